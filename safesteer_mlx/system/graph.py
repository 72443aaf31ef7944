"""What evaluating a function of MLX takes at most, counted on shapes alone: nothing is computed.

A function is traced (`mx.export_function` hands over each operation with its shapes), put in the order in which MLX
evaluates it, and followed by the rules of MLX's CPU backend: what an operation allocates; what only looks at another's
buffer (transposed, broadcast, sliced); what is written over an input that nobody needs any more; and when a buffer is
free again, some hundred dispatches later, since so many are queued ahead of what is computed. Nothing here is fitted:
docs/memory.md holds it against measured peaks.
"""

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

_width = os.environ.get("MLX_BFS_MAX_WIDTH", "")
WIDTH = max(1, int(_width)) if _width.isdecimal() else 20  # operations that MLX keeps open, ordering breadth first
AHEAD = 110  # dispatches queued ahead of what is computed: ten tasks of ten, and one that is filled
SPARE = 16_384  # bytes that a buffer may be larger than what is written over it

# Of what is given, elementwise: over an input where that is allowed, else as its input lies.
_ELEMENTWISE = {"Abs", "Add", "ArcCos", "ArcCosh", "ArcSin", "ArcSinh", "ArcTan", "ArcTan2", "ArcTanh", "AsType"}
_ELEMENTWISE |= {"BitwiseBinary", "BitwiseInvert", "Ceil", "Conjugate", "Cos", "Cosh", "DivMod", "Divide", "Equal"}
_ELEMENTWISE |= {"Erf", "ErfInv", "Exp", "Expm1", "Floor", "FloorDivide", "Greater", "GreaterEqual", "Imag", "Less"}
_ELEMENTWISE |= {"LessEqual", "Log", "Log10", "Log1p", "Log2", "LogAddExp", "LogicalAnd", "LogicalNot", "LogicalOr"}
_ELEMENTWISE |= {"Maximum", "Minimum", "Multiply", "NaNEqual", "Negative", "NotEqual", "Power", "Real", "Remainder"}
_ELEMENTWISE |= {"Round", "Rsqrt", "Select", "Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Square", "Subtract", "Tan"}
_ELEMENTWISE |= {"Tanh"}
_ACTIVATIONS = {"Erf", "LogAddExp", "Sigmoid", "Tanh"}
_OVER_FIRST = {"SliceUpdate", "DynamicSliceUpdate", "Scatter", "ScatterAxis"}  # a copy of it, changed in places
_BY_ROW = {"Softmax", "LogSumExp", "RMSNorm", "LayerNorm", "RoPE"}  # read row after row
_PRODUCTS = {"Matmul", "AddMM", "GatherMM", "BlockMaskedMM"}  # read either way round
_PRODUCTS_BY_ROW = {"QuantizedMatmul", "GatherQMM", "QQMatmul", "ScaledDotProductAttention"}
_SAME = {"Copy", "StopGradient", "Depends", "View", "AsStrided", "Split"}
_RESHAPES = {"Reshape", "Flatten", "Unflatten", "Squeeze", "ExpandDims"}


class Array(NamedTuple):
    """An array of a traced function: its name, shape, and bytes of a value."""

    name: str
    shape: tuple[int, ...]
    width: int


@dataclass(frozen=True)
class Operation:
    """What makes arrays of others, and what it is told beside them."""

    name: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    told: Sequence[Any]


@dataclass(frozen=True)
class Graph:
    """A traced function: its operations, each after those that it needs, and what it returns."""

    operations: tuple[Operation, ...]
    results: tuple[Array, ...]

    @property
    def result_bytes(self) -> int:
        """Of what is returned."""
        return sum(math.prod(array.shape) * array.width for array in self.results)


