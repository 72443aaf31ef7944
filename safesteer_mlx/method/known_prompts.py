"""What the base makes of prompts that come again: the anchor's, behind which it reads the student's answers.

The base does not change while the student trains, so the keys and values of such a prompt are computed once, when it is
first needed, beside others that depend on nothing that happens in training: a run that goes on has them to the bit.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .residual import Trunk, answer_states, as_in_a_gradient, by_length, close, recording
from .rollout import Ids, grown_in_small_steps, has_equal_batches, read_into

TOLD_BY = 8  # tokens of an answer, enough to tell whether it is read alike
WINDOW = 64  # prompts, in the order in which they are first needed, among which those of like length are read together

Row = tuple[int, ...]


@dataclass(frozen=True)
class KnownPrompts:
    """Prompts, each with those that are `read_with` it, all but their last ids. Of those that were: `caches`, block by
    block, and `inputs` (P − 1, D), what went into block `layer`, from which on the student differs; none for 0."""

    base: nn.Module
    layer: int
    read_with: dict[Row, list[Row]]
    caches: dict[Row, list[Any]] = field(default_factory=dict)
    inputs: dict[Row, mx.array] = field(default_factory=dict)

    def __contains__(self, prompt: Ids) -> bool:
        return tuple(prompt) in self.read_with

    def read(self, prompts: Sequence[Ids], answers: Sequence[Ids]) -> tuple[Trunk, mx.array]:
        """What student and base share of a pass over known prompts and their answers, and the base's states that
        predict these, as `answer_states` has them: (R, D)."""
        rows = [tuple(prompt) for prompt in prompts]
        for row in rows:
            if row not in self.caches:
                self._read(self.read_with[row])
        blocks = zip(*(self.caches[row] for row in rows), strict=True)
        cache = grown_in_small_steps([of_block[0].merge(list(of_block)) for of_block in blocks])
        passed: list[mx.array] = []
        model = recording(self.base, self.layer, passed) if self.layer else self.base
        states = answer_states(model, [row[-1:] for row in rows], answers, cache=cache)
        if not self.layer:
            return None, states
        width = max(len(row) + len(answer) for row, answer in zip(rows, answers, strict=True))
        whole = [
            mx.concatenate([self.inputs[row], passed[0][i, : 1 + len(answer)]])
            for i, (row, answer) in enumerate(zip(rows, answers, strict=True))
        ]
        return (self.layer, mx.stack([mx.pad(x, [(0, width - len(x)), (0, 0)]) for x in whole])), states

    def _read(self, rows: Sequence[Row]) -> None:
        """Read some prompts side by side, and keep what is known of each."""
        from mlx_lm.models.cache import make_prompt_cache

        passed: list[mx.array] = []
        model = recording(self.base, self.layer, passed) if self.layer else self.base
        cache = [one.merge([one] * len(rows)) for one in make_prompt_cache(self.base)]
        read_into(model, cache, [row[:-1] for row in rows])
        whole = mx.concatenate(passed, axis=1) if self.layer else None
        for i, row in enumerate(rows):
            self.caches[row] = [one.extract(i) for one in cache]
            if whole is not None:
                self.inputs[row] = mx.contiguous(whole[i, : len(row) - 1])
            mx.eval([one.state for one in self.caches[row]], self.inputs.get(row))


def known_prompts(base: nn.Module, prompts: Sequence[Ids], layer: int, size: int) -> KnownPrompts | None:
    """Prompts in the order in which they are first needed, of which the base reads `size` at a time; None where an
    architecture's caches are not of keys and values alone, or where reading on behind them comes to something else than
    reading at once."""
    if (longest := _longest(base)) is None:
        return None
    rows = list(dict.fromkeys(tuple(prompt) for prompt in prompts if 1 < len(prompt) <= longest))
    windows = [rows[start : start + WINDOW] for start in range(0, len(rows), WINDOW)]
    groups = [[window[i] for i in indices] for window in windows for indices in by_length(window, size)]
    known = KnownPrompts(base, layer, {row: group for group in groups for row in group})
    return known if groups and _reads_rightly(known, [groups[0][0], groups[0][-1]]) else None


def _longest(base: nn.Module) -> int | None:
    """Ids of a prompt that all caches hold; None where one holds something else than keys and values."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    caches = make_prompt_cache(base)
    rotating = [cache for cache in caches if type(cache) is RotatingKVCache and not cache.keep]
    if has_equal_batches(base) or sum(type(cache) is KVCache for cache in caches) + len(rotating) < len(caches):
        return None
    return min((cache.max_size for cache in rotating), default=sys.maxsize)


def _reads_rightly(known: KnownPrompts, rows: list[Row]) -> bool:
    """Told by two prompts, each begun again as the answer to the other."""
    answers = [row[:TOLD_BY] for row in reversed(rows)]
    _, states = as_in_a_gradient(known.read, rows, answers)
    return close(states, answer_states(known.base, rows, answers))
