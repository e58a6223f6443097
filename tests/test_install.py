"""The requirement files agree with each other, with the Makefile and with the imports."""

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
PINNED = ("torch", "torchrec", "torchdata", "fbgemm-gpu")
OWN = {"pipeline", "model", "tests", "benchmarks", "train", "eval", "recommend", "export"}


def requirements(name: str) -> dict[str, str]:
    """Package -> version specifier."""
    lines = (ROOT / name).read_text().splitlines()
    wanted = [line for line in lines if line.strip() and not line.startswith("#")]
    found = {}
    for line in wanted:
        package, specifier = re.fullmatch(r"([\w-]+)([<>=].*)?", line).groups()
        assert package not in found, f"{name}: {package} twice"
        found[package] = specifier or ""
    return found


def test_both_files_have_the_same_requirements() -> None:
    gpu, cpu = requirements("requirements.txt"), requirements("requirements-cpu.txt")
    common = gpu.keys() & cpu.keys()
    assert common >= {"torch", "torchdata", "numpy", "pyarrow", "safetensors", "tensorboard"}
    assert {name: gpu[name] for name in common} == {name: cpu[name] for name in common}
    # FBGEMM has two builds of one release, which must not both be installed; TorchRec requires the
    # GPU build, therefore the Makefile installs it without dependencies on CPU.
    assert gpu.keys() - cpu.keys() == {"fbgemm-gpu", "torchrec"}
    assert gpu["fbgemm-gpu"] == cpu["fbgemm-gpu-cpu"]
    comment = (ROOT / "requirements-cpu.txt").read_text()
    assert re.findall(r"torchrec==[\d.]+\d", comment) == [f"torchrec{gpu['torchrec']}"]
    # The Makefile reads TorchRec's version from requirements.txt.
    assert not re.findall(r"torchrec==\d", (ROOT / "Makefile").read_text())


def test_torch_torchrec_and_fbgemm_are_pinned() -> None:
    for name in ("requirements.txt", "requirements-cpu.txt"):
        for package, specifier in requirements(name).items():
            pinned = package.removesuffix("-cpu") in PINNED
            assert specifier.startswith("==") == pinned, f"{name}: {package}{specifier}"


def test_torchrec_and_fbgemm_are_of_one_release() -> None:
    gpu = requirements("requirements.txt")
    release = re.compile(r"==(\d+\.\d+)\.")
    assert release.match(gpu["torchrec"]).group(1) == release.match(gpu["fbgemm-gpu"]).group(1)


def test_development_tools_have_their_own_file() -> None:
    tools = requirements("requirements-dev.txt")
    assert tools.keys() >= {"mypy", "pytest", "pytest-timeout", "pytest-xdist", "ruff"}
    assert not tools.keys() & requirements("requirements.txt").keys()
    assert not tools.keys() & requirements("requirements-cpu.txt").keys()


def test_every_import_is_required() -> None:
    run_time = {*requirements("requirements-cpu.txt"), "fbgemm_gpu", "torchrec"}
    library = [file for room in ("pipeline", "model") for file in (ROOT / room).rglob("*.py")]
    assert len(library) > 60
    served = ROOT / "model/programs/recommender.py"  # leaves the project in an export
    library.remove(served)
    assert_imports([served], {"numpy", "onnxruntime"})
    assert_imports([*library, *ROOT.glob("*.py")], run_time)
    tools = [file for folder in ("tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    optional = {"triton"}  # comes with torch for GPUs; tests without it are skipped
    assert_imports(tools, run_time | requirements("requirements-dev.txt").keys() | optional)


def assert_imports(files: Iterable[Path], packages: set[str]) -> None:
    """The files import nothing but the standard library, the project and ``packages``."""
    known = {package.replace("-", "_") for package in packages} | OWN | sys.stdlib_module_names
    for file in files:
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in {name.split(".")[0] for name in names}:
                assert module in known, f"{file.relative_to(ROOT)} imports {module}"
