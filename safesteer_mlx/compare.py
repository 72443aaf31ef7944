"""Runs side by side: `python -m safesteer_mlx.compare RUN RUN … [--out FILE.html]`.

What they were told otherwise, what they were made with, what came of each with its interval: a table, and a page of
its own that asks nothing of a network and runs no script. Nothing is loaded, and no answer is shown.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .evals.last_screen import ASKED
from .evals.scores import HOW, Count
from .recipe import STEPS, Parser, current_names, read_yaml
from .system.files import check_out, user_path, write_out
from .system.screen import Screen, UserError, command_line

# What a run's own folder holds once a stage is done, in their order.
FILES = ("direction.json", "tokens.json", "metrics.jsonl", "before_after.json")
STAGES = dict(zip(FILES, STEPS[1:], strict=True)) | {"manifest.json": "writing what it was made with"}
NOT_SET_BY = ("adapter_path",)  # settings in which all runs differ
NOT_MADE_WITH = ("adapters_sha256", "not_aligned", "thinks")
NONE = "—"
LABEL, CELL = 26, 26  # columns of the terminal at least, where text is folded

Rows = list[list[str]]
Table = tuple[str, Rows]


@dataclass(frozen=True)
class Compared:
    """What the files of one run hold; `missing` is the stage that it did not come to, if it is not finished."""

    name: str
    recipe: dict[str, Any]
    manifest: dict[str, Any]
    scores: dict[str, Any]
    verdict: str | None
    timing: dict[str, Any]
    prompts: frozenset[tuple[str, str]] | None  # None if no answers were kept
    missing: str | None


def read_compared(folder: Path) -> Compared:
    """A run, finished or not; a UserError if there is none, or a file of it is not as `align` writes it."""
    from .report import run_folder
    from .system.finished import read_record

    record = run_folder(folder)
    if not (record / "recipe.yaml").is_file():
        raise UserError(f"{folder} holds no run of align; give folders that --adapter-path named")

    def content(name: str) -> Any:
        return read_record(record, name) if (record / name).exists() else None

    missing = next((stage for name, stage in STAGES.items() if not (record / name).exists()), None)
    answers, verdict = content("transcripts.jsonl"), content("verdict.json")
    return Compared(
        str(folder),
        current_names(read_yaml(record / "recipe.yaml")),
        content("manifest.json") or {},
        content("before_after.json") or {},
        verdict and verdict["word"],
        content("timing.json") or {},
        None if answers is None else frozenset((row["kind"], row["prompt"]) for row in answers),
        missing,
    )


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"


def differing(all_of: Sequence[Mapping[str, Any]], but: Sequence[str]) -> Rows:
    """What is not the same in all, a row each: its name, and its value in each."""
    names = dict.fromkeys(name for one in all_of for name in one if name not in but)
    rows = [[str(name), *(_text(one[name]) if name in one else NONE for one in all_of)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _change(count: Callable[[dict[str, Any]], Count], run: Compared) -> str | None:
    """Of base → aligned model, with Wilson's 95 % interval of the latter."""
    if not {"base", "student"} <= run.scores.keys():
        return None
    before, now = count(run.scores["base"]), count(run.scores["student"])
    low, high = now.interval
    return f"{before.count} → {now.count} of {now.total} ({100 * low:.0f}–{100 * high:.0f} %)"


def _asked(kind: str, how: str) -> Callable[[dict[str, Any]], Count]:
    against = "comply" if kind == "harmful" else "refuse"
    return lambda scores: Count.among(scores["outcomes"][kind][how], against)


def _right(scores: dict[str, Any]) -> Count:
    tasks = scores["capability"].values()
    return Count(sum(task["count"] for task in tasks), sum(task["total"] for task in tasks))


