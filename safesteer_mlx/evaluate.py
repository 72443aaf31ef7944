"""The scorecard: `python -m safesteer_mlx.evaluate MODEL [--adapter-path A] [--suite NAME …] [--judge J [K]]`.

Refusal, over-refusal, evasion, capability and drift from the base of one model, or of a base and its aligned
form side by side. docs/evaluation.md says how each is measured and what its known errors are.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import command_module
from .recipe import (
    BUNDLED,
    MOST_BATCH,
    MOST_LENGTH,
    MOST_SAMPLES,
    MOST_SEED,
    Parser,
    adapter_folder,
    add_model_flags,
    at_least,
    model_name,
    nearest,
    one_model,
)
from .system.files import MOST_TEXT, check_out, check_regular, user_path, write_out
from .system.hub import prepare
from .system.screen import Screen, UserError, exit_code

if TYPE_CHECKING:
    from .method.prompts import Instruction
    from .system.load import Loaded

BUILT_IN = "built-in"
ATTACKS = ("prefill", "own-answer", "decoding", "system", "template", "wrappers", "encodings", "turns", "languages")


def _parser() -> Parser:
    parser = Parser("evaluate", "Score a chat model: refusal, over-refusal, evasion, capability, drift from the base.")
    add = parser.add_argument
    add("positional_model", nargs="?", metavar="MODEL", help="as --model")
    add("--model", help=f"Hub id or folder of the model (default: {BUNDLED}, the bundled one)")
    add("--adapter-path", type=Path, help="adapters to score beside the base")
    add("--against", metavar="ORIGINAL", help="the model that MODEL was quantized from, to score beside it")
    add(
        "--suite",
        nargs="+",
        metavar="NAME[=FILE]",
        help=f"suites to run, of the Hub or a local file; {BUILT_IN} is our own held-out prompts (default: it alone, "
        "without --tasks)",
    )
    add("--data", metavar="FOLDER", help=f"own test sets by name (harmful_test.jsonl, …), for those of {BUILT_IN}")
    add("--tasks", nargs="+", default=[], metavar="TASK", help="tasks of lm-eval, by name or as own .yaml files")
    add("--test-prompts", type=at_least(0), default=100, help="prompts of each set; 0 for all (default: 100)")
    add("--samples", type=at_least(1, MOST_SAMPLES), default=1, help="sampled answers to each prompt (default: 1)")
    add(
        "--attacks",
        nargs="*",
        metavar="FAMILY",
        help=f"also the harmful prompts under attack: {', '.join(ATTACKS)} (default: all of them)",
    )
    add("--tamper", action="store_true", help="also after abliteration and after tuning on harmless requests")
    add(
        "--judge",
        nargs="+",
        default=["keyword"],
        metavar="MODEL",
        help="keyword, or the model that judges; of two the first decides, and both are compared (default: keyword)",
    )
    add(
        "--judge-template",
        nargs="+",
        metavar="NAME",
        help="guard, instruct, another of data/judges or a file, one for each judge model (default: by its name)",
    )
    add("--refusal-phrases", metavar="FILE", help="refusals that the keyword judge shall know too, a phrase a line")
    add("--seed", type=at_least(0, MOST_SEED), default=42, help="seed of everything that is drawn (default: 42)")
    add(
        "--max-tokens",
        type=at_least(1, MOST_LENGTH),
        default=96,
        help="longest answer, thinking included (default: 96)",
    )
    add("--batch-size", type=at_least(1, MOST_BATCH), default=64, help="answers generated at a time (default: 64)")
    add("--perplexity", type=Path, metavar="FILE", help="also the perplexity of this text")
    add("--out", type=Path, metavar="FILE.json", help="write the scores here, no answers")
    add("--confirm-run-unsafe-code", action="store_true", help="let HumanEval run the code that the model writes")
    add_model_flags(parser)
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: an unknown flag, with the nearest known one, two models, or a wrong value.
    """
    args = _parser().parse_args(argv)
    if len(args.judge) == 2 and args.positional_model is None and args.model is None:
        # A model's name behind --judge would be taken for a judge's, and the bundled model be scored in its place.
        raise UserError(f"--judge {' '.join(args.judge)} names two judges, but no model is named; give MODEL before it")
    args.model = model_name(one_model(args.positional_model, args.model))
    args.suite = args.suite or ([] if args.tasks else [BUILT_IN])
    if args.data is not None and BUILT_IN not in args.suite:
        raise UserError(f"--data {args.data} is for the suite {BUILT_IN}; add it to --suite, or leave --data out")
    if args.adapter_path is not None:
        args.adapter_path = adapter_folder(args.adapter_path)
    if args.against is not None and model_name(args.against) == args.model:
        raise UserError(f"--against {args.against} is the model itself; give the one that it was quantized from")
    for family in args.attacks or []:
        if family not in ATTACKS:
            raise UserError(f"there is no attack {family!r}{nearest(family, ATTACKS) or ': ' + ', '.join(ATTACKS)}")
    if args.perplexity is not None:
        check_regular(args.perplexity, f"--perplexity {args.perplexity}", "give a text file", MOST_TEXT)
    if args.out is not None:
        check_out(args.out, "--out")
    return args


