"""The residual stream: read it, steer it, ablate it. The only file that touches decoder blocks.

`x[l]`, the *input* of block `l`, is the residual stream before that block (method page, notation).
Interventions change the class of a copied block in place, so that parameter names stay as they are
and adapters keep loading; a wrapper module would rename them. Every view made here shares the
weights of the model it was made from and leaves that model untouched.
"""

import copy
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..system.screen import UserError

EPS = 1e-8  # keeps the unit vector of a zero direction (block 0) zero instead of NaN


class UnsupportedModelError(UserError):
    """The architecture keeps its blocks where this file cannot find them."""


def _architecture(model: nn.Module) -> str:
    """The name of mlx-lm's file; the classes in it are all called Model."""
    return type(model).__module__.rpartition(".")[2]


def _holds(value: object, block: nn.Module) -> bool:
    return isinstance(value, list) and any(item is block for item in value)


def _path_to_body(model: nn.Module) -> list[str]:
    """Attribute names from `model` down to the module whose own list holds the decoder blocks.

    `model.layers` is often a property that returns a slice, so the list is found by the identity of
    its first block, never assigned through the property.
    """
    first = model.layers[0]
    for path, module in sorted(model.named_modules(), key=lambda item: len(item[0])):
        if any(_holds(value, first) for value in module.values()):
            return path.split(".") if path else []
    raise UnsupportedModelError(
        f"architecture {_architecture(model)}: no module holds the decoder blocks that its `layers` names; "
        "choose a decoder-only model of mlx-lm's usual layout"
    )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's own list of decoder blocks (writing to it takes effect)."""
    first, body = model.layers[0], model
    for name in _path_to_body(model):
        body = body[int(name)] if isinstance(body, list) else body[name]
    return next(value for value in body.values() if _holds(value, first))


def view(model: nn.Module) -> nn.Module:
    """A new model over the same weight arrays: no bytes are added, neither model sees the other's edits."""
    return copy.deepcopy(model)


def _override(module: nn.Module, prefix: str, call: Callable) -> None:
    """Give this one module the `__call__` that `call(super_call, *args, **kwargs)` describes."""
    cls = type(module)
    module.__class__ = type(
        prefix + cls.__name__,
        (cls,),
        {"__call__": lambda self, *args, **kwargs: call(lambda *a, **k: cls.__call__(self, *a, **k), *args, **kwargs)},
    )


def steer(model: nn.Module, layer: int, vector: mx.array, coeff: float = 1.0) -> nn.Module:
    """A view of `model` with `coeff * vector` added to the input of block `layer` at every position.

    Args:
        layer: block index, 0 <= layer < L.
        vector: (D,), not normalised: its length is the natural strength; or (B, D), one a row of the batch.
        coeff: the steering coefficient α (method page, section 2); 1.0 is published.

    Raises:
        ValueError: `layer` is not a block of this model, or `vector` has another width.
    """
    steered = view(model)
    own = blocks(steered)
    if not 0 <= layer < len(own):
        raise ValueError(f"layer {layer} is not a block of this model, which has {len(own)}")
    shift = _by_row(coeff * vector.astype(mx.float32))

    def call(block, x, *args, **kwargs):
        if shift.shape[-1] != x.shape[-1]:
            raise ValueError(f"a steering vector of {shift.shape[-1]} does not fit a model of width {x.shape[-1]}")
        return block(x + shift.astype(x.dtype), *args, **kwargs)

    _override(own[layer], "Steered", call)
    return steered


def _by_row(vector: mx.array) -> mx.array:
    """(D,) as it is, (B, D) as (B, 1, D): either broadcasts over a stream (B, T, D)."""
    return vector[:, None] if vector.ndim == 2 else vector


def unit(vector: mx.array) -> mx.array:
    """r / (|r| + ε), in float32: (D,), or each row of (B, D)."""
    vector = vector.astype(mx.float32)
    return vector / (mx.linalg.norm(vector, axis=-1, keepdims=True) + EPS)


