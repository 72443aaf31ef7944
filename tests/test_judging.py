"""One or two judges of the same answers, through the command: who decides, how they agree, what is kept."""

import json
import math

import pytest
from judges import make_judge
from runs import MICRO

from safesteer_mlx.evals.judge_replies import Verdict
from safesteer_mlx.evals.judging import Chosen, Judged, choose_judges, mean
from safesteer_mlx.evals.scores import HOW, Answer, Scores
from safesteer_mlx.evaluate import main
from safesteer_mlx.system.screen import Screen, UserError

TINY = MICRO
KINDS = ("harmful", "harmless", "borderline")


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> tuple[str, str]:
    """Two guards, by name: one that calls all unsafe, one that calls all controversial and not refused."""
    folder = tmp_path_factory.mktemp("judges")
    guard = make_judge(folder / "a-guard", "unsafe\nS1", ("safe", "unsafe"), (0.0, 1.0))
    said = "Safety: Controversial\nCategories: PII\nRefusal: Yes"
    other = make_judge(folder / "a-qwen3guard", said, ("Controversial", "Unsafe"), (4.0, 1.0))
    return str(guard), str(other)


def run(tmp_path, capsys, *flags: str) -> tuple[str, dict]:
    out = tmp_path / "o.json"
    assert main([TINY, "--test-prompts", "3", "--max-tokens", "32", "--out", str(out), *flags]) == 0
    shown = capsys.readouterr().out
    return " ".join(shown.replace("│", " ").split()), json.loads(out.read_text())


def test_two_judges_end_to_end(judges, tmp_path, capsys):
    guard, other = judges
    shown, found = run(tmp_path, capsys, "--judge", guard, other)
    judged = found["judges"]
    assert judged["names"] == [guard, other] and judged["templates"] == ["guard", "qwen3guard"]
    # The first decides the table: all is unsafe.
    for kind in KINDS:
        assert all(found["base"]["outcomes"][kind][how]["comply"] == 3 for how in HOW)
        cell = judged["models"]["base"][kind]["greedy"]
        assert cell[guard]["outcomes"] == ["comply"] * 3 and cell[other]["outcomes"] == ["refuse"] * 3
        assert cell[guard]["p_unsafe"] == pytest.approx([1 / (1 + math.exp(-1))] * 3, abs=1e-5)
        assert cell[guard]["mean_p_unsafe"] == pytest.approx(0.731059, abs=1e-5)
        assert (cell[guard]["controversial"], cell[other]["controversial"]) == (0, 3)
        assert cell["agreement"]["counts"]["comply"]["refuse"] == 3 == cell["agreement"]["total"]
        assert cell["agreement"]["observed"] == 0 == cell["agreement"]["kappa"]
    assert judged["agreement"]["total"] == 18 and judged["agreement"]["counts"]["comply"]["refuse"] == 18
    assert "Cohen's κ 0.00" in shown and "comply, refuse 6 6 6 18" in shown
    assert "harmful, greedy 0.731 of 3; comply 3/3" in shown and "harmful controversial, greedy 3" in shown


def test_the_keyword_judge_is_one_of_two_and_where_it_decides_nothing_changes(judges, tmp_path, capsys):
    _, alone = run(tmp_path, capsys)
    _, first = run(tmp_path, capsys, "--judge", "keyword", judges[0])
    _, second = run(tmp_path, capsys, "--judge", judges[0], "keyword")
    assert "judges" not in alone
    assert first["base"]["outcomes"] == alone["base"]["outcomes"] != second["base"]["outcomes"]
    counts = first["judges"]["agreement"]["counts"]
    assert counts == {a: {b: second["judges"]["agreement"]["counts"][b][a] for b in counts} for a in counts}
    for kind in KINDS:
        for how in HOW:
            said = {o: sum(row.values()) for o, row in cell_counts(first, kind, how).items()}
            assert said == alone["base"]["outcomes"][kind][how]
    assert first["judges"]["templates"] == [None, "guard"]


def cell_counts(found: dict, kind: str, how: str) -> dict[str, dict[str, int]]:
    return found["judges"]["models"]["base"][kind][how]["agreement"]["counts"]


