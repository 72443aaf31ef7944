"""Stage 4: localized on-policy distillation (method page, 4), a generator of step metrics.

    loss = mean over rollouts of (1/T_n) Σ_t m[n,t] D(πs, target)[n,t] on the safety tokens

Every step the student answers prompts itself. On harmful prompts the target is the safety teacher; on
the anchor's harmless prompts, a share of each batch, it is the base, or what refuses somewhat less than the base (ours:
it ends over-refusal). The caller logs and saves. Where we deviate:

- `first_tokens` and `tail`: only the first positions of an answer, which decide whether it refuses, are the teacher's;
  on the `tail` positions after them the target is the base on the whole vocabulary, so that what follows a refusal's
  first words stays as it was. `guidance` and `anchor_margin` are explained in `losses`.
- `until_learned`: the run is as long as the model needs (`learning.course`).
- `prefill_ratio` and `wrap_ratio`: a prompt that is refused may be answered once the answer has begun, or in a frame. A
  share of the prompts, harmful and harmless, comes with an affirmative opening, ours or the base's own, from which the
  student goes on, another in a frame (a story, a role) or below a system prompt. There a harmful one is pulled to what
  the teacher says to the prompt as it is, a harmless one to what the base says within the frame. (The teacher itself,
  asked behind the opening, goes on with it: measured, docs/attacks.md.)
- `keep_best`, off by default: what the student makes of harmless prompts goes up and down while it trains, far more
  than what it makes of harmful ones, so the run ends with the weights of the measured step that was worth most
  (`Learning.worth`).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby, islice, pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..recipe import LossSettings, TrainSettings, harmful_per_batch, number_of_steps, rollout_tokens
from ..system import machines
from ..system.finished import SavedStep, Step
from ..system.machines import LostMachineError
from ..system.memory import PagingError, with_smaller_batches
from ..system.screen import UserError
from ..system.store import encoded
from .direction import FoundDirections, mean_differences
from .framing import Framer
from .judge import is_refusal
from .known_prompts import known_prompts
from .learning import Learning, best_step, course
from .losses import (
    Divergence,
    Scored,
    easing_shift,
    guidance_shift,
    kept_window,
    localized_loss,
    may_decide,
    safety_log_odds,
)
from .residual import (
    Trunk,
    answer_states,
    as_in_a_gradient,
    block_inputs,
    head,
    hidden_states,
    pad_right,
    resume,
    resumes,
)
from .rollout import Completion, Ids, Sampling, generate, stream_key
from .run import REFUSAL_TOKENS, Run
from .safety_tokens import SafetyTokens, find_tokens
from .student import bytes_trained, first_trained_block, row_dropouts, save_student
from .teacher import ChosenTeacher, Teacher, ema_update, moving_average, steered_teacher
from .training_prompts import TrainingPrompt, make_framer

FIRST_STEPS, NO_GRADIENT = 3, 1e-4  # after so many steps a norm below this teaches nothing
LOSS_SCALE = 1024.0  # of what float16 holds nothing is smaller than 6e-8, and most of the anchor's gradient is
LOST = 3e-5  # half of what lies between two bfloat16 weights near 0.01: a smaller step mostly leaves them as they are
COLLAPSE_PROMPTS = 16  # harmless prompts that tell a collapse
MEASURED_EVERY = 3  # steps


class NotFiniteError(UserError):
    """A loss or gradient that is NaN or infinite; the step was not applied."""


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
    worth: float  # refusals on harmful validation prompts, less what they rose on harmless ones; NaN if not measured


@dataclass(frozen=True)
class Rollouts:
    """What the student answered in a step, before it learns from it."""

    step: int
    completions: list[Completion]

    def fits(self, step: int, count: int, most: int) -> bool:
        """Whether they are of this step, so many and no longer."""
        return (self.step, len(self.completions)) == (step, count) and all(len(c.ids) <= most for c in self.completions)


def make_optimizer(train: TrainSettings) -> optim.Optimizer:
    """AdamW; `train` sets its rate step by step. Where all weights are trained, as published, its moments are corrected
    for beginning at zero, as torch's are; LoRA's rate was found without, where the first steps are larger."""
    corrected = train.fine_tune_type == "full"
    return optim.AdamW(train.learning_rate, weight_decay=train.weight_decay, bias_correction=corrected)


def read_at_once(train: TrainSettings, prompts: Sequence[Ids]) -> int:
    """How many prompts are read at a time where completions are trained on."""
    if train.micro_batch_tokens is None:
        return train.micro_batch_size
    return max(1, min(train.micro_batch_size, train.micro_batch_tokens // max(map(len, prompts))))


def _passes(n: int, seed: int, which: int) -> Iterator[int]:
    """Indices below n without end: one shuffled pass after another."""
    epoch = 0
    while True:
        yield from np.random.default_rng([seed, which, epoch]).permutation(n).tolist()
        epoch += 1


def _position_weights(lengths: Sequence[int], rollouts: int, skip: int, keep: int) -> np.ndarray:
    """What each answer position counts in the step's loss, answer after answer: m[n,t] / T_n / rollouts, (R,)."""
    # In numpy: what MLX computed would have to be waited for.
    there = np.arange(max(lengths)) < np.array(lengths)[:, None]
    weights = (there & kept_window(max(lengths), skip, keep)).astype(np.float32)
    return (weights / np.maximum(weights.sum(1, keepdims=True), 1.0) / rollouts)[there].astype(np.float32)


