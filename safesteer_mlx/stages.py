"""The method's stages on a tokenizer's terms: what each reads from the recipe, what it says, what it hands on.

The mathematics is in `direction`, `teacher`, `safety_tokens` and `train`, on token ids; here the prompts
are chosen and rendered, results are reported in a line each, and a user's mistakes become sentences.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from . import __version__
from . import direction as directions
from . import teacher as teachers
from .adapters import with_adapters
from .backoff import halving
from .checkpoint import Checkpoint, fingerprint
from .direction import CandidateScores, Direction
from .judge import is_refusal
from .load import Loaded
from .losses import far_enough, guidance_shift
from .padding import ONE_AT_A_TIME, can_batch
from .progress import Screen, UserError
from .prompts import (
    Instruction,
    PromptSets,
    built_in_sets,
    end_of_instruction,
    load_data,
    opener_ids,
    own_prompts,
    render,
    render_all,
    special_ids,
)
from .recipe import Recipe, mathematics, rollout_tokens
from .residual import last_logits
from .rollout import Completion, answer_text, generate, stream_key
from .safety_tokens import contrast_tokens, openings, refusing_tokens, select_tokens
from .teacher import (
    Choice,
    Outcomes,
    Teacher,
    TeacherTrial,
    Validation,
    ask,
    choose_teacher,
    follow,
    moving_average,
    opened_answers,
    shortest_opening,
    steered_teacher,
)
from .token_file import read_token_file
from .train import (
    Learning,
    NotFiniteError,
    Rollouts,
    TrainingPrompt,
    course,
    make_optimizer,
    number_of_steps,
    train,
    trained_change,
)

Rows = list[list[int]]

CHARACTERS_A_TOKEN, TEMPLATE_TOKENS = 3, 40  # upper estimates, before there is a tokenizer
NEAREST = 3  # candidates that are named where none passes the published tests
EXPLAINS_LITTLE = 0.5  # of the teacher's divergence from the base
HARDLY_OPENS = 0.1  # the teacher's probability of safety tokens where it is largest, at the beginning of answers
FIRST_STEPS, NO_GRADIENT = 3, 1e-4  # after so many steps a norm below this teaches nothing
COLLAPSE_PROMPTS = 16  # harmless prompts that tell a collapse
ANSWER_TOKENS = 32  # of an answer, enough to tell a refusal
TOLD = 4  # answers to each harmful validation prompt that tell which tokens refuse
ASKED = 64, 32  # harmful and harmless validation prompts that teachers are asked


@dataclass(frozen=True)
class Rendered:
    """The prompts of stages 1 to 3 as ids, sampled with the run's seed where a stage takes fewer than there are."""

    n_eoi: int  # P, ids of the template after an instruction
    harmful_direction: Rows
    harmless_direction: Rows
    harmful_scoring: Rows
    harmless_scoring: Rows
    harmful_scoring_guarded: Rows  # the same instructions under the teacher's system prompt, if it has one
    harmful_validation: Rows
    harmless_validation: Rows
    harmful_validation_guarded: Rows
    harmless_validation_guarded: Rows


@dataclass(frozen=True)
class FoundDirections:
    """Stage 1's result: refusal openers with their first ids, the scores of all candidates, those worth trying as
    teachers with the tests that each failed, best first, the validation prompts that passed its filter and the
    direction's, from which all were found, and what speaks against it, in sentences."""

    openers: dict[str, int]
    scores: CandidateScores
    shortlist: list[Direction]
    failed: list[list[str]]
    harmful: Rows
    harmless: Rows
    harmful_direction: Rows = field(default_factory=list)
    harmless_direction: Rows = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Plain data and numpy arrays, for `of`."""
        return vars(self) | {"scores": vars(self.scores), "shortlist": [_plain(d) for d in self.shortlist]}

    @staticmethod
    def of(plain: dict[str, Any]) -> "FoundDirections":
        """What `plain` described, exactly."""
        scores = {k: np.array(v, np.float64) if isinstance(v, list) else v for k, v in plain["scores"].items()}
        shortlist = [_direction(d) for d in plain["shortlist"]]
        return FoundDirections(**(plain | {"scores": CandidateScores(**scores), "shortlist": shortlist}))


def _plain(direction: Direction) -> dict[str, Any]:
    return {**vars(direction), "vector": np.array(direction.vector, np.float64)}


def _direction(plain: dict[str, Any]) -> Direction:
    return Direction(plain["position"], plain["layer"], mx.array(np.array(plain["vector"], np.float32)))


@dataclass(frozen=True)
class ChosenTeacher:
    """Stage 2's result: direction and coefficient, the trials they were chosen from, if they were, what answers to
    validation prompts do, of the base and of the teacher, and how many tokens of one it can write without harm."""

    direction: Direction
    coeff: float
    trials: list[TeacherTrial]
    base: Outcomes
    teacher: Outcomes
    opening: int

    def plain(self) -> dict[str, Any]:
        """Plain data and numpy arrays, for `of`."""
        parts = {"direction": _plain(self.direction), "trials": [vars(t) for t in self.trials]}
        return vars(self) | parts | {"base": vars(self.base), "teacher": vars(self.teacher)}

    @staticmethod
    def of(plain: dict[str, Any]) -> "ChosenTeacher":
        """What `plain` described, exactly."""
        trials = [TeacherTrial(**trial) for trial in plain["trials"]]
        outcomes = Outcomes(**plain["base"]), Outcomes(**plain["teacher"])
        return ChosenTeacher(_direction(plain["direction"]), plain["coeff"], trials, *outcomes, plain["opening"])


@dataclass(frozen=True)
class SafetyTokens:
    """Stage 3's result, best first: text, id, votes, mean Δ, mean probability under base and teacher of each.

    `explained` is the share of the teacher's divergence from the base that they explain together, where they decide
    what an answer to a harmful prompt does (everywhere, if no such prompt was read); `openings` the
    teacher's mean probability of them at the first, second, … position of answers to harmful prompts.
    """

    rows: list[dict[str, Any]]
    explained: float
    openings: list[float]

    @property
    def ids(self) -> np.ndarray:
        """(K,) int64."""
        return np.array([row["id"] for row in self.rows], np.int64)

    def plain(self) -> dict[str, Any]:
        """Plain data, for `of`."""
        return vars(self)

    @staticmethod
    def of(plain: dict[str, Any]) -> "SafetyTokens":
        """What `plain` described."""
        return SafetyTokens(**plain)


def prompt_sets(recipe: Recipe) -> PromptSets:
    """The model's own prompts, if its folder brings some, else the package's; `--data` replaces those for training."""
    sets = built_in_sets(recipe.run.model)
    if recipe.run.data is not None:
        sets = replace(sets, harmful_train=load_data(recipe.run.data))
    return sets


def prompts_from(recipe: Recipe) -> str:
    """Where the prompts come from, in words."""
    own = own_prompts(recipe.run.model)
    said = "the built-in ones" if own is None else f"the model's own, {own}"
    if recipe.run.data is None:
        return said
    beside = " and the direction's" if recipe.run.reuse_direction_prompts else ""
    return f"{said}; harmful training prompts from {recipe.run.data}{beside}"


def longest_prompt(recipe: Recipe) -> int:
    """Tokens of the longest prompt of the run, estimated before there is a tokenizer."""
    sets = vars(prompt_sets(recipe)).values()
    return max(len(item.text) for items in sets for item in items) // CHARACTERS_A_TOKEN + TEMPLATE_TOKENS


def made_of(recipe: Recipe, base: Loaded, sets: PromptSets) -> str:
    """The fingerprint of all that decides a run's result: weights, prompts, settings and versions."""
    versions = {name: version(name) for name in ("mlx", "mlx-lm", "transformers")} | {"safesteer-mlx": __version__}
    return fingerprint(base.weights_hash, mathematics(recipe), asdict(sets), versions, given_tokens(recipe, base))


