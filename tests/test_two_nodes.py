"""Two nodes with one rank each equal one node with two ranks.

Each node is a separate torchrun agent on this host, with its own working folder and cache of
prepared data. The run folder is shared, as on a shared file system.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, TINY, environment, losses_of, torchrun

FLAGS = (*TINY, "--mode=dmp", "--sharding=row_wise", "--seed=5", "--max_steps=4")
SECONDS = 120


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def agent(folder: Path, launch: list[str], flags: Sequence[str]) -> subprocess.Popen[str]:
    """Start one node's agent, whose ranks keep prepared data below ``folder``."""
    folder.mkdir(parents=True)
    launch = ["--nnodes=2", "--local_addr=127.0.0.1", *launch]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, str(ROOT / "train.py")]
    return subprocess.Popen(
        [*command, *flags, "--cache_dir=cache"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def train_on_nodes(folder: Path, launches: list[list[str]], flags: Sequence[str]) -> list[str]:
    """Train with one agent a node to the end; the outputs of the nodes."""
    nodes = [folder / f"node{number}" for number in range(len(launches))]
    agents = [agent(*each, flags) for each in zip(nodes, launches, strict=True)]
    try:
        outputs = [each.communicate(timeout=SECONDS)[0] for each in agents]
    finally:
        for each in agents:
            each.kill()
    assert [each.returncode for each in agents] == [0, 0], outputs
    for node in nodes:
        assert any((node / "cache").iterdir()), "each node prepares for itself"
    return outputs


def find(config: dict[str, Any], name: str) -> Any:
    """A value of a nested dict by its key."""
    if name in config:
        return config[name]
    found = (find(part, name) for part in config.values() if isinstance(part, dict))
    return next((value for value in found if value is not None), None)


@pytest.mark.slow
def test_two_nodes_equal_one(tmp_path: Path) -> None:
    where = ["--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    launches = [[*where, f"--node_rank={node}"] for node in (0, 1)]
    outputs = train_on_nodes(tmp_path / "nodes", launches, (*FLAGS, f"--run_dir={two}"))
    assert "2 ranks on cpu" in outputs[0]

    done = torchrun(
        2, ROOT / "train.py", *FLAGS, f"--cache_dir={tmp_path / 'cache'}", f"--run_dir={one}"
    )
    assert done.code == 0, done.err
    assert len(losses_of(one)) == 4
    # Nodes exchange rows by all-to-all, ranks of one node by gather: sums in another order.
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-6)
    plans = [json.loads((one.parent / run / "config.json").read_text()) for run in ("one", "two")]
    assert [find(plan, "exchange") for plan in plans] == ["gather", "all_to_all"]
