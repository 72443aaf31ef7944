"""Runs that were interrupted at an awkward moment, and models, flags and data that are not the usual ones."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from runs import files, write_run

from safesteer_mlx import evaluate
from safesteer_mlx.evals import heldout, scorecard
from safesteer_mlx.method import run as runs
from safesteer_mlx.method import train as stage
from safesteer_mlx.method.direction import Direction, mean_differences
from safesteer_mlx.method.residual import hidden_states, of_prompts
from safesteer_mlx.method.run import Run
from safesteer_mlx.method.student import make_student
from safesteer_mlx.method.train import MovingTeacher, StepMetrics, Training, collapsed, train_student
from safesteer_mlx.recipe import resolve
from safesteer_mlx.system.screen import Screen, UserError, exit_code
from safesteer_mlx.system.store import Store

RECIPE = resolve({}, {})[0]
UNEQUAL = [[1, 2, 3, 4 + i][: 2 + i % 3] for i in range(12)]


def loaded(model, **more):
    """A model with as much around it as its stage needs: a tokenizer whose every answer is "Of course."."""
    tokenizer = SimpleNamespace(has_thinking=False, decode=lambda *_, **__: "Of course.")
    return SimpleNamespace(model=model, name="m", tokenizer=tokenizer, eos_ids=[49], config={}, thinks=False, **more)


def test_a_student_that_cannot_be_batched_is_asked_one_at_a_time_whether_it_collapsed(tiny_model):
    # gemma2 of mlx-lm 0.32.2 fails on prompts of unequal length with grouped heads.
    base = loaded(tiny_model("gemma2"))
    recipe = replace(RECIPE, run=replace(RECIPE.run, generation_batch_size=1))
    given = SimpleNamespace(harmless_validation=UNEQUAL)
    run = Run(recipe, base, given, Screen(), None)  # type: ignore[arg-type]
    assert collapsed(run, base.model) is None


@pytest.mark.parametrize(("rightly", "size"), [(True, 64), (False, 1)])
def test_evaluate_asks_an_architecture_that_cannot_be_batched_one_at_a_time(
    rightly, size, tiny_model, monkeypatch, capsys
):
    used = []
    monkeypatch.setattr(runs, "batches_rightly", lambda *_: rightly)
    monkeypatch.setattr(runs, "render_all", lambda *_: UNEQUAL)
    monkeypatch.setattr(scorecard.Scoring, "scores", lambda self: used.append(self.args.batch_size) or {})
    monkeypatch.setattr(scorecard.Scoring, "task_results", lambda self: used.append(self.args.batch_size) or {})
    scorecard.score(
        evaluate.parse([]), heldout.TestSet({"harmful": []}, []), ["a task"], [], loaded(tiny_model("llama")), Screen()
    )
    assert used == [size, size] and ("answers are generated one at a time" in capsys.readouterr().out) == (size == 1)


class Scattered(nn.Module):
    """Blocks that stand in no list."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)

    @property
    def layers(self):
        return [self.first]


