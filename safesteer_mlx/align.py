"""SafeSteer, end to end: `align` is the paper's method section, stage by stage (arXiv 2606.02530)."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .progress import Screen, UserError
from .recipe import BUNDLED, MODELS, PACKAGE, Recipe, parse, resolve

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from .direction import Direction
    from .evaluate import Scores
    from .load import Loaded
    from .prompts import PromptSets
    from .teacher import Teacher

Rows = list[list[int]]


@dataclass(frozen=True)
class Rendered:
    """Every set of prompts as ids, sampled with the run's seed where the stage takes fewer than there are."""

    harmful_direction: Rows
    harmless_direction: Rows
    harmful_scoring: Rows
    harmless_scoring: Rows
    harmful_validation: Rows
    harmless_validation: Rows


def align(recipe: Recipe, base: "Loaded", screen: Screen) -> Path:
    """Align `base` and return the folder of adapters, with the run's record in `run/` beside them.

    Raises:
        UserError: what a user can mend, in one sentence.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from .evaluate import evaluate, first_of_each, make_test_set
    from .prompts import end_of_instruction
    from .runfolder import RunFolder, check_output
    from .student import adapter_config, make_student, save_adapters
    from .train import NotFiniteError, number_of_steps, train, trained_change

    run, tokenizer, started = recipe.run, base.tokenizer, time.time()
    folder = Path(run.adapter_path)
    check_output(folder)
    if (folder / "run").is_dir():
        screen.line(f"{folder} holds an earlier run, which this one replaces")
    sets = _prompt_sets(recipe)
    n_eoi = len(end_of_instruction(tokenizer))
    rendered = _render(recipe, sets, tokenizer, n_eoi)
    student = make_student(base.model, recipe.train, run.seed, base.quantized)

    # 1. The refusal direction: mean activations on harmful minus harmless instructions.
    openers = _find_openers(recipe, base, rendered, screen)
    direction, kept = _find_direction(recipe, base.model, rendered, n_eoi, list(openers.values()), screen)

    # 2. The safety teacher: the base, steered along the direction.
    teacher, coeff, curve = _make_teacher(recipe, base, direction, rendered, screen)

    # 3. The safety tokens: what the teacher favours over the base.
    tokens, contrast = _find_tokens(recipe, base, teacher, kept, rendered, screen)

    record = RunFolder(folder)
    record.yaml("recipe.yaml", recipe.flat())
    record.json("direction.json", _direction_record(direction, openers, coeff, curve))
    record.json("tokens.json", _token_record(tokens, contrast, tokenizer))

    # 4. The student learns from its own answers, on the safety tokens, and stays put on harmless prompts.
    prompts = _training_prompts(recipe, sets, tokenizer, teacher, screen)
    config = adapter_config(recipe.train, run.model, run.seed)
    before = dict(tree_flatten(student.trainable_parameters()))
    metrics: list[dict[str, Any]] = []
    interrupted = False
    steps = train(
        student,
        base.model,
        teacher,
        mx.array(tokens),
        *prompts,
        recipe.train,
        recipe.loss,
        eos_ids=base.eos_ids,
        seed=run.seed,
        generation_batch_size=run.generation_batch_size,
        after_step=_moving_teacher(recipe, base, student, direction, coeff, rendered, kept, screen),
    )
    with screen.stage("training") as advance:
        try:
            for m in steps:
                metrics.append(asdict(m))
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
                tokens,
                eos_ids=base.eos_ids,
                seed=run.seed,
                batch_size=run.generation_batch_size,
                system_prompt=teacher.system_prompt if name == "teacher" else None,
                progress=advance,
            )
    record.json("before_after.json", {name: s.as_json() for name, s in scores.items()})
    record.json("manifest.json", _manifest(base, folder))
    record.json("timing.json", {"seconds": round(time.time() - started, 1)})
    _show(scores, screen)
    screen.line(
        f"adapters: {folder} (mlx_lm.generate --model {run.model} --adapter-path {folder}); record: {record.path}"
    )
    return folder


def _prompt_sets(recipe: Recipe) -> "PromptSets":
    """The bundled model's own prompts for it, else the package's; `--data` replaces the training prompts."""
    from dataclasses import replace

    from .prompts import load_instructions, load_prompt_sets

    bundled = Path(recipe.run.model).resolve() == (MODELS / BUNDLED).resolve()
    sets = load_prompt_sets(MODELS / BUNDLED / "data" if bundled else PACKAGE / "data")
    if recipe.run.data is not None:
        sets = replace(sets, harmful_train=load_instructions(Path(recipe.run.data).expanduser()))
    return sets


def _render(recipe: Recipe, sets: "PromptSets", tokenizer: Any, n_eoi: int) -> Rendered:
    import numpy as np

    from .prompts import render_all

    def sample(name: str, count: int, which: int) -> Rows:
        items = getattr(sets, name)
        if len(items) < count:
            raise UserError(f"{name} holds {len(items)} prompts, {count} are needed; lower the setting or add prompts")
        chosen = np.random.default_rng([recipe.run.seed, which]).permutation(len(items))[:count]
        return render_all(tokenizer, [items[i] for i in sorted(chosen)])

    settings = recipe.direction
    return Rendered(
        sample("harmful_direction_train", settings.direction_train, 0),
        sample("harmless_direction_train", settings.direction_train, 1),
        sample("harmful_direction_validation", settings.direction_validation, 2),
        sample("harmless_direction_validation", settings.direction_validation, 3),
        render_all(tokenizer, sets.harmful_validation),
        render_all(tokenizer, sets.harmless_validation),
    )


def _find_openers(recipe: Recipe, base: "Loaded", rendered: Rendered, screen: Screen) -> dict[str, int]:
    """First tokens of refusals: the recipe's texts, and those the model itself begins its refusals with."""
    from collections import Counter

    from .judge import is_refusal
    from .prompts import opener_ids
    from .rollout import generate

    tokenizer = base.tokenizer
    found = opener_ids(tokenizer, recipe.direction.openers)
    with screen.stage("reading how the model refuses") as advance:
        harmful, harmless = (
            generate(base.model, rows, eos_ids=base.eos_ids, max_tokens=32, progress=advance)
            for rows in (rendered.harmful_direction, rendered.harmless_direction)
        )
    refused = Counter(a.ids[0] for a in harmful if is_refusal(a.text(tokenizer)))
    ordinary = Counter(a.ids[0] for a in harmless)
    for token, count in refused.most_common():
        # Kept if it opens one refusal in twenty and hardly ever an answer to a harmless prompt.
        if count >= max(2, refused.total() / 20) and ordinary[token] / len(harmless) <= count / refused.total() / 10:
            found.setdefault(tokenizer.decode([token]), token)
    if not found:
        raise UserError("no refusal opener is a token of this model; give --openers texts that its refusals begin with")
    share = f"{refused.total()} of {len(harmful)} harmful prompts are refused"
    screen.line(f"openers: {', '.join(repr(text) for text in found)}; {share}")
    return found


