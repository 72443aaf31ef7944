"""The benchmark script runs as documented, and writes what docs/performance.md names."""

import getpass
import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import bench
import mlx.core as mx
import mlx.nn as nn
import mutants
import numpy as np
import pytest
import roofline
import yaml
from mlx.utils import tree_flatten
from roofline import CHIPS, SEARCH, Chip, Roof, Sizes, held_against, planned_seconds, run_seconds
from shapes import LLAMA_3B, QWEN3_4B, QWEN_7B, memory_shape, random_model

from safesteer_mlx.method import own_answers, safety_tokens
from safesteer_mlx.method.teacher import TeacherTrial
from safesteer_mlx.recipe import resolve
from safesteer_mlx.system.screen import exit_code

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
            "anchor": lambda repeats: bench.bench_anchor(repeats, small, 12),
            "compile": lambda repeats: bench.bench_compile(repeats, small, 4, 16),
        },
        "qwen2.5-0.5b": {
            name: partial(part, shape=small | {"vocabulary": 2000, "layers": 18 if name == "step" else 10})
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
            assert {"machine", "chip", "system", "device"} <= set(found)
            rows += found["rows"]
    finally:
        bench.training.generate = generate
    assert [row["part"] for row in rows] == [
        "loss",
        *["anchor"] * 2,
        *["compile"] * 2,
        "rollouts",
        "run",
        "step",
        "step",
    ]
    for row in rows:
        assert row["seconds_ratio"] > 0 and row["ours_bytes"] > 0 and row["other_bytes"] > 0
    steps = [row for row in rows if row["part"] == "step"]
    assert [row["goal"] for row in steps] == [1.3, 1.4]
    assert all(row["planned_ratio"] == row["planned_bytes"] / row["ours_bytes"] for row in steps)


@pytest.fixture
def little(monkeypatch):
    """The bundled model with as little of everything as its stages take."""
    few = {"direction_train": 16, "direction_validation": 8, "kl_threshold": None, "steering_threshold": -99.0}
    few |= {"coeff_grid": [0.5, 1.0], "token_samples": 1, "iters": 1, "batch_size": 4, "max_tokens": 8}
    bundled = bench.bundled
    monkeypatch.setattr(bench, "bundled", lambda **changes: bundled(**changes | few))
    for module in (bench.teachers, safety_tokens):
        monkeypatch.setattr(module, "VALIDATION_PROMPTS", (4, 4))
    for module in (own_answers, bench.training):
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


# What a chip could do at best

# head_dim 5: a block has 2 · 10 · (10 + 5) + 3 · 10 · 20 = 900 weights; a token's keys and values are 2 · 2 · 5 numbers
LITTLE = {"hidden": 10, "intermediate": 20, "layers": 2, "heads": 2, "kv_heads": 1, "vocabulary": 100}
ONE_OPERATION_A_SECOND, ONE_BYTE_A_SECOND = Chip(1e9, 1e-12), Chip(1e-9, 1e9)


def roof(chip):
    return Roof(chip, Sizes.of(LITTLE, 16))


def test_a_roof_by_hand():
    assert roof(ONE_OPERATION_A_SECOND).sizes == Sizes(1800, 1000, 20, 2, 16)
    by_work, by_memory = roof(ONE_OPERATION_A_SECOND), roof(ONE_BYTE_A_SECOND)
    # Seven tokens, logits of three: 2 · (1,800 · 7 + 1,000 · 3) operations; 2,800 weights of two bytes, read once.
    assert by_work.reading(7, 3) == pytest.approx(31_200) and by_memory.reading(7, 3) == pytest.approx(5_600)
    # One block of two, no logits.
    assert by_work.reading(7, share=0.5) == pytest.approx(12_600)
    # Three answers of two tokens to prompts of four: twelve tokens read; then 2 · 3 · 2,800 a token.
    assert by_work.drawing(3, 4, 2) == pytest.approx(2 * 1800 * 12 + 2 * 2 * 3 * 2800)
    # The weights once to read and twice to write, whatever the rows; keys and values of 4 and then 5 tokens a row.
    assert by_memory.drawing(3, 4, 2) == pytest.approx(3600 + 2 * 5600 + 3 * (4 + 5) * 20 * 2)
    assert by_work.drawing(4, 4, 1, alike=2) == pytest.approx(2 * 1800 * 8 + 2 * 4 * 2800)  # two prompts are read
    assert by_work.in_batches(5, 2, 4, 1) == pytest.approx(5 * by_work.drawing(1, 4, 1))
    assert by_memory.in_batches(4, 2, 4, 1) == pytest.approx(2 * by_memory.drawing(2, 4, 1))


def test_a_step_on_the_roof_by_hand():
    by_work = roof(ONE_OPERATION_A_SECOND)
    forward, scored = 2 * 1800 * 2 * 5, 2 * 1000 * 2 * 2  # two rows of three and two tokens
    assert by_work.step(2, 3, 2) == pytest.approx(3 * (forward + scored))  # target, student, and back
    assert by_work.step(2, 3, 2, targets=2) == pytest.approx(4 * (forward + scored))
    assert by_work.step(2, 3, 2, checkpointed=True) == pytest.approx(4 * forward + 3 * scored)
    assert by_work.step(2, 3, 2, trained=1) == pytest.approx(2 * forward + 3 * scored)  # the lower block once
    assert by_work.step(2, 3, 2, trained=9) == by_work.step(2, 3, 2)
    work = bench.work_of("step", LITTLE, 16, 2, 5)
    assert work["prompt"] + work["answer"] == 5
    assert planned_seconds(work | {"prompt": 3, "answer": 2}, ONE_OPERATION_A_SECOND) == by_work.step(2, 3, 2)
    work = bench.work_of("rollouts", LITTLE, 16, 3, 8)
    assert planned_seconds(work, ONE_BYTE_A_SECOND) == roof(ONE_BYTE_A_SECOND).drawing(3, 4, 4)


@pytest.mark.parametrize("shape", bench.FOUR_BIT_SHAPES.values(), ids=bench.FOUR_BIT_SHAPES)
def test_sizes_are_those_of_the_model_that_is_built(shape):
    model, sizes = random_model(**shape), Sizes.of(shape, 4.5)
    found = memory_shape(model)
    weights = tree_flatten([layer.parameters() for layer in model.layers])
    assert sizes.blocks == sum(weight.size for _, weight in weights if weight.ndim == 2)
    assert sizes.head == found.vocabulary * found.hidden and sizes.layers == found.n_layers
    assert sizes.kv == 2 * found.n_layers * found.kv


def test_shapes_have_as_many_weights_as_the_models_are_said_to():
    billions = [(s := Sizes.of(shape, 4.5)).blocks + s.head for shape in (LLAMA_3B, QWEN3_4B, QWEN_7B)]
    untied = QWEN_7B["hidden"] * QWEN_7B["vocabulary"]
    assert [round(n / 1e9, 2) for n in (billions[0], billions[1], billions[2] + untied)] == [3.21, 4.02, 7.62]


def test_a_planned_run_goes_with_its_recipe():
    def planned(**given):
        return run_seconds(roof(ONE_OPERATION_A_SECOND), resolve({}, {"model": "org/model", **given})[0])

    usual, twice, longer = planned(iters=10), planned(iters=20), planned(iters=10, max_tokens=3)
    for stage in ("rollouts", "training steps"):
        assert twice[stage] == pytest.approx(2 * usual[stage]) and longer[stage] < usual[stage]
    assert {s for s in usual if usual[s] != twice[s]} == {"rollouts", "training steps"}
    assert planned(test_prompts=10)["scoring base and student"] < usual["scoring base and student"]
    checkpointed = planned(iters=10, grad_checkpoint="on")
    assert {s for s in usual if usual[s] != checkpointed[s]} == {"training steps"}
    assert all(value > 0 for value in usual.values()) and SEARCH in usual


def run_bench(monkeypatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *argv])
    return exit_code(bench.main)


