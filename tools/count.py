"""The sum of pytest's JUnit reports, in pytest's words: `12 passed, 0 failed, 3 skipped`."""

import sys
from xml.etree import ElementTree


def main(files: list[str]) -> None:
    total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for file in files:
        for suite in ElementTree.parse(file).iter("testsuite"):
            for key in total:
                total[key] += int(suite.get(key, 0))
    bad = total["failures"] + total["errors"]
    sys.stdout.write(f"{total['tests'] - bad - total['skipped']} passed, {bad} failed, {total['skipped']} skipped\n")


if __name__ == "__main__":
    main([file for file in sys.argv[1:] if "*" not in file])
