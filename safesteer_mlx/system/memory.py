"""What this machine offers, MLX kept to it, and what to do when it is not enough.

Where memory is exhausted though the plan (method/memory_plan.py) fits, `with_smaller_batches` does the work again in
smaller batches, which changes no mathematics; where it is not, but the machine would run on its disk, it stops.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

from ..recipe import parse_bytes
from . import machines
from .screen import UserError

T = TypeVar("T")

PAGES = 0.95  # of the physical memory, beyond which a machine runs on its disk
DISPLAY = "it helps to let the display sleep, or to start with AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 set"
CACHE_STEP = 32  # positions that keys and values grow by while answers are generated
READ_BACK = 16  # answers that base and student read at a time, for drift


@dataclass(frozen=True)
class Machine:
    """Bytes that MLX may use, and how they were told."""

    memory: int
    source: str


def smallest_machine(limit: str | None = None) -> Machine:
    """`this_machine`, or of several the one with the least: all get the same batches."""
    every = machines.here().gather(asdict(this_machine(limit)))
    return Machine(**min(every, key=lambda machine: machine["memory"]))


def this_machine(limit: str | None = None) -> Machine:
    """What MLX may use here: `limit`, or what Metal recommends, a CUDA card's memory, or the physical memory."""
    import mlx.core as mx

    if limit is not None:
        return Machine(parse_bytes(limit), "--memory-limit")
    if mx.metal.is_available():
        return Machine(_recommended(), "Metal's recommended working set")
    if mx.default_device() != mx.Device(mx.cpu):
        return Machine(int(mx.device_info()["total_memory"]), "the card's memory")
    return Machine(_physical(), "physical memory")


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def set_limits(machine: Machine) -> None:
    """Have MLX keep to the budget: it waits and frees before it asks for more. On Metal, weights stay wired in."""
    import mlx.core as mx

    mx.set_memory_limit(machine.memory)
    mx.set_cache_limit(machine.memory // 8)  # freed buffers kept for the next step
    if mx.metal.is_available():
        mx.set_wired_limit(min(machine.memory, _recommended()))


def _recommended() -> int:
    """Bytes that Metal recommends to use at most."""
    import mlx.core as mx

    return int(mx.device_info()["max_recommended_working_set_size"])


# What MLX's allocators and Metal's command buffers say, and what that means. MLX counts buffers too (mlx-lm #1185).
_SIGNS = ("insufficient memory", "unable to allocate", "out of memory", "bad_alloc", "maximum allowed buffer size")
_SIGNS += ("resource limit",)
# The watchdog of a Mac whose display waits for the GPU (mlx #3267).
_WATCHDOG = ("impacting interactivity", "impactinginteractivity", "gpu timeout")


def too_much(error: BaseException) -> str | None:
    """What MLX, or the system below it, says that smaller batches help against; None for any other error."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)):
        return "memory is exhausted"
    if isinstance(error, RuntimeError) and any(sign in text for sign in _WATCHDOG):
        return "macOS stopped the GPU, since the display waited too long for it,"
    return None


class PagingError(UserError):
    """More memory was used than the machine has to give; what was done before is kept."""


def _check_use(what: str, peak_before: int) -> None:
    """Stop before the system pages until it dies: MLX's own limit is advisory (mlx #3186)."""
    import mlx.core as mx

    physical = _physical()
    peak = mx.get_peak_memory()
    if peak > max(peak_before, PAGES * physical):
        raise PagingError(
            f"{what} used {peak / 1e9:.1f} GB, and this machine has {physical / 1e9:.1f} GB: stopped before it runs on "
            "the disk; close other programs, or lower --memory-limit, then the same command with --yes goes on"
        )


def with_smaller_batches(size: int, work: Callable[[int], T], what: str, together: bool = False) -> tuple[T, int]:
    """work(size), with half the size as often as it is too much, said on stderr; and the size that was enough.

    `together` says that other machines, if there are any, take part in the work, which cannot begin it again.

    Raises:
        UserError: even one at a time is too much, or any size of a work that is done together.
        PagingError: it went on, but with more memory than the machine has.
    """
    import mlx.core as mx

    while True:
        before = mx.get_peak_memory()
        try:
            result = work(size)
        except (RuntimeError, MemoryError) as error:
            fault = too_much(error)
            if fault is None:
                raise
        else:
            _check_use(what, before)
            return result, size
        watchdog = "" if "memory" in fault else DISPLAY
        if together and machines.here().size > 1:
            raise UserError(f"{fault} in {what} with {size} at a time; give --prompt-batch-size {max(1, size // 2)}")
        if size == 1:
            advice = watchdog or "lower --max-tokens, or close other programs"
            raise UserError(f"{fault} in {what} even one at a time; {advice}")
        mx.clear_cache()
        size //= 2
        more = f" ({watchdog})" if watchdog else ""
        print(f"safesteer-mlx: {fault} in {what}: going on with {size} at a time{more}", file=sys.stderr)
