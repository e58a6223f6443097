"""Flags of both scripts: names, help, errors, and the round trip through config.json."""

import gc
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.bert4rec import TABLE_PRECISIONS
from model.network.config import TeachersConfig
from model.run.config_file import read_config, write_config
from model.serving.config import RecommendFlags
from model.settings.config import MAIN_FLAGS, EvalFlags, ExportFlags, RunConfig
from model.settings.flags import FlagParser, build, current_flags, flags_of, flatten
from model.tables.config import EMBEDDING_OPTIMIZERS
from model.tables.sharding_plan import FUSED_OPTIMIZERS
from pipeline.config import Config, flag
from pipeline.errors import UserError
from pipeline.sources.config import MOVIELENS, DataConfig
from pipeline.sources.download import CHECKSUMS
from tests.conftest import ROOT, TINY, RunMain, assert_one_line, environment, seal

# Every flag of TorchRec's examples/bert4rec/bert4rec_main.py that is about the model or the data.
EXAMPLE_FLAGS = """
    dataset_name dataset_path mode min_user_count min_item_count min_rating max_len mask_prob
    num_epochs lr decay_step gamma weight_decay train_batch_size val_batch_size test_batch_size
    emb_dim nhead num_layers export_root random_user_count random_item_count random_size dupe_factor
"""
# The command of its README, and its defaults.
EXAMPLE_COMMAND = (
    "--dataset_name random --mode dmp --min_user_count 5 --min_item_count 0 --max_len 100 "
    "--mask_prob 0.15 --dupe_factor 1 --emb_dim 64 --nhead 2 --num_layers 2 --lr 0.001 "
    "--decay_step 25 --gamma 0.1 --weight_decay 0 --num_epochs 100 --train_batch_size 128 "
    "--val_batch_size 128 --test_batch_size 128"
)


@dataclass(frozen=True)
class Inner(Config):
    """An inner group."""

    width: int = flag(4, "how wide", at_least=1, below=100, reason="paper is narrow")
    share: float = flag(0.5, "100 % of it", above=-2, aliases=("part",))
    limit: int | None = flag(None, "largest (default: none)", at_least=1)


@dataclass(frozen=True)
class Outer(Config):
    """All flags of a script."""

    inner: Inner = field(default_factory=Inner)
    name: str = flag("", "what to call it (default: nothing)")
    fast: bool = flag(False, "hurry")
    kind: str = flag("a", "which", choices=("a", "b"))


def parse(*arguments: str) -> Outer:
    return FlagParser("Test.", Outer).parse(arguments)


def test_without_arguments_all_defaults_hold() -> None:
    assert parse() == Outer()
    assert FlagParser("", RunConfig).parse([]) == RunConfig()


def test_values_of_every_type() -> None:
    found = parse("--width", "7", "--share=0.25", "--limit=3", "--name=x-y", "--fast=TRUE")
    assert found == Outer(Inner(7, 0.25, 3), name="x-y", fast=True)
    assert parse("--share", "-1").inner.share == -1.0


