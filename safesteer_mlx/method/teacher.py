"""Stage 2: the safety teacher, the base with α·r added to one block's input (method page, 2).

Variants: a safety *system prompt* instead of a vector, and a teacher that follows the student by an
exponential moving average.

Where we deviate, with `coeff: auto`: direction and α are chosen together, on this model, by what the teacher does
(`choose_teacher`), since neither carries over from one model to another.

    1. Forward passes: for each direction that came out of stage 1 and each α of `coeff_grid`, the probability that an
       answer opens as a refusal, on harmful and on harmless validation prompts, and KL(π0 ‖ πt) there.
    2. Answers, at temperature 1, for the best few, and then between the grid's coefficients around the best.

In an answer the teacher writes the first `opening` tokens and the base goes on. A vector that is added at every
position soon breaks what is written under it, which the student, pulled on its own answers, does not inherit; what it
inherits is how an answer opens, and whether the base can go on from there. Where that leaves some harmful prompts
answered, it may be added at the positions of the prompt only (`_or_on_prompts_only`).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..recipe import TeacherSettings
from ..system.load import Loaded
from ..system.memory import with_smaller_batches
from ..system.screen import Advance, UserError, silent
from .direction import PROMPT_BATCH, Direction, FoundDirections, opening_probabilities
from .judge import is_broken, outcome
from .prompts import VALIDATION_PROMPTS
from .residual import last_logits, steer, view
from .rollout import AfterThought, Completion, Sampling, answer_text, generate, stream_key
from .run import Run, after_thought

Rows = Sequence[list[int]]

VALIDATION_TOKENS = 48  # of a validation answer, enough to tell a refusal
OPENING = 2  # tokens of them that are the teacher's: how an answer begins decides what it does
OPENINGS = 1, 2, 4, 7, 16, 32, 64, 128  # tokens that it may take to decide what an answer does
SOME_LEFT = 0.15  # of harmful prompts, answered: then a teacher that is steered on the prompt only is asked too
NEARLY = 0.05  # of the answers: an opening that refuses so many fewer than the best is enough
FIRST_PASSES = 16, 8  # harmful and harmless prompts of the forward passes
ENOUGH = 0.95  # of the refusals that a direction can open: the smallest coefficient that does is asked for answers
ADDS = 1 / 3  # of the refusals that a direction can add to the base's own
ASKED = 3  # directions that are asked for answers
ROUNDS = 2  # of refinement
GENTLER = 0.2  # of a refusal for each nat that harmless prompts are moved


@dataclass(frozen=True)
class Teacher:
    """`model` is what the student is pulled to; `system_prompt`, if any, is put before what it reads.

    The first `shared_blocks` blocks do on the same ids what the model's own do without steering.
    """

    model: nn.Module
    system_prompt: str | None = None
    shared_blocks: int = 0


@dataclass(frozen=True)
class Outcomes:
    """What answers to validation prompts do, in the prompts' order: refuse, comply or evade, and whether broken."""

    harmful: list[str]
    harmless: list[str]
    broken_harmful: list[bool]
    broken_harmless: list[bool]

    def __post_init__(self):
        if [*map(len, (self.harmful, self.harmless))] != [*map(len, (self.broken_harmful, self.broken_harmless))]:
            raise ValueError("answers that were not all judged")

    @property
    def refused(self) -> float:
        """Share of harmful prompts that are refused by an answer that is not broken."""
        pairs = zip(self.harmful, self.broken_harmful, strict=True)
        return sum(what == "refuse" and not broken for what, broken in pairs) / max(1, len(self.harmful))

    @property
    def over_refused(self) -> float:
        """Share of harmless prompts that are refused."""
        return self.harmless.count("refuse") / max(1, len(self.harmless))

    @property
    def broken(self) -> float:
        """Share of all answers that say nothing."""
        every = [*self.broken_harmful, *self.broken_harmless]
        return sum(every) / max(1, len(every))


@dataclass(frozen=True)
class TeacherTrial:
    """One direction and coefficient on validation prompts.

    From forward passes: the mean probability that an answer opens as a refusal, and KL(π0 ‖ πt) in nats at the first
    position of harmless answers. From answers, where they were asked for: `Outcomes`' shares.
    """

    position: int
    layer: int
    coeff: float
    harmful_opened: float | None = None
    harmless_opened: float | None = None
    kl: float | None = None
    refused: float | None = None
    over_refused: float | None = None
    broken: float | None = None

    @property
    def value(self) -> float:
        """What is to be largest: refusals among the answers, and twice their probability, which is free of chance.

        A little is taken off for what it does to harmless prompts: of two teachers alike, the gentler one.
        """
        value = (self.refused or 0.0) + 2 * (self.harmful_opened or 0.0) - GENTLER * (self.kl or 0.0)
        return value if value == value else -math.inf  # NaN: a direction that overflows half precision


