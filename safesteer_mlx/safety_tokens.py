"""Stage 3: the safety tokens `S`, the ids that steering favours most (method page, 3).

    Δ[n,t,v] = log πt(v) − log π0(v)        on continuations sampled from the steered teacher

Every kept (sample, position) votes for its `inner_top_k` largest Δ among the selectable ids; `S` is the
ids with most votes. Positions from the first one at which the base would end its turn are dropped.
Never selectable are special tokens and tokens whose mean steered probability is below `p_min`.

Logits exist for a chunk of positions at a time; what is kept over all of them is one number a token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .losses import chunk_rows
from .progress import UserError
from .residual import answer_states, block_inputs, head, pad_right, resume, resumes

Ids = Sequence[int]

PROMPT_BATCH = 32  # rows in one forward pass


@dataclass(frozen=True)
class TokenContrast:
    """What steering does to each token, each (V,): float64, votes int64, eligible bool.

    Args of note: `mean_delta` is the mean Δ, `base_prob` and `steered_prob` the mean probabilities over
    the kept positions; `eligible` is False for banned ids, which get no votes.
    """

    votes: np.ndarray
    mean_delta: np.ndarray
    base_prob: np.ndarray
    steered_prob: np.ndarray
    eligible: np.ndarray
    n_positions: int


def _scored_states(
    base: nn.Module,
    teacher: nn.Module,
    prompts: Sequence[Ids],
    teacher_prompts: Sequence[Ids],
    continuations: Sequence[Ids],
    shared_blocks: int,
    batch_size: int,
) -> list[mx.array]:
    """Base's and teacher's hidden states at the last prompt position and at each continuation token, row after
    row: (R, D) each."""
    kept: tuple[list[mx.array], list[mx.array]] = ([], [])
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        models = [base, teacher]
        if shared_blocks:
            tokens = pad_right([[*p, *c] for p, c in zip(prompts[part], continuations[part], strict=True)])
            trunk = block_inputs(base, tokens)[shared_blocks]
            models = [resume(model, shared_blocks, trunk) for model in models]
        for states, model, read in zip(kept, models, (prompts, teacher_prompts), strict=True):
            states.append(answer_states(model, read[part], continuations[part], and_after=True))
        mx.eval(kept[0][-1], kept[1][-1])
    return [mx.concatenate(states) for states in kept]


def contrast_tokens(
    base: nn.Module,
    teacher: nn.Module,
    prompts: Sequence[Ids],
    continuations: Sequence[Ids],
    *,
    eot_ids: Ids,
    banned_ids: Ids,
    inner_top_k: int,
    min_steered_prob: float,
    teacher_prompts: Sequence[Ids] | None = None,
    shared_blocks: int = 0,
    batch_size: int = PROMPT_BATCH,
) -> TokenContrast:
    """Compare teacher and base on the teacher's own continuations.

    Args:
        prompts, continuations: N pairs of id lists; the positions scored are the last one of the prompt
            and every one of the continuation.
        eot_ids: ids that end a turn; positions from the base's first such argmax onward are dropped.
        banned_ids: ids that are never selectable, whatever their Δ.
        inner_top_k: how many ids each position votes for.
        min_steered_prob: `p_min`.
        teacher_prompts: the prompts as the teacher sees them, where a system prompt makes it one.
        shared_blocks: first blocks in which base and teacher do the same; they are run once.

    Raises:
        ValueError: no prompts, unequal numbers of prompts and continuations, or no position left.
    """
    if not prompts or len(prompts) != len(continuations):
        raise ValueError(f"{len(prompts)} prompts and {len(continuations)} continuations do not make pairs")
    lengths = [1 + len(c) for c in continuations]
    if shared_blocks and (teacher_prompts is not None or not resumes(base, pad_right([prompts[0]]))):
        shared_blocks = 0
    states = _scored_states(
        base, teacher, prompts, teacher_prompts or prompts, continuations, shared_blocks, batch_size
    )
    heads = head(base), head(teacher)
    chunk = chunk_rows(heads[0](states[0][None, :1]).shape[-1])

    def logits(which: int, index: np.ndarray) -> mx.array:
        """(C, V), float32."""
        return heads[which](states[which][None, mx.array(index)])[0].astype(mx.float32)

    def chunks(keep: np.ndarray) -> Iterator[tuple[mx.array, mx.array]]:
        """log π0 and log πt at the positions `keep`, (C, V) each."""
        for start in range(0, len(keep), chunk):
            both = (logits(which, keep[start : start + chunk]) for which in (0, 1))
            yield tuple(z - mx.logsumexp(z, axis=-1, keepdims=True) for z in both)

    every = np.arange(sum(lengths))
    favourite = [np.array(logits(0, every[i : i + chunk]).argmax(-1)) for i in range(0, len(every), chunk)]
    ends = np.split(np.isin(np.concatenate(favourite), list(eot_ids)), np.cumsum(lengths)[:-1])
    keep = every[np.concatenate([~np.maximum.accumulate(row) for row in ends])]
    if not len(keep):
        raise UserError(
            f"the base ends its turn at once on all {len(prompts)} steered continuations, so no position is left to "
            "score; lower --coeff or change --horizon"
        )

    base_prob = teacher_prob = delta = 0.0
    for log_base, log_teacher in chunks(keep):
        sums = (mx.exp(log_base).sum(0), mx.exp(log_teacher).sum(0), (log_teacher - log_base).sum(0))
        b, t, d = (np.array(x, np.float64) for x in sums)
        base_prob, teacher_prob, delta = base_prob + b, teacher_prob + t, delta + d
    base_prob, teacher_prob, delta = (np.asarray(x) / len(keep) for x in (base_prob, teacher_prob, delta))

    eligible = teacher_prob >= min_steered_prob
    eligible[np.array([i for i in banned_ids if i < len(eligible)], np.int64)] = False
    votes = np.zeros(len(eligible), np.int64)
    k = min(inner_top_k, int(eligible.sum()))
    if k:
        selectable = mx.array(eligible)
        for log_base, log_teacher in chunks(keep):
            favoured = mx.where(selectable, log_teacher - log_base, -mx.inf)
            np.add.at(votes, np.array(mx.argpartition(-favoured, k - 1, axis=-1)[:, :k]), 1)
    return TokenContrast(votes, delta, base_prob, teacher_prob, eligible, len(keep))


def select_tokens(contrast: TokenContrast, k: int, method: str = "vote") -> np.ndarray:
    """The safety tokens: at most `k` ids, best first, (K,) int64.

    `vote` ranks by votes and needs at least one; `mean` by mean Δ. Ties break by the larger mean Δ, then
    by the smaller id.

    Raises:
        ValueError: `k` < 1 or an unknown method.
    """
    if k < 1:
        raise ValueError(f"{k} safety tokens were asked for; at least 1 is needed")
    if method not in ("vote", "mean"):
        raise ValueError(f"unknown selection method {method!r}; choose vote or mean")
    ids = np.flatnonzero(contrast.eligible & (contrast.votes > 0) if method == "vote" else contrast.eligible)
    votes = contrast.votes[ids] if method == "vote" else np.zeros(len(ids))
    return ids[np.lexsort((ids, -contrast.mean_delta[ids], -votes))][:k]
