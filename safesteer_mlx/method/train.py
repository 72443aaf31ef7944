"""Stage 4: localized on-policy distillation (method page, 4), a generator of step metrics.

    loss = mean over rollouts of (1/T_n) Σ_t m[n,t] D(πs, target)[n,t] on the safety tokens

Every step the student answers prompts itself. On harmful prompts the target is the safety teacher; on
the anchor's harmless prompts, a share of each batch, it is the base (ours: it ends over-refusal). The
caller logs and saves.

Where we deviate, with `keep` and `tail`: of an answer only the first `keep` positions are the teacher's, which decide
whether it refuses; on the `tail` positions after them the target is the base on the whole vocabulary, so that what
follows a refusal's first words stays as it was. `guidance` is explained in `losses`.

Where we deviate, with `until_learned`: the run is as long as the model needs. What the student makes of the safety
tokens where answers to validation prompts begin is measured every few steps; once `LEARNED` of the base's divergence
from the teacher is gone there, and stays so, the rate falls to zero and the run ends. Until then the rate is constant
for as long as the epochs take, and falls over as many steps again.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..recipe import LossSettings, TrainSettings, rollout_tokens
from ..system.backoff import halving
from ..system.screen import UserError
from .losses import Head, guidance_shift, kept_positions, localized_loss, safety_log_odds
from .residual import answer_states, block_inputs, head, pad_right, resume, resumes
from .rollout import Completion, generate, stream_key
from .safety_tokens import openings
from .student import first_trained_block
from .teacher import Teacher

Ids = Sequence[int]

FULL = {"tokens": None, "kind": "reverse_kl"}  # the divergence of a tail: the whole vocabulary's
LEARNED = 0.95  # of the base's divergence from the target, gone
MEASURED_EVERY = 3  # steps
FALL = 0.5  # of the epochs' steps, in which the rate falls at the end of a run that has learned


class NotFiniteError(UserError):
    """A loss or gradient that is NaN or infinite; the step was not applied."""


@dataclass(frozen=True)
class TrainingPrompt:
    """A prompt as the student reads it and as its target does; `harmful` says which target."""

    ids: list[int]
    target_ids: list[int]
    harmful: bool


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step: losses by kind (NaN if absent), gradient norm before clipping, tokens trained on."""

    step: int
    steps: int
    loss: float
    harmful_loss: float
    anchor_loss: float
    student_mass: float  # Σ_S πs at the first answer position of harmful prompts, mean
    target_mass: float
    grad_norm: float
    learning_rate: float
    tokens: int
    truncated: float  # share of rollouts that ran out of length
    learned: float  # share of what there is to learn, on validation prompts; NaN if not measured


@dataclass(frozen=True)
class Rollouts:
    """What the student answered in a step, before it learns from it."""

    step: int
    completions: list[Completion]


def make_optimizer(train: TrainSettings) -> optim.Optimizer:
    """AdamW, as published; `train` sets its rate step by step."""
    return optim.AdamW(learning_rate=train.learning_rate, weight_decay=train.weight_decay)


def harmful_per_batch(train: TrainSettings, loss: LossSettings) -> int:
    """Harmful prompts in a batch; the anchor's harmless ones are the rest."""
    return max(1, train.batch_size - round(loss.anchor * train.batch_size))


def number_of_steps(n_harmful: int, train: TrainSettings, loss: LossSettings) -> int:
    """Optimizer steps of a run: `iters`, or as many as `epochs` passes over the harmful prompts take."""
    if train.iters is not None:
        return train.iters
    return max(
        1,
        math.ceil(train.epochs * n_harmful / (harmful_per_batch(train, loss) * train.grad_accumulation_steps)),
    )


@dataclass(frozen=True)
class Learning:
    """What is to be learned: base's and target's probabilities of the safety tokens, and of all others together, where
    answers to validation prompts begin (N, K + 1); and how far the student was after each step so far."""

    prompts: Sequence[Ids]
    tokens: np.ndarray
    base: np.ndarray
    teacher: np.ndarray
    shares: Sequence[float | None] = ()

    def share(self, student: np.ndarray) -> float:
        """How much of the base's divergence from the target is gone: 1 − KL(πs ‖ πt) / KL(π0 ‖ πt), of (N, K + 1).

        Where the student went past the target, on the way from the base, it counts as there; where the base is the
        target, on harmless prompts, all that it moved counts against it.
        """
        whole = _grouped(self.base, self.teacher)
        past = (student - self.teacher) * (self.teacher - self.base) > 0
        return 1 - _grouped(np.where(past, self.teacher, student), self.teacher) / whole if whole > 1e-6 else 0.0


