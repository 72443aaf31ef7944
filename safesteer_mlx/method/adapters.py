"""Adapters on a view of the base, through mlx-lm's own loader, which takes a file with missing weights silently."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..system.screen import UserError
from .residual import share

_LEAVES = {"lora_a", "lora_b", "m"}  # of mlx-lm's LoRA and DoRA layers


def with_adapters(base: nn.Module, folder: Path) -> nn.Module:
    """A view of `base` with the folder's adapters: one set of weights for both, `base` left as it is.

    Raises:
        UserError: no adapters there, or they are not this model's: a weight missing, foreign, or of another shape.
    """
    from mlx_lm.tuner.utils import load_adapters

    model = share(base)
    try:
        load_adapters(model, str(folder))
        held = set(mx.load(str(folder / "adapters.safetensors")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"--adapter-path {folder} does not fit this model ({lines[-1].strip()[:150]}); "
            "give the model it was made for"
        ) from None
    wanted = {name for name, _ in tree_flatten(model.parameters()) if name.rsplit(".", 1)[-1] in _LEAVES}
    if missing := sorted(wanted - held):
        raise UserError(
            f"--adapter-path {folder} lacks {len(missing)} of its {len(wanted)} weights ({missing[0]} first); "
            "make the adapters again"
        )
    if not held:
        raise UserError(f"--adapter-path {folder} holds no weights; make the adapters again")
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return model