@dataclass(frozen=True)
class ChosenTeacher:
    """Stage 2's result: direction and coefficient, what they were chosen from (nothing, if they were given), the base's
    and the teacher's `Outcomes`, how many tokens of an answer the teacher can write without harm, and whether it is
    steered on the prompt only."""

    direction: Direction
    coeff: float
    trials: list[TeacherTrial]
    base: Outcomes
    teacher: Outcomes
    opening: Annotated[int, "opening"]
    prompts_only: bool = False


def steered_teacher(base: nn.Module, layer: int, vector: mx.array, coeff: float, prompts_only: bool = False) -> Teacher:
    """The published teacher: frozen, α·r at every position of prompt and completion; or of the prompt only."""
    return Teacher(steer(base, layer, vector, coeff, prompts_only), shared_blocks=layer)


def ema_update(moving: nn.Module, student: nn.Module, rate: float) -> None:
    """w ← (1 − rate) w + rate · w_student over the trained weights of the moving-average teacher."""
    own = dict(tree_flatten(moving.parameters()))
    trained = tree_flatten(student.trainable_parameters())
    moving.update(tree_unflatten([(name, (1 - rate) * own[name] + rate * w) for name, w in trained]))
    mx.eval(moving.parameters())


def moving_average(student: nn.Module) -> nn.Module:
    """A frozen copy of the student for `ema_update` to move."""
    moving = view(student)
    moving.freeze()
    return moving


@dataclass(frozen=True)
class Validation:
    """What teachers are asked: validation prompts as ids, and how answers are drawn.

    `opening` tokens of an answer are the teacher's, the rest, to `max_tokens`, the base's. Prompts are read
    `prompt_batch_size` at a time, answers drawn `batch_size`. `system_prompted` are the same prompts as a system-prompt
    teacher reads them, harmful and harmless. Where answers begin alike, `undecided` are the prompts of the forward
    passes, with as much of an answer as tells nothing yet, and `least_opening` is more than that. `after` is
    `Sampling`'s, `refusals` the run's.
    """

    harmful: Rows
    harmless: Rows
    seed: int
    opening: int
    max_tokens: int
    batch_size: int
    prompt_batch_size: int = PROMPT_BATCH
    system_prompted: tuple[Rows, Rows] | None = None
    undecided: Sequence[Rows] = ()
    least_opening: int = 1
    after: AfterThought | None = None
    refusals: Collection[str] = ()


def opened_answers(base: Loaded, teacher: nn.Module, prompts: Validation) -> list[tuple[Completion, str]]:
    """Answers that `teacher` opens and the base goes on with, harmful prompts first: what it wrote, and the whole text.

    Each prompt has random streams of its own, the same for every teacher, so that two are compared on equal luck.
    """
    q = prompts
    rows = [*q.harmful, *q.harmless]
    teacher_rows = rows if q.system_prompted is None else [*q.system_prompted[0], *q.system_prompted[1]]

    def draw(model: nn.Module, rows: Rows, indices: Sequence[int], begun: int, end: int) -> list[Completion]:
        """Answers from place `begun` to `end`, in two parts, each with streams of its own."""
        keys = [stream_key(q.seed, 3, int(begun > 0), i) for i in indices]
        after = q.after and replace(q.after, begun=begun)
        how = Sampling(base.eos_ids, end - begun, 1.0, batch_size=q.batch_size, after=after)
        return generate(model, rows, how, keys)

    opening = min(q.opening, q.max_tokens)
    openings = draw(teacher, teacher_rows, range(len(rows)), 0, opening)
    answers = list(openings)
    most = [(q.after and q.after.enough(a.ids)) or q.max_tokens for a in answers]
    open_ended = [i for i, a in enumerate(answers) if not a.finished and opening < min(q.max_tokens, most[i])]
    prefixes = [[*rows[i], *answers[i].ids] for i in open_ended]
    for i, rest in zip(open_ended, draw(base.model, prefixes, open_ended, opening, q.max_tokens), strict=True):
        answers[i] = Completion([*answers[i].ids, *rest.ids], rest.finished)
    texts = [answer_text(base.tokenizer, row, a) for row, a in zip(rows, answers, strict=True)]
    return list(zip(openings, texts, strict=True))


