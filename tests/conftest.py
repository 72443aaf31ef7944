"""Tiny random models, built in place: no tokenizer, no files."""

import os

# A process a core runs the tests; OpenBLAS's own threads would fight over them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import safesteer_mlx  # isort: skip  # noqa: F401  before MLX, so that OpenBLAS takes precedence

import importlib
import inspect

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.base import create_causal_mask


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


def pytest_collection_modifyitems(items):
    # The zoo's alignments take longest; begun last, they would leave the other cores idle.
    items.sort(key=lambda item: item.path.name != "test_zoo.py")


_PREPARED: dict[tuple, object] = {}  # what stages 1 to 3 found in this process


def _once(self, find, *found):
    """`Run.once`, but that what a stage finds is found once for all runs that only differ in what comes after it."""
    from safesteer_mlx.method import teacher

    recipe = self.recipe
    key = (
        find,
        self.base.weights_hash,
        self.base.thinks,
        repr((recipe.direction, recipe.teacher, recipe.tokens, recipe.loss.first_tokens)),
        repr((recipe.run.seed, recipe.run.prompt_batch_size, recipe.run.generation_batch_size)),
        (teacher.VALIDATION_PROMPTS, hash(repr(self.prompts))),
    )

    def finds(*_):
        if key not in _PREPARED:
            _PREPARED[key] = find(self, *found)
        return _PREPARED[key]

    kind = inspect.signature(find).return_annotation
    return self.store.once(find.__name__.removeprefix("find_"), finds, kind)


@pytest.fixture(scope="module")
def few_prompts():
    """For tests of something else than the search: it and checkpoint selection ask four prompts a kind, and runs that
    only differ in what comes after stages 1 to 3 share what these found."""
    from safesteer_mlx.evals import selection
    from safesteer_mlx.method import run, safety_tokens, teacher

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "once", _once)
        patch.setattr(selection, "PROMPTS", 4)
        for module in (teacher, safety_tokens):
            patch.setattr(module, "VALIDATION_PROMPTS", (4, 4))
        yield
    _PREPARED.clear()


@pytest.fixture
def nothing_prepared(few_prompts):
    """For a test of what the stages find, twice: no run before it is drawn on."""
    _PREPARED.clear()


@pytest.fixture(params=["qwen2", "llama", "gemma2"])
def any_model(request):
    return build(request.param)


@pytest.fixture
def model():
    return build("qwen2")


@pytest.fixture
def tiny_model():
    """tiny_model(name, seed=0): as `build`, for tests that want several."""
    return build


def walk(model, row, add=None, without=None):
    """The whole forward pass spelled out, for one row: block inputs (L, T, D) and logits (T, V), in numpy.

    `add` maps a block to what is added to its input. `without` (D,) is projected out as ablation does it,
    in the blocks of qwen2 and llama. Block inputs are those that the blocks see, after either.
    """
    body, tokens = model.model, mx.array([row])
    gemma = "gemma" in type(model).__module__
    assert without is None or not gemma
    r = None if without is None else without / mx.linalg.norm(without)

    def project(x):
        return x if r is None else x - mx.sum(x * r, axis=-1, keepdims=True) * r

    x, mask, seen = body.embed_tokens(tokens), create_causal_mask(len(row)), []
    x = x * 32**0.5 if gemma else x
    for i, block in enumerate(body.layers):
        x = project(x + (add or {}).get(i, 0.0))
        seen.append(x)
        if gemma:
            x = block(x, mask)
        else:
            x = x + project(block.self_attn(block.input_layernorm(x), mask))
            x = x + project(block.mlp(block.post_attention_layernorm(x)))
    x = body.norm(x)
    logits = model.lm_head(x) if "lm_head" in model else body.embed_tokens.as_linear(x)
    if gemma:
        logits = 30.0 * mx.tanh(logits / 30.0)
    return np.array(mx.stack(seen))[:, 0], np.array(logits)[0]
