"""The bundled model in the shape of a larger one (scripts/grow.py) answers as it does by itself."""

import json
import sys

import grow
import mlx.core as mx
import numpy as np
import pytest
from shapes import QWEN_7B, memory_shape, random_model

from safesteer_mlx.method.prompts import load_prompt_sets, render_all
from safesteer_mlx.method.rollout import Sampling, generate
from safesteer_mlx.system.load import load
from safesteer_mlx.system.shape import read_shape

# More heads, blocks and tokens, larger heads, shared keys and values: as of the real ones.
SHAPE = {"hidden": 1024, "intermediate": 640, "layers": 12, "heads": 8, "kv_heads": 4, "vocabulary": 4096}


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big-models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(grow.SHAPES, "larger", SHAPE)
        patch.setattr(sys, "argv", ["grow.py", "larger", "--out", str(folder)])
        grow.main()
    return folder / "larger"


def test_it_answers_as_the_small_one(grown):
    small, large = load(str(grow.SMALL)), load(str(grown))
    assert large.quantized and large.config["torch_dtype"] == "bfloat16"
    large.model.set_dtype(mx.float32)  # its scales are rounded all the same
    prompts = load_prompt_sets(grown / "data")
    rows = render_all(large.tokenizer, [*prompts.harmful_test[:6], *prompts.harmless_test[:6]])
    assert rows == render_all(small.tokenizer, [*prompts.harmful_test[:6], *prompts.harmless_test[:6]])
    for row in rows:
        mine, theirs = (mx.softmax(model.model(mx.array([row]))[0, -1].astype(mx.float32)) for model in (small, large))
        assert np.allclose(mine, theirs[: mine.size], atol=0.03) and theirs[mine.size :].sum().item() < 1e-6
    greedy = [[c.ids for c in generate(m.model, rows, Sampling(m.eos_ids, 32))] for m in (small, large)]
    same = sum(a == b for a, b in zip(*greedy, strict=True))
    assert same >= 10, f"{same} of 12 answers are the same"


def test_it_has_the_shape_of_the_large_one(grown):
    alike = memory_shape(random_model(**SHAPE, tied=False))
    shape, config = read_shape(grown), json.loads((grown / "config.json").read_text())
    for what in ("hidden", "n_layers", "kv", "vocabulary", "weight_bytes"):
        assert getattr(shape, what) == getattr(alike, what)
    assert shape.quantized and shape.activation_bytes == 4  # so small, on the CPU
    large = grow.config_of(config, QWEN_7B)
    assert (large["hidden_size"], large["num_hidden_layers"], large["vocab_size"]) == (3584, 28, 152_064)
