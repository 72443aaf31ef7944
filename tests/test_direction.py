"""Stage 1 against a forward pass spelled out in numpy, and its search and choice against brute force."""

import math

import mlx.core as mx
import numpy as np
import pytest
from conftest import build, walk
from hypothesis import given, settings
from hypothesis import strategies as st

from safesteer_mlx.method.direction import (
    ASKED_AT_ONCE,
    SCORE_BOUND,
    SHORTLIST,
    CandidateScores,
    Direction,
    Limits,
    Scorers,
    Search,
    _refusal_score,
    choose_direction,
    failed_tests,
    filled,
    filter_by_refusal_score,
    mean_differences,
    no_direction,
    opening_probabilities,
    pruned_from,
    refusal_scores,
    score_candidates,
    search,
    shortlist,
    spread,
    steered_logits,
)
from safesteer_mlx.method.residual import block_inputs, last_logits, pad_right, steer

NAN = float("nan")
RNG = np.random.default_rng(7)
HARMFUL = [[*RNG.integers(5, 25, n).tolist(), 1, 2] for n in (3, 6, 4, 3)]
HARMLESS = [[*RNG.integers(25, 50, n).tolist(), 1, 2] for n in (5, 3, 4, 6, 2)]
REFUSAL = [7, 9, 30]


def softmax(z):
    z = np.asarray(z, np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def score(p, ids):
    mass = p[..., ids].sum(-1)
    return np.log(mass + 1e-8) - np.log(1 - mass + 1e-8)


# Candidate directions


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma2"])
def test_mean_differences_by_hand(tiny_model, name):
    model = tiny_model(name)
    means = [
        np.mean([walk(model, row)[0][:, -3:].astype(np.float64) for row in rows], axis=0)
        for rows in (HARMFUL, HARMLESS)
    ]
    found = mean_differences(model, HARMFUL, HARMLESS, 3)
    assert found.shape == (3, 3, 32) and found.dtype == np.float64
    np.testing.assert_allclose(found, np.moveaxis(means[0] - means[1], 0, 1), atol=1e-5)


def test_mean_differences_of_more_prompts_than_a_batch_in_any_order(model):
    rows = [[*RNG.integers(3, 50, n % 5 + 1).tolist(), 2] for n in range(40)]
    mean = np.mean([walk(model, row)[0][:, -2:] for row in rows], axis=0)
    expected = mean - walk(model, HARMLESS[0])[0][:, -2:]
    for order in (rows, rows[::-1]):
        found = mean_differences(model, order, HARMLESS[:1], 2)
        np.testing.assert_allclose(found, np.moveaxis(expected, 0, 1), atol=1e-5)


def test_mean_differences_of_a_set_with_itself_vanish_and_change_sign_when_swapped(model):
    assert np.abs(mean_differences(model, HARMFUL, HARMFUL, 2)).max() == 0
    there, back = (mean_differences(model, *sets, 2) for sets in ((HARMFUL, HARMLESS), (HARMLESS, HARMFUL)))
    np.testing.assert_array_equal(there, -back)


def test_too_few_or_too_short_prompts_raise_with_both_numbers(model):
    with pytest.raises(ValueError, match=r"0 prompts of at least 2"):
        mean_differences(model, HARMFUL, [], 2)
    with pytest.raises(ValueError, match=r"2 prompts of at least 4"):
        mean_differences(model, [[1, 2, 3, 4], [1, 2, 3]], HARMLESS, 4)


# The refusal score


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma2"])
def test_refusal_scores_by_hand(tiny_model, name):
    model = tiny_model(name)
    expected = [score(softmax(walk(model, row)[1][-1]), REFUSAL) for row in HARMLESS]
    np.testing.assert_allclose(refusal_scores(model, HARMLESS, REFUSAL), expected, atol=1e-4)
    np.testing.assert_allclose(refusal_scores(model, HARMLESS[::-1], REFUSAL), expected[::-1], atol=1e-4)


def test_refusal_score_of_known_probabilities():
    logits = mx.log(mx.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]))
    found = _refusal_score(logits, [1, 3])
    assert found.tolist() == pytest.approx([math.log(0.6 / 0.4), 0.0], abs=1e-5)
    assert _refusal_score(logits, [0])[0].item() == pytest.approx(math.log(0.1 / 0.9), abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(-40, 40), st.floats(-4, 4))
