"""What an Apple chip could do at best: planned seconds by stage of a default run, and of what bench.py measures.

All of it is computed, none of it measured. A pass takes the longer of two times: its multiplications at the GPU's
published rate, and its weights (and keys and values) at the memory's published bandwidth, both at an efficiency of 1.0,
which no program reaches. Left out: attention's own products, activations, norms, LoRA, sampling, waiting.

    forward                2 · weights of the blocks · tokens, and 2 · V · D for each position whose logits are wanted
    backward               as much again: weights are frozen, so only what goes into them has a gradient
    checkpointed blocks    one more forward pass of those that are trained
    a token of each row    all weights read once for the whole batch, and each row's keys and values
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from safesteer_mlx.evals.heldout import held_out_prompts
from safesteer_mlx.method.direction import pruned_from
from safesteer_mlx.method.prompts import (
    CHARACTERS_A_TOKEN,
    TEMPLATE_TOKENS,
    VALIDATION_PROMPTS,
    instructions_to_train_on,
    prompt_sets,
)
from safesteer_mlx.method.run import REFUSAL_TOKENS
from safesteer_mlx.method.teacher import VALIDATION_TOKENS
from safesteer_mlx.recipe import HELD_OUT_TOKENS, Recipe, harmful_per_batch, number_of_steps, rollout_tokens
from safesteer_mlx.system.files import read_json
from safesteer_mlx.system.screen import UserError

FOUR_BIT = 4.5  # bits of a weight, its share of a group's scale and bias (64 weights, 16 bits each) included
VALUE_BYTES = 2  # of a key or value
EOI = 5  # positions that directions are read at: what the templates of Qwen and Llama write after the user's turn

SEARCH = "search, every candidate in full"


@dataclass(frozen=True)
class Chip:
    """The memory's GB/s, by Apple's technical specifications; the GPU's TFLOPS in single precision, by Hugging Face's
    table of hardware (huggingface.js, packages/tasks/src/hardware-apple.ts). Of each the largest variant.

    Half precision is no faster on an M1's (github.com/philipturner/metal-benchmarks).
    """

    bandwidth: float
    tflops: float


CHIPS = {
    "Apple M1": Chip(68.25, 2.6),
    "Apple M1 Pro": Chip(200, 5.2),
    "Apple M1 Max": Chip(400, 10.4),
    "Apple M2": Chip(100, 3.6),
    "Apple M2 Pro": Chip(200, 6.8),
    "Apple M2 Max": Chip(400, 13.49),
    "Apple M4": Chip(120, 4.6),
    "Apple M4 Pro": Chip(273, 9.2),
    "Apple M4 Max": Chip(546, 18.4),
}
MOST = 10**6  # of a number in a file that somebody sent


@dataclass(frozen=True)
class Sizes:
    """Weights of all blocks and of the head, keys and values of a token, blocks, and bits of a weight."""

    blocks: int
    head: int
    kv: int
    layers: int
    bits: float

    @staticmethod
    def of(shape: Mapping[str, Any], bits: float) -> "Sizes":
        """Of a decoder with a gated MLP, from what `shapes.py` has of it."""
        hidden, layers = shape["hidden"], shape["layers"]
        head_dim = shape.get("head_dim") or hidden // shape["heads"]
        queries, kv = shape["heads"] * head_dim, shape["kv_heads"] * head_dim
        block = 2 * hidden * (queries + kv) + 3 * hidden * shape["intermediate"]
        return Sizes(layers * block, hidden * shape["vocabulary"], 2 * layers * kv, layers, bits)

    def bytes(self, weights: float) -> float:
        """Of so many weights."""
        return weights * self.bits / 8


@dataclass(frozen=True)
class Roof:
    """Seconds on a chip, of a model."""

    chip: Chip
    sizes: Sizes

    def _least(self, operations: float, read: float) -> float:
        return max(operations / (self.chip.tflops * 1e12), read / (self.chip.bandwidth * 1e9))

    def reading(self, tokens: float, scored: float = 0, share: float = 1.0) -> float:
        """A forward pass over so many tokens, through a share of the blocks, with logits of `scored` positions."""
        s = self.sizes
        weights = share * s.blocks
        operations = 2 * (weights * tokens + s.head * scored)
        return self._least(operations, s.bytes(weights + (s.head if scored else 0)))

    def drawing(self, rows: int, prompt: float, answer: int, alike: int = 1) -> float:
        """Answers side by side: the prompts read, each for `alike` rows, then a token of each row at a time."""
        s = self.sizes
        operations, weights = 2 * rows * (s.blocks + s.head), s.bytes(s.blocks + s.head)
        return self.reading(rows / alike * prompt) + sum(
            self._least(operations, weights + rows * (prompt + t) * s.kv * VALUE_BYTES) for t in range(answer)
        )

    def in_batches(self, answers: int, size: int, prompt: float, answer: int, alike: int = 1) -> float:
        """As `drawing`, `size` at a time."""
        whole, rest = divmod(answers, size)
        return whole * self.drawing(size, prompt, answer, alike) + self.drawing(rest, prompt, answer, alike) * bool(
            rest
        )

    def step(
        self,
        rows: int,
        prompt: float,
        answer: int,
        *,
        targets: int = 1,
        trained: int = -1,
        checkpointed: bool = False,
    ) -> float:
        """Loss and gradient of `rows` rows at once: the student there and back, and `targets` models read beside it.

        What comes before the trained blocks is the same for all of them, and is read once.
        """
        s, tokens, scored = self.sizes, rows * (prompt + answer), rows * answer
        share = min(trained, s.layers) / s.layers if trained > 0 else 1.0
        once = self.reading(tokens, share=1 - share) + (self.reading(tokens, share=share) if checkpointed else 0.0)
        return (2 + targets) * self.reading(tokens, scored, share) + once


def planned_seconds(work: Mapping[str, Any], chip: Chip) -> float:
    """Of what bench.py measured, as its row says under `work`."""
    roof = Roof(chip, Sizes.of(work["shape"], work["bits"]))
    rows, prompt, answer = work["rows"], work["prompt"], work["answer"]
    if work["kind"] == "rollouts":
        return roof.drawing(rows, prompt, answer)
    return roof.step(rows, prompt, answer, trained=work["trained"], checkpointed=work["checkpointed"])


def held_against(path: Path) -> list[list[str]]:
    """What bench.py wrote on a Mac beside the chip's bound: a row of what, planned, measured, planned / measured each.

    Raises:
        UserError: it is no such file, of no such chip, or nothing in it has a bound.
    """
    remedy = "give what scripts/bench.py wrote"
    content = read_json(path, str(path), remedy)
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise UserError(f"{path} holds no rows of measurements; {remedy}")
    if not isinstance(name := content.get("chip"), str) or name not in CHIPS:
        raise UserError(
            f"{path} is of the chip {name!r:.80}, whose figures are not known; of {', '.join(CHIPS)} they are"
        )
    found = []
    for number, row in enumerate(content["rows"], 1):
        if not isinstance(row, dict) or "work" not in row:
            continue
        try:
            work, seconds, what = row["work"], row["ours_seconds"], f"{row['part']}: {row['what']}"
            sizes = [value for value in (*work["shape"].values(), *work.values()) if type(value) in (int, float)]
            if not (seconds > 0 and all(0 < n <= MOST or n == -1 for n in sizes)):
                raise ValueError("a number that none can be")
            planned = planned_seconds(work, CHIPS[name])
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError):
            raise UserError(f"row {number} of {path} is not as scripts/bench.py writes it; measure it again") from None
        found.append([what, shown(planned), shown(seconds), f"{planned / seconds:.2f}"])
    if not found:
        raise UserError(f"nothing in {path} has a bound to be held against; give --shape to scripts/bench.py")
    return found


def run_seconds(roof: Roof, recipe: Recipe) -> dict[str, float]:
    """By stage of a run: answers as long as the settings let them be, prompts of the mean length of the run's own
    sets by the memory plan's estimate, and the epochs' own number of steps (a run may learn in fewer, or take twice).

    What teachers are tried is the model's: counted are the base and one. So is how many candidates the search leaves
    out (of the bundled model's three quarters): it is told in full.
    """
    direction, tokens, train, run = recipe.direction, recipe.tokens, recipe.train, recipe.run
    keep = tokens.horizon if recipe.loss.first_tokens == "auto" else int(recipe.loss.first_tokens)
    loss = replace(recipe.loss, first_tokens=keep)
    sets, layers = prompt_sets(recipe), roof.sizes.layers
    training = instructions_to_train_on(recipe, sets, True)
    kinds, tasks = held_out_prompts(sets, run.test_prompts)
    asked = [item for items in kinds.values() for item in items]
    prompt = mean(len(item.text) for item in [*training, *asked]) / CHARACTERS_A_TOKEN + TEMPLATE_TOKENS
    size, answer = run.generation_batch_size, rollout_tokens(train, loss)

    steps = number_of_steps(len(training), train, loss)
    rollouts = train.batch_size * train.grad_accumulation_steps * train.num_generations
    harmful = rollouts * harmful_per_batch(train, loss) // train.batch_size
    validation, read = direction.direction_validation, 2 * direction.direction_train
    search = sum(
        validation * (2 * layers + layers - layer) / layers
        for layer in range(pruned_from(layers, direction.prune_last))
    )
    scored = validation * tokens.token_samples * (2 if tokens.token_method == "part" else 1)

    def learned(rows: int, targets: int) -> float:
        micro, rest = divmod(rows, train.micro_batch_size)
        how = {"targets": targets, "trained": train.num_layers, "checkpointed": train.grad_checkpoint == "on"}
        full = micro * roof.step(train.micro_batch_size, prompt, answer, **how)
        return full + roof.step(rest, prompt, answer, **how) * bool(rest)

    # Harmful prompts are read by teacher and base, the anchor's by the base.
    step = learned(harmful, 2) + learned(rollouts - harmful, 1)
    each = roof.in_batches(2 * len(asked), size, prompt, HELD_OUT_TOKENS, alike=2)  # greedily, and sampled
    return {
        "own answers": roof.in_batches(read, size, prompt, REFUSAL_TOKENS),
        "directions": 2 * roof.reading(read * prompt),  # once to keep those answered as meant, once for the means
        "base and one teacher asked": 2 * roof.in_batches(sum(VALIDATION_PROMPTS), size, prompt, VALIDATION_TOKENS),
        "safety tokens": roof.in_batches(scored, size, prompt, tokens.horizon - 1)
        + 2 * roof.reading(scored * (prompt + tokens.horizon), scored * tokens.horizon),
        "rollouts": steps * roof.in_batches(rollouts, size, prompt, answer),
        "training steps": steps * step,
        "scoring base and student": 2 * (each + roof.in_batches(len(tasks), size, prompt, HELD_OUT_TOKENS)),
        SEARCH: EOI * roof.reading(search * prompt),
    }


def shown(seconds: float) -> str:
    """Two digits or more."""
    return f"{seconds:,.{0 if seconds >= 10 else 1 if seconds >= 1 else 2}f}"


def table(shape: Mapping[str, Any], recipe: Recipe, works: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown: seconds by stage on each chip, the whole run, and what bench.py measures of this shape."""
    sizes = Sizes.of(shape, FOUR_BIT)
    columns = []
    for chip in CHIPS.values():
        stages = run_seconds(Roof(chip, sizes), recipe)
        parts = {f"*bench.py, {name}*": planned_seconds(work, chip) for name, work in works.items()}
        search = stages.pop(SEARCH)
        columns.append(stages | {"**all of these**": sum(stages.values()), SEARCH: search} | parts)
    head = ["", *(name.removeprefix("Apple ") for name in CHIPS)]
    lines = [head, ["---"] * len(head), *([name, *(shown(c[name]) for c in columns)] for name in columns[0])]
    return [f"| {' | '.join(line)} |" for line in lines]
