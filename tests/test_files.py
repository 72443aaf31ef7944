"""What a stranger sends: files that are none, runs that were edited, numbers and lines without end, paths that lead
nowhere. Each is one sentence, at once, and leaves nothing behind."""

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from runs import files, write_run

from safesteer_mlx import align, chat, compare, evaluate, export, report, tokens, verify
from safesteer_mlx.evals import heldout, scorecard
from safesteer_mlx.evals.fidelity import recorded
from safesteer_mlx.evals.heldout import BaseAnswers, perplexity
from safesteer_mlx.evals.judge_model import read_template
from safesteer_mlx.evals.suites import find_suite, load_suite, task_name
from safesteer_mlx.evals.tampering import run_direction
from safesteer_mlx.method.direction import CandidateScores, Direction, FoundDirections
from safesteer_mlx.method.judge import use_refusal_phrases
from safesteer_mlx.method.prompts import Instruction, load_instructions
from safesteer_mlx.method.rollout import Completion, Sampling
from safesteer_mlx.method.run import most_read
from safesteer_mlx.method.safety_tokens import SafetyTokens
from safesteer_mlx.method.teacher import ChosenTeacher, Outcomes
from safesteer_mlx.method.token_file import read_rows
from safesteer_mlx.method.train import Rollouts, TrainingLog
from safesteer_mlx.method.training_prompts import OwnOpenings
from safesteer_mlx.recipe import read_yaml, resolve
from safesteer_mlx.system.files import DEEPEST, parse_json, read_json, write_out
from safesteer_mlx.system.finished import RECORD, finished_run, read_record
from safesteer_mlx.system.model_files import read_header
from safesteer_mlx.system.screen import Screen, UserError, visible
from safesteer_mlx.system.store import Store, encoded, save_arrays, write


@pytest.fixture(autouse=True)
def at_once():
    """What waits for a pipe, or reads a device to its end, fails."""

    def late(*_):
        raise TimeoutError("not told at once")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 20)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")}


