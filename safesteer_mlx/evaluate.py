"""The scorecard: `python -m safesteer_mlx.evaluate MODEL [--adapter-path A] [--suite NAME …] [--judge J [K]]`.

Refusal, over-refusal, evasion, capability and drift from the base of one model, or of a base and its aligned
form side by side. docs/evaluation.md says how each is measured and what its known errors are.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

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
    thinking_of,
)
from .system.files import MOST_TEXT, check_out, check_regular, user_path, write_out
from .system.hub import prepare
from .system.screen import Screen, UserError, command_line

if TYPE_CHECKING:
    from .evals.heldout import TestSet

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


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; a UserError for an unknown flag, with the nearest known one, two models, or a wrong value."""
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
    args.thinking = args.thinking or thinking_of(args.adapter_path)
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


def read_suites(args: argparse.Namespace) -> "tuple[TestSet, list[str]]":
    """Find every suite, then read each one's prompts: the first few of ours, a draw of the others'. Sets that all have
    a kind, and lm-eval's tasks; a UserError for an unknown suite, one that cannot be had, or tasks without lm-eval."""
    import numpy as np

    from .evals.heldout import TestSet, held_out_prompts
    from .evals.suites import check_tasks, find_suite, load_suite, task_name
    from .method.prompts import sets_to_score

    n = args.test_prompts or None
    parts = [text.partition("=") for text in args.suite]
    suites = {name: find_suite(name) for name, _, _ in parts if name != BUILT_IN}
    of_suites = [suite for suite in suites.values() if suite.kind == "task"]
    tasks = [*(suite.task for suite in of_suites), *args.tasks]
    for task in args.tasks:
        if task.endswith(".yaml"):
            task_name(Path(task))
    if tasks:
        check_tasks(any(suite.runs_code for suite in of_suites), args.confirm_run_unsafe_code)
    kinds, capability, kind_of = {}, [], {}
    for name, _, file in parts:
        if file and (name == BUILT_IN or suites[name].kind == "task"):
            raise UserError(f"--suite {name}={file}: {name} is not read from a file; leave ={file} out")
        if name == BUILT_IN:
            ours, capability = held_out_prompts(sets_to_score(args.model, args.data), n)
            kinds |= ours
            kind_of |= {kind: kind for kind in ours}
        elif (suite := suites[name]).kind != "task":
            items = load_suite(suite, user_path(file) if file else None)
            # Many suites are sorted by category: their first few would be of one.
            order = np.random.default_rng(args.seed).permutation(len(items))[:n]
            kinds[suite.name], kind_of[suite.name] = [items[i] for i in order], suite.kind
    if (args.attacks is not None or args.tamper) and "harmful" not in kind_of.values():
        raise UserError(
            f"--attacks and --tamper need harmful prompts, and {' '.join(args.suite)} has none; add {BUILT_IN}"
        )
    return TestSet(kinds, capability, kind_of), tasks


@command_line
def main(argv: list[str]) -> None:
    """Score, show and write the scores."""
    args = parse(argv)
    prepare(args.offline)
    from .method.judge import use_refusal_phrases

    use_refusal_phrases(args.refusal_phrases)
    test, tasks = read_suites(args)  # a mistake in these is told before a model is fetched
    from .evals.judging import choose_judges
    from .evals.scorecard import score
    from .system.load import load

    choose_judges(args.judge, args.judge_template)

    screen = Screen()
    if args.data is not None:
        from .method.prompts import given_files, sources

        tests = [name for name in given_files(args.data) if name.endswith("_test")]
        screen.line(f"prompts: {sources(args.model, args.data, tests)}")
    families = [] if args.attacks is None else args.attacks or ATTACKS
    base = load(args.model, args.trust_remote_code, args.thinking, args.revision)
    result = score(args, test, tasks, families, base, screen)
    if args.out is not None:
        # NaN is not JSON; a measurement that does not exist is null.
        plain = json.loads(json.dumps(result, default=str), parse_constant=lambda _: None)
        write_out(args.out, json.dumps(plain, indent=2) + "\n")
        screen.line(f"scores: {args.out}")


command_module(__name__)

if __name__ == "__main__":
    sys.exit(main())