@dataclass(frozen=True)
class Asked:
    """What --suite asks for: prompts by set, the kind of each suite's set, and lm-eval's tasks."""

    kinds: dict[str, list["Instruction"]]
    kind_of: dict[str, str]
    capability: list["Instruction"]
    tasks: list[str]


def read_suites(args: argparse.Namespace) -> Asked:
    """Find every suite, then read each one's prompts: the first few of ours, a draw of the others'.

    Raises:
        UserError: an unknown suite, one whose file cannot be had, or a task without lm-eval.
    """
    import numpy as np

    from .evals.heldout import held_out_prompts
    from .evals.lm_tasks import check_tasks, task_name
    from .evals.suites import find_suite, load_suite
    from .method.prompts import sets_to_score

    n = args.test_prompts or None
    parts = [text.partition("=") for text in args.suite]
    suites = {name: find_suite(name) for name, _, _ in parts if name != BUILT_IN}
    tasks = [suite for suite in suites.values() if suite.kind == "task"]
    prompts = Asked({}, {}, [], [*(task.task for task in tasks), *args.tasks])
    for task in args.tasks:
        if task.endswith(".yaml"):
            task_name(Path(task))
    if prompts.tasks:
        check_tasks(any(t.runs_code for t in tasks), args.confirm_run_unsafe_code)
    for name, _, file in parts:
        if file and (name == BUILT_IN or suites[name].kind == "task"):
            raise UserError(f"--suite {name}={file}: {name} is not read from a file; leave ={file} out")
        if name == BUILT_IN:
            kinds, capability = held_out_prompts(sets_to_score(args.model, args.data), n)
            prompts.kinds.update(kinds)
            prompts.capability.extend(capability)
        elif (suite := suites[name]).kind != "task":
            items = load_suite(suite, user_path(file) if file else None)
            # Many suites are sorted by category: their first few would be of one.
            order = np.random.default_rng(args.seed).permutation(len(items))[:n]
            prompts.kinds[suite.name], prompts.kind_of[suite.name] = [items[i] for i in order], suite.kind
    if (args.attacks is not None or args.tamper) and "harmful" not in [
        prompts.kind_of.get(name, name) for name in prompts.kinds
    ]:
        raise UserError(
            f"--attacks and --tamper need harmful prompts, and {' '.join(args.suite)} has none; add {BUILT_IN}"
        )
    return prompts


def _safety_tokens(folder: Path | None, base: "Loaded") -> list[int]:
    """The run's own safety tokens, if align wrote these adapters: drift is measured without them too."""
    from .method.token_file import read_token_file

    path = folder / "run" / "tokens.json" if folder else None
    return read_token_file(path, base.tokenizer, base.vocabulary) if path and path.exists() else []


def _kept_answers(folder: Path | None) -> Path | None:
    """Where the run of these adapters keeps its base's answers, if it does."""
    from .system.store import BASE_ANSWERS

    path = folder / "run" / BASE_ANSWERS if folder else None
    return path if path and path.is_file() else None


