"""Every formula by hand, its gradient, and what it reduces to."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safesteer_mlx.losses import distillation_loss, token_divergence

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
    assert distillation_loss(zs, zt, mask).item() == pytest.approx((each[0].mean() + each[1, 0]) / 2, rel=1e-5)
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
    value = distillation_loss(z, z - mx.array([0.0, 5.0]), ONE, tokens=mx.array([0]), kind="grouped_reverse_kl")
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
