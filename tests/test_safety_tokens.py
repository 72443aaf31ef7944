"""Stage 3 on probabilities written down by hand, and on random models against a restatement in numpy."""

import types

import mlx.core as mx
import numpy as np
import pytest
from conftest import walk
from hypothesis import given, settings
from hypothesis import strategies as st

from safesteer_mlx import losses, residual, safety_tokens
from safesteer_mlx.residual import steer
from safesteer_mlx.safety_tokens import TokenContrast, contrast_tokens, select_tokens

# Probabilities at two positions, four tokens:
BASE = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]
STEERED = [[0.1, 0.4, 0.3, 0.2], [0.2, 0.1, 0.4, 0.3]]
# Δ = log of [1/4, 4/3, 3/2, 2] and of [2, 1/2, 4/3, 3/4]
MEAN_DELTA = np.log([1 / 2, 2 / 3, 2.0, 3 / 2]) / 2
OPTIONS = {"eot_ids": [], "banned_ids": [], "inner_top_k": 2, "min_steered_prob": 0.0}


@pytest.fixture
def toy(monkeypatch):
    """toy(**options): the contrast of BASE and STEERED; a toy's hidden states are its logits."""
    monkeypatch.setattr(residual, "hidden_states", lambda model, tokens: model.logits)
    monkeypatch.setattr(safety_tokens, "head", lambda model: lambda hidden: hidden)

    def contrast(base=BASE, steered=STEERED, **options):
        models = [types.SimpleNamespace(logits=mx.log(mx.array([p])) + 3.0) for p in (base, steered)]
        return contrast_tokens(*models, [[1]], [[2]], **{**OPTIONS, **options})

    return contrast


def test_votes_and_means_by_hand(toy):
    found = toy()
    assert found.votes.tolist() == [1, 0, 2, 1] and found.votes.dtype == np.int64
    np.testing.assert_allclose(found.mean_delta, MEAN_DELTA, atol=1e-6)
    np.testing.assert_allclose(found.base_prob, [0.25] * 4, atol=1e-6)
    np.testing.assert_allclose(found.steered_prob, [0.15, 0.25, 0.35, 0.25], atol=1e-6)
    assert found.eligible.all() and found.n_positions == 2
    assert toy(inner_top_k=1).votes.tolist() == [1, 0, 0, 1]
    assert select_tokens(found, 3).tolist() == [2, 3, 0]
    assert select_tokens(found, 3, "mean").tolist() == [2, 3, 1]


def test_tokens_below_p_min_get_no_votes_and_pass_theirs_on(toy):
    found = toy(min_steered_prob=0.2)
    assert found.eligible.tolist() == [False, True, True, True]
    assert found.votes.tolist() == [0, 0, 2, 2]
    assert select_tokens(found, 4).tolist() == [2, 3]
    assert select_tokens(found, 4, "mean").tolist() == [2, 3, 1]
    np.testing.assert_allclose(found.mean_delta, MEAN_DELTA, atol=1e-6)  # of all tokens, eligible or not
    assert not toy(min_steered_prob=0.9).votes.any()


def test_banned_tokens_get_no_votes_and_ids_beyond_the_vocabulary_are_none(toy):
    found = toy(banned_ids=[2, 99])
    assert found.eligible.tolist() == [True, True, False, True]
    assert found.votes.tolist() == [1, 1, 0, 2]
    assert 2 not in select_tokens(found, 4) and 2 not in select_tokens(found, 4, "mean")
    nothing = toy(banned_ids=[0, 1, 2, 3])
    assert not nothing.votes.any() and select_tokens(nothing, 4).size == 0


def test_positions_from_the_bases_end_of_turn_onward_are_dropped(toy):
    found = toy(eot_ids=[3])  # the base's argmax is 0, then 3
    assert found.n_positions == 1 and found.votes.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(found.mean_delta, np.log([1 / 4, 4 / 3, 3 / 2, 2]), atol=1e-6)
    np.testing.assert_allclose(found.steered_prob, STEERED[0], atol=1e-6)
    assert toy(eot_ids=[1, 2]).n_positions == 2  # the teacher's argmaxes, which do not count
    with pytest.raises(ValueError, match="all 1 steered continuations"):
        toy(eot_ids=[0])  # ends at the first position, so the second is dropped with it


def test_what_does_not_make_pairs_raises_with_both_numbers():
    for prompts, tails, message in (([], [], "0 prompts and 0"), ([[1]], [[2], [3]], "1 prompts and 2")):
        with pytest.raises(ValueError, match=message):
            contrast_tokens(None, None, prompts, tails, **OPTIONS)


def test_more_votes_than_tokens_is_a_vote_for_each_and_steering_to_oneself_has_no_delta(toy):
    assert toy(inner_top_k=50).votes.tolist() == [2, 2, 2, 2]
    same = toy(steered=BASE)
    assert np.abs(same.mean_delta).max() == 0
    np.testing.assert_array_equal(same.base_prob, same.steered_prob)


# On random models

PROMPTS = [[3, 8, 1], [4, 4, 9, 11, 2], [5], [6, 7, 20, 21]]
TAILS = [[12, 13, 14], [15], [16, 17], []]


