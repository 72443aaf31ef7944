"""A chat template from a stranger: a program in a model's folder, tried before anything here waits for it.

jinja2's sandbox keeps a template from files and from Python; it does not keep it from running for ever, or from
taking all memory. So each template is first rendered in a process that may take little of either: this file, run
by itself, which imports nothing of the package.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

MOST = 64_000  # characters of a template; the longest in use have some 30,000
_SECONDS, _BYTES = 1, 512 * 2**20  # of the processor, and of memory; a real template takes a hundredth of either
_WAIT = 30  # seconds until even a process that is kept waiting is given up
_WRITTEN = 1_000_000  # characters that one of the short conversations below may become
_TOO_LONG, _TOO_LARGE = 3, 4  # exit codes

_TURNS = [("user", "Why is it 7? " * 100), ("assistant", "a"), ("user", "a")]
_PARTS = [("user", [{"type": "text", "text": "a"}])]  # as some templates want it
_CONVERSATIONS = [
    [{"role": role, "content": content} for role, content in turns]
    for turns in (
        _TURNS[2:],
        _TURNS[:1],
        _TURNS,
        [("system", "a"), *_TURNS],
        _PARTS,
    )
]


def check_template(name: str, template: object, special: Mapping[str, Any]) -> None:
    """Render a model's template for some conversations; what it raises is for who renders it to tell.

    `special` are the tokens that it is given by name.

    Raises:
        UserError: it is no text or too long, or takes more time or memory than any real one.
    """
    from .screen import UserError

    if isinstance(template, str) and len(template) <= MOST:
        what = _outcome(template, json.dumps(dict(special), default=str))
    elif isinstance(template, str):
        what = f"has {len(template)} characters, more than {MOST}"
    else:
        what = f"is no text but a {type(template).__name__}"
    if what:
        raise UserError(f"the chat template of model {name} {what}; choose another model")


@lru_cache
def _outcome(template: str, special: str) -> str:
    """What is wrong with it, in words, or nothing."""
    # Of this interpreter only the paths: no startup files, nothing of the working folder.
    command = [sys.executable, "-I", "-S", __file__]
    request = json.dumps({"path": [p for p in sys.path if p], "template": template, "special": json.loads(special)})
    try:
        code = subprocess.run(command, input=request.encode(), capture_output=True, timeout=_WAIT).returncode
    except subprocess.TimeoutExpired:
        code = -signal.SIGXCPU
    return {
        0: "",
        -signal.SIGXCPU: "does not end within a second",
        _TOO_LONG: f"makes more than {_WRITTEN} characters of a short conversation",
        _TOO_LARGE: f"takes more than {_BYTES >> 20} MB for a short conversation",
    }.get(code, f"breaks what renders it (exit code {code})")


def _environment() -> Any:
    """As transformers sets it up, but that `strftime_now` is the clock's."""
    from datetime import datetime

    from jinja2 import TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """The tag around what the model says, which only training code looks at."""

        tags = {"generation"}  # noqa: RUF012, as jinja2 wants it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, **how)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _longest(template: str, special: dict[str, Any]) -> int:
    """Characters of the longest conversation that it renders; those that it fails at count for nothing."""
    longest = 0
    try:
        compiled = _environment().from_string(template)
    except MemoryError:
        raise
    except Exception:
        return longest
    for turns in _CONVERSATIONS:
        for thinks in (True, False):
            given = {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": True}
            try:
                written = compiled.render(**{**special, **given, "enable_thinking": thinks, "thinking": thinks})
                longest = max(longest, len(written))
            except MemoryError:
                raise
            except Exception:  # a system turn refused, or a mistake: both are told where they matter
                continue
    return longest


def _try() -> int:
    """Render what stands on the standard input, within the limits; the exit code."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS + 1))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    except (ValueError, OSError):  # macOS takes no such limit; that of time holds
        pass
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    try:
        return _TOO_LONG if _longest(request["template"], request["special"]) > _WRITTEN else 0
    except MemoryError:
        return _TOO_LARGE


if __name__ == "__main__":
    os._exit(_try())  # at once: what a template has made need not be taken apart
