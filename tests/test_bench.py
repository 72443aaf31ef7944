"""The benchmark script runs as documented, and writes what docs/performance.md names."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import bench
import pytest

from safesteer_mlx.method import safety_tokens
from safesteer_mlx.method.teacher import TeacherTrial

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "scripts" / "bench.py"


def test_help_and_an_unknown_part(tmp_path):
    how = {"capture_output": True, "text": True, "cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run([sys.executable, BENCH, "--help"], **how)
    assert done.returncode == 0 and "--shape qwen2.5-7b" in done.stdout
    done = subprocess.run([sys.executable, BENCH, "--only", "losses"], **how)
    assert done.returncode == 2 and "no part losses" in done.stderr and not list(tmp_path.iterdir())


def test_the_parts_measure_what_the_docs_name(tmp_path, monkeypatch):
    small = {"hidden": 32, "intermediate": 64, "layers": 18, "heads": 4, "kv_heads": 2, "vocabulary": 200}
    monkeypatch.setattr(bench, "NARROW", small)
    parts = {
        "bundled": {
            "loss": lambda repeats: bench.bench_loss(repeats, 8, 500, 16),
            "compile": lambda repeats: bench.bench_compile(repeats, small, 4, 16),
        },
        "qwen2.5-0.5b": {
            name: partial(part, shape=small | {"vocabulary": 2000})
            for name, part in bench.PARTS["qwen2.5-0.5b"].items()
        },
    }
    monkeypatch.setattr(bench, "PARTS", parts)
    generate = bench.training.generate
    rows = []
    try:
        for chosen in ([], ["--shape", "qwen2.5-0.5b"]):
            monkeypatch.setattr(sys, "argv", ["bench", *chosen, "--repeats", "1", "--out", str(tmp_path / "b.json")])
            bench.main()
            found = json.loads((tmp_path / "b.json").read_text())
            assert {"machine", "system", "device"} <= set(found)
            rows += found["rows"]
    finally:
        bench.training.generate = generate
    assert [row["part"] for row in rows] == ["loss", "compile", "rollouts", "run", "step", "step"]
    for row in rows:
        assert row["seconds_ratio"] > 0 and row["ours_bytes"] > 0 and row["other_bytes"] > 0
    assert [row["goal"] for row in rows[4:]] == [1.3, 1.4]
    assert all(row["planned_ratio"] == row["planned_bytes"] / row["ours_bytes"] for row in rows[4:])


@pytest.fixture
def little(monkeypatch):
    """The bundled model with as little of everything as its stages take."""
    few = {"direction_train": 16, "direction_validation": 8, "kl_threshold": None, "steering_threshold": -99.0}
    few |= {"coeff_grid": [0.5, 1.0], "token_samples": 1, "iters": 1, "batch_size": 4, "max_tokens": 8}
    bundled = bench.bundled
    monkeypatch.setattr(bench, "bundled", lambda **changes: bundled(**changes | few))
    for module in (bench.teachers, safety_tokens):
        monkeypatch.setattr(module, "VALIDATION_PROMPTS", (4, 4))
    for module in (bench.directions, bench.training):
        monkeypatch.setattr(module, "REFUSAL_TOKENS", 8)
    monkeypatch.setattr(bench.teachers, "VALIDATION_TOKENS", 8)


def test_the_search_is_counted_beside_the_published_choice(little):
    rows = bench.bench_search(1)
    assert [row["what"].split(" / ")[1] for row in rows] == [
        "the published choice on as many prompts",
        "the published choice on 96 prompts of each kind",
    ]
    for row in rows:
        assert row["seconds_ratio"] > 0 and row["ours_block_passes"] > row["other_block_passes"] > 0
        assert row["block_passes_ratio"] == row["ours_block_passes"] / row["other_block_passes"]
        assert "answers; " in row["what"]


def test_passes_of_trials_by_hand():
    trials = [TeacherTrial(-1, 6, coeff, 0.5, 0.1, 0.2) for coeff in (0.5, 0.6, 1.0)] + [TeacherTrial(-1, 2, 1.0)]
    run = bench.bundled(coeff_grid=[0.5, 1.0])
    # Eight blocks, 16 harmful and 8 harmless prompts: six blocks shared by two coefficients, then one alone; each time
    # the base on harmless prompts.
    assert bench.trial_passes(run, trials) == 24 * (6 + 2 * 2) + 24 * 8 + 2 * 8 * 8


@pytest.mark.parametrize("run", [bench.our_run, bench.published_run])
def test_both_whole_runs_come_to_their_end(little, run):
    run(8)
