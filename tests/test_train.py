"""Stage 4 on a random model: a step is the plain loss's own step, however the batch is cut."""

import itertools
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from safesteer_mlx.losses import distillation_loss
from safesteer_mlx.progress import UserError
from safesteer_mlx.recipe import LossSettings, TrainSettings
from safesteer_mlx.residual import blocks, hidden_states
from safesteer_mlx.rollout import Completion, generate, stream_key
from safesteer_mlx.student import make_student
from safesteer_mlx.teacher import steered_teacher
from safesteer_mlx.train import (
    Rollouts,
    StepMetrics,
    TrainingPrompt,
    divergence_options,
    make_optimizer,
    number_of_steps,
    schedule,
    train,
)

HARMFUL = [TrainingPrompt(row, row, True) for row in ([1, 2, 3], [4, 5], [6, 7, 8, 9, 10])]
HARMLESS = [TrainingPrompt(row, row, False) for row in ([11, 12], [13, 14, 15, 16])]
ALL = HARMFUL + HARMLESS
TOKENS = mx.array([5, 17, 30])
SETTINGS = TrainSettings(batch_size=4, iters=1, max_tokens=6, micro_batch_size=3, learning_rate=1e-2)
EOS = [49]


def one_step(model, settings=SETTINGS, loss=LossSettings(), seed=7, optimizer=None):  # noqa: B008
    """The student after one step, the teacher, and what the step reported."""
    student = make_student(model, settings, seed)
    teacher = steered_teacher(model, 1, 3 * mx.random.normal((32,), key=mx.random.key(5)), 1.0)
    options = {"eos_ids": EOS, "seed": seed, "optimizer": optimizer or make_optimizer(settings)}
    steps = train(student, model, teacher, TOKENS, HARMFUL, HARMLESS, settings, loss, **options)
    rollouts, metrics = next(steps), next(steps)
    assert isinstance(rollouts, Rollouts) and isinstance(metrics, StepMetrics)
    return dict(tree_flatten(student.trainable_parameters())), teacher, metrics


def drawn(model, teacher, settings=SETTINGS, seed=7):
    """What the first step draws: (prompt, its target, the student's own answer) each."""
    order = [np.random.default_rng([seed, which, 0]).permutation(n).tolist() for which, n in ((0, 3), (1, 2))]
    batch = [HARMFUL[i] for i in order[0][:2]] + [HARMLESS[i] for i in order[1][:2]]
    answers = generate(
        make_student(model, settings, seed),
        [p.ids for p in batch],
        eos_ids=EOS,
        max_tokens=settings.max_tokens,
        temp=settings.temp,
        keys=[stream_key(seed, 1, 0, i) for i in range(4)],
    )
    return [(p, teacher.model if p.harmful else model, a.ids) for p, a in zip(batch, answers, strict=True)]


LOSSES = {
    "ours": LossSettings(),
    "published": LossSettings(loss="reverse_kl"),
    "full": LossSettings(subset="full", loss="reverse_kl"),
    "top k": LossSettings(subset="top_k", top_k=4),
    "mixture": LossSettings(loss="mixture", mix=0.3),
    "window": LossSettings(skip=1, keep=4),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("architecture", "temp"), [("qwen2", 1.0), ("llama", 0.8)])
