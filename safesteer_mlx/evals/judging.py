"""One or two judges of the same answers: chosen, loaded one after the other, and told as tables and data; of two, how
often they agree, how far that is beyond chance, and every disagreement."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import nan
from typing import Any

import mlx.core as mx

from ..method.judge import OUTCOMES
from ..system.screen import Screen, UserError
from .judge_model import Case, Template, check_judge, default_template, judge_cases, read_template
from .judge_replies import DECIDING, Verdict
from .scores import HOW, SHOWN, Answer, Scores

KEYWORD = "keyword"


@dataclass(frozen=True)
class Chosen:
    """A judge by name, with the template it is asked by; None for the keyword judge, which is asked nothing."""

    name: str
    template: str | None
    label: str  # its name in tables, and its template where that alone tells two apart

    @cached_property
    def form(self) -> Template | None:
        """The template itself."""
        return self.template and read_template(self.template)

    def judged(self, cases: Sequence[Case], trust_remote_code: bool, batch_size: int, screen: Screen) -> list[Verdict]:
        """A judge model's on each case; its weights are free afterwards, since another may need the room."""
        with screen.stage(f"judging by {self.label}") as advance:
            verdicts = judge_cases(self.name, self.form, cases, trust_remote_code, batch_size, advance)
        mx.clear_cache()
        return verdicts


def choose_judges(names: Sequence[str], templates: Sequence[str] | None = None) -> list[Chosen]:
    """One or two judges, `keyword` or models, and the templates of the models, one each, in the same order. A UserError
    for more than two, one twice, not as many templates as models, or one that is none."""
    if len(names) > 2:
        raise UserError(f"--judge takes one or two judges, not {len(names)}: {' '.join(names)}")
    models = [name for name in names if name != KEYWORD]
    if templates is not None and len(templates) != len(models):
        raise UserError(
            f"--judge-template names {len(templates)} ({' '.join(templates)}) for {len(models)} judge models; "
            "give one for each model of --judge, keyword takes none"
        )
    given = iter(templates if templates is not None else [default_template(name) for name in models])
    chosen = [(name, None if name == KEYWORD else next(given)) for name in names]
    if len(set(chosen)) < len(chosen):
        raise UserError(f"--judge names {names[0]} twice with one template; give two judges, or two --judge-template")
    alone = len(set(names)) == len(names)
    judges = [Chosen(name, template, name if alone else f"{name} ({template})") for name, template in chosen]
    for judge in judges:
        _ = judge.form  # read now, and told now if it is none
    return judges


def check_judges(judges: Sequence[Chosen], trust_remote_code: bool) -> None:
    """See that each judge can be asked, before answers are made for it; raises as `check_judge`."""
    for judge in judges:
        if judge.form is not None:
            check_judge(judge.name, judge.form, trust_remote_code)


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


