"""The residual stream: read it, steer it, ablate it. The only file that touches decoder blocks.

`x[l]`, the *input* of block `l`, is the residual stream before that block (method page, notation).
Interventions change the class of a copied block in place, so that parameter names stay as they are
and adapters keep loading; a wrapper module would rename them. Every view made here shares the
weights of the model it was made from and leaves that model untouched.

Which of its arguments a block takes the stream in, and which of its results it hands on, is seen in a
forward pass: what one block returns is what the next one is given (`Plumbing`). `check_stream` compares
what is read and steered so with a second way, and refuses an architecture in which they differ.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..system.screen import UserError

T = TypeVar("T")
Trunk = tuple[int, mx.array] | None  # a block and its input (B, T, D), the same for student and target

EPS = 1e-8  # keeps the unit vector of a zero direction (block 0) zero instead of NaN


class UnsupportedModelError(UserError):
    """The architecture keeps its blocks where this file cannot find them."""


def architecture(model: nn.Module) -> str:
    """The name of mlx-lm's file; the classes in it are all called Model."""
    return type(model).__module__.rpartition(".")[2]


def _find_blocks(model: nn.Module) -> tuple[str, nn.Module, str]:
    """The path to the module whose own list holds the decoder blocks, that module, and the list's name in it.

    `model.layers` is often a property that returns a slice, so the list is found by the identity of
    its first block, never assigned through the property. It lies near the top, and is asked for in every pass: level by
    level few modules are looked at.
    """
    first = model.layers[0]
    level: list[tuple[str, Any]] = [("", model)]
    while level:
        for path, module in level:
            for name, value in module.items():
                if isinstance(value, list) and any(item is first for item in value):
                    return path, module, name
        level = [
            (f"{path}.{name}" if path else name, child)
            for path, module in level
            for name, child in tree_flatten(module.children(), is_leaf=nn.Module.is_module)
        ]
    raise UnsupportedModelError(
        f"architecture {architecture(model)}: no module holds the decoder blocks that its `layers` names; "
        "choose a decoder-only model of mlx-lm's usual layout"
    )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's own list of decoder blocks (writing to it takes effect)."""
    _, owner, name = _find_blocks(model)
    return owner[name]


@dataclass(frozen=True)
class Plumbing:
    """How the stream goes through an architecture's blocks: which argument it is, by place or name, and which element
    of what a block returns; None for all of it."""

    argument: int | str = 0
    result: int | None = None

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> mx.array:
        """The stream among a block's arguments."""
        return kwargs[self.argument] if isinstance(self.argument, str) else args[self.argument]

    def run(self, block: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], x: mx.array) -> Any:
        """What a block returns when it is given another stream."""
        if isinstance(self.argument, str):
            return block(*args, **{**kwargs, self.argument: x})
        return block(*(x if i == self.argument else arg for i, arg in enumerate(args)), **kwargs)

    def returned(self, out: Any) -> mx.array:
        """The stream in what a block returns."""
        return out if self.result is None else out[self.result]

    def change(self, out: Any, how: Callable[[mx.array], mx.array]) -> Any:
        """What a block returns, its stream changed."""
        if self.result is None:
            return how(out)
        return type(out)(how(part) if i == self.result else part for i, part in enumerate(out))


def plumbing(model: nn.Module) -> Plumbing:
    """How the stream goes through this model's blocks; seen once, and kept on the list's owner."""
    _, owner, _ = _find_blocks(model)
    if (known := vars(owner).get("_plumbing")) is None:
        known = _seen_plumbing(model)
        object.__setattr__(owner, "_plumbing", known)
    return known


def _seen_plumbing(model: nn.Module) -> Plumbing:
    """By identity: the array that one block returns is an argument of the next."""
    calls = _calls(model, mx.zeros((1, 2), mx.int32))
    ways: Counter[Plumbing] = Counter()
    for (*_, out), (_, args, kwargs, _) in pairwise(calls):
        parts = [(None, out)] if isinstance(out, mx.array) else list(enumerate(out))
        given = [*enumerate(args), *kwargs.items()]
        ways.update({Plumbing(i, j) for i, arg in given for j, part in parts if arg is part})
    if ways:
        return ways.most_common(1)[0][0]
    # Something is done to the stream between blocks, or there is one block: `check_stream` decides.
    return Plumbing(0, None if not calls or isinstance(calls[0][-1], mx.array) else 0)


