"""What one rank need not do: there is nobody to send anything to.

    a sharded collection    sends features to the ranks that have their rows, waits for the device
                            to say how many came, looks up, sends the rows back
    ``look_up_at_home``     looks up

A step of few launches would be mostly this. Rows are the same, bit by bit.
"""

from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor


def look_up_at_home(model: nn.Module) -> None:
    """Let the sharded collections of ``model`` look up without sending; one rank has all rows.

    A table in several shards even so, each some of its columns, is left to TorchRec.
    """
    for module in model.modules():
        if not isinstance(module, ShardedEmbeddingCollection):
            continue
        names = [name for sharding in module._embedding_names_per_sharding for name in sharding]
        if len(module._lookups) == 1 and len(set(names)) == len(names):
            module.forward = Home(module._lookups[0], names, module._embedding_dim)


class Home:
    """The forward pass of a collection whose features all stay.

    Args:
        lookup: gives the rows of all features in one tensor.
        names: of the features in the order in which it wants them.
        width: D, of a row.
    """

    def __init__(self, lookup: nn.Module, names: list[str], width: int) -> None:
        self._lookup, self._names, self._width = lookup, names, width

    def __call__(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Rows [sum of lengths, D] of each feature."""
        assert features.keys() == self._names, (features.keys(), self._names)
        all_rows, sizes = self._lookup(features).view(-1, self._width), features.length_per_key()
        # A split of all and nothing would copy all gradients.
        alone = sum(sizes) == sizes[0]
        rows = (all_rows, *(all_rows[:0] for _ in sizes[1:])) if alone else all_rows.split(sizes)
        lengths = features.lengths().view(len(rows), -1).unbind()
        return {
            name: JaggedTensor(of_name, lengths=each)
            for name, of_name, each in zip(self._names, rows, lengths, strict=True)
        }
