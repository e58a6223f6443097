"""Sharded, replicated or pipelined, one rank or two: the same training and evaluation.

The worker (tests/workers/sharded.py) runs here on one rank and under torchrun on two; these tests
compare both results. Tolerances are for the same float32 sums in another order, over 21 steps.
"""

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from model.checkpoints.checkpoints import Checkpoints
from model.distributed import Ranks, start
from pipeline.evaluation.config import HoldoutConfig
from pipeline.evaluation.holdout import EvalLoader
from tests.conftest import torchrun
from tests.reference_metrics import reference
from tests.workers import sharded
from tests.workers.sharded import EPOCHS, WAYS, Built, Copied, Run, Saved

METRICS = ("users", "sampled", "full", "popularity", "baselines", "debiased", "cold_targets")
LOSS, WEIGHT = 1e-5, 2e-5

Answers = dict[str, Any]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answers]:
    """The worker's results on one rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        ranks = start()
        try:
            found = sharded.answers(ranks, tmp_path_factory.mktemp("one"))
        finally:  # the tests after this module start their own group
            dist.destroy_process_group()
        yield found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """The worker's results on two ranks."""
    return answers_of(2, tmp_path_factory.mktemp("sharded"))


def answers_of(num_ranks: int, folder: Path) -> Answers:
    """The worker's results on several ranks."""
    outcome = torchrun(num_ranks, "tests/workers/sharded.py", folder, timeout=240)
    assert outcome.code == 0, outcome.err
    with pytest.MonkeyPatch.context() as patch:
        # The file names its classes as the script's own.
        patch.setattr(sys.modules["__main__"], "Run", Run, raising=False)
        patch.setattr(sys.modules["__main__"], "Copied", Copied, raising=False)
        patch.setattr(sys.modules["__main__"], "Saved", Saved, raising=False)
        return torch.load(folder / f"{num_ranks}.pt", weights_only=False)


def assert_same(found: Run, expected: Run) -> None:
    assert found.losses == pytest.approx(expected.losses, abs=LOSS)
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, atol=WEIGHT, rtol=0, msg=name)


def test_the_reference_learns(one: Answers) -> None:
    losses = one["unsharded"]["tied"].losses
    assert len(losses) == 3 * EPOCHS
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.6


@pytest.mark.parametrize("way", WAYS)
def test_one_rank_equals_the_unsharded_reference(one: Answers, way: str) -> None:
    assert_same(one["every_way"][way], one["unsharded"]["tied"])


OTHERWISE = ["row_wise, replayed", "row_wise, looked up", "row_wise, sent"]


@pytest.mark.parametrize("way", [*WAYS, *OTHERWISE])
def test_two_ranks_equal_the_unsharded_reference(one: Answers, two: Answers, way: str) -> None:
    assert_same(two["every_way"][way], one["unsharded"]["tied"])


@pytest.mark.parametrize("way", ["row_wise", "ddp"])
def test_the_untied_head_equals_the_reference(one: Answers, two: Answers, way: str) -> None:
    for answers in (one, two):
        assert_same(answers["every_way"][f"{way}, linear"], one["unsharded"]["linear"])
    different = (
        one["unsharded"]["linear"].weights["table"] - one["unsharded"]["tied"].weights["table"]
    )
    assert different.abs().max() > 100 * WEIGHT


@pytest.mark.parametrize("way", ["row_wise", "row_wise, replayed", "row_wise, sent", "ddp"])
def test_a_sampled_loss_equals_the_reference(one: Answers, two: Answers, way: str) -> None:
    # A step's negatives depend on its position in the data order, not on the number of ranks.
    for answers in (one, two):
        assert_same(answers["every_way"][f"{way}, sampled"], one["unsharded"]["sampled"])
    exact, sampled = (one["unsharded"][name].losses for name in ("tied", "sampled"))
    assert sampled != pytest.approx(exact, abs=1e-2)
    assert sum(sampled[-3:]) < sum(sampled[:3]) - 0.6


SEVERAL = ["requested", "requested, replayed", "requested, looked up"]


