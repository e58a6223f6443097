"""The losses of 20 training steps, compared with recorded numbers.

Another number means that the computation has changed. Both runs are seeded, in float32, on one
CPU core. Releases of torch draw other initial weights from a seed, so each has its own numbers.
"""

from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, RunMain, losses_of

# Kernels of other processors round the last bits of a float32 differently.
TOLERANCE = 1e-6
RELEASE = ".".join(torch.__version__.split(".")[:2])
FLAGS = {
    "exact": ("--dropout=0",),
    "sampled": ("--loss=sampled_softmax", "--train_negatives=20"),
}
FLAGS |= {
    f"{name}, adagrad": (*flags, "--embedding_optimizer=rowwise_adagrad")
    for name, flags in FLAGS.items()
}
# fmt: off
LOSSES = {
    ("exact", "2.11"): (
        8.9702008, 8.3043847, 7.7994594, 8.4995822, 7.9333639, 6.8090526, 6.6153841, 6.5813993,
        6.7475056, 6.2542768, 6.3068763, 6.2988294, 5.7559437, 5.4536665, 5.7330475, 6.0335729,
        5.6919316, 5.4832238, 5.6387687, 5.6325881,
    ),
    ("sampled", "2.11"): (
        8.1760653, 8.8145559, 8.0648770, 8.6693769, 8.3690276, 7.0410744, 7.1213115, 6.6414664,
        7.1317249, 7.0511000, 7.1384842, 6.9899788, 7.4903128, 6.2406967, 6.2535095, 7.2311912,
        6.5634084, 6.3893552, 6.6934868, 6.1528221,
    ),
    ("exact", "2.13"): (
        8.9754380, 8.4000156, 7.5605151, 8.0016256, 8.0667114, 6.8126406, 6.7866269, 6.7165512,
        6.9331406, 6.0378408, 6.3069208, 6.2890011, 6.0512681, 5.7097160, 5.5152905, 5.8999701,
        5.9364738, 5.5129680, 5.0208010, 5.3584418,
    ),
    ("sampled", "2.13"): (
        7.7975438, 9.2274025, 7.6422930, 8.6087114, 8.8550679, 6.9267741, 6.9334024, 6.6890931,
        7.2481995, 6.4364905, 6.7560908, 6.4979846, 7.9280715, 6.3420431, 5.5739390, 7.4809932,
        6.9570603, 6.3934593, 5.8289202, 6.0417885,
    ),
    ("exact, adagrad", "2.11"): (
        8.9702008, 8.3043847, 8.1385406, 8.1134145, 7.1566283, 7.2010882, 5.8444577, 5.7399933,
        5.6050466, 5.6379830, 5.3527684, 5.5428287, 4.8297740, 4.6422556, 4.4456388, 4.9658842,
        4.8576988, 4.3177822, 4.6378753, 4.6879999,
    ),
    ("sampled, adagrad", "2.11"): (
        8.1760653, 8.8145559, 7.1265852, 7.8322608, 6.6638327, 7.3922671, 6.2288348, 7.5581990,
        6.4682736, 6.4250469, 6.4758915, 6.7005828, 6.0988421, 6.0812407, 4.9237045, 5.6802340,
        5.7745597, 6.1851146, 5.8219463, 6.0242512,
    ),
    ("exact, adagrad", "2.13"): (
        8.9754380, 8.4000156, 8.1038400, 7.8535414, 7.3501821, 6.6226472, 5.5987376, 5.7500491,
        5.4744076, 5.1510136, 5.1585002, 5.3301781, 5.0611456, 4.6616260, 4.4913244, 4.7284972,
        4.9060694, 4.3711104, 4.2555073, 4.5035142,
    ),
    ("sampled, adagrad", "2.13"): (
        7.7975438, 9.2274025, 6.1994069, 8.0955415, 7.3118972, 6.9858190, 6.2559369, 7.2438378,
        6.6830482, 6.1711775, 6.2940575, 6.5875113, 6.5115618, 6.3302847, 5.1479895, 5.4191103,
        5.8784112, 6.5785175, 5.6035815, 6.0507688,
    ),
}
# fmt: on


@pytest.mark.parametrize("name", FLAGS)
def test_losses_are_the_recorded_ones(
    name: str, run_main: RunMain, run_dir: Path, cache_dir: Path
) -> None:
    if (name, RELEASE) not in LOSSES:
        pytest.skip(f"no losses are recorded for torch {RELEASE}")
    flags = ("--seed=7", "--num_epochs=5", "--max_steps=20", *FLAGS[name])
    folders = (f"--run_dir={run_dir}", f"--cache_dir={cache_dir}")
    outcome = run_main("train", *TINY, *flags, *folders)
    assert outcome.code == 0, outcome.err
    assert [*losses_of(run_dir).values()] == pytest.approx(LOSSES[name, RELEASE], rel=TOLERANCE)
