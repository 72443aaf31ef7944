"""What a pass of a model takes in memory, counted on its traced operations (system/graph.py), so that what is kept is
what the architecture's own code keeps. Nothing is computed, and no weights are read.

The operations are the CPU's, whatever the machine: a GPU's kernels keep less between them, and hand nothing over.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..recipe import TrainSettings
from ..system.graph import Graph, peak_bytes, traced
from ..system.screen import UserError
from ..system.shape import ModelShape
from .residual import architecture, checkpointed_gradient, hidden_states, view
from .student import bytes_trained, untrained

ROWS = 4  # traced at most: of more, each takes as much
STEPS = 16, 32  # tokens of the passes that are traced of a recurrence, whose operations are told token by token


@dataclass(frozen=True, eq=False)
class Passes:
    """Bytes that passes of this model take beside its weights, whose own are in its shape. Each kind is traced once.

    Raises:
        UserError: from each of them, if this architecture decides while it computes, so that it cannot be traced.
    """

    model: nn.Module
    shape: ModelShape
    _counted: dict[Any, int] = field(default_factory=dict)

    def forward(self, rows: float, length: int) -> int:
        """A pass of (rows, length) tokens that keeps nothing."""
        return self._bytes("forward", rows, length, lambda size: peak_bytes(self._read(size)))

    def gradient(self, train: TrainSettings, rows: float, length: int, checkpointed: bool) -> int:
        """A pass forward and backward through the blocks that are trained, without the gradient itself.

        Of checkpointed blocks the inputs are kept, and of one at a time what it makes again.
        """
        function = checkpointed_gradient if checkpointed else _gradient

        def count(size: tuple[int, int]) -> int:
            graph = _trace(self._student(train), function, size)
            return peak_bytes(graph) - graph.result_bytes

        return self._bytes(f"{function.__name__} {_trained(train)}", rows, length, count)

    def trained(self, train: TrainSettings) -> int:
        """The weights that training changes."""
        return self._once(_trained(train), lambda: bytes_trained(self._student(train)))

    def _bytes(self, kind: str, rows: float, length: int, count: Callable[[tuple[int, int]], int]) -> int:
        together = min(ROWS, math.ceil(rows))

        def of_a_row(n: int) -> float:
            return self._once((kind, together, n), lambda: count((together, n))) / together

        short, long = STEPS
        if length <= long or not self._by_token():
            return int(rows * of_a_row(length))
        a_token = (of_a_row(long) - of_a_row(short)) / (long - short)
        return int(rows * (of_a_row(long) + a_token * (length - long)))

    def _by_token(self) -> bool:
        """Whether more tokens are more operations, not larger ones."""
        two, four = (self._once(n, lambda n=n: len(self._read((1, n)).operations)) for n in (2, 4))
        return two != four

    def _once(self, key: Any, count: Callable[[], int]) -> int:
        if key not in self._counted:
            self._counted[key] = count()
        return self._counted[key]

    def _read(self, size: tuple[int, int]) -> Graph:
        return _trace(view(self.model), hidden_states, size)

    def _student(self, train: TrainSettings) -> nn.Module:
        student = untrained(self.model, train, seed=0)
        for module in student.modules():
            if "lora_a" in module and "dropout" in module:
                module.dropout = _Apart(module.dropout)
        student.train()
        return student


class _Apart(nn.Module):
    """What LoRA reads, as an array of its own: MLX hands over once what several layers make alike of one array, as a
    cast, but computes and keeps it for each."""

    def __init__(self, dropout: nn.Module):
        super().__init__()
        self.dropout, self._own = dropout, mx.array(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        return self.dropout(mx.depends([x], [self._own])[0])


def _trained(train: TrainSettings) -> str:
    """What decides which numbers are trained."""
    return f"{train.fine_tune_type} {train.num_layers} {train.lora_parameters}"


def _gradient(student: nn.Module, tokens: mx.array) -> list[mx.array]:
    """A loss and its gradient: MLX orders what it evaluates by both, and training evaluates both."""

    def loss_of(model: nn.Module) -> mx.array:
        return hidden_states(model, tokens).astype(mx.float32).square().sum()

    loss, gradient = nn.value_and_grad(student, loss_of)(student)  # pyright: ignore[reportPrivateImportUsage]
    return [loss, *(of_it for _, of_it in tree_flatten(gradient))]


def _trace(model: nn.Module, function: Callable, size: tuple[int, int]) -> Graph:
    """The graph of a function of a model, which is not to be used after it, and of so many tokens."""
    names, weights = zip(*tree_flatten(model.parameters()), strict=True)

    def run(tokens: mx.array, *given: mx.array) -> Any:
        model.update(tree_unflatten(list(zip(names, given, strict=True))))
        return function(model, tokens)

    with _traceable():
        try:
            return traced(run, mx.zeros(size, mx.int32), *weights)
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"architecture {architecture(model)} cannot be followed without computing it ({reason}); give "
                "--prompt-batch-size 4 --generation-batch-size 8 --micro-batch-size 1 if memory is short"
            ) from None


@contextmanager
def _traceable() -> Iterator[None]:
    """Operations that are handed over, in the place of two that are not, or whose gradient is not; on the CPU."""
    device, own = mx.default_device(), {name: getattr(mx, name) for name in ("gather_mm", "contiguous")}
    mx.set_default_device(mx.Device(mx.cpu))
    mx.gather_mm, mx.contiguous = _one_expert_for_all, _copied
    try:
        yield
    finally:
        mx.set_default_device(device)
        for name, function in own.items():
            setattr(mx, name, function)


def _one_expert_for_all(
    a: mx.array, b: mx.array, lhs_indices: mx.array | None = None, rhs_indices: mx.array | None = None, **_: Any
) -> mx.array:
    """As large as `mx.gather_mm` and its gradient, with the first expert's weights for every token."""
    out = a @ b[(0,) * (b.ndim - 2)]
    left = a.shape[:-2] if lhs_indices is None else lhs_indices.shape
    right = b.shape[:-2] if rhs_indices is None else rhs_indices.shape
    wanted = np.broadcast_shapes(left, right)
    if lhs_indices is not None:
        out = out.reshape(-1, *out.shape[-2:])[lhs_indices]
    out = out.reshape(*(1,) * (len(wanted) - out.ndim + 2), *out.shape)
    for axis, n in enumerate(wanted):
        if out.shape[axis] != n:
            out = mx.concatenate([out] * n, axis)
    return out


def _copied(a: mx.array, *_: Any, **__: Any) -> mx.array:
    return a + mx.zeros((), a.dtype)
