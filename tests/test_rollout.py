"""Sampling: what is drawn depends on its own stream and prompt alone, and no prompt is read twice."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from safesteer_mlx.method import rollout
from safesteer_mlx.method.residual import _override, blocks, view
from safesteer_mlx.method.rollout import Sampling, _points, _sampler, generate, set_equal_batches, stream_key

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


def test_a_drawn_token_is_where_the_distribution_function_passes_the_point():
    logprobs = mx.log(mx.array([[0.0, 0.25, 0.5, 0.0, 0.25]]))
    sample = _sampler([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-22], 1.0, 1.0)
    assert [sample(logprobs).item() for _ in range(6)] == [1, 1, 2, 2, 4, 4]
    # Squared and renormalised: 1/6, 4/6, 1/6; the half alone is left at top_p 0.5.
    sample = _sampler([0.16, 0.17, 0.83, 0.84], 0.5, 1.0)
    assert [sample(logprobs).item() for _ in range(4)] == [1, 2, 2, 4]
    sample = _sampler([0.0, 0.9999], 1.0, 0.5)
    assert [sample(logprobs).item() for _ in range(2)] == [2, 2]
    # Half precision would lose the small ones, and so cold a temperature everything.
    many = mx.log(mx.full((1, 4096), 1 / 4096)).astype(mx.bfloat16)
    sample = _sampler([0.25, 0.5, 1 - 2**-22], 1.0, 1.0)
    assert [sample(many).item() for _ in range(3)] == [1024, 2048, 4095]
    assert _sampler([0.5], 0.001, 1.0)(mx.array([[-9.0, -8.0, -9.0]])).item() == 1


def test_the_points_of_a_stream_are_spread_evenly():
    found = np.array(_points(stream_key(0, 1), 4000))
    assert found.min() >= 0 and found.max() < 1
    counts = np.histogram(found, 20, (0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 43.8  # chi-square, 19 degrees of freedom: 1 in 1,000


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_batch_size_changes_no_sample(model, batch_size):
    assert drawn(model, batch_size=batch_size) == drawn(model)


def test_the_samples_of_a_prompt_differ_and_its_reading_is_shared(model):
    read = []
    _override(blocks(model)[0], "Counted", lambda call, x, *a, **k: (read.append(x.shape), call(x, *a, **k))[1])
    same = drawn(model, [[1, 2, 3, 4, 5, 6, 7, 8]] * 6)
    assert len({tuple(ids) for ids, _ in same}) > 1
    prefilled = sum(b * t for b, t, _ in read if t > 1)
    assert prefilled == 7  # the prompt but its last id, once for all six
    read.clear()
    drawn(model)
    # [1, 2] once, [3, 4] once for three samples; [6] has nothing left but its last id; [7] of the single prompt
    assert sum(b * t for b, t, _ in read if t > 1) <= 2 + 2 + 2
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


@pytest.mark.parametrize(("before", "while_generating"), [(5, 5), (0, 9)])
def test_a_wired_limit_that_was_set_holds_while_answers_are_generated(
    tiny_model, monkeypatch, before, while_generating
):
    # Metal's part is played, since the CPU backend wires nothing; 0 is MLX's own, where nobody set one.
    limits, seen = [before], []

    def set_limit(limit):
        limits.append(limit)
        return limits[-2]

    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 9})
    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    generate(tiny_model("llama"), [[1, 2], [3]], Sampling(EOS, 4), progress=lambda *_: seen.append(limits[-1]))
    assert 9 in limits and seen and set(seen) == {while_generating} and limits[-1] == before


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


def test_what_the_engine_cannot_take_is_generated_alone(model, monkeypatch):
    prompts, few = [[3, 1, 4], [1, 5]], Sampling([7], 6)
    expected = generate(model, prompts, few)
    keys = [stream_key(1, i) for i in range(2)]
    drawn = generate(model, prompts, replace(few, temp=1.0), keys)

    def fail(*_):
        raise TypeError("'NoneType' object is not subscriptable")

    monkeypatch.setattr(rollout, "_generate_together", fail)
    with pytest.raises(TypeError):
        generate(model, prompts, few)  # a fault of ours must not hide behind a slow way
    assert generate(model, prompts, replace(few, batch_size=1)) == expected
    assert generate(model, prompts, replace(few, batch_size=1, temp=1.0), keys) == drawn
