"""Attributes of items: read from their table, summed, trained, exported."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from model.checkpoints.weights_file import AddedRows, Part
from model.distributed import ALONE, Ranks
from model.network.attributes import AttributeSums
from model.programs import recommender as program
from model.run.trained import TrainedRun
from model.serving.recommender import Recommender
from model.settings.config import EvalFlags
from model.tables.row_exchange import RowExchange
from pipeline.batches import attributes as module
from pipeline.batches.attributes import ItemAttributes
from pipeline.batches.features import ATTRIBUTE, jagged_items, with_attributes, with_candidates
from pipeline.errors import UserError
from pipeline.preparation.catalog import Catalog
from tests.conftest import RunMain, assert_one_line, losses_of

CUDA = torch.cuda.is_available()
PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="needs CUDA"))]


def catalog(**columns: Any) -> Catalog:
    count = len(next(iter(columns.values())))
    names = pa.array([f"i{number}" for number in range(1, count + 1)])
    no_users, titles = pa.array([], pa.string()), pa.repeat("", count)
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    return Catalog(names, titles, np.ones(count, np.int64), no_users, attributes=table)


def sets(found: ItemAttributes) -> list[list[int]]:
    """The attributes of items 1, 2, ...; those of padding and mask token are none."""
    each = [[place for place in row if place < found.count] for row in found.places.tolist()]
    assert each[0] == each[-1] == []
    return each[1:-1]


def test_attributes_are_values_that_items_share() -> None:
    given = catalog(
        genres=["drama|war", "war", None, " drama |alone|drama"], year=[1999, 7, 1999, 8]
    )
    found = ItemAttributes.of(given, "genres, year", "|")
    # drama, war, 1999; "alone", 7 and 8 are those of one item each.
    assert found.count == 3 and found.places.dtype == np.int32
    assert sets(found) == [[0, 1, 2], [1], [2], [0]]
    assert found.describe() == (
        "3 attributes of at least 2 items, 1.5 of an item; 0 items have none"
    )


def test_columns_without_an_attribute_are_named() -> None:
    columns = {"a": ["1", "2", "3"], "b": ["x", "x", ""], "c": [None, None, None], "d": ["y"] * 3}
    found = ItemAttributes.of(catalog(**columns), "a,b,c,d", "|")
    assert found.without == ("a", "c")
    assert found.describe() == (
        "2 attributes of at least 2 items, 1.7 of an item; 0 items have none; no value of a, c is "
        "that of two"
    )


def test_equal_values_of_two_columns_are_two_attributes() -> None:
    found = ItemAttributes.of(catalog(a=["x", "x", "y"], b=["x", "y", "x"]), "a,b", "|")
    assert found.count == 2 and sets(found) == [[0, 1], [0], [1]]


@pytest.mark.parametrize(
    ("column", "separator"),
    [
        ([["a", "b"], None, ["b", None, "a", "a"]], "|"),
        (["a b", "", "b  a"], " "),
        (["a;b", None, "b; a"], ";"),
        ([["1", "2"], [], ["2", "1"]], "|"),
        ([[1, 2], [], [2, 1]], "|"),
        (pa.array([[1, 2], None, [2, 1]], pa.list_(pa.int64(), 2)), "|"),
        ([[1.5, 2.5], [math.nan], [math.nan, 2.5, 1.5]], "|"),
    ],
)
def test_lists_and_separators(column: Any, separator: str) -> None:
    found = ItemAttributes.of(catalog(of=column), "of", separator)
    assert found.count == 2 and sets(found)[1] == []
    assert sets(found)[0] == sets(found)[2] == [0, 1]


def test_a_number_that_is_none_is_no_attribute() -> None:
    found = ItemAttributes.of(catalog(of=[1.0, math.nan, None, math.nan, 1.0]), "of", "|")
    assert found.count == 1 and sets(found) == [[0], [], [], [], [0]]


def test_a_column_named_twice_is_one() -> None:
    found = ItemAttributes.of(catalog(of=["a", "a", "b"]), "of, of", "|")
    assert found.count == 1 and sets(found) == [[0], [0], []]


def test_words_of_titles_are_attributes() -> None:
    given = catalog(of=["a", "b", "b"])
    given.titles = pa.array(["red car", "", "car  box"])
    assert sets(ItemAttributes.of(given, "title", " ")) == [[0], [], [0]]
    assert sets(ItemAttributes.of(given, "title,of", " ")) == [[0], [1], [0, 1]]


def test_a_fingerprint_is_that_of_all_attributes() -> None:
    marks = {
        ItemAttributes.of(catalog(of=column), "of", "|").fingerprint()
        for column in (["a", "a", "b", "b"], ["c", "c", "d", "d"], ["a", "b", "a", "b"], ["a"] * 4)
    }
    assert len(marks) == 3  # names do not matter


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            "nothing",
            "'nothing' is no column of the table of the items, --items_path: it has of, deep",
        ),
        ("of,", "'' is no column of the table of the items"),
        ("of", "--item_attributes of: no value is that of two items"),
        (
            "deep",
            "the column 'deep' holds struct<x: int64>: attributes are texts, numbers or lists",
        ),
        ("lists", "the column 'lists' holds list<item: struct<x: int64>>: attributes are texts"),
        ("bytes", "the column 'bytes' holds binary: attributes are texts"),
    ],
)
def test_what_is_no_attribute_is_an_error(columns: str, message: str) -> None:
    deep = [{"x": 1}, {"x": 1}]
    given = catalog(of=["a", "b"], deep=deep, lists=[deep, deep], bytes=[b"\xff", b"\xff"])
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        ItemAttributes.of(given, columns, "|")


def test_a_catalog_without_columns_is_an_error() -> None:
    given = catalog(of=["a", "b"])
    given.attributes = None
    with pytest.raises(UserError, match="--items_path: it has none"):
        ItemAttributes.of(given, "of", "|")


def test_too_many_attributes_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    many = catalog(of=["a|b|c", "a|b|c", "a"])
    monkeypatch.setattr(module, "MOST_OF_AN_ITEM", 2)
    with pytest.raises(UserError, match="item i1 has 3 attributes: at most 2"):
        ItemAttributes.of(many, "of", "|")
    monkeypatch.setattr(module, "MOST_ATTRIBUTES", 2)
    with pytest.raises(UserError, match="3 values are those of at least two items"):
        ItemAttributes.of(many, "of", "|")


@pytest.mark.parametrize("rows", [2, 3])
def test_all_attributes_are_a_third_feature(rows: int) -> None:
    """2 rows of items, 5 candidates, attributes 12 ... 18 spread over the rows."""
    lengths = torch.tensor([3, 2, 0][:rows])
    items = jagged_items(
        torch.tensor([7, 11, 9, 4, 11]), lengths, torch.tensor([0, 3, 5, 5][: rows + 1])
    )
    features = with_candidates(items, (1, 6))
    assert with_attributes(features, None) is features
    found = with_attributes(features, (12, 19))
    assert found.keys() == ["item", "candidate", ATTRIBUTE]
    assert found.length_per_key() == [5, 5, 7] and found.stride() == rows
    assert found.values().tolist() == [7, 11, 9, 4, 11, 1, 2, 3, 4, 5, *range(12, 19)]
    assert found.lengths()[2 * rows :].tolist() == {2: [4, 3], 3: [3, 2, 2]}[rows]
    assert found.offsets().tolist() == [0, *found.lengths().cumsum(0).tolist()]
    without = with_attributes(
        with_candidates(jagged_items(items.values(), lengths), (1, 6)), (12, 19)
    )
    assert without.offsets().equal(found.offsets())


@pytest.mark.parametrize(
    ("world_size", "attributes", "most"), [(1, 7, 7), (2, 7, 7), (2, 30, 20), (4, 7, 5), (4, 1, 1)]
)
def test_slots_of_a_shard(world_size: int, attributes: int, most: int) -> None:
    """10 rows of items; a shard holds ceil((10 + A) / W) rows."""
    ranks = Ranks(0, world_size, world_size, torch.device("cpu"))
    exchange = RowExchange(8, ranks, attributes)
    assert exchange.most_in_a_shard((10, 10 + attributes)) == most


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize(("width", "untrained"), [(8, False), (200, False), (16, True)])
def test_sums_and_gradients_equal_autograds(device: str, width: int, untrained: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    places = torch.randint(0, 6, (500, 3), generator=generator).int()  # 5: none
    places[3] = 5
    own = torch.arange(500) % 7 > 0 if untrained else torch.ones(500, dtype=torch.bool)
    sums = AttributeSums(ItemAttributes(places.numpy(), 5, own.numpy())).to(device)
    assert (sums.own is None) == (not untrained)
    rows, added = (torch.randn(n, width, generator=generator).to(device) for n in (700, 5))
    items = torch.randint(0, 500, (700,), generator=generator).to(device)
    weights = torch.randn(700, width, generator=generator).to(device)
    for rows_of, call, wanted in (
        (rows, lambda r, a: sums.of_items(r, a, items), items),
        (rows[:90], lambda r, a: sums.of_range(r, a, 7), torch.arange(7, 97, device=device)),
    ):
        given = [each.clone().requires_grad_() for each in (rows_of, added, rows_of, added)]
        found = call(*given[:2])
        known = torch.cat([given[3], given[3].new_zeros(1, width)])
        expected = given[2] * own.to(device)[wanted, None]
        expected = expected + known[places.to(device)[wanted].long()].sum(dim=1)
        torch.testing.assert_close(found, expected)
        for each in (found, expected):
            (each * weights[: len(each)]).sum().backward()
        torch.testing.assert_close(given[0].grad, given[2].grad)
        torch.testing.assert_close(given[1].grad, given[3].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", PLACES)
def test_item_dropout_leaves_the_attributes(device: str) -> None:
    """Items 0 and 3 have no attributes, 2 no own row; of 1, three of ten positions lose theirs."""
    places, own = np.array([[2, 2], [0, 1], [1, 2], [2, 2]], np.int32), np.arange(4) != 2
    sums = AttributeSums(ItemAttributes(places, 2, own), item_dropout=0.3).to(device)
    rows = torch.ones(4000, 1, device=device, requires_grad=True)
    added = torch.tensor([[10.0], [100.0]], device=device)
    items = torch.arange(4, device=device).repeat(1000)
    found = sums.of_positions(rows, added, items)
    found.sum().backward()
    assert rows.grad is not None
    assert found[0::4].eq(1).all() and found[3::4].eq(1).all() and found[2::4].eq(100).all()
    assert sorted(set(found[1::4].flatten().tolist())) == [110, 111]
    assert 0.2 < found[1::4].eq(110).float().mean() < 0.4
    assert rows.grad[1::4].equal(found[1::4].detach() - 110) and rows.grad[2::4].eq(0).all()
    assert sums.of_items(rows, added, items)[1::4].eq(111).all()
    assert sums.eval().of_positions(rows, added, items)[1::4].eq(111).all()


def test_items_without_a_training_rating_are_their_attributes() -> None:
    given = catalog(kind=["a", "a", "b", "a", ""], year=[1, 2, 3, 1, 4])
    given.train_counts[:] = [3, 0, 0, 1, 0]
    found = ItemAttributes.of(given, "kind,year", "|")
    # Items 3 and 5 have no attribute that another item has.
    assert found.own.tolist() == [True, True, False, True, True, True, True]


def test_parts_of_a_stored_table_lose_the_attributes_rows() -> None:
    """4 rows of items, 3 attributes; parts are cut by rows, or by columns."""
    stored, table = torch.arange(14.0).view(7, 2), torch.empty(4, 2)
    places = np.array([[3, 3], [0, 2], [1, 3], [3, 3]], np.int32)
    by_rows = [Part("t", (low, 0), stored[low : low + 3]) for low in (0, 3, 6)]
    by_columns = [Part("t", (0, column), stored[:, column : column + 1]) for column in (0, 1)]
    for parts in (by_rows, by_columns, [Part("t", (0, 0), stored)]):
        sums = AddedRows("t", table, ItemAttributes(places, 3, np.array([1, 1, 0, 1], bool)))
        assert list(sums.stored.shape) == [7, 2]
        own = torch.full((4, 2), torch.nan)
        for part in map(sums.without_attributes, parts):
            row, column = part.offsets
            own[row : row + len(part.values), column : column + part.values.shape[1]] = part.values
        assert own.equal(stored[:4])
        sums.add(slice(1, 4), rows := own[1:])
        # Item 2 has no row of its own.
        assert rows.tolist() == [[2 + 8 + 12, 3 + 9 + 13], [10, 11], [6, 7]]
        other = Part("b", (0,), stored[0])
        assert sums.without_attributes(other) is other


TINY = (
    *("--recipe=none", "--max_len=10", "--emb_dim=8", "--num_layers=1", "--train_batch_size=16"),
    *("--num_epochs=2", "--eval_every=1", "--log_every=1"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 users with 8 ratings of 40 items, of four kinds."""
    folder, generator = tmp_path_factory.mktemp("attributes"), np.random.default_rng(4)
    lines = [
        f"{user},i{generator.integers(10) * 4 + user % 4},{time}"
        for user in range(30)
        for time in range(8)
    ]
    (folder / "r.csv").write_text("\n".join(["user,item,timestamp", *lines]))
    lines = [f"i{item},k{item % 4},{item % 3}|{item % 5}" for item in range(40)]
    (folder / "items.csv").write_text("\n".join(["item,kind,words", *lines]))
    return folder


