"""The Markdown pages that people read: their text without code, their links and headings, and the commands in them."""

import re
from collections.abc import Iterator
from pathlib import Path

from safesteer_mlx.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("", "sh", "bash", "console")  # what the fences of commands are called

_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
# A command ends at two spaces or a #, behind which a comment stands; neither counts within quotes.
_COMMAND = re.compile(r"""(?:"[^"]*"|'[^']*'|[^\s"'#]#?|\s(?![\s#]))+""")


def parts(text: str) -> tuple[str, list[str]]:
    """A page without its code blocks, and the lines of those that may hold commands, continued ones joined."""
    prose, shell, fence, block, empty = [], [], None, False, True
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fence = line.strip().strip("`") if fence is None else None
        elif fence is not None:
            shell += [line] if fence in SHELL else []
        elif line.startswith("    ") and (block or empty):
            block = True
            shell.append(line)
        else:
            block = block and not line.strip()
            prose.append(line)
        empty = not line.strip()
    return "\n".join(prose), re.sub(r"\s*\\\n\s*", " ", "\n".join(shell)).splitlines()


def links(text: str) -> list[str]:
    """Where the links and images of a page lead; those within code do not count."""
    prose = _SPAN.sub("", parts(text)[0])
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose) + re.findall(r"(?:href|src)=\"([^\"]+)\"", prose)


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """The anchors of a page: its headings', repeated ones numbered, and those that it sets itself."""
    prose, seen = parts(text)[0], {}
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", prose, re.M):
        name = slug(heading)
        seen[name] = seen.get(name, -1) + 1
        if seen[name]:
            seen[f"{name}-{seen[name]}"] = 0
    return set(seen) | set(re.findall(r"<a id=\"([^\"]+)\"", prose))


def commands(text: str) -> Iterator[str]:
    """Every command of a page: the lines of its blocks, and within the text those of ours that say more than a name."""
    prose, shell = parts(text)
    for line in shell:
        found = _COMMAND.match(line.strip())
        if found and re.match(r"(\w+=\S+ )*(\./|\.venv/)?[a-z.][\w./-]*( |$)", found[0]):
            yield from (part.removeprefix(".venv/bin/") for part in found[0].split(" && "))
    for span in _SPAN.findall(prose):
        words = " ".join(span.split()).removeprefix(".venv/bin/")
        if re.match(r"(safesteer-mlx|(\./)?scripts/\w+(\.py)?|python|mlx_lm\.\w+) ", words):
            yield words if words.startswith("./") or not words.startswith("scripts/") else f"python {words}"


def flags(text: str) -> Iterator[tuple[str | None, str]]:
    """Every flag that a page names on its own, `--flag …`, or with the command alone, `command --flag …`."""
    for span in _SPAN.findall(parts(text)[0]):
        words = span.split()
        command = words.pop(0) if words[0] in COMMANDS else None
        if words and words[0].startswith("--"):
            yield from ((command, re.match(r"--[\w-]*", word)[0]) for word in words if word.startswith("--"))
