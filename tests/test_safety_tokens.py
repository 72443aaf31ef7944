"""Stage 3 on probabilities written down by hand, and on random models against a restatement in numpy."""

import types
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import walk
from hypothesis import given, settings
from hypothesis import strategies as st

from safesteer_mlx.method import losses, residual, safety_tokens
from safesteer_mlx.method.residual import steer
from safesteer_mlx.method.safety_tokens import (
    TokenContrast,
    contrast_tokens,
    openings,
    other_tokens,
    refusing_tokens,
    select_tokens,
)

# Probabilities at two positions, four tokens:
BASE = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]
STEERED = [[0.1, 0.4, 0.3, 0.2], [0.2, 0.1, 0.4, 0.3]]
# Δ = log of [1/4, 4/3, 3/2, 2] and of [2, 1/2, 4/3, 3/4]
MEAN_DELTA = np.log([1 / 2, 2 / 3, 2.0, 3 / 2]) / 2
# πt Δ, mean of the two; of token 0, 0.1 log 1/4 + 0.2 log 2 is nothing
PART = np.array(
    [
        0.0,
        0.4 * np.log(4 / 3) - 0.1 * np.log(2),
        0.3 * np.log(3 / 2) + 0.4 * np.log(4 / 3),
        0.2 * np.log(2) - 0.3 * np.log(4 / 3),
    ]
)
PART /= 2
OPTIONS = {"eot_ids": [], "banned_ids": [], "inner_top_k": 2, "min_steered_prob": 0.0}


