"""Stage 4's mathematics: divergences between student and teacher on the safety tokens `S`.

    reverse_kl          Σ_{v∈S} πs (log πs − log πt)                      (published, not renormalised)
    grouped_reverse_kl  Σ_{v∈S} πs (log πs − log πt) + (1−Ps) log((1−Ps)/(1−Pt)),  Ps = Σ_{v∈S} πs
    forward_kl          Σ_{v∈S} πt (log πt − log πs)
    mixture             Σ_{v∈S} α πt (log πt − log m) + (1−α) πs (log πs − log m),  m = (1−α) πs + α πt

with log-softmax over the full vocabulary (method page, section 4). `grouped_reverse_kl` is ours and
the default: everything outside `S` becomes one outcome, which makes the sum a proper divergence. The
published summand alone is smallest at πs = πt/e, so it also lowers the mass on `S`.

With `guidance` γ > 1, also ours, the target goes beyond the teacher, as far again as it is from the base: its logits on
`S` are raised by one number a position, which changes the mass of `S` and nothing within it or outside,

    (γ − 1) max(0, λt − λ0),      λ = log P(S) / (1 − P(S))     (`guidance_shift`)

where an answer begins; after that only where λt > 0, the teacher itself would rather write a safety token; within a
thought, which begins with none, where it writes one with a probability of `LIKELY` at least. A vector
saturates, some at a mass of 0.7 whatever the coefficient, so γ is found on the model: the least with which three
in four of the answers that the base does not begin so begin with a safety token at a probability of `SURE`
(`far_enough`).

The anchor's target, on harmless prompts, is the base. With a margin δ > 0, ours too, it refuses less where the base
does so with more than 1 − `SURE`: there the logits of the tokens of `S` with which it only refuses are raised by

    −min(δ, max(0, λ0 + log(SURE / (1 − SURE))))                  (`easing_shift`; λ0 is of those tokens)

Everything is computed in float32, whatever the logits' type. `distillation_loss` takes logits and is the
reference; training uses `localized_loss`, the same on hidden states, which never holds logits of more
than a chunk of positions (its own gradient is computed with its value, chunk after chunk).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..recipe import LossSettings

Head = Callable[[mx.array], mx.array]

# Logits that exist at once, 27 positions of a vocabulary of 151,936: 16 MB in float32, of which some nine
# arrays live with the gradient (a test holds it).
CHUNK_LOGITS = 2**22

KINDS = ("grouped_reverse_kl", "reverse_kl", "forward_kl", "mixture")


@mx.custom_function
def _split(logits: mx.array, ids: mx.array) -> tuple[mx.array, mx.array]:
    """Logits (..., V) -> those at the ids (..., K), and the logsumexp of all others (...).

    All that a divergence on a subset needs to know. The gradient is written out because it is one array of
    the logits' size, where autograd would hold several.
    """
    others = mx.put_along_axis(logits, ids, mx.array(-mx.inf, logits.dtype), axis=-1)
    return mx.take_along_axis(logits, ids, axis=-1), mx.logsumexp(others, axis=-1)


@_split.vjp
def _split_vjp(primals, cotangents, outputs):
    (logits, ids), (inside, rest) = primals, cotangents
    slope = rest[..., None] * mx.exp(logits - outputs[1][..., None])
    return mx.put_along_axis(slope, ids, inside, axis=-1), mx.zeros_like(ids)


def inside_and_rest(logits: mx.array, ids: mx.array) -> tuple[mx.array, mx.array]:
    """Logits (B, V) -> those at ids (K,), (B, K), and the logsumexp of all others (B,), which keeps its digits."""
    return _split(logits, mx.broadcast_to(ids, (len(logits), ids.size)))  # pyright: ignore[reportGeneralTypeIssues]


MOST_SURE = 6.0  # log-odds of the safety tokens beyond which guidance does not push, P = 0.9975
SURE, MOST_OF = 0.97, 0.75  # the mass of the safety tokens that guidance is to reach, and on how many prompts
FEW = 4  # prompts that tell how far guidance is to go
FARTHEST = 25.0
LIKELY = 0.05


def safety_log_odds(hidden: mx.array, head: Head, tokens: mx.array, *, temp: float = 1.0) -> mx.array:
    """log P(S) / (1 − P(S)) at each position: hidden (R, D), tokens (K,) -> (R,), float32, chunk by chunk."""
    size, log_odds = head(hidden[None, :1]).shape[-1], []
    for start in range(0, len(hidden), chunk_rows(size)):
        z = head(hidden[None, start : start + chunk_rows(size)])[0].astype(mx.float32) / temp
        inside, rest = inside_and_rest(z, tokens)
        log_odds.append(mx.logsumexp(inside, axis=-1) - rest)
        mx.eval(log_odds[-1])  # frees the chunk's logits
    return mx.concatenate(log_odds)


def may_decide(teacher: mx.array, place: np.ndarray, late: bool) -> mx.array:
    """Where an answer may turn to a refusal, (R,) bool, from the teacher's log-odds and places in the answer, (R,);
    `late` are answers that begin alike, behind which it decides."""
    return teacher >= float(np.log(LIKELY / (1 - LIKELY))) if late else (teacher > 0) | mx.array(place == 0)


def guidance_shift(teacher: mx.array, base: mx.array, guidance: float, where: mx.array | bool = True) -> mx.array:
    """How much guidance adds to the teacher's logits on the safety tokens, from both log-odds: (R,), (R,) -> (R,).

    `where` (R,) is `may_decide`'s; elsewhere nothing is added.

    Raises:
        ValueError: a guidance below 1.
    """
    if guidance < 1:
        raise ValueError(f"a guidance of {guidance:g} is less than the teacher; it must be at least 1")
    lift = (guidance - 1) * mx.maximum(teacher - base, 0.0)
    return mx.where(where, mx.minimum(lift, mx.maximum(MOST_SURE - teacher, 0.0)), 0.0)


def easing_shift(base: mx.array, margin: float, where: mx.array | bool = True) -> mx.array:
    """What a margin δ ≥ 0 takes off the base's logits on tokens that refuse, from their log-odds: (R,) -> (R,), ≤ 0.

    `where` (R,) is `may_decide`'s; elsewhere nothing is taken off, nor where they are less likely than 1 − `SURE`.
    """
    above = mx.maximum(base + math.log(SURE / (1 - SURE)), 0.0)
    return mx.where(where, -mx.minimum(above, margin), 0.0)


def far_enough(teacher: np.ndarray, base: np.ndarray) -> float:
    """The least guidance with which `MOST_OF` answers begin with a safety token at a probability of `SURE`.

    From both log-odds where they begin, (N,) and (N,). Answers that the base itself begins so do not count, if there
    are a few others: a model that refuses nine prompts in ten is to learn the tenth. From 1 to `FARTHEST`: what the
    teacher hardly raises is noise.
    """
    least = np.log(SURE / (1 - SURE))
    unsure = base < least
    if np.count_nonzero(unsure) >= FEW:
        teacher, base = teacher[unsure], base[unsure]
    lift = np.maximum(teacher - base, 0.0)
    guidance = np.where(teacher >= least, 1.0, 1 + (least - teacher) / np.maximum(lift, 1e-9))
    return round(float(np.clip(np.quantile(guidance, MOST_OF), 1.0, FARTHEST)), 3)


@dataclass(frozen=True)
class Divergence:
    """What is minimised at each position, and over which tokens.

    `kind` is one of `KINDS`; `tokens` (K,) the ids of `S`, None for the full vocabulary; `top_k`, instead of them, the
    teacher's likeliest ids at each position; `mix` the α of `mixture`, which no other kind has; `renormalize` makes
    both distributions sum to one over the subset (a variant that the paper rejects).
    """

    kind: str = "reverse_kl"
    tokens: mx.array | None = None
    top_k: int | None = None
    mix: float | None = None
    renormalize: bool = False

    @staticmethod
    def of(loss: LossSettings, tokens: mx.array) -> "Divergence":
        """What the settings ask for, `tokens` being the safety tokens."""
        return Divergence(
            "mixture" if loss.loss == "jsd" else loss.loss,
            tokens if loss.loss_tokens == "safety" else None,
            loss.top_k if loss.loss_tokens == "top_k" else None,
            loss.jsd_alpha if loss.loss == "jsd" else None,
            loss.renormalize,
        )

    def subset(self, teacher_logits: mx.array) -> mx.array | None:
        """The ids of each position (..., K), or None for the full vocabulary."""
        if self.tokens is not None:
            return mx.broadcast_to(self.tokens, (*teacher_logits.shape[:-1], self.tokens.size))
        if self.top_k is not None:
            return mx.argpartition(-teacher_logits, self.top_k - 1, axis=-1)[..., : self.top_k]
        return None

    def check(self, size: int) -> None:
        """Hold it against a vocabulary of `size`.

        Raises:
            ValueError: an unknown kind, an α outside [0, 1] or for another kind, both `tokens` and `top_k`,
                an id outside the vocabulary or given twice, or a `top_k` larger than it.
        """
        tokens, top_k, kind, mix = self.tokens, self.top_k, self.kind, self.mix
        if kind not in KINDS:
            raise ValueError(f"unknown loss {kind!r}; choose one of {', '.join(KINDS)}")
        if (mix is not None) != (kind == "mixture"):
            raise ValueError(f"mix = {mix} with the loss {kind}: 'mixture' needs it and the others have none")
        if mix is not None and not 0.0 <= mix <= 1.0:
            raise ValueError(f"mix must lie between 0 and 1, not {mix}")
        if tokens is not None and top_k is not None:
            raise ValueError(f"{tokens.size} tokens and top_k = {top_k}: a subset is one or the other")
        if tokens is not None:
            ids = [int(token) for token in np.array(tokens)]
            # An index out of range would corrupt memory instead of raising.
            if outside := [token for token in ids if not 0 <= token < size]:
                raise ValueError(f"token id {outside[0]} is outside the vocabulary of {size}")
            if len(set(ids)) < len(ids):
                raise ValueError(f"{len(ids)} token ids hold {len(ids) - len(set(ids))} twice; give each once")
        if top_k is not None and not 1 <= top_k <= size:
            raise ValueError(f"top_k = {top_k} does not fit a vocabulary of {size}")


@dataclass(frozen=True)
class _Restricted:
    """Log-probabilities on the subset (..., K), the log-mass of all other ids (...) or None if there are none,
    and the logits' logsumexp (...)."""

    inside: mx.array
    rest: mx.array | None
    normaliser: mx.array