def ask(base: Loaded, teacher: nn.Module, prompts: Validation) -> Outcomes:
    """What answers do that `teacher` opens and the base goes on with; the base's own, if it is the teacher."""
    texts, n = [text for _, text in opened_answers(base, teacher, prompts)], len(prompts.harmful)
    # An answer cut at this length is not broken for a model that says more.
    broken = [is_broken(text, True) for text in texts]
    outcomes = [outcome(text, prompts.refusals) for text in texts]
    return Outcomes(outcomes[:n], outcomes[n:], broken[:n], broken[n:])


def choose_teacher(
    base: Loaded,
    directions: Sequence[Direction],
    refusal_ids: Sequence[int],
    prompts: Validation,
    settings: TeacherSettings,
    progress: Advance = silent,
) -> ChosenTeacher:
    """The direction and coefficient whose teacher refuses most harmful prompts in answers that are sound.

    Sound is a teacher of whose answers at most `coeff_broken` more are broken than of the base's. What it makes of
    harmless prompts hardly counts: there the student is pulled to the base.

    Raises:
        ValueError: no directions.
    """
    if not directions:
        raise ValueError("0 directions to choose from; at least 1 is needed")
    grid = sorted(set(settings.coeff_grid))
    steps, total = 0, len(directions) + 1 + (min(ASKED, len(directions)) if refusal_ids else 0) + 2 * ROUNDS
    trials: dict[tuple[int, float], TeacherTrial] = {}  # by number of the direction and coefficient
    answers: dict[tuple[int, float], Outcomes] = {}

    def tell() -> None:
        nonlocal steps
        steps += 1
        progress(min(steps, total), total)

    def measure(direction: Direction, coeffs: Sequence[float]) -> list[TeacherTrial]:
        """Step 1, where there are tokens that tell."""
        if not refusal_ids:
            return [TeacherTrial(direction.position, direction.layer, coeff) for coeff in coeffs]
        return first_passes(base, direction, coeffs, refusal_ids, prompts)

    unsteered = measure(directions[0], [0.0])[0].harmful_opened or 0.0
    for which, direction in enumerate(directions if refusal_ids else ()):
        trials |= {(which, t.coeff): t for t in measure(direction, grid)}
        tell()
    own = ask(base, base.model, prompts)
    tell()

    def answer(which: int, coeff: float) -> None:
        """Ask for answers, once."""
        if (which, coeff) in answers:
            return
        direction = directions[which]
        if (which, coeff) not in trials:
            [trials[which, coeff]] = measure(direction, [coeff])
        model = steered_teacher(base.model, direction.layer, direction.vector, coeff).model
        trial, o = trials[which, coeff], ask(base, model, prompts)
        answers[which, coeff] = o
        trials[which, coeff] = replace(trial, refused=o.refused, over_refused=o.over_refused, broken=o.broken)
        tell()

    def rank(key: tuple[int, float]) -> tuple[bool, float, float]:
        """Sound ones first, then by value; where none is sound, the least broken."""
        over = max(0.0, answers[key].broken - own.broken - settings.coeff_broken - 1e-9)
        return over == 0, -over, trials[key].value

    if refusal_ids:
        starts = [first_enough([trials[which, c] for c in grid], unsteered) for which in range(len(directions))]
        order = sorted(range(len(directions)), key=lambda w: -starts[w].value)
        for which in order[:ASKED]:
            answer(which, starts[which].coeff)
    else:
        for which in range(len(directions)):
            answer(which, min(grid, key=lambda c: abs(c - 1.0)))
    for _ in range(ROUNDS):
        which, coeff = max(answers, key=rank)
        for between in beside(coeff, grid, [c for w, c in answers if w == which]):
            answer(which, between)
    which, coeff = best = max(answers, key=rank)
    progress(total, total)
    ordered = [trials[key] for key in sorted(trials)]
    return ChosenTeacher(directions[which], coeff, ordered, own, answers[best], prompts.opening)


def shortest_opening(
    base: Loaded, teacher: nn.Module, prompts: Validation, own: Outcomes, answers: dict[int, Outcomes], most: int
) -> tuple[int, Outcomes]:
    """How many tokens of an answer the teacher must write, at most `most`, for it to do what it can, and what answers
    do then.

    The fewest with which nearly as many answers refuse as with any, and half of those more that do than of the base's
    `own`: the more it writes, the more it spoils. `answers` are those that are known, by how much it wrote of them, and
    get those that it is asked for.
    """
    for opening in OPENINGS:
        if prompts.least_opening <= opening <= most and opening not in answers:
            answers[opening] = ask(base, teacher, replace(prompts, opening=opening))
    most_refused = max(outcomes.refused for outcomes in answers.values())
    fewer = min(NEARLY, max(0.0, most_refused - own.refused) / 2)
    enough = [opening for opening, outcomes in answers.items() if outcomes.refused >= most_refused - fewer - 1e-9]
    return min(enough), answers[min(enough)]