def micro_batches(lengths: Sequence[int], rows: int, tokens: int | None = None) -> list[slice]:
    """Cuts completions, the shortest first, into pieces that share a pass: of at most so many `rows` and, padding
    included, `tokens`; one that is longer than that stands alone. Short ones go together where long ones cannot."""
    starts = [0]
    for at, length in enumerate(lengths):  # the longest of its piece so far
        before = at - starts[-1]
        if before and (before == rows or (tokens is not None and (before + 1) * length > tokens)):
            starts.append(at)
    return [slice(*ends) for ends in pairwise([*starts, len(lengths)])]


@dataclass(frozen=True)
class Target:
    """What the student is pulled to on some positions of a micro-batch's answers, which `rows` counts; `weights` (R,)
    is what each position counts."""

    rows: np.ndarray
    scored: Scored
    weights: np.ndarray
    divergence: Divergence


def shared_prefix(base: nn.Module, layer: int, prompts: Sequence[Ids], answers: Sequence[Ids]) -> Trunk:
    """What goes into block `layer`; None if the student differs from its target from the first block on."""
    if layer == 0:
        return None
    return layer, block_inputs(base, pad_right([[*p, *a] for p, a in zip(prompts, answers, strict=True)]))[layer]


def _after(trunk: Trunk, model: nn.Module) -> nn.Module:
    """`model`, beginning behind the trunk."""
    return model if trunk is None else resume(model, *trunk)


@dataclass
class Training:
    """What training reads. `teacher` and `tokens` (K,) may be exchanged between steps, by a teacher that moves.

    `harmless` are the anchor's prompts, unused when `loss.anchor_ratio` is 0; `optimizer` is `make_optimizer`'s, or one
    with the state of a run that goes on; `framer` puts some of the prompts otherwise; `learning` tells how much has
    been learned, in the steps done before too: None measures nothing, and the run has the steps that the settings say;
    `refusing` are the safety tokens that the anchor's target is to open fewer answers with, if any.
    """

    student: nn.Module
    base: nn.Module
    teacher: Teacher
    tokens: mx.array
    harmful: Sequence[TrainingPrompt]
    harmless: Sequence[TrainingPrompt]
    settings: TrainSettings
    loss: LossSettings
    eos_ids: Ids
    seed: int
    optimizer: optim.Optimizer
    learning: Learning | None = None
    generation_batch_size: int = 32
    framer: Framer | None = None
    turns_late: bool = False
    refusing: mx.array | None = None


