"""Is it what was scored? `python -m safesteer_mlx.verify RUN --against FOLDER | FILE.gguf | http://…/v1`.

Asks an export, or a running OpenAI-compatible server, the run's held-out prompts, and holds its answers against those
of the run's student and base. Exit code 1 if it is not the student.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .recipe import HELD_OUT_TOKENS, Parser, at_least
from .system.files import check_out
from .system.hub import prepare
from .system.screen import Screen, UserError, exit_code

if TYPE_CHECKING:
    from .evals.fidelity import Fidelity
    from .system.finished import FinishedRun
    from .system.load import Loaded

PROMPTS = 100  # of each kind
WITH = ("mlx", "adapter", "transformers", "peft", "llama.cpp", "server")


def compare(
    run: "FinishedRun",
    base: "Loaded",
    against: str,
    screen: Screen,
    *,
    kind: str | None = None,
    n: int | None = PROMPTS,
    served_model: str | None = None,
) -> "Fidelity":
    """Ask `against` the first `n` held-out prompts of each kind (None: all that the run asked), and hold the answers
    against those of the run's base and student.

    The student's own answers are those that the run kept; if it kept none, base and student are asked again. `exact`
    in what is returned says that the student computes in float32, so that its like can be told from it by a hair. A
    UserError if `against` cannot be asked.
    """
    import mlx.core as mx

    from .evals import fidelity
    from .evals.fidelity import ask, mean_kl
    from .evals.scores import HOW
    from .formats.readers import kind_of, reader_for
    from .method.prompts import render
    from .method.residual import head
    from .method.rollout import Sampling, generate
    from .method.run import batch_size
    from .method.student import with_adapters

    recipe, kind = run.recipe, kind or kind_of(against)
    seed = recipe.run.seed
    longest = max(HELD_OUT_TOKENS, recipe.train.max_tokens) if base.thinks else HELD_OUT_TOKENS
    size = batch_size(base, recipe.run.generation_batch_size, screen)
    sampling = Sampling(base.eos_ids, longest, batch_size=size)
    student, asked = with_adapters(base.model, run.folder), fidelity.questions(run, n)
    if (scores := fidelity.recorded(run, asked)) is None:
        scores = {}
        for name, model in (("base", base.model), ("student", student)):
            with screen.stage(f"asking the {name} again") as advance:
                replies = fidelity.replies_of(model, base.tokenizer, sampling, seed)
                scores[name] = ask(replies, asked, HOW, advance)

    texts = {name: [q.text for q in asked if q.kind == name] for name in ("harmful", "harmless")}
    rows = {k: [render(base.tokenizer, text) for text in part[: fidelity.KL_PROMPTS]] for k, part in texts.items()}
    own = {name: [c.ids for c in generate(student, part, sampling)] for name, part in rows.items()}
    states = {name: fidelity.student_states(student, rows[name], own[name]) for name in rows}
    student_head = head(student)

    reader = reader_for(kind, against, base, sampling, seed, served_model)
    with screen.stage(f"asking {against}") as advance:
        scores["shipped"] = ask(reader.replies, asked, HOW if reader.samples else HOW[:1], advance)
    kl = dict.fromkeys(rows, math.nan)
    if (shipped := reader.logits) is not None:
        kl = {name: mean_kl(states[name], student_head, shipped, rows[name], own[name]) for name in rows}
    in_full = all(part.dtype == mx.float32 for parts in states.values() for part in parts)
    return fidelity.Fidelity(scores, kl["harmful"], kl["harmless"], exact=in_full)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    parser = Parser("verify", "Hold an export, or a running server, against the student that its run scored.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of adapters that align wrote")
    add("--against", metavar="WHAT", help="a model's folder, a .gguf file, or a server's http address")
    add("--with", dest="kind", choices=WITH, help="what reads it (default: by what it is)")
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
    from .system.finished import finished_run, load_base
    from .system.store import as_json, write

    run, screen = finished_run(args.run, args.model), Screen()
    if args.kind is None:
        from .formats.readers import kind_of

        kind_of(args.against)  # a mistake in it is told before a model is loaded
    base = load_base(run, args.trust_remote_code)
    asked = {"kind": args.kind, "n": args.test_prompts or None, "served_model": args.served_model}
    fidelity = compare(run, base, args.against, screen, **asked)
    fidelity = replace(fidelity, exact=args.exact and fidelity.exact)
    show(fidelity, screen, args.against)
    if args.out is not None:
        write(args.out.absolute(), as_json(fidelity.as_json()))
    return 1 if fidelity.fault else 0


if __name__ == "__main__":
    sys.exit(main())
