"""What a run shows while it works: a bar with rate and time left, or plain lines where there is no terminal.

Nothing that a model said is ever shown here.
"""

import codecs
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from types import FrameType
from typing import Any

from .. import started_rank

Advance = Callable[..., None]  # advance(done, total, note="")

PLAIN_SECONDS = 15.0  # between two plain lines of one stage
FIRST_SPEAKS = 2.0  # seconds that the other processes of a launcher give to the first
HEARD_WITHIN = 1.0  # seconds, after which an interrupt that is nowhere being raised was swallowed


class UserError(ValueError):
    """A mistake its user can mend: one sentence with the thing, the value and the remedy; exit code 2."""


_PLAIN = {"→": "->", "←": "<-", "…": "...", "±": "+-", "≥": ">=", "≤": "<=", "‖": "||"}
_PLAIN |= {"Δ": "delta", "κ": "kappa", "π": "pi"} | dict(zip("−–—·×²“”’", '---|x2""\'', strict=True))


def visible(text: str, keep: str = "\n") -> str:
    """`text` with what a terminal or a page would obey or hide (control, bidi and zero-width characters) spelled out,
    but for those in `keep`."""
    return "".join(ch if ch.isprintable() or ch in keep else f"⟨U+{ord(ch):04X}⟩" for ch in text)


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command: its code or 0; 2 for what its user can mend, told in one sentence; 130 after Ctrl-C, 143 after
    SIGTERM, 141 where nobody reads the output any more."""
    settle_streams()
    came: list[int] = []
    with _signals_stop(came):
        try:
            code = command() or 0
            sys.stdout.flush()  # a full disk is told now, not by Python when it has ended
            return code
        except UserError as error:
            return _told(str(error))
        except BrokenPipeError:
            _give_up_output()
            return 141
        except OSError as error:  # a full disk, missing permissions, a folder that went away
            where = f" {error.filename}" if error.filename else ""
            reason = error.strerror or error
            return _told(f"cannot read or write{where} ({reason}); mend that, then run the same command again")
        except KeyboardInterrupt:
            for number in came and (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            code = 128 + (came[0] if came else signal.SIGINT)
            if not started_rank():
                _told("interrupted", code)
            if came:  # at once: Python would take its time to end, and to another signal end otherwise
                os._exit(code)
            return code


def command_line(run: Callable[[list[str]], int | None]) -> Callable[..., int]:
    """A command's `main`, run by `exit_code`, whose code it returns."""

    @wraps(run)
    def main(argv: list[str] | None = None) -> int:
        return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))

    return main


def _told(what: str, code: int = 2) -> int:
    if rank := started_rank():
        what = f"machine {rank + 1}: {what}"
        for number in (signal.SIGINT, signal.SIGTERM):  # mlx.launch ends the others as soon as one has ended
            signal.signal(number, lambda *_: os._exit(code))
        time.sleep(FIRST_SPEAKS)  # what went wrong on all of them is told once
    with suppress(OSError):  # nobody reads it
        print(f"safesteer-mlx: {visible(what, '')}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:
        _give_up_output()
    return code


def _written_plainly(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN.get(ch, "?") for ch in error.object[error.start : error.end]), error.end


codecs.register_error("safesteer-plain", _written_plainly)


def settle_streams() -> None:
    """A standard stream that is closed is an empty one, and a character that a terminal does not have is written with
    those that it has: an arrow is "->", and what cannot be is a "?"."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="safesteer-plain")


def _give_up_output() -> None:
    """What the standard output did not take is dropped; Python would try again at its end, and say so."""
    with suppress(OSError):  # it is no file: a test's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _interrupt_is_raised() -> bool:
    """Whether the main thread is at work on a KeyboardInterrupt, or on what was raised meanwhile."""
    now: Any = sys._current_exceptions().get(threading.main_thread().ident)
    error = now[1] if isinstance(now, tuple) else now  # before Python 3.12, and since
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


@contextmanager
def _signals_stop(came: list[int]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM raises KeyboardInterrupt, so that a run can keep what it has; the second ends the
    process. `came` holds the first. It waits for an import to end, in which a library may swallow what is raised; and
    one that is swallowed elsewhere (in a callback, where Python cannot raise; in `int("a")`) comes again."""

    def later(seconds: float, number: int, only_if: Callable[[], bool] = lambda: True) -> None:
        def again() -> None:
            if only_if():
                came.clear()
                os.kill(os.getpid(), number)

        timer = threading.Timer(seconds, again)
        timer.daemon = True
        waiting.append(timer)
        timer.start()

    def stop(number: int, frame: FrameType | None) -> None:
        if came:
            if not started_rank():
                os.write(2, b"safesteer-mlx: interrupted\n")
            os._exit(128 + came[0])
        if _importing(frame):
            return later(0.05, number)
        came.append(number)
        later(HEARD_WITHIN, number, lambda: not _interrupt_is_raised())
        raise KeyboardInterrupt

    def swallowed(unraisable: Any) -> None:
        if not (came and unraisable.exc_type is KeyboardInterrupt):
            hook(unraisable)

    if threading.current_thread() is not threading.main_thread():
        yield  # its owner decides about signals
        return
    waiting: list[threading.Timer] = []
    hook, sys.unraisablehook = sys.unraisablehook, swallowed
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, stop)
    try:
        yield
    finally:
        for timer in waiting:
            timer.cancel()
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def silent(done: int, total: int, note: str = "") -> None:
    """A progress callback that shows nothing."""