def _grouped(p: np.ndarray, q: np.ndarray) -> float:
    """Mean KL(p ‖ q) over rows, also of p that do not sum to one: Σ p log(p/q) − p + q, never negative."""
    p, q = np.maximum(p, 1e-30), np.maximum(q, 1e-30)
    return float((p * np.log(p / q) - p + q).sum(-1).mean())


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
    has; else its rate falls from `steps` on, to twice the steps. Every other is a cosine over `steps`, as published.
    """
    warm = math.ceil(train.warmup * steps) if steps > 1 else 0
    if learning is None or not train.until_learned or train.iters is not None:
        return Course(steps, warm, warm)
    longest = Course(2 * steps, warm, steps)
    fall, row = math.ceil(FALL * steps), 0
    for step, share in enumerate(learning.shares, start=1):
        if share is not None:
            row = row + 1 if share >= LEARNED else 0
        if row == 2 and step + fall < longest.steps:
            return Course(step + fall, warm, step, longest.rate(step, 1.0))
    return longest


def _passes(n: int, seed: int, which: int) -> Iterator[int]:
    """Indices below n without end: one shuffled pass after another."""
    epoch = 0
    while True:
        yield from np.random.default_rng([seed, which, epoch]).permutation(n).tolist()
        epoch += 1


def _position_weights(lengths: Sequence[int], rollouts: int, skip: int, keep: int) -> np.ndarray:
    """What each answer position counts in the step's loss, answer after answer: m[n,t] / T_n / rollouts, (R,)."""
    mask = mx.array([[float(t < length) for t in range(max(lengths))] for length in lengths])
    kept = np.array(kept_positions(mask, skip, keep))
    weights = kept / np.maximum(kept.sum(1, keepdims=True), 1.0) / rollouts
    return weights[np.array(mask) > 0].astype(np.float32)


@dataclass(frozen=True)
class Target:
    """What the student is pulled to on some positions of a micro-batch's answers, which `rows` counts.

    `hidden` (R, D) are the target's states there, `weights` (R,) what each position counts, `shift` (R,) or None
    guidance's, `options` the divergence's.
    """

    rows: np.ndarray
    hidden: mx.array
    head: Head
    weights: np.ndarray
    options: dict[str, Any]
    shift: mx.array | None = None


Trunk = tuple[int, mx.array] | None  # a block and its input (B, T, D), the same for student and target


def _trunk(base: nn.Module, layer: int, prompts: Sequence[Ids], answers: Sequence[Ids]) -> Trunk:
    """What goes into block `layer`; None if the student differs from its target from the first block on."""
    if layer == 0:
        return None
    return layer, block_inputs(base, pad_right([[*p, *a] for p, a in zip(prompts, answers, strict=True)]))[layer]


def _after(trunk: Trunk, model: nn.Module) -> nn.Module:
    """`model`, beginning behind the trunk."""
    return model if trunk is None else resume(model, *trunk)


def divergence_options(loss: LossSettings, tokens: mx.array) -> dict[str, Any]:
    """The arguments of `token_divergence` that the settings ask for."""
    return {
        "tokens": tokens if loss.subset == "safety" else None,
        "top_k": loss.top_k if loss.subset == "top_k" else None,
        "kind": loss.loss,
        "mix": loss.mix if loss.loss == "mixture" else None,
        "renormalize": loss.renormalize,
    }