def traced(function: Callable[..., Any], *arrays: mx.array) -> Graph:
    """The graph of a function of arrays, which need not be computed.

    Raises:
        ValueError: it evaluates something meanwhile, or holds an operation that MLX does not hand over.
    """
    records: list[dict[str, Any]] = []
    mx.export_function(records.append, function, *arrays)

    def known(those: Iterable[Any]) -> tuple[Array, ...]:
        return tuple(Array(name, tuple(shape), dtype.size) for name, shape, dtype in those)

    operations = tuple(
        Operation(record["name"], known(record["inputs"]), known(record["outputs"]), record["arguments"])
        for record in records
        if record["type"] == "primitive"
    )
    return Graph(operations, known(next(record["outputs"] for record in records if record["type"] == "outputs")))


def _in_order(graph: Graph) -> list[Operation]:
    """The operations as MLX evaluates them: breadth first from the results, no more than `WIDTH` open, backwards."""
    made_by = {array.name: i for i, operation in enumerate(graph.operations) for array in operation.outputs}
    last = len(graph.operations)
    needs = [[made_by[a.name] for a in operation.inputs if a.name in made_by] for operation in graph.operations]
    needs.append([made_by[a.name] for a in graph.results if a.name in made_by])
    waiting: Counter[int] = Counter()
    todo, reached = [last], {last}
    while todo:
        for need in needs[todo.pop()]:
            waiting[need] += 1
            if need not in reached:
                reached.add(need)
                todo.append(need)
    tape, open_, at = [last], [], 0
    while at < len(tape) or open_:
        if at < len(tape):
            i, first = tape[at], 0
            at += 1
        else:
            i, first = open_.pop()
        for j in range(first, len(needs[i])):
            if len(tape) - at >= WIDTH:
                open_.append((i, j))
                break
            waiting[needs[i][j]] -= 1
            if not waiting[needs[i][j]]:
                tape.append(needs[i][j])
    return [graph.operations[i] for i in reversed(tape[1:])]


class _Buffer:
    """Allocated memory, and how many hold it."""

    __slots__ = ("holders", "size")

    def __init__(self, size: int):
        self.size, self.holders = size, 0


class _Layout(NamedTuple):
    """Where an array lies: its buffer (None: was there before), shape, strides in values, bytes of a value."""

    buffer: _Buffer | None
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    width: int

    @property
    def values(self) -> int:
        """Of those that lie apart: what is broadcast counts once."""
        return math.prod(n for n, stride in zip(self.shape, self.strides, strict=True) if stride)

    @property
    def by_row(self) -> bool:
        """The last axis first, with no gaps."""
        return _without_gaps(zip(reversed(self.shape), reversed(self.strides), strict=True))

    @property
    def by_column(self) -> bool:
        """The first axis first, with no gaps."""
        return _without_gaps(zip(self.shape, self.strides, strict=True))

    @property
    def dense(self) -> bool:
        """With no gaps, in whatever order of axes."""
        axes = sorted((stride, n) for n, stride in zip(self.shape, self.strides, strict=True) if stride and n > 1)
        return _without_gaps((n, stride) for stride, n in axes)

    def rows_follow(self, either_way: bool) -> bool:
        """Whether the last two axes can be read as they lie, by rows, or by columns too."""
        (rows, columns), (far, near) = self.shape[-2:], self.strides[-2:]
        by_row = (near == 1 or columns == 1) and (far == columns or rows == 1)
        return by_row or (either_way and (far == 1 or rows == 1) and (near == rows or columns == 1))


def _given(array: Array) -> _Layout:
    """An array that was there before."""
    return _Layout(None, array.shape, _strides(array.shape), array.width)


def _without_gaps(axes: Iterable[tuple[int, int]]) -> bool:
    expected = 1
    for n, stride in axes:
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Those of an array by rows."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * shape[i]
    return tuple(strides)


