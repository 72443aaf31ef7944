"""What a run will need, what this machine offers, and what to do when it is not enough.

    peak = weights + trained + the largest of: direction, safety tokens, sampling, training

The plan reads a model's configuration and the headers of its weight files, nothing else. Activations are counted in
bytes a token, by a rule fitted to measured peaks (`scripts/fit_memory.py`: random shapes and every family of mlx-lm,
with a margin): what is kept for the gradient of every block (what linear layers give, of experts those that a token
passes, attention's weights, the stream, what a recurrence keeps), and what is alive beside it while the largest part of
a block is computed: attention, feed-forward part or experts. A checkpointed block keeps what goes into it; of one at a
time all is made again.

Where memory is exhausted all the same, `with_smaller_batches` does the work again in smaller batches, which changes no
mathematics; where it is not, but the machine would run on its disk, it stops.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from ..recipe import HELD_OUT_TOKENS, Recipe, TrainSettings, parse_bytes, rollout_tokens
from . import machines
from .screen import Screen, UserError
from .shape import Block, ModelShape

T = TypeVar("T")

HEAD_LOGITS, HEAD_ARRAYS = 2**22, 9  # logits of one chunk of the loss, and arrays of that size alive with the gradient
PAGES = 0.95  # of the physical memory, beyond which a machine runs on its disk
DISPLAY = "it helps to let the display sleep, or to start with AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 set"
# Of a gradient's activations, where experts are asked one token after another; and again where they are checkpointed.
IN_TURN, KEPT_TWICE = 2.4, 1.7
CACHE_STEP = 32  # positions that keys and values grow by while answers are generated
READ_BACK = 16  # answers that base and student read at a time, for drift
ROOM = 0.9  # of what the machine has; the rest is for what runs beside

# Values a token by bytes of a value, of each feature below, in its order (scripts/fit_memory.py): kept for a gradient
# (9); alive in attention (5), in the feed-forward part (4), in experts (4); the inputs of checkpointed blocks (1).
RATES: dict[str, dict[int, tuple[float, ...]]] = {
    "gradient": {
        4: (
            *(1.87, 2.24, 2.33, 2.69, 0.43, 1.37, 1.93, 1.9, 2.32),
            *(5.64, 7.18, 1.45, 2.46, 4.04),
            *(6.15, 1.4, 16.13, 1.63),
            *(5.64, 6.51, 0.84, 3.03),
            2.24,
        ),
        2: (
            *(3.77, 3.2, 2.33, 2.69, 0.45, 1.93, 2.29, 3.75, 2.8),
            *(7.98, 7.91, 1.46, 2.46, 5.57),
            *(9.96, 1.45, 42.4, 1.64),
            *(5.64, 6.51, 0.84, 3.03),
            3.47,
        ),
    },
    "forward": {
        4: (*[0.0] * 9, *(4.39, 1.16, 12.08, 1.5, 0.91), *(1.96, 3.18, 5.5, 3.41), *(1.41, 3.71, 13.78, 2.65), 0.0),
        2: (*[0.0] * 9, *(5.25, 1.28, 24.47, 1.23, 2.61), *(3.48, 3.29, 5.85, 3.39), *(1.41, 3.71, 13.78, 2.65), 0.0),
    },
}


def features(shape: ModelShape, blocks: Sequence[Block], length: int, how: str) -> list[list[float]]:
    """What may be the most at once, for each part of each kind of block (C, 23): what is kept for the gradient, what is
    alive in attention, in the feed-forward part and in experts (of two of them nothing), inputs of checkpointed blocks.

    `how` is gradient (all blocks are kept), checkpointed (their inputs, and of one what it makes again) or forward.
    """

    def kept(block: Block) -> list[float]:
        """Inner outputs of the parts, experts' into the stream, stream, others' into it, attention's weights, what a
        recurrence keeps, steps of activations."""
        scores = 0 if block.state else shape.heads * length
        return [
            *(block.attention[0], block.dense[0], *block.experts[:2], shape.hidden),
            *(block.attention[1] + block.dense[1], scores, block.kept(length), block.dense[2] + block.experts[2]),
        ]

    whole = [sum(column) for column in zip(*map(kept, blocks), strict=True)]
    inputs = len(blocks) * shape.hidden if how == "checkpointed" else 0
    rows = []
    for block in dict.fromkeys(blocks):
        of_it = {"gradient": whole, "checkpointed": kept(block), "forward": [0] * len(whole)}[how]
        attention = [*block.attention, shape.hidden, 0 if block.state else shape.heads * length, block.kept(length)]
        others = [[inner, outer, shape.hidden, steps] for inner, outer, steps in (block.dense, block.experts)]
        for computed, part in enumerate(parts := [attention, *others]):
            if part[0] or not computed:
                alive = [value * (i == computed) for i, values in enumerate(parts) for value in values]
                rows.append([*of_it, *alive, inputs])
    return rows


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


def smallest_machine(limit: str | None = None) -> Machine:
    """`this_machine`, or of several the one with the least: all get the same batches."""
    every = machines.here().gather(asdict(this_machine(limit)))
    return Machine(**min(every, key=lambda machine: machine["memory"]))


def this_machine(limit: str | None = None) -> Machine:
    """What MLX may use here: `limit`, or what Metal recommends, a CUDA card's memory, or the physical memory."""
    import mlx.core as mx

    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if limit is not None:
        return Machine(parse_bytes(limit), "--memory-limit", on_cpu)
    if mx.metal.is_available():
        return Machine(_recommended(), "Metal's recommended working set", on_cpu)
    if not on_cpu:
        return Machine(int(mx.device_info()["total_memory"]), "the card's memory", on_cpu)
    return Machine(_physical(), "physical memory", on_cpu)


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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


