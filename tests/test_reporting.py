"""What --report-to tells, with stand-ins for the services' packages: numbers alone, and nothing unless asked."""

import importlib
import json
import os
import sys

import mlx_lm.tuner.callbacks as callbacks
import pytest
from runs import MICRO

from safesteer_mlx.align import main
from safesteer_mlx.evals.reporting import NUMBERS_ALONE, Reports, start_reports
from safesteer_mlx.evals.scores import Answer, Scores
from safesteer_mlx.method.run import Run
from safesteer_mlx.recipe import resolve
from safesteer_mlx.system.screen import Screen
from safesteer_mlx.system.store import check_output

pytestmark = pytest.mark.usefixtures("few_prompts")

SHORT = [MICRO, "--force", "--iters", "2", "--test-prompts", "2", "--direction-train", "32"]
SHORT += ["--direction-validation", "16", "--token-samples", "1", "--coeff", "0.7", "--horizon", "2"]
SHORT += ["--batch-size", "4", "--no-report"]
STAND_IN = """
import sys
seen = []
def init(**given):
    seen.append(("init", given, list(sys.argv)))
    if given["project"] == "locked":
        raise RuntimeError("no key is set")
def log(row, step=None):
    seen.append(("log", row, step))
    if fails:
        raise ConnectionError("gone away")
fails = False
"""


@pytest.fixture
def services(tmp_path, monkeypatch):
    """Stand-ins for both packages on the path, by name; mlx-lm's callbacks look for them when they are imported."""
    (tmp_path / "site").mkdir()
    for name in ("wandb", "swanlab"):
        (tmp_path / "site" / f"{name}.py").write_text(STAND_IN)
    for name in NUMBERS_ALONE:
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path / "site")
        importlib.reload(callbacks)
        yield callbacks
        for name in ("wandb", "swanlab"):
            sys.modules.pop(name, None)
    for name in NUMBERS_ALONE:
        os.environ.pop(name, None)
    importlib.reload(callbacks)


def test_each_step_and_the_scores_are_told_and_no_text(services, tmp_path, monkeypatch):
    folder = tmp_path / "adapters"
    monkeypatch.setattr(sys, "argv", ["safesteer-mlx", "--system-prompt", "secret"])
    flags = [*SHORT, "--report-to", "wandb,SwanLab", "--project-name", "mine", "--system-prompt", "secret words"]
    assert main(["--adapter-path", str(folder), *flags]) == 0
    for seen in (services.wandb.seen, services.swanlab.seen):
        (what, given, argv), *rows = seen
        assert what == "init" and given["project"] == "mine" and argv == ["safesteer-mlx"]
        assert given["config"]["learning_rate"] == 5e-4 and given["config"]["loss"] == "grouped_reverse_kl"
        assert not {"system_prompt", "model", "adapter_path", "data", "refusal_prefixes"} & given["config"].keys()
        assert [step for _, _, step in rows] == [1, 2, 2]
        assert all(type(value) in (int, float) for _, row, _ in rows for value in row.values())
        metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [row["train_loss"] for _, row, _ in rows[:2]] == [row["loss"] for row in metrics]
        scores = json.loads((folder / "run" / "before_after.json").read_text())
        cell = scores["student"]["outcomes"]["harmful"]["sampled"]
        assert rows[2][1]["student/harmful/sampled/refuse"] == cell["refuse"] / sum(cell.values())
        assert "secret" not in json.dumps(seen)
    given = services.wandb.seen[0][1]
    assert given["name"] == "adapters" and given["dir"] == str(folder / "run" / "reports" / "adapters")
    assert {name: os.environ[name] for name in NUMBERS_ALONE} == NUMBERS_ALONE
    # What is told elsewhere changes no result, and the folder is still one of ours.
    assert main(["--adapter-path", str(folder), *SHORT, "--dry-run"]) == 0


def test_nothing_is_told_unless_asked(services):
    run = Run(resolve({}, {})[0], None, None, Screen(), None)  # type: ignore[arg-type]
    told = start_reports(run)
    told.step({"step": 1, "loss": 0.5})
    assert services.wandb.seen == services.swanlab.seen == [] and run.recipe.run.report_to is None


REFUSED = {
    "offline": (
        ["wandb", "--offline"],
        "--report-to wandb sends figures away, and --offline forbids it; leave one out",
    ),
    "both, offline": (["wandb,swanlab", "--offline"], "leave one out"),
    "a service of another tool": (
        ["tensorboard"],
        "--report-to tensorboard is no service that mlx-lm can tell; choose",
    ),
    "mlflow": (["mlflow"], "choose wandb, swanlab"),
    "one of two": (["wandb, mlflow"], "--report-to mlflow is no service"),
    "a path": (["../../wandb"], "--report-to ../../wandb is no service"),
    "code": (["os"], "--report-to os is no service"),
    "a comma": ([","], "--report-to  is no service"),
    "nothing": ([""], "report_to = '' is empty"),
    "a number": (["3"], "--report-to 3 is no service"),
    "escapes": (["\x1b[2J"], "is no service"),
    "a project of nothing": (["wandb", "--project-name", " "], "project_name = ' ' is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_is_one_sentence_before_any_work(case, services, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    flags, expected = REFUSED[case]
    if "--offline" in flags:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["--adapter-path", str(tmp_path / "new"), *SHORT, "--report-to", *flags]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1 and "Traceback" not in said
    assert not (tmp_path / "new").exists() and services.wandb.seen == []


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_package_that_is_missing_is_named_with_the_command(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(callbacks, name, None)
    assert main(["--adapter-path", str(tmp_path / "new"), "--report-to", name]) == 2
    assert f"--report-to {name} needs its package; pip install {name}\n" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_service_that_does_not_begin_is_one_sentence(services, tmp_path, capsys):
    flags = ["--report-to", "wandb", "--project-name", "locked"]
    assert main(["--adapter-path", str(tmp_path / "new"), *SHORT, *flags]) == 2
    said = capsys.readouterr().err
    assert "--report-to wandb cannot begin (no key is set); mend that, or leave it out\n" in said
    check_output(tmp_path / "new")  # is still a run's


def test_a_service_that_fails_is_said_once_and_the_run_goes_on(services, capsys):
    services.wandb.fails = True
    told = Reports(services.get_reporting_callbacks("wandb", "p", "d", {}), Screen())
    for step in (1, 2):
        told.step({"step": step, "loss": 0.5, "harmful_loss": None})
    told.scores(2, {"base": Scores([Answer("harmful", "greedy", "p", "a", "refuse", True)], {}, 0.0, 0.0)})
    assert capsys.readouterr().out.count("nothing more is told (ConnectionError: gone away)") == 1
    assert len(services.wandb.seen) == 2  # init, and the first