def flags(data: Path, cache_dir: Path, run_dir: Path) -> tuple[str, ...]:
    paths = {"dataset_path": data / "r.csv", "items_path": data / "items.csv"}
    paths |= {"cache_dir": cache_dir, "run_dir": run_dir}
    return *TINY, *(f"--{name}={path}" for name, path in paths.items())


ATTRIBUTES = "--item_attributes=kind,words"


HISTORIES = [["i1", "i5"], ["i2"]]


def best_items(folder: Path) -> tuple[list[str], list[float]]:
    """Of two histories, by the model in a folder."""
    found = Recommender.load(folder, "cpu").recommend(HISTORIES, k=7)
    return found["item"].tolist(), found["score"].tolist()


def test_a_run_from_end_to_end(
    run_main: RunMain, data: Path, cache_dir: Path, tmp_path: Path
) -> None:
    run_dir, exported = tmp_path / "run", tmp_path / "exported"
    outcome = run_main("train", *flags(data, cache_dir, run_dir), ATTRIBUTES)
    assert outcome.code == 0, outcome.err
    # 4 kinds; the words are the remainders 0 ... 4.
    assert "9 attributes of at least 2 items, 2.8 of an item; 0 items have none" in outcome.out
    config = json.loads((run_dir / "config.json").read_text())
    assert config["num_attributes"] == 9 and config["flags"]["item_attributes"] == "kind,words"
    result = json.loads((run_dir / "eval_test.json").read_text())
    evaluated = run_main("eval", f"--checkpoint={run_dir}", f"--cache_dir={cache_dir}")
    assert evaluated.code == 0, evaluated.err
    assert json.loads((run_dir / "eval_test.json").read_text())["full"] == result["full"]

    weights = load_file(run_dir / "model" / "model.safetensors")
    assert weights["embeddings.embeddings.item.weight"].shape == (42, 8)  # sums: no attributes
    items, scores = best_items(run_dir)
    shutil.rmtree(run_dir / "model")  # the model is that of the checkpoint now
    again, found = best_items(run_dir)
    assert again == items and found == pytest.approx(scores, abs=1e-5)
    outcome = run_main("export", f"--checkpoint={run_dir}", f"--output={exported}")
    assert outcome.code == 0, outcome.err
    other = load_file(exported / "model.safetensors")
    assert other.keys() == weights.keys()
    assert all(other[name].equal(weights[name]) for name in weights)
    lists = program.Recommender(exported).recommend(HISTORIES, k=7)
    assert [item for each in lists for item, _ in each] == items
    assert [score for each in lists for _, score in each] == pytest.approx(scores, abs=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(
    run_main: RunMain, data: Path, cache_dir: Path, tmp_path: Path
) -> None:
    tables = []
    for name, stops in {"whole": [()], "parts": [("--max_steps=3",), ("--resume=auto",)]}.items():
        for stop in stops:
            given = (*flags(data, cache_dir, tmp_path / name), ATTRIBUTES, *stop)
            assert run_main("train", *given).code == 0
        folder = tmp_path / name / "model"
        tables.append(load_file(folder / "model.safetensors"))
    assert all(tables[0][name].equal(tables[1][name]) for name in tables[0])


def test_an_item_of_validation_parts_alone_may_be_trained_on(
    run_main: RunMain, data: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """User 0's last items are new ones: i40 its validation part, i41 its test part."""
    for name, lines in {"r.csv": "0,i40,8\n0,i41,9", "items.csv": "i40,k0,1|2\ni41,k0,3|4"}.items():
        (tmp_path / name).write_text((data / name).read_text() + f"\n{lines}\n")
    run_dir = tmp_path / "run"
    given = (*flags(tmp_path, cache_dir, run_dir), ATTRIBUTES, "--train_on_validation=true")
    assert run_main("train", *given, "--max_steps=3").code == 0
    outcome = run_main("train", *given, "--resume=auto")
    assert outcome.code == 0, outcome.err
    best = best_items(run_dir)
    shutil.rmtree(run_dir / "model")
    run = TrainedRun(EvalFlags(checkpoint=str(run_dir)))
    attributes = run.trained(ALONE).attributes
    assert attributes is not None
    items = run.catalog().items.to_pylist()
    without = [item for item, own in zip(items, attributes.own[1:-1], strict=True) if not own]
    assert without == ["i41"]
    again = best_items(run_dir)
    assert again[0] == best[0] and again[1] == pytest.approx(best[1], abs=1e-5)


def test_attributes_change_the_model(
    run_main: RunMain, data: Path, cache_dir: Path, tmp_path: Path
) -> None:
    found = []
    for number, more in enumerate([(), (ATTRIBUTES,), ("--item_attributes=kind",)]):
        run_dir = tmp_path / str(number)
        assert run_main("train", *flags(data, cache_dir, run_dir), *more).code == 0
        found.append(tuple(losses_of(run_dir).values()))
    assert len(set(found)) == 3


def test_other_attributes_are_another_run(
    run_main: RunMain, data: Path, cache_dir: Path, tmp_path: Path
) -> None:
    run_dir, items = tmp_path / "run", tmp_path / "items.csv"
    given = (*flags(data, cache_dir, run_dir), "--resume=auto")
    assert run_main("train", *given, ATTRIBUTES, "--max_steps=3").code == 0
    message = f"--resume auto: {run_dir} was trained with --item_attributes kind,words, not kind"
    assert_one_line(run_main("train", *given, "--item_attributes=kind"), "train", message)
    text = (data / "items.csv").read_text()
    items.write_text(text.replace("i7,k3", "i7,k0"))
    outcome = run_main("train", *given, ATTRIBUTES, f"--items_path={items}")
    message = f"--resume auto: {run_dir} was trained on other data (attributes "
    assert_one_line(outcome, "train", message)

    shutil.rmtree(run_dir / "model")
    config = json.loads((run_dir / "config.json").read_text())
    for change, said in (
        ({"num_attributes": 0}, "num_attributes is 0"),
        ({"num_attributes": "9"}, "num_attributes is '9'"),
        ({"attributes": "0" * 16}, "has other attributes of the items"),
    ):
        (run_dir / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=said):
            Recommender.load(run_dir, "cpu")


def test_the_files_may_be_moved(run_main: RunMain, data: Path, tmp_path: Path) -> None:
    first, second, run_dir = tmp_path / "first", tmp_path / "second", tmp_path / "run"
    first.mkdir()
    for name in ("r.csv", "items.csv"):
        shutil.copy(data / name, first)
    given = (*flags(first, tmp_path / "cache", run_dir), ATTRIBUTES)
    assert run_main("train", *given, "--max_steps=3").code == 0
    first.rename(second)
    given = (*flags(second, tmp_path / "cache", run_dir), ATTRIBUTES)
    outcome = run_main("train", *given, "--resume=auto")
    assert outcome.code == 0 and not outcome.err, outcome.err
    second.rename(first)
    paths = (f"--dataset_path={first / 'r.csv'}", f"--items_path={first / 'items.csv'}")
    for script, *more in (("eval",), ("recommend", "--user=3")):
        outcome = run_main(script, f"--checkpoint={run_dir}", *paths, *more)
        assert outcome.code == 0 and not outcome.err, outcome.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--item_attributes=a",), "--item_attributes names columns of --items_path: give that"),
        (
            ("--item_attributes=a", "--items_path=i.csv", "--dataset_path=r.csv", "--head=linear"),
            "--item_attributes needs --head tied",
        ),
        (("--attribute_separator=",), "--attribute_separator is empty"),
    ],
)
def test_flags_that_do_not_fit(run_main: RunMain, given: tuple[str, ...], message: str) -> None:
    assert_one_line(run_main("train", *given), "train", message)
