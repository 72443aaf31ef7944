"""Sampling: what is drawn depends on its own stream and prompt alone, and no prompt is read twice."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import RotatingKVCache

from safesteer_mlx.method import rollout
from safesteer_mlx.method.residual import _override, blocks, of_prompts, steer, view
from safesteer_mlx.method.rollout import (
    AfterThought,
    Sampling,
    _points,
    draw,
    generate,
    set_equal_batches,
    stream_key,
)

PROMPTS = [[1, 2, 3, 4, 5], [1, 2, 6], [1, 2, 3, 4, 5], [1, 2, 7, 8], [1, 2, 3, 4, 5], [1, 2, 6]]
EOS = [49]


def drawn(model, prompts=PROMPTS, temp=1.0, **options):
    keys = [stream_key(3, i) for i in range(len(prompts))]
    found = generate(model, prompts, Sampling(EOS, 12, temp, **options), keys)
    return [(c.ids, c.finished) for c in found]


def one_by_one(model, prompt, key, temp):
    """One sample without a cache: the whole sequence again for every token, its distribution function inverted."""
    ids, keys = list(prompt), mx.random.split(key, 13)
    for i in range(12):
        z = np.array(model(mx.array([ids]))[0, -1], np.float64)
        mass = np.exp((z - z.max()) / (temp or 1))
        point = mx.random.uniform(key=keys[i]).item() * mass.sum()
        ids.append(int(np.searchsorted(np.cumsum(mass), point, "right") if temp else z.argmax()))
        token = ids[-1]
        if token in EOS:
            break
    return ids[len(prompt) :], ids[-1] in EOS


@pytest.mark.parametrize("name", ["qwen2", "llama"])
@pytest.mark.parametrize("temp", [0.0, 0.7, 1.0])
def test_each_sample_is_what_it_would_be_alone(tiny_model, name, temp):
    model = tiny_model(name)
    expected = [one_by_one(model, p, stream_key(3, i), temp) for i, p in enumerate(PROMPTS)]
    assert drawn(model, temp=temp) == expected


@pytest.mark.parametrize("batch_size", [2, 32])
def test_where_prompts_alone_are_steered_answers_are_not(tiny_model, batch_size):
    """Also of rows that join a batch in which others are answered already."""
    model, vector = tiny_model("qwen2"), 3 * mx.random.normal((32,), key=mx.random.key(1))
    steered = steer(model, 1, vector, prompts_only=True)
    expected = []
    for i, (prompt, length) in enumerate(zip(PROMPTS, map(len, PROMPTS), strict=True)):

        def on_prompt(tokens, begins=length):
            with of_prompts(steered, lambda: mx.arange(tokens.shape[1])[None] < begins):
                return steered(tokens)

        expected.append(one_by_one(on_prompt, prompt, stream_key(3, i), 1.0))
    assert drawn(steered, batch_size=batch_size) == expected
    assert expected != drawn(steer(model, 1, vector)) and expected != drawn(model)


def test_a_drawn_token_is_where_the_distribution_function_passes_the_point():
    def at(logits, points, *how):
        rows = mx.concatenate([logits] * len(points)) if len(logits) == 1 else logits
        return draw(rows, mx.array(points), *how).tolist()

    logprobs = mx.log(mx.array([[0.0, 0.25, 0.5, 0.0, 0.25]]))
    assert at(logprobs, [0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-22]) == [1, 1, 2, 2, 4, 4]
    # Squared and renormalised: 1/6, 4/6, 1/6; the half alone is left at top_p 0.5.
    assert at(logprobs, [0.16, 0.17, 0.83, 0.84], 0.5) == [1, 2, 2, 4]
    assert at(logprobs, [0.0, 0.9999], 1.0, 0.5) == [2, 2]
    assert at(logprobs + 3, [0.0, 0.9999], 1.0, 0.5) == [2, 2]  # logits need not be normalised
    # Half precision would lose the small ones, and so cold a temperature everything.
    many = mx.log(mx.full((1, 4096), 1 / 4096)).astype(mx.bfloat16)
    assert at(many, [0.25, 0.5, 1 - 2**-22]) == [1024, 2048, 4095]
    assert at(mx.array([[-9.0, -8.0, -9.0]]), [0.5], 0.001) == [1]
    # Every row has its own distribution and point; below 0, and without points, the likeliest is taken.
    both = mx.concatenate([logprobs, logprobs[:, ::-1]])
    assert at(both, [0.1, 0.9]) == [1, 3] and at(both, [-1.0, 0.1]) == [2, 0]
    assert draw(both, None).tolist() == [2, 2]


def test_the_points_of_a_stream_are_spread_evenly_and_its_own():
    found = _points([stream_key(0, 1), stream_key(0, 2)], 4000)
    assert found.shape == (2, 4000) and found.min() >= 0 and found.max() < 1
    for row in found:
        counts = np.histogram(row, 20, (0, 1))[0]
        assert ((counts - 200) ** 2 / 200).sum() < 43.8  # chi-square, 19 degrees of freedom: 1 in 1,000
    assert abs(np.corrcoef(found)[0, 1]) < 0.06
    alone = [mx.random.uniform(key=k).item() for k in mx.random.split(stream_key(0, 2), 4000)[:5]]
    assert found[1, :5].tolist() == alone


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_batch_size_changes_no_sample(model, batch_size):
    assert drawn(model, batch_size=batch_size) == drawn(model)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("end", [1, 2])
def test_an_answer_ends_so_many_ids_behind_its_thought(model, end, batch_size):
    """Nothing else is drawn than without it, and less of it."""
    whole = drawn(model)
    marks = {tuple(ids[i : i + end]) for ids, _ in whole for i in range(2, 7) if i + end <= len(ids)}
    for mark in sorted(marks):
        after = AfterThought(mark, 3)
        keys = [stream_key(3, i) for i in range(len(PROMPTS))]
        cut = generate(model, PROMPTS, Sampling(EOS, 12, 1.0, batch_size=batch_size, after=after), keys)
        for (ids, finished), answer in zip(whole, cut, strict=True):
            most = len(ids)
            for i in range(end, len(ids) + 1):
                if i <= most and tuple(ids[i - end : i]) == mark:
                    most = i + 3
            assert answer.ids == ids[:most]
            ended = finished and most >= len(ids)
            assert (answer.finished, answer.cut) == (ended, not ended and most < 12)


def test_a_thought_that_ended_where_another_began_the_answer_counts(model):
    """Of an answer in two parts, whose mark stands in the first, or in both."""
    prompt, key, plain = PROMPTS[0], [stream_key(3, 0)], Sampling(EOS, 12, 1.0)

    def drawn_behind(begun, after=None):
        return generate(model, [[*prompt, *begun]], replace(plain, after=after), key)[0].ids

    for begun, mark in (([20, 21, 22], 21), ([20, 21, 22], 22), ([21, 20], 21), ([20], 20), ([20], 40)):
        whole = drawn_behind(begun)
        every = [*begun, *whole]  # until the mark is the fifth from the end
        ends = [n for n in range(len(begun) + 1, len(every)) if mark in every[:n] and every[:n][::-1].index(mark) == 4]
        most = ends[0] - len(begun) if ends else len(whole)
        after = AfterThought((mark,), 4, len(begun))
        assert drawn_behind(begun, after) == whole[:most]
        # What is no part of the answer is none of its thought, such as one that the template closed.
        assert drawn_behind(begun, replace(after, begun=0))[:4] == whole[:4]
    whole = drawn_behind([20, 21])
    assert len(whole) > 3 and drawn_behind([20, 21], AfterThought((21, whole[0]), 2, 2)) == whole[:3]
    after = AfterThought((1, 2), 5)
    assert [after.enough(ids) for ids in ([], [2, 1], [0, 1, 2], [1, 2, 3, 1, 2, 3])] == [None, None, 8, 10]


def test_the_samples_of_a_prompt_differ_and_its_reading_is_shared(model):
    read = []
    _override(blocks(model)[0], "Counted", lambda call, x, *a, **k: (read.append(x.shape), call(x, *a, **k))[1])
    same = drawn(model, [[1, 2, 3, 4, 5, 6, 7, 8]] * 6)
    assert len({tuple(ids) for ids, _ in same}) > 1
    prefilled = sum(b * t for b, t, _ in read if t > 1)
    assert prefilled == 7  # the prompt but its last id, once for all six
    read.clear()
    drawn(model)
    # [1, 2] once for all, then [3, 4], nothing and [7] side by side: three prompts, as wide as the longest
    assert sum(b * t for b, t, _ in read if t > 1) == 2 + 3 * 2
    assert drawn(model, [[1], [2], [3, 4]])  # nothing in common


def test_no_more_prompts_wait_than_one_batch(model):
    def peak(count):
        prompts = [[1, 2, i % 40, i // 40, 3] for i in range(count) for _ in range(2)]
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        drawn(model, prompts, batch_size=4)
        return mx.get_peak_memory() - before

    peak(8)
    assert peak(80) < 1.5 * peak(8)


def test_a_key_is_its_numbers_own():
    keys = {tuple(stream_key(*which).tolist()) for which in ((0, 1), (0, 2), (1, 1), (0, 1, 0), (0, 0, 1))}
    assert len(keys) == 5
    with pytest.raises(ValueError, match="6 prompts need as many random keys, not 0"):
        generate(None, PROMPTS, Sampling(EOS, 1, 1.0))  # type: ignore[arg-type]


def test_a_wired_limit_that_was_set_holds_while_answers_are_generated(tiny_model, monkeypatch):
    # Metal's part is played, since the CPU backend wires nothing: mlx-lm's own engine would set another.
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: pytest.fail(f"the wired limit became {limit}"))
    assert len(generate(tiny_model("llama"), [[1, 2], [3]], Sampling(EOS, 4))) == 2


def test_greedy_answers_and_samples_share_a_batch_and_the_reading(model):
    greedy, sampled = drawn(model, temp=0.0), drawn(model)
    keys = [k for i in range(len(PROMPTS)) for k in (None, stream_key(3, i))]
    both = [prompt for prompt in PROMPTS for _ in range(2)]
    read = []
    _override(blocks(model)[0], "Counted", lambda call, x, *a, **k: (read.append(x.shape), call(x, *a, **k))[1])
    found = [(c.ids, c.finished) for c in generate(model, both, Sampling(EOS, 12, 1.0), keys)]
    assert found[::2] == greedy and found[1::2] == sampled
    assert sum(b * t for b, t, _ in read if t > 1) == 2 + 3 * 2


@pytest.mark.parametrize("batch_size", [2, 16])
def test_rows_that_finish_make_room_while_the_others_go_on(model, batch_size, monkeypatch):
    """Prompts of many lengths, answers that end early and late: each is what it is alone."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 40, rng.integers(1, 9)).tolist() for _ in range(40)]
    keys = [stream_key(5, i) for i in range(40)]
    sampling = Sampling(list(range(40, 50)), 24, 1.0, batch_size=batch_size)
    alone = [generate(model, [p], sampling, [k])[0] for p, k in zip(prompts, keys, strict=True)]
    lengths = [len(c.ids) for c in alone]
    assert min(lengths) < 4 and max(lengths) == 24  # early and late
    steps, own = [], rollout.draw
    monkeypatch.setattr(rollout, "draw", lambda z, *rest: (steps.append(len(z)), own(z, *rest))[1])
    assert generate(model, prompts, sampling, keys) == alone
    assert max(steps) == batch_size
    assert sum(steps) < 1.6 * sum(lengths)  # rows that go on unheard are few