def score(args: argparse.Namespace, prompts: Asked, base: "Loaded", screen: Screen) -> dict[str, Any]:
    """Score the base, and the aligned model if there are adapters; print the tables, return what --out holds.

    Raises:
        UserError: what a user can mend, in one sentence.
    """
    from .method.run import batch_size
    from .method.student import with_adapters

    args.batch_size = batch_size(base, args.batch_size, screen)
    _leave_out_long(prompts, base, screen)
    models = {} if args.against is None else {"original": _original(args, base)}
    models["base"] = base.model
    if args.adapter_path is not None:
        models["student"] = with_adapters(base.model, args.adapter_path)
    result: dict[str, Any] = {"settings": {k: v for k, v in vars(args).items() if k != "positional_model"}}
    if args.perplexity is not None:
        result["perplexity"] = _perplexities(args, models, base, screen)
    if prompts.kinds:
        result |= _scores(args, prompts, models, base, screen)
    if args.attacks is not None or args.tamper:
        result["attacks"] = _attacks(args, prompts, models, base, screen)
    if prompts.tasks:
        result["tasks"] = _tasks(args, prompts, models, base, screen)
    return result


def _leave_out_long(prompts: Asked, base: "Loaded", screen: Screen) -> None:
    """Take out prompts of more tokens than are read, and say how many.

    Raises:
        UserError: none of a suite is left.
    """
    from .method.prompts import render
    from .method.run import most_read

    most = most_read(base)
    for name, items in prompts.kinds.items():
        # A token is a byte at least, so that hardly any prompt need be rendered for this.
        fit = [i for i in items if len(i.text.encode()) < most / 2 or len(render(base.tokenizer, i.text)) <= most]
        if items and not fit:
            raise UserError(f"every prompt of {name} is longer than the {most:,} tokens that are read; give others")
        if len(fit) < len(items):
            screen.line(f"{name}: {len(items) - len(fit)} prompts are longer than {most:,} tokens and are left out")
        prompts.kinds[name] = fit


def _original(args: argparse.Namespace, base: "Loaded") -> Any:
    """The model that the base was quantized from.

    Raises:
        UserError: it reads prompts otherwise, so that it is another model.
    """
    from .method.prompts import render
    from .system.load import load

    original = load(model_name(args.against), args.trust_remote_code, args.thinking)
    same = original.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    if not same or render(original.tokenizer, "Why?") != render(base.tokenizer, "Why?"):
        raise UserError(
            f"--against {args.against} has another tokenizer or chat template than {base.name}; give its own"
        )
    return original.model


def _perplexities(args: argparse.Namespace, models: dict[str, Any], base: "Loaded", screen: Screen) -> dict[str, Any]:
    from .evals.heldout import perplexity

    perplexities = {name: perplexity(model, base.tokenizer, args.perplexity) for name, model in models.items()}
    for name, (value, error, tokens) in perplexities.items():
        screen.line(f"perplexity of {args.perplexity}, {name}: {value:.3f} ± {error:.3f} over {tokens} tokens")
    keys = ("perplexity", "standard_error", "tokens")
    return {name: dict(zip(keys, values, strict=True)) for name, values in perplexities.items()}


def _attacks(
    args: argparse.Namespace, prompts: Asked, models: dict[str, Any], base: "Loaded", screen: Screen
) -> dict[str, Any]:
    from .evals.attacks import Attacker, attacks_json, judged_by, run_attacks, run_tampering, show_attacks
    from .evals.heldout import until_told
    from .evals.judging import choose_judges
    from .evals.tampering import Tampering
    from .method.prompts import sets_to_score
    from .method.rollout import Sampling

    items = next(items for name, items in prompts.kinds.items() if prompts.kind_of.get(name, name) == "harmful")
    sampling = Sampling(base.eos_ids, args.max_tokens, batch_size=args.batch_size)
    families = [] if args.attacks is None else args.attacks or ATTACKS
    judge = choose_judges(args.judge, args.judge_template)[0]
    how = until_told(sampling, base.tokenizer) if judge.template is None else sampling
    attacker = Attacker(base, how, args.seed)
    results = run_attacks(attacker, models, items, families, screen)
    if args.tamper:
        run = args.adapter_path / "run" if args.adapter_path else None
        tampering = Tampering(base, sets_to_score(args.model, args.data), sampling, args.seed)
        for name, found in run_tampering(attacker, models, items, tampering, run, screen).items():
            results[name] += found
    results = judged_by(judge, results, args.trust_remote_code, args.batch_size, screen)
    show_attacks(results, screen)
    return attacks_json(results)


