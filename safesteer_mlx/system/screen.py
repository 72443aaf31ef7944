"""What a run shows while it works: a bar with rate and time left, or plain lines where there is no terminal.

Nothing that a model said is ever shown here.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[..., None]  # advance(done, total, note="")

PLAIN_SECONDS = 15.0  # between two plain lines of one stage


class UserError(ValueError):
    """A mistake its user can mend: one sentence with the thing, the value and the remedy; exit code 2."""


def visible(text: str, keep: str = "\n") -> str:
    """`text` with what a terminal or a page would obey or hide (control, bidi and zero-width characters) spelled out.

    Characters in `keep` stay as they are.
    """
    return "".join(ch if ch.isprintable() or ch in keep else f"⟨U+{ord(ch):04X}⟩" for ch in text)


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command: its code or 0; 2 for what its user can mend, told in one sentence; 130 after Ctrl-C or SIGTERM."""
    try:
        return command() or 0
    except UserError as error:
        print(f"safesteer-mlx: {visible(str(error), '')}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, missing permissions, a folder that went away
        where = f" {error.filename}" if error.filename else ""
        reason = f"cannot read or write{where} ({error.strerror or error}); mend that, then run the same command again"
        print(f"safesteer-mlx: {visible(reason, '')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("safesteer-mlx: interrupted", file=sys.stderr)
        return 130


def silent(done: int, total: int, note: str = "") -> None:
    """A progress callback that shows nothing."""


class Screen:
    """Prints stages and their results; nothing if `quiet`, details only if `verbose`."""

    def __init__(self, quiet: bool = False, verbose: bool = False):
        from rich.console import Console

        self.console = Console(quiet=quiet, highlight=False, markup=False, emoji=False, stderr=False)
        self.verbose = verbose
        self._step = 0

    def step(self, text: str, of: int) -> None:
        """Say which step of how many begins."""
        self._step += 1
        self.line(f"{self._step} of {of}: {text}")

    def detail(self, text: str) -> None:
        """A line of result that the report has too."""
        if self.verbose:
            self.line(text)

    def line(self, text: str) -> None:
        """One line of result; markup and control characters in it are shown as text, not obeyed."""
        self.console.print(visible(text, ""), markup=False, soft_wrap=True)

    def table(self, title: str, head: list[str], rows: list[list[str]]) -> None:
        """Rows of cells; markup and control characters in them are shown as text, as in `line`."""
        from rich.table import Table
        from rich.text import Text  # a Text is shown as it is, a str as markup

        table = Table(title=Text(visible(title, "")), title_justify="left")
        for i, name in enumerate(head):
            table.add_column(Text(visible(name, "")), justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*(Text(visible(cell, "")) for cell in row))
        self.console.print(table)

    @contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """A named stage; what is yielded takes (done, total, note) and shows rate and time left."""
        if self.console.quiet:
            yield silent
        elif self.console.is_terminal:
            yield from self._bar(name)
        else:
            yield from self._plain(name)

    def _bar(self, name: str) -> Iterator[Advance]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        rate = TextColumn("{task.fields[rate]} {task.fields[note]}", markup=False)
        started = time.monotonic()
        with Progress(*columns, rate, console=self.console, transient=True) as bar:
            task = bar.add_task(visible(name, ""), total=None, rate="", note="")

            def advance(done: int, total: int, note: str = "") -> None:
                per_second = done / max(time.monotonic() - started, 1e-9)
                bar.update(task, completed=done, total=total, rate=f"{per_second:.1f}/s", note=visible(note, ""))

            yield advance

    def _plain(self, name: str) -> Iterator[Advance]:
        started = last = time.monotonic()

        def advance(done: int, total: int, note: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if done and done < total and now - last >= PLAIN_SECONDS:
                last = now
                rate = done / (now - started)
                left = (total - done) / rate
                self.line(f"{name}: {done}/{total}, {rate:.1f}/s, {left:.0f} s left {note}".rstrip())

        yield advance
