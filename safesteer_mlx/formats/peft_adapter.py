"""A run's adapters as PEFT has them.

mlx-lm:  y = W x + s · (x A) B, A (I, R), B (R, O);  PEFT:  y = W x + α/R · B' A' x, so A' = Aᵀ, B' = Bᵀ, α = s R.
DoRA's magnitudes are the same in both: m / |W + s B' A'| row by row, of all but the bias.
"""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..system.screen import UserError
from .fuse import layers


def write_peft(student: nn.Module, base_name: str, folder: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`; a UserError if the run trained all weights, or
    layers for which PEFT has no such adapter."""
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    touched = [layer for layer in layers(student) if layer.touched]
    if not touched:
        raise UserError("the run trained all weights, no adapter: there is nothing for PEFT; give --to hf")
    weights: dict[str, mx.array] = {}
    for layer in touched:
        own = layer.module
        if not isinstance(own, LoRALinear | DoRALinear):
            raise UserError(f"PEFT has no adapter for layers like {layer.path} (experts, embeddings); give --to hf")
        name = f"base_model.model.{layer.path}"
        weights[f"{name}.lora_A.weight"] = own.lora_a.T
        weights[f"{name}.lora_B.weight"] = own.lora_b.T
        if isinstance(own, DoRALinear):
            weights[f"{name}.lora_magnitude_vector"] = own.m.astype(mx.float32)
    [rank] = {layer.module["lora_a"].shape[1] for layer in touched}  # mlx-lm gives all layers one
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": touched[0].module.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "use_dora": isinstance(touched[0].module, DoRALinear),
        **_where([layer.path for layer in touched]),
    }
    weights = {name: mx.contiguous(weight) for name, weight in sorted(weights.items())}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), weights, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _where(paths: list[str]) -> dict[str, Any]:
    """Which modules of which blocks: PEFT's `target_modules` and `layers_to_transform`."""
    parts = [part for path in paths if (part := re.fullmatch(r"(?:.*\.)?(\w+)\.(\d+)\.(.+)", path))]
    modules, blocks = sorted({part[3] for part in parts}), sorted({int(part[2]) for part in parts})
    if len(parts) < len(paths) or len(modules) * len(blocks) != len(paths):  # not the same modules in each
        return {"target_modules": sorted(paths)}
    return {"target_modules": modules, "layers_to_transform": blocks, "layers_pattern": parts[0][1]}