def train(
    training: Training, first_step: int = 0, drawn_before: Rollouts | None = None
) -> Iterator[Rollouts | StepMetrics]:
    """Train the student in place: each step yields its rollouts and, once they are learned from, its metrics.

    Args:
        first_step: steps done before, by a run that goes on; student and optimizer are as they left them.
        drawn_before: the rollouts of the first step, if they were drawn already.

    Raises:
        NotFiniteError: the loss or its gradient is not finite; the student is as before the step.
    """
    student, base, seed = training.student, training.base, training.seed
    settings, loss = training.settings, training.loss
    harmful, harmless, learning = training.harmful, training.harmless, training.learning
    nominal = number_of_steps(len(harmful), settings, loss)
    per_batch = harmful_per_batch(settings, loss)
    anchors = settings.batch_size - per_batch if loss.anchor_ratio and harmless else 0
    order_h, order_b = _passes(len(harmful), seed, 0), _passes(max(1, len(harmless)), seed, 1)
    skipped = first_step * settings.grad_accumulation_steps
    for order, each in ((order_h, per_batch), (order_b, anchors)):
        next(islice(order, skipped * each, skipped * each), None)
    guidance = float(loss.guidance)
    first_trained = first_trained_block(student)
    dropouts = row_dropouts(student)
    can_resume = first_trained > 0 and resumes(base, pad_right([harmful[0].ids]))
    known = None
    if anchors and settings.anchor_cache == "on":
        again = [harmless[i].ids for i in islice(_passes(len(harmless), seed, 1), len(harmless))]
        known = known_prompts(base, again, first_trained if can_resume else 0, read_at_once(settings, again))
    scale = LOSS_SCALE if hidden_states(base, pad_right([[0]])).dtype == mx.float16 else 1.0

    def objective(model, batch, answers, trunk, targets: list[Target]):
        hidden = answer_states(_after(trunk, model), [p.ids for p in batch], answers)
        own = head(model)
        parts = [
            localized_loss(
                Scored(hidden if len(t.rows) == len(hidden) else hidden[mx.array(t.rows)], own),
                t.scored,
                mx.array(t.weights) * scale,
                training.tokens,
                t.divergence,
                settings.temp,
            )
            for t in targets
        ]
        return sum(value for value, *_ in parts), [each for _, each, _ in parts], parts[0][2]

    def targets_of(
        part: list[TrainingPrompt], answers: list[list[int]], trunk: Trunk, of: nn.Module, hidden: mx.array, n: int
    ):
        """The opening's target, `of`, which has states `hidden` (R, D), and the tail's, the base; `n` rollouts are in
        the batch."""
        lengths = [len(ids) for ids in answers]
        place = np.concatenate([np.arange(length) for length in lengths])
        weights = _position_weights(lengths, n, loss.skip_first, loss.first_tokens)
        pulled = part[0].harmful  # away from the base: told by the prompts, since a system-prompt teacher's model is it
        guided = pulled and guidance > 1
        tail = np.flatnonzero(place >= loss.first_tokens) if loss.first_tokens and loss.tail else np.zeros(0, np.int64)
        opening = np.arange(len(place)) if not len(tail) else np.flatnonzero(place < loss.first_tokens)
        by_base = hidden
        if pulled and (guided or len(tail)):
            rows = [p.ids if p.plain is None else p.plain for p in part]
            by_base = as_in_a_gradient(answer_states, _after(trunk, base), rows, answers)
        mx.async_eval(hidden, by_base)  # computed while the graph of the student is built
        first, shift = hidden[mx.array(opening)], None
        if guided:
            its, own = (
                safety_log_odds(states, head(model), training.tokens, temp=settings.temp)
                for states, model in ((first, of), (by_base[mx.array(opening)], base))
            )
            shift = guidance_shift(its, own, guidance, may_decide(its, place[opening], training.turns_late))
        shifted = training.refusing
        if not pulled and shifted is not None:
            own = safety_log_odds(first, head(of), shifted, temp=settings.temp)
            shift = easing_shift(own, loss.anchor_margin, may_decide(own, place[opening], training.turns_late))
        divergence = Divergence.of(loss, training.tokens)
        scored = Scored(first, head(of), shift, None if pulled else shifted)
        targets = [Target(opening, scored, weights[opening], divergence)]
        if len(tail):
            weights = _position_weights(lengths, n, loss.first_tokens, loss.first_tokens + loss.tail)[tail]
            targets.append(Target(tail, Scored(by_base[mx.array(tail)], head(base)), weights, Divergence()))
        return targets

    loss_and_grad = nn.value_and_grad(student, objective)  # pyright: ignore[reportPrivateImportUsage]

    def gradients(
        step: int, batch: list[TrainingPrompt], rollouts: list[Completion], size: int
    ) -> tuple[Any, np.ndarray, np.ndarray]:
        """Of this machine's part of the batch, `size` completions at a time: the gradient, and each completion's loss
        (B,) and mass on the safety tokens at its beginning, under student and target (2, B); 0 for the others'."""
        # Rows of one target, which reads what they read, or does not, or has read it before, and of like length share a
        # pass; the order changes no mathematics.
        length = [len(p.ids) + len(r.ids) for p, r in zip(batch, rollouts, strict=True)]
        kinds = [(not p.harmful, p.framed, not p.harmful and known is not None and p.ids in known) for p in batch]
        order = sorted(range(len(batch)), key=lambda i: (kinds[i], length[i]))
        order = order[of.rank :: of.size]
        tokens = settings.micro_batch_tokens and settings.micro_batch_tokens * size // settings.micro_batch_size
        grads, losses, masses = None, np.zeros(len(batch)), np.zeros((2, len(batch)))
        for (harmless_ones, in_frame, read_before), group in groupby(order, kinds.__getitem__):
            of_kind = list(group)
            for piece in micro_batches([length[i] for i in of_kind], size, tokens):
                index = of_kind[piece]
                part = [batch[i] for i in index]
                answers = [rollouts[i].ids for i in index]
                lengths = [len(ids) for ids in answers]
                teacher = Teacher(base, shared_blocks=first_trained) if harmless_ones else training.teacher
                prompts = [p.ids for p in part]
                if read_before and known is not None:
                    trunk, hidden = as_in_a_gradient(known.read, prompts, answers)
                else:
                    layer = min(teacher.shared_blocks, first_trained) if can_resume and not in_frame else 0
                    trunk, targeted = shared_prefix(base, layer, prompts, answers), [p.target_ids for p in part]
                    hidden = as_in_a_gradient(answer_states, _after(trunk, teacher.model), targeted, answers)
                targets = targets_of(part, answers, trunk, teacher.model, hidden, len(batch))
                for dropout in dropouts:
                    dropout.draw_from(mx.stack([stream_key(seed, 17, step, i) for i in index]))
                try:
                    (_, each, mass), grad = loss_and_grad(student, part, answers, trunk, targets)
                except ValueError as error:
                    if "VJP" not in str(error):
                        raise
                    raise UserError(f"MLX has no gradient for this architecture ({error}); choose another") from None
                grads = grad if grads is None else tree_map(mx.add, grads, grad)
                mx.eval(each, mass, grads)  # frees this micro-batch's graph before the next is built
                weighted = np.zeros(sum(lengths))
                for target, values in zip(targets, each, strict=True):
                    weighted[target.rows] = np.array(values) * target.weights
                first = np.cumsum([0, *lengths[:-1]])
                losses[index] = np.add.reduceat(weighted, first) * len(batch)
                masses[:, index] = np.array(mass)[:, np.searchsorted(targets[0].rows, first)]
        if grads is None:  # fewer rows than machines
            grads = tree_map(mx.zeros_like, student.trainable_parameters())
        return (grads if scale == 1.0 else tree_map(lambda grad: grad / scale, grads)), losses, masses

    of = machines.here()
    micro_batch_size, size = settings.micro_batch_size, training.generation_batch_size
    most = rollout_tokens(settings, loss)
    sampling = Sampling(training.eos_ids, most, settings.temp, settings.top_p, size)
    step = first_step
    while step < (now := course(nominal, settings, learning)).steps:
        prompts = [
            prompt
            for _ in range(settings.grad_accumulation_steps)
            for prompt in (
                *(harmful[next(order_h)] for _ in range(per_batch)),
                *(harmless[next(order_b)] for _ in range(anchors)),
            )
        ]
        if training.framer is not None:
            rng = np.random.default_rng([seed, 5, step])
            prompts = [prompt.put(training.framer, rng) for prompt in prompts]
        batch = [prompt for prompt in prompts for _ in range(settings.num_generations)]
        if drawn_before is not None and drawn_before.fits(step + 1, len(batch), settings.longest):
            rollouts = drawn_before.completions
        else:
            keys = [stream_key(seed, 1, step, i) for i in range(len(batch))]
            rollouts = generate(student, [p.ids for p in batch], sampling, keys)
            yield Rollouts(step + 1, rollouts)
        student.train()
        work = partial(gradients, step, batch, rollouts)
        (grads, losses, masses), micro_batch_size = with_smaller_batches(micro_batch_size, work, "training")
        student.eval()
        grads = of.total(grads)
        losses, masses = (np.sum(of.gather(own.tolist()), axis=0) for own in (losses, masses))
        grads, clipped = optim.clip_grad_norm(grads, settings.max_grad_norm)
        if not (np.isfinite(losses).all() and math.isfinite(norm := clipped.item())):
            worst = int(np.argmax(~np.isfinite(losses)))
            raise NotFiniteError(
                f"loss or gradient is not finite at step {step + 1} (prompt {worst} of its batch); the step was not "
                f"applied; lower the learning rate (now {settings.learning_rate:g})"
            )
        training.optimizer.learning_rate = now.rate(step, settings.learning_rate)
        training.optimizer.update(student, grads)
        mx.eval(student.trainable_parameters(), training.optimizer.state)
        learned = worth = math.nan
        if learning is not None:
            if (step + 1) % MEASURED_EVERY == 0 or step + 1 == now.steps:
                learned, worth = learning.measure(student, read_at_once(settings, learning.prompts))
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
            norm,
            now.rate(step, settings.learning_rate),
            sum(len(r.ids) for r in rollouts),
            float(np.mean([not r.finished for r in rollouts])),
            learned,
            worth,
        )
        step += 1


