"""What a run will need, and what is lowered where that is more than the machine has.

    peak = weights + trained + the largest of: direction, safety tokens, sampling, training

It is planned from a model without its weights: bytes of the files from their headers, activations counted on traced
passes (`Passes`), caches and logits by their sizes.
"""

from dataclasses import dataclass, replace
from typing import Any

from ..recipe import HELD_OUT_TOKENS, Recipe, TrainSettings, harmful_per_batch, number_of_steps, rollout_tokens
from ..system import machines
from ..system.memory import CACHE_STEP, READ_BACK, Machine
from ..system.screen import Screen
from ..system.shape import ModelShape
from .losses import CHUNK_LOGITS
from .passes import Passes
from .prompts import CHARACTERS_A_TOKEN, VALIDATION_PROMPTS, instructions_to_train_on, prompt_sets

HEAD_ARRAYS = 9  # of the size of one chunk's logits, alive with the loss's gradient
ROOM = 0.9  # of what the machine has; the rest is for what runs beside


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


def loss_bytes(shape: ModelShape, rows: int) -> int:
    """The chunked loss on `rows` positions: hidden states of student and target, and one chunk's logits."""
    logits = min(rows * shape.vocabulary, max(CHUNK_LOGITS, shape.vocabulary))
    return 4 * HEAD_ARRAYS * logits + 3 * 4 * rows * shape.hidden


