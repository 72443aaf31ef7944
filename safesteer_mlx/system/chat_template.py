"""A chat template from a stranger: a program in a model's folder, which never runs in this process.

jinja2's sandbox keeps a template from files and from Python; it does not keep it from running for ever, or from
taking all memory, and at some text of a user's alone. So a template is rendered in a process that is kept for it and
may take little of either: this file, run by itself, which imports nothing of the package.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

MOST = 64_000  # characters of a template; the longest in use have some 30,000
_SECONDS, _BYTES = 1, 512 * 2**20  # of the processor, and of memory; a real template takes a hundredth of either
_WRITTEN = 1_000_000  # characters that a conversation may become, beside eight times its own
_TOO_LONG, _TOO_LARGE = 3, 4  # exit codes

_TURNS = [("user", "Why is it 7? " * 100), ("assistant", "a"), ("user", "a")]
_PARTS = [("user", [{"type": "text", "text": "a"}])]  # as some templates want it
_CONVERSATIONS = [
    [{"role": role, "content": content} for role, content in turns]
    for turns in (_TURNS[2:], _TURNS[:1], _TURNS, [("system", "a"), *_TURNS], _PARTS)
]


class Template:
    """A model's template, in its process; has the place of jinja2's own, which transformers would render."""

    def __init__(self, name: str, template: str):
        self._name, self._template = name, template
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, **given: Any) -> str:
        """The text of what is given by name.

        Raises:
            UserError: it takes more time or memory than any real template.
            ValueError: what the template raises.
        """
        from transformers.utils import chat_template_utils

        from .screen import UserError

        now = chat_template_utils.datetime.now().isoformat()  # type: ignore[attr-defined]  # which may be a run's own
        reply = self._asked(json.dumps({"now": now, "given": given}, default=str))
        if isinstance(reply, int):
            what = {
                -signal.SIGPROF: "does not end within a second",
                _TOO_LONG: f"makes more than {_WRITTEN} characters of a conversation that is none so long",
                _TOO_LARGE: f"takes more than {_BYTES >> 20} MB for a conversation",
            }.get(reply, f"breaks what renders it (exit code {reply})")
            raise UserError(f"the chat template of model {self._name} {what}; choose another model")
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["text"]

    def _asked(self, request: str) -> dict[str, str] | int:
        """What the process answers; its exit code, if it has no answer."""
        if self._process is None:
            # Of this interpreter only the paths: no startup files, nothing of the working folder; and no Ctrl-C.
            command, pipe, none = [sys.executable, "-I", "-S", __file__], subprocess.PIPE, subprocess.DEVNULL
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=none, start_new_session=True)
            self._stop = weakref.finalize(self, _stop, self._process)
            request = json.dumps({"path": [p for p in sys.path if p], "template": self._template}) + "\n" + request
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request.encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # an interrupt: the next answer would be this one's
            self._end()
            raise
        return json.loads(line) if line.endswith(b"\n") else self._end()

    def _end(self) -> int:
        process, self._process = self._process, None
        assert process is not None
        self._stop()
        return process.returncode


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # nothing, if it has ended
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # what it did not read
            if pipe is not None:
                pipe.close()
    process.wait()


@lru_cache(maxsize=4)  # a model and its judges
def template_of(name: str, template: str) -> Template:
    """A model's template, which has rendered some conversations; what it raises is for who renders it to tell. A
    UserError if it is too long, or as `Template.render`."""
    from .screen import UserError

    if len(template) > MOST:
        what = f"has {len(template)} characters, more than {MOST}"
        raise UserError(f"the chat template of model {name} {what}; choose another model")
    tried = Template(name, template)
    for turns in _CONVERSATIONS:
        for thinks in (True, False):
            given = {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": True}
            try:
                tried.render(**given, enable_thinking=thinks, thinking=thinks)
            except UserError:
                raise
            except ValueError:  # a system turn refused, or a mistake: both are told where they matter
                continue
    return tried


def check_template(name: str, template: object) -> None:
    """Refuse (UserError) a template that is no text, or that `template_of` refuses."""
    from .screen import UserError

    if not isinstance(template, str):
        what = f"is no text but a {type(template).__name__}"
        raise UserError(f"the chat template of model {name} {what}; choose another model")
    template_of(name, template)


@contextmanager
def rendered_elsewhere(name: str) -> Iterator[None]:
    """Meanwhile transformers renders the templates of this model in processes of their own."""
    from transformers.utils import chat_template_utils

    module: Any = chat_template_utils
    own, module._compile_jinja_template = module._compile_jinja_template, lambda text: template_of(name, text)
    try:
        yield
    finally:
        module._compile_jinja_template = own


# What follows runs in the process.


def _environment(now: list[str]) -> Any:
    """As transformers sets it up; `now` holds the time that the template is told."""
    from datetime import datetime

    from jinja2 import TemplateError, ext, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(ext.Extension):
        """The tag around what the model says, which only training code looks at."""

        tags = {"generation"}  # noqa: RUF012, as jinja2 wants it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Dict:
        """`dict`, without the type's own attributes."""

        def __call__(self, *args: Any, **more: Any) -> dict[Any, Any]:
            return dict(*args, **more)

        fromkeys = staticmethod(dict.fromkeys)

    class Names(Namespace):
        """`namespace`, without Python's own names."""

        def __init__(*args: Any, **more: Any):  # type: ignore[misc]
            self, *given = args
            named = dict(*given, **more)
            for name in named:
                Names._check(name)
            Namespace.__init__(self, named)

        def __setitem__(self, name: str, value: Any) -> None:
            Names._check(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a namespace takes no name that begins with _, as {name!r:.80} does")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, **how)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, dict=Dict(), namespace=Names)
    environment.globals["strftime_now"] = lambda form: datetime.fromisoformat(now[0]).strftime(form)
    return environment


def _answer(compiled: Any, request: str, now: list[str]) -> dict[str, str]:
    """What a request comes to: a text, or what was raised."""
    content: Mapping[str, Any] = json.loads(request)
    now[:] = [content["now"]]
    try:
        text = compiled().render(content["given"])
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error)
        for prompt in (turn.get("content") for turn in content["given"]["messages"]):
            if isinstance(prompt, str) and len(prompt) > 4:  # a prompt, which is told to nobody; not our "a"
                reason = reason.replace(prompt, "…")
        return {"error": reason[:1000] or type(error).__name__}
    if len(text) > _WRITTEN + 8 * len(request):
        os._exit(_TOO_LONG)
    return {"text": text}


def _serve() -> None:
    """Render for the requests on the standard input, within the limits, one by one, to its end."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    except (ValueError, OSError):  # macOS takes no such limit; that of time holds
        pass
    start, now = json.loads(sys.stdin.readline()), [""]
    sys.path[:] = start["path"]
    environment = _environment(now)
    compiled: Any = lru_cache(lambda: environment.from_string(start["template"]))  # that too within the limits
    for request in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)  # of the processor; then the process ends, whatever it is at
        answer = json.dumps(_answer(compiled, request, now))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    try:
        _serve()
    except MemoryError:
        os._exit(_TOO_LARGE)  # at once: what a template has made need not be taken apart
    os._exit(0)