@dataclass(frozen=True)
class Judged:
    """Verdicts of each judge, by its label and the model's name, in the order of that model's answers."""

    judges: list[Chosen]
    scores: Mapping[str, Scores]
    kind_of: Mapping[str, str]
    verdicts: Mapping[str, Mapping[str, list[Verdict]]]

    def first(self) -> dict[str, Scores]:
        """The scores with the outcomes that the first judge gives."""
        scores = {}
        for name, verdicts in self.verdicts[self.judges[0].label].items():
            pairs = zip(self.scores[name].answers, verdicts, strict=True)
            scores[name] = replace(self.scores[name], answers=[replace(a, outcome=v.outcome) for a, v in pairs])
        return scores

    def cell(self, label: str, model: str, kind: str, how: str | None = None) -> list[Verdict]:
        """A judge's verdicts on a model's answers to one kind of prompt, by one way of decoding or all."""
        pairs = zip(self.scores[model].answers, self.verdicts[label][model], strict=True)
        return [v for a, v in pairs if a.kind == kind and how in (None, a.how)]

    def compare(self, *cells: tuple[str, str, str | None]) -> Agreement:
        """The two judges on all of these (model, kind, how)."""
        first, second = ([v.outcome for c in cells for v in self.cell(judge.label, *c)] for judge in self.judges)
        return compare(first, second)

    def as_json(self) -> dict[str, Any]:
        """No answer: each judge's outcomes and scores, answer by answer, and how far two of them agree."""
        kinds = next(iter(self.scores.values())).kinds
        cells: dict[str, Any] = {}
        for model in self.scores:
            cells[model] = {kind: {how: self._cell_as_json(model, kind, how) for how in HOW} for kind in kinds}
        labels, templates = [j.label for j in self.judges], [j.template for j in self.judges]
        result: dict[str, Any] = {"names": labels, "templates": templates}
        if len(self.judges) == 2:
            every: list[tuple[str, str, str | None]] = [(model, kind, None) for model in self.scores for kind in kinds]
            result["agreement"] = self.compare(*every).as_json()
        return result | {"models": cells}

    def _cell_as_json(self, model: str, kind: str, how: str) -> dict[str, Any]:
        told: dict[str, Any] = {}
        for judge in self.judges:
            verdicts = self.cell(judge.label, model, kind, how)
            told[judge.label] = {
                "outcomes": [v.outcome for v in verdicts],
                "p_unsafe": [v.p_unsafe for v in verdicts],
                "mean_p_unsafe": mean([v.p_unsafe for v in verdicts])[0],
                "controversial": sum(v.controversial for v in verdicts),
            }
        if len(self.judges) == 2:
            told["agreement"] = self.compare((model, kind, how)).as_json()
        return told

    def show(self, screen: Screen) -> None:
        """How far two judges agree, and each guard's scores beside its counts."""
        kinds = next(iter(self.scores.values())).kinds
        if len(self.judges) == 2:
            groups = {kind: self.compare(*((model, kind, None) for model in self.scores)) for kind in kinds}
            groups["all"] = Agreement(sum((Counter(g.counts) for g in groups.values()), Counter()))
            show_agreement((self.judges[0].label, self.judges[1].label), groups, screen)
        for judge in self.judges:
            if judge.form is not None and judge.form.verdict in DECIDING:
                self._show_scores(judge.label, [k for k in kinds if self.kind_of[k] == "harmful"], screen)

    def _show_scores(self, label: str, kinds: Sequence[str], screen: Screen) -> None:
        """Each model's mean P(unsafe) on harmful prompts and its count of comply; what was controversial, if any."""
        rows = []
        for kind, how in ((kind, how) for kind in kinds for how in HOW):
            cells = [self.cell(label, model, kind, how) for model in self.scores]
            scored = [mean([v.p_unsafe for v in cell]) for cell in cells]
            counts = [sum(v.outcome == "comply" for v in cell) for cell in cells]
            told = [
                f"{m:.3f} of {n}; comply {count}/{len(cell)}" if n else "–"
                for (m, n), count, cell in zip(scored, counts, cells, strict=True)
            ]
            rows.append([f"{kind}, {how}", *told])
            if any(v.controversial for cell in cells for v in cell):
                rows.append([f"{kind} controversial, {how}", *(str(sum(v.controversial for v in c)) for c in cells)])
        if rows:
            names = [SHOWN.get(name, name) for name in self.scores]
            screen.table(f"{label}: mean P(unsafe) of the answers that have one", ["", *names], rows)


def mean(values: Sequence[float]) -> tuple[float, int]:
    """The mean of what was measured, NaN if nothing was, and how many that is."""
    measured = [value for value in values if value == value]
    return (sum(measured) / len(measured) if measured else nan), len(measured)


def judge_all(
    judges: Sequence[Chosen],
    scores: Mapping[str, Scores],
    kind_of: Mapping[str, str],
    trust_remote_code: bool,
    batch_size: int,
    screen: Screen,
) -> Judged:
    """Every answer judged by every judge, one loaded after the other; `scores` hold the keyword judge's outcomes.
    Raises as `judge_cases`."""
    verdicts: dict[str, dict[str, list[Verdict]]] = {}
    every: list[Answer] = [a for s in scores.values() for a in s.answers]
    cases = [Case(kind_of[a.kind], a.prompt, a.text) for a in every]
    for judge in judges:
        if judge.form is None:
            own = [Verdict(a.outcome) for a in every]
        else:
            own = judge.judged(cases, trust_remote_code, batch_size, screen)
        rest = iter(own)
        verdicts[judge.label] = {name: [next(rest) for _ in s.answers] for name, s in scores.items()}
    return Judged(list(judges), scores, kind_of, verdicts)
