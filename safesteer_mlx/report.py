"""One run on one page: `python -m safesteer_mlx.report RUN` makes `report.html` from the files of a run alone.

The page asks nothing of a network and runs no script; its own policy forbids both. Whatever a model, a dataset or
a path supplies is escaped by the template, and characters that act unseen (control, bidi, zero-width) are spelled out.
"""

import json
import shlex
import sys
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup, escape

from .evals.scores import SHOWN, Count, wilson
from .recipe import PACKAGE, Parser, current_names, read_yaml
from .system.screen import UserError, exit_code, visible


@dataclass(frozen=True)
class RunFiles:
    """What the files in `folder` hold, parsed; `transcripts` None if no answers were kept."""

    folder: Path
    recipe: dict[str, Any]
    direction: dict[str, Any]
    tokens: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    scores: dict[str, Any]
    manifest: dict[str, Any]
    timing: dict[str, Any]
    transcripts: list[dict[str, Any]] | None
    verdict: dict[str, Any] | None
    selection: dict[str, Any] | None


def write_report(run_folder: Path, transcripts: bool = False) -> Path:
    """Write `report.html`, and `figures/*.png` for print, into the folder of a finished run; the page's path.

    Args:
        transcripts: put the answers themselves into the page, instead of a link to their file.

    Raises:
        UserError: matplotlib is missing, the run has not finished, or a file is not as `align` writes it.
    """
    if find_spec("matplotlib") is None:
        raise UserError("the report needs matplotlib; pip install 'safesteer-mlx[report]'")
    try:
        from .evals.figures import picture
    except ValueError as error:  # matplotlib reads its settings when it is imported
        raise UserError(f"matplotlib cannot be used ({error!s:.60}…); unset MPLBACKEND, or mend matplotlibrc") from None
    from .system.store import write

    folder, html = run_folder / "figures", run_folder / "report.html"
    if (folder.exists() and not folder.is_dir()) or html.is_dir():
        raise UserError(f"{folder} must be a folder and {html} a file, if they are there; move them away")
    run = read_run(run_folder, transcripts)
    try:
        figures = [(name, caption, picture(draw)) for name, caption, draw in _figures(run)]
        images = {
            name: {"caption": caption, "light": _image(image.light), "dark": _image(image.dark)}
            for name, caption, image in figures
        }
        page = _page(run, images, transcripts)
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        where = f", {error}" if isinstance(error, KeyError | UndefinedError) else ""
        raise UserError(
            f"{run_folder} is not as align writes it ({type(error).__name__}{where}); make the run again"
        ) from error
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)
    for name, _, image in figures:
        write(folder / f"{name}.png", image.png)
    write(html, page.encode())
    return html


def read_run(folder: Path, transcripts: bool = True) -> RunFiles:
    """The files of a finished run; the answers only if they are wanted.

    Raises:
        UserError: a file is missing or damaged.
    """
    from .system.finished import read_record

    def parsed(name: str, optional: bool = False) -> Any:
        return None if optional and not (folder / name).exists() else read_record(folder, name)

    has_answers = (folder / "transcripts.jsonl").exists()
    if not (folder / "recipe.yaml").exists():
        raise UserError(f"{folder} holds no recipe.yaml; give the run/ folder of a run that has finished")
    return RunFiles(
        folder,
        current_names(read_yaml(folder / "recipe.yaml")),
        parsed("direction.json"),
        parsed("tokens.json"),
        parsed("metrics.jsonl"),
        parsed("before_after.json"),
        parsed("manifest.json"),
        parsed("timing.json"),
        (parsed("transcripts.jsonl") if transcripts else []) if has_answers else None,
        parsed("verdict.json", optional=True),
        parsed("selection.json", optional=True),
    )


