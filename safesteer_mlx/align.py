"""SafeSteer, end to end: `_align` is the paper's method section, stage by stage (arXiv 2606.02530)."""

import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, command_module
from .recipe import HELD_OUT_TOKENS, STEPS, Recipe, idle, model_name, parse, read_yaml, recipe_note, resolve
from .system import machines
from .system.files import user_path
from .system.hub import prepare
from .system.model_files import read_header
from .system.screen import Screen, UserError, command_line, duration

if TYPE_CHECKING:
    from mlx import nn

    from .evals.scores import Scores
    from .evals.verdict import Verdict
    from .method.direction import FoundDirections
    from .method.memory_plan import Plan
    from .method.passes import Passes
    from .method.run import Run
    from .method.safety_tokens import SafetyTokens
    from .method.teacher import ChosenTeacher, Teacher
    from .system.load import Loaded
    from .system.memory import Machine


@dataclass(frozen=True)
class Aligned:
    """What came of a run: the folder of adapters, the verdict before training and, if it trained, the scores of base
    and student (of the teacher too, if asked for) on held-out prompts, and why the student is not safer than its base,
    if it is not."""

    folder: Path
    verdict: "Verdict"
    scores: "dict[str, Scores]"
    not_aligned: str | None = None


def align_model(
    recipe: Recipe, base: "Loaded", screen: Screen, *, check: bool = False, force: bool = False, go_on: bool = True
) -> Aligned:
    """Align `base`; adapters are written to the recipe's folder, with the run's record in `run/` beside them, and the
    run's page is served while it works, if the recipe says so.

    `check` ends with the verdict, before anything is trained, and leaves a run that is in the folder as it is; `force`
    goes on past every alarm.

    Goes on where an earlier run in that folder left off, if it had the same weights, prompts and settings, and after a
    question without `go_on`; a finished run is replaced.

    Raises:
        UserError: what a user can mend, in one sentence.
    """
    recipe = _as_begun(recipe)
    settings, folder = recipe.run, Path(recipe.run.adapter_path)
    if machines.here().first:
        from .system.store import check_output

        check_output(folder)
        if check and _state_of(folder) is not None:
            with tempfile.TemporaryDirectory() as scratch:
                apart = replace(recipe, run=replace(settings, adapter_path=f"{scratch}/check"))
                return replace(_align(apart, base, screen, check, force), folder=folder)
        if not check:
            _earlier_run(folder, recipe, go_on, screen)
    if check or not settings.watch or not machines.here().first:
        return _align(recipe, base, screen, check, force)
    from .report import watching

    record = Path(settings.adapter_path) / "run"
    with watching(record, settings.transcripts_in_report, settings.watch_port, screen.line):
        return _align(recipe, base, screen, check, force)


def _as_begun(recipe: Recipe) -> Recipe:
    """The recipe with `max_tokens` of an unfinished run in its folder, if that was left to the model; and with the
    whole path of a model that is a folder here, which from elsewhere would be another or a Hub id, but as an unfinished
    run of this model has it, whose states know it by that name."""
    record, earlier = Path(recipe.run.adapter_path) / "run" / "recipe.yaml", {}
    if machines.here().first and _state_of(record.parents[1]) == "unfinished":
        earlier = read_yaml(record)
    most = machines.here().share(earlier.get("max_tokens"))
    if recipe.train.max_tokens is None and type(most) is int and most > 0:  # the file may have been edited
        recipe = replace(recipe, train=replace(recipe.train, max_tokens=most))
    if not (path := user_path(recipe.run.model)).is_dir():
        return recipe
    name, begun = str(path.absolute()), earlier.get("model")
    if isinstance(begun, str) and str(user_path(begun).absolute()) == name:
        name = begun
    return replace(recipe, run=replace(recipe.run, model=name))