def _calls(model: nn.Module, tokens: mx.array) -> list[tuple[int, Sequence[Any], Mapping[str, Any], Any]]:
    """Of every block in a forward pass of tokens (B, T): which, its arguments, those by name, what it returned."""
    calls = []
    reading = view(model)

    def call(i, block, *args, **kwargs):
        calls.append((i, args, kwargs, block(*args, **kwargs)))
        return calls[-1][-1]

    for i, block in enumerate(blocks(reading)):
        _override(block, "Read", partial(call, i))
    reading(tokens)
    return calls


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


def steer(model: nn.Module, layer: int, vector: mx.array, coeff: float = 1.0, prompts_only: bool = False) -> nn.Module:
    """A view of `model` with `coeff * vector` added to the input of block `layer` at every position; with
    `prompts_only` not where `of_prompts` says that there is no prompt.

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
    shift, stream = _by_row(coeff * vector.astype(mx.float32)), plumbing(model)
    where: list[mx.array] = []  # of all views of this one

    def call(block, *args, **kwargs):
        x = stream.given(args, kwargs)
        if shift.shape[-1] != x.shape[-1]:
            raise ValueError(f"a steering vector of {shift.shape[-1]} does not fit a model of width {x.shape[-1]}")
        there = shift * where[-1][..., None] if where else shift
        return stream.run(block, args, kwargs, x + there.astype(x.dtype))

    _override(own[layer], "Steered", call)
    if prompts_only:
        object.__setattr__(steered, "_steered_where", where)
    return steered


@contextmanager
def of_prompts(model: nn.Module, are_prompts: Callable[[], mx.array]) -> Iterator[None]:
    """Meanwhile a model that is steered on prompts only, or a view of it, is not steered at tokens that are not of
    prompts, (B, T) bool; of any other model nobody asks which those are."""
    where = vars(model).get("_steered_where")
    if where is None:
        yield
        return
    where.append(are_prompts())
    try:
        yield
    finally:
        where.pop()


def _by_row(vector: mx.array) -> mx.array:
    """(D,) as it is, (B, D) as (B, 1, D): either broadcasts over a stream (B, T, D)."""
    return vector[:, None] if vector.ndim == 2 else vector


def unit(vector: mx.array) -> mx.array:
    """r / (|r| + ε), in float32: (D,), or each row of (B, D)."""
    vector = vector.astype(mx.float32)
    return vector / (mx.linalg.norm(vector, axis=-1, keepdims=True) + EPS)


def ablate(model: nn.Module, vector: mx.array, whole_stream: bool = False) -> nn.Module:
    """A view of `model` with the direction of `vector` projected out of the residual stream.

    `vector` is (D,), or (B, D) for a direction of its own in each row of the batch.

    x ← x − (x·r̂) r̂ at every block's input and every attention and MLP output, at all positions
    (Arditi et al. 2024, section 2.4; method page, section 1).

    Ours, with `whole_stream`: where a norm stands between a part's output and the stream (sandwich norms, as Gemma's),
    or the parts are not the block's own, that leaves some of the direction in the stream (`left_by_ablation`). What
    such a norm makes of a part's output, and what a block returns, are projected too.
    """
    ablated, stream = view(model), plumbing(model)
    r = _by_row(unit(vector))
    projected: list[mx.array] = []  # of the block that is computed, for the norms after its parts

    def project(x: mx.array) -> mx.array:
        if x.shape[-1] != r.shape[-1] or not mx.issubdtype(x.dtype, mx.floating):
            return x  # a router's choice, for one
        wide = x.astype(mx.float32)
        return (wide - (wide * r).sum(-1, keepdims=True) * r).astype(x.dtype)

    def on_input(block, *args, **kwargs):
        projected.clear()
        out = stream.run(block, args, kwargs, project(stream.given(args, kwargs)))
        return stream.change(out, project) if whole_stream else out

    def on_output(sublayer, *args, **kwargs):
        out = sublayer(*args, **kwargs)
        first = project(out[0] if isinstance(out, tuple) else out)
        projected.append(first)
        return (first, *out[1:]) if isinstance(out, tuple) else first

    def on_norm(norm, x, *args, **kwargs):
        out = norm(x, *args, **kwargs)
        return project(out) if any(x is part for part in projected) else out

    for block in blocks(ablated):
        for child in list(block.children().values()):
            if not isinstance(child, nn.Module):
                continue
            # Attention and MLP (or mixture-of-experts) modules have parts of their own; norms do not.
            if child.children():
                _override(child, "Ablated", on_output)
            elif whole_stream:
                _override(child, "Ablated", on_norm)
        _override(block, "Ablated", on_input)
    return ablated


def left_by_ablation(model: nn.Module, vector: mx.array, tokens: mx.array) -> float:
    """What the published ablation leaves: the largest |x·r̂| / |x| in any block's output, r̂ the direction (D,)."""
    r = unit(vector)
    worst = 0.0
    for x in block_outputs(ablate(model, vector), tokens):
        x = x.astype(mx.float32)
        worst = max(worst, (mx.abs(x @ r) / (mx.linalg.norm(x, axis=-1) + EPS)).max().item())
    return worst


