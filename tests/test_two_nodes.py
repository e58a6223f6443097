"""Two nodes with one rank each equal one node with two ranks.

Each node is a separate torchrun agent on this host, with its own working folder and cache of
prepared data. The run folder is shared, as on a shared file system.
"""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, TINY, environment, torchrun

FLAGS = (*TINY, "--mode=dmp", "--sharding=row_wise", "--seed=5", "--max_steps=4")
SECONDS = 120


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def agent(node: int, port: int, folder: Path) -> subprocess.Popen[str]:
    """Start one node's agent, whose ranks keep prepared data below ``folder``."""
    folder.mkdir()
    launch = ["--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1"]
    where = ["--master_addr=127.0.0.1", f"--master_port={port}", "--local_addr=127.0.0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, *where, ROOT / "train.py"]
    folders = ["--cache_dir=cache", f"--run_dir={folder.parent / 'runs' / 'two'}"]
    return subprocess.Popen(
        [*map(str, command), *FLAGS, *folders],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def losses(run_dir: Path) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def find(config: dict[str, Any], name: str) -> Any:
    """A value of a nested dict by its key."""
    if name in config:
        return config[name]
    found = (find(part, name) for part in config.values() if isinstance(part, dict))
    return next((value for value in found if value is not None), None)


def test_two_nodes_equal_one(tmp_path: Path) -> None:
    port = free_port()
    agents = [agent(node, port, tmp_path / f"node{node}") for node in (0, 1)]
    try:
        outputs = [each.communicate(timeout=SECONDS)[0] for each in agents]
    finally:
        for each in agents:
            each.kill()
    assert [each.returncode for each in agents] == [0, 0], outputs
    assert "2 ranks on cpu" in outputs[0]
    for node in (0, 1):
        assert any((tmp_path / f"node{node}" / "cache").iterdir()), "each node prepares for itself"

    one = tmp_path / "runs" / "one"
    done = torchrun(
        2, ROOT / "train.py", *FLAGS, f"--cache_dir={tmp_path / 'cache'}", f"--run_dir={one}"
    )
    assert done.code == 0, done.err
    assert len(losses(one)) == 4
    # Nodes exchange rows by all-to-all, ranks of one node by gather: sums in another order.
    assert losses(tmp_path / "runs" / "two") == pytest.approx(losses(one), rel=1e-6)
    plans = [json.loads((one.parent / run / "config.json").read_text()) for run in ("one", "two")]
    assert [find(plan, "exchange") for plan in plans] == ["gather", "all_to_all"]
