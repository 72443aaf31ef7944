"""Compare ways of aligning the bundled model: the same student, prompts, steps and seeds for each.

    python scripts/compare.py                                   the README's table and figure
    python scripts/compare.py --variant "rank 4: lora_parameters={rank: 4}" --variant "mean: token_method=mean"

For each seed: stages 1 to 3 as `align` runs them, each variant's training, the held-out scores. During
training the sampled refusals of held-out harmful prompts and the drift outside the safety tokens are
measured every few steps. Writes `results.json` and, from it, `table.md` and `drift.png`.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from safesteer_mlx.evals.heldout import HeldOut, TestSet, drift, held_out_prompts
from safesteer_mlx.evals.scores import HOW
from safesteer_mlx.method.direction import find_directions
from safesteer_mlx.method.judge import is_refusal
from safesteer_mlx.method.learning import course, what_to_learn
from safesteer_mlx.method.prompts import Instruction, instructions_to_train_on, prompt_sets, render, render_all
from safesteer_mlx.method.rollout import Sampling, generate
from safesteer_mlx.method.run import Run, make_run
from safesteer_mlx.method.safety_tokens import SafetyTokens, find_tokens
from safesteer_mlx.method.student import make_student
from safesteer_mlx.method.teacher import ChosenTeacher, Teacher, find_teacher, make_teacher, settled
from safesteer_mlx.method.train import StepMetrics, make_training, train
from safesteer_mlx.method.training_prompts import TrainingPrompt, training_prompts
from safesteer_mlx.recipe import BUNDLED, HELD_OUT_TOKENS, MODELS, SECTIONS, Recipe, number_of_steps, resolve
from safesteer_mlx.system.load import Loaded, load
from safesteer_mlx.system.model_files import read_object
from safesteer_mlx.system.screen import Screen

SFT = "SFT on 100 refusals"
VARIANTS: dict[str, dict[str, Any]] = {
    "student": {},
    "full vocabulary": {"loss_tokens": "full"},
    "published loss": {"loss": "reverse_kl", "anchor_ratio": 0.0, "first_tokens": 0, "guidance": 1.0},
    SFT: {},
}
MODEL = MODELS / BUNDLED
SAFE = "You are a careful assistant. Refuse harmful requests."

Measure = Callable[[int], None]


def settings(seed: int, changes: dict[str, Any]) -> Recipe:
    """The bundled model's recipe with some settings changed; nothing is written to its folder."""
    given = {"model": str(MODEL), "seed": seed, "adapter_path": "/nowhere", **changes}
    return resolve(read_object(MODEL / "config.json"), given)[0]


def refusal_examples(
    base: Loaded, harmful: list[TrainingPrompt], items: list[Instruction]
) -> list[tuple[list[int], int]]:
    """Each harmful training prompt with a refusal of the model's own: (ids, where the answer begins).

    The refusal is its greedy answer, or where that complies, its answer under a safety system prompt, so
    that fine-tuning teaches nothing but to refuse. A prompt that neither refuses is left out.
    """
    guarded = [render(base.tokenizer, item.text, SAFE) for item in items]
    found = []
    answers = (generate(base.model, rows, Sampling(base.eos_ids, 64)) for rows in ([p.ids for p in harmful], guarded))
    for prompt, *both in zip(harmful, *answers, strict=True):
        chosen = next((a for a in both if a.finished and is_refusal(a.text(base.tokenizer))), None)
        if chosen is not None:
            found.append(([*prompt.ids, *chosen.ids], len(prompt.ids)))
    return found


def fine_tune(student: Any, examples: list[tuple[list[int], int]], recipe: Recipe, measure: Measure) -> None:
    """Plain fine-tuning by mlx-lm's own trainer, with our optimizer and schedule."""
    import mlx.core as mx
    import mlx.optimizers as optim
    import numpy as np
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs
    from mlx_lm.tuner.trainer import train as train_sft

    settings, steps = recipe.train, recipe.train.iters or 1
    run = course(steps, settings)
    rates = mx.array([run.rate(step, settings.learning_rate) for step in range(steps)] + [0.0])

    class Report(TrainingCallback):
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            measure(info["iteration"])
            student.train()

    np.random.seed(recipe.run.seed)  # mlx-lm draws its batches from numpy's global stream
    with tempfile.TemporaryDirectory() as folder:
        train_sft(
            student,
            optim.AdamW(learning_rate=lambda step: rates[step], weight_decay=settings.weight_decay),
            examples,
            args=TrainingArgs(
                batch_size=settings.batch_size,
                iters=steps,
                steps_per_report=1,
                max_seq_length=settings.max_prompt_length,
                adapter_file=str(Path(folder) / "adapters.safetensors"),
            ),
            training_callback=Report(),
        )
    student.eval()


