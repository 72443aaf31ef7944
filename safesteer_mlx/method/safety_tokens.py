"""Stage 3: the safety tokens `S`, the ids that steering favours most (method page, 3).

    Δ[n,t,v] = log πt(v) − log π0(v)        on continuations sampled from the steered teacher

`vote` and `mean` are published: every kept (sample, position) votes for its `inner_top_k` largest Δ among the
selectable ids, `S` is the ids with most votes; or those with the largest mean Δ. Positions from the first one at
which the base would end its turn are dropped. Never selectable are special tokens and tokens whose mean steered
probability is below `p_min`.

Where we deviate, by default: Δ is a ratio, and a token of probability 1e-7 can have the largest. `part` ranks by what
a token adds to the divergence of the teacher from the base, and takes as many as explain a share of it:

    part[v]      = mean over positions of πt(v) (log πt(v) − log π0(v)),     Σ_v part[v] = KL(πt ‖ π0)
    explained(S) = mean of KL(πt ‖ π0) with all ids outside S as one outcome  /  mean of KL(πt ‖ π0)

A token that steering makes rarer has a negative part and is not taken: it is in the one outcome outside `S`. On
harmful prompts, where the student is taught, steering raises other words too, and the student would learn to begin with
them. So of the answers that the teacher opens with a token and the base goes on with, most must refuse
(`refusing_tokens`); where that cannot be told, the token must be raised on harmful prompts.

Logits exist for a chunk of positions at a time; what is kept over all of them is one number a token. Several machines
read a part of the continuations each, and add up what they found.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, TypedDict

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..recipe import MOST_TOKENS, TokenSettings
from ..system import machines
from ..system.load import Loaded
from ..system.memory import with_smaller_batches
from ..system.screen import Advance, UserError
from ..system.store import TokenId
from .direction import PROMPT_BATCH, FoundDirections
from .judge import is_refusal
from .losses import chunk_rows, inside_and_rest
from .prompts import VALIDATION_PROMPTS, special_ids
from .residual import answer_states, block_inputs, by_length, head, last_logits, pad_right, resume, resumes
from .rollout import Sampling, generate
from .run import REFUSAL_TOKENS, Run, given_tokens
from .teacher import Teacher, opened_answers, validation

Ids = Sequence[int]

REFUSES = 2 / 3  # of the answers that a safety token opens
SEEN = 3  # answers that tell that a token opens others as often
EXPLAINS_LITTLE = 0.5  # of the teacher's divergence from the base
THOUGHTS_EXPLAIN_LITTLE = 0.25  # the same of thoughts, of whose words most go with answers of all kinds
MORE = (2, 4)  # times as many safety tokens as by default, where those explain little
LITTLE = 0.01  # nats that the teacher is from the base
HARDLY_OPENS = 0.1  # the teacher's probability of safety tokens where it is largest, at the beginning of answers
TOLD = 4  # answers to each harmful validation prompt that tell which tokens refuse
METHODS = ("part", "vote", "mean")


@dataclass(frozen=True)
class TokenContrast:
    """What steering does to each token, each (V,): float64, votes int64, eligible bool.

    Args of note: `mean_delta` is the mean Δ, `base_prob` and `steered_prob` the mean probabilities over
    the kept positions; `eligible` is False for banned ids, which get no votes. `part` is what each adds to the
    mean KL(πt ‖ π0), which is `divergence`, in nats; `raised` whether its part is above 0 on the deciding prompts.
    """

    votes: np.ndarray
    mean_delta: np.ndarray
    base_prob: np.ndarray
    steered_prob: np.ndarray
    eligible: np.ndarray
    n_positions: int
    part: np.ndarray
    divergence: float
    raised: np.ndarray
    positions: "Positions"

    def explained(self, tokens: Sequence[int] | np.ndarray, of: np.ndarray | None = None) -> np.ndarray:
        """The share of the divergence that the first 1, 2, … of `tokens` explain: (K,) in [0, 1], never falling.

        At all kept positions, or at those for which `of` (R,) is true.
        """
        if not len(tokens):
            return np.zeros(0)
        ids, at = mx.array(np.asarray(tokens, np.int32)), self.positions
        inside = [np.zeros((0, len(tokens)))]  # a machine may have no position
        for both in at.chunks():
            # Small arrays, (C, K): in float64, since 1 − P of nested subsets is a difference.
            log_base, log_teacher = (np.array(z[:, ids], np.float64) for z in both)
            of_tokens = np.cumsum(np.exp(log_teacher) * (log_teacher - log_base), axis=1)
            rest = [np.maximum(1 - np.cumsum(np.exp(z), axis=1), 1e-12) for z in (log_teacher, log_base)]
            inside.append(of_tokens + rest[0] * np.log(rest[0] / rest[1]))
        mask = np.ones(len(at.place), bool) if of is None else of
        of_all = machines.here().add(np.append(np.concatenate(inside)[mask].sum(0), at.kl[mask].sum()))
        return np.clip(of_all[:-1] / max(of_all[-1], 1e-12), 0.0, 1.0)

    def where_it_decides(self, tokens: Sequence[int] | np.ndarray, prompts: range) -> np.ndarray:
        """Where in answers to some of the prompts `tokens` decide, (R,) bool: of the places where the teacher writes
        them at least half as often as anywhere, the first, second, … position at which they explain most. Everywhere,
        where no position of those answers is kept."""
        at, mass = self.positions, self.openings(tokens, prompts)
        if not len(mass):
            return np.ones(len(at.place), bool)
        places = [at.of(prompts) & (at.place == place) for place in np.flatnonzero(mass >= mass.max() / 2)]
        return max(places, key=lambda of: float(self.explained(tokens, of)[-1]))

    def openings(self, tokens: Sequence[int] | np.ndarray, prompts: range) -> np.ndarray:
        """The teacher's mean probability of `tokens` at the first, second, … scored position of some of the prompts.

        (H,), by position in the answer; 0 where none is kept, and no positions if none of any is.
        """
        mask = self.positions.of(prompts)
        place, mass = self.positions.place[mask], self.teacher_mass(tokens)[mask]
        longest = max(machines.here().gather(int(place.max(initial=-1)))) + 1
        sums = [np.bincount(place, mass, longest), np.bincount(place, minlength=longest)]
        masses, counts = machines.here().add(np.array(sums, np.float64))
        return masses / np.maximum(counts, 1)

    def where_thoughts_turn(self, tokens: Sequence[int] | np.ndarray, prompts: range) -> np.ndarray:
        """Where `tokens` decide in thoughts before answers to some of the prompts, (R,) bool: each at its own place,
        where the teacher is farthest from the base."""
        masses, rows = self._masses(tokens), np.flatnonzero(self.positions.of(prompts))
        lengths = np.unique(self.positions.prompt[rows], return_counts=True)[1]
        base, teacher = (np.stack([p, 1 - p], -1) for p in masses[rows].T)
        turns = np.zeros(len(masses), bool)
        turns[rows[farthest(teacher, base, lengths) + np.cumsum([0, *lengths])[:-1]]] = True
        return turns

    def mean(self, values: np.ndarray, of: np.ndarray) -> float:
        """The mean of what is told of each position (R,), where `of` (R,) is true; 0 where it never is."""
        total, count = machines.here().add(np.array([values[of].sum(), of.sum()], np.float64))
        return float(total / max(1.0, count))

    def farthest_mean(self, prompts: range) -> float:
        """How far the teacher is from the base in answers to some of the prompts, in nats: the mean of KL(πt ‖ π0) at
        the place where it is largest."""
        at, of = self.positions, self.positions.of(prompts)
        longest = max(machines.here().gather(int(at.place[of].max(initial=-1)))) + 1
        return max((self.mean(at.kl, of & (at.place == place)) for place in range(longest)), default=0.0)

    def teacher_mass(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """The teacher's probability of `tokens` at each kept position, (R,)."""
        return self._masses(tokens)[:, 1]

    def _masses(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Base's and teacher's probability of `tokens` at the kept positions, (R, 2) float64."""
        ids = mx.array(np.asarray(tokens, np.int32))
        chunks = (mx.stack([mx.exp(z[:, ids]).sum(-1) for z in both], -1) for both in self.positions.chunks())
        return np.concatenate([np.zeros((0, 2)), *(np.array(both, np.float64) for both in chunks)])


@dataclass(frozen=True)
class Positions:
    """The kept positions, of several machines this one's: of which pair of prompt and continuation each is, (R,), its
    place in the answer, (R,), KL(πt ‖ π0), (R,) in nats, and the hidden states of base and teacher there, (R, D) each,
    with the heads that make logits of them."""

    prompt: np.ndarray
    place: np.ndarray
    kl: np.ndarray
    states: tuple[mx.array, mx.array]
    heads: tuple[Callable[[mx.array], mx.array], Callable[[mx.array], mx.array]]
    chunk: int

    def of(self, prompts: range) -> np.ndarray:
        """Which of the positions are of some of the prompts, (R,) bool."""
        return (self.prompt >= prompts.start) & (self.prompt < prompts.stop)

    def chunks(self) -> Iterator[tuple[mx.array, mx.array]]:
        """log π0 and log πt, a chunk of positions at a time: (C, V) each, float32."""
        for start in range(0, len(self.place), self.chunk):
            both = (
                head(states[None, start : start + self.chunk])[0].astype(mx.float32)
                for head, states in zip(self.heads, self.states, strict=True)
            )
            yield tuple(z - mx.logsumexp(z, axis=-1, keepdims=True) for z in both)  # type: ignore[misc]


@dataclass(frozen=True)
class Contrast:
    """How teacher and base are compared: ids that end a turn (positions from the base's first such argmax onward are
    dropped) and ids that are never selectable, whatever their Δ; how many ids each position votes for; `p_min`.

    `teacher_prompts` are the prompts as the teacher sees them, where a system prompt makes it one; `deciding` how many
    of the prompts, the first ones, a token must be raised on (None for all); `shared_blocks` the first blocks in which
    base and teacher do the same: they are run once.
    """

    eot_ids: Ids
    banned_ids: Ids
    inner_top_k: int
    min_steered_prob: float
    teacher_prompts: Sequence[Ids] | None = None
    deciding: int | None = None
    shared_blocks: int = 0
    batch_size: int = PROMPT_BATCH


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
    states: tuple[list[mx.array], list[mx.array]] = ([], [])
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        models = [base, teacher]
        if shared_blocks:
            tokens = pad_right([[*p, *c] for p, c in zip(prompts[part], continuations[part], strict=True)])
            trunk = block_inputs(base, tokens)[shared_blocks]
            models = [resume(model, shared_blocks, trunk) for model in models]
        for each, model, rows in zip(states, models, (prompts, teacher_prompts), strict=True):
            each.append(answer_states(model, rows[part], continuations[part], and_after=True))
        mx.eval(states[0][-1], states[1][-1])
    return [mx.concatenate(each) for each in states]


def contrast_tokens(
    base: nn.Module,
    teacher: nn.Module,
    prompts: Sequence[Ids],
    continuations: Sequence[Ids],
    **contrast_settings: Any,
) -> TokenContrast:
    """Compare teacher and base on the teacher's own continuations.

    Args:
        prompts, continuations: N pairs of id lists; the positions scored are the last one of the prompt
            and every one of the continuation.
        contrast_settings: `Contrast`'s fields.

    Raises:
        ValueError: no prompts, unequal numbers of prompts and continuations, or no position left.
    """
    how = Contrast(**contrast_settings)
    shared_blocks, teacher_prompts = how.shared_blocks, how.teacher_prompts
    if not prompts or len(prompts) != len(continuations):
        raise ValueError(f"{len(prompts)} prompts and {len(continuations)} continuations do not make pairs")
    if shared_blocks and (teacher_prompts is not None or not resumes(base, pad_right([prompts[0]]))):
        shared_blocks = 0
    own = machines.here().part(len(prompts))
    read = own or [0]  # a machine that has no part keeps nothing of what it reads
    lengths = [1 + len(continuations[i]) for i in read]
    rows = ([of[i] for i in read] for of in (prompts, teacher_prompts or prompts, continuations))
    states = _scored_states(base, teacher, *rows, shared_blocks, how.batch_size)
    heads = head(base), head(teacher)
    chunk = chunk_rows(heads[0](states[0][None, :1]).shape[-1])
    every = np.arange(sum(lengths))
    favourite = [np.array(heads[0](states[0][None, i : i + chunk])[0].argmax(-1)) for i in range(0, len(every), chunk)]
    ends = np.split(np.isin(np.concatenate(favourite), list(how.eot_ids)), np.cumsum(lengths)[:-1])
    keep = every[np.concatenate([~np.maximum.accumulate(row) for row in ends])][: len(every) if own else 0]
    n_kept = sum(machines.here().gather(len(keep)))
    if not n_kept:
        raise UserError(
            f"the base ends its turn at once on all {len(prompts)} steered continuations, so no position is left to "
            "score; lower --coeff or change --horizon"
        )
    prompt, place = np.repeat(read, lengths), np.concatenate([np.arange(n) for n in lengths])
    at = mx.array(keep)
    nothing = np.zeros(len(keep))
    positions = Positions(prompt[keep], place[keep], nothing, (states[0][at], states[1][at]), heads, chunk)

    of_deciding = positions.prompt < (len(prompts) if how.deciding is None else how.deciding)
    none_decides = not any(machines.here().gather(bool(of_deciding.any())))  # the base ends its turn at once on those
    decides = mx.array(of_deciding | none_decides)
    totals, kl = np.zeros(1), [np.zeros(0)]
    for i, (log_base, log_teacher) in enumerate(positions.chunks()):
        p, change = mx.exp(log_teacher), log_teacher - log_base
        mask = decides[i * chunk : (i + 1) * chunk, None]
        sums = (mx.exp(log_base), p, change, p * change, mx.where(mask, p * change, 0.0))
        totals = totals + np.stack([np.array(x.sum(0), np.float64) for x in sums])
        kl.append(np.array(sums[3].sum(-1), np.float64))
    base_prob, teacher_prob, delta, part, deciding_part = machines.here().add(totals) / n_kept

    eligible = teacher_prob >= how.min_steered_prob
    eligible[np.array([i for i in how.banned_ids if i < len(eligible)], np.int64)] = False
    votes = np.zeros(len(eligible), np.int64)
    k = min(how.inner_top_k, int(eligible.sum()))
    if k:
        selectable = mx.array(eligible)
        for log_base, log_teacher in positions.chunks():
            favoured = mx.where(selectable, log_teacher - log_base, -mx.inf)
            np.add.at(votes, np.array(mx.argpartition(-favoured, k - 1, axis=-1)[:, :k]), 1)
    return TokenContrast(
        machines.here().add(votes),
        delta,
        base_prob,
        teacher_prob,
        eligible,
        n_kept,
        part,
        float(part.sum()),
        deciding_part > 0,
        replace(positions, kl=np.concatenate(kl)),
    )


def outcomes_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) of each row, also of p that do not sum to one: Σ p log(p/q) − p + q, never negative."""
    p, q = np.maximum(p, 1e-30), np.maximum(q, 1e-30)
    return (p * np.log(p / q) - p + q).sum(-1)


def farthest(teacher: np.ndarray, base: np.ndarray, lengths: Ids | np.ndarray) -> np.ndarray:
    """In each of N answers, so long, the place where the teacher is farthest from the base: of the probabilities of the
    safety tokens and of all others at every position, answer after answer, (R, 2) each -> (N,)."""
    far = np.split(outcomes_kl(teacher, base), np.cumsum(lengths)[:-1])
    return np.array([int(np.argmax(of)) for of in far if len(of)], np.int64)


def refusing_tokens(openings: Sequence[Ids], refused: Sequence[bool]) -> list[int]:
    """The tokens with which answers refuse: openings of answers, and whether each was a refusal -> ids, ascending.

    A token is one if more than two thirds of the answers with it in their opening refuse, two answers more, one of each
    kind, counted in: one refusal alone is not enough.

    Raises:
        ValueError: not one outcome for each opening.
    """
    answers, refusals = _opened(openings, refused)
    return sorted(token for token, n in answers.items() if refusals[token] + 1 > REFUSES * (n + 2))


def other_tokens(openings: Sequence[Ids], refused: Sequence[bool]) -> list[int]:
    """The tokens with which answers do not refuse, as `refusing_tokens`: three answers or more open with one, and at
    most half of them refuse."""
    answers, refusals = _opened(openings, refused)
    return sorted(token for token, n in answers.items() if n >= SEEN and refusals[token] <= n / 2)


def _opened(openings: Sequence[Ids], refused: Sequence[bool]) -> tuple[Counter[int], Counter[int]]:
    """How many answers have each token in their opening, and how many of these refuse."""
    answers, refusals = Counter[int](), Counter[int]()
    for ids, refusal in zip(openings, refused, strict=True):
        answers.update(set(ids))
        refusals.update(set(ids) if refusal else ())
    return answers, refusals


def select_tokens(
    contrast: TokenContrast, k: int, method: str = "vote", share: float = 1.0, among: Ids | None = None
) -> np.ndarray:
    """The safety tokens: at most `k` ids, best first, (K,) int64.

    `vote` ranks by votes and needs at least one; `mean` by mean Δ; `part` by the part in the divergence, which must be
    above 0, and takes no more than explain `share` of it. `among` are the ids to choose from; None means all, for
    `part` those that are raised on the deciding prompts. Ties break by the larger mean Δ, then by the smaller id.

    Raises:
        ValueError: `k` < 1 or an unknown method.
    """
    if k < 1:
        raise ValueError(f"{k} safety tokens were asked for; at least 1 is needed")
    if method not in METHODS:
        raise ValueError(f"unknown selection method {method!r}; choose {', '.join(METHODS[:-1])} or {METHODS[-1]}")
    ranks = {"vote": contrast.votes, "mean": contrast.mean_delta, "part": contrast.part}[method]
    eligible = contrast.eligible & (ranks > 0) if method != "mean" else contrast.eligible
    ids = np.flatnonzero(eligible & contrast.raised if method == "part" and among is None else eligible)
    ids = ids if among is None else np.intersect1d(ids, np.asarray(among, np.int64))
    ids = ids[np.lexsort((ids, -contrast.mean_delta[ids], -ranks[ids]))][:k]
    if method != "part" or not len(ids):
        return ids
    return ids[: 1 + int(np.searchsorted(contrast.explained(ids), share))]


def openings(
    model: nn.Module, prompts: Sequence[Ids], tokens: Sequence[int] | np.ndarray, batch_size: int
) -> np.ndarray:
    """Where answers to the prompts begin: the probability of each token, and of all others together, (N, K + 1).

    float64; the others' from the logsumexp of their logits, so that it keeps its digits near 0. Where memory is
    exhausted, fewer than `batch_size` are read at a time.
    """
    ids = mx.array(np.asarray(tokens, np.int32))

    def read(rows: list[Ids], size: int) -> list[list[float]]:
        probabilities = np.zeros((len(rows), len(ids) + 1))
        for batch in by_length(rows, size):
            logits = last_logits(model, [rows[i] for i in batch])
            inside, rest = inside_and_rest(logits, ids)
            outcomes = mx.concatenate([inside, rest[:, None]], axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
            probabilities[batch] = np.exp(np.array(outcomes, np.float64))
        return probabilities.tolist()

    def part(rows: list[Ids]) -> list[list[float]]:
        return with_smaller_batches(batch_size, partial(read, rows), "reading how answers begin")[0]

    return np.array(machines.here().each(prompts, part))


class SafetyToken(TypedDict):
    """A row of them."""

    token: str
    id: TokenId
    votes: int
    mean_delta: float
    part: float
    base_prob: float
    teacher_prob: float


@dataclass(frozen=True)
class SafetyTokens:
    """Stage 3's result, best first: text, id, votes, mean Δ, mean probability under base and teacher of each.

    `explained` is the share of the teacher's divergence from the base that they explain together, where they decide
    what an answer to a harmful prompt does (everywhere, if no such prompt was read); `openings` the
    teacher's mean probability of them at the first, second, … position of answers to harmful prompts, or of a model
    that thinks first where its thoughts turn; `nats` how far the teacher is from the base at the place where it is
    farthest, by the mean. `refusing` are those that the anchor's target may open fewer answers with than the base.
    """

    rows: Annotated[list[SafetyToken], MOST_TOKENS]
    explained: float
    openings: list[float]
    nats: float
    refusing: Annotated[list[TokenId], MOST_TOKENS] = field(default_factory=list)

    def __post_init__(self):
        if not self.rows:
            raise ValueError("no tokens")

    @property
    def ids(self) -> np.ndarray:
        """(K,) int64."""
        return np.array([row["id"] for row in self.rows], np.int64)


def find_tokens(run: Run, teacher: Teacher, directions: FoundDirections) -> SafetyTokens:
    """The safety tokens, from the teacher's own continuations of harmless prompts, as published, and with the method
    `part` of harmful ones too; of harmful ones alone, if a system prompt makes the teacher.

    Raises:
        UserError: no token is likely enough under the teacher.
    """
    settings, base, prompts = run.recipe.tokens, run.base, run.prompts
    m = settings.token_samples if settings.horizon > 1 else 1  # without a continuation they would be alike
    guarded, by_part = teacher.system_prompt is not None, settings.token_method == "part"
    if guarded:
        harmful, teacher_rows = prompts.harmful_direction_validation, prompts.harmful_direction_validation_guarded
        base_rows = harmful
    else:
        harmful = prompts.harmful_validation[: VALIDATION_PROMPTS[0]] if by_part else []
        base_rows = teacher_rows = [*harmful, *directions.harmless]
    n_harmful = m * len(harmful)
    base_rows, teacher_rows = ([row for row in rows for _ in range(m)] for rows in (base_rows, teacher_rows))
    with run.screen.stage("finding the safety tokens") as advance:
        continuations = _continuations(run, teacher, teacher_rows, advance)
        compare = partial(
            contrast_tokens,
            base.model,
            teacher.model,
            base_rows,
            continuations,
            eot_ids=base.eos_ids,
            banned_ids=special_ids(base.tokenizer, base.vocabulary),
            inner_top_k=settings.inner_top_k,
            min_steered_prob=settings.min_steered_prob,
            teacher_prompts=teacher_rows if guarded else None,
            deciding=n_harmful or None,
            shared_blocks=teacher.shared_blocks if run.recipe.teacher.teacher == "steer" else 0,
        )
        size, what = run.recipe.run.prompt_batch_size, "the safety tokens"
        contrast, _ = with_smaller_batches(size, lambda size: compare(batch_size=size), what, together=True)
        tokens = given_tokens(run.recipe, base)
        if tokens is None:
            tokens = _selected(run, teacher, contrast, directions, range(n_harmful))
    if not len(tokens):
        raise UserError(
            f"steering makes no token likelier that reaches min_steered_prob = {settings.min_steered_prob:g}; lower "
            "--min-steered-prob, or give a larger --coeff"
        )
    masses, of = contrast.openings(tokens, range(n_harmful)), range(n_harmful)
    if len(masses):
        where = _where(base, contrast, tokens, of)
        masses = [contrast.mean(contrast.teacher_mass(tokens), where)] if base.turns_late else masses
    else:  # harmful prompts were not among them, or the base ends its turn at once on all: their first position alone
        first, of = openings(teacher.model, directions.harmful, tokens, size), range(len(base_rows))
        where, masses = np.ones(len(contrast.positions.place), bool), [first[:, :-1].sum(-1).mean()]
    explained = float(contrast.explained(tokens, where)[-1])
    nats = contrast.farthest_mean(of)
    rows = [
        {
            "token": base.tokenizer.decode([int(t)]),
            "id": int(t),
            "votes": int(contrast.votes[t]),
            "mean_delta": float(contrast.mean_delta[t]),
            "part": float(contrast.part[t]),
            "base_prob": float(contrast.base_prob[t]),
            "teacher_prob": float(contrast.steered_prob[t]),
        }
        for t in tokens
    ]
    run.screen.detail(
        f"safety tokens: {len(tokens)} from {contrast.n_positions} positions, {explained:.0%} of what steering does "
        f"where they decide; first {' '.join(repr(row['token']) for row in rows[:10])}"
    )
    loss = run.recipe.loss
    refusing = _only_refusing(run, tokens.tolist()) if loss.anchor_margin and loss.anchor_ratio else []
    return SafetyTokens(rows, explained, [float(mass) for mass in masses], nats, refusing)


def _continuations(run: Run, teacher: Teacher, rows: list[list[int]], progress: Advance) -> list[list[int]]:
    """What the teacher goes on with, to the horizon, each with a random stream of its own."""
    horizon = run.recipe.tokens.horizon
    if horizon == 1:
        return [[] for _ in rows]
    sampling = Sampling(run.base.eos_ids, horizon - 1, 1.0, batch_size=run.recipe.run.generation_batch_size)
    return [c.ids for c in generate(teacher.model, rows, sampling, [run.key(0, i) for i in range(len(rows))], progress)]


def _where(base: Loaded, contrast: TokenContrast, tokens: np.ndarray, harmful: range) -> np.ndarray:
    """Where in answers to harmful prompts the tokens decide, (R,) bool."""
    return (contrast.where_thoughts_turn if base.turns_late else contrast.where_it_decides)(tokens, harmful)


def _selected(
    run: Run, teacher: Teacher, contrast: TokenContrast, directions: FoundDirections, harmful: range
) -> np.ndarray:
    """The tokens by the recipe's method, (K,); of a model that thinks first, those with which it thinks of refusing.

    Those that refuse may be none of those that steering raises, or so few that a run would end for it: then all that
    it raises count, without those that open other answers as often if the rest explains enough. Where a run would end
    even so, as of a model whose refusals begin in very many ways, twice or four times as many tokens as by default may.
    """
    settings, among, others = run.recipe.tokens, None, []
    if settings.token_method == "part" and run.base.thinks:
        among = directions.thoughts.telling or None
    if settings.token_method == "part" and among is None:
        among, others = _refusing(run, teacher, directions)

    def explain(tokens: np.ndarray) -> float:
        shares = contrast.explained(tokens, _where(run.base, contrast, tokens, harmful)) if len(tokens) else [0.0]
        return float(shares[-1])

    def chosen(most: int) -> np.ndarray:
        select = partial(select_tokens, contrast, most, settings.token_method, settings.token_share)
        tokens = select(among)
        if among is None or (share := explain(tokens)) >= explains_little(run.base):
            return tokens
        for but in (others, []):
            raised = select(np.setdiff1d(np.flatnonzero(contrast.raised), but))
            if explain(raised) >= max(share, explains_little(run.base)):
                of_what = f"all that it raises count, but {len(but)}" if but else "all that it raises count"
                run.screen.detail(f"tokens that refuse explain {share:.0%} of what steering does, so {of_what}")
                # What refuses and is not raised would be free to rise on harmless prompts.
                more = np.intersect1d(among, np.flatnonzero(contrast.eligible)) if but else raised[:0]
                more = np.setdiff1d(more, raised)
                return np.concatenate([raised[: max(0, most - len(more))], more])
        return tokens if len(tokens) else raised

    most = int(settings.safety_tokens)
    tokens = chosen(most)
    for times in MORE if settings.token_method == "part" and most == TokenSettings().safety_tokens else ():
        if len(tokens) < most or (share := explain(tokens)) >= explains_little(run.base):
            break
        most = times * TokenSettings().safety_tokens
        run.screen.detail(f"{len(tokens)} tokens explain {share:.0%} of what steering does, so {most} may count")
        tokens = chosen(most)
    return tokens


def _refusing(run: Run, teacher: Teacher, directions: FoundDirections) -> tuple[list[int] | None, list[int]]:
    """The ids with which answers to harmful prompts refuse, if the teacher opens them and the base goes on, None where
    no id does; and those with which they do not."""
    prompts = validation(run, directions)
    guarded = None if prompts.system_prompted is None else (list(prompts.system_prompted[0]) * TOLD, [])
    harmful = replace(prompts, harmful=list(prompts.harmful) * TOLD, harmless=[], system_prompted=guarded)
    answers = opened_answers(run.base, teacher.model, replace(harmful, opening=run.recipe.tokens.horizon))
    told = [opening.ids for opening, _ in answers], [is_refusal(text, run.refusals) for _, text in answers]
    ids = refusing_tokens(*told)
    if not ids:
        run.screen.detail(
            "no token that opens the teacher's answers tells a refusal, so all that steering raises count"
        )
    return ids or None, other_tokens(*told)


def _only_refusing(run: Run, tokens: list[int]) -> list[int]:
    """Those of the tokens in the openings of whose answers to harmless prompts the base refuses, as often as not at
    least: *I* may open *I can't* and *I'd be glad to*. All of them, where a thought comes first, which no answer
    begins with."""
    if run.base.thinks:
        return tokens
    rows = run.prompts.harmless_validation
    answers = run.answers(run.base.model, rows, run.sampling(REFUSAL_TOKENS, 1.0), (19,))
    refusals, others = Counter(), Counter()
    for completion, text in answers:
        (refusals if is_refusal(text, run.refusals) else others).update({*completion.ids[: run.recipe.tokens.horizon]})
    refusing = [token for token in tokens if refusals[token] >= others[token]]
    run.screen.detail(f"{len(refusing)} of them open no other answers to harmless requests")
    return refusing


def explains_little(base: Loaded) -> float:
    """The share of what steering does below which tokens are not worth training on."""
    return THOUGHTS_EXPLAIN_LITTLE if base.thinks else EXPLAINS_LITTLE


def check_tokens(run: Run, tokens: SafetyTokens) -> None:
    """Hold what there is to learn against what would teach nothing.

    Raises:
        UserError: the tokens explain little of what steering does, or the teacher hardly opens an answer to a harmful
            prompt with them; if the run is forced, or they are not what is trained on, that is only said.
    """
    settings, first = run.recipe.tokens, max(tokens.openings, default=0.0)
    if tokens.nats < LITTLE:  # of which no share tells anything
        run.screen.line("the teacher hardly differs from the model on harmful requests: there is little to learn")
        return
    if tokens.explained < explains_little(run.base):
        fault = f"the {len(tokens.rows)} safety tokens explain only {tokens.explained:.0%} of what steering does"
        remedy = ""
        if settings.token_method != "part":
            remedy = "--token-method part or "
        elif isinstance(settings.safety_tokens, int) and len(tokens.rows) >= settings.safety_tokens:
            remedy = "more --safety-tokens or "
    elif first < HARDLY_OPENS:
        fault = f"the teacher opens answers to harmful prompts with safety tokens at a probability of only {first:.2f}"
        remedy = "" if run.recipe.teacher.coeff == "auto" else "--coeff auto or "
    else:
        return
    fault += "; training on them would teach little of that"
    if run.recipe.loss.loss_tokens != "safety" or isinstance(settings.safety_tokens, str) or run.force:
        run.screen.line(fault)  # they are not what is trained on, or were chosen by hand
        return
    raise UserError(f"{fault}; give {remedy}--loss-tokens full (or --force)")
