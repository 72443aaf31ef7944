"""Every formula by hand, its gradient, and what it reduces to."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safesteer_mlx.method import losses
from safesteer_mlx.method.losses import (
    KINDS,
    Divergence,
    Scored,
    _restrict,
    distillation_loss,
    kept_window,
    localized_loss,
    token_divergence,
)
from safesteer_mlx.method.residual import head

PS, PT = [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]
ZS, ZT = (mx.log(mx.array([[p]])) for p in (PS, PT))
ONE = mx.array([[1]])
S = mx.array([0, 1])


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


MIX = [0.7 * s + 0.3 * t for s, t in zip(PS, PT, strict=True)]
BY_HAND = {
    "full": ({}, kl(PS, PT)),
    "published": ({"tokens": S}, kl(PS[:2], PT[:2])),
    "grouped": ({"tokens": S, "kind": "grouped_reverse_kl"}, kl([0.5, 0.3, 0.2], [0.2, 0.5, 0.3])),
    "grouped one": (
        {"tokens": mx.array([0]), "kind": "grouped_reverse_kl"},
        0.5 * math.log(2.5) + 0.5 * math.log(0.5 / 0.8),
    ),
    "forward": ({"tokens": S, "kind": "forward_kl"}, kl(PT[:2], PS[:2])),
    "renormalised": ({"tokens": S, "renormalize": True}, kl([5 / 8, 3 / 8], [2 / 7, 5 / 7])),
    "top 1": ({"top_k": 1}, 0.3 * math.log(0.3 / 0.5)),
    "mixture": ({"kind": "mixture", "mix": 0.3}, 0.3 * kl(PT, MIX) + 0.7 * kl(PS, MIX)),
    "mixture 1": ({"kind": "mixture", "mix": 1.0}, 0.0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    options, expected = BY_HAND[name]
    assert distillation_loss(ZS, ZT, ONE, **options).item() == pytest.approx(expected, abs=1e-6)


def test_mean_is_over_positions_then_over_sequences_and_padding_is_nothing():
    zs, zt = mx.random.normal((2, 3, 5)), mx.random.normal((2, 3, 5))
    each = np.array(token_divergence(zs, zt))
    mask = mx.array([[1, 1, 1], [1, 0, 0]])
    expected = (each[0].mean() + each[1, 0]) / 2
    assert distillation_loss(zs, zt, mask).item() == pytest.approx(expected, rel=1e-5)
    windowed = distillation_loss(zs, zt, mask, skip=1, keep=2).item()
    assert windowed == pytest.approx(each[0, 1] / 2, rel=1e-5)
    gradient = np.array(mx.grad(lambda z: distillation_loss(z, zt, mask))(zs))
    assert np.abs(gradient[1, 1:]).max() == 0 and np.abs(gradient[0]).max() > 0


def test_gradient_at_the_teacher_is_zero_for_grouped_and_not_for_the_published_form():
    z = mx.random.normal((1, 1, 6))
    ids, p = mx.array([1, 4]), np.array(mx.softmax(z, axis=-1))[0, 0]
    grouped = mx.grad(lambda x: distillation_loss(x, z, ONE, tokens=ids, kind="grouped_reverse_kl"))(z)
    assert mx.abs(grouped).max().item() < 1e-6
    published = np.array(mx.grad(lambda x: distillation_loss(x, z, ONE, tokens=ids))(z))[0, 0]
    inside = np.isin(np.arange(6), [1, 4])
    np.testing.assert_allclose(published, p * (inside - p[inside].sum()), atol=1e-6)


@pytest.mark.parametrize("kind", ["grouped_reverse_kl", "reverse_kl", "forward_kl", "mixture"])
def test_gradient_by_finite_differences(kind):
    mx.random.seed(1)
    zs, zt = mx.random.normal((1, 1, 6)), mx.random.normal((1, 1, 6))
    options = {"tokens": mx.array([0, 2, 5]), "kind": kind, "mix": 0.3 if kind == "mixture" else None}
    gradient = np.array(mx.grad(lambda z: distillation_loss(z, zt, ONE, **options))(zs))[0, 0]
    for j in range(6):
        step = mx.array(np.eye(6, dtype=np.float32)[j]) * 1e-2
        ends = [distillation_loss(zs + sign * step, zt, ONE, **options).item() for sign in (1, -1)]
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(gradient[j], abs=2e-3)
    teacher = mx.grad(lambda z: distillation_loss(zs, z, ONE, **options))(zt)
    assert mx.abs(teacher).max().item() == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7))
def test_grouped_lies_between_zero_and_the_full_divergence(seed, k):
    key = mx.random.key(seed)
    zs, zt = 3 * mx.random.normal((2, 1, 1, 8), key=key)
    full = distillation_loss(zs, zt, ONE).item()
    grouped = distillation_loss(zs, zt, ONE, tokens=mx.arange(k), kind="grouped_reverse_kl").item()
    assert -1e-6 <= grouped <= full + 1e-5
    whole = distillation_loss(zs, zt, ONE, tokens=mx.arange(8), kind="grouped_reverse_kl").item()
    assert whole == pytest.approx(full, abs=1e-5)


def test_the_mass_outside_keeps_its_digits_near_one():
    z = mx.array([[[30.0, 0.0]]])
    zt = z - mx.array([0.0, 5.0])
    value = distillation_loss(z, zt, ONE, tokens=mx.array([0]), kind="grouped_reverse_kl")
    assert value.item() == pytest.approx(math.exp(-30) * (5 - 1 + math.exp(-5)), rel=0.3)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "reverse"},
        {"mix": 0.5},
        {"kind": "mixture"},
        {"kind": "mixture", "mix": 1.5},
        {"tokens": S, "top_k": 2},
        {"tokens": mx.array([3])},
        {"tokens": mx.array([-1])},
        {"top_k": 9},
    ],
)
def test_what_makes_no_sense_raises(options):
    with pytest.raises(ValueError):
        distillation_loss(ZS, ZT, ONE, **options)


def drawn(seed, *shape, scale=2.0):
    return scale * mx.random.normal(shape, key=mx.random.key(seed))


def with_mix(kind, mix=0.3):
    return {"kind": kind, "mix": mix if kind == "mixture" else None}


def log_softmax(z):
    z = np.array(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def restated(zs, zt, ids, kind, mix=0.3):
    """The module's table of formulas in numpy, float64."""
    ls, lt = log_softmax(zs), log_softmax(zt)
    s, t = np.exp(ls)[..., ids], np.exp(lt)[..., ids]
    ls, lt = ls[..., ids], lt[..., ids]
    if kind == "forward_kl":
        return (t * (lt - ls)).sum(-1)
    if kind == "mixture":
        lm = np.log((1 - mix) * s + mix * t)
        return (mix * t * (lt - lm) + (1 - mix) * s * (ls - lm)).sum(-1)
    inside = (s * (ls - lt)).sum(-1)
    if kind == "reverse_kl" or len(ids) == np.shape(zs)[-1]:
        return inside
    rest_s, rest_t = 1 - s.sum(-1), 1 - t.sum(-1)
    return inside + rest_s * np.log(rest_s / rest_t)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ids", [[2], [0, 3, 5], [6, 1, 4, 2], list(range(7))])
