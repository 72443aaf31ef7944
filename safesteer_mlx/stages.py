"""The method's stages on a tokenizer's terms: what each reads from the recipe, what it says, what it hands on.

The mathematics is in `direction`, `teacher`, `safety_tokens` and `train`, on token ids; here the prompts
are chosen and rendered, results are reported in a line each, and a user's mistakes become sentences.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
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
from .direction import Direction
from .judge import is_refusal
from .load import Loaded
from .progress import Screen, UserError
from .prompts import (
    Instruction,
    PromptSets,
    built_in_sets,
    end_of_instruction,
    load_data,
    opener_ids,
    render,
    render_all,
    special_ids,
)
from .recipe import Recipe, mathematics
from .residual import last_logits
from .rollout import Completion, answer_text, generate, stream_key
from .safety_tokens import contrast_tokens, select_tokens
from .teacher import CoefficientTrial, Teacher, find_coefficient, follow, moving_average, steered_teacher
from .token_file import read_token_file
from .train import (
    NotFiniteError,
    Rollouts,
    TrainingPrompt,
    make_optimizer,
    number_of_steps,
    train,
    trained_change,
)

Rows = list[list[int]]

CHARACTERS_A_TOKEN, TEMPLATE_TOKENS = 3, 40  # upper estimates, before there is a tokenizer
COLLAPSE_PROMPTS = 16  # harmless prompts that tell a collapse
ANSWER_TOKENS = 32  # of an answer, enough to tell a refusal


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
class FoundDirection:
    """Stage 1's result: refusal openers with their first ids, direction, the harmless validation prompts that passed
    its filter, and what makes the direction unfit, with the remedy: the verdict is stop if there is any."""

    openers: dict[str, int]
    direction: Direction
    harmless: Rows
    faults: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Plain data and numpy arrays, for `of`."""
        d = self.direction
        return {
            "openers": self.openers,
            "position": d.position,
            "layer": d.layer,
            "vector": np.array(d.vector, np.float64),
            **vars(d.scores),
            "harmless": self.harmless,
            "faults": self.faults,
        }

    @staticmethod
    def of(plain: dict[str, Any]) -> "FoundDirection":
        """What `plain` described, exactly."""
        names = [f.name for f in fields(directions.CandidateScores)]
        scores = directions.CandidateScores(
            *(np.array(plain[name], np.float64) if isinstance(plain[name], list) else plain[name] for name in names)
        )
        vector = mx.array(np.array(plain["vector"], np.float32))
        direction = Direction(plain["position"], plain["layer"], vector, scores)
        return FoundDirection(plain["openers"], direction, plain["harmless"], plain["faults"])


@dataclass(frozen=True)
class Strength:
    """The steering coefficient, and the curve it was chosen from, if it was."""

    coeff: float
    curve: list[CoefficientTrial]

    def plain(self) -> dict[str, Any]:
        """Plain data, for `of`."""
        return asdict(self)

    @staticmethod
    def of(plain: dict[str, Any]) -> "Strength":
        """What `plain` described."""
        return Strength(plain["coeff"], [CoefficientTrial(**trial) for trial in plain["curve"]])


@dataclass(frozen=True)
class SafetyTokens:
    """Stage 3's result, best first: text, id, votes, mean Δ, mean probability under base and teacher of each."""

    rows: list[dict[str, Any]]

    @property
    def ids(self) -> np.ndarray:
        """(K,) int64."""
        return np.array([row["id"] for row in self.rows], np.int64)

    def plain(self) -> list[dict[str, Any]]:
        """Plain data, for `of`."""
        return self.rows

    @staticmethod
    def of(plain: list[dict[str, Any]]) -> "SafetyTokens":
        """What `plain` described."""
        return SafetyTokens(plain)


def prompt_sets(recipe: Recipe) -> PromptSets:
    """The bundled model's own prompts for it, else the package's; `--data` replaces the training prompts."""
    sets = built_in_sets(recipe.run.model)
    if recipe.run.data is not None:
        sets = replace(sets, harmful_train=load_data(recipe.run.data))
    return sets


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