def test_the_planned_table_is_the_docs(monkeypatch, capsys):
    assert run_bench(monkeypatch, "--planned") == 0
    said = capsys.readouterr().out
    docs = (ROOT / "docs" / "performance.md").read_text()
    assert [name for name in bench.FOUR_BIT_SHAPES if f"{name}, 4-bit, computed:" in said] == [*bench.FOUR_BIT_SHAPES]
    for line in said.splitlines():
        assert line in docs


MEASURED = {
    "chip": "Apple M2 Pro",
    "rows": [
        {"part": "loss", "what": "no bound"},
        {
            "part": "step",
            "what": "of this",
            "ours_seconds": 2.0,
            "work": bench.work_of("step", LLAMA_3B, 4.5, 1, 128, checkpointed=True),
        },
    ],
}


def test_a_file_is_held_against_its_chip(tmp_path, monkeypatch, capsys):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(MEASURED))
    planned = planned_seconds(MEASURED["rows"][1]["work"], CHIPS["Apple M2 Pro"])
    assert held_against(path) == [["step: of this", f"{planned:.2f}", "2.0", f"{planned / 2:.2f}"]]
    assert run_bench(monkeypatch, "--against", str(path)) == 0
    said = capsys.readouterr().out
    assert "computed" in said and f"{planned:.2f}" in said


