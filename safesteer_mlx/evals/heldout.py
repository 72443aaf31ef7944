"""Measuring one model: its answers to held-out prompts and what they do, capability, drift from the base."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..method.judge import is_correct, judge_hash, outcome, own_phrases, refusal_is_told
from ..method.losses import chunk_rows
from ..method.prompts import Instruction, PromptSets, render_all
from ..method.residual import answer_states, head
from ..method.rollout import Completion, Ids, Sampling, answer_text, generate, stream_key
from ..system import machines
from ..system.files import read_json, read_text
from ..system.load import Loaded
from ..system.memory import READ_BACK
from ..system.screen import Advance, Screen, UserError, silent
from ..system.store import as_json, decoded, encoded, fingerprint, write
from .scores import HOW, Answer, Scores

Stream = Sequence[int] | None  # the numbers that make a random key; None is greedy
Texts = list[tuple[list[int], list[int]]]  # prompts with the base's own greedy answers, on which drift is measured
KINDS = ("harmful", "harmless", "borderline")
DRIFT_PROMPTS = 64
DRIFT_BATCH = READ_BACK
PERPLEXITY_TOKENS = 512  # in one piece of a text


@dataclass(frozen=True)
class TestSet:
    """Held-out instructions by kind, and little tasks. A suite's instructions stand under its name; `kind_of` says
    which kind they are, where it is not the name."""

    kinds: dict[str, list[Instruction]]
    capability: list[Instruction]
    kind_of: Mapping[str, str] = field(default_factory=dict)

    def of_kind(self, kind: str) -> list[Instruction]:
        """All instructions of a kind, whichever set they are of."""
        return [item for name, items in self.kinds.items() if self.kind_of.get(name, name) == kind for item in items]


def first_of_each(items: Sequence[Instruction], n: int | None) -> list[Instruction]:
    """The first `n` of each category, in order; all for None."""
    seen: dict[str, int] = {}
    first = []
    for item in items:
        seen[item.category] = seen.get(item.category, 0) + 1
        if n is None or seen[item.category] <= n:
            first.append(item)
    return first


def held_out_prompts(sets: PromptSets, n: int | None) -> tuple[dict[str, list[Instruction]], list[Instruction]]:
    """The first `n` prompts of each kind, and of each little task; all for None."""
    return {kind: getattr(sets, f"{kind}_test")[:n] for kind in KINDS}, first_of_each(sets.capability_test, n)


class BaseAnswers:
    """What the base answers to held-out prompts, each drawn once.

    With a `file` they are kept there, readable by their owner alone, for as long as model, sampling, judge and versions
    are the same.
    """

    def __init__(self, base: Loaded, sampling: Sampling, file: Path | None = None):
        self._base, self._sampling, self._file = base, sampling, file
        kept = machines.here().share(encoded({} if file is None else self._read(file)))
        self._found = decoded(dict[str, Completion], kept)

    @cached_property
    def _made_by(self) -> str:
        how = self._sampling
        versions = [version(name) for name in ("mlx", "mlx-lm", "transformers")]
        model, judge = (self._base.weights_hash, self._base.settings_hash), (judge_hash(), own_phrases())
        ends = how.max_tokens, sorted(how.eos_ids), how.after and asdict(how.after), judge  # who says when they end
        return fingerprint(model, versions, *ends)

    def _read(self, file: Path) -> dict[str, Completion]:
        try:
            content = read_json(file, str(file), "")
            if content["made_by"] == self._made_by:
                answers = decoded(dict[str, Completion], content["answers"], {"token": range(self._base.vocabulary)})
                if all(len(c.ids) <= self._sampling.max_tokens for c in answers.values()):
                    return answers
        except (ValueError, TypeError, KeyError):
            pass
        return {}  # nothing, or nothing of ours: it is drawn again

    def __call__(
        self, prompts: Sequence[Ids], streams: Sequence[Stream], whole: bool = False, progress: Advance = silent
    ) -> list[Completion]:
        """The answer to each prompt, with the random key that its stream's numbers make, greedy where it is None;
        `whole` takes none that was cut."""
        keys = [fingerprint([int(i) for i in p], stream) for p, stream in zip(prompts, streams, strict=True)]
        known = {key for key, c in self._found.items() if not (whole and c.cut)}
        new = {key: i for i, key in enumerate(keys) if key not in known}
        if not new:
            return [self._found[key] for key in keys]
        how = replace(self._sampling, temp=1.0, enough=None if whole else self._sampling.enough)
        random = [stream and stream_key(*stream) for stream in (streams[i] for i in new.values())]
        completions = generate(self._base.model, [prompts[i] for i in new.values()], how, random, progress)
        self._found |= dict(zip(new, completions, strict=True))
        if self._file is not None:
            with contextlib.suppress(OSError):  # then they are drawn again another time
                write(self._file, as_json({"made_by": self._made_by, "answers": encoded(self._found)}))
        return [self._found[key] for key in keys]


def base_texts(answers: BaseAnswers, harmless: list[list[int]]) -> Texts:
    """Harmless prompts and the base's greedy answers to them, to their end."""
    completions = answers(harmless, [None] * len(harmless), whole=True)
    return [(prompt, c.ids) for prompt, c in zip(harmless, completions, strict=True)]