@pytest.fixture
def toy(monkeypatch):
    """toy(**options): the contrast of BASE and STEERED, positions of one prompt or of as many as there are; a toy's
    hidden states are its logits."""
    monkeypatch.setattr(residual, "hidden_states", lambda model, tokens, cache=None: model.logits)
    monkeypatch.setattr(safety_tokens, "head", lambda model: lambda hidden: hidden)

    def contrast(base=BASE, steered=STEERED, prompts=1, **options):
        shape, tail = (prompts, -1, len(base[0])), [2] * (len(base) // prompts - 1)
        models = [types.SimpleNamespace(logits=mx.log(mx.array(p)).reshape(shape) + 3.0) for p in (base, steered)]
        return contrast_tokens(*models, [[1]] * prompts, [tail] * prompts, **{**OPTIONS, **options})

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


# The part in the divergence


def test_parts_by_hand_add_up_to_the_divergence(toy):
    found = toy()
    np.testing.assert_allclose(found.part, PART, atol=1e-6)
    b, t = np.array(BASE), np.array(STEERED)
    assert found.divergence == pytest.approx((t * np.log(t / b)).sum(-1).mean(), abs=1e-6)
    assert found.divergence == found.part.sum()
    assert select_tokens(found, 3, "part").tolist() == [2, 3, 1]
    assert select_tokens(found, 2, "part").tolist() == [2, 3]
    same = toy(steered=BASE)
    assert same.divergence == 0 and not same.raised.any() and select_tokens(same, 4, "part").size == 0


def test_what_tokens_explain_by_hand(toy):
    found, log = toy(), np.log
    # 2 alone: 0.3 and 0.7 of 0.2 and 0.8; 0.4 and 0.6 of 0.3 and 0.7. Then 3 beside it; then all but one: all.
    alone = 0.3 * log(3 / 2) + 0.7 * log(7 / 8) + 0.4 * log(4 / 3) + 0.6 * log(6 / 7)
    both = 0.3 * log(3 / 2) + 0.2 * log(2) + 0.5 * log(5 / 7) + 0.4 * log(4 / 3) + 0.3 * log(3 / 4)
    shares = [alone / 2 / found.divergence, both / 2 / found.divergence, 1.0, 1.0]
    np.testing.assert_allclose(found.explained([2, 3, 1, 0]), shares, atol=1e-5)
    assert found.explained([]).size == 0
    assert 0.15 < shares[0] < 0.2 < shares[1] < 0.4
    for share, taken in ((0.15, [2]), (0.2, [2, 3]), (0.36, [2, 3]), (0.4, [2, 3, 1]), (1.0, [2, 3, 1])):
        assert select_tokens(found, 3, "part", share).tolist() == taken
    assert select_tokens(found, 2, "part", 0.9).tolist() == [2, 3]  # no more than were asked for


def test_a_token_that_is_lowered_where_the_student_is_taught_is_not_taken(toy):
    # The first prompt decides. Token 1: 0.2 log 1/2 there, 0.5 log 5 on the other, more than token 0's 0.7 log 7/4.
    base, steered = [[0.4, 0.4, 0.2], [0.4, 0.1, 0.5]], [[0.7, 0.2, 0.1], [0.4, 0.5, 0.1]]
    both, first = (toy(base, steered, prompts=2, deciding=n) for n in (None, 1))
    assert both.raised.tolist() == [True, True, False] and first.raised.tolist() == [True, False, False]
    np.testing.assert_array_equal(first.part, both.part)
    np.testing.assert_array_equal(first.votes, both.votes)
    assert select_tokens(both, 3, "part").tolist() == [1, 0]
    assert select_tokens(first, 3, "part").tolist() == [0]
    assert select_tokens(first, 3, "mean").tolist() == select_tokens(both, 3, "mean").tolist()


def test_vote_takes_noise_of_a_huge_ratio_and_part_what_carries_the_mass(toy):
    # Steering makes 0 sixty times as likely, and 2, 3 and 4 a hundred thousand times: 1e-7 each.
    noise = [1e-12] * 3, [1e-7] * 3
    base, steered = [[0.01, 0.98, *noise[0], 0.01]], [[0.6, 0.39, *noise[1], 0.01]]
    found = toy(base, steered, inner_top_k=3, min_steered_prob=1e-8)
    assert select_tokens(found, 3, "vote").tolist() == select_tokens(found, 3, "mean").tolist() == [2, 3, 4]
    assert found.explained([2, 3, 4])[-1] < 1e-4
    assert select_tokens(found, 3, "part", 0.95).tolist() == [0]
    grouped = 0.6 * np.log(60) + 0.4 * np.log(0.4 / 0.99)
    whole = 0.6 * np.log(60) + 0.39 * np.log(0.39 / 0.98) + 3e-7 * np.log(1e5)
    assert found.explained([0])[0] == pytest.approx(grouped / whole, abs=1e-5) and grouped / whole > 0.99


def test_the_teachers_openings_by_hand(toy):
    # Two prompts, two positions each; the base ends its turn (3) at the second position of the second.
    base, steered = [BASE[0], BASE[0], *BASE], [*STEERED, [0.4, 0.1, 0.2, 0.3], STEERED[0]]
    found = toy(base, steered, prompts=2, eot_ids=[3])
    assert found.n_positions == 3
    np.testing.assert_allclose(found.openings([1, 2], range(2)), [(0.7 + 0.3) / 2, 0.5], atol=1e-6)
    np.testing.assert_allclose(found.openings([1, 2], range(1)), [0.7, 0.5], atol=1e-6)
    np.testing.assert_allclose(found.openings([0, 1, 2, 3], range(1, 2)), [1.0], atol=1e-6)


def test_openings_keep_their_digits_near_1(monkeypatch):
    monkeypatch.setattr(safety_tokens, "last_logits", lambda model, rows: mx.array([[30.0, 0.0, 2.0]] * len(rows)))
    [first, second] = openings(None, [[1], [2]], [0], 1)
    rest = (1 + np.exp(2)) / (1 + np.exp(2) + np.exp(30))  # 8e-13; 1 − p in float32 would be 0
    assert first.tolist() == pytest.approx([1 - rest, rest], rel=1e-5) and second.tolist() == first.tolist()


# On random models

PROMPTS = [[3, 8, 1], [4, 4, 9, 11, 2], [5], [6, 7, 20, 21]]
TAILS = [[12, 13, 14], [15], [16, 17], []]


def restated(base, teacher, *, eot_ids, banned_ids, inner_top_k, min_steered_prob, deciding=None, seen=PROMPTS):
    """What `contrast_tokens` is to find; `positions` are log π0 and log πt, (R, V) each."""
    kept, decides = [], []
    for i, (prompt, tail, other) in enumerate(zip(PROMPTS, TAILS, seen, strict=True)):
        rows = []
        for (model, add), head in ((base, prompt), (teacher, other)):
            z = walk(model, head + tail, add)[1][len(head) - 1 :].astype(np.float64)
            z = z - z.max(-1, keepdims=True)
            rows.append(z - np.log(np.exp(z).sum(-1, keepdims=True)))
        for b, t in zip(*rows, strict=True):
            if b.argmax() in eot_ids:
                break
            kept.append((b, t))
            decides.append(deciding is None or i < deciding)
    b, t = (np.array(x) for x in zip(*kept, strict=True))
    eligible = np.exp(t).mean(0) >= min_steered_prob
    eligible[banned_ids] = False
    votes = np.zeros(50, np.int64)
    for row in t - b:
        ranked = sorted(np.flatnonzero(eligible), key=lambda v, row=row: -row[v])
        votes[ranked[:inner_top_k]] += 1
    adds = np.exp(t) * (t - b)
    means = (t - b).mean(0), np.exp(b).mean(0), np.exp(t).mean(0)
    raised = adds[decides].sum(0) > 0
    return TokenContrast(votes, *means, eligible, len(kept), adds.mean(0), adds.sum(1).mean(), raised, (b, t))


def explained(expected, ids):
    """The grouped divergence's share of the whole, from probabilities."""
    b, t = (np.exp(z) for z in expected.positions)
    grouped = [np.concatenate([p[:, ids], 1 - p[:, ids].sum(1, keepdims=True)], axis=1) for p in (b, t)]
    return (grouped[1] * np.log(grouped[1] / grouped[0])).sum(1).mean() / expected.divergence


def agree(found, expected):
    for name in ("votes", "eligible", "raised", "n_positions"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("mean_delta", "base_prob", "steered_prob", "part", "divergence"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-4)
    assert found.divergence == pytest.approx(found.part.sum(), abs=1e-12)


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma2"])
def test_contrast_restated_in_numpy_and_the_same_in_any_chunks(tiny_model, name, monkeypatch):
    model = tiny_model(name, 5)
    add = {1: 2 * mx.random.normal((32,), key=mx.random.key(1))}
    teacher = steer(model, 1, add[1])
    ends = [int(walk(model, PROMPTS[0] + TAILS[0])[1][4].argmax())]  # cuts the first row, perhaps others
    options = {"eot_ids": ends, "banned_ids": [7, 49], "inner_top_k": 6, "min_steered_prob": 0.012, "deciding": 2}
    expected = restated((model, None), (model, add), **options)
    assert 3 <= expected.n_positions < 10 and 10 < expected.eligible.sum() < 48
    assert (expected.raised != (expected.part > 0)).any()
    agree(contrast_tokens(model, teacher, PROMPTS, TAILS, **options), expected)
    ids = np.random.default_rng(0).permutation(50)
    shares = [explained(expected, ids[:k]) for k in range(1, 50)]
    for logit_rows, sequences in ((1, 1), (3, 2), (1000, 3)):
        monkeypatch.setattr(losses, "CHUNK_LOGITS", 50 * logit_rows)
        found = contrast_tokens(model, teacher, PROMPTS, TAILS, **options, batch_size=sequences)
        agree(found, expected)
        np.testing.assert_allclose(found.explained(ids), [*shares, 1.0], atol=1e-3)
        mass = np.exp(expected.positions[1])[:, ids[:9]].sum(1)
        assert found.openings(ids[:9], range(4))[0] == pytest.approx(mass[found.positions.place == 0].mean(), abs=1e-5)
    assert (np.diff(found.explained(ids)) >= -1e-6).all()
    rising = np.flatnonzero(expected.eligible & expected.raised & (expected.part > 0))
    by_part = sorted(rising, key=lambda v: -expected.part[v])
    for share in (0.1, 0.3, 0.99):  # as many as explain it, and no more
        taken = select_tokens(found, 50, "part", share)
        assert taken.tolist() == by_part[: len(taken)]
        assert explained(expected, taken) >= share or len(taken) == len(by_part)
        assert len(taken) == 1 or explained(expected, taken[:-1]) < share


@pytest.mark.parametrize("batch_size", [1, 3])
def test_openings_are_the_models_own_probabilities(any_model, batch_size):
    ids = [30, 4, 17]
    z = np.stack([walk(any_model, row)[1][-1] for row in PROMPTS]).astype(np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True))[:, ids]
    found = openings(any_model, PROMPTS, ids, batch_size)
    assert found.shape == (4, 4) and found.dtype == np.float64
    np.testing.assert_allclose(found, np.concatenate([p, 1 - p.sum(1, keepdims=True)], axis=1), atol=1e-5)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


def test_openings_are_read_fewer_at_a_time_where_memory_is_exhausted(model, monkeypatch, capsys):
    expected, sizes, whole = openings(model, PROMPTS, [30, 4, 17], 4), [], safety_tokens.last_logits

    def short(model, rows):
        sizes.append(len(rows))
        if len(rows) > 1:
            raise RuntimeError("[metal::malloc] Unable to allocate 123 bytes")
        return whole(model, rows)

    monkeypatch.setattr(safety_tokens, "last_logits", short)
    np.testing.assert_allclose(openings(model, PROMPTS, [30, 4, 17], 4), expected, atol=1e-6)
    assert sizes == [4, 2, 1, 1, 1, 1]
    assert "in reading how answers begin: going on with 1 at a time" in capsys.readouterr().err


def test_a_teacher_with_a_system_prompt_is_scored_at_the_same_continuation(model):
    seen = [[40, 41, *prompt] for prompt in PROMPTS]
    options = {"eot_ids": [], "banned_ids": [], "inner_top_k": 4, "min_steered_prob": 0.0}
    expected = restated((model, None), (model, None), seen=seen, **options)
    agree(contrast_tokens(model, model, PROMPTS, TAILS, teacher_prompts=seen, **options), expected)
    assert expected.n_positions == 10


def test_a_teacher_that_is_the_base_has_no_delta(any_model):
    found = contrast_tokens(any_model, any_model, PROMPTS, TAILS, **OPTIONS)
    assert np.abs(found.mean_delta).max() == 0 and found.votes.sum() == 2 * found.n_positions
    assert found.divergence == 0 and not found.part.any() and not found.raised.any()
    np.testing.assert_array_equal(found.base_prob, found.steered_prob)
    assert found.base_prob.sum() == pytest.approx(1, abs=1e-5)


# Selecting


def contrast(votes, delta, eligible=None):
    n = len(votes)
    eligible = np.ones(n, bool) if eligible is None else np.array(eligible)
    return TokenContrast(
        votes=np.array(votes),
        mean_delta=np.array(delta, float),
        base_prob=np.ones(n),
        steered_prob=np.ones(n),
        eligible=eligible,
        n_positions=3,
        part=np.zeros(n),
        divergence=1.0,
        raised=np.zeros(n, bool),
        positions=None,
    )


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
    with pytest.raises(ValueError, match=r"'median'.*part, vote or mean"):
        select_tokens(contrast([1], [1.0]), 1, "median")


@pytest.mark.parametrize("shared_blocks", [1, 2])
def test_blocks_below_the_steered_one_are_run_once_and_the_contrast_is_the_same(model, shared_blocks):
    teacher = steer(model, 2, 2 * mx.random.normal((32,), key=mx.random.key(1)))
    expected = contrast_tokens(model, teacher, PROMPTS, TAILS, **OPTIONS)
    agree(contrast_tokens(model, teacher, PROMPTS, TAILS, **OPTIONS, shared_blocks=shared_blocks), expected)


def test_tokens_with_which_answers_refuse_by_hand():
    wrote = [[1, 2], [1, 3], [1, 2], [4], [5], [5, 5], [5], [6]]
    refused = [True, True, False, True, True, True, False, False]
    # 1: 2 of 3, (2 + 1) / (3 + 2) = 3/5; 2: 1 of 2; 3 and 4: 1 of 1, which is 2/3 and no more; 5: 2 of 3; 6: none
    assert refusing_tokens(wrote, refused) == []
    assert refusing_tokens([*wrote, [4], [1, 5], [1]], [*refused, True, True, True]) == [1, 4]  # 5/7, 3/4; 5: 4/6
    with pytest.raises(ValueError, match="shorter"):
        refusing_tokens([[1]], [])


def test_tokens_with_which_answers_do_not_refuse_by_hand():
    wrote = [[1], [1, 2], [1, 2], [2, 3], [3], [3], [3, 3], [4], [4]]
    refused = [True, False, True, False, True, True, False, False, False]
    # 1: 2 of 3 refuse; 2: 1 of 3; 3: 2 of 4, a half; 4 was seen but twice
    assert other_tokens(wrote, refused) == [2, 3]


def test_a_word_that_steering_raises_most_is_left_out_if_answers_do_not_refuse_with_it(toy):
    found = toy()
    assert select_tokens(found, 3, "part").tolist() == [2, 3, 1]
    assert select_tokens(found, 3, "part", among=[1, 3]).tolist() == [3, 1]
    # One with which answers refuse counts though steering makes another of them likelier in its place.
    lowered = replace(found, raised=np.array([False] * len(found.raised)))
    assert select_tokens(lowered, 3, "part", among=[1, 3]).tolist() == [3, 1]
    assert not select_tokens(lowered, 3, "part").size
    assert select_tokens(found, 3, among=[0]).tolist() == [0] and select_tokens(found, 3, "part", among=[]).size == 0


def test_what_tokens_explain_is_told_where_the_teacher_writes_them(toy):
    found = toy()
    places = [
        np.sum([p * np.log(p / q) for p, q in zip(t, b, strict=True)]) for t, b in zip(STEERED, BASE, strict=True)
    ]

    def alone(token, place):
        p, q = STEERED[place][token], BASE[place][token]
        return (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))) / places[place]

    # Token 1: 0.4 at the first position, and 0.1 at the second, less than half of it; token 3: 0.2 and 0.3.
    where = found.where_it_decides([1], range(1))
    assert where.tolist() == [True, False]
    np.testing.assert_allclose(found.explained([1], where), [alone(1, 0)], rtol=1e-5)
    assert found.mean(found.positions.kl, where) == pytest.approx(places[0], rel=1e-5)
    assert found.where_it_decides([3], range(1)).tolist() == [alone(3, 0) > alone(3, 1), alone(3, 1) > alone(3, 0)]
    assert found.mean(found.positions.kl, np.zeros(2, bool)) == 0
    assert found.farthest_mean(range(1)) == pytest.approx(max(places), rel=1e-5)
    assert alone(1, 1) > alone(1, 0)  # so it matters which are looked at
    second = found.explained([3], found.positions.place == 1)
    np.testing.assert_allclose(second, [alone(3, 1)], rtol=1e-5)


