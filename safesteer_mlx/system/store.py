"""A run's own folder, `run/` beside the adapters: its record, for its owner only, and its state, to go on from.

Everything in the record but `timing.json` and the report is the same bytes for the same seed, settings and machine. The
state is written whole or not at all, read back exactly, or said to be damaged:

    run/checkpoint/
        directions.json, tokens.json, …     what a stage found
        rollouts.json                       what the student answered in the step under way
        step-000010.safetensors and .json   weights, optimizer and metrics after step 10; the last two are kept

Every file of it carries fingerprints of what made it (model, prompts, settings, versions) and a hash of its content:
what was made otherwise, or was damaged, is not used.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import weakref
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, NotRequired, TypedDict, TypeVar, get_args, get_origin, get_type_hints, is_typeddict

import mlx.core as mx
import numpy as np

from . import machines
from .files import open_new, parse_json, read_json
from .model_files import read_header
from .screen import UserError

T = TypeVar("T")

# What a number, row or array's shape in a state must be one of: the store that reads it knows those of the run's model.
TokenId = Annotated[int, "token"]
Block = Annotated[int, "block"]
Position = Annotated[int, "position"]
Prompt = Annotated[list[int], "prompt"]
Scores = Annotated[np.ndarray, "candidates"]
StreamVector = Annotated[mx.array, "stream"]
Known = Mapping[str, Container[Any]]
Arrays = Mapping[str, mx.array]
NOTHING: Mapping[str, Any] = MappingProxyType({})

KEPT = 2  # states of steps
BASE_ANSWERS = "base_answers.json"  # what the base answered to held-out prompts, whichever run asked
ANSWERS = ("rollouts", "own_openings")  # of the state, what holds answers
_OURS = {"adapters.safetensors", "adapter_config.json", "run"}


def check_output(folder: Path) -> None:
    """Refuse (UserError) an output folder that holds anything but an earlier run of ours, is a file, or cannot be
    written; nothing is written."""
    why, circle = None, "links in a circle"
    try:
        folder = folder.resolve()  # new/../file is the file, whether or not there is a folder new
        folder.exists()
        if any(path.is_symlink() for path in (folder, *folder.parents)):  # from Python 3.13 on no error
            why = circle
    except (OSError, RuntimeError) as error:  # a name too long; a circle before
        why = getattr(error, "strerror", circle)
    if why is not None:
        raise UserError(f"--adapter-path {str(folder)[:80]} cannot be used ({why}); give another")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--adapter-path {folder} is a file; give a folder")
    if folder.is_dir():
        own = folder / "run"
        other = sorted({p.name for p in folder.iterdir() if not p.name.startswith(".")} - _OURS)
        record = {p.name for p in own.iterdir()} if own.is_dir() else None
        # A run that was killed at its first write has no recipe yet.
        unfinished = {"checkpoint", "reports", ".recipe.yaml.part", BASE_ANSWERS}
        ours = record is not None and ("recipe.yaml" in record or record <= unfinished)
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
    try:
        with open_new(part, 0o600) as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        put_in_place(part, path)
    except OSError:  # a full disk, or a folder of that name
        part.unlink(missing_ok=True)
        raise


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
    try:
        mx.save_safetensors(str(part), arrays)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        put_in_place(part, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: what MLX raises at a full disk
        part.unlink(missing_ok=True)
        raise OSError(getattr(error, "errno", None) or errno.EIO, str(error), str(path)) from None


def as_json(content: Any) -> bytes:
    """JSON for people and programs; a measurement that does not exist is null, since NaN is not JSON."""
    plain = json.loads(json.dumps(content, default=_plain), parse_constant=lambda _: None)
    return (json.dumps(plain, indent=2) + "\n").encode()


class RunFolder:
    """Writes the files of one run. Made by the first of them, and locked from then on, by this process alone.

    Of several machines the first alone reads and writes; the others are told what it found."""

    def __init__(self, adapters: Path):
        self.path = adapters / "run"
        self.ours = machines.here().first
        self._locked = False
        if self.ours and self.path.is_dir():
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
        """Remove an earlier run's record, not the adapters, nor what the base answered, which is not the run's."""
        for path in self.path.iterdir():
            if path.name != BASE_ANSWERS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def path_for(self, name: str) -> Path:
        """The path of a file to write, its folder made; an OSError if the run's own folder went away, which is not made
        again, or cannot be made."""
        if not self._locked:
            self._open()
        path = self.path / name
        if path.parent != self.path:
            path.parent.mkdir(exist_ok=True, mode=0o700)
        return path

    def text(self, name: str, content: str) -> None:
        """Write a text file."""
        if self.ours:
            write(self.path_for(name), content.encode())

    def json(self, name: str, content: Any) -> None:
        """Write plain data and numpy arrays."""
        self.text(name, as_json(content).decode())

    def lines(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write plain data as JSON, a line a row."""
        self.text(name, "".join(json.dumps(row) + "\n" for row in rows))

    def yaml(self, name: str, content: dict[str, Any]) -> None:
        """Write settings."""
        import yaml

        self.text(name, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def encoded(value: Any) -> Any:
    """Dataclasses as mappings, MLX's arrays as numpy's; what `as_json` takes and `decoded` reads back exactly."""
    if is_dataclass(value):
        return {f.name: encoded(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (list, tuple)):
        return [encoded(item) for item in value]
    if isinstance(value, dict):
        return {key: encoded(item) for key, item in value.items()}
    return np.array(value, np.float64) if isinstance(value, mx.array) else value


def decoded(kind: Any, plain: Any, known: Known = NOTHING) -> Any:
    """A value of this type from `encoded`'s, after JSON: null in an array, or for a number of a dataclass, is NaN;
    arrays are of float64 or, MLX's, float32. A TypedDict may hold more than it names; `Annotated[list[…], 9]` holds 9
    at most, and `Annotated[int, "token"]` is among the `known` tokens, if those are given.

    Raises:
        ValueError: it is of another type; TypeError or KeyError: of a dataclass with other fields.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        hints, items = _hints(kind), _expect(plain, dict).items()
        values = {name: math.nan if value is None and hints[name] is float else value for name, value in items}
        return kind(**{name: decoded(hints[name], value, known) for name, value in values.items()})  # type: ignore[operator]
    if is_typeddict(kind):
        if missing := sorted(kind.__required_keys__ - _expect(plain, dict).keys()):
            raise ValueError(f"no {missing[0]}")
        hints = _hints(kind).items()
        return plain | {name: decoded(hint, plain[name], known) for name, hint in hints if name in plain}
    if kind is np.ndarray:
        return np.array(_expect(plain, list), np.float64)
    if kind is mx.array:
        return mx.array(np.array(_expect(plain, list), np.float32))
    if origin is Annotated:
        what = inner[1]
        if isinstance(what, int) and isinstance(plain, list | dict) and len(plain) > what:
            raise ValueError(f"{len(plain):,} in place of at most {what:,}")
        value = decoded(inner[0], plain, known)
        if what in known:
            thing = tuple(value) if isinstance(value, list) else getattr(value, "shape", value)
            if thing not in known[what]:
                raise ValueError(f"another {what}")
        return value
    if origin is NotRequired:
        return decoded(inner[0], plain, known)
    if origin is list:
        return [decoded(inner[0], item, known) for item in _expect(plain, list)]
    if origin is dict:
        return {key: decoded(inner[1], item, known) for key, item in _expect(plain, dict).items()}
    return _expect(plain, *(inner if origin is UnionType else (kind,)))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _expect(plain: Any, *kinds: Any) -> Any:
    """A plain value that is of one of these types; a whole number is a float too, and any other type is not checked."""
    if Any in kinds or not set(kinds) <= {dict, list, str, int, float, bool, NoneType}:
        return plain
    if type(plain) in kinds or (type(plain) is int and float in kinds):
        return plain
    raise ValueError(f"{type(plain).__name__} in place of {' or '.join(kind.__name__ for kind in kinds)}")


@dataclass(frozen=True)
class SavedStep:
    """State after `step`: named arrays, and plain data beside them."""

    step: int
    arrays: dict[str, mx.array]
    data: Any


def fingerprint(*parts: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(as_json(list(parts))).hexdigest()


class Envelope(TypedDict):
    """What `keep` writes: who made it, JSON in a text, and the hash of that."""

    made_by: str | dict[str, str]
    sha256: str
    content: str


class Store(RunFolder):
    """A run's folder with the state of the run, whose tokens, blocks, prompts and shapes are `known`; `damaged` names
    the files that were found unfit for use. What made the state is told by one fingerprint, or one of each part."""

    def __init__(self, adapters: Path, fingerprint: str | dict[str, str], known: Known = NOTHING):
        super().__init__(adapters)
        self._fingerprint, self._known = fingerprint, known
        self.states = self.path / "checkpoint"
        self.damaged: list[str] = []
        self._not_kept: set[str] = set()

    def other_parts(self) -> list[str]:
        """Which parts of what made the last saved step are others than this run's; none without such a step."""
        own = self._fingerprint
        for name in self._steps() if self.ours else []:
            file = self.states / f"{name}.json"
            try:
                made_by = decoded(Envelope, read_json(file, str(file), "make the run again"))["made_by"]
            except ValueError:
                continue
            if isinstance(made_by, dict) and isinstance(own, dict):
                return [part for part in own if made_by.get(part) != own[part]]
            return [] if made_by == own else ["versions"]
        return []

    def keep(self, name: str, content: Any) -> None:
        """Keep plain data and numpy arrays under a name, in an `Envelope`, unless it is to be forgotten."""
        if name in self._not_kept:
            return
        body = as_json(content).decode()
        sha = hashlib.sha256(body.encode()).hexdigest()
        self.json(f"checkpoint/{name}.json", {"made_by": self._fingerprint, "sha256": sha, "content": body})

    def found(self, name: str) -> Any | None:
        """What was kept under a name by a run like this one, or None."""
        return machines.here().share(self._read(name) if self.ours else None)

    def _read(self, name: str) -> Any | None:
        file = self.states / f"{name}.json"
        if not file.exists():
            return None
        try:
            envelope = decoded(Envelope, read_json(file, str(file), "make the run again"))
            body = envelope["content"].encode()
            if hashlib.sha256(body).hexdigest() != envelope["sha256"]:
                raise ValueError("hash")
            return parse_json(body) if envelope["made_by"] == self._fingerprint else None
        except (ValueError, KeyError):
            self.damaged.append(file.name)
            return None

    def found_as(self, name: str, kind: type[T]) -> T | None:
        """What was kept under a name, as a dataclass of this `kind`, or None."""
        if (content := self.found(name)) is None:
            return None
        try:
            return decoded(kind, content, self._known)
        except (ValueError, TypeError, KeyError):
            self.damaged.append(f"{name}.json")
            return None

    def once(self, name: str, find: Callable[[], T], kind: type[T]) -> T:
        """What `find` finds, a dataclass of this `kind`, or what it found before."""
        if (before := self.found_as(name, kind)) is not None:
            return before
        result = find()
        self.keep(name, encoded(result))
        if machines.here().size > 1:  # of one kind of machine or of several: all go on from what the first found
            return decoded(kind, json.loads(machines.here().share(as_json(encoded(result)).decode())))
        return result

    def check_space(self, trained_bytes: int, candidates: int = 0) -> None:
        """Refuse (UserError) to begin a run whose states will not fit on the disk.

        A state is the trained weights, AdamW's two moments and the best weights so far; `KEPT` of them, one that is
        being written, and the adapters, old and new; and `candidates` for `--select-checkpoint`. All else is small
        beside 64 MB.
        """
        if not self.ours:
            return
        needed = (4 * (KEPT + 1) + 2 + candidates) * trained_bytes + 64 * 10**6
        folder = next(p for p in self.states.absolute().parents if p.exists())
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise UserError(
                f"--adapter-path {self.path.parent}: the run may write {needed / 1e6:,.0f} MB, but {folder} "
                f"has {free / 1e6:,.0f} MB free; make room, or give a folder on another disk"
            )

    def save(self, step: int, arrays: dict[str, mx.array], data: dict[str, Any]) -> None:
        """Keep the state after a step, and forget all but the last `KEPT`; later ones too, which another run made, or
        which are damaged: else the run would have gone on from them."""
        if not self.ours:
            return
        file = self.path_for(f"checkpoint/step-{step:06d}.safetensors")
        save_arrays(file, arrays)
        file.chmod(0o600)
        self.keep(file.stem, {"arrays_sha256": sha256_of(file), "data": data})
        steps = self._steps()
        recent = [name for name in steps if name <= file.stem][:KEPT]
        for old in set(steps) - set(recent):
            (self.states / f"{old}.json").unlink(missing_ok=True)
            (self.states / f"{old}.safetensors").unlink(missing_ok=True)

    def latest(self, kind: Any = dict, needed: Arrays = NOTHING, allowed: Arrays = NOTHING) -> SavedStep | None:
        """The last state that is whole, its data of this `kind`, its arrays of the shapes and types of those `needed`
        and, where they are there, of those `allowed`; a row of whole numbers is one of tokens."""
        saved = self._latest(kind, needed, allowed) if self.ours else None
        if machines.here().size == 1:
            return saved
        plain = machines.here().share(saved and [saved.step, as_json(encoded(saved.data)).decode()])
        arrays = machines.here().share_arrays(saved.arrays if saved else None)
        return plain and SavedStep(plain[0], arrays, decoded(kind, json.loads(plain[1])))

    def _latest(self, kind: Any, needed: Arrays, allowed: Arrays) -> SavedStep | None:
        like = {name: (a.shape, a.dtype) for name, a in [*allowed.items(), *needed.items()]}
        for name in self._steps():
            content, file = self._read(name), self.states / f"{name}.safetensors"
            if content is None:
                continue
            try:
                data, step = decoded(kind, content["data"], self._known), int(name.split("-")[1])
                if not read_header(file).keys() >= needed.keys() or sha256_of(file) != content["arrays_sha256"]:
                    raise ValueError("other arrays")
                arrays = mx.load(str(file))
                assert isinstance(arrays, dict)
                if any((a.shape, a.dtype) != like.get(name, (a.shape, a.dtype)) for name, a in arrays.items()):
                    raise ValueError("other arrays")
                rows = [np.array(a) for a in arrays.values() if a.ndim and not mx.issubdtype(a.dtype, mx.inexact)]
                tokens = self._known.get("token", range(2**31))
                if any(i not in tokens for row in rows for i in row.ravel().tolist()):
                    raise ValueError("other tokens")
            except (ValueError, TypeError, KeyError):
                self.damaged.append(file.name)
                continue
            mx.eval(arrays)  # now, since the file may be deleted while the run goes on
            return SavedStep(step, arrays, data)
        return None

    def _steps(self) -> list[str]:
        return sorted({f.stem for f in self.states.glob("step-*.json")}, reverse=True)

    def forget_answers(self, more: Iterable[str] = ()) -> None:
        """Nothing stays of what a model said, in this run or in one before it here; `more` are names of what holds some
        of it too, beside `ANSWERS`."""
        if not self.ours:
            return
        self._not_kept = {*ANSWERS, *more}
        states = [self.states / f"{name}.json" for name in sorted(self._not_kept)]
        for file in (self.path / BASE_ANSWERS, self.path / "transcripts.jsonl", *states):
            file.unlink(missing_ok=True)

    def forget_states(self) -> None:
        """The run is done: only its record stays."""
        shutil.rmtree(self.states, ignore_errors=True)


def sha256_of(file: Path) -> str:
    """Of a file's bytes."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