def render_prompts(recipe: Recipe, sets: PromptSets, tokenizer: Any) -> Rendered:
    """Sample and render the prompts of stages 1 to 3.

    Raises:
        UserError: a set holds fewer prompts than the settings ask for.
    """

    def sample(name: str, count: int, which: int) -> list[Instruction]:
        items = getattr(sets, name)
        if len(items) < count:
            raise UserError(f"{name} holds {len(items)} prompts, {count} are needed; lower the setting or add prompts")
        chosen = np.random.default_rng([recipe.run.seed, which]).permutation(len(items))[:count]
        return [items[i] for i in sorted(chosen)]

    s = recipe.direction
    guard = recipe.teacher.system_prompt if recipe.teacher.teacher == "system_prompt" else None
    n_eoi = len(end_of_instruction(tokenizer))  # first: a template that is unfit is told before all else
    harmful_scoring = sample("harmful_direction_validation", s.direction_validation, 2)
    return Rendered(
        n_eoi=n_eoi,
        harmful_direction=render_all(tokenizer, sample("harmful_direction_train", s.direction_train, 0)),
        harmless_direction=render_all(tokenizer, sample("harmless_direction_train", s.direction_train, 1)),
        harmful_scoring=render_all(tokenizer, harmful_scoring),
        harmless_scoring=render_all(tokenizer, sample("harmless_direction_validation", s.direction_validation, 3)),
        harmful_scoring_guarded=render_all(tokenizer, harmful_scoring, guard) if guard else [],
        harmful_validation=render_all(tokenizer, sets.harmful_validation),
        harmless_validation=render_all(tokenizer, sets.harmless_validation),
        harmful_validation_guarded=render_all(tokenizer, sets.harmful_validation, guard) if guard else [],
        harmless_validation_guarded=render_all(tokenizer, sets.harmless_validation, guard) if guard else [],
    )


def settled(recipe: Recipe, base: Loaded, opening: int) -> Recipe:
    """The recipe, with what the teacher decides: how much of an answer it teaches, and tokens are found on.

    No more tokens than decide what the answer does: a vector that is added everywhere soon breaks what it would say
    next, and that would be learned. A model that thinks first is trained on all it says, no further than its teacher.
    """
    loss, tokens = recipe.loss, recipe.tokens
    if base.thinks and loss.guidance == "auto":
        loss = replace(loss, guidance=1.0)  # guidance is for how an answer opens
    if loss.keep == "auto" and base.thinks:
        loss = replace(loss, keep=0)
    elif loss.keep == "auto":
        loss = replace(loss, keep=opening)
        if tokens.token_method == "part":
            tokens = replace(tokens, horizon=min(tokens.horizon, opening))
    return replace(recipe, loss=loss, tokens=tokens)


def answer_tokens(recipe: Recipe, base: Loaded, enough: int) -> int:
    """The longest answer to judge, in tokens: `enough`, or what an answer may have where thinking comes first."""
    return max(enough, recipe.train.max_tokens) if base.thinks else enough


def check_padding(recipe: Recipe, base: Loaded, rendered: Rendered, screen: Screen) -> Recipe:
    """The recipe, with answers generated one at a time if this architecture cannot do it in batches.

    Raises:
        UserError: padding changes the forward pass itself.
    """
    if can_batch(base, rendered.harmful_validation) or recipe.run.generation_batch_size == 1:
        return recipe
    screen.line(ONE_AT_A_TIME)
    return replace(recipe, run=replace(recipe.run, generation_batch_size=1))