def checkpoint_blocks(model: nn.Module) -> None:
    """While `model` trains, its blocks keep no activations: each is computed again for its gradient. In place.

    For blocks of this model alone: mlx-lm's own switch changes the class, the base's and teacher's blocks too.
    """

    def of(cls: type) -> type:
        def call(self, *args, **kwargs):
            if not self.training:
                return cls.__call__(self, *args, **kwargs)

            def inner(trained, args, kwargs):
                self.update(trained)
                return cls.__call__(self, *args, **kwargs)

            # All is given, so that the gradient reaches every array: some blocks get others' keys and values too.
            return mx.checkpoint(inner)(self.trainable_parameters(), args, kwargs)

        return type("Checkpointed" + cls.__name__, (cls,), {"__call__": call})

    for block in blocks(model):
        if tree_flatten(block.trainable_parameters()):
            block.__class__ = of(type(block))


def checkpointed_gradient(model: nn.Module, tokens: mx.array) -> list[mx.array]:
    """A loss of the normed stream behind the last block, and its gradient by all trained weights, as
    `checkpoint_blocks` has it computed: each block again from its input. Not computed until it is evaluated.

    Written out, since what `mx.checkpoint` makes cannot be traced (method/passes.py).
    """
    calls, stream, own, gradients = _calls(model, tokens), plumbing(model), blocks(model), []

    def loss_of(x: mx.array) -> list[mx.array]:
        return [mx.fast.rms_norm(x, None, EPS).astype(mx.float32).square().sum()]

    loss, (above,) = mx.vjp(loss_of, [stream.returned(calls[-1][-1])], [mx.array(1.0)])
    for i, args, kwargs, _ in reversed(calls):
        names = [name for name, _ in tree_flatten(own[i].trainable_parameters())]
        if not names:
            break

        def run(*given: mx.array, block=own[i], names=names, args=args, kwargs=kwargs) -> list[mx.array]:
            *trained, x = given
            block.update(tree_unflatten(list(zip(names, trained, strict=True))))
            return [stream.returned(stream.run(block, args, kwargs, x))]

        # Another array for MLX, which would not compute again what is the same.
        again = mx.depends([stream.given(args, kwargs)], [tokens])
        trained = [weight for _, weight in tree_flatten(own[i].trainable_parameters())]
        *of_it, above = mx.vjp(run, [*trained, *again], [above])[1]
        gradients = [*of_it, *gradients]  # in the order of the blocks, by which MLX orders what it evaluates
    return [*loss, *gradients]


def _with_body(model: nn.Module, call: Callable) -> nn.Module:
    """A view whose body (embedding, blocks, final norm) is overridden; all inner modules are the same objects.

    The copies are shallow and only along the path, so the view follows the model's parameters even
    while a gradient is being traced through it.
    """
    view, body, _ = _own_body(model)
    if body is view:
        raise UnsupportedModelError(
            f"architecture {architecture(model)} computes its logits in the module that holds its blocks, so hidden "
            "states and head cannot be told apart; choose another model"
        )
    _override(body, "Viewed", call)
    return view