def _reshaped(array: _Layout, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides of an array in another shape; None if it must be copied for it."""
    if array.by_row:
        return _strides(shape)
    axes: list[list[int]] = []  # those that lie one in the other are one
    for n, stride in zip(array.shape, array.strides, strict=True):
        if n != 1 and axes and axes[-1][1] == stride * n:
            axes[-1] = [axes[-1][0] * n, stride]
        elif n != 1:
            axes.append([n, stride])
    strides, at = [], 0
    for n in shape:
        if at < len(axes) and axes[at][0] % n == 0:
            axes[at][0] //= n
            strides.append(axes[at][0] * axes[at][1])
            at += axes[at][0] == 1
        elif n == 1:
            strides.append(strides[-1] if strides else 1)
        else:
            return None
    return tuple(strides)


def _viewed(operation: Operation, which: int, inputs: Sequence[_Layout]) -> _Layout | None:
    """The output that only looks at an input's buffer; None if this operation makes one of its own."""
    name, (_, shape, width) = operation.name, operation.outputs[which]
    source = inputs[which if name == "Depends" else 0] if inputs else None
    if source is None:
        return None
    strides: tuple[int, ...] | None = None
    if name in _SAME:
        strides = source.strides if len(source.strides) == len(shape) and source.width == width else _strides(shape)
    elif name in _RESHAPES:
        strides = _reshaped(source, shape)
    elif name == "Transpose":
        strides = tuple(source.strides[axis] for axis in operation.told[0])
    elif name in ("Broadcast", "BroadcastAxes"):
        new = len(shape) - len(source.shape)
        old = zip(source.shape, shape[new:], source.strides, strict=True)
        strides = (0,) * new + tuple(0 if before == 1 != after else stride for before, after, stride in old)
    elif name == "Slice":
        strides = tuple(stride * by for stride, by in zip(source.strides, operation.told[-1], strict=True))
    elif name == "Contiguous" and source.by_row:
        strides = source.strides
    return None if strides is None else _Layout(source.buffer, shape, strides, width)


class _Memory:
    """What is allocated while operations are followed."""

    def __init__(self, operations: Sequence[Operation], results: Sequence[Array]):
        self.peak = self._now = self._dispatched = 0
        # Of each array: how many inputs and results it still is; where it lies, once it is made.
        self._uses = Counter(array.name for operation in operations for array in operation.inputs)
        self._uses.update(array.name for array in results)
        self._lies: dict[str, _Layout] = {}
        self._fused = _fused(operations, self._uses)
        self._queued: deque[tuple[int, list[_Buffer]]] = deque()  # held until so many are dispatched

    def run(self, operation: Operation) -> None:
        """One operation: its outputs, what it needs meanwhile, and what is no longer needed after it."""
        while self._queued and self._queued[0][0] <= self._dispatched - AHEAD:
            self._drop(self._queued.popleft()[1])
        inputs = [self._lies.get(array.name) or _given(array) for array in operation.inputs]
        views = [_viewed(operation, i, inputs) for i in range(len(operation.outputs))]
        outputs = [view or self._made(operation, i, inputs) for i, view in enumerate(views)]
        buffers = {id(out.buffer) for out in outputs}
        held = {id(buffer): buffer for a in inputs if (buffer := a.buffer) is not None and id(buffer) not in buffers}
        copies = [self._allocated(size) for size in _copies(operation, inputs)]
        self._hold([*held.values(), *copies])
        # What a view looks at is held by a dispatch too; inputs are copied into one one by one, as is what is padded.
        made = {"Concatenate": len(inputs), "Pad": 2}.get(operation.name, 1) if None in views else 0
        self._dispatched += (1 + len(copies) + made) * (operation.outputs[0].name not in self._fused)
        self._queued.append((self._dispatched, [*held.values(), *copies]))
        for array, out in zip(operation.outputs, outputs, strict=True):
            self._lies[array.name] = out
            self._hold([out.buffer])
        for array in operation.inputs:
            self._uses[array.name] -= 1
        for array in (*operation.inputs, *operation.outputs):
            if not self._uses[array.name] and (gone := self._lies.pop(array.name, None)):
                self._drop([gone.buffer])

    def _made(self, operation: Operation, which: int, inputs: Sequence[_Layout]) -> _Layout:
        name, (_, shape, width) = operation.name, operation.outputs[which]
        size, strides = math.prod(shape) * width, _strides(shape)
        over: list[int] = []
        if _elementwise(operation):
            many = [i for i, a in enumerate(inputs) if a.values > 1 and a.shape == shape]
            if not many and name in _ELEMENTWISE:
                return _Layout(self._allocated(width), shape, (0,) * len(shape), width)
            alike = all(inputs[i].by_row for i in many) or all(inputs[i].by_column for i in many)
            as_it_lies = bool(many) and (alike or (len(many) == 1 and inputs[many[0]].dense))
            over = many if as_it_lies else [i for i in many if inputs[i].by_row]
            if as_it_lies:
                strides, size = inputs[many[0]].strides, inputs[many[0]].values * width
        elif name in _OVER_FIRST or (name in _BY_ROW and not which):
            over = [0] if inputs[0].dense and inputs[0].shape == shape else []
        for i in over:
            array, buffer = operation.inputs[i], inputs[i].buffer
            if buffer is None or self._uses[array.name] > 1 or buffer.holders > 1 or inputs[i].width != width:
                continue
            if buffer.size <= math.prod(shape) * width + SPARE:
                return _Layout(buffer, shape, inputs[i].strides, width)
        return _Layout(self._allocated(size), shape, strides, width)

    def _allocated(self, size: int) -> _Buffer:
        self._now += size
        self.peak = max(self.peak, self._now)
        return _Buffer(size)

    def _hold(self, buffers: Iterable[_Buffer | None]) -> None:
        for buffer in buffers:
            if buffer is not None:
                buffer.holders += 1

    def _drop(self, buffers: Iterable[_Buffer | None]) -> None:
        for buffer in buffers:
            if buffer is not None:
                buffer.holders -= 1
                if not buffer.holders:
                    self._now -= buffer.size


def _fused(operations: Sequence[Operation], uses: Counter[str]) -> set[str]:
    """What operations make that are dispatched with the next one: an activation, and what is done elementwise just
    before and after it. Activations are functions that `mx.compile` makes one operation of, which a trace does not
    show."""
    needed_by = {array.name: operation for operation in operations for array in operation.inputs}

    def leads_on(operation: Operation) -> bool:
        out = operation.outputs[0]
        if not _elementwise(operation) or uses[out.name] != 1 or out.name not in needed_by:
            return False
        then = needed_by[out.name]
        return _elementwise(then) and then.outputs[0].shape == out.shape

    chains = [operation for operation in operations if leads_on(operation)]
    after: set[str] = set()
    for operation in chains:
        if operation.name in _ACTIVATIONS or any(array.name in after for array in operation.inputs):
            after.add(operation.outputs[0].name)
    before: set[str] = set()
    for operation in reversed(chains):
        out = operation.outputs[0].name
        then = needed_by[out]
        if then.name in _ACTIVATIONS or then.outputs[0].name in before:
            before.add(out)
    return after | before


def _elementwise(operation: Operation) -> bool:
    return operation.name in _ELEMENTWISE or operation.name.startswith("Compiled")


def _copies(operation: Operation, inputs: Sequence[_Layout]) -> list[int]:
    """Bytes of the copies that an operation makes of inputs that it cannot read as they lie."""
    name = operation.name
    if name == "Convolution":  # in float32: padded, each window beside the next, and of another type what comes out
        (_, shape, width), given, kernel = operation.outputs[0], inputs[0].shape, inputs[1].shape
        copies = [math.prod(given), math.prod(shape[:-1]) * math.prod(kernel[1:-1]) * given[-1]]
        return [4 * n for n in (*copies, *([math.prod(shape)] if width < 4 else []))]
    if name in _BY_ROW:
        inputs = inputs[:1]
    elif name in _PRODUCTS or name in _PRODUCTS_BY_ROW:
        inputs = inputs[:2] if name == "AddMM" else inputs
    else:
        return []
    either_way = name in _PRODUCTS
    unread = [a for a in inputs if len(a.shape) > 1 and not a.rows_follow(either_way)]
    return [math.prod(a.shape) * a.width for a in unread]


def peak_bytes(graph: Graph) -> int:
    """The most that evaluating it takes at once beside what it is given; its results are of it."""
    operations = _in_order(graph)
    memory = _Memory(operations, graph.results)
    for operation in operations:
        memory.run(operation)
    return memory.peak