def cache_bytes(shape: ModelShape, rows: int, length: int) -> int:
    """Keys and values of `rows` sequences, twice over: mlx-lm's caches are copied, block after block, when they grow
    and when rows join or leave."""
    grown = -(-length // CACHE_STEP) * CACHE_STEP
    return 2 * 2 * rows * grown * shape.n_layers * shape.kv * shape.activation_bytes


def sampling_bytes(passes: Passes, rows: int, prompt: int, answer: int) -> int:
    """Answers generated `rows` at a time: caches, prefill, logits and their copies."""
    logits = 4 * 4 * rows * passes.shape.vocabulary
    return cache_bytes(passes.shape, rows, prompt + answer) + max(passes.forward(rows, prompt), logits)


def anchor_tokens(recipe: Recipe, template: int) -> int:
    """Tokens of the anchor's prompts, estimated, each with so many of its template; 0 of those that do
    not come again, for `anchor_cache: auto`."""
    train, loss, sets = recipe.train, recipe.loss, prompt_sets(recipe)
    texts = {item.text for item in instructions_to_train_on(recipe, sets, harmful=False)}
    steps = number_of_steps(len(instructions_to_train_on(recipe, sets, harmful=True)), train, loss)
    anchors = train.grad_accumulation_steps * (train.batch_size - harmful_per_batch(train, loss))
    read = steps * anchors * train.num_generations / machines.here().size
    if not read or (train.anchor_cache == "auto" and read <= len(texts)):
        return 0
    return sum(min(len(text) // CHARACTERS_A_TOKEN + template, train.max_prompt_length) for text in texts)


def anchor_bytes(shape: ModelShape, tokens: int) -> int:
    """Keys, values and one block's inputs of so many tokens of the anchor's prompts."""
    return tokens * shape.activation_bytes * (2 * shape.n_layers * shape.kv + shape.hidden)


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
    recipe: Recipe,
    passes: Passes,
    machine: Machine,
    longest_prompt: int,
    judged: int = HELD_OUT_TOKENS,
    anchors: int = 0,
) -> Plan:
    """The bytes of each stage, for prompts of up to `longest_prompt` tokens, up to `judged` tokens of an answer that is
    judged, and so many tokens of the anchor's prompts."""
    train, run, shape = recipe.train, recipe.run, passes.shape
    prompt, answer = _longest(recipe, longest_prompt)
    rollouts, micro = _rollouts(train), _of_the_longest(train, prompt + answer)
    # As many tokens in shorter rows take no more: what one takes grows with its row. But more of them are answers'.
    learned = min(train.micro_batch_size, rollouts) * answer
    learned = min(learned, max(train.micro_batch_tokens or learned, answer))
    # Weights, two moments and the last good state of all three; a gradient and the sum it is added to.
    trained = 8 * passes.trained(train)
    vocabulary = 4 * shape.vocabulary
    rows = run.generation_batch_size
    scored = longest_prompt + recipe.tokens.horizon
    by_part = recipe.tokens.token_method == "part" and recipe.teacher.teacher != "system_prompt"
    read_for_tokens = recipe.direction.direction_validation + (VALIDATION_PROMPTS[0] if by_part else 0)
    positions = read_for_tokens * recipe.tokens.token_samples * (recipe.tokens.horizon + 1)
    read = passes.forward(run.prompt_batch_size, longest_prompt)
    # Continuations, rollouts, held-out answers: how many at a time, to what and how long; the largest counts.
    samplings = (
        *((rows, longest_prompt, recipe.tokens.horizon), (min(rows, rollouts), prompt, answer)),
        (rows, longest_prompt, judged),
    )
    answers, request, length = max(samplings, key=lambda a: sampling_bytes(passes, *a))
    activations = passes.gradient(train, micro, prompt + answer, train.grad_checkpoint == "on")
    training = activations + loss_bytes(shape, learned)
    kept = anchor_bytes(shape, anchors) if train.anchor_cache == "on" else 0
    if kept:  # while prompts are read, and read behind, and the student answers
        behind = int(max(1, micro)), prompt, answer
        training = kept + max(training, *(sampling_bytes(passes, *rows) for rows in (behind, samplings[1])))
    stages = {
        "direction": read + 4 * recipe.direction.direction_validation * vocabulary,
        "safety tokens": passes.forward(run.prompt_batch_size, scored)
        + 2 * 2 * 4 * shape.hidden * positions  # all that are scored, and those that are kept
        + 4 * HEAD_ARRAYS * min(positions * shape.vocabulary, max(CHUNK_LOGITS, shape.vocabulary)),
        "sampling": sampling_bytes(passes, answers, request, length),
        "training": training,
    }
    if judged > HELD_OUT_TOKENS:  # else far less than what tokens are found on
        states = 2 * shape.activation_bytes * shape.hidden * READ_BACK * judged
        stages["scoring"] = passes.forward(READ_BACK, longest_prompt + judged) + states
    together = f"{train.micro_batch_tokens:,} tokens" if train.micro_batch_tokens else f"{micro} completions"
    parts = {
        "direction": {f"activations of {run.prompt_batch_size} prompts": read},
        "sampling": {f"keys and values of {answers} answers": cache_bytes(shape, answers, request + length)},
        "training": {f"activations of {together}": activations, "loss": loss_bytes(shape, learned)}
        | ({"anchor prompts, read once": kept} if kept else {}),
    }
    share = 1.0 if machine.source == "--memory-limit" else ROOM
    return Plan(recipe, shape.weight_bytes, trained, stages, parts, int(share * machine.memory))


def fitted(
    recipe: Recipe,
    passes: Passes,
    machine: Machine,
    longest_prompt: int,
    judged: int = HELD_OUT_TOKENS,
    anchors: int = 0,
) -> Plan:
    """The plan whose batches fit, if any do: prompts read at a time, answers generated, completions trained on.

    `grad_checkpoint: auto` becomes on where training would not fit without it, before its batch is cut; `anchor_cache:
    auto` where there is room beside all else.
    """

    def with_train(**changes: Any) -> Recipe:
        return replace(recipe, train=replace(recipe.train, **changes))

    def now() -> Plan:
        return plan(recipe, passes, machine, longest_prompt, judged, anchors)

    def over(*names: str) -> bool:
        p = now()
        return p.weights + p.trained + max(p.stages[name] for name in names) > p.budget

    auto = recipe.train.grad_checkpoint == "auto"
    if auto:
        recipe = with_train(grad_checkpoint="off")
    may_keep = recipe.train.anchor_cache == "auto"
    if may_keep:
        recipe = with_train(anchor_cache="off")
    while over("direction", "safety tokens") and recipe.run.prompt_batch_size > 1:
        recipe = replace(recipe, run=replace(recipe.run, prompt_batch_size=recipe.run.prompt_batch_size // 2))
    while over("sampling") and recipe.run.generation_batch_size > 1:
        recipe = replace(recipe, run=replace(recipe.run, generation_batch_size=recipe.run.generation_batch_size // 2))
    if auto and over("training"):
        recipe = with_train(grad_checkpoint="on")
    longest = sum(_longest(recipe, longest_prompt))
    rows = int(_of_the_longest(recipe.train, longest))
    while over("training") and rows > 1:
        rows //= 2
        recipe = with_train(micro_batch_tokens=rows * longest)
    least = now()
    if may_keep and anchors and least.fits:
        recipe = with_train(anchor_cache="on")
        return kept if (kept := now()).fits else least
    return least


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