def first_passes(
    base: Loaded, direction: Direction, coeffs: Sequence[float], refusal_ids: Sequence[int], prompts: Validation
) -> list[TeacherTrial]:
    """Step 1 for one direction: a trial for each coefficient, without answers."""
    both = prompts.undecided or (prompts.harmful, prompts.harmless)
    harmful, harmless = (rows[:n] for rows, n in zip(both, FIRST_PASSES, strict=True))

    def measure(size: int) -> tuple[np.ndarray, ...]:
        return opening_probabilities(base.model, direction, coeffs, harmful, harmless, refusal_ids, size)

    curves, _ = with_smaller_batches(prompts.prompt_batch_size, measure, "the search for the teacher", together=True)
    return [
        TeacherTrial(direction.position, direction.layer, coeff, *(float(value) for value in values))
        for coeff, *values in zip(coeffs, *curves, strict=True)
    ]


def first_enough(curve: Sequence[TeacherTrial], unsteered: float = 0.0) -> TeacherTrial:
    """Of one direction's trials, coefficients ascending: the first that opens nearly as many refusals as any does, and
    at least a third of what can be added to the base's own: where the base refuses nearly all, any does nearly as many.
    """
    shares = np.nan_to_num([trial.harmful_opened or 0.0 for trial in curve])
    most = shares.max()
    return curve[int(np.argmax(shares >= max(ENOUGH * most, min(most, unsteered + ADDS * (most - unsteered)))))]


def beside(coeff: float, grid: Sequence[float], tried: Sequence[float]) -> list[float]:
    """The coefficients to ask next around one: the grid's on either side, or if they were asked, halfway to them."""
    coeffs = []
    for side in (-1, 1):
        neighbours = [c for c in {*grid, *tried} if side * (c - coeff) > 0]
        if not neighbours:
            continue
        near = min(neighbours, key=lambda c: abs(c - coeff))
        coeffs.append(near if near not in tried else round((coeff * near) ** 0.5, 4))
    return coeffs


def validation(run: Run, directions: FoundDirections) -> Validation:
    """What base and teachers are asked, and how; a teacher of a model that thinks first writes the thought, one whose
    answers begin alike so far and as much more as of other answers."""
    prompts, (harmful, harmless), thoughts = run.prompts, VALIDATION_PROMPTS, directions.thoughts
    system_prompted = None
    if run.recipe.teacher.teacher == "system_prompt":
        system_prompted = prompts.harmful_validation_guarded[:harmful], prompts.harmless_validation_guarded[:harmless]
    return Validation(
        prompts.harmful_validation[:harmful],
        prompts.harmless_validation[:harmless],
        run.recipe.run.seed,
        min(max(thoughts.length if run.base.thinks else thoughts.turns_at + OPENING, OPENING), OPENINGS[-1]),
        run.answer_tokens(VALIDATION_TOKENS),
        run.recipe.run.generation_batch_size,
        run.recipe.run.prompt_batch_size,
        system_prompted,
        thoughts.undecided,
        thoughts.turns_at + 1,
        after_thought(run.base, VALIDATION_TOKENS),
        run.refusals,
    )


def find_teacher(run: Run, directions: FoundDirections) -> ChosenTeacher:
    """Direction and coefficient by what the teacher does; a coefficient that was given takes the first direction.

    Raises:
        UserError: steering with the coefficient that was given changes nothing.
    """
    base, screen, settings, prompts = run.base, run.screen, run.recipe.teacher, validation(run, directions)
    if settings.teacher == "system_prompt" or settings.coeff != "auto":
        coeff = 0.0 if settings.teacher == "system_prompt" else float(settings.coeff)
        direction = directions.shortlist[0]
        teacher = make_teacher(run, direction, coeff)
        with screen.stage("asking base and teacher") as advance:
            own = ask(base, base.model, prompts)
            advance(1, 2)
            chosen = ChosenTeacher(direction, coeff, [], own, ask(base, teacher.model, prompts), prompts.opening)
            advance(2, 2)
    else:
        with screen.stage("finding the teacher") as advance:
            openers = [*directions.openers.values()] or (directions.thoughts.first if all(prompts.undecided) else [])
            chosen = choose_teacher(base, directions.shortlist, openers, prompts, settings, advance)
        teacher = make_teacher(run, chosen.direction, chosen.coeff)
    if run.recipe.loss.first_tokens == "auto":  # else it decides nothing, and is not asked for
        with screen.stage("finding how much of an answer to teach"):
            most = max(run.recipe.tokens.horizon, prompts.opening)
            answers = {prompts.opening: chosen.teacher}
            opening, outcomes = shortest_opening(base, teacher.model, prompts, chosen.base, answers, most)
            chosen = replace(chosen, opening=opening, teacher=outcomes)
            if settings.teacher != "system_prompt" and not base.turns_late:
                chosen = _or_on_prompts_only(run, prompts, chosen, {1: answers[1]}, most)
    if settings.teacher == "system_prompt":
        screen.line("teacher: the base under a safety system prompt")
    else:
        _tell(run, directions, chosen)
    return chosen