def answer_tokens(recipe: Recipe, base: Loaded, enough: int) -> int:
    """The longest answer to judge, in tokens: `enough`, or what an answer may have where thinking comes first."""
    return max(enough, recipe.train.max_tokens) if base.thinks else enough


def check_padding(recipe: Recipe, base: Loaded, rendered: Rendered, screen: Screen) -> Recipe:
    """The recipe, with answers generated one at a time if this architecture cannot do it in batches.

    In some architectures of mlx-lm, prompts of unequal length in a batch fail or change each other's answers.

    Raises:
        UserError: padding changes the forward pass itself.
    """
    prompts = sorted(rendered.harmful_validation, key=len)
    rows = prompts[:4] + prompts[-4:]
    together = last_logits(base.model, rows)
    alone = mx.concatenate([last_logits(base.model, [row]) for row in rows])
    if not mx.allclose(together, alone, rtol=0.05, atol=0.05 * mx.abs(alone).max().item()):
        kind = base.config.get("model_type")
        raise UserError(
            f"padding changes what model_type {kind} computes, so it cannot be aligned; choose another model"
        )
    try:
        found = [c.ids[0] for c in generate(base.model, rows, eos_ids=base.eos_ids, max_tokens=1)]
        wrong = sum(token != int(best) for token, best in zip(found, alone.argmax(-1).tolist(), strict=True))
    except (ValueError, RuntimeError):
        wrong = len(rows)
    if wrong <= 1 or recipe.run.generation_batch_size == 1:  # half precision may turn a near tie
        return recipe
    screen.line("mlx-lm does not batch this architecture rightly: answers are generated one at a time, slowly")
    return replace(recipe, run=replace(recipe.run, generation_batch_size=1))


def find_openers(recipe: Recipe, base: Loaded, rendered: Rendered, screen: Screen) -> dict[str, int]:
    """First tokens of refusals: the recipe's texts, and those the model itself begins its refusals with."""
    tokenizer = base.tokenizer
    found = opener_ids(tokenizer, recipe.direction.openers)
    with screen.stage("reading how the model refuses") as advance:
        harmful, harmless = (
            generate(
                base.model,
                rows,
                eos_ids=base.eos_ids,
                max_tokens=answer_tokens(recipe, base, ANSWER_TOKENS),
                batch_size=recipe.run.generation_batch_size,
                progress=advance,
            )
            for rows in (rendered.harmful_direction, rendered.harmless_direction)
        )
    asked = zip(rendered.harmful_direction, harmful, strict=True)
    refused = Counter(a.ids[0] for row, a in asked if is_refusal(answer_text(tokenizer, row, a)))
    ordinary = Counter(a.ids[0] for a in harmless)
    for token, count in refused.most_common():
        # Kept if it opens one refusal in twenty and hardly ever an answer to a harmless prompt.
        if count >= max(2, refused.total() / 20) and ordinary[token] / len(harmless) <= count / refused.total() / 10:
            found.setdefault(tokenizer.decode([token]), token)
    if not found:
        raise UserError("no refusal opener is a token of this model; give --openers texts that its refusals begin with")
    share = f"{refused.total()} of {len(harmful)} harmful prompts are refused"
    screen.line(f"openers: {', '.join(repr(text) for text in found)}; {share}")
    return found


def find_direction(recipe: Recipe, base: Loaded, rendered: Rendered, screen: Screen) -> FoundDirection:
    """The chosen direction, or where no candidate passes the tests the nearest one, with its faults.

    Raises:
        UserError: the base refuses every harmless prompt, or no candidate can be measured.
    """
    openers = find_openers(recipe, base, rendered, screen)
    work = partial(_find_direction, recipe, base, rendered, openers, screen)
    return halving(recipe.run.prompt_batch_size, work, "the search for the direction")[0]


