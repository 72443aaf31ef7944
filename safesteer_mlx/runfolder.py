"""The run's own folder, `run/` beside the adapters: what was asked, found and measured, for its owner only.

Everything in it but `timing.json` is the same bytes for the same seed, settings and machine.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from .progress import UserError

_OURS = {"adapters.safetensors", "adapter_config.json", "run"}


def check_output(folder: Path) -> None:
    """Refuse an output folder that holds anything but an earlier run of ours; nothing is written.

    Raises:
        UserError: the folder holds something else, is a file, or cannot be written.
    """
    try:
        folder.exists()
    except OSError as error:  # a name too long, for one
        raise UserError(f"--adapter-path {str(folder)[:80]} cannot be used ({error.strerror}); give another") from None
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--adapter-path {folder} is a file; give a folder")
    if folder.is_dir():
        other = sorted({p.name for p in folder.iterdir() if not p.name.startswith(".")} - _OURS)
        if other or (any(folder.iterdir()) and not (folder / "run" / "recipe.yaml").is_file()):
            named = other[0] if other else "something that is not a safesteer-mlx run"
            raise UserError(f"--adapter-path {folder} already holds {named}; give a new or an empty folder")
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise UserError(f"--adapter-path {folder} cannot be made, since {parent} is a file; give another folder")
    if not os.access(parent, os.W_OK):
        raise UserError(f"--adapter-path {folder} cannot be written ({parent} is read-only); give another folder")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")


class RunFolder:
    """Writes files of one run, each replaced in one step, readable by their owner only."""

    def __init__(self, adapters: Path):
        self.path = adapters / "run"
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o700)

    def text(self, name: str, content: str) -> None:
        part = self.path / f".{name}.part"
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as out:
            out.write(content)
        part.replace(self.path / name)

    def json(self, name: str, content: Any) -> None:
        # NaN is not JSON; a measurement that does not exist is null.
        text = json.dumps(json.loads(json.dumps(content, default=_plain), parse_constant=lambda _: None), indent=2)
        self.text(name, text + "\n")

    def yaml(self, name: str, content: dict[str, Any]) -> None:
        import yaml

        self.text(name, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
