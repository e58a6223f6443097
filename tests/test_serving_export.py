"""An export serves what the model computes, in a process without torch and this project."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.bert4rec import BERT4Rec, ModelConfig
from model.checkpoints import export as export_module
from model.checkpoints.exported import CHECKSUMS
from model.checkpoints.manifest import describe_files
from model.distributed import Ranks
from model.network.config import EncoderConfig, HeadConfig
from model.network.head import CatalogSlice
from model.programs import vectors as vectors_module
from model.programs.exporters import item_table_name, write_exported
from model.programs.folder import write_programs
from model.programs.padded import PaddedEncoder
from model.programs.recommender import Recommender
from model.serving import recommender
from pipeline.files import write_json
from pipeline.preparation.catalog import Catalog
from tests.conftest import most_bytes_of_a_file, mounted, run_process

V, MAX_LEN, WIDTH = 12, 6, 8
KINDS = {
    "tied": (HeadConfig(), EncoderConfig(WIDTH, 2, 2), False, "fp32"),
    "left only, fp16": (HeadConfig(), EncoderConfig(WIDTH, 2, 2), True, "fp16"),
    "linear, dot product": (
        HeadConfig("linear", logit_temperature=0),
        EncoderConfig(WIDTH, 1, 1, positions="none"),
        False,
        "fp32",
    ),
}
# Rows of the catalog; the last is longer than the model reads.
HISTORIES = [[3], [0, 1, 2, 3, 4], [11, 5], [7, 6, 7, 2, 9, 10, 1, 4]]


@dataclass(frozen=True)
class Exported:
    bert: BERT4Rec
    catalog: Catalog
    folder: Path


def write_config(folder: Path, head: HeadConfig) -> None:
    flags = {"max_len": MAX_LEN, "logit_temperature": head.logit_temperature}
    write_json(folder / "config.json", {"flags": flags})


@pytest.fixture(scope="module", params=KINDS)
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    head, encoder, left_only, precision = KINDS[request.param]
    config = ModelConfig(V, MAX_LEN, encoder, head, precision)
    bert = BERT4Rec(config, CatalogSlice(1, V + 1, shared=False), left_only=left_only).eval()
    torch.manual_seed(1)
    for weight in bert.parameters():
        nn.init.normal_(weight, std=0.5)
    folder = tmp_path_factory.mktemp("exported")
    counts = np.array([3, 5, 0, 2, 9, 1, 1, 1, 4, 4, 2, 2])
    names = [f"i{row}" for row in range(V)]
    titles = ["", *[f"The {name}" for name in names[1:]]]
    catalog = Catalog(pa.array(names), pa.array(titles), counts, pa.array(["u"]))
    save_file(bert.state_dict(), folder / "model.safetensors")
    write_config(folder, head)
    write_programs(bert, catalog, folder, "model.safetensors")
    write_json(folder / CHECKSUMS, describe_files(folder, "*"))
    return Exported(bert, catalog, folder)


def jagged_vectors(bert: BERT4Rec, histories: list[list[int]]) -> Tensor:
    """Users' vectors [B, D] by the training encoder."""
    rows = [[*(item + 1 for item in each[-(MAX_LEN - 1) :]), V + 1] for each in histories]
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    left_only = torch.ones(len(rows), dtype=torch.bool) if bert.left_only else None
    items = bert.state_dict()[item_table_name(bert)][torch.tensor([*chain(*rows)])].float()
    with torch.no_grad():
        return bert.head.project(bert.encoder(items, offsets, offsets[1:] - 1, left_only))


def padded(histories: list[list[int]]) -> Tensor:
    grid = torch.zeros(len(histories), MAX_LEN - 1, dtype=torch.int64)
    for row, history in zip(grid, histories, strict=True):
        recent = torch.tensor(history[-(MAX_LEN - 1) :]) + 1
        row[MAX_LEN - 1 - len(recent) :] = recent
    return grid


@pytest.mark.parametrize("users", [1, len(HISTORIES)])
def test_every_form_gives_the_vectors_of_the_training_encoder(
    exported: Exported, users: int
) -> None:
    expected, folder = jagged_vectors(exported.bert, HISTORIES[:users]), exported.folder
    histories = padded(HISTORIES[:users])
    table = exported.bert.state_dict()[item_table_name(exported.bert)]
    with torch.no_grad():
        found = {
            "padded": PaddedEncoder(exported.bert).eval()(histories, table),
            "pt2": torch.export.load(folder / "model.pt2").module()(histories, table),
        }
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    found["onnx"] = torch.tensor(session.run(None, {"histories": histories.numpy()})[0])
    if users == 1:
        short = histories[:, -1:]  # a history of one item, without padding
        found["short"] = torch.tensor(session.run(None, {"histories": short.numpy()})[0])
    for form, vectors in found.items():
        torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=1e-5, msg=form)
    assert len({*expected[:, 0].tolist()}) == users


