"""Public test suites by name: where each one's prompts are, what kind they are, and how they are read; and tasks of
lm-eval, through mlx-lm's own evaluator, on a model that is already loaded, adapters and all.

A suite is a file `data/suites/NAME.yaml`. Nothing is fetched but what is named, and none of it is copied here.
"""

import csv
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..method.prompts import Instruction
from ..recipe import PACKAGE, nearest, read_yaml
from ..system.files import MOST_SETTINGS, MOST_TEXT, check_regular, read_json, read_text
from ..system.hub import fetch
from ..system.screen import UserError

FOLDER = PACKAGE / "data" / "suites"


@dataclass(frozen=True)
class Suite:
    """One suite. `kind` is harmful, harmless, borderline, task (of lm-eval), or missing: then `needs` says why."""

    name: str
    kind: str
    repository: str = ""  # a dataset on the Hub
    revision: str = "main"
    file: str = ""
    column: list[str] = field(default_factory=list)  # the first of these that the file has
    where: dict[str, str] = field(default_factory=dict)  # rows kept, where the file has the column
    strip: list[str] = field(default_factory=list)  # what frames a prompt
    licence: str = ""
    task: str = ""
    runs_code: bool = False
    needs: str = ""


def names() -> list[str]:
    """The suites there are."""
    return sorted((path.stem for path in FOLDER.glob("*.yaml")), key=str.lower)


def find_suite(name: str) -> Suite:
    """A suite by name, upper or lower case; a UserError if there is none, or it needs what we do not have."""
    spelling = next((known for known in names() if known.lower() == name.lower()), None)
    if spelling is None:
        raise UserError(f"there is no suite {name!r}{nearest(name, names()) or ': ' + ', '.join(names())}")
    suite = Suite(spelling, **read_yaml(FOLDER / f"{spelling}.yaml"))
    if suite.kind == "missing":
        raise UserError(f"suite {spelling} cannot be run: it needs {suite.needs}")
    return suite


def load_suite(suite: Suite, file: Path | None = None) -> list[Instruction]:
    """The suite's prompts, each once, in the file's order: from a local file, or from the Hub's cache or the Hub. A
    UserError if it cannot be fetched or read, or has not the suite's columns."""
    if (file or Path(suite.file)).suffix == ".parquet":
        _check_pyarrow(suite)
    try:
        path = file or fetch(suite.repository, suite.file, suite.revision)
    except UserError as error:
        raise UserError(f"suite {suite.name}: {error}; or give --suite {suite.name}=FILE") from None
    seen: dict[str, Instruction] = {}
    for row in _rows(path, suite):
        column = next((c for c in suite.column if c in row), None)
        if column is None:
            raise UserError(f"{path} has no column {' or '.join(suite.column)}; is it the file of suite {suite.name}?")
        if any(str(row[key]).lower() != wanted for key, wanted in suite.where.items() if key in row):
            continue
        text = row[column][0] if isinstance(row[column], list) and row[column] else row[column]
        if not isinstance(text, str):
            raise UserError(
                f"{path}: a {column} is a {type(text).__name__}, not a text; is it suite {suite.name}'s file?"
            )
        for frame in suite.strip:
            text = text.replace(frame, "")
        if text.strip():
            seen.setdefault(text.strip(), Instruction(text.strip(), suite.name))
    if not seen:
        raise UserError(f"{path} holds no prompts of suite {suite.name}; check the file")
    return list(seen.values())


def _rows(path: Path, suite: Suite) -> list[Mapping[str, Any]]:
    """The file's rows as mappings; a UserError if there is no such file, or it is malformed."""
    subject = f"suite {suite.name}: {path}"
    if path.suffix == ".parquet":
        from pyarrow import parquet  # type: ignore[import-not-found]

        check_regular(path, subject, "fetch it again", MOST_TEXT)
        try:
            rows = parquet.read_table(path).to_pylist()
        except (OSError, ValueError, NotImplementedError) as error:
            raise UserError(f"{subject} is malformed ({type(error).__name__}); fetch it again") from None
    elif path.suffix in (".json", ".jsonl"):
        rows = read_json(path, subject, "fetch it again", MOST_TEXT)
    elif path.suffix == ".csv":
        csv.field_size_limit(2**24)  # a recorded answer may be longer than the default of 128 KiB
        try:
            text = read_text(path, subject, "fetch it again", line_ends=True)
            rows = list(csv.DictReader(StringIO(text, newline="")))
        except csv.Error as error:
            raise UserError(f"{subject} is malformed ({error}); fetch it again") from None
    else:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}; a suite is .csv, .json, .jsonl or .parquet")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"suite {suite.name}: {path} is not a list of objects; is it this suite's file?")
    return rows


def _check_pyarrow(suite: Suite) -> None:
    try:
        import pyarrow.parquet  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        raise UserError(
            f"suite {suite.name} is a parquet file; `pip install pyarrow`, or give --suite {suite.name}=FILE as .csv, "
            ".json or .jsonl"
        ) from None


def check_tasks(runs_code: bool, confirmed: bool) -> None:
    """Before anything is loaded: is lm-eval here, and is running a model's code asked for? Else a UserError."""
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