def refused(capsys, main, *argv) -> str:
    """The one sentence in which a command ends; what was in its folders is as before."""
    assert main([str(a) for a in argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("safesteer-mlx: ") and said.count("\n") == 1 and len(said) < 700, said
    assert "Traceback" not in said and visible(said[:-1]) == said[:-1]
    return said


# Not a regular file

READERS = {
    "run.yaml": read_yaml,
    "data.jsonl": load_instructions,
    "data.json": load_instructions,
    "data.txt": load_instructions,
    "tokens.json": read_rows,
    "phrases": lambda p: use_refusal_phrases(str(p)),
    "text": lambda p: evaluate.parse(["--perplexity", str(p)]),
    "text.txt": lambda p: perplexity(None, None, p),
    "suite.csv": lambda p: load_suite(find_suite("AdvBench"), p),
    "suite.json": lambda p: load_suite(find_suite("AdvBench"), p),
    "suite.jsonl": lambda p: load_suite(find_suite("AdvBench"), p),
    "template": lambda p: read_template(str(p)),
    "task.yaml": task_name,
    "adapters.safetensors": read_header,
    "direction.json": lambda p: run_direction(p.parent),
    **{f"run/{name}": lambda p: read_record(p.parent, p.name) for name in RECORD},
}


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def endless(path: Path) -> None:
    """A terabyte that takes no place."""
    path.touch()
    os.truncate(path, 10**12)


@pytest.mark.parametrize("make", [os.mkfifo, device, Path.mkdir, endless], ids=["pipe", "device", "folder", "endless"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_or_has_no_end_is_told_and_not_read(name, make, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    with pytest.raises(UserError, match=r"; ") as error:
        READERS[name](path)
    assert len(str(error.value)) < 400 + len(str(path))


@pytest.mark.parametrize("make", [os.mkfifo, device, Path.mkdir, endless], ids=["pipe", "device", "folder", "endless"])
def test_a_state_that_is_no_file_is_damaged_and_answers_are_drawn_again(make, tmp_path):
    store = Store(tmp_path, "this run")
    store.keep("tokens", [1])
    (store.states / "tokens.json").unlink()
    make(store.states / "tokens.json")
    assert store.found("tokens") is None and store.damaged == ["tokens.json"]
    make(tmp_path / "answers.json")
    assert BaseAnswers(None, None, tmp_path / "answers.json")._found == {}  # type: ignore[arg-type]


# JSON without end

DEEP = "[" * 10_000 + "]" * 10_000
BAD_JSON = ["1e308", "-1e31", "1e400", "9" * 31, "9" * 5000, "-" + "9" * 5000, DEEP, '{"a":' * 100 + "1" + "}" * 100]
BAD_JSON += ["[" * DEEPEST + "[]" + "]" * DEEPEST, "[" * 10_000, "", "{", "[1,]", "{'a': 1}", '"\x00"', "nul", "1 2"]


@pytest.mark.parametrize("text", BAD_JSON, ids=lambda t: t[:20])
def test_json_beyond_the_limits_is_refused(text, tmp_path):
    with pytest.raises(ValueError):
        parse_json(text)
    for name, where in (("a.json", " line 1" if text.startswith(("{'", "1 ")) else ""), ("a.jsonl", " line 2")):
        (tmp_path / name).write_text(f'"first"\n{text}\n' if name.endswith("l") else text)
        if text or name == "a.json":
            with pytest.raises(UserError, match=f"a file{where}.* JSON.*; mend it"):
                read_json(tmp_path / name, "a file", "mend it")


def test_json_within_the_limits_is_read_and_what_was_not_measured_is_null():
    assert parse_json(b'[1e30, -5, NaN, Infinity, -Infinity, true, null, {"a": []}, "x"]') == [
        1e30,
        -5,
        None,
        None,
        None,
        True,
        None,
        {"a": []},
        "x",
    ]


# A run that was edited, or that a stranger made


HOW = {
    "huge": lambda row: json.dumps(row).replace("{", '{"more": 1e308, ', 1),
    "digits": lambda row: json.dumps(row).replace("{", '{"more": ' + "9" * 5000 + ", ", 1),
    "null": lambda row: "null",
    "a text": lambda row: '"x"',
    "number": lambda row: "3",
    "a list of lists": lambda row: "[[]]",
    "deep": lambda row: DEEP,
    "half": lambda row: json.dumps(row)[: len(json.dumps(row)) // 2],
    "no text": lambda row: "\udcff",
    "names only": lambda row: json.dumps(dict.fromkeys(row)),
    "true for all": lambda row: json.dumps(dict.fromkeys(row, True)),
    "lists for all": lambda row: json.dumps({key: [] for key in row}),
}


def spoil(folder: Path, name: str, how: str) -> None:
    """A file of a run with its object, or the second row of its list, made otherwise."""
    found = files()[name]
    if name.endswith("jsonl"):
        text = "\n".join([json.dumps(found[0]), HOW[how](found[1])])
    elif isinstance(found, list):
        text = f"[{json.dumps(found[0])}, {HOW[how](found[1])}]"
    else:
        text = HOW[how](found)
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))


# Versions in a manifest that are not known are fine.
@pytest.mark.parametrize(
    ("name", "how"), [(n, h) for n in RECORD for h in HOW if (n, h) != ("manifest.json", "names only")]
)
def test_an_edited_file_of_a_run_is_one_sentence_that_names_it(name, how, tmp_path, capsys):
    folder = write_run(tmp_path / "run", files())
    spoil(folder, name, how)
    before = tree(tmp_path)
    said = refused(capsys, report.main, folder, "--transcripts-in-report")
    assert name in said and said.endswith("make the run again\n") and tree(tmp_path) == before


SHAPES = {
    "votes beyond C": ("tokens.json", lambda d: [d[0] | {"part": None, "votes": 10**29}, d[1]]),
    "ragged scores": ("direction.json", lambda d: d | {"scores": d["scores"] | {"ablation_kl": [[1], [1, 2]]}}),
    "a thousand positions": ("direction.json", lambda d: d | {"scores": d["scores"] | {"ablation_kl": [[1]] * 1000}}),
    "a thousand blocks": ("direction.json", lambda d: d | {"scores": d["scores"] | {"ablation_kl": [[1] * 1000]}}),
    "1e5 trials": ("direction.json", lambda d: d | {"trials": d["trials"] * 20_000}),
    "1e5 tokens": ("tokens.json", lambda d: [d[0] | {"id": i} for i in range(100_000)]),
    "1e5 reasons": ("verdict.json", lambda d: d | {"reasons": ["x"] * 100_000}),
    "1e4 saved steps": ("selection.json", lambda d: d | {"scores": d["scores"] * 5000}),
    "1e4 tasks": (
        "before_after.json",
        lambda d: d | {"base": d["base"] | {"capability": {str(i): {"count": 1, "total": 1} for i in range(10_000)}}},
    ),
    "a hundred models": ("before_after.json", lambda d: d | {f"m{i}": d["base"] for i in range(100)}),
    "no student": ("before_after.json", lambda d: {"base": d["base"]}),
    "less than none": (
        "verdict.json",
        lambda d: d | {"flipped": {"count": -3, "total": -5}},
    ),
    "a step that was not saved": ("selection.json", lambda d: d | {"kept": 99}),
}


DRAWN = {
    "tokens.json": "tokens",
    "direction.json": "direction",
    "verdict.json": "verdict",
    "selection.json": "selection",
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_run_of_another_shape_is_one_sentence(case, tmp_path, capsys, monkeypatch):
    name, change = SHAPES[case]
    found, pictures = files(), report._drawings
    monkeypatch.setattr(report, "_drawings", lambda run: [p for p in pictures(run) if p.name == DRAWN.get(name)])
    folder = write_run(tmp_path / "run", found | {name: change(found[name])})
    before = tree(tmp_path)
    assert "is not as align writes it" in refused(capsys, report.main, folder) and tree(tmp_path) == before


@pytest.mark.parametrize("how", HOW)
def test_the_other_commands_read_a_run_as_strictly(how, tmp_path, capsys):
    import hashlib

    run = write_run(tmp_path / "run", files())
    for name in ("adapters.safetensors", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    manifest = files()["manifest.json"] | {"adapters_sha256": hashlib.sha256(b"{}").hexdigest()}
    for name in ("direction.json", "tokens.json", "before_after.json", "transcripts.jsonl", "timing.json"):
        spoil(run, name, how)
    assert "tokens.json" in refused(capsys, tokens.main, run)
    with pytest.raises(UserError, match=r"direction\.json"):
        run_direction(run)
    model = SimpleNamespace()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safesteer_mlx.method.student.with_adapters", lambda *_: model)
        with pytest.raises(UserError, match=r"direction\.json"):
            chat.make_voices(model, tmp_path, 1.0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"tokens\.json"):
        scorecard.safety_tokens(run, SimpleNamespace(tokenizer=None, vocabulary=1))  # type: ignore[arg-type]
    assert recorded(SimpleNamespace(folder=tmp_path), []) is None  # type: ignore[arg-type]
    assert align._last_seconds(tmp_path) is None
    write_run(run, {"manifest.json": manifest, "recipe.yaml": {"model": "tiny-chat"}})
    with pytest.raises(UserError, match=r"before_after\.json"):
        finished_run(tmp_path)
    spoil(run, "manifest.json", "lists for all" if how == "names only" else how)
    for main, argv in ((export.main, ["--to", "mlx"]), (verify.main, ["--against", "x"])):
        assert "manifest.json" in refused(capsys, main, tmp_path, *argv)


STATES = {
    "another hash": lambda e: e | {"sha256": "0" * 64},
    "content no text": lambda e: e | {"content": [1]},
    "no maker": lambda e: {k: v for k, v in e.items() if k != "made_by"},
    "a list": lambda e: [e],
    "null": lambda e: None,
    "huge": lambda e: e | {"more": 10**40},
}
KEPT = {
    "deep": DEEP,
    "huge": '{"openers": {"I": 1e308}}',
    "no object": "[1, 2]",
    "no fields": "{}",
    "other fields": '{"a": 1}',
    "texts for numbers": '{"openers": {"I": "x"}}',
    "a list for an object": '{"openers": []}',
    "null": "null",
    "ragged": '{"scores": {"ablation_kl": [[1], [1, 2]]}}',
    "words for numbers": '{"scores": {"ablation_kl": ["x"]}}',
}


def directions() -> FoundDirections:
    """Of a model of 3 blocks of width 2, whose template has 2 ids behind an instruction."""
    scores = CandidateScores(*(np.zeros((2, 3)) for _ in range(3)))
    return FoundDirections({"I": 1}, scores, [Direction(-1, 2, mx.ones(2))], [[]], [[1, 2]], [[3, 4]])


@pytest.mark.parametrize("case", [*STATES, *(f"kept {name}" for name in KEPT)])
def test_a_state_of_another_shape_is_damaged_and_found_anew(case, tmp_path):
    import hashlib

    store = Store(tmp_path, "this run")
    store.keep("directions", {})
    file = store.states / "directions.json"
    envelope = json.loads(file.read_text())
    if case in STATES:
        file.write_text(json.dumps(STATES[case](envelope)))
    else:  # by one who knows how a state is signed
        body = KEPT[case.removeprefix("kept ")]
        file.write_text(json.dumps(envelope | {"content": body, "sha256": hashlib.sha256(body.encode()).hexdigest()}))
    new = directions()
    assert store.once("directions", lambda: new, FoundDirections) is new
    assert store.damaged == ([] if case == "kept null" else ["directions.json"])


STEPS = {
    "no data": lambda c: {"arrays_sha256": c["arrays_sha256"]},
    "data a list": lambda c: c | {"data": [1]},
    "no log": lambda c: c | {"data": {}},
    "rows for a list": lambda c: c | {"data": c["data"] | {"metrics": {"a": 1}}},
    "numbers for rows": lambda c: c | {"data": c["data"] | {"metrics": [1, 2]}},
    "texts for seconds": lambda c: c | {"data": c["data"] | {"seconds": ["x"]}},
    "more": lambda c: c | {"data": c["data"] | {"more": 1}},
    "no hash": lambda c: c | {"arrays_sha256": None},
    "a list": lambda c: [c],
    "a number": lambda c: 3,
}


@pytest.mark.parametrize("case", [*STEPS, "weights of another shape", "weights missing"])
def test_a_step_of_another_shape_is_damaged_and_the_one_before_it_is_used(case, tmp_path):
    store = Store(tmp_path, "this run")
    needed = {"student.w": mx.zeros(3)}
    for step in (1, 2):
        name = "student.v" if step == 2 and case == "weights missing" else "student.w"
        width = 4 if step == 2 and case == "weights of another shape" else 3
        store.save(step, {name: mx.zeros(width)}, {"metrics": [], "seconds": [], "scored": []})
    if case in STEPS:
        store.keep("step-000002", STEPS[case](store.found("step-000002")))
    saved = store.latest(TrainingLog, needed)
    assert saved is not None and saved.step == 1 and saved.data == TrainingLog([], [], [])
    assert store.damaged == ["step-000002.safetensors"]


# Ids of a state: beyond the embedding MLX would read other memory

KNOWN = {
    "token": range(1856),
    "block": range(3),
    "position": range(-2, 0),
    "opening": range(1, 100),
    "candidates": {(2, 3)},
    "stream": {(2,)},
    "prompt": {(1, 2), (3, 4)},
}
OUTCOMES = {"harmful": [], "harmless": [], "broken_harmful": [], "broken_harmless": []}
WHERE: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "openers": (FoundDirections, lambda i: encoded(directions()) | {"openers": {"I": i}}),
    "prompts": (FoundDirections, lambda i: encoded(directions()) | {"harmless": [[3, i]]}),
    "prompts of training": (FoundDirections, lambda i: encoded(directions()) | {"harmful_train": [[i, 2]]}),
    "tokens": (
        SafetyTokens,
        lambda i: {"rows": [files()["tokens.json"][0] | {"id": i}], "explained": 1, "openings": [], "nats": 1},
    ),
    "own openings": (OwnOpenings, lambda i: {"ids": {"a": [5, i]}}),
    "rollouts": (Rollouts, lambda i: {"step": 1, "completions": [{"ids": [i], "finished": True, "cut": False}]}),
}
IDS = {
    **{str(i): i for i in (1856, 2_000_000_000, 2**31, 2**70, -1, -1_000_000_000, 1.5, 1e9, 5.0)},
    **{"null": None, "true": True, "a text": "5", "a list": [5], "an object": {"id": 5}, "a million": [5] * 10**6},
}


def states(of: Path, name: str, content: Any) -> Store:
    """A store in which somebody who knows how a state is signed has put this."""
    store = Store(of, "this run", KNOWN)
    store.keep(name, content)
    return store


@pytest.mark.parametrize("where", WHERE)
def test_a_state_with_ids_that_the_model_has_is_read(where, tmp_path):
    kind, forged = WHERE[where]
    good = states(tmp_path, "state", forged(4 if "prompts" not in where else {"prompts": 4}.get(where, 1)))
    assert isinstance(good.found_as("state", kind), kind)


@pytest.fixture
def forged_state(where, ids, tmp_path):
    """A fixture, since what a case takes is measured: that is reading a state, not writing a million ids for it."""
    return states(tmp_path, "state", WHERE[where][1](IDS[ids]))


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("where", WHERE)
def test_a_state_with_ids_that_the_model_does_not_have_is_damaged(where, ids, forged_state):
    assert forged_state.found_as("state", WHERE[where][0]) is None and forged_state.damaged == ["state.json"]


FORGED: dict[str, tuple[type, Callable[[], Any]]] = {
    "a block that is not there": (Direction, lambda: {"position": -1, "layer": 3, "vector": [1, 1]}),
    "a block from behind": (Direction, lambda: {"position": -1, "layer": -1, "vector": [1, 1]}),
    "a position that is not there": (Direction, lambda: {"position": -3, "layer": 1, "vector": [1, 1]}),
    "a vector of another model": (Direction, lambda: {"position": -1, "layer": 1, "vector": [1, 1, 1]}),
    "a block that is null": (Direction, lambda: {"position": -1, "layer": None, "vector": [1, 1]}),
    "a prompt of nobody": (FoundDirections, lambda: encoded(directions()) | {"harmful": [[2, 1]]}),
    "no prompt": (FoundDirections, lambda: encoded(directions()) | {"harmless": []}),
    "no direction": (FoundDirections, lambda: encoded(directions()) | {"shortlist": [], "failed": []}),
    "a direction without its tests": (FoundDirections, lambda: encoded(directions()) | {"failed": []}),
    "no scores": (FoundDirections, lambda: encoded(directions()) | {"scores": None}),
    "scores of other blocks": (
        FoundDirections,
        lambda: encoded(directions()) | {"scores": {name: [[1, 2]] for name in vars(directions().scores)}},
    ),
    "answers not judged": (Outcomes, lambda: OUTCOMES | {"harmful": ["refuse"]}),
    "an opening of nothing": (
        ChosenTeacher,
        lambda: {
            "direction": encoded(directions().shortlist[0]),
            **{"coeff": 1, "trials": [], "base": OUTCOMES, "teacher": OUTCOMES, "opening": 0},
        },
    ),
    "no safety token": (SafetyTokens, lambda: {"rows": [], "explained": 1, "openings": [], "nats": 1}),
    "a long opening": (OwnOpenings, lambda: {"ids": {"a": [5] * 21}}),
    "no ids": (Rollouts, lambda: {"step": 1, "completions": [{"ids": None, "finished": True, "cut": False}]}),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_state_that_indexes_what_is_not_there_is_damaged(case, tmp_path):
    kind, forged = FORGED[case]
    store = states(tmp_path, "a", forged())
    assert store.found_as("a", kind) is None and store.damaged == ["a.json"]


ARRAYS = {
    "2e9": mx.array([2_000_000_000]),
    "-1e9": mx.array([5, -1_000_000_000]),
    "-1": mx.array([-1]),
    "the first beyond": mx.array([1856]),
    "64 bits": mx.array([2**62], mx.int64),
    "unsigned": mx.array([2**32 - 1], mx.uint32),
    "a row of rows": mx.array([[5, 2_000_000_000]]),
    "weights as whole numbers": None,
    "the best weights of another shape": None,
    "moments of another shape": None,
    "a step that is a row": None,
}


@pytest.mark.parametrize("case", ARRAYS)
def test_a_step_with_other_tokens_or_arrays_is_damaged(case, tmp_path):
    store, w = Store(tmp_path, "this run", KNOWN), mx.zeros(3)
    good = {"student.w": w, "optimizer.w.m": w, "optimizer.step": mx.array(1, mx.uint64), "best.w": w}
    changed = {
        "weights as whole numbers": {"student.w": mx.zeros(3, mx.int32)},
        "the best weights of another shape": {"best.w": mx.zeros(4)},
        "moments of another shape": {"optimizer.w.m": mx.zeros((1, 3))},
        "a step that is a row": {"optimizer.step": mx.array([1], mx.uint64)},
    }.get(case, {"teacher.tokens": ARRAYS[case]})
    needed = {name: array for name, array in good.items() if name != "best.w"}
    log = {"metrics": [], "seconds": [], "scored": []}
    store.save(1, good | {"teacher.tokens": mx.array([0, 1855])}, log)
    store.save(2, good | changed, log)
    saved = store.latest(TrainingLog, needed, {"best.w": w})
    assert saved is not None and saved.step == 1 and store.damaged == ["step-000002.safetensors"]


@pytest.mark.parametrize("i", IDS)
def test_kept_answers_with_ids_that_the_model_does_not_have_are_drawn_again(i, tmp_path):
    base = SimpleNamespace(weights_hash="a", settings_hash="b", vocabulary=1856)
    sampling = Sampling([1], 4)
    answers = BaseAnswers(base, sampling, None)  # type: ignore[arg-type]
    for ids, kept in (([5, 1855], True), ([5, IDS[i]], False), ([5] * 5, False), (5, False)):
        found = {"a": {"ids": ids, "finished": True, "cut": False}}
        (tmp_path / "a.json").write_text(json.dumps({"made_by": answers._made_by, "answers": found}))
        assert bool(BaseAnswers(base, sampling, tmp_path / "a.json")._found) == kept  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["another step", "one too few", "one too long"])
def test_rollouts_that_do_not_fit_the_step_are_drawn_again(how):
    c = Completion([5, 6], False)
    assert Rollouts(3, [c, c]).fits(3, 2, 2)
    assert not Rollouts(3, [c, c]).fits(*{"another step": (4, 2, 2), "one too few": (3, 3, 2)}.get(how, (3, 2, 1)))


# Numbers

EVALUATE, CHAT = (evaluate.main, []), (chat.main, [])
VERIFY, EXPORT = (verify.main, ["run", "--against", "x"]), (export.main, ["run", "--to", "mlx"])
ALIGN = (align.main, ["--adapter-path", "new"])
NUMBERS = [
    *((EVALUATE, f"--seed {n}") for n in (2**32, 2**64, "1e30", "-1", "9" * 5000, "²")),
    *((CHAT, f"--seed {n}") for n in (2**32, 2**64, "1e30", "-1", "9" * 5000)),
    *((EVALUATE, f"{flag} 99999999999") for flag in ("--max-tokens", "--batch-size", "--test-prompts", "--samples")),
    *((CHAT, f"{flag} 1e308") for flag in ("--max-tokens", "--temp", "--steer", "--top-p")),
    *((CHAT, f"{flag} nan") for flag in ("--max-tokens", "--temp", "--steer", "--top-p")),
    *((VERIFY, f"--test-prompts {n}") for n in (10**18, "9" * 5000, "1e3")),
    *((EXPORT, f"--verify {n}") for n in (10**18, "9" * 5000, "0")),
    *((ALIGN, f"{flag} 1e308") for flag in ("--epochs", "--learning-rate", "--temp", "--weight-decay", "--coeff")),
    *((ALIGN, f"{flag} {10**18}") for flag in ("--iters", "--max-tokens", "--batch-size", "--test-prompts")),
    *((ALIGN, f"{flag} {10**18}") for flag in ("--num-generations", "--token-samples", "--horizon", "--tail")),
    *((ALIGN, f"{flag} {10**18}") for flag in ("--safety-tokens", "--inner-top-k", "--top-k", "--direction-train")),
    *((ALIGN, f"{flag} {10**18}") for flag in ("--save-every", "--skip-first", "--first-tokens", "--guidance")),
]


@pytest.mark.parametrize(("command", "flags"), NUMBERS, ids=lambda v: v[:40] if isinstance(v, str) else v[0].__module__)
def test_a_number_beyond_its_range_is_told_and_nothing_is_written(command, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main, argv = command
    said = refused(capsys, main, *argv, *flags.split())
    assert flags.split()[0].strip("-").replace("-", "_") in said.replace("-", "_") and not list(tmp_path.iterdir())


# Paths

TILDE = "~no-such-user-here/x"
LOST = {
    "data": (align.main, ["--data", TILDE]),
    "adapters to write": (align.main, ["--iters", "0", "--adapter-path", TILDE]),
    "a run to go on with": (align.main, ["--resume", TILDE]),
    "settings": (align.main, ["-c", TILDE]),
    "adapters to begin from": (align.main, ["--resume-adapter-file", TILDE]),
    "model": (align.main, [TILDE]),
    "evaluate's model": (evaluate.main, [TILDE]),
    "evaluate's adapters": (evaluate.main, ["--adapter-path", TILDE]),
    "suite": (evaluate.main, ["--suite", f"AdvBench={TILDE}"]),
    "phrases": (evaluate.main, ["--refusal-phrases", TILDE]),
    "data of evaluate": (evaluate.main, ["--data", TILDE]),
    "template": (evaluate.main, ["--judge", "a", "b", "--model", "tiny-chat", "--judge-template", TILDE, TILDE]),
    "chat's adapters": (chat.main, ["--adapter-path", TILDE]),
    "report": (report.main, [TILDE]),
    "tokens": (tokens.main, [TILDE]),
    "compare": (compare.main, [TILDE, "run"]),
    "verify": (verify.main, [TILDE, "--against", "x"]),
    "export": (export.main, [TILDE, "--to", "mlx"]),
}


@pytest.mark.parametrize("case", LOST)
@pytest.mark.parametrize("path", [TILDE, "loop", "loop/x", "n" * 300, "\udcff.json", "a\x1b[2Jb"], ids=ascii)
def test_a_path_that_leads_nowhere_is_one_sentence(case, path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "loop").symlink_to("loop")
    main, argv = LOST[case]
    before = tree(tmp_path)
    refused(capsys, main, *(word.replace(TILDE, path) for word in argv))
    assert tree(tmp_path) == before


HOME = {
    "adapters to write": (align.main, ["--adapter-path", "~/new", "--model", "./nowhere"], "model folder ./nowhere"),
    "a run to go on with": (align.main, ["--resume", "~/run"], "holds no run"),
    "settings": (align.main, ["-c", "~/a.yaml"], "unknown key 'sed'"),
    "a run to report on": (report.main, ["~/empty"], "holds no"),
    "a run's tokens": (tokens.main, ["~/run", "--veto", " plain", "--out", "~/safe.json"], "exists already"),
    "scores": (evaluate.main, ["--out", "~/empty"], "is a folder"),
    "a text": (evaluate.main, ["--perplexity", "~/empty"], "it is a folder"),
    "counts": (verify.main, ["~/run", "--against", "x", "--out", "~/empty"], "is a folder"),
    "adapters to talk to": (chat.main, ["--adapter-path", "~/run"], "holds no adapter_config.json"),
    "a run to export": (export.main, ["~/empty", "--to", "mlx"], "holds no run of align"),
}


@pytest.mark.parametrize("case", HOME)
def test_a_tilde_is_the_home_wherever_a_path_is_given(case, tmp_path, capsys, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    write_run(home / "run", files())
    (home / "empty").mkdir()
    here.mkdir()
    (home / "a.yaml").write_text("sed: 1\n")
    (home / "safe.json").touch()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    main, argv, expected = HOME[case]
    said = refused(capsys, main, *argv)
    assert expected in said and not list(here.iterdir())
    assert "home" in said or "model folder" in said


def test_the_adapters_are_written_where_the_tilde_leads(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve({}, {"adapter_path": "~/new"})[0].run.adapter_path == str(tmp_path / "new")
    with pytest.raises(UserError, match=r"~no-such-user-here/x: no home folder is known for its ~"):
        resolve({}, {"adapter_path": TILDE})


def test_without_a_home_a_tilde_is_one_sentence(monkeypatch):
    import pwd

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: (_ for _ in ()).throw(KeyError("nobody")))
    with pytest.raises(UserError, match="no home folder is known for its ~; write the whole path"):
        read_rows(Path("~/tokens.json"))


# What is refused leaves nothing

LEFT = {
    "report.html a folder": (report.main, ["run"], lambda f: (f / "run" / "report.html").mkdir()),
    "figures a file": (report.main, ["run"], lambda f: (f / "run" / "figures").touch()),
    "scores a folder": (evaluate.main, ["--out", "d"], lambda f: (f / "d").mkdir()),
    "scores nowhere": (evaluate.main, ["--out", "d/e/x.json"], lambda f: None),
    "scores in a file": (evaluate.main, ["--out", "d/x.json"], lambda f: (f / "d").touch()),
    "a page a folder": (compare.main, ["run", "run", "--out", "d"], lambda f: (f / "d").mkdir()),
    "a page nowhere": (compare.main, ["run", "run", "--out", "d/x.html"], lambda f: None),
    "a page of one run": (compare.main, ["run", "--out", "x.html"], lambda f: None),
    "a page of no run": (compare.main, ["run", ".", "--out", "x.html"], lambda f: (f / "run").rename(f / "other")),
    "counts a folder": (verify.main, ["run", "--against", "x", "--out", "d"], lambda f: (f / "d").mkdir()),
    "counts nowhere": (verify.main, ["run", "--against", "x", "--out", "d/x.json"], lambda f: None),
    "tokens a folder": (tokens.main, ["run", "--veto", " plain", "--out", "d"], lambda f: (f / "d").mkdir()),
    "tokens nowhere": (tokens.main, ["run", "--veto", " plain", "--out", "d/x.json"], lambda f: None),
    "tokens in a circle": (
        tokens.main,
        ["run", "--veto", " plain", "--out", "loop"],
        lambda f: (f / "loop").symlink_to("loop"),
    ),
    "steps without end": (align.main, ["--adapter-path", "new", "--iters", "99999999"], lambda f: None),
    "adapters in a circle": (align.main, ["--adapter-path", "loop"], lambda f: (f / "loop").symlink_to("loop")),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_written_is_told_before_the_work_and_leaves_nothing(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", files())
    main, argv, prepare = LEFT[case]
    prepare(tmp_path)
    before = tree(tmp_path)
    refused(capsys, main, *argv)
    assert tree(tmp_path) == before


SAVE = pytest.mark.parametrize(
    "save", [lambda p: write(p, b"new"), lambda p: write_out(p, "new")], ids=["write", "write_out"]
)


@SAVE
@pytest.mark.parametrize("there", ["link", "half a file"])
def test_what_stands_where_a_file_is_written_first_is_not_written_through(save, there, tmp_path):
    """In a folder that others write too; a process that was killed may have left one."""
    (tmp_path / "precious").write_text("mine")
    part = tmp_path / ".file.part"
    part.symlink_to(tmp_path / "precious") if there == "link" else part.write_text("half of it")
    save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "new" and not (tmp_path / "file").is_symlink()
    assert (tmp_path / "precious").read_text() == "mine" and not part.exists()


@SAVE
def test_a_write_that_fails_leaves_what_was_there_and_no_part(save, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write(tmp_path / "folder", b"new")
    (tmp_path / "file").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError):
        save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old" and {p.name for p in tmp_path.iterdir()} == {"file", "folder"}


def test_weights_that_the_disk_does_not_take_leave_no_part(tmp_path, monkeypatch):
    def full(path, _):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[write] Unable to write 3554 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(OSError, match="Unable to write"):
        save_arrays(tmp_path / "adapters.safetensors", {})
    assert not list(tmp_path.iterdir())


# Lines without end


@pytest.mark.parametrize(
    ("typed", "heard", "left_out"),
    [
        ("hi\n", ["hi"], 0),
        ("hi", ["hi"], 0),
        ("", [], 0),
        ("\n\n \n", [], 0),
        ("hi\n/quit\nno\n", ["hi"], 0),
        ("a" * 10**6, [], 1),
        ("a" * 10**6 + "\nhi\n", ["hi"], 1),
        ("hi\n" + "a" * 10**6 + "\nho\n", ["hi", "ho"], 1),
        ("a" * 10**5, ["a" * 10**5], 0),
        ("a" * (10**5 + 1) + "\n" + "b" * 10**7, [], 2),
        ("\0" * 10**6 + "\nhi", ["hi"], 1),
    ],
    ids=range(11),
)
def test_a_line_without_end_is_left_out_and_said(typed, heard, left_out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert list(chat._messages(interactive=False)) == heard
    assert capsys.readouterr().out.count("a line of more than 100,000 characters is left out") == left_out


@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({}, 32_768),
        ({"max_position_embeddings": 512}, 4096),
        ({"max_position_embeddings": 8192}, 8192),
        ({"max_position_embeddings": 131_072}, 32_768),
        ({"text_config": {"max_position_embeddings": 8192}}, 8192),
        ({"max_position_embeddings": "many"}, 32_768),
        ({"model_type": "gptj", "n_positions": 8192}, 8192),  # rotary
        ({"n_ctx": 512}, 4096),
        ({"model_type": "gpt2", "n_positions": 1024, "n_ctx": 9000, "max_position_embeddings": 9000}, 1024),
        ({"model_type": "gpt_bigcode", "n_positions": 131_072}, 32_768),
    ],
)
def test_prompts_longer_than_a_model_reads_are_left_out_and_said(config, most, capsys):
    base = SimpleNamespace(
        config=config,
        tokenizer=SimpleNamespace(chat_template="", apply_chat_template=lambda turns, **_: turns[0]["content"].split()),
    )
    assert most_read(base.config) == most
    items = [Instruction("a " * n) for n in (1, most, most + 1, 3 * most)]
    asked = heldout.TestSet({"AdvBench": items, "other": items[:1]}, [])
    scorecard.leave_out_long(asked, base, Screen())  # type: ignore[arg-type]
    assert asked.kinds == {"AdvBench": items[:2], "other": items[:1]}
    assert f"AdvBench: 2 prompts are longer than {most:,} tokens and are left out" in capsys.readouterr().out
    asked = heldout.TestSet({"AdvBench": items[2:]}, [])
    with pytest.raises(UserError, match=f"every prompt of AdvBench is longer than the {most:,} tokens"):
        scorecard.leave_out_long(asked, base, Screen())  # type: ignore[arg-type]