def _activations(shape: ModelShape, blocks: Sequence[Block], rows: float, length: int, how: str) -> float:
    rates = RATES["forward" if how == "forward" else "gradient"][shape.activation_bytes]
    most = max(sum(r * f for r, f in zip(rates, of, strict=True)) for of in features(shape, blocks, length, how))
    return shape.activation_bytes * rows * length * most


def forward_bytes(shape: ModelShape, rows: int, length: int) -> int:
    """Activations of a forward pass that keeps nothing."""
    return int(_activations(shape, shape.blocks, rows, length, "forward"))


def trained_blocks(shape: ModelShape, train: TrainSettings) -> int:
    """How many blocks are trained; for 0 all of them, as by mlx-lm."""
    return min(train.num_layers, shape.n_layers) if train.num_layers > 0 else shape.n_layers


def gradient_bytes(shape: ModelShape, train: TrainSettings, rows: float, length: int, checkpointed: bool) -> int:
    """Activations of a forward and backward pass through the trained blocks."""
    blocks = shape.blocks[-trained_blocks(shape, train) :]
    if shape.forgets:
        return int(_activations(shape, blocks, rows, length, "checkpointed" if checkpointed else "gradient"))
    return int(IN_TURN * (KEPT_TWICE if checkpointed else 1) * _activations(shape, blocks, rows, length, "gradient"))


def loss_bytes(shape: ModelShape, rows: int) -> int:
    """The chunked loss on `rows` positions: hidden states of student and target, and one chunk's logits."""
    logits = min(rows * shape.vocabulary, max(HEAD_LOGITS, shape.vocabulary))
    return 4 * HEAD_ARRAYS * logits + 3 * 4 * rows * shape.hidden


