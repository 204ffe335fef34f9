"""The arrows between the rooms, read from the source without importing it."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gnetlab"
ROOMS = {
    "net": set(),
    "measure": {"net"},
    "draw": set(),
    "report": set(),
    "cli": {"report", "measure", "draw", "net"},
    "explorer": {"measure", "draw", "net"},
}
FORBIDDEN = {
    "net": {"matplotlib", "pandas"},
    "measure": {"matplotlib"},
    "draw": {"torch"},
    "report": {"torch", "matplotlib"},
}


def imports(path: Path) -> list[tuple[str, int]]:
    """Imported modules with the column of the statement (0: at the module's top level)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.col_offset) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            found += [(base, node.col_offset)]
            found += [(f"{base}.{alias.name}", node.col_offset) for alias in node.names]
    return found


def files(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    found = [single] if single.is_file() else sorted((PACKAGE / room).glob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_along_the_arrows(room):
    for path in files(room):
        for name, _ in imports(path):
            if name.startswith("gnetlab."):
                target = name.split(".")[1]
                assert target in ROOMS[room] | {room} or target == "__version__", (path.name, name)
            assert name.split(".")[0] not in FORBIDDEN.get(room, set()), (path.name, name)


def test_torchvision_is_imported_only_where_it_is_used():
    for path in PACKAGE.rglob("*.py"):
        for name, column in imports(path):
            if name.split(".")[0] == "torchvision":
                assert column > 0, f"{path} imports torchvision at its top level"


def test_the_package_itself_imports_nothing_heavy():
    names = {name.split(".")[0] for name, _ in imports(PACKAGE / "__init__.py")}
    assert names == {"importlib"}


def test_hooks_are_registered_in_one_file_only():
    pattern = re.compile(r"register_\w*hook")
    users = [p.name for p in PACKAGE.rglob("*.py") if pattern.search(p.read_text())]
    assert users == ["hooks.py"]


def test_no_drawer_for_odds_and_ends():
    names = {path.stem for path in PACKAGE.rglob("*.py")}
    assert not names & {"utils", "common", "helpers", "base", "misc"}