def train(
    student: nn.Module,
    base: nn.Module,
    teacher: Teacher,
    tokens: mx.array,
    harmful: Sequence[TrainingPrompt],
    harmless: Sequence[TrainingPrompt],
    settings: TrainSettings,
    loss: LossSettings,
    *,
    eos_ids: Ids,
    seed: int,
    optimizer: optim.Optimizer,
    learning: Learning | None = None,
    first_step: int = 0,
    drawn_before: Rollouts | None = None,
    generation_batch_size: int = 32,
    after_step: Callable[[int], tuple[Teacher, mx.array | None] | None] = lambda step: None,
) -> Iterator[Rollouts | StepMetrics]:
    """Train `student` in place: each step yields its rollouts and, once they are learned from, its metrics.

    Args:
        tokens: (K,) the safety tokens.
        harmless: the anchor's prompts; unused when `loss.anchor` is 0.
        optimizer: `make_optimizer`'s, or one with the state of a run that goes on.
        learning: what tells how much has been learned, in the steps done before too; None measures nothing, and the
            run has the steps that the settings say.
        first_step: steps done before, by a run that goes on; student and optimizer are as they left them.
        drawn_before: the rollouts of the first step, if they were drawn already.
        after_step: called after each update; may return the teacher, and new tokens or None, for the steps that follow.

    Raises:
        NotFiniteError: the loss or its gradient is not finite; the student is as before the step.
    """
    nominal = number_of_steps(len(harmful), settings, loss)
    per_batch = harmful_per_batch(settings, loss)
    anchors = settings.batch_size - per_batch if loss.anchor and harmless else 0
    order_h, order_b = _passes(len(harmful), seed, 0), _passes(max(1, len(harmless)), seed, 1)
    skipped = first_step * settings.grad_accumulation_steps
    for order, each in ((order_h, per_batch), (order_b, anchors)):
        next(islice(order, skipped * each, skipped * each), None)
    options, guidance = divergence_options(loss, tokens), float(loss.guidance)
    first_trained = first_trained_block(student)
    can_resume = first_trained > 0 and resumes(base, pad_right([harmful[0].ids]))

    def objective(model, batch, answers, trunk, targets: list[Target]):
        hidden = answer_states(_after(trunk, model), [p.ids for p in batch], answers)
        found = [
            localized_loss(
                hidden if len(t.rows) == len(hidden) else hidden[mx.array(t.rows)],
                t.hidden,
                head(model),
                t.head,
                mx.array(t.weights),
                watched=tokens,
                temp=settings.temp,
                shift=t.shift,
                **t.options,
            )
            for t in targets
        ]
        return sum(value for value, *_ in found), [each for _, each, _ in found], found[0][2]

    def targets_of(part: list[TrainingPrompt], done: list[list[int]], trunk: Trunk, of: nn.Module, n: int):
        """The opening's target, `of`, and the tail's, the base; `n` rollouts are in the batch."""
        lengths, seen = [len(ids) for ids in done], [p.target_ids for p in part]
        place = np.concatenate([np.arange(length) for length in lengths])
        hidden = answer_states(_after(trunk, of), seen, done)
        weights = _position_weights(lengths, n, loss.skip, loss.keep)
        guided = of is not base and guidance > 1
        tail = np.flatnonzero(place >= loss.keep) if loss.keep and loss.tail else np.zeros(0, np.int64)
        opening = np.arange(len(place)) if not len(tail) else np.flatnonzero(place < loss.keep)
        by_base = hidden
        if of is not base and (guided or len(tail)):
            by_base = answer_states(_after(trunk, base), [p.ids for p in part], done)
        mx.async_eval(hidden, by_base)  # computed while the graph of the student is built
        first, shift = hidden[mx.array(opening)], None
        if guided:
            both = (
                safety_log_odds(states, head(model), tokens, temp=settings.temp)
                for states, model in ((first, of), (by_base[mx.array(opening)], base))
            )
            shift = guidance_shift(*both, guidance, mx.array(place[opening] == 0))
        found = [Target(opening, first, head(of), weights[opening], options, shift)]
        if len(tail):
            held = _position_weights(lengths, n, loss.keep, loss.keep + loss.tail)[tail]
            found.append(Target(tail, by_base[mx.array(tail)], head(base), held, FULL))
        return found

    loss_and_grad = nn.value_and_grad(student, objective)

    def gradients(
        step: int, teacher: Teacher, batch: list[TrainingPrompt], rollouts: list[Completion], size: int
    ) -> tuple[Any, np.ndarray, np.ndarray]:
        """Of the whole batch, `size` completions at a time: the gradient, and each completion's loss (B,) and mass on
        the safety tokens at its beginning, under student and target (2, B)."""
        # Rows of like length and target share a pass; the order changes no mathematics.
        order = sorted(range(len(batch)), key=lambda i: (batch[i].harmful, len(batch[i].ids) + len(rollouts[i].ids), i))
        mx.random.seed(seed ^ (step + 1) << 32)  # for LoRA's dropout: each step its own, resumed or not
        grads, losses, masses = None, np.zeros(len(batch)), np.zeros((2, len(batch)))
        for kind in (True, False):
            of_kind = [i for i in order if batch[i].harmful is kind]
            for start in range(0, len(of_kind), size):
                index = of_kind[start : start + size]
                part = [batch[i] for i in index]
                done = [rollouts[i].ids for i in index]
                lengths = [len(ids) for ids in done]
                source, alike = (teacher.model, teacher.shared_blocks) if kind else (base, first_trained)
                trunk = _trunk(base, min(alike, first_trained) if can_resume else 0, [p.ids for p in part], done)
                targets = targets_of(part, done, trunk, source, len(batch))
                (_, each, mass), grad = loss_and_grad(student, part, done, trunk, targets)
                grads = grad if grads is None else tree_map(mx.add, grads, grad)
                mx.eval(each, mass, grads)  # frees this micro-batch's graph before the next is built
                weighted = np.zeros(sum(lengths))
                for target, values in zip(targets, each, strict=True):
                    weighted[target.rows] = np.array(values) * target.weights
                first = np.cumsum([0, *lengths[:-1]])
                losses[index] = np.add.reduceat(weighted, first) * len(batch)
                masses[:, index] = np.array(mass)[:, np.searchsorted(targets[0].rows, first)]
        return grads, losses, masses

    micro_batch_size = settings.micro_batch_size
    step = first_step
    while step < (now := course(nominal, settings, learning)).steps:
        drawn = [
            prompt
            for _ in range(settings.grad_accumulation_steps)
            for prompt in (
                *(harmful[next(order_h)] for _ in range(per_batch)),
                *(harmless[next(order_b)] for _ in range(anchors)),
            )
        ]
        batch = [prompt for prompt in drawn for _ in range(settings.samples)]
        if drawn_before is not None and drawn_before.step == step + 1:
            rollouts = drawn_before.completions
        else:
            rollouts = generate(
                student,
                [p.ids for p in batch],
                eos_ids=eos_ids,
                max_tokens=rollout_tokens(settings, loss),
                temp=settings.temp,
                top_p=settings.top_p,
                keys=[stream_key(seed, 1, step, i) for i in range(len(batch))],
                batch_size=generation_batch_size,
            )
            yield Rollouts(step + 1, rollouts)
        student.train()
        work = partial(gradients, step, teacher, batch, rollouts)
        (grads, losses, masses), micro_batch_size = halving(micro_batch_size, work, "training")
        student.eval()
        grads, norm = optim.clip_grad_norm(grads, settings.max_grad_norm)
        if not (np.isfinite(losses).all() and math.isfinite(norm.item())):
            worst = int(np.argmax(~np.isfinite(losses)))
            raise NotFiniteError(
                f"loss or gradient is not finite at step {step + 1} (prompt {worst} of its batch); the step was not "
                f"applied; lower the learning rate (now {settings.learning_rate:g})"
            )
        optimizer.learning_rate = now.rate(step, settings.learning_rate)
        optimizer.update(student, grads)
        mx.eval(student.trainable_parameters(), optimizer.state)
        if (changed := after_step(step + 1)) is not None:
            teacher, found = changed
            tokens = tokens if found is None else found
            options = divergence_options(loss, tokens)
        learned = math.nan
        if learning is not None:
            if (step + 1) % MEASURED_EVERY == 0:
                learned = learning.share(
                    openings(student, learning.prompts, learning.tokens, settings.micro_batch_size)
                )
            learning = replace(learning, shares=[*learning.shares, None if math.isnan(learned) else learned])
        is_harmful = np.array([p.harmful for p in batch])
        yield StepMetrics(
            step + 1,
            course(nominal, settings, learning).steps,
            float(losses.mean()),
            float(losses[is_harmful].mean()),
            float(losses[~is_harmful].mean()) if anchors else math.nan,
            float(masses[0, is_harmful].mean()),
            float(masses[1, is_harmful].mean()),
            norm.item(),
            now.rate(step, settings.learning_rate),
            sum(len(r.ids) for r in rollouts),
            float(np.mean([not r.finished for r in rollouts])),
            learned,
        )
        step += 1


def trained_change(student: nn.Module, before: dict[str, mx.array]) -> float:
    """The largest change of any trained weight since `before`."""
    now = dict(tree_flatten(student.trainable_parameters()))
    return max(mx.abs(now[name] - value).max().item() for name, value in before.items())