def test_a_step_is_the_step_of_the_plain_loss(tiny_model, architecture, name, temp):
    model = tiny_model(architecture)
    settings, loss = replace(SETTINGS, temp=temp), LOSSES[name]
    _, teacher, metrics = one_step(model, settings, loss)
    student = make_student(model, settings, 7)
    rows = drawn(model, teacher, settings)

    def plain(student):
        total = 0.0
        for prompt, source, ids in rows:  # one at a time: no padding
            logits = [m(mx.array([[*prompt.ids, *ids]]))[:, len(prompt.ids) - 1 : -1] / temp for m in (student, source)]
            options = divergence_options(loss, TOKENS)
            total += distillation_loss(*logits, mx.ones((1, len(ids))), skip=loss.skip, keep=loss.keep, **options) / 4
        return total

    value, gradient = nn.value_and_grad(student, plain)(student)
    norm = sum((g.astype(mx.float32) ** 2).sum().item() for _, g in tree_flatten(gradient)) ** 0.5
    assert metrics.loss == pytest.approx(value.item(), rel=1e-4, abs=1e-7)
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
    assert metrics.loss == pytest.approx((metrics.harmful_loss + metrics.anchor_loss) / 2, rel=1e-5)
    firsts = [mx.softmax(m(mx.array([p.ids]))[0, -1] / temp)[TOKENS].sum().item() for p, m, _ in rows if p.harmful]
    assert metrics.target_mass == pytest.approx(np.mean(firsts), rel=1e-4)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_how_the_batch_is_cut_changes_nothing(model, micro_batch_size):
    whole, _, expected = one_step(model)
    cut, _, found = one_step(model, replace(SETTINGS, micro_batch_size=micro_batch_size))
    assert found.tokens == expected.tokens and found.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, weight in whole.items():
        np.testing.assert_allclose(np.array(cut[name]), np.array(weight), atol=2e-4)  # Adam divides by the gradient


@pytest.mark.parametrize("share", [0.1, 10.0])
def test_the_gradient_is_clipped_to_its_largest_norm(model, share):
    _, _, free = one_step(model)
    rate, largest = 0.5, share * free.grad_norm
    settings = replace(SETTINGS, max_grad_norm=largest, learning_rate=rate)
    before = dict(tree_flatten(make_student(model, settings, 7).trainable_parameters()))
    after, _, found = one_step(model, settings, optimizer=optim.SGD(rate))
    change = sum(((after[name] - value) ** 2).sum().item() for name, value in before.items()) ** 0.5
    assert change == pytest.approx(rate * min(free.grad_norm, largest), rel=1e-4)
    assert found.grad_norm == pytest.approx(free.grad_norm, rel=1e-4)  # what is reported is not clipped


@pytest.fixture
def given_answers(monkeypatch):
    """Nothing is sampled: each prompt has its answer."""
    from safesteer_mlx import train as stage

    answers = {tuple(p.ids): Completion([20 + i, 30 + i, 40 + i][: i % 3 + 1], False) for i, p in enumerate(ALL)}
    monkeypatch.setattr(stage, "generate", lambda student, rows, **more: [answers[tuple(row)] for row in rows])


def test_a_micro_batch_is_waited_for_once(model, given_answers, monkeypatch):
    wait, waits = mx.eval, []
    monkeypatch.setattr(mx, "eval", lambda *arrays: (waits.append(1), wait(*arrays))[1])

    def counted(micro_batch_size):
        waits.clear()
        one_step(model, replace(SETTINGS, micro_batch_size=micro_batch_size))
        return len(waits)

    assert counted(1) - counted(2) == 4 - 2  # micro-batches of four completions


def test_accumulated_batches_are_one_batch(model, given_answers):
    whole, _, expected = one_step(model)
    halves, _, found = one_step(model, replace(SETTINGS, batch_size=2, grad_accumulation_steps=2))
    assert (found.tokens, found.steps) == (expected.tokens, expected.steps)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for name, weight in whole.items():
        np.testing.assert_allclose(np.array(halves[name]), np.array(weight), atol=2e-4)


def test_steps_and_rates():
    settings = TrainSettings(batch_size=32, epochs=4.0, learning_rate=1.0, warmup=0.1)
    assert number_of_steps(100, settings, LossSettings(anchor=0.5)) == 25
    assert number_of_steps(100, settings, LossSettings(anchor=0.0)) == 13
    assert number_of_steps(100, replace(settings, iters=7), LossSettings()) == 7
    rates = [schedule(step, 20, settings) for step in range(20)]
    assert rates[0] == 0.5 and rates[1:3] == [1.0, 1.0]
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))
    assert 0 < rates[-1] < 0.01


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_checkpointed_blocks_give_the_same_gradients_and_leave_the_base_as_it_is(model, kind):
    settings = replace(SETTINGS, fine_tune_type=kind, num_layers=2)
    tokens = mx.array([[1, 2, 3, 4, 5]])
    found = []
    for grad_checkpoint in ("off", "on"):
        student = make_student(model, replace(settings, grad_checkpoint=grad_checkpoint), 3)
        student.train()
        loss = nn.value_and_grad(student, lambda m: (m(tokens) ** 2).mean())
        found.append({name: np.array(g) for name, g in tree_flatten(loss(student)[1])})
        kinds = [type(block).__name__.startswith("Checkpointed") for block in blocks(student)]
        assert kinds == [False, grad_checkpoint == "on", grad_checkpoint == "on"]
        assert not any(type(block).__name__.startswith("Checkpointed") for block in blocks(model))
    assert found[0].keys() == found[1].keys() and any(g.any() for g in found[0].values())
    for name, gradient in found[0].items():
        np.testing.assert_allclose(found[1][name], gradient, atol=1e-6 * np.abs(gradient).max(), err_msg=name)


