"""Two judges on the same answers: how often they agree, how far that is beyond chance, and every disagreement."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import nan
from typing import Any

from ..method.judge import OUTCOMES
from ..system.screen import Screen


@dataclass(frozen=True)
class Agreement:
    """How often each pair of outcomes, (the first judge's, the second's), occurs."""

    counts: Mapping[tuple[str, str], int]

    @property
    def total(self) -> int:
        """The answers that both judged."""
        return sum(self.counts.values())

    @property
    def alike(self) -> int:
        """The answers that both judged alike."""
        return sum(n for (a, b), n in self.counts.items() if a == b)

    @property
    def kappa(self) -> float:
        """Cohen's kappa, unparsed being an outcome like the others.

        κ = (p_o − p_e) / (1 − p_e), Cohen 1960: p_o the share that both judge alike, p_e = Σ_k p_k q_k what two judges
        with these shares of outcomes would agree on by chance. NaN where it is not defined: no answers, or both judges
        say one and the same of all of them.
        """
        total, first, second = self.total, Counter[str](), Counter[str]()
        for (a, b), n in self.counts.items():
            first[a] += n
            second[b] += n
        by_chance = sum(first[k] * second[k] for k in first)  # p_e n², whole so that 1 is seen for certain
        if by_chance == total * total:
            return nan
        return (self.alike * total - by_chance) / (total * total - by_chance)

    def as_json(self) -> dict[str, Any]:
        """Every cell of the matrix: counts[the first judge's outcome][the second's]."""
        return {
            "kappa": self.kappa,
            "observed": self.alike / self.total if self.total else nan,
            "total": self.total,
            "counts": {a: {b: self.counts.get((a, b), 0) for b in OUTCOMES} for a in OUTCOMES},
        }


def compare(first: Iterable[str], second: Iterable[str]) -> Agreement:
    """Compare two judges' outcomes of the same answers, in the same order; a ValueError if they are not as many."""
    return Agreement(Counter(zip(first, second, strict=True)))


def show_agreement(names: tuple[str, str], groups: Mapping[str, Agreement], screen: Screen) -> None:
    """One table, a column a group of answers: answers, share alike, κ, and each pair of outcomes that occurs."""
    columns = list(groups.values())
    rows = [
        ["answers", *(str(c.total) for c in columns)],
        ["judged alike", *(f"{100 * c.alike / c.total:.1f} %" if c.total else "–" for c in columns)],
        ["Cohen's κ", *("–" if c.kappa != c.kappa else f"{c.kappa:.2f}" for c in columns)],
    ]
    pairs = [(a, b) for a in OUTCOMES for b in OUTCOMES if any(c.counts.get((a, b)) for c in columns)]
    for a, b in sorted(pairs, key=lambda pair: pair[0] != pair[1]):  # what they agree on first
        rows.append([f"both {a}" if a == b else f"{a}, {b}", *(str(c.counts.get((a, b), 0)) for c in columns)])
    screen.table(f"Judges: {names[0]}, {names[1]}, in this order", ["", *groups], rows)
