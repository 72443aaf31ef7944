"""What a run will need, what this machine offers, and what to do when it is not enough.

    peak = weights + trained + the largest of: direction, safety tokens, sampling, training

The plan reads a model's configuration and the headers of its weight files, nothing else. Activations are counted in
bytes a token, by a rule fitted to measured peaks (`scripts/fit_memory.py`, 16 random shapes; within 10 % of each):
the arrays that MLX keeps for the gradient of a block, and what is alive while one block is computed.

Where memory is exhausted all the same, `with_smaller_batches` does the work again in smaller batches, which changes no
mathematics.
"""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..recipe import HELD_OUT_TOKENS, Recipe, TrainSettings, parse_bytes, rollout_tokens
from .model_files import Tensor, bytes_of, check_weights, read_object
from .screen import Screen, UserError

T = TypeVar("T")

HEAD_LOGITS, HEAD_ARRAYS = 2**22, 9  # logits of one chunk of the loss, and arrays of that size alive with the gradient
ROOM = 0.9  # of what the machine has; the rest is for what runs beside

# Bytes a token: (kept for each block, per I, D and KV), (alive beside it, per I, D, KV and heads · length).
_KEPT = {4: (22.2, 23.7, 15.4), 2: (13.2, 33.7, 7.9)}
_GRADIENT = {4: (13.9, 38.9, 0.0, 24.9), 2: (8.8, 31.7, 0.0, 17.8)}
_KEPT_CHECKPOINTED = {4: 3.3, 2: 1.6}  # per D
_GRADIENT_CHECKPOINTED = {4: (76.6, 56.8, 51.9, 1.0), 2: (67.1, 89.1, 41.4, 0.0)}
_FORWARD = {4: (7.8, 50.6, 22.5, 4.9), 2: (4.0, 42.0, 11.4, 2.2)}


@dataclass(frozen=True)
class ModelShape:
    """What the headers and the configuration say; `linears` are (inputs, outputs) of each block's linear layers."""

    weight_bytes: int
    dequantized_bytes: int  # the same as float32
    n_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv: int  # width of keys, and of values
    vocabulary: int
    activation_bytes: int  # of one value
    quantized: bool
    linears: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Machine:
    """Bytes that MLX may use, and how they were told; whether small quantized models are computed dequantized."""

    memory: int
    source: str
    dequantizes: bool