def changed(**step):
    work = step.pop("work", {})
    row = MEASURED["rows"][1]
    return {**MEASURED, "rows": [row | step | {"work": row["work"] | work}]}


NOT_OURS = {
    "a list": ([], "holds no rows"),
    "no rows": ({"chip": "Apple M1"}, "holds no rows"),
    "rows that are none": ({"chip": "Apple M1", "rows": 7}, "holds no rows"),
    "no chip": ({"rows": []}, "is of the chip None, whose figures are not known; "),
    "a chip that is none": ({"chip": ["Apple M1"], "rows": []}, "whose figures are not known; "),
    "another chip": (
        {"chip": "x86_64", "rows": []},
        "is of the chip 'x86_64', whose figures are not known; of Apple M1,",
    ),
    "nothing measured": ({"chip": "Apple M1", "rows": [3, {"part": "loss"}]}, "has a bound to be held against; "),
    "no seconds": (changed(ours_seconds=None), "row 1 of "),
    "0 seconds": (changed(ours_seconds=0), "row 1 of "),
    "seconds in words": (changed(ours_seconds="two"), "row 1 of "),
    "no shape": (changed(work={"shape": None}), "row 1 of "),
    "a shape without heads": (changed(work={"shape": {"hidden": 8, "layers": 2}}), "row 1 of "),
    "0 heads": (changed(work={"shape": LLAMA_3B | {"heads": 0}}), "row 1 of "),
    "answers without end": (changed(work={"kind": "rollouts", "answer": 10**9}), "row 1 of "),
    "rows in words": (changed(work={"rows": "many"}), "row 1 of "),
    "negative rows": (changed(work={"rows": -4}), "row 1 of "),
    "no work": (changed() | {"rows": [{"work": 3}]}, "row 1 of "),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_a_file_that_bench_did_not_write_is_a_sentence(name, tmp_path, monkeypatch, capsys):
    content, expected = NOT_OURS[name]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(content))
    assert run_bench(monkeypatch, "--against", str(path)) == 2
    out, said = capsys.readouterr()
    assert expected in said and said.count("\n") == 1 and "; " in said and "Traceback" not in said + out


@pytest.mark.parametrize(("content", "expected"), [(None, "No such file"), ("", "JSON"), ("{", "JSON"), ("\0", "JSON")])
def test_what_is_no_json_is_a_sentence(content, expected, tmp_path, monkeypatch, capsys):
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_text(content)
    assert run_bench(monkeypatch, "--against", str(path)) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1