def test_the_table_is_stored_once(exported: Exported) -> None:
    """The programs do not grow with the catalog."""
    bytes_of_row = WIDTH * 4
    programs = [(exported.folder / name).read_bytes() for name in ("model.onnx", "model.pt2")]
    row = exported.bert.state_dict()[item_table_name(exported.bert)][3]
    assert row.numpy().tobytes() in (exported.folder / "model.safetensors").read_bytes()
    assert len(row.numpy().tobytes()) in (bytes_of_row, bytes_of_row // 2)
    assert not any(row.numpy().tobytes() in program for program in programs)


@pytest.mark.parametrize("most_bytes", [100, 1500, 5000, 20_000])
def test_a_program_that_a_disk_does_not_take(
    exported: Exported, tmp_path: Path, most_bytes: int
) -> None:
    with most_bytes_of_a_file(most_bytes), pytest.raises(OSError, match="File too large"):
        write_exported(exported.bert, tmp_path, str(exported.folder / "model.safetensors"))


def test_vectors_that_a_disk_does_not_take(tmp_path: Path) -> None:
    """An error; writing to a mapped file would end this process."""
    config = ModelConfig(1000, MAX_LEN, EncoderConfig(WIDTH, 2, 2), HeadConfig())
    bert = BERT4Rec(config, CatalogSlice(1, 1001, shared=False))  # 32,000 bytes of vectors
    with mounted(tmp_path):
        (tmp_path / "last page").write_bytes(b"x")
        with suppress(OSError):
            (tmp_path / "rest").write_bytes(bytes(5 << 20))
        (tmp_path / "last page").unlink()
        with pytest.raises(OSError, match="No space left"):
            vectors_module.write_vectors(bert, tmp_path)


def test_items_written_in_blocks_are_one_text(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors_module, "_ROWS", 5)
    vectors_module.write_items(exported.catalog, tmp_path)
    assert (tmp_path / "items.json").read_bytes() == (exported.folder / "items.json").read_bytes()
    known = json.loads((tmp_path / "items.json").read_text("utf-8"))
    assert known["items"] == exported.catalog.items.to_pylist()
    assert known["titles"] == exported.catalog.titles.to_pylist()
    assert known["train_counts"] == exported.catalog.train_counts.tolist()


# Names of modules that cannot be imported, then a program without them.
SERVE = """
import json, sys
for name in ("torch", "torchrec", "fbgemm_gpu", "torchdata", "pyarrow", "pipeline", "model"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
from recommender import Recommender
serving = Recommender(sys.argv[1])
print(json.dumps([getattr(serving, name)(*given) for name, *given in json.loads(sys.argv[2])]))
"""


def served(folder: Path, *calls: Any) -> list[Any]:
    outcome = run_process("-c", SERVE, folder, json.dumps(calls))
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_the_folder_serves_alone(exported: Exported) -> None:
    catalog, folder = exported.catalog, exported.folder
    given = [[f"i{row}" for row in history] for history in HISTORIES]
    allow, unknown = ["i1", "i2", "i5", "i6", "new"], [["new"], [], ["new", "i3"]]
    dropped, kept, allowed, denied, popular, similar = served(
        folder,
        ("recommend", given, 4),
        ("recommend", given, V, "keep"),
        ("recommend", given, V, "keep", allow),
        ("recommend", given, V, "keep", allow, ["i5", "i6"]),
        ("recommend", unknown, 3),
        ("similar", "i4", V),
    )
    scores = (
        jagged_vectors(exported.bert, HISTORIES).numpy() @ np.load(folder / "item_vectors.npy").T
    )
    for user, history in enumerate(HISTORIES):
        order = [row for row in np.argsort(-scores[user]) if catalog.train_counts[row]]
        named = [f"i{row}" for row in order]
        assert [item for item, _ in kept[user]] == named
        assert [value for _, value in kept[user]] == pytest.approx(scores[user][order], abs=1e-5)
        unseen = [f"i{row}" for row in order if row not in history]
        assert [item for item, _ in dropped[user]] == unseen[:4]
        some = [item for item in named if item in ("i1", "i5", "i6")]  # i2 was never trained
        assert [item for item, _ in allowed[user]] == some
        assert [item for item, _ in denied[user]] == ["i1"]
    assert popular[0] == popular[1] == [["i4", 9], ["i1", 5], ["i8", 4]]
    assert [item for item, _ in popular[2]] == [item for item, _ in dropped[0]][:3]
    found = [item for item, _ in similar]
    assert "i4" not in found and "i2" not in found and len(found) == V - 2
    assert similar == sorted(similar, key=lambda pair: -pair[1])


def test_a_list_has_at_least_one_place(exported: Exported) -> None:
    serving = Recommender(exported.folder)
    for k in (0, -2):
        with pytest.raises(ValueError, match="k is at least 1"):
            serving.recommend([["i1"]], k=k)
        with pytest.raises(ValueError, match="k is at least 1"):
            serving.similar("i1", k=k)


def test_times_need_a_model_that_reads_them(exported: Exported) -> None:
    serving = Recommender(exported.folder)
    with pytest.raises(ValueError, match="for a model with times"):
        serving.recommend([["i1"]], times=[[5]])
    with pytest.raises(ValueError, match="for a model with times"):
        serving.user_vectors([["i1"]], at=5)


@pytest.mark.parametrize("trains_on_validation", [False, True])
def test_a_discount_is_that_of_recommend_py(
    exported: Exported, tmp_path: Path, trains_on_validation: bool
) -> None:
    catalog, ranks = exported.catalog, Ranks(0, 1, 1, torch.device("cpu"))
    folder = exported.folder
    if trains_on_validation:  # i2, of training count 0, may be recommended
        counts = np.eye(V, dtype=np.int64)[2]
        catalog = replace(catalog, validation_counts=counts)
        folder = shutil.copytree(folder, tmp_path / "exported")
        items = json.loads((folder / "items.json").read_text())
        write_json(folder / "items.json", items | {"validation_counts": counts.tolist()})
        (folder / CHECKSUMS).unlink()
        write_json(folder / CHECKSUMS, describe_files(folder, "*"))
    whole = recommender.Recommender(exported.bert, catalog, MAX_LEN, ranks)
    histories = [[f"i{row}" for row in history] for history in HISTORIES]
    table = whole.recommended(histories, k=V, popularity_discount=0.7).to_pylist()
    assert ("i2" in {row["item"] for row in table}) == trains_on_validation
    serving = Recommender(folder)
    found = serving.recommend([*histories, []], V, popularity_discount=0.7)
    assert found[:-1] != serving.recommend(histories, V)
    assert [name for each in found[:-1] for name, _ in each] == [row["item"] for row in table]
    assert [score for each in found[:-1] for _, score in each] == pytest.approx(
        [row["score"] for row in table], abs=1e-5
    )
    assert found[-1][0] == ("i4", 9)  # popular items are not discounted
    with pytest.raises(ValueError, match="popularity_discount 0 to 1"):
        serving.recommend(histories, popularity_discount=2.0)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Exports of untrained models, the second of fewer items."""
    folders = []
    for names in (["1193", "661", "914", "x"], ["661", "1193"]):
        config = ModelConfig(len(names), MAX_LEN, EncoderConfig(WIDTH, 1, 1), HeadConfig())
        bert = BERT4Rec(config, CatalogSlice(1, len(names) + 1, shared=False)).eval()
        folder = tmp_path_factory.mktemp("two")
        save_file(bert.state_dict(), folder / "model.safetensors")
        write_config(folder, config.head)
        titles = pa.array([f"The {name}" for name in names])
        catalog = Catalog(pa.array(names), titles, np.arange(len(names)) + 1, pa.array(["u"]))
        write_programs(bert, catalog, folder, "model.safetensors")
        write_json(folder / CHECKSUMS, describe_files(folder, "*"))
        folders.append(folder)
    return folders[0], folders[1]


@pytest.fixture
def small(tmp_path: Path, two: tuple[Path, Path]) -> Path:
    return Path(shutil.copytree(two[0], tmp_path / "exported"))


@pytest.fixture
def replace_small(small: Path, tmp_path: Path, two: tuple[Path, Path]) -> Callable[[], None]:
    """Puts the second export in place of the first."""

    def replace() -> None:
        aside = Path(shutil.copytree(two[1], tmp_path / "aside"))
        export_module._replace(small, aside)

    return replace


@pytest.mark.parametrize("trained", ["keep", "drop", None])
def test_seen_items_are_ranked_as_the_run_ranked_them(small: Path, trained: str | None) -> None:
    """An export of an earlier version names no choice: it dropped them."""
    config = json.loads((small / "config.json").read_text("utf-8"))
    config["flags"] |= {"seen": trained} if trained else {}
    write_json(small / "config.json", config)
    (small / CHECKSUMS).unlink()
    write_json(small / CHECKSUMS, describe_files(small, "*"))
    serving, histories = Recommender(small), [["1193", "x"]]
    found = {item for item, _ in serving.recommend(histories)[0]}
    assert found == {"661", "914"} | ({"1193", "x"} if trained == "keep" else set())
    assert serving.recommend(histories) == serving.recommend(histories, seen=trained or "drop")


def test_blanks_of_an_id_count_where_the_catalog_has_them(small: Path) -> None:
    """As Parquet may have them, or texts with other blanks than those that readers trim."""
    ids = ["7", " 7", "7\u00a0", "\u3000x"]
    known = json.loads((small / "items.json").read_text("utf-8")) | {"items": ids}
    write_json(small / "items.json", known)
    (small / CHECKSUMS).unlink()
    write_json(small / CHECKSUMS, describe_files(small, "*"))
    serving = Recommender(small)
    assert serving.rows([*ids, "7 ", " x"]).tolist() == [0, 1, 2, 3, 0]
    assert {item for item, _ in serving.similar("\u3000x")} == set(ids[:3])
    assert {item for item, _ in serving.recommend([[" 7"]], deny=["7\u00a0"])[0]} == {
        "7",
        "\u3000x",
    }


def test_ids_are_items_of_lists(small: Path) -> None:
    """A text is one id, not a list of its letters; blanks around an id do not count."""
    serving = Recommender(small)
    assert serving.rows([" 661", 1193, "none", "x "]).tolist() == [1, 0, 3]
    assert serving.recommend([[" 1193", 661]]) == serving.recommend([["1193", "661"]])
    assert serving.similar(" 661 ") == serving.similar(661)
    calls: list[Callable[[], object]] = [
        lambda: serving.recommend(["1193", "661"]),
        lambda: serving.recommend("1193"),
        lambda: serving.user_vectors(["1193"]),
        lambda: serving.recommend([["1193"]], allow="661"),
        lambda: serving.recommend([["1193"]], deny="661"),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="must be a list, not the text"):
            call()


def test_without_users_nothing_is_recommended(small: Path) -> None:
    serving = Recommender(small)
    assert serving.recommend([]) == []
    assert serving.user_vectors([]).shape == (0, WIDTH)


def test_axes_of_the_program_have_names(exported: Exported) -> None:
    session = onnxruntime.InferenceSession(exported.folder / "model.onnx")
    assert [each.shape for each in session.get_inputs()] == [["users", "length"]]
    assert [each.shape for each in session.get_outputs()] == [["users", WIDTH]]


def test_an_export_is_replaced_while_it_serves(
    small: Path, replace_small: Callable[[], None]
) -> None:
    serving = Recommender(small)
    before = serving.recommend([["1193"]])
    assert not serving.outdated()
    (small / "model.safetensors").rename(small / "hidden")  # what an export does first
    assert not serving.outdated() and serving.recommend([["1193"]]) == before
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        Recommender(small)
    replace_small()
    assert serving.outdated() and serving.recommend([["1193"]]) == before
    assert Recommender(small).items == ["661", "1193"] and not Recommender(small).outdated()


@pytest.mark.parametrize(
    "at", ["checksums.json", "items.json", "item_vectors.npy", "config.json", "model.onnx"]
)
def test_a_mixture_of_two_exports_is_not_read(
    small: Path, replace_small: Callable[[], None], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """The export is replaced just before the reading of one of its files."""
    left = [at]

    def replace_at(path: object) -> None:
        if left and str(path).endswith(left[0]):
            left.clear()
            replace_small()

    read_text, load, session = Path.read_text, np.load, onnxruntime.InferenceSession

    def replaced(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: object, *args: Any, **options: Any) -> Any:
            replace_at(path)
            return call(path, *args, **options)

        return wrapped

    monkeypatch.setattr(Path, "read_text", replaced(read_text))
    monkeypatch.setattr(np, "load", replaced(load))
    monkeypatch.setattr(onnxruntime, "InferenceSession", replaced(session))
    with pytest.raises(RuntimeError, match="was replaced while it was read"):
        Recommender(small)
    assert not left and len(Recommender(small).items) == 2


def test_half_an_export_is_not_read(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that a replacement causes, such as onnxruntime's, are told as what they are."""

    def lost(path: object, *_: Any) -> None:
        (small / "model.safetensors").unlink()
        raise KeyError(f"{path} cannot be used")

    monkeypatch.setattr(onnxruntime, "InferenceSession", lost)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        Recommender(small)


def test_a_link_is_followed_once(small: Path, tmp_path: Path, two: tuple[Path, Path]) -> None:
    link = tmp_path / "served"
    link.symlink_to(small)
    serving = Recommender(link)
    (tmp_path / "new").symlink_to(two[1])
    (tmp_path / "new").replace(link)
    assert serving.outdated() and len(serving.items) == 4
    assert Recommender(link).items == ["661", "1193"]
