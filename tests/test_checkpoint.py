"""Nothing is lost: a run that was stopped goes on to the same bytes, and what is damaged is told and not used."""

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from runs import MICRO, few_sets

import safesteer_mlx as safesteer
import safesteer_mlx.align as align
import safesteer_mlx.method.train as stage
from safesteer_mlx.align import main
from safesteer_mlx.formats.card import shown_base
from safesteer_mlx.method import direction, own_answers
from safesteer_mlx.method import run as runs
from safesteer_mlx.method.learning import Learning
from safesteer_mlx.recipe import read_yaml
from safesteer_mlx.system import store as stores
from safesteer_mlx.system.finished import finished_run, load_base
from safesteer_mlx.system.memory import PagingError
from safesteer_mlx.system.screen import UserError
from safesteer_mlx.system.store import RunFolder, Store, fingerprint

SHORT = [MICRO, "--iters", "4", "--save-every", "2", "--test-prompts", "2", "--direction-train", "32", "--no-report"]
SHORT += ["--direction-validation", "16", "--token-samples", "1", "--batch-size", "8", "--max-tokens", "24"]
# For runs in a process of their own, with `few_sets`.
SHORTEST = [MICRO, "--iters", "2", "--token-samples", "1", "--coeff", "0.85", "--horizon", "2", "--batch-size", "4"]
SHORTEST += ["--save-every", "1"]
pytestmark = pytest.mark.usefixtures("few_prompts")
COMPARED = ["adapters.safetensors", "adapter_config.json"]
COMPARED += [f"run/{name}" for name in ("direction.json", "tokens.json", "metrics.jsonl", "before_after.json")]
VARIANTS = {
    "default": [],
    "moving teacher, dropout": [
        *("--teacher", "ema", "--ema-rate", "0.3", "--refresh-every", "2"),
        *("--lora-parameters", "{rank: 4, dropout: 0.2}", "--select-checkpoint", "over_refusal<=0.9"),
    ],
}


def stop_after(monkeypatch, events, why: Callable[[], BaseException] = KeyboardInterrupt):
    """Let training be interrupted after so many of its events: rollouts, metrics, rollouts, …"""
    whole = stage.train

    def stops(*args, **kwargs):
        for n, event in enumerate(whole(*args, **kwargs), 1):
            yield event
            if n == events:
                raise why()

    monkeypatch.setattr(stage, "train", stops)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory, few_prompts):
    """The flags of a run, and the folder of one that was left alone."""
    flags = [*SHORT, *VARIANTS[request.param]]
    folder = tmp_path_factory.mktemp("whole") / "adapters"
    assert main(["--adapter-path", str(folder), *flags]) == 0
    return flags, folder


@pytest.mark.parametrize("events", [3, 4, 5])
def test_a_run_that_goes_on_ends_in_the_same_bytes(variant, events, tmp_path, monkeypatch, capsys):
    flags, whole = variant
    folder = tmp_path / "adapters"
    command = ["--adapter-path", str(folder), *flags]
    stop_after(monkeypatch, events)  # with rollouts drawn; after step 2; with those of step 3 drawn
    assert main(command) == 130
    monkeypatch.undo()
    done = events // 2
    said = "".join(capsys.readouterr().out.split())
    assert f"interruptedafter{done}of4steps;theadapterssofararein{folder};thesamecommandwith--yesgoeson" in said
    assert (folder / "adapters.safetensors").stat().st_size > 0
    drawn = []
    kept = stage.generate
    monkeypatch.setattr(stage, "generate", lambda *a, **k: (drawn.append(1), kept(*a, **k))[1])
    assert main(["--resume", str(folder)] if events == 4 else [*command, "--yes"]) == 0
    assert f"going on after step {done} of 4" in capsys.readouterr().out
    assert len(drawn) == 4 - (events + 1) // 2  # rollouts that were drawn before are not drawn again
    for name in COMPARED:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (folder / "run" / "checkpoint").exists()


