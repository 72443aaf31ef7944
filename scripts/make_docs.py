"""The pages of docs/ that are made from the code: commands.md from the parsers, api.md from the package's public names.

python scripts/make_docs.py            write both
python scripts/make_docs.py --check    write nothing; exit code 1 if a committed page is not what this writes
"""

import argparse
import inspect
import sys
import textwrap
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import safesteer_mlx
from safesteer_mlx.cli import COMMANDS
from safesteer_mlx.recipe import FIELDS, SECTIONS, Parser, _align_parser

DOCS = Path(__file__).resolve().parent.parent / "docs"
WRITTEN = "<!-- Written by scripts/make_docs.py; do not edit. -->"

COMMANDS_INTRO = """\
`safesteer-mlx COMMAND --help` shows the same on the screen, `safesteer-mlx align --help-all` all flags of `align`.
Without a command the first word is a model, which is aligned. The settings of `align` are also the keys of a YAML file
for `-c`, with underscores for hyphens, and the keyword arguments of `safesteer.align` in Python ([api.md](api.md)).

| exit code | means |
|---|---|
| 0 | done |
| 1 | `export`, `verify`: it does not answer as the student that was scored |
| 2 | something that you can mend, told in one sentence; *not aligned*; a verdict of *stop* |
| 130, 143 | ended by Ctrl-C, by SIGTERM |
| 141 | nobody read the output any more |"""

API_INTRO = """\
The names are those of the package: `import safesteer_mlx as safesteer`, then `safesteer.align`. The README has the
shortest program; `examples/align_and_compare.py`, and the notebook beside it, are longer."""


class _Found(BaseException):
    """The parser that a command was about to use."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """A command's parser, with all of its flags."""
    if command == "align":
        return _align_parser(True)

    def found(parser: Parser, *_: Any) -> None:
        raise _Found(parser)

    kept, Parser.parse_args = Parser.parse_args, found
    try:
        import_module(f"safesteer_mlx.{command}").main([])
    except _Found as stop:
        return stop.args[0]
    finally:
        Parser.parse_args = kept
    raise AssertionError(f"{command} has no parser")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("%%", "%")


def _spelling(action: argparse.Action) -> str:
    """A flag and its value, as one would type them."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return action.option_strings[0]
    words = ", ".join(action.option_strings)
    if action.nargs == 0:
        return words
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    value = action.metavar or choices
    many = {"+": f"{value} …", "*": f"[{value} …]", "?": f"[{value}]"}.get(str(action.nargs), value)
    return f"{words} {many}".strip()


def _row(action: argparse.Action) -> str:
    text = action.help or ""
    if isinstance(action, argparse.BooleanOptionalAction):
        switched_off = f"on; `{action.option_strings[1]}` switches it off"
        text += f" (default: {switched_off if FIELDS[action.dest].default else 'off'})"
    return f"| `{_spelling(action)}` | {_cell(text)} |"


def _table(actions: list[argparse.Action]) -> list[str]:
    shown = [a for a in actions if a.help is not argparse.SUPPRESS and not isinstance(a, argparse._HelpAction)]
    return ["| | what it does |", "|---|---|", *map(_row, shown), ""] if shown else []


def commands_page() -> str:
    """docs/commands.md."""
    lines = ["# Commands and flags", "", WRITTEN, "", COMMANDS_INTRO, ""]
    sections = {title: cls.__doc__ for title, cls in SECTIONS.items()}
    for name, purpose in COMMANDS.items():
        parser = parser_of(name)
        first, *groups = [group for group in parser._action_groups if group.title not in sections]
        loose = [*first._group_actions, *(action for group in groups for action in group._group_actions)]
        what = purpose[0].upper() + purpose[1:]
        lines += [f"## {name}", "", f"{what}.", "", *_table(loose)]
        for group in parser._action_groups:
            if group.title in sections:
                about = [f"### {name}: {group.title}", "", sections[group.title] or "", ""]
                lines += [*about, *_table(group._group_actions)]
    return "\n".join(lines).rstrip() + "\n"


def _type(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation).strip("'\"")
    ours = "safesteer_mlx.evals.scores.", "safesteer_mlx.system.load."
    for module in ("pathlib._local.", "pathlib.", "typing.", *ours):  # Python 3.13 writes the first
        text = text.replace(module, "")
    return text


def _signature(name: str, function: Any) -> str:
    """A function with its arguments, a line each where they are many."""
    signature, parts, starred = inspect.signature(function), [], False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        text = f"{stars}{parameter.name}: {_type(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {parameter.default!r}"
        parts.append(text)
    gives = f" -> {_type(signature.return_annotation)}"
    one = f"{name}({', '.join(parts)}){gives}"
    return one if len(one) <= 100 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){gives}"


def _told(docstring: str | None) -> list[str]:
    """A docstring as Markdown; what stands below `Args:` or `Raises:` becomes a list."""
    lines, listing = [], False
    for line in textwrap.dedent(inspect.cleandoc(docstring or "")).splitlines():
        if line in ("Args:", "Raises:", "Returns:"):
            lines += [f"{line}", ""]
            listing = True
        elif listing and line.startswith("    ") and not line.startswith("     "):
            lines.append(f"- {line.strip()}")
        else:
            listing = listing and line.startswith(" ")
            lines.append(f"  {line.strip()}" if listing else line)
    return [*lines, ""]


def _code(name: str, function: Any) -> list[str]:
    return ["```python", _signature(name, function), "```", "", *_told(function.__doc__)]


def _class(name: str, cls: type) -> list[str]:
    lines = [f"## {name}", "", *_told(cls.__doc__)]
    if name == "Recipe":
        lines += ["The settings of each section, with their defaults: [commands.md](commands.md).", ""]
    if is_dataclass(cls):
        lines += ["| field | type |", "|---|---|"]
        shown = [(f.name, _type(f.type).replace(" | ", " or ")) for f in fields(cls) if not f.name.startswith("_")]
        lines += [f"| `{field}` | `{kind}` |" for field, kind in shown] + [""]
    for method, function in vars(cls).items():
        if method.startswith("_"):
            continue
        if isinstance(function, property):
            lines += [f"**`{name}.{method}`**", "", *_told(function.__doc__)]
        elif inspect.isfunction(function) and function.__doc__:
            lines += _code(f"{name}.{method}", function)
    return lines


def api_page() -> str:
    """docs/api.md."""
    api = import_module("safesteer_mlx.api")
    lines = ["# Python API", "", WRITTEN, "", *_told(api.__doc__), API_INTRO, ""]
    names = [name for name in safesteer_mlx.__all__ if not name.startswith("_")]
    things = {name: getattr(api, name) for name in names}
    for name in ("load", "align", "evaluate"):
        lines += [f"## {name}", "", *_code(name, things[name])]
    for name, thing in things.items():
        if inspect.isclass(thing):
            lines += _class(name, thing)
    return "\n".join(lines).rstrip() + "\n"


PAGES = {"commands.md": commands_page, "api.md": api_page}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    stale = []
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if not path.is_file() or path.read_text("utf-8") != text:
            stale.append(name)
            if not args.check:
                path.write_text(text, "utf-8")
    for name in stale:
        print(f"docs/{name} {'is not what the code says; run scripts/make_docs.py' if args.check else 'written'}")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