def _find_direction(
    recipe: Recipe, model: "nn.Module", rendered: Rendered, n_eoi: int, refusal_ids: list[int], screen: Screen
) -> tuple["Direction", Rows]:
    """The chosen direction, and the harmless validation prompts that passed the filter."""
    import mlx.core as mx
    import numpy as np

    from . import direction as stage

    s = recipe.direction
    limits = {
        "kl_threshold": s.kl_threshold,
        "steering_threshold": s.steering_threshold,
        "prune_last": s.prune_last,
    }

    def kept(harmful: Rows, harmless: Rows) -> tuple[Rows, Rows]:
        h, b = stage.keep_answered_as_meant(model, harmful, harmless, refusal_ids)
        if not len(h) or not len(b):
            raise UserError(
                f"the base refuses {len(h)} of {len(harmful)} harmful and answers {len(b)} of {len(harmless)} harmless "
                "prompts; SafeSteer needs a base that sometimes refuses (try --teacher system_prompt or --openers)"
            )
        return [harmful[i] for i in h], [harmless[i] for i in b]

    if recipe.teacher.teacher == "system_prompt":
        return stage.no_direction(model), kept(rendered.harmful_scoring, rendered.harmless_scoring)[1]
    with screen.stage("finding the refusal direction") as advance:
        candidates = stage.mean_differences(
            model, *kept(rendered.harmful_direction, rendered.harmless_direction), n_eoi
        )
        harmful, harmless = kept(rendered.harmful_scoring, rendered.harmless_scoring)
        scores = stage.score_candidates(
            model, candidates, harmful, harmless, refusal_ids, exhaustive=False, **limits, progress=advance
        )
        try:
            position, layer = stage.choose_direction(scores, **limits)
        except stage.NoDirectionError:
            scores = stage.score_candidates(model, candidates, harmful, harmless, refusal_ids, True, progress=advance)
            near = "; ".join(
                f"block {layer} position {position}: {', '.join(failed)}"
                for position, layer, failed in stage.nearest_candidates(scores, **limits)
            )
            raise UserError(
                f"no refusal direction passes the tests (nearest: {near}); loosen --steering-threshold or "
                "--kl-threshold, give other --openers, or use --teacher system_prompt"
            ) from None
    vector = mx.array(candidates[position, layer].astype(np.float32))
    found = stage.Direction(position, layer, vector, scores)
    p = (position, layer)
    screen.line(
        f"direction: block {layer} of {candidates.shape[1]}, position {position}, KL {scores.ablation_kl[p]:.3f}, "
        f"refusal under ablation {scores.ablation_refusal[p]:+.1f}, steering {scores.steering_refusal[p]:+.1f}"
    )
    return found, harmless