def test_shifting_all_logits_changes_nothing_and_shifting_the_refusals_shifts_the_score(seed, all_by, by):
    z = mx.random.normal((3, 8), key=mx.random.key(seed))
    before = np.array(_refusal_score(z, [2, 5]))
    np.testing.assert_allclose(np.array(_refusal_score(z + all_by, [2, 5])), before, atol=1e-4)
    inside = mx.array(np.isin(np.arange(8), [2, 5]).astype(np.float32))
    np.testing.assert_allclose(np.array(_refusal_score(z + by * inside, [2, 5])), before + by, atol=1e-3)
    others = np.array(_refusal_score(z, [0, 1, 3, 4, 6, 7]))  # the complement: the score of not refusing
    np.testing.assert_allclose(others, -before, atol=1e-4)


def test_two_tokens_make_the_score_a_difference_of_logits_and_certainty_is_bounded_by_epsilon():
    found = _refusal_score(mx.array([[1.5, -0.5], [200.0, 0.0], [0.0, 200.0], [14.0, 0.0]]), [0]).tolist()
    bound = math.log(1 + 1e-8) - math.log(1e-8)
    assert found[:3] == pytest.approx([2.0, bound, -bound], abs=1e-4)
    q = 1 / (1 + math.exp(14.0))  # 8e-7: 1 − p in float32 would have one digit left
    assert found[3] == pytest.approx(math.log(1 - q) - math.log(q + 1e-8), abs=1e-4)


def test_refusal_score_gradient_in_closed_form():
    # dscore/dz_j = p_j / P on R, −p_j / (1 − P) off it
    z, inside = mx.random.normal((1, 8), key=mx.random.key(3)), np.isin(np.arange(8), [2, 5])
    p = softmax(np.array(z))[0]
    expected = np.where(inside, p / p[inside].sum(), -p / p[~inside].sum())
    gradient = mx.grad(lambda x: _refusal_score(x, [2, 5]).sum())(z)
    np.testing.assert_allclose(np.array(gradient)[0], expected, atol=1e-4)


def test_prompts_are_kept_where_they_are_answered_as_meant(model):
    harmful, harmless = (refusal_scores(model, rows, REFUSAL) for rows in (HARMFUL, HARMLESS))
    kept = filter_by_refusal_score(model, HARMFUL, HARMLESS, REFUSAL)
    assert kept[0] == [HARMFUL[i] for i in np.flatnonzero(harmful > 0)]
    assert kept[1] == [HARMLESS[i] for i in np.flatnonzero(harmless < 0)] and kept[1]


TWICE = [9, *REFUSAL, 7, 7]  # REFUSAL as a set


def test_refusal_ids_are_a_set():
    # counted twice, 0.6 would become 1.2, more than there is
    logits = mx.log(mx.array([[0.1, 0.6, 0.3]]))
    assert _refusal_score(logits, [1, 1]).item() == pytest.approx(math.log(0.6 / 0.4), abs=1e-5)
    assert _refusal_score(logits, [2, 0, 2]).item() == pytest.approx(math.log(0.4 / 0.6), abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 7), min_size=1, max_size=20), st.sampled_from([1.0, 10.0]))
def test_a_repeated_id_changes_nothing_and_the_probability_of_a_refusal_never_passes_1(seed, ids, scale):
    z = scale * mx.random.normal((3, 8), key=mx.random.key(seed))
    found = np.array(_refusal_score(z, ids), np.float64)
    np.testing.assert_array_equal(found, np.array(_refusal_score(z, sorted(set(ids)))))
    mass = softmax(np.array(z))[:, sorted(set(ids))].sum(-1)
    np.testing.assert_allclose(1 / (1 + np.exp(-found)), mass, atol=1e-5)  # score = log(p / (1 − p)): p ≤ 1
    assert np.abs(found).max() <= SCORE_BOUND + 1e-5


