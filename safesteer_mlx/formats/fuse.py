"""The student as one model without adapters: its changes added to the weights, and these put on a grid again.

A weight's change is some tenth of a step of a 4-bit grid. So the layers that training touched are quantized by GPTQ, on
prompts of training and the student's own answers, and what training did not touch keeps its bytes.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce, tree_unflatten

from ..method.residual import block_inputs, blocks, hidden_states, resume, resumes, view
from ..system.screen import Advance, silent
from .gptq import quantize

Ids = Sequence[int]

MIXED_BITS = 6
GROUP_SIZE = 64  # where the base has none
_ROUNDED_WELL = 8  # bits, from which on rounding alone loses nothing


@dataclass(frozen=True)
class Grid:
    """An affine quantization: 2^bits levels in each group of an input's values."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class Layer:
    """A layer that holds a weight which can be quantized: by its path in the model; `inner` without its adapter;
    `touched` by training; and the grid that it is on, None for none. `foreign` says that this grid is no affine one."""

    path: str
    module: nn.Module
    inner: nn.Module
    touched: bool
    grid: Grid | None
    foreign: bool = False

    @property
    def width(self) -> int:
        """I, the values in a row of the weight."""
        values = self.inner["weight"].shape[-1]
        return values * 32 // self.grid.bits if self.grid else values

    @property
    def dtype(self) -> mx.Dtype:
        """That of the weight, or of its scales; of a grid that is not affine, whose scales are codes too, bfloat16."""
        return mx.bfloat16 if self.foreign else self.inner["scales" if self.grid else "weight"].dtype

    @property
    def size(self) -> int:
        """How many values the weight has."""
        weight: mx.array = self.inner["weight"]
        return weight.size // weight.shape[-1] * self.width

    def fused(self) -> nn.Module:
        """The layer with its adapter added and its weight spelled out, both in float32."""
        inner = copy.copy(self.inner)
        inner.set_dtype(mx.float32)  # scales, biases and plain weights; packed ones are integers
        if not self.touched:
            return _spelled_out(inner) if self.grid else inner
        adapted: Any = copy.copy(self.module)
        name = "linear" if "linear" in adapted else "embedding"
        adapted[name] = inner
        return adapted.fuse(dequantize=True)


def _spelled_out(quantized: Any) -> nn.Module:
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
    from mlx_lm.utils import dequantize_model

    if isinstance(quantized, QuantizedMultiLinear):  # which mlx-lm's function leaves as it is
        own = quantized
        weight = mx.dequantize(own.weight, own.scales, own.biases, own.group_size, own.bits, mode=own.mode)
        n_heads, n_out, n_in = weight.shape
        spelled = MultiLinear(n_in, n_out, n_heads)
        spelled.weight = weight
        return spelled
    holder = nn.Module()
    holder.layer = quantized
    return dequantize_model(holder).layer


def layers(model: nn.Module) -> list[Layer]:
    """Every layer of a student, or of any model, that holds a weight which is or can be quantized, in order."""
    modules = sorted(model.named_modules(), key=lambda item: item[0])
    entries, adapted = [], tuple(f"{path}." for path, module in modules if hasattr(module, "fuse"))
    for path, module in modules:
        touched = hasattr(module, "fuse")
        if not touched and (path.startswith(adapted) or not hasattr(module, "weight")):
            continue
        inner = module.get("linear", module.get("embedding")) if touched else module
        if hasattr(inner, "bits"):
            grid, foreign = Grid(inner.bits, inner.group_size), getattr(inner, "mode", "affine") != "affine"
        elif hasattr(inner, "to_quantized"):
            grid, foreign = None, False
        else:
            continue
        entries.append(Layer(path, module, inner, touched, grid, foreign))
    return entries