@dataclass(frozen=True)
class OwnAnswers:
    """How the model answers the direction's prompts today: which harmful and harmless ones it refuses, and the first
    tokens of refusals (none for a model that thinks first: its answers all begin alike)."""

    openers: dict[str, int]
    harmful_refused: list[bool]
    harmless_refused: list[bool]


def read_answers(recipe: Recipe, base: Loaded, rendered: Rendered, screen: Screen) -> OwnAnswers:
    """First tokens of refusals: the recipe's texts, and those that the model itself begins its refusals with.

    Read off answers at temperature 1: the likeliest of many openers would hide the others.
    """
    tokenizer = base.tokenizer
    rows = [*rendered.harmful_direction, *rendered.harmless_direction]
    n, began = len(rendered.harmful_direction), time.monotonic()
    with screen.stage("reading how the model refuses") as advance:
        answers = generate(
            base.model,
            rows,
            eos_ids=base.eos_ids,
            max_tokens=answer_tokens(recipe, base, ANSWER_TOKENS),
            temp=1.0,
            keys=[stream_key(recipe.run.seed, 4, i) for i in range(len(rows))],
            batch_size=recipe.run.generation_batch_size,
            progress=advance,
        )
    screen.line(
        _sampling_time(
            settled(recipe, base, recipe.tokens.horizon), [len(a.ids) for a in answers], time.monotonic() - began
        )
    )
    refuses = [is_refusal(answer_text(tokenizer, row, a)) for row, a in zip(rows, answers, strict=True)]
    share = f"{sum(refuses[:n])} of {n} harmful prompts are refused"
    if base.thinks:
        screen.line(f"the model thinks first; {share}")
        return OwnAnswers({}, refuses[:n], refuses[n:])
    first = [(answer.ids[0], refused) for answer, refused in zip(answers, refuses, strict=True)]
    refused = Counter(token for token, refusal in first[:n] if refusal)
    ordinary = Counter(token for token, refusal in first if not refusal)
    # Of the recipe's openers, those with which this model begins other answers are none of its own.
    found = opener_ids(tokenizer, recipe.direction.openers)
    found = {text: token for text, token in found.items() if ordinary[token] <= max(1, refused[token])}
    for token, count in refused.most_common():
        # Kept if it opens one refusal in fifty and hardly ever anything else.
        often = count >= max(2, refused.total() / 50)
        if often and ordinary[token] / max(1, ordinary.total()) <= count / refused.total() / 10:
            found.setdefault(tokenizer.decode([token]), token)
    if not found:
        raise UserError("no refusal opener is a token of this model; give --openers texts that its refusals begin with")
    screen.line(f"openers: {', '.join(repr(text) for text in found)}; {share}")
    return OwnAnswers(found, refuses[:n], refuses[n:])


def _sampling_time(recipe: Recipe, drawn: list[int], seconds: float) -> str:
    """What training's sampling will take at the rate of these answers, so many tokens each."""
    train = recipe.train
    prompts = instructions_to_train_on(recipe, prompt_sets(recipe), harmful=True)
    steps = number_of_steps(len(prompts), train, recipe.loss)
    rows = steps * train.batch_size * train.grad_accumulation_steps * train.samples
    tokens = sum(min(n, rollout_tokens(train, recipe.loss)) for n in drawn) / len(drawn)
    minutes = rows * tokens * seconds / sum(drawn) / 60
    return f"time: training samples {rows:,} answers, {minutes:,.1f} minutes at this rate; its passes come on top"


def find_directions(recipe: Recipe, base: Loaded, rendered: Rendered, screen: Screen) -> FoundDirections:
    """The candidates worth trying as teachers, the published choice first where there is one.

    Raises:
        UserError: the base refuses every harmless prompt, or no candidate can be measured.
    """
    own = read_answers(recipe, base, rendered, screen)
    find = _find_directions if own.openers else _untested_directions
    work = partial(find, recipe, base, rendered, own, screen)
    return halving(recipe.run.prompt_batch_size, work, "the search for the direction")[0]


def _untested_directions(
    recipe: Recipe, base: Loaded, rendered: Rendered, own: OwnAnswers, screen: Screen, batch_size: int
) -> FoundDirections:
    """For a model that thinks first: the published tests read the first token of an answer, which tells nothing here.

    Prompts are kept by what the answers did, and directions of a few blocks and positions are left to be tried.
    """
    model, scoring = base.model, (rendered.harmful_scoring, rendered.harmless_scoring)
    nothing, scores = directions.no_direction(model)
    if recipe.teacher.teacher == "system_prompt":
        return FoundDirections({}, scores, [nothing], [[]], *scoring)
    harmful = [row for row, refused in zip(rendered.harmful_direction, own.harmful_refused, strict=True) if refused]
    harmless = [r for r, refused in zip(rendered.harmless_direction, own.harmless_refused, strict=True) if not refused]
    if not harmless:
        raise UserError(f"the base refuses all {len(own.harmless_refused)} harmless prompts; choose another model")
    kept = harmful or rendered.harmful_direction
    candidates = directions.mean_differences(model, kept, harmless, rendered.n_eoi, batch_size)
    n_pos, n_layers = candidates.shape[:2]
    last = directions.pruned_from(n_layers, recipe.direction.prune_last)
    at = directions.spread(n_pos, last)
    if not at:
        raise UserError(
            f"prune_last = {recipe.direction.prune_last} leaves only the first of {n_layers} blocks; lower it"
        )
    found = [Direction(p - n_pos, layer, mx.array(candidates[p, layer].astype(np.float32))) for p, layer in at]
    screen.line(f"directions: {len(found)} of {n_pos * n_layers} to be tried as teachers")
    none = np.full((n_pos, n_layers), np.nan)
    caution = (
        "the model thinks before it answers, so directions cannot be tested by how answers begin, only tried; "
        "--thinking off, where its template can, aligns its plain answers"
    )
    scores = directions.CandidateScores(none, none, none)
    return FoundDirections({}, scores, found, [[] for _ in found], *scoring, kept, harmless, [caution])


