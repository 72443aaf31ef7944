"""What a run shows: a bar or plain lines, text that nothing obeys, and how a command ends."""

import io

import pytest
from rich.console import Console

from safesteer_mlx.system import screen as progress
from safesteer_mlx.system.screen import Screen, UserError, exit_code, visible


def test_plain_lines_give_rate_and_time_left(monkeypatch, capsys):
    now = iter([100.0, 105.0, 120.0, 125.0, 200.0])
    shown = Screen()
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with shown.stage("reading") as advance:
        advance(1, 100)  # too soon for a line
        advance(40, 100, "loss 1")
        advance(50, 100)
        advance(100, 100)  # done: the stage's result says so
    assert capsys.readouterr().out.splitlines() == ["reading: 40/100, 2.0/s, 30 s left loss 1"]


def test_a_terminal_gets_a_bar_that_leaves_nothing_behind():
    screen = Screen()
    screen.console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with screen.stage("reading") as advance:
        advance(3, 10, "loss 1")
    shown = screen.console.file.getvalue()
    assert "reading" in shown and "3/10" in shown and "loss 1" in shown and "/s" in shown
    assert shown.endswith("\x1b[2K")  # erased


def test_a_terminal_breaks_a_line_between_words_and_a_command_not_at_all():
    from safesteer_mlx.recipe import STEPS

    screen = Screen()
    screen.console = Console(file=io.StringIO(), force_terminal=True, width=40, highlight=False)
    screen.line("a sentence that is longer than this terminal is wide, by some words")
    screen.line("command --with a/path/that/is/longer/than/the/line", whole=True)
    lines = screen.console.file.getvalue().splitlines()
    assert [len(line) <= 40 for line in lines] == [True, True, False] and lines[0].endswith("longer than this ")
    assert all(len(f"5 of 5: {step} (about 90 minutes left)") <= 80 for step in STEPS)


def test_a_quiet_screen_is_silent(capsys):
    screen = Screen(quiet=True)
    screen.line("said")
    screen.table("t", ["a"], [["b"]])
    with screen.stage("reading") as advance:
        advance(1, 1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("seed = -1 is too small\x1b[2J; raise it"), 2, "seed = -1 is too small⟨U+001B⟩[2J; raise it"),
        (OSError(28, "No space left on device", "/a/b"), 2, "/a/b (No space left on device); mend that"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_how_a_command_ends(error, code, said, capsys):
    def command():
        raise error

    assert exit_code(command) == code
    err = capsys.readouterr().err
    assert err.startswith("safesteer-mlx: ") and said in err and err.count("\n") == 1


def test_a_mistake_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0)
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 3) == 3  # a command within a command


def test_what_acts_unseen_is_spelled_out():
    assert visible("a\x1b[2J\u202eb\nc") == "a⟨U+001B⟩[2J⟨U+202E⟩b\nc"
    assert visible("a\nb", "") == "a⟨U+000A⟩b" and visible("é 中 🙂") == "é 中 🙂"
