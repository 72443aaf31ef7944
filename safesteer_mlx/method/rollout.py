"""On-policy sampling in batches, through mlx-lm's own engine, the end-of-turn token kept.

Every sample has a random stream of its own, made from the run's seed and what the sample is, so that
what is drawn does not depend on which others share its batch.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..system.memory import with_smaller_batches
from ..system.screen import Advance, silent

Ids = Sequence[int]


@dataclass(frozen=True)
class Completion:
    """The ids drawn, the end-of-turn one included; `finished` is False if the length ran out first."""

    ids: list[int]
    finished: bool

    def text(self, tokenizer) -> str:
        """The completion as a reader sees it, without its end-of-turn token."""
        return tokenizer.decode(self.ids[:-1] if self.finished else self.ids, skip_special_tokens=True)


def answer_text(tokenizer: Any, prompt: Ids, completion: Completion) -> str:
    """The answer as a reader sees it, without its thinking: empty if the length ran out while it thought."""
    if not tokenizer.has_thinking:
        return completion.text(tokenizer)
    end = tokenizer.rfind_think_end(completion.ids)
    if end >= 0:
        rest = completion.ids[end + len(tokenizer.think_end_tokens) :]
        return Completion(rest, completion.finished).text(tokenizer).strip()
    opened = tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt)
    return "" if opened or tokenizer.find_think_start(completion.ids) >= 0 else completion.text(tokenizer)


def stream_key(seed: int, *which: int) -> mx.array:
    """A random key for (seed, what is drawn): folded in one number after another."""
    key = mx.random.key(seed)
    for number in which:
        key = mx.random.split(key, 2)[1] ^ mx.array([number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF], mx.uint32)
    return key


def _points(key: mx.array, count: int) -> list[float]:
    """`count` numbers in [0, 1), drawn with `key`; none so near 1 that it rounds to it."""
    points = mx.vmap(lambda k: mx.random.uniform(key=k))(mx.random.split(key, count))
    return mx.minimum(points, 1 - 2**-22).tolist()


def _sampler(points: Sequence[float], temp: float, top_p: float) -> Callable[[mx.array], mx.array]:
    """Draws where the distribution function passes each of `points`, in turn.

    The engine calls it once a row and token, so it must be few operations; drawing the numbers here would double them.
    """
    from mlx_lm.sample_utils import apply_top_p

    rest = iter(points)

    def sample(logprobs: mx.array) -> mx.array:
        if 0.0 < top_p < 1.0:
            logprobs = apply_top_p(logprobs, top_p)
        scaled = logprobs.astype(mx.float32) if temp == 1 else logprobs.astype(mx.float32) * (1 / temp)
        below = mx.cumsum(mx.exp(scaled - scaled.max(axis=-1, keepdims=True)), axis=-1)
        return mx.argmax(below > next(rest) * below[:, -1:], axis=-1)

    return sample


class _Reader:
    """Prompts for the engine, read as far as they can be read once.

    What all prompts begin with is read once, and a prompt that is asked for several samples is read once too.
    Only where the caches are plain: rotating and recurrent ones are left to the engine.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Ids]):
        from mlx_lm.models.cache import KVCache, make_prompt_cache

        self._model = model
        unique = {tuple(p) for p in prompts}
        shortest = min(map(len, unique)) - 1  # the last id is the engine's to read
        self._common = next((i for i in range(shortest) if len({p[i] for p in unique}) > 1), shortest)
        self._start = make_prompt_cache(model)
        self._plain = all(type(layer) is KVCache for layer in self._start)
        if not self._plain:
            self._common = 0
        if self._common:
            self._read(self._start, prompts[0][: self._common])

    def _read(self, cache: list[Any], ids: Ids) -> list[Any]:
        self._model(mx.array([list(ids)]), cache=cache)
        mx.eval([layer.state for layer in cache])
        return cache

    def __call__(self, prompts: Sequence[Ids]) -> tuple[list[list[int]], list[Any]]:
        """What is left to read of each prompt, and the cache of what was read (None for nothing), (N,) each."""
        counts = Counter(tuple(p) for p in prompts)
        common, start = self._common, self._start
        whole = {
            p: self._read(copy.deepcopy(start), p[common:-1])
            for p, n in counts.items()
            if n > 1 and len(p) > common + 1 and self._plain
        }
        rest = [list(p[-1:] if tuple(p) in whole else p[common:]) for p in prompts]
        return rest, [whole.get(tuple(p), start if common else None) for p in prompts]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: greedy at `temp` 0, `max_tokens` at most, `batch_size` of them at a time."""

    eos_ids: Ids
    max_tokens: int
    temp: float = 0.0
    top_p: float = 1.0
    batch_size: int = 32


def generate(
    model: nn.Module,
    prompts: Sequence[Ids],
    sampling: Sampling,
    keys: Sequence[mx.array] | None = None,
    progress: Advance = silent,
) -> list[Completion]:
    """One completion a prompt, in the prompts' order: greedy at a temperature of 0, else drawn with `keys`.

    Where memory is exhausted it begins again with half of the batch size, which changes no sample.

    Raises:
        ValueError: sampling without one key a prompt.
    """
    if not prompts:
        return []
    random = sampling.temp > 0
    if random and (keys is None or len(keys) != len(prompts)):
        raise ValueError(f"{len(prompts)} prompts need as many random keys, not {len(keys or [])}")
    model.eval()  # LoRA's dropout would act while sampling
    points = [_points(key, sampling.max_tokens + 1) for key in keys] if random and keys is not None else None

    lengths = [len(prompt) if has_equal_batches(model) else 0 for prompt in prompts]
    groups = [[i for i, own in enumerate(lengths) if own == length] for length in dict.fromkeys(lengths)]

    def draw(size: int) -> list[Completion]:
        drawn: dict[int, Completion] = {}
        for group in groups:
            samplers = points and [_sampler(points[i], sampling.temp, sampling.top_p) for i in group]
            rows, before = [prompts[i] for i in group], len(drawn)
            told = partial(_told, progress, before, len(prompts))
            own = _generate(model, rows, replace(sampling, batch_size=size), samplers, told)
            drawn |= dict(zip(group, own, strict=True))
        return [drawn[i] for i in range(len(prompts))]

    return with_smaller_batches(sampling.batch_size, draw, "sampling")[0]


def _told(progress: Advance, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def set_equal_batches(model: nn.Module) -> None:
    """From now on only prompts of one length share a batch of this model, and of views made of it: mlx-lm pads the
    caches of some architectures wrongly."""
    model._equal_batches = True


def has_equal_batches(model: nn.Module) -> bool:
    """Whether `set_equal_batches` was said of it."""
    return vars(model).get("_equal_batches", False)


def _generate(
    model: nn.Module,
    prompts: Sequence[Ids],
    sampling: Sampling,
    samplers: Sequence[Callable[[mx.array], mx.array]] | None,
    progress: Advance,
) -> list[Completion]:
    """By mlx-lm's engine, or, where that fails at an architecture even for one prompt at a time, without it."""
    from mlx_lm.models.cache import make_prompt_cache

    if has_equal_batches(model):  # then these are
        return _generate_alike(model, prompts, sampling, samplers, progress)
    alone = replace(sampling, batch_size=1)
    if not all(hasattr(layer, "merge") for layer in make_prompt_cache(model)):
        return _generate_alike(model, prompts, alone, samplers, progress)
    try:
        return _generate_together(model, prompts, sampling, samplers, progress)
    except (TypeError, AttributeError, IndexError):
        if sampling.batch_size > 1:
            raise
        return _generate_alike(model, prompts, alone, samplers, progress)


