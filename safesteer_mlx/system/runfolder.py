"""The run's own folder, `run/` beside the adapters: what was asked, found and measured, for its owner only.

Everything in it but `timing.json` and the report is the same bytes for the same seed, settings and machine.
"""

import fcntl
import json
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .screen import UserError

_OURS = {"adapters.safetensors", "adapter_config.json", "run"}


def check_output(folder: Path) -> None:
    """Refuse an output folder that holds anything but an earlier run of ours; nothing is written.

    Raises:
        UserError: the folder holds something else, is a file, or cannot be written.
    """
    try:
        folder = folder.resolve()  # new/../file is the file, whether or not there is a folder new
        folder.exists()
    except OSError as error:  # a name too long, for one
        raise UserError(f"--adapter-path {str(folder)[:80]} cannot be used ({error.strerror}); give another") from None
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--adapter-path {folder} is a file; give a folder")
    if folder.is_dir():
        other = sorted({p.name for p in folder.iterdir() if not p.name.startswith(".")} - _OURS)
        record = {p.name for p in (folder / "run").iterdir()} if (folder / "run").is_dir() else set()
        # A run that was killed at its first write has no recipe yet.
        ours = "recipe.yaml" in record or ((folder / "run").is_dir() and record <= {"checkpoint", ".recipe.yaml.part"})
        if other or (any(folder.iterdir()) and not ours):
            named = other[0] if other else "something that is not a safesteer-mlx run"
            raise UserError(f"--adapter-path {folder} already holds {named}; give a new or an empty folder")
    parent = next(p for p in (folder, *folder.parents) if p.exists())
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


def write(path: Path, content: bytes) -> None:
    """Replace a file in one step, readable by its owner only: after a crash it is the old one or the new one."""
    part = path.with_name(f".{path.name}.part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    put_in_place(part, path)


def put_in_place(part: Path, path: Path) -> None:
    """Rename a file that is safely on disk, and make the renaming safe too."""
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_arrays(path: Path, arrays: dict[str, mx.array]) -> None:
    """`mx.save_safetensors`, in one step as `write`."""
    part = path.with_name(f".{path.stem}.part.safetensors")  # MLX adds the ending if it is another
    mx.save_safetensors(str(part), arrays)
    with part.open("rb") as done:
        os.fsync(done.fileno())
    put_in_place(part, path)


def as_json(content: Any) -> bytes:
    """JSON for people and programs; a measurement that does not exist is null, since NaN is not JSON."""
    plain = json.loads(json.dumps(content, default=_plain), parse_constant=lambda _: None)
    return (json.dumps(plain, indent=2) + "\n").encode()


class RunFolder:
    """Writes the files of one run. Made by the first of them, and locked from then on, by this process alone."""

    def __init__(self, adapters: Path):
        self.path = adapters / "run"
        self._locked = False
        if self.path.is_dir():
            self._open()

    def _open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o700)
        lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go when the process dies
        except BlockingIOError:
            os.close(lock)
            raise UserError(
                f"--adapter-path {self.path.parent} is in use by another run; wait for it or give another folder"
            ) from None
        weakref.finalize(self, os.close, lock)
        self._locked = True

    def clear(self) -> None:
        """Remove an earlier run's record, not the adapters."""
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def room(self, name: str) -> Path:
        """The path of a file to write, its folder made. A run's own folder that went away is not made again.

        Raises:
            OSError: the run's folder went away, or cannot be made.
        """
        if not self._locked:
            self._open()
        path = self.path / name
        if path.parent != self.path:
            path.parent.mkdir(exist_ok=True, mode=0o700)
        return path

    def text(self, name: str, content: str) -> None:
        """Write a text file."""
        write(self.room(name), content.encode())

    def json(self, name: str, content: Any) -> None:
        """Write plain data and numpy arrays."""
        self.text(name, as_json(content).decode())

    def yaml(self, name: str, content: dict[str, Any]) -> None:
        """Write settings."""
        import yaml

        self.text(name, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