def test_ids_that_were_forged_into_a_state_are_found_anew(variant, tmp_path, monkeypatch, capsys):
    """By somebody who knows how a state is signed; MLX would read whatever is in memory there."""
    flags, whole = variant
    folder = tmp_path / "adapters"
    stop_after(monkeypatch, 5)
    assert main(["--adapter-path", str(folder), *flags]) == 130
    monkeypatch.undo()
    states = folder / "run" / "checkpoint"
    store = Store(folder, json.loads((states / "tokens.json").read_text())["made_by"])
    tokens, drawn = store.found("tokens"), store.found("rollouts")
    tokens["rows"][0]["id"] = 2_000_000_000
    drawn["completions"][0]["ids"][0] = -1_000_000_000
    store.keep("tokens", tokens)
    store.keep("rollouts", drawn)
    saved = store.latest()
    assert saved is not None and saved.step == 2
    expected = ["tokens.json", "rollouts.json"]
    if "teacher.tokens" in saved.arrays:
        store.save(2, saved.arrays | {"teacher.tokens": mx.array([2_000_000_000])}, saved.data)
        expected.append("step-000002.safetensors")
    del store  # and its lock
    capsys.readouterr()
    assert main(["--resume", str(folder)]) == 0
    said = "".join(capsys.readouterr().out.split())
    assert all(f"{name}isdamaged" in said for name in expected), said
    for name in COMPARED:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


# A run that kills itself once it has trained a step and drawn for the next.
KILLED = """
import os, signal, sys
from safesteer_mlx.align import main
from safesteer_mlx.method import train as stage
whole = stage.train
def dies(*given):
    for n, event in enumerate(whole(*given), 1):
        yield event
        if n == 3:
            os.kill(os.getpid(), signal.SIGKILL)
stage.train = dies
main(sys.argv[1:])
"""


