"""Measure ours beside the plain way, in turns, in one run: a table, and bench.json.

    python scripts/bench.py                        the bundled model and small shapes, some twenty minutes on two cores
    python scripts/bench.py --only loss,step --repeats 5
    python scripts/bench.py --shape qwen2.5-0.5b   rollouts, a short run of every stage, and training steps
    python scripts/bench.py --shape qwen2.5-7b --only step     one 4-bit training step on 64 + 64 tokens; forty minutes
    python scripts/bench.py --shape llama-3.2-3b   (qwen3-4b, qwen2.5-7b) on a Mac: answers too
    python scripts/bench.py --contribute           as above, and figures.json for an issue; with --shape too
    python scripts/bench.py --planned              what M1, M2 and M4 could do at best, computed
    python scripts/bench.py --against bench.json   what a Mac measured, beside that
    python scripts/bench.py --counts               waits, graphs and operations of a training step; padding

Seconds are noisy, so each figure is the median of ratios of two measurements made one after the other. Peaks are
MLX's own, above what was in use before. docs/performance.md says what came out and on which machine.
"""

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safesteer_mlx  # isort: skip  # noqa: F401  before mlx
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from roofline import CHIPS, FOUR_BIT, held_against, table
from shapes import LLAMA_3B, QWEN3_4B, QWEN_05B, QWEN_7B, memory_shape, random_model

from safesteer_mlx.method import direction as directions
from safesteer_mlx.method import teacher as teachers
from safesteer_mlx.method import train as training
from safesteer_mlx.method.learning import what_to_learn
from safesteer_mlx.method.losses import Divergence, Scored, distillation_loss, localized_loss
from safesteer_mlx.method.memory_plan import loss_bytes, plan
from safesteer_mlx.method.passes import Passes
from safesteer_mlx.method.prompts import longest_prompt
from safesteer_mlx.method.residual import answer_states, head, hidden_states, pad_right
from safesteer_mlx.method.rollout import Completion, Sampling, generate, stream_key
from safesteer_mlx.method.run import Run, make_run
from safesteer_mlx.method.safety_tokens import contrast_tokens, find_tokens, select_tokens
from safesteer_mlx.method.student import make_student
from safesteer_mlx.method.teacher import find_teacher, make_teacher, settled, steered_teacher
from safesteer_mlx.method.train import Rollouts, StepMetrics, Training, make_optimizer
from safesteer_mlx.method.training_prompts import TrainingPrompt, training_prompts
from safesteer_mlx.recipe import (
    MODELS,
    PRESETS,
    TrainSettings,
    harmful_per_batch,
    number_of_steps,
    resolve,
    rollout_tokens,
)
from safesteer_mlx.system.load import Loaded, load
from safesteer_mlx.system.memory import this_machine
from safesteer_mlx.system.screen import Screen, exit_code
from safesteer_mlx.system.shape import read_shape

Row = dict[str, Any]

BUNDLED = str(MODELS / "tiny-chat")
GROUPED = "grouped_reverse_kl"
# With these the published tests find a direction on the bundled model; no candidate of its passes a threshold of 0.
PUBLISHED = {"steering_threshold": -1.5, "direction_validation": 96}
COUNTED = ("waits", "handed over", "reads", "graphs", "operations")
TINY = {"hidden": 32, "intermediate": 64, "layers": 3, "heads": 4, "kv_heads": 2, "vocabulary": 512}
NARROW = {"hidden": 512, "intermediate": 1408, "layers": 28, "heads": 8, "kv_heads": 2, "vocabulary": 32_000}


def quantized_model(**shape: Any) -> nn.Module:
    """As `random_model`, with random 4-bit weights in groups of 64, built packed: no full-precision copy ever exists.

    Scales are float32, in which the CPU backend's quantized kernels are fastest; on a GPU bfloat16, as in the files.
    """
    kind = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16

    def packed(path: str, module: nn.Module) -> nn.Module:
        outputs, inputs = module.weight.shape
        made = (
            nn.QuantizedEmbedding(64, 64, 64, 4)
            if isinstance(module, nn.Embedding)
            else nn.QuantizedLinear(64, 64, "bias" in module, 64, 4)
        )
        made.weight = mx.random.randint(0, 2**32 - 1, (outputs, inputs // 8), mx.uint32)
        made.scales = mx.full((outputs, inputs // 64), 0.02 / inputs**0.5, kind)
        made.biases = mx.full((outputs, inputs // 64), -0.15 / inputs**0.5, kind)
        if "bias" in module:
            made.bias = mx.zeros(outputs, kind)
        if isinstance(module, nn.Embedding):
            made.num_embeddings, made.dims = outputs, inputs
        mx.eval(made.parameters())
        return made

    model = random_model(**shape)
    found = [(p, m) for p, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    model.update_modules(tree_unflatten([(path, packed(path, module)) for path, module in found]))
    mx.eval(model.parameters())
    return model


def measured(work: Callable[[], Any]) -> tuple[float, int]:
    """Seconds, and peak bytes above what was there."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    began = time.perf_counter()
    mx.eval(work())
    return time.perf_counter() - began, mx.get_peak_memory() - before


def compared(pairs: list[tuple[tuple[float, int], tuple[float, int]]]) -> Row:
    """(seconds, bytes) of ours and of the other, pair by pair: medians, and the median of the ratios of seconds."""
    ours, other = zip(*pairs, strict=True)
    peaks = [max(peak for _, peak in side) for side in (ours, other)]
    return {
        "ours_seconds": statistics.median(seconds for seconds, _ in ours),
        "other_seconds": statistics.median(seconds for seconds, _ in other),
        "seconds_ratio": statistics.median(a[0] / b[0] for a, b in pairs),
        "ours_bytes": peaks[0],
        "other_bytes": peaks[1],
        "bytes_ratio": peaks[0] / max(1, peaks[1]),
    }


def in_turns(ours: Callable[[], Any], other: Callable[[], Any], repeats: int) -> Row:
    """Both, one after the other, `repeats` times."""
    return compared([(measured(ours), measured(other)) for _ in range(repeats)])


def bench_loss(repeats: int, length: int = 512, vocabulary: int = 151_936, hidden: int = 896) -> list[Row]:
    """The chunked loss on hidden states, and the plain one on logits; value and gradient."""
    mx.random.seed(0)
    weight = mx.random.normal((vocabulary, hidden)) * 0.02
    student, teacher = (mx.random.normal((length, hidden)) for _ in range(2))
    tokens = mx.array(np.random.default_rng(0).permutation(vocabulary)[:50])
    mx.eval(weight, student, teacher)

    def to_logits(h: mx.array) -> mx.array:
        return h @ weight.T

    def ours(h: mx.array) -> mx.array:
        each = mx.full((length,), 1 / length)
        target = Scored(teacher, to_logits)
        return localized_loss(Scored(h, to_logits), target, each, tokens, Divergence(GROUPED, tokens))[0]

    def plain(h: mx.array) -> mx.array:
        options: Row = {"tokens": tokens, "kind": "grouped_reverse_kl"}
        return distillation_loss(to_logits(h)[None], to_logits(teacher)[None], mx.ones((1, length)), **options)

    row = in_turns(lambda: mx.value_and_grad(ours)(student), lambda: mx.value_and_grad(plain)(student), repeats)
    return [{"part": "loss", "what": f"T {length}, V {vocabulary}, D {hidden}; ours / plain logits", **row}]


def prompts_and_answers(
    rows: int, length: int, vocabulary: int, prompt: int | None = None
) -> tuple[list[TrainingPrompt], list[Completion]]:
    """`rows` prompts of so many tokens, half of them harmful, and answers; by default as long as they are: `length`
    tokens together."""
    drawn, cut = np.random.default_rng(0).integers(1, vocabulary, (rows, length)), prompt or length // 2
    prompts = [TrainingPrompt(r[:cut].tolist(), r[:cut].tolist(), i % 2 == 0) for i, r in enumerate(drawn)]
    return prompts, [Completion(r[cut:].tolist(), False) for r in drawn]


def work_of(kind: str, shape: dict[str, Any], bits: float, rows: int, length: int, **more: Any) -> Row:
    """What a row measured, for `planned_seconds`: half of the length is the prompt's."""
    what = {"kind": kind, "shape": shape, "bits": bits, "rows": rows, "prompt": length // 2}
    return what | {"answer": length - length // 2, "trained": -1, "checkpointed": False} | more


class OurStep:
    """Optimizer steps of `train` on given answers; nothing is sampled."""

    def __init__(
        self,
        model: nn.Module,
        settings: Any,
        rows: int,
        length: int,
        vocabulary: int,
        loss: Any = None,
        prompt: int | None = None,
    ):
        prompts, answers = prompts_and_answers(rows, length, vocabulary, prompt)
        harmful, harmless = ([p for p in prompts if p.harmful is kind] for kind in (True, False))
        by_prompt = {tuple(p.ids): a for p, a in zip(prompts, answers, strict=True)}
        self.student = make_student(model, settings, 0)
        layer = len(model.layers) // 2
        hidden = model.model.norm.weight.size
        teacher = steered_teacher(model, layer, mx.random.normal((hidden,)), 1.0)
        training.generate = lambda student, rows, *how: [by_prompt[tuple(row)] for row in rows]  # type: ignore[assignment]
        loss = loss or resolve({}, {"first_tokens": 0, "guidance": 1.0})[0].loss  # as mlx-lm, of every position
        tokens = mx.array(np.random.default_rng(1).permutation(vocabulary)[:50])
        how = (settings, loss, [0], 0, make_optimizer(settings))
        self._steps = training.train(Training(self.student, model, teacher, tokens, harmful, harmless, *how))

    def __call__(self) -> list[mx.array]:
        while not isinstance(found := next(self._steps), StepMetrics):
            assert isinstance(found, Rollouts)
        return []


def operations(arrays: Any) -> int:
    """Operations that are still to be done for them: the nodes of their graph."""
    drawn = io.StringIO()
    mx.export_to_dot(drawn, *(array for _, array in tree_flatten(arrays) if isinstance(array, mx.array)))
    return drawn.getvalue().count("shape=rectangle")


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts what is asked of MLX: `waits` for what is still to be computed, `handed over` to be computed meanwhile
    (`async_eval`), `reads` of what is computed, `graphs` of a gradient that are built, and the `operations` in all."""
    found: Counter[str] = Counter()
    kept = {
        (mx, "eval"): "waits",
        (mx, "async_eval"): "handed over",
        (np, "array"): "waits",
        (np, "asarray"): "waits",
        **{(mx.array, name): "waits" for name in ("item", "tolist", "__bool__", "__float__", "__int__")},
    }

    def counting(call: Callable[..., Any], kind: str, *args: Any, **how: Any) -> Any:
        if any(isinstance(array, mx.array) for _, array in tree_flatten(args)):
            found["operations"] += (count := operations(args))
            found[kind if count else "reads"] += 1
        return call(*args, **how)

    def building(*given: Any, **how: Any) -> Callable[..., Any]:
        build = value_and_grad(*given, **how)

        def built(*args: Any, **more: Any) -> Any:
            found["graphs"] += 1
            return build(*args, **more)

        return built

    value_and_grad, before = nn.value_and_grad, {key: getattr(*key) for key in kept}
    nn.value_and_grad = building
    for key, kind in kept.items():
        # A method of arrays is only bound to them if it is a function of Python.
        setattr(*key, lambda *args, _call=before[key], _kind=kind, **how: counting(_call, _kind, *args, **how))
    try:
        yield found
    finally:
        nn.value_and_grad = value_and_grad
        for key, call in before.items():
            setattr(*key, call)


def bench_counts(shape: dict[str, Any] = NARROW, rows: int = 32, length: int = 24) -> list[list[str]]:
    """Of a training step by default settings, on `rows` answers of as many tokens as are trained on: a row of the
    table for what samples and for what learns."""
    model = random_model(**shape)
    mx.eval(model.parameters())
    recipe = resolve({}, {"iters": 1000, "batch_size": rows})[0]
    loss = replace(recipe.loss, first_tokens=recipe.tokens.horizon, guidance=2.0)
    prompts, _ = prompts_and_answers(rows, 2 * length, shape["vocabulary"])
    both = ([p for p in prompts if p.harmful is kind] for kind in (True, False))
    student = make_student(model, recipe.train, 0)
    mx.eval(student.parameters())
    teacher = steered_teacher(model, shape["layers"] // 2, mx.random.normal((shape["hidden"],)), 1.0)
    how = (recipe.train, loss, [], 0, make_optimizer(recipe.train))
    found, tokens = [], mx.arange(50)
    with counted() as counts:
        steps = training.train(Training(student, model, teacher, tokens, *both, *how, refusing=tokens))
        for which, event in enumerate(
            itertools.islice(steps, 4)
        ):  # the second step: the first makes the optimizer's state
            what = f"{_named(shape)}: {'sampling' if isinstance(event, Rollouts) else 'learning'}"
            found += [[what, *(f"{counts[kind]:,}" for kind in COUNTED)]] * (which > 1)
            counts.clear()
    return found


def bench_padding(steps: int = 8) -> list[list[str]]:
    """Passes of a step and what is padded in them, of the bundled run's batches and the base's answers: by rows, and by
    as many tokens as these rows would have if all were as long as the longest that the plan knows."""
    run = bundled()
    recipe, base = run.recipe, run.base
    settings = replace(recipe.train, until_learned=False)
    loss = replace(recipe.loss, first_tokens=recipe.tokens.horizon)
    most = rollout_tokens(settings, loss)
    pools = training_prompts(run)
    each = harmful_per_batch(settings, loss)
    rng = np.random.default_rng(0)
    batches: list[list[int]] = []  # lengths, of one kind in a step
    for _ in range(steps):
        for pool, count in zip(pools, (each, settings.batch_size - each), strict=True):
            rows = [pool[i].ids for i in rng.permutation(len(pool))[:count]]
            keys = [stream_key(0, len(batches), i) for i in range(count)]
            drawn = generate(base.model, rows, Sampling(base.eos_ids, most, 1.0, batch_size=64), keys)
            batches.append(sorted(len(row) + len(c.ids) for row, c in zip(rows, drawn, strict=True)))
    longest = longest_prompt(recipe) + most
    ways: list[tuple[str, int, int | None]] = [("16 rows, the default", 16, None)]
    for n in (4, 2, 1):
        ways += [(f"{n} row{'s'[: n > 1]}", n, None), (f"{n * longest} tokens, of {n} × {longest}", 16, n * longest)]
    found = []
    for name, rows_at_once, tokens in ways:
        cut = [lengths[part] for lengths in batches for part in training.micro_batches(lengths, rows_at_once, tokens)]
        padded = sum(len(part) * max(part) for part in cut)
        found.append([name, f"{len(cut) / steps:.1f}", f"{padded / sum(map(sum, batches)):.3f}"])
    return found


def their_steps(
    model: nn.Module, settings: Any, rows: int, length: int, vocabulary: int, steps: int
) -> tuple[float, int]:
    """Seconds of one step of mlx-lm's own LoRA trainer on the same rows, the first left out; and its peak."""
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train

    prompts, answers = prompts_and_answers(rows, length, vocabulary)
    items = [([*p.ids, *a.ids], len(p.ids)) for p, a in zip(prompts, answers, strict=True)]
    took: list[float] = []

    class Reported(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            took.append(1 / train_info["iterations_per_second"])

    student = make_student(model, replace(settings, grad_checkpoint="off"), 0)
    student.train()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train(
            student, make_optimizer(settings), items, None,
            args=TrainingArgs(
                batch_size=rows, iters=steps + 1, steps_per_report=1, steps_per_eval=10**6, steps_per_save=10**6,
                max_seq_length=length + 64, adapter_file=f"{folder}/a.safetensors",
                grad_checkpoint=settings.grad_checkpoint == "on",
            ),
            training_callback=Reported(),
        )  # fmt: skip
    return statistics.median(took[1:]), mx.get_peak_memory() - before


def beside_plan(passes: Passes, settings: TrainSettings, rows: int, length: int, peak: int) -> Row:
    """What the plan's rules give for a training step, weights and optimizer left out, and its ratio to `peak`."""
    planned = passes.gradient(settings, rows, length, settings.grad_checkpoint == "on")
    planned += loss_bytes(passes.shape, rows * length // 2) + passes.trained(settings)  # the gradient
    return {"planned_bytes": planned, "planned_ratio": planned / peak}


def bench_step(repeats: int, shape: dict[str, Any] = NARROW, rows: int = 8, length: int = 128) -> list[Row]:
    """A whole optimizer step, teacher and anchor included, and mlx-lm's own step on the same tokens."""
    found = []
    for blocks in (16, -1):
        settings = replace(
            resolve({}, {})[0].train, num_layers=blocks, iters=10**6, batch_size=rows, micro_batch_size=rows,
            grad_checkpoint="off",
        )  # fmt: skip
        model = random_model(**shape)
        mx.eval(model.parameters())
        ours = OurStep(model, settings, rows, length, shape["vocabulary"])
        ours()  # set-up and first step
        pairs = []
        for _ in range(repeats):
            theirs = their_steps(model, settings, rows, length, shape["vocabulary"], 2)
            pairs.append((measured(ours), theirs))
        row = compared(pairs)
        where = f"LoRA on {'the upper 16' if blocks > 0 else 'all'} of {shape['layers']} blocks"
        where += f" of width {shape['hidden']}"
        found.append(
            {
                "part": "step",
                "what": f"{where}, {rows} × {length} tokens; ours / mlx_lm.lora",
                **row,
                # Harmful prompts and the anchor's are passes of their own.
                **beside_plan(Passes(model, memory_shape(model)), settings, rows // 2, length, row["ours_bytes"]),
                "goal": 1.30 if blocks > 0 else 1.40,
                "work": work_of("step", shape, 32, rows, length, trained=blocks),
            }
        )
    return found


def bench_anchor(repeats: int, shape: dict[str, Any] = NARROW, prompt: int = 45) -> list[Row]:
    """An optimizer step by default settings, whose anchor's prompts were read before, and one that reads them anew."""
    recipe, found = resolve({}, {"guidance": 2.0, "grad_checkpoint": "off", "iters": 10**5})[0], []
    loss = replace(recipe.loss, first_tokens=recipe.tokens.horizon)
    length = prompt + rollout_tokens(recipe.train, loss)
    for n_blocks in (16, -1):
        model = random_model(**shape)
        mx.eval(model.parameters())
        ours, other = (
            OurStep(
                model, replace(recipe.train, num_layers=n_blocks, anchor_cache=kept), recipe.train.batch_size, length,
                shape["vocabulary"], loss, prompt,
            )
            for kept in ("on", "off")
        )  # fmt: skip
        for step in (ours, other):
            step()  # set-up, reading before, and first step
        found.append(
            {
                "part": "anchor",
                "what": f"{_named(shape)}, LoRA on {n_blocks if n_blocks > 0 else 'all'}, prompts of {prompt} tokens, "
                f"answers of {length - prompt}; the anchor's prompts read before / anew",
                **in_turns(ours, other, repeats),
            }
        )
    return found


def bench_compile(repeats: int, shape: dict[str, Any] = NARROW, rows: int = 8, length: int = 128) -> list[Row]:
    """The gradient of one batch, compiled for its lengths, and as training computes it; then by buckets of lengths."""
    model = random_model(**shape)
    student = make_student(model, replace(resolve({}, {})[0].train, num_layers=-1), 0)
    mx.eval(model.parameters(), student.parameters())
    prompts, answers = prompts_and_answers(rows, length, shape["vocabulary"])
    read, said = [p.ids for p in prompts], [a.ids for a in answers]
    targets, tokens = answer_states(model, read, said), mx.arange(50)
    each = mx.full((len(targets),), 1 / len(targets))
    mx.eval(targets, each)

    def objective(of: nn.Module, targets: mx.array) -> mx.array:
        own = Scored(answer_states(of, read, said), head(of))
        return localized_loss(own, Scored(targets, head(model)), each, tokens, Divergence(GROUPED, tokens))[0]

    plain = nn.value_and_grad(student, objective)
    state = [student.state, model.state, mx.random.state]
    compiled = mx.compile(lambda targets: plain(student, targets), inputs=state, outputs=state)
    first = measured(lambda: compiled(targets))[0]
    row = in_turns(lambda: compiled(targets), lambda: plain(student, targets), repeats)
    what = f"{shape['layers']} blocks of width {shape['hidden']}, {rows} × {length} tokens; compiled / as it is"
    found = [{"part": "compile", "what": what, **row, "first_call_seconds": first}]

    # By buckets: rows and positions padded to the longest that falls into one, so that a compiled graph serves many.
    def gradient(ids: mx.array, at: mx.array, targets: mx.array, weights: mx.array) -> Any:
        def objective(of: nn.Module) -> mx.array:
            states = hidden_states(of, ids)
            own = Scored(states.reshape(-1, states.shape[-1])[at], head(of))
            return localized_loss(own, Scored(targets, head(model)), weights, tokens, Divergence(GROUPED, tokens))[0]

        return nn.value_and_grad(student, objective)(student)

    lengths = [length - length // 8 * i for i in range(1, 4)]  # none as long as the bucket
    exact = [_batch(rows, n, n, shape) for n in lengths]
    padded = [_batch(rows, n, length, shape) for n in lengths]
    by_bucket = mx.compile(gradient, inputs=state, outputs=state)
    first = measured(lambda: by_bucket(*padded[0]))[0]
    row = in_turns(
        lambda: [_done(by_bucket(*b)) for b in padded], lambda: [_done(gradient(*b)) for b in exact], repeats
    )
    what = f"the same, {rows} × {', '.join(map(str, lengths))} tokens; compiled for {length}, padded / as it is"
    return [*found, {"part": "compile", "what": what, **row, "first_call_seconds": first}]


def _done(arrays: Any) -> mx.array:
    mx.eval(arrays)
    return mx.array(0)


def _batch(rows: int, length: int, width: int, shape: dict[str, Any]) -> list[mx.array]:
    """Rows of `length` tokens, half of them the answer's, padded to `width`: ids, positions, targets and weights."""
    drawn = np.random.default_rng(length).integers(1, shape["vocabulary"], (rows, length))
    ids, each = np.zeros((rows, width), np.int32), length - length // 2
    ids[:, :length] = drawn
    at = np.zeros((rows, width - width // 2), np.int32)
    at[:, :each] = np.arange(rows)[:, None] * width + np.arange(length - each - 1, length - 1)
    weights = np.zeros(at.shape, np.float32)
    weights[:, :each] = 1 / (rows * each)
    targets = mx.random.normal((at.size, shape["hidden"]), key=mx.random.key(0))
    made = [mx.array(ids), mx.array(at.ravel()), targets, mx.array(weights.ravel())]
    mx.eval(made)
    return made


def bundled(**changes: Any) -> Run:
    """A run of the bundled model with some settings changed; nothing is written, unless a folder is given."""
    base = load(BUNDLED)
    given = {"model": BUNDLED, "adapter_path": "/nowhere", **changes}
    return settled(make_run(resolve(base.config, given)[0], base, Screen(quiet=True)), 7)


def read_as_published(run: Run) -> tuple[Any, tuple[Any, Any], list[int], dict[str, Any]]:
    """Mean differences, the prompts that they are scored on, openers and limits: all of prompts answered as meant."""
    base, prompts, s = run.base, run.prompts, run.recipe.direction
    openers = [*directions.find_openers(run).openers.values()]
    limits = {"kl_threshold": s.kl_threshold, "steering_threshold": s.steering_threshold, "prune_last": s.prune_last}

    kept = partial(directions.filter_by_refusal_score, base.model, refusal_ids=openers)
    found = directions.mean_differences(
        base.model, *kept(prompts.harmful_direction_train, prompts.harmless_direction_train), prompts.n_eoi
    )
    scoring = kept(prompts.harmful_direction_validation, prompts.harmless_direction_validation)
    return found, scoring, openers, limits


def published_search(**changes: Any) -> Callable[[bool], tuple[int, tuple[int, int]]]:
    """The search for the published choice on the bundled model, alone: search(exhaustive) -> block passes, choice."""
    run = bundled(**changes)
    base = run.base
    found, scoring, openers, limits = read_as_published(run)

    def search(exhaustive: bool) -> tuple[int, tuple[int, int]]:
        with counted_passes() as passes:
            scores = directions.score_candidates(base.model, found, *scoring, openers, exhaustive, **limits)
        return sum(passes), directions.choose_direction(scores, **limits)

    return search


@contextmanager
def counted_passes() -> Iterator[list[int]]:
    """The block passes of searches while it holds: blocks run, times prompts, on a model that resumes."""
    passes: list[int] = []
    search = directions.search

    def counted(ask: directions.Ask, blocks: Callable[[list[int]], int]) -> directions.Ask:
        def asked(pairs: list[directions.Candidate], prompts: list[int]) -> np.ndarray:
            passes.append(blocks([layer for _, layer in pairs]) * len(prompts))
            return ask(pairs, prompts)

        return asked

    def counting(moved, own, scorers, batches, how):
        n, (n_harmless, n_harmful) = moved.shape[1], (sum(map(len, part)) for part in batches)
        # The base's own logits, whether it resumes, and what it refuses where a vector has no length.
        passes.append((n_harmless + 3 + (0 if moved.all() or how.only else n_harmful)) * n)
        scorers = replace(
            scorers,
            steering=counted(scorers.steering, lambda layers: max(layers) + sum(n - layer for layer in layers)),
            kl=counted(scorers.kl, lambda layers: n * len(layers)),
            refusal=counted(scorers.refusal, lambda layers: n * len(layers)),
        )
        return search(moved, own, scorers, batches, how)

    with patch.object(directions, "search", counting):
        yield passes


def bench_direction(repeats: int) -> list[Row]:
    """The search for the bundled model's direction, and the same with every candidate measured in full."""
    search, results = published_search(**PUBLISHED), {}

    def work(exhaustive: bool) -> list[mx.array]:
        results[exhaustive] = search(exhaustive)
        return []

    row = in_turns(lambda: work(False), lambda: work(True), repeats)
    assert results[False][1] == results[True][1], "the two searches chose differently"
    passes = {"ours_block_passes": results[False][0], "other_block_passes": results[True][0]}
    return [{"part": "direction", "what": "bundled model; ours / published order", **row, **passes}]


def bench_search(repeats: int) -> list[Row]:
    """Directions and teacher as `align` finds them, beside the search for the published choice alone.

    Ours has more to do: it reads how the model refuses, and asks teachers for answers. Block passes are those over
    whole prompts; what drawing answers takes is in the seconds, and their number is said.
    """
    run, done = bundled(), {}
    published = {
        "as many prompts": published_search(steering_threshold=PUBLISHED["steering_threshold"]),
        f"{PUBLISHED['direction_validation']} prompts of each kind": published_search(**PUBLISHED),
    }

    def ours() -> list[mx.array]:
        with counted_passes() as passes:
            found = directions.find_directions(run)
        chosen = find_teacher(run, found)
        answers = len(run.prompts.harmful_direction_train) + len(run.prompts.harmless_direction_train)
        asked = 1 + sum(trial.refused is not None for trial in chosen.trials)  # the base, too
        done["answers"] = answers + asked * (len(chosen.base.harmful) + len(chosen.base.harmless))
        done["ours"] = sum(passes) + trial_passes(run, chosen.trials)
        return []

    def other(name: str) -> list[mx.array]:
        done[name], _ = published[name](False)
        return []

    rounds = [
        [measured(ours), *(measured(lambda name=name: other(name)) for name in published)] for _ in range(repeats)
    ]
    rows = []
    for i, name in enumerate(published, 1):
        what = f"bundled model, {done['answers']} answers; directions and teacher / the published choice on {name}"
        row = compared([(took[0], took[i]) for took in rounds])
        passes: Row = {"ours_block_passes": done["ours"], "other_block_passes": done[name]}
        passes["block_passes_ratio"] = done["ours"] / done[name]
        rows.append({"part": "search", "what": what, **row, **passes})
    return rows


def trial_passes(run: Run, trials: list[teachers.TeacherTrial]) -> int:
    """Block passes of the trials' forward passes: those of the grid share what comes before the block they steer."""
    n_layers, rows = len(run.base.model.layers), (run.prompts.harmful_validation, run.prompts.harmless_validation)
    harmful, harmless = (min(n, len(of)) for n, of in zip(teachers.FIRST_PASSES, rows, strict=True))
    grid, total = set(run.recipe.teacher.coeff_grid), 0
    by_direction: dict[tuple[int, int], list[float]] = {}
    for trial in trials:
        if trial.harmful_opened is not None:
            by_direction.setdefault((trial.position, trial.layer), []).append(trial.coeff)
    for (_, layer), coeffs in by_direction.items():
        for count in (sum(c in grid for c in coeffs), *(1 for c in coeffs if c not in grid)):
            # The base up to the block, the rest with each coefficient; and the base on harmless prompts, for the KL.
            total += (harmful + harmless) * (layer + count * (n_layers - layer)) + harmless * n_layers
    return total


def bench_rollouts(repeats: int, tokens: int = 64) -> list[Row]:
    """Answers drawn: ours, mlx-lm's batch_generate on the same prompts, and one prompt at a time."""
    run = bundled()
    base, prompts = run.base, run.prompts.harmful_validation
    larger = random_model(**NARROW | {"vocabulary": base.vocabulary})
    mx.eval(larger.parameters())
    return [
        *rollouts("bundled model", base.model, base, prompts[:32], tokens, repeats, alone=True),
        *rollouts("28 blocks of width 512", larger, base, prompts[:16], tokens, repeats),
    ]


def rollouts(
    name: str, model: nn.Module, base: Loaded, prompts: Any, tokens: int, repeats: int, alone: bool = False
) -> list[Row]:
    """As many tokens for each prompt, ours / batch_generate, and / one prompt at a time."""
    keys = [stream_key(0, i) for i in range(len(prompts))]

    def ours(size: int = len(prompts)) -> list[mx.array]:
        # No end of turn, so that all draw as many tokens.
        generate(model, prompts, Sampling([], tokens, 1.0, batch_size=size), keys)
        return []

    def theirs() -> list[mx.array]:
        _batch_generate(model, base, prompts, tokens, len(prompts))
        return []

    ours(), theirs()
    what = f"{name}, {len(prompts)} answers of {tokens} tokens; ours / "
    found: list[Row] = [{"part": "rollouts", "what": what + "batch_generate", **in_turns(ours, theirs, repeats)}]
    if alone:
        row = in_turns(ours, lambda: ours(1), max(1, repeats // 2))
        found.append({"part": "rollouts", "what": what + "one at a time", **row})
    return found


def _batch_generate(model: nn.Module, base: Loaded, prompts: list[list[int]], tokens: int, rows: int) -> None:
    from mlx_lm.generate import batch_generate
    from mlx_lm.sample_utils import make_sampler

    kept = set(base.tokenizer.eos_token_ids)
    base.tokenizer.eos_token_ids = {base.vocabulary - 1}
    batch_generate(
        model, base.tokenizer, [list(p) for p in prompts], max_tokens=tokens, sampler=make_sampler(1.0),
        completion_batch_size=rows, prefill_batch_size=rows,
    )  # fmt: skip
    base.tokenizer.eos_token_ids = kept


def published_tokens(base: nn.Module, teacher: nn.Module, rows: Any, drawn: list[Completion], count: int) -> mx.array:
    """The tokens that steering favours most, told by the logits of all sequences at once."""
    whole = pad_right([[*row, *c.ids] for row, c in zip(rows, drawn, strict=True)])
    both = [mx.log(mx.softmax(of(whole).astype(mx.float32), axis=-1)) for of in (base, teacher)]
    tokens = mx.argsort(-(both[1] - both[0]).mean((0, 1)))[:count]
    mx.eval(tokens)
    return tokens


def published_step(
    student: nn.Module, base: nn.Module, teacher: nn.Module, optimizer: Any, tokens: mx.array,
    batch: list[TrainingPrompt], harmful: int, max_tokens: int, eos_ids: list[int],
) -> None:  # fmt: skip
    """One optimizer step on a batch whose first `harmful` prompts are harmful ones, by whole logits."""
    read = [p.ids for p in batch]
    keys = [stream_key(0, i) for i in range(len(batch))]
    drawn = generate(student, read, Sampling(eos_ids, max_tokens, 1.0, batch_size=64), keys)
    whole = pad_right([[*row, *c.ids] for row, c in zip(read, drawn, strict=True)])
    mask = np.zeros(whole.shape)
    for i, (row, c) in enumerate(zip(read, drawn, strict=True)):
        mask[i, len(row) - 1 : len(row) + len(c.ids) - 1] = 1
    target = mx.concatenate([teacher(whole[:harmful]), base(whole[harmful:])]).astype(mx.float32)

    def loss(of: nn.Module) -> mx.array:
        logits = of(whole).astype(mx.float32)
        return distillation_loss(logits, target, mx.array(mask), tokens=tokens, kind="grouped_reverse_kl")

    student.train()
    _, gradient = nn.value_and_grad(student, loss)(student)
    student.eval()
    optimizer.update(student, gradient)
    mx.eval(student.parameters(), optimizer.state)


def published_run(n_prompts: int) -> None:
    """A plain port of the published order: every candidate in full, logits of whole batches, nothing shared."""
    run = bundled(**PUBLISHED)
    recipe, base, model = run.recipe, run.base, run.base.model
    found, scoring, openers, limits = read_as_published(run)
    scores = directions.score_candidates(model, found, *scoring, openers, True)
    position, layer = directions.choose_direction(scores, **limits)
    vector = mx.array(found[position, layer].astype(np.float32))
    teacher = steered_teacher(model, layer, vector, PRESETS["paper"]["coeff"]).model
    m, horizon = recipe.tokens.token_samples, recipe.tokens.horizon
    rows = [row for row in scoring[1] for _ in range(m)]
    keys = [stream_key(0, i) for i in range(len(rows))]
    drawn = generate(teacher, rows, Sampling(base.eos_ids, horizon - 1, 1.0, batch_size=64), keys)
    tokens = published_tokens(model, teacher, rows, drawn, recipe.tokens.safety_tokens)
    student = make_student(model, recipe.train, 0)
    optimizer = make_optimizer(recipe.train)
    harmful, anchors = training_prompts(run)
    steps = number_of_steps(n_prompts, recipe.train, recipe.loss)
    rng = np.random.default_rng(0)
    half = recipe.train.batch_size // 2
    for _ in range(steps):
        batch = [harmful[i] for i in rng.integers(0, len(harmful), half)]
        batch += [anchors[i] for i in rng.integers(0, len(anchors), half)]
        published_step(student, model, teacher, optimizer, tokens, batch, half, recipe.train.max_tokens, base.eos_ids)


def our_run(n_prompts: int) -> None:
    """Ours, up to the trained student: all epochs over as many harmful prompts, whenever it has learned."""
    with tempfile.TemporaryDirectory() as folder:
        run = bundled(save_every=10**5, grad_checkpoint="off", adapter_path=folder)
        student = make_student(run.base.model, run.recipe.train, 0)
        found = directions.find_directions(run)
        chosen = find_teacher(run, found)
        teacher = make_teacher(run, chosen.direction, chosen.coeff)
        run = settled(run, chosen.opening)
        tokens = find_tokens(run, teacher, found)
        run, _ = what_to_learn(run, teacher, tokens)
        prompts = tuple(rows[:n_prompts] for rows in training_prompts(run))
        training.train_student(run, training.make_training(run, student, teacher, tokens, prompts, None))


def random_prompts(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(1, vocabulary, (count, length)).tolist()


def shape_run(ours: bool, shape: dict[str, Any]) -> None:
    """Every stage once on random weights and prompts, ours or in the published order, to a student of two steps."""
    model = random_model(**shape)
    mx.eval(model.parameters())
    vocabulary, openers, steps = shape["vocabulary"], [10, 20, 30], 2
    harmful, harmless = (random_prompts(8, 16, vocabulary, which) for which in (0, 1))
    found = directions.mean_differences(model, harmful, harmless, 3)
    # No random weights pass the published thresholds: half of the candidates raise refusal, that is the test here.
    limits: Row = {
        "kl_threshold": None,
        "steering_threshold": float(directions.refusal_scores(model, harmless, openers).mean()),
        "prune_last": 0.2,
    }
    scores = directions.score_candidates(model, found, harmful, harmless, openers, not ours, **limits)
    position, layer = directions.choose_direction(scores, **limits)
    teacher = steered_teacher(model, layer, mx.array(found[position, layer].astype(np.float32)), 1.0)
    rows = [row for row in harmless for _ in range(2)]
    keys = [stream_key(0, i) for i in range(len(rows))]
    drawn = generate(teacher.model, rows, Sampling([], 6, 1.0, batch_size=64), keys)
    if ours:
        options: Row = {"eot_ids": [], "banned_ids": [], "inner_top_k": 50, "min_steered_prob": 0.0}
        answers = [c.ids for c in drawn]
        contrast = contrast_tokens(model, teacher.model, rows, answers, shared_blocks=teacher.shared_blocks, **options)
        tokens = mx.array(select_tokens(contrast, 50))
    else:
        tokens = published_tokens(model, teacher.model, rows, drawn, 50)
    settings = replace(
        resolve({}, {})[0].train, iters=steps, batch_size=8, micro_batch_size=2, max_tokens=32, grad_checkpoint="off"
    )
    student = make_student(model, settings, 0)
    optimizer = make_optimizer(settings)
    prompts = [TrainingPrompt(ids, ids, kind) for kind in (True, False) for ids in (harmful if kind else harmless)]
    if ours:
        how = (settings, resolve({}, {"first_tokens": 0, "guidance": 1.0})[0].loss, [], 0, optimizer)
        for _ in training.train(Training(student, model, teacher, tokens, prompts[:8], prompts[8:], *how)):
            pass
    else:
        for _ in range(steps):
            batch = prompts[:4] + prompts[8:12]
            published_step(student, model, teacher.model, optimizer, tokens, batch, 4, settings.max_tokens, [])


def _bundled_run(ours: bool, n_prompts: int) -> None:
    (our_run if ours else published_run)(n_prompts)


def _measure_alone(work: Callable[..., None], ours: bool, argument: Any, weights: int) -> tuple[float, int]:
    began = time.perf_counter()
    work(ours, argument)
    return time.perf_counter() - began, mx.get_peak_memory() - weights


def alone(work: Callable[..., None], ours: bool, argument: Any, weights: int) -> tuple[float, int]:
    """work(ours, argument) in a fresh process: seconds, and peak bytes above the weights'."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_alone, work, ours, argument, weights).result()


def runs(work: Callable[..., None], argument: Any, weights: int, repeats: int) -> Row:
    """Ours and the published order in turns, each in a process of its own."""
    ours, other = (lambda kind=kind: alone(work, kind, argument, weights) for kind in (True, False))
    return compared([(ours(), other()) for _ in range(repeats)])


def weight_bytes(model: nn.Module) -> int:
    return sum(value.nbytes for _, value in tree_flatten(model.parameters()))


def bench_run(repeats: int, n_prompts: int = 100) -> list[Row]:
    """The whole run of the bundled model: ours, and the published order ported plainly."""
    what = f"bundled model, {n_prompts} prompts, to the trained student; ours / published order"
    run = bundled()
    recipe, base = run.recipe, run.base
    row = runs(_bundled_run, n_prompts, weight_bytes(base.model), max(1, repeats // 2))
    planned = plan(recipe, Passes(base.model, read_shape(base.path)), this_machine(), longest_prompt(recipe))
    above = planned.peak - planned.weights
    return [{"part": "run", "what": what, **row, "planned_bytes": above, "planned_ratio": above / row["ours_bytes"]}]


def bench_growth(repeats: int) -> list[Row]:
    """How a run's seconds and peak grow with prompts, and a step's with rows, length, vocabulary and depth."""
    small = {"hidden": 256, "intermediate": 704, "layers": 8, "heads": 8, "kv_heads": 2, "vocabulary": 8000}
    found = []
    weights = weight_bytes(load(BUNDLED).model)
    for count in (25, 50, 100):
        seconds, peak = alone(_bundled_run, True, count, weights)
        what = f"whole run, {count} prompts"
        found.append({"part": "growth", "what": what, "ours_seconds": seconds, "ours_bytes": peak})
    for name, values in (
        ("rows", (4, 8, 16)),
        ("completion", (64, 256, 512)),
        ("vocabulary", (8000, 32_000, 128_000)),
        ("layers", (8, 16, 32)),
    ):
        for value in values:
            rows, length, shape = 4, 64, dict(small)
            if name == "rows":
                rows = value
            elif name == "completion":
                length = 2 * value  # a prompt as long as the completion
            else:
                shape[name] = value
            model = random_model(**shape)
            mx.eval(model.parameters())
            settings = replace(
                resolve({}, {})[0].train, iters=10**6, batch_size=rows, micro_batch_size=rows, grad_checkpoint="off"
            )
            step = OurStep(model, settings, rows, length, shape["vocabulary"])
            step()
            took = [measured(step) for _ in range(repeats)]
            found.append(
                {
                    "part": "growth",
                    "what": f"{name} {value}",
                    "ours_seconds": statistics.median(t for t, _ in took),
                    "ours_bytes": max(b for _, b in took),
                }
            )
    return found


def four_bit_step(length: int, shape: dict[str, Any]) -> list[Row]:
    """One row of half prompt, half completion through a training step, and what the plan says."""
    model = quantized_model(**shape)
    weights = mx.get_active_memory()
    settings = replace(resolve({}, {})[0].train, iters=10**6, batch_size=1, micro_batch_size=1, grad_checkpoint="on")
    prompts, answers = prompts_and_answers(2, length, shape["vocabulary"])
    student = make_student(model, settings, 0)
    teacher = steered_teacher(model, shape["layers"] // 2, mx.random.normal((shape["hidden"],)), 1.0)
    tokens = mx.arange(50)
    mx.eval(student.parameters())
    student.train()
    optimizer = make_optimizer(settings)
    optimizer.init(student.trainable_parameters())
    mx.eval(optimizer.state)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    began = time.perf_counter()
    target = answer_states(teacher.model, [prompts[0].ids], [answers[0].ids])
    mx.eval(target)

    def objective(of: nn.Module) -> mx.array:
        states = answer_states(of, [prompts[0].ids], [answers[0].ids])
        each = mx.full((len(states),), 1 / len(states))
        scored = Scored(target, head(model))
        return localized_loss(Scored(states, head(of)), scored, each, tokens, Divergence(GROUPED, tokens))[0]

    value, gradient = nn.value_and_grad(student, objective)(student)
    optimizer.update(student, gradient)
    mx.eval(value, student.trainable_parameters(), optimizer.state)
    seconds, peak = time.perf_counter() - began, mx.get_peak_memory() - before
    config = vars(model.args) | {"quantization": {"bits": 4, "group_size": 64}}
    passes = Passes(model, memory_shape(model, config))
    return [
        {
            "part": "step",
            "what": f"{_named(shape)}, 4-bit, 1 × {length} tokens, checkpointed; weights {weights / 1e9:.2f} GB",
            "ours_seconds": seconds,
            "ours_bytes": peak,
            "whole_bytes": before + peak,
            **beside_plan(passes, settings, 1, length, peak),
            "loss": value.item(),
            "work": work_of("step", shape, FOUR_BIT, 1, length, checkpointed=True),
        }
    ]


def four_bit_rollouts(length: int, shape: dict[str, Any]) -> list[Row]:
    """Eight answers, as long as their prompts: ours, and batch_generate's, once."""
    model = quantized_model(**shape)
    return random_rollouts(f"{_named(shape)}, 4-bit", model, shape, FOUR_BIT, length, 1)


def random_rollouts(
    name: str, model: nn.Module, shape: dict[str, Any], bits: float, length: int, repeats: int
) -> list[Row]:
    """Eight answers of random weights: ours, and batch_generate's."""
    base = load(BUNDLED)  # for its tokenizer alone
    found = rollouts(name, model, base, random_prompts(8, length // 2, 1000, 0), length - length // 2, repeats)
    return [row | {"work": work_of("rollouts", shape, bits, 8, length)} for row in found]


def large_rollouts(repeats: int, shape: dict[str, Any] = QWEN_05B) -> list[Row]:
    """Eight answers of 16 tokens."""
    model = random_model(**shape)
    mx.eval(model.parameters())
    return random_rollouts(_named(shape), model, shape, 32, 32, repeats)


def large_run(repeats: int, shape: dict[str, Any] = QWEN_05B) -> list[Row]:
    """Every stage on random weights, in small: ours, and the published order ported plainly."""
    what = f"{_named(shape)}, every stage in small, 2 steps; ours / published order"
    return [
        {
            "part": "run",
            "what": what,
            **runs(shape_run, shape, weight_bytes(random_model(**shape)), max(1, repeats // 2)),
        }
    ]


def large_step(repeats: int, shape: dict[str, Any] = QWEN_05B) -> list[Row]:
    """As `bench_step`, on fewer tokens."""
    return bench_step(repeats, shape, 4, 64)


def _named(shape: dict[str, Any]) -> str:
    return f"{shape['layers']} blocks of width {shape['hidden']}, V {shape['vocabulary']:,}"


FOUR_BIT_SHAPES = {"llama-3.2-3b": LLAMA_3B, "qwen3-4b": QWEN3_4B, "qwen2.5-7b": QWEN_7B}

# By shape; each takes how often to measure, but those in 4 bits, which are measured once: how many tokens.
PARTS: dict[str, dict[str, Callable[[int], list[Row]]]] = {
    "bundled": {
        "direction": bench_direction,
        "search": bench_search,
        "loss": bench_loss,
        "step": bench_step,
        "anchor": bench_anchor,
        "compile": bench_compile,
        "rollouts": bench_rollouts,
        "run": bench_run,
        "growth": bench_growth,
    },
    "qwen2.5-0.5b": {"rollouts": large_rollouts, "run": large_run, "step": large_step},
    **{
        name: {"step": partial(four_bit_step, shape=shape), "rollouts": partial(four_bit_rollouts, shape=shape)}
        for name, shape in FOUR_BIT_SHAPES.items()
    },
}


def _said(*command: str) -> str | None:
    """What a command says, if there is one."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def facts() -> Row:
    """What was measured with; nothing that tells who measured."""
    packages = ("mlx", "mlx-metal", "mlx-lm", "safesteer-mlx")
    return {
        "machine": _said("sysctl", "-n", "hw.model") or platform.machine(),
        "chip": _said("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
        "macos": platform.mac_ver()[0] or None,
        "python": platform.python_version(),
        "device": str(mx.default_device()),
        **{name: _version(name) for name in packages},
        "commit": _said("git", "describe", "--always", "--dirty", "--exclude=*"),
    }


def planned() -> list[str]:
    """Markdown: for each shape that is measured in 4 bits, what Apple's chips could do at best."""
    lines, recipe = [], resolve({}, {"model": "org/model"})[0]
    for name, shape in FOUR_BIT_SHAPES.items():
        works = {
            "step of 1 × 128 tokens": work_of("step", shape, FOUR_BIT, 1, 128, checkpointed=True),
            "8 answers of 64 tokens": work_of("rollouts", shape, FOUR_BIT, 8, 128),
        }
        lines += [f"{name}, 4-bit, computed:", "", *table(shape, recipe, works), ""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="bundled", choices=PARTS, help="of the model; the large ones are random")
    parser.add_argument("--only", help="some parts, joined by commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="of a row in 4 bits, half of them the prompt's")
    parser.add_argument("--out", type=Path, help="(default: bench.json; with --contribute figures.json)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--contribute", action="store_true", help="measure, and write the file that an issue asks for")
    instead.add_argument("--planned", action="store_true", help="print what Apple's chips could do at best; no more")
    instead.add_argument("--against", type=Path, metavar="FILE", help="a bench.json beside that; no more")
    instead.add_argument("--counts", action="store_true", help="count what a training step asks of MLX; no more")
    args = parser.parse_args()
    if args.planned:
        print("\n".join(planned()))
        return
    screen = Screen()
    if args.against is not None:
        _show_against(args.against, screen)
        return
    if args.counts:
        rows = [row for shape in (TINY, NARROW) for row in bench_counts(shape)]
        screen.table("A training step of 32 answers, 15 tokens each", ["", *COUNTED], rows)
        head = ["completions in one pass, at most", "passes a step", "tokens, padded / real"]
        screen.table("The bundled run's batches", head, bench_padding())
        return
    parts = PARTS[args.shape]
    wanted = args.only.split(",") if args.only else list(parts)
    if unknown := set(wanted) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))} of {args.shape}; choose {', '.join(parts)}")
    out = args.out or Path("figures.json" if args.contribute else "bench.json")
    command = {"shape": args.shape, "parts": wanted, "repeats": args.repeats, "tokens": args.tokens}
    rows, where = [], facts()
    for name in wanted:
        for row in parts[name](args.tokens if args.shape in FOUR_BIT_SHAPES else args.repeats):
            rows.append(row)
            screen.line("; ".join(part for part in _cells(row) if part))
            out.write_text(json.dumps({**where, **command, "rows": rows}, indent=2) + "\n")
    head = ["", "seconds (ratio)", "peak, MB (ratio)", "block passes", "plan / peak"]
    screen.table("Ours / the other", head, [_cells(row) for row in rows])
    if where["chip"] in CHIPS and any("work" in row for row in rows):
        _show_against(out, screen)
    screen.line(f"all of it: {out}")
    if args.contribute:
        screen.line('paste it into an issue of the kind "Figures from a Mac"; it names no user, host or folder')


def _show_against(path: Path, screen: Screen) -> None:
    head = ["", "at best, seconds, computed", "measured", "efficiency"]
    screen.table("Measured beside the chip's bound", head, held_against(path))


def _cells(row: Row) -> list[str]:
    """A row of the table: what was measured, then what came out, empty where it was not measured."""

    def both(name: str, unit: float) -> str:
        found = [row[key] / unit for who in ("ours", "other") if (key := f"{who}_{name}") in row]
        ratio = f" ({row[f'{name}_ratio']:.2f})" if f"{name}_ratio" in row else ""
        return " / ".join(f"{value:,.{2 if value < 10 else 0}f}" for value in found) + ratio

    plan = f"{row['planned_ratio']:.2f}" if "planned_ratio" in row else ""
    return [f"{row['part']}: {row['what']}", both("seconds", 1), both("bytes", 1e6), both("block_passes", 1), plan]


if __name__ == "__main__":
    sys.exit(exit_code(main))
