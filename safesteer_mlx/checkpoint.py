"""The state of a run on disk: written whole or not at all, read back exactly, or said to be damaged.

    run/checkpoint/
        direction.json, tokens.json, …      what a stage found
        rollouts.json                       what the student answered in the step under way
        step-000010.safetensors and .json   weights, optimizer and metrics after step 10; the last two are kept

Every file carries the fingerprint of what made it (model, prompts, settings, versions) and a hash of its
content: what was made otherwise, or was damaged, is not used.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import mlx.core as mx

from .progress import UserError
from .runfolder import RunFolder, as_json, save_arrays

KEPT = 2  # checkpoints of steps


class Plain(Protocol):
    """A result that can be written down."""

    def plain(self) -> Any:
        """Plain data and numpy arrays."""


T = TypeVar("T", bound=Plain)


@dataclass(frozen=True)
class SavedStep:
    """State after `step`: named arrays, and plain data beside them."""

    step: int
    arrays: dict[str, mx.array]
    data: dict[str, Any]


def fingerprint(*made_of: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(as_json(list(made_of))).hexdigest()


class Checkpoint:
    """The state of one run; `damaged` names the files that were found unfit for use."""

    def __init__(self, record: RunFolder, fingerprint: str):
        self._record, self._fingerprint = record, fingerprint
        self.path = record.path / "checkpoint"
        self.damaged: list[str] = []

    def keep(self, name: str, content: Any) -> None:
        """Keep plain data and numpy arrays under a name."""
        body = as_json(content).decode()
        sha = hashlib.sha256(body.encode()).hexdigest()
        self._record.json(f"checkpoint/{name}.json", {"made_by": self._fingerprint, "sha256": sha, "content": body})

    def found(self, name: str) -> Any | None:
        """What was kept under a name by a run like this one, or None."""
        file = self.path / f"{name}.json"
        try:
            envelope = json.loads(file.read_bytes())
            made_by, sha, body = envelope["made_by"], envelope["sha256"], envelope["content"]
            if hashlib.sha256(body.encode()).hexdigest() != sha:
                raise ValueError("hash")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.damaged.append(file.name)
            return None
        return json.loads(body) if made_by == self._fingerprint else None

    def once(self, name: str, find: Callable[[], T], of: Callable[[Any], T]) -> T:
        """What `find` finds, or what it found before; `of` reads it back from its `plain()`."""
        if (plain := self.found(name)) is not None:
            return of(plain)
        result = find()
        self.keep(name, result.plain())
        return result

    def check_space(self, trained_bytes: int, candidates: int = 0) -> None:
        """Refuse to begin a run whose states will not fit on the disk.

        A state is the trained weights and AdamW's two moments; `KEPT` of them, one that is being written, and the
        adapters, old and new; and `candidates` for `--select`. Answers, report and record are small beside 64 MB.

        Raises:
            UserError: less is free.
        """
        needed = (3 * (KEPT + 1) + 2 + candidates) * trained_bytes + 64 * 10**6
        folder = next(p for p in self.path.absolute().parents if p.exists())
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise UserError(
                f"--adapter-path {self._record.path.parent}: the run may write {needed / 1e6:,.0f} MB, but {folder} "
                f"has {free / 1e6:,.0f} MB free; make room, or give a folder on another disk"
            )

    def save(self, step: int, arrays: dict[str, mx.array], data: dict[str, Any]) -> None:
        """Keep the state after a step, and forget all but the last `KEPT`.

        Later ones too: the run would have gone on from them, but another run made them, or they are damaged.
        """
        file = self._record.room(f"checkpoint/step-{step:06d}.safetensors")
        save_arrays(file, arrays)
        file.chmod(0o600)
        self.keep(file.stem, {"arrays_sha256": _sha256(file), "data": data})
        steps = self._steps()
        kept = [name for name in steps if name <= file.stem][:KEPT]
        for old in set(steps) - set(kept):
            (self.path / f"{old}.json").unlink(missing_ok=True)
            (self.path / f"{old}.safetensors").unlink(missing_ok=True)

    def latest(self) -> SavedStep | None:
        """The last state that is whole."""
        for name in self._steps():
            kept, file = self.found(name), self.path / f"{name}.safetensors"
            if kept is None:
                continue
            if not file.is_file() or _sha256(file) != kept["arrays_sha256"]:
                self.damaged.append(file.name)
                continue
            arrays = mx.load(str(file))
            assert isinstance(arrays, dict)
            mx.eval(arrays)  # now, since the file may be deleted while the run goes on
            return SavedStep(int(name.split("-")[1]), arrays, kept["data"])
        return None

    def _steps(self) -> list[str]:
        return sorted({f.stem for f in self.path.glob("step-*.json")}, reverse=True)

    def clear(self) -> None:
        """Forget everything: the run is done, or begins anew."""
        shutil.rmtree(self.path, ignore_errors=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