def test_hyphens_become_underscores_only_in_names() -> None:
    config = FlagParser("", RunConfig).parse(["--num-epochs=3", "--run-dir", "a-b", "--emb-dim=8"])
    assert config.training.num_epochs == 3
    assert config.output.run_dir == "a-b"
    assert config.encoder.emb_dim == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widht=3"], "unknown argument --widht=3: did you mean --width?"),
        (["--nonsense", "3"], "unknown argument --nonsense: see --help"),
        (["width=3"], "unknown argument width=3"),
        (["--wid=3"], "unknown argument --wid=3: did you mean --width?"),  # no abbreviations
        (["--width=wide"], "--width: invalid int value: 'wide'"),
        (["--width=2.5"], "--width: invalid int value: '2.5'"),
        (["--width"], "--width: expected one argument"),
        (["--share=half"], "--share: invalid float value: 'half'"),
        (["--share=nan"], "--share must be a finite number, not nan"),
        (["--share=inf"], "--share must be a finite number, not inf"),
        (["--fast=yes"], "--fast: must be true or false, not 'yes'"),
        (["--kind=c"], "--kind must be one of a, b, not 'c'"),
        (["--width=0"], "--width must be at least 1 and below 100, not 0: paper is narrow"),
        (["--width=100"], "--width must be at least 1 and below 100, not 100: paper is narrow"),
        (["--share=-2"], "--share must be above -2, not -2.0"),
        (["--part=-3"], "--share must be above -2, not -3.0"),
        (["--part=half"], "--part: invalid float value: 'half'"),
        (["--limit=0"], "--limit must be at least 1, not 0"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(*arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_python_values_are_checked_too() -> None:
    assert Inner(width=99).width == 99
    with pytest.raises(UserError, match="--width must be at least 1 and below 100, not 100"):
        Inner(width=100)
    with pytest.raises(UserError, match="--share must be a finite number, not nan"):
        Inner(share=float("nan"))
    assert Inner(limit=None).limit is None


def test_every_flag_of_a_file_or_folder_knows_the_home_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    given = FlagParser("", RunConfig).given(["--run_dir=~/a", "--export_root", "~/b"])
    assert given == {"run_dir": "/home/u/a", "export_root": "/home/u/b"}
    given = FlagParser("", EvalFlags).given(["--checkpoint=~", "--compare", "~/a", "b"])
    assert given == {"checkpoint": "/home/u", "compare": ["/home/u/a", "b"]}
    with pytest.raises(UserError, match=r"--run_dir: ~nobody-here/a: there is no such user's home"):
        FlagParser("", RunConfig).given(["--run_dir=~nobody-here/a"])
    assert RunConfig().teaching.folders == []
    assert TeachersConfig(teachers="~/a, b,/c").folders == ["/home/u/a", "b", "/c"]
    # These expand it where they are read, so that config.json is true on other machines.
    later = ("dataset_path", "split_path", "items_path", "cache_dir", "teachers", "histories")
    for config in (RunConfig, EvalFlags, ExportFlags, RecommendFlags):
        for name, entry in flags_of(config).items():
            text = entry.metadata["help"]
            words = ("folder", "file to write", "text file", "Parquet file")
            is_place = entry.type is not int and any(word in text for word in words)
            assert entry.metadata["is_path"] or not is_place or name in later, name


def test_an_old_name_sets_the_flag() -> None:
    assert parse("--part=0.25").inner.share == 0.25
    assert parse("--part=0.25", "--share=0.75").inner.share == 0.75
    assert "--part" not in FlagParser("", Outer).format_help()
    config = FlagParser("", RunConfig).parse(["--num_negatives=7", "--negative-seed=3"])
    assert (config.holdout.eval_negatives, config.holdout.eval_negatives_seed) == (7, 3)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        FlagParser("Trains.", Outer, main_flags=("name", "width")).given(arguments)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_shows_the_main_flags_and_help_all_the_rest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = printed(capsys, "--help")
    assert short.index("--name TEXT") < short.index("--width N")
    assert "--fast" not in short and "--share" not in short
    assert short.splitlines()[-1].startswith("--help-all shows all flags, by group")
    for spelling in ("--help-all", "--help_all"):
        everything = printed(capsys, spelling)
        assert "An inner group:" in everything
        assert everything.startswith("usage: ") and "Trains." in everything
        for name in flags_of(Outer):
            assert f"--{name} " in everything


def test_train_py_has_about_fifteen_main_flags() -> None:
    assert set(MAIN_FLAGS) <= flags_of(RunConfig).keys()
    assert 12 <= len(set(MAIN_FLAGS)) == len(MAIN_FLAGS) <= 18
    parser = FlagParser("", RunConfig, MAIN_FLAGS)
    assert parser.parse([]) == RunConfig()
    assert parser.parse(["--two_stream=true"]).mask.two_stream  # hidden, not unknown


@pytest.mark.parametrize(
    ("script", "arguments", "code"),
    [
        ("train", ["--help"], 0),
        ("train", ["--help-all"], 0),
        ("eval", ["--help-all"], 0),
        ("train", ["--lr=fast"], 2),
        ("train", ["--mask_prob=2"], 2),
        ("eval", ["--help"], 0),
        ("eval", ["--split=training"], 2),
    ],
)
def test_flags_are_read_without_slow_imports(script: str, arguments: list[str], code: int) -> None:
    command = [sys.executable, "-X", "importtime", ROOT / f"{script}.py", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == code
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "model.settings.config" in imported
    slow = {"torch", "torchrec", "fbgemm_gpu", "torchdata", "numpy", "pyarrow", "pandas"}
    assert not imported & slow
    if code:
        assert done.stderr.splitlines()[-1].startswith(f"{script}.py: --")


def test_choices_equal_those_of_the_libraries() -> None:
    assert tuple(CHECKSUMS) == MOVIELENS
    assert tuple(FUSED_OPTIMIZERS) == EMBEDDING_OPTIMIZERS
    assert tuple(TABLE_PRECISIONS) == flags_of(RunConfig)["table_precision"].metadata["choices"]


@pytest.mark.parametrize("config_class", [RunConfig, EvalFlags])
def test_every_flag_has_a_help_text_and_is_shown(config_class: type) -> None:
    flags, shown = flags_of(config_class), FlagParser("", config_class).format_help()
    for name, entry in flags.items():
        text = entry.metadata["help"]
        assert text.strip() == text and text[0] != "-" and not text.endswith("."), name
        assert f"--{name} " in shown, name
        none = (None, "", ())
        default = "(default:" if entry.default in none else f"(default:{entry.default})"
        assert default in "".join((text + shown).split()), name
        assert "default" in text or entry.default not in none, name
        if choices := entry.metadata["choices"]:
            assert entry.default in choices, name


def test_a_wrong_choice_is_refused_by_config_files_too() -> None:
    for name, entry in flags_of(RunConfig).items():
        if entry.metadata["choices"]:
            with pytest.raises(UserError, match=f"--{name} must be one of"):
                build(RunConfig, {name: "nonsense"})


def test_all_flags_of_the_example_exist() -> None:
    assert set(EXAMPLE_FLAGS.split()) <= flags_of(RunConfig).keys()


def test_the_example_s_own_values_are_accepted() -> None:
    config = FlagParser("", RunConfig).parse(EXAMPLE_COMMAND.split())
    assert config.sharding.mode == "dmp"
    assert config.training.gamma == 0.1


def changed(config: Any) -> RunConfig:
    """With some flags unlike their defaults."""
    return replace(
        config,
        data=replace(config.data, dataset_name="random", min_rating=3.5),
        training=replace(config.training, patience=4),
        encoder=replace(config.encoder, emb_dim=32),
    )


def test_flatten_and_build_are_inverse() -> None:
    config = changed(RunConfig())
    flat = flatten(config)
    assert list(flat) == list(flags_of(RunConfig))
    assert build(RunConfig, flat) == config
    assert build(RunConfig, json.loads(json.dumps(flat))) == config
    assert build(RunConfig, {"emb_dim": 32}).training == RunConfig().training


def test_config_json_and_back(tmp_path: Path) -> None:
    config = changed(RunConfig())
    write_config(tmp_path, flatten(config), {"num_items": 7, "catalog": "abc"})
    found = read_config(tmp_path)
    assert build(RunConfig, found["flags"]) == config
    assert (found["num_items"], found["catalog"]) == (7, "abc")
    assert found["versions"].keys() >= {"torch", "torchrec", "fbgemm-gpu", "python", "device"}
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"emb_dim": "64"}, "--emb_dim must be of type int, not '64'"),
        ({"emb_dim": True}, "--emb_dim must be of type int, not True"),
        ({"emb_dim": None}, "--emb_dim must be of type int, not None"),
        ({"lr": float("nan")}, "--lr must be a finite number, not nan"),
        ({"embdim": 64}, "unknown settings embdim"),
        ({"num_negatives": 64}, "unknown settings num_negatives"),
    ],
)
def test_a_file_of_settings_is_checked(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(RunConfig, flat)


def test_types_of_a_caller_s_settings_are_checked() -> None:
    with pytest.raises(UserError, match="--min_user_count must be of type int, not '3'"):
        DataConfig(min_user_count="3")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--columns must be of type str, not \\['u', 'i'\\]"):
        DataConfig(columns=["u", "i"])  # type: ignore[arg-type]
    assert DataConfig(min_user_count=np.int64(3)).min_user_count == 3  # type: ignore[arg-type]
    assert DataConfig(min_rating=np.float32(3)).min_rating == 3  # type: ignore[arg-type]


EARLIER = {
    "attention_dropout": 0.0,
    "positions": "none",
    "acceleration": "auto",
    "num_negatives": 50,
    "negative_seed": 3,
    "emb_dim": 32,
}


def test_flags_of_earlier_versions_get_their_new_names() -> None:
    assert current_flags(RunConfig, EARLIER) == {
        "positions": "none",
        "acceleration": "auto",
        "eval_negatives": 50,
        "eval_negatives_seed": 3,
        "emb_dim": 32,
    }
    assert current_flags(RunConfig, {"attention_dropout": 0}) == {}  # JSON of another writer
    for value in ("graphs", "compile"):
        assert current_flags(RunConfig, {"acceleration": value}) == {"acceleration": "auto"}
    flat = flatten(RunConfig())
    assert current_flags(RunConfig, flat) == flat


UNCHANGED = {"positions": "rotary", "attention_dropout": 0.0, "acceleration": "graphs"}
RETIRED = [("positions", "bias"), ("attention_dropout", 0.1)]


@pytest.mark.parametrize(("name", "value"), RETIRED)
def test_removed_flag_values_are_rejected(name: str, value: Any) -> None:
    message = f"made with --{name} {value}, which this version no longer has"
    with pytest.raises(UserError, match=message):
        current_flags(RunConfig, EARLIER | {name: value})


def rewrite_flags(folder: Path, **flags: Any) -> None:
    """Change config.json to the form of an earlier version."""
    path = folder / "config.json"
    recorded = json.loads(path.read_text())
    for name in ("eval_negatives", "eval_negatives_seed"):
        recorded["flags"].pop(name, None)
    recorded["flags"] |= {"num_negatives": 30, "negative_seed": 0, **flags}
    path.write_text(json.dumps(recorded))
    seal(folder)


def test_a_run_of_an_earlier_version_is_evaluated_resumed_exported_and_teaches(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    run, common = tmp_path / "run", (*TINY, f"--cache_dir={cache_dir}", "--eval_negatives=30")
    assert run_main("train", *common, f"--run_dir={run}", "--num_epochs=1").code == 0
    resume = ("train", *common, f"--run_dir={run}", "--resume=auto", "--num_epochs=2")
    taught = ("train", *common, f"--run_dir={tmp_path / 'taught'}", f"--teachers={run}")
    evaluate = ("eval", f"--checkpoint={run}")
    for name, value in RETIRED:
        for folder in (run, run / "model"):
            rewrite_flags(folder, **(UNCHANGED | {name: value}))
        for command in (evaluate, resume, taught, ("eval", f"--checkpoint={run / 'model'}")):
            message = f"config.json: made with --{name} {value}, which this version no longer has"
            assert_one_line(run_main(*command), command[0], message)
    for folder in (run, run / "model"):
        rewrite_flags(folder, **UNCHANGED)
        assert run_main("eval", f"--checkpoint={folder}").code == 0
    for command in (taught, (*resume, f"--export_root={tmp_path / 'exported'}")):
        outcome = run_main(*command)
        assert outcome.code == 0, outcome.err
    assert run_main("eval", f"--checkpoint={tmp_path / 'exported'}").code == 0
    assert "attention_dropout" not in json.loads((run / "config.json").read_text())["flags"]


def test_a_refused_run_frees_its_folder_at_once(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    run = ("train", *TINY, f"--cache_dir={cache_dir}", f"--run_dir={tmp_path / 'run'}")
    assert run_main(*run, "--num_epochs=1").code == 0
    gc.disable()  # an error that holds itself would keep the lock
    try:
        for _ in range(2):
            outcome = run_main(*run, "--resume=auto", "--num_epochs=1", "--emb_dim=8")
            assert outcome.code == 2 and "in use" not in outcome.err
        assert run_main(*run, "--resume=auto", "--num_epochs=2").code == 0
    finally:
        gc.enable()


def test_whole_numbers_of_a_file_become_floats() -> None:
    assert isinstance(build(RunConfig, {"lr": 1}).optimizer.lr, float)
    assert build(RunConfig, {"patience": None}).training.patience is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run folder: config.json cannot be read"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"flags": {}}', "is damaged"),
    ],
)
def test_a_folder_without_a_proper_config(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


def test_eval_needs_a_checkpoint() -> None:
    with pytest.raises(UserError, match="--checkpoint is needed"):
        EvalFlags()
    with pytest.raises(UserError, match="--batch_size must be at least 1, not 0"):
        EvalFlags(checkpoint="x", batch_size=0)
    # A run with --split_path reads it as that.
    with pytest.raises(UserError, match=r"--dataset_path ~nobody\.here: there is no such"):
        EvalFlags(checkpoint="x", dataset_path="~nobody.here")