def _find_direction(
    recipe: Recipe, base: Loaded, rendered: Rendered, openers: dict[str, int], screen: Screen, batch_size: int
) -> FoundDirection:
    s, model, refusal_ids = recipe.direction, base.model, list(openers.values())
    limits = {
        "kl_threshold": s.kl_threshold,
        "steering_threshold": s.steering_threshold,
        "prune_last": s.prune_last,
    }

    faults: list[str] = []

    def kept(harmful: Rows, harmless: Rows) -> tuple[Rows, Rows]:
        h, b = directions.keep_answered_as_meant(model, harmful, harmless, refusal_ids, batch_size)
        if not len(b):
            raise UserError(f"the base refuses all {len(harmless)} harmless prompts; choose a model that answers some")
        if not len(h):
            h = np.arange(len(harmful))
            if not faults:
                faults.append(
                    f"no answer to {len(harmful)} harmful prompts begins as a refusal; give --openers, if this model "
                    "refuses in other words" + (", or --thinking off" if base.thinks else "")
                )
        return [harmful[i] for i in h], [harmless[i] for i in b]

    if recipe.teacher.teacher == "system_prompt":
        harmless = kept(rendered.harmful_scoring, rendered.harmless_scoring)[1]
        return FoundDirection(openers, directions.no_direction(model), harmless)
    with screen.stage("finding the refusal direction") as advance:
        candidates = directions.mean_differences(
            model, *kept(rendered.harmful_direction, rendered.harmless_direction), rendered.n_eoi, batch_size
        )
        scoring = kept(rendered.harmful_scoring, rendered.harmless_scoring)
        how: dict[str, Any] = {"batch_size": batch_size, "progress": advance}
        scores = directions.score_candidates(model, candidates, *scoring, refusal_ids, **limits, **how)
        try:
            position, layer = directions.choose_direction(scores, **limits)
        except directions.NoDirectionError:
            scores = directions.score_candidates(model, candidates, *scoring, refusal_ids, True, **how)
            near = directions.nearest_candidates(scores, **limits)
            if not near:
                raise UserError(
                    f"no direction can be measured: prune_last = {s.prune_last} leaves only the first of "
                    f"{candidates.shape[1]} blocks, or no score is a number; lower --prune-last, or use --teacher "
                    "system_prompt"
                ) from None
            position, layer, _ = near[0]
            named = "; ".join(f"block {at} position {p}: {', '.join(failed)}" for p, at, failed in near)
            faults.append(
                f"no refusal direction passes the tests (nearest: {named}); loosen --steering-threshold or "
                "--kl-threshold, give other --openers, or use --teacher system_prompt"
            )
    vector = mx.array(candidates[position, layer].astype(np.float32))
    found = Direction(position, layer, vector, scores)
    p = (position, layer)
    screen.line(
        f"direction: block {layer} of {candidates.shape[1]}, position {position}, KL {scores.ablation_kl[p]:.3f}, "
        f"refusal under ablation {scores.ablation_refusal[p]:+.1f}, steering {scores.steering_refusal[p]:+.1f}"
    )
    return FoundDirection(openers, found, scoring[1], faults)


