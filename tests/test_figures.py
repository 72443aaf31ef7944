"""The pictures hold the data: the framed candidate, the gaps, the intervals, tokens as they are."""

import warnings

import pytest
from matplotlib.patches import Rectangle
from runs import HOSTILE, files, trial

from safesteer_mlx.evals import figures
from safesteer_mlx.evals.figures import DARK, LIGHT, picture


@pytest.fixture
def found():
    return files()


def frames(axes):
    return [p for p in axes.patches if isinstance(p, Rectangle) and not p.get_fill()]


def test_points_that_lie_on_each_other_share_a_label():
    points = figures._together([0.0, 1.0, 1.01, 2.0], [0.0, 5.0, 5.0, 10.0], [5, 10, 15, 20])
    assert [names for *_, names in points] == [[5], [10, 15], [20]]


def test_the_chosen_candidate_is_framed_in_all_three_and_gaps_are_left_empty(found):
    drawn = figures.direction(found["direction.json"], LIGHT)
    panels = [axes for axes in drawn.axes if axes.get_ylabel() == "position (token)"]
    assert len(panels) == 3
    for axes in panels:
        assert {p.get_xy() for p in frames(axes)} == {(2, -2)}  # block 2, position −2
    measured = [int((~axes.collections[0].get_array().mask).sum()) for axes in panels]
    assert measured == [0, 2, 2]
    scores = panels[2].collections[0].get_array()
    assert scores[1, 2] == 0.05  # under the frame: row 1 of positions −3, −2, −1
    assert panels[0].get_ylim() == (-3, 0)


def lines(drawn, axes=0):
    """What is drawn, by its name in the legend: points as (x, y)."""
    return {
        line.get_label(): [tuple(map(float, p)) for p in line.get_xydata().round(6)]
        for line in drawn.axes[axes].lines
        if not line.get_label().startswith("_")
    }


def test_every_trial_is_on_the_frontier_and_the_chosen_one_is_ringed_and_named(found):
    found["direction.json"]["trials"].reverse()  # lines go by coefficient, not by the order of the file
    drawn = figures.frontier(found["direction.json"], LIGHT)
    assert lines(drawn) == {
        "chosen direction, probability": [(10, 50), (30, 80), (60, 90)],
        "chosen direction, answers": [(10, 90)],
        "others, probability": [(20, 30), (40, 60)],
        "others, answers": [(10, 50)],
        "chosen": [(10, 90)],  # where answers were drawn, by them
    }
    [label] = drawn.axes[0].texts
    assert label.get_text() == "block 2, coefficient 0.7" and label.xy == (10, 90)
    assert {t.get_text() for t in drawn.legends[0].get_texts()} == set(lines(drawn))


def test_two_directions_that_were_not_chosen_are_two_lines_with_one_name(found):
    found["direction.json"]["trials"] += [trial(3, 0.4, (0.3, 0.2)), trial(3, 1.0, (0.6, 0.4))]
    axes = figures.frontier(found["direction.json"], LIGHT).axes[0]
    assert [len(line.get_xdata()) for line in axes.lines if line.get_color() == LIGHT.base] == [2, 1, 2]
    names = [t.get_text() for t in axes.figure.legends[0].get_texts()]
    assert len(names) == len(set(names)) == 5


def test_the_frontier_of_a_model_that_thinks_first_is_by_answers_alone(found):
    found["direction.json"]["trials"] = [trial(4, 1.0, None, 0.4), trial(2, 0.7, None, 0.9), trial(2, 1.0, None)]
    drawn = figures.frontier(found["direction.json"], LIGHT)
    assert lines(drawn) == {
        "others, answers": [(10, 40)],
        "chosen direction, answers": [(10, 90)],
        "chosen": [(10, 90)],
    }


@pytest.mark.parametrize(
    ("tried", "ring"),
    [
        ([], None),
        ([trial(2, 0.7, None)], None),  # nothing was measured
        ([trial(2, 0.7, (1.0, 1.0))], (100, 100)),
        ([trial(2, 0.7, (0.0, 0.0), 0.0)], (10, 0)),
        ([trial(4, 0.7, (0.5, 0.5))], None),  # the chosen one is none of them
    ],
    ids=["none", "not measured", "no answers", "no refusals", "another"],
)
def test_a_frontier_of_one_trial_or_none_is_drawn(found, tried, ring):
    found["direction.json"]["trials"] = tried
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture(lambda theme: figures.frontier(found["direction.json"], theme))
    assert lines(figures.frontier(found["direction.json"], LIGHT)).get("chosen", [None]) == [ring]


def test_no_text_of_a_model_is_on_the_frontier():
    runs = files()["direction.json"], files(HOSTILE)["direction.json"]
    plain, hostile = (picture(lambda theme, found=found: figures.frontier(found, theme)) for found in runs)
    assert plain == hostile


def test_text_for_a_number_is_never_drawn(found):
    for name in ("layer", "coeff"):
        bad = found["direction.json"] | {name: HOSTILE, "trials": [trial(2, 0.7, (0.5, 0.1)) | {name: HOSTILE}]}
        with pytest.raises((ValueError, TypeError)):
            figures.frontier(bad, LIGHT)


def test_what_is_learned_has_a_panel_where_it_was_measured(found):
    rows = found["metrics.jsonl"]
    drawn = figures.training(rows, LIGHT)
    titles = [axes.get_title() for axes in drawn.axes]
    assert titles[2] == "Learned, on validation prompts" and len(titles) == 4
    assert [tuple(p) for p in drawn.axes[2].lines[0].get_xydata()] == [(3, 80)]
    assert [axes.get_xlabel() for axes in drawn.axes] == ["", "", "", "optimizer step (number)"]
    never = [row | {"learned": None} for row in rows]
    before = [{key: value for key, value in row.items() if key != "learned"} for row in rows]  # an older run
    assert all(len(figures.training(without, LIGHT).axes) == 3 for without in (never, before))


