"""recommend.py: the documented commands on small data, on one, two and three ranks."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from model.checkpoints.export import export
from model.distributed import Ranks
from model.programs.recommender import Recommender as Alone
from model.run.trained import TrainedRun
from model.serving.recommender import Recommender
from model.settings.config import EvalFlags
from pipeline.preparation.catalog import Catalog
from tests.conftest import ROOT, TINY, RunMain, assert_one_line, run_process, torchrun

# The ids of the documented commands, and more; 2 is never rated in a training part.
ITEMS = [1193, 661, 914, 2571, *range(3, 45)]
COLD, NUM_USERS = 2, 50


@dataclass(frozen=True)
class Trained:
    """A folder with the run runs/ml-1m, the same in ddp, an export and prepared data."""

    folder: Path
    cache: Path

    @property
    def flags(self) -> list[str]:
        return ["--checkpoint", str(self.folder / "runs/ml-1m"), "--cache_dir", str(self.cache)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Trained:
    """Two models of data like ML-1M's: users 1 ... 50 with 12 ratings each."""
    folder = tmp_path_factory.mktemp("trained")
    generator, lines = np.random.default_rng(0), []
    for user in range(1, NUM_USERS + 1):
        items = generator.permutation(ITEMS)[:12].tolist()
        items[-1] = COLD if user == 1 else items[-1]
        lines += [f"{user}::{item}::5::{time}" for time, item in enumerate(items)]
    (folder / "ratings.dat").write_text("\n".join(lines))
    titles = "\n".join(f"{item}::Film {item} (1999)::Drama" for item in ITEMS)
    (folder / "movies.dat").write_text(titles)
    for run, more in (("ml-1m", ["--export_root=exported"]), ("ddp", ["--mode=ddp"])):
        data = [f"--dataset_path={folder / 'ratings.dat'}", f"--cache_dir={cache_dir}"]
        command = [*TINY[3:], *data, f"--run_dir=runs/{run}", "--num_epochs=1", *more]
        outcome = run_process(ROOT / "train.py", "--recipe=none", *command, cwd=folder)
        assert outcome.code == 0, outcome.err
    return Trained(folder, cache_dir)


def history_of(trained: Trained, user: int) -> list[str]:
    lines = (trained.folder / "ratings.dat").read_text().splitlines()
    return [line.split("::")[1] for line in lines if line.startswith(f"{user}::")]


def test_a_user_of_the_training_data(trained: Trained, run_main: RunMain) -> None:
    outcome = run_main("recommend", *trained.flags, "--user", "42")
    assert outcome.code == 0, outcome.err
    title, *lines = outcome.out.splitlines()
    assert title == "history of 12 known items, the newest 10, oldest first"
    before, after = lines[:10], lines[11:]
    history = history_of(trained, 42)
    assert [line.split() for line in before] == [
        [item, "Film", item, "(1999)"] for item in history[-10:]
    ]
    assert lines[10].split() == ["rank", "item", "title", "score"]
    rows = [line.split() for line in after]
    assert [row[0] for row in rows] == [str(rank) for rank in range(1, 11)]
    assert not {row[1] for row in rows} & {*history, str(COLD)}
    assert [row[2:5] for row in rows] == [["Film", row[1], "(1999)"] for row in rows]
    scores = [float(row[5]) for row in rows]
    assert scores == sorted(scores, reverse=True)


def test_somebody_new(trained: Trained, run_main: RunMain) -> None:
    history = "1193,661,914"
    outcome = run_main("recommend", *trained.flags, "--history", history, "--k", "20")
    assert outcome.code == 0 and not outcome.err
    rows = [line.split() for line in outcome.out.splitlines()]
    assert [row[0] for row in rows[1:4]] == history.split(",")
    assert len(rows) == 5 + 20
    # The rows of user 42 are those of the same history.
    given = ",".join(history_of(trained, 42))
    as_user = run_main("recommend", *trained.flags, "--user", "42")
    assert run_main("recommend", *trained.flags, "--history", given).out == as_user.out

    outcome = run_main("recommend", *trained.flags, "--history", "1193,none", "--k", "1")
    assert "1 of 2 items in the histories are unknown" in outcome.err
    outcome = run_main("recommend", *trained.flags, "--history", "none", "--k", "2")
    assert "ranked by popularity" in outcome.err
    assert outcome.out.startswith("history without a known item: the most popular items\n")