def test_a_step_goes_on_with_half_when_memory_is_exhausted(model, monkeypatch, capsys):
    from safesteer_mlx import train as stage

    whole, _, expected = one_step(model)
    real = stage.answer_states

    def short(of, prompts, answers, **more):
        if len(prompts) > 1:
            raise RuntimeError("[metal::malloc] Unable to allocate 123 bytes")
        return real(of, prompts, answers, **more)

    monkeypatch.setattr(stage, "answer_states", short)
    halved, _, found = one_step(model)
    assert "in training: going on with 1 at a time" in capsys.readouterr().err
    assert abs(found.loss - expected.loss) < 1e-6
    for name, weight in whole.items():
        np.testing.assert_allclose(np.array(halved[name]), np.array(weight), atol=2e-4)


def test_a_checkpointed_step_is_the_same_step_and_needs_less_memory(tiny_model):
    plain, _, expected = one_step(tiny_model("llama"))
    checkpointed, _, found = one_step(tiny_model("llama"), replace(SETTINGS, grad_checkpoint="on"))
    assert found.loss == expected.loss and found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for name, weight in plain.items():
        np.testing.assert_allclose(np.array(checkpointed[name]), np.array(weight), atol=2e-4)

    tokens = mx.zeros((8, 512), mx.int32)
    peaks = []
    for grad_checkpoint in ("off", "on"):
        student = make_student(tiny_model("llama"), replace(SETTINGS, grad_checkpoint=grad_checkpoint), 3)
        student.train()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(nn.value_and_grad(student, lambda m: hidden_states(m, tokens).sum())(student))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.75 * peaks[0]


def test_training_begins_from_given_adapters(model, tmp_path):
    weights, *_ = one_step(model)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    settings = replace(SETTINGS, resume_adapter_file=str(tmp_path / "adapters.safetensors"))
    student = make_student(model, settings, seed=99)
    for name, weight in tree_flatten(student.trainable_parameters()):
        np.testing.assert_array_equal(np.array(weight), np.array(weights[name]))
    with pytest.raises(UserError, match="holds other weights"):
        make_student(model, replace(settings, num_layers=1), 0)
    with pytest.raises(UserError, match="cannot be read"):
        make_student(model, replace(settings, resume_adapter_file=str(tmp_path / "no.safetensors")), 0)


@pytest.mark.parametrize("name", ["ours", "full"])
@pytest.mark.parametrize(("num_layers", "begins"), [(1, {1, 2}), (2, {1})])
def test_blocks_that_student_and_target_share_run_once_and_change_nothing(model, monkeypatch, name, num_layers, begins):
    import safesteer_mlx.train as stage

    settings, whole, seen = replace(SETTINGS, num_layers=num_layers), stage.resume, set()
    monkeypatch.setattr(stage, "resume", lambda model, layer, x: (seen.add(layer), whole(model, layer, x))[1])
    shared, _, found = one_step(model, settings, LOSSES[name])
    assert seen == begins  # steered at block 1; the anchor's target is the base
    monkeypatch.setattr(stage, "resumes", lambda model, tokens: False)
    seen.clear()
    plain, _, expected = one_step(model, settings, LOSSES[name])
    assert not seen
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
    for key, weight in plain.items():
        np.testing.assert_allclose(np.array(shared[key]), np.array(weight), atol=1e-6)
