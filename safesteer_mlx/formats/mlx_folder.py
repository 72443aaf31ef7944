"""A model as a folder that mlx-lm, LM Studio and transformers read."""

import shutil
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..system.load import Loaded

# Of a model's folder, all but the weights and what belongs to them alone.
_COPIED = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("config.json", "model.safetensors.index.json", "hf_quant_config.json", "adapter_config.json")


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Copy what stands beside a model's weights: tokenizer, chat template, generation settings, licence."""
    for pattern in _COPIED:
        for file in sorted(base.glob(pattern)):
            if file.name not in _NOT_COPIED and file.is_file():
                shutil.copyfile(file, folder / file.name)


def write_mlx(
    base: Loaded,
    model: nn.Module,
    quantization: dict[str, Any] | None,
    folder: Path,
    more: dict[str, Any] | None = None,
) -> None:
    """Write a fused model, with the base's tokenizer, as mlx-lm does; `more` goes into its config.json."""
    from mlx_lm.utils import save_config, save_model

    config = {k: v for k, v in base.config.items() if k not in ("quantization", "quantization_config")}
    config |= (more or {}) | ({"quantization": quantization} if quantization else {})
    save_model(folder, model)
    save_config(config, folder / "config.json")
    copy_tokenizer(base.path, folder)
