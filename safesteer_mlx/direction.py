"""Stage 1: the refusal direction, a difference of mean activations (Arditi et al. 2024; method page, 1).

    r[i,l]  = mean_H x[l][i] − mean_B x[l][i]        for every end-of-instruction position i and block l
    score   = log(p(R) + 1e-8) − log(1 − p(R) + 1e-8),   p(R) = Σ_{v∈R} p(v) at the last position

`r` is not normalised: its length is the natural steering strength. The candidate is chosen that, when
ablated, lowers refusal of harmful prompts most, among those that raise refusal of harmless prompts when
added and that disturb harmless prompts little when ablated.

Where we deviate: a search that is not exhaustive asks the cheapest question first and never scores a
candidate that an earlier answer has already ruled out. It chooses the same direction.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .progress import Advance, silent
from .residual import ablate, block_inputs, blocks, last_logits, pad_right, steer

Ids = Sequence[int]

PROMPT_BATCH = 32  # prompts in one forward pass


class NoDirectionError(ValueError):
    """No candidate passed; `scores` holds what was measured."""

    def __init__(self, message: str, scores: "CandidateScores"):
        super().__init__(message)
        self.scores = scores


@dataclass(frozen=True)
class CandidateScores:
    """Three scores a candidate, each (P, L); row p is position p − P. NaN marks what was not measured."""

    ablation_kl: np.ndarray
    ablation_refusal: np.ndarray
    steering_refusal: np.ndarray


@dataclass(frozen=True)
class Direction:
    """A chosen direction: `vector` (D,) float32, added before block `layer`, found at `position` (−1 last)."""

    position: int
    layer: int
    vector: mx.array
    scores: CandidateScores


def _batches(prompts: Sequence[Ids], size: int = PROMPT_BATCH) -> Iterator[list[int]]:
    """Indices of prompts in batches of similar length, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _over_prompts(prompts: Sequence[Ids], score: Callable[[list[Ids]], mx.array]) -> np.ndarray:
    """score(batch of prompts) -> (B, ...) for all prompts, in the order given: (N, ...) float64."""
    out: list[np.ndarray] = [np.empty(0)] * len(prompts)
    for batch in _batches(prompts):
        for i, value in zip(batch, np.array(score([prompts[i] for i in batch]), np.float64), strict=True):
            out[i] = value
    return np.stack(out)


def mean_differences(model: nn.Module, harmful: Sequence[Ids], harmless: Sequence[Ids], n_pos: int) -> np.ndarray:
    """Candidate directions r[i,l] at the last `n_pos` positions: (P, L, D) float64.

    Means are accumulated in float64 on the host: activations differ by orders of magnitude, and Metal
    has no float64.

    Raises:
        ValueError: a set is empty, or a prompt is shorter than `n_pos`.
    """

    def mean(prompts: Sequence[Ids]) -> np.ndarray:
        if not prompts or min(map(len, prompts)) < n_pos:
            raise ValueError(f"{len(prompts)} prompts of at least {n_pos} tokens each are too few or too short")
        total = 0.0
        for batch in _batches(prompts):
            rows = [prompts[i] for i in batch]
            positions = mx.array([[len(row) - n_pos + p for p in range(n_pos)] for row in rows])
            inputs = block_inputs(model, pad_right(rows), positions)  # (L, B, P, D)
            total = total + np.array(inputs.astype(mx.float32), np.float64).sum(1)
        return np.moveaxis(np.asarray(total) / len(prompts), 0, 1)

    return mean(harmful) - mean(harmless)


def _refusal_score(logits: mx.array, refusal_ids: Ids) -> mx.array:
    """logits (B, V) -> scores (B,). p and 1 − p each by its own logsumexp, so neither loses digits."""
    normaliser = mx.logsumexp(logits, axis=-1)
    ids = mx.array(list(refusal_ids))
    refusing = mx.exp(mx.logsumexp(logits[:, ids], axis=-1) - normaliser)
    others = mx.put_along_axis(logits, mx.broadcast_to(ids, (len(logits), ids.size)), mx.array(-mx.inf), axis=-1)
    other = mx.exp(mx.logsumexp(others, axis=-1) - normaliser)
    return mx.log(refusing + 1e-8) - mx.log(other + 1e-8)