def test_a_repeated_id_changes_no_score_no_prompt_that_is_kept_and_no_candidate(model):
    np.testing.assert_array_equal(*(refusal_scores(model, HARMLESS, ids) for ids in (TWICE, REFUSAL)))
    third = [*range(17)]  # of 50 ids: they are likelier than not only if they count twice
    mass = [[softmax(walk(model, row)[1][-1])[third].sum() for row in rows] for rows in (HARMFUL, HARMLESS)]
    assert np.all(np.concatenate(mass) > 0.25) and np.all(np.concatenate(mass) < 0.5)
    kept = filter_by_refusal_score(model, HARMFUL, HARMLESS, third * 2)
    assert kept == ([], HARMLESS)
    sets = (mean_differences(model, HARMFUL, HARMLESS, 2), HARMFUL, HARMLESS)
    twice, once = (score_candidates(model, *sets, ids, exhaustive=True) for ids in (TWICE, REFUSAL))
    for key in TABLES:
        np.testing.assert_array_equal(getattr(twice, key), getattr(once, key))


# Scoring and searching


def test_scores_of_every_candidate_by_hand(model):
    candidates = mean_differences(model, HARMFUL, HARMLESS, 3) * 3
    found = score_candidates(model, candidates, HARMFUL, HARMLESS, REFUSAL, exhaustive=True)

    def last(rows, **change):
        return np.array([softmax(walk(model, row, **change)[1][-1]) for row in rows])

    base = last(HARMLESS)
    for p, layer in ((0, 0), (0, 1), (2, 1), (1, 2)):
        r = mx.array(candidates[p, layer].astype(np.float32))
        if not candidates[p, layer].any():
            continue
        steered = score(last(HARMLESS, add={layer: r}), REFUSAL).mean()
        assert found.steering_refusal[p, layer] == pytest.approx(steered, abs=1e-3)
        ablated = score(last(HARMFUL, without=r), REFUSAL).mean()
        assert found.ablation_refusal[p, layer] == pytest.approx(ablated, abs=1e-3)
        q = last(HARMLESS, without=r)
        kl = (base * (np.log(base + 1e-6) - np.log(q + 1e-6))).sum(-1).mean()
        assert found.ablation_kl[p, layer] == pytest.approx(kl, abs=1e-4) and kl > 0


def test_a_zero_direction_scores_as_the_base_does(model):
    zero = np.zeros((1, 3, 32))
    options = {"kl_threshold": None, "steering_threshold": None, "prune_last": None}
    for exhaustive in (True, False):
        found = score_candidates(model, zero, HARMFUL, HARMLESS, REFUSAL, exhaustive, **options)
        np.testing.assert_allclose(found.ablation_kl, 0, atol=1e-6)
        for scores, rows in ((found.steering_refusal, HARMLESS), (found.ablation_refusal, HARMFUL)):
            np.testing.assert_allclose(scores, refusal_scores(model, rows, REFUSAL).mean(), atol=1e-4)


TABLES = ("ablation_kl", "ablation_refusal", "steering_refusal")


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma2"])
@pytest.mark.parametrize("seed", [10, 11, 12])
def test_the_short_search_chooses_what_the_exhaustive_one_does(name, seed):
    model = build(name, seed)
    candidates = mean_differences(model, HARMFUL, HARMLESS, 3) * 2
    sets = (candidates, HARMFUL, HARMLESS, REFUSAL)
    whole = score_candidates(model, *sets, exhaustive=True)
    assert not any(np.isnan(getattr(whole, key)).any() for key in TABLES)
    limits = {
        "kl_threshold": float(np.quantile(whole.ablation_kl, 0.8)),
        "steering_threshold": float(np.quantile(whole.steering_refusal, 0.2)),
        "prune_last": 0.2,
    }
    ticks = []
    short = score_candidates(model, *sets, **limits, progress=lambda done, total: ticks.append((done, total)))
    assert choose_direction(short, **limits) == choose_direction(whole, **limits)
    assert ticks == sorted(ticks) and ticks[-1][0] == ticks[-1][1]
    skipped = 0
    for key in TABLES:
        measured = getattr(short, key)
        known = ~np.isnan(measured)
        np.testing.assert_allclose(measured[known], getattr(whole, key)[known], atol=1e-4)
        assert not known[:, pruned_from(3, 0.2) :].any()
        skipped += (~known).sum()
    assert skipped
    strict = {**limits, "steering_threshold": float(whole.steering_refusal.max()) + 1}
    early = score_candidates(model, *sets, **strict)
    assert np.isnan(early.ablation_kl[candidates.any(-1)]).all()  # never run once steering has failed
    for steered in (short.steering_refusal, early.steering_refusal):  # which is measured for all, to the end
        assert not np.isnan(steered[:, : pruned_from(3, 0.2)]).any()
    with pytest.raises(ValueError):
        choose_direction(early, **strict)


