"""The table of layers.toml, held against the imports: from rows above, never a peer's private names, never in a circle."""

from __future__ import annotations

import ast
import graphlib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import ramet

SOURCE = Path(ramet.__file__).parent
NOT_OURS_TO_LAYER = ("migrations", "share")


@dataclass(frozen=True)
class Import:
    """A name that a module imports. name: empty for the module itself."""

    importer: str
    module: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.module or 'ramet'}{f' ({self.name})' if self.name else ''}"


def module_name(path: Path) -> str:
    """`vm.argv` for vm/argv.py, `vm` for vm/__init__.py, the empty name for the package itself."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] not in NOT_OURS_TO_LAYER}


def resolve(dotted: str) -> tuple[str, str] | None:
    """`ramet.vm.argv.build` as (`vm.argv`, `build`); None for what is not ours."""
    if dotted != "ramet" and not dotted.startswith("ramet."):
        return None
    parts = dotted.split(".")[1:]
    for cut in range(len(parts), -1, -1):
        if ".".join(parts[:cut]) in MODULES:
            return ".".join(parts[:cut]), ".".join(parts[cut:])
    raise AssertionError(dotted)


def imports(importer: str, tree: ast.AST) -> Iterator[Import]:
    """Every import, also those inside functions."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}:{node.lineno}: write absolute imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if found := resolve(name):
                yield Import(importer, found[0], found[1], node.lineno)


def private_uses(importer: str, tree: ast.AST) -> Iterator[str]:
    """`module._name` of modules imported as a whole."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ramet"):
            aliases |= {
                a.asname or a.name: f"{node.module}.{a.name}"
                for a in node.names
                if (resolve(f"{node.module}.{a.name}") or ("", "x"))[1] == ""
            }
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases):
            continue
        if node.attr.startswith("_") and not node.attr.startswith("__"):
            yield f"{importer}:{node.lineno} uses {aliases[node.value.id]}.{node.attr}"


def matches(module: str, pattern: str) -> bool:
    return module == pattern or (pattern.endswith(".*") and (module == pattern[:-2] or module.startswith(pattern[:-1])))


TABLE = tomllib.loads((Path(__file__).parent / "layers.toml").read_text())
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
IMPORTS = [each for name, tree in TREES.items() for each in imports(name, tree)]


def row(module: str) -> int:
    rows = [int(number) for number, patterns in TABLE["rows"].items() if any(matches(module, pattern) for pattern in patterns)]
    assert len(rows) == 1, f"{module or 'ramet'} stands in {len(rows)} rows of layers.toml, not in one"
    return rows[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_each_module_is_in_one_row_and_imports_from_above(module: str) -> None:
    here = row(module) if module else max(map(int, TABLE["rows"]))  # the package re-exports the SDK when it is asked for
    low = [
        f"{each}, which is in row {row(each.module)} below row {here}"
        for each in IMPORTS
        if each.importer == module and row(each.module) > here
    ]
    assert not low


def test_no_private_names_of_others() -> None:
    found = [str(each) for each in IMPORTS if each.name.startswith("_") and not each.name.startswith("__") and each.importer != each.module]
    found += [use for name, tree in TREES.items() for use in private_uses(name, tree)]
    assert not found


def test_no_circles() -> None:
    # a package's __init__ may gather its own modules: it is the same noun
    graph = {name: {each.module for each in IMPORTS if each.importer == name and each.module not in (name, "")} for name in MODULES if name}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}", pytrace=False)


@pytest.mark.parametrize("pattern", sorted(TABLE["only"]))
def test_edges_import_only_what_they_may(pattern: str) -> None:
    allowed = TABLE["only"][pattern]
    found = [
        str(each)
        for each in IMPORTS
        if matches(each.importer, pattern) and not any(matches(each.module, one) for one in [*allowed, pattern])
    ]
    assert not found


def test_the_table_names_no_module_that_is_gone() -> None:
    patterns = [pattern for patterns in TABLE["rows"].values() for pattern in patterns] + list(TABLE["only"])
    gone = [pattern for pattern in patterns if not any(matches(module, pattern) for module in MODULES)]
    assert not gone


def test_the_check_sees_what_it_forbids() -> None:
    tree = ast.parse(
        "def f():\n    from ramet.db import _MIGRATIONS\n    import ramet.engine\n    from ramet import process\n    process._end()\n"
    )
    assert [(each.module, each.name) for each in imports("x", tree)] == [("db", "_MIGRATIONS"), ("engine", ""), ("process", "")]
    assert list(private_uses("x", tree)) == ["x:5 uses ramet.process._end"]
    assert row("engine") > row("process")
