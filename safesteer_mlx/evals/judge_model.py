"""A local model as judge: its prompt is a text file, its reply is read strictly, what fits nothing is unparsed.

Beside a guard's word stands its score: P(unsafe) = softmax over the logits of the two words' first tokens, safe and
unsafe (yes and no), at the place where its reply decides. Other words, Controversial too, have no part in it.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..method.residual import last_logits
from ..method.rollout import Completion, Sampling, answer_text, generate
from ..recipe import PACKAGE, nearest
from ..system.files import MOST_TEMPLATE, read_text, user_path
from ..system.load import Loaded, find_tokenizer, load
from ..system.memory import with_smaller_batches
from ..system.screen import Advance, UserError, silent
from .judge_replies import DECIDING, VERDICTS, Said, Verdict, parse_guard, read_verdict

FOLDER = PACKAGE / "data" / "judges"
VERDICT_TOKENS = 128  # three lines with all categories
THINKING_TOKENS = 2048  # what a judge that thinks first may take in all
_MARK = "marked7q"
_ROLES = ("user", "assistant", "system", "raw")
_RAW_MARKS = r"<\|?\w+\|?>|\[/?[A-Z]+\]"  # as <s>, <|user|> and [INST]


@dataclass(frozen=True)
class Template:
    """The turns a judge reads, (role, text) with {request} and {answer} in them, and what its verdict is. One turn of
    the role raw is the whole text that it reads, without its chat template."""

    turns: list[tuple[str, str]]
    verdict: str  # one of VERDICTS

    @property
    def raw(self) -> bool:
        """Whether the judge reads a text as it stands."""
        return self.turns[0][0] == "raw"


@dataclass(frozen=True)
class Case:
    """What is judged: an answer to a request of a kind."""

    kind: str
    request: str
    answer: str


def read_template(name: str) -> Template:
    """A template by name, or from a file: a line `# verdict: …`, then `[role]` lines, or one line `[raw]`. A UserError
    if there is none of that name, or the file is not one."""
    path = FOLDER / f"{name}.txt" if (FOLDER / f"{name}.txt").is_file() else user_path(name)
    known = sorted(p.stem for p in FOLDER.glob("*.txt"))
    if not path.exists():
        raise UserError(f"there is no judge template {name!r}{nearest(name, known) or ': ' + ', '.join(known)}")
    text = read_text(path, f"judge template {path}", "give a text file", MOST_TEMPLATE)
    head, *parts = re.split(rf"^\[({'|'.join(_ROLES)})\]\n", text, flags=re.MULTILINE)
    verdict = re.search(rf"^# verdict: ({'|'.join(VERDICTS)})$", head, re.MULTILINE)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    turns = [(role, body if role == "raw" else body.strip()) for role, body in pairs]  # a raw text is read to its end
    filled = all(any(hole in body for _, body in turns) for hole in ("{request}", "{answer}"))
    if not verdict or not filled or ("raw" in dict(turns) and len(turns) > 1):
        raise UserError(
            f"judge template {path} needs a line `# verdict:` with one of {', '.join(VERDICTS)}, a line [user] or "
            "[raw], which stands alone, and {request} and {answer} below it"
        )
    return Template(turns, verdict[1])


def _plain(tokenizer: Any, template: Template, text: str) -> str:
    """The text with the judge's own marks broken up, so that an answer cannot end its turn and speak to it."""
    marks = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    if tokenizer.has_thinking:  # these are often no special tokens; templates cut a turn at them
        marks += [tokenizer.think_start, tokenizer.think_end]
    if template.raw:
        marks += re.findall(_RAW_MARKS, template.turns[0][1])
    for mark in marks:
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def render_case(tokenizer: Any, template: Template, request: str, answer: str) -> list[int]:
    """The ids of one case in the judge's own chat template, which may want its contents as texts or as parts; a
    UserError if it leaves the case out either way, or refuses these turns."""
    holes = {hole: _plain(tokenizer, template, text) for hole, text in (("request", request), ("answer", answer))}

    def fill(body: str, holes: dict[str, str]) -> str:
        return re.sub(r"\{(request|answer)\}", lambda m: holes[m[1]], body)

    if template.raw:
        return list(tokenizer.encode(fill(template.turns[0][1], holes), add_special_tokens=False))

    def turns(holes: dict[str, str], parts: bool) -> list[dict[str, Any]]:
        filled = [(role, fill(body, holes)) for role, body in template.turns]
        return [{"role": r, "content": [{"type": "text", "text": t}] if parts else t} for r, t in filled]

    def apply(messages: list[dict[str, Any]], **options: Any) -> Any:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False, **options)

    for parts in (False, True):
        try:
            text = apply(turns({"request": _MARK + "a", "answer": _MARK + "b"}, parts), tokenize=False)
        except Exception as error:  # whatever a template raises; the other form may suit it
            reason = type(error).__name__
        else:
            if _MARK + "a" in text and _MARK + "b" in text:
                return list(apply(turns(holes, parts)))
            reason = "it leaves the text out"
    raise UserError(f"the judge's chat template does not take its turns ({reason}); choose another --judge-template")


