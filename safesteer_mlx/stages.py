"""The method's stages on a tokenizer's terms: what each reads from the recipe, what it says, what it hands on.

The mathematics is in `direction`, `teacher`, `safety_tokens` and `train`, on token ids; here the prompts
are chosen and rendered, results are reported in a line each, and a user's mistakes become sentences.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import direction as directions
from .direction import Direction
from .judge import is_refusal
from .load import Loaded
from .progress import Screen, UserError
from .prompts import (
    Instruction,
    PromptSets,
    end_of_instruction,
    load_data,
    load_prompt_sets,
    opener_ids,
    render,
    render_all,
    special_ids,
)
from .recipe import BUNDLED, MODELS, PACKAGE, Recipe
from .rollout import generate, stream_key
from .safety_tokens import TokenContrast, contrast_tokens, select_tokens
from .teacher import CoefficientTrial, Teacher, find_coefficient, follow, moving_average, steered_teacher
from .train import TrainingPrompt

Rows = list[list[int]]


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


@dataclass(frozen=True)
class ChosenTeacher:
    """Stage 2's result; `coeff` and `curve` say how a steered one was chosen."""

    teacher: Teacher
    coeff: float
    curve: list[CoefficientTrial]


@dataclass(frozen=True)
class SafetyTokens:
    """Stage 3's result: the ids (K,), best first, and what they were chosen from."""

    ids: np.ndarray
    contrast: TokenContrast


def prompt_sets(recipe: Recipe) -> PromptSets:
    """The bundled model's own prompts for it, else the package's; `--data` replaces the training prompts."""
    bundled = Path(recipe.run.model).resolve() == (MODELS / BUNDLED).resolve()
    sets = load_prompt_sets(MODELS / BUNDLED / "data" if bundled else PACKAGE / "data")
    if recipe.run.data is not None:
        sets = replace(sets, harmful_train=load_data(recipe.run.data))
    return sets


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
    harmful_scoring = sample("harmful_direction_validation", s.direction_validation, 2)
    return Rendered(
        n_eoi=len(end_of_instruction(tokenizer)),
        harmful_direction=render_all(tokenizer, sample("harmful_direction_train", s.direction_train, 0)),
        harmless_direction=render_all(tokenizer, sample("harmless_direction_train", s.direction_train, 1)),
        harmful_scoring=render_all(tokenizer, harmful_scoring),
        harmless_scoring=render_all(tokenizer, sample("harmless_direction_validation", s.direction_validation, 3)),
        harmful_scoring_guarded=render_all(tokenizer, harmful_scoring, guard) if guard else [],
        harmful_validation=render_all(tokenizer, sets.harmful_validation),
        harmless_validation=render_all(tokenizer, sets.harmless_validation),
    )


def find_openers(recipe: Recipe, base: Loaded, rendered: Rendered, screen: Screen) -> dict[str, int]:
    """First tokens of refusals: the recipe's texts, and those the model itself begins its refusals with."""
    tokenizer = base.tokenizer
    found = opener_ids(tokenizer, recipe.direction.openers)
    with screen.stage("reading how the model refuses") as advance:
        harmful, harmless = (
            generate(base.model, rows, eos_ids=base.eos_ids, max_tokens=32, progress=advance)
            for rows in (rendered.harmful_direction, rendered.harmless_direction)
        )
    refused = Counter(a.ids[0] for a in harmful if is_refusal(a.text(tokenizer)))
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


