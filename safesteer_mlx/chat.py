"""Base and aligned model side by side: `python -m safesteer_mlx.chat MODEL --adapter-path A [--steer COEFF]`.

Each answers every message, in its own conversation; one set of weights serves them all. What they say is shown
as text alone: no escape of theirs reaches the terminal.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipe import (
    MOST_FACTOR,
    MOST_LENGTH,
    MOST_SEED,
    Parser,
    adapter_folder,
    add_model_flags,
    at_least,
    model_name,
    thinking_of,
)
from .system.hub import prepare
from .system.screen import UserError, command_line, visible

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

Turns = list[dict[str, str]]

MOST_TYPED = 100_000  # characters of a message


def make_voices(base: "nn.Module", folder: Path, coeff: float | None) -> dict[str, "nn.Module"]:
    """Views of one set of weights, by name: base, aligned, and with `coeff` the teacher of the run in `folder`.

    Raises:
        UserError: the adapters do not fit, or the run has no direction for this model.
    """
    import mlx.core as mx

    from .method.residual import last_logits, steer
    from .method.student import with_adapters
    from .system.finished import Vector, read_record

    voices = {"base": base, "aligned": with_adapters(base, folder)}
    if coeff is not None:
        record = read_record(folder / "run", "direction.json", Vector)
        vector = mx.array(record["vector"], mx.float32)
        if not mx.any(vector).item():
            raise UserError(f"--steer: the teacher of {folder} is a system prompt, not a direction; leave it out")
        try:
            voices["teacher"] = steer(base, record["layer"], vector, coeff, record.get("prompts_only", False))
            mx.eval(last_logits(voices["teacher"], [[0]]))  # a vector of another width fails only when it is used
        except (ValueError, IndexError) as error:
            raise UserError(
                f"--steer: the run in {folder} holds no direction for this model ({type(error).__name__}); "
                "leave it out, or give the adapters of a run of align"
            ) from None
    return voices


def render(tokenizer: Any, turns: Turns) -> list[int]:
    """A conversation's ids, with the header of the next answer.

    Raises:
        UserError: the template refuses such a conversation.
    """
    try:
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True))
    except UserError as error:
        raise UserError(f"{error}, or begin anew with /reset") from None


class ChatSession:
    """A model and what it has read, so that a message is read and not the conversation again.

    Where a model's caches cannot be cut back (rotating and recurrent ones, once they are full), it is read again.
    """

    def __init__(self, model: "nn.Module"):
        self.model = model
        self.ids: list[int] = []  # read, or said
        self.cache: list[Any] = []

    def left_to_read(self, prompt: Sequence[int]) -> list[int]:
        """Cut back to where `prompt` begins to differ; the rest of it, its last id at least."""
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
        from mlx_lm.utils import common_prefix_len

        shared = common_prefix_len(self.ids, prompt[:-1])
        if shared and can_trim_prompt_cache(self.cache):
            trim_prompt_cache(self.cache, len(self.ids) - shared)
        else:
            shared, self.cache = 0, make_prompt_cache(self.model)
        self.ids = list(prompt)
        return self.ids[shared:]


def _told_of_its_prompt(model: "nn.Module", left: int) -> Callable[..., "mx.array"]:
    """The model for mlx-lm, of whose prompt `left` ids are still to be read: one that is steered on prompts only is
    told which those are."""
    import mlx.core as mx

    from .method.residual import of_prompts

    def call(ids: mx.array, **how: Any) -> mx.array:
        nonlocal left
        with of_prompts(model, lambda: mx.arange(ids.shape[1]) < left):
            left -= ids.shape[1]
            return model(ids, **how)

    return call


def stream(
    voices: Mapping[str, ChatSession], prompts: Mapping[str, Sequence[int]], tokenizer: Any, **options: Any
) -> Iterator[tuple[str, str]]:
    """(name, next piece of its answer), the voices in turn, until all have finished. Options as in mlx-lm."""
    from mlx_lm import stream_generate

    live = {}
    for name, voice in voices.items():
        left = voice.left_to_read(prompts[name])
        model: Any = _told_of_its_prompt(voice.model, len(left)) if name == "teacher" else voice.model
        live[name] = stream_generate(model, tokenizer, left, prompt_cache=voice.cache, **options)
    while live:
        for name in list(live):
            if (piece := next(live[name], None)) is None:
                del live[name]
            else:
                voices[name].ids.append(piece.token)
                yield name, piece.text


def _show(pieces: Iterator[tuple[str, str]], names: Sequence[str], interactive: bool) -> dict[str, str]:
    """Show the answers as they come, side by side, or each after the other where there is no terminal."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    answers = dict.fromkeys(names, "")
    if not interactive:
        for name, text in pieces:
            answers[name] += text
        for name, text in answers.items():
            print(f"{name}: {visible(text).strip()}", flush=True)
        return answers

    def columns() -> Table:
        table = Table(expand=True)
        for name in names:
            table.add_column(name, ratio=1)
        table.add_row(*(Text(visible(text)) for text in answers.values()))
        return table

    with Live(columns(), console=Console(highlight=False), auto_refresh=False) as live:
        for name, text in pieces:
            answers[name] += text
            live.update(columns(), refresh=True)
    return answers