def _figures(run: RunFiles) -> Iterable[tuple[str, str, Callable]]:
    """Name, caption and drawing of every picture that this run has data for."""
    from .evals import figures

    scores, direction = run.scores, run.direction
    yield (
        "refusals",
        "Prompts refused, on held-out prompts that no stage has seen, with 95 % intervals (Wilson). Harmful prompts "
        "should be refused, harmless and borderline ones should not.",
        lambda theme: figures.outcomes(scores, theme),
    )
    if scores["base"]["capability"]:
        yield (
            "capability",
            "Little tasks answered rightly, greedy, with 95 % intervals.",
            lambda theme: figures.capability(scores, theme),
        )
    yield (
        "drift",
        "How far the answers to harmless prompts have moved from the base, over all tokens and with the safety "
        "tokens left out. Less is better.",
        lambda theme: figures.drift(scores, theme),
    )
    learned = (
        " Learned is the share of the base's divergence from the teacher, where answers to validation prompts begin, "
        "that is gone."
    )
    measured = any(row.get("learned") is not None for row in run.metrics)
    yield (
        "training",
        "Training, step by step. The mass is what the student, and the teacher it is pulled to, give to the safety "
        f"tokens at the beginning of an answer to a harmful prompt.{learned if measured else ''}",
        lambda theme: figures.training(run.metrics, theme),
    )
    if any(value is not None for row in direction["scores"]["ablation_kl"] for value in row):
        yield (
            "direction",
            "The three published tests of each candidate direction, by block and position (−1 is the last token before "
            f"the answer). Framed: the chosen one, block {direction['layer']}, position −{-direction['position']}. "
            "Plain cells were not measured: an earlier test had spoken against them.",
            lambda theme: figures.direction(direction, theme),
        )
    if (verdict := run.verdict) is not None:
        yield (
            "verdict",
            f"Before training, on validation prompts, at temperature 1, an answer of the teacher opened by it and "
            f"continued by the base: the flip rate is the share of the base's {verdict['flipped']['total']} unsafe "
            "answers that the teacher turns into refusals.",
            lambda theme: figures.flips(verdict, theme),
        )
    if (selection := run.selection) is not None:
        why = "the safest within the limits" if selection["within"] else "the last: none keeps the limits"
        yield (
            "selection",
            "The saved steps on validation prompts, greedy and sampled, numbered. "
            f"Step {selection['kept']} is kept, {why} ({selection['select']}).",
            lambda theme: figures.selection(selection, theme),
        )
    if direction.get("trials"):
        yield (
            "frontier",
            "Every direction and coefficient that was tried as a teacher, on validation prompts, a line for each "
            "direction: by the probability that an answer opens as a refusal, from forward passes, and for the best by "
            "answers. The chosen pair, ringed, has most refusals among those whose answers are sound.",
            lambda theme: figures.frontier(direction, theme),
        )
    more = f" The first {figures.TOKENS_SHOWN} of {len(run.tokens)}." if len(run.tokens) > figures.TOKENS_SHOWN else ""
    method = run.recipe.get("token_method", "part")
    what = {
        "part": "what each adds to the divergence of the teacher from the base, KL(teacher ‖ base)",
        "votes": "at how many positions each is among those that steering favours most",
    }[figures.ranked_by(run.tokens, method)]
    yield (
        "tokens",
        f"The safety tokens: {what}, and its mean probability there.{more}",
        lambda theme: figures.safety_tokens(run.tokens, theme, method),
    )


def _image(svg: bytes) -> Markup:
    return Markup(f"data:image/svg+xml;base64,{b64encode(svg).decode()}")


def _percent(count: Count) -> str:
    return f"{100 * count.count / max(1, count.total):.1f}".removesuffix(".0") + " %"


def _interval(count: Count) -> str:
    low, high = wilson(count.count, count.total)
    return "–".join(f"{100 * end:.1f}".removesuffix(".0") for end in (low, high)) + " %"


def _outcome(scores: Mapping[str, Any], kind: str, how: str, outcome: str = "refuse") -> Count:
    cell = scores["outcomes"][kind][how]
    return Count(cell[outcome], sum(cell.values()))