def test_every_kind_restated_in_numpy(kind, ids):
    zs, zt = drawn(1, 2, 3, 7), drawn(2, 2, 3, 7)
    found = token_divergence(zs, zt, tokens=mx.array(ids), **with_mix(kind))
    np.testing.assert_allclose(np.array(found), restated(zs, zt, ids, kind), atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(-50, 50), st.sampled_from(KINDS))
def test_a_constant_added_to_all_logits_changes_nothing(seed, shift, kind):
    zs, zt = drawn(seed, 3, 7), drawn(seed + 1, 3, 7)
    options = {"tokens": mx.array([1, 5]), **with_mix(kind)}
    moved = token_divergence(zs + shift, zt - shift, **options)
    np.testing.assert_allclose(np.array(moved), np.array(token_divergence(zs, zt, **options)), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.permutations(range(7)), st.sampled_from(KINDS))
def test_tokens_may_come_in_any_order_and_all_of_them_are_the_full_vocabulary(seed, ids, kind):
    zs, zt = drawn(seed, 2, 7), drawn(seed + 1, 2, 7)
    full = np.array(token_divergence(zs, zt, **with_mix(kind)))
    assert (full > -1e-6).all()
    listed = np.array(token_divergence(zs, zt, tokens=mx.array(ids), **with_mix(kind)))
    np.testing.assert_allclose(listed, full, atol=1e-5)
    orders = (mx.array(ids[:3]), mx.array(sorted(ids[:3])))
    some = [token_divergence(zs, zt, tokens=order, **with_mix(kind)) for order in orders]
    np.testing.assert_allclose(np.array(some[0]), np.array(some[1]), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_renormalising_over_everything_changes_nothing_and_over_a_subset_it_is_a_divergence(kind):
    zs, zt = drawn(3, 4, 7), drawn(4, 4, 7)
    full = np.array(token_divergence(zs, zt, **with_mix(kind)))
    again = np.array(token_divergence(zs, zt, renormalize=True, **with_mix(kind)))
    np.testing.assert_allclose(again, full, atol=1e-5)
    ids = [0, 2, 6]
    over = {"tokens": mx.array(ids), "renormalize": True, **with_mix(kind)}
    alone = np.array(token_divergence(zs[:, ids], zt[:, ids], **with_mix(kind)))
    np.testing.assert_allclose(np.array(token_divergence(zs, zt, **over)), alone, atol=1e-5)
    gradient = mx.grad(lambda z: token_divergence(z, zt, **over).sum())(zt)
    assert mx.abs(gradient).max().item() < 1e-6


@pytest.mark.parametrize("subset", [None, S])
def test_the_mixture_vanishes_at_its_ends_and_is_a_reverse_or_forward_kl_close_to_them(subset):
    zs, zt = drawn(5, 1, 3), drawn(6, 1, 3)

    def value(**options):
        return token_divergence(zs, zt, tokens=subset, **options).item()

    for mix in (0.0, 1.0):
        assert value(kind="mixture", mix=mix) == pytest.approx(0, abs=1e-7)
        options = {"tokens": subset, "kind": "mixture", "mix": mix}
        gradient = mx.grad(lambda z, options=options: token_divergence(z, zt, **options).sum())
        assert mx.abs(gradient(zs)).max().item() < 1e-6
    if subset is None:  # D/α → KL(πt‖πs) for α → 0, and D/(1−α) → KL(πs‖πt) for α → 1
        assert value(kind="mixture", mix=1e-2) / 1e-2 == pytest.approx(value(kind="forward_kl"), rel=0.1)
        assert value(kind="mixture", mix=1 - 1e-2) / 1e-2 == pytest.approx(value(kind="reverse_kl"), rel=0.1)


def test_the_published_form_pulls_the_mass_on_s_below_the_teachers_and_grouped_does_not():
    zt = mx.log(mx.array([0.6, 0.4]))

    def at(p, kind):
        return token_divergence(mx.log(mx.array([p, 1 - p])), zt, tokens=mx.array([0]), kind=kind).item()

    assert at(0.6, "reverse_kl") == pytest.approx(0, abs=1e-6)
    assert at(0.6 / math.e, "reverse_kl") == pytest.approx(-0.6 / math.e, abs=1e-6)
    around = [at(p, "grouped_reverse_kl") for p in (0.5, 0.6, 0.7)]
    assert around[1] == pytest.approx(0, abs=1e-6) and around[0] > 1e-3 < around[2]


def test_grouped_gradient_in_closed_form():
    # dD/dz_j = p_j (log(p_j/q_j) − D) on S, and p_j (log((1−P)/(1−Q)) − D) off it
    zs, zt, ids = drawn(7, 6), drawn(8, 6), [1, 4]
    ls, lt = log_softmax(zs), log_softmax(zt)
    rest = np.log((1 - np.exp(ls)[ids].sum()) / (1 - np.exp(lt)[ids].sum()))
    ratio = np.where(np.isin(np.arange(6), ids), ls - lt, rest)
    expected = np.exp(ls) * (ratio - restated(zs, zt, ids, "grouped_reverse_kl"))
    options = {"tokens": mx.array(ids), "kind": "grouped_reverse_kl"}
    found = mx.grad(lambda z: token_divergence(z, zt, **options))(zs)
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5)