def _make_teacher(
    recipe: Recipe, base: "Loaded", direction: "Direction", rendered: Rendered, screen: Screen
) -> tuple["Teacher", float, list[Any]]:
    from .teacher import Teacher, find_coefficient, steered_teacher

    settings = recipe.teacher
    if settings.teacher == "system_prompt":
        screen.line("teacher: the base under a safety system prompt")
        return Teacher(base.model, settings.system_prompt), 0.0, []
    if settings.coeff != "auto":
        coeff, curve = float(settings.coeff), []
        screen.line(f"teacher: coefficient {coeff:g}")
    else:
        with screen.stage("finding the steering coefficient") as advance:
            coeff, curve = find_coefficient(
                base.model,
                direction.layer,
                direction.vector,
                rendered.harmful_validation,
                rendered.harmless_validation,
                settings,
                tokenizer=base.tokenizer,
                eos_ids=base.eos_ids,
                batch_size=recipe.run.generation_batch_size,
                progress=advance,
            )
        at = next(t for t in curve if t.coeff == coeff)
        screen.line(
            f"teacher: coefficient {coeff:g} refuses {at.harmful_refused:.0%} of the harmful prompts that the base "
            f"answers and {at.harmless_refused:.0%} of harmless ones, {at.broken:.0%} broken"
        )
        if at.harmful_refused < settings.coeff_refusal:
            screen.line(f"  less than the {settings.coeff_refusal:.0%} asked for: no coefficient reaches it unbroken")
    return steered_teacher(base.model, direction.layer, direction.vector, coeff), coeff, curve


def _find_tokens(
    recipe: Recipe, base: "Loaded", teacher: "Teacher", harmless: Rows, rendered: Rendered, screen: Screen
) -> tuple[Any, Any]:
    """The safety tokens, from the teacher's own continuations; of harmful prompts if a system prompt makes it."""
    from .prompts import special_ids
    from .rollout import generate, stream_key
    from .safety_tokens import contrast_tokens, select_tokens

    s, tokenizer, m = recipe.tokens, base.tokenizer, recipe.tokens.token_samples
    source = rendered.harmful_scoring if teacher.system_prompt else harmless
    prompts = [row for row in source for _ in range(m)]
    teacher_prompts = _under(teacher, tokenizer, recipe, prompts, base) if teacher.system_prompt else prompts
    continuations: Rows = [[] for _ in prompts]
    with screen.stage("finding the safety tokens") as advance:
        if s.horizon > 1:
            drawn = generate(
                teacher.model,
                teacher_prompts,
                eos_ids=base.eos_ids,
                max_tokens=s.horizon - 1,
                temp=1.0,
                keys=[stream_key(recipe.run.seed, 0, i) for i in range(len(prompts))],
                batch_size=recipe.run.generation_batch_size,
                progress=advance,
            )
            continuations = [c.ids for c in drawn]
        contrast = contrast_tokens(
            base.model,
            teacher.model,
            prompts,
            continuations,
            eot_ids=base.eos_ids,
            banned_ids=special_ids(tokenizer, base.vocabulary),
            inner_top_k=s.inner_top_k,
            min_steered_prob=s.min_steered_prob,
            teacher_prompts=teacher_prompts,
        )
    tokens = select_tokens(contrast, s.safety_tokens, s.token_method)
    if not len(tokens):
        raise UserError(f"no token reaches min_steered_prob = {s.min_steered_prob:g}; lower --min-steered-prob")
    shown = " ".join(repr(tokenizer.decode([int(t)])) for t in tokens[:10])
    screen.line(f"safety tokens: {len(tokens)} from {contrast.n_positions} positions, first {shown}")
    return tokens, contrast


def _under(teacher: "Teacher", tokenizer: Any, recipe: Recipe, prompts: Rows, base: "Loaded") -> Rows:
    """The same instructions as `prompts`, rendered with the teacher's system prompt."""
    from .prompts import render_all

    sets = _prompt_sets(recipe)
    plain = {tuple(row): i for i, row in enumerate(render_all(tokenizer, sets.harmful_direction_validation))}
    under = render_all(tokenizer, sets.harmful_direction_validation, teacher.system_prompt)
    return [under[plain[tuple(row)]] for row in prompts]


