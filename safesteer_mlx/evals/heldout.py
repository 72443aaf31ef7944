"""Measuring one model: its answers to held-out prompts and what they do, capability, drift from the base."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..method.judge import is_correct, outcome
from ..method.losses import chunk_rows
from ..method.prompts import Instruction, PromptSets, render_all
from ..method.residual import answer_states, head
from ..method.rollout import Sampling, answers, generate, stream_key
from ..system.load import Loaded
from ..system.screen import Advance, Screen, UserError, silent
from .scores import HOW, Answer, Scores

Ids = Sequence[int]
KINDS = ("harmful", "harmless", "borderline")
DRIFT_PROMPTS = 64
DRIFT_BATCH = 16
PERPLEXITY_TOKENS = 512  # in one piece of a text


@dataclass(frozen=True)
class TestSet:
    """Held-out instructions by kind, and the base's greedy answers to harmless ones, on which drift is measured.

    A suite's instructions stand under its name; `kind_of` says which kind they are.
    """

    kinds: dict[str, list[Instruction]]
    capability: list[Instruction]
    drift_prompts: list[list[int]]
    drift_answers: list[list[int]]
    kind_of: dict[str, str]


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


def make_test_set(
    base: Loaded,
    kinds: dict[str, list[Instruction]],
    capability: list[Instruction],
    sampling: Sampling,
    kind_of: dict[str, str] | None = None,
) -> TestSet:
    """The held-out prompts; the base answers some harmless ones. `kind_of` is needed for suites alone."""
    kind_of = {kind: kind for kind in kinds} | (kind_of or {})
    harmless = [item for name, items in kinds.items() if kind_of[name] == "harmless" for item in items]
    rows = render_all(base.tokenizer, harmless[:DRIFT_PROMPTS])
    return TestSet(kinds, capability, *own_answers(base, rows, sampling), kind_of)


def own_answers(base: Loaded, harmless: list[list[int]], sampling: Sampling) -> tuple[list[list[int]], list[list[int]]]:
    """Harmless prompts and the base's greedy answers to them, on which drift is measured."""
    return harmless, [c.ids for c in generate(base.model, harmless, replace(sampling, temp=0.0))]


def drift(base: nn.Module, model: nn.Module, test: TestSet, tokens: Sequence[int]) -> tuple[float, float]:
    """Mean per-token KL(base ‖ model) on the base's harmless answers: over all tokens, and without `tokens`.

    NaN is what cannot be measured: no harmless answers, or no safety tokens to leave out.
    """
    if not test.drift_prompts:
        return float("nan"), float("nan")
    if model is base:
        return 0.0, 0.0 if len(tokens) else float("nan")
    total = outside = 0.0
    count = 0
    ids = mx.array([int(t) for t in tokens], mx.int32)
    heads = head(base), head(model)
    for start in range(0, len(test.drift_prompts), DRIFT_BATCH):
        part = slice(start, start + DRIFT_BATCH)
        states = [answer_states(m, test.drift_prompts[part], test.drift_answers[part]) for m in (base, model)]
        chunk = chunk_rows(heads[0](states[0][None, :1]).shape[-1])
        for at in range(0, len(states[0]), chunk):
            zb, zm = (h(x[None, at : at + chunk])[0].astype(mx.float32) for h, x in zip(heads, states, strict=True))
            total += _kl(zb, zm)
            if ids.size:
                zb[:, ids] = -mx.inf
                zm[:, ids] = -mx.inf
                outside += _kl(zb, zm)
        count += len(states[0])
    return total / count, outside / count if ids.size else float("nan")


def _kl(zb: mx.array, zm: mx.array) -> float:
    """Σ over positions of KL(softmax zb ‖ softmax zm), ids at −inf in both left out: (C, V)."""
    lb, lm = (z - mx.logsumexp(z, axis=-1, keepdims=True) for z in (zb, zm))
    return mx.where(lb > -mx.inf, mx.exp(lb) * (lb - lm), 0.0).sum().item()


@dataclass(frozen=True)
class HeldOut:
    """Scores models on a test set: the one scorer of `align`, `evaluate` and scripts.

    `tokens` are the safety tokens, without which drift is measured too; sampling is at temperature 1 with the streams
    of `seed`, `samples` answers to each prompt.
    """

    base: Loaded
    test: TestSet
    tokens: Sequence[int]
    seed: int
    sampling: Sampling
    samples: int = 1

    def answers(
        self, model: nn.Module, prompts: Sequence[Ids], sampled: bool, stream: int = 0, progress: Advance = silent
    ) -> list[tuple[str, bool]]:
        """Each answer's text and whether it finished, `samples` of each prompt one after another if `sampled`; `stream`
        numbers the random streams of a set."""
        how, keys = replace(self.sampling, temp=1.0 if sampled else 0.0), None
        if sampled:
            which = [(i, *([j] if j else [])) for i in range(len(prompts)) for j in range(self.samples)]
            prompts = [prompts[i] for i, *_ in which]
            keys = [stream_key(self.seed, 2, stream, *one) for one in which]
        return [(text, c.finished) for c, text in answers(model, self.base.tokenizer, prompts, how, keys, progress)]

    def score(self, model: nn.Module, system_prompt: str | None = None, progress: Advance = silent) -> Scores:
        """Score one model: capability greedy, drift teacher-forced without system turn."""
        test, answers, n_answered = self.test, [], 0
        total = (1 + self.samples) * sum(map(len, test.kinds.values())) + len(test.capability)

        def advance(n: int, _: int) -> None:
            progress(n_answered + n, total)

        for which, (kind, items) in enumerate(test.kinds.items()):
            prompts = render_all(self.base.tokenizer, items, system_prompt)
            for how in HOW:
                requests = [item.text for item in items for _ in range(self.samples if how == "sampled" else 1)]
                replies = self.answers(model, prompts, how == "sampled", which, advance)
                n_answered += len(replies)
                progress(n_answered, total, "judging")
                for request, (text, finished) in zip(requests, replies, strict=True):
                    answers.append(Answer(kind, how, request, text, outcome(text), finished))
        tasks = render_all(self.base.tokenizer, test.capability, system_prompt)
        replies = self.answers(model, tasks, False, progress=advance)
        correct: dict[str, list[bool]] = {}
        for item, (text, _) in zip(test.capability, replies, strict=True):
            correct.setdefault(item.category, []).append(is_correct(text, item.answer))
        return Scores(answers, correct, *drift(self.base.model, model, test, self.tokens), self.samples)

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

    The text is cut into pieces of 512 tokens (of its own length if shorter), each read without what came before.

    Raises:
        UserError: the file cannot be read, or has fewer than three tokens.
    """
    from mlx_lm.perplexity import eval_ppl

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"--perplexity {path} cannot be read ({reason}); give a text file") from None
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)  # longer than the model is meant
    width = min(PERPLEXITY_TOKENS, len(ids))
    if width < 3:
        raise UserError(f"--perplexity {path} holds {len(ids)} tokens; give a longer text")
    pieces = mx.array(ids[: len(ids) // width * width]).reshape(-1, width)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line a batch
        value, error = eval_ppl(model, pieces, batch_size=1)
    return value, error, pieces.shape[0] * (width - 1)