@dataclass(frozen=True)
class Prepared:
    """What stages 1 to 3 found at one seed, and what scores on the held-out prompts."""

    run: Run
    chosen: ChosenTeacher
    teacher: Teacher
    tokens: SafetyTokens
    held_out: HeldOut


def prepare(recipe: Recipe, base: Loaded, screen: Screen) -> Prepared:
    """Stages 1 to 3."""
    run = make_run(recipe, base, screen)
    found = find_directions(run)
    chosen = find_teacher(run, found)
    teacher = make_teacher(run, chosen.direction, chosen.coeff)
    tokens = find_tokens(settled(run, chosen.opening), teacher, found)
    sets, n = run.prompts.sets, recipe.run.test_prompts
    sampling = Sampling(base.eos_ids, HELD_OUT_TOKENS, batch_size=64)
    test = TestSet(*held_out_prompts(sets, n))
    return Prepared(run, chosen, teacher, tokens, HeldOut(base, test, tokens.ids.tolist(), recipe.run.seed, sampling))


def train_variant(name: str, run: Run, prepared: Prepared, every: int) -> dict[str, Any]:
    """One variant at one seed: its scores, and the curve of refusals and drift while it trained."""
    recipe, base, held_out = run.recipe, run.base, prepared.held_out
    student = make_student(base.model, recipe.train, recipe.run.seed, base.quantized)
    prompts = training_prompts(run)
    steps = number_of_steps(len(prompts[0]), recipe.train, recipe.loss)
    rows = render_all(base.tokenizer, held_out.test.kinds["harmful"])
    curve: list[dict[str, float]] = []

    def measure(step: int) -> None:
        if every and (step % every == 0 or step == steps):
            streams = [stream for stream in held_out.streams(len(rows), 0) if stream is not None]
            refused = sum(is_refusal(text) for text, _ in held_out.draw(student, rows, streams))
            over_all, outside = drift(base.model, student, held_out.texts, held_out.tokens)
            curve.append({"step": step, "refused": refused, "drift": over_all, "drift_outside": outside})

    started = time.time()
    if name == SFT:
        items = instructions_to_train_on(recipe, run.prompts.sets, harmful=True)
        fine_tune(student, refusal_examples(base, prompts[0], items), recipe, measure)
    else:
        for event in train(make_training(run, student, prepared.teacher, prepared.tokens, prompts, None)):
            if isinstance(event, StepMetrics):
                measure(event.step)
    seconds = round(time.time() - started, 1)
    who = f"{name}, seed {recipe.run.seed}"
    return {"steps": steps, "curve": curve, "seconds": seconds, **score(who, student, prepared)}


def score(who: str, model: Any, prepared: Prepared) -> dict[str, Any]:
    """The held-out scores, which are also printed."""
    scores = prepared.held_out.score(model)
    refused = "; ".join(
        f"{kind} " + " ".join(str(scores.count(kind, how, "refuse")) for how in HOW) for kind in scores.kinds
    )
    right = sum(map(sum, scores.correct.values()))
    prepared.run.screen.line(
        f"{who}: {refused}; capability {right}; drift {scores.drift:.5f}, outside S {scores.drift_outside:.5f}"
    )
    return {"scores": scores.as_json()}


def compare(seeds: Iterable[int], variants: dict[str, dict[str, Any]], every: int, screen: Screen) -> dict[str, Any]:
    """Every variant at every seed, {seed: {variant: …}}, with the base and the first variant's teacher."""
    base = load(str(MODEL))
    ours = settings(0, {})
    prompts = instructions_to_train_on(ours, prompt_sets(ours), harmful=True)
    iters = number_of_steps(len(prompts), ours.train, ours.loss)
    results: dict[str, Any] = {}
    for seed in seeds:
        by_settings: dict[str, Prepared] = {}
        scored = results[str(seed)] = {}
        for name, changes in variants.items():
            # As many steps for all, also where a batch holds no anchor; none ends when it has learned.
            same_steps = {} if {"epochs", "iters"} & set(changes) else {"iters": iters}
            recipe = settings(seed, changes | same_steps)
            key = repr((recipe.direction, recipe.teacher, recipe.tokens))
            if key not in by_settings:
                by_settings[key] = prepare(recipe, base, screen)
            prepared = by_settings[key]
            run = settled(replace(prepared.run, recipe=recipe), prepared.chosen.opening)
            run, _ = what_to_learn(run, prepared.teacher, prepared.tokens)
            if not scored:
                scored["base"] = score("base", base.model, prepared)
                scored["teacher"] = {
                    "layer": prepared.chosen.direction.layer,
                    "position": prepared.chosen.direction.position,
                    "coeff": prepared.chosen.coeff,
                    "tokens": [row["token"] for row in prepared.tokens.rows],
                    **score("teacher", prepared.teacher.model, prepared),
                }
            scored[name] = {"changes": changes, "coeff": prepared.chosen.coeff}
            scored[name] |= train_variant(name, run, prepared, every)
    return results


