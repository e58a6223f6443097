"""For any bytes and JSON in the files of a run folder: they are read, or refused by one line."""

import json
import pickle
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from model.checkpoints.exported import check_exported, load_exported
from model.checkpoints.manifest import DamagedError, position_of, read_manifest, verify
from model.checkpoints.safe_reader import read_index, stored_weights
from model.checkpoints.weights import check_fit
from model.run.trained import TrainedRun
from model.settings.config import EvalFlags, RunConfig
from model.settings.flags import flatten
from model.training.run_log import _keep_lines_up_to
from pipeline.errors import UserError
from pipeline.preparation.catalog import FILES, Catalog
from pipeline.preparation.store import SequenceStore

FLAGS = flatten(RunConfig())
# Tables of 20 bytes upwards, not of TiB, are made when a model is built: sizes are drawn small.
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -1, 0, True, 2**63, 1e308])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=5)
JSON = st.recursive(
    SCALARS,
    lambda each: (
        st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=4), each, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(["__0_0.distcp", ".metadata", "../a", "/dev/zero", "", ".", "a\0b"])

quick = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """Any bytes, or a file with some bytes changed and its end cut off."""

    def damage(changes: list[tuple[float, int]], share: float) -> bytes:
        content = bytearray(whole)
        for place, byte in changes:
            content[int(place * (len(content) - 1))] = byte
        return bytes(content[: int(share * len(content))])

    change = st.tuples(st.floats(0, 1), st.integers(0, 255))
    shares = st.just(1.0) | st.floats(0, 1)
    return st.binary(max_size=300) | st.builds(damage, st.lists(change, max_size=4), shares)


def read(folder: Path) -> None:
    with suppress(UserError):
        TrainedRun(EvalFlags(checkpoint=str(folder)))._weightless_model()


@quick
@given(content=damaged(json.dumps({"flags": FLAGS, "num_items": 3, "catalog": "x"}).encode()))
def test_any_bytes_as_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    read(tmp_path)


@quick
@given(
    flags=st.dictionaries(st.sampled_from([*FLAGS, "num_negatives", "x"]), JSON, max_size=4) | JSON,
    facts=st.dictionaries(st.sampled_from(["num_items", "catalog", "step", "flags"]), JSON),
    all_flags=st.booleans(),
)
def test_any_json_as_config(tmp_path: Path, flags: Any, facts: Any, all_flags: bool) -> None:
    if all_flags and isinstance(flags, dict):
        flags = FLAGS | flags
    content = {"flags": flags, "num_items": 3, "catalog": "x"} | facts
    (tmp_path / "config.json").write_text(json.dumps(content))
    read(tmp_path)


def checked(folder: Path) -> None:
    with suppress(DamagedError, UserError):
        position_of(read_manifest(folder))
        verify(folder)


@quick
@given(content=st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    checked(tmp_path)


@quick
@given(
    position=st.dictionaries(st.sampled_from(["step", "best", "best_step", "x"]), JSON) | JSON,
    files=st.dictionaries(
        NAMES, st.dictionaries(st.sampled_from(["size", "crc32"]), JSON) | JSON, max_size=3
    )
    | JSON,
    more=st.dictionaries(st.sampled_from(["format", "recorded", "world_size"]), JSON),
)
def test_any_json_as_manifest(tmp_path: Path, position: Any, files: Any, more: Any) -> None:
    """With the right checksum."""
    content = {"format": 1, "position": position, "files": files} | more
    content = json.loads(json.dumps(content))
    content["crc32"] = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    checked(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    state = {"model": nn.Linear(3, 2).state_dict(), "optimizer": {"x": torch.ones(2)}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def test_any_bytes_as_index(checkpoint: Path) -> None:
    path, wanted = checkpoint / ".metadata", nn.Linear(3, 2).state_dict()
    whole = path.read_bytes()

    @settings(max_examples=400)
    @given(content=damaged(whole))
    def examples(content: bytes) -> None:
        path.write_bytes(content)
        with suppress(DamagedError, ValueError):
            check_fit(stored_weights(read_index(checkpoint)), wanted)

    examples()
    path.write_bytes(whole)
    check_fit(stored_weights(read_index(checkpoint)), wanted)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(),
    lambda each: (
        st.lists(each, max_size=3)
        | st.dictionaries(st.text(max_size=3), each, max_size=3)
        | st.tuples(each, each)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("part", ["state_dict_metadata", "storage_data", "storage_meta"])
def test_any_values_in_an_index(checkpoint: Path, part: str) -> None:
    path = checkpoint / ".metadata"
    whole = path.read_bytes()
    fields = {
        "state_dict_metadata": ("properties", "size", "chunks"),
        "storage_data": ("relative_path", "offset", "length"),
        "storage_meta": ("load_id", "save_id"),
    }[part]

    @settings(max_examples=100)
    @given(value=VALUES, where=st.sampled_from(["all", *fields]))
    def examples(value: Any, where: str) -> None:
        index = pickle.loads(whole)
        if where == "all":
            setattr(index, part, value)
        else:
            inside = getattr(index, part)
            for each in inside.values() if isinstance(inside, dict) else [inside]:
                object.__setattr__(each, where, value)
        path.write_bytes(pickle.dumps(index))
        with suppress(DamagedError, ValueError):
            check_fit(stored_weights(read_index(checkpoint)), nn.Linear(3, 2).state_dict())

    examples()
    path.write_bytes(whole)


def use_weights(folder: Path, config: Any) -> None:
    model = nn.Linear(3, 2)
    with suppress(UserError):
        check_exported(folder, config, model)
        load_exported(folder, model)


def test_any_bytes_as_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(nn.Linear(3, 2).state_dict(), path, {"trained": json.dumps({"step": 1})})

    @settings(max_examples=400)
    @given(content=damaged(path.read_bytes()))
    def examples(content: bytes) -> None:
        path.unlink()
        path.write_bytes(content)
        use_weights(tmp_path, {"step": 1})

    examples()


@quick
@given(tie=JSON.map(json.dumps) | st.text(), config=st.dictionaries(st.just("step"), JSON))
def test_any_metadata_of_weights(tmp_path: Path, tie: str, config: Any) -> None:
    save_file(nn.Linear(3, 2).state_dict(), tmp_path / "model.safetensors", {"trained": tie})
    use_weights(tmp_path, config)


def test_any_bytes_as_catalog(tmp_path: Path) -> None:
    store = SequenceStore.from_arrays([1, 2, 3, 3, 2, 1], [0, 3, 6], 3)
    store.catalog.write_to(tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in FILES}

    @settings(max_examples=200)
    @given(data=st.data(), name=st.sampled_from(FILES))
    def examples(data: st.DataObject, name: str) -> None:
        for each in FILES:
            (tmp_path / each).write_bytes(whole[each])
        (tmp_path / name).write_bytes(data.draw(damaged(whole[name])))
        try:
            Catalog.read(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)

    examples()


@quick
@given(
    lines=st.lists(st.binary(max_size=20) | JSON.map(lambda each: json.dumps(each).encode())),
    end=st.sampled_from([b"", b"\n", b"\r", b'{"step": 1}']),
)
def test_any_bytes_as_log(tmp_path: Path, lines: list[bytes], end: bytes) -> None:
    """Only lines of steps up to the given one are kept, as they are."""
    good = [b'{"step": 1, "loss": 2}\n', b'{"step": 2}\n', b'{"step": 3}\n']
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(good[0] + b"\n".join(lines) + b"\n" + good[1] + good[2] + end)
    _keep_lines_up_to(path, 2)
    kept = path.read_bytes().splitlines(keepends=True)
    assert kept[0] == good[0] and good[1] in kept and good[2] not in kept
    assert all(json.loads(line)["step"] <= 2 for line in kept if line.strip())


@pytest.mark.parametrize("name", FILES)
def test_any_byte_of_a_catalog_that_is_no_utf_8(tmp_path: Path, name: str) -> None:
    store = SequenceStore.from_arrays([1, 2, 3, 3, 2, 1], [0, 3, 6], 3)
    store.catalog.write_to(tmp_path)
    whole = (tmp_path / name).read_bytes()
    refused = 0
    for place in range(len(whole)):
        (tmp_path / name).write_bytes(whole[:place] + bytes([128]) + whole[place + 1 :])
        try:
            Catalog.read(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused
