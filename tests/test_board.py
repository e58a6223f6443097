"""What TensorBoard shows, read from the event files, and the lines of metrics.jsonl."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.util.tensor_util import make_ndarray

from model.board import markdown, projector, tags
from model.board.examples import Examples
from model.board.projector import popular_items
from model.board.result import Measured, write_measured
from model.distributed import Ranks
from model.evaluation.metrics import METRICS
from model.run.build import build_model
from model.run.execution import plan_execution
from model.serving.recommender import Recommender
from model.settings.config import RunConfig
from pipeline.preparation.store import SequenceStore
from pipeline.sources.config import DataConfig
from pipeline.training.config import WindowConfig
from tests.conftest import TINY, RunMain

HOSTILE = [
    "<script>alert(1)</script>",
    "![a](http://example.com/a.png)",
    "| a | b |\t**c**",
    "`x` \x1b[2J \u202e &lt; &#60;",
    "long" * 10_000,
]


def events_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def texts(folder: Path, tag: str) -> dict[int, str]:
    """The texts of a tag, by step."""
    found = events_of(folder).Tensors(f"{tag}/text_summary")
    return {each.step: each.tensor_proto.string_val[0].decode() for each in found}


def flags_of(folder: Path) -> dict[str, Any]:
    """The flags that HParams shows for a result."""
    content = events_of(folder).SummaryMetadata(metadata.SESSION_START_INFO_TAG)
    start = metadata.parse_session_start_info_plugin_data(content.plugin_data.content)
    return {name: getattr(each, each.WhichOneof("kind")) for name, each in start.hparams.items()}


class Cells(HTMLParser):
    """The cells of a table as text, and the names of all tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.names: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.names.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


@given(st.text(min_size=1) | st.sampled_from(HOSTILE))
def test_no_title_is_markup(title: str) -> None:
    cells = [markdown.escaped(title), markdown.escaped("b")]
    shown = Cells(markdown_to_safe_html(markdown.table(["x", "y"], [cells])))
    assert shown.names == {"table", "thead", "tbody", "tr", "th", "td"}
    assert [each.strip() for each in shown.cells[:4]] == [
        *("x", "y"),
        *(markdown.shortened(title).strip(), "b"),
    ]


@pytest.mark.parametrize("text", HOSTILE[:4])
def test_no_line_of_a_text_is_markup(text: str) -> None:
    html = markdown_to_safe_html(markdown.sections({"command": f"train.py\n{text}"}))
    assert set(re.findall(r"<(\w+)", html)) == {"h3", "pre", "code"}


def test_a_chart_has_the_curves_of_one_metric() -> None:
    known = [tags.tag(protocol, name) for protocol in ("full", "sampled") for name in METRICS]
    charts = tags.layout(METRICS)["full and sampled"]
    assert next(iter(charts)) == "NDCG@10"
    for name, (kind, patterns) in charts.items():
        found = [tag for tag in known for pattern in patterns if re.match(pattern, tag)]
        assert (kind, found) == ("Multiline", [tags.tag(p, name) for p in ("full", "sampled")])


def hostile_ratings(folder: Path) -> list[str]:
    """20 users of 6 ratings of 8 items, some of which have hostile titles."""
    rng = np.random.default_rng(3)
    rated = [rng.permutation(8)[:6] for _ in range(20)]
    lines = [f"{u}::{i}::5::{t}" for u, items in enumerate(rated) for t, i in enumerate(items)]
    (folder / "ratings.dat").write_text("\n".join(lines) + "\n")
    named = [title.replace("\n", " ") for title in HOSTILE]
    (folder / "movies.dat").write_text("".join(f"{i}::{t}::x\n" for i, t in enumerate(named)))
    return named


def test_hostile_titles_in_a_run(run_main: RunMain, tmp_path: Path, run_dir: Path) -> None:
    hostile_ratings(tmp_path)
    data = [f"--dataset_path={tmp_path / 'ratings.dat'}", f"--cache_dir={tmp_path / 'cache'}"]
    flags = ["--min_user_count=1", "--min_item_count=1", f"--run_dir={run_dir}"]
    outcome = run_main("train", *TINY, *data, *flags)
    assert outcome.code == 0, outcome.err
    for text in texts(run_dir, "examples").values():
        shown = Cells(markdown_to_safe_html(text))
        assert shown.names <= {"table", "thead", "tbody", "tr", "th", "td", "strong"}
        assert len(shown.cells) == 6 * (1 + 3 + 1 + 8)
    result = run_dir / "results" / "eval_test"
    head, *items = (result / "items.tsv").read_text().removesuffix("\n").split("\n")
    assert head == "title\tid\tcount" and {len(line.split("\t")) for line in items} == {3}
    counts = [int(line.split("\t")[2]) for line in items]
    assert counts == sorted(counts, reverse=True) and len(items) == 8
    assert len((result / "vectors.tsv").read_text().splitlines()) == 8
    (named,) = read_config(result).embeddings
    assert (named.tensor_path, named.metadata_path) == ("vectors.tsv", "items.tsv")


def read_config(folder: Path) -> ProjectorConfig:
    """What names the files of the projector, as TensorBoard reads it."""
    from google.protobuf import text_format  # a requirement of TensorBoard

    return text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())


def test_what_a_run_shows(run_main: RunMain, run_dir: Path, cache_dir: Path) -> None:
    places = [f"--run_dir={run_dir}", f"--cache_dir={cache_dir}"]
    more = ["--max_grad_norm=1e-3", "--lr=2e-3", "--metrics_at=2"]
    outcome = run_main("train", *TINY, *places, *more)
    assert outcome.code == 0, outcome.err
    main, steps = events_of(run_dir), [5, 10]
    scalars = set(main.Tags()["scalars"])
    assert {"1_quality/loss", "2_speed/data_wait_share", "3_optimizer/lr_tables"} <= scalars
    assert not any("test" in tag for tag in scalars)
    chosen = "1_quality/full_NDCG@10"
    lines = {
        name: events_of(run_dir / "results" / name).Scalars(chosen)
        for name in ("popularity", "best_possible", "eval_test")
    }
    assert [each.step for each in main.Scalars(chosen)] == steps
    assert [each.step for each in lines["popularity"]] == steps
    assert [each.step for each in lines["best_possible"]] == steps
    assert lines["best_possible"][0].value == lines["best_possible"][1].value > 0
    (test,) = lines["eval_test"]
    assert test.value == pytest.approx(
        json.loads((run_dir / "eval_test.json").read_text())["full"]["NDCG@10"]
    )

    assert flags_of(run_dir / "results" / "eval_test") == {
        "run": "mine/eval_test",
        **{"data": "synthetic", "recipe": "none", "max_grad_norm": 1e-3, "lr": 2e-3},
        **{"synthetic_user_count": 60, "synthetic_item_count": 80, "max_len": 16, "emb_dim": 16},
        **{"num_layers": 1, "train_batch_size": 32, "num_epochs": 2},
        **{"loss": "softmax", "dropout": 0.2},  # the defaults, which other runs may not have
        "seen": "drop",  # which "auto" decided
        "metrics_at": "2",
    }
    assert texts(run_dir, "examples").keys() == set(steps)
    (about,) = texts(run_dir, "run").values()
    for part in ("train.py --recipe=none", "what each stage kept", "1 rank on cpu", "torchrec "):
        assert part in about
    (result,) = texts(run_dir / "results" / "eval_test", "result").values()
    shown = json.loads((run_dir / "eval_test.json").read_text())
    heads = [line for line in result.splitlines() if "| model |" in line]
    assert heads == [
        "| full | model | ± (95 %) | popularity alone | best possible on this data |",
        "| sampled | model | ± (95 %) | popularity alone |",
    ]
    for metric, value in shown["full"].items():
        assert f"\n| {metric} | {value:.4f} | " in result
    assert "lists of 10: " in result
    assert re.search(r"\| history: 20-49, [0-9]+ users \| [0-9.]+ \|", result)
    for protocol in ("full", "sampled"):
        (ranks,) = events_of(run_dir / "results" / "eval_test").Histograms(
            f"log10_of_ranks/{protocol}"
        )
        counts = shown["rank_histogram"]
        assert ranks.histogram_value.bucket == counts[protocol] and sum(counts[protocol]) == 60
        assert ranks.step == test.step
    (layout,) = main.Tensors("custom_scalars__config__")
    parsed = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    assert [each.title for each in parsed.category] == ["full and sampled", "learning rates"]
    charts = ["NDCG@10", "HR@2", "HR@10", "NDCG@2", "MRR"]
    assert [chart.title for chart in parsed.category[0].chart] == charts


def test_ranks_are_drawn_where_they_are(tmp_path: Path) -> None:
    limits = [1, 2, 5, 10, 20, 50, 80]
    histogram = {"limits": limits, "full": [0, 3, 0, 2, 1, 0, 0], "sampled": [4, 0, 0, 2, 0, 0, 0]}
    metrics = {"sampled": {"MRR": 0.5}, "full": {"MRR": 0.5}, "users": 6}
    result = {**metrics, "rank_histogram": histogram}
    folder = write_measured(tmp_path, Measured("eval_test", 7, result, {}), full=True)
    (path,) = folder.glob("events.*")
    drawn = {
        value.tag: make_ndarray(value.tensor)
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag.startswith("log10_of_ranks")
    }
    # Left, right and count of each interval: without the empty ones at both ends.
    edges = np.log10([0.5, *limits])
    expected = {"full": (1, [3, 0, 2, 1]), "sampled": (0, [4, 0, 0, 2])}
    for protocol, (first, counts) in expected.items():
        lefts, rights = (edges[at : at + len(counts)] for at in (first, first + 1))
        found = drawn[f"log10_of_ranks/{protocol}"]
        np.testing.assert_allclose(found, np.stack([lefts, rights, counts], axis=1), atol=1e-6)