def _counts(cells: list[dict[str, int]]) -> str:
    total = {c["total"] for c in cells}
    return " / ".join(str(c["count"]) for c in cells) + f" of {total.pop()}"


def refusals(scores: dict[str, Any], kind: str, how: str) -> dict[str, int]:
    """The refusals among a model's answers."""
    outcomes = scores["outcomes"][kind][how]
    return {"count": outcomes["refuse"], "total": sum(outcomes.values())}


def table(results: dict[str, Any]) -> str:
    """A Markdown table, a column for each model; counts of all seeds side by side."""
    seeds = list(results)
    names = list(results[seeds[0]])
    scores = {name: [results[s][name]["scores"] for s in seeds] for name in names}
    lines = [f"| seeds {', '.join(seeds)} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]

    def row(label: str, cell: Callable[[list[Any]], str]) -> None:
        lines.append(f"| {label} | {' | '.join(cell(scores[name]) for name in names)} |")

    for kind in ("harmful", "harmless", "borderline"):
        for how in ("greedy", "sampled"):
            row(f"{kind} refused, {how}", lambda all_, k=kind, h=how: _counts([refusals(s, k, h) for s in all_]))
    row(
        "capability, exact matches",
        lambda all_: _counts(
            [{f: sum(c[f] for c in s["capability"].values()) for f in ("count", "total")} for s in all_]
        ),
    )
    row("KL(base ‖ model) a token, harmless", lambda all_: " / ".join(f"{s['drift']:.5f}" for s in all_))
    row("the same outside S", lambda all_: " / ".join(f"{s['drift_outside']:.4f}" for s in all_))
    return "\n".join(lines) + "\n"


def figure(results: dict[str, Any], path: Path) -> None:
    """Drift outside S against harmful refusal while training, a line for each variant and seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plot, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    names = [name for name, found in next(iter(results.values())).items() if found.get("curve")]
    for colour, name in zip(("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"), names, strict=False):
        for i, found in enumerate(results.values()):
            points = found[name]["curve"]
            total = refusals(found[name]["scores"], "harmful", "sampled")["total"]
            axes.plot(
                [100 * p["refused"] / total for p in points],
                [p["drift_outside"] for p in points],
                "o-",
                color=colour,
                markersize=3,
                linewidth=1,
                alpha=0.8,
                label=name if i == 0 else None,
            )
    axes.set(
        yscale="log",
        xlabel="harmful prompts refused, sampled (%)",
        ylabel="KL(base ‖ model) a token outside S (nats)",
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    plot.savefig(path, dpi=160)


def _variant(text: str) -> tuple[str, dict[str, Any]]:
    name, _, changes = text.partition(":")
    pairs = [part.partition("=") for part in changes.split(";") if part.strip()]
    return name.strip(), {key.strip(): yaml.safe_load(value) for key, _, value in pairs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", metavar="NAME: KEY=VALUE; …", help="instead of the four")
    parser.add_argument("--set", default="", metavar="KEY=VALUE; …", help="for every variant that does not say it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--every", type=int, default=2, help="steps between two measurements; 0 for none")
    parser.add_argument("--out", type=Path, default=Path("comparison"))
    parser.add_argument("--redraw", nargs="+", type=Path, metavar="JSON", help="only merge and draw these results")
    args = parser.parse_args()
    known = {f for cls in SECTIONS.values() for f in cls.__dataclass_fields__}
    variants = dict(map(_variant, args.variant)) if args.variant else VARIANTS
    variants = {name: _variant(f"all: {args.set}")[1] | changes for name, changes in variants.items()}
    for name, changes in variants.items():
        if unknown := set(changes) - known:
            parser.error(f"variant {name} has unknown settings {', '.join(sorted(unknown))}")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.redraw:
        results = {seed: found for path in args.redraw for seed, found in json.loads(path.read_text()).items()}
    else:
        results = compare(args.seeds, variants, args.every, Screen())
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "table.md").write_text(table(results))
    if args.every and any(found.get("curve") for found in next(iter(results.values())).values()):
        figure(results, args.out / "drift.png")
    print((args.out / "table.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
