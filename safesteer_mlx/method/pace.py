"""How long a run will take: what each of its steps reads and draws, at rates that a few seconds of measuring give.

Reading is a forward pass, told by the tokens that go through it; drawing is told by how often a batch is fed a token
each. What nobody can know before (how many candidates are dropped early, how soon the student has learned) is taken as
it mostly is. `Screen` corrects the plan by the steps that are done.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..recipe import HELD_OUT_TOKENS, number_of_steps, rollout_tokens
from ..system import machines
from .direction import SHORTLIST, pruned_from
from .judge import is_refusal
from .own_answers import alike_for
from .prompts import VALIDATION_PROMPTS, instructions_to_train_on
from .residual import blocks, last_logits
from .rollout import Completion, generate_here
from .run import REFUSAL_TOKENS, Run
from .safety_tokens import TOLD
from .teacher import ASKED, FIRST_PASSES, OPENING, OPENINGS, ROUNDS, VALIDATION_TOKENS, settled
from .train import COLLAPSE_PROMPTS, MEASURED_EVERY

SECONDS = 4.0  # of drawing, after which eight tokens more are enough to measure by
READ = 9, 1.0  # batches at most, timed, and seconds after which there are enough of them
# As it mostly is, on the half of the zoo that defaults were chosen on:
LEARNS = 1.25  # of the epochs' steps, until it has learned
SEARCHED = 0.6, 350  # of candidates × prompts, full forward passes of the search; and those that it always needs
PASSES = 6.0  # reads of a training row: student, its gradient, teacher and base, beside what they share
TASK_TOKENS = 8  # of an answer to a little task
DRIFT_PROMPTS = 64  # whose answers base and student read again
MOST_FULLER = 4.0  # times as many rows as were fed on average: of fewer nobody can tell what a full batch takes
KEPT_BUSY = 0.85  # of a batch's rows, while those that have finished wait to be replaced


@dataclass(frozen=True)
class Rates:
    """Seconds to read a token of a batch of prompts, and to feed a batch of one row and of `batch` rows a token each;
    how many tokens answers have, those that were longer counted as long as one that is scored may be; and for how many
    of them refusals begin as other answers do."""

    reading: float
    feeding: tuple[float, float]
    batch: int
    lengths: Sequence[int]
    alike: int = 0

    def draw(self, rows: float, most: int) -> float:
        """Seconds to draw answers to `rows` prompts, `most` tokens of each at most; without reading the prompts."""
        lengths = [min(length, most) for length in self.lengths]
        mean, longest = float(np.mean(lengths)), max(lengths)
        if rows <= self.batch:  # until the longest has ended; those that have are left out
            return self._feed(rows * mean / longest) * longest if rows else 0.0
        return self._feed(self.batch) * (rows * mean / (KEPT_BUSY * self.batch) + longest / 2)

    def _feed(self, rows: float) -> float:
        alone, together = self.feeding
        return alone + (together - alone) * max(0.0, rows - 1) / max(1, self.batch - 1)


def measure_rates(run: Run) -> Rates:
    """The rates of this machine with this model, from answers of the base to validation prompts."""
    base, settings, scored = run.base, run.recipe.run, run.sampling(HELD_OUT_TOKENS, 1.0)
    rows = [*run.prompts.harmful_validation, *run.prompts.harmless_validation]
    batch = min(settings.generation_batch_size, len(rows))
    which = [i * len(rows) // batch for i in range(batch)]
    sample = [rows[i] for i in which]
    together = sample[: settings.prompt_batch_size]
    mx.eval(last_logits(base.model, together))  # kernels are made, and weights read from the disk
    most_reads, most_seconds = READ
    took: list[float] = []
    while len(took) < most_reads and sum(took) < most_seconds:
        began = time.monotonic()
        mx.eval(last_logits(base.model, together))
        took.append(time.monotonic() - began)
    # The median: whatever else the machine does for a moment is not the model's.
    reading = float(np.median(took)) / (len(together) * max(map(len, together)))

    def measure(prompts: list[list[int]], most: int) -> tuple[float, list[Completion]]:
        """Seconds that feeding took each time, and the answers as far as they were drawn."""
        start = time.monotonic()

        def enough(*_) -> bool:
            return time.monotonic() - start > SECONDS

        keys = [run.key(15, i) for i in range(len(prompts))]
        how = replace(scored, max_tokens=most, batch_size=batch, enough=enough)
        answers = generate_here(base.model, prompts, how, keys)
        read = reading * len(prompts) * max(map(len, prompts))
        return max(1e-6, time.monotonic() - start - read) / max(len(a.ids) for a in answers), answers

    alone, _ = measure(sample[:1], 8)
    on_average, answers = measure(sample, scored.max_tokens)
    ids = [answer.ids for answer in answers]
    tokens = sum(map(len, ids))
    rows_fed = tokens / max(map(len, ids))
    fuller = (batch - 1) / max(rows_fed - 1, (batch - 1) / MOST_FULLER) if batch > 1 else 1.0
    ended = [a.finished or bool(scored.after and scored.after.enough(a.ids) == len(a.ids)) for a in answers]
    # One that was cut would have gone on for as long as answers of a constant chance to end do.
    more = int(tokens / max(1, sum(ended)))
    lengths = [min(scored.max_tokens, len(a) + (0 if whole else more)) for a, whole in zip(ids, ended, strict=True)]
    alike = 0
    if not base.thinks:
        n_harmful = sum(i < len(run.prompts.harmful_validation) for i in which)
        alike = alike_for(run, sample, ids, [is_refusal(base.tokenizer.decode(list(a))) for a in ids], n_harmful)
    return Rates(reading, (alone, alone + (on_average - alone) * fuller), batch, lengths, alike)


def plan_seconds(run: Run, rates: Rates) -> list[float]:
    """Seconds of each of a run's five steps, in their order; several machines share the work evenly."""
    recipe, prompts, sets = run.recipe, run.prompts, run.prompts.sets
    train, loss, tokens, teacher = recipe.train, recipe.loss, recipe.tokens, recipe.teacher
    n_blocks, thinks = len(blocks(run.base.model)), run.base.thinks
    found_from = [*prompts.harmful_direction_train, *prompts.harmless_direction_train]
    prompt = float(np.mean([len(row) for row in found_from]))
    tried = len(prompts.harmless_direction_validation)

    def read(rows: float, length: float = prompt) -> float:
        return rates.reading * rows * length

    def answer(rows: int, most: int, alike: int = 1) -> float:
        """Seconds to read prompts and to answer them, each of them so many times."""
        return read(rows / alike) + rates.draw(rows, most)

    validation = run.answer_tokens(VALIDATION_TOKENS)
    both = prompts.harmful_validation, prompts.harmless_validation
    counts = [min(most, len(own)) for most, own in zip(VALIDATION_PROMPTS, both, strict=True)]
    candidates = prompts.n_eoi * pruned_from(n_blocks, recipe.direction.prune_last)
    searched = SEARCHED[0] * candidates * tried + SEARCHED[1] if teacher.teacher != "system_prompt" else 0
    directions = answer(len(found_from), run.answer_tokens(REFUSAL_TOKENS)) + read(searched + 3 * len(found_from))

    # Teachers are asked for answers; what they open, the base reads and goes on with.
    opened = answer(sum(counts), OPENING) + answer(sum(counts), validation)
    asks = 2 if teacher.coeff != "auto" or teacher.teacher == "system_prompt" else 1 + ASKED + 2 * ROUNDS
    first_passes = 0 if asks == 2 else SHORTLIST * len(teacher.coeff_grid) * sum(FIRST_PASSES) / 2
    asks += sum(n != OPENING for n in OPENINGS if thinks or n <= tokens.horizon) if loss.first_tokens == "auto" else 0
    choosing = asks * opened + read(first_passes)

    auto = loss.first_tokens == "auto"
    if auto and rates.alike:
        taught = settled(run, rates.alike + OPENING).recipe
        loss, tokens, auto = taught.loss, taught.tokens, False
    samples = tokens.token_samples if tokens.horizon > 1 else 1
    continued = samples * (counts[0] + tried)
    finding = answer(continued, tokens.horizon, samples) + read(continued, prompt + tokens.horizon)
    if tokens.token_method == "part" and not thinks:
        finding += answer(TOLD * counts[0], tokens.horizon, TOLD) + answer(TOLD * counts[0], validation)

    n_harmful = len(instructions_to_train_on(recipe, sets, harmful=True))
    steps = number_of_steps(n_harmful, train, loss)
    if train.until_learned and train.iters is None:
        steps *= LEARNS
    most = rollout_tokens(train, replace(loss, first_tokens=tokens.horizon if thinks else OPENING) if auto else loss)
    rows = train.batch_size * train.num_generations * train.grad_accumulation_steps
    length = prompt + float(np.mean([min(n, most) for n in rates.lengths]))
    a_step = answer(rows, most) + read(PASSES * rows, length) + read(sum(map(len, both)) / MEASURED_EVERY)
    a_step += answer(COLLAPSE_PROMPTS, run.answer_tokens(REFUSAL_TOKENS)) / train.save_every
    training = steps * a_step

    few, capability = recipe.run.test_prompts, sets.capability_test
    n_tests = sum(len(kind[:few]) for kind in (sets.harmful_test, sets.harmless_test, sets.borderline_test))
    n_tasks = min(len(capability), len({item.category for item in capability}) * (few or len(capability)))
    judged = run.answer_tokens(HELD_OUT_TOKENS)
    scored = answer(2 * n_tests, judged, 2) + answer(n_tasks, judged if thinks else TASK_TOKENS)
    scored += 2 * read(DRIFT_PROMPTS, prompt + float(np.mean(rates.lengths)))
    scoring = (2 + recipe.run.score_teacher) * scored
    size = machines.here().size
    return [seconds / size for seconds in (directions, choosing, finding, training, scoring)]
