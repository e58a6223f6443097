"""The search of docs/tuning.md, word for word but for its size."""

import re
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.conftest import ROOT

optuna = pytest.importorskip("optuna")


def test_the_documented_search_runs(
    no_cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    rows = [f"u{user},i{(3 * user + time) % 20},{time}" for user in range(30) for time in range(8)]
    Path("clicks.csv").write_text("\n".join(["user,item,timestamp", *rows]))
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tuning.md").read_text(), re.S)
    small = '{"num_epochs": 2, "emb_dim": 8, "num_layers": 1, "cache_dir": "cache", '
    code = code.replace("flags = {", f"flags = {small}").replace("n_trials=20", "n_trials=3")

    class OnlyTheFirst(optuna.pruners.BasePruner):
        def prune(self, study: object, trial: optuna.trial.FrozenTrial) -> bool:
            return trial.number > 0

    names: dict[str, object] = {}
    create = optuna.create_study
    monkeypatch.setattr(
        optuna, "create_study", lambda **given: create(pruner=OnlyTheFirst(), **given)
    )
    try:
        exec(compile(code, "docs/tuning.md", "exec"), names)
    finally:
        dist.destroy_process_group()
    trials = names["study"].trials  # type: ignore[attr-defined]
    state = optuna.trial.TrialState
    assert [trial.state for trial in trials] == [state.COMPLETE, state.PRUNED, state.PRUNED]
    assert trials[0].value == max(trials[0].intermediate_values.values())
    assert list(trials[0].intermediate_values) == [1, 2]
    assert list(trials[1].intermediate_values) == [1]