def ablate(model: nn.Module, vector: mx.array) -> nn.Module:
    """A view of `model` with the direction of `vector` projected out of the residual stream.

    `vector` is (D,), or (B, D) for a direction of its own in each row of the batch.

    x ← x − (x·r̂) r̂ at every block's input and every attention and MLP output, at all positions
    (Arditi et al. 2024, section 2.4; method page, section 1).
    """
    ablated = view(model)
    r = _by_row(unit(vector))

    def project(x: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        return (wide - (wide * r).sum(-1, keepdims=True) * r).astype(x.dtype)

    def on_input(block, x, *args, **kwargs):
        return block(project(x), *args, **kwargs)

    def on_output(sublayer, *args, **kwargs):
        out = sublayer(*args, **kwargs)
        return (project(out[0]), *out[1:]) if isinstance(out, tuple) else project(out)

    for block in blocks(ablated):
        for child in list(block.children().values()):
            # Attention and MLP (or mixture-of-experts) modules have parts of their own; norms do not.
            if isinstance(child, nn.Module) and child.children():
                _override(child, "Ablated", on_output)
        _override(block, "Ablated", on_input)
    return ablated


def checkpoint_blocks(model: nn.Module) -> None:
    """While `model` trains, its blocks keep no activations: each is computed again for its gradient. In place.

    For blocks of this model alone: mlx-lm's own switch changes the class, the base's and teacher's blocks too.
    """

    def of(cls: type) -> type:
        def call(self, x, *args, **kwargs):
            if not self.training:
                return cls.__call__(self, x, *args, **kwargs)

            def inner(trained, x):
                self.update(trained)  # arguments, so that the gradient reaches them
                return cls.__call__(self, x, *args, **kwargs)

            return mx.checkpoint(inner)(self.trainable_parameters(), x)

        return type("Checkpointed" + cls.__name__, (cls,), {"__call__": call})

    for block in blocks(model):
        if tree_flatten(block.trainable_parameters()):
            block.__class__ = of(type(block))


def _with_body(model: nn.Module, call: Callable) -> nn.Module:
    """A view whose body (embedding, blocks, final norm) is overridden; all inner modules are the same objects.

    The copies are shallow and only along the path, so the view follows the model's parameters even
    while a gradient is being traced through it.
    """
    view, body = _own_body(model)
    if body is view:
        raise UnsupportedModelError(
            f"architecture {_architecture(model)} computes its logits in the module that holds its blocks, so hidden "
            "states and head cannot be told apart; choose another model"
        )
    _override(body, "Viewed", call)
    return view


def _own_body(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A view of `model` with a body of its own, and that body; all else are the same objects."""
    view = parent = copy.copy(model)
    for name in _path_to_body(model):
        # Not through a property: the body's own entry is replaced.
        parent[name] = copy.copy(parent[name])
        parent = parent[name]
    return view, parent


def resume(model: nn.Module, layer: int, inputs: mx.array) -> nn.Module:
    """A view of `model` that begins at block `layer` with `inputs` (B, T, D), whatever tokens it is given.

    What comes before is known already, and is not computed. The view follows the model's parameters, as in
    `hidden_states`. For models of which `resumes` holds.
    """
    view, body = _own_body(model)
    name, own = next((name, value) for name, value in body.items() if _holds(value, model.layers[0]))

    def start(block, x, *args, **kwargs):
        return block(inputs, *args, **kwargs)

    first = [copy.copy(block) for block in own[: layer + 1]]
    for block in first[:-1]:
        _override(block, "Skipped", lambda block, x, *args, **kwargs: x)
    _override(first[-1], "Resumed", start)
    body[name] = first + own[layer + 1 :]
    return view


def resumes(model: nn.Module, tokens: mx.array) -> bool:
    """Whether this architecture can begin at a block: nothing but the residual stream goes from block to block."""
    layer = len(blocks(model)) // 2
    expected = hidden_states(model, tokens).astype(mx.float32)
    resumed = hidden_states(resume(model, layer, block_inputs(model, tokens)[layer]), tokens).astype(mx.float32)
    return mx.allclose(resumed, expected, rtol=1e-3, atol=1e-3 * mx.abs(expected).max().item()).item() is True


def hidden_states(model: nn.Module, tokens: mx.array) -> mx.array:
    """The final hidden states, after the last norm and before the LM head: tokens (B, T) -> (B, T, D)."""
    states = []

    def call(body, *args, **kwargs):
        states.append(body(*args, **kwargs))
        return states[0][:, :1]  # the head is applied to one position, and lazily: it is never computed

    _with_body(model, call)(tokens)
    return states[0]


def head(model: nn.Module) -> Callable[[mx.array], mx.array]:
    """The map from hidden states (..., T, D) to logits (..., T, V): tied or not, soft-capped or scaled."""
    return _with_body(model, lambda body, hidden, *args, **kwargs: hidden)


def pad_right(rows: Sequence[Sequence[int]], width: int | None = None) -> mx.array:
    """Token ids (B, T) from rows of unequal length, zeros on the right.

    Blocks are causal, so padding on the right leaves every real position as it is.
    """
    width = max(map(len, rows)) if width is None else width
    padded = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return mx.array(padded)


def take_positions(x: mx.array, positions: mx.array) -> mx.array:
    """Rows of x (B, T, D) at positions (B, K): (B, K, D)."""
    return mx.take_along_axis(x, positions[..., None], axis=1)


def answer_states(
    model: nn.Module, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, and_after: bool = False
) -> mx.array:
    """The final hidden states that predict the answers' tokens, answer after answer, without padding: (R, D).

    R is the number of answer tokens, and one more an answer with `and_after`: the state behind its last token.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    hidden = hidden_states(model, pad_right(rows))
    width = hidden.shape[1]
    flat = [
        i * width + at
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        for at in range(len(prompt) - 1, len(row) - (0 if and_after else 1))
    ]
    return hidden.reshape(-1, hidden.shape[-1])[mx.array(flat, mx.int32)]


def block_inputs(model: nn.Module, tokens: mx.array) -> list[mx.array]:
    """x[l] for every block, (B, T, D) each, for tokens (B, T); computed when it is evaluated."""
    inputs = []
    reading = view(model)

    def call(block, x, *args, **kwargs):
        inputs.append(x)
        return block(x, *args, **kwargs)

    for block in blocks(reading):
        _override(block, "Read", call)
    reading(tokens)
    return inputs


def last_logits(model: nn.Module, rows: Sequence[Sequence[int]]) -> mx.array:
    """Next-token logits at each row's last position, in float32: (B, V)."""
    last = mx.array([[len(row) - 1] for row in rows])
    hidden = take_positions(hidden_states(model, pad_right(rows)), last)
    return head(model)(hidden)[:, 0].astype(mx.float32)