class Flat(nn.Module):
    """Blocks, embedding and head in one module."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(2, 2)]


@pytest.mark.parametrize(("model", "said"), [(Scattered(), "no module holds"), (Flat(), "cannot be told apart")])
def test_an_architecture_of_another_layout_is_a_sentence(model, said, capsys):
    assert exit_code(lambda: hidden_states(model, mx.array([[1, 2]])) and None) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"architecture {__name__}" in told
    assert said in told and "; choose" in told


class Moving:
    """A moving teacher whose state is taken at the beginning and after each step; one of these is interrupted."""

    teacher = tokens = None

    def __init__(self, interrupted=None):
        self.interrupted, self.taken = interrupted, 0

    def move(self, step):
        pass

    def state(self):
        if self.taken == self.interrupted:
            raise KeyboardInterrupt
        self.taken += 1
        return {}

    def restore(self, state):
        pass


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(moving=None, score=None, force=False): `train_student` for 4 steps, each a whole number added to the one
    weight; what is written is in one folder, so a second call goes on. `train.worth` is what steps are worth, if they
    are measured, `train.gradient` their norm.
    """
    worth = {}

    def steps(training, first_step, drawn_before):
        for step in range(first_step + 1, 5):
            training.student.weight = training.student.weight + 1
            measured = (run.gradient, 1e-3, 8, 0.0, 0.5, worth.get(step, float("nan")))
            yield StepMetrics(step, 4, 1.0, 1.0, 1.0, 0.1, 0.9, *measured)

    monkeypatch.setattr(stage, "train", steps)
    for name in ("collapsed", "save_student"):
        monkeypatch.setattr(stage, name, lambda *_: None)
    recipe = replace(RECIPE, train=replace(RECIPE.train, iters=4, save_every=2, keep_best=True))
    store = Store(tmp_path / "adapters", "this run")

    def run(moving=None, score=None, force=False):
        student = nn.Linear(1, 1, bias=False)
        student.weight = mx.zeros((1, 1))
        optimizer = stage.make_optimizer(recipe.train)
        how = (recipe.train, recipe.loss, [49], 0, optimizer)
        training = Training(student, None, None, mx.array([1]), [], [], *how)  # type: ignore[arg-type]
        around = Run(recipe, None, None, Screen(), store, force)  # type: ignore[arg-type]
        return student, train_student(around, training, moving, score)

    run.store, run.worth, run.gradient = store, worth, 1.0
    return run


def test_steps_without_a_gradient_end_the_training_unless_it_is_forced(train):
    train.gradient = 1e-5
    with pytest.raises(UserError, match="first 3 steps had no gradient"):
        train()
    _, log = train(force=True)
    assert [row["step"] for row in log.metrics] == [1, 2, 3, 4]


def test_a_step_interrupted_before_its_state_is_taken_leaves_no_row(train):
    with pytest.raises(KeyboardInterrupt):
        train(Moving(interrupted=2))
    saved = train.store.latest()
    assert saved.step == 1 and saved.arrays["student.weight"].item() == 1
    student, log = train(Moving())
    assert [row["step"] for row in log.metrics] == [1, 2, 3, 4] and len(log.seconds) == 4
    assert student.weight.item() == 4


def score_of(step: int) -> dict:
    none = {"count": 0, "total": 8}
    return {"step": step, "unsafe": none, "over_refusal": none, "broken": none, "drift": 0.0}


@pytest.mark.parametrize("at", [2, 4])
def test_a_saved_step_whose_scoring_was_interrupted_is_scored_when_the_run_goes_on(train, at):
    scored = []

    def score(step):
        if step == at and len(scored) == at // 2 - 1:  # the first time that it is asked
            scored.append("interrupted")
            raise KeyboardInterrupt
        scored.append(step)
        return score_of(step)

    with pytest.raises(KeyboardInterrupt):
        train(score=score)
    assert train.store.latest().step == at
    _, log = train(score=score)
    assert log.scored == [score_of(2), score_of(4)] and [row["step"] for row in log.metrics] == [1, 2, 3, 4]
    assert scored == (["interrupted", 2, 4] if at == 2 else [2, "interrupted", 4])


@pytest.mark.parametrize(
    ("worth", "kept"), [({2: 0.9, 4: 0.8}, 2), ({2: 0.8, 4: 0.9}, 4), ({2: 0.9, 4: 0.9}, 4), ({}, 4)]
)
@pytest.mark.parametrize("interrupted", [None, 4])
def test_the_run_ends_with_the_step_that_did_best_also_where_it_was_interrupted(
    train, worth, kept, interrupted, capsys
):
    train.worth.update(worth)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            train(Moving(interrupted))
    student, log = train()
    assert student.weight.item() == kept and len(log.metrics) == 4
    assert (f"step {kept} of 4 did best on validation prompts and is kept" in capsys.readouterr().out) == (kept < 4)


def test_steps_that_were_saved_to_select_from_are_not_chosen_twice(train):
    train.worth.update({2: 0.9, 4: 0.8})
    student, _ = train(score=score_of)
    assert student.weight.item() == 4