def drift(base: nn.Module, model: nn.Module, texts: Texts, tokens: Sequence[int]) -> tuple[float, float]:
    """Mean per-token KL(base ‖ model) on the base's harmless answers: over all tokens, and without `tokens`.

    NaN is what cannot be measured: no harmless answers, or no safety tokens to leave out.
    """
    if not texts:
        return float("nan"), float("nan")
    if model is base:
        return 0.0, 0.0 if len(tokens) else float("nan")
    ids = mx.array([int(t) for t in tokens], mx.int32)
    heads = head(base), head(model)

    def of_batch(start: int) -> tuple[float, float, int]:
        total = outside = 0.0
        prompts, answers = zip(*texts[start : start + DRIFT_BATCH], strict=True)
        states = [answer_states(m, prompts, answers) for m in (base, model)]
        chunk = chunk_rows(heads[0](states[0][None, :1]).shape[-1])
        for at in range(0, len(states[0]), chunk):
            zb, zm = (h(x[None, at : at + chunk])[0] for h, x in zip(heads, states, strict=True))
            total += summed_kl(zb, zm)
            if ids.size:
                zb[:, ids] = -mx.inf
                zm[:, ids] = -mx.inf
                outside += summed_kl(zb, zm)
        return total, outside, len(states[0])

    starts = range(0, len(texts), DRIFT_BATCH)
    sums = machines.here().each(starts, lambda own: [of_batch(start) for start in own])
    total, outside, count = (sum(column) for column in zip(*sums, strict=True))
    return total / count, outside / count if ids.size else float("nan")


def summed_kl(zp: mx.array, zq: mx.array) -> float:
    """Σ over positions of KL(softmax zp ‖ softmax zq) in float32, nats; ids at −inf in both left out: (C, V) both."""
    p, q = (z - mx.logsumexp(z, axis=-1, keepdims=True) for z in (zp.astype(mx.float32), zq.astype(mx.float32)))
    return mx.where(p > -mx.inf, mx.exp(p) * (p - q), 0.0).sum().item()


def until_told(sampling: Sampling, tokenizer: Any) -> Sampling:
    """The sampling, ending answers that are told to be refusals, for the keyword judge: it changes no outcome."""

    def told(prompt: Ids, ids: Ids) -> bool:
        return refusal_is_told(answer_text(tokenizer, prompt, Completion(list(ids), False)))

    return replace(sampling, enough=told)


