"""Direction and safety tokens against plain restatements of the method."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import build
from hypothesis import given, settings
from hypothesis import strategies as st

from safesteer_mlx import safety_tokens
from safesteer_mlx.direction import (
    CandidateScores,
    NoDirectionError,
    choose_direction,
    mean_differences,
    nearest_candidates,
    refusal_scores,
    score_candidates,
)
from safesteer_mlx.residual import steer
from safesteer_mlx.safety_tokens import TokenContrast, contrast_tokens, select_tokens

RNG = np.random.default_rng(0)
HARMFUL = [[*RNG.integers(5, 25, n).tolist(), 1, 2] for n in (3, 5, 4, 6)]
HARMLESS = [[*RNG.integers(25, 50, n).tolist(), 1, 2] for n in (4, 3, 6, 5, 4)]


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_mean_differences_of_embeddings_and_of_the_template(model):
    found = mean_differences(model, HARMFUL, HARMLESS, 3)
    table = np.array(model.model.embed_tokens.weight)
    expected = np.mean([table[p[-3]] for p in HARMFUL], 0) - np.mean([table[p[-3]] for p in HARMLESS], 0)
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-6)
    assert found.shape == (3, 3, 32) and np.abs(found[1:, 0]).max() < 1e-12
    with pytest.raises(ValueError, match="0 prompts"):
        mean_differences(model, [], HARMLESS, 2)


def test_refusal_scores_by_hand(model):
    p = softmax(np.array(model(mx.array([HARMFUL[1]])))[0, -1].astype(np.float64))[[7, 9]].sum()
    expected = np.log(p + 1e-8) - np.log(1 - p + 1e-8)
    assert refusal_scores(model, HARMFUL, [7, 9])[1] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_the_short_search_chooses_what_the_exhaustive_one_does(seed):
    model = build("qwen2", seed)
    candidates = mean_differences(model, HARMFUL, HARMLESS, 3)
    whole = score_candidates(model, candidates, HARMFUL, HARMLESS, [7, 9], exhaustive=True)
    limits = {
        "kl_threshold": float(np.quantile(whole.ablation_kl, 0.7)),
        "steering_threshold": float(np.quantile(whole.steering_refusal, 0.3)),
        "prune_last": 0.2,
    }
    short = score_candidates(model, candidates, HARMFUL, HARMLESS, [7, 9], **limits)
    assert np.isnan(short.ablation_refusal).sum() > 0
    try:
        expected = choose_direction(whole, **limits)
    except NoDirectionError:
        with pytest.raises(NoDirectionError):
            choose_direction(short, **limits)
    else:
        assert choose_direction(short, **limits) == expected


values = st.one_of(st.just(float("nan")), st.floats(-3, 3))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(values, min_size=24, max_size=24),
    st.sampled_from([None, 0.1]),
    st.sampled_from([None, 0.0]),
    st.booleans(),
)
def test_choice_is_the_brute_force_one(flat, kl_threshold, steering_threshold, prune):
    scores = CandidateScores(*np.array(flat).reshape(3, 2, 4))
    prune_last = 0.25 if prune else None
    passing = [
        (scores.ablation_refusal[p, layer], p - 2, layer)
        for p in range(2)
        for layer in range(3 if prune else 4)
        if not np.isnan([s[p, layer] for s in vars(scores).values()]).any()
        and (kl_threshold is None or scores.ablation_kl[p, layer] <= kl_threshold)
        and (steering_threshold is None or scores.steering_refusal[p, layer] >= steering_threshold)
    ]
    if passing:
        assert choose_direction(scores, kl_threshold, steering_threshold, prune_last) == min(passing)[1:]
    else:
        with pytest.raises(ValueError):
            choose_direction(scores, kl_threshold, steering_threshold, prune_last)


def test_nearest_candidates_come_nearest_first():
    scores = CandidateScores(np.array([[0.2, 5.0, 0.0]]), np.zeros((1, 3)), np.array([[1.0, 1.0, -9.0]]))
    near = nearest_candidates(scores, 0.1, 0.0, None)
    assert near[0][1] == 0 and "KL" in near[0][2][0]


def test_contrast_against_plain_numpy(model, monkeypatch):
    teacher = steer(model, 1, 3 * mx.random.normal((32,), key=mx.random.key(3)))
    prompts, tails = HARMLESS[:3], [[4, 5], [6], [8, 9]]
    rows, ends = [], set()
    for prompt, tail in zip(prompts, tails, strict=True):
        z0, z1 = (np.array(m(mx.array([prompt + tail])), np.float64)[0, len(prompt) - 1 :] for m in (model, teacher))
        rows.append((z0, z1))
        ends.add(int(z0[1].argmax()))
    eot = [min(ends)]
    kept = []
    for z0, z1 in rows:
        for b, t in zip(softmax(z0), softmax(z1), strict=True):
            if b.argmax() in eot:
                break
            kept.append((b, t))
    base, steered = (np.array(x) for x in zip(*kept, strict=True))
    delta = np.log(steered) - np.log(base)
    eligible = (steered.mean(0) >= 0.01) & ~np.isin(np.arange(50), [3])
    votes = np.zeros(50, int)
    for row in np.where(eligible, delta, -np.inf):
        votes[np.argsort(-row)[:5]] += 1
    options = {"eot_ids": eot, "banned_ids": [3], "inner_top_k": 5, "min_steered_prob": 0.01}
    found = contrast_tokens(model, teacher, prompts, tails, **options)
    np.testing.assert_array_equal(found.votes, votes)
    np.testing.assert_allclose(found.mean_delta, delta.mean(0), atol=1e-4)
    np.testing.assert_allclose(found.steered_prob, steered.mean(0), atol=1e-6)
    monkeypatch.setattr(safety_tokens, "LOGIT_ROWS", 2)
    chunked = contrast_tokens(model, teacher, prompts, tails, **options)
    np.testing.assert_array_equal(chunked.votes, votes)
    same = contrast_tokens(model, model, prompts, tails, **options)
    assert np.abs(same.mean_delta).max() == 0


def test_ties_break_by_mean_delta_then_by_id():
    contrast = TokenContrast(
        votes=np.array([2, 2, 0, 3, 2]),
        mean_delta=np.array([0.1, 0.5, 9.0, 0.0, 0.1]),
        base_prob=np.ones(5),
        steered_prob=np.ones(5),
        eligible=np.array([True, True, True, True, True]),
        n_positions=3,
    )
    assert select_tokens(contrast, 10).tolist() == [3, 1, 0, 4]
    assert select_tokens(contrast, 2, "mean").tolist() == [2, 1]
    with pytest.raises(ValueError):
        select_tokens(contrast, 0)
