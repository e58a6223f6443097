"""A guard of quality that runs on a CPU in a minute: MovieLens 100K, twelve epochs, two floors.

Full ranking on validation. Measured by this very command, HR@10 / NDCG@10:

    seeds 0, 1, 2                                      .191 / .096   .192 / .101   .188 / .100
    the floors                                         .170 / .085
    schedule: a warm-up that never ends                .159 / .076
    mask: 95 % of the items hidden                     .133 / .063
    attention: no distances, no rows with left context .120 / .053
    head: scores 14 times too small                    .112 / .057
    popularity alone                                   .073 / .034
    learning rate a tenth                              .072 / .034
    mask: targets stay visible        .006 / .003
"""

import json
from pathlib import Path

from tests.conftest import DATA, RunMain, needs_ml_100k

FLAGS = (
    "--dataset_name=ml-100k",
    f"--dataset_path={DATA / 'ml-100k.zip'}",
    "--recipe=none",
    "--max_len=100",
    "--emb_dim=64",
    "--nhead=2",
    "--learned_positions=false",
    "--train_batch_size=32",
    "--lr=2e-3",
    "--num_epochs=12",
    "--eval_every=12",
)
HR, NDCG = 0.17, 0.085


@needs_ml_100k
def test_ml_100k_is_learned(run_main: RunMain, run_dir: Path, cache_dir: Path) -> None:
    outcome = run_main("train", *FLAGS, f"--run_dir={run_dir}", f"--cache_dir={cache_dir}")
    assert outcome.code == 0, outcome.err
    flags = [f"--checkpoint={run_dir}", f"--cache_dir={cache_dir}", "--split=validation"]
    assert run_main("eval", *flags).code == 0
    result = json.loads((run_dir / "eval_validation.json").read_text())
    found, popularity = result["full"], result["popularity"]["full"]
    assert found["HR@10"] > HR > 2 * popularity["HR@10"], (found, popularity)
    assert found["NDCG@10"] > NDCG > 2 * popularity["NDCG@10"], (found, popularity)
