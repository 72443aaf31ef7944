"""Counts with their uncertainty: Wilson's interval for one rate, McNemar's exact test for a pair of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist


def wilson(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion, (0, 1) where nothing was counted.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n), Wilson 1927; it stays within [0, 1] and is no point at
    0 or n of n.

    Raises:
        ValueError: a count outside 0…total.
    """
    if not 0 <= count <= total:
        raise ValueError(f"count {count} is not between 0 and the total {total}")
    if not total:
        return 0.0, 1.0
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), count / total
    middle = p + z * z / (2 * total)
    half = z * sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At the ends the exact bound is 0 or 1; rounding would leave 1e-17 beside it.
    low = 0.0 if count == 0 else (middle - half) / scale
    return low, 1.0 if count == total else (middle + half) / scale


def mcnemar(lost: int, gained: int) -> float:
    """McNemar's exact two-sided p: how likely a split at least this uneven is if either way were a coin's toss.

    `lost` and `gained` are the pairs that changed; those that did not say nothing about the change.
    """
    n = lost + gained
    return min(1.0, 2 * sum(comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n)


@dataclass(frozen=True)
class Count:
    """`count` out of `total`, shown with the rate and its 95 % interval."""

    count: int
    total: int

    def __str__(self) -> str:
        low, high = wilson(self.count, self.total)
        rate = 100 * self.count / max(1, self.total)
        return f"{self.count}/{self.total}, {rate:.1f} % ({100 * low:.1f}–{100 * high:.1f})"


@dataclass(frozen=True)
class Paired:
    """How yes and no changed from before to after on the same prompts."""

    lost: int  # yes before, no after
    gained: int  # no before, yes after

    @property
    def p(self) -> float:
        """McNemar's exact p."""
        return mcnemar(self.lost, self.gained)

    def __str__(self) -> str:
        return f"+{self.gained} −{self.lost}, p = {self.p:.2g}"


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Compare answers to the same prompts, in the same order.

    Raises:
        ValueError: sequences of unequal length.
    """
    changes = [(b, a) for b, a in zip(before, after, strict=True) if b != a]
    return Paired(sum(b for b, _ in changes), sum(a for _, a in changes))