def test_of_a_run_that_was_killed_no_answers_are_left_where_none_were_to_be(tmp_path):
    run = tmp_path / "adapters" / "run"
    (run / "checkpoint").mkdir(parents=True)
    (run / "base_answers.json").write_text("{}")  # an earlier run's
    flags = [*SHORTEST, "--data", str(few_sets(tmp_path) / "few"), "--prefill-ratio", "0.5"]
    command = [sys.executable, "-c", KILLED, "--adapter-path", str(run.parent), *flags]
    done = subprocess.run([*command, "--no-transcripts"], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {p.name for p in run.rglob("*") if p.is_file()}
    assert {"step-000001.json", "teacher.json"} <= left
    assert not left & {"base_answers.json", "rollouts.json", "own_openings.json", "transcripts.jsonl"}


def test_thoughts_are_kept_as_little_as_answers_where_none_are_to_be(tmp_path, monkeypatch):
    base, folder = safesteer.load(MICRO), tmp_path / "adapters"
    tokenizer = copy.copy(base.tokenizer)
    vars(tokenizer)["rfind_think_end"] = lambda ids: 1  # its first two tokens pass for a thought
    thinking = replace(base, thinks=True, tokenizer=tokenizer)
    settings = {"direction_train": 32, "direction_validation": 16, "max_tokens": 32, "report": False}
    states = folder / "run" / "checkpoint"
    safesteer.align(thinking, folder, check=True, force=True, **settings)
    kept = json.loads(json.loads((states / "directions.json").read_text())["content"])
    assert len(kept["thoughts"]["undecided"][0]) == 32
    safesteer.align(thinking, folder, check=True, force=True, transcripts=False, **settings)
    assert [p.name for p in states.iterdir()] == ["teacher.json"]
    safesteer.align(base, folder, check=True, force=True, transcripts=False, **settings)  # has none
    assert sorted(p.name for p in states.iterdir()) == ["directions.json", "teacher.json"]
    # Nor how the answers begin of a model that begins all alike, nor with what it refuses. They are runs that no other
    # prepared.
    opened = direction.find_openers
    alike = replace(own_answers.NONE, length=3, undecided=[[[5, 6, 7]] * 32, [[5, 6]] * 32], turns_at=1, alike=True)
    for n, which in ((24, {"openers": {}, "thoughts": alike}), (20, {"refusals": ["Mi ne volas."]})):
        settings |= {"direction_train": n}
        monkeypatch.setattr(direction, "find_openers", lambda run, which=which: replace(opened(run), **which))
        for transcripts in (True, False):
            its = tmp_path / next(iter(which))
            safesteer.align(base, its, check=True, force=True, transcripts=transcripts, **settings)
            assert (its / "run" / "checkpoint" / "directions.json").exists() is transcripts


# A run that gets a signal while it scores the step that it has saved.
SIGNALLED = """
import os, signal, sys, time
from safesteer_mlx.align import main
from safesteer_mlx.evals.selection import SavedSteps
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell lets tests in the background ignore
def score(self, step):
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(60)
SavedSteps.score = score
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_checkpoint_is_scored_is_one_line_and_the_run_goes_on(number, tmp_path, capsys):
    folder = tmp_path / "adapters"
    flags = [*SHORTEST, "--data", str(few_sets(tmp_path) / "few"), "--test-prompts", "1"]
    flags += ["--adapter-path", str(folder), "--select-checkpoint", "drift<=9", "--no-report"]
    command = [sys.executable, "-c", SIGNALLED, str(int(number)), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (128 + number, "safesteer-mlx: interrupted\n")
    assert "interrupted after 1 of 2 steps" in done.stdout and (folder / "adapters.safetensors").is_file()
    assert main(["--resume", str(folder)]) == 0
    assert "going on after step 1 of 2" in capsys.readouterr().out
    scores = json.loads((folder / "run" / "selection.json").read_text())["scores"]
    assert [row["step"] for row in scores] == [1, 2]


def test_a_run_that_stops_for_want_of_memory_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    command = ["--adapter-path", str(tmp_path / "adapters"), *SHORT]
    stop_after(monkeypatch, 3, lambda: PagingError("training used 9.9 GB, the same command with --yes goes on"))
    assert main(command) == 2
    assert "training used 9.9 GB" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*command, "--yes", "--iters", "4"]) == 0
    assert "going on after step 1 of 4" in capsys.readouterr().out


def test_what_is_kept_for_want_of_memory_in_the_midst_of_a_step_is_of_one_step(tmp_path, monkeypatch):
    """A student is trained, then measured: adapters and state are those of the last step that was counted."""
    measure, times = Learning.measure, []

    def fails(*args):
        if times.append(1) or len(times) == 3:
            raise PagingError("measuring used 9.9 GB, the same command with --yes goes on")
        return measure(*args)

    monkeypatch.setattr(Learning, "measure", fails)
    monkeypatch.setattr(stage, "MEASURED_EVERY", 1)
    folder = tmp_path / "adapters"
    assert main(["--adapter-path", str(folder), *SHORT]) == 2 and len(times) == 3
    state = mx.load(str(folder / "run" / "checkpoint" / "step-000002.safetensors"))
    adapters = mx.load(str(folder / "adapters.safetensors"))
    assert isinstance(state, dict) and isinstance(adapters, dict)
    assert all(mx.array_equal(adapters[name], state[f"student.{name}"]) for name in adapters)


@pytest.fixture
def short_by_default():
    """What is left to the model, how long answers may be, is as short as other tests ask for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_answers, "ROOMS", (24,))
        yield