def find_strength(recipe: Recipe, base: Loaded, rendered: Rendered, direction: Direction, screen: Screen) -> Strength:
    """The steering coefficient asked for, or found; 0 for a system-prompt teacher."""
    settings = recipe.teacher
    if settings.teacher == "system_prompt":
        screen.line("teacher: the base under a safety system prompt")
        return Strength(0.0, [])
    if settings.coeff != "auto":
        screen.line(f"teacher: coefficient {float(settings.coeff):g}")
        return Strength(float(settings.coeff), [])
    with screen.stage("finding the steering coefficient") as advance:
        coeff, curve = find_coefficient(
            base.model,
            direction.layer,
            direction.vector,
            rendered.harmful_validation,
            rendered.harmless_validation,
            settings,
            tokenizer=base.tokenizer,
            eos_ids=base.eos_ids,
            max_tokens=answer_tokens(recipe, base, teachers.ANSWER_TOKENS),
            batch_size=recipe.run.generation_batch_size,
            progress=advance,
        )
    at = next(t for t in curve if t.coeff == coeff)
    screen.line(
        f"teacher: coefficient {coeff:g} refuses {at.harmful_refused:.0%} of the harmful prompts that the base "
        f"answers and {at.harmless_refused:.0%} of harmless ones, {at.broken:.0%} broken"
    )
    if at.harmful_refused < settings.coeff_refusal:
        screen.line(f"  less than the {settings.coeff_refusal:.0%} asked for: no coefficient reaches it unbroken")
    return Strength(coeff, curve)


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
    recipe: Recipe, base: Loaded, rendered: Rendered, teacher: Teacher, harmless: Rows, screen: Screen
) -> SafetyTokens:
    """The safety tokens, from the teacher's own continuations of `harmless` (of harmful prompts, if a system
    prompt makes it).

    Raises:
        UserError: no token is likely enough under the teacher.
    """
    s, tokenizer, m = recipe.tokens, base.tokenizer, recipe.tokens.token_samples
    guarded = teacher.system_prompt is not None
    read, read_by_teacher = (
        (rendered.harmful_scoring, rendered.harmful_scoring_guarded) if guarded else (harmless, harmless)
    )
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
            shared_blocks=teacher.shared_blocks if recipe.teacher.teacher == "steer" else 0,
        )
        contrast, _ = halving(recipe.run.prompt_batch_size, lambda size: compare(batch_size=size), "the safety tokens")
    tokens = given_tokens(recipe, base)
    if tokens is None:
        tokens = select_tokens(contrast, s.safety_tokens, s.token_method)
    if not len(tokens):
        raise UserError(f"no token reaches min_steered_prob = {s.min_steered_prob:g}; lower --min-steered-prob")
    shown = " ".join(repr(tokenizer.decode([int(t)])) for t in tokens[:10])
    screen.line(f"safety tokens: {len(tokens)} from {contrast.n_positions} positions, first {shown}")
    return SafetyTokens(
        [
            {
                "token": tokenizer.decode([int(t)]),
                "id": int(t),
                "votes": int(contrast.votes[t]),
                "mean_delta": float(contrast.mean_delta[t]),
                "base_prob": float(contrast.base_prob[t]),
                "teacher_prob": float(contrast.steered_prob[t]),
            }
            for t in tokens
        ]
    )


def given_tokens(recipe: Recipe, base: Loaded) -> np.ndarray | None:
    """The ids in the file that `safety_tokens` names, (K,) int64; None where it is a number.

    Raises:
        UserError: the file cannot be read, or does not fit the model's vocabulary.
    """
    given = recipe.tokens.safety_tokens
    return np.array(read_token_file(Path(given), base.tokenizer, base.vocabulary)) if isinstance(given, str) else None


