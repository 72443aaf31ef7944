"""One run on one page: `python -m safesteer_mlx.report RUN` makes `report.html` from the files of a run alone.

The page asks nothing of a network and runs no script; its own policy forbids both. Whatever a model, a dataset or
a path supplies is escaped by the template, and characters that act unseen (control, bidi, zero-width) are spelled out.
With `--watch` the page of a run that is going on is served to this computer's browser, and grows with it.
"""

import json
import shlex
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup, escape

from .evals.last_screen import next_steps
from .evals.scores import SHOWN, Count
from .recipe import PACKAGE, STEPS, Parser, at_least, current_names, read_yaml
from .system.screen import UserError, command_line, visible
from .system.serve import PageServer

# Enough to look at, so that a page stays below 2 MB; the files hold the rest.
TOKEN_ROWS = 500
ANSWER_BYTES = 800_000

REDRAWN = 4.0  # seconds between two drawings of a page that is watched
RECORD_FILES = ("direction.json", "tokens.json", "metrics.jsonl", "before_after.json", "outcome.json", "manifest.json")
RECORD_FILES += ("timing.json", "verdict.json", "selection.json")
OPTIONAL = ("outcome.json", "verdict.json", "selection.json")  # an older run's, or one without --select-checkpoint

DAMAGED = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, UndefinedError)


@dataclass(frozen=True)
class RunFiles:
    """What the files in `folder` hold, parsed; None what a run has not, or not yet; `transcripts` if none were kept."""

    folder: Path
    recipe: dict[str, Any]
    direction: dict[str, Any] | None
    tokens: list[dict[str, Any]] | None
    metrics: list[dict[str, Any]] | None
    scores: dict[str, Any] | None
    outcome: dict[str, Any] | None
    manifest: dict[str, Any] | None
    timing: dict[str, Any] | None
    verdict: dict[str, Any] | None
    selection: dict[str, Any] | None
    transcripts: list[dict[str, Any]] | None

    @property
    def token_method(self) -> str:
        """How the safety tokens were ranked."""
        return self.recipe.get("token_method", "part")

    @property
    def stage(self) -> int:
        """How many of `STEPS` are done, by the file that each leaves."""
        last = self.metrics[-1] if self.metrics else {}
        trained = self.scores is not None or (bool(last) and last["step"] == last.get("steps"))
        return [self.recipe or None, self.direction, self.tokens, trained or None, self.timing, None].index(None)


@dataclass(frozen=True)
class Drawing:
    """A figure of the page, by the name that the template has for it: the file that it shows, and what draws it in a
    theme."""

    name: str
    file: str
    draw: Callable


def write_report(run_folder: Path, transcripts: bool = False) -> Path:
    """Write `report.html`, and `figures/*.png` for print, into the folder of a finished run; the page's path. With
    `transcripts` the answers themselves are in it, not a link to them. A UserError if matplotlib is missing, the run
    has not finished, or a file is not as `align` writes it."""
    picture = _drawing().picture
    from .system.store import write

    folder, html = run_folder / "figures", run_folder / "report.html"
    if (folder.exists() and not folder.is_dir()) or html.is_dir():
        raise UserError(f"{folder} must be a folder and {html} a file, if they are there; move them away")
    run = read_run(run_folder, transcripts)
    try:
        figures = {drawing.name: picture(drawing.draw) for drawing in _drawings(run)}
        page = _page(run, figures, transcripts)
    except DAMAGED as error:
        raise _damaged(run_folder, error) from error
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)
    for name, image in figures.items():
        write(folder / f"{name}.png", image.png)
    write(html, page.encode())
    return html


def _drawing() -> ModuleType:
    """What draws; a UserError if matplotlib is missing, or cannot be used."""
    if find_spec("matplotlib") is None:
        raise UserError("the report needs matplotlib; pip install 'safesteer-mlx[report]'")
    try:
        from .evals import figures
    except ValueError as error:  # matplotlib reads its settings when it is imported
        raise UserError(f"matplotlib cannot be used ({error!s:.60}…); unset MPLBACKEND, or mend matplotlibrc") from None
    return figures