def cache_bytes(shape: ModelShape, rows: int, length: int) -> int:
    """Keys and values of `rows` sequences, twice over: mlx-lm's caches are copied, block after block, when they grow
    and when rows join or leave."""
    grown = -(-length // CACHE_STEP) * CACHE_STEP
    return 2 * 2 * rows * grown * shape.n_layers * shape.kv * shape.activation_bytes


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


def _longest(recipe: Recipe, longest_prompt: int) -> tuple[int, int]:
    """Tokens of the longest prompt that is trained on, and of the longest completion."""
    keep = recipe.tokens.horizon if recipe.loss.first_tokens == "auto" else int(recipe.loss.first_tokens)
    answer = rollout_tokens(recipe.train, replace(recipe.loss, first_tokens=keep))
    return min(longest_prompt, recipe.train.max_prompt_length), answer  # of longer ones none is trained on


def _rollouts(train: TrainSettings) -> int:
    return train.batch_size * train.grad_accumulation_steps * train.num_generations


def _of_the_longest(train: TrainSettings, length: int) -> float:
    """How many completions of this length would be as many tokens as are in one pass at most."""
    rows = min(train.micro_batch_size, _rollouts(train))
    return rows if train.micro_batch_tokens is None else max(1.0, min(rows, train.micro_batch_tokens / length))


def plan(
    recipe: Recipe, shape: ModelShape, machine: Machine, longest_prompt: int, judged: int = HELD_OUT_TOKENS
) -> Plan:
    """The bytes of each stage, for prompts of up to `longest_prompt` tokens, and up to `judged` tokens of an answer
    that is judged."""
    train, run = recipe.train, recipe.run
    dequantizes = machine.dequantizes and shape.quantized and shape.dequantized_bytes <= 4 * 2**30
    weights = shape.dequantized_bytes if dequantizes else shape.weight_bytes
    prompt, answer = _longest(recipe, longest_prompt)
    rollouts, micro = _rollouts(train), _of_the_longest(train, prompt + answer)
    # As many tokens in shorter rows take no more: what one takes grows with its row. But more of them are answers'.
    learned = min(train.micro_batch_size, rollouts) * answer
    learned = min(learned, max(train.micro_batch_tokens or learned, answer))
    width = 4 if train.fine_tune_type != "full" else shape.activation_bytes
    # Weights, two moments and the last good state of all three; a gradient and the sum it is added to.
    trained = 8 * width * trained_values(shape, train)
    vocabulary = 4 * shape.vocabulary
    rows = run.generation_batch_size
    scored = longest_prompt + recipe.tokens.horizon
    read_for_tokens = recipe.direction.direction_validation * (2 if recipe.tokens.token_method == "part" else 1)
    positions = read_for_tokens * recipe.tokens.token_samples * (recipe.tokens.horizon + 1)
    read = forward_bytes(shape, run.prompt_batch_size, longest_prompt)
    # Continuations, rollouts, held-out answers: how many at a time, to what and how long; the largest counts.
    samplings = (
        *((rows, longest_prompt, recipe.tokens.horizon), (min(rows, rollouts), prompt, answer)),
        (rows, longest_prompt, judged),
    )
    answers, request, length = max(samplings, key=lambda a: sampling_bytes(shape, *a))
    activations = gradient_bytes(shape, train, micro, prompt + answer, train.grad_checkpoint == "on")
    stages = {
        "direction": read + 4 * recipe.direction.direction_validation * vocabulary,
        "safety tokens": forward_bytes(shape, run.prompt_batch_size, scored)
        + 2 * 2 * 4 * shape.hidden * positions  # all that are scored, and those that are kept
        + 4 * HEAD_ARRAYS * min(positions * shape.vocabulary, max(HEAD_LOGITS, shape.vocabulary)),
        "sampling": sampling_bytes(shape, answers, request, length),
        "training": activations + loss_bytes(shape, learned),
    }
    if judged > HELD_OUT_TOKENS:  # else far less than what tokens are found on
        states = 2 * shape.activation_bytes * shape.hidden * READ_BACK * judged
        stages["scoring"] = forward_bytes(shape, READ_BACK, longest_prompt + judged) + states
    together = f"{train.micro_batch_tokens:,} tokens" if train.micro_batch_tokens else f"{micro} completions"
    parts = {
        "direction": {f"activations of {run.prompt_batch_size} prompts": read},
        "sampling": {f"keys and values of {answers} answers": cache_bytes(shape, answers, request + length)},
        "training": {f"activations of {together}": activations, "loss": loss_bytes(shape, learned)},
    }
    share = 1.0 if machine.source == "--memory-limit" else ROOM
    return Plan(recipe, weights, trained, stages, parts, int(share * machine.memory))


def fitted(
    recipe: Recipe, shape: ModelShape, machine: Machine, longest_prompt: int, judged: int = HELD_OUT_TOKENS
) -> Plan:
    """The plan whose batches fit, if any do: prompts read at a time, answers generated, completions trained on.

    `grad_checkpoint: auto` becomes on where training would not fit without it, before its batch is cut.
    """

    def with_train(**changes: Any) -> Recipe:
        return replace(recipe, train=replace(recipe.train, **changes))

    def now() -> Plan:
        return plan(recipe, shape, machine, longest_prompt, judged)

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
    if auto and over("training") and shape.forgets:
        recipe = with_train(grad_checkpoint="on")
    longest = sum(_longest(recipe, longest_prompt))
    rows = int(_of_the_longest(recipe.train, longest))
    while over("training") and rows > 1:
        rows //= 2
        recipe = with_train(micro_batch_tokens=rows * longest)
    return now()


def show(asked: Recipe, plan: Plan, machine: Machine, screen: Screen) -> None:
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


def summary(asked: Recipe, plan: Plan) -> str:
    """One line: the peak, whether it fits, what was lowered for it, and which knob is left."""
    now = plan.recipe
    changes = [
        f"{name.replace('_', ' ')} {getattr(after, name)}"
        for before, after, name in (
            (asked.run, now.run, "prompt_batch_size"),
            (asked.run, now.run, "generation_batch_size"),
            (asked.train, now.train, "micro_batch_tokens"),
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
        return "take the longest prompts out of --data"
    if worst == "safety tokens":
        return f"lower --token-samples (now {plan.recipe.tokens.token_samples})"
    if worst == "training" and train.grad_checkpoint == "off":
        return "give --grad-checkpoint"
    if train.longest > 64:
        return f"lower --max-tokens (now {train.longest})"
    return f"lower --num-layers or the rank in --lora-parameters (now {train.lora_parameters.get('rank')})"


# What MLX's allocators and Metal's command buffers say, and what that means. MLX counts buffers too (mlx-lm #1185).
_SIGNS = ("insufficient memory", "unable to allocate", "out of memory", "bad_alloc", "maximum allowed buffer size")
_SIGNS += ("resource limit",)
# The watchdog of a Mac whose display waits for the GPU (mlx #3267).
_WATCHDOG = ("impacting interactivity", "impactinginteractivity", "gpu timeout")


def too_much(error: BaseException) -> str | None:
    """What MLX, or the system below it, says that smaller batches help against; None for any other error."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)):
        return "memory is exhausted"
    if isinstance(error, RuntimeError) and any(sign in text for sign in _WATCHDOG):
        return "macOS stopped the GPU, since the display waited too long for it,"
    return None


class PagingError(UserError):
    """More memory was used than the machine has to give; what was done before is kept."""


def _check_use(what: str, peak_before: int) -> None:
    """Stop before the system pages until it dies: MLX's own limit is advisory (mlx #3186)."""
    import mlx.core as mx

    physical = _physical()
    peak = mx.get_peak_memory()
    if peak > max(peak_before, PAGES * physical):
        raise PagingError(
            f"{what} used {peak / 1e9:.1f} GB, and this machine has {physical / 1e9:.1f} GB: stopped before it runs on "
            "the disk; close other programs, or lower --memory-limit, then the same command with --yes goes on"
        )


def with_smaller_batches(size: int, work: Callable[[int], T], what: str, together: bool = False) -> tuple[T, int]:
    """work(size), with half the size as often as it is too much, said on stderr; and the size that was enough.

    `together` says that other machines take part in the work, which cannot begin it again.

    Raises:
        UserError: even one at a time is too much, or any size of a work that is done together.
        PagingError: it went on, but with more memory than the machine has.
    """
    import mlx.core as mx

    while True:
        before = mx.get_peak_memory()
        try:
            result = work(size)
        except (RuntimeError, MemoryError) as error:
            fault = too_much(error)
            if fault is None:
                raise
        else:
            _check_use(what, before)
            return result, size
        watchdog = "" if "memory" in fault else DISPLAY
        if together:
            raise UserError(f"{fault} in {what} with {size} at a time; give --prompt-batch-size {max(1, size // 2)}")
        if size == 1:
            advice = watchdog or "lower --max-tokens, or close other programs"
            raise UserError(f"{fault} in {what} even one at a time; {advice}")
        mx.clear_cache()
        size //= 2
        more = f" ({watchdog})" if watchdog else ""
        print(f"safesteer-mlx: {fault} in {what}: going on with {size} at a time{more}", file=sys.stderr)