def _training_prompts(
    recipe: Recipe, sets: "PromptSets", tokenizer: Any, teacher: "Teacher", screen: Screen
) -> tuple[list[Any], list[Any]]:
    """Harmful and anchor prompts as student and target read them; those over the length are left out, and said."""
    from .prompts import render
    from .train import TrainingPrompt

    limit = recipe.train.max_seq_length
    found: tuple[list[Any], list[Any]] = ([], [])
    for harmful, items, into in (
        (True, sets.harmful_train, found[0]),
        (False, sets.harmless_train, found[1]),
    ):
        for item in items:
            ids = render(tokenizer, item.text)
            seen = render(tokenizer, item.text, teacher.system_prompt) if harmful and teacher.system_prompt else ids
            if len(ids) <= limit:
                into.append(TrainingPrompt(ids, seen, harmful))
        if len(into) < len(items):
            screen.line(f"{len(items) - len(into)} prompts are longer than {limit} tokens and are left out")
    if not found[0]:
        raise UserError(f"every training prompt is longer than max_seq_length = {limit}; raise --max-seq-length")
    return found


def _moving_teacher(
    recipe: Recipe,
    base: "Loaded",
    student: "nn.Module",
    direction: "Direction",
    coeff: float,
    rendered: Rendered,
    kept: Rows,
    screen: Screen,
) -> Any:
    """What `train` calls after each step: nothing, or the moving-average teacher's next state (variant a)."""
    if recipe.teacher.teacher != "ema":
        return lambda step: None
    import mlx.core as mx
    import numpy as np

    from .direction import mean_differences
    from .teacher import follow, moving_average, steered_teacher

    moving = moving_average(student)
    vector, tokens = direction.vector, None

    def after_step(step: int) -> tuple["Teacher", "mx.array | None"]:
        nonlocal vector, tokens
        follow(moving, student, recipe.teacher.mixup)
        teacher = steered_teacher(moving, direction.layer, vector, coeff)
        every = recipe.teacher.refresh_every
        if every and step % every == 0:
            found = mean_differences(
                moving, rendered.harmful_direction, rendered.harmless_direction, -direction.position
            )
            vector = mx.array(found[0, direction.layer].astype(np.float32))
            teacher = steered_teacher(moving, direction.layer, vector, coeff)
            tokens = mx.array(_find_tokens(recipe, base, teacher, kept, rendered, screen)[0])
        return teacher, tokens

    return after_step


def _direction_record(
    direction: "Direction", openers: dict[str, int], coeff: float, curve: Sequence[Any]
) -> dict[str, Any]:
    import numpy as np

    return {
        "position": direction.position,
        "layer": direction.layer,
        "coeff": coeff,
        "openers": openers,
        "coefficient_curve": [asdict(trial) for trial in curve],
        "vector": np.array(direction.vector, np.float64),
        "scores": asdict(direction.scores),
    }


def _token_record(tokens: Any, contrast: Any, tokenizer: Any) -> list[dict[str, Any]]:
    return [
        {
            "token": tokenizer.decode([int(t)]),
            "id": int(t),
            "votes": int(contrast.votes[t]),
            "mean_delta": float(contrast.mean_delta[t]),
            "base_prob": float(contrast.base_prob[t]),
            "teacher_prob": float(contrast.steered_prob[t]),
        }
        for t in tokens
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
        given = flags.get("model")
        if given is None and yaml_file is not None:
            from .recipe import read_yaml

            given = read_yaml(yaml_file).get("model")
        name = str(MODELS / BUNDLED) if given in (None, BUNDLED) and not Path(BUNDLED).exists() else str(given)
        resolve({}, flags, preset, yaml_file)  # a mistake in a setting is told before anything is fetched
        from .runfolder import check_output

        check_output(Path(flags.get("adapter_path", "adapters")))
        from .load import find, load, read_config

        recipe, found = resolve(read_config(find(name)), flags, preset, yaml_file)
        recipe = replace(recipe, run=replace(recipe.run, model=name))
        screen = Screen(quiet=_rank() != 0)
        base = load(name, recipe.run.trust_remote_code)
        if preset == "paper" and "fine_tune_type" not in flags and not base.quantized:
            # As published: all weights at the published rate. Quantized weights cannot be trained.
            full = replace(recipe.train, fine_tune_type="full", learning_rate=flags.get("learning_rate", 1e-5))
            recipe = replace(recipe, train=full)
        screen.line(f"model: {name}" + (f", recipe {found}" if found else ", no recipe of its own: defaults"))
        align(recipe, base, screen)
    except UserError as error:
        print(f"safesteer-mlx: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _rank() -> int:
    import mlx.core as mx

    return mx.distributed.init().rank()


if __name__ == "__main__":
    sys.exit(main())
