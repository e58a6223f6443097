"""Flags of both scripts: their names, help, errors, and the way into a file and back."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from model.run.config import RunConfig
from model.run.flags import FlagParser, build, flags_of, flatten
from model.run.folder import read_config, write_config
from model.run.trained import EvalFlags
from pipeline.errors import UserError

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
class Inner:
    """An inner group."""

    width: int = field(default=4, metadata={"help": "how wide"})
    share: float = field(default=0.5, metadata={"help": "100 % of it"})
    limit: int | None = field(default=None, metadata={"help": "if any"})


@dataclass(frozen=True)
class Outer:
    """All flags of a script."""

    inner: Inner = field(default_factory=Inner)
    name: str = field(default="", metadata={"help": "what to call it"})
    fast: bool = field(default=False, metadata={"help": "hurry"})
    kind: str = field(default="a", metadata={"help": "which", "choices": ("a", "b")})


def parse(*arguments: str) -> Outer:
    return FlagParser("Test.", Outer).parse(arguments)


def test_without_arguments_all_defaults_hold() -> None:
    assert parse() == Outer()
    assert FlagParser("", RunConfig).parse([]) == RunConfig()


def test_values_of_every_type() -> None:
    found = parse("--width", "7", "--share=0.25", "--limit=3", "--name=x-y", "--fast=TRUE")
    assert found == Outer(Inner(7, 0.25, 3), name="x-y", fast=True)
    assert parse("--share", "-1").inner.share == -1.0


def test_hyphens_are_underscores_in_names_alone() -> None:
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
        (["--kind=c"], "--kind: invalid choice: 'c'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(*arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config_class", [RunConfig, EvalFlags])
def test_every_flag_says_what_it_is_and_is_shown(config_class: type) -> None:
    flags, shown = flags_of(config_class), FlagParser("", config_class).format_help()
    for name, entry in flags.items():
        text = entry.metadata["help"]
        assert text.strip() == text and text[0] != "-" and not text.endswith("."), name
        assert f"--{name} " in shown, name
        if entry.default not in (None, ""):
            assert f"(default:{entry.default})" in "".join(shown.split()), name
        if choices := entry.metadata.get("choices"):
            assert entry.default in choices, name


def test_a_wrong_choice_is_refused_by_config_files_too() -> None:
    for name, entry in flags_of(RunConfig).items():
        if "choices" in entry.metadata:
            with pytest.raises(UserError, match=f"--{name}"):
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
    ],
)
def test_a_file_of_settings_is_checked(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(RunConfig, flat)


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