def _align(recipe: Recipe, base: "Loaded", screen: Screen, check: bool, force: bool) -> Aligned:
    """`align_model`, but for the page."""
    from .evals.last_screen import outcome
    from .evals.reporting import start_reports
    from .evals.selection import SavedSteps, keep_best
    from .evals.verdict import give_verdict, not_aligned, refuse_to_go_on
    from .evals.verdict import show as show_verdict
    from .method.direction import as_it_answers, find_directions
    from .method.learning import choose_strength, what_to_learn
    from .method.own_answers import as_it_begins, with_room_to_think
    from .method.pace import measure_rates, plan_seconds
    from .method.run import make_run
    from .method.safety_tokens import check_tokens, find_tokens
    from .method.student import check_saved, make_student, save_student
    from .method.teacher import find_teacher, make_teacher, settled
    from .method.train import MovingTeacher, check_space, make_training, train_student
    from .method.training_prompts import training_prompts

    start, folder = time.time(), Path(recipe.run.adapter_path)
    base = as_it_begins(base, recipe.run.seed)
    recipe = _fitted(with_room_to_think(recipe, base, screen, force), base, screen)
    run = make_run(recipe, base, screen, force)
    if not recipe.run.transcripts:
        run.store.forget_answers(["directions"] if base.thinks else [])  # which hold thoughts
    prompts = training_prompts(run)
    student = make_student(base.model, run.recipe.train, run.recipe.run.seed, base.quantized)
    check_space(run, student, prompts)
    reports = None if check else start_reports(run)
    rates = None if screen.console.quiet else measure_rates(run)
    if rates is not None:
        screen.plan(plan_seconds(run, rates))

    # 1. Refusal directions: mean activations on harmful minus harmless instructions.
    screen.step(STEPS)
    directions = run.once(find_directions)
    run = as_it_answers(run, directions)
    if (run.base.alike or run.refusals) and not recipe.run.transcripts:
        run.store.forget_answers(["directions"])  # which hold how answers begin
    run.store.yaml("recipe.yaml", run.recipe.flat())

    # 2. The safety teacher: the base, steered along the direction, as strongly, as works best on this model.
    screen.step(STEPS)
    chosen = run.once(find_teacher, directions)
    teacher = make_teacher(run, chosen.direction, chosen.coeff, chosen.prompts_only)
    run.store.json("direction.json", _direction_record(directions, chosen))

    # Before anything is trained: is this model fit for it?
    verdict = give_verdict(run, directions, chosen)
    run.store.json("verdict.json", asdict(verdict))
    show_verdict(verdict, screen)
    if verdict.word == "stop" and not force:
        raise refuse_to_go_on(verdict)
    if reports is None:
        return Aligned(folder, verdict, {})

    # 3. The safety tokens: what the teacher favours over the base, where it is worth following.
    run = settled(run, chosen.opening)
    if rates is not None:  # now it is known how much of an answer is read and drawn
        screen.pace.correct(plan_seconds(run, rates))
    screen.step(STEPS)
    tokens = run.once(find_tokens, teacher, directions)
    run.store.json("tokens.json", tokens.rows)
    check_tokens(run, tokens)

    # 4. The student learns from its own answers, on the safety tokens, and stays put on harmless prompts.
    screen.step(STEPS)
    run, learning = what_to_learn(run, teacher, tokens)
    moving = MovingTeacher(run, student, directions, chosen) if run.recipe.teacher.teacher == "ema" else None
    saved_steps = SavedSteps(run, student, tokens.ids) if run.recipe.run.select_checkpoint else None
    training = make_training(run, student, teacher, tokens, prompts, learning)
    log = train_student(run, training, moving, saved_steps and saved_steps.score, reports.step)
    if saved_steps is not None:
        keep_best(run, student, log.scored)
    strength = choose_strength(run, student, learning)
    save_student(run, student)
    check_saved(run, student)
    run.store.lines("metrics.jsonl", log.metrics)

    # Before and after, on prompts that no stage has seen.
    screen.step(STEPS)
    scores = _before_and_after(run, teacher, student, tokens)
    reports.scores(len(log.metrics), scores)
    learned = None if learning is None else learning.measure(student, run.recipe.run.prompt_batch_size)[0]
    why = not_aligned(scores["base"], scores["student"], learned, run.refusals)
    if run.store.ours:
        timing = {"seconds": round(time.time() - start, 1), "seconds_by_step": log.seconds}
        told = outcome(scores, why, run.recipe.run.transcripts, run.refusals)
        made = {"not_aligned": why, "adapter_strength": strength}
        _record(run, scores, told, made, timing | screen.pace.as_json(), tokens)
        _tell(run, scores, told, why)
    return Aligned(folder, verdict, scores, why)


def _fitted(recipe: Recipe, base: "Loaded", screen: Screen) -> Recipe:
    """The recipe with the batch sizes that this machine's memory allows, and MLX kept to that memory."""
    from .method import memory_plan
    from .method.passes import Passes
    from .method.prompts import prompts_from, template_tokens
    from .system import memory
    from .system.shape import read_shape

    screen.line(f"prompts: {prompts_from(recipe)}")
    machine = memory.smallest_machine(recipe.run.memory_limit)
    try:
        template = template_tokens(base.tokenizer)
        passes = Passes(base.model, read_shape(base.path))
        plan = _planned(recipe, base.config, passes, machine, base.thinks, template)
        screen.line(memory_plan.summary(recipe, plan))
        recipe = plan.recipe
    except UserError as error:  # a configuration with other names, or passes that cannot be counted
        screen.line(f"memory: not planned, {error}")
    memory.set_limits(machine)
    return recipe


def _planned(
    recipe: Recipe,
    config: dict[str, Any],
    passes: "Passes",
    machine: "Machine",
    thinks: bool,
    template: int | None = None,
) -> "Plan":
    """The memory of a run of a model that may think first, or does not; its chat template puts so many tokens around a
    prompt, if that is known."""
    from .method.memory_plan import anchor_tokens, fitted
    from .method.prompts import TEMPLATE_TOKENS, longest_prompt
    from .method.run import most_read
    from .method.teacher import OPENINGS

    around = template or TEMPLATE_TOKENS
    limit = recipe.train.max_prompt_length + around - TEMPLATE_TOKENS
    to_plan, judged = replace(recipe, train=replace(recipe.train, max_prompt_length=limit)), HELD_OUT_TOKENS
    if thinks:  # as much as may be taught of a thought, and all of it before the answer that is judged
        to_plan = replace(to_plan, tokens=replace(recipe.tokens, horizon=OPENINGS[-1], token_samples=1))
        judged = max(judged, recipe.train.longest)
    longest = min(longest_prompt(to_plan, around), most_read(config))  # of longer ones none is read
    plan = fitted(to_plan, passes, machine, longest, judged, anchor_tokens(to_plan, around))
    train = replace(plan.recipe.train, max_prompt_length=recipe.train.max_prompt_length)
    return replace(plan, recipe=replace(plan.recipe, tokens=recipe.tokens, train=train))


def _before_and_after(
    run: "Run", teacher: "Teacher", student: "nn.Module", tokens: "SafetyTokens"
) -> "dict[str, Scores]":
    """The scores of base and student on held-out prompts, and of the teacher if they are wanted."""
    from .evals.heldout import HeldOut, TestSet, held_out_prompts
    from .system.store import BASE_ANSWERS

    settings, ids = run.recipe.run, tokens.ids.tolist()
    test = TestSet(*held_out_prompts(run.prompts.sets, settings.test_prompts))
    kept = run.store.path_for(BASE_ANSWERS) if settings.transcripts and run.store.ours else None
    held_out = HeldOut(run.base, test, ids, settings.seed, run.sampling(HELD_OUT_TOKENS), kept=kept)
    models = {"base": run.base.model} | ({"teacher": teacher.model} if settings.score_teacher else {})
    models["student"] = student
    return dict(held_out.score_each(models, run.screen, {"teacher": teacher.system_prompt}))


def _record(
    run: "Run",
    scores: "dict[str, Scores]",
    told: dict[str, Any],
    made: dict[str, Any],
    timing: dict[str, Any],
    tokens: "SafetyTokens",
) -> None:
    """Write what came of the run, and forget the states that it could have gone on from."""
    import platform
    from importlib.metadata import version

    import mlx.core as mx

    from .evals.scores import transcripts
    from .method.prompts import given_files
    from .system.store import sha256_of

    store = run.store
    store.json("before_after.json", {name: s.as_json() for name, s in scores.items()})
    store.json("outcome.json", told)
    (store.path / "transcripts.jsonl").unlink(missing_ok=True)  # an earlier run's
    if run.recipe.run.transcripts:
        store.lines("transcripts.jsonl", transcripts(scores))
    manifest = {
        "safesteer_mlx": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in ("mlx", "mlx-lm", "numpy", "transformers")},
        "model": run.recipe.run.model,
        "model_sha256": run.base.weights_hash,
        "model_settings_sha256": run.base.settings_hash,
        "adapters_sha256": sha256_of(store.path.parent / "adapters.safetensors"),
        "thinks": run.base.thinks,  # and does, so that longer answers were scored
        "own_sets": sorted(given_files(run.recipe.run.data)),
        **made,
        "tokens_explain": tokens.explained,
        "tokens_open": tokens.openings,
    }
    store.json("manifest.json", manifest)
    store.json("timing.json", timing | {"peak_bytes": mx.get_peak_memory()})  # last: the end of the run, to who watches
    store.forget_states()


