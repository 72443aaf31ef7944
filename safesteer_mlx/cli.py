"""The console script: `safesteer-mlx COMMAND …`, or `python -m safesteer_mlx COMMAND …`.

Each command is the module of its name, imported only when it is asked for, so that `--help` stays quick.
"""

from importlib import import_module
from pathlib import Path

from . import __version__
from .recipe import BUNDLED, nearest
from .system.screen import UserError, command_line

COMMANDS = {
    "align": "make a model safer: adapters, and the run's record beside them",
    "evaluate": "score a model, with and without adapters",
    "chat": "talk to a model and its aligned form side by side",
    "tokens": "show a run's safety tokens, write an edited set",
    "report": "make report.html from a finished run",
    "compare": "show runs side by side: settings that differ, scores with intervals",
    "export": "write what a run made for others to use, or upload it, and check it",
    "verify": "hold an export, or a running server, against what its run scored",
}


def usage() -> str:
    """What `--help` alone shows."""
    commands = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    return f"""\
usage: safesteer-mlx COMMAND …
       safesteer-mlx [MODEL] …    the same as safesteer-mlx align [MODEL] …
       safesteer-mlx --version

Make a chat model safer: align it by localized on-policy distillation
(SafeSteer).

commands (safesteer-mlx COMMAND --help lists the flags of one):
{commands}

The first word decides. The name of a command is that command, even where a
folder has the same name: ./chat is the model in the folder chat. Without any
word, the bundled model is aligned."""


def command_of(argv: list[str]) -> tuple[str, list[str]]:
    """The command that `argv` asks for, and what is left for it.

    Raises:
        UserError: the first word is neither a command nor a model, and close to a command.
    """
    word = argv[0] if argv else ""
    if word in COMMANDS:
        return word, argv[1:]
    is_model = word.startswith("-") or "/" in word or word == BUNDLED
    if not is_model and (close := nearest(word, COMMANDS)) and not Path(word).exists():
        raise UserError(f"{word!r} is no command, folder or Hub id{close}")
    return "align", argv


@command_line
def main(argv: list[str]) -> int:
    """Run the command that is asked for."""
    if argv[:1] in (["-h"], ["--help"], ["--version"]):
        print(f"safesteer-mlx {__version__}" if argv[0] == "--version" else usage())
        return 0
    name, rest = command_of(argv)
    return import_module(f".{name}", __package__).main(rest)