def test_the_log_mass_outside_is_right_where_one_minus_p_is_nothing():
    z = mx.array([40.0, 41.0, 0.0, -3.0])
    rest = _restrict(z, mx.array([0, 1])).rest
    expected = math.log(1 + math.exp(-3)) - (41 + math.log(1 + math.exp(-1)))
    assert rest.item() == pytest.approx(expected, rel=1e-6)
    assert 1 - mx.softmax(z)[:2].sum().item() == pytest.approx(0, abs=1e-6)  # subtraction would lose it
    grouped = {"tokens": mx.array([0, 1]), "kind": "grouped_reverse_kl"}
    whole = token_divergence(z, z - 1, **grouped)
    assert whole.item() == pytest.approx(0, abs=1e-6)
    gradient = mx.grad(lambda x: token_divergence(x, -z, **grouped))(z)
    assert mx.isfinite(gradient).all().item()


def test_top_k_takes_the_teachers_likeliest_at_each_position():
    zs, zt = drawn(9, 2, 4, 7), drawn(10, 2, 4, 7)
    for kind in KINDS:
        found = np.array(token_divergence(zs, zt, top_k=3, **with_mix(kind)))
        for n, t in np.ndindex(2, 4):
            ids = np.argsort(-np.array(zt)[n, t])[:3]
            assert found[n, t] == pytest.approx(restated(zs[n, t], zt[n, t], ids, kind), abs=1e-5)
        every = np.array(token_divergence(zs, zt, top_k=7, **with_mix(kind)))
        np.testing.assert_allclose(every, np.array(token_divergence(zs, zt, **with_mix(kind))), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_logits_are_computed_in_float32(kind):
    zs, zt = drawn(11, 2, 7).astype(mx.bfloat16), drawn(12, 2, 7).astype(mx.bfloat16)
    options = {"tokens": mx.array([0, 3]), **with_mix(kind)}
    found = token_divergence(zs, zt, **options)
    assert found.dtype == mx.float32
    wide = token_divergence(zs.astype(mx.float32), zt.astype(mx.float32), **options)
    np.testing.assert_array_equal(np.array(found), np.array(wide))


def test_skip_and_keep():
    for (skip, keep), expected in {
        (0, 0): [1, 1, 1, 1],
        (1, 0): [0, 1, 1, 1],
        (0, 2): [1, 1, 0, 0],
        (1, 3): [0, 1, 1, 0],
        (2, 2): [0, 0, 0, 0],
        (0, 9): [1, 1, 1, 1],
    }.items():
        assert kept_window(4, skip, keep).astype(int).tolist() == expected


@pytest.mark.parametrize(
    ("skip", "keep", "kept"), [(0, 0, [0, 1]), (1, 0, [1]), (0, 1, [0]), (1, 1, []), (0, 9, [0, 1])]
)
def test_the_loss_is_a_mean_of_means_and_a_row_with_nothing_kept_is_zero(skip, keep, kept):
    zs, zt = drawn(21, 2, 3, 6), drawn(22, 2, 3, 6)
    each = np.array(token_divergence(zs, zt))
    found = distillation_loss(zs, zt, mx.array([[1, 1, 0], [0, 0, 0]]), skip=skip, keep=keep)
    expected = [each[0, kept].mean() if kept else 0.0, 0.0]
    np.testing.assert_allclose(np.array(found), np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_the_padding_does_not_reach_the_loss(kind, bad):
    zs, zt, mask = drawn(13, 2, 3, 6), drawn(14, 2, 3, 6), mx.array([[1, 1, 1], [1, 0, 0]])
    options = {"tokens": mx.array([0, 2]), **with_mix(kind)}
    clean = distillation_loss(zs, zt, mask, **options).item()
    zs[1, 1:], zt[1, 2:] = bad, bad
    assert distillation_loss(zs, zt, mask, **options).item() == pytest.approx(clean, rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_gradient_whatever_stands_there(kind, bad):
    zs, zt, mask = drawn(13, 2, 3, 6), drawn(14, 2, 3, 6), mx.array([[1, 1, 1], [1, 0, 0]])
    zs[1, 1:] = bad
    options = {"tokens": mx.array([0, 2]), **with_mix(kind)}
    gradient = np.array(mx.grad(lambda z: distillation_loss(z, zt, mask, **options))(zs))
    assert np.isfinite(gradient[0]).all() and np.abs(gradient[0]).max() > 0
    np.testing.assert_array_equal(gradient[1, 1:], 0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kind": "reverse"}, ["'reverse'", "grouped_reverse_kl"]),
        ({"mix": 0.5}, ["0.5", "reverse_kl"]),
        ({"kind": "mixture"}, ["None", "mixture"]),
        ({"kind": "mixture", "mix": -0.5}, ["-0.5", "0 and 1"]),
        ({"tokens": S, "top_k": 2}, ["2 tokens", "top_k = 2"]),
        ({"tokens": mx.array([0, 3])}, ["3", "vocabulary of 3"]),
        ({"top_k": 0}, ["top_k = 0", "vocabulary of 3"]),
        ({"top_k": 4}, ["top_k = 4", "vocabulary of 3"]),
        pytest.param(
            {"tokens": mx.array([-1, 2])},
            ["-1", "vocabulary of 3"],
        ),
    ],
)
def test_errors_name_both_values(options, named):
    with pytest.raises(ValueError) as caught:
        token_divergence(ZS, ZT, **options)
    assert all(name in str(caught.value) for name in named), str(caught.value)


# From hidden states, without logits of more than a chunk


ids = mx.array([3, 1, 40])
SUBSETS = {
    "grouped": {"tokens": ids, "kind": "grouped_reverse_kl"},
    "published": {"tokens": ids},
    "full": {},
    "grouped top k": {"top_k": 5, "kind": "grouped_reverse_kl"},
    "forward renormalised": {"tokens": ids, "kind": "forward_kl", "renormalize": True},
    "mixture": {"tokens": ids, "kind": "mixture", "mix": 0.3},
    "mixture full": {"kind": "mixture", "mix": 0.3},
    "all tokens": {"tokens": mx.arange(50), "kind": "grouped_reverse_kl"},
}


@pytest.mark.parametrize("name", SUBSETS)
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_from_hidden_states_it_is_the_plain_loss_and_its_gradient(tiny_model, name, chunk):
    # qwen2 has a tied head, llama its own, gemma2 caps its logits; the last is quantized
    for architecture in ("qwen2", "llama", "gemma2", "quantized"):
        model = tiny_model("qwen2" if architecture == "quantized" else architecture, 3)
        if architecture == "quantized":
            nn.quantize(model, group_size=32, bits=4)
        project, temp = head(model), 0.7
        hs, ht = (mx.random.normal((9, 32), key=mx.random.key(i)) for i in (1, 2))
        weights = mx.array(np.random.default_rng(0).random(9), mx.float32)
        watched = mx.array([2, 7])

        def plain(h):
            zs, zt = (project(x[None])[0] / temp for x in (h, ht))  # noqa: B023
            return (token_divergence(zs, zt, **SUBSETS[name]) * weights).sum()  # noqa: B023

        def ours(h, t):
            student, teacher = Scored(h, project), Scored(t, project)  # noqa: B023
            divergence = Divergence(**SUBSETS[name])
            return localized_loss(student, teacher, weights, watched, divergence, temp, chunk)  # noqa: B023

        expected, slope = mx.value_and_grad(plain)(hs)
        (value, each, masses), (found, to_teacher) = mx.value_and_grad(ours, argnums=(0, 1))(hs, ht)
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        np.testing.assert_allclose(np.array(found), np.array(slope), atol=1e-5 * mx.abs(slope).max().item())
        assert not to_teacher.any().item()
        np.testing.assert_allclose(float((each * weights).sum()), value.item(), rtol=1e-5)
        for mass, h in zip(np.array(masses), (hs, ht), strict=True):
            z = project(h[None])[0] / temp
            np.testing.assert_allclose(mass, np.array(mx.softmax(z, axis=-1)[:, watched].sum(-1)), rtol=1e-5)


@pytest.mark.parametrize("options", [SUBSETS["grouped"], {}, {"top_k": 5}])
def test_no_array_of_all_positions_and_the_vocabulary_exists(options):
    positions, vocabulary, chunk = 256, 40_000, 4
    weight = mx.random.normal((vocabulary, 8))
    hs, ht = mx.random.normal((positions, 8)), mx.random.normal((positions, 8))
    weights = mx.ones((positions,)) / positions
    mx.eval(weight, hs, ht, weights)

    def project(x):
        return x @ weight.T

    def loss(h):
        student, teacher = Scored(h, project), Scored(ht, project)
        return localized_loss(student, teacher, weights, ids, Divergence(**options), chunk=chunk)[0]

    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(*mx.value_and_grad(loss)(hs))
    # A chunk's logits are 0.64 MB, all of them 41 MB: the chunks are computed one after another.
    assert mx.get_peak_memory() - before < 24 * chunk * vocabulary * 4


def test_token_ids_given_twice_are_refused():
    with pytest.raises(ValueError, match="3 token ids hold 1 twice"):
        token_divergence(ZS, ZT, tokens=mx.array([0, 1, 0]))


# Guidance

GUIDED_TOKENS = mx.array([0, 2])


def test_the_log_odds_of_the_safety_tokens_by_hand(monkeypatch):
    p = np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.05, 0.2, 0.05]])
    for chunk in (1, 2):
        monkeypatch.setattr(losses, "chunk_rows", lambda size, chunk=chunk: chunk)
        found = losses.safety_log_odds(mx.log(mx.array(p)), lambda h: h, GUIDED_TOKENS)
        np.testing.assert_allclose(np.array(found), np.log([0.4 / 0.6, 0.9 / 0.1]), rtol=1e-5)
    halved = losses.safety_log_odds(mx.log(mx.array(p)), lambda h: h, GUIDED_TOKENS, temp=0.5)
    np.testing.assert_allclose(np.array(halved)[1], np.log((0.49 + 0.04) / (2 * 0.0025)), rtol=1e-4)