def test_all_users_on_two_ranks_and_three(trained: Trained, run_main: RunMain) -> None:
    # The documented command, in batches of 7.
    command = ["--checkpoint", "runs/ml-1m", "--all", "--k", "100", "--output", "recs.parquet"]
    more = f"--cache_dir={trained.cache}"
    outcome = torchrun(
        2, ROOT / "recommend.py", *command, more, "--batch_size=7", cwd=trained.folder
    )
    assert outcome.code == 0 and outcome.err == "", outcome.err
    folders = [trained.folder / "runs" / name for name in ("ml-1m", "ddp")]
    worker = ROOT / "tests" / "workers" / "recommended.py"
    outcome = torchrun(3, worker, trained.cache, *folders)
    assert outcome.code == 0, outcome.err

    for folder in folders:
        flags = [f"--checkpoint={folder}", more, "--batch_size=7", "--all", "--k=100"]
        run_main("recommend", *flags, f"--output={folder / 'recs-1.parquet'}")
        one, three = (pq.read_table(folder / f"recs-{ranks}.parquet") for ranks in (1, 3))
        assert one.equals(three)
    one = pq.read_table(folders[0] / "recs-1.parquet")
    assert one.equals(pq.read_table(trained.folder / "recs.parquet"))
    assert not one.equals(pq.read_table(folders[1] / "recs-1.parquet"))

    # In the users' order, all items that are neither seen nor cold, once each.
    rows = one.to_pylist()
    assert [*dict.fromkeys(row["user"] for row in rows)] == [str(u) for u in range(1, 51)]
    for user in (1, 42):
        items = [row["item"] for row in rows if row["user"] == str(user)]
        assert sorted(items) == sorted({*map(str, ITEMS)} - {*history_of(trained, user)})

    exported = trained.folder / "exported"
    output = trained.folder / "exported.parquet"
    flags = [f"--checkpoint={exported}", more, "--all", "--k=100", f"--output={output}"]
    assert run_main("recommend", *flags, "--batch_size=7").code == 0
    assert pq.read_table(output).equals(one)


def test_python_recommends_what_the_command_does(
    trained: Trained, run_main: RunMain, no_cuda: None
) -> None:
    history = ["1193", "661"]
    output = trained.folder / "new.parquet"
    flags = [*trained.flags, "--history", ",".join(history), f"--output={output}"]
    assert run_main("recommend", *flags).code == 0
    try:
        for folder in ("runs/ml-1m", "exported", "runs/ddp"):
            recommender = Recommender.load(trained.folder / folder, device="cpu")
            found = recommender.recommended([history], k=10)
            vectors = recommender.user_vectors([history]) @ recommender.item_vectors().T
            assert found["score"][0].as_py() <= vectors.max() + 1e-6
            # The command's user has the same number, 0.
            assert found.equals(pq.read_table(output)) == (folder != "runs/ddp")
    finally:
        dist.destroy_process_group()


# Runs the code of a document, where its files are.
RUN_CODE = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
text = open(sys.argv[2]).read()
codes = re.findall(r"^```python\\n(.*?)^```", text, re.M | re.S)
namespace = {"__name__": "document"}
for code in codes:
    if "faiss" not in code:  # not installed
        exec(code, namespace)
answer, served = namespace["answer"], namespace["served"]
namespace["refresh"]()
assert namespace["served"] is served
served._written = None
namespace["refresh"]()
assert namespace["served"] is not served
vector = namespace["r"].user_vectors([["1193", "661"]])
assert abs(namespace["vectors"].numpy() - vector).max() < 1e-5
print(json.dumps([len(codes), answer("history=1193,661&k=2"), answer("history=none&k=1")]))
"""


def test_the_code_of_the_document(trained: Trained) -> None:
    document = ROOT / "docs" / "serving.md"
    outcome = run_process("-c", RUN_CODE, ROOT, document, cwd=trained.folder)
    assert outcome.code == 0, outcome.err
    codes, known, unknown = json.loads(outcome.out.splitlines()[-1])
    assert codes == 5
    assert len(known["items"]) == 2 and not known["popular"] and known["step"] > 0
    assert len(unknown["items"]) == 1 and unknown["popular"]


def test_users_of_a_run_whose_model_has_none(trained: Trained, tmp_path: Path) -> None:
    """A run's own exported model has no users; the run has."""
    run = TrainedRun(EvalFlags(checkpoint=str(trained.folder / "runs" / "ml-1m")))
    run.check_users()
    model = run.trained(Ranks(0, 1, 1, torch.device("cpu")))
    export(model, tmp_path, with_users=True, with_programs=False)
    assert len(Catalog.read(tmp_path).users) == NUM_USERS


