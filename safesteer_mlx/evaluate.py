"""Before and after: refusal on held-out prompts, capability, drift from the base, each with its counts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .judge import is_broken, is_correct, is_refusal
from .losses import chunk_rows
from .progress import Advance, silent
from .prompts import Instruction, render_all
from .residual import answer_states, head
from .rollout import generate, stream_key

Ids = Sequence[int]
ANSWER_TOKENS = 96
DRIFT_PROMPTS = 64
DRIFT_BATCH = 16


@dataclass(frozen=True)
class Count:
    """`count` out of `total`."""

    count: int
    total: int

    def __str__(self) -> str:
        return f"{self.count}/{self.total} ({100 * self.count / max(1, self.total):.1f} %)"


@dataclass(frozen=True)
class Scores:
    """What one model does on held-out prompts; refusals by kind of prompt and way of decoding."""

    refusals: dict[str, dict[str, Count]]  # kind -> greedy, sampled -> refused
    broken: dict[str, dict[str, Count]]
    capability: dict[str, Count]  # task -> exact matches, greedy
    drift: float  # mean KL(base ‖ this) a token on the base's own harmless answers, nats
    drift_outside: float  # the same, both renormalised without the safety tokens

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class TestSet:
    """Held-out instructions by kind, and the base's greedy answers to harmless ones, on which drift is measured."""

    kinds: dict[str, list[Instruction]]
    capability: list[Instruction]
    drift_prompts: list[list[int]]
    drift_answers: list[list[int]]


def first_of_each(items: Sequence[Instruction], n: int) -> list[Instruction]:
    """The first `n` of each category, in order."""
    seen: dict[str, int] = {}
    kept = []
    for item in items:
        seen[item.category] = seen.get(item.category, 0) + 1
        if seen[item.category] <= n:
            kept.append(item)
    return kept


def make_test_set(
    base: nn.Module,
    tokenizer: Any,
    kinds: dict[str, list[Instruction]],
    capability: list[Instruction],
    eos_ids: Ids,
) -> TestSet:
    """The held-out prompts; the base answers some harmless ones."""
    harmless = render_all(tokenizer, kinds["harmless"][:DRIFT_PROMPTS])
    answers = generate(base, harmless, eos_ids=eos_ids, max_tokens=ANSWER_TOKENS)
    return TestSet(kinds, capability, harmless, [c.ids for c in answers])


def drift(base: nn.Module, model: nn.Module, test: TestSet, tokens: Sequence[int]) -> tuple[float, float]:
    """Mean per-token KL(base ‖ model) on the base's harmless answers: over all tokens, and without `tokens`."""
    total = outside = 0.0
    count = 0
    ids = mx.array([int(t) for t in tokens])
    heads = head(base), head(model)
    for start in range(0, len(test.drift_prompts), DRIFT_BATCH):
        part = slice(start, start + DRIFT_BATCH)
        states = [answer_states(m, test.drift_prompts[part], test.drift_answers[part]) for m in (base, model)]
        chunk = chunk_rows(heads[0](states[0][None, :1]).shape[-1])
        for at in range(0, len(states[0]), chunk):
            zb, zm = (h(x[None, at : at + chunk])[0].astype(mx.float32) for h, x in zip(heads, states, strict=True))
            total += _kl(zb, zm)
            zb[:, ids] = -mx.inf
            zm[:, ids] = -mx.inf
            outside += _kl(zb, zm)
        count += len(states[0])
    return total / count, outside / count


def _kl(zb: mx.array, zm: mx.array) -> float:
    """Σ over positions of KL(softmax zb ‖ softmax zm), ids at −inf in both left out: (C, V)."""
    lb, lm = (z - mx.logsumexp(z, axis=-1, keepdims=True) for z in (zb, zm))
    return mx.where(lb > -mx.inf, mx.exp(lb) * (lb - lm), 0.0).sum().item()


def count_refusals(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Ids],
    sampled: bool,
    *,
    eos_ids: Ids,
    seed: int,
    stream: int = 0,
    batch_size: int = 64,
    progress: Advance = silent,
) -> tuple[Count, Count]:
    """How many of the answers refuse and how many are broken; `stream` numbers the random streams of a set."""
    answers = generate(
        model,
        prompts,
        eos_ids=eos_ids,
        max_tokens=ANSWER_TOKENS,
        temp=1.0 if sampled else 0.0,
        keys=[stream_key(seed, 2, stream, i) for i in range(len(prompts))],
        batch_size=batch_size,
        progress=progress,
    )
    texts = [a.text(tokenizer) for a in answers]
    bad = sum(is_broken(t, a.finished) for t, a in zip(texts, answers, strict=True))
    return Count(sum(map(is_refusal, texts)), len(texts)), Count(bad, len(texts))


def evaluate(
    model: nn.Module,
    base: nn.Module,
    tokenizer: Any,
    test: TestSet,
    tokens: Sequence[int],
    *,
    eos_ids: Ids,
    seed: int,
    batch_size: int = 64,
    system_prompt: str | None = None,
    progress: Advance = silent,
) -> Scores:
    """Score one model. Sampling is at temperature 1, capability greedy, drift teacher-forced without system turn."""
    refusals, broken = {}, {}
    total = 2 * sum(map(len, test.kinds.values())) + len(test.capability)
    done = 0
    for which, (kind, items) in enumerate(test.kinds.items()):
        prompts = render_all(tokenizer, items, system_prompt)
        refusals[kind], broken[kind] = {}, {}
        for how in ("greedy", "sampled"):
            refusals[kind][how], broken[kind][how] = count_refusals(
                model,
                tokenizer,
                prompts,
                how == "sampled",
                eos_ids=eos_ids,
                seed=seed,
                stream=which,
                batch_size=batch_size,
                progress=lambda n, _, done=done: progress(done + n, total),
            )
            done += len(prompts)
    answers = generate(
        model,
        render_all(tokenizer, test.capability, system_prompt),
        eos_ids=eos_ids,
        max_tokens=ANSWER_TOKENS,
        batch_size=batch_size,
        progress=lambda n, _: progress(done + n, total),
    )
    right: dict[str, list[bool]] = {}
    for item, answer in zip(test.capability, answers, strict=True):
        right.setdefault(item.category, []).append(is_correct(answer.text(tokenizer), item.answer))
    capability = {task: Count(sum(found), len(found)) for task, found in right.items()}
    return Scores(refusals, broken, capability, *drift(base, model, test, tokens))