@pytest.mark.parametrize(
    ("teacher", "base", "guidance", "first", "expected"),
    [
        (1.0, 0.5, 3.0, False, 1.0),  # two steps more of 0.5
        (1.0, -1.0, 2.0, False, 2.0),
        (1.0, 2.0, 3.0, True, 0.0),  # steering lowered it: nothing is pushed
        (-0.5, -1.5, 3.0, False, 0.0),  # within an answer the teacher itself would rather not
        (-0.5, -1.5, 3.0, True, 2.0),
        (5.0, 0.0, 3.0, True, 1.0),  # no further than 6
        (7.0, 0.0, 3.0, True, 0.0),
        (1.0, -1.0, 1.0, True, 0.0),
    ],
)
def test_how_far_guidance_goes_by_hand(teacher, base, guidance, first, expected):
    where = losses.may_decide(mx.array([teacher]), np.array([0 if first else 3]), late=False)
    shift = losses.guidance_shift(mx.array([teacher]), mx.array([base]), guidance, where)
    assert shift.item() == pytest.approx(expected)


def test_a_thought_may_turn_to_a_refusal_wherever_the_teacher_writes_a_safety_token_with_1_in_20():
    p = np.array([0.04, 0.06, 0.6])
    odds, places = mx.array(np.log(p / (1 - p)), mx.float32), np.array([0, 5, 30])
    assert losses.may_decide(odds, places, late=True).tolist() == [False, True, True]
    assert losses.may_decide(odds, places, late=False).tolist() == [True, False, True]


