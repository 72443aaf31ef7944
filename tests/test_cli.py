"""The console script: the first word decides, a misspelt command is one sentence, nothing heavy for --help."""

import json
import re
import subprocess
import sys
from importlib import import_module

import pytest

from safesteer_mlx import __version__
from safesteer_mlx.cli import COMMANDS, command_of, main


@pytest.fixture
def asked(monkeypatch):
    """What each command's own main was given, instead of running it."""
    found = []

    def note(name):
        def command(argv):
            found.append((name, argv))
            return 3

        return command

    for name in COMMANDS:
        monkeypatch.setattr(import_module(f"safesteer_mlx.{name}"), "main", note(name))
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gets_the_words_after_it_and_its_code_is_returned(name, asked):
    assert main([name, "one", "--two"]) == 3
    assert asked == [(name, ["one", "--two"])]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["org/name", "--seed", "1"],
        ["./chat"],
        ["/models/chat/"],
        ["chats/"],
        ["tiny-chat"],  # the bundled model's name is close to a command's
        ["gpt2"],
        ["--seed", "1", "chat"],
        ["--model", "tokens"],
        [""],
    ],
    ids=" ".join,
)
def test_without_a_command_a_model_is_aligned(argv, asked):
    assert main(argv) == 3
    assert asked == [("align", argv)]


def test_a_command_wins_over_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat").mkdir()
    assert command_of(["chat", "x"]) == ("chat", ["x"])
    assert command_of(["./chat", "x"]) == ("align", ["./chat", "x"])


def test_a_folder_whose_name_is_close_to_a_command_is_a_model(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats").mkdir()
    assert main(["chats"]) == 3
    assert asked == [("align", ["chats"])]


@pytest.mark.parametrize(
    ("word", "meant"), [("evalute", "evaluate"), ("chats", "chat"), ("token", "tokens"), ("train", "align")]
)
def test_a_misspelt_command_is_one_sentence(word, meant, asked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([word, "--seed", "1"]) == 2
    said = capsys.readouterr().err
    assert word in said and said.endswith(f"did you mean {meant}?\n") and said.count("\n") == 1
    assert not asked


def test_arguments_come_from_the_command_line(asked, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["safesteer-mlx", "tokens", "run"])
    assert main() == 3
    assert asked == [("tokens", ["run"])]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_command_and_who_wins(flag, capsys):
    assert main([flag]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in COMMANDS)
    assert "./chat" in said and all(len(line) <= 80 for line in said.splitlines())


def test_align_shows_the_flags_that_people_need_and_all_if_asked(capsys):
    from safesteer_mlx.recipe import FIELDS, SHOWN_FIRST

    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            main(["align", flag])
        assert not end.value.code
        out, usage = (text := capsys.readouterr().out), text.split("options:")[1]
        shown[flag] = {name for name in FIELDS if f"\n  --{name.replace('_', '-')}" in usage}
        assert all(len(line) <= 80 for line in usage.splitlines() if not line.startswith("  --")) and "None" not in out
        shown[flag + " all"] = set(re.findall(r"^  (?:-c(?: FILE)?, )?--([a-z-]+)", usage, re.MULTILINE)) - {"help-all"}
        for group in text.split("\n  --")[1:]:
            name = group.split()[0].strip(",").replace("-", "_")
            if name in FIELDS and name in shown[flag] and FIELDS[name].default is not None:
                assert "(default:" in " ".join(group.split()), name
    assert shown["--help"] == set(SHOWN_FIRST) and shown["--help-all"] == set(FIELDS)
    assert len(shown["--help all"]) == 10


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"safesteer-mlx {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_usage_is_what_one_types(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: safesteer-mlx {name} ") and all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize("name", ["--help", "--version", "evalute", *(f"{name} --help" for name in COMMANDS)])
def test_nothing_heavy_is_imported_for_it(name):
    code = (
        "import json, sys\n"
        "from safesteer_mlx.cli import main\n"
        f"try:\n    main({name.split()})\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert not imported & {"mlx", "mlx_lm", "numpy", "rich", "transformers", "huggingface_hub", "matplotlib"}


def test_the_package_is_run_as_the_script():
    done = subprocess.run([sys.executable, "-m", "safesteer_mlx", "chats"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "did you mean chat?" in done.stderr


# --------------------------------------------------------------------------------------------------
# What all commands share
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flag", "meant"),
    [
        ("align", "--learning-rat=1", "--learning-rate"),
        ("evaluate", "--sute", "--suite"),
        ("chat", "--stear", "--steer"),
        ("tokens", "--vito", "--veto"),
        ("report", "--transcripts-in-the-report", "--transcripts-in-report"),
        ("compare", "--ouput", "--out"),
    ],
)
def test_an_unknown_flag_names_the_nearest(name, flag, meant, capsys):
    assert main([name, "one", flag]) == 2
    assert capsys.readouterr().err == f"safesteer-mlx: unknown flag {flag}; did you mean {meant}?\n"


@pytest.mark.parametrize("flag", ["-o", "--no-such-flag"])
def test_a_flag_that_is_like_none_names_none(flag, capsys):
    assert main(["align", "one", flag]) == 2
    assert capsys.readouterr().err == f"safesteer-mlx: unknown flag {flag}; see --help\n"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "compare"])
def test_a_word_too_many_is_one_sentence(name, capsys):
    assert main([name, "one", "two"]) == 2
    assert capsys.readouterr().err == "safesteer-mlx: two is one word too many; see --help\n"