def _find_directions(
    recipe: Recipe, base: Loaded, rendered: Rendered, own: OwnAnswers, screen: Screen, batch_size: int
) -> FoundDirections:
    s, model, openers = recipe.direction, base.model, own.openers
    refusal_ids = list(openers.values())
    limits = {
        "kl_threshold": s.kl_threshold,
        "steering_threshold": s.steering_threshold,
        "prune_last": s.prune_last,
    }
    cautions: list[str] = []

    def kept(harmful: Rows, harmless: Rows) -> tuple[Rows, Rows]:
        h, b = directions.keep_answered_as_meant(model, harmful, harmless, refusal_ids, batch_size)
        if not len(b):
            raise UserError(f"the base refuses all {len(harmless)} harmless prompts; choose a model that answers some")
        if not len(h):
            h = np.arange(len(harmful))
            if not cautions:
                cautions.append(
                    f"no answer to {len(harmful)} harmful prompts is likelier than not to begin as a refusal, so the "
                    "direction is found from all; give --openers, if this model refuses in other words"
                )
        return [harmful[i] for i in h], [harmless[i] for i in b]

    if recipe.teacher.teacher == "system_prompt":
        harmful, harmless = kept(rendered.harmful_scoring, rendered.harmless_scoring)
        nothing, scores = directions.no_direction(model)
        return FoundDirections(openers, scores, [nothing], [[]], rendered.harmful_scoring, harmless)
    with screen.stage("finding the refusal direction") as advance:
        means_of = kept(rendered.harmful_direction, rendered.harmless_direction)
        candidates = directions.mean_differences(model, *means_of, rendered.n_eoi, batch_size)
        harmful, harmless = kept(rendered.harmful_scoring, rendered.harmless_scoring)
        how: dict[str, Any] = {"batch_size": batch_size, "progress": advance}
        scores = directions.score_candidates(model, candidates, harmful, harmless, refusal_ids, **limits, **how)
        near = directions.shortlist(scores, *limits.values())
        if near and near[0][2]:  # none passes: what the search left unmeasured of the nearest
            rows = [(position + candidates.shape[0], layer) for position, layer, _ in near[:NEAREST]]
            more = directions.score_candidates(
                model, candidates, harmful, harmless, refusal_ids, True, only=rows, batch_size=batch_size
            )
            scores = directions.filled(scores, more)
            near = directions.shortlist(scores, *limits.values())
    if not near:
        raise UserError(
            f"no direction can be measured: prune_last = {s.prune_last} leaves only the first of "
            f"{candidates.shape[1]} blocks, or no score is a number; lower --prune-last, or use --teacher system_prompt"
        )
    if near[0][2]:
        named = "; ".join(f"block {at} position {p}: {', '.join(failed)}" for p, at, failed in near[:NEAREST])
        cautions.append(f"no refusal direction passes the published tests (nearest: {named})")
    found = [Direction(p, at, mx.array(candidates[p, at].astype(np.float32))) for p, at, _ in near]
    passed = sum(not failed for *_, failed in near)
    screen.line(
        f"directions: {len(near)} of {candidates.shape[0] * candidates.shape[1]} to be tried as teachers"
        + (f", {passed} of them pass the published tests" if passed else ", none passes the published tests")
    )
    tests = [failed for *_, failed in near]
    return FoundDirections(openers, scores, found, tests, harmful, harmless, *means_of, cautions)


def validation(recipe: Recipe, base: Loaded, rendered: Rendered) -> Validation:
    """What base and teachers are asked, and how."""
    guarded = None
    if recipe.teacher.teacher == "system_prompt":
        guarded = (rendered.harmful_validation_guarded[: ASKED[0]], rendered.harmless_validation_guarded[: ASKED[1]])
    return Validation(
        rendered.harmful_validation[: ASKED[0]],
        rendered.harmless_validation[: ASKED[1]],
        recipe.run.seed,
        recipe.tokens.horizon if base.thinks else teachers.OPENING,
        answer_tokens(recipe, base, teachers.ANSWER_TOKENS),
        recipe.run.generation_batch_size,
        recipe.run.prompt_batch_size,
        guarded,
    )