def test_guidance_is_as_far_as_it_takes_on_most_prompts():
    sure = np.log(losses.SURE / (1 - losses.SURE))
    base, teacher = np.zeros(4), np.array([sure, 1.0, 0.5, -0.5])
    # One in four needs more: the third needs (sure − 0.5) / 0.5 steps beyond the teacher's one.
    assert losses.far_enough(teacher[:3].repeat(4), base[:3].repeat(4)) == pytest.approx(sure / 0.5, abs=1e-3)
    for found, expected in ((teacher + 9, 1.0), (base - 1, losses.FARTHEST), (np.full(4, 1e-3), losses.FARTHEST)):
        assert losses.far_enough(found, base) == expected
    weak = np.full(4, sure / 18)  # a teacher that hardly steers is followed as far as it takes
    assert losses.far_enough(weak, base) == pytest.approx(18, abs=1e-2)
    guidance = losses.far_enough(np.array([2.0, 1.5, 1.0, 1.0]), np.array([0.0, 0.5, 0.0, -1.0]))
    odds = np.array([2.0, 1.5, 1.0, 1.0])
    odds += np.array(losses.guidance_shift(mx.array(odds), mx.array([0.0, 0.5, 0.0, -1.0]), guidance))
    assert (odds >= sure - 1e-2).sum() == 3


