"""Runs side by side: what differs, what came of each, and what a reader must know before comparing them."""

import json
import re
from pathlib import Path

import pytest
from runs import HOSTILE, files, write_run

from safesteer_mlx import compare
from safesteer_mlx.compare import STAGES, differing, read_compared
from safesteer_mlx.recipe import PACKAGE


def other(**changed) -> dict:
    """Another run: of another seed, safer, quicker."""
    found = files()
    found["recipe.yaml"] |= {"seed": 7, "anchor_ratio": 0.25, "adapter_path": "elsewhere"}
    found["manifest.json"] |= {"mlx": "0.0.2", "adapters_sha256": "ef" * 32}
    cell = found["before_after.json"]["student"]["outcomes"]["harmful"]["greedy"]
    cell.update(refuse=8, comply=2)
    found["timing.json"] = {"seconds": 4500.4, "peak_bytes": 2_340_000_000}
    return found | changed


def said(capsys, monkeypatch, *argv: object, columns: int = 120) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert compare.main([str(a) for a in argv]) == 0
    return capsys.readouterr().out


def row(text: str, title: str) -> list[str]:
    """The cells of a printed row."""
    line = next(line for line in text.splitlines() if f" {title} " in line)
    return [cell.strip() for cell in line.strip("│┃").split("│")]


@pytest.fixture
def two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = files()
    first["recipe.yaml"] |= {"seed": 42}
    return write_run(Path("one/run"), first), write_run(Path("two"), other())


def test_what_differs_and_what_came_of_it_is_shown_side_by_side(two, capsys, monkeypatch):
    text = said(capsys, monkeypatch, "one", "two")
    assert text.startswith("1: one\n2: two\n")
    assert row(text, "harmful requests answered, greedy") == [
        "harmful requests answered, greedy",
        "5 → 1 of 10 (2–40 %)",
        "5 → 2 of 10 (6–51 %)",
    ]
    assert row(text, "harmless requests refused, sampled")[1:] == ["0 → 1 of 10 (2–40 %)"] * 2
    assert row(text, "small tasks right")[1:] == ["15 → 15 of 16 (72–99 %)"] * 2
    assert row(text, "seconds")[1:] == ["90", "4,500"] and row(text, "peak memory")[1:] == ["—", "2.34 GB"]
    assert row(text, "verdict before training")[1:] == ["caution", "caution"]
    assert row(text, "seed")[1:] == ["42", "7"] and row(text, "anchor_ratio")[1:] == ["0.5", "0.25"]
    assert row(text, "mlx")[1:] == ["0.0.1", "0.0.2"]
    assert not any(name in text for name in ("adapter_path", "adapters_sha256", "system_prompt", "different"))


def test_of_runs_that_are_alike_nothing_differs(two, capsys, monkeypatch):
    text = said(capsys, monkeypatch, "one", "one/run")
    assert "Settings that differ: nothing" in text and "Made with: nothing" in text


@pytest.mark.parametrize(("columns", "beside"), [(60, 1), (80, 2), (100, 2), (140, 4)])
def test_as_many_runs_stand_side_by_side_as_there_is_room_for(columns, beside, two, capsys, monkeypatch):
    text = said(capsys, monkeypatch, "one", "two", "one", "two", "one", columns=columns)
    heads = [re.findall(r"\d", line) for line in text.splitlines() if line.startswith("┃")]
    assert max(map(len, heads)) == beside and {n for head in heads for n in head} == set("12345")
    assert all(len(line) <= columns for line in text.splitlines())


CAUTIONS = {
    "another model": ({"manifest.json": files()["manifest.json"] | {"model_sha256": "00" * 32}}, "different models"),
    "other prompts": (
        {"transcripts.jsonl": [r | {"prompt": "another"} for r in files()["transcripts.jsonl"]]},
        "different prompts",
    ),
    "other prompts, by the settings": (
        {"transcripts.jsonl": None, "recipe.yaml": files()["recipe.yaml"] | {"data": "mine"}},
        "different prompts",
    ),
    **{
        f"not finished, {name}": (dict.fromkeys([*STAGES][at:]), f"two is not finished: “{stage}” is missing.")
        for at, (name, stage) in enumerate(STAGES.items())
    },
}