@pytest.mark.parametrize(
    ("way", "loss"),
    [
        *((way, "") for way in ("table_wise", "column_wise")),
        *product(("row_wise", "ddp", "looked up", "sent", "row_wise, replayed"), sharded.LOSSES),
        *product(SEVERAL, sharded.LOSSES),
    ],
)
def test_training_with_attributes_equals_autograds(
    one: Answers, two: Answers, way: str, loss: str
) -> None:
    expected = one["unsharded_with_attributes"][loss]
    for answers in (two,) if way in SEVERAL else (one, two):
        assert_same(answers["with_attributes"][f"{way}{loss}"], expected)
    assert sum(expected.losses[-3:]) < sum(expected.losses[:3]) - 0.6
    without = one["unsharded"]["sampled" if loss else "tied"]
    assert without.losses != pytest.approx(expected.losses, abs=1e-2)


@pytest.mark.parametrize("way", [*WAYS, "row_wise, sent"])
def test_torchrec_calls_the_tables_input_dist_a_batch_ahead(
    one: Answers, two: Answers, way: str
) -> None:
    for answers in (one, two):
        assert answers["every_way"][way].pipelined == (way != "ddp")


@pytest.mark.parametrize("loss", ["", ", sampled"])
def test_requested_rows_equal_gathered_ones(one: Answers, two: Answers, loss: str) -> None:
    runs, expected = two["every_way"], one["every_way"][f"row_wise{loss}"]
    for way in ("", ", replayed", *([] if loss else [", looked up"])):
        run = runs[f"row_wise, requested{way}{loss}"]
        assert run.pipelined == 1
        assert_same(run, expected)
    assert runs[f"row_wise, requested, replayed{loss}"].replayable > 2


@pytest.mark.parametrize("loss", ["", ", sampled"])
def test_steps_of_one_shape_are_replayed(one: Answers, two: Answers, loss: str) -> None:
    for answers in (one, two):
        assert answers["every_way"][f"row_wise, replayed{loss}"].replayable > 2
        assert answers["every_way"][f"row_wise{loss}"].replayable == 0
    assert_same(one["every_way"][f"row_wise, replayed{loss}"], one["every_way"][f"row_wise{loss}"])


@pytest.mark.parametrize("kind", ["tied, softmax", "tied, sampled_softmax", "linear, sampled"])
def test_fp16_tables_give_the_same_losses_on_one_rank_and_two(
    one: Answers, two: Answers, kind: str
) -> None:
    """Rows are rounded by the same random bits; sums in another order turn a few of them.

    At a rate of .1, rows of 23 items move by hundreds of spacings.
    """
    found = {
        name: run
        for answers in (one, two)
        for name, run in answers["halves"].items()
        if name.startswith(kind)
    }
    assert len(found) == 6
    (alone,) = (run.losses for name, run in found.items() if name.endswith("none"))
    assert sum(alone[-3:]) < sum(alone[:3]) - 0.3
    for name, run in found.items():
        assert run.losses == pytest.approx(alone, abs=0.01), name
        assert (run.replayable > 2) == ("replayed" in name)


def test_a_checkpoint_of_fp16_tables_is_restored_on_another_number_of_ranks(
    one: Answers, two: Answers, one_rank: Ranks
) -> None:
    for answers in (one, two):
        saved: Saved = answers["saved"]
        built = Built.of(sharded.config_of(sharded.HALF, one_rank), one_rank)
        optimizers = built.optimizers()
        position = Checkpoints(saved.run_dir, one_rank).resume(built.model, optimizers)
        assert position.step == saved.step == 9
        assert sharded.weights_of(built.model)["table"].equal(saved.table)
        later = sharded.later_losses(built, optimizers, saved.step)
        if answers is one:  # the same bits
            assert later == saved.later
        assert later == pytest.approx(saved.later, abs=0.01)


def test_tables_of_a_linear_head_equal_the_reference(one: Answers, two: Answers) -> None:
    for answers, count in ((one, 5), (two, 9)):
        assert len(answers["linear"]) == count
        for name, run in answers["linear"].items():
            expected = "linear" + ", sampled" * name.startswith("sampled")
            assert_same(run, one["unsharded"][expected])
            assert run.pipelined == 1
            assert (run.replayable > 2) == ("replayed" in name)


@pytest.mark.parametrize("way", ["row_wise", "ddp"])
def test_the_pipeline_equals_the_plain_loop(one: Answers, two: Answers, way: str) -> None:
    for answers in (one, two):
        runs = answers["every_way"]
        assert runs[way].losses == runs[f"{way}, plain loop"].losses
        for name, weight in runs[way].weights.items():
            assert torch.equal(runs[f"{way}, plain loop"].weights[name], weight), name


