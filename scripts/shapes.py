"""Random Qwen2 models of a given shape, to measure with, and what the memory plan would read of their files."""

import importlib
from typing import Any

import safesteer_mlx  # isort: skip  # noqa: F401  before mlx
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from safesteer_mlx.system.model_files import Tensor
from safesteer_mlx.system.shape import ModelShape, shape_of

QWEN_05B = {"hidden": 896, "intermediate": 4864, "layers": 24, "heads": 14, "kv_heads": 2, "vocabulary": 151_936}
QWEN_7B = {
    "hidden": 3584,
    "intermediate": 18944,
    "layers": 28,
    "heads": 28,
    "kv_heads": 4,
    "vocabulary": 152_064,
    "tied": False,
}


def qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = True
) -> nn.Module:
    """A random model of this shape; its weights exist once they are evaluated."""
    module = importlib.import_module("mlx_lm.models.qwen2")
    args = module.ModelArgs(
        model_type="qwen2",
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-6,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    mx.random.seed(0)
    model = module.Model(args)
    model.eval()
    return model


def memory_shape(model: nn.Module, **more: Any) -> ModelShape:
    """What the plan would read of its files; `more` is what else the configuration says."""
    config = {key: value for key, value in vars(model.args).items() if isinstance(value, (int, float, str))}
    kinds = {mx.uint32: "U32", mx.float32: "F32", mx.bfloat16: "BF16"}
    tensors = {name: Tensor(kinds[w.dtype], tuple(w.shape)) for name, w in tree_flatten(model.parameters())}
    return shape_of(config | more, tensors)
