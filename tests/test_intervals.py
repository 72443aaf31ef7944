"""Wilson's interval and McNemar's exact p against scipy, by hand, and at their ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from safesteer_mlx.evals.scores import Count, Paired, mcnemar, paired, wilson

counts = st.integers(0, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts.filter(lambda c: c[1] > 0))
def test_wilson_is_scipys(c):
    theirs = binomtest(*c).proportion_ci(0.95, method="wilson")
    assert wilson(*c) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_by_hand():
    # z = 1.959964, z² = 3.841459: 8 of 10 is (0.8 + 0.192073 ± 1.959964·√(0.016 + 0.009604)) / 1.384146
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    assert wilson(0, 0) == (0, 1)


def test_wilson_refuses_what_is_no_count():
    for count, total in ((5, 4), (-1, 4)):
        with pytest.raises(ValueError, match=str(count)):
            wilson(count, total)


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_exact_binomial_test(lost, gained):
    expected = binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_hand():
    assert mcnemar(0, 5) == 2 / 32
    assert mcnemar(1, 3) == 2 * (1 + 4) / 16
    assert mcnemar(4, 4) == mcnemar(0, 0) == 1
    assert 0 < mcnemar(0, 1000) < 1e-300  # no overflow


def test_pairs_are_counted_by_how_they_changed():
    before, after = [True, True, False, False, False], [True, False, True, True, False]
    assert paired(before, after) == Paired(lost=1, gained=2)
    assert str(Paired(1, 2)) == "+2 −1, p = 1"
    with pytest.raises(ValueError):
        paired([True], [])


def test_a_count_is_shown_with_rate_and_interval():
    assert str(Count(8, 10)) == "8/10, 80.0 % (49.0–94.3)"
    assert str(Count(0, 0)) == "0/0, 0.0 % (0.0–100.0)"