def test_prompts_of_one_length_share_a_batch_where_others_must_not(tiny_model, monkeypatch):
    """gemma2, whose masks mlx-lm makes wrongly for a batch: in groups, each answer is what it is alone."""
    model = tiny_model("gemma2")
    prompts = [
        [3, 1, 4],
        [1, 5, 9, 2, 6],
        [3, 1, 4],
        [3, 1, 5],
        [1, 5, 7, 9, 3],
        [2, 3],
    ]  # one twice, beginnings shared
    few = Sampling([], 6)
    alone = [generate(model, [p], few)[0].ids for p in prompts]
    keys = [stream_key(1, i) for i in range(6)]
    sampled = [generate(model, [p], replace(few, temp=1.0), [k])[0].ids for p, k in zip(prompts, keys, strict=True)]
    set_equal_batches(model)
    sizes, own = [], rollout._generate
    monkeypatch.setattr(rollout, "_generate", lambda m, rows, *rest: (sizes.append(len(rows)), own(m, rows, *rest))[1])
    ticks = []
    found = generate(view(model), prompts, few, progress=lambda done, total, *_: ticks.append((done, total)))
    assert [c.ids for c in found] == alone and sizes == [3, 2, 1]
    assert [c.ids for c in generate(model, prompts, replace(few, temp=1.0), keys)] == sampled
    assert ticks == sorted(ticks) and ticks[-1] == (6, 6)


