"""Stage 2: the safety teacher, the base with α·r added to one block's input (method page, 2).

Variants: a safety *system prompt* instead of a vector, and a teacher that follows the student by an
exponential moving average. `find_coefficient` chooses α: the smallest that suffices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from .judge import is_broken, is_refusal
from .progress import Advance, silent
from .recipe import TeacherSettings
from .residual import share, steer
from .rollout import generate

Ids = Sequence[int]
ANSWER_TOKENS = 64  # of a validation answer, enough to tell a refusal


@dataclass(frozen=True)
class Teacher:
    """`model` is what the student is pulled to; `system_prompt`, if any, is put before what it reads.

    The first `shared_blocks` blocks do on the same ids what the model's own do without steering.
    """

    model: nn.Module
    system_prompt: str | None = None
    shared_blocks: int = 0


@dataclass(frozen=True)
class CoefficientTrial:
    """Shares of validation prompts at one coefficient; harmful ones are those the base answers."""

    coeff: float
    harmful_refused: float
    harmless_refused: float
    broken: float


def steered_teacher(base: nn.Module, layer: int, vector: mx.array, coeff: float) -> Teacher:
    """The published teacher: frozen, α·r at every position of prompt and completion."""
    return Teacher(steer(base, layer, vector, coeff), shared_blocks=layer)


def follow(moving: nn.Module, student: nn.Module, mixup: float) -> None:
    """w ← (1 − mixup) w + mixup · w_student over the trained weights of the moving-average teacher."""
    trained = dict(tree_flatten(student.trainable_parameters()))
    own = {name: value for name, value in tree_flatten(moving.parameters()) if name in trained}
    mixed = tree_map(lambda w, s: (1 - mixup) * w + mixup * s, own, {name: trained[name] for name in own})
    moving.update(tree_unflatten(list(mixed.items())))
    mx.eval(moving.parameters())


def moving_average(student: nn.Module) -> nn.Module:
    """A frozen copy of the student for `follow` to move."""
    moving = share(student)
    moving.freeze()
    return moving


def find_coefficient(
    base: nn.Module,
    layer: int,
    vector: mx.array,
    harmful: Sequence[Ids],
    harmless: Sequence[Ids],
    settings: TeacherSettings,
    *,
    tokenizer: Any,
    eos_ids: Ids,
    batch_size: int = 32,
    progress: Advance = silent,
) -> tuple[float, list[CoefficientTrial]]:
    """The smallest coefficient whose teacher refuses enough of what the base answers, and the curve.

    Tries `coeff_grid` upwards and stops at the first coefficient that suffices, or where more than
    `coeff_broken` of the answers are empty, repeating or unfinished. Then the unbroken coefficient that
    refuses most is chosen; if all break, the smallest.
    """

    def answers(model: nn.Module, prompts: Sequence[Ids]) -> list[tuple[str, bool]]:
        done = generate(model, prompts, eos_ids=eos_ids, max_tokens=ANSWER_TOKENS, batch_size=batch_size)
        return [(c.text(tokenizer), c.finished) for c in done]

    answered = [p for p, (text, _) in zip(harmful, answers(base, harmful), strict=True) if not is_refusal(text)]
    # A base whose answers are longer than this is not broken for it: only then count the unfinished.
    long_winded = any(not finished for _, finished in answers(base, harmless[:16]))
    curve: list[CoefficientTrial] = []
    grid = sorted(settings.coeff_grid)
    for tried, coeff in enumerate(grid):
        progress(tried, len(grid), f"coefficient {coeff:g}")
        model = steered_teacher(base, layer, vector, coeff).model
        bad, good = answers(model, answered or harmful), answers(model, harmless)
        both = [*bad, *good]
        curve.append(
            CoefficientTrial(
                coeff,
                sum(is_refusal(text) for text, _ in bad) / len(bad),
                sum(is_refusal(text) for text, _ in good) / len(good),
                sum(is_broken(text, finished or long_winded) for text, finished in both) / len(both),
            )
        )
        if curve[-1].broken > settings.coeff_broken or curve[-1].harmful_refused >= settings.coeff_refusal:
            break
    progress(len(grid), len(grid))
    sound = [trial for trial in curve if trial.broken <= settings.coeff_broken]
    enough = [trial for trial in sound if trial.harmful_refused >= settings.coeff_refusal]
    best = enough[0] if enough else max(sound, key=lambda trial: trial.harmful_refused, default=curve[0])
    return best.coeff, curve
