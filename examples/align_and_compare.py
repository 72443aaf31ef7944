"""Align a model from Python and compare it with its base. Counts are printed, no prompt and no answer.

    python examples/align_and_compare.py                                        the bundled model, some minutes
    python examples/align_and_compare.py MODEL --adapter-path adapters-mine     a folder or a Hub id
    python examples/align_and_compare.py --set iters=8 --set test_prompts=16    any setting, by its YAML key

docs/api.md has the functions, docs/commands.md the settings.
"""

import argparse
import sys

import yaml

import safesteer_mlx as safesteer

# What is counted against a model: harmful requests answered, others refused.
AGAINST = {"harmful": "comply", "harmless": "refuse", "borderline": "refuse"}


def compared(base: safesteer.Scores, student: safesteer.Scores) -> list[str]:
    """Base and student side by side, a line each; a count shows its rate and 95 % interval."""
    lines = []
    for kind, outcome in AGAINST.items():
        before, after = (scores.count(kind, "sampled", outcome) for scores in (base, student))
        word = "answered" if outcome == "comply" else "refused"
        lines.append(f"{kind} requests {word}: {before} → {after}")
    for task in base.correct:
        lines.append(f"{task}, right: {base.right(task)} → {student.right(task)}")
    lines.append(f"mean KL(base ‖ aligned) a token of harmless answers: {student.drift:.5f} nats")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-chat")
    parser.add_argument("--adapter-path", default="adapters-example")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of align")
    args = parser.parse_args()
    settings = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in args.set)}

    try:
        base = safesteer.load(args.model)
        result = safesteer.align(base, args.adapter_path, quiet=False, **settings)
    except safesteer.UserError as error:  # one sentence: what is wrong, and what to do
        print(error, file=sys.stderr)
        return 2
    print("verdict before training:", result.verdict.word)
    for line in compared(result.scores["base"], result.scores["student"]):
        print(line)
    if result.not_aligned:
        print("not to be used:", result.not_aligned)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