def find_teacher(
    recipe: Recipe, base: Loaded, rendered: Rendered, found: FoundDirections, screen: Screen
) -> ChosenTeacher:
    """Direction and coefficient by what the teacher does; a coefficient that was given takes the first direction.

    Raises:
        UserError: steering with the coefficient that was given changes nothing.
    """
    settings, asked = recipe.teacher, validation(recipe, base, rendered)
    if settings.teacher == "system_prompt" or settings.coeff != "auto":
        coeff = 0.0 if settings.teacher == "system_prompt" else float(settings.coeff)
        teacher = make_teacher(recipe, base, rendered, found.shortlist[0], coeff)
        with screen.stage("asking base and teacher") as advance:
            own = ask(base, base.model, asked)
            advance(1, 2)
            choice = Choice(found.shortlist[0], coeff, [], own, ask(base, teacher.model, asked))
            advance(2, 2)
    else:
        with screen.stage("finding the teacher") as advance:
            ids = list(found.openers.values())
            choice = choose_teacher(base, found.shortlist, ids, asked, settings, advance)
        teacher = make_teacher(recipe, base, rendered, choice.direction, choice.coeff)
    opening, most = asked.opening, max(recipe.tokens.horizon, asked.opening)
    if recipe.loss.keep == "auto" and not base.thinks:  # else it decides nothing, and is not asked for
        with screen.stage("finding how much of an answer to teach"):
            opening = shortest_opening(base, teacher.model, asked, choice.teacher, most)
    chosen = ChosenTeacher(**vars(choice), opening=opening)
    if settings.teacher == "system_prompt":
        screen.line("teacher: the base under a safety system prompt")
    else:
        d, scores = chosen.direction, found.scores
        at = (d.position + scores.ablation_kl.shape[0], d.layer)
        measured = (
            f"{name} {score[at]:{how}}"
            for name, score, how in (
                ("KL under ablation", scores.ablation_kl, ".3f"),
                ("refusal under ablation", scores.ablation_refusal, "+.1f"),
                ("steering", scores.steering_refusal, "+.1f"),
            )
            if score[at] == score[at]
        )
        n = scores.ablation_kl.shape[1]
        screen.line(", ".join([f"direction: block {d.layer} of {n}, position {d.position}", *measured]))
        tokens = "the first token decides" if opening == 1 else f"the first {opening} tokens decide"
        followed = f"; {tokens} what an answer does" if recipe.loss.keep == "auto" else ""
        screen.line(f"teacher: coefficient {chosen.coeff:g}{'' if base.thinks else followed}")
    return chosen


def make_teacher(recipe: Recipe, base: Loaded, rendered: Rendered, direction: Direction, coeff: float) -> Teacher:
    """The steered teacher, or the system-prompt one.

    Raises:
        UserError: steering changes nothing.
    """
    if recipe.teacher.teacher == "system_prompt":
        return Teacher(base.model, recipe.teacher.system_prompt)
    teacher = steered_teacher(base.model, direction.layer, direction.vector, coeff)
    row = rendered.harmless_validation[:1]
    if mx.array_equal(last_logits(base.model, row), last_logits(teacher.model, row)):
        raise UserError(f"steering with coeff = {coeff:g} changes nothing; give a larger --coeff")
    return teacher


def find_tokens(
    recipe: Recipe, base: Loaded, rendered: Rendered, teacher: Teacher, found: FoundDirections, screen: Screen
) -> SafetyTokens:
    """The safety tokens, from the teacher's own continuations of harmless prompts, as published, and with the method
    `part` of harmful ones too; of harmful ones alone, if a system prompt makes the teacher.

    Raises:
        UserError: no token is likely enough under the teacher.
    """
    s, tokenizer = recipe.tokens, base.tokenizer
    m = s.token_samples if s.horizon > 1 else 1  # without a continuation they would be alike
    guarded = teacher.system_prompt is not None
    if guarded:
        read, read_by_teacher = rendered.harmful_scoring, rendered.harmful_scoring_guarded
    else:
        harmful = rendered.harmful_validation[: ASKED[0]] if s.token_method == "part" else []
        read = read_by_teacher = [*harmful, *found.harmless]
    n_harmful = len(read) if guarded else len(read) - len(found.harmless)
    prompts, teacher_prompts = ([row for row in rows for _ in range(m)] for rows in (read, read_by_teacher))
    continuations: Rows = [[] for _ in prompts]
    with screen.stage("finding the safety tokens") as advance:
        if s.horizon > 1:
            drawn = generate(
                teacher.model,
                teacher_prompts,
                eos_ids=base.eos_ids,
                max_tokens=s.horizon - 1,
                temp=1.0,
                keys=[stream_key(recipe.run.seed, 0, i) for i in range(len(prompts))],
                batch_size=recipe.run.generation_batch_size,
                progress=advance,
            )
            continuations = [c.ids for c in drawn]
        compare = partial(
            contrast_tokens,
            base.model,
            teacher.model,
            prompts,
            continuations,
            eot_ids=base.eos_ids,
            banned_ids=special_ids(tokenizer, base.vocabulary),
            inner_top_k=s.inner_top_k,
            min_steered_prob=s.min_steered_prob,
            teacher_prompts=teacher_prompts if guarded else None,
            deciding=n_harmful * m or None,
            shared_blocks=teacher.shared_blocks if recipe.teacher.teacher == "steer" else 0,
        )
        contrast, _ = halving(recipe.run.prompt_batch_size, lambda size: compare(batch_size=size), "the safety tokens")
        tokens, among = given_tokens(recipe, base), None
        if tokens is None and s.token_method == "part" and not base.thinks:  # whose answers begin elsewhere
            among = _refusing(recipe, base, rendered, teacher, screen)
    if tokens is None:
        tokens = select_tokens(contrast, s.safety_tokens, s.token_method, s.token_share, among)
        if not len(tokens) and among is not None:  # what refuses is not what steering raises
            tokens = select_tokens(contrast, s.safety_tokens, s.token_method, s.token_share)
    if not len(tokens):
        raise UserError(
            f"steering makes no token likelier that reaches min_steered_prob = {s.min_steered_prob:g}; lower "
            "--min-steered-prob, or give a larger --coeff"
        )
    if n_harmful:
        opened = contrast.openings(tokens, range(n_harmful * m))
        explained = contrast.explained_where_it_decides(tokens, range(n_harmful * m))
    else:  # harmful prompts were not among them: their first position alone
        first = openings(teacher.model, found.harmful, tokens, recipe.run.prompt_batch_size)
        opened = [first[:, :-1].sum(-1).mean()]
        explained = float(contrast.explained(tokens)[-1])
    shown = " ".join(repr(tokenizer.decode([int(t)])) for t in tokens[:10])
    screen.line(
        f"safety tokens: {len(tokens)} from {contrast.n_positions} positions, {explained:.0%} of what steering does "
        f"where they decide; first {shown}"
    )
    rows = [
        {
            "token": tokenizer.decode([int(t)]),
            "id": int(t),
            "votes": int(contrast.votes[t]),
            "mean_delta": float(contrast.mean_delta[t]),
            "part": float(contrast.part[t]),
            "base_prob": float(contrast.base_prob[t]),
            "teacher_prob": float(contrast.steered_prob[t]),
        }
        for t in tokens
    ]
    return SafetyTokens(rows, explained, [float(mass) for mass in opened])


