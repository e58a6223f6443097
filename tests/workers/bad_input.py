"""Worker: bad input through train.py's main() on two ranks, one case after the other.

    torchrun --nproc_per_node 2 tests/workers/bad_input.py FOLDER

Each rank writes FOLDER/<rank>.json: exit code and stderr of each case. Each works in a folder of
its own, FOLDER/<rank>, as ranks on two hosts.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

import train
from pipeline import errors

TINY = (
    *("--recipe=none", "--max_len=8", "--emb_dim=16", "--num_layers=1", "--train_batch_size=8"),
    *("--num_epochs=1", "--min_user_count=0"),
)
HEAD = "user,item,rating\n"
ONE_USER = HEAD + "1,1,4\n1,2,4\n1,3,4\n"


def cases(folder: Path) -> Iterator[tuple[str, int, list[str]]]:
    """Name, expected exit code, flags."""
    texts = {
        "empty": "",
        "header only": HEAD,
        "text for a number": ONE_USER + "1,2,four\n",
        "histories of length 2": HEAD + "1,1,4\n1,2,4\n2,1,4\n2,2,4\n",
        "no separator": ONE_USER.replace(",", " "),
    }
    for name, text in texts.items():
        path = folder / f"{name.replace(' ', '_')}.csv"
        path.write_text(text)
        yield name, 2, [f"--dataset_path={path}"]
    path = folder / "one_user.csv"
    path.write_text(ONE_USER)
    good = f"--dataset_path={path}"
    yield "no such file", 2, ["--dataset_path=none.csv"]
    yield "a flag out of range", 2, [good, "--mask_prob=1"]
    yield "an unknown flag", 2, [good, "--max_length=8"]
    yield "all dropped", 2, [good, "--min_rating=5"]
    yield "more memory than there is", 2, [good, "--max_len=99999999999"]
    yield "a run folder that is a file", 2, [good, f"--run_dir={path}"]
    yield "a cache that is a file", 2, [good, f"--cache_dir={path}"]
    yield "an export that is a file", 2, [good, f"--export_root={path}"]
    yield "a run folder of each host", 2, [good, "--run_dir=own"]
    Path("ratings.csv").write_text(ONE_USER + f"1,{4 + int(os.environ['RANK'])},4\n")
    caches = f"--cache_dir={Path.cwd()}"
    here = {name: os.environ[name] for name in ("GROUP_RANK", "LOCAL_RANK")}
    os.environ |= {"GROUP_RANK": os.environ["RANK"], "LOCAL_RANK": "0"}  # each rank is a host
    yield "other ratings on each host", 2, ["--dataset_path=ratings.csv", caches]
    os.environ |= here
    yield "more ranks than users", 0, [good]
    yield "more rows than there are", 0, [good, "--train_batch_size=100000"]


def end(number: int, arguments: list[str]) -> dict[str, object]:
    """Run one case as a separate start."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # a separate process group
    sys.argv = ["train.py", *TINY, *arguments]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            train.main()
        except SystemExit as ended:
            code = ended.code
    return {"code": code, "said": said.getvalue()}


def leave(code: int) -> None:
    raise SystemExit(code)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os._exit = leave
    errors.time = SimpleNamespace(sleep=lambda seconds: None)  # no torchrun ends rank 1 here
    rank, found = int(os.environ["RANK"]), {}
    (folder / str(rank)).mkdir()
    os.chdir(folder / str(rank))
    for number, (name, expected, flags) in enumerate(cases(folder)):
        folders = [f"--cache_dir={folder / 'cache'}", f"--run_dir={folder / f'run-{number}'}"]
        found[name] = {"expected": expected, **end(number, [*folders, *flags])}
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