def test_prompts_of_one_length_are_read_without_their_logits(model, monkeypatch):
    """Of 64 prompts of 100 tokens a vocabulary of 262,144 makes 3.4 GB."""
    computed, wait = [], mx.eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: (computed.extend(arrays), wait(*arrays))[1])
    rollout._AlikeReader(model)([[3, 1, 4], [1, 5, 9]])
    shapes = [array.shape for _, array in tree_flatten(computed) if isinstance(array, mx.array)]
    assert shapes and all(len(shape) == 4 for shape in shapes)  # keys and values, (2, 2, 2, 8)


def test_what_the_engine_cannot_take_is_generated_alone(model, monkeypatch):
    prompts, few = [[3, 1, 4], [1, 5]], Sampling([7], 6)
    expected = generate(model, prompts, few)
    keys = [stream_key(1, i) for i in range(2)]
    drawn = generate(model, prompts, replace(few, temp=1.0), keys)

    def fail(*_):
        raise TypeError("'NoneType' object is not subscriptable")

    monkeypatch.setattr(rollout._Reader, "__call__", fail)
    with pytest.raises(TypeError):
        generate(model, prompts, few)  # a fault of ours must not hide behind a slow way
    assert generate(model, prompts, replace(few, batch_size=1)) == expected
    assert generate(model, prompts, replace(few, batch_size=1, temp=1.0), keys) == drawn


