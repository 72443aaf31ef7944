"""Files that anyone may have written, read in one place: regular ones of a sensible size, or one sentence.

A pipe or a device would be waited for without end, brackets without end would overflow the stack, and numbers without
end the arithmetic of whatever reads them.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from .screen import UserError

# Bytes, by what a file is for.
MOST_SETTINGS = 200_000  # YAML, whose parser takes a second for as much
MOST_TEMPLATE = 1_000_000
MOST_RECORD = 200_000_000  # the JSON of a run
MOST_TEXT = 1_000_000_000  # prompts and texts

DEEPEST = 64  # brackets in brackets
LARGEST = 1e30  # a number; more could not be squared in float32, nor drawn


def user_path(text: str | Path) -> Path:
    """A path as a user gives it, `~` and `~name` resolved; a UserError if there is no such home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text!s:.200}: no home folder is known for its ~; write the whole path") from None


def check_regular(path: Path, subject: str, remedy: str, most: int | None = None) -> None:
    """Refuse, without opening it, what is no file, a pipe or a device, or is longer than `most` bytes: a UserError,
    `{subject} cannot be read (why); {remedy}`."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unreadable(subject, getattr(error, "strerror", None) or "no such name", remedy) from None
    if stat.S_ISDIR(status.st_mode):
        raise _unreadable(subject, "it is a folder", remedy)
    if not stat.S_ISREG(status.st_mode):
        raise _unreadable(subject, "it is not a regular file", remedy)
    if most is not None and status.st_size > most:
        raise _unreadable(subject, f"{status.st_size:,} bytes, and at most {most:,} are read", remedy)


def _unreadable(subject: str, why: str, remedy: str) -> UserError:
    return UserError(f"{subject} cannot be read ({why}); {remedy}")


def read_bytes(path: Path, subject: str, remedy: str, most: int = MOST_TEXT) -> bytes:
    """What a regular file holds; a UserError as `check_regular`, or if it cannot be read."""
    check_regular(path, subject, remedy, most)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(subject, error.strerror or str(error), remedy) from None


def read_text(path: Path, subject: str, remedy: str, most: int = MOST_TEXT, line_ends: bool = False) -> str:
    """The UTF-8 text in a regular file, without a byte-order mark; its `line_ends` as they are, or as Python has them.
    A UserError as `read_bytes`, or if it is another text."""
    content = read_bytes(path, subject, remedy, most)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _unreadable(subject, "it is not UTF-8 text", remedy) from None
    return text if line_ends else text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str | bytes) -> Any:
    """JSON within the limits; NaN and infinity, which Python writes where nothing was measured, are null.

    Raises:
        ValueError: no JSON, nested too deep, or a number too large; a JSONDecodeError says where.
    """

    def number(kind: type) -> Any:
        def parse(digits: str) -> Any:
            if not -LARGEST <= (value := kind(digits)) <= LARGEST:
                raise ValueError("a number too large")
            return value

        return parse

    try:
        content = json.loads(text, parse_int=number(int), parse_float=number(float), parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError("nested too deep") from None
    level = [content]
    for _ in range(DEEPEST):
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [item for value in inner if not isinstance(value, str | int | float | None) for item in value]
        if not level:
            return content
    raise ValueError("nested too deep")


def read_json(path: Path, subject: str, remedy: str, most: int = MOST_RECORD) -> Any:
    """The JSON in a regular file, or, if it ends in .jsonl, the list of what its lines hold. A UserError as
    `read_text`, or if it is not JSON within the limits of `parse_json`."""
    text = read_text(path, subject, remedy, most)
    lines = text.split("\n") if path.suffix == ".jsonl" else [text]
    values = []
    for number, line in enumerate(lines, 1):
        if path.suffix == ".jsonl" and not line.strip():
            continue
        try:
            values.append(parse_json(line))
        except json.JSONDecodeError as error:
            at = number if path.suffix == ".jsonl" else error.lineno
            raise UserError(f"{subject} line {at} is not JSON ({error.msg}); {remedy}") from None
        except ValueError:
            where = f" line {number}" if path.suffix == ".jsonl" else ""
            raise UserError(f"{subject}{where} is JSON nested too deep or with too long a number; {remedy}") from None
    return values if path.suffix == ".jsonl" else values[0]


def check_out(path: Path, flag: str) -> None:
    """Refuse (UserError), before any work, a file that could not be written at its end: a folder, or in none."""
    folder = path.absolute().parent
    if not os.path.isdir(folder):  # Path.is_dir raises for some names
        raise UserError(f"{flag} {path}: there is no folder {folder}; make it first")
    if os.path.isdir(path):
        raise UserError(f"{flag} {path} is a folder; give a file in it")
    if not os.access(path if os.path.lexists(path) else folder, os.W_OK):
        raise UserError(f"{flag} {path} cannot be written; check its permissions")


def open_new(path: Path, mode: int) -> BinaryIO:
    """A file to write, made now, with these permissions less those that the user's umask takes: what is there goes, and
    a link that somebody has put there, in a folder that others write too, is not followed."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb")


def write_out(path: Path, text: str) -> None:
    """Write a file that a user named: whole, or not at all and what was there before stays."""
    if path.exists() and not path.is_file():  # /dev/stdout
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f".{path.name[:200]}.part")
    try:
        with open_new(part, 0o666) as out:
            out.write(text.encode())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