def _restrict(logits: mx.array, ids: mx.array | None) -> _Restricted:
    """A distribution as far as the divergence sees it: logits (..., V), ids (..., K) or None for all.

    The mass outside is the logsumexp of the logits outside: 1 − P would lose all its digits near P = 1.
    """
    if ids is None or ids.shape[-1] == logits.shape[-1]:
        normaliser = mx.logsumexp(logits, axis=-1)
        inside = logits if ids is None else mx.take_along_axis(logits, ids, axis=-1)
        return _Restricted(inside - normaliser[..., None], None, normaliser)
    inside, outside = _split(logits, ids)  # pyright: ignore[reportGeneralTypeIssues]
    normaliser = mx.logaddexp(mx.logsumexp(inside, axis=-1), outside)
    return _Restricted(inside - normaliser[..., None], outside - normaliser, normaliser)


def _divergence(s: _Restricted, t: _Restricted, how: Divergence) -> mx.array:
    """The divergence at each position, (...)."""
    ls, lt, mix = s.inside, t.inside, how.mix
    if how.renormalize:
        ls, lt = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (ls, lt))
    if how.kind == "forward_kl":
        return (mx.exp(lt) * (lt - ls)).sum(-1)
    if mix is not None:
        lm = _log_mixture(ls, lt, mix)
        return (mix * mx.exp(lt) * (lt - lm) + (1 - mix) * mx.exp(ls) * (ls - lm)).sum(-1)
    total = (mx.exp(ls) * (ls - lt)).sum(-1)
    if how.kind == "grouped_reverse_kl" and not how.renormalize and s.rest is not None and t.rest is not None:
        total = total + mx.exp(s.rest) * (s.rest - t.rest)
    return total


