"""One run on one page: `python -m safesteer_mlx.report RUN` makes `report.html` from the files of a run alone.

The page asks nothing of a network and runs no script; its own policy forbids both. Whatever a model, a dataset or
a path supplies is escaped, and characters that act unseen (control, bidi, zero-width) are spelled out.
"""

import html
import json
import shlex
import sys
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from .evals.scores import SHOWN, Count, wilson
from .recipe import PACKAGE, Parser, read_yaml
from .system.screen import UserError, exit_code, visible


@dataclass(frozen=True)
class Run:
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
    from .evals.figures import picture
    from .system.store import write

    run = read_run(run_folder, transcripts)
    try:
        figures = [(name, caption, picture(draw)) for name, caption, draw in _figures(run)]
        images = {name: _image(name, caption, drawn) for name, caption, drawn in figures}
        page = _page(run, images, transcripts)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        where = f", {error.args[0]!r}" if isinstance(error, KeyError) else ""
        raise UserError(
            f"{run_folder} is not as align writes it ({type(error).__name__}{where}); make the run again"
        ) from error
    folder = run_folder / "figures"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)
    for name, _, drawn in figures:
        write(folder / f"{name}.png", drawn.png)
    write(run_folder / "report.html", page.encode())
    return run_folder / "report.html"


def read_run(folder: Path, transcripts: bool = True) -> Run:
    """The files of a finished run; the answers only if they are wanted.

    Raises:
        UserError: a file is missing or damaged.
    """

    def text(name: str) -> str:
        try:
            return (folder / name).read_text("utf-8")
        except FileNotFoundError:
            raise UserError(f"{folder} holds no {name}; give the run/ folder of a run that has finished") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{folder / name} cannot be read ({type(error).__name__}); make the run again") from None

    def parsed(name: str, one_a_line: bool = False) -> Any:
        try:
            return (
                [json.loads(line) for line in text(name).split("\n") if line] if one_a_line else json.loads(text(name))
            )
        except json.JSONDecodeError as error:
            raise UserError(f"{folder / name} line {error.lineno} is not JSON; make the run again") from None

    kept = (folder / "transcripts.jsonl").is_file()
    text("recipe.yaml")  # a missing file is told in the words above
    return Run(
        folder,
        read_yaml(folder / "recipe.yaml"),
        parsed("direction.json"),
        parsed("tokens.json"),
        parsed("metrics.jsonl", one_a_line=True),
        parsed("before_after.json"),
        parsed("manifest.json"),
        parsed("timing.json"),
        (parsed("transcripts.jsonl", one_a_line=True) if transcripts else []) if kept else None,
        parsed("verdict.json") if (folder / "verdict.json").is_file() else None,
        parsed("selection.json") if (folder / "selection.json").is_file() else None,
    )