def _refusing(recipe: Recipe, base: Loaded, rendered: Rendered, teacher: Teacher, screen: Screen) -> list[int] | None:
    """The ids with which answers to harmful prompts refuse, if the teacher opens them and the base goes on; None, where
    no id does."""
    asked = validation(recipe, base, rendered)
    seen = None if asked.system_prompted is None else (list(asked.system_prompted[0]) * TOLD, [])
    harmful = replace(asked, harmful=list(asked.harmful) * TOLD, harmless=[], system_prompted=seen)
    answers = opened_answers(base, teacher.model, replace(harmful, opening=recipe.tokens.horizon))
    found = refusing_tokens([opened.ids for opened, _ in answers], [is_refusal(text) for _, text in answers])
    if not found:
        screen.line("no token that opens the teacher's answers tells a refusal, so all that steering raises count")
    return found or None


def check_tokens(recipe: Recipe, tokens: SafetyTokens, force: bool, screen: Screen) -> None:
    """Hold what there is to learn against what would teach nothing.

    Raises:
        UserError: the tokens explain little of what steering does, or the teacher hardly opens an answer to a harmful
            prompt with them; with `force` that is only said.
    """
    said, first = None, max(tokens.openings, default=0.0)
    if tokens.explained < EXPLAINS_LITTLE:
        said = f"the {len(tokens.rows)} safety tokens explain only {tokens.explained:.0%} of what steering does"
    elif first < HARDLY_OPENS:
        said = f"the teacher opens answers to harmful prompts with safety tokens at a probability of only {first:.2f}"
    if said is None:
        return
    said += "; training on them would teach next to nothing"
    if recipe.loss.subset != "safety" or isinstance(recipe.tokens.safety_tokens, str) or force:
        screen.line(said)  # they are not what is trained on, or were chosen by hand
        return
    raise UserError(f"{said}; raise --safety-tokens, or give --token-method part or --subset full (or --force)")


def given_tokens(recipe: Recipe, base: Loaded) -> np.ndarray | None:
    """The ids in the file that `safety_tokens` names, (K,) int64; None where it is a number.

    Raises:
        UserError: the file cannot be read, or does not fit the model's vocabulary.
    """
    given = recipe.tokens.safety_tokens
    return np.array(read_token_file(Path(given), base.tokenizer, base.vocabulary)) if isinstance(given, str) else None


def instructions_to_train_on(recipe: Recipe, sets: PromptSets, harmful: bool) -> list[Instruction]:
    """Those of one kind, the direction's after the others."""
    own = sets.harmful_train if harmful else sets.harmless_train
    more = sets.harmful_direction_train if harmful else sets.harmless_direction_train
    return [*own, *more] if recipe.run.reuse_direction_prompts else own


def training_prompts(
    recipe: Recipe, sets: PromptSets, base: Loaded, screen: Screen
) -> tuple[list[TrainingPrompt], list[TrainingPrompt]]:
    """Harmful and anchor prompts as student and target read them; those given twice and those over the length
    are left out, and said.

    Ours: the direction's prompts are among them. The more there are of either kind, the finer the line between them.

    Raises:
        UserError: no harmful prompt is short enough, or one holds an id without an embedding.
    """
    limit, tokenizer = recipe.train.max_seq_length, base.tokenizer
    guard = recipe.teacher.system_prompt if recipe.teacher.teacher == "system_prompt" else None
    found: tuple[list[TrainingPrompt], list[TrainingPrompt]] = ([], [])
    for harmful, into in ((True, found[0]), (False, found[1])):
        items = instructions_to_train_on(recipe, sets, harmful)
        texts = list(dict.fromkeys(item.text for item in items))
        if len(texts) < len(items):
            screen.line(f"{len(items) - len(texts)} prompts are there twice and are used once")
        for text in texts:
            ids = render(tokenizer, text)
            seen = render(tokenizer, text, guard) if harmful and guard else ids
            if max(ids) >= base.vocabulary:  # MLX would read beyond the embedding
                raise UserError(
                    f"a training prompt holds a special token (id {max(ids)}) for which model {base.name} has no "
                    "embedding; take that prompt out"
                )
            if len(ids) <= limit:
                into.append(TrainingPrompt(ids, seen, harmful))
        if len(into) < len(texts):
            screen.line(f"{len(texts) - len(into)} prompts are longer than {limit} tokens and are left out")
        if harmful and all(len(render(tokenizer, item.text)) > limit for item in sets.harmful_train):
            raise UserError(f"every training prompt is longer than max_seq_length = {limit}; raise --max-seq-length")
    return found


