"""Several machines at one run: `mlx.launch … -m safesteer_mlx.align` starts the same command on each of them.

Each has the whole model and does its share: it answers its part of the prompts, asks its part of the candidate
directions, and makes the gradients of its part of the batch. What they find is put together, so that all go on from
the same. The first alone reads and writes the run's folder, and speaks.

One process alone is the same with nobody to talk to. MLX carries everything (its ring, JACCL, NCCL or MPI).
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .. import started_rank
from .screen import UserError

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

T = TypeVar("T")

TOGETHER = 2  # prompts that go to the same machine: those that are asked twice stand side by side


class LostMachineError(UserError):
    """Another machine does not answer any more."""

    def __init__(self, error: Exception):
        super().__init__(
            f"another machine of this run does not answer ({str(error).strip() or type(error).__name__}); see what it "
            "says; the same command with --yes goes on from what is kept, on as many machines as there are"
        )


@dataclass(frozen=True)
class Machines:
    """This process among those of the run: `rank` counts from 0, and 0 is the first."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this one reads, writes and speaks."""
        return self.rank == 0

    def part(self, n: int) -> list[int]:
        """Which of n pieces of work this one does."""
        return [i for i in range(n) if i // TOGETHER % self.size == self.rank % self.size]

    def gather(self, own: T) -> list[T]:
        """What each has, in the order of their ranks: anything that JSON holds.

        Raises:
            LostMachineError: one does not answer.
        """
        if self.size == 1:
            return [own]
        return [json.loads(body) for body in _bodies(json.dumps(own).encode())]

    def add(self, own: "np.ndarray") -> "np.ndarray":
        """The sum of what each has, in the arrays' own type: float64 too, which Metal has not. An array of one number
        stands for any shape.

        Raises:
            LostMachineError: one does not answer.
        """
        if self.size == 1:
            return own
        import numpy as np

        shapes = self.gather(list(own.shape))
        bodies = _bodies(own.tobytes())
        each = [np.frombuffer(body, own.dtype).reshape(shape) for body, shape in zip(bodies, shapes, strict=True)]
        return np.asarray(sum(each))

    def share(self, of_first: T) -> T:
        """What the first has; what the others gave is not looked at."""
        return of_first if self.size == 1 else self.gather(of_first if self.first else None)[0]  # type: ignore[return-value]

    def share_arrays(self, of_first: dict[str, "mx.array"] | None) -> dict[str, "mx.array"]:
        """`share` for arrays by name."""
        if self.size == 1:
            return of_first or {}
        import mlx.core as mx

        kinds = self.share({name: [list(w.shape), str(w.dtype)] for name, w in (of_first or {}).items()})
        shared = {}
        for name, (shape, kind) in kinds.items():
            own = of_first[name] if of_first is not None and self.first else mx.zeros(shape, getattr(mx, kind[9:]))
            shared[name] = _exchanged(mx.distributed.all_sum(own))
        return shared

    def each(self, pieces: Sequence[Any], work: Callable[[list[Any]], list[T]]) -> list[T]:
        """work(pieces), one result a piece, of which this one does its part."""
        if self.size == 1:
            return work(list(pieces))
        own = self.part(len(pieces))
        results = dict(
            pair for share in self.gather(list(zip(own, work([pieces[i] for i in own]), strict=True))) for pair in share
        )
        return [results[i] for i in range(len(pieces))]

    def total(self, gradients: Any) -> Any:
        """The sum of all machines' gradients, a tree of arrays."""
        if self.size == 1:
            return gradients
        from mlx.nn.utils import average_gradients
        from mlx.utils import tree_map

        return _exchanged(tree_map(lambda mean: mean * self.size, average_gradients(gradients)))


_here = Machines()


def here() -> Machines:
    """This process among those of the run that it has joined."""
    return _here


def join() -> Machines:
    """Meet the others that were launched with this process, if any were.

    Raises:
        UserError: they cannot be reached.
    """
    global _here
    alone = "MLX_HOSTFILE" in os.environ and os.path.getsize(os.environ["MLX_HOSTFILE"]) < 2  # mlx.launch -n 1
    if started_rank() is not None and not alone:
        import mlx.core as mx

        try:
            group = mx.distributed.init()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the machines of this run cannot meet ({error}); check the hosts and ports that mlx.launch was given "
                "(docs/several-macs.md)"
            ) from None
        _here = Machines(group.rank(), group.size())
    return _here


def leave() -> None:
    """From now on alone: what is done after a failure, others do not take part in. The rank stays what it was."""
    global _here
    _here = Machines(_here.rank, 1)


def _bodies(own: bytes) -> list[bytes]:
    """The bytes that each has."""
    import mlx.core as mx
    import numpy as np

    lengths = _exchanged(mx.distributed.all_gather(mx.array([len(own)]))).tolist()
    padded = np.zeros((1, max(lengths)), np.uint8)
    padded[0, : len(own)] = np.frombuffer(own, np.uint8)
    every = np.array(_exchanged(mx.distributed.all_gather(mx.array(padded))))
    return [row[:length].tobytes() for row, length in zip(every, lengths, strict=True)]


def _exchanged(arrays: T) -> T:
    import mlx.core as mx

    try:
        mx.eval(arrays)
    except RuntimeError as error:
        raise LostMachineError(error) from None
    return arrays