@pytest.mark.parametrize("case", CAUTIONS)
def test_what_a_reader_must_know_is_a_sentence(case, two, capsys, monkeypatch):
    changed, expected = CAUTIONS[case]
    write_run(Path("three"), files() | changed)
    for name in (name for name, content in changed.items() if content is None):
        Path("two", name).unlink()
    if "not finished" not in case:
        two = (two[0], Path("three"))
    text = said(capsys, monkeypatch, "one", two[1])
    assert text.count(expected) == 1
    if "before_after.json" in changed:
        assert row(text, "harmful requests answered, greedy")[1:] == ["5 → 1 of 10 (2–40 %)", "—"]


BAD = {
    "none": ([], "two runs or more, and 0 was given"),
    "one": (["one"], "two runs or more, and 1 was given"),
    "nothing there": (["one", "nowhere"], "nowhere holds no run of align"),
    "an empty folder": (["one", "empty"], "empty holds no run of align"),
    "a file": (["one", "one/run/recipe.yaml"], "holds no run of align"),
    "settings of no form": (["one", "two"], "recipe.yaml holds a list", "recipe.yaml", "[1]"),
    "scores of no form": (["one", "two"], "before_after.json is not as align writes it", "before_after.json", "[]"),
    "half the scores": (["one", "two"], "before_after.json", "before_after.json", '{"base": '),
    "fewer than none": (["one", "two"], "is not as align writes it", "before_after.json", '"refuse": -9'),
    "no such kind": (["one", "two"], "is not as align writes it", "before_after.json", '"harmless": 5'),
    "endless seconds": (["one", "two"], "timing.json", "timing.json", '{"seconds": 1e308}'),
    "memory in words": (["one", "two"], "timing.json", "timing.json", '{"seconds": 1, "peak_bytes": "much"}'),
    "no verdict": (["one", "two"], "verdict.json", "verdict.json", '{"reasons": []}'),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_compared_is_one_sentence(case, two, capsys):
    Path("empty").mkdir()
    argv, expected, *file = BAD[case]
    if file:
        name, text = file
        if text.startswith('"'):  # within what is there
            key = text.partition(": ")[0]
            whole = Path("two", name).read_text()
            text = re.sub(rf"{key}: \d+", text, whole) if "refuse" in key else whole.replace(key, '"other"')
        Path("two", name).write_text(text)
    assert compare.main([*argv, "--out", "page.html"]) == 2
    told = capsys.readouterr().err
    assert expected in told and told.count("\n") == 1 and "Traceback" not in told and not Path("page.html").exists()


def test_the_page_is_in_the_reports_style_and_runs_and_fetches_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("one"), files(HOSTILE.encode("utf-8", "replace").decode()))
    write_run(Path("two"), other())
    said(capsys, monkeypatch, "one", "two", "--out", "page.html")
    page, head = Path("page.html").read_text(), (PACKAGE / "data" / "head.html").read_text()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', head)
    assert policy and policy[0] in page and "--ink" in page
    assert "<script" not in page and "src=" not in page and "http:" not in page and "\x1b" not in page
    assert "&lt;script&gt;" in page and "5 → 2 of 10 (6–51 %)" in page and page.count("<table") == 3
    assert "'s answer" not in page  # as the transcripts have it


def test_the_page_says_what_a_reader_must_know(two, capsys, monkeypatch):
    Path("two", "manifest.json").unlink()
    said(capsys, monkeypatch, "one", "two", "--out", "page.html")
    assert "two is not finished" in Path("page.html").read_text()


def test_a_run_that_names_no_model_is_on_the_page(two, capsys, monkeypatch):
    Path("two", "recipe.yaml").write_text("")
    said(capsys, monkeypatch, "one", "two", "--out", "page.html")
    assert "</bdi>, of <bdi>a model</bdi>" in Path("page.html").read_text()


def test_a_long_value_is_cut_and_one_that_is_not_there_is_told():
    rows = differing([{"a": "x" * 500, "b": 1}, {"a": [1, "ü"], "b": 1}, {}], ())
    assert rows == [["a", "x" * 79 + "…", '[1, "ü"]', "—"], ["b", "1", "1", "—"]]


def test_a_run_is_read_from_its_own_folder_or_from_the_adapters(two):
    both = [read_compared(Path(name)) for name in ("one", "one/run")]
    assert both[0].scores == both[1].scores == json.loads(Path("one/run/before_after.json").read_text())
