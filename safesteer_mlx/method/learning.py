"""What a student has to learn, how much of it it has, and so how long it trains and how fast.

Every few steps it is measured what the student makes of the safety tokens where answers to validation prompts begin
(`Learning.share`, and `Learning.worth` for `--keep-best`); `course` says what follows. At the end it is asked how much
of the trained change is worth most (`choose_strength`): weights between the base's and the student's, as of WiSE-FT
(arXiv 2109.01903), draw a finer line on prompts that neither was trained on.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..recipe import TrainSettings
from ..system import machines
from ..system.memory import with_smaller_batches
from .losses import easing_shift, far_enough, guidance_shift, may_decide, safety_log_odds
from .residual import answer_states, head
from .rollout import Ids, Sampling, generate
from .run import Run
from .safety_tokens import LITTLE, SafetyTokens, farthest, openings, outcomes_kl
from .student import lora_change, weaken
from .teacher import Teacher

LEARNED = 0.95  # of the base's divergence from the target, gone
COST = 3.0  # of a refusal too many on harmless prompts, in refusals of harmful ones
FLAT, MORE = 0.25, 0.01  # of the epochs' steps, in which no more than that is learned: there is no more to learn
FALL = 0.5  # of the epochs' steps, in which the rate falls at the end of a run that has learned
STRENGTHS = [n / 20 for n in range(19, 9, -1)]  # of the trained change: 0.95, 0.9, … 0.5
LEAST = 0.8  # of what refusals of harmful prompts rose: less would undo what was learned, and draw no finer line
A_POINT = 0.01  # of refusals: so much more of them on harmless prompts, or of what a student is worth, counts


@dataclass(frozen=True)
class Learning:
    """What is to be learned: base's and target's probabilities of the safety tokens, and of all others together, where
    answers to validation prompts begin (N, K + 1), the first `n_harmful` of them harmful ones; and how far the student
    was after each step so far."""

    prompts: Sequence[Ids]
    tokens: np.ndarray
    base: np.ndarray
    teacher: np.ndarray
    n_harmful: int
    shares: Sequence[float | None] = ()

    def share(self, student: np.ndarray) -> float:
        """How much of the base's divergence from the target is gone: 1 − KL(πs ‖ πt) / KL(π0 ‖ πt), of (N, K + 1).

        Where the student went past the target, on the way from the base, it counts as there. On harmless prompts there
        is nothing to learn, and all that it moved counts against it, unless from the base towards the anchor's target.
        """
        n = self.n_harmful
        whole = outcomes_kl(self.base[:n], self.teacher[:n]).sum() / len(self.base)
        past = (student - self.teacher) * (self.teacher - self.base) > 0
        left = outcomes_kl(np.where(past, self.teacher, student), self.teacher)
        ends = self.base[n:], self.teacher[n:]
        left[n:] = outcomes_kl(student[n:], np.clip(student[n:], np.minimum(*ends), np.maximum(*ends)))
        return float(1 - left.mean() / whole) if whole > 1e-6 else 0.0

    def worth(self, student: np.ndarray) -> float:
        """What a student is worth to keep, of (N, K + 1): mean P(S) on harmful prompts − `COST` · `rise`."""
        return float(student[: self.n_harmful, :-1].sum(-1).mean() - COST * self.rise(student))

    def gain(self, student: np.ndarray) -> float:
        """How much P(S) rose over the base's on harmful prompts, in the mean, of (N, K + 1)."""
        mass, before = (p[: self.n_harmful, :-1].sum(-1) for p in (student, self.base))
        return float((mass - before).mean())

    def rise(self, student: np.ndarray) -> float:
        """How much P(S) rose over the base's on harmless prompts, where it rose, in the mean, of (N, K + 1)."""
        mass, before = (p[self.n_harmful :, :-1].sum(-1) for p in (student, self.base))
        return float(np.maximum(mass - before, 0).sum() / max(1, len(mass)))

    def read(self, student: nn.Module, batch_size: int) -> np.ndarray:
        """What a student makes of the tokens as it is, (N, K + 1)."""
        return openings(student, self.prompts, self.tokens, batch_size)

    def measure(self, student: nn.Module, batch_size: int) -> tuple[float, float]:
        """`share` and `worth` of a student as it is."""
        now = self.read(student, batch_size)
        return self.share(now), self.worth(now)