def test_a_moving_teacher_is_refreshed_from_the_prompts_that_passed_in_batches_as_planned(tiny_model, monkeypatch):
    base = loaded(tiny_model("llama"))
    teacher = replace(RECIPE.teacher, teacher="ema", ema_rate=0.5, refresh_every=1)
    recipe = replace(RECIPE, teacher=teacher, run=replace(RECIPE.run, prompt_batch_size=4))
    found = SimpleNamespace(harmful_train=UNEQUAL[:5], harmless_train=UNEQUAL[5:9])
    chosen = SimpleNamespace(direction=Direction(-2, 1, mx.ones(32)), coeff=1.0, prompts_only=True)
    student, sizes = make_student(base.model, RECIPE.train, 0), []

    def means(*given):
        sizes.append(given[4])
        if given[4] > 2:
            raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008)")
        return mean_differences(*given)

    monkeypatch.setattr(stage, "mean_differences", means)
    monkeypatch.setattr(stage, "find_tokens", lambda *_: SimpleNamespace(ids=[1, 2]))
    run = Run(recipe, base, None, Screen(quiet=True), None)  # type: ignore[arg-type]
    moving = MovingTeacher(run, student, found, chosen)  # type: ignore[arg-type]
    moving.move(1)
    assert sizes == [4, 2]
    expected = mean_differences(base.model, UNEQUAL[:5], UNEQUAL[5:9], 2)[0, 1]  # the student is still the base
    assert mx.allclose(moving.state()["vector"], mx.array(expected.astype(np.float32)), atol=1e-5)
    row, moved = mx.array([UNEQUAL[0]]), moving.teacher.model
    with of_prompts(moved, lambda: mx.zeros(row.shape, mx.bool_)):
        assert mx.array_equal(moved(row), base.model(row))  # on prompts only, as the one that was chosen


# Signals

PYTHON = {"PYTHONPATH": str(Path(__file__).parents[1]), "OPENBLAS_NUM_THREADS": "1"}
SLOW_REPORT = """
import sys, time
from safesteer_mlx import report
from safesteer_mlx.evals import figures
def picture(draw):
    print("drawing", flush=True)
    for _ in range(600):  # a signal in front of a long sleep is heeded after it
        time.sleep(0.1)
figures.picture = picture
sys.exit(report.main(sys.argv[1:]))
"""
# What waits, as a run does, and needs a while to keep what it has.
SLOW_RUN = """
import sys, time
from safesteer_mlx.system.screen import exit_code
def run():
    try:
        print("drawing", flush=True)
        for _ in range(600):  # a signal in front of a long sleep is heeded after it
            time.sleep(0.1)
    finally:
        print("keeping", flush=True)
        time.sleep(float(sys.argv[1]))
sys.exit(exit_code(run))
"""


def stopped(command, signals, folder, wait_for=b"", pause=0.0, then=b"") -> tuple[int, str]:
    """The code and the words of a process that gets these signals, after a pause or once it has said something.

    Of two that are pending together the system hands over the one of the lower number first: where their order is
    what is asked, the second waits until the process says ``then``."""

    def heeds_signals() -> None:  # also where the tests run in the background, which a shell lets ignore Ctrl-C
        signal.signal(INT, signal.SIG_DFL)

    with subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | PYTHON,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heeds_signals,
    ) as process:
        assert process.stdout is not None
        if wait_for:
            assert process.stdout.readline().strip() == wait_for
        time.sleep(pause)
        for number in signals:
            process.send_signal(number)
            if then:
                process.stdout.readline()
            else:
                time.sleep(0.05)
        _, said = process.communicate(timeout=30)
        return process.returncode, said.decode()


INT, TERM = signal.SIGINT, signal.SIGTERM
ONE_LINE = "safesteer-mlx: interrupted\n"


@pytest.mark.parametrize(
    ("signals", "code"), [([INT], 130), ([TERM], 143), ([INT, INT], 130), ([TERM, TERM], 143), ([TERM, INT], 143)]
)
@pytest.mark.parametrize("keeping", ["0", "0.3"])
def test_a_signal_or_two_are_one_line_and_the_code_of_the_first(signals, code, keeping, tmp_path):
    then = b"keeping" if len(set(signals)) > 1 else b""
    assert stopped(["-c", SLOW_RUN, keeping], signals, tmp_path, b"drawing", then=then) == (code, ONE_LINE)


