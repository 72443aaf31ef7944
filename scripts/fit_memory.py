"""Fit the plan's bytes a token (safesteer_mlx/system/memory.py) to measured peaks, and hold the plan against others.

    python scripts/fit_memory.py            # the rates: random Qwen2 shapes and every family of the survey, minutes
    python scripts/fit_memory.py --check    # planned / measured of shapes that nothing was fitted to

For float32 and bfloat16, with and without checkpointed blocks, and for a pass without gradient: the rates by least
squares of relative errors, none negative, and the quantiles of fitted to measured peak.
"""

import argparse
import importlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safesteer_mlx  # isort: skip  # noqa: F401  before mlx
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from scipy.optimize import nnls
from shapes import memory_shape, random_model

from safesteer_mlx.method.residual import check_stream, hidden_states
from safesteer_mlx.method.student import make_student
from safesteer_mlx.recipe import resolve
from safesteer_mlx.system import memory

SHAPES = 16
SHAPES_COUNT = 3.0
SIZES = ((8, 64), (4, 32))  # rows and length, of the survey's
TYPES = {4: mx.float32, 2: mx.bfloat16}


def random_shapes() -> list[dict[str, int]]:
    """Qwen2's, that differ in all."""
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

    for i, c in enumerate(random_shapes()):
        sizes = {name: c[name] for name in ("hidden", "intermediate", "layers", "heads", "kv_heads")}
        model = random_model(**sizes, vocabulary=1000)
        model.set_dtype(TYPES[width])
        mx.eval(model.parameters())
        yield "qwen2 shape", model, memory_shape(model), c["rows"], c["length"]
        if width == 2:  # MLX's CPU backend has no experts in half precision
            continue
        experts = {"num_experts": 8, "num_experts_per_tok": 1 + i % 6, "intermediate_size": c["intermediate"] // 4}
        config = attention(c["hidden"], c["layers"] // 2, c["heads"], model_type="olmoe", **experts)
        model = made(config)
        yield "olmoe shape", model, memory_shape(model, config), c["rows"], c["length"]
    for name in sorted(survey.configs()[0]):
        for rows, length in SIZES:
            try:
                model, config = survey.build(name)
                model.set_dtype(TYPES[width])
                mx.eval(model.parameters())
                check_stream(model, mx.array([[5, 9, 3, 17]]))
                yield name, model, memory_shape(model, config), rows, length
            except Exception as error:  # refused, or not on this backend
                print(f"{name}: left out ({str(error)[:60]})")


def fit(width: int, margin: float) -> dict[str, list[float]]:
    """The rates of one type of activations, `margin` times the best fit."""
    rows: dict[str, list[tuple[str, list[float], float]]] = {"forward": [], "gradient": [], "checkpointed": []}
    for name, model, shape, n, length in models(width):
        try:
            measured = measure(model, n, length)
        except Exception as error:  # no gradient, or no experts in bfloat16 here
            print(f"{name}: left out ({str(error)[:60]})")
            continue
        for kind, bytes_ in measured.items():
            if bytes_ <= 0:  # something was freed meanwhile
                continue
            features = memory.FEATURES[kind](shape, shape.blocks, length)
            rows[kind].append((name, features, bytes_ / (n * length)))
    rates = {}
    for kind, found in rows.items():
        a, y = np.array([f for _, f, _ in found], float), np.array([b for *_, b in found])
        # The survey's are all of one width and say little of how sizes go; the random shapes do.
        weights = np.array([SHAPES_COUNT if "shape" in name else 1.0 for name, *_ in found])
        best, _ = nnls(weights[:, None] * a / y[:, None], weights)
        rates[kind] = [round(margin * float(rate), 1) for rate in best]
        ratio = a @ np.array(rates[kind]) / y
        quantiles = ", ".join(f"{q:.2f}" for q in np.quantile(ratio, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]))
        lowest = sorted(zip(ratio.round(2).tolist(), [n for n, *_ in found], strict=True))[:6]
        print(f"{width} bytes, {kind}: {rates[kind]}; fitted / measured {quantiles}; lowest {lowest}", flush=True)
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
    parser.add_argument("--margin", type=float, default=1.15, help="what the best fit is multiplied by")
    parser.add_argument("--json", type=Path, help="write the rates here")
    args = parser.parse_args()
    mx.set_cache_limit(0)
    if not args.check:
        rates = {width: fit(width, args.margin) for width in TYPES}
        if args.json:
            args.json.write_text(json.dumps(rates))
    check()


if __name__ == "__main__":
    main()