def test_what_the_base_refuses_already_does_not_tell_how_far_guidance_goes():
    base, teacher = np.array([-2.0, -1.0, -3.0, -2.0]), np.array([0.0, 0.5, 1.0, -1.0])
    alone = losses.far_enough(teacher, base)
    sure = np.full(36, 5.0)  # nine prompts in ten
    assert alone > 2 and losses.far_enough(np.append(sure + 1, teacher), np.append(sure, base)) == alone
    few = losses.far_enough(np.append(sure + 1, teacher[:3]), np.append(sure, base[:3]))
    assert few == 1.0  # three prompts may be anything


@pytest.mark.parametrize(
    ("p", "margin", "decides", "expected"),
    [
        (0.5, 1.0, True, -1.0),
        (0.5, 9.0, True, -np.log(0.97 / 0.03)),  # as far as 3 %
        (0.03, 9.0, True, 0.0),
        (0.01, 9.0, True, 0.0),  # it is below that already
        (0.9, 3.0, True, -3.0),
        (0.5, 1.0, False, 0.0),
        (0.5, 0.0, True, 0.0),
    ],
)
def test_how_far_the_anchor_goes_below_the_base_by_hand(p, margin, decides, expected):
    shift = losses.easing_shift(mx.array([np.log(p / (1 - p))]), margin, mx.array([decides]))
    assert shift.item() == pytest.approx(expected, abs=1e-5)


