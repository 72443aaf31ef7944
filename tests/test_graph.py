"""What evaluating a graph takes, by hand and against what MLX measured: order, views, writing over, the queue."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from safesteer_mlx.system import graph
from safesteer_mlx.system.graph import peak_bytes, traced

A = 250_000  # bytes of an array of these tests, far from the bytes that a buffer may be larger


def square(n: int = 250, rows: int = 1) -> mx.array:
    return mx.zeros((rows, n, n), mx.float32)


def counted(function, *arrays, ahead: int = 0) -> float:
    """Peak in arrays, of an evaluation that queues nothing ahead (or so many dispatches)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "AHEAD", ahead)
        return peak_bytes(traced(function, *arrays)) / A


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: mx.exp(x), 1),
        (lambda x: mx.exp(mx.exp(x)), 1),  # over what nobody else needs
        (lambda x: mx.exp(x) + x, 1),
        (lambda x: (y := mx.exp(x)) * mx.sin(y), 2),
        (lambda x: [mx.exp(x), mx.sin(x)], 2),
        (lambda x: (mx.exp(x) @ x) @ x, 2),  # a product is never written over what it reads
        (lambda x: mx.exp(x).swapaxes(1, 2).reshape(1, 250 * 250), 2),  # transposed, then copied for its shape
        (lambda x: mx.exp(x).reshape(250 * 250), 1),
        (lambda x: mx.exp(x)[:, :125] + 1, 1.5),  # what is sliced stays whole
        (lambda x: mx.broadcast_to(mx.exp(x[:, :1]), (1, 250, 250)) @ x, 2 + 1 / 250),  # a row, spelled out to be read
        (lambda x: mx.exp(x).astype(mx.float16), 1.5),  # of another width
        (lambda x: x.swapaxes(1, 2) @ x, 1),  # read by columns
        (lambda x: x[:, ::2, ::2] @ x[:, :125, :125], 0.25 + 2 * 0.25),  # copied first, since rows have gaps
        (lambda x: mx.softmax(mx.exp(x), axis=-1), 1),
        (lambda x: mx.concatenate([x, x]), 2),
    ],
)
def test_what_operations_allocate_by_hand(function, expected):
    assert counted(function, square()) == pytest.approx(expected)


def test_what_is_done_is_held_until_so_much_more_is_dispatched():
    def chain(x):
        for _ in range(30):
            x = x @ x
        return x

    # A product is two dispatches: itself, and letting go of what it read.
    assert counted(chain, square()) == 2
    assert counted(chain, square(), ahead=20) == 2 + 10
    assert counted(chain, square(), ahead=10**6) == 30


def test_what_is_put_together_is_a_dispatch_for_each_part():
    def chain(x):
        for _ in range(30):
            x = mx.concatenate([x[:, :100], x[:, 100:150], x[:, 150:]], 1)
        return x

    # Three views, three copies, and letting go; what is padded is filled first.
    assert counted(chain, square()) == 2
    assert counted(chain, square(), ahead=35) == 2 + 5
    padded = traced(lambda x: mx.exp(mx.pad(x, [(0, 0), (0, 1), (0, 1)])), square())
    memory = graph._Memory(padded.operations, padded.results)
    for operation in padded.operations:
        memory.run(operation)
    assert [operation.name for operation in padded.operations] == ["Pad", "Exp"] and memory._dispatched == 3 + 2


def test_operations_are_ordered_as_mlx_does():
    """Breadth first from the results, the last first: so the second result's chain is worked off before the first's."""
    names = [o.name for o in graph._in_order(traced(lambda x: [mx.exp(mx.sin(x)), mx.cos(mx.tanh(x))], square()))]
    assert names == ["Tanh", "Sin", "Cos", "Exp"]
    wide = traced(lambda x: [mx.exp(x + i) * (x + i + 0.5) for i in range(60)], square())
    order = graph._in_order(wide)
    assert len(order) == len(wide.operations) and len({id(o) for o in order}) == len(order)
    made = set()
    for operation in order:  # each after what it needs
        needed = {a.name for a in operation.inputs} & {a.name for o in order for a in o.outputs}
        assert needed <= made
        made |= {a.name for a in operation.outputs}


def test_nothing_is_computed_and_what_must_be_is_told():
    before = mx.get_peak_memory()
    huge = mx.zeros((10**6, 10**5))  # 400 GB, were it made
    assert peak_bytes(traced(lambda x: mx.exp(x) + 1, huge)) == 4 * 10**11
    assert mx.get_peak_memory() == before
    with pytest.raises(ValueError, match="eval"):
        traced(lambda x: x * x.sum().item(), square())


@pytest.mark.parametrize(
    ("between", "most", "deep"),
    [
        (lambda x: x, 1.02, 40),
        (lambda x: x, 1.02, 300),
        (lambda x: mx.sign(x) + 0.1, 1.25, 40),
        (lambda x: mx.sign(x) + 0.1, 1.25, 300),
        # One operation each, as `mx.compile` has it: the queue reaches farther back. What they hold inside is counted.
        (nn.softplus, 1.02, 40),
        (nn.gelu_approx, 1.7, 40),
        (nn.silu, 2.1, 40),
    ],
)
def test_what_mlx_measures_is_what_was_counted(between, most, deep):
    """With operations that are slow enough for the queue to be full."""
    weights = [mx.random.normal((700, 700)) for _ in range(3)]
    mx.eval(weights)

    def work(x):
        for i in range(deep):
            x = between(x @ weights[i % 3])
        return x

    x = mx.random.normal((700, 700))
    mx.eval(x)
    cache = mx.set_cache_limit(0)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(work(x))
    measured = mx.get_peak_memory() - before
    mx.set_cache_limit(cache)
    assert 0.95 < peak_bytes(traced(work, x)) / measured < most
