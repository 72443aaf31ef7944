"""A run's figures to services that keep track of training, by mlx-lm's own callbacks, where `--report-to` asks for it.

They get numbers alone: each step's metrics, the scores, and those settings that are a number or one of a few words.
No prompt, answer, token or path.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..method.run import Run
from ..recipe import FIELDS, RunSettings
from ..system.hub import is_offline
from ..system.screen import Screen, UserError
from .scores import Scores

# wandb would take the terminal's output, the code and the repository's last change, too.
NUMBERS_ALONE = {"WANDB_CONSOLE": "off", "WANDB_DISABLE_CODE": "true", "WANDB_DISABLE_GIT": "true"}


def check_report_to(settings: RunSettings) -> None:
    """Refuse (UserError), before any work, what could not be told: offline, a service that mlx-lm does not know, or one
    whose package is missing."""
    if settings.report_to is None:
        return
    if is_offline():
        raise UserError(f"--report-to {settings.report_to} sends figures away, and --offline forbids it; leave one out")
    for name, value in NUMBERS_ALONE.items():
        os.environ.setdefault(name, value)
    from mlx_lm.tuner import callbacks

    for name in (name.strip().lower() for name in settings.report_to.split(",")):
        if name not in callbacks.SUPPORT_CALLBACK:
            known = ", ".join(callbacks.SUPPORT_CALLBACK)
            raise UserError(f"--report-to {name:.40} is no service that mlx-lm can tell; choose {known}")
        if getattr(callbacks, name) is None:
            raise UserError(f"--report-to {name} needs its package; pip install {name}")


class Reports:
    """Tells the services, if there are any; where one fails, that is said once, and the run goes on without."""

    def __init__(self, callback: Any, screen: Screen):
        self._callback, self._screen = callback, screen

    def step(self, row: Mapping[str, Any]) -> None:
        """A step's metrics, under mlx-lm's names where it has one for them."""
        self._tell("on_train_loss_report", {"iteration": row["step"], "train_loss": row["loss"], **row})

    def scores(self, step: int, scores: Mapping[str, Scores]) -> None:
        """The share of each outcome, of tasks that are right, and the drift, of each model."""
        metrics: dict[str, Any] = {"iteration": step}
        for model, own in scores.items():
            for kind, cell in own.as_json()["outcomes"].items():
                for how, counts in cell.items():
                    total = max(1, sum(counts.values()))
                    metrics |= {f"{model}/{kind}/{how}/{what}": n / total for what, n in counts.items()}
            right = [one for task in own.correct.values() for one in task]
            metrics |= {f"{model}/tasks/right": sum(right) / max(1, len(right)), f"{model}/drift": own.drift}
        self._tell("on_val_loss_report", metrics)

    def _tell(self, what: str, metrics: Mapping[str, Any]) -> None:
        if self._callback is None:
            return
        try:
            getattr(self._callback, what)({k: v for k, v in metrics.items() if type(v) in (int, float) and v == v})
        except Exception as error:  # whatever a service's package raises
            self._callback = None
            self._screen.line(f"--report-to: nothing more is told ({type(error).__name__}: {error!s:.100})")


def start_reports(run: Run) -> Reports:
    """What tells the services that the run's settings name, if any; what they write is kept in `run/reports/`. A
    UserError if one cannot be begun with."""
    settings = run.recipe.run
    if settings.report_to is None or not run.store.ours:
        return Reports(None, run.screen)
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    folder = run.store.path_for("reports/of").parent / (Path(settings.adapter_path).name or "adapters")
    folder.mkdir(exist_ok=True)
    flat = run.recipe.flat().items()
    config = {k: v for k, v in flat if type(v) in (bool, int, float) or "choices" in FIELDS[k].metadata}
    argv, sys.argv = sys.argv, sys.argv[:1]  # which wandb would take, and which may hold a system prompt
    try:
        callback = get_reporting_callbacks(settings.report_to, settings.project_name, str(folder), config)  # type: ignore[arg-type]
    except Exception as error:
        why = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(f"--report-to {settings.report_to} cannot begin ({why}); mend that, or leave it out") from None
    finally:
        sys.argv = argv
    return Reports(callback, run.screen)