def outcomes(runs: Sequence[Compared]) -> Rows:
    """What came of each: counts of base → aligned model with the latter's interval, drift, verdict, time, memory."""

    def row(title: str, cell: Callable[[Compared], str | None]) -> list[str]:
        return [title, *(cell(run) or NONE for run in runs)]

    def drift(run: Compared) -> str | None:
        value = run.scores.get("student", {}).get("drift")
        return None if value is None else f"{value:.5f}"

    counts = {f"{title}, {how}": _asked(kind, how) for kind, title in ASKED.items() for how in HOW}
    counts["small tasks right"] = _right
    return [
        *(row(title, partial(_change, count)) for title, count in counts.items()),
        row("harmless answers changed, nats a token", drift),
        row("verdict before training", lambda run: run.verdict),
        row("not aligned", lambda run: None if (why := run.manifest.get("not_aligned")) is None else _text(why)),
        row("seconds", lambda run: f"{run.timing['seconds']:,.0f}" if run.timing else None),
        row("peak memory", lambda run: f"{n / 1e9:.2f} GB" if (n := run.timing.get("peak_bytes")) else None),
    ]


def cautions(runs: Sequence[Compared]) -> list[str]:
    """What a reader must know before comparing, a sentence each."""
    left = [run for run in runs if run.missing]
    lines = [f"{run.name} is not finished: “{run.missing}” is missing." for run in left]
    finished_runs = [run for run in runs if not run.missing]
    if len({run.manifest.get("model_sha256") for run in finished_runs}) > 1:
        lines.append("The runs are of different models: that one number is smaller says nothing about the settings.")
    prompts = [run.prompts for run in finished_runs]
    if None in prompts:  # told by the settings, and by how many there were
        totals = [{kind: _asked(kind, "greedy")(run.scores["base"]).total for kind in ASKED} for run in finished_runs]
        which = [[run.recipe.get("data"), run.recipe.get("test_prompts")] for run in finished_runs]
        prompts = [json.dumps([*pair]) for pair in zip(totals, which, strict=True)]
    if len(set(prompts)) > 1:
        lines.append("The runs were scored on different prompts: their numbers are not of the same questions.")
    return lines


def compare(folders: Sequence[Path]) -> tuple[list[Compared], list[Table], list[str]]:
    """The runs, what to show of them, and what to say first; a UserError if they are fewer than two, or none."""
    if len(folders) < 2:
        raise UserError(f"compare takes two runs or more, and {len(folders)} was given; name their adapter folders")
    runs = [read_compared(folder) for folder in folders]
    try:
        tables = [
            ("What came of them: base → aligned (95 % interval)", outcomes(runs)),
            ("Settings that differ", differing([run.recipe for run in runs], NOT_SET_BY)),
            ("Made with", differing([run.manifest for run in runs], NOT_MADE_WITH)),
        ]
        return runs, tables, cautions(runs)
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"a run is not as align writes it ({type(error).__name__}); make it again") from error


def show(runs: Sequence[Compared], tables: Sequence[Table], said: Sequence[str], screen: Screen) -> None:
    """Print them, as many runs side by side as the terminal has room for."""
    for number, run in enumerate(runs, 1):
        screen.line(f"{number}: {run.name}")
    for text in said:
        screen.line(text)
    beside = max(1, (screen.console.width - LABEL) // CELL)
    for title, rows in tables:
        for at in range(0, len(runs), beside) if rows else []:
            part = range(at, min(at + beside, len(runs)))
            cells = [[row[0], *(row[i + 1] for i in part)] for row in rows]
            screen.table(title, ["", *(str(i + 1) for i in part)], cells)
        if not rows:
            screen.line(f"{title}: nothing")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, or a UserError about it."""
    parser = Parser("compare", "Show runs side by side: settings that differ, scores with intervals, time and memory.")
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="adapter folders of two runs or more, or their run/ folders")
    add("--out", type=Path, metavar="FILE.html", help="write a page of it, too")
    args = parser.parse_args(argv)
    args.runs = [user_path(run) for run in args.runs]
    if args.out is not None:
        check_out(args.out, "--out")
    return args


@command_line
def main(argv: list[str]) -> None:
    """Show the runs, and write a page of them if that is asked."""
    args = parse(argv)
    runs, tables, lines = compare(args.runs)
    show(runs, tables, lines, Screen())
    if args.out is not None:
        from .report import rendered

        write_out(args.out, rendered("compare.html", runs=runs, tables=tables, said=lines))
        print(args.out)


if __name__ == "__main__":
    sys.exit(main())