@dataclass(frozen=True)
class HeldOut:
    """Scores models on a test set: the one scorer of `align`, `evaluate` and scripts.

    `tokens` are the safety tokens, without which drift is measured too; sampling is at temperature 1 with the streams
    of `seed`, `samples` answers to each prompt. With `whole`, for a judge that reads all, answers go on where a
    refusal is told already. The base's answers are kept in the file `kept`, if one is given.
    """

    base: Loaded
    test: TestSet
    tokens: Sequence[int]
    seed: int
    sampling: Sampling
    samples: int = 1
    whole: bool = False
    kept: Path | None = None

    @cached_property
    def base_answers(self) -> BaseAnswers:
        """The base's own."""
        return BaseAnswers(self.base, until_told(self.sampling, self.base.tokenizer), self.kept)

    @cached_property
    def texts(self) -> Texts:
        """What drift is measured on."""
        harmless = self.test.of_kind("harmless")[:DRIFT_PROMPTS]
        return base_texts(self.base_answers, render_all(self.base.tokenizer, harmless))

    def streams(self, n: int, which: int) -> list[Stream]:
        """How `n` prompts of the set `which` are answered, prompt after prompt: greedily, then `samples` times."""
        more = [[*([j] if j else [])] for j in range(self.samples)]
        return [s for i in range(n) for s in (None, *((self.seed, 2, which, i, *rest) for rest in more))]

    def draw(
        self, model: nn.Module, prompts: Sequence[Ids], streams: Sequence[Stream], progress: Advance = silent
    ) -> list[tuple[str, Completion]]:
        """Each answer and its text, greedy where its stream is None; equal prompts side by side are read once."""
        how = until_told(replace(self.sampling, temp=1.0), self.base.tokenizer)
        if model is self.base.model:
            completions = self.base_answers(prompts, streams, self.whole, progress)
        else:
            keys = [stream and stream_key(*stream) for stream in streams]
            how = replace(how, enough=None) if self.whole else how
            completions = generate(model, prompts, how, keys, progress)
        texts = (answer_text(self.base.tokenizer, *pair) for pair in zip(prompts, completions, strict=True))
        return list(zip(texts, completions, strict=True))

    def score(self, model: nn.Module, system_prompt: str | None = None, progress: Advance = silent) -> Scores:
        """Score one model: capability greedy, drift teacher-forced without system turn."""
        test, tokenizer, each = self.test, self.base.tokenizer, 1 + self.samples
        prompts = [(kind, item) for kind, items in test.kinds.items() for item in items]
        rows = [row for row in render_all(tokenizer, [item for _, item in prompts], system_prompt) for _ in range(each)]
        streams = [s for which, items in enumerate(test.kinds.values()) for s in self.streams(len(items), which)]
        rows += render_all(tokenizer, test.capability, system_prompt)
        streams += [None] * len(test.capability)
        texts = self.texts  # first, since these are drawn to their end
        replies = self.draw(model, rows, streams, progress)
        judged: dict[tuple[str, str], list[Answer]] = {}
        for n, (text, c) in enumerate(replies[: each * len(prompts)]):
            kind, item = prompts[n // each]
            how = HOW[n % each > 0]
            answer = Answer(kind, how, item.text, text, outcome(text), c.finished, c.cut)
            judged.setdefault((kind, how), []).append(answer)
        correct: dict[str, list[bool]] = {}
        for item, (text, _) in zip(test.capability, replies[each * len(prompts) :], strict=True):
            correct.setdefault(item.category, []).append(is_correct(text, item.answer))
        answers = [answer for own in judged.values() for answer in own]
        return Scores(answers, correct, *drift(self.base.model, model, texts, self.tokens), self.samples)

    def score_each(
        self, models: Mapping[str, nn.Module], screen: Screen, system_prompts: Mapping[str, str | None] | None = None
    ) -> Iterator[tuple[str, Scores]]:
        """(name, scores) of several models, one after the other, each with the system prompt that it has, if any."""
        for name, model in models.items():
            with screen.stage(f"scoring the {name}") as advance:
                scores = self.score(model, (system_prompts or {}).get(name), advance)
            yield name, scores


def perplexity(model: nn.Module, tokenizer: Any, path: Path) -> tuple[float, float, int]:
    """Perplexity of a text file, its standard error and the number of tokens scored, by mlx-lm's own measure.

    The text is cut into pieces of 512 tokens (of its own length if shorter), each read without what came before. A
    UserError if the file cannot be read, or has fewer than three tokens.
    """
    from mlx_lm.perplexity import eval_ppl

    text = read_text(path, f"--perplexity {path}", "give a text file")
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)  # longer than the model is meant
    width = min(PERPLEXITY_TOKENS, len(ids))
    if width < 3:
        raise UserError(f"--perplexity {path} holds {len(ids)} tokens; give a longer text")
    pieces = mx.array(ids[: len(ids) // width * width]).reshape(-1, width)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line a batch
        value, error = eval_ppl(model, pieces, batch_size=1)
    return value, error, pieces.shape[0] * (width - 1)
