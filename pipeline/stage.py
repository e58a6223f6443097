"""A pipeline stage written as one generator.

    class Doubled(Stage[int]):
        def __init__(self, source): super().__init__(); self.source = source
        def stream(self): yield from (2 * x for x in self.source)

`torchdata.nodes.BaseNode` asks for reset, next and get_state; a `Stage` makes them of `stream()`.
Preparation runs once and to its end, so a state is only the number of chunks handed out, and
resuming replays them.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

from torchdata.nodes import BaseNode

T = TypeVar("T")


class Stage(BaseNode[T]):
    """Base of the preparation stages; subclasses implement `stream`."""

    def stream(self) -> Iterator[T]:
        """All chunks, from the first; called anew at every reset."""
        raise NotImplementedError(type(self))

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        source = getattr(self, "source", None)
        if source is not None:
            source.reset()
        self._chunks = self.stream()
        self._handed_out = 0
        for _ in range(initial_state["handed_out"] if initial_state else 0):
            self.next()

    def next(self) -> T:
        chunk = next(self._chunks)
        self._handed_out += 1
        return chunk

    def get_state(self) -> dict[str, Any]:
        return {"handed_out": self._handed_out}