def test_only_the_candidates_that_are_named_are_measured(model):
    sets = (mean_differences(model, HARMFUL, HARMLESS, 3), HARMFUL, HARMLESS, REFUSAL)
    whole, only = score_candidates(model, *sets, exhaustive=True), [(0, 1), (2, 2)]
    found = score_candidates(model, *sets, exhaustive=True, only=only)
    named = np.zeros((3, 3), bool)
    named[[0, 2], [1, 2]] = True
    for key in TABLES:
        np.testing.assert_array_equal(~np.isnan(getattr(found, key)), named)
        np.testing.assert_allclose(getattr(found, key)[named], getattr(whole, key)[named], atol=1e-4)
    none = CandidateScores(*(np.full((3, 3), NAN) for _ in range(3)))
    merged = filled(filled(none, found), whole)
    for key in TABLES:
        np.testing.assert_allclose(getattr(merged, key), getattr(whole, key), atol=1e-4)


def test_steering_is_measured_to_the_end_however_low_it_is():
    # 2 positions, 10 blocks of which 8 are allowed, 12 prompts: every score is the lowest there is.
    draw, shape, n = np.random.default_rng(1), (2, 10), 12
    steering = np.full((*shape, n), -18.0) + draw.random((*shape, n))
    tables = steering, np.zeros((*shape, n)), np.zeros((*shape, n))
    parts = [list(range(i, i + 4)) for i in (0, 4, 8)]
    own = {"ablation_kl": 0.0, "steering_refusal": 0.0, "ablation_refusal": 0.0}
    limits = {"kl_threshold": 0.1, "steering_threshold": 0.0, "prune_last": 0.2}
    passes: list[int] = []
    found = search(np.ones(shape, bool), own, asked(tables, passes, 10), (parts, parts), Search(**limits))
    np.testing.assert_allclose(found.steering_refusal[:, :8], steering.mean(-1)[:, :8])
    assert np.isnan(found.steering_refusal[:, 8:]).all()
    assert np.isnan(found.ablation_kl).all() and np.isnan(found.ablation_refusal).all()
    assert sum(passes) == 2 * 12 * sum(10 - layer for layer in range(8))


def asked(tables, passes, n_layers=28):
    """Scorers answered from tables (P, L, N), which add to `passes` the blocks that a model of so many would run, times
    prompts."""

    def ask(table, cost):
        def answer(found, which):
            passes.append(sum(cost(layer) for _, layer in found) * len(which))
            return np.stack([table[c][which] for c in found])

        return answer

    steering, kl, refusal = tables
    full = lambda layer: n_layers  # noqa: E731
    return Scorers(
        ask(steering, lambda layer: n_layers - layer), ask(kl, full), ask(refusal, full), np.zeros(kl.shape[-1])
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.3, 2.0, 10.0]), st.sampled_from([None, 0.0, 0.1]))
def test_the_search_chooses_what_asking_everything_does(seed, scale, limit):
    draw = np.random.default_rng(seed)
    shape, n = (3, 10), 12
    level = draw.normal(0, scale, (3, *shape, 1))
    tables = np.clip(level + draw.normal(0, 2, (3, *shape, n)), -18.4, 18.4)
    tables[1] = np.abs(tables[1]) * draw.choice([0.01, 0.05, 1.0], (*shape, 1))
    if seed % 3 == 0:  # ties, and a number that is none
        tables = np.round(tables)
        tables[0, 1, 2, 3] = NAN
    moved = draw.random(shape) > 0.1
    own = {"ablation_kl": 0.0, "steering_refusal": -1.0, "ablation_refusal": 1.0}
    limits = {"kl_threshold": limit, "steering_threshold": limit, "prune_last": 0.2}
    parts = [list(range(i, i + 4)) for i in (0, 4, 8)]
    found = search(moved, own, asked(tables, []), (parts, parts), Search(**limits))
    steering, kl, refusal = (table.mean(-1) for table in tables)
    for table, value in ((steering, -1.0), (kl, 0.0), (refusal, 1.0)):
        table[~moved] = value
    whole = CandidateScores(kl, refusal, steering)
    try:
        expected = choose_direction(whole, **limits)
    except ValueError:
        with pytest.raises(ValueError):
            choose_direction(found, **limits)
    else:
        assert choose_direction(found, **limits) == expected