@pytest.mark.parametrize("way", [*WAYS, "table_wise, linear", "row_wise, cooccurrence"])
def test_own_optimizers_give_the_same_losses_on_one_rank_and_two(
    one: Answers, two: Answers, way: str
) -> None:
    # Adam may divide by tiny values, which enlarges rounding errors: ten times the
    # tolerance. Weights are not compared: the key bias's gradient is only rounding errors.
    alone = one["own_optimizers"][way].losses
    assert two["own_optimizers"][way].losses == pytest.approx(alone, abs=10 * LOSS)
    assert sum(alone[-3:]) < sum(alone[:3]) - 0.3
    # A linear head's table of items has rows that are not looked up, which only ddp's Adam moves.
    if way in WAYS:
        assert alone == pytest.approx(one["own_optimizers"]["ddp"].losses, abs=10 * LOSS)


@pytest.mark.parametrize("way", ["row_wise", "ddp"])
def test_a_learning_rate_of_0_changes_no_weight(one: Answers, two: Answers, way: str) -> None:
    for answers in (one, two):
        runs = answers["at_factor"][way]
        for name, weight in runs["untouched"].items():
            assert torch.equal(runs[0.0].weights[name], weight), name
            assert not torch.equal(runs[1.0].weights[name], weight), name


def test_the_schedule_reaches_the_fused_tables(one: Answers, two: Answers) -> None:
    for answers in (one, two):
        runs = answers["at_factor"]["row_wise"]
        start, half, whole = (
            runs["untouched"]["table"],
            *(runs[factor].weights["table"] for factor in (0.5, 1.0)),
        )
        assert (whole - start).abs().max() > 1e-3
        torch.testing.assert_close(2 * (half - start), whole - start, atol=1e-6, rtol=0)


@pytest.mark.parametrize("attributes", ["", ", attributes"])
@pytest.mark.parametrize("way", [*WAYS, "in parts"])
def test_evaluation_does_not_depend_on_ranks_or_sharding(
    one: Answers, two: Answers, way: str, attributes: str
) -> None:
    expected, way = one["evaluation"][f"ddp{attributes}"], f"{way}{attributes}"
    assert (expected == one["evaluation"]["ddp"]) == (not attributes)
    assert expected["users"] == 13
    assert 0 < expected["full"]["MRR"] < 1
    assert expected["popularity"]["full"] != expected["full"]
    for answers in (one, two):
        found = answers["evaluation"][way]
        assert found["users"] == 13
        for protocol in ("sampled", "full"):
            assert found[protocol] == pytest.approx(expected[protocol])
            popularity = expected["popularity"][protocol]
            assert found["popularity"][protocol] == pytest.approx(popularity)


@pytest.mark.parametrize("seen", ["drop", "keep"])
@pytest.mark.parametrize("parts", ["", ", in parts"])
def test_all_metrics_equal_an_independent_implementation(
    one: Answers, two: Answers, seen: str, parts: str
) -> None:
    store = sharded.histories()
    config = HoldoutConfig(eval_negatives=5)
    loader = EvalLoader(store, "test", 6, 100, config, keep_seen=seen == "keep")
    (batch,) = loader
    users = batch.users.tolist()
    histories = np.split(store.items, store.offsets[1:-1])
    expected = reference(
        {user: items.tolist() for user, items in enumerate(histories)},
        users,
        sharded.NUM_ITEMS,
        "test",
        dict(zip(users, one["scores"].tolist(), strict=True)),
        dict(zip(users, batch.negatives.tolist(), strict=True)),
        seen == "keep",
        (1, 3, 10),
    )
    assert 0 < expected["full"]["MRR"] < 1 and len(expected["groups"]["target"]) == 2
    one_result = one["measured"][f"row_wise, {seen}{parts}"][0]
    for answers, way in product((one, two), ("row_wise", "ddp")):
        result, ranked = answers["measured"][f"{way}, {seen}{parts}"]
        assert_near(result, expected)
        # Everything beside the sums is computed from all users in their order.
        for key in ("intervals", "debiased", "groups", "cold_targets", "lists", "protocol"):
            assert result[key] == one_result[key]
        assert ranked.users.tolist() == users
        assert len(ranked.ranks) == (4 if seen == "keep" else 2)
        targets = store.items[store.offsets[1:] - 1]
        own = one["scores"].numpy()[np.arange(len(users)), targets - 1]
        np.testing.assert_allclose(ranked.scores, own, atol=1e-6)


