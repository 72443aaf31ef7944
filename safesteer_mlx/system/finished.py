"""A finished run, read back: what was aligned, how, and what came of it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..method.judge import use_refusal_phrases
from ..recipe import Recipe, current_names, model_name, read_yaml, resolve
from .load import Loaded, load
from .model_files import read_object
from .screen import UserError


@dataclass(frozen=True)
class FinishedRun:
    """`folder` holds the adapters, and `folder/run` the record."""

    folder: Path
    recipe: Recipe
    manifest: dict[str, Any]
    outcomes: dict[str, Any]  # before_after.json

    @property
    def record(self) -> Path:
        """The run's own folder."""
        return self.folder / "run"


def finished_run(folder: Path, model: str | None = None) -> FinishedRun:
    """Read the run in a folder of adapters, or in the `run/` of one. `model` is where its base is now, if it has moved.

    Raises:
        UserError: there is no run, it is not finished, or its adapters are gone or are others.
    """
    given, folder = folder, folder.expanduser()
    if folder.name == "run" and not (folder / "run").is_dir():
        folder = folder.absolute().parent
    record = folder / "run"
    if not (record / "recipe.yaml").is_file():
        raise UserError(f"{given} holds no run of align; give the folder that --adapter-path named")
    if not (record / "manifest.json").is_file():
        raise UserError(f"the run in {given} is not finished; go on with it first: align --resume {given}")
    manifest = read_object(record / "manifest.json")
    for file in ("adapters.safetensors", "adapter_config.json"):
        if not (folder / file).is_file():
            raise UserError(f"{given} holds a run, but no {file}; run align again")
    with (folder / "adapters.safetensors").open("rb") as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() != manifest.get("adapters_sha256"):
            raise UserError(f"the adapters in {given} are not those that its run scored; run align again")
    settings = current_names(read_yaml(record / "recipe.yaml"))
    if model is not None:
        settings |= {"model": model_name(model), "revision": None}
    elif (name := str(settings.get("model"))).startswith("/") and not Path(name).exists():
        raise UserError(f"the base of the run in {given}, {name}, is gone; say with --model where it is now")
    return FinishedRun(folder, resolve({}, settings)[0], manifest, read_object(record / "before_after.json"))


def load_base(run: FinishedRun, trust_remote_code: bool = False) -> Loaded:
    """The base that the run aligned.

    Raises:
        UserError: as `load`, or its weights are others than those that the run aligned.
    """
    settings = run.recipe.run
    use_refusal_phrases(settings.refusal_phrases)
    trusted = settings.trust_remote_code or trust_remote_code
    base = load(settings.model, trusted, settings.thinking, settings.revision)
    if base.weights_hash != run.manifest.get("model_sha256"):
        raise UserError(
            f"{settings.model} holds other weights than the run in {run.folder} aligned; say with --model where "
            "those are"
        )
    return base
