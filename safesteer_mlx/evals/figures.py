"""A run's pictures, by matplotlib: each function draws what one of the run's files holds, in a theme.

Colours are Okabe and Ito's, told apart by the colour-blind; the base is grey, the teacher orange, the student
blue everywhere. `picture` gives each as SVG for light and dark pages and as PNG for print.
"""

import io
import logging
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ..system.screen import visible
from .scores import SHOWN, Count, wilson

T = TypeVar("T")

WIDTH = 4.6  # inches: text stays readable when a phone shows it 360 points wide
TOKENS_SHOWN = 24
LABEL = 20  # characters of a name; a longer one would leave no room for the bars
PRINT_DPI = 300
STEPS_SHOWN = 400  # of a training; a line of more is no finer on the page
CELLS_DRAWN = 300  # of a map; more are kept as an image

ONE_AT_A_TIME = threading.Lock()  # matplotlib's settings are the process's, and a run may be watched while it draws


@dataclass(frozen=True)
class Theme:
    """Colours of one page: text, grid, background, and the three models."""

    ink: str
    grid: str
    page: str
    base: str
    teacher: str
    student: str
    missing: str


LIGHT = Theme("#1b1f23", "#d8dce1", "#ffffff", "#7d858e", "#d55e00", "#0072b2", "#eceef1")
DARK = Theme("#e4e7ea", "#363c44", "#16191d", "#9aa4af", "#e69f00", "#56b4e9", "#262b31")


@dataclass(frozen=True)
class Picture:
    """One drawing: SVG for light and dark pages, PNG for print, if that was wanted."""

    light: bytes
    dark: bytes
    png: bytes