@pytest.mark.parametrize("seen", ["drop", "keep"])
def test_several_targets_are_the_same_on_two_ranks(one: Answers, two: Answers, seen: str) -> None:
    expected, known = one["measured_by_time"][f"row_wise, {seen}"]
    users, places = sharded.by_time().parts.targets("test", sharded.histories().items, every=True)
    assert expected["targets"] == len(users) > expected["users"] == len(set(users.tolist()))
    for answers, way in product((one, two), ("row_wise", "ddp")):
        result, ranked = answers["measured_by_time"][f"{way}, {seen}"]
        assert_near(result, {name: expected[name] for name in METRICS})
        for key in ("intervals", "groups", "lists", "recent_days", "targets", "protocol"):
            assert result[key] == expected[key]
        assert ranked.users.tolist() == users.tolist()
        assert ranked.places.tolist() == places.tolist()
        assert ranked.ranks.keys() == known.ranks.keys() >= {"model", "popular_recently"}
        for name, ranks in known.ranks.items():
            assert ranked.ranks[name].tolist() == ranks.tolist()


def assert_near(found: Any, expected: Any) -> None:
    """All of ``expected`` is in ``found``."""
    if not isinstance(expected, dict):
        assert found == pytest.approx(expected, rel=1e-12)
        return
    for name in expected:
        assert_near(found[name], expected[name])


@pytest.mark.parametrize("way", WAYS)
def test_an_export_holds_one_rank_s_part_of_the_table_at_a_time(
    one: Answers, two: Answers, way: str
) -> None:
    untouched = one["at_factor"]["ddp"]["untouched"]
    for answers in (one, two):
        copied = answers["exported"][way]
        assert copied.held == 1
        assert torch.equal(copied.weights["embeddings.embeddings.item.weight"], untouched["table"])
        for name in untouched.keys() - {"table"}:
            assert torch.equal(copied.weights[f"encoder.{name}"], untouched[name])
    # 23 rows of 16 values.
    assert one["exported"][way].parts == [((0, 0), [23, 16])]
    parts = {"row_wise": [((0, 0), [12, 16]), ((12, 0), [11, 16])]}
    parts["column_wise"] = [((0, 0), [23, 8]), ((0, 8), [23, 8])]
    assert copied.parts == parts.get(way, [((0, 0), [23, 16])])


@pytest.mark.parametrize("way", WAYS)
def test_an_export_holds_sums_of_items_and_attributes(one: Answers, two: Answers, way: str) -> None:
    name, places = "embeddings.embeddings.item.weight", sharded.attributes().places
    start = one["initial_with_attributes"]
    added = torch.cat([start["attributes"], torch.zeros(1, 16)])[torch.from_numpy(places)]
    for answers in (one, two):
        copied = answers["exported"][f"{way}, attributes"]
        assert copied.held == 1
        own = torch.arange(23)[:, None] != 5
        expected = start["table"] * own + added.sum(dim=1)
        torch.testing.assert_close(copied.weights[name], expected)
        assert copied.weights[name][[0, -1]].equal(start["table"][[0, -1]])


@pytest.mark.slow
def test_four_ranks_equal_one(one: Answers, two: Answers, tmp_path: Path) -> None:
    """As on two ranks, but in every epoch's last step three of the four have a filler row."""
    four = answers_of(4, tmp_path)
    for way, run in two["every_way"].items():
        reference = next((name for name in ("linear", "sampled") if name in way), "tied")
        assert_same(four["every_way"][way], one["unsharded"][reference])
        assert four["every_way"][way].pipelined == run.pipelined
    for way in two["with_attributes"]:
        loss = ", sampled" if "sampled" in way else ""
        assert_same(four["with_attributes"][way], one["unsharded_with_attributes"][loss])
    for way, result in one["evaluation"].items():
        found = four["evaluation"][way]
        assert found["users"] == result["users"] == 13
        for protocol in ("sampled", "full"):
            assert found[protocol] == pytest.approx(result[protocol])
            popularity = result["popularity"][protocol]
            assert found["popularity"][protocol] == pytest.approx(popularity)