def _scores(
    args: argparse.Namespace, prompts: Asked, models: dict[str, Any], base: "Loaded", screen: Screen
) -> dict[str, Any]:
    from .evals.heldout import HeldOut, TestSet
    from .evals.judging import check_judges, choose_judges, judge_all
    from .evals.scores import show
    from .method.rollout import Sampling

    judges = choose_judges(args.judge, args.judge_template)
    check_judges(judges, args.trust_remote_code)
    sampling = Sampling(base.eos_ids, args.max_tokens, batch_size=args.batch_size)
    test = TestSet(prompts.kinds, prompts.capability, {kind: prompts.kind_of.get(kind, kind) for kind in prompts.kinds})
    tokens, kept = _safety_tokens(args.adapter_path, base), _kept_answers(args.adapter_path)
    whole = any(judge.template is not None for judge in judges)
    held_out = HeldOut(base, test, tokens, args.seed, sampling, args.samples, whole, kept)
    scores = {}
    for name, own in held_out.score_each(models, screen):
        scores[name] = own
        if base.tokenizer.has_thinking and (cut := sum(not (a.finished or a.text) for a in own.answers)):
            screen.line(f"{cut} answers of the {name} ran out of --max-tokens while thinking, and count as evasions")
    judged = judge_all(judges, scores, test.kind_of, args.trust_remote_code, args.batch_size, screen)
    scores = judged.first()
    show(scores, screen, f"Judge: {judges[0].label}")
    judged.show(screen)
    result = {name: s.as_json() for name, s in scores.items()} | {"kinds": test.kind_of}
    return result | ({"judges": judged.as_json()} if args.judge != ["keyword"] else {})


def _tasks(
    args: argparse.Namespace, prompts: Asked, models: dict[str, Any], base: "Loaded", screen: Screen
) -> dict[str, Any]:
    from .evals.lm_tasks import run_tasks

    results = {
        name: run_tasks(
            model,
            base.tokenizer,
            prompts.tasks,
            seed=args.seed,
            batch_size=args.batch_size,
            limit=args.test_prompts or None,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        )
        for name, model in models.items()
    }
    for name, tasks in results.items():
        for task, metrics in tasks.items():
            numbers = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items() if isinstance(value, float))
            screen.line(f"{task}, {name}: {numbers}")
    return results


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: _run(argv))


def _run(argv: list[str] | None) -> None:
    args = parse(argv)
    prepare(args.offline)
    from .method.judge import use_refusal_phrases

    use_refusal_phrases(args.refusal_phrases)
    prompts = read_suites(args)  # a mistake in these is told before a model is fetched
    from .evals.judging import choose_judges
    from .system.load import load

    choose_judges(args.judge, args.judge_template)

    screen = Screen()
    if args.data is not None:
        from .method.prompts import given_files, sources

        tests = [name for name in given_files(args.data) if name.endswith("_test")]
        screen.line(f"prompts: {sources(args.model, args.data, tests)}")
    result = score(args, prompts, load(args.model, args.trust_remote_code, args.thinking, args.revision), screen)
    if args.out is not None:
        # NaN is not JSON; a measurement that does not exist is null.
        plain = json.loads(json.dumps(result, default=str), parse_constant=lambda _: None)
        write_out(args.out, json.dumps(plain, indent=2) + "\n")
        screen.line(f"scores: {args.out}")


command_module(__name__)

if __name__ == "__main__":
    sys.exit(main())
