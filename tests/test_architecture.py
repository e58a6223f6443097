"""Import rules of docs/architecture.md, read from the source without importing it.

A *part* is a direct child of pipeline/ or model/: a room (a folder) or a single file.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

DOCUMENT = ROOT / "docs" / "architecture.md"
MAX_FILES, MAX_LINES = 12, 350
PACKAGES = ("pipeline", "model")
# Modules that plain torch code and configs must not load, so that --help is fast.
TORCHREC = {"torchrec", "fbgemm_gpu"}
TORCH = TORCHREC | {"torch", "torchdata"}


def order() -> dict[str, int]:
    """Part -> its level; a part may import parts of lower levels."""
    text = "\n".join(re.findall(r"^```\w*\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S))
    levels: dict[str, int] = {}
    for package, line in re.findall(r"^(model|pipeline): (.+ < .+)$", text, re.M):
        for level, names in enumerate(line.split("<")):
            for name in names.split(","):
                part = f"{package}.{name.strip()}"
                assert part not in levels, f"{part} has two places in the order"
                levels[part] = level
    return levels


@cache
def modules() -> dict[str, Path]:
    """Module -> its file, of both packages; a package's own module is its ``__init__.py``."""
    found = {}
    for file in sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def rooms() -> list[Path]:
    return sorted({file.parent for file in modules().values()} - {ROOT / p for p in PACKAGES})


def part_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


@cache
def imports(file: Path, at_once: bool = False) -> set[str]:
    """Full names that a file imports; ``at_once``: only what runs when the file is loaded."""
    found = set()
    for node in _at_once(ast.parse(file.read_text())) if at_once else _all(file):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & modules().keys()
            found |= inside or {node.module or ""}
    return found


def _all(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text()))


def _at_once(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        if not is_typing and not isinstance(child, (ast.FunctionDef, ast.Lambda)):
            yield child
            yield from _at_once(child)


def loaded(module: str) -> dict[str, str]:
    """All modules that an import loads: name -> the project module that imports it."""
    found, waiting = {module: ""}, [module]
    while waiting:
        current = waiting.pop()
        new = set(imports(modules()[current], at_once=True))
        parents = current.split(".")[:-1]
        new |= {".".join(parents[:depth]) for depth in range(1, len(parents) + 1)}
        for name in new - found.keys():
            found[name] = current
            if name in modules():
                waiting.append(name)
    return found


def assert_not_loaded(module: str, packages: set[str]) -> None:
    found = loaded(module)
    for name in sorted(found):
        if name.split(".")[0] in packages:
            chain = [name]
            while chain[-1]:
                chain.append(found[chain[-1]])
            pytest.fail(f"{module} loads {name}: {' < '.join(chain[:-1])}")


def test_every_part_has_a_level() -> None:
    levels, parts = order(), {part_of(module) for module in modules()} - {*PACKAGES}
    assert levels.keys() == parts, f"only in one of both: {parts ^ levels.keys()}"


def test_parts_import_lower_parts_only() -> None:
    levels, broken = order(), []
    for module, file in modules().items():
        for name in imports(file):
            one, other = part_of(module), part_of(name)
            if name.split(".")[0] != module.split(".")[0] or one == other or "." not in other:
                continue
            both_files = modules()[one].name != "__init__.py" != modules()[other].name
            allowed = levels[one] > levels[other] or (both_files and levels[one] == levels[other])
            if not allowed:
                broken.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not broken, broken


def test_no_import_cycle() -> None:
    graph = {
        module: [name for name in imports(file) if name in modules()]
        for module, file in modules().items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' > '.join(error.args[1])}")


def test_the_pipeline_does_not_import_the_model() -> None:
    for module, file in modules().items():
        if module.startswith("pipeline"):
            bad = {name for name in imports(file) if name.split(".")[0] in ("model", "train")}
            assert not bad, f"{file.relative_to(ROOT)} imports {bad}"


def test_nothing_imports_the_scripts() -> None:
    for file in modules().values():
        bad = imports(file) & {"train", "eval", "tests", "benchmarks"}
        assert not bad, f"{file.relative_to(ROOT)} imports {bad}"


def test_the_network_itself_imports_no_torchrec() -> None:
    for room in ("kernels", "losses", "network"):
        for file in (ROOT / "model" / room).glob("*.py"):
            bad = {name for name in imports(file) if name.split(".")[0] in TORCHREC}
            assert not bad, f"{file.relative_to(ROOT)} imports {bad}"


def test_the_network_loads_without_torchrec() -> None:
    for module in modules():
        if part_of(module) in ("model.kernels", "model.losses", "model.network"):
            assert_not_loaded(module, TORCHREC)


def test_configs_load_without_torch() -> None:
    configs = [module for module in modules() if module.endswith(".config")]
    assert configs
    for module in configs:
        assert_not_loaded(module, TORCH)


def test_rooms_are_small() -> None:
    assert len(rooms()) >= 14
    for room in rooms():
        files = [file for file in room.glob("*.py") if file.name != "__init__.py"]
        assert len(files) <= MAX_FILES, f"{room.relative_to(ROOT)} has {len(files)} files"
        assert (room / "__init__.py").exists(), f"{room.relative_to(ROOT)} has no __init__.py"
    for file in modules().values():
        assert file.name not in ("utils.py", "helpers.py", "misc.py"), "name it after what it does"
        lines = len(file.read_text().splitlines())
        assert lines <= MAX_LINES, f"{file.relative_to(ROOT)} has {lines} lines"


def test_rooms_have_a_docstring_that_names_their_files() -> None:
    """A room's ``__init__.py`` is a docstring that names all of its files, and imports nothing."""
    missing = {}
    for room in rooms():
        tree = ast.parse((room / "__init__.py").read_text())
        text = ast.get_docstring(tree) or ""
        stems = {file.stem for file in room.glob("*.py")} - {"__init__"}
        if unnamed := {stem for stem in stems if not re.search(rf"\b{stem}\b", text)}:
            missing[str(room.relative_to(ROOT))] = unnamed
        assert len(tree.body) <= 1, f"{room.relative_to(ROOT)}/__init__.py is not a docstring alone"
    assert not missing, f"__init__.py does not name {missing}"