def _damaged(folder: Path, error: Exception) -> UserError:
    where = f", {error}" if isinstance(error, KeyError | UndefinedError) else ""
    return UserError(f"{folder} is not as align writes it ({type(error).__name__}{where}); make the run again")


def read_run(folder: Path, transcripts: bool = True, only: Collection[str] | None = None) -> RunFiles:
    """The files of a finished run, or those of them that `only` names; the answers only if they are wanted. A UserError
    if one is missing or damaged."""
    from .system.finished import read_record

    def parsed(name: str) -> Any:
        missing = name in OPTIONAL and not (folder / name).exists() if only is None else name not in only
        return None if missing else read_record(folder, name)

    has_answers = (folder / "transcripts.jsonl").exists() and (only is None or "timing.json" in only)
    if only is None and not (folder / "recipe.yaml").exists():
        raise UserError(f"{folder} holds no recipe.yaml; give the run/ folder of a run that has finished")
    return RunFiles(
        folder,
        current_names(read_yaml(folder / "recipe.yaml")) if only is None or "recipe.yaml" in only else {},
        *map(parsed, RECORD_FILES),
        (read_record(folder, "transcripts.jsonl") if transcripts else []) if has_answers else None,
    )


def _drawings(run: RunFiles) -> Iterable[Drawing]:
    """Every picture that this run has data for."""
    from .evals import figures

    if (scores := run.scores) is not None:
        yield Drawing("refusals", "before_after.json", partial(figures.outcomes, scores))
        if scores["base"]["capability"]:
            yield Drawing("capability", "before_after.json", partial(figures.capability, scores))
        yield Drawing("drift", "before_after.json", partial(figures.drift, scores))
    if run.metrics is not None:
        yield Drawing("training", "metrics.jsonl", partial(figures.training, run.metrics))
    if (direction := run.direction) is not None:
        if any(value is not None for row in direction["scores"]["ablation_kl"] for value in row):
            yield Drawing("direction", "direction.json", partial(figures.direction, direction))
        if direction.get("trials"):
            yield Drawing("frontier", "direction.json", partial(figures.frontier, direction))
    if run.verdict is not None:
        yield Drawing("verdict", "verdict.json", partial(figures.flips, run.verdict))
    if run.selection is not None:
        yield Drawing("selection", "selection.json", partial(figures.selection, run.selection))
    if run.tokens is not None:
        yield Drawing("tokens", "tokens.json", partial(figures.safety_tokens, run.tokens, method=run.token_method))


def _image(svg: bytes) -> Markup:
    return Markup(f"data:image/svg+xml;base64,{b64encode(svg).decode()}")


def _counts(scores: Mapping[str, Any], names: list[str]) -> Iterable[list[str]]:
    """Rows of the table of all counts, a column for each model."""
    for kind, cell in scores["base"]["outcomes"].items():
        for how, counts in cell.items():
            for o in counts:
                rates = [Count.among(scores[n]["outcomes"][kind][how], o) for n in names]
                if o == "refuse" or any(c.count for c in rates):
                    yield [f"{kind}, {how}: {o}", *map(str, rates)]
            broken = [Count(**scores[n]["broken"][kind][how]) for n in names]
            if any(c.count for c in broken):
                yield [f"{kind}, {how}: broken", *map(str, broken)]
    for task in scores["base"]["capability"]:
        yield [f"{task}: right", *(str(Count(**scores[n]["capability"][task])) for n in names)]
    for key, label in (("drift", "KL(base ‖ model) a token"), ("drift_outside", "the same outside the safety tokens")):
        values = [scores[n][key] for n in names]
        yield [label, *("not measured" if v is None else f"{v:.5f} nats" for v in values)]


