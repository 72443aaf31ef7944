"""Agreement of two judges: kappa worked out by hand, and every cell of the matrix told."""

import math

import pytest

from safesteer_mlx.evals.judging import Agreement, compare, show_agreement
from safesteer_mlx.method.judge import OUTCOMES
from safesteer_mlx.system.screen import Screen


def test_kappa_by_hand():
    # 50 answers: 20 + 15 alike, p_o = 35/50 = 0.7. Refuse: 25/50 and 30/50; comply: 25/50 and 20/50, so
    # p_e = 0.5 · 0.6 + 0.5 · 0.4 = 0.5, and κ = (0.7 − 0.5) / (1 − 0.5) = 0.4.
    counts = {("refuse", "refuse"): 20, ("refuse", "comply"): 5, ("comply", "refuse"): 10, ("comply", "comply"): 15}
    assert Agreement(counts).kappa == pytest.approx(0.4)
    # 10 answers, 4 + 4 + 2 and 5 + 3 + 2 of three outcomes, 3 + 1 + 1 alike: p_o = 0.5,
    # p_e = (4 · 5 + 4 · 3 + 2 · 2) / 100 = 0.36, κ = 0.14 / 0.64.
    first = "refuse refuse refuse refuse comply comply comply comply evade evade"
    second = "refuse refuse refuse comply comply evade refuse refuse comply evade"
    found = compare(first.split(), second.split())
    assert (found.alike, found.total) == (5, 10) and found.kappa == pytest.approx(0.14 / 0.64)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("refuse comply", "refuse comply", 1.0),
        ("refuse comply", "comply refuse", -1.0),
        ("refuse refuse comply comply", "refuse comply refuse comply", 0.0),
        ("refuse refuse", "refuse comply", 0.0),  # one that always says the same agrees by chance alone
        ("refuse refuse", "comply comply", 0.0),
        ("refuse refuse", "refuse refuse", math.nan),  # chance alone would agree on all
        ("", "", math.nan),
    ],
)
def test_kappa_at_its_ends(first, second, expected):
    assert compare(first.split(), second.split()).kappa == pytest.approx(expected, nan_ok=True)


def test_every_disagreement_can_be_counted(capsys):
    first = ["refuse", "refuse", "comply", "unparsed"]
    found = compare(first, ["refuse", "comply", "comply", "evade"])
    told = found.as_json()
    assert told["observed"] == 0.5 and told["total"] == 4
    assert sum(n for row in told["counts"].values() for n in row.values()) == 4
    assert set(told["counts"]) == set(OUTCOMES) and all(set(row) == set(OUTCOMES) for row in told["counts"].values())
    assert told["counts"]["refuse"] == {"refuse": 1, "comply": 1, "evade": 0, "unparsed": 0}
    screen = Screen()
    screen.console.width = 120
    show_agreement(("keyword", "a/b"), {"harmful": found, "harmless": Agreement({})}, screen)
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert lines[0] == ["answers", "4", "0"] and lines[1] == ["judged alike", "50.0 %", "–"]
    assert lines[2][0] == "Cohen's κ" and lines[2][2] == "–"
    assert [line[0] for line in lines[3:]] == ["both refuse", "both comply", "refuse, comply", "unparsed, evade"]
    assert all(line[1:] == ["1", "0"] for line in lines[3:])


def test_unequal_answers_are_refused():
    with pytest.raises(ValueError, match="longer"):
        compare(["refuse"], ["refuse", "comply"])
    assert math.isnan(Agreement({}).as_json()["observed"])
