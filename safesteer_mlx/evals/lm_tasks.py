"""Tasks of lm-eval, through mlx-lm's own evaluator, on a model that is already loaded, adapters and all."""

import os
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..system.files import MOST_SETTINGS, read_text
from ..system.screen import UserError


def check_tasks(runs_code: bool, confirmed: bool) -> None:
    """Before anything is loaded: is lm-eval here, and is running a model's code asked for? Else a UserError."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise UserError("tasks need lm-eval, which is not installed; pip install 'safesteer-mlx[eval]'")
    if runs_code and not (confirmed and os.environ.get("HF_ALLOW_CODE_EVAL") == "1"):
        raise UserError(
            "HumanEval runs code that the model writes on this machine; "
            "if you accept that, set HF_ALLOW_CODE_EVAL=1 and pass --confirm-run-unsafe-code"
        )


def task_name(file: Path) -> str:
    """The name that an own task's file gives it; a UserError if it cannot be read, or gives none."""
    text = read_text(file, f"--tasks {file}", "give a task's YAML file", MOST_SETTINGS)
    # Not as YAML: lm-eval's own tags name functions to import.
    if (name := re.search(r"^task:\s*[\"']?([\w.\-]+)", text, re.MULTILINE)) is None:
        raise UserError(f"--tasks {file} names no task; give it a line like task: {file.stem}")
    return name[1]


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    seed: int,
    batch_size: int,
    limit: int | None = None,
    confirm_run_unsafe_code: bool = False,
) -> dict[str, Any]:
    """lm-eval's own results by task, {task: {metric: value}}, greedy, in the model's chat template.

    `tasks` are lm-eval's names, or .yaml files of one's own, which lie in their folder with what they include. A
    UserError tells of one that lm-eval does not know or cannot fetch.
    """
    import lm_eval  # type: ignore[import-not-found]
    from mlx_lm.evaluate import MLXLM, chat_template_fn

    class Loaded(MLXLM):
        """mlx-lm's evaluator without its loading, which knows no adapters."""

        apply_chat_template = chat_template_fn()

        def __init__(self):
            super(MLXLM, self).__init__()
            self._model, self.tokenizer = model, tokenizer
            self._max_tokens, self._batch_size, self._sampler = None, batch_size, None
            self.use_chat_template = True

    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    files = {task: Path(task) for task in tasks if task.endswith(".yaml")}
    names = [task_name(files[task]) if task in files else task for task in tasks]
    folders = sorted({str(file.absolute().parent) for file in files.values()}) or None
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        with redirect_stdout(StringIO()):  # mlx-lm prints a line an answer
            results = lm_eval.simple_evaluate(
                model=Loaded(),
                tasks=names,
                task_manager=TaskManager(include_path=folders),
                apply_chat_template=True,
                limit=limit,
                confirm_run_unsafe_code=confirm_run_unsafe_code,
                **seeds,
            )
    except (KeyError, ValueError, OSError) as error:
        raise UserError(
            f"lm-eval cannot run {', '.join(tasks)} ({type(error).__name__}); "
            "check that it knows the names and can fetch their data sets"
        ) from None
    return results["results"]