@dataclass(frozen=True)
class Plan:
    """What becomes of each layer: the grid that it is put on, None for a weight spelled out. A layer that is not among
    them stays as it is, to the byte. `dtype` is that of all numbers that are no codes, None for each layer's own."""

    grids: dict[str, Grid | None]
    dtype: mx.Dtype | None = None

    @property
    def by_gptq(self) -> bool:
        """Whether texts are needed to quantize by."""
        return any(grid and grid.bits < _ROUNDED_WELL for grid in self.grids.values())

    def bytes_of(self, model: nn.Module) -> int:
        """How many bytes the weights will take, a little too many."""
        total = tree_reduce(lambda size, x: size + x.nbytes, view_without_adapters(model).parameters(), 0)
        for layer in layers(model):
            if layer.path in self.grids:
                total -= sum(layer.inner[name].nbytes for name in ("weight", "scales", "biases") if name in layer.inner)
        return int(total) + sum(self._sizes(model))

    def new_bytes(self, model: nn.Module) -> int:
        """How many bytes are held beside the base's while it is fused: the new weights; of the layer that takes most
        the weight spelled out, twice, and, by GPTQ, Σ x xᵀ of its inputs with some five arrays of that size."""
        beside = [
            2 * layer.size + 6 * layer.width**2 * _needs_gptq(layer, self)
            for layer in layers(model)
            if layer.path in self.grids
        ]
        return sum(self._sizes(model)) + mx.float32.size * max(beside, default=0)

    def _sizes(self, model: nn.Module) -> list[int]:
        """Bytes of each new weight."""
        sizes = []
        for layer in layers(model):
            if layer.path in self.grids:
                grid, size = self.grids[layer.path], (self.dtype or layer.dtype).size
                sizes.append(layer.size * (size if grid is None else grid.bits / 8 + 2 * size / grid.group_size))
        return [int(size) for size in sizes]


def view_without_adapters(model: nn.Module) -> nn.Module:
    """A view of a student that computes what its base does."""
    base = view(model)
    own = {layer.path: layer.inner for layer in layers(base) if layer.touched}
    base.update_modules(tree_unflatten(list(own.items())))
    return base


def plan(model: nn.Module, bits: str, dtype: str | None = None) -> Plan:
    """What `--bits` means for this student.

    `auto`: what training touched goes back onto the grid that it came from (an affine one of as many bits, if that was
    of another kind). `mixed`: onto one of `MIXED_BITS`. 4, 5, 6 or 8: every layer, but what training did not touch
    stays where it has so many already. 16 and 32: every weight spelled out, in `dtype` if one is named.
    """
    every = layers(model)
    if bits in ("16", "32"):
        half = next((layer.dtype for layer in every if layer.dtype != mx.float32), mx.float16)
        named = getattr(mx, dtype) if dtype else half if bits == "16" else mx.float32
        return Plan({layer.path: None for layer in every}, named)
    if bits in ("auto", "mixed"):

        def again(layer: Layer, grid: Grid) -> Grid:
            return Grid(grid.bits if bits == "auto" else MIXED_BITS, _group_size(layer, grid.group_size))

        return Plan({layer.path: layer.grid and again(layer, layer.grid) for layer in every if layer.touched})
    allowed = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    has_grid, grids = any(layer.grid for layer in every), {}
    for layer in every:
        wanted = allowed(layer.path, layer.inner) if not has_grid else layer.grid is not None
        size = _group_size(layer, layer.grid.group_size if layer.grid else GROUP_SIZE)
        if not wanted or layer.width % size:
            if layer.touched:
                grids[layer.path] = layer.grid
            continue
        grid = Grid(int(bits), size)
        if isinstance(wanted, dict):
            grid = Grid(wanted.get("bits", grid.bits), wanted.get("group_size", size))
        if layer.touched or layer.foreign or layer.grid != grid:
            grids[layer.path] = grid
    return Plan(grids)


def _group_size(layer: Layer, size: int) -> int:
    """The group size of an affine grid for this layer: this one, if MLX has it and a row can be cut so."""
    fits = size in (32, 64, 128) and layer.width % size == 0 and not layer.foreign
    return size if fits else 64 if layer.width % 64 == 0 else 32


class _Inputs(nn.Module):
    """A layer that notes Σ x xᵀ of what it is given."""

    def __init__(self, layer: nn.Module, width: int):
        super().__init__()
        self.layer = layer
        self.hessian = mx.zeros((width, width))

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        self.hessian = self.hessian + flat.T @ flat
        return self.layer(x, *args, **kwargs)


