"""One model's scores, as data and as tables: every rate with its count and interval, every change paired.

Wilson's interval for one rate, McNemar's exact test for a pair of them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from math import comb, sqrt
from statistics import NormalDist
from typing import Any

from ..method.judge import OUTCOMES, is_broken, is_refusal
from ..system.screen import Screen

HOW = ("greedy", "sampled")
SIGNIFICANT = 0.05  # McNemar's p up to which a change is told as one
SHOWN = {"base": "base", "teacher": "teacher", "student": "aligned"}  # as readers know the models


def wilson(count: float, total: float, confidence: float = 0.95) -> tuple[float, float]:
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
    return low, 1.0 if count == total else min(1.0, (middle + half) / scale)


def mcnemar(lost: int, gained: int) -> float:
    """McNemar's exact two-sided p: how likely a split at least this uneven is if either way were a coin's toss.

    `lost` and `gained` are the pairs that changed; those that did not say nothing about the change.
    """
    n = lost + gained
    return min(1.0, 2 * sum(comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n)


def effective_size(counts: Sequence[int], each: int) -> float:
    """How many independent answers `each` answers to every prompt are worth, of which (N,) `counts` are yes.

    p(1 − p) over the variance of the mean of the prompts' shares, Σ(p_i − p)² / (N(N − 1)): answers to one prompt are
    alike, so it lies between N, where they always are, and N · each. Where all or none are yes, nothing tells: N.
    """
    n = len(counts)
    shares = [c / each for c in counts]
    p = sum(shares) / max(1, n)
    variance = sum((s - p) ** 2 for s in shares) / max(1, n * (n - 1))
    if each == 1 or not 0 < p < 1:
        return float(n)
    return min(float(n * each), max(float(n), p * (1 - p) / variance)) if variance else float(n * each)


@dataclass(frozen=True)
class Count:
    """`count` out of `total`, shown with the rate and its 95 % interval; where answers are several to a prompt, `size`
    is how many independent ones they are worth."""

    count: int
    total: int
    size: float | None = None

    @staticmethod
    def of(yes: Sequence[bool]) -> "Count":
        """How many are."""
        return Count(sum(yes), len(yes))

    @staticmethod
    def among(cell: Mapping[str, int], outcome: str) -> "Count":
        """How many of a cell's answers, counted by outcome, have this one."""
        return Count(cell[outcome], sum(cell.values()))

    @staticmethod
    def of_clusters(counts: Sequence[int], each: int) -> "Count":
        """Of (N,) prompts with `each` answers, `counts` of them yes."""
        return Count(sum(counts), len(counts) * each, effective_size(counts, each))

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate, for as many answers as these are worth."""
        if self.size is None or not self.total:
            return wilson(self.count, self.total)
        return wilson(self.count * self.size / self.total, self.size)

    def __str__(self) -> str:
        low, high = self.interval
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


def paired(before: Sequence[int], after: Sequence[int]) -> Paired:
    """Compare the same prompts in the same order, by how many of each one's answers are yes: those with fewer than
    before against those with more. The sign test; with one answer to each, yes or no, it is McNemar's.

    Raises:
        ValueError: sequences of unequal length.
    """
    changes = [a - b for b, a in zip(before, after, strict=True)]
    return Paired(sum(c < 0 for c in changes), sum(c > 0 for c in changes))


@dataclass(frozen=True)
class Answer:
    """One judged answer; `text` is what was judged, without any thinking before it, `cut` where that was enough."""

    kind: str
    how: str
    prompt: str
    text: str
    outcome: str
    finished: bool
    cut: bool = False

    def is_like(self, other: "Answer") -> bool:
        """Whether both say the same, as far as both were read."""
        read = min((len(a.text) for a in (self, other) if a.cut), default=None)
        return self.text[:read] == other.text[:read]


@dataclass(frozen=True)
class Scores:
    """What one model does on held-out prompts. Two models' answers and tasks are in the same order."""

    answers: list[Answer]
    correct: dict[str, list[bool]]  # task -> exact match, greedy
    drift: float  # mean KL(base ‖ this) a token on the base's own harmless answers, nats
    drift_outside: float  # the same, both renormalised without the safety tokens
    samples: int = 1  # sampled answers to each prompt, one after another

    def of(self, kind: str, how: str) -> list[Answer]:
        """The answers to one kind of prompt by one way of decoding."""
        return [a for a in self.answers if (a.kind, a.how) == (kind, how)]

    @property
    def kinds(self) -> list[str]:
        """The kinds of prompts, in order."""
        return list(dict.fromkeys(a.kind for a in self.answers))

    def with_refusals(self, beginnings: Collection[str]) -> "Scores":
        """The same, where an answer whose first sentence begins so refuses."""

        def judged(a: Answer) -> Answer:
            return replace(a, outcome="refuse") if a.outcome == "comply" and is_refusal(a.text, beginnings) else a

        return replace(self, answers=[judged(a) for a in self.answers]) if beginnings else self

    def by_prompt(self, kind: str, how: str, outcome: str) -> list[int]:
        """How many of each prompt's answers have this outcome (N,)."""
        each, answers = self.samples if how == "sampled" else 1, self.of(kind, how)
        return [sum(a.outcome == outcome for a in answers[i : i + each]) for i in range(0, len(answers), each)]

    def count(self, kind: str, how: str, outcome: str) -> Count:
        """How many answers of a kind have this outcome."""
        return Count.of_clusters(self.by_prompt(kind, how, outcome), self.samples if how == "sampled" else 1)

    def right(self, task: str) -> Count:
        """The task's exact matches."""
        return Count.of(self.correct[task])

    def as_json(self) -> dict[str, Any]:
        """Counts alone, no answer: outcomes and broken answers by kind and decoding, capability, drift."""

        def each(count: Callable[[list[Answer]], dict[str, int]]) -> dict[str, dict[str, dict[str, int]]]:
            return {kind: {how: count(self.of(kind, how)) for how in HOW} for kind in self.kinds}

        def broken(answers: list[Answer]) -> dict[str, int]:
            return {"count": sum(is_broken(a.text, a.finished or a.cut) for a in answers), "total": len(answers)}

        return {
            "outcomes": each(lambda answers: {o: sum(a.outcome == o for a in answers) for o in OUTCOMES}),
            "broken": each(broken),
            "capability": {task: {"count": sum(right), "total": len(right)} for task, right in self.correct.items()},
            "drift": self.drift,
            "drift_outside": self.drift_outside,
            "samples": self.samples,
        }


