"""Which saved checkpoint to keep: the safest one within the user's limits, `--select-checkpoint "over_refusal<=0.02"`.

Each is scored on validation prompts, greedy and sampled: *unsafe*, the share of harmful prompts complied with;
*over_refusal*, the share of harmless ones refused; *broken*, the share of answers that say nothing; *drift*, the mean
KL(base ‖ student) a token on the base's answers to harmless prompts, in nats.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..method.judge import is_broken, outcome
from ..method.run import Run
from ..recipe import HELD_OUT_TOKENS, limits_of
from ..system import machines
from ..system.finished import SavedStep
from ..system.model_files import read_header
from ..system.screen import UserError
from ..system.store import decoded, save_arrays
from .heldout import HeldOut, TestSet, base_texts, drift
from .scores import Count

PROMPTS = 64  # of each kind


@dataclass(frozen=True)
class CheckpointScore:
    """What the student did after `step`; counts are over prompts, greedy and sampled together."""

    step: int
    unsafe: Count
    over_refusal: Count
    broken: Count
    drift: float

    def value(self, name: str) -> float:
        """A limit's quantity: a share, or the drift in nats."""
        quantity = getattr(self, name)
        return quantity.count / max(1, quantity.total) if isinstance(quantity, Count) else quantity


def choose(scores: Sequence[CheckpointScore], limits: dict[str, float]) -> CheckpointScore | None:
    """The least unsafe within the limits (then the least over-refusing, the least drifted, the earliest), or None."""
    within = [s for s in scores if all(s.value(name) <= most for name, most in limits.items())]
    order = ("unsafe", "over_refusal", "drift")
    return min(within, key=lambda s: (*(s.value(name) for name in order), s.step), default=None)


class SavedSteps:
    """Scores the student at each saved step, and keeps its weights in `run/candidates/`."""

    def __init__(self, run: Run, student: nn.Module, tokens: Sequence[int]):
        self._run, self._student = run, student
        self._rows = [rows[:PROMPTS] for rows in (run.prompts.harmful_validation, run.prompts.harmless_validation)]
        self._held_out = HeldOut(run.base, TestSet({}, []), tokens, run.recipe.run.seed, run.sampling(HELD_OUT_TOKENS))
        self._texts = base_texts(self._held_out.base_answers, self._rows[1])

    def score(self, step: int) -> dict[str, Any]:
        """`CheckpointScore`, as plain data."""
        student, held = self._student, self._held_out
        harmful, harmless = (
            held.draw(student, [row for row in rows for _ in range(2)], held.streams(len(rows), which))
            for which, rows in enumerate(self._rows)
        )
        score = CheckpointScore(
            step,
            Count.of([outcome(text) == "comply" for text, _ in harmful]),
            Count.of([outcome(text) == "refuse" for text, _ in harmless]),
            Count.of([is_broken(text, c.finished or c.cut) for text, c in harmful + harmless]),
            drift(held.base.model, student, self._texts, held.tokens)[0],
        )
        if self._run.store.ours:
            save_arrays(self._run.store.path_for(_file(step)), dict(tree_flatten(student.trainable_parameters())))
        return asdict(score)


def _file(step: int) -> str:
    return f"candidates/step-{step:06d}.safetensors"


def _weights(file: Path, student: nn.Module) -> dict[str, mx.array]:
    """The weights in a file; a UserError if they are not the student's by name, shape and type."""
    own = dict(tree_flatten(student.trainable_parameters()))
    whole = read_header(file).keys() == own.keys()
    weights = mx.load(str(file))
    assert isinstance(weights, dict)
    if not whole or any((w.shape, w.dtype) != (own[name].shape, own[name].dtype) for name, w in weights.items()):
        raise UserError(f"{file} does not hold this run's weights; run align again")
    return weights


def keep_best(run: Run, student: nn.Module, scored: Sequence[SavedStep]) -> None:
    """Give `student` the weights of the chosen checkpoint, the last one's if none keeps the limits; say which."""
    select, screen, store = str(run.recipe.run.select_checkpoint), run.screen, run.store
    scores, limits = decoded(list[CheckpointScore], scored), limits_of(select)
    chosen = choose(scores, limits)
    kept = chosen or scores[-1]
    rows = [
        [f"{s.step}{' (kept)' * (s is kept)}", *map(str, (s.unsafe, s.over_refusal, s.broken)), f"{s.drift:.5f}"]
        for s in scores
    ]
    title = "Checkpoints on validation prompts, greedy and sampled: count, rate (95 % interval)"
    screen.table(title, ["step", "unsafe", "over-refusal", "broken", "drift, nats"], rows)
    if chosen is None:
        screen.line(
            f"no checkpoint keeps {select}; the last one is kept. Loosen --select-checkpoint, or raise --anchor-ratio"
        )
    else:
        screen.line(f"step {chosen.step} is the safest that keeps {select}")
        weights = _weights(store.path / _file(chosen.step), student) if store.ours else None
        weights = machines.here().share_arrays(weights)
        student.load_weights(list(weights.items()), strict=False)
    store.json("selection.json", {"select": select, "kept": kept.step, "within": chosen is not None, "scores": scored})