@pytest.mark.parametrize(("failing", "most"), [(0.4, 0.45), (0.75, 0.30)])
def test_block_passes_on_28_blocks(failing, most):
    # 5 positions, 28 blocks, 32 + 32 prompts; the published order asks everything of everyone.
    draw, shape, n = np.random.default_rng(0), (5, 28), 32
    steering = np.where(draw.permutation(140).reshape(*shape, 1) < 140 * failing, -4.0, 3.0) + draw.normal(
        0, 2, (*shape, n)
    )
    kl = np.abs(draw.normal(0.04, 0.03, (*shape, 1)) + draw.normal(0, 0.01, (*shape, n)))
    refusal = np.clip(draw.normal(0, 4, (*shape, 1)) + draw.normal(0, 2, (*shape, n)), -18.4, 18.4)
    parts = [list(range(i, i + ASKED_AT_ONCE)) for i in range(0, n, ASKED_AT_ONCE)]
    limits = {"kl_threshold": 0.1, "steering_threshold": 0.0, "prune_last": 0.2}
    own = {"ablation_kl": 0.0, "steering_refusal": 0.0, "ablation_refusal": 0.0}
    passes: list[int] = []
    search(np.ones(shape, bool), own, asked((steering, kl, refusal), passes), (parts, parts), Search(**limits))
    base = (n + 3) * 28 + n * 22  # the base's own logits, whether it resumes, and the inputs of its blocks
    assert (sum(passes) + base) / (3 * 5 * 28 * n * 28) <= most


def test_a_direction_that_is_not_a_number_is_measured_as_such_and_never_chosen(model):
    candidates = mean_differences(model, HARMFUL, HARMLESS, 2)
    candidates[0, 1] = NAN
    limits = {"kl_threshold": None, "steering_threshold": None, "prune_last": None}
    for exhaustive in (True, False):
        found = score_candidates(model, candidates, HARMFUL, HARMLESS, REFUSAL, exhaustive, **limits)
        assert np.isnan(found.steering_refusal[0, 1]) and choose_direction(found, **limits) != (-2, 1)


@pytest.mark.parametrize(
    ("n_layers", "prune_last", "first"),
    [(10, 0.2, 8), (2, 0.2, 2), (3, 0.2, 2), (28, 0.2, 22), (10, 0.9, 1), (10, 0.0, 10), (10, None, 10), (4, 1.0, 0)],
)
def test_the_first_pruned_block(n_layers, prune_last, first):
    assert pruned_from(n_layers, prune_last) == first


# What steering does to how answers open


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_steered_logits_of_rows_with_a_vector_each(tiny_model, name):
    model, rows = tiny_model(name), HARMLESS[:2]
    vectors = mx.random.normal((4, 32), key=mx.random.key(2))
    inputs = block_inputs(model, pad_right(rows))[1]
    expected = np.stack([walk(model, rows[i % 2], add={1: vectors[i]})[1][-1] for i in range(4)])
    for known in (inputs, None):
        found = np.array(steered_logits(model, 1, vectors, rows * 2, known))
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_opening_probabilities_are_those_of_the_model_steered_by_each_coefficient(tiny_model, name, batch_size):
    model, coeffs = tiny_model(name), [0.0, 0.5, 3.0]
    direction = Direction(-1, 1, 2 * mx.random.normal((32,), key=mx.random.key(4)))
    found = opening_probabilities(model, direction, coeffs, HARMFUL, HARMLESS, TWICE, batch_size)

    def last(rows, coeff):
        steered = steer(model, 1, direction.vector, coeff)
        return np.concatenate([softmax(last_logits(steered, [row])) for row in rows])

    base = last(HARMLESS, 0.0)
    for i, coeff in enumerate(coeffs):
        q = last(HARMLESS, coeff)
        kl = (base * (np.log(base + 1e-6) - np.log(q + 1e-6))).sum(-1).mean()
        by_hand = last(HARMFUL, coeff)[:, REFUSAL].sum(-1).mean(), q[:, REFUSAL].sum(-1).mean(), kl
        assert [float(values[i]) for values in found] == pytest.approx(by_hand, abs=1e-5)
    own = [1 / (1 + np.exp(-refusal_scores(model, rows, REFUSAL))) for rows in (HARMFUL, HARMLESS)]
    assert [found[0][0], found[1][0]] == pytest.approx([p.mean() for p in own], abs=1e-5)
    assert abs(found[2][0]) < 1e-6 < found[2][1]