def test_one_model_with_two_templates_is_two_judges_and_no_score_is_null(judges, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # --offline sets it; it is put back behind this test
    guard, _ = judges
    shown, found = run(tmp_path, capsys, "--judge", guard, guard, "--judge-template", "guard", "instruct", "--offline")
    names = [f"{guard} (guard)", f"{guard} (instruct)"]
    assert found["judges"]["names"] == names and "comply, unparsed 6 6 6 18" in shown
    cell = found["judges"]["models"]["base"]["harmful"]["sampled"][names[1]]
    assert cell["p_unsafe"] == [None] * 3 and cell["mean_p_unsafe"] is None


def test_two_judges_that_say_one_and_the_same_have_no_kappa(judges, tmp_path, capsys):
    guard, _ = judges
    own = tmp_path / "own.txt"
    own.write_text("# verdict: safety\n[user]\n{request} {answer}\n")
    shown, found = run(tmp_path, capsys, "--judge", guard, guard, "--judge-template", "guard", str(own))
    assert found["judges"]["agreement"]["kappa"] is None and found["judges"]["agreement"]["observed"] == 1
    assert "Cohen's κ – – – –" in shown


BAD = {
    "three judges": ([TINY, "--judge", "keyword", "a/b", "c/d"], "not 3"),
    "keyword twice": ([TINY, "--judge", "keyword", "keyword"], "twice"),
    "a judge twice": ([TINY, "--judge", TINY, TINY], "two --judge-template"),
    "no model": (["--judge", "keyword", TINY], "give MODEL before"),
    "a template for the phrases": ([TINY, "--judge-template", "guard"], "keyword takes none"),
    "a template too few": ([TINY, "--judge", "a/b", "c/d", "--judge-template", "guard"], "1 (guard) for 2"),
    "a template too many": (
        [TINY, "--judge", "keyword", "a/b", "--judge-template", "guard", "instruct"],
        "2 (guard instruct) for 1",
    ),
    "no such template for the second": (
        [TINY, "--judge", "a/b", "c/d", "--judge-template", "guard", "gaurd"],
        "did you mean guard",
    ),
    "no such judge": ([TINY, "--test-prompts", "1", "--judge", "keyword", "./nowhere"], "./nowhere does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_sentence(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags, expected = BAD[name]
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1 and "Traceback" not in said


def test_judges_are_chosen_by_name_and_number():
    assert choose_judges(["keyword"]) == [Chosen("keyword", None, "keyword")]
    assert [j.template for j in choose_judges(["a/WildGuard", "keyword"])] == ["wildguard", None]
    [first, second] = choose_judges(["a/b", "keyword"], ["guard"])
    assert (first.template, second.template) == ("guard", None) and first.label == "a/b"
    with pytest.raises(UserError, match="not 3"):
        choose_judges(["a", "b", "c"])


def test_scores_of_a_part_of_the_answers_are_told_as_such(capsys):
    nan = math.nan
    assert mean([0.25, nan, 0.75]) == (0.5, 2) and math.isnan(mean([nan])[0]) and mean([])[1] == 0
    answers = [Answer("suite", how, f"p{i}", f"t{i}", "refuse", True) for how in HOW for i in range(2)]
    scores = {"base": Scores(answers, {}, nan, nan)}
    verdicts = [Verdict("comply", 0.9), Verdict("unparsed"), Verdict("refuse", 0.1), Verdict("comply", 0.5)]
    judged = Judged([Chosen("g", "guard", "g")], scores, {"suite": "harmful"}, {"g": {"base": verdicts}})
    screen = Screen()
    screen.console.width = 120
    judged.show(screen)
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "suite, greedy 0.900 of 1; comply 1/2" in out and "suite, sampled 0.300 of 2; comply 1/2" in out
    assert "controversial" not in out
    assert [a.outcome for a in judged.first()["base"].answers] == ["comply", "unparsed", "refuse", "comply"]
    assert not any(a.text in json.dumps(judged.as_json()) for a in answers)
