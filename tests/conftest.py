"""Tiny random models, built in place: no tokenizer, no files."""

import safesteer_mlx  # isort: skip  # noqa: F401  before MLX, so that OpenBLAS takes precedence

import importlib

import mlx.core as mx
import pytest


def build(name: str, seed: int = 0):
    """A random float32 model of 3 blocks, width 32, vocabulary 50."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    more = {"tie_word_embeddings": False} if name == "llama" else {}
    if name == "gemma2":
        more = {"head_dim": 8, "query_pre_attn_scalar": 8}
    args = module.ModelArgs(
        model_type=name,
        hidden_size=32,
        num_hidden_layers=3,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        vocab_size=50,
        **more,
    )
    mx.random.seed(seed)
    model = module.Model(args)
    model.eval()
    mx.eval(model.parameters())
    return model


@pytest.fixture(params=["qwen2", "llama", "gemma2"])
def any_model(request):
    return build(request.param)


@pytest.fixture
def model():
    return build("qwen2")