def _tell(run: "Run", scores: "dict[str, Scores]", told: dict[str, Any], not_aligned: str | None) -> None:
    """Draw the report, say what came of it, and what to do with the adapters of a student that is safer."""
    from .evals.last_screen import next_steps, show_last, show_next, shown_path
    from .evals.scores import show
    from .report import write_report

    settings, screen, record = run.recipe.run, run.screen, run.store.path
    if screen.verbose:
        show(scores, screen)
    report = None
    if settings.report:
        try:
            report = write_report(record, settings.transcripts_in_report)
        except UserError as error:
            screen.line(f"no report: {error}")
    show_last(told, screen)
    if not_aligned is None:
        show_next(next_steps(vars(settings), Path(settings.adapter_path), report), screen)
    elif report is not None:
        screen.line(f"report: {shown_path(report)}")


def _direction_record(directions: "FoundDirections", chosen: "ChosenTeacher") -> dict[str, Any]:
    from .system.store import encoded

    return {
        "position": chosen.direction.position,
        "layer": chosen.direction.layer,
        "coeff": chosen.coeff,
        "opening": chosen.opening,
        "prompts_only": chosen.prompts_only,
        "openers": directions.openers,
        "trials": encoded(chosen.trials),
        "vector": encoded(chosen.direction.vector),
        "scores": encoded(directions.scores),
    }


@command_line
def main(argv: list[str]) -> None:
    """The command line."""
    flags, preset, yaml_file = parse(argv)
    resume, yes = flags.pop("resume", None), flags.pop("yes", False)
    dry_run = flags.pop("dry_run", False)
    verdict_only, force = flags.pop("verdict_only", False), flags.pop("force", False)
    first = machines.join().first
    if resume is not None:
        flags = {"trust_remote_code": False} | flags | {"adapter_path": resume}  # the run may be a stranger's
        yaml_file = _settings_of(user_path(resume), preset, yaml_file) if first else None
    given = machines.here().share(read_yaml(yaml_file) if first and yaml_file is not None else {})
    if not first:  # settings files are on the first machine
        flags, yaml_file = given | flags, None
    # A mistake in a setting, a folder or a file is told before anything is fetched.
    draft = resolve({}, flags, preset, yaml_file)[0]
    run = draft.run
    prepare(run.offline)
    from .method.prompts import direction_counts, prompt_sets
    from .system.store import check_output

    folder, name = Path(run.adapter_path), model_name(run.model)
    if first:
        check_output(folder)
    if first and run.watch:
        from .report import check_watch

        check_watch(run.watch_port)
    if run.data is not None:
        named = replace(draft, run=replace(run, model=name))
        direction_counts(named, prompt_sets(named))
    if draft.train.resume_adapter_file is not None:
        read_header(user_path(draft.train.resume_adapter_file))
    from .evals.reporting import check_report_to
    from .system.load import config_and_headers, load

    check_report_to(run)
    if dry_run:
        from .method import memory_plan
        from .method.passes import Passes
        from .system import memory
        from .system.load import load_unread, may_think
        from .system.shape import shape_of

        machine = memory.this_machine(run.memory_limit)
        config, headers = config_and_headers(name, run.revision)
        recipe, _ = resolve(config, {**flags, "model": name}, preset, yaml_file)
        passes = Passes(load_unread(name, config, headers, run.trust_remote_code), shape_of(config, headers))
        plan = _planned(recipe, config, passes, machine, may_think(recipe.run, config))
        screen = Screen(quiet=not first)
        memory_plan.show(recipe, plan, machine, screen)
        if first:
            _show_time(plan.recipe if plan.fits else None, folder, screen)
        return
    from .evals.last_screen import ask_what_next

    base = load(name, run.trust_remote_code, run.thinking, run.revision)
    recipe, recipe_name = resolve(base.config, {**flags, "model": name}, preset, yaml_file)
    screen = Screen(quiet=not first, verbose=recipe.run.verbose or verdict_only)
    if (size := machines.here().size) > 1:
        screen.line(f"machines: {size}, each with the whole model and a share of the work")
    screen.line(f"model: {name}" + (f", recipe {recipe_name}" if recipe_name else ""))
    if note := recipe_note(recipe_name):
        screen.line(f"  {note}")
    for line in idle(recipe, flags):
        screen.line(line)
    if verdict_only:
        with tempfile.TemporaryDirectory() as scratch:  # what is found for it is not kept
            recipe = replace(recipe, run=replace(recipe.run, adapter_path=f"{scratch}/check"))
            align_model(recipe, base, screen, check=True)
        return
    reason = align_model(recipe, base, screen, force=force, go_on=resume is not None or yes).not_aligned
    if reason is not None:
        warning = f"not aligned: {reason}; the adapters in {folder} are not to be used"
        if not force:
            raise UserError(warning)
        screen.line(warning)
    elif not yes and screen.console.is_terminal and sys.stdin.isatty():
        chosen = ask_what_next(vars(run), folder)
        if chosen is not None:  # its model takes the place of this one in memory
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, "-m", __package__, *chosen])