def picture(draw: Callable[[Theme], Figure], print_too: bool = True) -> Picture:
    """Draw in every form. The same data give the same bytes."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with ONE_AT_A_TIME, warnings.catch_warnings():
        # A token in a script that the font lacks: the SVG is shown in the reader's fonts, the PNG has a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        light, dark = (_save(draw, theme, format="svg", dpi=144, metadata={"Date": None}) for theme in (LIGHT, DARK))
        return Picture(light, dark, _save(draw, LIGHT, format="png", dpi=PRINT_DPI) if print_too else b"")


def _save(draw: Callable[[Theme], Figure], theme: Theme, **how: Any) -> bytes:
    style = {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.6,
        "svg.fonttype": "none",
        "svg.hashsalt": "safesteer",
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), theme.page),
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), theme.ink),
        **dict.fromkeys(("xtick.color", "ytick.color"), theme.ink),
    }
    out = io.BytesIO()
    with matplotlib.rc_context(style):
        draw(theme).savefig(out, **how)
    return out.getvalue()


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def _numbers(values: Sequence[Any]) -> np.ndarray:
    """Float64, NaN for null: what was not measured."""
    return np.array(values, np.float64)


def _label(text: str) -> str:
    short = visible(text, "")
    return short if len(short) <= LABEL else short[: LABEL - 1] + "…"


def direction(record: Mapping[str, Any], theme: Theme) -> Figure:
    """The three tests of every candidate, (P, L) each; the chosen one is framed."""
    tests = (
        ("steering_refusal", "Added: refusal score of harmless prompts", "log-odds"),
        ("ablation_refusal", "Ablated: refusal score of harmful prompts", "log-odds"),
        ("ablation_kl", "Ablated: KL to the base, harmless prompts", "nats"),
    )
    n_positions, n_layers = _numbers(record["scores"]["ablation_kl"]).shape
    height = min(2.2, 0.95 + 0.16 * n_positions)
    figure = _figure(3 * height)
    for axes, (name, title, unit) in zip(figure.subplots(3, 1, sharex=True), tests, strict=True):
        axes.set_facecolor(theme.missing)
        scores = np.ma.masked_invalid(_numbers(record["scores"][name]))
        lines = {"edgecolors": theme.page, "linewidth": 0.5, "rasterized": scores.size > CELLS_DRAWN}
        mesh = axes.pcolormesh(range(n_layers + 1), range(-n_positions, 1), scores, cmap="cividis", **lines)
        figure.colorbar(mesh, ax=axes, label=unit, pad=0.02).outline.set_visible(False)
        corner = (record["layer"], record["position"])
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=theme.page, linewidth=4, clip_on=False))
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=theme.teacher, linewidth=2, clip_on=False))
        step = -(-n_positions // 8)
        positions = list(range(-1, -n_positions - 1, -step))
        axes.set_yticks([p + 0.5 for p in positions], labels=[f"−{-p}" for p in positions])
        axes.set(title=title, ylabel="position (token)")
        axes.spines[:].set_visible(False)
    step = -(-n_layers // 12)
    axes.set_xticks([b + 0.5 for b in range(0, n_layers, step)], labels=[str(b) for b in range(0, n_layers, step)])
    axes.set_xlabel("block (number)")
    return figure


def frontier(record: Mapping[str, Any], theme: Theme) -> Figure:
    """Every direction and coefficient tried: harmful prompts refused against harmless ones; the chosen pair is ringed.

    A line for each direction, coefficients ascending, by probability; filled marks by answers, where they were drawn.
    """
    figure = _figure(3.9)
    axes = figure.subplots()
    chosen = record["position"], record["layer"]
    by_direction: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for trial in sorted(record["trials"], key=lambda trial: trial["coeff"]):
        by_direction.setdefault((trial["position"], trial["layer"]), []).append(trial)
    in_legend = set()

    def draw(points: Any, style: str, name: str, colour: str, **how: Any) -> None:
        if len(points):
            axes.plot(*np.transpose(points), style, color=colour, label=None if name in in_legend else name, **how)
            in_legend.add(name)

    def lines(trials: Sequence[Mapping[str, Any]], which: str, colour: str, above: int) -> None:
        opened = _measured(trials, "harmless_opened", "harmful_opened")
        draw(opened, "o-", f"{which}, probability", colour, markersize=3, linewidth=0.8, alpha=0.5, zorder=above)
        answered = _measured(trials, "over_refused", "refused")
        draw(answered, "D", f"{which}, answers", colour, markersize=5, clip_on=False, zorder=above)

    mine = by_direction.pop(chosen, [])
    lines(mine, "chosen direction", theme.teacher, 3)
    ringed = [trial for trial in mine if trial["coeff"] == record["coeff"]]
    points = [*_measured(ringed, "over_refused", "refused"), *_measured(ringed, "harmless_opened", "harmful_opened")]
    for x, y in points[:1]:
        draw([(x, y)], "o", "chosen", theme.ink, markersize=12, fillstyle="none", clip_on=False, zorder=4)
        left, low = x > 50, y > 85  # towards the middle, where there is room
        axes.annotate(
            f"block {record['layer']:d}, coefficient {record['coeff']:g}",
            (x, y),
            xytext=(-9 if left else 9, -9 if low else 9),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top" if low else "bottom",
            fontsize=8,
            zorder=4,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": theme.page, "edgecolor": "none", "alpha": 0.8},
        )
    for trials in by_direction.values():
        lines(trials, "others", theme.base, 2)
    axes.set(xlabel="harmless prompts refused (%)", ylabel="harmful prompts refused (%)")
    axes.set(xlim=(-3, 103), ylim=(-3, 103))
    axes.grid()
    _legend_above(figure, axes, 2)
    return figure


def _measured(trials: Sequence[Mapping[str, Any]], across: str, up: str) -> np.ndarray:
    """Two shares of each trial that has both, in per cent: (N, 2)."""
    points = 100 * _numbers([(trial[across], trial[up]) for trial in trials]).reshape(-1, 2)
    return points[~np.isnan(points).any(1)]


def ranked_by(rows: Sequence[Mapping[str, Any]], method: str) -> str:
    """What the tokens' bars show: their part in the teacher's divergence, or votes, by method or for want of parts."""
    return "votes" if method == "vote" or any(row.get("part") is None for row in rows) else "part"


def safety_tokens(rows: Sequence[Mapping[str, Any]], theme: Theme, method: str = "part") -> Figure:
    """Parts or votes of the first tokens, and how likely base and teacher are to say each."""
    rows = rows[:TOKENS_SHOWN]
    figure = _figure(1.1 + 0.19 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(rows))
    by = ranked_by(rows, method)
    left.barh(places, [row[by] for row in rows], color=theme.teacher, height=0.7)
    # Quoted, so that a leading space is seen. A token may hold dollar signs: they are no formula.
    left.set_yticks(places, labels=[f"“{_label(row['token'])}”" for row in rows], parse_math=False)
    left.set_xlabel("votes (positions)" if by == "votes" else "part in KL (nats)")
    left.xaxis.set_major_locator(MaxNLocator(2, integer=by == "votes"))
    left.xaxis.set_major_formatter("{x:g}")
    base, teacher = (_numbers([row[name] for row in rows]) for name in ("base_prob", "teacher_prob"))
    right.hlines(places, base, teacher, color=theme.grid, linewidth=2, zorder=1)
    right.scatter(base, places, color=theme.base, marker="s", s=16, label="base")
    right.scatter(teacher, places, color=theme.teacher, marker="^", s=20, label="teacher")
    right.set_xscale("log")
    right.set_xlabel("mean probability (0 to 1)")
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter("")
    right.tick_params(axis="x", labelrotation=35)
    for axes in (left, right):
        _rows_only(axes)
    _legend_above(figure, right, 2)
    return figure


def _thinned(rows: Sequence[T]) -> Sequence[T]:
    """Every nth, so that about `STEPS_SHOWN` are left."""
    return rows[:: max(1, -(-len(rows) // STEPS_SHOWN))]


def training(metrics: Sequence[Mapping[str, Any]], theme: Theme) -> Figure:
    """Loss, probability mass on the safety tokens, how much is learned if that was measured, and gradient norm."""
    measured = _thinned([row for row in metrics if row.get("learned") is not None])
    metrics = _thinned(metrics)
    figure = _figure(7.0 if measured else 5.4)
    loss, mass, *learned, gradient = panels = figure.subplots(4 if measured else 3, 1, sharex=True)
    steps = [row["step"] for row in metrics]
    mark = "" if len(steps) > 60 else "o"

    def line(axes: Axes, name: str, label: str | None, colour: str, style: str = "-") -> None:
        values = _numbers([row[name] for row in metrics])
        axes.plot(steps, values, style, marker=mark, markersize=2.5, color=colour, label=label)

    line(loss, "harmful_loss", "harmful prompts, to the teacher", theme.teacher, "--")
    line(loss, "anchor_loss", "harmless prompts, to the base", theme.base, ":")
    line(loss, "loss", "both", theme.student)
    loss.set(title="Loss", ylabel="loss (nats a token)")
    line(mass, "target_mass", "target", theme.teacher, "--")
    line(mass, "student_mass", SHOWN["student"], theme.student)
    mass.set(title="Safety mass: probability of the safety tokens", ylabel="mass (0 to 1)")
    for axes in learned:
        shares = 100 * _numbers([row["learned"] for row in measured])
        axes.plot([row["step"] for row in measured], shares, marker="o", markersize=2.5, color=theme.student)
        axes.set(title="Learned, on validation prompts", ylabel="learned (%)")
    line(gradient, "grad_norm", None, theme.student)
    gradient.set(title="Gradient norm, before clipping", ylabel="norm (no unit)")
    gradient.set(ylim=(0, None), xlabel="optimizer step (number)")
    gradient.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels:
        axes.grid(axis="y")
        if axes in (loss, mass):
            axes.legend(loc="best")
    return figure


def outcomes(scores: Mapping[str, Any], theme: Theme) -> Figure:
    """How many prompts of each kind each model refuses, with 95 % intervals."""
    cells = [(kind, how) for kind, cell in scores["base"]["outcomes"].items() for how in cell]
    counts = {
        name: [Count.among(model["outcomes"][kind][how], "refuse") for kind, how in cells]
        for name, model in scores.items()
    }
    return _bars([f"{kind},\n{how}" for kind, how in cells], counts, "refused (% of prompts)", theme)


def capability(scores: Mapping[str, Any], theme: Theme) -> Figure:
    """How many of each little task each model gets right, with 95 % intervals."""
    tasks = list(scores["base"]["capability"])
    counts = {name: [Count(**model["capability"][task]) for task in tasks] for name, model in scores.items()}
    return _bars([_label(task) for task in tasks], counts, "right (% of tasks)", theme)


def _bars(labels: Sequence[str], counts: Mapping[str, Sequence[Count]], unit: str, theme: Theme) -> Figure:
    figure = _figure(0.9 + 0.52 * len(labels))
    axes = figure.subplots()
    places = np.arange(len(labels))
    thick = 0.8 / len(counts)
    for i, (name, of_kinds) in enumerate(counts.items()):
        rates = np.array([c.count / max(1, c.total) for c in of_kinds])
        low, high = np.array([wilson(c.count, c.total) for c in of_kinds]).T
        # An interval of 0 or n of n ends where the bar does; rounding may leave it 1e-17 beyond.
        reach = np.clip([rates - low, high - rates], 0, None)
        where = places + (i - (len(counts) - 1) / 2) * thick
        axes.barh(where, 100 * rates, thick * 0.9, color=getattr(theme, name), label=SHOWN[name])
        axes.errorbar(100 * rates, where, xerr=100 * reach, fmt="none", ecolor=theme.ink, elinewidth=0.9, capsize=1.5)
    axes.set_yticks(places, labels=labels, parse_math=False)
    axes.set(xlim=(0, 101), xlabel=unit)
    _rows_only(axes)
    _legend_above(figure, axes, len(counts))
    return figure


def flips(verdict: Mapping[str, Any], theme: Theme) -> Figure:
    """What the teacher makes of the base's unsafe answers, and of harmless prompts, with 95 % intervals."""
    flipped, *harmless = (Count(**verdict[name]) for name in ("flipped", "base_harmless", "teacher_harmless"))
    counts = {"base": [Count(0, flipped.total), harmless[0]], "teacher": [flipped, harmless[1]]}
    return _bars(["unsafe answers", "harmless prompts"], counts, "refused (% of prompts)", theme)


