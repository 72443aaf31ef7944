"""The package as a library: README's ten lines, and that importing it costs nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import safesteer_mlx as safesteer

ROOT = Path(__file__).parents[1]
QUICK = {"iters": 2, "batch_size": 4, "test_prompts": 2, "direction_train": 32, "direction_validation": 16}
QUICK |= {"token_samples": 1, "report": False}

pytestmark = pytest.mark.usefixtures("few_prompts")


def test_readmes_lines_align_the_bundled_model_and_read_its_scores(tmp_path, monkeypatch, capsys):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(code.splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    whole = safesteer.align

    def quickly(base, *args, **settings):
        return whole(base, *args, force=True, **settings | QUICK)

    monkeypatch.setattr(safesteer, "align", quickly)
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert re.search(r"unsafe answers: \d+/2.* → \d+/2", said), said
    assert (tmp_path / "adapters-tiny" / "adapters.safetensors").is_file()


def test_what_align_returns_is_what_the_run_recorded(tmp_path):
    base = safesteer.load("tiny-chat")
    checked = safesteer.align(base, tmp_path / "a", check=True, direction_train=32, direction_validation=16)
    assert checked.verdict.word in ("go", "caution") and not checked.scores
    with pytest.raises(safesteer.UserError, match="did you mean epochs"):
        safesteer.align(base, tmp_path / "a", epoch=2)
    assert not (tmp_path / "b").exists()


def test_evaluate_scores_a_base_alone():
    scores = safesteer.evaluate(safesteer.load("tiny-chat"), test_prompts=2)
    assert list(scores) == ["base"] and scores["base"].count("harmful", "greedy", "refuse").total == 2


def test_evaluate_scores_on_a_policys_own_test_sets(tmp_path):
    (tmp_path / "harmful_test.jsonl").write_text('"mine"\n')
    [scores] = safesteer.evaluate(safesteer.load("tiny-chat"), test_prompts=2, data=tmp_path).values()
    assert [scores.count(kind, "greedy", "refuse").total for kind in ("harmful", "harmless")] == [1, 2]
    (tmp_path / "harmful_test.jsonl").rename(tmp_path / "harmful_train.jsonl")
    with pytest.raises(safesteer.UserError, match="is no folder that holds a test set"):
        safesteer.evaluate(safesteer.load("tiny-chat"), data=tmp_path)


def test_importing_it_is_light_and_its_names_are_there_in_any_order():
    code = """
import sys, safesteer_mlx
assert not {"mlx.core", "numpy", "rich", "transformers"} & set(sys.modules), "heavy"
import safesteer_mlx.align
assert callable(safesteer_mlx.align) and callable(safesteer_mlx.align.main) and callable(safesteer_mlx.evaluate)
assert all(hasattr(safesteer_mlx, name) for name in safesteer_mlx.__all__)
from safesteer_mlx import Recipe, load
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