def token_divergence(student_logits: mx.array, teacher_logits: mx.array, **divergence: Any) -> mx.array:
    """The divergence at each position: logits (..., V) and (..., V) -> (...), float32.

    `divergence` are `Divergence`'s fields.

    Raises:
        ValueError: as `Divergence.check`.
    """
    how = Divergence(**divergence)
    how.check(student_logits.shape[-1])
    zs, zt = student_logits.astype(mx.float32), mx.stop_gradient(teacher_logits.astype(mx.float32))
    ids = how.subset(zt)
    return _divergence(_restrict(zs, ids), _restrict(zt, ids), how)


def _log_mixture(ls: mx.array, lt: mx.array, mix: float) -> mx.array:
    """log((1−α) e^ls + α e^lt), safe at α = 0 and 1, where one term is absent."""
    if mix in (0.0, 1.0):
        return lt if mix else ls
    return mx.logaddexp(ls + mx.log(mx.array(1 - mix)), lt + mx.log(mx.array(mix)))


def kept_window(length: int, skip: int, keep: int) -> np.ndarray:
    """Which of the first `length` positions count: not the first `skip` and, if `keep`, none from `keep` on, (T,)."""
    t = np.arange(length)
    return (t >= skip) & (t < (keep or length))


def distillation_loss(
    student_logits: mx.array,
    teacher_logits: mx.array,
    mask: mx.array,
    *,
    skip: int = 0,
    keep: int = 0,
    **divergence: Any,
) -> mx.array:
    """The localized distillation loss: mean over sequences of the mean over their kept positions, 0 where none is kept.

    Args:
        student_logits, teacher_logits: (N, T, V) at the positions that predict the completion's tokens,
            already divided by the sampling temperature. Gradients reach the student only.
        mask: (N, T), 1 at real completion tokens, the end-of-turn token included.
        skip, keep: leave out the first `skip` completion positions; use only the first `keep` (0: all).
        divergence: `Divergence`'s fields.

    Returns:
        A float32 scalar.
    """
    mask = mask.astype(mx.float32) * mx.array(kept_window(mask.shape[-1], skip, keep))
    # Before the divergence, not after it: inf or NaN in padding would reach the gradient as 0 · NaN.
    zs, zt = (mx.where(mask[..., None] > 0, z, 0.0) for z in (student_logits, teacher_logits))
    each = token_divergence(zs, zt, **divergence) * mask
    return (each.sum(-1) / mx.maximum(mask.sum(-1), 1.0)).mean()


