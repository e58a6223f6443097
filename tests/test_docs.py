"""Commands, flags and paths in README.md and docs/ exist; README's first minute runs."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from benchmarks.rows import ROWS, SETS
from model.serving.config import RecommendFlags
from model.settings.config import EvalFlags, ExportFlags, RunConfig
from model.settings.flags import FlagParser, build
from model.settings.recipes import with_recipe
from tests.conftest import ROOT, TINY, run_process

README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md")), *(ROOT / "benchmarks").glob("*.md")]
PROGRAMS = ("python", "torchrun", "make", "pip")
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
MEMBER = re.compile(r"`([A-Z]\w+)\.(\w+)")  # of a class, as `TrainLoader.epoch`
PATH = re.compile(r"\b(?:pipeline|model|docs|benchmarks|tests)/[\w/.-]*\w")


def commands(text: str) -> Iterator[list[str]]:
    """Words of each command, in blocks and in lines of text; without flags of <placeholders>."""
    text = re.sub(r"(--\w+ )?<[^>\n]+>", "", text)
    for block in FENCED.findall(text):
        unfinished = ""
        for line in block.splitlines():
            unfinished += line.removesuffix("\\") + "\n"
            if line.endswith("\\"):
                continue
            try:
                words = shlex.split(unfinished, comments=True)
            except ValueError:  # an open quotation
                continue
            unfinished = ""
            for command in " ".join(map(shlex.quote, words)).split(" '&&' "):
                yield shlex.split(command)
    for span in re.findall(r"`([^`]+)`", FENCED.sub("", text)):
        yield span.replace('"', "").split()


def commands_of(document: Path) -> list[list[str]]:
    found = [words for words in commands(document.read_text()) if words]
    found = [words for words in found if words[0] in PROGRAMS and words[1:]]
    return [words for words in found if not {"...", "--help", "--help-all"} & {*words}]


def check(words: list[str]) -> None:
    """All flags and files of a command exist."""
    program, *arguments = words
    if program == "make":
        for target in arguments:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    elif program == "pip":
        for file in re.findall(r"-r (\S+)", " ".join(arguments)):
            assert (ROOT / file).exists(), file
    elif program == "torchrun" and ".py" in " ".join(arguments):
        launch = get_args_parser().parse_args(arguments)
        script = [launch.training_script, *launch.training_script_args]
        check_script(*(script[1:] if launch.no_python else script))
    elif Path(arguments[0]).name == "recommender.py":
        assert (ROOT / "model/programs/recommender.py").exists()  # which export.py copies
    elif arguments[0].endswith(".py"):
        check_script(*arguments)


def check_script(script: str, *arguments: str) -> None:
    assert (ROOT / script).exists(), script
    if script == "train.py":
        build(RunConfig, with_recipe(FlagParser("", RunConfig).given(arguments)))
    elif script in ("eval.py", "benchmarks/evaluation.py"):
        FlagParser("", EvalFlags).given(arguments)
    elif script == "recommend.py":
        FlagParser("", RecommendFlags).parse(arguments)
    elif script == "export.py":
        FlagParser("", ExportFlags).parse(arguments)
    else:
        check_benchmark(script, *arguments)


def check_benchmark(script: str, *arguments: str) -> None:
    """A benchmark's own flags are in its source; other flags belong to train.py."""
    calls = [node for node in ast.walk(ast.parse((ROOT / script).read_text())) if is_flag(node)]
    own = {call.args[0].value for call in calls}
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    flag = ""
    for word in arguments[:cut]:
        flag = word.split("=")[0] if word.startswith("--") else flag
        known = flag in own or script.endswith("quality.py") or not flag
        assert known, f"{script} has no {flag}"
        if flag == "--rows" and word != flag:
            assert word in ROWS or word in SETS, f"{script} has no row {word}"
    FlagParser("", RunConfig).given(arguments[cut + 1 :])


def is_flag(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(document: Path) -> None:
    for words in commands_of(document):
        try:
            check(words)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{' '.join(words)}: {error!r}")


def test_the_readme_has_commands() -> None:
    programs = {words[0] for words in commands_of(README)}
    assert programs >= {"python", "torchrun", "make"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_and_links_exist(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    missing += [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    assert not missing, f"{document.name} names {missing}"


def test_members_of_classes_exist() -> None:
    texts = [
        file.read_text() for room in ("pipeline", "model") for file in ROOT.glob(f"{room}/**/*.py")
    ]
    classes: dict[str, str] = {}
    for text in texts:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                classes[node.name] = classes.get(node.name, "") + ast.unparse(node)
    named = [found for each in DOCUMENTS for found in MEMBER.findall(each.read_text())]
    known = [(owner, member) for owner, member in named if owner in classes]
    assert known
    for owner, member in known:
        assert re.search(rf"\b{member}\b", classes[owner]), f"{owner} has no {member}"


def test_the_first_minute(tmp_path: Path) -> None:
    (section,) = re.findall(r"^## One minute\n(.*?)^## ", README.read_text(), re.M | re.S)
    found = [words for words in commands(section) if words]
    makefile = (ROOT / "Makefile").read_text()
    of_train = re.findall(r"^train:.*\n\t\$\(BIN\)/(python .+)", makefile, re.M)
    scripts = [words for words in found if words[0] == "python" and "--help" not in words]
    scripts += [of_train[0].split() for words in found if words == ["make", "train"]]
    assert scripts
    for _, script, *arguments in scripts:
        small = [*TINY, f"--cache_dir={tmp_path / 'cache'}"]
        outcome = run_process(ROOT / script, *arguments, *small, cwd=tmp_path)
        assert outcome.code == 0, outcome.err
        assert "full, best possible on this data" in outcome.out
        assert [*tmp_path.glob("runs/*/eval_test.json")]
