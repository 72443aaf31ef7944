"""On-policy sampling in batches, on mlx-lm's batch caches, the end-of-turn token kept.

mlx-lm's own engine serves what nobody asks for here: each token's log-probabilities, a sampler and a text for each row.

Every sample has a random stream of its own, made from the run's seed and what the sample is, so that
what is drawn does not depend on which others share its batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..system import machines
from ..system.memory import CACHE_STEP, with_smaller_batches
from ..system.screen import Advance, silent
from ..system.store import TokenId
from .residual import of_prompts, pad_right

Ids = Sequence[int]

ASKED_EVERY = 8  # ids
READ_AT_ONCE = 2048  # ids of each prompt
TAKEN_OUT = 4  # rows are taken out of a batch and replaced a quarter of it at a time


@dataclass(frozen=True)
class Completion:
    """The ids drawn, the end-of-turn one included; `finished` is False if the length ran out first, or if it was `cut`
    because enough was known of it."""

    ids: list[TokenId]
    finished: bool
    cut: bool = False

    def text(self, tokenizer) -> str:
        """The completion as a reader sees it, without its end-of-turn token."""
        return tokenizer.decode(self.ids[:-1] if self.finished else self.ids, skip_special_tokens=True)


def answer_text(tokenizer: Any, prompt: Ids, completion: Completion) -> str:
    """The answer as a reader sees it, without its thinking: empty if the length ran out while it thought."""
    if not tokenizer.has_thinking:
        return completion.text(tokenizer)
    if tokenizer.rfind_think_end(completion.ids) >= 0:
        return tokenizer.decode(answer_ids(tokenizer, completion), skip_special_tokens=True).strip()
    opened = tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt)
    return "" if opened or tokenizer.find_think_start(completion.ids) >= 0 else completion.text(tokenizer)


def answer_ids(tokenizer: Any, completion: Completion) -> list[TokenId]:
    """The ids of an answer without its end-of-turn token; where a thought has ended, those behind it and the blank
    lines that follow it."""
    ids = completion.ids[:-1] if completion.finished else completion.ids
    end = tokenizer.rfind_think_end(ids) if tokenizer.has_thinking else -1
    if end < 0:
        return ids
    rest = ids[end + len(tokenizer.think_end_tokens) :]
    shown = (tokenizer.decode([token], skip_special_tokens=True).strip() for token in rest)
    return rest[next((n for n, text in enumerate(shown) if text), len(rest)) :]


def stream_key(seed: int, *which: int) -> mx.array:
    """A random key for (seed, what is drawn): folded in one number after another."""
    key = mx.random.key(seed)
    for number in which:
        key = mx.random.split(key, 2)[1] ^ mx.array([number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF], mx.uint32)
    return key


def _points(keys: Sequence[mx.array], count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for each key, (N, count) float32; none so near 1 that it rounds to it."""
    uniform = mx.vmap(lambda key: mx.random.uniform(key=key))
    points = mx.vmap(lambda key: uniform(mx.random.split(key, count)))(mx.stack(list(keys)))
    return np.array(mx.minimum(points, 1 - 2**-22))


def draw(logits: mx.array, points: mx.array | None, temp: float = 1.0, top_p: float = 1.0) -> mx.array:
    """The id of each row of logits (B, V) where its distribution function passes its point (B,), below 0 or without
    points the likeliest: (B,) int.

    One operation for a batch; the points were drawn before, each row's from a stream of its own.
    """
    if points is None:
        return logits.argmax(axis=-1)
    from mlx_lm.sample_utils import apply_top_p

    scaled = logits = logits.astype(mx.float32)
    if 0.0 < top_p < 1.0:
        scaled = apply_top_p(logits - mx.logsumexp(logits, axis=-1, keepdims=True), top_p)
    if temp != 1:
        scaled = scaled * (1 / temp)
    below = mx.cumsum(mx.exp(scaled - scaled.max(axis=-1, keepdims=True)), axis=-1)
    point = points[:, None]
    ids = mx.argmax(below > point * below[:, -1:], axis=-1)
    return mx.where(points < 0, logits.argmax(axis=-1), ids)