def _together(xs: Sequence[float], ys: Sequence[float], names: Sequence[int]) -> list[tuple[float, float, list[int]]]:
    """Points with their names; those too near each other to be told apart share a label."""
    near = [0.06 * (max(values) - min(values)) for values in (xs, ys)]
    points: list[tuple[float, float, list[int]]] = []
    for x, y, name in zip(xs, ys, names, strict=True):
        here = next((p[2] for p in points if abs(p[0] - x) <= near[0] and abs(p[1] - y) <= near[1]), None)
        if here is None:
            points.append((x, y, here := []))
        here.append(name)
    return points


def selection(record: Mapping[str, Any], theme: Theme) -> Figure:
    """Safety against over-refusal and against drift, a point a saved step in order; the kept one is framed."""
    figure = _figure(4.6)
    rows = record["scores"]
    safe, refused = ([100 * r[n]["count"] / max(1, r[n]["total"]) for r in rows] for n in ("unsafe", "over_refusal"))
    safe = [100 - share for share in safe]
    [kept] = [i for i, row in enumerate(rows) if row["step"] == record["kept"]]
    drifts = "KL(base ‖ aligned) a token, harmless answers (nats)", [row["drift"] for row in rows]
    panels = ("harmless prompts refused (%)", refused), drifts
    for axes, (label, across) in zip(figure.subplots(2, 1), panels, strict=True):
        axes.plot(across, safe, "o-", color=theme.student, markersize=4, linewidth=0.8)
        axes.plot(across[kept], safe[kept], "o", color=theme.teacher, markersize=10, fillstyle="none", label="kept")
        for x, y, steps in _together(across, safe, [row["step"] for row in rows]):
            axes.annotate(", ".join(map(str, steps)), (x, y), xytext=(4, -9), textcoords="offset points", fontsize=7)
        axes.set(xlabel=label, ylabel="harmful prompts not\ncomplied with (%)")
        axes.grid()
    _legend_above(figure, axes, 1)
    return figure


