"""Flags through train.py: out of range, contradictory, extreme."""

from pathlib import Path

import pytest

from tests.conftest import TINY, RunMain, assert_one_line, assert_refused

# 4 users of 3 items, 1 of 2.
RATINGS = "user,item,rating,time\n" + "".join(
    f"{user},{item},{rating},{when}\n"
    for when, (user, item, rating) in enumerate(
        [(u, i, 4) for u in range(4) for i in range(u, u + 3)] + [(9, 1, 1), (9, 2, 1)]
    )
)


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Flags that name a small file of ratings."""
    path = tmp_path / "ratings.csv"
    path.write_text(RATINGS)
    return [f"--dataset_path={path}", "--min_user_count=0"]


REFUSED: list[tuple[str, str]] = [
    ("--max_len=0", "--max_len must be at least 1, not 0"),
    ("--max_len=1.5", "--max_len: invalid int value: '1.5'"),
    ("--max_len=", "--max_len: invalid int value: ''"),
    ("--max_len", "--max_len: expected one argument"),
    ("--mask_prob=0", "--mask_prob must be above 0 and below 1, not 0.0: some positions must be"),
    ("--mask_prob=1", "--mask_prob must be above 0 and below 1, not 1.0: some positions must be"),
    ("--mask_prob=nan", "--mask_prob must be a finite number, not nan"),
    ("--window_stride=0", "--window_stride must be above 0 and at most 1, not 0.0"),
    ("--dupe_factor=0", "--dupe_factor must be at least 1 and at most 65,536, not 0"),
    ("--mask_last_share=-0.1", "--mask_last_share must be at least 0 and at most 1, not -0.1"),
    ("--left_context_share=2", "--left_context_share must be at least 0 and at most 1, not 2.0"),
    (
        "--mask_token_share=0.8 --random_item_share=0.9",
        "--mask_token_share and --random_item_share must not exceed 1 in sum",
    ),
    ("--train_batch_size=0", "--train_batch_size must be at least 1, not 0"),
    ("--val_batch_size=0", "--val_batch_size must be at least 1, not 0"),
    ("--test_batch_size=-1", "--test_batch_size must be at least 1, not -1"),
    ("--prefetch_batches=0", "--prefetch_batches must be at least 1, not 0"),
    ("--seed=-1", "--seed must be at least 0 and at most 9,223,372,036,854,775,807, not -1"),
    (
        "--seed=9223372036854775808",
        "--seed must be at least 0 and at most 9,223,372,036,854,775,807, not 9223372036854775808",
    ),
    ("--eval_negatives=0", "--eval_negatives must be at least 1, not 0"),
    ("--num_negatives=0", "--eval_negatives must be at least 1, not 0"),
    ("--nhead=3", "--nhead 3 does not divide --emb_dim 16"),
    ("--nhead=16", "--positions rotary needs heads of even width, not 1"),
    ("--nhead=16385", "--nhead must be at most 16,384, not 16385"),
    ("--emb_dim=10", "--emb_dim must be a multiple of 4, not 10"),
    ("--num_layers=0", "--num_layers must be at least 1, not 0"),
    ("--dropout=1", "--dropout must be at least 0 and below 1, not 1.0"),
    ("--positions=bias", "--positions must be one of rotary, none, not 'bias'"),
    ("--acceleration=compile", "--acceleration must be one of auto, none, not 'compile'"),
    ("--attention_dropout=0.1", "unknown argument --attention_dropout=0.1"),
    ("--logit_temperature=-1", "--logit_temperature must be at least 0, not -1.0"),
    ("--mode=fsdp", "--mode must be one of dmp, ddp, not 'fsdp'"),
    ("--embedding_lr=-1", "--embedding_lr must be at least 0, not -1.0"),
    ("--lr=-1", "--lr must be at least 0, not -1.0"),
    ("--lr=fast", "--lr: invalid float value: 'fast'"),
    ("--lr=inf", "--lr must be a finite number, not inf"),
    ("--weight_decay=-1", "--weight_decay must be at least 0, not -1.0"),
    ("--beta2=1", "--beta2 must be above 0 and below 1, not 1.0"),
    ("--max_grad_norm=-1", "--max_grad_norm must be at least 0, not -1.0"),
    ("--num_epochs=0", "--num_epochs must be at least 1, not 0"),
    ("--warmup_share=1", "--warmup_share must be at least 0 and below 1, not 1.0"),
    ("--decay_step=0", "--decay_step must be at least 1, not 0"),
    ("--gamma=0", "--gamma must be above 0 and at most 1, not 0.0"),
    ("--eval_every=0", "--eval_every must be at least 1, not 0"),
    ("--patience=0", "--patience must be at least 1, not 0"),
    ("--log_every=0", "--log_every must be at least 1, not 0"),
    ("--rank_timeout=0", "--rank_timeout must be at least 0.01 and below 1,000,000, not 0.0"),
    ("--checkpoint_every=0", "--checkpoint_every must be above 0, not 0.0"),
    ("--keep_last=0", "--keep_last must be at least 1, not 0"),
    ("--on_save_error=ask", "--on_save_error must be one of stop, continue, not 'ask'"),
    ("--min_rating=nan", "--min_rating must be a finite number, not nan"),
    ("--min_rating=4.5", "--min_rating 4.5 drops all of the 14 ratings of ratings: lower it"),
    ("--min_item_count=-1", "--min_item_count must be at least 0, not -1"),
    ("--min_item_count=9", "--min_item_count 9 drops all of the 14 ratings"),
    ("--min_user_count=4", "--min_user_count 4 drops all of the 14 ratings"),
    ("--min_item_count=4", "no user of ratings has 3 items"),
    ("--columns=user", "--columns must name user,item[,rating[,timestamp]], not 'user'"),
    ("--columns=user,movie", "ratings.csv:1: no column 'movie' (--columns); there are user, item"),
    ("--columns=user,user", "--columns 'user,user' names a column twice"),
    ("--columns=1,9", "ratings.csv:1: no column 9 (--columns); there are 4"),
    ("--columns=²,1", "ratings.csv:1: no column '²' (--columns)"),
    ("--separator=tab", "ratings.csv:1: one column only when cut at a tab"),
    ("--separator=ab", '--separator must be one character, "tab" or "::", not \'ab\''),
    ("--dataset_path=~nobody.here/x", "--dataset_path ~nobody.here/x: there is no such user's"),
    ("--dataset_name=ml-2m --dataset_path=", "--dataset_name 'ml-2m' is none of synthetic, random"),
    ("--dataset_name=../up", "--dataset_name must be made of letters, digits, '.', '_' and '-'"),
    ("--dataset_name=random", "--dataset_name random is generated: leave --dataset_path out"),
    ("--random_size=0", "--random_size must be at least 1 and at most 2,147,483,647, not 0"),
    (
        "--synthetic_item_count=5",
        "--synthetic_item_count must be at least 80 and at most 10,000,000, not 5",
    ),
    (
        "--synthetic_user_count=99999999999",
        "--synthetic_user_count must be at least 1 and at most 10,000,000, not 9",
    ),
    ("--data_seed=-1", "--data_seed must be at least 0, not -1"),
    ("--resume=auto --run_dir=", "--resume auto needs --run_dir"),
    ("--num_epoch=3", "unknown argument --num_epoch=3: did you mean --num_epochs?"),
    ("ratings.csv", "unknown argument ratings.csv: see --help"),
    ("--max_len=1000000000000000000", "--max_len must be at most 1,048,576, not 1000000000000"),
    (
        "--train_batch_size=9223372036854775807",
        "--train_batch_size must be at most 16,777,216, not 9223372036854775807",
    ),
    (
        "--train_batch_size=16777216 --max_len=64",
        "--max_len x --train_batch_size must be below 1,073,741,824 positions, not 1,073,741,824",
    ),
    ("--val_batch_size=9223372036854775807", "--val_batch_size must be at most 16,777,216"),
    ("--train_negatives=1000000000000", "--train_negatives must be at most 67,108,864"),
    ("--emb_dim=1000000000000000000", "--emb_dim must be at most 65,536"),
    ("--num_layers=1000000", "--num_layers must be at most 1,000, not 1000000"),
    ("--lr=1e300", "--lr must be at most 1e+28, not 1e+300"),
    ("--lr=1e30", "--lr must be at most 1e+28, not 1e+30"),
    ("--embedding_lr=1e38", "--embedding_lr must be at most 1e+30, not 1e+38"),
    ("--weight_decay=1e9", "--weight_decay must be at most 1,000, not 1000000000.0"),
    ("--logit_temperature=1e-300", "--logit_temperature must be 0 or at least 1e-06, not 1e-300"),
    (
        "--rank_timeout=1e12",
        "--rank_timeout must be at least 0.01 and below 1,000,000, not 1000000000000",
    ),
    (
        "--batch_size=8",
        "did you mean --train_batch_size or --val_batch_size or --test_batch_size?",
    ),
    ("--epochs=8", "did you mean --num_epochs?"),
    (
        f"--cache_dir={'x' * 300}",
        "File name too long; name another folder with --cache_dir",
    ),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_rejected_flags(
    run_main: RunMain, tmp_path: Path, data: list[str], flags: str, message: str
) -> None:
    assert_refused(run_main, tmp_path, [*data, *flags.split()], message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max_len=1048576 --emb_dim=65536", "not enough memory"),
        (f"--run_dir={'x' * 300}", "cannot be written: File name too long"),
    ],
)
def test_flags_rejected_after_preparation(
    run_main: RunMain, tmp_path: Path, data: list[str], flags: str, message: str
) -> None:
    run_dir = tmp_path / "run"
    folders = [f"--cache_dir={tmp_path / 'cache'}", f"--run_dir={run_dir}"]
    assert_one_line(run_main("train", *TINY, *folders, *data, *flags.split()), "train", message)
    assert not run_dir.exists()


def test_a_run_folder_cannot_be_the_export_folder(
    run_main: RunMain, tmp_path: Path, data: list[str]
) -> None:
    run_dir = tmp_path / "run"
    flags = [f"--cache_dir={tmp_path / 'cache'}", f"--run_dir={run_dir}"]
    outcome = run_main("train", *TINY, *data, *flags, f"--export_root={run_dir}/../run")
    message = f"--export_root {run_dir}/../run is the folder of a run: choose another one"
    assert_one_line(outcome, "train", message)


# Extreme, but with a meaning.
WORKS = [
    "--max_len=1",
    "--max_len=5000",
    "--mask_prob=1e-12",
    "--mask_prob=0.999999",
    "--mask_last_share=1 --left_context_share=1",
    "--mask_token_share=0 --random_item_share=0",
    "--train_batch_size=1000000",
    "--train_batch_size=1",
    "--val_batch_size=1000000 --test_batch_size=1",
    "--eval_negatives=5000",
    "--emb_dim=4 --nhead=1",
    "--lr=0 --embedding_lr=0",
    "--eval_every=100",
    "--log_every=1000000",
    "--min_rating=-5",
    "--max_len=4 --max_len=5",
]


@pytest.mark.parametrize("flags", WORKS)
def test_extreme_flags(run_main: RunMain, tmp_path: Path, data: list[str], flags: str) -> None:
    run_dir = tmp_path / "run"
    folders = [f"--cache_dir={tmp_path / 'cache'}", f"--run_dir={run_dir}"]
    outcome = run_main("train", *TINY, *data, *folders, "--num_epochs=1", *flags.split())
    assert outcome.code == 0, outcome.err
    assert "test, 4 users" in outcome.out
    assert "nan" not in (run_dir / "metrics.jsonl").read_text().lower()
