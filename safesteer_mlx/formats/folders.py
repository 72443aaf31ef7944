"""What mlx-lm, LM Studio, transformers and PEFT read: a model as a folder, or adapters."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..system.load import BESIDE, Loaded
from ..system.model_files import code_of
from ..system.screen import UserError
from .fuse import layers

# What of a base's folder goes with its weights; there may be notes, scripts and data of who made it beside these.
_COPIED = (*BESIDE, "tekken.json", "preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*")

# Families whose weights mlx-lm keeps under transformers' own names, and those whose experts it stacks.
_SAME_NAMES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "starcoder2")
_EXPERTS: dict[str, dict[str, str]] = {"olmoe": {}, "qwen2_moe": {}, "qwen3_moe": {}}
_EXPERTS |= {"mixtral": {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}}


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Copy what stands beside a model's weights: tokenizer, chat template, generation settings, licence, and the code
    that its configuration or its tokenizer names."""
    files = {file for pattern in _COPIED for file in base.glob(pattern) if file.suffix != ".py"} | code_of(base)
    for file in files:
        if file.name != "config.json" and file.is_file():
            shutil.copyfile(file, folder / file.name)


def write_mlx(base: Loaded, model: nn.Module, folder: Path, more: dict[str, Any] | None) -> None:
    """Write a fused model, with the base's tokenizer, as mlx-lm does; `more` goes into its config.json, which has no
    quantization otherwise."""
    from mlx_lm.utils import save_config, save_model

    config = {k: v for k, v in base.config.items() if k not in ("quantization", "quantization_config")}
    save_model(folder, model)
    save_config(config | (more or {}), folder / "config.json")
    copy_tokenizer(base.path, folder)


def check_family(config: dict[str, Any], what: str) -> None:
    """Refuse (UserError) a family that transformers may keep under other names: all but those that were tried."""
    kind = config.get("model_type")
    if kind not in _SAME_NAMES and kind not in _EXPERTS:
        known = ", ".join(sorted((*_SAME_NAMES, *_EXPERTS)))
        raise UserError(f"--to {what} is there for {known}, not for model_type {kind}; give --to mlx")


def write_hf(base: Loaded, model: nn.Module, dtype: mx.Dtype, folder: Path) -> None:
    """Write a model without quantized weights as transformers reads it, in `dtype`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = base.config.get("model_type", "")
    weights = {name: weight.astype(dtype) for name, weight in tree_flatten(model.parameters())}  # type: ignore
    if kind in _EXPERTS:
        weights = dict(_unstacked(weights, _EXPERTS[kind]))
    holder = nn.Module()
    for name, part in tree_unflatten(list(weights.items())).items():
        holder[name] = part
    more: dict[str, Any] = {"dtype": str(dtype).rpartition(".")[2]}
    if not base.config.get("architectures"):  # llama.cpp's converter asks for it
        more["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    write_mlx(base, holder, folder, more)


def _unstacked(weights: dict[str, mx.array], names: dict[str, str]):
    """Each expert's own weights, from those that mlx-lm stacks."""
    for name, weight in weights.items():
        before, stacked, after = name.partition(".switch_mlp.")
        if not stacked:
            yield name, weight
            continue
        layer, _, leaf = after.partition(".")
        for i, own in enumerate(weight):
            yield f"{before}.experts.{i}.{names.get(layer, layer)}.{leaf}", own


def write_peft(student: nn.Module, base_name: str | None, folder: Path) -> None:
    """Write a run's adapters as PEFT's `adapter_model.safetensors` and `adapter_config.json`, which names the base if
    one is given; a UserError if the run trained all weights, or layers for which PEFT has no such adapter.

    mlx-lm:  y = W x + s · (x A) B, A (I, R), B (R, O);  PEFT:  y = W x + α/R · B' A' x, so A' = Aᵀ, B' = Bᵀ, α = s R.
    DoRA's magnitudes are the same in both: m / |W + s B' A'| row by row, of all but the bias.
    """
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