def check_stream(model: nn.Module, tokens: mx.array) -> None:
    """Hold what is read and steered here against a second way, at the first, a middle and the last block.

    What goes into a block is what the one before it returned; adding a vector to the one is adding it to the other; and
    blocks are as many as the model says.

    Raises:
        UnsupportedModelError: they differ, so that reading or steering this architecture would be wrong.
    """
    wrong = UnsupportedModelError(
        f"architecture {architecture(model)} hands its blocks something else than one residual stream, so it cannot "
        "be read or steered; choose another model"
    )
    stream, own = plumbing(model), blocks(model)
    if len(own) != len(model.layers):
        raise wrong
    try:
        inputs, outputs = block_inputs(model, tokens), block_outputs(model, tokens)
        if len(inputs) != len(own) or any(x.shape[:2] != tokens.shape or x.ndim != 3 for x in inputs):
            raise wrong
        vector = inputs[-1][0, -1].astype(mx.float32)
        plain = hidden_states(model, tokens)
        for layer in sorted({1, len(own) // 2, len(own) - 1} - {0}):
            after = view(model)

            def call(block, *args, **kwargs):
                out = block(*args, **kwargs)
                return stream.change(out, lambda x: x + vector.astype(x.dtype))

            _override(blocks(after)[layer - 1], "Shifted", call)
            pairs = [
                (inputs[layer], outputs[layer - 1]),
                (hidden_states(steer(model, layer, vector), tokens), hidden_states(after, tokens)),
            ]
            if not all(close(*pair) for pair in pairs) or close(pairs[1][0], plain, 1e-6):
                raise wrong
    except UnsupportedModelError:
        raise
    except (TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        raise wrong from error


def close(a: mx.array, b: mx.array, within: float = 2e-2) -> bool:
    """Whether two streams are alike, as far as half precision tells."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return a.shape == b.shape and bool(((a - b).abs().max() <= within * b.abs().max()).item())


def _own_body(model: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A view of `model`, its body (the module that computes hidden states) and the owner of its blocks' list, which is
    the body in most architectures; these are its own, all else are the same objects."""
    path: list[Any] = [copy.copy(model)]
    names, *_ = _find_blocks(model)
    for name in names.split(".") if names else ():
        # Not through a property: the module's own entry is replaced.
        path[-1][name] = copy.copy(path[-1][name])
        path.append(path[-1][name])
    return path[0], next((module for module in reversed(path) if callable(module)), path[0]), path[-1]


def resume(model: nn.Module, layer: int, inputs: mx.array) -> nn.Module:
    """A view of `model` that begins at block `layer` with `inputs` (B, T, D), whatever tokens it is given.

    What comes before is known already, and is not computed. The view follows the model's parameters, as in
    `hidden_states`. For models of which `resumes` holds.
    """
    view, _, owner = _own_body(model)
    *_, name = _find_blocks(model)
    own, stream = owner[name], plumbing(model)
    first = [copy.copy(block) for block in own[: layer + 1]]
    for block in first[:-1]:
        _override(block, "Skipped", lambda block, *args, **kwargs: stream.given(args, kwargs))
    _override(first[-1], "Resumed", lambda block, *args, **kwargs: stream.run(block, args, kwargs, inputs))
    owner[name] = first + own[layer + 1 :]
    return view


def resumes(model: nn.Module, tokens: mx.array) -> bool:
    """Whether this architecture can begin at a block: nothing but the residual stream goes from block to block."""
    if plumbing(model).result is not None:
        return False
    layer = len(blocks(model)) // 2
    expected = hidden_states(model, tokens).astype(mx.float32)
    resumed = hidden_states(resume(model, layer, block_inputs(model, tokens)[layer]), tokens).astype(mx.float32)
    return mx.allclose(resumed, expected, rtol=1e-3, atol=1e-3 * mx.abs(expected).max().item()).item() is True


def recording(model: nn.Module, layer: int, inputs: list[mx.array]) -> nn.Module:
    """A view of `model` that appends to `inputs` what goes into block `layer`, (B, T, D), in every pass."""
    view, _, owner = _own_body(model)
    *_, name = _find_blocks(model)
    own, stream = owner[name], plumbing(model)
    recorded = copy.copy(own[layer])

    def call(block, *args, **kwargs):
        inputs.append(stream.given(args, kwargs))
        return block(*args, **kwargs)

    _override(recorded, "Recorded", call)
    owner[name] = [*own[:layer], recorded, *own[layer + 1 :]]
    return view


def as_in_a_gradient(compute: Callable[..., T], *args: Any) -> T:
    """compute(*args), by the operations that a gradient is of.

    MLX's fused attention on a GPU has no gradient, so the student's is computed otherwise and rounds otherwise: of a
    target by the fused one it would learn how that rounds.
    """
    values: list[T] = []

    def traced(nothing: mx.array) -> mx.array:
        values.append(compute(*args))
        return nothing

    mx.grad(traced)(mx.array(0.0))
    return values[0]


def hidden_states(model: nn.Module, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
    """The final hidden states, after the last norm and before the LM head: tokens (B, T) -> (B, T, D); with `cache`, of
    tokens that follow those in it."""
    states = []

    def call(body, *args, **kwargs):
        states.append(body(*args, **kwargs))
        return states[0][:, :1]  # the head is applied to one position, and lazily: it is never computed

    _with_body(model, call)(tokens, **({} if cache is None else {"cache": cache}))
    return states[0]


def head(model: nn.Module) -> Callable[[mx.array], mx.array]:
    """The map from hidden states (..., T, D) to logits (..., T, V): tied or not, soft-capped or scaled.

    Of a quantized head they are float32: between 16 and 32 bfloat16 holds every eighth alone, which is more than most
    divergences here are. A plain one would be spelled out in float32 for it.
    """
    given: list[mx.array] = []
    view = _with_body(model, lambda *args, **kwargs: given.pop())
    own = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "lm_head"]
    heads = own or [module for module in model.modules() if isinstance(module, nn.QuantizedEmbedding)]
    quantized = bool(heads) and all(isinstance(one, (nn.QuantizedLinear, nn.QuantizedEmbedding)) for one in heads)

    def logits(hidden: mx.array) -> mx.array:
        given.append(hidden.astype(mx.float32) if quantized else hidden)
        return view(mx.zeros(hidden.shape[:2], mx.int32))  # tokens that nothing looks at

    return logits


def pad_right(rows: Sequence[Sequence[int]]) -> mx.array:
    """Token ids (B, T) from rows of unequal length, zeros on the right.

    Blocks are causal, so padding on the right leaves every real position as it is.
    """
    padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return mx.array(padded)


def by_length(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Indices of rows in batches of similar length, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def take_positions(x: mx.array, positions: mx.array) -> mx.array:
    """Rows of x (B, T, D) at positions (B, K): (B, K, D)."""
    return mx.take_along_axis(x, positions[..., None], axis=1)


def answer_states(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    and_after: bool = False,
    cache: list[Any] | None = None,
) -> mx.array:
    """The final hidden states that predict the answers' tokens, answer after answer, without padding: (R, D).

    R is the number of answer tokens, and one more an answer with `and_after`: the state behind its last token. Of
    prompts whose beginnings are in `cache`, the rest is given.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    tokens = pad_right(rows)
    width = tokens.shape[1]
    with of_prompts(model, lambda: mx.arange(width) < mx.array([[len(prompt)] for prompt in prompts])):
        hidden = hidden_states(model, tokens, cache)
    flat = [
        i * width + at
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        for at in range(len(prompt) - 1, len(row) - (0 if and_after else 1))
    ]
    return hidden.reshape(-1, hidden.shape[-1])[mx.array(flat, mx.int32)]


def block_inputs(model: nn.Module, tokens: mx.array) -> list[mx.array]:
    """x[l] for every block, (B, T, D) each, for tokens (B, T); computed when it is evaluated."""
    stream = plumbing(model)
    return [stream.given(args, kwargs) for _, args, kwargs, _ in _calls(model, tokens)]


def block_outputs(model: nn.Module, tokens: mx.array) -> list[mx.array]:
    """The stream behind every block, (B, T, D) each, for tokens (B, T); computed when it is evaluated."""
    stream = plumbing(model)
    return [stream.returned(out) for *_, out in _calls(model, tokens)]


def last_logits(model: nn.Module, rows: Sequence[Sequence[int]]) -> mx.array:
    """Next-token logits at each row's last position, in float32: (B, V)."""
    last = mx.array([[len(row) - 1] for row in rows])
    hidden = take_positions(hidden_states(model, pad_right(rows)), last)
    return head(model)(hidden)[:, 0].astype(mx.float32)