def test_what_is_contributed_tells_the_machine_and_not_its_owner(tmp_path, monkeypatch):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "mac_figures.yml").read_text())
    assert (
        "scripts/bench.py --contribute"
        in next(f for f in form["body"] if f.get("id") == "bench")["attributes"]["description"]
    )
    answers = {"sysctl -n hw.model": "Mac14,9", "sysctl -n machdep.cpu.brand_string": "Apple M2 Pro"}
    answers |= {"git describe --always --dirty --exclude=*": "abc1234"}
    monkeypatch.setattr(bench, "_said", lambda *command: answers[" ".join(command)])
    little = {"loss": lambda repeats: bench.bench_loss(repeats, 8, 500, 16)}
    monkeypatch.setattr(bench, "PARTS", {"bundled": little})
    monkeypatch.chdir(tmp_path)
    assert run_bench(monkeypatch, "--contribute", "--repeats", "1") == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert path.name == "figures.json" and found["rows"][0]["seconds_ratio"] > 0
    assert (found["machine"], found["chip"], found["commit"]) == ("Mac14,9", "Apple M2 Pro", "abc1234")
    assert found["mlx"] and found["mlx-lm"] and found["memory"] > 1e9 and "macos" in found
    about = {"machine", "chip", "memory", "system", "macos", "python", "device", "mlx", "mlx-metal", "mlx-lm"}
    assert set(found) == about | {"safesteer-mlx", "commit", "shape", "parts", "repeats", "tokens", "rows"}
    text = path.read_text()
    for private in (str(Path.home()), str(ROOT), str(tmp_path), socket.gethostname(), getpass.getuser()):
        assert f'"{private}' not in text and (len(private) < 5 or private not in text)


@pytest.mark.parametrize("name", bench.FOUR_BIT_SHAPES)
def test_shapes_in_4_bits_are_measured_as_the_bound_has_them(name):
    shape = bench.FOUR_BIT_SHAPES[name] | {"hidden": 128, "intermediate": 192, "layers": 2, "vocabulary": 2048}
    shape |= {"heads": 2, "kv_heads": 1}
    step, *answers = (row for part in bench.PARTS[name].values() for row in part.func(8, shape))
    assert (step["part"], answers[0]["part"], answers[0]["seconds_ratio"] > 0) == ("step", "rollouts", True)
    for row in (step, *answers):
        assert row["ours_seconds"] > 0 and row["work"]["shape"] == shape and row["work"]["bits"] == roofline.FOUR_BIT
        assert planned_seconds(row["work"], CHIPS["Apple M1"]) > 0
    assert step["work"]["checkpointed"] and step["work"]["rows"] == 1 and answers[0]["work"]["rows"] == 8


# What a step asks of MLX

WAITS = {
    "eval": (lambda x: mx.eval(x), {"waits": 1, "operations": 2}),
    "eval of a tree": (lambda x: mx.eval({"a": [x, x]}, x), {"waits": 1, "operations": 2}),
    "item": (lambda x: x.item(), {"waits": 1, "operations": 2}),
    "tolist": (lambda x: x.tolist(), {"waits": 1, "operations": 2}),
    "float": (lambda x: float(x), {"waits": 1, "operations": 2}),
    "int": (lambda x: int(x), {"waits": 1, "operations": 2}),
    "a condition": (lambda x: 1 if x > 0 else 2, {"waits": 1, "operations": 3}),
    "np.array": (lambda x: np.array(x), {"waits": 1, "operations": 2}),
    "np.asarray": (lambda x: np.asarray(x), {"waits": 1, "operations": 2}),
    "async_eval": (lambda x: mx.async_eval(x), {"handed over": 1, "operations": 2}),
    "read again": (lambda x: (mx.eval(x), x.item(), np.array(x)), {"waits": 1, "reads": 2, "operations": 2}),
    "two graphs": (lambda x: (x.item(), (x + 1).item()), {"waits": 2, "operations": 3}),
    "numpy's own": (lambda x: np.array([1, 2]), {}),
    "nothing": (lambda x: x * 2, {}),
}


