"""The ways in which one request can be put, self-written: the beginning of an answer put into the model's mouth, a
frame around the request, a dialogue before it. Half of the texts only measure, the other half only trains."""

import base64
import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from ..recipe import PACKAGE, read_yaml
from ..system.screen import UserError
from .prompts import Rows, opening_ids, render

LONGEST = 20  # tokens of an opening, at most, that training puts into the student's mouth

LEET = str.maketrans("aeiostAEIOST", "431057431057")
ENCODINGS = {
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "leetspeak": lambda text: text.translate(LEET),
    "spaced_letters": lambda text: " ".join(text),
}


@cache
def framings(half: str, kind: str) -> list[dict[str, Any]]:
    """Those of a kind (openings, systems, wrappers, encodings, turns), of the half that trains or tests."""
    return read_yaml(PACKAGE / "data" / "attacks.yaml")[half][kind]


def framed(framing: dict[str, Any], request: str) -> str:
    """The request in its frame, encoded if the frame says so."""
    if "{encoded}" in framing["text"]:
        return framing["text"].replace("{encoded}", ENCODINGS[framing["name"]](request))
    return framing["text"].replace("{request}", request)


def begun(tokenizer: Any, prompt: Sequence[int], opening: Sequence[int]) -> list[int]:
    """A prompt after which the model has said `opening` already; where its template has begun a thought, that is
    ended first."""
    closes: Sequence[int] = ()
    if tokenizer.has_thinking and tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt):
        closes = tokenizer.encode(f"\n{tokenizer.think_end}\n\n", add_special_tokens=False)
    return [*prompt, *closes, *opening]


def _opening(tokenizer: Any, request: str, opening: str) -> list[int]:
    return opening_ids(tokenizer, request, opening) or tokenizer.encode(opening, add_special_tokens=False)


def openings_of(tokenizer: Any, requests: Sequence[str], half: str) -> Rows:
    """An affirmative opening for each request, one after another of those there are."""
    texts = [framing["text"] for framing in framings(half, "openings")]
    return [_opening(tokenizer, request, texts[i % len(texts)]) for i, request in enumerate(requests)]


@dataclass(frozen=True)
class Framer:
    """Puts a share of the training prompts otherwise than as they are (ours): `prefill` of them with the answer begun,
    `wrap` of the rest in a frame or below a system prompt.

    `own` is how the base itself begins to answer some of them, by instruction.
    """

    tokenizer: Any
    prefill: float
    wrap: float
    limit: int  # tokens of a prompt
    systems: bool = False  # whether the template takes system prompts
    own: Mapping[str, list[int]] = field(default_factory=dict)

    def opening(self, request: str, rng: np.random.Generator) -> list[int] | None:
        """The first tokens of an affirmative opening, if the draw says so: of ours, or, as often, of the base's own."""
        if rng.random() >= self.prefill:
            return None
        texts = framings("train", "openings")
        which, most = rng.integers(len(texts)), rng.integers(1, LONGEST, endpoint=True)
        if request in self.own and rng.random() < 0.5:
            return self.own[request][:most]
        return _opening(self.tokenizer, request, texts[which]["text"])[:most]

    def frame(self, request: str, rng: np.random.Generator) -> list[int] | None:
        """The request's prompt in a frame or below a system prompt, if the draw says so and it is short enough."""
        if rng.random() >= self.wrap:
            return None
        frames = [*framings("train", "wrappers"), *(framings("train", "systems") if self.systems else [])]
        frame = frames[rng.integers(len(frames))]
        if "{request}" in frame["text"]:
            ids = render(self.tokenizer, framed(frame, request))
        else:
            ids = render(self.tokenizer, request, frame["text"])
        return ids if len(ids) <= self.limit else None


def takes_system_turn(tokenizer: Any) -> bool:
    """Whether the chat template has room for a system turn."""
    try:
        return render(tokenizer, "a", "b") != render(tokenizer, "a")
    except UserError:
        return False