def test_where_the_base_ends_its_turn_at_once_nothing_decides_and_all_is_looked_at(toy):
    found = toy()
    assert found.openings([1], range(7, 9)).tolist() == []
    assert found.where_it_decides([1], range(7, 9)).tolist() == [True, True]


def test_what_tokens_explain_of_thoughts_is_told_where_each_of_them_turns(toy):
    # Two thoughts. At a place of all of them token 2 is as good as certain under both models; one turns before it, the
    # other behind, from token 1 to token 0.
    turn, certain, other = (
        ([0.1, 0.8, 0.05, 0.05], [0.7, 0.1, 0.1, 0.1]),
        [0.01, 0.01, 0.97, 0.01],
        [0.01, 0.49, 0.01, 0.49],
    )
    base = [turn[0], certain, other, other, certain, turn[0]]
    steered = [turn[1], [0.01, 0.02, 0.96, 0.01], other, other, certain, turn[1]]
    found, tokens = toy(base, steered, prompts=2), [0, 2]
    (p, q), (rest_p, rest_q) = (([of[0], of[2]] for of in reversed(turn)), (1 - of[0] - of[2] for of in reversed(turn)))
    inside = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)) + rest_p * np.log(rest_p / rest_q)
    whole = sum(a * np.log(a / b) for b, a in zip(*turn, strict=True))
    where = found.where_thoughts_turn(tokens, range(2))
    assert where.tolist() == [True, False, False, False, False, True]
    explained = found.explained(tokens, where)[-1]
    assert explained == pytest.approx(inside / whole, rel=1e-4)
    assert found.mean(found.teacher_mass(tokens), where) == pytest.approx(0.8, rel=1e-5)
    assert found.mean(found.positions.kl, where) == pytest.approx(whole, rel=1e-4)
    # By places, as of models that do not think, that of the certain token counts, where nothing turns.
    assert found.explained(tokens, found.where_it_decides(tokens, range(2)))[-1] < 0.7 * explained
    assert found.where_thoughts_turn(tokens, range(1)).tolist() == [True, *[False] * 5]


def test_where_thoughts_turn_is_where_the_teacher_is_farthest_from_the_base():
    base = np.array([0.5, 0.1, 0.2, 0.9, 0.01, 0.3])
    teacher = np.array([0.5, 0.2, 0.6, 0.2, 0.02, 0.3])
    both = [np.stack([p, 1 - p], -1) for p in (teacher, base)]
    assert safety_tokens.farthest(*both, [3, 1, 2]).tolist() == [2, 0, 0]
    assert safety_tokens.farthest(*both, [6]).tolist() == [3]
    assert not safety_tokens.farthest(*(p[:0] for p in both), []).size
