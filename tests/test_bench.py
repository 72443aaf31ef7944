"""The benchmark script runs as documented, and writes what docs/performance.md names."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import bench

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