def test_a_guidance_below_the_teacher_is_refused():
    with pytest.raises(ValueError, match=r"guidance of 0\.5 is less than the teacher"):
        losses.guidance_shift(mx.zeros(1), mx.zeros(1), 0.5)


@pytest.mark.parametrize("name", ["grouped", "published", "mixture", "all tokens"])
@pytest.mark.parametrize("of", [[2, 7], [7]])  # all that is watched, or some
def test_a_shift_is_the_loss_of_teacher_logits_that_were_raised(name, of):
    zs, zt = (mx.random.normal((9, 50), key=mx.random.key(i)) for i in (3, 4))
    shift, watched = mx.abs(mx.random.normal((9,), key=mx.random.key(5))), mx.array([2, 7])
    weights = mx.ones(9) / 9
    shifted = None if of == watched.tolist() else mx.array(of)
    raised = zt.at[:, mx.array(of)].add(shift[:, None])

    def loss(teacher, **more):
        def of(z):
            target = Scored(teacher, lambda h: h, **more)
            divergence = Divergence(**SUBSETS[name])
            return localized_loss(Scored(z, lambda h: h), target, weights, watched, divergence, chunk=4)[0]

        return mx.value_and_grad(of)(zs)

    (value, slope), (expected, by_hand) = loss(zt, shift=shift, shifted=shifted), loss(raised)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5) and value.item() != loss(zt)[0].item()
    np.testing.assert_allclose(np.array(slope), np.array(by_hand), atol=1e-6)
    assert mx.array_equal(loss(zt, shift=mx.zeros(9))[1], loss(zt)[1])