def test_openings_of_all_tokens_have_probability_1(model):
    direction = Direction(-1, 1, mx.ones(32))
    on_harmful, on_harmless, _ = opening_probabilities(model, direction, [1.0], HARMFUL, HARMLESS, [*range(50)] * 2)
    assert [on_harmful[0], on_harmless[0]] == pytest.approx([1.0, 1.0], abs=1e-6)


# Choosing

grid = st.integers(-2000, 2000).map(lambda x: x / 1000)
number = st.one_of(st.just(NAN), st.sampled_from([-1.0, 0.0, 0.1, 0.5]), grid)
threshold = st.one_of(st.none(), st.sampled_from([-1.0, 0.0, 0.1, 0.5]))
numbers = st.lists(number, min_size=30, max_size=30)
table = numbers.map(lambda x: CandidateScores(*np.array(x).reshape(3, 2, 5)))
part = st.sampled_from([None, 0.0, 0.2, 0.5])


def by_brute_force(scores, limits):
    kl_threshold, steering_threshold, prune_last = vars(limits).values()
    best = None
    for p in range(2):
        for layer in range(5):
            kl = float(scores.ablation_kl[p, layer])
            ablated = float(scores.ablation_refusal[p, layer])
            steered = float(scores.steering_refusal[p, layer])
            if math.isnan(kl + ablated + steered):
                continue
            if prune_last is not None and layer >= {0.0: 5, 0.2: 4, 0.5: 2}[prune_last]:
                continue
            if kl_threshold is not None and kl > kl_threshold:
                continue
            if steering_threshold is not None and steered < steering_threshold:
                continue
            if best is None or ablated < best[0]:  # the first of equals: lower position, then lower block
                best = (ablated, p - 2, layer)
    return best and best[1:]


@settings(max_examples=200, deadline=None)
@given(table, threshold, threshold, part)
def test_the_choice_is_the_brute_force_one(scores, kl_threshold, steering_threshold, prune_last):
    limits = Limits(kl_threshold, steering_threshold, prune_last)
    expected = by_brute_force(scores, limits)
    if expected:
        assert choose_direction(scores, **vars(limits)) == expected
        return
    with pytest.raises(ValueError, match="none of the 10"):
        choose_direction(scores, **vars(limits))


@settings(max_examples=100, deadline=None)
@given(table, threshold, threshold, part, st.integers(1, 8))
def test_the_shortlist_is_the_sorted_list_with_two_of_a_block(scores, kl_threshold, steering_threshold, prune_last, n):
    limits = Limits(kl_threshold, steering_threshold, prune_last)
    near = shortlist(scores, limits, count=n)
    every = []
    for layer in range(1, pruned_from(5, prune_last)):
        for p in (0, 1):
            if not math.isnan(scores.steering_refusal[p, layer]):
                failed = failed_tests(scores, p, layer, limits)
                by = -scores.steering_refusal[p, layer] if failed else scores.ablation_refusal[p, layer]
                every.append((len(failed), by, p - 2, layer, failed))
    assert near == [(p, layer, failed) for _, _, p, layer, failed in sorted(every)][:n]  # two positions: none is third
    if (best := by_brute_force(scores, limits)) and best[1] > 0:
        assert near[0][:2] == best and near[0][2] == []
    assert shortlist(scores, limits) == shortlist(scores, limits, count=SHORTLIST)