def restated(base, teacher, *, eot_ids, banned_ids, inner_top_k, min_steered_prob, seen=PROMPTS):
    kept = []
    for prompt, tail, other in zip(PROMPTS, TAILS, seen, strict=True):
        rows = []
        for (model, add), head in ((base, prompt), (teacher, other)):
            z = walk(model, head + tail, add)[1][len(head) - 1 :].astype(np.float64)
            z = z - z.max(-1, keepdims=True)
            rows.append(z - np.log(np.exp(z).sum(-1, keepdims=True)))
        for b, t in zip(*rows, strict=True):
            if b.argmax() in eot_ids:
                break
            kept.append((b, t))
    b, t = (np.array(x) for x in zip(*kept, strict=True))
    eligible = np.exp(t).mean(0) >= min_steered_prob
    eligible[banned_ids] = False
    votes = np.zeros(50, np.int64)
    for row in t - b:
        ranked = sorted(np.flatnonzero(eligible), key=lambda v, row=row: -row[v])
        votes[ranked[:inner_top_k]] += 1
    return TokenContrast(votes, (t - b).mean(0), np.exp(b).mean(0), np.exp(t).mean(0), eligible, len(kept))


def agree(found, expected):
    np.testing.assert_array_equal(found.votes, expected.votes)
    np.testing.assert_array_equal(found.eligible, expected.eligible)
    assert found.n_positions == expected.n_positions
    for name in ("mean_delta", "base_prob", "steered_prob"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma2"])
def test_contrast_restated_in_numpy_and_the_same_in_any_chunks(tiny_model, name, monkeypatch):
    model = tiny_model(name, 5)
    add = {1: 2 * mx.random.normal((32,), key=mx.random.key(1))}
    teacher = steer(model, 1, add[1])
    ends = [int(walk(model, PROMPTS[0] + TAILS[0])[1][4].argmax())]  # cuts the first row, perhaps others
    options = {"eot_ids": ends, "banned_ids": [7, 49], "inner_top_k": 6, "min_steered_prob": 0.012}
    expected = restated((model, None), (model, add), **options)
    assert 3 <= expected.n_positions < 10 and 10 < expected.eligible.sum() < 48
    agree(contrast_tokens(model, teacher, PROMPTS, TAILS, **options), expected)
    for logit_rows, sequences in ((1, 1), (3, 2), (1000, 3)):
        monkeypatch.setattr(losses, "CHUNK_LOGITS", 50 * logit_rows)
        agree(contrast_tokens(model, teacher, PROMPTS, TAILS, **options, batch_size=sequences), expected)


def test_a_teacher_with_a_system_prompt_is_scored_at_the_same_continuation(model):
    seen = [[40, 41, *prompt] for prompt in PROMPTS]
    options = {"eot_ids": [], "banned_ids": [], "inner_top_k": 4, "min_steered_prob": 0.0}
    expected = restated((model, None), (model, None), seen=seen, **options)
    agree(contrast_tokens(model, model, PROMPTS, TAILS, teacher_prompts=seen, **options), expected)
    assert expected.n_positions == 10


def test_a_teacher_that_is_the_base_has_no_delta(any_model):
    found = contrast_tokens(any_model, any_model, PROMPTS, TAILS, **OPTIONS)
    assert np.abs(found.mean_delta).max() == 0 and found.votes.sum() == 2 * found.n_positions
    np.testing.assert_array_equal(found.base_prob, found.steered_prob)
    assert found.base_prob.sum() == pytest.approx(1, abs=1e-5)


# Selecting


def contrast(votes, delta, eligible=None):
    n = len(votes)
    eligible = np.ones(n, bool) if eligible is None else np.array(eligible)
    return TokenContrast(np.array(votes), np.array(delta, float), np.ones(n), np.ones(n), eligible, 3)


def test_ties_break_by_the_larger_mean_delta_then_the_smaller_id():
    tied = contrast([2, 2, 0, 3, 2, 2], [0.1, 0.5, 9.0, -1.0, 0.1, 0.5])
    assert select_tokens(tied, 10).tolist() == [3, 1, 5, 0, 4]
    assert select_tokens(tied, 2).tolist() == [3, 1]
    assert select_tokens(tied, 10, "mean").tolist() == [2, 1, 5, 0, 4, 3]


token = st.tuples(st.integers(0, 3), st.sampled_from([-1.0, 0.0, 0.5]), st.booleans())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(token, min_size=1, max_size=12),
    st.integers(1, 14),
)
def test_selection_is_the_sorted_list(rows, k):
    made = contrast(*zip(*rows, strict=True))
    by_vote = sorted((-v, -d, i) for i, (v, d, ok) in enumerate(rows) if ok and v)
    by_mean = sorted((-d, i) for i, (_, d, ok) in enumerate(rows) if ok)
    assert select_tokens(made, k).tolist() == [i for *_, i in by_vote][:k]
    assert select_tokens(made, k, "mean").tolist() == [i for *_, i in by_mean][:k]


def test_bad_selections_raise_with_their_value():
    for k in (0, -3):
        with pytest.raises(ValueError, match=rf"^{k} .* at least 1"):
            select_tokens(contrast([1], [1.0]), k)
    with pytest.raises(ValueError, match=r"'median'.*vote or mean"):
        select_tokens(contrast([1], [1.0]), 1, "median")


@pytest.mark.parametrize("shared_blocks", [1, 2])
def test_blocks_below_the_steered_one_are_run_once_and_the_contrast_is_the_same(model, shared_blocks):
    teacher = steer(model, 2, 2 * mx.random.normal((32,), key=mx.random.key(1)))
    expected = contrast_tokens(model, teacher, PROMPTS, TAILS, **OPTIONS)
    agree(contrast_tokens(model, teacher, PROMPTS, TAILS, **OPTIONS, shared_blocks=shared_blocks), expected)