@dataclass(frozen=True)
class Course:
    """The steps of a run, and how its rate goes: a linear warm-up that never starts at 0, constant until step `falls`
    (from 0), a cosine to 0 from `height`, the share of the peak that it had come to."""

    steps: int
    warm: int
    falls: int
    height: float = 1.0

    def rate(self, step: int, peak: float) -> float:
        """The rate of a step counted from 0."""
        if step < self.falls:
            return peak * min(1.0, (step + 1) / max(1, self.warm))
        return (
            peak * self.height * 0.5 * (1 + math.cos(math.pi * (step - self.falls) / max(1, self.steps - self.falls)))
        )


def course(steps: int, train: TrainSettings, learning: Learning | None = None) -> Course:
    """The course of a run as far as it is known by now; `steps` are those that the epochs make.

    A run that is to go on until it has learned ends `FALL` of them after the second measurement in a row that finds it
    has, or after one that finds that it learns no more; else its rate falls from `steps` on, to twice the steps. Every
    other is a cosine over `steps`, as published.
    """
    warm = math.ceil(train.warmup * steps) if steps > 1 else 0
    if learning is None or not train.until_learned or train.iters is not None:
        return Course(steps, warm, warm)
    longest = Course(2 * steps, warm, steps)
    fall, in_a_row, best, since = math.ceil(FALL * steps), 0, -math.inf, 0
    for step, share in enumerate(learning.shares, start=1):
        if share is not None:
            in_a_row = in_a_row + 1 if share >= LEARNED else 0
            best, since = (share, step) if share > best + MORE else (best, since)
            if (in_a_row == 2 or step - since >= FLAT * steps) and step + fall < longest.steps:
                return Course(step + fall, warm, step, longest.rate(step, 1.0))
    return longest


def best_step(metrics: Sequence[Mapping[str, Any]]) -> int | None:
    """The step, of those that were measured, whose student is worth most, the later of two alike; None without any."""
    measured = [(row["worth"], row["step"]) for row in metrics if row.get("worth") is not None]
    return max(measured)[1] if measured else None


def choose_strength(run: Run, student: nn.Module, learning: Learning | None) -> float:
    """The share of the trained change that the student is given to keep: `adapter_strength`, or all; where refusals of
    harmless validation prompts rose by more than `A_POINT`, the one of `STRENGTHS` that is worth most, if it is worth
    so much more, of those with `LEAST` of what refusals of harmful ones rose."""
    settings, wanted = run.recipe.train, run.recipe.train.adapter_strength
    if settings.fine_tune_type != "lora":
        return 1.0  # of other weights half the change is not half of what it does
    change, strength = lora_change(student), 1.0
    if wanted != "auto":
        strength = float(wanted)
    elif learning is not None and run.recipe.run.select_checkpoint is None:
        strength = machines.here().share(_worth_most(run, student, change, learning))
    weaken(student, change, strength)
    if strength < 1:
        why = ", which is worth most on validation prompts" if wanted == "auto" else ""
        run.screen.line(f"{strength:.0%} of what was trained is kept{why}")
    return strength


def _worth_most(run: Run, student: nn.Module, change: dict[str, mx.array], learning: Learning) -> float:
    size = run.recipe.run.prompt_batch_size
    whole = learning.read(student, size)
    if learning.rise(whole) <= A_POINT:
        return 1.0
    worths = {1.0: learning.worth(whole) + A_POINT}
    with run.screen.stage("seeing how much of it to keep") as advance:
        for number, strength in enumerate(STRENGTHS, start=1):
            weaken(student, change, strength)
            weaker = learning.read(student, size)
            if learning.gain(weaker) >= LEAST * learning.gain(whole):
                worths[strength] = learning.worth(weaker)
            advance(number, len(STRENGTHS))
    return max(worths, key=worths.__getitem__)