def test_minimal_is_curves_alone(run_main: RunMain, run_dir: Path, cache_dir: Path) -> None:
    places = [f"--run_dir={run_dir}", f"--cache_dir={cache_dir}"]
    outcome = run_main("train", *TINY, *places, "--tensorboard=minimal")
    assert outcome.code == 0, outcome.err
    folders = {path.parent for path in run_dir.rglob("events.out.*")}
    assert len(folders) == 4
    for folder in folders:
        found = events_of(folder)
        assert found.Tags()["scalars"] and not found.Tags()["tensors"]
        assert not found.Tags()["histograms"]
    assert not list(run_dir.rglob("*.tsv"))


def test_eval_is_a_row_of_its_own(run_main: RunMain, run_dir: Path, cache_dir: Path) -> None:
    places = [f"--run_dir={run_dir}", f"--cache_dir={cache_dir}"]
    assert run_main("train", *TINY, *places).code == 0
    flags = [f"--checkpoint={run_dir}", f"--cache_dir={cache_dir}", "--popularity_discount=0.3"]
    for _ in range(2):
        outcome = run_main("eval", *flags)
        assert outcome.code == 0, outcome.err
    folder = run_dir / "results" / "eval_test-discount-0.3"
    assert len(list(folder.iterdir())) == 1  # the second took the place of the first
    shown = flags_of(folder)
    assert shown["run"] == "mine/eval_test-discount-0.3" and shown["popularity_discount"] == 0.3
    (event,) = events_of(folder).Scalars("1_quality/full_NDCG@10")
    result = json.loads((run_dir / f"{folder.name}.json").read_text())
    assert event.value == pytest.approx(result["full"]["NDCG@10"])
    trained = events_of(run_dir / "results" / "eval_test")
    assert event.step == trained.Scalars("1_quality/full_NDCG@10")[0].step > 0
    exported = run_main("eval", f"--checkpoint={run_dir / 'model'}", f"--cache_dir={cache_dir}")
    assert exported.code == 0, exported.err
    assert not (run_dir / "model" / "results").exists()


def test_lines_are_of_one_kind_for_each_event(
    run_main: RunMain, run_dir: Path, cache_dir: Path
) -> None:
    places = [f"--run_dir={run_dir}", f"--cache_dir={cache_dir}"]
    assert run_main("train", *TINY, *places, "--max_grad_norm=1e-3").code == 0
    lines = pd.read_json(run_dir / "metrics.jsonl", lines=True)
    assert lines.isna().mean().mean() < 0.5
    assert lines.event.value_counts().to_dict() == {"train": 10, "validation": 2}
    kinds = {kind: part.dropna(axis="columns") for kind, part in lines.groupby("event")}
    shared = {"event", "time", "step", "epoch", "samples"}
    assert shared <= set(kinds["train"]) & set(kinds["validation"])
    assert {"full", "sampled", "popularity", "seconds"} <= set(kinds["validation"])
    train = kinds["train"]
    # 143 windows an epoch, 32 a step.
    assert train.samples.tolist() == [32, 64, 96, 128, 143, 175, 207, 239, 271, 286]
    assert kinds["validation"].samples.tolist() == [143, 286]
    assert train.time.is_monotonic_increasing
    assert (train.gradient_norm > 1e-3).all() and (train.clipped_share == 1).all()
    assert (train.table_lr > 0).sum() == (train.lr > 0).sum()


def test_examples_are_the_best_unseen_items_and_the_target(
    one_rank: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last user's validation target, 3, is in the history before it.
    rows = [[1, 2, 3, 4, 5], [6, 7, 8, 9], [2, 4, 6, 8, 10, 12], [3, 5, 3, 7]]
    offsets = np.cumsum([0, *map(len, rows)])
    store = SequenceStore.from_arrays(np.concatenate(rows), offsets, 14)
    config = RunConfig(data=DataConfig(), windows=WindowConfig(max_len=8))
    plan = plan_execution(config, 14, one_rank)
    model = build_model(config, 14, one_rank, plan)
    found = Examples(model, store, 8, one_rank).found()
    recommender = Recommender(model, store.catalog, 8, one_rank)
    users = recommender.user_vectors([[str(i) for i in row[:-2]] for row in rows])
    scores = users @ recommender.item_vectors().T
    assert found.shape == (4, 10)
    for row, score, items in zip(rows, scores, found, strict=True):
        allowed = [i for i in range(1, 15) if i not in row[:-2] or i == row[-2]]
        expected = sorted(allowed, key=lambda item: -score[item - 1])[:10]
        assert items.tolist() == expected

    monkeypatch.setattr(projector, "MOST_ITEMS", 5)
    popular = popular_items(model, store.train_item_counts)
    counts = store.train_item_counts[1:-1]
    assert popular.items.tolist() == (np.argsort(-counts, kind="stable")[:5] + 1).tolist()
    np.testing.assert_array_equal(popular.vectors, recommender.item_vectors()[popular.items - 1])
