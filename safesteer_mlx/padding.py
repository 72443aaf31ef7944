"""Whether mlx-lm computes prompts of unequal length side by side as it does each alone; in some architectures, not."""

from collections.abc import Sequence

import mlx.core as mx

from .load import Loaded
from .progress import UserError
from .residual import last_logits
from .rollout import generate

Ids = Sequence[int]

ONE_AT_A_TIME = "mlx-lm does not batch this architecture rightly: answers are generated one at a time, slowly"


def can_batch(base: Loaded, prompts: Sequence[Ids]) -> bool:
    """Whether answers can be generated in batches, told by the shortest and the longest of some prompts.

    Raises:
        UserError: padding changes the forward pass itself.
    """
    ordered = sorted(prompts, key=len)
    rows = ordered[:4] + ordered[-4:]
    together = last_logits(base.model, rows)
    alone = mx.concatenate([last_logits(base.model, [row]) for row in rows])
    if not mx.allclose(together, alone, rtol=0.05, atol=0.05 * mx.abs(alone).max().item()):
        kind = base.config.get("model_type")
        raise UserError(
            f"padding changes what model_type {kind} computes, so prompts of unequal length cannot be read "
            "together; choose another model"
        )
    try:
        found = [c.ids[0] for c in generate(base.model, rows, eos_ids=base.eos_ids, max_tokens=1)]
        wrong = sum(token != int(best) for token, best in zip(found, alone.argmax(-1).tolist(), strict=True))
    except (ValueError, RuntimeError):
        return False
    return wrong <= 1  # half precision may turn a near tie