def refusal_scores(model: nn.Module, prompts: Sequence[Ids], refusal_ids: Ids) -> np.ndarray:
    """The refusal score of each prompt: (N,). Above 0 the next token more likely opens a refusal than not."""
    return _over_prompts(prompts, lambda rows: _refusal_score(last_logits(model, rows), refusal_ids))


def _kl(base_logits: mx.array, other_logits: mx.array) -> mx.array:
    """Σ p (log(p + 1e-6) − log(q + 1e-6)), p the base: (B, V), (B, V) -> (B,)."""
    p, q = mx.softmax(base_logits, axis=-1), mx.softmax(other_logits, axis=-1)
    return (p * (mx.log(p + 1e-6) - mx.log(q + 1e-6))).sum(-1)


def pruned_from(n_layers: int, prune_last: float | None) -> int:
    """The first block that is too late to steer: floor((1 − prune_last) · L), or L."""
    # Rounded first, so that 0.8 · 10 does not become 7.
    return n_layers if prune_last is None else int(np.floor(round((1 - prune_last) * n_layers, 9)))


def score_candidates(
    model: nn.Module,
    candidates: np.ndarray,
    harmful: Sequence[Ids],
    harmless: Sequence[Ids],
    refusal_ids: Ids,
    exhaustive: bool = False,
    *,
    kl_threshold: float | None = 0.1,
    steering_threshold: float | None = 0.0,
    prune_last: float | None = 0.2,
    progress: Advance = silent,
) -> CandidateScores:
    """Score candidate directions (P, L, D) on validation prompts.

    `exhaustive` measures everything. Otherwise candidates in pruned blocks and of length zero are not
    run, and ablation is measured only where steering passed, its refusal only where its KL passed too.

    Returns:
        `ablation_kl`, `ablation_refusal`, `steering_refusal`, each (P, L), NaN where not measured.
    """
    n_pos, n_layers, _ = candidates.shape
    scores = CandidateScores(*(np.full((n_pos, n_layers), np.nan) for _ in range(3)))
    base = {tuple(row): logits for row, logits in _base_logits(model, harmless)}
    wanted = [(p, layer) for layer in range(n_layers) for p in range(n_pos)]
    if not exhaustive:
        wanted = [(p, layer) for p, layer in wanted if layer < pruned_from(n_layers, prune_last)]
        zero = [c for c in wanted if not candidates[c].any()]
        if zero:  # a zero vector changes nothing, so its scores are the base's own
            index = tuple(np.array(zero).T)
            steered = _over_prompts(
                harmless, lambda rows: _refusal_score(mx.stack([base[tuple(row)] for row in rows]), refusal_ids)
            )
            scores.steering_refusal[index] = steered.mean()
            scores.ablation_kl[index] = 0.0
            scores.ablation_refusal[index] = refusal_scores(model, harmful, refusal_ids).mean()
            wanted = [c for c in wanted if c not in zero]
    for done, (p, layer) in enumerate(wanted):
        progress(done, len(wanted))
        vector = mx.array(candidates[p, layer].astype(np.float32))
        scores.steering_refusal[p, layer] = refusal_scores(steer(model, layer, vector), harmless, refusal_ids).mean()
        if not exhaustive and _fails(scores.steering_refusal[p, layer], steering_threshold, at_least=True):
            continue
        without = ablate(model, vector)
        scores.ablation_kl[p, layer] = _over_prompts(
            harmless,
            lambda rows, without=without: _kl(mx.stack([base[tuple(row)] for row in rows]), last_logits(without, rows)),
        ).mean()
        if not exhaustive and _fails(scores.ablation_kl[p, layer], kl_threshold, at_least=False):
            continue
        scores.ablation_refusal[p, layer] = refusal_scores(without, harmful, refusal_ids).mean()
    progress(len(wanted), len(wanted))
    return scores


def _base_logits(model: nn.Module, prompts: Sequence[Ids]) -> Iterator[tuple[Ids, mx.array]]:
    for batch in _batches(prompts):
        rows = [prompts[i] for i in batch]
        logits = last_logits(model, rows)
        mx.eval(logits)
        yield from zip(rows, logits, strict=True)