def test_an_export_without_users_cannot_give_them(
    trained: Trained, run_main: RunMain, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    model = trained.folder / "runs" / "ml-1m" / "model"
    for folder, message in (
        (model, f"--with_users: {model} has no users.parquet: give the run folder by --checkpoint"),
        (tmp_path / "missing", "missing is no run folder"),
    ):
        flags = [f"--checkpoint={folder}", f"--output={target}", "--with_users"]
        assert_one_line(run_main("export", *flags), "export", message)
        assert not target.exists()


def test_histories_of_a_file(trained: Trained, run_main: RunMain, tmp_path: Path) -> None:
    users, items = [8, 7, 8, 9], ["661", "1193", "914", "none"]
    table = pa.table({"user": users, "item": items, "timestamp": [5, 1, 2, 1]})
    pq.write_table(table, tmp_path / "new_users.parquet")
    flags = [*trained.flags, "--histories", tmp_path / "new_users.parquet", "--k=3"]
    outcome = run_main("recommend", *flags, "--output", tmp_path / "recs.jsonl")
    assert outcome.code == 0
    assert "1 of 4 items" in outcome.err and "1 of 3 users have no known item" in outcome.err
    rows = [json.loads(line) for line in (tmp_path / "recs.jsonl").read_text().splitlines()]
    assert [row["user"] for row in rows] == [7] * 3 + [8] * 3 + [9] * 3
    assert [row["popularity"] for row in rows] == [False] * 6 + [True] * 3
    assert rows[0].keys() == {"user", "rank", "item", "score", "title", "popularity"}
    assert outcome.out.endswith("recs.jsonl: 9 rows for 3 users\n")
    pq.write_table(table.slice(1, 1), tmp_path / "new_users.parquet")
    outcome = run_main("recommend", *flags, "--output", tmp_path / "recs-1.jsonl")
    assert outcome.out.endswith("recs-1.jsonl: 3 rows for 1 user\n")
    single = tmp_path / "one.csv"
    run_main("recommend", *trained.flags, "--history=914,661", "--k=3", f"--output={single}")
    lines = single.read_text().splitlines()
    assert lines[0] == '"user","rank","item","score","title"'
    assert [line.split(",")[2].strip('"') for line in lines[1:]] == [
        row["item"] for row in rows[3:6]
    ]


def test_similar_items(trained: Trained, run_main: RunMain, tmp_path: Path) -> None:
    outcome = run_main("recommend", *trained.flags, "--similar", "1193")
    assert outcome.code == 0 and not outcome.err
    first, header, *rows = outcome.out.splitlines()
    assert first == "similar to 1193  Film 1193 (1999)"
    assert header.split() == ["rank", "item", "title", "cosine"] and len(rows) == 10
    assert not {row.split()[1] for row in rows} & {"1193", str(COLD)}
    (tmp_path / "ids").write_text("661\n\n914\nnone\n")
    flags = [*trained.flags, "--similar=1193", f"--output={tmp_path / 'similar.parquet'}"]
    outcome = run_main("recommend", *flags, f"--allow={tmp_path / 'ids'}")
    assert "1 of the ids to allow or deny" in outcome.err
    table = pq.read_table(tmp_path / "similar.parquet")
    assert table.column_names == ["rank", "item", "score", "title"]
    assert {*table["item"].to_pylist()} == {"661", "914"}


def test_no_other_spelling_is_an_items_id(
    trained: Trained, run_main: RunMain, tmp_path: Path
) -> None:
    """As in files of ratings, only blanks and tabs around an id do not count."""
    (tmp_path / "ids").write_text("661\u00a0\n914\u2028661\n 661\t\r\n914\n", newline="")
    flags = [*trained.flags, "--history=1193\u00a0, 661", f"--allow={tmp_path / 'ids'}"]
    outcome = run_main("recommend", *flags)
    assert outcome.code == 0
    assert "1 of 2 items in the histories are unknown" in outcome.err
    assert "2 of the ids to allow or deny" in outcome.err


def test_a_pipe_beside_the_output(trained: Trained, run_main: RunMain, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "similar.csv.part")
    flags = [*trained.flags, "--similar=1193", f"--output={tmp_path / 'similar.csv'}"]
    assert run_main("recommend", *flags).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["similar.csv"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--user=nobody"], "--user nobody: no such user in the training data"),
        (["--similar=none"], "unknown item none"),
        (["--user=42", "--allow=missing"], "--allow missing cannot be read: No such file"),
        (["--history=1193", "--deny={all}"], "none of the 47 items may be recommended"),
        (["--history=1193", "--deny={empty}"], "no ids in it"),
        (["--user=42", "--output={empty}/recs.csv"], "cannot be written"),
        (
            ["--histories=missing.csv", "--output=recs.csv"],
            "no such file: missing.csv; check the path",
        ),
        (
            ["--histories=~nobody.here/--dataset_path", "--output=recs.csv"],
            "--histories ~nobody.here/--dataset_path: there is no such user's home folder",
        ),
        (["--user=42", "--allow=/dev/zero"], "cannot be read: it is a pipe or device"),
        (["--user=42", "--deny={pipe}"], "cannot be read: it is a pipe or device"),
        ([f"--checkpoint={'a' * 300}", "--user=42"], "cannot be read (File name too long)"),
        (["--user=42", f"--output={'a' * 300}.csv"], "cannot be written: File name too long"),
        (["--user=42", "--kk=3"], "unknown argument --kk=3"),
        (["--user=42", "--at=2001-02-03"], "--at: the model reads no times"),
        (["--checkpoint=missing", "--user=42"], "missing is no run folder"),
    ],
)
def test_mistakes_are_one_line(
    trained: Trained,
    run_main: RunMain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {name: tmp_path / name for name in ("all", "empty", "pipe")}
    os.mkfifo(files["pipe"])
    files["all"].write_text("\n".join(map(str, ITEMS)))
    files["empty"].write_text("\n")
    outcome = run_main("recommend", *trained.flags, *(flag.format(**files) for flag in flags))
    assert_one_line(outcome, "recommend", message)
    assert {file.name for file in tmp_path.iterdir()} == files.keys()


def test_an_item_that_only_validation_parts_have(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    """User 0's last item but one is 3, trained on with --train_on_validation; 4 never is."""
    rows = [f"{user},{5 + (user + at) % 20}" for user in range(20) for at in range(6)]
    rows += ["0,3", "0,4", *(f"{user},{5 + user}" for user in range(1, 20))]
    (tmp_path / "ratings.csv").write_text("\n".join(["user,item", *rows]))
    data = f"--dataset_path={tmp_path / 'ratings.csv'}", f"--cache_dir={cache_dir}"
    run, folder = tmp_path / "run", tmp_path / "exported"
    places = f"--run_dir={run}", f"--export_root={folder}", "--train_on_validation"
    outcome = run_main("train", *TINY[:1], *TINY[3:], *data, *places)
    assert outcome.code == 0, outcome.err
    expected = {"3", *map(str, range(6, 25))}  # 5 is the history
    for checkpoint in (run, folder):
        output = tmp_path / "recs.parquet"
        flags = f"--checkpoint={checkpoint}", "--history=5", "--k=100", f"--output={output}"
        assert run_main("recommend", *flags).code == 0
        assert {*pq.read_table(output)["item"].to_pylist()} == expected
        outcome = run_main("recommend", f"--checkpoint={checkpoint}", "--similar=3", "--k=1")
        assert outcome.code == 0 and not outcome.err
    alone = Alone(folder)
    assert {item for item, _ in alone.recommend([["5"]], k=100)[0]} == expected
    assert {item for item, _ in alone.similar("5", k=100)} == expected