def grown_in_small_steps(cache: list[Any]) -> list[Any]:
    """The caches, whose keys and values grow by `CACHE_STEP` positions: mlx-lm's 256 are empty for the most part, and
    copied whenever rows are replaced."""
    for layer in (part for whole in cache for part in getattr(whole, "caches", [whole])):
        if hasattr(layer, "step"):
            layer.step = CACHE_STEP
    return cache


def read_into(model: nn.Module, cache: list[Any], rows: Sequence[Ids]) -> None:
    """Feed rows (B, T) side by side to a batch's caches, padded on the right where they are of unequal length; nothing
    if there is nothing."""
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    if any(padding):
        for layer in cache:
            layer.prepare(lengths=[len(row) for row in rows], right_padding=padding)
    ids = pad_right(rows)
    for start in range(0, longest, READ_AT_ONCE):
        model(ids[:, start : start + READ_AT_ONCE], cache=cache)
        mx.eval([layer.state for layer in cache])
    if any(padding):
        for layer in cache:
            layer.finalize()
        mx.eval([layer.state for layer in cache])
    mx.clear_cache()


class _Reader:
    """Reads prompts up to their last id, side by side, each of them once, and what all begin with once for all.

    A beginning is shared only where the caches are plain: rotating and recurrent ones begin empty.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Ids]):
        from mlx_lm.models.cache import KVCache, make_prompt_cache

        self._model, self._start = model, make_prompt_cache(model)
        unique = {tuple(p) for p in prompts}
        shortest = min(map(len, unique)) - 1  # the last id is fed by itself
        common = next((i for i in range(shortest) if len({p[i] for p in unique}) > 1), shortest)
        self._common = common if all(type(layer) is KVCache for layer in self._start) else 0
        if self._common:
            read_into(model, self._start, [list(prompts[0][: self._common])])

    def __call__(self, prompts: Sequence[Ids]) -> list[Any]:
        """The caches of prompts (N,), read but for their last id."""
        rows = list(dict.fromkeys(tuple(p) for p in prompts))
        cache = [layer.merge([layer] * len(rows)) for layer in self._start]
        read_into(self._model, grown_in_small_steps(cache), [row[self._common : -1] for row in rows])
        if len(rows) < len(prompts):
            for layer in cache:
                layer.filter([rows.index(tuple(p)) for p in prompts])
        return cache


class _AlikeReader:
    """Reads prompts of one length, or one prompt, into the model's own caches, which are not taken apart."""

    def __init__(self, model: nn.Module):
        self._model = model

    def __call__(self, prompts: Sequence[Ids]) -> list[Any]:
        from mlx_lm.models.cache import make_prompt_cache

        cache, ids = grown_in_small_steps(make_prompt_cache(self._model)), mx.array([list(p[:-1]) for p in prompts])
        if ids.shape[1]:
            self._model(ids, cache=cache)
            mx.eval([layer.state for layer in cache])  # and no logits, which nobody reads
        return cache


