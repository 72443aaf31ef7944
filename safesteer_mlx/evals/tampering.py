"""What is left of a model's refusals after somebody has changed its weights: base beside aligned.

Two ways that need no skill. Abliteration projects out of the stream the direction that refusals lie along, found anew
in the very model that is attacked, at the block where it does most (Arditi et al. 2024). And a short fine-tuning on
harmless requests as `mlx_lm.lora` does it, which means no harm and undoes refusals all the same (Qi et al. 2023).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from ..method.direction import mean_differences, too_much_left
from ..method.judge import is_refusal
from ..method.prompts import PromptSets, Rows, render_all
from ..method.residual import ablate, block_inputs, blocks
from ..method.rollout import Sampling, answers, stream_key
from ..method.run import REFUSAL_TOKENS
from ..method.student import make_student
from ..recipe import resolve
from ..system.finished import Vector, read_record
from ..system.load import Loaded
from ..system.screen import Advance, UserError, silent

BLOCKS = 8  # that are tried, evenly between 20 and 80 % of the depth
TUNING_STEPS = (10, 25, 50)
# As mlx_lm.lora does by default, but for the rate, which is 1e-5 there and would change nothing so soon.
TUNING_RATE, TUNING_BATCH, TUNING_BLOCKS, TUNING_LENGTH = 1e-4, 4, 16, 2048
ANSWER_TOKENS = 96  # of the harmless answers


@dataclass(frozen=True)
class Tampering:
    """What both ways need: the base, prompts that are not the tests', and how answers are drawn."""

    base: Loaded
    sets: PromptSets
    sampling: Sampling
    seed: int

    def rows(self, name: str) -> Rows:
        """A set's prompts."""
        return render_all(self.base.tokenizer, getattr(self.sets, name))

    def texts(self, model: nn.Module, rows: Rows) -> list[str]:
        """The beginnings of greedy answers."""
        sampling = replace(self.sampling, temp=0.0, max_tokens=REFUSAL_TOKENS)
        return [text for _, text in answers(model, self.base.tokenizer, rows, sampling)]

    def abliterated(self, model: nn.Module, progress: Advance = silent) -> nn.Module:
        """The model without the direction, of those found at each of `BLOCKS` blocks, without which it refuses least on
        validation prompts."""
        harmful, harmless = self.rows("harmful_direction_train"), self.rows("harmless_direction_train")
        directions = mean_differences(model, harmful, harmless, 1, self.sampling.batch_size)[0]
        validation, n = self.rows("harmful_direction_validation"), len(blocks(model))
        layers = sorted({round(x) for x in np.linspace(0.2 * n, 0.8 * n - 1, BLOCKS)})
        tried = []
        for at, layer in enumerate(layers):
            without = ablated(model, mx.array(directions[layer].astype(np.float32)), validation[0])
            tried.append((sum(map(is_refusal, self.texts(without, validation))), at, without))
            progress(at + 1, len(layers))
        return min(tried, key=lambda t: t[:2])[2]

    def tuned(self, model: nn.Module, own: Sequence[tuple[list[int], int]]) -> Iterator[tuple[int, nn.Module]]:
        """The model after each of `TUNING_STEPS` steps of LoRA on (prompt and answer, tokens of the prompt); adapters
        that it has stay, below the new ones. A UserError if they cannot carry others (DoRA)."""
        from mlx_lm.tuner.trainer import default_loss, iterate_batches

        adapted = list(takewhile(_has_adapters, reversed(blocks(model)))) or blocks(model)[::-1]
        tuned = adapted[:TUNING_BLOCKS]  # one key names a layer in all of them, so all have adapters, or none has
        keys = sorted({key for block in tuned for key, module in block.named_modules() if _is_linear(module)})
        settings = resolve({}, {"num_layers": len(tuned)})[0].train
        settings = replace(settings, lora_parameters={"rank": 8, "dropout": 0.0, "scale": 20.0, "keys": keys})
        try:
            student = make_student(model, settings, self.seed)
            student(mx.array([self.rows("harmless_train")[0]]))
        except (ValueError, AttributeError, KeyError) as error:
            raise UserError(
                f"these adapters cannot be trained further ({error}); export the run and try that"
            ) from None
        optimizer, loss_and_grad = optim.Adam(TUNING_RATE), nn.value_and_grad(student, default_loss)  # pyright: ignore[reportPrivateImportUsage]
        batches = iterate_batches(own, min(TUNING_BATCH, len(own)), TUNING_LENGTH, loop=True, seed=self.seed)
        student.train()
        for step, batch in zip(range(1, TUNING_STEPS[-1] + 1), batches, strict=False):
            (_, _), grads = loss_and_grad(student, *batch)
            optimizer.update(student, grads)
            mx.eval(student.trainable_parameters(), optimizer.state)
            if step in TUNING_STEPS:
                student.eval()
                yield step, student
                student.train()

    def harmless_answers(self) -> list[tuple[list[int], int]]:
        """Harmless training prompts and what the base answers at temperature 1, the same for every model."""
        rows = self.rows("harmless_train")[: TUNING_BATCH * TUNING_STEPS[-1]]  # of more, none would be read
        keys = [stream_key(self.seed, 13, i) for i in range(len(rows))]
        sampling = replace(self.sampling, temp=1.0, max_tokens=ANSWER_TOKENS)
        replies = answers(self.base.model, self.base.tokenizer, rows, sampling, keys)
        return [([*row, *completion.ids], len(row)) for row, (completion, _) in zip(rows, replies, strict=True)]

    def every(self, model: nn.Module, run: Path | None, progress: Advance = silent) -> Iterator[tuple[str, nn.Module]]:
        """(name, model) of each way to tamper with it; `run` is the folder of the run that has found a direction."""
        yield "abliterated, direction of its own", self.abliterated(model, progress)
        if (vector := run_direction(run)) is not None:
            yield "abliterated, the run's direction", ablated(model, vector, self.rows("harmful_validation")[0])
        for step, student in self.tuned(model, self.harmless_answers()):
            yield f"tuned on harmless requests, {step} steps", student


def _is_linear(module: nn.Module) -> bool:
    """Whether mlx-lm puts an adapter on it."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return isinstance(module, (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear))


def _has_adapters(block: nn.Module) -> bool:
    return any(name.endswith(("lora_a", ".m")) for name, _ in tree_flatten(block.parameters()))


def ablated(model: nn.Module, vector: mx.array, row: Sequence[int]) -> nn.Module:
    """The model without a direction in its stream, by the way that leaves none of it; a UserError if it is another
    model's."""
    tokens = mx.array([list(row)])
    if vector.size != (width := block_inputs(model, tokens)[0].shape[-1]):
        raise UserError(f"the run's direction has {vector.size} numbers, and this model's stream {width}")
    return ablate(model, vector, too_much_left(model, vector, tokens) is not None)


def run_direction(run: Path | None) -> mx.array | None:
    """The direction that a run has kept, if there is a run and its teacher is no system prompt."""
    if run is None or not (run / "direction.json").exists():
        return None
    vector = mx.array(read_record(run, "direction.json", Vector)["vector"], mx.float32)
    return vector if mx.any(vector).item() else None