def _line() -> str | None:
    """A line of the standard input; None of one without end, which is read past and not kept."""
    line = sys.stdin.readline(MOST_TYPED + 1)
    if len(line) <= MOST_TYPED:
        return line
    while line and not line.endswith("\n"):
        line = sys.stdin.readline(MOST_TYPED)
    return None


def _messages(interactive: bool) -> Iterator[str]:
    """What the user says, line by line, to the end of the input or /quit."""
    if interactive:
        import readline  # noqa: F401  editing and history for input()
    while True:
        try:
            line = input("> ") + "\n" if interactive else _line()
        except EOFError:
            return
        if line is None or len(line) > MOST_TYPED:
            print(f"a line of more than {MOST_TYPED:,} characters is left out", flush=True)
        elif not line or line.strip() == "/quit":
            return
        elif line.strip():
            yield line.strip()


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: an unknown flag, a wrong value, or no adapters in the folder.
    """
    parser = Parser("chat", "Talk to a base model and its aligned form side by side.")
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="Hub id or folder of the base model (default: the bundled one)")
    add("--adapter-path", type=Path, default=Path("adapters"), help="the adapters (default: adapters)")
    add("--steer", type=float, metavar="COEFF", help="the run's teacher too, steered with this coefficient")
    add("--temp", type=float, default=0.0, help="sampling temperature; 0 takes the likeliest (default: 0)")
    add("--top-p", type=float, default=1.0, help="nucleus of the sampling (default: 1)")
    add("--max-tokens", type=at_least(1, MOST_LENGTH), default=512, help="longest answer (default: 512)")
    add("--seed", type=at_least(0, MOST_SEED), default=42, help="seed of the sampling (default: 42)")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    args.model = model_name(args.model)
    up = f"and at most {MOST_FACTOR:g}"
    for flag, value, fits, least in (
        ("--steer", args.steer, args.steer is None or 0 < args.steer <= MOST_FACTOR, f"above 0, {up}"),
        ("--temp", args.temp, 0 <= args.temp <= MOST_FACTOR, f"at least 0, {up}"),
        ("--top-p", args.top_p, 0 < args.top_p <= 1, "above 0 and at most 1"),
    ):
        if not fits:
            raise UserError(f"{flag} {value} does not fit; it must be {least}")
    args.adapter_path = adapter_folder(args.adapter_path)
    args.thinking = args.thinking or thinking_of(args.adapter_path)
    return args


@command_line
def main(argv: list[str]) -> None:
    """Load, then answer every message."""
    args = parse(argv)
    prepare(args.offline)
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    from .method.rollout import Completion, answer_text
    from .method.run import most_read
    from .system.load import load

    loaded = load(args.model, args.trust_remote_code, args.thinking, args.revision)
    most = most_read(loaded.config, args.max_tokens)
    models = make_voices(loaded.model, args.adapter_path, args.steer)
    voices = {name: ChatSession(model) for name, model in models.items()}
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        print("/reset begins anew, /quit or Ctrl-D ends")
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    mx.random.seed(args.seed)
    options = {"max_tokens": args.max_tokens, "sampler": make_sampler(args.temp, args.top_p)}
    turns: dict[str, Turns] = {name: [] for name in voices}
    for message in _messages(interactive):
        if message == "/reset":
            turns = {name: [] for name in voices}
            continue
        pending = {name: [*own, {"role": "user", "content": message}] for name, own in turns.items()}
        try:
            prompts = {name: render(loaded.tokenizer, own) for name, own in pending.items()}
        except UserError as error:
            if not any(turns.values()):
                raise  # another message would not help
            print(visible(str(error), ""), flush=True)
            continue
        if (length := max(map(len, prompts.values()))) > most:
            print(f"{length:,} tokens, and {most:,} are read: left out; /reset begins anew", flush=True)
            continue
        answers = _show(stream(voices, prompts, loaded.tokenizer, **options), list(voices), interactive)
        if loaded.tokenizer.has_thinking:  # no thought goes back: templates leave it out, or refuse it (gpt-oss's)
            for name, prompt in prompts.items():
                ids = voices[name].ids[len(prompt) :]
                completion = Completion(ids, ids[-1] in loaded.eos_ids)
                answers[name] = answer_text(loaded.tokenizer, prompt, completion)
        turns = {name: [*own, {"role": "assistant", "content": answers[name]}] for name, own in pending.items()}


if __name__ == "__main__":
    sys.exit(main())