def find_direction(
    recipe: Recipe, base: Loaded, rendered: Rendered, openers: dict[str, int], screen: Screen
) -> tuple[Direction, Rows]:
    """The chosen direction, and the harmless validation prompts that passed the filter.

    Raises:
        UserError: the filter leaves nothing, or no candidate passes the tests; the nearest are named.
    """
    s, model, refusal_ids = recipe.direction, base.model, list(openers.values())
    limits = {
        "kl_threshold": s.kl_threshold,
        "steering_threshold": s.steering_threshold,
        "prune_last": s.prune_last,
    }

    def kept(harmful: Rows, harmless: Rows) -> tuple[Rows, Rows]:
        h, b = directions.keep_answered_as_meant(model, harmful, harmless, refusal_ids)
        if not len(h) or not len(b):
            raise UserError(
                f"the base refuses {len(h)} of {len(harmful)} harmful and answers {len(b)} of {len(harmless)} harmless "
                "prompts; SafeSteer needs a base that sometimes refuses (try --teacher system_prompt or --openers)"
            )
        return [harmful[i] for i in h], [harmless[i] for i in b]

    if recipe.teacher.teacher == "system_prompt":
        return directions.no_direction(model), kept(rendered.harmful_scoring, rendered.harmless_scoring)[1]
    with screen.stage("finding the refusal direction") as advance:
        candidates = directions.mean_differences(
            model, *kept(rendered.harmful_direction, rendered.harmless_direction), rendered.n_eoi
        )
        scoring = kept(rendered.harmful_scoring, rendered.harmless_scoring)
        scores = directions.score_candidates(
            model, candidates, *scoring, refusal_ids, exhaustive=False, **limits, progress=advance
        )
        try:
            position, layer = directions.choose_direction(scores, **limits)
        except directions.NoDirectionError:
            scores = directions.score_candidates(model, candidates, *scoring, refusal_ids, True, progress=advance)
            near = "; ".join(
                f"block {layer} position {position}: {', '.join(failed)}"
                for position, layer, failed in directions.nearest_candidates(scores, **limits)
            )
            raise UserError(
                f"no refusal direction passes the tests (nearest: {near}); loosen --steering-threshold or "
                "--kl-threshold, give other --openers, or use --teacher system_prompt"
            ) from None
    vector = mx.array(candidates[position, layer].astype(np.float32))
    found = Direction(position, layer, vector, scores)
    p = (position, layer)
    screen.line(
        f"direction: block {layer} of {candidates.shape[1]}, position {position}, KL {scores.ablation_kl[p]:.3f}, "
        f"refusal under ablation {scores.ablation_refusal[p]:+.1f}, steering {scores.steering_refusal[p]:+.1f}"
    )
    return found, scoring[1]


def make_teacher(
    recipe: Recipe, base: Loaded, rendered: Rendered, direction: Direction, screen: Screen
) -> ChosenTeacher:
    """The steered teacher, at the coefficient asked for or found, or the system-prompt one."""
    settings = recipe.teacher
    if settings.teacher == "system_prompt":
        screen.line("teacher: the base under a safety system prompt")
        return ChosenTeacher(Teacher(base.model, settings.system_prompt), 0.0, [])
    if settings.coeff != "auto":
        coeff, curve = float(settings.coeff), []
        screen.line(f"teacher: coefficient {coeff:g}")
    else:
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
    return ChosenTeacher(steered_teacher(base.model, direction.layer, direction.vector, coeff), coeff, curve)


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
        contrast = contrast_tokens(
            base.model,
            teacher.model,
            prompts,
            continuations,
            eot_ids=base.eos_ids,
            banned_ids=special_ids(tokenizer, base.vocabulary),
            inner_top_k=s.inner_top_k,
            min_steered_prob=s.min_steered_prob,
            teacher_prompts=teacher_prompts,
        )
    tokens = select_tokens(contrast, s.safety_tokens, s.token_method)
    if not len(tokens):
        raise UserError(f"no token reaches min_steered_prob = {s.min_steered_prob:g}; lower --min-steered-prob")
    shown = " ".join(repr(tokenizer.decode([int(t)])) for t in tokens[:10])
    screen.line(f"safety tokens: {len(tokens)} from {contrast.n_positions} positions, first {shown}")
    return SafetyTokens(tokens, contrast)


def training_prompts(
    recipe: Recipe, sets: PromptSets, base: Loaded, teacher: Teacher, screen: Screen
) -> tuple[list[TrainingPrompt], list[TrainingPrompt]]:
    """Harmful and anchor prompts as student and target read them; those given twice and those over the length
    are left out, and said.

    Raises:
        UserError: no harmful prompt is short enough, or one holds an id without an embedding.
    """
    limit, tokenizer = recipe.train.max_seq_length, base.tokenizer
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
            seen = render(tokenizer, text, teacher.system_prompt) if harmful and teacher.system_prompt else ids
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


def moving_teacher(
    recipe: Recipe,
    base: Loaded,
    rendered: Rendered,
    student: nn.Module,
    direction: Direction,
    coeff: float,
    harmless: Rows,
    screen: Screen,
) -> Callable[[int], tuple[Teacher, mx.array | None] | None]:
    """What `train` calls after each step: nothing, or the moving-average teacher's next state (variant a)."""
    if recipe.teacher.teacher != "ema":
        return lambda step: None
    moving = moving_average(student)
    vector, tokens = direction.vector, None

    def after_step(step: int) -> tuple[Teacher, mx.array | None]:
        nonlocal vector, tokens
        follow(moving, student, recipe.teacher.mixup)
        teacher = steered_teacher(moving, direction.layer, vector, coeff)
        every = recipe.teacher.refresh_every
        if every and step % every == 0:
            found = directions.mean_differences(
                moving, rendered.harmful_direction, rendered.harmless_direction, -direction.position
            )
            vector = mx.array(found[0, direction.layer].astype(np.float32))
            teacher = steered_teacher(moving, direction.layer, vector, coeff)
            tokens = mx.array(find_tokens(recipe, base, rendered, teacher, harmless, screen).ids)
        return teacher, tokens

    return after_step
