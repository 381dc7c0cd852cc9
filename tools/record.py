"""Run a command on a terminal of 80 columns and draw what stays on the screen as an SVG: record.py FILE.svg COMMAND...

    ./ramet --version && .venv/bin/python tools/record.py docs/tour.svg ./ramet tour

The picture is what the program wrote, progress bars that went away again gone, nothing edited.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios

from rich.console import Console
from rich.text import Text

COLUMNS, ROWS = 80, 50
_ESCAPE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|\x1b[()][A-Z0-9]|\x1b\][^\x07]*\x07|\x1b[=>78]")


class Screen:
    """The few control sequences that line-oriented programs use: colours, carriage return, cursor up, erase. Lines scroll up and stay."""

    def __init__(self) -> None:
        self.lines: list[list[tuple[str, str]]] = [[]]
        self.row = self.column = 0
        self.style = ""

    def feed(self, text: str) -> None:
        at = 0
        while at < len(text):
            if found := _ESCAPE.match(text, at):
                self._control(found[1] or "", found[2] or "")
                at = found.end()
            else:
                self._put(text[at])
                at += 1

    def _put(self, character: str) -> None:
        if character == "\n":
            self.row += 1
        elif character == "\r":
            self.column = 0
        elif character >= " ":
            if self.column >= COLUMNS:
                self.row, self.column = self.row + 1, 0
            line = self._line()
            line.extend([(" ", "")] * (self.column + 1 - len(line)))
            line[self.column] = (character, self.style)
            self.column += 1

    def _line(self) -> list[tuple[str, str]]:
        while self.row >= len(self.lines):
            self.lines.append([])
        return self.lines[self.row]

    def _control(self, parameters: str, command: str) -> None:
        count = int(parameters) if parameters.isdigit() else 1
        if command == "m":
            self.style = "" if parameters in ("", "0") else f"{self.style}\x1b[{parameters}m"
        elif command == "A":
            self.row = max(0, self.row - count)
        elif command == "K":
            line = self._line()
            del line[0 if parameters == "2" else self.column :]
        elif command == "J":
            self._line()
            del self.lines[self.row + 1 :]
            del self.lines[self.row][self.column :]

    def ansi(self) -> str:
        """The lines, with their colours."""
        return "\n".join("".join(f"{style}{char}\x1b[0m" if style else char for char, style in line) for line in self.lines).rstrip()


def run(argv: list[str]) -> tuple[str, int]:
    """What the command wrote to its terminal, and its exit status. It is shown here as it comes."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
        os.execvp(argv[0], argv)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    parts = []
    while True:
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        parts.append(part)
        os.write(sys.stdout.fileno(), part)
    return b"".join(parts).decode(errors="replace"), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(file: str, *argv: str) -> int:
    output, status = run(list(argv))
    screen = Screen()
    screen.feed(output)
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(Text.from_ansi(f"\x1b[32m$\x1b[0m {' '.join(argv)}\n{screen.ansi()}"), soft_wrap=False)
        picture = console.export_svg(title=" ".join(argv))
    picture = re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.DOTALL)  # a picture in a repository fetches nothing
    # Some viewers collapse even the no-break spaces that rich writes.
    with open(file, "w") as out:
        lines = picture.replace("<svg ", '<svg xml:space="preserve" ', 1).splitlines()
        out.write("".join(f"{line.rstrip(' ')}\n" for line in lines))
    return status


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
