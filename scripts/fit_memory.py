"""Fit the plan's bytes a token (safesteer_mlx/system/memory.py) to measured peaks, and hold the plan against others.

    python scripts/fit_memory.py            # the rates: random shapes and every family of the survey, minutes
    python scripts/fit_memory.py --check    # planned / measured of shapes that nothing was fitted to

For float32 and bfloat16, for a gradient, with and without checkpointed blocks, and for a pass without: the rates with
the least relative errors, of which too low counts twice, and the quantiles of fitted to measured peak.
"""

import argparse
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safesteer_mlx  # isort: skip  # noqa: F401  before mlx
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from scipy.optimize import minimize
from shapes import memory_shape

from safesteer_mlx.method.residual import check_stream, hidden_states
from safesteer_mlx.method.student import make_student
from safesteer_mlx.recipe import resolve
from safesteer_mlx.system import memory

SHAPES = 40, 24  # dense ones and mixtures of experts
SHAPES_COUNT = 3.0
NEAR, TINY = 0.3, 2e-5  # errors up to which squares count; what keeps a rate that says nothing near 1
SIZES = ((8, 64), (4, 32))  # rows and length, of the survey's
TYPES = {4: mx.float32, 2: mx.bfloat16}


def attention(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    """What most configurations hold."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": 512}
    return sizes | {
        "num_key_value_heads": heads // 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        **more,
        "max_position_embeddings": 512,
    }


def random_shapes() -> list[tuple[dict[str, Any], int, int]]:
    """Configurations that differ in all, rows and length."""
    rng, found = np.random.default_rng(7), []

    def one(*values: int) -> int:
        return int(rng.choice(values))

    for i in range(SHAPES[0]):
        family = ["llama", "qwen2", "qwen3", "gemma2", ["starcoder2", "olmo2", "phi3", "stablelm"][i % 4]][i % 5]
        heads, width = one(2, 4, 8, 16), one(16, 32, 64)
        own = family in ("llama", "qwen3", "gemma2")  # heads of a width of their own
        hidden = one(128, 192, 256, 384) if own else min(512, heads * width)
        more = {
            "gemma2": {"query_pre_attn_scalar": 64, "sliding_window": 4096},
            "starcoder2": {"norm_epsilon": 1e-5},
            "phi3": {"rope_scaling": None, "original_max_position_embeddings": 512},
            "stablelm": {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "use_qkv_bias": False},
        }.get(family, {})
        sizes = {"intermediate_size": hidden * one(1, 2, 3, 4), "num_key_value_heads": one(*{1, heads // 2, heads})}
        sizes |= {"tie_word_embeddings": True, **({"head_dim": width} if own else {})}
        config = attention(hidden, one(3, 4, 6, 8), heads, model_type=family, **(sizes | more))
        found.append((config, one(1, 2, 4), one(48, 96, 160, 256)))
    for i in range(SHAPES[1]):
        family = ["olmoe", "mixtral", "qwen3_moe", "qwen2_moe"][i % 4]
        heads, width, experts, inner = one(2, 4, 8), one(16, 32, 64), one(4, 8, 16, 32), one(64, 96, 128, 256)
        sizes = {"num_experts_per_tok": one(1, 2, 4), "intermediate_size": inner, "tie_word_embeddings": False}
        sizes["num_local_experts" if family == "mixtral" else "num_experts"] = experts
        if family == "qwen3_moe":
            sizes |= {"head_dim": width, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
        sizes |= {"moe_intermediate_size": inner, "shared_expert_intermediate_size": 2 * inner}
        config = attention(heads * width, one(2, 3, 4, 6), heads, model_type=family, **sizes)
        found.append((config, one(2, 4), one(48, 96, 160)))
    return found


# Never fitted: larger than the survey's, and of other proportions.
CHECKED: list[tuple[dict[str, Any], int, int]] = [
    (attention(512, 6, 32, model_type="llama", intermediate_size=1024), 4, 96),
    (attention(256, 10, 4, model_type="qwen3", head_dim=128, intermediate_size=768, tie_word_embeddings=True), 4, 128),
    (
        attention(384, 6, 12, model_type="olmoe", intermediate_size=192, num_experts=16, num_experts_per_tok=8),
        4,
        96,
    ),
    (
        attention(192, 8, 6, model_type="mixtral", intermediate_size=384, num_local_experts=8, num_experts_per_tok=2),
        4,
        64,
    ),
    (
        attention(
            256,
            6,
            4,
            model_type="qwen3_moe",
            head_dim=64,
            intermediate_size=512,
            num_experts=32,
            num_experts_per_tok=4,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            moe_intermediate_size=96,
            norm_topk_prob=True,
            tie_word_embeddings=False,
        ),
        4,
        128,
    ),
    (
        attention(
            256,
            8,
            4,
            model_type="gemma3_text",
            head_dim=64,
            intermediate_size=1536,
            sliding_window=64,
            sliding_window_pattern=3,
            query_pre_attn_scalar=64,
        ),
        4,
        96,
    ),
    (attention(384, 6, 6, model_type="starcoder2", intermediate_size=1536, norm_epsilon=1e-5), 4, 96),
    (attention(384, 8, 12, model_type="olmo2", intermediate_size=1024, tie_word_embeddings=False), 4, 64),
    (
        attention(
            192,
            4,
            4,
            model_type="qwen3_next",
            head_dim=48,
            intermediate_size=512,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=48,
            linear_value_head_dim=48,
            linear_conv_kernel_dim=4,
            num_experts=8,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            shared_expert_intermediate_size=96,
            mlp_only_layers=[],
            moe_intermediate_size=96,
            partial_rotary_factor=0.25,
            norm_topk_prob=True,
            tie_word_embeddings=False,
            attention_bias=False,
            full_attention_interval=4,
        ),
        4,
        48,
    ),
    (
        attention(
            192,
            6,
            6,
            model_type="mamba2",
            num_heads=6,
            head_dim=64,
            state_size=48,
            n_groups=1,
            conv_kernel=4,
            intermediate_size=384,
            time_step_rank="auto",
            time_step_limit=[0.0, float("inf")],
            layer_norm_epsilon=1e-5,
            use_bias=False,
            use_conv_bias=True,
            tie_word_embeddings=False,
        ),
        4,
        96,
    ),
    (
        {
            "model_type": "dbrx",
            **{"vocab_size": 512, "d_model": 256, "n_layers": 6, "n_heads": 8},
            "attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 384, "moe_num_experts": 8, "moe_top_k": 3, "moe_jitter_eps": 0.01},
        },
        4,
        96,
    ),
    (
        {
            "model_type": "phixtral",
            **{"vocab_size": 512, "n_embd": 256, "n_head": 8, "n_layer": 6, "num_experts_per_tok": 2},
            **{"num_vocab": 512, "model_dim": 256, "num_heads": 8, "num_layers": 6, "rotary_dim": 16},
            "num_local_experts": 4,
        },
        4,
        96,
    ),
]


# Looked at once, when all was chosen.
UNTIED = {"tie_word_embeddings": False}
CHECKED += [
    (
        attention(320, 7, 10, model_type="ernie4_5", intermediate_size=960, use_bias=False, head_dim=32, **UNTIED),
        3,
        200,
    ),
    (
        attention(
            *(256, 6, 8),
            model_type="cohere",
            **{"intermediate_size": 640, "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "use_qk_norm": False},
        ),
        2,
        144,
    ),
    (
        attention(
            *(384, 5, 12),
            model_type="glm4",
            **{"head_dim": 32, "intermediate_size": 1152, "attention_bias": True, "partial_rotary_factor": 0.5},
            **UNTIED,
        ),
        4,
        80,
    ),
    (
        attention(
            *(256, 5, 8),
            model_type="granitemoe",
            **{"intermediate_size": 160, "num_local_experts": 12, "num_experts_per_tok": 3, "logits_scaling": 8.0},
            **{"attention_multiplier": 0.0625, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
            **{"attention_bias": False, "mlp_bias": False},
            **UNTIED,
        ),
        4,
        112,
    ),
    (
        attention(
            *(192, 6, 6),
            model_type="qwen2_moe",
            **{"intermediate_size": 384, "moe_intermediate_size": 80, "num_experts": 24, "num_experts_per_tok": 3},
            shared_expert_intermediate_size=320,
            **UNTIED,
        ),
        2,
        320,
    ),
]


def peak(work: Any) -> tuple[int, Any]:
    """Bytes above what was there before, and the result."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = work()
    mx.eval(result)
    return mx.get_peak_memory() - before, result


def made(config: dict[str, Any]) -> nn.Module:
    """A random model of a configuration."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(dict(config)))
    mx.eval(model.parameters())
    return model


def measure(model: nn.Module, rows: int, length: int, checkpoints: Sequence[str] = ("off", "on")) -> dict[str, int]:
    """Peaks of a forward pass, and of training passes without the gradient itself."""
    ids = mx.array(np.random.default_rng(0).integers(0, 150, (rows, length)))
    found = {"forward": peak(lambda: hidden_states(model, ids))[0]}
    for how in checkpoints:
        student = make_student(model, replace(resolve({}, {})[0].train, grad_checkpoint=how), 0)
        student.train()
        work = nn.value_and_grad(student, lambda m: hidden_states(m, ids).astype(mx.float32).square().sum())
        bytes_, (_, gradient) = peak(lambda work=work, student=student: work(student))
        own = sum(g.nbytes for _, g in tree_flatten(gradient))
        found["checkpointed" if how == "on" else "gradient"] = bytes_ - own
    return found


def models(width: int) -> Any:
    """(name, model, its shape, rows, length) of all that is fitted."""
    import survey

    shapes = [(f"{config['model_type']} shape", config, rows, length) for config, rows, length in random_shapes()]
    families = [(name, None, *size) for name in sorted(survey.configs()[0]) for size in SIZES]
    for name, config, rows, length in shapes + families:
        try:
            model, config = survey.build(name) if config is None else (made(config), config)
            model.set_dtype(TYPES[width])
            mx.eval(model.parameters())
            check_stream(model, mx.array([[5, 9, 3, 17]]))
            yield name, model, memory_shape(model, config), rows, length
        except Exception as error:  # refused, or not on this backend, as experts in half precision
            print(f"{name}: left out ({str(error)[:60]})")


@dataclass(frozen=True)
class Measured:
    """A peak in values a token, and what may be the most then (C, F); `gradient`, of trained weights, comes on top."""

    name: str
    how: str
    parts: np.ndarray
    values: float
    gradient: float


def least_errors(found: list[Measured], near: np.ndarray | None) -> np.ndarray:
    """The rates (F,), by relative errors of the largest part beside what was measured; too low counts twice.

    `near` are rates that those are like of which little was measured: float32's, where experts cannot be computed.
    """
    n, size = max(len(one.parts) for one in found), found[0].parts.shape[1]
    parts = np.zeros((len(found), n, size))
    for i, one in enumerate(found):
        parts[i, : len(one.parts)] = one.parts
    values, gradients = (np.array([getattr(one, name) for one in found]) for name in ("values", "gradient"))
    # The survey's are all of one width and say little of how sizes go; the random shapes do.
    weights, rows = np.array([SHAPES_COUNT if "shape" in one.name else 1.0 for one in found]), np.arange(len(found))

    def error(logs: np.ndarray) -> tuple[float, np.ndarray]:
        rates = np.exp(logs)
        given = parts @ rates
        most = given.argmax(1)
        planned = given[rows, most] + gradients + 1e-9
        off = np.log(planned / (values + gradients))
        each = np.where(off < 0, 2.0, 1.0) * weights
        size = np.where(abs(off) < NEAR, off**2, 2 * NEAR * abs(off) - NEAR**2) * each
        slope = np.where(abs(off) < NEAR, 2 * off, 2 * NEAR * np.sign(off)) * each / planned
        whole = (slope[:, None] * parts[rows, most] * rates).mean(0)
        return size.mean() + pull * ((logs - middle) ** 2).sum(), whole + 2 * pull * (logs - middle)

    middle, pull = (np.zeros(size), TINY) if near is None else (np.log(near), 100 * TINY)
    starts = [middle + np.random.default_rng(seed).normal(0, 0.3, size) for seed in range(4)]
    tries = [minimize(error, at, jac=True, method="L-BFGS-B", bounds=[(-5, 3.7)] * size) for at in starts]
    return np.exp(min(tries, key=lambda one: one.fun).x)


def fit(width: int, margin: float, like: dict[str, list[float]] | None) -> dict[str, list[float]]:
    """The rates of one type of activations, `margin` times the best fit, `like` those of another."""
    train, found = resolve({}, {})[0].train, []
    for name, model, shape, n, length in models(width):
        if not shape.forgets:  # by factors of their own
            continue
        try:
            measured = measure(model, n, length)
        except Exception as error:  # no gradient, or no experts in bfloat16 here
            print(f"{name}: left out ({str(error)[:60]})")
            continue
        if min(measured.values()) <= 0:  # something was freed meanwhile
            continue
        for how, bytes_ in measured.items():
            parts = np.array(memory.features(shape, shape.blocks, length, how), float)
            own = 0 if how == "forward" else 4 * memory.trained_values(shape, train)
            found.append(Measured(name, how, parts, bytes_ / (n * length * width), own / (n * length * width)))
    rates = {}
    for kind, hows in (("gradient", ("gradient", "checkpointed")), ("forward", ("forward",))):
        near = None if like is None else np.array(like[kind]) / margin
        best = margin * least_errors([one for one in found if one.how in hows], near)
        rates[kind] = [round(float(rate), 2) for rate in best]
        for how in hows:
            of = [one for one in found if one.how == how]
            ratio = [((one.parts @ best).max() + one.gradient) / (one.values + one.gradient) for one in of]
            quantiles = ", ".join(f"{q:.2f}" for q in np.quantile(ratio, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]))
            lowest = sorted((round(r, 2), one.name) for r, one in zip(ratio, of, strict=True))[:6]
            print(f"{width} bytes, {how}: fitted / measured {quantiles}; lowest {lowest}", flush=True)
        print(f"{width} bytes, {kind}: {rates[kind]}", flush=True)
    return rates


def check() -> None:
    """Planned over measured, of each shape that was not fitted."""
    for config, rows, length in CHECKED:
        model = made(config)
        shape, found = memory_shape(model, config), measure(model, rows, length)
        train = resolve({}, {})[0].train
        planned = {
            "forward": memory.forward_bytes(shape, rows, length),
            "gradient": memory.gradient_bytes(shape, train, rows, length, False),
            "checkpointed": memory.gradient_bytes(shape, train, rows, length, True),
        }
        said = ", ".join(f"{kind} {planned[kind] / bytes_:.2f}" for kind, bytes_ in found.items())
        print(
            f"{config['model_type']}, {shape.hidden} wide, {shape.heads} heads: planned / measured {said}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only hold the plan against shapes that were not fitted")
    parser.add_argument("--margin", type=float, default=1.12, help="what the best fit is multiplied by")
    parser.add_argument("--json", type=Path, help="write the rates here")
    args = parser.parse_args()
    mx.set_cache_limit(0)
    if not args.check:
        rates: dict[int, dict[str, list[float]]] = {}
        for width in TYPES:
            rates[width] = fit(width, args.margin, rates.get(4))
        if args.json:
            args.json.write_text(json.dumps(rates))
    check()


if __name__ == "__main__":
    main()