def test_the_tokens_bars_are_what_they_are_ranked_by(found):
    rows = found["tokens.json"]
    without = [{k: v for k, v in row.items() if k != "part"} for row in rows]
    for drawn, width in (
        (figures.safety_tokens(rows, LIGHT), 0.25),
        (figures.safety_tokens(rows, LIGHT, "vote"), 9),
        (figures.safety_tokens(without, LIGHT), 9),
    ):
        assert [bar.get_width() for bar in drawn.axes[0].patches] == [width] * 2


def test_a_deep_model_has_every_block_on_the_axis(found):
    wide = [[0.1] * 80 for _ in range(5)]
    found["direction.json"]["scores"] = dict.fromkeys(("ablation_kl", "ablation_refusal", "steering_refusal"), wide)
    drawn = figures.direction(found["direction.json"], LIGHT)
    assert drawn.axes[0].get_xlim() == (0, 80) and len(drawn.axes[2].get_xticks()) <= 12


def test_bars_have_the_rates_and_wilsons_intervals(found):
    axes = figures.outcomes(found["before_after.json"], LIGHT).axes[0]
    widths = [bar.get_width() for container in axes.containers for bar in getattr(container, "patches", [])]
    assert widths == [50, 50, 0, 0, 10, 10, 100, 100, 40, 40, 50, 50, 90, 90, 10, 10, 10, 10]
    whiskers = axes.collections[2].get_segments()  # of the aligned model
    assert whiskers[0][:, 0] == pytest.approx([59.585, 98.212], abs=0.01)  # 9 of 10


def test_tokens_are_no_formulas_and_stand_quoted(found):
    rows = [
        dict(row, token=token) for row, token in zip(found["tokens.json"], (" $\\frac{a}$", "\u202e抱\n"), strict=True)
    ]
    drawn = figures.safety_tokens(rows, LIGHT)
    assert [t.get_text() for t in drawn.axes[0].get_yticklabels()] == ["“ $\\frac{a}$”", "“⟨U+202E⟩抱⟨U+000A⟩”"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = picture(lambda theme: figures.safety_tokens(rows, theme)).light.decode()
    assert "$\\frac{a}$" in svg and "抱" in svg  # text, in whatever font the reader has


def test_a_long_name_leaves_room_for_the_bars(found):
    scores = found["before_after.json"]
    scores = {name: s | {"capability": {"x" * 500: {"count": 1, "total": 2}}} for name, s in scores.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = picture(lambda theme: figures.capability(scores, theme)).light.decode()
    assert "x" * 19 + "…" in svg


def test_many_tokens_are_cut_to_what_can_be_read(found):
    drawn = figures.safety_tokens(found["tokens.json"][:1] * 60, LIGHT)
    assert len(drawn.axes[0].get_yticklabels()) == figures.TOKENS_SHOWN


def test_dark_and_light_differ_in_colours_alone(found):
    drawn = picture(lambda theme: figures.training(found["metrics.jsonl"], theme))
    light, dark = drawn.light.decode(), drawn.dark.decode()
    assert DARK.page in dark and DARK.page not in light and LIGHT.page in light
    assert light.count("<path") == dark.count("<path")


def test_axes_say_what_they_measure_and_in_which_unit(found):
    scores, direction = found["before_after.json"], found["direction.json"]
    said = {
        "refused (% of prompts)": figures.outcomes(scores, LIGHT),
        "right (% of tasks)": figures.capability(scores, LIGHT),
        "KL(base ‖ model) a token, harmless prompts (nats)": figures.drift(scores, LIGHT),
        "harmless prompts refused (%)": figures.frontier(direction, LIGHT),
        "part in KL (nats)": figures.safety_tokens(found["tokens.json"], LIGHT),
        "votes (positions)": figures.safety_tokens(found["tokens.json"], LIGHT, "vote"),
        "optimizer step (number)": figures.training(found["metrics.jsonl"], LIGHT),
        "block (number)": figures.direction(direction, LIGHT),
        "KL(base ‖ aligned) a token, harmless answers (nats)": figures.selection(found["selection.json"], LIGHT),
    }
    said["refused (% of prompts)", "before training"] = figures.flips(found["verdict.json"], LIGHT)
    for label, drawn in said.items():
        labels = [text for axes in drawn.axes for text in (axes.get_xlabel(), axes.get_ylabel()) if text]
        assert (label if isinstance(label, str) else label[0]) in labels
        assert all(text.endswith(")") or text in ("log-odds", "nats") for text in labels), labels


def _luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(("name", "least"), [("ink", 4.5), ("base", 3), ("teacher", 3), ("student", 3)])
def test_text_and_marks_stand_out_from_the_page(theme, name, least):
    """WCAG 2 AA: 4.5 for text, 3 for what a figure shows."""
    light, dark = sorted((_luminance(getattr(theme, name)), _luminance(theme.page)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= least


def test_a_drift_that_was_not_measured_is_said(found):
    axes = figures.drift(found["before_after.json"], LIGHT).axes[0]
    assert [t.get_text().strip() for t in axes.texts] == ["0.01", "not measured"] * 2


@pytest.mark.parametrize("value", [0.0, -1e-9])
def test_where_nothing_moved_drift_is_drawn_all_the_same(value):
    scores = {name: {"drift": value, "drift_outside": None} for name in ("base", "student")}
    axes = figures.drift(scores, LIGHT).axes[0]  # a warning would fail it
    assert axes.get_xlim()[0] == 0 < axes.get_xlim()[1]