def _generate_together(
    model: nn.Module,
    prompts: Sequence[Ids],
    sampling: Sampling,
    samplers: Sequence[Callable[[mx.array], mx.array]] | None,
    progress: Advance,
) -> list[Completion]:
    from mlx_lm.generate import BatchGenerator

    batch_size, max_tokens = sampling.batch_size, sampling.max_tokens
    engine = BatchGenerator(
        model,
        stop_tokens=[[token] for token in sampling.eos_ids],
        completion_batch_size=batch_size,
        prefill_batch_size=batch_size,
    )
    # While it lives the engine has all wired in that Metal recommends; a limit that was set before holds here too.
    if limit := vars(engine).get("_old_wired_limit"):
        mx.set_wired_limit(limit)
    read = _Reader(model, prompts)
    place: dict[int, int] = {}
    tokens: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    n_finished = 0

    def feed() -> None:
        """Give the engine one batch more than it runs: every prompt that waits there holds a cache."""
        while len(place) < min(len(prompts), n_finished + 2 * batch_size):
            part = slice(len(place), len(place) + batch_size)
            rest, caches = read(prompts[part])
            uids = engine.insert(rest, [max_tokens] * len(rest), caches=caches, samplers=samplers and samplers[part])
            place.update(zip(uids, range(part.start, part.start + len(rest)), strict=True))

    feed()
    while responses := engine.next_generated():
        for r in responses:
            tokens[place[r.uid]].append(r.token)
            if r.finish_reason is not None:
                finished[place[r.uid]] = r.finish_reason == "stop"
                n_finished += 1
        progress(n_finished, len(prompts))
        feed()
    engine.close()
    return [Completion(ids, end) for ids, end in zip(tokens, finished, strict=True)]


def _generate_alike(
    model: nn.Module,
    prompts: Sequence[Ids],
    sampling: Sampling,
    samplers: Sequence[Callable[[mx.array], mx.array]] | None,
    progress: Advance,
) -> list[Completion]:
    """Prompts of one length, or one at a time, with the model's own caches: nothing is padded, and rows that have
    finished go on unheard until the last one has."""
    from mlx_lm.models.cache import make_prompt_cache

    completions: list[Completion] = []
    for start in range(0, len(prompts), sampling.batch_size):
        part = slice(start, start + sampling.batch_size)
        own, cache = samplers and samplers[part], make_prompt_cache(model)
        tokens = mx.array([list(prompt) for prompt in prompts[part]])
        ids: list[list[int]] = [[] for _ in prompts[part]]
        finished = [False] * len(ids)
        for _ in range(sampling.max_tokens):
            logits = model(tokens, cache=cache)[:, -1]
            scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            drawn = [own[i](scores[i : i + 1]) for i in range(len(ids))] if own else [scores.argmax(-1)]
            tokens = mx.concatenate(drawn)[:, None]
            for i, token in enumerate(tokens[:, 0].tolist()):
                if not finished[i]:
                    ids[i].append(token)
                    finished[i] = token in sampling.eos_ids
            if all(finished):
                break
        completions += [Completion(*row) for row in zip(ids, finished, strict=True)]
        progress(len(completions), len(prompts))
    return completions


def answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Ids],
    sampling: Sampling,
    keys: Sequence[mx.array] | None = None,
    progress: Advance = silent,
) -> list[tuple[Completion, str]]:
    """`generate`'s completions, and each one's text as a reader sees it."""
    completions = generate(model, prompts, sampling, keys, progress)
    return [(c, answer_text(tokenizer, prompt, c)) for prompt, c in zip(prompts, completions, strict=True)]
