"""SafeSteer, end to end: `align` is the paper's method section, stage by stage (arXiv 2606.02530)."""

import json
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .checks import read_header
from .hub import prepare
from .progress import Screen, UserError, exit_code
from .recipe import Recipe, model_name, parse, resolve

if TYPE_CHECKING:
    from .load import Loaded
    from .stages import ChosenTeacher, FoundDirections


def align(recipe: Recipe, base: "Loaded", screen: Screen, *, check: bool = False, force: bool = False) -> Path:
    """Align `base` and return the folder of adapters, with the run's record in `run/` beside them.

    `check` ends with the verdict, before anything is trained; `force` goes on whatever the verdict is.

    Goes on where an earlier run in that folder left off, if it had the same weights, prompts and settings.

    Raises:
        UserError: what a user can mend, in one sentence.
    """
    import mlx.core as mx

    from . import stages
    from .checkpoint import Checkpoint
    from .measure import ANSWER_TOKENS, evaluate, first_of_each, make_test_set
    from .report import write_report
    from .runfolder import RunFolder, check_output
    from .safety_tokens import openings
    from .scores import show, transcripts
    from .selection import keep_best, make_scorer
    from .student import adapter_config, bytes_trained, make_student, save_adapters
    from .verdict import give_verdict, not_aligned, refuse_to_go_on
    from .verdict import show as show_verdict

    tokenizer, started = base.tokenizer, time.time()
    folder = Path(recipe.run.adapter_path)
    check_output(folder)
    sets = stages.prompt_sets(recipe)
    rendered = stages.render_prompts(recipe, sets, tokenizer)
    prompts = stages.training_prompts(recipe, sets, base, screen)
    recipe = stages.check_padding(recipe, base, rendered, screen)
    run = recipe.run
    student = make_student(base.model, recipe.train, run.seed, base.quantized)
    record = RunFolder(folder)
    checkpoint = Checkpoint(record, stages.made_of(recipe, base, sets))
    checkpoint.check_space(bytes_trained(student), stages.candidates(recipe, prompts))

    # 1. Refusal directions: mean activations on harmful minus harmless instructions.
    found = checkpoint.once(
        "directions",
        lambda: stages.find_directions(recipe, base, rendered, screen),
        stages.FoundDirections.of,
    )
    record.yaml("recipe.yaml", recipe.flat())

    # 2. The safety teacher: the base, steered along the direction, as strongly, as works best on this model.
    chosen = checkpoint.once(
        "teacher",
        lambda: stages.find_teacher(recipe, base, rendered, found, screen),
        stages.ChosenTeacher.of,
    )
    teacher = stages.make_teacher(recipe, base, rendered, chosen.direction, chosen.coeff)
    record.json("direction.json", _direction_record(found, chosen))

    # Before anything is trained: is this model fit for it?
    verdict = give_verdict(recipe, found, chosen)
    record.json("verdict.json", verdict.plain())
    show_verdict(verdict, screen)
    if verdict.word == "stop" and not force:
        raise refuse_to_go_on(verdict)
    if check:
        return folder

    # 3. The safety tokens: what the teacher favours over the base, where it is worth following.
    recipe = stages.settled(recipe, base, chosen.opening)
    tokens = checkpoint.once(
        "tokens",
        lambda: stages.find_tokens(recipe, base, rendered, teacher, found, screen),
        stages.SafetyTokens.of,
    )
    record.json("tokens.json", tokens.rows)
    stages.check_tokens(recipe, tokens, force, screen)

    # 4. The student learns from its own answers, on the safety tokens, and stays put on harmless prompts.
    moving = None
    if recipe.teacher.teacher == "ema":
        moving = stages.MovingTeacher(recipe, base, rendered, student, found, chosen, screen)
    recipe, learning = stages.what_to_learn(recipe, base, rendered, teacher, tokens)
    config = adapter_config(recipe.train, run.model, run.seed)
    log = stages.train_student(
        recipe,
        base,
        rendered,
        student,
        teacher,
        moving,
        mx.array(tokens.ids),
        learning,
        prompts,
        checkpoint,
        lambda: save_adapters(folder, student, config),
        screen,
        make_scorer(recipe, base, rendered, student, tokens.ids, record) if run.select else None,
        force,
    )
    if run.select:
        keep_best(student, log.scored, run.select, record, screen)
    save_adapters(folder, student, config)
    stages.check_saved(base, rendered, student, folder)
    record.text("metrics.jsonl", _json_lines(log.metrics))

    # Before and after, on prompts that no stage has seen.
    n = run.test_prompts
    kinds = {kind: getattr(sets, f"{kind}_test")[:n] for kind in ("harmful", "harmless", "borderline")}
    max_tokens = stages.answer_tokens(recipe, base, ANSWER_TOKENS)
    test = make_test_set(
        base.model,
        tokenizer,
        kinds,
        first_of_each(sets.capability_test, n),
        base.eos_ids,
        max_tokens=max_tokens,
        batch_size=run.generation_batch_size,
    )
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
                max_tokens=max_tokens,
                batch_size=run.generation_batch_size,
                system_prompt=teacher.system_prompt if name == "teacher" else None,
                progress=advance,
            )
    record.json("before_after.json", {name: s.as_json() for name, s in scores.items()})
    (record.path / "transcripts.jsonl").unlink(missing_ok=True)  # an earlier run's
    if run.transcripts:
        record.text("transcripts.jsonl", _json_lines(transcripts(scores)))
    learned = None
    if learning is not None:
        learned = learning.share(openings(student, learning.prompts, tokens.ids, run.prompt_batch_size))
    why = not_aligned(scores["base"], scores["student"], learned)
    record.json("manifest.json", _manifest(base, folder) | {"not_aligned": why})
    record.json(
        "timing.json",
        {
            "seconds": round(time.time() - started, 1),
            "peak_bytes": mx.get_peak_memory(),
            "seconds_by_step": log.seconds,
        },
    )
    checkpoint.clear()
    show(scores, screen)
    if run.report:
        try:
            screen.line(f"report: {write_report(record.path, run.transcripts_in_report)}")
        except UserError as error:
            screen.line(f"no report: {error}")
    if why is not None:
        said = f"not aligned: {why}; the adapters in {folder} are not to be used"
        if not force:
            raise UserError(said)
        screen.line(said)
        return folder
    screen.line(
        f"adapters: {folder} (mlx_lm.generate --model {run.model} --adapter-path {folder}); record: {record.path}"
    )
    return folder


def _direction_record(found: "FoundDirections", chosen: "ChosenTeacher") -> dict[str, Any]:
    import numpy as np

    return {
        "position": chosen.direction.position,
        "layer": chosen.direction.layer,
        "coeff": chosen.coeff,
        "opening": chosen.opening,
        "openers": found.openers,
        "trials": [asdict(trial) for trial in chosen.trials],
        "vector": np.array(chosen.direction.vector, np.float64),
        "scores": asdict(found.scores),
    }


def _json_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


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
        "model_sha256": base.weights_hash,
        "adapters_sha256": hashlib.sha256((folder / "adapters.safetensors").read_bytes()).hexdigest(),
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    import signal

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGTERM, stop)
    except ValueError:
        pass  # not the main thread: its owner decides about signals
    return exit_code(lambda: _run(argv))


def _run(argv: list[str] | None) -> None:
    flags, preset, yaml_file = parse(argv)
    resume, yes = flags.pop("resume", None), flags.pop("yes", False)
    dry_run = flags.pop("dry_run", False)
    check, force = flags.pop("check", False), flags.pop("force", False)
    if resume is not None:
        yaml_file, flags = _settings_of(Path(resume), flags, preset, yaml_file)
    # A mistake in a setting, a folder or a file is told before anything is fetched.
    asked = resolve({}, flags, preset, yaml_file)[0]
    run = asked.run
    prepare(run.offline)
    from .prompts import load_data
    from .runfolder import check_output

    folder = Path(run.adapter_path)
    check_output(folder)
    if run.data is not None:
        load_data(run.data)
    if asked.train.resume_adapter_file is not None:
        read_header(Path(asked.train.resume_adapter_file).expanduser())
    from . import memory
    from .load import load
    from .stages import longest_prompt, prompts_from

    name = model_name(run.model)
    machine = memory.this_machine(run.memory_limit)
    if dry_run:
        from .load import config_and_headers

        config, headers = config_and_headers(name, run.revision)
        recipe, _ = resolve(config, {**flags, "model": name}, preset, yaml_file)
        plan = memory.fitted(recipe, memory.shape_of(config, headers), machine, longest_prompt(recipe))
        memory.show(recipe, plan, machine, Screen(), _last_seconds(folder))
        return
    base = load(name, run.trust_remote_code, run.thinking, run.revision)
    recipe, found = resolve(base.config, {**flags, "model": name}, preset, yaml_file)
    screen = Screen()
    screen.line(f"model: {name}" + (f", recipe {found}" if found else ""))
    screen.line(f"prompts: {prompts_from(recipe)}")
    try:
        plan = memory.fitted(recipe, memory.read_shape(base.path), machine, longest_prompt(recipe))
        screen.line(memory.summary(recipe, plan))
        recipe = plan.recipe
    except UserError as error:  # an architecture whose configuration has other names
        screen.line(f"memory: not planned, {error}")
    memory.set_limits(machine)
    if check:
        with tempfile.TemporaryDirectory() as scratch:  # what is found for it is not kept
            align(replace(recipe, run=replace(recipe.run, adapter_path=f"{scratch}/check")), base, screen, check=True)
        return
    _earlier_run(folder, recipe, resume is not None or yes, screen)
    align(recipe, base, screen, force=force)


