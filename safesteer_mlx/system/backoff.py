"""When memory is exhausted: the same work, in smaller batches, which changes no mathematics."""

import sys
from collections.abc import Callable
from typing import TypeVar

from .screen import UserError

T = TypeVar("T")

# What MLX's allocators and Metal's command buffers say.
_SAID = ("insufficient memory", "unable to allocate", "out of memory", "bad_alloc", "maximum allowed buffer size")


def is_exhausted(error: BaseException) -> bool:
    """Whether MLX, or the system below it, says that memory is exhausted."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(words in said for words in _SAID))


def halving(size: int, work: Callable[[int], T], what: str) -> tuple[T, int]:
    """work(size), with half the size as often as memory is exhausted, said on stderr; and the size that was enough.

    Raises:
        UserError: even one at a time is too much.
    """
    import mlx.core as mx

    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if not is_exhausted(error):
                raise
        if size == 1:
            raise UserError(
                f"memory is exhausted in {what} even one at a time; lower --max-tokens, or close other programs"
            )
        mx.clear_cache()
        size //= 2
        print(f"safesteer-mlx: memory is exhausted in {what}: going on with {size} at a time", file=sys.stderr)
