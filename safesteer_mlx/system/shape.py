"""The sizes of a model that memory goes by, read from its configuration and the headers of its weight files alone."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .model_files import HEADS, Tensor, bytes_of, check_weights, read_object, with_sizes
from .screen import UserError

# Keys that say how many experts a token passes.
_TOP_K = re.compile(
    r"(num_|^)experts?_per_tok(en)?$|^moe_?top_?k$|^top_k_experts$|^num_selected_experts$|^moe_num_active|^moe_k$"
)
# An expert's own weights, where experts are not stacked into one tensor.
_EXPERT = re.compile(r"experts\.(\d+)\.")
# Not into the stream, even where they are as wide as it is.
_INNER = re.compile(r"[qkv]_proj|qkv|query|w[qkv]\b|gate|up_proj|w[13]\b|fc1|c_fc|in_proj|att_proj", re.IGNORECASE)
# Weights of a block's feed-forward part; all others count as its attention, or what it has in its place.
_FEED_FORWARD = re.compile(r"mlp|feed_forward|ffn|expert|moe|fc[12]|w[123]\b|gate_proj|up_proj")
_CHUNK, _CHUNK_STATE = 1.0, 2.7  # what Mamba 2 keeps, in states: heads · length, and its inner width


@dataclass(frozen=True)
class _Family:
    """What only a family's name tells."""

    in_turn: bool = False  # asks experts one after another: keeps what each gives for all, twice where checkpointed
    scan: float = 0.0  # its scan's gradient holds an array of all positions for each of them, of states · length
    gelu: bool = False  # its activation, whatever the configuration says
    table: bool = False  # of learned positions, beyond whose end mlx reads other memory, in silence


# The package's one table by family, but for what other programs read (tests/test_house.py).
_FAMILIES = {"dbrx": _Family(in_turn=True), "jamba": _Family(scan=0.5)}
_FAMILIES |= dict.fromkeys(("gpt2", "gpt_bigcode"), _Family(table=True))
_FAMILIES |= dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text"), _Family(gelu=True))


@dataclass(frozen=True)
class Block:
    """What a block makes of one token, in numbers: of its attention, its feed-forward part and the experts that the
    token passes, the linear layers' outputs into inner widths and into the stream (D), and of the last two the width
    whose activation takes several steps (GELU, or without a gate); and what a recurrence keeps, `state + chunk ·
    length`."""

    attention: tuple[int, int] = (0, 0)
    dense: tuple[int, int, int] = (0, 0, 0)
    experts: tuple[int, int, int] = (0, 0, 0)
    state: float = 0.0
    chunk: float = 0.0

    def kept(self, length: int) -> float:
        """The recurrence's numbers, in sequences of this length."""
        return self.state + self.chunk * length


@dataclass(frozen=True)
class ModelShape:
    """What the headers and the configuration say; `linears` are (inputs, outputs) of each block's linear layers."""

    weight_bytes: int
    dequantized_bytes: int  # the same as float32
    hidden: int
    heads: int
    kv: int  # width of keys, and of values
    vocabulary: int
    activation_bytes: int  # of one value
    quantized: bool
    forgets: bool  # what a checkpointed block made; else it is kept, and made again
    linears: tuple[tuple[tuple[int, int], ...], ...]
    blocks: tuple[Block, ...]

    @property
    def n_layers(self) -> int:
        """How many blocks there are."""
        return len(self.linears)


def read_shape(path: Path) -> ModelShape:
    """The shape of a model in a folder, from its configuration and headers; a UserError if they cannot be believed."""
    return shape_of(with_sizes(read_object(path / "config.json")), check_weights(path))


