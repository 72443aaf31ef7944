"""A model as a folder: one that mlx-lm, LM Studio and transformers read, or one for transformers alone."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..system.load import Loaded
from ..system.screen import UserError

# Of a model's folder, all but the weights and what belongs to them alone.
_COPIED = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("config.json", "model.safetensors.index.json", "hf_quant_config.json", "adapter_config.json")

# Families whose weights mlx-lm keeps under transformers' own names, and those whose experts it stacks.
_SAME_NAMES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "starcoder2")
_EXPERTS: dict[str, dict[str, str]] = {"olmoe": {}, "qwen2_moe": {}, "qwen3_moe": {}}
_EXPERTS |= {"mixtral": {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}}


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Copy what stands beside a model's weights: tokenizer, chat template, generation settings, licence."""
    for pattern in _COPIED:
        for file in sorted(base.glob(pattern)):
            if file.name not in _NOT_COPIED and file.is_file():
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
