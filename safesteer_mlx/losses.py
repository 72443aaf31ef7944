"""Stage 4's mathematics: divergences between student and teacher on the safety tokens `S`.

    reverse_kl          Σ_{v∈S} πs (log πs − log πt)                      (published, not renormalised)
    grouped_reverse_kl  Σ_{v∈S} πs (log πs − log πt) + (1−Ps) log((1−Ps)/(1−Pt)),  Ps = Σ_{v∈S} πs
    forward_kl          Σ_{v∈S} πt (log πt − log πs)
    mixture             Σ_{v∈S} α πt (log πt − log m) + (1−α) πs (log πs − log m),  m = (1−α) πs + α πt

with log-softmax over the full vocabulary (method page, section 4). `grouped_reverse_kl` is ours and
the default: everything outside `S` becomes one outcome, which makes the sum a proper divergence. The
published summand alone is smallest at πs = πt/e, so it also lowers the mass on `S`.

Everything is computed in float32, whatever the logits' type.
"""

import mlx.core as mx

KINDS = ("grouped_reverse_kl", "reverse_kl", "forward_kl", "mixture")


def _excluded(logits: mx.array, ids: mx.array) -> mx.array:
    """logits (..., V) with the ids (..., K) of each position at −inf."""
    return mx.put_along_axis(logits, ids, mx.array(-mx.inf, logits.dtype), axis=-1)


def _restrict(logits: mx.array, ids: mx.array | None) -> tuple[mx.array, mx.array | None]:
    """Log-probabilities on the chosen ids (..., K), and the log-mass of all others (...), None if none.

    The mass outside is the logsumexp of the logits outside: 1 − P would lose all its digits near P = 1.
    """
    normaliser = mx.logsumexp(logits, axis=-1, keepdims=True)
    if ids is None:
        return logits - normaliser, None
    inside = mx.take_along_axis(logits, ids, axis=-1) - normaliser
    if ids.shape[-1] == logits.shape[-1]:
        return inside, None
    rest = mx.logsumexp(_excluded(logits, ids), axis=-1) - normaliser[..., 0]
    return inside, rest


def token_divergence(
    student_logits: mx.array,
    teacher_logits: mx.array,
    *,
    tokens: mx.array | None = None,
    top_k: int | None = None,
    kind: str = "reverse_kl",
    mix: float | None = None,
    renormalize: bool = False,
) -> mx.array:
    """The divergence at each position: logits (..., V) and (..., V) -> (...), float32.

    Args:
        tokens: (K,) ids of `S`; None means the full vocabulary.
        top_k: instead of `tokens`, the teacher's `top_k` likeliest ids at each position.
        kind: one of `KINDS`.
        mix: α of `mixture`, between 0 and 1; it belongs to that kind alone.
        renormalize: make both distributions sum to one over the subset (a variant that the paper rejects).

    Raises:
        ValueError: an unknown kind, an α outside [0, 1] or for another kind, both `tokens` and `top_k`,
            an id outside the vocabulary, or a `top_k` larger than it.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown loss {kind!r}; choose one of {', '.join(KINDS)}")
    if (mix is not None) != (kind == "mixture"):
        raise ValueError(f"mix = {mix} with the loss {kind}: 'mixture' needs it and the others have none")
    if mix is not None and not 0.0 <= mix <= 1.0:
        raise ValueError(f"mix must lie between 0 and 1, not {mix}")
    if tokens is not None and top_k is not None:
        raise ValueError(f"{tokens.size} tokens and top_k = {top_k}: a subset is one or the other")
    zs, zt = student_logits.astype(mx.float32), mx.stop_gradient(teacher_logits.astype(mx.float32))
    size = zs.shape[-1]
    ids = None
    if tokens is not None:
        # An index out of range would corrupt memory instead of raising.
        if tokens.size and not 0 <= tokens.min().item() <= tokens.max().item() < size:
            wrong = tokens.min().item() if tokens.min().item() < 0 else tokens.max().item()
            raise ValueError(f"token id {wrong} is outside the vocabulary of {size}")
        ids = mx.broadcast_to(tokens, (*zs.shape[:-1], tokens.size))
    elif top_k is not None:
        if not 1 <= top_k <= size:
            raise ValueError(f"top_k = {top_k} does not fit a vocabulary of {size}")
        ids = mx.argpartition(-zt, top_k - 1, axis=-1)[..., :top_k]

    (ls, rest_s), (lt, rest_t) = _restrict(zs, ids), _restrict(zt, ids)
    if renormalize:
        ls, lt = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (ls, lt))
        rest_s = rest_t = None
    if kind == "forward_kl":
        return (mx.exp(lt) * (lt - ls)).sum(-1)
    if mix is not None:
        lm = _log_mixture(ls, lt, mix)
        return (mix * mx.exp(lt) * (lt - lm) + (1 - mix) * mx.exp(ls) * (ls - lm)).sum(-1)
    total = (mx.exp(ls) * (ls - lt)).sum(-1)
    if kind == "grouped_reverse_kl" and rest_s is not None:
        total = total + mx.exp(rest_s) * (rest_s - rest_t)
    return total


def _log_mixture(ls: mx.array, lt: mx.array, mix: float) -> mx.array:
    """log((1−α) e^ls + α e^lt), safe at α = 0 and 1, where one term is absent."""
    if mix in (0.0, 1.0):
        return lt if mix else ls
    return mx.logaddexp(ls + mx.log(mx.array(1 - mix)), lt + mx.log(mx.array(mix)))


def kept_positions(mask: mx.array, skip: int = 0, keep: int = 0) -> mx.array:
    """The mask (N, T) without each row's first `skip` positions and, if `keep`, those from `keep` on."""
    t = mx.arange(mask.shape[-1])
    window = t >= skip
    if keep:
        window = window & (t < keep)
    return mask.astype(mx.float32) * window


def sequence_losses(
    student_logits: mx.array, teacher_logits: mx.array, mask: mx.array, skip: int = 0, keep: int = 0, **options
) -> mx.array:
    """Each sequence's mean divergence over its kept positions, (1/T_n) Σ_t m[n,t] D[n,t]: (N, T, V) -> (N,).

    0 for a row with nothing kept. `options` are those of `token_divergence`.
    """
    kept = kept_positions(mask, skip, keep)
    # Before the divergence, not after it: inf or NaN in padding would reach the gradient as 0 · NaN.
    zs, zt = (mx.where(kept[..., None] > 0, z, 0.0) for z in (student_logits, teacher_logits))
    return (token_divergence(zs, zt, **options) * kept).sum(-1) / mx.maximum(kept.sum(-1), 1.0)


def distillation_loss(
    student_logits: mx.array,
    teacher_logits: mx.array,
    mask: mx.array,
    *,
    tokens: mx.array | None = None,
    top_k: int | None = None,
    kind: str = "reverse_kl",
    mix: float | None = None,
    renormalize: bool = False,
    skip: int = 0,
    keep: int = 0,
) -> mx.array:
    """The localized distillation loss: mean over sequences of the mean over their kept positions.

    Args:
        student_logits, teacher_logits: (N, T, V) at the positions that predict the completion's tokens,
            already divided by the sampling temperature. Gradients reach the student only.
        mask: (N, T), 1 at real completion tokens, the end-of-turn token included.
        skip, keep: leave out the first `skip` completion positions; use only the first `keep` (0: all).
        Others: as in `token_divergence`.

    Returns:
        A float32 scalar.
    """
    options = {"tokens": tokens, "top_k": top_k, "kind": kind, "mix": mix, "renormalize": renormalize}
    return sequence_losses(student_logits, teacher_logits, mask, skip, keep, **options).mean()