def _fails(score: float, threshold: float | None, at_least: bool) -> bool:
    """Whether a score breaks its bound; NaN always does, whatever the bound."""
    if np.isnan(score):
        return True
    if threshold is None:
        return False
    return score < threshold if at_least else score > threshold


def failed_tests(
    scores: CandidateScores,
    position: int,
    layer: int,
    kl_threshold: float | None,
    steering_threshold: float | None,
    prune_last: float | None,
) -> list[str]:
    """Which tests the candidate at [position, layer] fails, in words; empty when it passes."""
    p = (position, layer)
    failed = []
    if layer >= pruned_from(scores.ablation_kl.shape[1], prune_last):
        failed.append(f"block {layer} is in the last {prune_last:.0%}")
    for name, score, threshold, at_least in (
        ("refusal when steered", scores.steering_refusal[p], steering_threshold, True),
        ("KL when ablated", scores.ablation_kl[p], kl_threshold, False),
        ("refusal when ablated", scores.ablation_refusal[p], None, False),
    ):
        if np.isnan(score):
            failed.append(f"{name} was not measured or is not a number")
        elif _fails(score, threshold, at_least):
            failed.append(f"{name} {score:+.3f} {'<' if at_least else '>'} {threshold:g}")
    return failed


def choose_direction(
    scores: CandidateScores,
    kl_threshold: float | None = 0.1,
    steering_threshold: float | None = 0.0,
    prune_last: float | None = 0.2,
) -> tuple[int, int]:
    """The (position, layer) with the smallest ablated refusal among those that pass; position −1 is the last.

    Discarded are: any NaN, l ≥ floor((1 − prune_last)·L), KL > kl_threshold, steered refusal <
    steering_threshold. A threshold of None leaves its test out.

    Raises:
        NoDirectionError: none passes.
    """
    n_pos, n_layers = scores.ablation_kl.shape
    allowed = [
        (scores.ablation_refusal[p, layer], p, layer)
        for p in range(n_pos)
        for layer in range(n_layers)
        if not failed_tests(scores, p, layer, kl_threshold, steering_threshold, prune_last)
    ]
    if not allowed:
        raise NoDirectionError(f"none of the {n_pos * n_layers} candidate directions passes all tests", scores)
    _, p, layer = min(allowed)
    return p - n_pos, layer


def nearest_candidates(
    scores: CandidateScores,
    kl_threshold: float | None,
    steering_threshold: float | None,
    prune_last: float | None,
    count: int = 3,
) -> list[tuple[int, int, list[str]]]:
    """The `count` candidates that fail by least: (position, layer, tests failed).

    Nearness is the worst relative shortfall: of steering in units of the scores' spread, of KL in units
    of its threshold.
    """
    n_pos, n_layers = scores.ablation_kl.shape
    spread = float(np.nanstd(scores.steering_refusal)) or 1.0
    ranked = []
    for p in range(n_pos):
        for layer in range(min(n_layers, pruned_from(n_layers, prune_last))):
            steering, kl = scores.steering_refusal[p, layer], scores.ablation_kl[p, layer]
            if np.isnan(steering) or np.isnan(kl):
                continue
            short = 0.0 if steering_threshold is None else (steering_threshold - steering) / spread
            over = 0.0 if kl_threshold is None else (kl - kl_threshold) / max(abs(kl_threshold), 1e-9)
            failed = failed_tests(scores, p, layer, kl_threshold, steering_threshold, prune_last)
            ranked.append((max(short, over, 0.0), p - n_pos, layer, failed))
    return [(position, layer, failed) for _, position, layer, failed in sorted(ranked)[:count]]


def no_direction(model: nn.Module) -> Direction:
    """What stands for a direction where the teacher needs none: nothing measured, a vector of no length."""
    nothing = np.full((1, len(blocks(model))), np.nan)
    return Direction(-1, 0, mx.zeros(1), CandidateScores(nothing, nothing, nothing))


def keep_answered_as_meant(
    model: nn.Module, harmful: Sequence[Ids], harmless: Sequence[Ids], refusal_ids: Ids
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of harmful prompts with score > 0 and of harmless ones with score < 0 (method page, 1.1)."""
    return (
        np.flatnonzero(refusal_scores(model, harmful, refusal_ids) > 0),
        np.flatnonzero(refusal_scores(model, harmless, refusal_ids) < 0),
    )