def _last_seconds(folder: Path) -> float | None:
    """How long the run that is in `folder` took, if one is."""
    try:
        return float(json.loads((folder / "run" / "timing.json").read_text("utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _settings_of(
    folder: Path, flags: dict[str, Any], preset: str | None, yaml_file: Path | None
) -> tuple[Path, dict[str, Any]]:
    """The settings file of the run in `folder`, and flags that lead back to it."""
    stored = folder / "run" / "recipe.yaml"
    if preset is not None or yaml_file is not None:
        raise UserError("--resume takes its settings from the run; leave --config and --preset out")
    if not stored.is_file():
        raise UserError(f"--resume {folder} holds no run; give the --adapter-path of one that was interrupted")
    if (folder / "run" / "manifest.json").is_file():
        raise UserError(f"--resume {folder} is a finished run; there is nothing left to do")
    return stored, {**flags, "adapter_path": str(folder)}


def _earlier_run(folder: Path, recipe: Recipe, go_on: bool, screen: Screen) -> None:
    """Clear a finished run's record; go on with an unfinished one only if it was this one, and was asked for.

    Raises:
        UserError: the unfinished run had other settings, or nobody said whether to go on.
    """
    from .recipe import mathematics, read_yaml
    from .runfolder import RunFolder

    stored = folder / "run" / "recipe.yaml"
    if not stored.is_file():
        return
    if (folder / "run" / "manifest.json").is_file():
        screen.line(f"{folder} holds an earlier run, which this one replaces")
        RunFolder(folder).clear()
        return
    if not any((folder / "run" / "checkpoint").glob("step-*")):
        return  # nothing was trained yet; what its stages found is used if it still holds
    earlier, now = read_yaml(stored), mathematics(recipe)
    changed = [
        f"{key} ({earlier.get(key)!r}, now {value!r})" for key, value in now.items() if earlier.get(key) != value
    ]
    if changed:
        raise UserError(
            f"--adapter-path {folder} holds an unfinished run with other settings: {', '.join(changed)}; "
            "give them as they were to go on, or another folder"
        )
    if not go_on and sys.stdin.isatty():
        go_on = input(f"{folder} holds this run, unfinished; go on with it? [Y/n] ").strip().lower() in ("", "y", "yes")
        if not go_on:
            RunFolder(folder).clear()
    elif not go_on:
        raise UserError(
            f"--adapter-path {folder} holds this run, unfinished; add --yes to go on, or give another folder"
        )


if __name__ == "__main__":
    sys.exit(main())
