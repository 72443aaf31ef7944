"""docs/own-policy.md: its commands are run as they stand there, on the bundled model."""

import json
import re
import shlex
from pathlib import Path

import pytest

from safesteer_mlx import cli, report
from safesteer_mlx.evals import heldout
from safesteer_mlx.method import safety_tokens, teacher
from safesteer_mlx.method.prompts import SETS, given_files, sets_for
from safesteer_mlx.recipe import BUNDLED, model_name

ROOT = Path(__file__).resolve().parent.parent
PAGE, POLICY = ROOT / "docs" / "own-policy.md", "examples/school-policy"


def commands() -> list[list[str]]:
    """The commands of the page's shell block, each as its words after `safesteer-mlx`."""
    [block] = re.findall(r"```sh\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [words[1:] for words in lines if words and words[0] == "safesteer-mlx"]


@pytest.mark.usefixtures("few_prompts")
def test_the_pages_commands_do_what_it_says(tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for module in (teacher, safety_tokens):  # of four prompts this base refuses none
        monkeypatch.setattr(module, "VALIDATION_PROMPTS", (16, 8))
    monkeypatch.setattr(report, "find_spec", lambda name: None)  # its figures take seconds, and have their own tests
    few = heldout.first_of_each
    monkeypatch.setattr(heldout, "first_of_each", lambda items, n: few(items, 1))  # the little tasks take most of it
    fewer = ["--direction-train", "32", "--direction-validation", "16", "--batch-size", "12"]
    said = []
    for argv in commands():
        argv += fewer if argv[0] == "align" else []
        code, (out, err) = cli.main(argv), capsys.readouterr()
        assert code == 0, err
        said.append(" ".join(out.split()))
    look, align, evaluate = said
    assert "verdict: " in look and "harmful training prompts from examples/school-policy" in look
    manifest = json.loads(Path("adapters-school/run/manifest.json").read_text())
    assert manifest["own_sets"] == sorted(given_files(POLICY))
    assert "from examples/school-policy borderline_test, harmful_test" in evaluate and "prompts: " in align
    scores = json.loads(Path("school.json").read_text())
    refused = [scores[name]["outcomes"]["harmful"]["greedy"]["refuse"] for name in ("base", "student")]
    assert refused[0] < refused[1]
    kept = Path("adapters-school/run/transcripts.jsonl").read_text("utf-8").splitlines()
    asked = {json.loads(line)["prompt"] for line in kept}
    own = sets_for(model_name(BUNDLED), POLICY)
    assert asked <= {item.text for name in SETS if name.endswith("_test") for item in getattr(own, name)}


def test_the_pages_table_has_every_set():
    page = PAGE.read_text("utf-8")
    assert all(f"`{name}`" in page for name in SETS)