def training_prompts(
    recipe: Recipe, sets: PromptSets, base: Loaded, screen: Screen
) -> tuple[list[TrainingPrompt], list[TrainingPrompt]]:
    """Harmful and anchor prompts as student and target read them; those given twice and those over the length
    are left out, and said.

    Raises:
        UserError: no harmful prompt is short enough, or one holds an id without an embedding.
    """
    limit, tokenizer = recipe.train.max_seq_length, base.tokenizer
    guard = recipe.teacher.system_prompt if recipe.teacher.teacher == "system_prompt" else None
    found: tuple[list[TrainingPrompt], list[TrainingPrompt]] = ([], [])
    for harmful, items, into in (
        (True, sets.harmful_train, found[0]),
        (False, sets.harmless_train, found[1]),
    ):
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
    if not found[0]:
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
        direction: Direction,
        coeff: float,
        harmless: Rows,
        screen: Screen,
    ):
        self._recipe, self._base, self._rendered, self._student = recipe, base, rendered, student
        self._direction, self._coeff, self._harmless, self._screen = direction, coeff, harmless, screen
        self._model, self._vector, self._tokens = moving_average(student), direction.vector, None

    def __call__(self, step: int) -> tuple[Teacher, mx.array | None]:
        follow(self._model, self._student, self._recipe.teacher.mixup)
        every = self._recipe.teacher.refresh_every
        if every and step % every == 0:
            rows, position = self._rendered, self._direction.position
            found = directions.mean_differences(self._model, rows.harmful_direction, rows.harmless_direction, -position)
            self._vector = mx.array(found[0, self._direction.layer].astype(np.float32))
            found = find_tokens(self._recipe, self._base, rows, self._teacher(), self._harmless, self._screen)
            self._tokens = mx.array(found.ids)
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
    drawn = generate(student, rows, eos_ids=base.eos_ids, max_tokens=answer_tokens(recipe, base, ANSWER_TOKENS))
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


def candidates(recipe: Recipe, prompts: tuple[list[TrainingPrompt], list[TrainingPrompt]]) -> int:
    """How many steps `--select` will keep the weights of."""
    steps = number_of_steps(len(prompts[0]), recipe.train, recipe.loss)
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
    prompts: tuple[list[TrainingPrompt], list[TrainingPrompt]],
    checkpoint: Checkpoint,
    save: Callable[[], None],
    screen: Screen,
    score: Callable[[int], dict[str, Any]] | None = None,
) -> TrainingLog:
    """Train `student` to the end, from where `checkpoint` was; `save` writes the adapters, `score` scores them.

    Raises:
        UserError: the first step moved nothing, or a loss is not finite; the last good state is kept.
        KeyboardInterrupt: after keeping the last state.
    """
    settings, seed = recipe.train, recipe.run.seed
    optimizer = make_optimizer(settings)
    total = number_of_steps(len(prompts[0]), settings, recipe.loss)
    log, done = TrainingLog([], [], []), 0

    def state() -> dict[str, mx.array]:
        parts = {"student": student.trainable_parameters(), "optimizer": optimizer.state}
        arrays = {f"{part}.{name}": w for part, tree in parts.items() for name, w in tree_flatten(tree)}
        return arrays | ({} if moving is None else {f"teacher.{name}": w for name, w in moving.state().items()})

    def keep() -> None:
        checkpoint.save(done, last, asdict(log))
        save()
        if (fault := collapsed(recipe, base, rendered, student)) is not None:
            screen.line(f"step {done}: {fault}; lower --learning-rate or --epochs, or raise --anchor")

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
        first_step=done,
        drawn_before=rollouts,
        generation_batch_size=recipe.run.generation_batch_size,
        after_step=moving or (lambda step: None),
    )
    began = time.monotonic()
    with screen.stage("training") as advance:
        try:
            for event in steps:
                if isinstance(event, Rollouts):
                    completions = [(c.ids, c.finished) for c in event.completions]
                    checkpoint.keep("rollouts", {"step": event.step, "completions": completions})
                    continue
                now = time.monotonic()
                log.metrics.append({k: None if v != v else v for k, v in asdict(event).items()})  # NaN is not JSON
                log.seconds.append(round(now - began, 3))
                began, done, last = now, event.step, state()
                note = f"loss {event.loss:.4f}, safety mass {event.student_mass:.2f} → {event.target_mass:.2f}"
                advance(event.step, event.steps, note)
                if event.step == 1 and trained_change(student, before) == 0:
                    raise UserError("the first step moved no weight; raise --learning-rate or check lora_parameters")
                if event.step % settings.steps_per_report == 0 or event.step == event.steps:
                    screen.line(f"step {event.step} of {event.steps}: {note}, gradient {event.grad_norm:.2g}")
                if event.step % settings.save_every == 0 or event.step == event.steps:
                    if score is not None:
                        log.scored.append(score(done))
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
