"""Rows with left context only: their choice, and the context of their positions."""

import numpy as np
import pytest
import torch

from model.network.config import EncoderConfig
from model.network.encoder import Encoder
from pipeline.errors import UserError
from pipeline.preparation.store import SequenceStore
from pipeline.training.cloze import ClozeMask
from pipeline.training.config import LoaderConfig, MaskConfig, WindowConfig
from pipeline.training.loader import TrainLoader


def test_their_share_is_kept_and_keyed_by_window() -> None:
    cloze = ClozeMask(MaskConfig(left_context_share=0.3), num_items=9, seed=4)
    windows, copies = np.arange(20_000), np.zeros(20_000, dtype=np.int64)
    chosen = cloze.left_only(cloze.keys(1, windows, copies))
    assert abs(chosen.mean() - 0.3) < 0.013  # four standard deviations
    assert (cloze.left_only(cloze.keys(1, windows[::-1], copies)) == chosen[::-1]).all()
    assert (cloze.left_only(cloze.keys(2, windows, copies)) != chosen).any()


def test_no_share_draws_nothing() -> None:
    cloze = ClozeMask(MaskConfig(left_context_share=0.0), num_items=9, seed=4)
    assert cloze.left_only(np.arange(3, dtype=np.uint64)) is None


@pytest.mark.parametrize("few_shapes", [False, True])
def test_batches_carry_them_row_by_row(few_shapes: bool) -> None:
    store = SequenceStore.from_arrays([1, 2, 3, 4, 5] * 40, np.arange(41) * 5, 5)
    loader = TrainLoader(
        store,
        WindowConfig(max_len=4),
        MaskConfig(left_context_share=0.5),
        LoaderConfig(train_batch_size=16),
        few_shapes=few_shapes,
    )
    rows = []
    for packed in loader.epoch(0):
        batch = packed.unpack()
        assert batch.left_only.shape == (batch.num_windows,)
        moved = packed.to(torch.device("cpu"))
        assert moved.unpacked.left_only.equal(batch.left_only)
        rows += batch.left_only.tolist()
    assert len(rows) == 40
    assert 8 < sum(rows) < 32


@pytest.mark.parametrize("positions", ("rotary", "none"))
def test_their_positions_attend_only_to_earlier_positions(positions: str) -> None:
    torch.manual_seed(0)
    config = EncoderConfig(emb_dim=16, nhead=2, positions=positions)
    encoder = Encoder(config, max_len=8).eval()
    offsets = torch.tensor([0, 3, 8])
    everywhere, left_only = torch.arange(8), torch.tensor([True, False])
    items = torch.randn(8, 16)
    changed = items.clone()
    changed[1], changed[6] = torch.randn(16), torch.randn(16)
    before = encoder(items, offsets, everywhere, left_only, longest=8)
    after = encoder(changed, offsets, everywhere, left_only, longest=8)
    moved = (before - after).abs().amax(dim=1) > 1e-6
    # Row 0 (positions 0-2): only 1 and later positions. Row 1 (3-7, both contexts): all positions.
    assert moved.tolist() == [False, True, True, True, True, True, True, True]
    assert torch.isfinite(before).all()


def test_without_learned_positions_a_prefix_has_the_same_vector() -> None:
    """A left-context position has the same vector as the last one of a row that ends there."""
    torch.manual_seed(0)
    config = EncoderConfig(emb_dim=16, nhead=2, learned_positions=False)
    encoder = Encoder(config, max_len=8).eval()
    for parameter in encoder.parameters():  # with small initial weights context has little effect
        torch.nn.init.normal_(parameter, std=0.3)
    items, left_only = torch.randn(8, 16), torch.tensor([True])
    whole = encoder(items, torch.tensor([0, 8]), torch.arange(8), left_only, longest=8)
    for end in (1, 3, 8):
        offsets, last = torch.tensor([0, end]), torch.tensor([end - 1])
        row = encoder(items[:end], offsets, last, left_only, longest=8)
        assert torch.allclose(whole[last], row, atol=1e-5)
        seeing_all = encoder(items[:end], offsets, last, longest=8)
        assert end == 1 or not torch.allclose(whole[last], seeing_all, atol=1e-4)


def test_without_positions_the_order_of_items_is_lost() -> None:
    with pytest.raises(UserError, match="--positions none needs --learned_positions true"):
        EncoderConfig(positions="none", learned_positions=False)
