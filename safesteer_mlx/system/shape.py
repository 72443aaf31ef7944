"""The sizes of a model that memory goes by, read from its configuration and the headers of its weight files alone."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .model_files import HEADS, Tensor, bytes_of, check_weights, read_object, with_sizes
from .screen import UserError

# Of learned positions, beyond whose end mlx reads other memory, in silence.
_WITH_POSITION_TABLE = {"gpt2", "gpt_bigcode"}

_SMALL = 4 * 2**30  # bytes of the weights in float32


@dataclass(frozen=True)
class ModelShape:
    """What headers and configuration say of the weights, as they are computed with, of a cache and of logits."""

    weight_bytes: int
    hidden: int
    n_layers: int
    kv: int  # width of keys, and of values
    vocabulary: int
    activation_bytes: int  # of one value
    quantized: bool


def in_float32(n_weights: int) -> bool:
    """Whether a model of so many weights is computed in float32, however they are kept: on the CPU backend, whose
    kernels for anything else are many times slower, if that is small. The numbers are the same, and nothing is rounded
    to less on the way."""
    return mx.default_device() == mx.Device(mx.cpu) and 4 * n_weights <= _SMALL


def read_shape(path: Path) -> ModelShape:
    """The shape of a model in a folder, from its configuration and headers; a UserError if they cannot be believed."""
    return shape_of(with_sizes(read_object(path / "config.json")), check_weights(path))


def shape_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> ModelShape:
    """The shape from what was read; a UserError if the configuration lacks a size, or has what is none."""
    try:
        return _shape_of(config, tensors)
    except (TypeError, AttributeError, ArithmeticError, IndexError) as error:
        raise UserError(
            f"the sizes in the config.json make no model ({str(error).rstrip('.'):.200}); fetch the model again"
        ) from None


def _shape_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> ModelShape:
    text = config.get("text_config") or config
    quantization = config.get("quantization") or config.get("quantization_config")
    bits = quantization.get("bits", 4) if isinstance(quantization, dict) else 0

    def size(*names: str) -> int:
        value = next((text[name] for name in names if isinstance(text.get(name), int)), None)
        if value is None:
            raise UserError(f"the config.json has no {names[0]}; without --dry-run a run goes on all the same")
        return value

    n_layers = size("num_hidden_layers", "n_layers", "num_layers", "n_layer")
    hidden = size("hidden_size", "dim", "d_model", "n_embd")
    heads = size(*HEADS)
    values = 0
    for name, tensor in tensors.items():
        packed = f"{name.removesuffix('.weight')}.scales" in tensors and name.endswith(".weight")
        shape = (*tensor.shape[:-1], tensor.shape[-1] * 32 // bits) if packed and bits else tensor.shape
        if not name.endswith((".scales", ".biases")) or not bits:
            values += math.prod(shape)
    floating = [t.dtype for t in tensors.values() if t.dtype in ("F32", "F16", "BF16")]
    widened = in_float32(values)
    return ModelShape(
        weight_bytes=4 * values if widened else sum(map(bytes_of, tensors.values())),
        hidden=hidden,
        n_layers=n_layers,
        kv=(text.get("head_dim") or hidden // heads) * (text.get("num_key_value_heads") or heads),
        vocabulary=size("vocab_size"),
        activation_bytes=4 if widened or (floating and all(kind == "F32" for kind in floating)) else 2,
        quantized=bool(bits),
    )


def has_position_table(text: dict[str, Any]) -> bool:
    """Whether a model of this configuration looks positions up in a table that it learned, and can read no more."""
    return text.get("model_type") in _WITH_POSITION_TABLE