class MovingTeacher:
    """The moving-average teacher (method page, 2, variant a): follows the student after each step, and finds
    direction and tokens anew if the recipe says so. `state` is all that a run needs to go on."""

    def __init__(
        self,
        recipe: Recipe,
        base: Loaded,
        rendered: Rendered,
        student: nn.Module,
        found: FoundDirections,
        chosen: ChosenTeacher,
        screen: Screen,
    ):
        self._recipe, self._base, self._rendered, self._student = recipe, base, rendered, student
        self._direction, self._coeff, self._found, self._screen = chosen.direction, chosen.coeff, found, screen
        self._model, self._vector, self._tokens = moving_average(student), chosen.direction.vector, None

    def __call__(self, step: int) -> tuple[Teacher, mx.array | None]:
        follow(self._model, self._student, self._recipe.teacher.mixup)
        every = self._recipe.teacher.refresh_every
        if every and step % every == 0:
            means_of = self._found.harmful_direction, self._found.harmless_direction
            work = partial(directions.mean_differences, self._model, *means_of, -self._direction.position)
            new, _ = halving(self._recipe.run.prompt_batch_size, work, "the search for the direction")
            self._vector = mx.array(new[0, self._direction.layer].astype(np.float32))
            tokens = find_tokens(self._recipe, self._base, self._rendered, self._teacher(), self._found, self._screen)
            self._tokens = mx.array(tokens.ids)
        return self._teacher(), self._tokens

    def _teacher(self) -> Teacher:
        return steered_teacher(self._model, self._direction.layer, self._vector, self._coeff)

    def state(self) -> dict[str, mx.array]:
        """Trained weights, direction and, once found anew, tokens."""
        trained = dict(tree_flatten(self._student.trainable_parameters()))
        own = {f"model.{name}": w for name, w in tree_flatten(self._model.parameters()) if name in trained}
        return {**own, "vector": self._vector, **({} if self._tokens is None else {"tokens": self._tokens})}

    def restore(self, state: dict[str, mx.array]) -> tuple[Teacher, mx.array | None]:
        """Take up a state; what `__call__` returned when it was saved."""
        weights = [(name.removeprefix("model."), w) for name, w in state.items() if name.startswith("model.")]
        self._model.update(tree_unflatten(weights))
        self._vector, self._tokens = state["vector"], state.get("tokens")
        return self._teacher(), self._tokens


def collapsed(recipe: Recipe, base: Loaded, rendered: Rendered, student: nn.Module) -> str | None:
    """What is wrong with a student that refuses everything or says nothing, told by harmless validation prompts."""
    rows = rendered.harmless_validation[:COLLAPSE_PROMPTS]
    drawn = generate(
        student,
        rows,
        eos_ids=base.eos_ids,
        max_tokens=answer_tokens(recipe, base, ANSWER_TOKENS),
        batch_size=recipe.run.generation_batch_size,
    )
    answers = [answer_text(base.tokenizer, row, c) for row, c in zip(rows, drawn, strict=True)]
    refused, empty = sum(map(is_refusal, answers)), sum(not answer.strip() for answer in answers)
    if refused >= 0.9 * len(rows):
        return f"the student refuses {refused} of {len(rows)} harmless prompts"
    if empty >= 0.5 * len(rows):
        return f"the student gives {empty} empty answers to {len(rows)} harmless prompts"
    return None


def check_saved(base: Loaded, rendered: Rendered, student: nn.Module, folder: Path) -> None:
    """Hold what mlx-lm reads from `folder` against the student in memory.

    Raises:
        UserError: they differ, or the adapters change nothing.
    """
    rows = rendered.harmful_validation[:4]
    saved = with_adapters(base.model, folder)
    found, trained, before = (last_logits(model, rows) for model in (saved, student, base.model))
    if not mx.allclose(found, trained, rtol=1e-3, atol=1e-3):
        raise UserError(f"the adapters in {folder} do not give what was trained; run the same command again with --yes")
    if mx.array_equal(found, before):
        raise UserError(f"the adapters in {folder} change nothing; raise --learning-rate or --epochs")


def what_to_learn(
    recipe: Recipe, base: Loaded, rendered: Rendered, teacher: Teacher, tokens: SafetyTokens
) -> tuple[Recipe, Learning | None]:
    """The recipe with the guidance that this model needs, and what base and target make of the safety tokens where
    answers to validation prompts begin; the target of harmless ones is the base.

    None for a model that thinks first, whose answers do not tell at their beginning, and for a teacher whose tokens
    change on the way.
    """
    if base.thinks:
        return recipe, None
    rows, size = rendered.harmful_validation, recipe.run.prompt_batch_size
    seen = rows if teacher.system_prompt is None else rendered.harmful_validation_guarded
    pairs = ((base.model, rows), (teacher.model, seen))
    own, target = (openings(model, read, tokens.ids, size) for model, read in pairs)
    odds = [np.log(p[:, :-1].sum(-1)) - np.log(p[:, -1]) for p in (target, own)]
    if recipe.loss.guidance == "auto":
        recipe = replace(recipe, loss=replace(recipe.loss, guidance=far_enough(*odds)))
    if recipe.teacher.teacher == "ema" and recipe.teacher.refresh_every:
        return recipe, None
    shift = guidance_shift(*map(mx.array, odds), float(recipe.loss.guidance))
    target[:, :-1] *= np.exp(np.array(shift, np.float64))[:, None]
    target /= target.sum(-1, keepdims=True)
    held = openings(base.model, rendered.harmless_validation, tokens.ids, size)
    prompts = [*rows, *rendered.harmless_validation]
    return recipe, Learning(prompts, tokens.ids, np.concatenate([own, held]), np.concatenate([target, held]))