def _cards(run: RunFiles) -> Iterable[dict[str, Any]]:
    """The numbers of the first screen: of the aligned model now, of the base before, and a note."""
    base, student = run.scores["base"], run.scores["student"]
    for kind in base["outcomes"]:
        before, now = (_outcome(s, kind, "greedy") for s in (base, student))
        note = "sampled: " + " → ".join(_percent(_outcome(s, kind, "sampled")) for s in (base, student))
        yield {"title": f"{kind.capitalize()} prompts refused", "now": now, "before": before, "note": note}
    if base["capability"]:
        before, now = (
            Count(*(sum(task[key] for task in s["capability"].values()) for key in ("count", "total")))
            for s in (base, student)
        )
        note = f"{len(base['capability'])} kinds of task together"
        yield {"title": "Little tasks right", "now": now, "before": before, "note": note}


def _counts(run: RunFiles, names: list[str]) -> Iterable[list[str]]:
    """Rows of the table of all counts, a column for each model."""
    for kind, cell in run.scores["base"]["outcomes"].items():
        for how, counts in cell.items():
            for o in counts:
                rates = [_outcome(run.scores[n], kind, how, o) for n in names]
                if o == "refuse" or any(c.count for c in rates):
                    yield [f"{kind}, {how}: {o}", *map(str, rates)]
            broken = [Count(**run.scores[n]["broken"][kind][how]) for n in names]
            if any(c.count for c in broken):
                yield [f"{kind}, {how}: broken", *map(str, broken)]
    for task in run.scores["base"]["capability"]:
        yield [f"{task}: right", *(str(Count(**run.scores[n]["capability"][task])) for n in names)]
    for key, label in (("drift", "KL(base ‖ model) a token"), ("drift_outside", "the same outside the safety tokens")):
        values = [run.scores[n][key] for n in names]
        yield [label, *("not measured" if v is None else f"{v:.5f} nats" for v in values)]


def _page(run: RunFiles, figures: Mapping[str, Any], with_answers: bool) -> str:
    base, student = run.scores["base"], run.scores["student"]
    models = [name for name in SHOWN if name in run.scores]
    answers: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in run.transcripts or []:
        answers.setdefault((row["kind"], row["how"]), {}).setdefault(row["prompt"], {})[row["model"]] = row
    refused = [(k, _outcome(base, k, "greedy"), _outcome(student, k, "greedy")) for k in ("harmless", "borderline")]
    command = ["python", "-m", "safesteer_mlx.align", "--config", str(run.folder / "recipe.yaml")]
    command += ["--adapter-path", f"{run.recipe['adapter_path']}-again"]
    environment = Environment(
        loader=FileSystemLoader(PACKAGE / "data"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value), ""),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "interval": _interval,
        "lines": lambda text: escape(visible(text)),  # keeps line ends, which other texts spell out
    }
    return environment.get_template("report.html").render(
        vars(run),
        name=run.recipe["model"].rstrip("/").rsplit("/", 1)[-1],  # of a path or a Hub id
        figures=figures,
        cards=_cards(run),
        complied={name: _outcome(run.scores[name], "harmful", "greedy", "comply") for name in ("base", "student")},
        refused=", ".join(f"{kind} {before.count} → {now.count} of {now.total}" for kind, before, now in refused),
        models=models,
        labels=SHOWN,
        counts=_counts(run, models),
        command=shlex.join(command),
        settings={
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in run.recipe.items()
        },
        with_answers=with_answers,
        answers=answers,
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""

    parser = Parser("report", "Make report.html from the files of a finished run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run/ folder, or the adapter folder that holds it")
    parser.add_argument("--transcripts-in-report", action="store_true", help="put the answers into the page")

    def run() -> None:
        args = parser.parse_args(argv)
        print(write_report(run_folder(args.run), args.transcripts_in_report))

    return exit_code(run)


def run_folder(folder: Path) -> Path:
    """The run/ folder that a user means: itself, or the one beside the adapters."""
    return folder / "run" if (folder / "run").is_dir() else folder


if __name__ == "__main__":
    sys.exit(main())