def _show_time(recipe: Recipe | None, folder: Path, screen: Screen) -> None:
    """How long a run will take: as long as the one in `folder` did, or by what is measured, if the model fits and its
    weights are on this machine."""
    from .method.own_answers import as_it_begins, with_room_to_think
    from .method.pace import measure_rates, plan_seconds
    from .method.run import make_run
    from .system.hub import is_here
    from .system.load import load

    if (seconds := _last_seconds(folder)) is not None:
        screen.line(f"time: {seconds / 60:,.1f} minutes, as the last run here took")
        return
    if recipe is None or not is_here(recipe.run.model, recipe.run.revision):
        screen.line("time: not known before the weights are on this machine, and fit; the run shows what is left")
        return
    settings = recipe.run
    try:
        base = load(settings.model, settings.trust_remote_code, settings.thinking, settings.revision)
        with tempfile.TemporaryDirectory() as scratch:
            recipe = replace(recipe, run=replace(settings, adapter_path=f"{scratch}/none"))
            base = as_it_begins(base, settings.seed)
            run = make_run(with_room_to_think(recipe, base, screen), base, Screen(quiet=True))
            planned = plan_seconds(run, measure_rates(run))
    except UserError as error:
        screen.line(f"time: not measured, {error}")
        return
    rows = [[name, duration(seconds)] for name, seconds in zip(STEPS, planned, strict=True)]
    screen.table("Time, planned by what was measured just now", ["", ""], [*rows, ["in all", duration(sum(planned))]])


def _last_seconds(folder: Path) -> float | None:
    """How long the run that is in `folder` took, if one is."""
    from .system.finished import read_record

    try:
        return read_record(folder / "run", "timing.json")["seconds"]
    except UserError:
        return None


def _settings_of(folder: Path, preset: str | None, yaml_file: Path | None) -> Path:
    """The settings file of the run in `folder`."""
    settings = folder / "run" / "recipe.yaml"
    if preset is not None or yaml_file is not None:
        raise UserError("--resume takes its settings from the run; leave --config and --preset out")
    if not settings.is_file():
        raise UserError(f"--resume {folder} holds no run; give the --adapter-path of one that was interrupted")
    if _state_of(folder) == "finished":
        raise UserError(f"--resume {folder} is a finished run; there is nothing left to do")
    return settings


def _state_of(folder: Path) -> str | None:
    """Whether a run that is in `folder` already is finished, or has trained a step and is not; None for neither."""
    record = folder / "run"
    if not (record / "recipe.yaml").is_file():
        return None
    trained = any((record / "checkpoint").glob("step-*"))
    if (record / "manifest.json").is_file() and ((record / "timing.json").is_file() or not trained):
        return "finished"
    return "unfinished" if trained else None  # else what its stages found is used


def _earlier_run(folder: Path, recipe: Recipe, go_on: bool, screen: Screen) -> None:
    """Clear a finished run's record; go on with an unfinished one only if it was this one, and was asked for.

    Raises:
        UserError: the unfinished run had other settings, or nobody said whether to go on.
    """
    from .recipe import current_names, result_settings
    from .system.store import RunFolder

    if (state := _state_of(folder)) is None:
        return
    if state == "finished":
        screen.line(f"{folder} holds an earlier run, which this one replaces")
        RunFolder(folder).clear()
        return
    earlier, now = current_names(read_yaml(folder / "run" / "recipe.yaml")), result_settings(recipe)
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


command_module(__name__)

if __name__ == "__main__":
    sys.exit(main())