@pytest.mark.usefixtures("short_by_default")
def test_an_unfinished_run_is_neither_overwritten_nor_gone_on_with_unasked(tmp_path, monkeypatch, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text("max_tokens:\n")  # left to the model, whose recipe says otherwise
    command = ["--adapter-path", str(tmp_path / "adapters"), *SHORT[: SHORT.index("--max-tokens")], "-c", str(settings)]
    stop_after(monkeypatch, 2)
    assert main(command) == 130
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    before = {p: p.read_bytes() for p in (tmp_path / "adapters").rglob("*") if p.is_file()}
    for flags, said in (
        ([], "unfinished; add --yes to go on"),
        (["--yes", "--learning-rate", "3e-4"], "other settings: learning_rate (0.0005, now 0.0003)"),
        (["--resume", str(tmp_path / "adapters"), "--seed", "1"], "other settings: seed (42, now 1)"),
        (["--resume", str(tmp_path / "nowhere")], "holds no run"),
    ):
        assert main([*command, *flags] if "--resume" not in flags else flags) == 2
        assert said in capsys.readouterr().err
        assert before == {p: p.read_bytes() for p in (tmp_path / "adapters").rglob("*") if p.is_file()}
    edited = tmp_path / "adapters" / "run" / "recipe.yaml"
    for wrong in ("-3", "true"):
        edited.write_text(before[edited].decode().replace("max_tokens: 24", f"max_tokens: {wrong}"))
        assert main([*command, "--yes"]) == 2
        assert "other settings: max_tokens" in capsys.readouterr().err
    edited.write_bytes(before[edited])
    # What changes no result may change: here, how often the state is kept.
    assert main([*command, "--yes", "--save-every", "1"]) == 0


def test_a_stopped_run_whose_files_or_versions_are_others_is_named_and_left_alone(tmp_path, monkeypatch, capsys):
    folder, data, phrases = tmp_path / "adapters", few_sets(tmp_path) / "few", tmp_path / "phrases.txt"
    phrases.write_text("that is not for me\n")
    command = ["--adapter-path", str(folder), *SHORTEST, "--data", str(data), "--refusal-phrases", str(phrases)]
    command += ["--no-report", "--force"]
    stop_after(monkeypatch, 3)
    assert main(command) == 130
    monkeypatch.undo()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def refused(flags, what):
        capsys.readouterr()
        assert main(flags) == 2
        said = capsys.readouterr().err
        assert f"{folder} holds an unfinished run with other {what}; give them as they were" in said, said
        assert said.count("\n") == 1 and before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    phrases.write_text("that is not for us\n")
    refused(["--resume", str(folder)], "refusal phrases")
    edited = data / "harmless_train.jsonl"
    text = edited.read_text()
    edited.write_text(text[: text.rstrip().rindex("\n") + 1])
    refused([*command, "--yes"], "prompts and other refusal phrases")
    edited.write_text(text)
    phrases.write_text("that is not for me\n")
    monkeypatch.setattr(runs, "version", lambda name: "0.0.1")
    refused(["--resume", str(folder)], "versions")
    monkeypatch.undo()
    assert main(["--resume", str(folder), "--force"]) == 0
    assert "going on after step 1 of 2" in capsys.readouterr().out


def test_a_model_s_folder_is_recorded_with_its_whole_path(tmp_path, monkeypatch, capsys):
    """From elsewhere `models/mine` is another folder, or some stranger's on the Hub."""
    data, elsewhere = few_sets(tmp_path) / "few", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(MICRO, tmp_path / "models" / "mine", ignore=shutil.ignore_patterns("data"))
    whole = str(tmp_path / "models" / "mine")

    def stopped(name) -> Path:
        """A run that stopped after its first step."""
        folder = tmp_path / name
        with monkeypatch.context() as patch:
            stop_after(patch, 3)
            command = ["models/mine", "--adapter-path", str(folder), *SHORTEST[1:], "--data", str(data), "--no-report"]
            assert main([*command, "--force", "--offline"]) == 130
        return folder

    monkeypatch.chdir(tmp_path)
    folder = stopped("new")
    with monkeypatch.context() as patch:
        patch.setattr(align, "_as_begun", lambda recipe: recipe)
        older = stopped("older")
    assert read_yaml(older / "run" / "recipe.yaml")["model"] == "models/mine"
    capsys.readouterr()
    assert main(["--resume", str(older), "--force"]) == 0  # its states know the model by that name
    assert "going on after step 1 of 2" in capsys.readouterr().out

    monkeypatch.chdir(elsewhere)
    assert main(["--resume", str(folder), "--force"]) == 0
    assert "going on after step 1 of 2" in capsys.readouterr().out
    for name in ("adapter_config.json", "run/manifest.json", "run/recipe.yaml"):  # JSON is YAML
        assert read_yaml(folder / name)["model"] == whole, name
    run = finished_run(folder)
    assert load_base(run).path == Path(whole) and shown_base(run) == ("mine", False)

    monkeypatch.chdir(tmp_path)  # where an older run is what it was
    run = finished_run(older)
    assert run.manifest["model"] == "models/mine" and load_base(run) and shown_base(run) == ("mine", False)


QUICK = {"iters": 2, "save_every": 1, "test_prompts": 2, "direction_train": 32, "direction_validation": 16}
QUICK |= {"token_samples": 1, "batch_size": 4, "max_tokens": 24, "report": False}


def test_the_library_too_replaces_a_finished_run_and_goes_on_with_a_stopped_one(tmp_path, monkeypatch, capsys):
    base, folder = safesteer.load(MICRO), tmp_path / "adapters"
    safesteer.align(base, folder, force=True, **QUICK)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert folder / "run" / "manifest.json" in before
    checked = safesteer.align(base, folder, check=True, **QUICK, seed=2)
    assert checked.folder == folder and not checked.scores
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        safesteer.align(base, folder, force=True, **QUICK, learning_rate=1e-3)
    monkeypatch.undo()
    record = {p.name for p in (folder / "run").iterdir()}
    assert "checkpoint" in record and not record & {"manifest.json", "before_after.json", "transcripts.jsonl"}
    with pytest.raises(UserError, match=r"other settings: seed \(42, now 1\)"):
        safesteer.align(base, folder, **QUICK, learning_rate=1e-3, seed=1)
    capsys.readouterr()
    assert main(["--resume", str(folder), "--force"]) == 0
    assert "going on after step 1 of 2" in capsys.readouterr().out


def test_a_run_that_was_stopped_before_its_last_file_is_gone_on_with(tmp_path, monkeypatch, capsys):
    base, folder, names, whole = safesteer.load(MICRO), tmp_path / "adapters", [], RunFolder.json

    def writes(self, name, content):
        names.append(name)
        if names.count("timing.json") == 1:  # the first time
            raise KeyboardInterrupt
        whole(self, name, content)

    monkeypatch.setattr(RunFolder, "json", writes)
    with pytest.raises(KeyboardInterrupt):
        safesteer.align(base, folder, force=True, **QUICK)
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    assert manifest["thinks"] is False and manifest["model_settings_sha256"] == base.settings_hash
    names.append("timing.json")
    assert main(["--resume", str(folder), "--force", "--report"]) == 0
    assert "going on after step 2 of 2" in capsys.readouterr().out
    assert names[-1] == "timing.json" and (folder / "run" / "report.html").is_file()
    assert main(["--resume", str(folder)]) == 2
    assert "is a finished run; there is nothing left to do" in capsys.readouterr().err


def test_a_folder_in_use_is_refused(tmp_path, capsys):
    folder = tmp_path / "adapters"
    code = "import sys, time; from pathlib import Path; from safesteer_mlx.system.store import RunFolder\n"
    code += (
        "r = RunFolder(Path(sys.argv[1])); r.text('recipe.yaml', 'seed: 1'); print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match="is in use by another run; wait for it"):
            RunFolder(folder)
        other.kill()
    RunFolder(folder)  # the lock died with its process


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EFBIG])
def test_a_write_that_fails_is_one_sentence_and_the_state_before_it_is_whole(code, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "adapters"
    command = ["--adapter-path", str(folder), *SHORT]
    stop_after(monkeypatch, 4)
    assert main(command) == 130
    monkeypatch.undo()
    state = {p.name: p.read_bytes() for p in (folder / "run" / "checkpoint").iterdir()}
    real = os.fsync

    def full(handle):
        if "checkpoint" in os.readlink(f"/proc/self/fd/{handle}") if os.path.exists("/proc/self/fd") else True:
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(stores.os, "fsync", full)
    capsys.readouterr()
    assert main([*command, "--yes"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and os.strerror(code) in said and "run the same command again" in said
    monkeypatch.undo()
    assert {n: (folder / "run" / "checkpoint" / n).read_bytes() for n in state} == state
    assert main([*command, "--yes"]) == 0


def test_a_folder_that_vanishes_is_one_sentence(tmp_path, monkeypatch, capsys):
    def find_directions(*args):
        shutil.rmtree(tmp_path / "adapters")
        return 1  # cannot be kept

    monkeypatch.setattr(direction, "find_directions", find_directions)
    (tmp_path / "adapters" / "run").mkdir(parents=True)
    capsys.readouterr()
    assert main(["--adapter-path", str(tmp_path / "adapters"), *SHORT]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No such file or directory" in said and "run the same command again" in said


def test_a_disk_without_room_for_the_states_is_told_before_the_first_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=50 * 10**6))
    assert main(["--adapter-path", str(tmp_path / "adapters"), *SHORT]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "50 MB free" in said and "make room" in said
    assert not (tmp_path / "adapters").exists()


# The store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, fingerprint("model", {"seed": 1}))


def test_states_come_back_exactly_and_only_the_last_two_are_kept(store):
    for step in (1, 2, 3):
        arrays = {
            "w": mx.random.normal((3,)),
            "b": mx.array([1.5], mx.bfloat16),
            "n": mx.array(2**40 + step, mx.uint64),
        }
        store.save(step, arrays, {"metrics": [step, None, 0.1]})
    saved = store.latest()
    assert saved.step == 3 and saved.data == {"metrics": [3, None, 0.1]}
    for name, array in arrays.items():
        assert saved.arrays[name].dtype == array.dtype and mx.array_equal(saved.arrays[name], array)
    assert sorted(p.name for p in store.states.glob("*.safetensors")) == [f"step-00000{n}.safetensors" for n in (2, 3)]
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in store.states.iterdir())
    assert not store.damaged


@pytest.mark.parametrize("ending", ["safetensors", "json"])
@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty"])
def test_a_damaged_state_is_named_and_the_one_before_it_is_used(store, ending, harm):
    for step in (1, 2):
        store.save(step, {"w": mx.full((50,), step)}, {"metrics": []})
    file = store.states / f"step-000002.{ending}"
    content = bytearray(file.read_bytes())
    if harm == "flipped":
        content[len(content) // 2] ^= 1
    file.write_bytes(b"" if harm == "empty" else content if harm == "flipped" else content[: len(content) // 2])
    saved = store.latest()
    assert saved.step == 1 and saved.arrays["w"][0].item() == 1
    assert store.damaged == [file.name]


def test_what_another_run_kept_is_not_found(store, tmp_path):
    store.keep("direction", {"vector": np.array([0.1, np.nan])})
    assert store.found("direction") == {"vector": [0.1, None]}
    other = Store(tmp_path / "elsewhere", fingerprint("model", {"seed": 2}))
    other.states = store.states
    assert other.found("direction") is None and store.found("tokens") is None and not other.damaged
    envelope = json.loads((store.states / "direction.json").read_text())
    assert envelope["made_by"] != fingerprint("model", {"seed": 2})


def test_what_made_a_step_is_told_part_by_part(tmp_path):
    now = {"weights": "a", "prompts": "b", "versions": "c"}
    store = Store(tmp_path, now)
    assert store.other_parts() == []
    for before, other in (
        (now, []),
        (now | {"prompts": "d"}, ["prompts"]),
        ({"weights": "e", "versions": "c", "\x1b": "f"}, ["weights", "prompts"]),
        ("of an earlier version", ["versions"]),
    ):
        store._fingerprint = before
        for step in (10, 20):
            store.save(step, {"w": mx.zeros(3)}, {})
        store._fingerprint = now
        assert store.other_parts() == other
        (store.states / "step-000020.json").write_text("{")  # damaged: the one before it tells
        assert store.other_parts() == other


def test_states_of_another_run_do_not_push_out_this_ones(store):
    for step in (40, 50):
        store.save(step, {"w": mx.full((5,), step)}, {})
    now = copy.copy(store)
    now._fingerprint = fingerprint("model", {"seed": 1}, "a later mlx")
    assert now.latest() is None
    for step in (10, 20, 30):
        now.save(step, {"w": mx.full((5,), step)}, {})
        saved = now.latest()
        assert saved is not None and saved.step == step and saved.arrays["w"][0].item() == step
    assert sorted(p.stem for p in now.states.glob("*.safetensors")) == ["step-000020", "step-000030"]


@pytest.mark.parametrize("at", ["content", "rename"])
def test_a_write_cut_short_leaves_the_old_file(tmp_path: Path, monkeypatch, at):
    file = tmp_path / "state.json"
    stores.write(file, b"old")

    def dies(*args):
        raise OSError(errno.EIO, "cut short")

    monkeypatch.setattr(stores.os, "fsync" if at == "content" else "replace", dies)
    with pytest.raises(OSError, match="cut short"):
        stores.write(file, b"new and longer")
    monkeypatch.undo()
    assert file.read_bytes() == b"old"
