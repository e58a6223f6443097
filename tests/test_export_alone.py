"""safetensors, JSON and Parquet suffice to read an exported model, without TorchRec or torch."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.conftest import TINY, RunMain, run_process

# Names of modules that cannot be imported, then a program without them.
READ = """
import sys
for name in ("torch", "torchrec", "fbgemm_gpu", "torchdata", "pipeline", "model"):
    sys.modules[name] = None

import json
from pathlib import Path
import pyarrow.parquet
from safetensors.numpy import load_file

folder = Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
catalog = pyarrow.parquet.read_table(folder / "catalog.parquet")
(table,) = [w for name, w in load_file(folder / "model.safetensors").items() if "item" in name]
vector = dict(zip(catalog.column("item").to_pylist(), table[1:-1], strict=True))
print(json.dumps({
    "emb_dim": config["flags"]["emb_dim"],
    "num_items": config["num_items"],
    "items": [*map(str, vector)],
    "sums": [float(row.sum(dtype="float64")) for row in vector.values()],
}))
"""


def test_an_export_is_read_without_torchrec(
    run_main: RunMain, run_dir: Path, cache_dir: Path, tmp_path: Path
) -> None:
    export = tmp_path / "export"
    folders = (f"--run_dir={run_dir}", f"--cache_dir={cache_dir}", f"--export_root={export}")
    outcome = run_main("train", *TINY, "--num_epochs=1", *folders)
    assert outcome.code == 0, outcome.err

    alone = run_process("-c", READ, export)
    assert alone.code == 0, alone.err
    found = json.loads(alone.out)
    assert (found["emb_dim"], found["num_items"], len(found["items"])) == (16, 80, 80)
    assert len({*found["items"]}) == 80
    # Row 0 is padding, row 81 the mask token.
    (table,) = [w for name, w in load_file(export / "model.safetensors").items() if "item" in name]
    assert table.shape == (82, 16)
    assert found["sums"] == pytest.approx(table.double().numpy()[1:-1].sum(1), abs=1e-12)
    assert np.std(found["sums"]) > 0