@pytest.mark.parametrize("window", [None, 40])
def test_answers_are_the_same_in_however_small_steps_the_caches_grow(model, monkeypatch, window):
    prompts = [[1 + i % 7, 2, *range(3, 3 + i % 5)] for i in range(24)]
    if window:
        monkeypatch.setattr(
            model, "make_cache", lambda: [RotatingKVCache(window) for _ in blocks(model)], raising=False
        )

    def answers(step):
        monkeypatch.setattr(rollout, "CACHE_STEP", step)
        keys = [stream_key(3, i) for i in range(len(prompts))]
        return [c.ids for c in generate(model, prompts, Sampling(EOS, 90, temp=1.0, batch_size=8), keys)]

    usual = answers(256)
    assert max(map(len, usual)) > 64 > min(map(len, usual))  # rows leave, join, and pass the ends of steps
    assert answers(32) == answers(5) == usual


@pytest.mark.parametrize("alike", [False, True])
def test_caches_hold_few_positions_that_nothing_is_in(model, monkeypatch, alike):
    """Those of mlx-lm's 256 were copied whenever rows were replaced."""
    if alike:
        model = view(model)
        set_equal_batches(model)
    held, caches = [], []

    def drawn(logits, *how):
        held.extend(layer.keys.shape[2] for layer in caches)
        return draw(logits, *how)

    for reader in (rollout._Reader, rollout._AlikeReader):
        read = reader.__call__
        monkeypatch.setattr(reader, "__call__", lambda self, rows, read=read: kept(read(self, rows)))

    def kept(cache):
        caches[:] = caches or cache  # those that others are joined to
        return cache

    monkeypatch.setattr(rollout, "draw", drawn)
    generate(model, [[1, 2, 3 + i] for i in range(12)], Sampling([], 40, batch_size=4))
    assert 43 <= max(held) < 100
