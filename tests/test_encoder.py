"""The packed encoder against a plain loop over rows and positions."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.network.config import EncoderConfig
from model.network.encoder import Encoder, EncoderLayer
from pipeline.batches.train_batch import rounded_up

MAX_LEN = 6
LENGTHS = [3, 1, 6, 2]
MASKED = [1, 3, 4, 9, 10]  # in rows 0, 1, 2, 2 and 3


def encoder_of(positions: str = "rotary", num_layers: int = 2) -> Encoder:
    """With weights so large that attention is far from uniform, and without dropout."""
    torch.manual_seed(7)
    config = EncoderConfig(8, 2, num_layers, positions=positions)
    encoder = Encoder(config, MAX_LEN).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return encoder


def batch_of(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Items [T, 8] and offsets [B + 1]."""
    torch.manual_seed(11)
    return torch.randn(sum(lengths), 8), torch.tensor([0, *lengths]).cumsum(0)


def layer_by_hand(layer: EncoderLayer, row: torch.Tensor) -> torch.Tensor:
    """One layer over one row [L, D], a query and a key at a time."""
    normed = layer.attention_norm(row)
    attention = layer.attention
    width = row.shape[1] // attention.heads
    mixed = torch.zeros_like(row)
    query, key, value = attention.project_in(normed).split(row.shape[1], dim=1)
    for head in range(attention.heads):
        part = slice(head * width, (head + 1) * width)
        if attention.rotation is not None:
            query[:, part], key[:, part] = rotated(query[:, part]), rotated(key[:, part])
        for i in range(len(row)):
            scores = torch.zeros(len(row))
            for j in range(len(row)):
                scores[j] = query[i, part] @ key[j, part] / math.sqrt(width)
            mixed[i, part] = scores.softmax(0) @ value[:, part]
    row = row + attention.project_out(mixed)
    into, _, _, out = layer.feed_forward
    hidden = F.gelu(into(layer.feed_forward_norm(row)), approximate="tanh")
    return row + out(hidden)


def rotated(vectors: torch.Tensor) -> torch.Tensor:
    """Rotate a head's queries or keys [L, W]: values i and W/2 + i are a pair."""
    length, width = vectors.shape
    turned = torch.empty_like(vectors)
    for at in range(length):
        for i in range(width // 2):
            angle = (length - 1 - at) * 10_000 ** (-2 * i / width)  # steps ago
            low, high = vectors[at, i], vectors[at, width // 2 + i]
            turned[at, i] = low * math.cos(angle) - high * math.sin(angle)
            turned[at, width // 2 + i] = low * math.sin(angle) + high * math.cos(angle)
    return turned


def encode_by_hand(encoder: Encoder, items: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """All positions [T, D]."""
    rows = []
    for row in items.split(lengths):
        steps_ago = torch.arange(len(row)).flip(0)  # the newest item is at position 0
        row = encoder.embedding_norm(row + encoder.positions(steps_ago))
        for layer in encoder.layers:
            row = layer_by_hand(layer, row)
        rows.append(encoder.final_norm(row))
    return torch.cat(rows)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_the_encoder_equals_the_plain_loop(positions: str, num_layers: int) -> None:
    encoder = encoder_of(positions, num_layers)
    assert (encoder.layers[0].attention.rotation is not None) == (positions == "rotary")
    items, offsets = batch_of(LENGTHS)
    masked = torch.tensor(MASKED)
    with torch.no_grad():
        found = encoder(items, offsets, masked, longest=6)
        expected = encode_by_hand(encoder, items, LENGTHS)[masked]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_last_layer_at_masked_positions_equals_the_gathered_full_layer() -> None:
    encoder = encoder_of()
    items, offsets = batch_of(LENGTHS)
    everywhere = encoder(items, offsets, torch.arange(12), longest=6)
    some = encoder(items, offsets, torch.tensor(MASKED), longest=6)
    torch.testing.assert_close(some, everywhere[MASKED], atol=1e-6, rtol=1e-6)


def test_masked_positions_in_any_order_and_none() -> None:
    encoder = encoder_of()
    items, offsets = batch_of(LENGTHS)
    there = encoder(items, offsets, torch.tensor([3, 1]), longest=6)
    back = encoder(items, offsets, torch.tensor([1, 3]), longest=6)
    torch.testing.assert_close(there, back.flip(0))
    assert encoder(items, offsets, torch.tensor([], dtype=torch.int64), longest=6).shape == (0, 8)


@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_a_row_does_not_depend_on_the_other_rows(positions: str) -> None:
    encoder = encoder_of(positions)
    items, offsets = batch_of(LENGTHS)
    together = encoder(items, offsets, torch.arange(12), longest=6).split(LENGTHS)
    for row, expected in zip(items.split(LENGTHS), together, strict=True):
        alone = encoder(row, torch.tensor([0, len(row)]), torch.arange(len(row)), longest=len(row))
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)


def test_padding_to_more_than_the_longest_row_changes_nothing() -> None:
    encoder = encoder_of()
    items, offsets = batch_of([2, 3])
    tight = encoder(items, offsets, torch.tensor([1, 4]), longest=3)
    for longest in (4, 6, rounded_up(3)):  # 8 is more than max_len
        loose = encoder(items, offsets, torch.tensor([1, 4]), longest=longest)
        torch.testing.assert_close(loose, tight, atol=1e-6, rtol=1e-6)


def test_gradients_reach_every_parameter_and_stay_finite() -> None:
    encoder = encoder_of().train()  # padded keys must not turn softmax into NaN
    items, offsets = batch_of(LENGTHS)
    items.requires_grad_()
    encoder(items, offsets, torch.tensor(MASKED), longest=6).square().sum().backward()
    for name, parameter in [("items", items), *encoder.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_dropout_acts_only_in_training() -> None:
    encoder = encoder_of()
    items, offsets = batch_of(LENGTHS)

    def encode() -> torch.Tensor:
        return encoder(items, offsets, torch.tensor(MASKED), longest=6)

    assert torch.equal(encode(), encode())
    encoder.train()
    assert not torch.allclose(encode(), encode())
