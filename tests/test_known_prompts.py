"""What the base makes of prompts that come again is what it makes of them each time."""

from dataclasses import replace

import check_memory
import mlx.core as mx
import numpy as np
import pytest

from safesteer_mlx.method import known_prompts as module
from safesteer_mlx.method.known_prompts import known_prompts
from safesteer_mlx.method.memory_plan import anchor_bytes, anchor_tokens
from safesteer_mlx.method.prompts import instructions_to_train_on, prompt_sets
from safesteer_mlx.method.residual import answer_states, as_in_a_gradient, blocks, resume, view
from safesteer_mlx.method.rollout import set_equal_batches
from safesteer_mlx.method.train import shared_prefix
from safesteer_mlx.recipe import resolve
from safesteer_mlx.system import machines

PROMPTS = [np.random.default_rng(i).integers(1, 49, n).tolist() for i, n in enumerate((9, 3, 40, 14, 2))]
ANSWERS = [np.random.default_rng(i + 9).integers(1, 49, n).tolist() for i, n in enumerate((4, 12, 9, 1, 6))]


def model_of(family):
    return check_memory.made(next(config for config, *_ in check_memory.CHECKED if config["model_type"] == family))


def agrees(model, known, layer, prompts=PROMPTS, answers=ANSWERS):
    trunk, states = known.read(prompts, answers)
    expected = answer_states(model, prompts, answers)
    np.testing.assert_allclose(np.array(states), np.array(expected), atol=2e-5 * mx.abs(expected).max().item())
    if not layer:
        assert trunk is None
        return
    at, inputs = trunk
    *_, plain = shared_prefix(model, layer, prompts, answers)
    assert at == layer and inputs.shape == plain.shape
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        length = len(prompt) + len(answer)
        np.testing.assert_allclose(
            np.array(inputs[row, :length]), np.array(plain[row, :length]), atol=2e-5 * mx.abs(plain).max().item()
        )


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_answers_to_prompts_that_were_read_before_are_read_as_ever(tiny_model, layer):
    for architecture in ("qwen2", "llama"):
        model = tiny_model(architecture)
        known = known_prompts(model, PROMPTS, layer, 2)
        assert known is not None and all(prompt in known for prompt in PROMPTS) and [1, 2, 3] not in known
        agrees(model, known, layer)
        agrees(model, known, layer, PROMPTS[1:2], ANSWERS[1:2])
        agrees(model, known, layer)  # what is kept is as it was


# Sliding windows, experts, no norm before the sum.
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe", "cohere", "olmo2"])
def test_so_they_are_in_other_families(family):
    model = model_of(family)
    known = known_prompts(model, PROMPTS, 1, 3)
    assert known is not None
    agrees(model, known, 1)


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16])
def test_in_half_precision_they_round_alike(model, kind):
    """Else the student, at first the base itself, would learn how its prompts were read."""
    model.set_dtype(kind)
    known = known_prompts(model, PROMPTS, 1, 2)
    trunk, states = as_in_a_gradient(known.read, PROMPTS, ANSWERS)
    assert mx.array_equal(states, as_in_a_gradient(answer_states, model, PROMPTS, ANSWERS))
    assert mx.array_equal(states, as_in_a_gradient(answer_states, resume(model, *trunk), PROMPTS, ANSWERS))


def test_a_prompt_that_does_not_fit_in_a_sliding_window_is_not_kept():
    model, long = model_of("gemma3_text"), [1] * 65  # the window is of 64
    known = known_prompts(model, [*PROMPTS, long], 0, 3)
    assert known is not None and long not in known and long[:64] not in known and PROMPTS[0] in known


def test_nothing_is_kept_where_a_prompt_is_more_than_keys_and_values(model, tiny_model, monkeypatch):
    assert known_prompts(model_of("mamba2"), PROMPTS, 0, 2) is None
    assert (
        known_prompts(tiny_model("gemma2"), PROMPTS, 0, 2) is None
    )  # of prompts side by side mlx-lm masks the wrong one
    alike = view(model)
    set_equal_batches(alike)
    assert known_prompts(alike, PROMPTS, 0, 2) is None
    assert known_prompts(model, [[1]], 0, 2) is None  # nothing stands before its last id
    read = module.answer_states
    wrong = lambda of, prompts, answers, cache=None: read(of, prompts, answers, cache=cache) + (cache is not None)  # noqa: E731
    monkeypatch.setattr(module, "answer_states", wrong)
    assert known_prompts(model, PROMPTS, 0, 2) is None


def test_a_prompt_is_read_once(model, monkeypatch):
    """Behind it, its last id and the answer."""
    known, widths = known_prompts(model, PROMPTS, 1, 2), []
    known.read(PROMPTS, ANSWERS)
    block = type(blocks(model)[0])
    call = block.__call__
    monkeypatch.setattr(block, "__call__", lambda self, x, *how: (widths.append(x.shape[1]), call(self, x, *how))[1])
    mx.eval(known.read(PROMPTS, ANSWERS)[1])
    assert widths and max(widths) == 1 + max(map(len, ANSWERS))


def test_what_is_kept_takes_what_was_planned(model):
    known = known_prompts(model, PROMPTS, 1, 2)
    known.read(PROMPTS, ANSWERS)
    held = sum(cache.nbytes for caches in known.caches.values() for cache in caches)
    held += sum(inputs.nbytes for inputs in known.inputs.values())
    shape = check_memory.memory_shape(model)
    assert held == anchor_bytes(shape, sum(len(prompt) - 1 for prompt in PROMPTS))


def test_prompts_are_read_beside_the_same_ones_whatever_is_asked_for_first(model):
    """So a run that goes on has what it had, to the bit."""
    prompts = [[1 + i % 40] * (2 + i * 7 % 11) for i in range(100)]
    whole, later = (known_prompts(model, prompts, 1, 4) for _ in range(2))
    whole.read(prompts, [[1]] * 100)
    assert len(later.caches) == 4  # no more than is asked for, and those that are read with it
    wanted = prompts[70:73]
    later.read(wanted, [[1]] * 3)
    assert len(later.caches) <= 4 + 3 * 4
    for row in map(tuple, wanted):
        assert mx.array_equal(later.inputs[row], whole.inputs[row])
        for ours, other in zip(later.caches[row], whole.caches[row], strict=True):
            assert mx.array_equal(ours.keys, other.keys) and mx.array_equal(ours.values, other.values)


def test_prompts_of_the_anchor_are_kept_where_they_come_again(monkeypatch):
    def tokens(**given):
        return anchor_tokens(resolve({}, {"model": "org/model", **given})[0], 10)

    recipe = resolve({}, {"model": "org/model"})[0]
    texts = {item.text for item in instructions_to_train_on(recipe, prompt_sets(recipe), harmful=False)}
    every, once = sum(len(text) // 3 + 10 for text in texts), len(texts) // 21  # 21 of a batch are the anchor's
    assert tokens() == tokens(anchor_cache="on", iters=1) == tokens(iters=once + 1) == every > 0
    assert tokens(iters=once) == tokens(anchor_ratio=0.0) == 0
    short = replace(recipe, train=replace(recipe.train, max_prompt_length=12))
    assert anchor_tokens(short, 10) <= 12 * len(texts)
    monkeypatch.setattr(machines, "_here", machines.Machines(0, 2))
    assert tokens() == 0 < tokens(anchor_cache="on")  # each reads half of them