def fuse(student: nn.Module, plan: Plan, rows: Sequence[Ids], progress: Advance = silent) -> nn.Module:
    """The student as a model without adapters, its layers on the plan's grids. `rows` are texts to quantize by.

    Block after block: what goes into a block comes from blocks that are quantized already, so that each makes good what
    those before it lost. One block is spelled out at a time.
    """
    model = view(student)
    texts = [mx.array([list(row)]) for row in rows]
    place = {id(module): path for path, module in model.named_modules()}
    in_blocks: set[str] = set()
    own = blocks(model)
    can_resume = bool(texts) and resumes(model, texts[0])
    inputs: list[mx.array] | None = None
    for i, block in enumerate(own):
        prefix = place[id(block)] + "."
        every = [layer for layer in layers(model) if layer.path.startswith(prefix) and layer.path in plan.grids]
        in_blocks |= {layer.path for layer in every}
        slow = [layer for layer in every if _needs_gptq(layer, plan)]
        hessians: dict[str, mx.array] = {}
        if slow:
            if can_resume and inputs is None:
                inputs = [block_inputs(model, text)[i] for text in texts]
            hessians = _hessians(model, i, prefix, slow, texts, inputs)
        new = []
        for layer in every:
            new.append((layer.path.removeprefix(prefix), _placed(layer, plan, hessians.get(layer.path))))
            mx.eval(new[-1][1].parameters())
        block.update_modules(tree_unflatten(new))
        if inputs is not None and i + 1 < len(own):
            inputs = [block_inputs(resume(model, i, x), text)[i + 1] for x, text in zip(inputs, texts, strict=True)]
            mx.eval(inputs)
        progress(i + 1, len(own))
    for layer in layers(model):
        if layer.path in plan.grids and layer.path not in in_blocks:
            model.update_modules(tree_unflatten([(layer.path, placed := _placed(layer, plan, None))]))
            mx.eval(placed.parameters())
    if plan.dtype is not None:
        model.set_dtype(plan.dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def _needs_gptq(layer: Layer, plan: Plan) -> bool:
    """Whether it is on a grid so coarse, and computes W x: embeddings, and latent attention's maps of each head, which
    are read from both sides, are rounded."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    grid = plan.grids[layer.path]
    is_linear = isinstance(layer.inner, nn.Linear | nn.QuantizedLinear | SwitchLinear | QuantizedSwitchLinear)
    return grid is not None and grid.bits < _ROUNDED_WELL and is_linear


def _hessians(
    model: nn.Module, i: int, prefix: str, layers: Sequence[Layer], texts: Sequence[mx.array], inputs: Any
) -> dict[str, mx.array]:
    """Σ x xᵀ over the inputs of some layers of block `i`, by path."""
    block = blocks(model)[i]
    reading = {layer.path: _Inputs(layer.module, layer.width) for layer in layers}
    block.update_modules(tree_unflatten([(path.removeprefix(prefix), module) for path, module in reading.items()]))
    for n, text in enumerate(texts):
        hidden_states(model if inputs is None else resume(model, i, inputs[n]), text)
        mx.eval([module.hessian for module in reading.values()])  # no more is computed than these need
    return {path: module.hessian for path, module in reading.items()}


def _placed(layer: Layer, plan: Plan, hessian: mx.array | None) -> nn.Module:
    """The layer without its adapter, on its grid."""
    fused: Any = layer.fused()
    grid, dtype = plan.grids[layer.path], plan.dtype or layer.dtype
    weight = fused.weight
    fused.set_dtype(dtype)
    if grid is None:
        return fused
    placed = fused.to_quantized(group_size=grid.group_size, bits=grid.bits)
    if hessian is not None:
        packed = quantize(weight, hessian, grid.bits, grid.group_size, dtype)
        placed.weight, placed.scales, placed.biases = packed
    return placed


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """What config.json says of the model's grids: the commonest one, and by path each layer's that is on another, or on
    none although it could be; None for no grid."""
    grids = {
        layer.path: (layer.grid.bits, layer.grid.group_size, getattr(layer.module, "mode", "affine"))
        for layer in layers(model)
        if layer.grid
    }
    if not grids:
        return None
    keys = list(grids.values())
    commonest = max(sorted(set(keys)), key=keys.count)

    def said(grid: tuple[int, int, str]) -> dict[str, Any]:
        bits, group_size, mode = grid
        with_mode = mode != "affine" or commonest[2] != "affine"
        return {"group_size": group_size, "bits": bits} | ({"mode": mode} if with_mode else {})

    return said(commonest) | {path: said(grid) for path, grid in grids.items() if grid != commonest}
