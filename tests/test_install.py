"""The two requirement files and the Makefile install the same stack."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PINNED = ("torch", "torchrec", "torchdata", "fbgemm-gpu")


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


def test_both_files_ask_for_the_same() -> None:
    gpu, cpu = requirements("requirements.txt"), requirements("requirements-cpu.txt")
    common = gpu.keys() & cpu.keys()
    assert common >= {"torch", "torchdata", "numpy", "pandas", "pyarrow", "pytest", "ruff"}
    assert {name: gpu[name] for name in common} == {name: cpu[name] for name in common}
    # FBGEMM has two builds of one release that must never be installed together; TorchRec would
    # bring the wrong one in, so the Makefile installs it by itself on CPU.
    assert gpu.keys() - cpu.keys() == {"fbgemm-gpu", "torchrec"}
    assert gpu["fbgemm-gpu"] == cpu["fbgemm-gpu-cpu"]
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"torchrec==[\d.]+", makefile) == [f"torchrec{gpu['torchrec']}"]
    comment = (ROOT / "requirements-cpu.txt").read_text()
    assert re.findall(r"torchrec==[\d.]+\d", comment) == [f"torchrec{gpu['torchrec']}"]


def test_what_belongs_together_is_pinned() -> None:
    for name in ("requirements.txt", "requirements-cpu.txt"):
        for package, specifier in requirements(name).items():
            pinned = package.removesuffix("-cpu") in PINNED
            assert specifier.startswith("==") == pinned, f"{name}: {package}{specifier}"


def test_torchrec_and_fbgemm_are_of_one_release() -> None:
    gpu = requirements("requirements.txt")
    assert gpu["torchrec"] == gpu["fbgemm-gpu"]


def test_every_import_of_the_project_is_required() -> None:
    known = {package.replace("-", "_") for package in requirements("requirements-cpu.txt")}
    known |= {"fbgemm_gpu", "torchrec", "pipeline", "model", "tests", "benchmarks", "train"}
    files = [file for part in ("pipeline", "model") for file in (ROOT / part).rglob("*.py")]
    assert len(files) > 20
    for file in [*files, ROOT / "train.py", ROOT / "eval.py"]:
        for module in re.findall(r"^(?:import|from) (\w+)", file.read_text(), re.MULTILINE):
            import_is_known = module in known or module in sys.stdlib_module_names
            assert import_is_known, f"{file.name} imports {module}"