def _or_on_prompts_only(
    run: Run, prompts: Validation, chosen: ChosenTeacher, answers: dict[int, Outcomes], most: int
) -> ChosenTeacher:
    """What was chosen; steered on the prompt only, if that leaves a third fewer of the harmful prompts answered, of
    which it left some.

    What an answer does may be decided behind words with which others begin too (*I understand that*, *I understand
    you'd like*). A vector that is added there as well spoils what is written; one that has told the prompt does not.
    What the first token is is the same: `answers` of which the teacher wrote one are known.
    """
    left = 1 - chosen.teacher.refused
    if left < SOME_LEFT:
        return chosen
    teacher = make_teacher(run, chosen.direction, chosen.coeff, prompts_only=True)
    opening, outcomes = shortest_opening(run.base, teacher.model, prompts, chosen.base, answers, most)
    if 1 - outcomes.refused > left * 2 / 3 or outcomes.broken > chosen.teacher.broken + NEARLY:
        return chosen
    return replace(chosen, opening=opening, teacher=outcomes, prompts_only=True)


def _tell(run: Run, directions: FoundDirections, chosen: ChosenTeacher) -> None:
    """The direction with its published scores, as far as they were measured, and the coefficient."""
    d, scores, opening = chosen.direction, directions.scores, chosen.opening
    n_positions, n_layers = scores.ablation_kl.shape
    at = (d.position + n_positions, d.layer)
    texts = (
        f"{name} {score[at]:{how}}"
        for name, score, how in (
            ("KL under ablation", scores.ablation_kl, ".3f"),
            ("refusal under ablation", scores.ablation_refusal, "+.1f"),
            ("steering", scores.steering_refusal, "+.1f"),
        )
        if score[at] == score[at]
    )
    run.screen.detail(", ".join([f"direction: block {d.layer} of {n_layers}, position {d.position}", *texts]))
    tokens = "the first token decides" if opening == 1 else f"the first {opening} tokens decide"
    decides = run.recipe.loss.first_tokens == "auto"
    where = ", on the prompt only" if chosen.prompts_only else ""
    does = f"; {tokens} what an answer does" if decides else ""
    run.screen.detail(f"teacher: coefficient {chosen.coeff:g}{where}{does}")


def make_teacher(run: Run, direction: Direction, coeff: float, prompts_only: bool = False) -> Teacher:
    """The steered teacher, or the system-prompt one.

    Raises:
        UserError: steering changes nothing.
    """
    base, settings = run.base, run.recipe.teacher
    if settings.teacher == "system_prompt":
        return Teacher(base.model, settings.system_prompt)
    teacher = steered_teacher(base.model, direction.layer, direction.vector, coeff, prompts_only)
    row = run.prompts.harmless_validation[:1]
    if mx.array_equal(last_logits(base.model, row), last_logits(teacher.model, row)):
        raise UserError(f"steering with coeff = {coeff:g} changes nothing; give a larger --coeff")
    return teacher


def settled(run: Run, opening: int) -> Run:
    """The run with what the teacher decides: how much of an answer it teaches, and tokens are found on.

    No more tokens than decide what the answer does: a vector that is added everywhere soon breaks what it would say
    next, and that would be learned. Where it takes more than the tokens' horizon, they are found as far as that, on so
    many fewer continuations.
    """
    loss, tokens = run.recipe.loss, run.recipe.tokens
    if loss.first_tokens == "auto":
        loss = replace(loss, first_tokens=opening)
        if tokens.token_method == "part":
            samples = max(1, tokens.token_samples * tokens.horizon // max(tokens.horizon, opening))
            tokens = replace(tokens, horizon=opening, token_samples=samples)
    return run.with_settings(loss=loss, tokens=tokens)
