"""Triton, the kernels' compiler; None where it is not installed, as in CPU builds.

Modules define their kernels inside ``if triton is not None`` and start them by :func:`launch`.
Triton compiles a kernel at its first launch with arguments of these types, which takes up to a
second. The kernels of a step are compiled all at once, before it: a call of the step on fake
tensors only notes its launches::

    with noted_launches(lambda each: launches_wait(each, executor.submit(each.compile))):
        step(...)                                                     on torch's fake tensors
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None
try:
    from triton.runtime import build
except ImportError:  # no Triton, or one without this module
    build = None

__all__ = ["launch", "row_tiles", "tl", "triton"]


def load_apart(build: Any) -> bool:
    """Let several threads load launchers, the code by which Triton starts a kernel.

    A launcher is an extension module, and all launchers have one name. Python answers the second
    load of a file with the module that has the name at this moment, perhaps of another file, and
    puts the functions of the first load into it: a kernel would be launched as if it were another
    one. Here each load returns the functions of its file in an object of their own, before another
    thread loads one.

    Args:
        build: ``triton.runtime.build``; None: this Triton has no such module.

    Returns:
        Whether threads may load launchers; False: ``build`` has another loader, and keeps it.
    """
    load, one_at_a_time = getattr(build, "_load_module_from_path", None), Lock()
    if load is None:
        return False

    def loaded(name: str, path: str) -> SimpleNamespace:
        with one_at_a_time:
            return SimpleNamespace(**vars(load(name, path)))

    build._load_module_from_path = loaded  # Private: Triton has no public setter
    return True


# Whether threads may compile kernels beside each other.
THREADS_COMPILE = load_apart(build)

# Triton compiles other code for pointers and integers that are not multiples of it, for the integer
# 1, and for integers of 64 bits; for all floats the same.
MULTIPLE = 16


@dataclass(frozen=True)
class Pointer:
    """What Triton compiles for, of a tensor argument."""

    dtype: torch.dtype
    address: int  # modulo MULTIPLE

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class Launch:
    """A kernel and the types of its arguments; equal ones need the same code."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> "Launch":
        """The launch of a kernel with arguments, constants among them, and options."""
        pairs = zip(kernel.params, arguments, strict=True)
        types = (one if parameter.is_constexpr else type_of(one) for parameter, one in pairs)
        return cls(kernel, tuple(types), tuple(options.items()))

    def compile(self) -> None:
        """Compile for the current device, or load from Triton's cache, all that a launch needs."""
        compiled = self.kernel.warmup(*self.arguments, grid=(1,), **dict(self.options))
        if compiled is not None:  # a hook may leave it out
            _ = compiled.run  # made now: by the C compiler, code that launches it; both are loaded


# Work of other threads for kernels: all of it, and the compilations by what waits for them.
_underway: dict[Future[None], None] = {}
_awaited: dict[Launch, Future[None]] = {}
# Every thread has its own.
_note: ContextVar[Callable[[Launch], object] | None] = ContextVar("note", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)``."""
    note = _note.get()
    if note is not None:
        note(Launch.of(kernel, arguments, options))
        return
    if _awaited:
        awaited = _awaited.get(Launch.of(kernel, arguments, options))
        wait([] if awaited is None else [awaited])
    kernel[grid](*arguments, **options)


def launches_wait(launch: Launch, compiled: Future[None]) -> None:
    """Let such launches wait until a compilation is done; else they would start another one."""
    _awaited[launch] = compiled
    compiled.add_done_callback(lambda _: _awaited.pop(launch))
    captures_wait(compiled)


def captures_wait(work: Future[None]) -> None:
    """Let captures of CUDA graphs wait until other threads' work for kernels is done."""
    _underway[work] = None
    work.add_done_callback(_underway.pop)


def before_capture() -> None:
    """Wait for the threads that compile: while a graph is captured, none of them uses CUDA."""
    while underway := [*_underway]:
        wait(underway)


@contextmanager
def noted_launches(note: Callable[[Launch], object]) -> Iterator[None]:
    """Inside, this thread's launches call ``note``; tensors that they write stay as they are.

    The memory of a tensor is taken to begin at a multiple of 16 bytes, as memory of CUDA does.
    """
    token = _note.set(note)
    try:
        yield
    finally:
        _note.reset(token)


def type_of(argument: Any) -> Any:
    """An argument for which Triton compiles the same code; equal ones for the same code."""
    if isinstance(argument, torch.Tensor):
        offset = int(argument.storage_offset()) * argument.element_size()
        return Pointer(argument.dtype, offset % MULTIPLE)
    if isinstance(argument, tuple):
        parts = map(type_of, argument)
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    if isinstance(argument, int) and argument > 1:
        wide = 2**32 if argument >= 2**31 else 0
        return wide + (MULTIPLE if argument % MULTIPLE == 0 else 2)
    return 0.5 if isinstance(argument, float) else argument


def row_tiles(shape: Sequence[int], values: int) -> tuple[int, int, int]:
    """Cut a tensor [count, width] into tiles of whole rows, of ``values`` values.

    Returns:
        Number of tiles, rows of a tile, and its columns: ``width`` rounded up to a power of two.
    """
    count, width = shape
    columns = triton.next_power_of_2(width)
    block = max(1, values // columns)
    return triton.cdiv(count, block), block, columns