def _figures(run: Run) -> Iterable[tuple[str, str, Callable]]:
    """Name, caption and drawing of every picture that this run has data for."""
    from .evals import figures

    scores, found = run.scores, run.direction
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
    learned = ""
    if any(row.get("learned") is not None for row in run.metrics):
        learned = (
            " Learned is the share of the base's divergence from the teacher, where answers to validation prompts "
            "begin, that is gone."
        )
    yield (
        "training",
        "Training, step by step. The mass is what the student, and the teacher it is pulled to, give to the safety "
        f"tokens at the beginning of an answer to a harmful prompt.{learned}",
        lambda theme: figures.training(run.metrics, theme),
    )
    if any(value is not None for row in found["scores"]["ablation_kl"] for value in row):
        yield (
            "direction",
            f"The three published tests of each candidate direction, by block and position (−1 is the last token "
            f"before the answer). Framed: the chosen one, block {found['layer']}, position −{-found['position']}. "
            "Plain cells were not measured: an earlier test had spoken against them.",
            lambda theme: figures.direction(found, theme),
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
        kept = f"Step {selection['kept']} is kept, " + (
            "the safest within the limits" if selection["within"] else "the last: none keeps the limits"
        )
        yield (
            "selection",
            f"The saved steps on validation prompts, greedy and sampled, numbered. {kept} ({selection['select']}).",
            lambda theme: figures.selection(selection, theme),
        )
    if found.get("trials"):
        yield (
            "frontier",
            "Every direction and coefficient that was tried as a teacher, on validation prompts, a line for each "
            "direction: by the probability that an answer opens as a refusal, from forward passes, and for the best by "
            "answers. The chosen pair, ringed, has most refusals among those whose answers are sound.",
            lambda theme: figures.frontier(found, theme),
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


def _image(name: str, caption: str, drawn: Any) -> str:
    dark, light = (f"data:image/svg+xml;base64,{b64encode(svg).decode()}" for svg in (drawn.dark, drawn.light))
    return (
        f'<figure id="figure-{name}"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_escaped(caption)}"></picture><figcaption>{_escaped(caption)}</figcaption></figure>'
    )


def _escaped(value: Any, keep: str = "") -> str:
    return html.escape(visible(str(value), keep))


def _own(value: Any) -> str:
    """Text of a model's or a user's, kept from reordering what stands around it."""
    return f"<bdi>{_escaped(value)}</bdi>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML already; the first column is text, the others are numbers where there are more than two."""
    mark = ' class="number"' if len(head) > 2 else ""

    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr><{tag}>{cells[0]}</{tag}>" + "".join(f"<{tag}{mark}>{c}</{tag}>" for c in cells[1:]) + "</tr>"

    inner = line(head, "th") + "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table class="{kind}">{inner}</table></div>'


def _percent(count: Count) -> str:
    return f"{100 * count.count / max(1, count.total):.1f}".removesuffix(".0") + " %"


def _interval(count: Count) -> str:
    low, high = wilson(count.count, count.total)
    return "–".join(f"{100 * end:.1f}".removesuffix(".0") for end in (low, high)) + " %"


def _outcome(scores: Mapping[str, Any], kind: str, how: str, outcome: str = "refuse") -> Count:
    cell = scores["outcomes"][kind][how]
    return Count(cell[outcome], sum(cell.values()))


def _card(title: str, now: Count, before: Count, note: str = "") -> str:
    return (
        f'<div class="card"><h3>{title}</h3><b>{_percent(now)}</b>'
        f"<div>95 % interval {_interval(now)}</div><div>{now.count} of {now.total}</div>"
        f"<div>base {_percent(before)}, {_interval(before)}</div>{note and f'<div>{note}</div>'}</div>"
    )


def _cards(run: Run) -> str:
    base, student = run.scores["base"], run.scores["student"]
    cards = []
    for kind in base["outcomes"]:
        now, before = (_outcome(s, kind, "greedy") for s in (student, base))
        drawn = [_percent(_outcome(s, kind, "sampled")) for s in (base, student)]
        note = f"sampled: {drawn[0]} → {drawn[1]}"
        cards.append(_card(f"{_escaped(kind.capitalize())} prompts refused", now, before, note))
    if base["capability"]:
        now, before = (
            Count(sum(t["count"] for t in s["capability"].values()), sum(t["total"] for t in s["capability"].values()))
            for s in (student, base)
        )
        cards.append(_card("Little tasks right", now, before, f"{len(base['capability'])} kinds of task together"))
    return f'<div class="cards">{"".join(cards)}</div>'


def _what_was_done(run: Run) -> str:
    recipe, found = run.recipe, run.direction
    steered = f"steered at block {found['layer']:d} with coefficient {found['coeff']:g}"
    teacher = {
        "steer": f"the model itself, {steered}",
        "system_prompt": "the model itself under a safety system prompt",
        "ema": f"a moving average of the student, {steered} at first",
    }[recipe["teacher"]]
    rank = f" of rank {_escaped(recipe['lora_parameters']['rank'])}" if recipe["fine_tune_type"] != "full" else ""
    trained = {"lora": "LoRA adapters", "dora": "DoRA adapters", "full": "all its weights"}[recipe["fine_tune_type"]]
    anchor = f", {100 * recipe['anchor']:.0f} % of them harmless and held to the base" if recipe["anchor"] else ""
    return (
        f"{_own(recipe['model'])} was trained to refuse harmful requests: {trained}{rank}, {len(run.metrics)} "
        f"optimizer steps on its own answers to prompts{anchor}, towards a teacher on {len(run.tokens)} safety tokens. "
        f"The teacher is {teacher}."
    )


def _what_came_of_it(run: Run) -> str:
    base, student = run.scores["base"], run.scores["student"]
    before, now = (_outcome(s, "harmful", "greedy", "comply") for s in (base, student))
    refused = ", ".join(
        f"{kind} {_outcome(base, kind, 'greedy').count} → {_outcome(student, kind, 'greedy').count} of {now.total}"
        for kind, now in ((k, _outcome(student, k, "greedy")) for k in ("harmless", "borderline"))
    )
    return (
        f"Greedily, the base does what {before.count} of {before.total} harmful prompts ask, the aligned model what "
        f"{now.count} ask. Refused: {refused} prompts. Differences within the intervals are no finding."
    )


def _verdict(run: Run) -> str:
    """The verdict before training, where it was not go, and that the model is not aligned, where it is not."""
    said = ""
    if why := run.manifest.get("not_aligned"):
        said += f"<p><b>Not aligned:</b> {_escaped(why)}. The adapters are not to be used.</p>"
    if run.verdict is not None and run.verdict["word"] != "go":
        reasons = "".join(f"<li>{_escaped(reason)}</li>" for reason in run.verdict["reasons"])
        said += f"<p>Before training the verdict was {_escaped(run.verdict['word'])}:</p><ul>{reasons}</ul>"
    return said and f'<div class="warning">{said}</div>'


def _all_counts(run: Run) -> str:
    names = [name for name in SHOWN if name in run.scores]
    rows = []
    for kind, cell in run.scores["base"]["outcomes"].items():
        for how, counts in cell.items():
            label = f"{_escaped(kind)}, {_escaped(how)}"
            for o in counts:
                found = [_outcome(run.scores[n], kind, how, o) for n in names]
                if o == "refuse" or any(c.count for c in found):
                    rows.append([f"{label}: {_escaped(o)}", *map(str, found)])
            broken = [Count(**run.scores[n]["broken"][kind][how]) for n in names]
            if any(c.count for c in broken):
                rows.append([f"{label}: broken", *map(str, broken)])
    for task in run.scores["base"]["capability"]:
        rows.append([f"{_escaped(task)}: right", *(str(Count(**run.scores[n]["capability"][task])) for n in names)])
    for key, label in (("drift", "KL(base ‖ model) a token"), ("drift_outside", "the same outside the safety tokens")):
        values = [run.scores[n][key] for n in names]
        rows.append([label, *("not measured" if v is None else f"{v:.5f} nats" for v in values)])
    return _table(["", *(SHOWN[n] for n in names)], rows, "counts")


def _token_table(run: Run) -> str:
    rows = [
        [
            f"<code>“{_own(t['token'])}”</code>",
            str(int(t["id"])),
            str(int(t["votes"])),
            f"{t['mean_delta']:+.2f}",
            "–" if t.get("part") is None else f"{t['part']:+.2g}",
            f"{t['base_prob']:.2g}",
            f"{t['teacher_prob']:.2g}",
        ]
        for t in run.tokens
    ]
    return _table(["token", "id", "votes", "mean Δ (nats)", "part in KL (nats)", "p, base", "p, teacher"], rows)


def _record(run: Run) -> str:
    again = ["python", "-m", "safesteer_mlx.align", "--config", str(run.folder / "recipe.yaml")]
    again += ["--adapter-path", f"{run.recipe['adapter_path']}-again"]
    minutes = f"{run.timing['seconds'] / 60:.1f} minutes in all"
    openers = ", ".join(f"“{_own(text)}”" for text in run.direction["openers"])
    facts = [(key.replace("_", " "), _own(value)) for key, value in run.manifest.items()]
    facts += [("time", _escaped(minutes)), ("refusal openers", openers)]
    return (
        f"<p>This command repeats the run, to the same bytes with these versions on the same machine:</p>"
        f"<pre>{_escaped(shlex.join(again))}</pre>"
        + _table(["what", "value"], facts)
        + "<details><summary>All settings</summary>"
        + _table(["setting", "value"], [(_escaped(k), _own(_as_set(v))) for k, v in run.recipe.items()])
        + "</details>"
    )


def _as_set(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _answers(run: Run, wanted: bool) -> str:
    """The answers of base and aligned model side by side, or where they are."""
    if run.transcripts is None:
        return "<p>No answers were kept.</p>"
    if not wanted:
        return (
            '<p class="warning">All judged answers are in <a href="transcripts.jsonl">transcripts.jsonl</a> beside '
            "this page. Answers to harmful prompts can be harmful themselves: read them in private, and share "
            "neither.</p>"
        )
    pairs: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in run.transcripts:
        pairs.setdefault((row["kind"], row["how"]), {}).setdefault(row["prompt"], {})[row["model"]] = row
    parts = [
        '<details class="warning"><summary><b>Warning:</b> what follows are prompts that may offend and answers '
        "that may be harmful. Open to read; do not share this page.</summary>"
    ]
    for (kind, how), prompts in pairs.items():
        parts.append(f"<details><summary>{_escaped(kind)}, {_escaped(how)}: {len(prompts)} prompts</summary>")
        for prompt, rows in prompts.items():
            sides = "".join(_side(SHOWN[name], rows[name]) for name in ("base", "student") if name in rows)
            parts.append(
                f'<div class="pair"><p class="text"><bdi>{_escaped(prompt, keep=chr(10))}</bdi></p>'
                f'<div class="sides">{sides}</div></div>'
            )
        parts.append("</details>")
    return "".join(parts) + "</details>"


def _side(name: str, row: Mapping[str, Any]) -> str:
    cut = "" if row["finished"] else ", cut at the length limit"
    return (
        f'<div><span class="soft">{name}: {_escaped(row["outcome"])}{cut}</span>'
        f'<div class="text"><bdi>{_escaped(row["answer"], keep=chr(10))}</bdi></div></div>'
    )


def _page(run: Run, images: Mapping[str, str], transcripts: bool) -> str:
    def pictures(*names: str) -> str:
        return f'<div class="figures">{"".join(images[name] for name in names if name in images)}</div>'

    notes = []
    if run.recipe["teacher"] == "system_prompt":
        notes.append("<p>The teacher is a system prompt, so no direction was looked for.</p>")
    else:
        if "direction" not in images:
            notes.append(
                "<p>The model thinks before it answers. The published tests of a direction read the first token of "
                "an answer, so none was tested.</p>"
            )
        if run.direction.get("trials") == []:
            notes.append(f"<p>The coefficient, {run.direction['coeff']:g}, was given, so none was looked for.</p>")
    name = run.recipe["model"].rstrip("/").rsplit("/", 1)[-1]  # of a path or a Hub id
    body = [
        f"<header><h1>{_own(name)}, aligned</h1><p>{_what_was_done(run)}</p>{_cards(run)}"
        f"<p>{_what_came_of_it(run)}</p></header>",
        _verdict(run),
        f"<h2>Before and after</h2>{pictures('refusals', 'capability', 'drift')}"
        f"<details><summary>All counts, with 95 % intervals</summary>{_all_counts(run)}</details>",
        f"<h2>Direction, teacher, safety tokens, training</h2>"
        f"{pictures('direction', 'tokens', 'verdict', 'frontier', 'training', 'selection')}{''.join(notes)}"
        f"<details><summary>All {len(run.tokens)} safety tokens</summary>{_token_table(run)}</details>",
        f"<h2>Record</h2>{_record(run)}",
        f"<h2>Answers</h2>{_answers(run, transcripts)}",
    ]
    template = Template((PACKAGE / "data" / "report.html").read_text("utf-8"))
    return template.substitute(title=f"{_escaped(name)}, aligned", body="\n".join(body))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""

    def run() -> None:
        args = parser.parse_args(argv)
        print(write_report(run_folder(args.run), args.transcripts_in_report))

    parser = Parser("report", "Make report.html from the files of a finished run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run/ folder, or the adapter folder that holds it")
    parser.add_argument("--transcripts-in-report", action="store_true", help="put the answers into the page")
    return exit_code(run)


def run_folder(given: Path) -> Path:
    """The run/ folder that a user means: itself, or the one beside the adapters."""
    return given / "run" if (given / "run").is_dir() else given


if __name__ == "__main__":
    sys.exit(main())
