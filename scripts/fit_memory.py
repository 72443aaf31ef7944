"""Fit the plan's bytes a token (safesteer_mlx/memory.py) to peaks measured on random Qwen2 shapes.

    python scripts/fit_memory.py          # about two minutes on two cores

For float32 and bfloat16, with and without checkpointed blocks, and for a pass without gradient: the rates by least
squares, and the worst ratios of fitted to measured peak.
"""

from dataclasses import replace
from typing import Any

import safesteer_mlx  # isort: skip  # noqa: F401  before mlx
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from shapes import qwen2

from safesteer_mlx.method.residual import hidden_states
from safesteer_mlx.method.student import make_student
from safesteer_mlx.recipe import resolve

SHAPES = 16


def random_shapes() -> list[dict[str, int]]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(SHAPES):
        heads, width = int(rng.choice([2, 4, 8])), int(rng.choice([16, 32, 64]))
        found.append(
            {
                "heads": heads,
                "hidden": heads * width,
                "kv_heads": int(rng.choice([k for k in (1, 2, 4, 8) if k <= heads])),
                "intermediate": int(rng.choice([256, 512, 1024])),
                "layers": int(rng.choice([4, 8, 12])),
                "rows": int(rng.choice([2, 4])),
                "length": int(rng.choice([64, 128, 192])),
            }
        )
    return found


def build(c: dict[str, int], dtype: mx.Dtype) -> nn.Module:
    sizes = {name: c[name] for name in ("hidden", "intermediate", "layers", "heads", "kv_heads")}
    model = qwen2(**sizes, vocabulary=1000)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def peak(work: Any) -> tuple[int, Any]:
    """Bytes above what was there before, and the result."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = work()
    mx.eval(result)
    return mx.get_peak_memory() - before, result


def gradient_peak(c: dict[str, int], dtype: mx.Dtype, checkpointed: bool) -> int:
    """Of a training pass, without the gradient itself."""
    settings = replace(resolve({}, {})[0].train, grad_checkpoint="on" if checkpointed else "off")
    student = make_student(build(c, dtype), settings, 0)
    student.train()
    ids = mx.array(np.random.randint(0, 1000, (c["rows"], c["length"])))
    work = nn.value_and_grad(student, lambda m: hidden_states(m, ids).astype(mx.float32).square().sum())
    found, (_, gradient) = peak(lambda: work(student))
    return found - sum(g.nbytes for _, g in tree_flatten(gradient))  # type: ignore[union-attr]


def forward_peak(c: dict[str, int], dtype: mx.Dtype) -> int:
    model = build(c, dtype)
    ids = mx.array(np.random.randint(0, 1000, (c["rows"], c["length"])))
    return peak(lambda: hidden_states(model, ids))[0]


def sizes(c: dict[str, int], *names: str) -> list[float]:
    kv = c["hidden"] // c["heads"] * c["kv_heads"]
    beside = {"I": c["intermediate"], "D": c["hidden"], "KV": kv, "heads·T": c["heads"] * c["length"]}
    kept = {f"L·{name}": c["layers"] * value for name, value in beside.items()}
    return [float((beside | kept)[name]) for name in names]


def fit(title: str, names: tuple[str, ...], measured: list[int], shapes: list[dict[str, int]]) -> None:
    """Least squares of relative errors, printed."""
    a = np.array([sizes(c, *names) for c in shapes])
    y = np.array([bytes_ / (c["rows"] * c["length"]) for bytes_, c in zip(measured, shapes, strict=True)])
    rates, *_ = np.linalg.lstsq(a / y[:, None], np.ones(len(y)), rcond=None)
    ratio = a @ rates / y
    said = ", ".join(f"{name} {rate:.1f}" for name, rate in zip(names, rates, strict=True))
    print(f"{title}: {said}; fitted / measured {ratio.min():.3f} to {ratio.max():.3f}", flush=True)


def main() -> None:
    mx.set_cache_limit(0)
    shapes = random_shapes()
    for dtype in (mx.float32, mx.bfloat16):
        for checkpointed, names in (
            (False, ("L·I", "L·D", "L·KV", "I", "D", "heads·T")),
            (True, ("L·D", "I", "D", "KV", "heads·T")),
        ):
            found = [gradient_peak(c, dtype, checkpointed) for c in shapes]
            fit(f"{dtype}, gradient{', checkpointed' if checkpointed else ''}", names, found, shapes)
        fit(f"{dtype}, no gradient", ("I", "D", "KV", "heads·T"), [forward_peak(c, dtype) for c in shapes], shapes)


if __name__ == "__main__":
    main()