class MovingTeacher:
    """The moving-average teacher (method page, 2, variant a): follows the student after each step, and finds
    direction and tokens anew if the recipe says so. `state` is all that a run needs to go on."""

    def __init__(self, run: Run, student: nn.Module, directions: FoundDirections, choice: ChosenTeacher):
        self._run, self._student, self._directions = run, student, directions
        self._direction, self._coeff, self._vector = choice.direction, choice.coeff, choice.direction.vector
        self._prompts_only, self._model, self.tokens = choice.prompts_only, moving_average(student), None

    @property
    def teacher(self) -> Teacher:
        """The teacher as it is now."""
        return steered_teacher(self._model, self._direction.layer, self._vector, self._coeff, self._prompts_only)

    def move(self, step: int) -> None:
        """Follow the student after a step."""
        settings, size = self._run.recipe.teacher, self._run.recipe.run.prompt_batch_size
        ema_update(self._model, self._student, settings.ema_rate)
        if settings.refresh_every and step % settings.refresh_every == 0:
            rows = self._directions.harmful_train, self._directions.harmless_train
            work = partial(mean_differences, self._model, *rows, -self._direction.position)
            new, _ = with_smaller_batches(size, work, "the search for the direction", together=True)
            self._vector = mx.array(new[0, self._direction.layer].astype(np.float32))
            self.tokens = mx.array(find_tokens(self._run, self.teacher, self._directions).ids)

    def state(self) -> dict[str, mx.array]:
        """Trained weights, direction and, once found anew, tokens."""
        names = dict(tree_flatten(self._student.trainable_parameters()))
        weights = {f"model.{name}": w for name, w in tree_flatten(self._model.parameters()) if name in names}
        return {**weights, "vector": self._vector, **({} if self.tokens is None else {"tokens": self.tokens})}

    def restore(self, state: dict[str, mx.array]) -> None:
        """Take up a state."""
        self._model.update(tree_unflatten(_part(state, "model")))
        self._vector, self.tokens = state["vector"], state.get("tokens")


