"""A model and its tokenizer, from a Hub id or a folder, through mlx-lm."""

import copy
import hashlib
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .progress import UserError

# Of the memory that a dequantized copy may take on the CPU backend.
_DEQUANTIZED_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Loaded:
    """A frozen base model: `path` the folder it came from, `quantized` whether its weights are."""

    name: str
    path: Path
    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    quantized: bool
    dequantized_for_speed: bool
    thinks: bool  # before it answers, as its template is switched

    @property
    def vocabulary(self) -> int:
        """V of the logits, from the configuration."""
        text = self.config.get("text_config", self.config)
        return int(text["vocab_size"])

    @property
    def eos_ids(self) -> list[int]:
        """Ids that end the model's turn."""
        return sorted(self.tokenizer.eos_token_ids)

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over the names and bytes of the weight files."""
        digest = hashlib.sha256()
        for file in sorted(self.path.glob("model*.safetensors")):
            digest.update(file.name.encode())
            with file.open("rb") as handle:
                while chunk := handle.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()


def find(name: str) -> Path:
    """The local folder of a model, downloaded from the Hub if `name` is not a folder.

    Raises:
        UserError: no such folder or repository, no access, or no configuration in it.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from mlx_lm.utils import _download

    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise UserError(f"model folder {name} does not exist; give an existing folder or a Hub id like org/name")
    try:
        path = _download(str(Path(name).expanduser()) if Path(name).expanduser().exists() else name)
    except GatedRepoError:
        raise UserError(
            f"model {name} is gated; accept its licence at https://huggingface.co/{name}, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"model {name} is neither a folder here nor a repository on the Hub; check the name") from None
    except HFValidationError:
        raise UserError(f"model {name!r} is neither a folder here nor a Hub id like org/name; check the name") from None
    except (LocalEntryNotFoundError, OSError) as error:
        reason = type(error).__name__
        raise UserError(
            f"model {name} is not in the local cache and the Hub cannot be reached ({reason}); "
            "check the name and the connection, or give a folder"
        ) from None
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json; give the folder of an MLX or Hugging Face model")
    return path


def read_config(path: Path) -> dict[str, Any]:
    """The model's configuration."""
    from mlx_lm.utils import load_config

    try:
        return load_config(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}/config.json cannot be read ({type(error).__name__}); fetch the model again") from None


def load(name: str, trust_remote_code: bool = False, thinking: str = "auto") -> Loaded:
    """Load and freeze a model. No code from its repository runs unless `trust_remote_code` says so.

    `thinking` sets the switch of the chat template, wherever the tokenizer renders it; auto leaves it as mlx-lm does.

    On the CPU backend, whose quantized kernels are ten times slower, a small quantized model is computed
    on its dequantized weights: the same values. On Metal never.

    Raises:
        UserError: as `find`, or the model is of an unknown architecture, has no weights, no chat template,
            no end-of-turn token, or no switch for thinking.
    """
    from mlx_lm.utils import dequantize_model, load_model, load_tokenizer

    path = find(name)
    config = read_config(path)
    asked = config.get("model_file") or config.get("auto_map")
    if asked and not trust_remote_code:
        raise UserError(
            f"model {name} wants to run code of its own ({asked}); "
            "if you trust it, pass --trust-remote-code, else choose another model"
        )
    try:
        model, config = load_model(path, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(
            path, {"trust_remote_code": trust_remote_code}, eos_token_ids=config.get("eos_token_id")
        )
    except FileNotFoundError:
        raise UserError(
            f"{path} holds no model*.safetensors; fetch the weights or convert them with mlx_lm.convert"
        ) from None
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model {name} cannot be loaded: {first[:200]}; is it a text model that mlx-lm supports?"
        ) from None
    if not tokenizer.has_chat_template:
        raise UserError(f"model {name} has no chat template; SafeSteer aligns chat models, choose its instruct version")
    if not tokenizer.eos_token_ids:
        raise UserError(f"model {name} names no end-of-turn token; set eos_token_id in its config.json")
    if thinking != "auto":
        tokenizer = _switched(tokenizer, thinking == "on")
    model.eval()
    model.freeze()
    quantized = any(hasattr(module, "bits") for _, module in model.named_modules())
    slow = quantized and mx.default_device() == mx.Device(mx.cpu)
    sizes = [m.weight.size * 32 // m.bits for _, m in model.named_modules() if hasattr(m, "bits")]
    if dequantize := slow and 4 * sum(sizes) <= _DEQUANTIZED_BYTES:
        model = dequantize_model(model)
        model.freeze()
        mx.eval(model.parameters())
    thinks = tokenizer.has_thinking and thinking != "off"
    return Loaded(name, path, model, tokenizer, config, quantized, bool(dequantize), thinks)


def _switched(tokenizer: Any, thinking: bool) -> Any:
    """A view of a tokenizer whose chat template thinks, or does not."""
    turns = [{"role": "user", "content": "a"}]
    on, off = (
        tokenizer.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=switch)
        for switch in (True, False)
    )
    if on == off:
        raise UserError("the chat template has no thinking switch; leave --thinking at auto")
    view = copy.copy(tokenizer)
    view.apply_chat_template = partial(tokenizer.apply_chat_template, enable_thinking=thinking)
    return view
