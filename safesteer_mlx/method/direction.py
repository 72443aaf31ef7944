"""Stage 1: the refusal direction, a difference of mean activations (Arditi et al. 2024; method page, 1).

    r[i,l]  = mean_H x[l][i] − mean_B x[l][i]        for every end-of-instruction position i and block l
    score   = log(p(R) + 1e-8) − log(1 − p(R) + 1e-8),   p(R) = Σ_{v∈R} p(v) at the last position

`r` is not normalised: its length is the natural steering strength. The candidate is chosen that, when
ablated, lowers refusal of harmful prompts most, among those that raise refusal of harmless prompts when
added and that disturb harmless prompts little when ablated.

Where we deviate: a search that is not exhaustive asks the cheapest question first, prompts a few at a
time, and drops a candidate as soon as what is left to ask can no longer save it. Steering resumes at the
block it changes. It chooses the same direction. By default the tests
only rank: `shortlist`'s candidates are tried as teachers (`teacher.choose_teacher`), since refusal and KL under
ablation say little about what steering does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..system import machines
from ..system.memory import with_smaller_batches
from ..system.screen import Advance, UserError, silent
from ..system.store import Block, Position, Prompt, Scores, StreamVector, TokenId
from .losses import inside_and_rest
from .own_answers import NONE, REFUSED, OwnAnswers, Thoughts, find_openers
from .prompts import Rows
from .residual import (
    ablate,
    block_inputs,
    blocks,
    by_length,
    last_logits,
    left_by_ablation,
    pad_right,
    resume,
    resumes,
    steer,
    take_positions,
)
from .rollout import Ids
from .run import Run

Candidate = tuple[int, int]  # row of the position, block

PROMPT_BATCH = 32  # rows in one forward pass

ASKED_AT_ONCE = 4  # prompts asked before candidates are dropped
NEAREST = 3  # candidates that are measured in full where none passes the published tests
SHORTLIST = 5  # candidates that are tried as teachers
SPREAD = 4  # blocks that are tried where there are no tests
A_BLOCK = 2  # of one block: neighbouring positions differ little
LEFT, LEFT_BY_HALF = 1e-3, 1e-2  # of the length of the stream, along a direction: more than rounding leaves of it
GROUP = 4  # candidates whose refusal under ablation is asked side by side
SCORE_BOUND = float(np.log1p(1e-8) - np.log(1e-8))  # no refusal score is larger or smaller


@dataclass(frozen=True)
class CandidateScores:
    """Three scores a candidate, each (P, L); row p is position p − P. NaN marks what was not measured."""

    ablation_kl: Scores
    ablation_refusal: Scores
    steering_refusal: Scores


@dataclass(frozen=True)
class Direction:
    """A direction: `vector` (D,) float32, added before block `layer`, found at `position` (−1 last)."""

    position: Position
    layer: Block
    vector: StreamVector


def filled(scores: CandidateScores, more: CandidateScores) -> CandidateScores:
    """`scores`, and where they were not measured, `more`."""
    names = ("ablation_kl", "ablation_refusal", "steering_refusal")
    tables = {name: np.where(np.isnan(own := getattr(scores, name)), getattr(more, name), own) for name in names}
    return CandidateScores(**tables)


def mean_differences(
    model: nn.Module, harmful: Sequence[Ids], harmless: Sequence[Ids], n_pos: int, batch_size: int = PROMPT_BATCH
) -> np.ndarray:
    """Candidate directions r[i,l] at the last `n_pos` positions: (P, L, D) float64.

    Means are accumulated in float64 on the host: activations differ by orders of magnitude, and Metal
    has no float64. Several machines read a part of the prompts each.

    Raises:
        ValueError: a set is empty, or a prompt is shorter than `n_pos`.
    """

    def mean(prompts: Sequence[Ids]) -> np.ndarray:
        if not prompts or min(map(len, prompts)) < n_pos:
            raise ValueError(f"{len(prompts)} prompts of at least {n_pos} tokens each are too few or too short")
        own = [prompts[i] for i in machines.here().part(len(prompts))]
        total = np.zeros(1)  # for a machine whose part is nothing
        for batch in by_length(own, batch_size):
            rows = [own[i] for i in batch]
            positions = mx.array([[len(row) - n_pos + p for p in range(n_pos)] for row in rows])
            inputs = mx.stack([take_positions(x, positions) for x in block_inputs(model, pad_right(rows))])
            total = total + np.array(inputs.astype(mx.float32), np.float64).sum(1)  # of (L, B, P, D)
        return np.moveaxis(machines.here().add(total) / len(prompts), 0, 1)

    return mean(harmful) - mean(harmless)


def _refusal_score(logits: mx.array, refusal_ids: Ids) -> mx.array:
    """logits (B, V) -> scores (B,). p and 1 − p each by its own logsumexp, so neither loses digits.

    R is a set: two openers may begin with one token, whose probability counts once.
    """
    normaliser = mx.logsumexp(logits, axis=-1)
    inside, rest = inside_and_rest(logits, mx.array(sorted(set(refusal_ids))))
    refusal, other = mx.exp(mx.logsumexp(inside, axis=-1) - normaliser), mx.exp(rest - normaliser)
    return mx.log(refusal + 1e-8) - mx.log(other + 1e-8)


def refusal_scores(
    model: nn.Module, prompts: Sequence[Ids], refusal_ids: Ids, batch_size: int = PROMPT_BATCH
) -> np.ndarray:
    """The refusal score of each prompt: (N,). Above 0 the next token more likely opens a refusal than not."""

    def part(rows: list[Ids]) -> list[float]:
        scores = np.empty(len(rows))
        for batch in by_length(rows, batch_size):
            scores[batch] = np.array(_refusal_score(last_logits(model, [rows[i] for i in batch]), refusal_ids))
        return scores.tolist()

    return np.array(machines.here().each(prompts, part))


def steered_logits(
    model: nn.Module, layer: int, vectors: mx.array, rows: Sequence[Ids], inputs: mx.array | None
) -> mx.array:
    """Next-token logits (B, V) of rows that repeat a few prompts, each with a vector of its own (B, D) added.

    `inputs` (N, T, D), where the model can resume, is what goes into `layer` for the N prompts that are repeated.
    """
    steered = steer(model, layer, vectors)
    if inputs is not None:
        steered = resume(steered, layer, mx.concatenate([inputs] * (len(rows) // len(inputs))))
    return last_logits(steered, rows)


def opening_probabilities(
    model: nn.Module,
    direction: Direction,
    coeffs: Sequence[float],
    harmful: Sequence[Ids],
    harmless: Sequence[Ids],
    refusal_ids: Ids,
    batch_size: int = PROMPT_BATCH,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What steering by `direction` does to how an answer opens, a number for each coefficient.

    Returns:
        Mean p(R) on harmful and on harmless prompts, and mean KL(base ‖ steered) on harmless ones, (C,) each.
    """
    ids = mx.array(sorted(set(refusal_ids)))
    size = max(1, batch_size // len(coeffs))
    can_resume = resumes(model, pad_right([harmful[0]]))

    def over(prompts: Sequence[Ids], with_kl: bool) -> np.ndarray:
        """Sums over prompts of p(R), and of KL, (2, C)."""
        own = [prompts[i] for i in machines.here().part(len(prompts))]
        sums = np.zeros((2, len(coeffs)))
        for batch in by_length(own, size):
            rows = [own[i] for i in batch]
            inputs = block_inputs(model, pad_right(rows))[direction.layer] if can_resume else None
            vectors = mx.repeat(mx.array(coeffs)[:, None] * direction.vector, len(rows), axis=0)  # (C·B, D)
            logits = steered_logits(model, direction.layer, vectors, rows * len(coeffs), inputs)
            refusal = mx.exp(mx.logsumexp(logits[:, ids], axis=-1) - mx.logsumexp(logits, axis=-1))
            kl = mx.zeros_like(refusal)
            if with_kl:
                kl = _kl(mx.concatenate([last_logits(model, rows)] * len(coeffs)), logits)
            sums += np.array(mx.stack([refusal, kl]), np.float64).reshape(2, len(coeffs), len(rows)).sum(-1)
        return machines.here().add(sums) / len(prompts)

    (on_harmful, _), (on_harmless, kl) = over(harmful, False), over(harmless, True)
    return on_harmful, on_harmless, kl


def _kl(base_logits: mx.array, other_logits: mx.array) -> mx.array:
    """Σ p (log(p + 1e-6) − log(q + 1e-6)), p the base: (B, V), (B, V) -> (B,)."""
    p, q = mx.softmax(base_logits, axis=-1), mx.softmax(other_logits, axis=-1)
    return (p * (mx.log(p + 1e-6) - mx.log(q + 1e-6))).sum(-1)


def pruned_from(n_layers: int, prune_last: float | None) -> int:
    """The first block that is too late to steer: floor((1 − prune_last) · L), or L; of two blocks, the second, the only
    one to steer before, is never pruned."""
    if prune_last is None or n_layers == 2:
        return n_layers
    # Rounded first, so that 0.8 · 10 does not become 7.
    return int(np.floor(round((1 - prune_last) * n_layers, 9)))


@dataclass(frozen=True)
class Limits:
    """The published tests' thresholds: KL on harmless prompts under ablation at most, their refusal when steered at
    least, the share of the last blocks that are left out. None leaves a test out."""

    kl_threshold: float | None = 0.1
    steering_threshold: float | None = 0.0
    prune_last: float | None = 0.2


@dataclass(frozen=True)
class Search(Limits):
    """How candidates are searched: to the end for all, the (row, block) that are measured (None for all), what ablation
    projects (`ablate`), rows in one forward pass."""

    exhaustive: bool = False
    only: Sequence[Candidate] | None = None
    whole_stream: bool = False
    batch_size: int = PROMPT_BATCH
    progress: Advance = silent


# ask(candidates, indices of prompts) -> a score for each, (C, B)
Ask = Callable[[list[Candidate], list[int]], np.ndarray]


def score_candidates(
    model: nn.Module,
    candidates: np.ndarray,
    harmful: Sequence[Ids],
    harmless: Sequence[Ids],
    refusal_ids: Ids,
    exhaustive: bool = False,
    **search_settings: Any,
) -> CandidateScores:
    """Score candidate directions (P, L, D) on validation prompts.

    `exhaustive` measures everything. Otherwise candidates in pruned blocks and of length zero are not
    run, ablation is measured only where steering passed, its refusal only where its KL passed too, and a
    candidate that can no longer be chosen is left where it is. `search_settings` are `Search`'s fields.

    Returns:
        `ablation_kl`, `ablation_refusal`, `steering_refusal`, each (P, L), NaN where not measured.
    """
    how = Search(exhaustive=exhaustive, **search_settings)
    only, batch_size = how.only, how.batch_size
    vectors = mx.array(candidates.astype(np.float32))
    starts = range(0, len(harmless), batch_size)
    base = mx.concatenate([last_logits(model, harmless[i : i + batch_size]) for i in starts])
    probabilities = mx.softmax(base, axis=-1)
    # KL ≥ −log(1 + ε Σ p/(p + ε)), by Jensen's inequality; and a little for rounding.
    floor = -np.array(mx.log1p(1e-6 * (probabilities / (probabilities + 1e-6)).sum(-1)), np.float64) - 1e-5
    can_resume = resumes(model, pad_right(harmless[:1]))

    def in_groups(
        pairs: list[Candidate], rows: list[Ids], score: Callable[[mx.array, list[Ids]], mx.array]
    ) -> np.ndarray:
        """score(vectors (C·B, D), rows (C·B)) for a few candidates at a time: (C, B)."""
        size = max(1, batch_size // len(rows))
        out = []
        for start in range(0, len(pairs), size):
            group = pairs[start : start + size]
            each = mx.stack([vectors[c] for c in group for _ in rows])
            out.append(np.array(score(each, rows * len(group)), np.float64).reshape(len(group), len(rows)))
        return np.concatenate(out)

    def steering(pairs: list[Candidate], indices: list[int]) -> np.ndarray:
        rows = [harmless[i] for i in indices]
        inputs = block_inputs(model, pad_right(rows)) if can_resume else []
        scores = np.empty((len(pairs), len(rows)))
        for layer in sorted({layer for _, layer in pairs}):
            at = [i for i, c in enumerate(pairs) if c[1] == layer]

            def score(each: mx.array, repeated: list[Ids], layer: int = layer) -> mx.array:
                logits = steered_logits(model, layer, each, repeated, inputs[layer] if can_resume else None)
                return _refusal_score(logits, refusal_ids)

            scores[at] = in_groups([pairs[i] for i in at], rows, score)
        return scores

    def kl(pairs: list[Candidate], indices: list[int]) -> np.ndarray:
        def score(each: mx.array, repeated: list[Ids]) -> mx.array:
            logits = last_logits(ablate(model, each, how.whole_stream), repeated)
            return _kl(mx.concatenate([base[mx.array(indices)]] * (len(logits) // len(indices))), logits)

        return in_groups(pairs, [harmless[i] for i in indices], score)

    def refusal(pairs: list[Candidate], indices: list[int]) -> np.ndarray:
        def score(each: mx.array, repeated: list[Ids]) -> mx.array:
            return _refusal_score(last_logits(ablate(model, each, how.whole_stream), repeated), refusal_ids)

        return in_groups(pairs, [harmful[i] for i in indices], score)

    moved = candidates.any(-1)  # a vector of no length changes nothing: its scores are the base's own
    own = {"ablation_kl": 0.0, "steering_refusal": 0.0, "ablation_refusal": 0.0}
    if only is None and not (moved.all() or exhaustive):
        own["steering_refusal"] = float(np.array(_refusal_score(base, refusal_ids), np.float64).mean())
        own["ablation_refusal"] = float(refusal_scores(model, harmful, refusal_ids, batch_size).mean())
    candidate_mask = moved | exhaustive
    if only is not None:
        candidate_mask = np.zeros(moved.shape, bool)
        for candidate in only:
            candidate_mask[candidate] = True
        own = dict.fromkeys(own, np.nan)  # of the others nothing is known
    return search(
        candidate_mask,
        own,
        Scorers(steering, kl, refusal, floor),
        (list(by_length(harmless, ASKED_AT_ONCE)), list(by_length(harmful, ASKED_AT_ONCE))),
        how,
    )


@dataclass(frozen=True)
class Scorers:
    """What a search may ask, the least that each harmless prompt's KL can be (N,)."""

    steering: Ask  # refusal of harmless prompts
    kl: Ask  # on harmless prompts
    refusal: Ask  # of harmful prompts under ablation
    kl_floor: np.ndarray


def search(
    moved: np.ndarray,
    own: dict[str, float],
    scorers: Scorers,
    batches: tuple[list[list[int]], list[list[int]]],
    how: Search,
) -> CandidateScores:
    """Ask no more than the choice needs: steering, then KL, then refusal, each a few prompts at a time.

    Args:
        moved: (P, L), False for vectors of no length, whose scores are `own`.
        batches: indices of harmless and of harmful prompts, in the order they are asked.
    """
    n_pos, n_layers = moved.shape
    limits = Limits(None, None, None) if how.exhaustive else how
    progress = how.progress
    scores = CandidateScores(*(np.full(moved.shape, np.nan) for _ in range(3)))
    allowed = range(pruned_from(n_layers, limits.prune_last))
    candidates = [(p, layer) for layer in allowed for p in range(n_pos) if moved[p, layer]]
    for name, value in own.items():
        getattr(scores, name)[:, : len(allowed)][~moved[:, : len(allowed)]] = value
    n_harmless, n_harmful = (sum(map(len, part)) for part in batches)

    def ask_all(
        ask: Ask,
        of: list[Candidate],
        parts: list[list[int]],
        floor: np.ndarray,
        limit: float = np.inf,
        initial: np.ndarray | float = 0.0,
    ) -> np.ndarray:
        """Sums of scores (C,) over `initial` and the prompts of `parts`; NaN for a candidate dropped on the way.

        Dropped is one whose sum will pass `limit` even if every answer left is the least there can be.
        """
        sums, alive = np.zeros(len(of)) + initial, list(range(len(of)))
        for i, part in enumerate(parts):
            remaining = sum(float(floor[later].sum()) for later in parts[i + 1 :])  # of what is left to ask
            sums[alive] += ask_together(ask, [of[c] for c in alive], part).sum(1)
            alive = [c for c in alive if not sums[c] + remaining > limit]
            if not alive:
                break
        return np.where(np.isin(np.arange(len(of)), alive), sums, np.nan)

    harmless, harmful = batches
    least = np.full(max(n_harmless, n_harmful), -SCORE_BOUND - 1e-3)
    total, alive = 3 * len(candidates), candidates
    if alive:
        # To the end, for all: where no candidate passes, this is what they are ranked by.
        scores.steering_refusal[*np.transpose(alive)] = ask_all(scorers.steering, alive, harmless, least) / n_harmless
        if not how.exhaustive:
            lowest = -np.inf if limits.steering_threshold is None else limits.steering_threshold
            alive = [c for c in alive if scores.steering_refusal[c] >= lowest]
    progress(len(candidates), total)
    if alive:
        highest = np.inf if limits.kl_threshold is None else limits.kl_threshold
        sums = ask_all(scorers.kl, alive, harmless, scorers.kl_floor, highest * n_harmless)
        scores.ablation_kl[*np.transpose(alive)] = sums / n_harmless
        if not how.exhaustive:
            alive = [c for c in alive if scores.ablation_kl[c] <= highest]
    progress(2 * len(candidates), total)
    if alive:
        # All answer the first prompts; then the most promising first, so that the others are dropped soon.
        initial = ask_all(scorers.refusal, alive, harmful[:1], least)
        passing = [c for c in zip(*np.nonzero(~moved), strict=True) if not failed_tests(scores, *c, limits)]
        best = own["ablation_refusal"] * n_harmful if passing and not how.exhaustive else np.inf
        order = np.argsort(initial, kind="stable")
        for start in range(0, len(order), GROUP):
            which = order[start : start + GROUP]
            part = [alive[i] for i in which]
            limit = np.inf if how.exhaustive else best
            sums = ask_all(scorers.refusal, part, harmful[1:], least, limit, initial[which])
            scores.ablation_refusal[*np.transpose(part)] = sums / n_harmful
            best = np.nanmin([best, *sums])
            progress(2 * len(candidates) + start + len(part), total)
    progress(total, total)
    return scores


def ask_together(ask: Ask, of: list[Candidate], part: list[int]) -> np.ndarray:
    """What `ask` answers, of which each machine asks about its share of the candidates."""
    return np.array(machines.here().each(of, lambda pairs: ask(pairs, part).tolist() if pairs else []))


def failed_tests(scores: CandidateScores, position: int, layer: int, limits: Limits) -> list[str]:
    """Which tests the candidate at [position, layer] fails, in words; empty when it passes."""
    p = (position, layer)
    tests = []
    if layer >= pruned_from(scores.ablation_kl.shape[1], limits.prune_last):
        tests.append(f"block {layer} is in the last {limits.prune_last:.0%}")
    for name, score, broken_if, threshold in (
        ("refusal when steered", scores.steering_refusal[p], "<", limits.steering_threshold),
        ("KL when ablated", scores.ablation_kl[p], ">", limits.kl_threshold),
        ("refusal when ablated", scores.ablation_refusal[p], ">", None),
    ):
        if np.isnan(score):
            tests.append(f"{name} was not measured or is not a number")
        elif threshold is not None and (score < threshold if broken_if == "<" else score > threshold):
            tests.append(f"{name} {score:+.3f} {broken_if} {threshold:g}")
    return tests


def choose_direction(scores: CandidateScores, **limits: float | None) -> tuple[int, int]:
    """The (position, layer) with the smallest ablated refusal among those that pass; position −1 is the last.

    Discarded are: any NaN, l ≥ floor((1 − prune_last)·L), KL > kl_threshold, steered refusal <
    steering_threshold. `limits` are `Limits`' fields; a threshold of None leaves its test out.

    Raises:
        ValueError: none passes.
    """
    how, (n_pos, n_layers) = Limits(**limits), scores.ablation_kl.shape
    passing = [c for c in np.ndindex(n_pos, n_layers) if not failed_tests(scores, *c, how)]
    if not passing:
        raise ValueError(f"none of the {n_pos * n_layers} candidate directions passes all tests")
    p, layer = min(passing, key=lambda c: (scores.ablation_refusal[c], c))
    return p - n_pos, layer


def shortlist(
    scores: CandidateScores, limits: Limits, count: int = SHORTLIST, moved: np.ndarray | None = None
) -> list[tuple[int, int, list[str]]]:
    """The candidates worth trying as teachers, best first: (position, layer, tests failed).

    The published choice comes first, if there is one; then those that fail fewest tests, and of these those that
    raise refusal most. At most two are of one block. Block 0 is left out: its input is the template's embeddings, the
    same for every prompt. So are candidates of length zero, those that are not in `moved` (P, L): a few convolutions
    see no further back than the template.
    """
    n_pos, n_layers = scores.ablation_kl.shape
    ranked = []
    for p in range(n_pos):
        for layer in range(1, pruned_from(n_layers, limits.prune_last)):
            steering, ablated = scores.steering_refusal[p, layer], scores.ablation_refusal[p, layer]
            if np.isnan(steering) or (moved is not None and not moved[p, layer]):
                continue
            failed = failed_tests(scores, p, layer, limits)
            ranked.append((len(failed), -steering if failed else ablated, p - n_pos, layer, failed))
    near: list[tuple[int, int, list[str]]] = []
    for *_, position, layer, failed in sorted(ranked):
        if len(near) < count and sum(at == layer for _, at, _ in near) < A_BLOCK:
            near.append((position, layer, failed))
    return near


def spread(n_pos: int, n_layers: int) -> list[Candidate]:
    """A few candidates all over the blocks and positions, for want of tests: (row, block)."""
    rows = sorted({0, n_pos // 2, n_pos - 1})
    at = sorted({round(1 + (n_layers - 2) * i / (SPREAD - 1)) for i in range(SPREAD)} & set(range(1, n_layers)))
    return [(row, layer) for layer in at for row in rows]


def no_direction(model: nn.Module) -> tuple[Direction, CandidateScores]:
    """What stands for a direction where the teacher needs none: nothing measured, a vector of no length."""
    nothing = np.full((1, len(blocks(model))), np.nan)
    return Direction(-1, 0, mx.zeros(1)), CandidateScores(nothing, nothing, nothing)


def filter_by_refusal_score(
    model: nn.Module, harmful: Rows, harmless: Rows, refusal_ids: Ids, batch_size: int = PROMPT_BATCH
) -> tuple[Rows, Rows]:
    """The harmful prompts with score > 0 and the harmless ones with score < 0 (method page, 1.1)."""
    of_harmful, of_harmless = (refusal_scores(model, rows, refusal_ids, batch_size) for rows in (harmful, harmless))
    return (
        [row for row, score in zip(harmful, of_harmful, strict=True) if score > 0],
        [row for row, score in zip(harmless, of_harmless, strict=True) if score < 0],
    )


def or_all(harmful: Rows, *refused: Rows) -> Rows:
    """The first of these sets of refused prompts that are not so few that their mean is of what they are about; else
    all prompts."""
    return next((rows for rows in refused if len(rows) >= max(1, REFUSED * len(harmful))), harmful)


@dataclass(frozen=True)
class FoundDirections:
    """Stage 1's result: refusal openers with their first ids, the scores of all candidates, those worth trying as
    teachers with the tests that each failed, best first, the prompts that passed its filter, those for validation and
    those that all directions were found from, what speaks against it, in sentences, how the model thinks, and with what
    sentences it refuses that the judge does not know."""

    openers: dict[str, TokenId]
    scores: CandidateScores
    shortlist: list[Direction]
    failed: list[list[str]]
    harmful: list[Prompt]
    harmless: list[Prompt]
    harmful_train: list[Prompt] = field(default_factory=list)
    harmless_train: list[Prompt] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)
    thoughts: Thoughts = NONE
    refusals: list[str] = field(default_factory=list)

    def __post_init__(self):
        if not self.shortlist or len(self.shortlist) != len(self.failed) or not self.harmless:
            raise ValueError("no direction, one without its tests, or no prompts")


def find_directions(run: Run) -> FoundDirections:
    """The candidates worth trying as teachers, the published choice first where there is one.

    Raises:
        UserError: the base refuses every harmless prompt, or no candidate can be measured.
    """
    own = find_openers(run)
    find = _find_directions if own.openers else _untested_directions
    size = run.recipe.run.prompt_batch_size
    directions = with_smaller_batches(size, partial(find, run, own), "the search for the direction", together=True)[0]
    return replace(directions, cautions=[*directions.cautions, *own.cautions], refusals=own.refusals)


def as_it_answers(run: Run, directions: FoundDirections) -> Run:
    """The run of a model as it answers: one that could think first and does not is one that cannot, whose answers tell
    soon, or begin alike; and that refuses in words of its own."""
    alike = directions.thoughts.alike
    thinks = run.base.thinks and bool(directions.thoughts.length) and not alike
    base = replace(run.base, thinks=thinks, alike=alike)
    return replace(run, base=base, refusals=directions.refusals)


def _untested_directions(run: Run, own: OwnAnswers, batch_size: int) -> FoundDirections:
    """For a model whose answers tell late, behind a thought or a beginning that all have: the published tests read the
    first token of an answer, which tells nothing here.

    Prompts are kept by what the answers did, and directions of a few blocks and positions are left to be tried.
    """
    model, prompts = run.base.model, run.prompts
    scoring = prompts.harmful_direction_validation, prompts.harmless_direction_validation
    nothing, scores = no_direction(model)
    if run.recipe.teacher.teacher == "system_prompt":
        return FoundDirections({}, scores, [nothing], [[]], *scoring, thoughts=own.thoughts)
    harmful, harmless = prompts.harmful_direction_train, prompts.harmless_direction_train
    harmful = or_all(harmful, [*compress(harmful, own.harmful_refused)])
    harmless = [row for row, refusal in zip(harmless, own.harmless_refused, strict=True) if not refusal]
    if not harmless:
        raise UserError(f"the base refuses all {len(own.harmless_refused)} harmless prompts; choose another model")
    candidates = mean_differences(model, harmful, harmless, prompts.n_eoi, batch_size)
    n_pos, n_layers = candidates.shape[:2]
    prune_last = run.recipe.direction.prune_last
    at = [one for one in spread(n_pos, pruned_from(n_layers, prune_last)) if candidates[one].any()]
    if not at:
        raise UserError(f"prune_last = {prune_last} leaves only the first of {n_layers} blocks; lower it")
    directions = [Direction(p - n_pos, layer, mx.array(candidates[p, layer].astype(np.float32))) for p, layer in at]
    run.screen.detail(f"directions: {len(directions)} of {n_pos * n_layers} to be tried as teachers")
    none = np.full((n_pos, n_layers), np.nan)
    caution = "refusals of this model begin as its other answers do, so directions cannot be tested by that, only tried"
    if own.thoughts.length and not own.thoughts.alike:
        caution = (
            "the model thinks before it answers, so directions cannot be tested by how answers begin, only tried; "
            "--thinking off, where its template can, aligns its plain answers"
        )
    scores = CandidateScores(none, none, none)
    tests, found_from = [[] for _ in directions], (harmful, harmless)
    return FoundDirections({}, scores, directions, tests, *scoring, *found_from, [caution], own.thoughts)


def _whole_stream(run: Run, candidates: np.ndarray) -> bool:
    """Whether ablation projects all that reaches the stream, told by a candidate of a middle block (P, L, D)."""
    if (way := run.recipe.direction.ablation) != "auto":
        return way == "stream"
    vector = mx.array(candidates[-1, candidates.shape[1] // 2].astype(np.float32))
    left = too_much_left(run.base.model, vector, pad_right(run.prompts.harmless_validation[:1]))
    if left is not None:
        run.screen.detail(
            f"ablation: as published it leaves up to {left:.1%} of the stream along a direction (norms stand between a "
            "block's parts and the stream), so all that reaches the stream is projected"
        )
    return left is not None


def too_much_left(model: nn.Module, vector: mx.array, tokens: mx.array) -> float | None:
    """What the published ablation leaves (`left_by_ablation`), if rounding is not all of it: in half precision a
    thousandth is."""
    left = left_by_ablation(model, vector, tokens)
    most = LEFT if block_inputs(model, tokens)[0].dtype == mx.float32 else LEFT_BY_HALF
    return left if left > most else None


def _refused(run: Run, harmful: Rows, begun: Rows, sampled: Rows) -> tuple[Rows, list[str]]:
    """The harmful prompts that directions are found from, and cautions: those `begun` as refusals, or those of which
    `sampled` answers refuse, as of a model whose refusals begin as its other answers do, or all."""
    kept = or_all(harmful, begun, sampled)
    if kept is begun:
        return kept, []
    some, seem = (f"only {len(begun)}", "seem") if begun else ("none", "seems")
    why = f"{some} of its answers to {len(harmful)} harmful requests {seem} to begin as a refusal, so"
    if kept is sampled:
        run.screen.detail(f"{why} the {len(sampled)} were used that it refuses at temperature 1")
        return kept, []
    return kept, [
        f"{why} all were used to find what makes it refuse; give --refusal-prefixes, if this model refuses in other "
        "words"
    ]


def _find_directions(run: Run, own: OwnAnswers, batch_size: int) -> FoundDirections:
    settings, model, prompts, refusal_ids = run.recipe.direction, run.base.model, run.prompts, [*own.openers.values()]
    limits = Limits(settings.kl_threshold, settings.steering_threshold, settings.prune_last)

    def by_score(harmful: Rows, harmless: Rows) -> tuple[Rows, Rows]:
        begun, answered = filter_by_refusal_score(model, harmful, harmless, refusal_ids, batch_size)
        if not answered:
            raise UserError(
                f"the base begins its answers to all {len(harmless)} harmless prompts as refusals begin; give other "
                "--refusal-prefixes, or choose a model that answers some"
            )
        return begun, answered

    scoring = prompts.harmful_direction_validation, prompts.harmless_direction_validation
    if run.recipe.teacher.teacher == "system_prompt":
        nothing, scores = no_direction(model)
        return FoundDirections(own.openers, scores, [nothing], [[]], scoring[0], by_score(*scoring)[1])
    with run.screen.stage("finding the refusal direction") as advance:
        harmful = prompts.harmful_direction_train
        begun, harmless = by_score(harmful, prompts.harmless_direction_train)
        kept, cautions = _refused(run, harmful, begun, [*compress(harmful, own.harmful_refused)])
        train = kept, harmless
        candidates = mean_differences(model, *train, prompts.n_eoi, batch_size)
        begun, harmless = by_score(*scoring)
        scoring = or_all(scoring[0], begun), harmless
        how = {"batch_size": batch_size, "whole_stream": _whole_stream(run, candidates)}
        search = partial(score_candidates, model, candidates, *scoring, refusal_ids, **how)
        scores = search(**vars(limits), progress=advance)
        pick = partial(shortlist, limits=limits, moved=candidates.any(-1))
        near = pick(scores)
        if near and near[0][2]:  # none passes: what the search left unmeasured of the nearest
            rows = [(position + candidates.shape[0], layer) for position, layer, _ in near[:NEAREST]]
            scores = filled(scores, search(exhaustive=True, only=rows))
            near = pick(scores)
    if not near:
        raise UserError(
            f"no direction can be measured: prune_last = {settings.prune_last} leaves only the first of "
            f"{candidates.shape[1]} blocks, or no score is a number; lower --prune-last, or use --teacher system_prompt"
        )
    if near[0][2]:
        cautions.append(
            "nothing found in the model passes every published test of what makes it refuse; what is used was chosen "
            "by the answers it leads to"
        )
    directions = [Direction(p, at, mx.array(candidates[p, at].astype(np.float32))) for p, at, _ in near]
    tests = [failed for *_, failed in near]
    n_passing = tests.count([])
    run.screen.detail(
        f"directions: {len(near)} of {candidates.shape[0] * candidates.shape[1]} to be tried as teachers"
        f", {f'{n_passing} of them pass' if n_passing else 'none passes'} the published tests"
    )
    return FoundDirections(own.openers, scores, directions, tests, *scoring, *train, cautions)
