"""Files that anyone may have written: regular ones of a sensible size, or one sentence.

A pipe or a device would be waited for without end.
"""

import stat
from pathlib import Path

from .screen import UserError


def check_regular(path: Path, subject: str, remedy: str, most: int | None = None) -> None:
    """Refuse, without opening it, what is no file, a pipe or a device, or is longer than `most` bytes.

    Raises:
        UserError: it is; `{subject} cannot be read (why); {remedy}`.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unreadable(subject, getattr(error, "strerror", None) or "no such name", remedy) from None
    if stat.S_ISDIR(found.st_mode):
        raise _unreadable(subject, "it is a folder", remedy)
    if not stat.S_ISREG(found.st_mode):
        raise _unreadable(subject, "it is not a regular file", remedy)
    if most is not None and found.st_size > most:
        raise _unreadable(subject, f"{found.st_size:,} bytes, and at most {most:,} are read", remedy)


def _unreadable(subject: str, why: str, remedy: str) -> UserError:
    return UserError(f"{subject} cannot be read ({why}); {remedy}")