def drift(scores: Mapping[str, Any], theme: Theme) -> Figure:
    """How far teacher and student are from the base on harmless prompts, over all tokens and without S."""
    figure = _figure(1.9)
    axes = figure.subplots()
    names = [name for name in scores if name != "base"]
    for i, name in enumerate(names):
        values = np.maximum(_numbers([scores[name]["drift"], scores[name]["drift_outside"]]), 0)  # NaN stays
        where = np.arange(2) + (i - (len(names) - 1) / 2) * 0.38
        axes.barh(where, np.nan_to_num(values), 0.34, color=getattr(theme, name), label=SHOWN[name])
        for at, value in zip(where, values, strict=True):
            text = " not measured" if np.isnan(value) else f" {value:.2g}"
            axes.text(np.nan_to_num(value), at, text, va="center", fontsize=8)
    axes.set_yticks(range(2), labels=["all tokens", "outside the\nsafety tokens"])
    axes.margins(x=0.16)
    axes.set_xlim(0, max(axes.get_xlim()[1], 1e-9))  # nothing moved: no width
    axes.set_xlabel("KL(base ‖ model) a token, harmless prompts (nats)")
    _rows_only(axes)
    _legend_above(figure, axes, 2)
    return figure


def _rows_only(axes: Axes) -> None:
    """The first row above, and no line or tick on the left, where the labels stand for themselves."""
    axes.yaxis.set_inverted(True)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _legend_above(figure: Figure, axes: Axes, columns: int) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns)