@pytest.mark.parametrize("name", WAITS)
def test_every_wait_is_counted(name):
    work, expected = WAITS[name]
    before = mx.eval, mx.array.item, np.array, nn.value_and_grad
    x = mx.exp(mx.array(1.0)) * mx.array(2.0)
    with bench.counted() as found:
        work(x)
    assert {kind: count for kind, count in found.items() if count} == expected
    assert (mx.eval, mx.array.item, np.array, nn.value_and_grad) == before


def test_graphs_are_counted():
    model = nn.Linear(2, 1)
    with bench.counted() as found:
        grad = nn.value_and_grad(model, lambda x: model(x).sum())
        assert not found["graphs"]
        for _ in range(3):
            grad(mx.ones((1, 2)))
    assert found["graphs"] == 3 and not found["waits"]


def test_a_step_waits_for_nothing_that_it_need_not():
    """One wait a pass; two for the log-odds that guidance goes by, one for the anchor's in each of its passes; the
    gradient's norm, before it is applied; the rest.

    A number that is read in the loop, to be shown for one, makes Metal stand still until it is there.
    """
    sampling, learning = (dict(zip(bench.COUNTED, row[1:], strict=True)) for row in bench.bench_counts(bench.TINY))
    passes = 3  # 11 harmful prompts; 16 and 5 harmless ones
    assert learning["graphs"] == str(passes) and sampling["graphs"] == "0"
    assert int(learning["waits"]) <= passes + 2 + 2 + 1 + 1
    assert int(learning["handed over"]) <= passes
    # Of what was waited for: each pass's masses and two targets' losses, and the tokens, held against the vocabulary.
    assert int(learning["reads"]) <= 4 * passes
    assert (
        int(sampling["handed over"]) <= 15 and int(sampling["waits"]) <= 5
    )  # tokens; readings, and what they begin with


def test_short_completions_go_together_where_long_ones_cannot(monkeypatch):
    monkeypatch.setattr(bench, "generate", lambda model, rows, *how: [bench.Completion([1] * 15, False) for _ in rows])
    rows = {name.split(" ")[0] + name.split(" ")[1]: (float(n), float(p)) for name, n, p in bench.bench_padding(2)}
    by_rows, by_tokens = [rows[f"{n}row{'s'[: n > 1]}"] for n in (4, 2, 1)], list(rows.values())[2::2]
    for (passes, padded), (fewer, more) in zip(by_rows, by_tokens, strict=True):
        assert fewer < 0.7 * passes and padded <= more < 1.1


def test_a_padded_batch_is_the_batch():
    shape = {"hidden": 8, "vocabulary": 50}
    (ids, at, _, weights), (exact, where, _, own) = (map(np.array, bench._batch(2, 6, n, shape)) for n in (9, 6))
    assert (ids[:, :6] == exact).all() and not ids[:, 6:].any() and at.shape == (10,) and where.shape == (6,)
    assert (ids.ravel()[at[weights > 0]] == exact.ravel()[where]).all() and weights.sum() == own.sum() == 1
    assert where.tolist() == [2, 3, 4, 8, 9, 10]  # what predicts the last three tokens of each


def test_every_mutant_has_its_line_and_its_test():
    """Else it says nothing: both change their words with the code."""
    for mutant in mutants.MUTANTS:
        assert (ROOT / mutant.file).read_text("utf-8").count(mutant.old) == 1, f"{mutant.name}: {mutant.old}"
        file, _, beginning = mutant.test.partition("::")
        assert f"def {beginning}" in (ROOT / file).read_text("utf-8"), f"{mutant.name}: {mutant.test}"