def _reraise() -> None:
    raise


def duration(seconds: float) -> str:
    """A time as a person says it, to the digit that a plan can hold."""
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} seconds"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {minutes} minutes"
    return f"about {minutes // 60} h {5 * (minutes % 60 // 5):02d} min"


class Pace:
    """How far a run is, by the seconds that its steps were planned to take and those that they took."""

    def __init__(self, planned: Sequence[float]):
        self.planned, self.expected = list(planned), list(planned)
        self.took, self.step = [], 0
        self._began = time.monotonic()

    def next(self) -> None:
        """The next step begins."""
        now = time.monotonic()
        self.took += [now - self._began] if self.step else []
        self.step, self._began = self.step + 1, now

    def correct(self, planned: Sequence[float]) -> None:
        """A plan made later, of which the steps that have not begun are taken."""
        self.expected[self.step :] = planned[self.step :]

    def more(self, seconds: float) -> None:
        """The step under way had so much to do that nobody could plan: those to come are no slower for it."""
        if self.planned and self.step:
            self.expected[self.step - 1] += seconds

    def as_json(self) -> dict[str, list[float]]:
        """Seconds that were planned at first for each step, and that each took, the one under way until now."""
        took = [*self.took, time.monotonic() - self._began]
        return {"planned": [round(s, 1) for s in self.planned], "took": [round(s, 1) for s in took]}

    def left(self, of_stage: float = 0.0, is_step: bool = False) -> float:
        """Seconds until the run's end, of which the stage under way needs so many, and its step no more if it is all of
        it; 0 where nothing is planned.

        The steps to come take as much longer than planned as those that are done did."""
        if not self.planned:
            return 0.0
        steps = len(self.took)
        slower = (sum(self.took) + self.planned[0]) / (sum(self.expected[:steps]) + self.planned[0])
        here, *later = [slower * seconds for seconds in self.expected[steps:]] or [0.0]
        planned = 0.0 if is_step else here - (time.monotonic() - self._began)
        return max(planned, of_stage) + sum(later)


class Screen:
    """Prints stages and their results; nothing if `quiet`, details only if `verbose`."""

    def __init__(self, quiet: bool = False, verbose: bool = False):
        from rich.console import Console

        settle_streams()
        self.console = Console(quiet=quiet, highlight=False, markup=False, emoji=False, stderr=False)
        self.console.on_broken_pipe = _reraise  # rich would end the process
        self.verbose = verbose
        self.pace = Pace([])

    def plan(self, seconds: Sequence[float]) -> None:
        """Say how long the steps to come are planned to take, and what is left of them from now on."""
        self.pace = Pace(seconds)
        self.line(f"time: {duration(sum(seconds))} in all, by what was measured just now")

    def step(self, steps: Sequence[str]) -> None:
        """Say which of a run's steps begins, the one after the last that did, and what is left of the run."""
        self.pace.next()
        left, n = self.pace.left(), self.pace.step
        self.line(f"{n} of {len(steps)}: {steps[n - 1]}" + (f" ({duration(left)} left)" if left else ""))

    def detail(self, text: str) -> None:
        """A line of result that the report has too."""
        if self.verbose:
            self.line(text)

    def line(self, text: str, whole: bool = False) -> None:
        """One line of result; markup and control characters in it are shown as text, not obeyed. A terminal that is too
        narrow for it breaks it between words, if it is not to stay `whole`: a command, to be pasted."""
        self.console.print(visible(text, ""), markup=False, soft_wrap=whole or not self.console.is_terminal)

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
    def stage(self, name: str, is_step: bool = False) -> Iterator[Advance]:
        """A named stage, which may be all of the run's step; what is yielded takes (done, total, note) and shows rate
        and time left."""
        if self.console.quiet:
            yield silent
        elif self.console.is_terminal:
            yield from self._bar(name, is_step)
        else:
            yield from self._plain(name, is_step)

    def _bar(self, name: str, is_step: bool) -> Iterator[Advance]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        name_shown = TextColumn("{task.description}", markup=False)
        rate = TextColumn("{task.fields[rate]} {task.fields[note]}{task.fields[whole]}", markup=False)
        columns = (name_shown, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), rate)
        started = time.monotonic()
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(visible(name, ""), total=None, rate="", note="", whole="")

            def advance(done: int, total: int, note: str = "") -> None:
                per_second = done / max(time.monotonic() - started, 1e-9)
                whole = self._whole((total - done) / max(per_second, 1e-9), is_step)
                shown = {"rate": f"{per_second:.1f}/s", "note": visible(note, ""), "whole": whole}
                bar.update(task, completed=done, total=total, **shown)

            yield advance

    def _plain(self, name: str, is_step: bool) -> Iterator[Advance]:
        started = last = time.monotonic()

        def advance(done: int, total: int, note: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if done and done < total and now - last >= PLAIN_SECONDS:
                last = now
                rate = done / (now - started)
                left = (total - done) / rate
                line = f"{name}: {done}/{total}, {rate:.1f}/s, {left:.0f} s left {note}".rstrip()
                self.line(line + self._whole(left, is_step))

        yield advance

    def _whole(self, left: float, is_step: bool) -> str:
        """What is left of the run, where the stage under way needs so many seconds."""
        whole = self.pace.left(left, is_step)
        return f"; the run: {duration(whole)} left" if whole else ""