def shape_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> ModelShape:
    """The shape from what was read; a UserError if the configuration lacks a size, or has what is none."""
    try:
        return _shape_of(config, tensors)
    except (TypeError, AttributeError, ArithmeticError) as error:
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
    linears: list[list[tuple[int, int]]] = [[] for _ in range(n_layers)]
    # Of blocks, by part: inner and outer width, and how many weights make the inner one.
    widths = [{part: [0.0, 0.0, 0.0] for part in ("attention", "dense", "experts")} for _ in range(n_layers)]
    sizes = text | (text.get("ffn_config") or {})
    passed = next((sizes[key] for key in sizes if _TOP_K.search(key) and isinstance(sizes[key], int)), 1)
    experts_apart = 1 + max((int(m[1]) for m in map(_EXPERT.search, tensors) if m), default=0)
    in_turn = _family(text).in_turn
    values = 0
    for name, tensor in tensors.items():
        packed = f"{name.removesuffix('.weight')}.scales" in tensors and name.endswith(".weight")
        shape = (*tensor.shape[:-1], tensor.shape[-1] * 32 // bits) if packed and bits else tensor.shape
        count = math.prod(shape)
        if not name.endswith((".scales", ".biases")) or not bits:
            values += count
        number = _block_of(name, n_layers)
        if number is None or not name.endswith(".weight") or len(shape) < 2:
            continue
        experts = count // (shape[-1] * shape[-2])
        linears[number] += [(shape[-1], shape[-2])] * experts
        if "conv" in name:
            continue
        part, share, of_one = "dense" if _FEED_FORWARD.search(name) else "attention", 1.0, 1.0
        if len(shape) == 3:
            part, share = "experts", min(passed, experts)
        elif _EXPERT.search(name):
            part, of_one, share = "experts", 1 / experts_apart, min(1.0, passed / experts_apart)
        inner = shape[-2] != hidden or (shape[-1] == hidden and _INNER.search(name) is not None)
        widths[number][part][not inner] += shape[-2] * share
        widths[number][part][2] += inner * of_one * (2 if "gate_up" in name else 1)
    states = _states(text, tensors, n_layers)
    activation = next((str(text[key]) for key in ("hidden_act", "hidden_activation") if text.get(key)), "")
    gelu = "gelu" in activation or _family(text).gelu
    floating = [t.dtype for t in tensors.values() if t.dtype in ("F32", "F16", "BF16")]
    return ModelShape(
        weight_bytes=sum(map(bytes_of, tensors.values())),
        dequantized_bytes=4 * values,
        hidden=hidden,
        heads=heads,
        kv=(text.get("head_dim") or hidden // heads) * (text.get("num_key_value_heads") or heads),
        vocabulary=size("vocab_size"),
        activation_bytes=4 if floating and all(kind == "F32" for kind in floating) else 2,
        quantized=bool(bits),
        forgets=not in_turn,
        linears=tuple(map(tuple, linears)),
        blocks=tuple(
            Block(
                (int(of["attention"][0]), int(of["attention"][1])),
                _with_steps(of["dense"], gelu),
                _with_steps(of["experts"], gelu),
                *state,
            )
            for of, state in zip(widths, states, strict=True)
        ),
    )


def has_position_table(text: dict[str, Any]) -> bool:
    """Whether a model of this configuration looks positions up in a table that it learned, and can read no more."""
    return _family(text).table


def _family(text: dict[str, Any]) -> _Family:
    return _FAMILIES.get(str(text.get("model_type")), _Family())


def _with_steps(widths: list[float], gelu: bool) -> tuple[int, int, int]:
    """Inner and outer width, and the width whose activation takes several steps: one of two where there is a gate."""
    inner, outer, weights = widths
    return int(inner), int(outer), int(inner / max(1.0, weights)) if gelu or round(weights) == 1 else 0


def _block_of(name: str, n_layers: int) -> int | None:
    """The block that a weight's name tells, the first number in it."""
    number = next((int(part) for part in name.split(".") if part.isdigit()), n_layers)
    return number if number < n_layers else None


def _states(text: dict[str, Any], tensors: dict[str, Tensor], n_layers: int) -> list[tuple[float, float]]:
    """(state, chunk) of each block: of those that have a decay (`A_log`), by the kind of recurrence.

    Mamba keeps (d_inner, n) states of each token, told by the decay's shape. Gated delta nets keep (heads, d_k, d_v),
    Mamba 2 what its chunks take, both told by the configuration.
    """
    states = [(0.0, 0.0)] * n_layers
    linear = text.get("linear_attn_config") or {}
    key, value = (text.get(f"linear_{which}_head_dim") or linear.get("head_dim") for which in ("key", "value"))
    for name, tensor in tensors.items():
        number, size = _block_of(name, n_layers), math.prod(tensor.shape)
        if number is None or not name.endswith("A_log"):
            continue
        if len(tensor.shape) == 2:
            states[number] = (float(size), size * _family(text).scan)
        elif isinstance(key, int) and isinstance(value, int):
            states[number] = (float(size * key * value), 0.0)
        else:
            width = next((text[k] for k in ("mamba_d_head", "mamba_head_dim", "head_dim") if text.get(k)), 64)
            states[number] = (_CHUNK_STATE * size * width, _CHUNK * size)
    return states