@pytest.mark.parametrize("signals", [[TERM], [TERM, TERM]])
def test_of_several_machines_the_first_alone_says_that_it_was_interrupted(signals, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_RANK", "1")
    assert stopped(["-c", SLOW_RUN, "0.3"], signals, tmp_path, b"drawing") == (143, "")


@pytest.mark.parametrize("pause", [0.15, 0.3, 0.5, 0.8])
@pytest.mark.parametrize(
    ("number", "code", "rank", "line"), [(INT, 130, "0", ONE_LINE), (TERM, 143, "0", ONE_LINE), (TERM, 143, "1", "")]
)
def test_a_signal_at_the_start_is_one_line_of_the_first(number, code, rank, line, pause, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_RANK", rank)
    # Whatever is being imported then; before the package is, Python itself decides.
    ours = ["-c", "import sys; sys.argv = ['-m']; import safesteer_mlx; print('ours', flush=True); import runpy; "]
    ours[1] += "sys.argv = ['align', '--iters', '2']; runpy.run_module('safesteer_mlx.align', run_name='__main__')"
    assert stopped(ours, [number], tmp_path, b"ours", pause - 0.15) == (code, line)


@pytest.mark.parametrize("number", [INT, TERM])
def test_a_signal_during_the_report_is_one_line_and_leaves_no_page(number, tmp_path):
    run = write_run(tmp_path / "run", files())
    before = sorted(run.rglob("*"))
    code, said = stopped(["-c", SLOW_REPORT, str(run)], [number], tmp_path, b"drawing")
    assert (code, said) == (128 + number, ONE_LINE) and sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    "where",
    [
        "Swallows()",
        "try: interrupt()\n    except BaseException: pass",
        "try: in_a_row()\n    except ValueError: pass",
    ],
    ids=["a destructor", "a library", "Python"],
)
def test_an_interrupt_that_was_swallowed_comes_again(where, tmp_path):
    code = f"""
import ctypes, functools, operator, os, signal, sys, time
from safesteer_mlx.system.screen import exit_code
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
class Swallows:
    def __del__(self):
        interrupt()
def in_a_row():  # int heeds it while it says that this is no number, which it then says (at least Python 3.11's)
    calls = functools.partial(ctypes.CDLL(None)["raise"], signal.SIGINT), functools.partial(int, "a")
    list(map(operator.call, calls))
def run():
    {where}
    time.sleep(10)
sys.exit(exit_code(run))
"""
    assert stopped(["-c", code], [], tmp_path) == (130, ONE_LINE)


def test_what_a_stopped_run_keeps_may_take_its_time(tmp_path):
    code = """
import os, signal, sys, time
from safesteer_mlx.system import screen
screen.HEARD_WITHIN = 0.1
def run():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    except KeyboardInterrupt:
        try:
            int("what fails meanwhile")
        except ValueError:
            time.sleep(0.3)
        time.sleep(0.3)
        print("kept", flush=True)
        raise
sys.exit(screen.exit_code(run))
"""
    assert stopped(["-c", code], [], tmp_path, b"kept") == (130, ONE_LINE)


def test_a_signal_as_the_tokenizer_has_been_read_is_told_too(tmp_path):
    # While a long list is dropped Python heeds no signal: it comes between the call's last word and whoever called.
    code = """
import sys, time
from safesteer_mlx.system import load
from safesteer_mlx.system.screen import exit_code
def read():
    words = [[] for _ in range(5_000_000)]
    print("drawing", flush=True)
def run():
    load._panics_unseen(read)
    time.sleep(10)
sys.exit(exit_code(run))
"""
    assert stopped(["-c", code], [INT], tmp_path, b"drawing") == (130, ONE_LINE)


def test_a_signal_within_an_import_comes_when_it_is_done(tmp_path):
    (tmp_path / "swallows.py").write_text(
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(0.01)\nexcept:\n"
        "    pass\ntime.sleep(0.2)\n"
    )
    code = """
import sys, time
from safesteer_mlx.system.screen import exit_code
sys.path.insert(0, "")
def run():
    import swallows
    for _ in range(100):
        time.sleep(0.1)
sys.exit(exit_code(run))
"""
    began = time.monotonic()
    assert stopped(["-c", code], [], tmp_path) == (143, ONE_LINE) and time.monotonic() - began < 5


def test_handlers_are_put_back_and_another_thread_has_none():
    before = [signal.getsignal(number) for number in (INT, TERM)]
    inside = []

    def command() -> None:
        inside.append([signal.getsignal(number) for number in (INT, TERM)])

    assert exit_code(command) == 0 and inside[0] != before
    assert [signal.getsignal(number) for number in (INT, TERM)] == before
    thread = threading.Thread(target=exit_code, args=(command,))
    thread.start()
    thread.join()
    assert inside[1] == before


# The terminal, and what is around a process


STREAMS = {
    "closed output": ("{} >&-", 0, ""),
    "closed errors": ("{} 2>&-", 0, ""),
    "all closed": ("{} <&- >&- 2>&-", 0, ""),
    "nobody reads": ("{{ {}; echo code $? >&2; }} | true", 0, "code 141"),
    "nobody reads the help": ("{{ {python} -m safesteer_mlx --help; echo code $? >&2; }} | true", 0, "code 141"),
    "a full disk": ("{} >/dev/full", 2, "No space left on device"),
    "C": ("LC_ALL=C {}", 0, ""),
    "latin-1": ("PYTHONIOENCODING=latin-1 {}", 0, ""),
    "latin-1 help": ("PYTHONIOENCODING=latin-1 {python} -m safesteer_mlx.align --help", 0, ""),
    "ASCII errors": ("PYTHONIOENCODING=ascii {python} -m safesteer_mlx.align --seed ⟨", 2, "seed = '?'"),
    "no home": ("env -u HOME {}", 0, ""),
    "few files": ("ulimit -n 32; {}", 2, "only 32 files may be open at once"),
    "small files": ("ulimit -f 0; {} --veto ' plain' --out x.json", 2, "File too large"),
    "a proxy that is none": ("all_proxy=junk://x {}", 0, ""),
    "a model behind it": (
        "https_proxy=junk://x {python} -m safesteer_mlx.align a/b --offline",
        2,
        "the proxy in http_proxy, https_proxy or all_proxy cannot be used",
    ),
    "an unknown backend": ("MPLBACKEND=junk {report}", 2, "unset MPLBACKEND"),
    "json.py": ("echo 'raise SystemExit(9)' > json.py; {safe}", 0, ""),
    "a name that is no UTF-8": ("mv run $(printf 'r\\377'); {python} -m safesteer_mlx.tokens r*", 0, ""),
}


# A Mac has no /dev/full.
@pytest.mark.parametrize("case", [case for case in STREAMS if case != "a full disk" or Path("/dev/full").exists()])
def test_odd_surroundings_are_a_sentence_or_do_not_matter(case, tmp_path):
    write_run(tmp_path / "run", files())
    line, code, expected = STREAMS[case]
    python = sys.executable
    line = line.format(
        f"{python} -m safesteer_mlx.tokens run",
        python=python,
        report=f"{python} -m safesteer_mlx.report run",
        safe=f"{python} -P -m safesteer_mlx.tokens run",
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONIOENCODING"} | PYTHON
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, timeout=60, check=False)
    said = done.stderr.decode("utf-8", "replace")
    assert done.returncode == code and expected in said and said.count("\n") == bool(expected), said
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".part") or p.name == "x.json"]


def test_the_scripts_and_the_check_of_an_export_run_nothing_of_the_working_folder():
    root = Path(__file__).parents[1]
    assert " -P -m safesteer_mlx.align" in (root / "scripts" / "align").read_text()
    assert '"-P", "-m", "safesteer_mlx.verify"' in (root / "safesteer_mlx" / "export.py").read_text()


def test_a_sentence_for_which_nobody_listens_changes_no_code(monkeypatch):
    class Gone:
        def write(self, _):
            raise BrokenPipeError

        flush = write

    def command():
        raise UserError("a; b")

    monkeypatch.setattr(sys, "stderr", Gone())
    assert exit_code(command) == 2
