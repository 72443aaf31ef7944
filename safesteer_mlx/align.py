"""SafeSteer, end to end: `align` is the paper's method section, stage by stage (arXiv 2606.02530)."""

import sys
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .checks import read_header
from .hub import prepare
from .progress import Screen, UserError, plain
from .recipe import BUNDLED, MODELS, Recipe, parse, resolve

if TYPE_CHECKING:
    from .direction import Direction
    from .evaluate import Scores
    from .load import Loaded
    from .stages import ChosenTeacher, SafetyTokens


def align(recipe: Recipe, base: "Loaded", screen: Screen) -> Path:
    """Align `base` and return the folder of adapters, with the run's record in `run/` beside them.

    Raises:
        UserError: what a user can mend, in one sentence.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from . import stages
    from .evaluate import evaluate, first_of_each, make_test_set
    from .runfolder import RunFolder, check_output
    from .student import adapter_config, make_student, save_adapters
    from .train import NotFiniteError, number_of_steps, train, trained_change

    run, tokenizer, started = recipe.run, base.tokenizer, time.time()
    folder = Path(run.adapter_path)
    check_output(folder)
    if (folder / "run").is_dir():
        screen.line(f"{folder} holds an earlier run, which this one replaces")
    sets = stages.prompt_sets(recipe)
    rendered = stages.render_prompts(recipe, sets, tokenizer)
    student = make_student(base.model, recipe.train, run.seed, base.quantized)

    # 1. The refusal direction: mean activations on harmful minus harmless instructions.
    openers = stages.find_openers(recipe, base, rendered, screen)
    direction, harmless = stages.find_direction(recipe, base, rendered, openers, screen)

    # 2. The safety teacher: the base, steered along the direction.
    chosen = stages.make_teacher(recipe, base, rendered, direction, screen)
    teacher = chosen.teacher

    # 3. The safety tokens: what the teacher favours over the base.
    tokens = stages.find_tokens(recipe, base, rendered, teacher, harmless, screen)

    record = RunFolder(folder)
    record.yaml("recipe.yaml", recipe.flat())
    record.json("direction.json", _direction_record(direction, openers, chosen))
    record.json("tokens.json", _token_record(tokens, tokenizer))

    # 4. The student learns from its own answers, on the safety tokens, and stays put on harmless prompts.
    prompts = stages.training_prompts(recipe, sets, base, teacher, screen)
    config = adapter_config(recipe.train, run.model, run.seed)
    before = dict(tree_flatten(student.trainable_parameters()))
    metrics: list[dict[str, Any]] = []
    interrupted = False
    steps = train(
        student,
        base.model,
        teacher,
        mx.array(tokens.ids),
        *prompts,
        recipe.train,
        recipe.loss,
        eos_ids=base.eos_ids,
        seed=run.seed,
        generation_batch_size=run.generation_batch_size,
        after_step=stages.moving_teacher(recipe, base, rendered, student, direction, chosen.coeff, harmless, screen),
    )
    seconds = [time.time()]
    with screen.stage("training") as advance:
        try:
            for m in steps:
                metrics.append(asdict(m))
                seconds.append(time.time())
                note = f"loss {m.loss:.4f}, safety mass {m.student_mass:.2f} → {m.target_mass:.2f}"
                advance(m.step, m.steps, note)
                if m.step == 1 and trained_change(student, before) == 0:
                    raise UserError("the first step moved no weight; raise --learning-rate or check lora_parameters")
                if m.step % recipe.train.steps_per_report == 0 or m.step == m.steps:
                    screen.line(f"step {m.step} of {m.steps}: {note}, gradient {m.grad_norm:.2g}")
                if m.step % recipe.train.save_every == 0:
                    save_adapters(folder, student, config)
        except KeyboardInterrupt:
            interrupted = True
        except NotFiniteError:
            if metrics:  # the last step that was applied
                save_adapters(folder, student, config)
            raise
    save_adapters(folder, student, config)
    record.text("metrics.jsonl", "".join(_json_line(m) for m in metrics))
    if interrupted:
        done, total = len(metrics), number_of_steps(len(prompts[0]), recipe.train, recipe.loss)
        screen.line(f"interrupted after {done} of {total} steps; the adapters so far are in {folder}")
        raise KeyboardInterrupt

    # Before and after, on prompts that no stage has seen.
    n = run.test_prompts
    kinds = {kind: getattr(sets, f"{kind}_test")[:n] for kind in ("harmful", "harmless", "borderline")}
    test = make_test_set(base.model, tokenizer, kinds, first_of_each(sets.capability_test, n), base.eos_ids)
    scores = {}
    for name, model in (("base", base.model), ("teacher", teacher.model), ("student", student)):
        with screen.stage(f"scoring the {name}") as advance:
            scores[name] = evaluate(
                model,
                base.model,
                tokenizer,
                test,
                tokens.ids,
                eos_ids=base.eos_ids,
                seed=run.seed,
                batch_size=run.generation_batch_size,
                system_prompt=teacher.system_prompt if name == "teacher" else None,
                progress=advance,
            )
    record.json("before_after.json", {name: s.as_json() for name, s in scores.items()})
    record.json("manifest.json", _manifest(base, folder))
    by_step = [round(b - a, 3) for a, b in pairwise(seconds)]
    record.json("timing.json", {"seconds": round(time.time() - started, 1), "seconds_by_step": by_step})
    _show(scores, screen)
    screen.line(
        f"adapters: {folder} (mlx_lm.generate --model {run.model} --adapter-path {folder}); record: {record.path}"
    )
    return folder


def _direction_record(direction: "Direction", openers: dict[str, int], chosen: "ChosenTeacher") -> dict[str, Any]:
    import numpy as np

    return {
        "position": direction.position,
        "layer": direction.layer,
        "coeff": chosen.coeff,
        "openers": openers,
        "coefficient_curve": [asdict(trial) for trial in chosen.curve],
        "vector": np.array(direction.vector, np.float64),
        "scores": asdict(direction.scores),
    }


def _token_record(tokens: "SafetyTokens", tokenizer: Any) -> list[dict[str, Any]]:
    contrast = tokens.contrast
    return [
        {
            "token": tokenizer.decode([int(t)]),
            "id": int(t),
            "votes": int(contrast.votes[t]),
            "mean_delta": float(contrast.mean_delta[t]),
            "base_prob": float(contrast.base_prob[t]),
            "teacher_prob": float(contrast.steered_prob[t]),
        }
        for t in tokens.ids
    ]


def _json_line(metrics: dict[str, Any]) -> str:
    import json

    return json.dumps({k: None if v != v else v for k, v in metrics.items()}) + "\n"


def _manifest(base: "Loaded", folder: Path) -> dict[str, Any]:
    import hashlib
    import platform
    from importlib.metadata import version

    return {
        "safesteer_mlx": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in ("mlx", "mlx-lm", "numpy", "transformers")},
        "model": base.name,
        "model_sha256": base.weights_hash(),
        "adapters_sha256": hashlib.sha256((folder / "adapters.safetensors").read_bytes()).hexdigest(),
    }


def _show(scores: dict[str, "Scores"], screen: Screen) -> None:
    """The before/after table."""
    rows = []
    for kind in next(iter(scores.values())).refusals:
        for how in ("greedy", "sampled"):
            rows.append([f"{kind} refused, {how}", *(str(s.refusals[kind][how]) for s in scores.values())])
    for task in next(iter(scores.values())).capability:
        rows.append([f"{task} correct", *(str(s.capability[task]) for s in scores.values())])
    rows.append(["KL(base ‖ model) a token, harmless", *(f"{s.drift:.5f}" for s in scores.values())])
    rows.append(["the same outside S", *(f"{s.drift_outside:.5f}" for s in scores.values())])
    screen.table("Held-out prompts", ["", *scores], rows)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    from dataclasses import replace

    try:
        flags, preset, yaml_file = parse(argv)
        asked, _ = resolve({}, flags, preset, yaml_file)  # a mistake in a setting is told before all else
        run = asked.run
        name = str(MODELS / BUNDLED) if run.model == BUNDLED and not Path(BUNDLED).exists() else run.model
        prepare(run.offline)
        from .prompts import load_data
        from .runfolder import check_output

        check_output(Path(run.adapter_path))
        if run.data is not None:
            load_data(run.data)  # a mistake in them is told before a model is fetched
        if asked.train.resume_adapter_file is not None:
            read_header(Path(asked.train.resume_adapter_file).expanduser())
        from .load import load

        base = load(name, run.trust_remote_code, run.revision)
        recipe, found = resolve(base.config, flags, preset, yaml_file)
        recipe = replace(recipe, run=replace(recipe.run, model=name))
        screen = Screen(quiet=_rank() != 0)
        if preset == "paper" and "fine_tune_type" not in flags and not base.quantized:
            # As published: all weights at the published rate. Quantized weights cannot be trained.
            full = replace(recipe.train, fine_tune_type="full", learning_rate=flags.get("learning_rate", 1e-5))
            recipe = replace(recipe, train=full)
        screen.line(f"model: {name}" + (f", recipe {found}" if found else ", no recipe of its own: defaults"))
        align(recipe, base, screen)
    except UserError as error:
        print(f"safesteer-mlx: {plain(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that went away
        where = error.filename or "a file"
        print(
            f"safesteer-mlx: {plain(f'{where}: {error.strerror or error}; mend that and run again')}", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _rank() -> int:
    import mlx.core as mx

    return mx.distributed.init().rank()


if __name__ == "__main__":
    sys.exit(main())
