"""Random models of a given shape, to measure with, and what the memory plan would read of their files."""

import importlib
from dataclasses import fields
from typing import Any

import safesteer_mlx  # isort: skip  # noqa: F401  before mlx
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from safesteer_mlx.system.model_files import Tensor
from safesteer_mlx.system.shape import ModelShape, shape_of

# As the models' own config.json on the Hub has them: Qwen/Qwen2.5-0.5B-Instruct, Qwen/Qwen2.5-7B-Instruct,
# meta-llama/Llama-3.2-3B-Instruct (read in github.com/citsjtu2020/LLM-Prof, sglang/Model_Config.md), Qwen/Qwen3-4B.
QWEN_05B = {"hidden": 896, "intermediate": 4864, "layers": 24, "heads": 14, "kv_heads": 2, "vocabulary": 151_936}
QWEN_7B = {"hidden": 3584, "intermediate": 18944, "layers": 28, "heads": 28, "kv_heads": 4, "vocabulary": 152_064}
QWEN_7B |= {"tied": False}
LLAMA_3B: dict[str, Any] = {"hidden": 3072, "intermediate": 8192, "layers": 28, "heads": 24, "kv_heads": 8}
LLAMA_3B |= {"vocabulary": 128_256, "family": "llama"}
QWEN3_4B: dict[str, Any] = {"hidden": 2560, "intermediate": 9728, "layers": 36, "heads": 32, "kv_heads": 8}
QWEN3_4B |= {"vocabulary": 151_936, "head_dim": 128, "family": "qwen3"}


def random_model(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tied: bool = True,
    family: str = "qwen2",
    head_dim: int | None = None,
) -> nn.Module:
    """A random model of this shape and family of mlx-lm's; its weights exist once they are evaluated."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    given = {
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "rms_norm_eps": 1e-6,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rope_theta": 1e6,
        "max_position_embeddings": 32_768,
    }
    known = {field.name for field in fields(module.ModelArgs)}
    mx.random.seed(0)
    model = module.Model(module.ModelArgs(**{name: value for name, value in given.items() if name in known}))
    model.eval()
    return model


def memory_shape(model: nn.Module, config: dict[str, Any] | None = None) -> ModelShape:
    """What the plan would read of its files, of which one is this configuration (else what the model holds of it)."""
    kinds = {mx.uint32: "U32", mx.float32: "F32", mx.bfloat16: "BF16"}
    tensors = {n: Tensor(kinds.get(w.dtype, "I32"), tuple(w.shape)) for n, w in tree_flatten(model.parameters())}
    return shape_of(config or vars(model.args), tensors)