def what_to_learn(run: Run, teacher: Teacher, tokens: SafetyTokens) -> tuple[Run, Learning | None]:
    """The run with the guidance that this model needs, and what base and target make of the safety tokens where
    answers to validation prompts begin; the target of harmless ones is the anchor's.

    Where all answers begin alike, as those of a model that thinks first, it is asked where, in what the teacher says to
    a harmful prompt and the base to a harmless one, the two differ most. None for a teacher whose tokens change on the
    way.
    """
    recipe, base, prompts = run.recipe, run.base, run.prompts
    size, harmful, harmless = recipe.run.prompt_batch_size, prompts.harmful_validation, prompts.harmless_validation
    guarded = harmful if teacher.system_prompt is None else prompts.harmful_validation_guarded
    if base.turns_late:
        thoughts = _undecided(run, teacher, tokens, harmful, guarded, by_teacher=True)
        harmful, guarded = _begun(harmful, thoughts), _begun(guarded, thoughts)
        read = harmless if teacher.system_prompt is None else prompts.harmless_validation_guarded
        harmless = _begun(harmless, _undecided(run, teacher, tokens, harmless, read, by_teacher=False))
    own = openings(base.model, harmful, tokens.ids, size)
    target = openings(teacher.model, guarded, tokens.ids, size)
    its, of_base = (np.log(p[:, :-1].sum(-1)) - np.log(p[:, -1]) for p in (target, own))
    where = np.array(may_decide(mx.array(its), np.zeros(len(its)), base.turns_late))
    if recipe.loss.guidance == "auto":
        guidance = far_enough(its[where], of_base[where]) if where.any() else 1.0
        run = run.with_settings(loss=replace(recipe.loss, guidance=guidance))
    if recipe.teacher.teacher == "ema" and recipe.teacher.refresh_every:
        return run, None
    shift = guidance_shift(mx.array(its), mx.array(of_base), float(run.recipe.loss.guidance), mx.array(where))
    target[:, :-1] *= np.exp(np.array(shift, np.float64))[:, None]
    target /= target.sum(-1, keepdims=True)
    if float(outcomes_kl(own, target).mean()) < LITTLE:
        return run, None  # no share of so little tells anything
    held = openings(base.model, harmless, tokens.ids, size)
    both = (np.concatenate(parts) for parts in ((own, held), (target, _eased(run, held, tokens))))
    return run, Learning([*harmful, *harmless], tokens.ids, *both, n_harmful=len(harmful))


def _eased(run: Run, base: np.ndarray, tokens: SafetyTokens) -> np.ndarray:
    """The anchor's target where answers begin, as it is given from the base's: probabilities of the tokens and of all
    others, (N, K + 1)."""
    refusing = np.append(np.isin(tokens.ids, tokens.refusing), False)
    if not refusing.any():
        return base
    mass = base[:, refusing].sum(-1)
    odds = mx.array(np.log(mass) - np.log1p(-mass))
    where = may_decide(odds, np.zeros(len(base)), run.base.turns_late)
    shift = np.array(easing_shift(odds, run.recipe.loss.anchor_margin, where), np.float64)
    target = base.copy()
    target[:, refusing] *= np.exp(shift)[:, None]
    return target / target.sum(-1, keepdims=True)


def _begun(rows: Sequence[Ids], answers: Sequence[Ids]) -> list[list[int]]:
    return [[*row, *answer] for row, answer in zip(rows, answers, strict=True)]


def _undecided(
    run: Run, teacher: Teacher, tokens: SafetyTokens, rows: Sequence[Ids], guarded: Sequence[Ids], *, by_teacher: bool
) -> list[list[int]]:
    """What the teacher, or else the base, writes after each prompt before it comes to where the two are farthest apart
    on the safety tokens; the teacher reads the prompts as `guarded`."""
    settings, size, base = run.recipe.run, run.recipe.run.prompt_batch_size, run.base.model
    sampling = Sampling(run.base.eos_ids, run.recipe.tokens.horizon, 1.0, batch_size=settings.generation_batch_size)
    keys = [run.key(16, i) for i in range(len(rows))]
    written = (teacher.model, guarded) if by_teacher else (base, rows)
    answers = [c.ids for c in generate(*written, sampling, keys)]

    def read(model: nn.Module, prompts: Sequence[Ids], size: int) -> np.ndarray:
        """Probabilities of them, and of all others, at every position, (R, 2)."""
        odds = []
        for start in range(0, len(prompts), size):
            states = answer_states(model, prompts[start : start + size], answers[start : start + size])
            odds.append(np.array(safety_log_odds(states, head(model), mx.array(tokens.ids)), np.float64))
        return 1 / (1 + np.exp(-np.concatenate(odds)[:, None] * [1, -1]))

    own, its = (
        with_smaller_batches(size, partial(read, model, prompts), "reading thoughts")[0]
        for model, prompts in ((base, rows), (teacher.model, guarded))
    )
    places = farthest(its, own, [len(answer) for answer in answers])
    return [answer[:place] for answer, place in zip(answers, places.tolist(), strict=True)]