@dataclass(frozen=True)
class AfterThought:
    """Where thinking comes first: how many `tokens` of an answer are enough behind the last `end` of its thought, whose
    ids these are. The last `begun` ids of its prompt belong to the answer already."""

    end: Ids
    tokens: int
    begun: int = 0

    def enough(self, answer: Ids) -> int | None:
        """Ids of the whole answer that are enough, by what is written of it; None before its thought has ended."""
        size = len(self.end)
        ends = [i for i in range(size, len(answer) + 1) if [*answer[i - size : i]] == [*self.end]]
        return ends[-1] + self.tokens if ends else None


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: greedy at `temp` 0, `max_tokens` at most, `batch_size` of them at a time.

    `enough`, asked of a prompt and what was answered so far every `ASKED_EVERY` ids, says that the rest of an answer
    makes no difference; `after` says so of answers that were thought about.
    """

    eos_ids: Ids
    max_tokens: int
    temp: float = 0.0
    top_p: float = 1.0
    batch_size: int = 32
    enough: Callable[[Ids, Ids], bool] | None = None
    after: AfterThought | None = None

    def most(self, prompt: Ids, ids: Ids) -> int:
        """Ids that an answer may have, by what is written of it."""
        if self.after is None:
            return self.max_tokens
        begun = self.after.begun
        enough = self.after.enough([*prompt[len(prompt) - begun :], *ids])
        return self.max_tokens if enough is None else min(self.max_tokens, enough - begun)


def generate(
    model: nn.Module,
    prompts: Sequence[Ids],
    sampling: Sampling,
    keys: Sequence[mx.array | None] | None = None,
    progress: Advance = silent,
) -> list[Completion]:
    """One completion a prompt, in the prompts' order: greedy at a temperature of 0, else drawn with its key; a prompt
    whose key is None is answered greedily too. Several machines do a part each.

    Where memory is exhausted it begins again with half of the batch size, which changes no sample.

    Raises:
        ValueError: sampling without one key a prompt.
    """
    if sampling.temp > 0 and (keys is None or len(keys) != len(prompts)):
        raise ValueError(f"{len(prompts)} prompts need as many random keys, not {len(keys or [])}")

    def part(indices: list[int]) -> list[tuple[list[int], bool, bool]]:
        rows, own = [prompts[i] for i in indices], None if keys is None else [keys[i] for i in indices]
        return [(c.ids, c.finished, c.cut) for c in generate_here(model, rows, sampling, own, progress)]

    return [Completion(*fields) for fields in machines.here().each(range(len(prompts)), part)]


def generate_here(
    model: nn.Module,
    prompts: Sequence[Ids],
    sampling: Sampling,
    keys: Sequence[mx.array | None] | None = None,
    progress: Advance = silent,
) -> list[Completion]:
    """`generate`, on this machine alone."""
    if not prompts:
        return []
    model.eval()  # LoRA's dropout would act while sampling
    points = None
    if own_keys := {i: key for i, key in enumerate(keys or []) if key is not None and sampling.temp > 0}:
        points = np.full((len(prompts), sampling.max_tokens + 1), -1, np.float32)
        points[[*own_keys]] = _points([*own_keys.values()], sampling.max_tokens + 1)

    lengths = [len(prompt) if has_equal_batches(model) else 0 for prompt in prompts]
    groups = [[i for i, own in enumerate(lengths) if own == length] for length in dict.fromkeys(lengths)]

    def work(size: int) -> list[Completion]:
        completions: dict[int, Completion] = {}
        for group in groups:
            rows, own = [prompts[i] for i in group], None if points is None else points[group]
            before = len(completions)

            def tell(done: int, _: int, before: int = before) -> None:
                progress(before + done, len(prompts))

            results = _generate(model, rows, replace(sampling, batch_size=size), own, tell)
            completions |= dict(zip(group, results, strict=True))
        return [completions[i] for i in range(len(prompts))]

    return with_smaller_batches(sampling.batch_size, work, "sampling")[0]


def set_equal_batches(model: nn.Module) -> None:
    """From now on only prompts of one length share a batch of this model, and of views made of it: mlx-lm pads the
    caches of some architectures wrongly."""
    model._equal_batches = True


def has_equal_batches(model: nn.Module) -> bool:
    """Whether `set_equal_batches` was said of it."""
    return vars(model).get("_equal_batches", False)


def _generate(
    model: nn.Module, prompts: Sequence[Ids], sampling: Sampling, points: np.ndarray | None, progress: Advance
) -> list[Completion]:
    """Side by side in mlx-lm's batch caches, or, where those fail at an architecture even for one prompt at a time,
    without them."""
    from mlx_lm.models.cache import make_prompt_cache

    if has_equal_batches(model):  # then these are
        return _decode(model, prompts, sampling, points, progress, _AlikeReader(model))
    alone = replace(sampling, batch_size=1)
    if not all(hasattr(layer, "merge") for layer in make_prompt_cache(model)):
        return _decode(model, prompts, alone, points, progress, _AlikeReader(model))
    try:
        return _decode(model, prompts, sampling, points, progress, _Reader(model, prompts))
    except (TypeError, AttributeError, IndexError):
        if sampling.batch_size > 1:
            raise
        return _decode(model, prompts, alone, points, progress, _AlikeReader(model))


def _decode(
    model: nn.Module,
    prompts: Sequence[Ids],
    sampling: Sampling,
    points: np.ndarray | None,
    progress: Advance,
    read: _Reader | _AlikeReader,
) -> list[Completion]:
    """Draw id after id for a batch of rows; `points` (N, max_tokens + 1) as `draw` takes them, a column an id.

    The next ids are on their way before the last are looked at, so that the device never waits for Python. A row that
    has finished goes on unheard until there are enough of them to be worth taking out of the caches and replacing.
    """
    ids: list[list[int]] = [[] for _ in prompts]
    most = [sampling.most(prompt, []) for prompt in prompts]
    completions: dict[int, Completion] = {}
    together = isinstance(read, _Reader)
    rows: list[int] = []  # in the batch
    unread: set[int] = set()  # those of them whose prompt's last id is still to be fed
    cache: list[Any] = []
    last = mx.array([], mx.int32)  # what was last drawn of each row
    n_begun = n_steps = 0
    while len(completions) < len(prompts):
        over = [i for i, row in enumerate(rows) if row in completions]
        if len(over) == len(rows):
            rows, cache, last = [], [], last[:0]
        elif together and len(over) * TAKEN_OUT >= sampling.batch_size:
            left = [i for i in range(len(rows)) if i not in over]
            for layer in cache:
                layer.filter(left)
            rows, last = [rows[i] for i in left], last[mx.array(left)]
        free = sampling.batch_size - len(rows)
        if n_begun < len(prompts) and (not rows or (together and free * TAKEN_OUT >= sampling.batch_size)):
            new = range(n_begun, min(len(prompts), n_begun + free))
            n_begun, own = new.stop, read([prompts[i] for i in new])
            for layer, other in zip(cache, own, strict=True) if cache else ():
                layer.extend(other)
            cache, rows = cache or own, [*rows, *new]
            last = mx.concatenate([last, mx.array([prompts[i][-1] for i in new], mx.int32)])
            unread.update(new)
        fed, place = last, [len(ids[row]) + (row not in unread) for row in rows]
        if min(place) < sampling.max_tokens:  # else every row has its last id
            with of_prompts(model, lambda rows=rows: mx.array([[row in unread] for row in rows])):
                logits = model(fed[:, None], cache=cache)[:, -1]
            own = None if points is None else mx.array(points[rows, np.minimum(place, sampling.max_tokens)])
            last = draw(logits, own, sampling.temp, sampling.top_p).astype(mx.int32)
            mx.async_eval(last)
        for row, token in zip(rows, fed.tolist(), strict=True):
            if row in unread or row in completions:
                unread.discard(row)
                continue
            ids[row].append(token)
            if sampling.after and token == sampling.after.end[-1]:
                most[row] = sampling.most(prompts[row], ids[row])
            if token in sampling.eos_ids or len(ids[row]) >= most[row]:
                finished = token in sampling.eos_ids
                completions[row] = Completion(ids[row], finished, not finished and most[row] < sampling.max_tokens)
            elif len(ids[row]) % ASKED_EVERY == 0 and sampling.enough and sampling.enough(prompts[row], ids[row]):
                completions[row] = Completion(ids[row], False, cut=True)
        progress(len(completions), len(prompts))
        n_steps += 1
        if n_steps % 512 == 0:
            mx.clear_cache()
    return [completions[i] for i in range(len(prompts))]


def answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Ids],
    sampling: Sampling,
    keys: Sequence[mx.array | None] | None = None,
    progress: Advance = silent,
) -> list[tuple[Completion, str]]:
    """`generate`'s completions, and each one's text as a reader sees it."""
    completions = generate(model, prompts, sampling, keys, progress)
    return [(c, answer_text(tokenizer, prompt, c)) for prompt, c in zip(prompts, completions, strict=True)]