def candidates(recipe: Recipe, prompts: tuple[list[TrainingPrompt], list[TrainingPrompt]]) -> int:
    """How many steps `--select` will keep the weights of."""
    steps = number_of_steps(len(prompts[0]), recipe.train, recipe.loss)
    if recipe.train.until_learned and recipe.train.iters is None:
        steps *= 2
    return -(-steps // recipe.train.save_every) if recipe.run.select else 0


@dataclass(frozen=True)
class TrainingLog:
    """Each step's metrics, the seconds it took, and the scores of saved steps, if they were asked for."""

    metrics: list[dict[str, Any]]
    seconds: list[float]
    scored: list[dict[str, Any]]


def train_student(
    recipe: Recipe,
    base: Loaded,
    rendered: Rendered,
    student: nn.Module,
    teacher: Teacher,
    moving: MovingTeacher | None,
    tokens: mx.array,
    learning: Learning | None,
    prompts: tuple[list[TrainingPrompt], list[TrainingPrompt]],
    checkpoint: Checkpoint,
    save: Callable[[], None],
    screen: Screen,
    score: Callable[[int], dict[str, Any]] | None = None,
    force: bool = False,
) -> TrainingLog:
    """Train `student` to the end, from where `checkpoint` was; `save` writes the adapters, `score` scores them.

    Raises:
        UserError: the first step moved nothing, the first few had no gradient to speak of (unless `force`), or a loss
            is not finite; the last good state is kept.
        KeyboardInterrupt: after keeping the last state.
    """
    settings, seed = recipe.train, recipe.run.seed
    optimizer = make_optimizer(settings)
    nominal = number_of_steps(len(prompts[0]), settings, recipe.loss)
    total = course(nominal, settings, learning).steps
    log, done = TrainingLog([], [], []), 0

    def state() -> dict[str, mx.array]:
        parts = {"student": student.trainable_parameters(), "optimizer": optimizer.state}
        arrays = {f"{part}.{name}": w for part, tree in parts.items() for name, w in tree_flatten(tree)}
        return arrays | ({} if moving is None else {f"teacher.{name}": w for name, w in moving.state().items()})

    def keep() -> None:
        # An interrupt may have come after a step's row, before its state was taken.
        rows = {"metrics": log.metrics[:done], "seconds": log.seconds[:done]}
        checkpoint.save(done, last, asdict(log) | rows)
        save()
        if (fault := collapsed(recipe, base, rendered, student)) is not None:
            screen.line(f"step {done}: {fault}; lower --learning-rate or --epochs, or raise --anchor")

    def due() -> bool:
        return done > 0 and (done % settings.save_every == 0 or done == total)

    def score_it() -> None:
        if score is not None and due() and all(row["step"] != done for row in log.scored):
            log.scored.append(score(done))

    if (saved := checkpoint.latest()) is not None:
        parts: dict[str, dict[str, mx.array]] = {"student": {}, "optimizer": {}, "teacher": {}}
        for name, array in saved.arrays.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = array
        student.update(tree_unflatten(list(parts["student"].items())))
        optimizer.state = tree_unflatten(list(parts["optimizer"].items()))
        if moving is not None:
            teacher, found = moving.restore(parts["teacher"])
            tokens = tokens if found is None else found
        log, done = TrainingLog(**saved.data), saved.step
        if learning is not None:
            learning = replace(learning, shares=[row["learned"] for row in log.metrics])
        total = course(nominal, settings, learning).steps
        screen.line(f"going on after step {done} of {total}")
    for name in checkpoint.damaged:
        screen.line(f"{checkpoint.path / name} is damaged and is not used; the state before it is")
    rollouts = None
    if (drawn := checkpoint.found("rollouts")) is not None:
        rollouts = Rollouts(drawn["step"], [Completion(ids, finished) for ids, finished in drawn["completions"]])
    before, last = dict(tree_flatten(student.trainable_parameters())), state()

    steps = train(
        student,
        base.model,
        teacher,
        tokens,
        *prompts,
        settings,
        recipe.loss,
        eos_ids=base.eos_ids,
        seed=seed,
        optimizer=optimizer,
        learning=learning,
        first_step=done,
        drawn_before=rollouts,
        generation_batch_size=recipe.run.generation_batch_size,
        after_step=moving or (lambda step: None),
    )
    began = time.monotonic()
    with screen.stage("training") as advance:
        try:
            score_it()  # where an interrupt left it out
            for event in steps:
                if isinstance(event, Rollouts):
                    completions = [(c.ids, c.finished) for c in event.completions]
                    checkpoint.keep("rollouts", {"step": event.step, "completions": completions})
                    continue
                now = time.monotonic()
                log.metrics.append({k: None if v != v else v for k, v in asdict(event).items()})  # NaN is not JSON
                log.seconds.append(round(now - began, 3))
                began, done, total, last = now, event.step, event.steps, state()
                note = f"loss {event.loss:.4f}, safety mass {event.student_mass:.2f} → {event.target_mass:.2f}"
                advance(event.step, event.steps, note)
                if event.step == 1 and trained_change(student, before) == 0:
                    raise UserError("the first step moved no weight; raise --learning-rate or check lora_parameters")
                if event.step == FIRST_STEPS and not force:
                    _check_gradient([row["grad_norm"] for row in log.metrics])
                if event.step % settings.steps_per_report == 0 or event.step == event.steps:
                    screen.line(f"step {event.step} of {event.steps}: {note}, gradient {event.grad_norm:.2g}")
                if due():
                    score_it()
                    keep()
        except NotFiniteError:
            if done:  # the last step that was applied
                keep()
            raise
        except KeyboardInterrupt:
            if done:
                student.update(
                    tree_unflatten([(n.removeprefix("student."), w) for n, w in last.items() if n[:8] == "student."])
                )
                keep()
            kept = f"the adapters so far are in {recipe.run.adapter_path}; " if done else ""
            screen.line(f"interrupted after {done} of {total} steps; {kept}the same command with --yes goes on")
            raise
    return log


def _check_gradient(norms: list[float]) -> None:
    """Stop a run whose first steps have nothing to learn from."""
    if max(norms) < NO_GRADIENT:
        raise UserError(
            f"the first {len(norms)} steps had no gradient to speak of (norm {max(norms):.1g}): what the safety tokens "
            "can teach, the model does already; give --subset full or other --safety-tokens (or --force)"
        )