def harmful_change(base: Scores, student: Scores, outcome: str) -> tuple[int, int, Paired]:
    """Answers to harmful prompts with this outcome, greedy and sampled together: of the base, of the student, and how
    prompts changed, each counted once, since its answers are alike: those with fewer of them than before, and with
    more."""

    def of_each(scores: Scores) -> list[int]:
        own = (scores.by_prompt("harmful", how, outcome) for how in HOW)
        return [sum(counts) for counts in zip(*filter(None, own), strict=True)]

    before, after = of_each(base), of_each(student)
    return sum(before), sum(after), paired(before, after)


def show(scores: Mapping[str, Scores], screen: Screen, title: str = "Held-out prompts") -> None:
    """Each model's rates, and below them the first model against the last, prompt by prompt."""
    (first_name, first), (last_name, last) = (list(scores.items())[at] for at in (0, -1))
    cells = [(kind, how, o) for kind in first.kinds for how in HOW for o in OUTCOMES]
    # Refusals are what this is about, and compliance where harm is asked for; the rest is shown if it occurs.
    cells = [c for c in cells if c[2] == "refuse" or any(s.count(*c).count for s in scores.values())]
    cells = [c for c in cells if not (c[0] in ("harmless", "borderline") and c[2] == "comply")]
    rows = [[f"{kind} {o}, {how}", *(str(s.count(kind, how, o)) for s in scores.values())] for kind, how, o in cells]
    for task in first.correct:
        rows.append([f"{task} correct", *(str(s.right(task)) for s in scores.values())])
    for label, values in (
        ("KL(base ‖ model) a token, harmless", [s.drift for s in scores.values()]),
        ("the same outside S", [s.drift_outside for s in scores.values()]),
    ):
        if len(scores) > 1 and values[-1] == values[-1]:  # NaN: not measured
            rows.append([label, *(f"{v:.5f}" for v in values)])
    screen.table(f"{title}: count, rate (95 % interval)", ["", *scores], rows)
    if len(scores) < 2:
        return
    changes = [
        [f"{kind} {o}, {how}", str(paired(*(s.by_prompt(kind, how, o) for s in (first, last))))]
        for kind, how, o in cells
    ]
    changes += [[f"{task} correct", str(paired(first.correct[task], last.correct[task]))] for task in first.correct]
    title = f"{first_name} → {last_name}, prompt by prompt: gained, lost, McNemar's exact p"
    screen.table(title, ["", "change"], changes)


def transcripts(scores: Mapping[str, Scores]) -> Sequence[dict[str, Any]]:
    """Every judged answer of every model, for a file that its owner alone can read."""
    keys = ("model", "kind", "how", "prompt", "answer", "outcome", "finished", "cut")
    answers = [(name, a) for name, own in scores.items() for a in own.answers]
    return [dict(zip(keys, (name, *astuple(a)), strict=True)) for name, a in answers]
