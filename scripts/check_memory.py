"""Hold the memory plan's passes (safesteer_mlx/method/passes.py) against measured peaks.

    python scripts/check_memory.py                 # planned / measured of the shapes in docs/memory.md, half a minute
    python scripts/check_memory.py --bits 16       # in bfloat16; 4: quantized
    python scripts/check_memory.py --large         # Qwen2.5-0.5B's shape
    python scripts/check_memory.py --random 40     # of random shapes of eight dense families and four of experts

Nothing is fitted: a pass is counted by MLX's own rules. What MLX's queue holds back differs by the speed of what it
computes; the plan counts on a full one.
"""

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import safesteer_mlx  # isort: skip  # noqa: F401  before mlx
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from shapes import memory_shape

from safesteer_mlx.method.passes import Passes
from safesteer_mlx.method.residual import hidden_states
from safesteer_mlx.method.student import make_student
from safesteer_mlx.recipe import resolve
from safesteer_mlx.system.screen import UserError


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


def random_shapes(n: int) -> list[tuple[dict[str, Any], int, int]]:
    """Configurations that differ in all, rows and length: n dense ones, and half as many with experts."""
    rng, shapes = np.random.default_rng(7), []

    def one(*values: int) -> int:
        return int(rng.choice(values))

    for i in range(n):
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
        shapes.append((config, one(1, 2, 4), one(48, 96, 160, 256)))
    for i in range(n // 2):
        family = ["olmoe", "mixtral", "qwen3_moe", "qwen2_moe"][i % 4]
        heads, width, experts, inner = one(2, 4, 8), one(16, 32, 64), one(4, 8, 16, 32), one(64, 96, 128, 256)
        sizes = {"num_experts_per_tok": one(1, 2, 4), "intermediate_size": inner, "tie_word_embeddings": False}
        sizes["num_local_experts" if family == "mixtral" else "num_experts"] = experts
        if family == "qwen3_moe":
            sizes |= {"head_dim": width, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
        sizes |= {"moe_intermediate_size": inner, "shared_expert_intermediate_size": 2 * inner}
        config = attention(heads * width, one(2, 3, 4, 6), heads, model_type=family, **sizes)
        shapes.append((config, one(2, 4), one(48, 96, 160)))
    return shapes


# Larger than the survey's, and of other proportions.
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


QWEN = {"num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151_936, "tie_word_embeddings": True}
LARGE = (attention(896, 24, 14, model_type="qwen2") | QWEN, 2, 128)  # Qwen2.5-0.5B's shape


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


def compared(config: dict[str, Any], rows: int, length: int, bits: int = 32) -> dict[str, tuple[int, int]]:
    """Bytes planned and measured, of each kind of pass."""
    model = made(config)
    if bits < 32:
        model.set_dtype(mx.bfloat16)
    if bits < 16:
        nn.quantize(model, 32, bits)
    mx.eval(model.parameters())
    measured = measure(model, rows, length)
    train, passes = resolve({}, {})[0].train, Passes(model, memory_shape(model, config))
    planned = {
        "forward": passes.forward(rows, length),
        "gradient": passes.gradient(train, rows, length, False),
        "checkpointed": passes.gradient(train, rows, length, True),
    }
    return {kind: (planned[kind], measured[kind]) for kind in planned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=32, choices=(4, 8, 16, 32), help="of the weights")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="random shapes, and N / 2 of experts")
    parser.add_argument("--large", action="store_true", help="Qwen2.5-0.5B's shape alone, half a minute")
    args = parser.parse_args()
    mx.set_cache_limit(0)
    shapes = [LARGE] if args.large else random_shapes(args.random) if args.random else CHECKED
    every: list[dict[str, tuple[int, int]]] = []
    for config, rows, length in shapes:
        name = f"{config['model_type']}, {config.get('hidden_size') or config.get('d_model') or config['n_embd']} wide"
        try:
            every.append(compared(config, rows, length, args.bits))
        except (UserError, RuntimeError, ValueError) as error:  # as experts in half precision on the CPU
            print(f"{name}: left out ({str(error)[:60]})")
            continue
        told = [f"{kind} {p / m:.2f} of {m / 1e6:.1f} MB" for kind, (p, m) in every[-1].items()]
        print(f"{name}: {', '.join(told)}", flush=True)
    for kind in every[0]:
        quantiles = np.quantile([of[kind][0] / of[kind][1] for of in every], [0, 0.05, 0.5, 0.95, 1])
        print(f"{kind}: {', '.join(f'{q:.2f}' for q in quantiles)} (0, 5, 50, 95, 100 %)")


if __name__ == "__main__":
    main()