def collapsed(run: Run, student: nn.Module) -> str | None:
    """What is wrong with a student that refuses everything or says nothing, told by harmless validation prompts."""
    rows = run.prompts.harmless_validation[:COLLAPSE_PROMPTS]
    texts = [text for _, text in run.answers(student, rows, run.sampling(REFUSAL_TOKENS))]
    refused, empty = sum(is_refusal(text, run.refusals) for text in texts), sum(not text.strip() for text in texts)
    if refused >= 0.9 * len(rows):
        return f"the student refuses {refused} of {len(rows)} harmless prompts"
    if empty >= 0.5 * len(rows):
        own = run.answers(run.base.model, rows, run.sampling(REFUSAL_TOKENS))
        empty -= sum(not text.strip() for _, text in own)  # a thought that is cut leaves an empty answer too
    if empty >= 0.5 * len(rows):
        return f"the student gives {empty} empty answers to {len(rows)} harmless prompts"
    return None


def check_space(run: Run, student: nn.Module, prompts: tuple[list[TrainingPrompt], list[TrainingPrompt]]) -> None:
    """Refuse to begin a run whose states, and steps kept for `--select-checkpoint`, will not fit on the disk.

    Raises:
        UserError: as `Store.check_space`.
    """
    settings = run.recipe.train
    steps = number_of_steps(len(prompts[0]), settings, run.recipe.loss)
    if settings.until_learned and settings.iters is None:
        steps *= 2
    run.store.check_space(
        bytes_trained(student), -(-steps // settings.save_every) if run.recipe.run.select_checkpoint else 0
    )


def make_training(
    run: Run,
    student: nn.Module,
    teacher: Teacher,
    tokens: SafetyTokens,
    prompts: tuple[list[TrainingPrompt], list[TrainingPrompt]],
    learning: Learning | None,
) -> Training:
    """What training reads, with a fresh optimizer."""
    recipe, base = run.recipe, run.base
    _tell_what_is_lost(run, student)
    if recipe.train.keep_best and learning is None:
        run.screen.line(
            "--keep-best does nothing here: with this teacher, or so little to learn, nothing tells the best step, and "
            "the last one is kept"
        )
    return Training(
        student,
        base.model,
        teacher,
        mx.array(tokens.ids),
        *prompts,
        recipe.train,
        recipe.loss,
        base.eos_ids,
        recipe.run.seed,
        make_optimizer(recipe.train),
        learning,
        recipe.run.generation_batch_size,
        make_framer(run, prompts),
        base.turns_late,
        mx.array(tokens.refusing) if tokens.refusing else None,
    )


def _tell_what_is_lost(run: Run, student: nn.Module) -> None:
    """Say that half precision rounds updates away, if it does: LoRA's weights are float32."""
    rate, half = run.recipe.train.learning_rate, (mx.bfloat16, mx.float16)
    if rate < LOST and any(w.dtype in half for _, w in tree_flatten(student.trainable_parameters())):  # pyright: ignore
        run.screen.line(
            f"learning_rate = {rate:g} is small for weights in half precision, where most of its updates are rounded "
            "away; a model in float32 keeps them, and so does --fine-tune-type lora"
        )


@dataclass(frozen=True)
class TrainingLog:
    """Each step's metrics, the seconds it took, and the scores of saved steps, if they were asked for."""

    metrics: list[Step]
    seconds: list[float]
    scored: list[SavedStep]


def _part(arrays: Mapping[str, mx.array], name: str) -> dict[str, mx.array]:
    """Those of a state's arrays that belong to one of its parts, as they are called there."""
    return {key.removeprefix(f"{name}."): w for key, w in arrays.items() if key.startswith(f"{name}.")}


def train_student(
    run: Run,
    training: Training,
    moving: MovingTeacher | None = None,
    score: Callable[[int], SavedStep] | None = None,
    tell: Callable[[Step], None] = lambda row: None,
) -> TrainingLog:
    """Train the student to the end, from where the run's store left it, and keep its adapters; `score` is asked about
    the student as it is after each saved step, `tell` hears of each step.

    Raises:
        UserError: the first step moved nothing, the first few had no gradient to speak of (unless the run is forced),
            or a loss is not finite; the last good state is kept.
        KeyboardInterrupt: after keeping the last state.
    """
    settings, student, store, screen = run.recipe.train, training.student, run.store, run.screen
    nominal = number_of_steps(len(training.harmful), settings, run.recipe.loss)
    log, step = TrainingLog([], [], []), 0
    best: dict[str, mx.array] = {}  # the weights of the best step so far

    def state() -> dict[str, mx.array]:
        parts = {"student": student.trainable_parameters(), "optimizer": training.optimizer.state, "best": best}
        return dict(tree_flatten(parts | ({} if moving is None else {"teacher": moving.state()})))  # pyright: ignore

    def follow_teacher() -> None:
        if moving is not None:
            training.teacher = moving.teacher
            training.tokens = training.tokens if moving.tokens is None else moving.tokens

    def keep() -> None:
        # An interrupt may have come after a step's row, before its state was taken.
        rows = {"metrics": log.metrics[:step], "seconds": log.seconds[:step]}
        store.save(step, last, asdict(log) | rows)
        student.update(tree_unflatten(_part(last, "student")))  # which may be a step ahead, where it was stopped
        save_student(run, student)
        if (fault := collapsed(run, student)) is not None:
            screen.line(f"step {step}: {fault}; lower --learning-rate or --epochs, or raise --anchor-ratio")

    def due() -> bool:
        return step > 0 and (step % settings.save_every == 0 or step == total)

    def score_once() -> None:
        if score is not None and due() and all(row["step"] != step for row in log.scored):
            log.scored.append(score(step))

    training.optimizer.init(student.trainable_parameters())  # as its first step does; a state holds as much
    last = state()
    allowed = {name.replace("student", "best", 1): w for name, w in last.items() if name.startswith("student.")}
    if (saved := store.latest(TrainingLog, last, allowed)) is not None:
        student.update(tree_unflatten(_part(saved.arrays, "student")))
        training.optimizer.state = tree_unflatten(_part(saved.arrays, "optimizer"))
        if moving is not None:
            moving.restore(_part(saved.arrays, "teacher"))
            follow_teacher()
        log, step, best = saved.data, saved.step, _part(saved.arrays, "best")
        last = state()
        if training.learning is not None:
            training.learning = replace(training.learning, shares=[row["learned"] for row in log.metrics])
    total = course(nominal, settings, training.learning).steps
    if step:
        screen.line(f"going on after step {step} of {total}")
        store.lines("metrics.jsonl", log.metrics)  # whoever watches the run sees it go on from here
    rollouts = store.found_as("rollouts", Rollouts)
    for name in store.damaged:
        screen.line(f"{store.states / name} is damaged and is not used; the state before it is")
    before = tree_flatten(student.trainable_parameters())

    began = time.monotonic()
    with screen.stage("training", is_step=True) as advance:
        try:
            score_once()  # where an interrupt left it out
            for event in train(training, step, rollouts):
                if isinstance(event, Rollouts):
                    store.keep("rollouts", encoded(event))  # where answers are not kept, the same are drawn again
                    continue
                if moving is not None:
                    moving.move(event.step)
                    follow_teacher()
                now = time.monotonic()
                log.metrics.append({k: None if v != v else v for k, v in asdict(event).items()})  # NaN is not JSON
                log.seconds.append(round(now - began, 3))
                tell(log.metrics[-1])
                if settings.keep_best and best_step(log.metrics) == event.step:
                    best = dict(tree_flatten(student.trainable_parameters()))
                began, step, total, last = now, event.step, event.steps, state()
                advance(event.step, event.steps, f"loss {event.loss:.4f}")
                if event.step == 1 and all(mx.array_equal(last[f"student.{name}"], w) for name, w in before):
                    raise UserError("the first step moved no weight; raise --learning-rate or check lora_parameters")
                if event.step == FIRST_STEPS and not run.force:
                    check_gradient([row["grad_norm"] for row in log.metrics])
                if event.step % settings.steps_per_report == 0 or event.step == event.steps:
                    mass = f"safety mass {event.student_mass:.2f} → {event.target_mass:.2f}"
                    line = f"loss {event.loss:.4f}, {mass}, gradient {event.grad_norm:.2g}"
                    screen.detail(f"step {event.step} of {event.steps}: {line}")
                    store.lines("metrics.jsonl", log.metrics)
                if due():
                    score_once()
                    keep()
        except (NotFiniteError, PagingError):
            machines.leave()
            if step:  # the last step that was applied
                keep()
            raise
        except (KeyboardInterrupt, LostMachineError) as error:
            machines.leave()  # the others do not take part in what is kept
            if not store.ours:
                raise
            if step:
                keep()
            where = f"the adapters so far are in {run.recipe.run.adapter_path}; " if step else ""
            what = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
            screen.line(f"{what} after {step} of {total} steps; {where}the same command with --yes goes on")
            raise
    kept = best_step(log.metrics)
    if settings.keep_best and kept is not None and kept < step and score is None:
        student.update(tree_unflatten(best))
        screen.line(f"step {kept} of {step} did best on validation prompts and is kept")
    return log


def check_gradient(norms: list[float]) -> None:
    """Stop a run whose first steps have nothing to learn from."""
    if max(norms) < NO_GRADIENT:
        raise UserError(
            f"the first {len(norms)} steps had no gradient to speak of (norm {max(norms):.1g}): what the safety tokens "
            "can teach, the model does already; give --loss-tokens full or other --safety-tokens (or --force)"
        )