def _lines(text: str) -> Markup:
    """A text that keeps its line ends, which other texts spell out."""
    return escape(visible(text))


Pair = tuple[str, dict[str, dict[str, Any]]]  # a prompt, and what each model answered


def _answers(run: RunFiles) -> tuple[dict[tuple[str, str], list[Pair]], int]:
    """Prompts with their answers, by kind and decoding, those first that changed; and how many there is no room for."""
    by_kind: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in run.transcripts or []:
        if row["model"] in ("base", "student"):
            by_kind.setdefault((row["kind"], row["how"]), {}).setdefault(row["prompt"], {})[row["model"]] = row
    shown, left_out = {}, 0
    for key, prompts in by_kind.items():
        pairs = sorted(prompts.items(), key=lambda pair: len({row["outcome"] for row in pair[1].values()}) == 1)
        texts = ["".join([prompt, *(row["answer"] for row in rows.values())]) for prompt, rows in pairs]
        sizes = accumulate(400 + len(_lines(text).encode()) for text in texts)
        fit = sum(size <= ANSWER_BYTES // len(by_kind) for size in sizes)
        shown[key], left_out = pairs[:fit], left_out + len(pairs) - fit
    return shown, left_out


def rendered(template: str, **given: Any) -> str:
    """A page by one of the templates in `data`: all that is given is escaped, and spelled out where it would hide."""
    environment = Environment(
        loader=FileSystemLoader(PACKAGE / "data"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value), ""),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(lines=_lines, image=_image)
    return environment.get_template(template).render(given)


def _page(
    run: RunFiles, pictures: Mapping[str, Any], with_answers: bool, going: str | None = None, served: bool = False
) -> str:
    """The page; `pictures` are figures.Picture by name, `going` says how a run that has not finished is doing, `served`
    that no file lies beside the page."""
    figures = _drawing()
    names = [name for name in SHOWN if name != "teacher" or name in (run.scores or {})]
    answers, left_out = _answers(run)
    command, steps = [], []
    if going is None:
        command = ["python", "-m", "safesteer_mlx.align", "--config", str(run.folder / "recipe.yaml")]
        command += ["--adapter-path", f"{run.recipe['adapter_path']}-again"]
        steps = next_steps(run.recipe, run.folder.parent, None)
    return rendered(
        "report.html",
        **vars(run),
        name=run.recipe["model"].rstrip("/").rsplit("/", 1)[-1] if run.recipe else "a model",  # of a path or a Hub id
        going=going,
        served=served,
        stages=STEPS,
        stage=run.stage,
        figures=pictures,
        tokens_drawn=figures.TOKENS_SHOWN,
        ranked_by=figures.ranked_by(run.tokens or [], run.token_method),
        models=names,
        labels=SHOWN,
        counts=_counts(run.scores, names) if run.scores is not None else [],
        here=shlex.quote(str(Path.cwd())),
        steps=steps,
        command=shlex.join(command),
        settings={k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in run.recipe.items()},
        token_rows=TOKEN_ROWS,
        with_answers=with_answers,
        answers=answers,
        left_out=left_out,
    )


class GoingRun:
    """The page of a run that is going on, drawn when it is asked for, again if files changed, but not at each request.

    Files from before `since` (seconds), or older than the settings, are an earlier run's.
    """

    def __init__(self, folder: Path, transcripts: bool = False, since: float = 0.0):
        self._folder, self._transcripts, self._since = folder, transcripts, since
        self._lock = threading.Lock()
        self._page, self._seen, self._drawn = b"", {}, -REDRAWN
        self._figures: dict[str, tuple[int, Any]] = {}  # drawn, with the time of the file that each shows

    def __call__(self) -> tuple[bytes, bool]:
        """The page, and whether it may still change."""
        with self._lock:
            files = self._files()
            if not self._page or (files != self._seen and time.monotonic() - self._drawn >= REDRAWN):
                self._page, self._seen = self._draw(files).encode(), files
                self._drawn = time.monotonic()
            return self._page, "timing.json" not in self._seen

    def _files(self) -> dict[str, int]:
        """The run's files with the times when they were written."""
        times = {}
        for name in ("recipe.yaml", *RECORD_FILES):
            try:
                times[name] = (self._folder / name).stat().st_mtime_ns
            except OSError:
                continue
        oldest = max(self._since * 1e9, times.get("recipe.yaml", float("inf")))
        return {name: written for name, written in times.items() if written >= oldest}

    def _draw(self, files: Mapping[str, int]) -> str:
        picture = _drawing().picture
        ended = "timing.json" in files
        going = "It has just begun."
        if files:
            going = f"Last heard of at {time.strftime('%H:%M:%S', time.localtime(max(files.values()) / 1e9))}."
        try:
            run, figures = read_run(self._folder, self._transcripts, files), {}
            for drawing in _drawings(run):
                written, image = self._figures.get(drawing.name, (None, None))
                if written != files[drawing.file]:
                    image = picture(drawing.draw, print_too=False)
                    self._figures[drawing.name] = files[drawing.file], image
                figures[drawing.name] = image
            return _page(run, figures, self._transcripts, None if ended else going, served=True)
        except DAMAGED as error:  # a file that went away or is damaged; the next drawing may find it whole
            told = error if isinstance(error, UserError) else _damaged(self._folder, error)
            return _page(read_run(self._folder, only=()), {}, False, str(told))


@contextmanager
def watching(
    folder: Path, transcripts: bool, port: int, tell: Callable[[str], None], since: float | None = None
) -> Iterator[None]:
    """Serve the page of the run in `folder` while the body works; its address is told once. Raises as `check_watch`."""
    _drawing()
    since = time.time() - 2 if since is None else since  # some file systems keep whole seconds
    with PageServer(GoingRun(folder, transcripts, since), port) as server:
        tell(f"watch it, on this computer alone: {server.address}")
        yield
        server.let_see_the_end()


def check_watch(port: int) -> None:
    """Before anything is loaded: a UserError if matplotlib is missing, or the port cannot be used."""
    _drawing()
    PageServer(lambda: (b"", False), port).server_close()


def watch(folder: Path, transcripts: bool, port: int) -> None:
    """Serve the page of a run that is going on elsewhere, until it has finished; a UserError if none is going on."""
    if (folder / "timing.json").exists():
        raise UserError(f"{folder} holds a run that has finished; leave --watch out, and its page is written")
    if not ((folder / "recipe.yaml").exists() or (folder / "checkpoint").is_dir()):
        raise UserError(f"{folder} holds no run; give the adapter folder of one that is going on")
    with watching(folder, transcripts, port, lambda text: print(text, flush=True), since=0.0):
        while not (folder / "timing.json").exists():
            time.sleep(0.5)
    print("the run has finished")


@command_line
def main(argv: list[str]) -> None:
    """Write the page, or serve it."""
    parser = Parser("report", "Make report.html from the files of a finished run.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run/ folder, or the adapter folder that holds it")
    add("--transcripts-in-report", action="store_true", help="put the answers into the page")
    add("--watch", action="store_true", help="serve the page of a run that is going on, to this computer")
    add("--watch-port", type=at_least(0, 65535), default=0, help="its port (default: any that is free)")
    args = parser.parse_args(argv)
    folder, transcripts = run_folder(args.run), args.transcripts_in_report
    if args.watch:
        return watch(folder, transcripts, args.watch_port)
    print(write_report(folder, transcripts))


def run_folder(folder: Path) -> Path:
    """The run/ folder that a user means: itself, or the one beside the adapters."""
    return folder / "run" if (folder / "run").is_dir() else folder


if __name__ == "__main__":
    sys.exit(main())