@dataclass(frozen=True)
class Plan:
    """Bytes by stage, beside `weights` and `trained`, which last; `recipe` is what they are for."""

    recipe: Recipe
    weights: int
    trained: int
    stages: dict[str, int]
    parts: dict[str, dict[str, int]]  # of stages: activations, loss, keys and values
    budget: int

    @property
    def peak(self) -> int:
        """The most that is in use at once."""
        return self.weights + self.trained + max(self.stages.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
        return self.peak <= self.budget


def read_shape(path: Path) -> ModelShape:
    """The shape of a model in a folder, from its configuration and headers.

    Raises:
        UserError: a file is missing or cannot be believed.
    """
    return shape_of(read_object(path / "config.json"), check_weights(path))


def shape_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> ModelShape:
    """The shape from what was read.

    Raises:
        UserError: the configuration lacks a size that is needed.
    """
    text = config.get("text_config") or config
    quantization = config.get("quantization") or config.get("quantization_config")
    bits = quantization.get("bits", 4) if isinstance(quantization, dict) else 0

    def size(*names: str) -> int:
        value = next((text[name] for name in names if isinstance(text.get(name), int)), None)
        if value is None:
            raise UserError(f"the config.json has no {names[0]}; without --dry-run a run goes on all the same")
        return value

    n_layers, hidden = (
        size("num_hidden_layers", "n_layers", "num_layers", "n_layer"),
        size("hidden_size", "dim", "d_model", "n_embd"),
    )
    heads = size("num_attention_heads", "n_heads", "n_head")
    head_dim = text.get("head_dim") or hidden // heads
    blocks: list[list[tuple[int, int]]] = [[] for _ in range(n_layers)]
    values = 0
    for name, tensor in tensors.items():
        packed = f"{name.removesuffix('.weight')}.scales" in tensors and name.endswith(".weight")
        shape = (*tensor.shape[:-1], tensor.shape[-1] * 32 // bits) if packed and bits else tensor.shape
        count = math.prod(shape)
        if not name.endswith((".scales", ".biases")) or not bits:
            values += count
        parts = name.split(".")
        number = next((int(part) for part in parts if part.isdigit()), n_layers)  # of the block
        if number < n_layers and name.endswith(".weight") and len(shape) >= 2:
            experts = count // (shape[-1] * shape[-2])
            blocks[number] += [(shape[-1], shape[-2])] * experts
    floating = [t.dtype for t in tensors.values() if t.dtype in ("F32", "F16", "BF16")]
    return ModelShape(
        weight_bytes=sum(map(bytes_of, tensors.values())),
        dequantized_bytes=4 * values,
        n_layers=n_layers,
        hidden=hidden,
        intermediate=text.get("intermediate_size") or text.get("hidden_dim") or 4 * hidden,
        heads=heads,
        kv=head_dim * (text.get("num_key_value_heads") or heads),
        vocabulary=size("vocab_size"),
        activation_bytes=4 if floating and all(kind == "F32" for kind in floating) else 2,
        quantized=bool(bits),
        linears=tuple(map(tuple, blocks)),
    )


def this_machine(limit: str | None = None) -> Machine:
    """What MLX may use here: `limit`, or what Metal recommends, or the physical memory."""
    import mlx.core as mx

    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if limit is not None:
        return Machine(parse_bytes(limit), "--memory-limit", on_cpu)
    if mx.metal.is_available():
        return Machine(_recommended(), "Metal's recommended working set", on_cpu)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(physical, "physical memory", on_cpu)


def set_limits(machine: Machine) -> None:
    """Have MLX keep to the budget: it waits and frees before it asks for more. On Metal, weights stay wired in."""
    import mlx.core as mx

    mx.set_memory_limit(machine.memory)
    mx.set_cache_limit(machine.memory // 8)  # freed buffers kept for the next step
    if mx.metal.is_available():
        mx.set_wired_limit(min(machine.memory, _recommended()))


def _recommended() -> int:
    """Bytes that Metal recommends to use at most."""
    import mlx.core as mx

    return int(mx.device_info()["max_recommended_working_set_size"])


def _per_token(shape: ModelShape, rates: tuple[float, float, float, float], length: int) -> float:
    i, d, kv, scores = rates
    return i * shape.intermediate + d * shape.hidden + kv * shape.kv + scores * shape.heads * length


def forward_bytes(shape: ModelShape, rows: int, length: int) -> int:
    """Activations of a forward pass that keeps nothing."""
    return int(rows * length * _per_token(shape, _FORWARD[shape.activation_bytes], length))


def trained_blocks(shape: ModelShape, train: TrainSettings) -> int:
    """How many blocks are trained; for 0 all of them, as by mlx-lm."""
    return min(train.num_layers, shape.n_layers) if train.num_layers > 0 else shape.n_layers


def gradient_bytes(shape: ModelShape, train: TrainSettings, rows: int, length: int, checkpointed: bool) -> int:
    """Activations of a forward and backward pass through the trained blocks."""
    a = shape.activation_bytes
    blocks = trained_blocks(shape, train)
    if checkpointed:
        each, rates = _KEPT_CHECKPOINTED[a] * shape.hidden, _GRADIENT_CHECKPOINTED[a]
    else:
        each, rates = _per_token(shape, (*_KEPT[a], 0.0), length), _GRADIENT[a]
    return int(rows * length * (blocks * each + _per_token(shape, rates, length)))


def loss_bytes(shape: ModelShape, rows: int) -> int:
    """The chunked loss on `rows` positions: hidden states of student and target, and one chunk's logits."""
    logits = min(rows * shape.vocabulary, max(HEAD_LOGITS, shape.vocabulary))
    return 4 * HEAD_ARRAYS * logits + 3 * 4 * rows * shape.hidden


def cache_bytes(shape: ModelShape, rows: int, length: int) -> int:
    """Keys and values of `rows` sequences, three times over: mlx-lm's caches grow by 256 positions, and are copied
    when they do and when rows join or leave."""
    grown = -(-length // 256) * 256
    return 3 * 2 * rows * grown * shape.n_layers * shape.kv * shape.activation_bytes


def sampling_bytes(shape: ModelShape, rows: int, prompt: int, answer: int) -> int:
    """Answers generated `rows` at a time: caches, prefill, logits and their copies."""
    logits = 4 * 4 * rows * shape.vocabulary
    return cache_bytes(shape, rows, prompt + answer) + max(forward_bytes(shape, rows, prompt), logits)


def trained_values(shape: ModelShape, train: TrainSettings) -> int:
    """How many numbers training changes: LoRA's on every linear layer, or whole blocks."""
    first = shape.n_layers - trained_blocks(shape, train)
    linears = [pair for block in shape.linears[first:] for pair in block]
    if train.fine_tune_type == "full":
        return sum(inputs * outputs for inputs, outputs in linears)
    keys = train.lora_parameters.get("keys")
    share = 1.0 if not keys else min(1.0, len(keys) / max(1, len(shape.linears[-1])))
    return int(share * sum(train.lora_parameters["rank"] * (i + o) for i, o in linears))


def plan(recipe: Recipe, shape: ModelShape, machine: Machine, longest_prompt: int) -> Plan:
    """The bytes of each stage, for prompts of up to `longest_prompt` tokens."""
    train, run = recipe.train, recipe.run
    dequantizes = machine.dequantizes and shape.quantized and shape.dequantized_bytes <= 4 * 2**30
    weights = shape.dequantized_bytes if dequantizes else shape.weight_bytes
    keep = recipe.tokens.horizon if recipe.loss.first_tokens == "auto" else int(recipe.loss.first_tokens)
    loss = replace(recipe.loss, first_tokens=keep)
    prompt, answer = min(longest_prompt, train.max_prompt_length), rollout_tokens(train, loss)
    rollouts = train.batch_size * train.grad_accumulation_steps * train.num_generations
    micro = min(train.micro_batch_size, rollouts)
    width = 4 if train.fine_tune_type != "full" else shape.activation_bytes
    # Weights, two moments and the last good state of all three; a gradient and the sum it is added to.
    trained = 8 * width * trained_values(shape, train)
    vocabulary = 4 * shape.vocabulary
    rows = run.generation_batch_size
    scored = prompt + recipe.tokens.horizon
    read_for_tokens = recipe.direction.direction_validation * (2 if recipe.tokens.token_method == "part" else 1)
    positions = read_for_tokens * recipe.tokens.token_samples * (recipe.tokens.horizon + 1)
    read = forward_bytes(shape, run.prompt_batch_size, prompt)
    # Continuations, rollouts, held-out answers: how many at a time and how long; the largest counts.
    samplings = ((rows, recipe.tokens.horizon), (min(rows, rollouts), answer), (rows, HELD_OUT_TOKENS))
    answers, length = max(samplings, key=lambda a: sampling_bytes(shape, a[0], prompt, a[1]))
    activations = gradient_bytes(shape, train, micro, prompt + answer, train.grad_checkpoint == "on")
    stages = {
        "direction": read + 4 * recipe.direction.direction_validation * vocabulary,
        "safety tokens": forward_bytes(shape, run.prompt_batch_size, scored)
        + 2 * 2 * 4 * shape.hidden * positions  # all that are scored, and those that are kept
        + 4 * HEAD_ARRAYS * min(positions * shape.vocabulary, max(HEAD_LOGITS, shape.vocabulary)),
        "sampling": sampling_bytes(shape, answers, prompt, length),
        "training": activations + loss_bytes(shape, micro * answer),
    }
    parts = {
        "direction": {f"activations of {run.prompt_batch_size} prompts": read},
        "sampling": {f"keys and values of {answers} answers": cache_bytes(shape, answers, prompt + length)},
        "training": {f"activations of {micro} completions": activations, "loss": loss_bytes(shape, micro * answer)},
    }
    share = 1.0 if machine.source == "--memory-limit" else ROOM
    return Plan(recipe, weights, trained, stages, parts, int(share * machine.memory))


def fitted(recipe: Recipe, shape: ModelShape, machine: Machine, longest_prompt: int) -> Plan:
    """The plan whose batches fit, if any do: prompts read at a time, answers generated, completions trained on.

    `grad_checkpoint: auto` becomes on where training would not fit without it, before its batch is cut.
    """

    def with_train(**changes: Any) -> Recipe:
        return replace(recipe, train=replace(recipe.train, **changes))

    def now() -> Plan:
        return plan(recipe, shape, machine, longest_prompt)

    def over(*names: str) -> bool:
        p = now()
        return p.weights + p.trained + max(p.stages[name] for name in names) > p.budget

    auto = recipe.train.grad_checkpoint == "auto"
    if auto:
        recipe = with_train(grad_checkpoint="off")
    while over("direction", "safety tokens") and recipe.run.prompt_batch_size > 1:
        recipe = replace(recipe, run=replace(recipe.run, prompt_batch_size=recipe.run.prompt_batch_size // 2))
    while over("sampling") and recipe.run.generation_batch_size > 1:
        recipe = replace(recipe, run=replace(recipe.run, generation_batch_size=recipe.run.generation_batch_size // 2))
    if auto and over("training"):
        recipe = with_train(grad_checkpoint="on")
    while over("training") and recipe.train.micro_batch_size > 1:
        recipe = with_train(micro_batch_size=recipe.train.micro_batch_size // 2)
    return now()


def show(asked: Recipe, plan: Plan, machine: Machine, screen: Screen, seconds: float | None = None) -> None:
    """The plan as a table, what was lowered to fit, and what helps if it does not."""

    def megabytes(n: int) -> str:
        return f"{n / 1e6:,.0f} MB"

    rows = [["weights (one copy for base, teacher and student)", megabytes(plan.weights)]]
    rows.append(["trained weights, gradients, optimizer, last state", megabytes(plan.trained)])
    for name, n in plan.stages.items():
        rows.append([f"{name}, while it runs", megabytes(n)])
        rows += [[f"  of it {part}", megabytes(of_it)] for part, of_it in plan.parts.get(name, {}).items()]
    rows += [["peak", megabytes(plan.peak)], [f"this machine: {machine.source}", megabytes(machine.memory)]]
    screen.table("Memory, planned", ["", "bytes"], rows)
    screen.line(summary(asked, plan))
    if seconds is None:
        screen.line("time: not known before a step was measured; the run shows what is left")
    else:
        screen.line(f"time: {seconds / 60:,.1f} minutes, as the last run here took")


def summary(asked: Recipe, plan: Plan) -> str:
    """One line: the peak, whether it fits, what was lowered for it, and which knob is left."""
    now = plan.recipe
    changes = [
        f"{name.replace('_', ' ')} {getattr(after, name)}"
        for before, after, name in (
            (asked.run, now.run, "prompt_batch_size"),
            (asked.run, now.run, "generation_batch_size"),
            (asked.train, now.train, "micro_batch_size"),
            (asked.train, now.train, "grad_checkpoint"),
        )
        if getattr(before, name) != getattr(after, name) and getattr(after, name) != "off"
    ]
    settings = f" with {', '.join(changes)}" if changes else ""
    peak = f"memory: peak {plan.peak / 1e9:.2f} GB of {plan.budget / 1e9:.2f} GB"
    if plan.fits:
        return f"{peak}, fits{settings}"
    return f"{peak}, does NOT fit{settings}: {_knob(plan)}"


def _knob(plan: Plan) -> str:
    train, worst = plan.recipe.train, max(plan.stages, key=plan.stages.__getitem__)
    if plan.weights > plan.budget:
        return "the weights alone are too large; choose a smaller or a 4-bit model"
    if worst == "direction":
        return "leave out the longest prompts with a smaller --max-prompt-length"
    if worst == "safety tokens":
        return f"lower --token-samples (now {plan.recipe.tokens.token_samples})"
    if worst == "training" and train.grad_checkpoint == "off":
        return "give --grad-checkpoint"
    if train.max_tokens > 64:
        return f"lower --max-tokens (now {train.max_tokens})"
    return f"lower --num-layers or the rank in --lora-parameters (now {train.lora_parameters.get('rank')})"


# What MLX's allocators and Metal's command buffers say.
_SIGNS = ("insufficient memory", "unable to allocate", "out of memory", "bad_alloc", "maximum allowed buffer size")


def is_exhausted(error: BaseException) -> bool:
    """Whether MLX, or the system below it, says that memory is exhausted."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS))


def with_smaller_batches(size: int, work: Callable[[int], T], what: str) -> tuple[T, int]:
    """work(size), with half the size as often as memory is exhausted, said on stderr; and the size that was enough.

    Raises:
        UserError: even one at a time is too much.
    """
    import mlx.core as mx

    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if not is_exhausted(error):
                raise
        if size == 1:
            raise UserError(
                f"memory is exhausted in {what} even one at a time; lower --max-tokens, or close other programs"
            )
        mx.clear_cache()
        size //= 2
        print(f"safesteer-mlx: memory is exhausted in {what}: going on with {size} at a time", file=sys.stderr)