def test_the_shortlist_by_hand():
    kl, steered = np.array([[0.0, 0.4, 0.1, 0.15, 0.05]]), np.array([[9.0, 3.0, -1.0, -1.0, 1.0]])
    scores = CandidateScores(kl, np.zeros((1, 5)), steered)
    expected = [
        (-1, 4, []),
        (-1, 1, ["KL when ablated +0.400 > 0.1"]),  # fails one test, as block 2 does, but raises refusal more
        (-1, 2, ["refusal when steered -1.000 < 0"]),
        (-1, 3, ["refusal when steered -1.000 < 0", "KL when ablated +0.150 > 0.1"]),
    ]  # block 0 is never a direction
    assert shortlist(scores, Limits(prune_last=None)) == expected
    assert shortlist(scores, Limits(prune_last=None), count=2) == expected[:2]
    assert [at for _, at, _ in shortlist(scores, Limits())] == [1, 2, 3]  # block 4 is pruned


def test_of_two_blocks_the_second_is_a_candidate():
    scores = CandidateScores(*(np.zeros((1, 2)) for _ in range(3)))
    assert shortlist(scores, Limits()) == [(-1, 1, [])] and choose_direction(scores) == (-1, 0)
    assert spread(1, pruned_from(2, 0.2)) == [(0, 1)]


def test_the_shortlist_begins_with_the_published_choice_and_takes_two_of_a_block():
    # All pass: by refusal under ablation, the smallest first. Block 1 has the three smallest.
    refusal = np.array([[0.0, -9.0, 3.0], [0.0, -7.0, 1.0], [0.0, -8.0, 2.0]])
    scores = CandidateScores(np.zeros((3, 3)), refusal, np.ones((3, 3)))
    near = shortlist(scores, Limits(prune_last=None))
    assert near == [(-3, 1, []), (-1, 1, []), (-2, 2, []), (-1, 2, [])]
    assert near[0][:2] == choose_direction(scores, prune_last=None)


def test_what_was_not_measured_is_filled():
    some = CandidateScores(*(np.array([[1.0, NAN, NAN]]) for _ in range(3)))
    more = CandidateScores(*(np.array([[7.0, 2.0, NAN]]) + i for i in range(3)))
    found = filled(some, more)
    for i, key in enumerate(("ablation_kl", "ablation_refusal", "steering_refusal")):
        np.testing.assert_array_equal(getattr(found, key), [[1.0, 2.0 + i, NAN]])


@pytest.mark.parametrize(
    ("n_pos", "n_layers", "expected"),
    [
        (5, 10, [(row, at) for at in (1, 4, 6, 9) for row in (0, 2, 4)]),
        (2, 3, [(0, 1), (1, 1), (0, 2), (1, 2)]),
        (1, 2, [(0, 1)]),
    ],
)
def test_candidates_spread_over_blocks_and_positions_but_for_the_first_block(n_pos, n_layers, expected):
    assert spread(n_pos, n_layers) == expected


def test_every_failed_test_is_named():
    scores = CandidateScores(*(np.array([[x]]) for x in (0.2, NAN, -0.5)))
    failed = failed_tests(scores, 0, 0, Limits(prune_last=1.0))
    assert failed == [
        "block 0 is in the last 100%",
        "refusal when steered -0.500 < 0",
        "KL when ablated +0.200 > 0.1",
        "refusal when ablated was not measured or is not a number",
    ]
    assert len(failed_tests(scores, 0, 0, Limits(None, None, None))) == 1


def test_no_direction_can_never_be_chosen(model):
    nothing, scores = no_direction(model)
    assert isinstance(nothing, Direction) and not nothing.vector.any().item()
    assert scores.ablation_kl.shape == (1, 3)
    with pytest.raises(ValueError):
        choose_direction(scores, **vars(Limits(None, None, None)))
    assert shortlist(scores, Limits(None, None, None)) == []


def test_a_direction_of_no_length_is_not_tried():
    """As where a few convolutions see no further back than the template."""
    shape = (2, 4)
    scores = CandidateScores(np.zeros(shape), np.full(shape, -1.0), np.full(shape, 1.0))
    moved = np.ones(shape, bool)
    moved[1, 1:3] = False
    near = shortlist(scores, Limits(prune_last=None), count=9, moved=moved)
    assert {(p, at) for p, at, _ in near} == {(-2, 1), (-2, 2), (-2, 3), (-1, 3)}
    assert {(p, at) for p, at, _ in shortlist(scores, Limits(prune_last=None), count=9)} > {(-1, 1), (-1, 2)}
    assert shortlist(scores, Limits(prune_last=None), moved=np.zeros(shape, bool)) == []
