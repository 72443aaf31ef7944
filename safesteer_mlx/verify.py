"""Is it what was scored? `python -m safesteer_mlx.verify RUN --against FOLDER | FILE.gguf | http://…/v1`.

Asks an export, or a running OpenAI-compatible server, the run's held-out prompts, and holds its answers against those
of the run's student and base. Exit code 1 if it is not the student.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from .recipe import Parser, at_least
from .system.files import check_out, write_out
from .system.hub import prepare
from .system.screen import Screen, UserError, command_line

PROMPTS = 100  # of each kind
WITH = ("mlx", "adapter", "transformers", "peft", "llama.cpp", "server")


@command_line
def main(argv: list[str]) -> int:
    """Ask what is shipped; 1 if it is not the student."""
    parser = Parser("verify", "Hold an export, or a running server, against the student that its run scored.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of adapters that align wrote")
    add("--against", metavar="WHAT", help="a model's folder, a .gguf file, or a server's http address")
    readers = f"what reads it: {', '.join(WITH)} (default: by what it is)"
    add("--with", dest="kind", choices=WITH, metavar="READER", help=readers)
    add("--model", help="where the run's base is now, if it has moved")
    add("--served-model", metavar="NAME", help="the server's name for the model (default: the one that it has loaded)")
    add("--test-prompts", type=at_least(0), default=PROMPTS, help=f"of each kind; 0 for all (default: {PROMPTS})")
    add("--out", type=Path, metavar="FILE.json", help="write the counts here, no answers")
    add("--exact", action="store_true", help=argparse.SUPPRESS)  # for export: greedy answers must be alike
    add("--offline", action="store_true", help="fetch nothing from the Hub, as HF_HUB_OFFLINE=1")
    add("--trust-remote-code", action="store_true", help="let code from the model's repository run")
    args = parser.parse_args(argv)
    if args.against is None:
        raise UserError("say with --against what to ask: a model's folder, a .gguf file, or a server's http address")
    if args.out is not None:
        check_out(args.out, "--out")
    prepare(args.offline)
    from .evals.fidelity import show
    from .formats.readers import compare, kind_of
    from .system.finished import finished_run, load_base
    from .system.store import as_json

    run, screen = finished_run(args.run, args.model), Screen()
    kind = args.kind or kind_of(args.against)  # a mistake in it is told before a model is loaded
    base = load_base(run, args.trust_remote_code)
    fidelity = compare(run, base, args.against, kind, args.test_prompts or None, args.served_model, screen)
    fidelity = replace(fidelity, exact=args.exact and fidelity.exact)
    show(fidelity, screen, args.against)
    if args.out is not None:
        write_out(args.out, as_json(fidelity.as_json()).decode())
    return 1 if fidelity.fault else 0


if __name__ == "__main__":
    sys.exit(main())