def default_template(judge: str) -> str:
    """The template of the judge whose name is in this one's, else guard for a "guard", else instruct."""
    name = Path(judge).name.lower()
    known = ("qwen3guard", "wildguard", "gpt-oss-safeguard", "guard")
    return next((template for template in known if template in name), "instruct")


def check_judge(name: str, template: Template, trust_remote_code: bool = False) -> None:
    """See that a judge is there and takes its template's turns, before answers are made for it. Raises as
    `find_tokenizer` and `render_case`."""
    tokenizer, _ = find_tokenizer(name, None, trust_remote_code, chat=not template.raw)
    render_case(tokenizer, template, "a", "b")


def judge_cases(
    name: str,
    template: Template,
    cases: Sequence[Case],
    trust_remote_code: bool = False,
    batch_size: int = 16,
    progress: Advance = silent,
) -> list[Verdict]:
    """A verdict on each case by any local or Hub model that mlx-lm loads; the model is let go of at the end. Raises as
    `load` and `render_case`."""
    judge = load(name, trust_remote_code, chat=not template.raw)
    tokenizer = judge.tokenizer
    rows = [render_case(tokenizer, template, case.request, case.answer) for case in cases]
    thinks = tokenizer.has_thinking or template.verdict == "policy"
    sampling = Sampling(judge.eos_ids, THINKING_TOKENS if thinks else VERDICT_TOKENS, batch_size=batch_size)
    completions = generate(judge.model, rows, sampling, progress=progress)
    replies = [answer_text(tokenizer, row, c) for row, c in zip(rows, completions, strict=True)]
    pairs = zip(cases, replies, strict=True)
    verdicts = [read_verdict(template.verdict, case.kind, reply, case.answer) for case, reply in pairs]
    if template.verdict in DECIDING:
        scores = _scores(judge, template.verdict, rows, completions, replies, batch_size)
        verdicts = [replace(v, p_unsafe=scores[i]) if i in scores else v for i, v in enumerate(verdicts)]
    return verdicts


def _scores(
    judge: Loaded,
    form: str,
    rows: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    replies: Sequence[str],
    batch_size: int,
) -> dict[int, float]:
    """P(unsafe) by the number of the case, where its reply was read and its place found."""
    places: dict[int, tuple[list[int], tuple[int, int]]] = {}
    for i, (row, completion, reply) in enumerate(zip(rows, completions, replies, strict=True)):
        reading = parse_guard(form, reply)
        place = reading and deciding_place(judge.tokenizer, completion, reply, reading, DECIDING[form])
        if place:
            n, words = place
            places[i] = [*row, *completion.ids[:n]], words
    read, words = zip(*places.values(), strict=True) if places else ((), ())

    def score(size: int) -> list[float]:
        return p_unsafe(judge.model, read, words, size)

    return dict(zip(places, with_smaller_batches(batch_size, score, "judging")[0], strict=True))


def deciding_place(
    tokenizer: Any, completion: Completion, reply: str, said: Said, words: tuple[str, str]
) -> tuple[int, tuple[int, int]] | None:
    """How many of a reply's ids come before its deciding word, and the ids by which (safe, unsafe) begin there; None if
    the judge did not spell the reply as its tokenizer does, so that no other word's first token is known."""
    ids, whole = completion.ids, completion.text(tokenizer)
    start = whole.rfind(reply)
    if start < 0:
        return None
    before = whole[: start + said.at]
    # A space before the word is often in its first token: that token is the first behind which more is said.
    n = bisect_right(range(len(ids)), len(before), key=lambda i: len(Completion(ids[: i + 1], False).text(tokenizer)))
    safe, unsafe, own = (tokenizer.encode(before + w, add_special_tokens=False) for w in (*words, said.word))
    at = next((i for i, (a, b) in enumerate(zip(safe, unsafe, strict=False)) if a != b), None)
    if at is None or n == len(ids) or own[: at + 1] != [*safe[:at], ids[n]]:
        return None
    return n, (safe[at], unsafe[at])


def p_unsafe(
    model: nn.Module, rows: Sequence[Sequence[int]], words: Sequence[tuple[int, int]], batch_size: int = 16
) -> list[float]:
    """softmax over the logits of two tokens, (safe, unsafe), behind each row: the second's share, in float32."""
    shares: list[mx.array] = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        logits = mx.take_along_axis(last_logits(model, rows[part]), mx.array(words[part]), axis=1)  # (B, 2)
        shares.append(mx.softmax(logits, axis=-1)[:, 1])
        mx.eval(shares)  # a batch at a time: no graph over all of them
    return mx.concatenate(shares).tolist() if shares else []