def chunk_rows(vocabulary: int) -> int:
    """Positions whose logits may exist at once."""
    return max(1, CHUNK_LOGITS // vocabulary)


@dataclass(frozen=True)
class Scored:
    """What is scored at R positions: hidden states (R, D) after the last norm, and the head that makes logits of them,
    (1, C, D) -> (1, C, V), soft-caps and scaling included. `shift` (R,), if any, is added to the logits of the safety
    tokens, or of those of them that `shifted` names: `guidance_shift`'s or `easing_shift`'s."""

    hidden: mx.array
    head: Head
    shift: mx.array | None = None
    shifted: mx.array | None = None


def localized_loss(
    student: Scored,
    teacher: Scored,
    weights: mx.array,
    watched: mx.array,
    divergence: Divergence,
    temp: float = 1.0,
    chunk: int | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Σ_r weights[r] · D[r] over R positions, from hidden states; no (R, V) array ever exists.

    The gradient with respect to the student's states is computed with the value, chunk by chunk, the chunks
    chained so that they run one after another; it reaches nothing else (the head is frozen).

    Args:
        weights: (R,) float32, 1/T_n over the number of sequences.
        watched: (K,) the safety tokens, whose probability is reported and to which the teacher's shift is added.
        temp: the sampling temperature, which divides all logits.
        chunk: positions whose logits exist at once; None for as many as `chunk_rows` allows.

    Returns:
        The loss, a float32 scalar; each position's divergence (R,); and the probability of `watched`
        under student and teacher, (2, R). Gradients reach the first only.

    Raises:
        ValueError: as `Divergence.check`.
    """
    size = teacher.head(teacher.hidden[None, :1]).shape[-1]  # lazily: no logits are computed
    divergence.check(size)
    chunk = chunk or chunk_rows(size)

    def logits(head: Head, hidden: mx.array) -> mx.array:
        z = head(hidden[None])[0].astype(mx.float32)
        return z if temp == 1.0 else z / temp

    def mass(z: mx.array, restricted: _Restricted) -> mx.array:
        return mx.exp(mx.logsumexp(z[:, watched], axis=-1) - restricted.normaliser)

    added = mx.zeros(len(teacher.hidden)) if teacher.shift is None else teacher.shift
    shifted = watched if teacher.shifted is None else teacher.shifted

    def one_chunk(hs: mx.array, ht: mx.array, w: mx.array, more: mx.array) -> tuple[mx.array, ...]:
        """Value, divergences (C,), masses (C,) twice, and the gradient (C, D)."""
        zt = logits(teacher.head, ht)
        if teacher.shift is not None:
            zt = zt.at[:, shifted].add(more[:, None])
        ids = divergence.subset(zt)
        target = _restrict(zt, ids)
        target_mass = mass(zt, target)

        def weighted(h: mx.array) -> tuple[mx.array, ...]:
            zs = logits(student.head, h)
            own = _restrict(zs, ids)
            each = _divergence(own, target, divergence)
            return (each * w).sum(), each, mass(zs, own)

        # The teacher's logits are done with before the student's exist.
        (value, each, student_mass), slope = mx.value_and_grad(weighted)(mx.depends(hs, target_mass))
        return value, each, student_mass, target_mass, slope

    @mx.custom_function
    def loss(hs: mx.array, ht: mx.array, w: mx.array) -> tuple[mx.array, ...]:
        chunks: list[tuple[mx.array, ...]] = []
        for start in range(0, hs.shape[0], chunk):
            part = slice(start, start + chunk)
            # Waits for the chunk before it: only one chunk's logits are alive.
            inputs = [hs[part], ht[part]]
            h, target = mx.depends(inputs, list(chunks[-1])) if chunks else inputs
            chunks.append(one_chunk(h, target, w[part], added[part]))
        value, each, *masses, slope = zip(*chunks, strict=True)
        return sum(value), mx.concatenate(each), mx.stack([mx.concatenate(m) for m in masses]), mx.concatenate(slope)

    @loss.vjp
    def _(primals, cotangents, outputs):
        hs, ht, w = primals
        return (cotangents[0] * outputs[3]).astype(hs.dtype), mx.zeros_like(ht), mx.zeros_like(w)

    outputs = loss(student.hidden, mx.stop_gradient(teacher.hidden), weights)
    value, each, masses, _ = outputs  # pyright: ignore[reportGeneralTypeIssues]
    return value, mx.stop_gradient(each), mx.stop_gradient(masses)
