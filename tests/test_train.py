"""Stage 4 on a random model: a step is the plain loss's own step, however the batch is cut."""

import itertools
import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from safesteer_mlx.method import learning as learn
from safesteer_mlx.method import train as stage
from safesteer_mlx.method.learning import Course, Learning, best_step, course
from safesteer_mlx.method.losses import Divergence, distillation_loss
from safesteer_mlx.method.residual import blocks, hidden_states, last_logits
from safesteer_mlx.method.rollout import Completion, Sampling, generate, stream_key
from safesteer_mlx.method.safety_tokens import openings
from safesteer_mlx.method.student import make_student, row_dropouts
from safesteer_mlx.method.teacher import Teacher, steered_teacher
from safesteer_mlx.method.train import Rollouts, StepMetrics, Training, make_optimizer, train
from safesteer_mlx.method.training_prompts import TrainingPrompt
from safesteer_mlx.recipe import LossSettings, TrainSettings, number_of_steps, rollout_tokens
from safesteer_mlx.system.screen import UserError

HARMFUL = [TrainingPrompt(row, row, True) for row in ([1, 2, 3], [4, 5], [6, 7, 8, 9, 10])]
HARMLESS = [TrainingPrompt(row, row, False) for row in ([11, 12], [13, 14, 15, 16])]
ALL = HARMFUL + HARMLESS
TOKENS = mx.array([5, 17, 30])
SETTINGS = TrainSettings(batch_size=4, iters=1, max_tokens=6, micro_batch_size=3, learning_rate=1e-2)
EOS = [49]
WHOLE = LossSettings(
    first_tokens=0, guidance=1.0, tail=0, anchor_ratio=0.5
)  # whole answers, towards the teacher itself


def a_teacher(model):
    return steered_teacher(model, 1, 3 * mx.random.normal((32,), key=mx.random.key(5)), 1.0)


def raised_by_teacher(model):
    """So many tokens that it would rather write one of them than another, those it raises most after a prompt."""
    change = a_teacher(model).model(mx.array([HARMFUL[0].ids])) - model(mx.array([HARMFUL[0].ids]))
    return mx.argsort(-change[0, -1])[:40]


def one_step(model, settings=SETTINGS, loss=WHOLE, seed=7, optimizer=None, tokens=TOKENS, refusing=None):
    """The student after one step, the teacher, and what the step reported."""
    student = make_student(model, settings, seed)
    teacher = a_teacher(model)
    how = (settings, loss, EOS, seed, optimizer or make_optimizer(settings))
    steps = train(Training(student, model, teacher, tokens, HARMFUL, HARMLESS, *how, refusing=refusing))
    rollouts, metrics = next(steps), next(steps)
    assert isinstance(rollouts, Rollouts) and isinstance(metrics, StepMetrics)
    return dict(tree_flatten(student.trainable_parameters())), teacher, metrics


def drawn(model, teacher, settings=SETTINGS, loss=WHOLE, seed=7):
    """What the first step draws: (prompt, its target, the student's own answer) each."""
    order = [np.random.default_rng([seed, which, 0]).permutation(n).tolist() for which, n in ((0, 3), (1, 2))]
    batch = [HARMFUL[i] for i in order[0][:2]] + [HARMLESS[i] for i in order[1][:2]]
    answers = generate(
        make_student(model, settings, seed),
        [p.ids for p in batch],
        Sampling(EOS, rollout_tokens(settings, loss), settings.temp),
        [stream_key(seed, 1, 0, i) for i in range(4)],
    )
    return [(p, teacher.model if p.harmful else model, a.ids) for p, a in zip(batch, answers, strict=True)]


LOSSES = {
    "ours": WHOLE,
    "published": replace(WHOLE, loss="reverse_kl"),
    "full": replace(WHOLE, loss_tokens="full", loss="reverse_kl"),
    "top k": replace(WHOLE, loss_tokens="top_k", top_k=4),
    "mixture": replace(WHOLE, loss="jsd", jsd_alpha=0.3),
    "window": replace(WHOLE, skip_first=1, first_tokens=4),
    "tail": replace(WHOLE, first_tokens=2, tail=3),
    "guided": replace(WHOLE, guidance=2.5),
    "guided, full": replace(WHOLE, guidance=2.5, loss_tokens="full", loss="reverse_kl"),
    "guided, tail": replace(WHOLE, first_tokens=2, tail=3, guidance=2.5),
    "eased": replace(WHOLE, anchor_margin=1.5),
    "eased, full": replace(WHOLE, anchor_margin=0.5, guidance=2.5, loss_tokens="full", loss="reverse_kl"),
    "eased, tail": replace(WHOLE, first_tokens=2, tail=3, anchor_margin=99.0),
    "default": LossSettings(first_tokens=1, guidance=2.5, anchor_ratio=0.5),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("architecture", "temp"), [("qwen2", 1.0), ("llama", 0.8)])
def test_a_step_is_the_step_of_the_plain_loss(tiny_model, architecture, name, temp):
    model = tiny_model(architecture)
    settings, loss = replace(SETTINGS, temp=temp), LOSSES[name]
    tokens = raised_by_teacher(model) if loss.guidance > 1 or loss.anchor_margin else TOKENS
    refusing = tokens[::2] if loss.anchor_margin else None  # the others open other answers too
    _, teacher, metrics = one_step(model, settings, loss, tokens=tokens, refusing=refusing)
    student = make_student(model, settings, 7)
    rows = drawn(model, teacher, settings, loss)
    shifts, eased = [], []

    def logits(of, prompt, ids):
        return of(mx.array([[*prompt.ids, *ids]]))[:, len(prompt.ids) - 1 : -1] / temp

    def target(prompt, source, ids):
        """What the opening is pulled to: on harmful prompts, further from the base than the teacher; on others by up
        to the margin below the base, where that writes a refusing token with more than 3 %."""
        z = logits(source, prompt, ids)
        if not prompt.harmful and refusing is not None:
            p = mx.softmax(z, axis=-1)[..., refusing].sum(-1)
            above = mx.minimum(mx.maximum(mx.log(p / (1 - p)) + math.log(0.97 / 0.03), 0), loss.anchor_margin)
            shift = mx.where((p > 0.5) | (mx.arange(z.shape[1]) == 0), -above, 0)
            eased.extend(shift.flatten().tolist())
            z = z.at[..., refusing].add(shift[..., None])
        if prompt.harmful and loss.guidance > 1:
            mass = [mx.softmax(x, axis=-1)[..., tokens].sum(-1) for x in (z, logits(model, prompt, ids))]
            by_teacher, by_base = (mx.log(p / (1 - p)) for p in mass)
            beyond = mx.minimum(
                (loss.guidance - 1) * mx.maximum(by_teacher - by_base, 0), mx.maximum(6 - by_teacher, 0)
            )
            first = mx.arange(z.shape[1]) == 0
            shift = mx.where((by_teacher > 0) | first, beyond, 0)
            shifts.extend(shift.flatten().tolist())
            z = z.at[..., tokens].add(shift[..., None])
        return z

    def plain(student):
        total = 0.0
        for prompt, source, ids in rows:  # one at a time: no padding
            zs, mask, options = logits(student, prompt, ids), mx.ones((1, len(ids))), vars(Divergence.of(loss, tokens))
            opening = {"skip": loss.skip_first, "keep": loss.first_tokens} | options
            total += distillation_loss(zs, target(prompt, source, ids), mask, **opening) / 4
            if loss.tail:
                after = {"skip": loss.first_tokens, "keep": loss.first_tokens + loss.tail}  # the whole vocabulary
                total += distillation_loss(zs, logits(model, prompt, ids), mask, **after) / 4
        return total

    value, gradient = nn.value_and_grad(student, plain)(student)
    norm = sum((g.astype(mx.float32) ** 2).sum().item() for _, g in tree_flatten(gradient)) ** 0.5
    assert metrics.loss == pytest.approx(value.item(), rel=1e-4, abs=1e-7)
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
    assert metrics.loss == pytest.approx((metrics.harmful_loss + metrics.anchor_loss) / 2, rel=1e-5)
    firsts = [mx.softmax(target(p, m, [0])[0, 0])[tokens].sum().item() for p, m, _ in rows if p.harmful]
    assert metrics.target_mass == pytest.approx(np.mean(firsts), rel=1e-4)
    assert loss.guidance == 1 or max(shifts) > 0.01
    assert refusing is None or min(eased) < -0.4


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_how_the_batch_is_cut_changes_nothing(model, micro_batch_size):
    whole, _, expected = one_step(model)
    cut, _, found = one_step(model, replace(SETTINGS, micro_batch_size=micro_batch_size))
    assert found.tokens == expected.tokens and found.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, weight in whole.items():
        np.testing.assert_allclose(np.array(cut[name]), np.array(weight), atol=2e-4)  # Adam divides by the gradient


@pytest.mark.parametrize(
    ("lengths", "rows", "tokens", "expected"),
    [
        ([5], 1, None, [1]),
        ([3, 3, 3, 3, 3], 2, None, [2, 2, 1]),  # by rows alone, from the shortest on
        ([3, 3, 3, 3, 3], 16, None, [5]),
        ([3, 3, 3, 3, 3], 16, 15, [5]),
        ([3, 3, 3, 3, 3], 16, 14, [4, 1]),
        ([3, 3, 3, 3, 3], 2, 14, [2, 2, 1]),  # rows, too
        ([2, 2, 2, 2, 8], 16, 8, [4, 1]),  # short ones together, a long one alone
        ([2, 2, 2, 3, 8], 16, 8, [3, 1, 1]),  # the fourth would make four of 3 tokens
        ([2, 4, 4, 4], 16, 12, [3, 1]),  # padding counts: three of 4 tokens
        ([2, 20], 16, 8, [1, 1]),  # longer than that: alone
        ([20, 20], 16, 1, [1, 1]),
        ([1, 2, 3, 4, 5, 6], 3, 9, [3, 1, 1, 1]),
    ],
)
def test_completions_are_cut_by_tokens_and_rows(lengths, rows, tokens, expected):
    cut = stage.micro_batches(lengths, rows, tokens)
    assert [piece.stop - piece.start for piece in cut] == expected
    assert [length for piece in cut for length in lengths[piece]] == lengths


@pytest.mark.parametrize("tokens", [1, 9, 14, 100])
def test_cutting_by_tokens_changes_nothing(model, tokens):
    whole, _, expected = one_step(model)
    cut, _, found = one_step(model, replace(SETTINGS, micro_batch_tokens=tokens))
    assert found.tokens == expected.tokens and found.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, weight in whole.items():
        np.testing.assert_allclose(np.array(cut[name]), np.array(weight), atol=2e-4)
    if tokens == 100:  # more than there are: to the byte
        assert all(mx.array_equal(cut[name], weight) for name, weight in whole.items())


def test_where_memory_is_exhausted_tokens_are_halved_with_the_rows(model, given_answers, monkeypatch, capsys):
    loss, cut, asked, given = stage.localized_loss, stage.micro_batches, [], []

    def exhausted(*how):
        asked.append(1)
        if len(asked) == 1:
            raise RuntimeError("[metal::malloc] unable to allocate")
        return loss(*how)

    monkeypatch.setattr(stage, "localized_loss", exhausted)
    monkeypatch.setattr(stage, "micro_batches", lambda *how: (given.append(how[1:]), cut(*how))[1])
    one_step(model, replace(SETTINGS, micro_batch_size=4, micro_batch_tokens=40))
    assert given == [(4, 40), (2, 20), (2, 20)]  # harmful ones; then both kinds
    assert "going on with 2 at a time" in capsys.readouterr().err


@pytest.mark.parametrize(("tokens", "expected"), [(None, 3), (1000, 3), (10, 2), (5, 1), (2, 1)])
def test_prompts_are_read_as_many_at_a_time_as_there_is_room_for(tokens, expected):
    settings = replace(SETTINGS, micro_batch_tokens=tokens)
    assert stage.read_at_once(settings, [p.ids for p in HARMFUL]) == expected  # the longest has 5 tokens


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


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("full", (1.0, 1.0)),  # of a constant gradient each step is the rate, as torch's
        # (1 − 0.9) g / √((1 − 0.999) g²), and after two steps (1 − 0.9²) g / √((1 − 0.999²) g²)
        ("lora", (0.1 / 0.001**0.5, 0.19 / 0.001999**0.5)),
        ("dora", (0.1 / 0.001**0.5, 0.19 / 0.001999**0.5)),
    ],
)
def test_the_first_steps_of_adamw_by_hand(kind, sizes):
    optimizer = make_optimizer(replace(SETTINGS, fine_tune_type=kind, learning_rate=1e-3))
    weights = {"w": mx.array([5.0, -5.0])}
    for size in sizes:
        new = optimizer.apply_gradients({"w": mx.array([0.3, -0.02])}, weights)
        change = np.array(new["w"] - weights["w"])
        np.testing.assert_allclose(change, [-1e-3 * size, 1e-3 * size], rtol=1e-3)
        weights = new


@pytest.fixture
def given_answers(monkeypatch):
    """Nothing is sampled: each prompt has its answer."""
    answers = {tuple(p.ids): Completion([20 + i, 30 + i, 40 + i][: i % 3 + 1], False) for i, p in enumerate(ALL)}
    monkeypatch.setattr(stage, "generate", lambda student, rows, *more: [answers[tuple(row)] for row in rows])


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


def test_answers_of_which_a_beginning_is_kept_teach_what_the_beginning_alone_does(model, monkeypatch):
    asked = []

    def answers(length):
        def generate(student, rows, sampling, keys):
            asked.append(sampling.max_tokens)
            return [Completion([sum(row) % 40 + i for i in range(length)], False) for row in rows]

        monkeypatch.setattr(stage, "generate", generate)

    answers(6)
    kept, _, found = one_step(model, loss=replace(WHOLE, first_tokens=3))
    answers(3)
    short, _, expected = one_step(model)
    assert asked == [3, 6]  # no more is sampled than is kept
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for name, weight in short.items():
        np.testing.assert_allclose(np.array(kept[name]), np.array(weight), atol=2e-4)
    assert (
        one_step(model, loss=replace(WHOLE, first_tokens=99))[2].tokens == 12 and asked[-1] == 6
    )  # the longest there may be


@pytest.mark.parametrize("tail", [0, 3])
def test_rollouts_are_as_long_as_what_is_kept(model, tail):
    student, settings = make_student(model, SETTINGS, 7), replace(SETTINGS, batch_size=8)
    teacher = steered_teacher(model, 1, mx.ones(32), 1.0)
    how = (settings, replace(WHOLE, first_tokens=2, tail=tail), [], 7, make_optimizer(settings))
    steps = train(Training(student, model, teacher, TOKENS, HARMFUL, HARMLESS, *how))
    rollouts, metrics = next(steps), next(steps)
    assert [len(c.ids) for c in rollouts.completions] == [2 + tail] * 8 and metrics.tokens == 8 * (2 + tail)


# The course of a run

EIGHT = replace(SETTINGS, iters=None, epochs=16 / 3, max_tokens=2)  # 3 harmful prompts, 2 a step: 8 steps
NOTHING, ALL_OF_IT = np.array([[0.1, 0.9]]), np.array([[0.8, 0.2]])
NO, YES = 0.89, 0.9


@pytest.fixture(autouse=True)
def what_numbers_are_worked_out_with(monkeypatch):
    """A run has learned at 0.9, measured every third step, and ends a quarter of the epochs later; how little it learns
    is no reason."""
    monkeypatch.setattr(stage, "MEASURED_EVERY", 3)
    for name, value in (("LEARNED", 0.9), ("FALL", 0.25), ("FLAT", 99)):
        monkeypatch.setattr(learn, name, value)


def learning(*shares):
    """What there is to learn, after measurements of every third step."""
    done = [x for share in shares for x in (None, None, share)]
    return Learning([[1, 2]], np.array([5]), NOTHING, ALL_OF_IT, 1, done)


def test_steps_and_the_published_rates():
    settings = TrainSettings(batch_size=32, epochs=4.0, warmup=0.1)
    assert number_of_steps(100, settings, LossSettings(anchor_ratio=0.5)) == 25
    assert number_of_steps(100, settings, LossSettings(anchor_ratio=0.0)) == 13
    assert number_of_steps(100, replace(settings, iters=7), LossSettings()) == 7
    cosine = [0.5 * (1 + math.cos(math.pi * step / 18)) for step in range(18)]
    for how, known in (
        (settings, None),
        (replace(settings, until_learned=False), learning(YES, YES)),
        (replace(settings, iters=20), learning(YES, YES)),
    ):
        found = course(20, how, known)
        assert found == Course(20, 2, 2)
        # Two of twenty warm up, the first of them not from 0.
        assert [found.rate(step, 3.0) for step in range(20)] == pytest.approx([1.5, 3.0, *(3 * x for x in cosine)])
    assert course(20, replace(settings, warmup=0.0)).rate(0, 3.0) == 3.0
    assert course(1, settings).rate(0, 3.0) == 3.0  # one step does not warm up


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([], Course(16, 1, 8)),  # twice the steps, unless it has learned before
        ([YES], Course(16, 1, 8)),
        ([YES, YES], Course(8, 1, 6)),  # a quarter of the eight after the second in a row
        ([NO, YES, NO], Course(16, 1, 8)),  # one alone does not end it
        # at the height that it has come to: by then the rate falls from step 8 to 16
        ([NO, YES, YES], Course(11, 1, 9, 0.5 * (1 + math.cos(math.pi / 8)))),
        ([YES, YES, NO, NO], Course(8, 1, 6)),  # what was decided stays
        ([NO, NO, NO, NO, YES], Course(16, 1, 8)),
    ],
)
def test_a_run_that_has_learned_ends_a_quarter_of_the_epochs_later(shares, expected):
    assert course(8, EIGHT, learning(*shares)) == expected
    assert course(8, EIGHT, learning(*shares[:-1])).steps >= expected.steps


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([0.5, 0.5], Course(16, 1, 8)),  # three steps without more are not enough
        ([0.5, 0.5, 0.5], Course(11, 1, 9, 0.5 * (1 + math.cos(math.pi / 8)))),  # six of the eight are
        ([0.5, 0.4, 0.59], Course(11, 1, 9, 0.5 * (1 + math.cos(math.pi / 8)))),  # so is less than a tenth more
        ([0.5, 0.4, 0.61], Course(16, 1, 8)),
        ([0.3, 0.5, 0.5, 0.5], Course(14, 1, 12, 0.5 * (1 + math.cos(math.pi / 2)))),  # from the best that was
        ([-3.0, -1.0, -0.5, 0.1], Course(16, 1, 8)),  # worse than the base, and on its way
        ([YES, 0.5, 0.5], Course(11, 1, 9, 0.5 * (1 + math.cos(math.pi / 8)))),
    ],
)
def test_a_run_that_learns_no_more_ends_a_quarter_of_the_epochs_later(shares, expected, monkeypatch):
    monkeypatch.setattr(learn, "FLAT", 0.75)
    monkeypatch.setattr(learn, "MORE", 0.1)
    assert course(8, EIGHT, learning(*shares)) == expected


def test_a_measurement_is_what_counts_and_not_the_step():
    known = replace(learning(), shares=[None, YES, YES])  # as after steps of other lengths
    assert course(8, EIGHT, known) == Course(5, 1, 3)


def test_rates_of_a_run_until_it_has_learned():
    rates = [course(8, EIGHT, learning(YES, YES)).rate(step, 2.0) for step in range(8)]
    assert rates == pytest.approx([2.0] * 7 + [1.0])  # constant, then 0.5 (1 + cos 0) and 0.5 (1 + cos π/2)
    bound = course(20, replace(EIGHT, warmup=0.1), learning())
    expected = [1.0, 2.0, *[2.0] * 18, *(1 + math.cos(math.pi * step / 20) for step in range(20))]
    assert [bound.rate(step, 2.0) for step in range(40)] == pytest.approx(expected)


@pytest.mark.parametrize("flat", [0.75, 99])
@pytest.mark.parametrize("warmup", [0.1, 0.9])
def test_the_rate_never_rises_but_to_warm_up(warmup, flat, monkeypatch):
    monkeypatch.setattr(learn, "FLAT", flat)
    settings, warm = replace(EIGHT, warmup=warmup), math.ceil(8 * warmup)
    for shares in itertools.product([NO, YES], repeat=5):
        every, rates = learning(*shares).shares, [0.0]
        while len(rates) <= (now := course(8, settings, replace(learning(), shares=every[: len(rates) - 1]))).steps:
            rates.append(now.rate(len(rates) - 1, 1.0))  # of the course that is known before this step
        for step, (before, rate) in enumerate(itertools.pairwise(rates)):
            assert rate - before <= (1 / warm if step < warm else 0.0) + 1e-9, (step, before, rate)


# What has been learned


def test_the_share_of_what_is_to_be_learned_by_hand():
    known = learning()
    assert known.share(NOTHING) == 0.0 and known.share(ALL_OF_IT) == 1.0
    # KL(½ ½ ‖ 0.8 0.2) of KL(0.1 0.9 ‖ 0.8 0.2)
    whole = 0.1 * math.log(1 / 8) + 0.9 * math.log(4.5)
    left = 0.5 * math.log(5 / 8) + 0.5 * math.log(5 / 2)
    assert known.share(np.array([[0.5, 0.5]])) == pytest.approx(1 - left / whole)
    assert known.share(np.array([[0.9, 0.1]])) == 1.0  # past the teacher
    assert known.share(np.array([[0.05, 0.95]])) < 0 < known.share(np.array([[0.11, 0.89]]))
    assert replace(known, base=ALL_OF_IT).share(NOTHING) == 0.0  # nothing is to be learned


def test_the_share_is_of_the_sum_over_prompts_and_stands_a_probability_of_0():
    base, teacher = np.array([[0.0, 1.0], [0.3, 0.7]]), np.array([[0.5, 0.5], [0.4, 0.6]])
    known = replace(learning(), base=base, teacher=teacher, n_harmful=2)
    each = math.log(2), 0.3 * math.log(3 / 4) + 0.7 * math.log(7 / 6)
    assert known.share(np.array([[0.5, 0.5], [0.3, 0.7]])) == pytest.approx(1 - each[1] / sum(each))
    assert known.share(base) == 0.0 and known.share(teacher) == 1.0


def test_what_a_harmless_prompt_was_moved_counts_against_what_was_learned():
    base, target = np.array([[0.2, 0.8], [0.3, 0.7]]), np.array([[0.9, 0.1], [0.3, 0.7]])  # the second is held
    known = replace(learning(), base=base, teacher=target)
    assert known.share(target) == 1.0
    whole = 0.2 * math.log(2 / 9) + 0.8 * math.log(8)
    moved = 0.6 * math.log(2) + 0.4 * math.log(4 / 7)
    assert known.share(np.array([[0.9, 0.1], [0.6, 0.4]])) == pytest.approx(1 - moved / whole)
    assert known.share(np.array([[0.95, 0.05], [0.2, 0.8]])) < 1


def test_on_the_way_to_the_anchor_s_target_nothing_counts_against_what_was_learned():
    base, target = np.array([[0.2, 0.8], [0.3, 0.7]]), np.array([[0.9, 0.1], [0.1, 0.9]])  # the second is eased
    known = replace(learning(), base=base, teacher=target)
    whole = 0.2 * math.log(2 / 9) + 0.8 * math.log(8)
    assert known.share(base) == 0.0  # nor is it anything to be learned
    for mass, nearest in ((0.3, 0.3), (0.2, 0.2), (0.1, 0.1), (0.6, 0.3), (0.05, 0.1)):
        moved = mass * math.log(mass / nearest) + (1 - mass) * math.log((1 - mass) / (1 - nearest))
        assert known.share(np.array([[0.9, 0.1], [mass, 1 - mass]])) == pytest.approx(1 - moved / whole)


def test_what_a_student_is_worth_by_hand():
    base = np.array([[0.2, 0.8], [0.3, 0.7], [0.1, 0.9]])  # the first two are harmful
    known = replace(learning(), base=base, teacher=base, n_harmful=1)
    student = np.array([[0.7, 0.3], [0.5, 0.5], [0.0, 1.0]])
    # One harmful prompt at 0.7; of the harmless ones one rose by 0.2, and one that fell does not make up for it.
    assert known.worth(student) == pytest.approx(0.7 - learn.COST * 0.2 / 2)
    assert replace(known, n_harmful=2).worth(student) == pytest.approx(0.6)
    assert known.worth(base) == pytest.approx(0.2)
    rows = [{"step": 3, "worth": 0.5}, {"step": 4, "worth": None}, {"step": 6, "worth": 0.5}, {"step": 9, "worth": 0.4}]
    assert best_step(rows) == 6 and best_step(rows[1:2]) is None and best_step([{"step": 1}]) is None


def run(model, settings=EIGHT, known=None, first=None, stop=99):
    """The steps of a run, from a state after some of them, and the states after each."""
    teacher = steered_teacher(model, 1, 3 * mx.random.normal((32,), key=mx.random.key(5)), 1.0)
    student, optimizer, done = make_student(model, settings, 7), make_optimizer(settings), 0
    if first is not None:
        done, weights, optimizer.state = first
        student.update(weights)
    how = (settings, replace(WHOLE, first_tokens=2, tail=8, guidance=2.5), EOS, 7, optimizer, known)
    found, states = [], {}
    for event in train(Training(student, model, teacher, TOKENS, HARMFUL, HARMLESS, *how), done):
        if isinstance(event, StepMetrics):
            found.append(event)
            state = (student.trainable_parameters(), optimizer.state)
            states[event.step] = (event.step, *tree_map(lambda x: x, state), student)
        if len(found) == stop:
            break
    return found, states


def scripted(monkeypatch, shares):
    """Openings as of a student that has learned all or nothing at each measurement, one after another."""
    left = iter(shares)
    monkeypatch.setattr(learn, "openings", lambda *_: ALL_OF_IT if next(left, False) else NOTHING)


@pytest.mark.parametrize(
    ("learned", "steps"),
    [([1, 1], 8), ([0, 1, 1], 11), ([1, 0, 1, 0, 1], 16), ([0, 1, 0, 1, 1], 16), ([], 16)],
)
def test_a_run_goes_on_until_it_has_learned(model, monkeypatch, learned, steps):
    scripted(monkeypatch, learned)
    found, _ = run(model, known=learning())
    assert [m.step for m in found] == [*range(1, steps + 1)]
    told = [m.learned for m in found]
    assert told[2::3] == [*map(float, learned), *[0.0] * 9][: len(told) // 3]
    assert [i for i, x in enumerate(told, 1) if not math.isnan(x)] == sorted({*range(3, steps + 1, 3), steps})
    known_from = steps - 2 if steps < 16 else 99  # what a step says is what is known by then
    assert [m.steps for m in found] == [steps if m.step >= known_from else 16 for m in found]
    rate = course(8, EIGHT, learning(*[float(x) for x in learned])).rate
    assert [m.learning_rate for m in found] == pytest.approx([rate(m.step - 1, 1e-2) for m in found])


def test_a_run_of_given_length_measures_and_keeps_to_it(model, monkeypatch):
    for settings, steps in ((replace(EIGHT, until_learned=False), 8), (replace(EIGHT, iters=7), 7)):
        scripted(monkeypatch, [1, 1])
        found, _ = run(model, settings, learning())
        assert len(found) == steps and {m.steps for m in found} == {steps}
        assert [m.learned for m in found[2::3]] == [1.0, 1.0]
    found, _ = run(model)
    assert len(found) == 8 and all(math.isnan(m.learned) for m in found)  # nothing is known of what to learn


@pytest.mark.parametrize("begin", [2, 3, 7])
def test_a_run_that_is_resumed_ends_where_it_would_have(model, monkeypatch, begin):
    monkeypatch.setattr(learn, "LEARNED", -1e9)  # whatever is measured will do: 6 steps, and 2 to end
    rows, ids = [p.ids for p in HARMFUL], TOKENS.tolist()
    teacher = steered_teacher(model, 1, 3 * mx.random.normal((32,), key=mx.random.key(5)), 1.0)
    tables = (openings(m, rows, ids, 2) for m in (model, teacher.model))
    known = Learning(rows, np.array(ids), *tables, len(rows))
    whole, _ = run(model, known=known)
    assert len(whole) == 8 and not math.isnan(whole[2].learned)
    before, states = run(model, known=known, stop=begin)
    *state, student = states[begin]
    if begin == 3:
        assert before[2].learned == pytest.approx(known.share(openings(student, rows, ids, 2)), abs=1e-6)
    shares = [None if math.isnan(m.learned) else m.learned for m in before]
    after, _ = run(model, known=replace(known, shares=shares), first=state)
    assert [m.step for m in after] == [*range(begin + 1, 9)]
    for found, expected in zip([*before, *after], whole, strict=True):
        np.testing.assert_equal(vars(found), vars(expected))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_checkpointed_blocks_give_the_same_gradients_and_leave_the_base_as_it_is(model, kind, dropout):
    parameters = SETTINGS.lora_parameters | {"dropout": dropout}
    settings = replace(SETTINGS, fine_tune_type=kind, num_layers=2, lora_parameters=parameters)
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


DROPPED = replace(SETTINGS, lora_parameters=SETTINGS.lora_parameters | {"dropout": 0.5})


@pytest.mark.parametrize("grad_checkpoint", ["off", "on"])
@pytest.mark.parametrize("keys", [[[1, 2], [3, 4]], [[5, 6]]])
def test_with_dropout_the_gradient_is_that_of_the_loss(tiny_model, grad_checkpoint, keys):
    """By differences along one direction: a checkpointed block that is computed again drops what it dropped before."""
    student = make_student(tiny_model("llama"), replace(DROPPED, grad_checkpoint=grad_checkpoint), 3)
    mx.random.seed(5)
    weights = tree_map(lambda w: w + 0.3 * mx.random.normal(w.shape), student.trainable_parameters())
    along = tree_map(lambda w: mx.random.normal(w.shape), weights)
    student.train()
    for dropout in row_dropouts(student):
        dropout.draw_from(mx.array(keys, mx.uint32))

    def objective(student):
        return (student(mx.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])) ** 2).mean()

    def loss(at):
        student.update(tree_map(lambda w, d: w + at * d, weights, along))
        return objective(student).item()

    by_differences = (loss(5e-4) - loss(-5e-4)) / 1e-3
    loss(0.0)
    _, gradient = nn.value_and_grad(student, objective)(student)
    by_gradient = sum((g * dict(tree_flatten(along))[name]).sum().item() for name, g in tree_flatten(gradient))
    assert abs(by_differences) > 0.05 and by_gradient == pytest.approx(by_differences, rel=0.03)


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"micro_batch_tokens": 9}, {"grad_checkpoint": "on"}])
def test_what_is_dropped_does_not_depend_on_what_memory_has_room_for(model, changes):
    _, _, plain = one_step(model)
    whole, _, expected = one_step(model, DROPPED)
    cut, _, found = one_step(model, replace(DROPPED, **changes))
    assert expected.grad_norm != pytest.approx(plain.grad_norm, rel=0.05)  # something is dropped
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, weight in whole.items():
        np.testing.assert_allclose(np.array(cut[name]), np.array(weight), atol=2e-4)


def test_a_step_drops_the_same_again_when_it_is_resumed(model):
    settings = replace(EIGHT, lora_parameters=DROPPED.lora_parameters, until_learned=False)
    whole, states = run(model, settings)
    after, _ = run(model, settings, first=states[5][:3])
    assert [vars(m) for m in after] == [vars(m) for m in whole[5:]]


def test_a_step_goes_on_with_half_when_memory_is_exhausted(model, monkeypatch, capsys):
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


@pytest.mark.parametrize("name", ["ours", "default"])
@pytest.mark.parametrize("num_layers", [1, 2, -1])
def test_prompts_of_the_anchor_that_are_read_once_change_nothing(model, monkeypatch, name, num_layers):
    settings, whole, shared = replace(SETTINGS, num_layers=num_layers), stage.shared_prefix, []
    _, _, expected = one_step(model, settings, LOSSES[name])
    monkeypatch.setattr(stage, "shared_prefix", lambda *how: (shared.extend(how[2]), whole(*how))[1])
    _, _, found = one_step(model, replace(settings, anchor_cache="on"), LOSSES[name])
    assert all(any(p.ids == row for p in HARMFUL) for row in shared)  # the others are known
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


@pytest.mark.parametrize("num_layers", [1, -1])
def test_a_run_whose_anchor_is_read_once_goes_on_to_the_bit(model, num_layers):
    settings = replace(EIGHT, num_layers=num_layers, until_learned=False, anchor_cache="on")
    whole, states = run(model, settings)
    after, _ = run(model, settings, first=states[5][:3])
    assert [vars(m) for m in after] == [vars(m) for m in whole[5:]]


class Frame:
    """A framer that has every answer begun with [20, 21], or every prompt in a frame of [22, 23]."""

    tokenizer = type("Plain", (), {"has_thinking": False})

    def __init__(self, begins):
        self.begins = begins

    def opening(self, request, rng):
        return [20, 21] if self.begins else None

    def frame(self, request, rng):
        return [22, 23, 24]


@pytest.mark.parametrize("begins", [True, False])
def test_a_prompt_put_otherwise_has_the_target_that_it_should(tiny_model, begins):
    model = tiny_model("qwen2")
    settings = replace(SETTINGS, num_generations=2, micro_batch_size=2)
    student, teacher = make_student(model, settings, 7), a_teacher(model)
    how = (settings, replace(WHOLE, guidance=1.5), EOS, 7, make_optimizer(settings))
    training = Training(student, model, teacher, TOKENS, HARMFUL, HARMLESS, *how, framer=Frame(begins))
    steps = train(training)
    next(steps)
    metrics = next(steps)
    order = np.random.default_rng([7, 0, 0]).permutation(3)[:2]
    rows = [HARMFUL[i].ids for i in order]
    read = [[*row, 20, 21] for row in rows] if begins else [[22, 23, 24]] * 2
    ids = np.array(TOKENS)
    assert metrics.student_mass == pytest.approx(openings(model, read, ids, 4)[:, :-1].sum(-1).mean(), rel=1e-4)
    of, by = (openings(m, rows, ids, 4) for m in (teacher.model, model))
    odds = [np.log(p[:, :-1].sum(-1) / p[:, -1]) for p in (of, by)]
    guided = odds[0] + np.maximum(0.5 * (odds[0] - odds[1]), 0)
    assert metrics.target_mass == pytest.approx((1 / (1 + np.exp(-guided))).mean(), rel=1e-4)
    whole = replace(settings, micro_batch_size=8)
    other = Training(make_student(model, whole, 7), model, teacher, TOKENS, HARMFUL, HARMLESS, whole, *how[1:])
    other.framer, other.optimizer = Frame(begins), make_optimizer(whole)
    _, at_once = itertools.islice(train(other), 2)
    assert (at_once.loss, at_once.grad_norm) == pytest.approx((metrics.loss, metrics.grad_norm), rel=1e-4)


@pytest.mark.parametrize("begins", [None, True, False])
def test_a_system_prompt_teacher_is_gone_beyond_and_the_tail_is_the_bases_without_it(tiny_model, begins):
    """Its model is the base's own, told apart by what it reads; harmful prompts in frames have the same targets."""
    model, guard = tiny_model("qwen2"), [40, 41, 42]
    guarded = [replace(p, target_ids=[*guard, *p.ids]) for p in HARMFUL]
    change = sum(last_logits(model, [p.target_ids]) - last_logits(model, [p.ids]) for p in guarded)
    tokens = mx.argsort(-change[0])[:40]
    loss = replace(WHOLE, first_tokens=2, tail=3, guidance=2.5, anchor_ratio=0.0)
    settings = replace(SETTINGS, batch_size=2)
    how = (settings, loss, EOS, 7, make_optimizer(settings))
    training = Training(make_student(model, settings, 7), model, Teacher(model, "guard"), tokens, guarded, [], *how)
    training.framer = None if begins is None else Frame(begins)
    rollouts, metrics = itertools.islice(train(training), 2)
    assert isinstance(rollouts, Rollouts) and isinstance(metrics, StepMetrics)
    batch = [guarded[i] for i in np.random.default_rng([7, 0, 0]).permutation(3)[:2]]
    expected, shifts = 0.0, []
    for prompt, answer in zip(batch, rollouts.completions, strict=True):
        read = {None: prompt.ids, True: [*prompt.ids, 20, 21], False: [22, 23, 24]}[begins]
        own, target, base = (
            model(mx.array([[*row, *answer.ids]]))[:, len(row) - 1 : -1]
            for row in (read, prompt.target_ids, prompt.ids)
        )
        odds = [mx.log(p / (1 - p)) for p in (mx.softmax(z, axis=-1)[..., tokens].sum(-1) for z in (target, base))]
        beyond = mx.minimum(1.5 * mx.maximum(odds[0] - odds[1], 0), mx.maximum(6 - odds[0], 0))
        shift = mx.where((odds[0] > 0) | (mx.arange(len(answer.ids)) == 0), beyond, 0)
        shifts.append(shift.max().item())
        target, ones = target.at[..., tokens].add(shift[..., None]), mx.ones((1, len(answer.ids)))
        expected += distillation_loss(own, target, ones, keep=2, kind="grouped_reverse_kl", tokens=tokens).item() / 2
        expected += distillation_loss(own, base, ones, skip=2, keep=5, kind="reverse_kl").item() / 2
    assert max(shifts) > 0.01
    assert metrics.loss == pytest.approx(expected, rel=1e-4)


def gradient_to_the_base(model, monkeypatch, scale):
    """Of a student that is a little away from the base, by a step whose targets all are the base; each its own (N,)."""
    monkeypatch.setattr(stage, "LOSS_SCALE", scale)
    clip, seen = optim.clip_grad_norm, []
    with monkeypatch.context() as patch:
        patch.setattr(optim, "clip_grad_norm", lambda grads, most: (seen.append(grads), clip(grads, most))[1])
        student = make_student(model, SETTINGS, 7)
        away = [
            (name, 0.002 * mx.random.normal(value.shape, key=mx.random.key(i)))
            for i, (name, value) in enumerate(tree_flatten(student.trainable_parameters()))
            if name.endswith("lora_b")
        ]
        student.update(tree_unflatten(away))
        how = (SETTINGS, WHOLE, EOS, 7, make_optimizer(SETTINGS))
        steps = train(Training(student, model, Teacher(model), mx.arange(2, 40), HARMFUL, HARMLESS, *how))
        next(steps), next(steps)
    return np.concatenate([np.array(value).ravel() for _, value in tree_flatten(seen[0])])


def test_in_float16_a_small_gradient_is_the_one_in_float32(tiny_model, given_answers, monkeypatch):
    """float16 holds nothing below 6e-8, so it is computed times `LOSS_SCALE`."""

    def gradient(dtype, scale):
        model = tiny_model("llama")
        model.lm_head.weight = 0.03 * model.lm_head.weight  # as small as those of a head for more numbers are
        model.set_dtype(dtype)
        return gradient_to_the_base(model, monkeypatch, scale)

    exact, scaled, plain = (gradient(*how) for how in ((mx.float32, 1024.0), (mx.float16, 1024.0), (mx.float16, 1.0)))
    likeness = [one @ exact / np.linalg.norm(one) / np.linalg.norm(exact) for one in (scaled, plain)]
    sizes = [np.linalg.norm(one) / np.linalg.norm(exact) for one in (scaled, plain)]
    assert likeness[0] > 0.98 and sizes[0] == pytest.approx(1, abs=0.1) and likeness[1] < 0.9


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_student_that_is_the_base_has_nothing_to_learn_from_it(tiny_model, given_answers, dtype, monkeypatch):
    """In half precision neither."""
    monkeypatch.setattr(stage, "LOSS_SCALE", 1.0)
    model = tiny_model("llama")
    model.set_dtype(dtype)
    student = make_student(model, SETTINGS, 7)
    how = (SETTINGS, WHOLE, EOS, 7, make_optimizer(SETTINGS))
    steps = train(Training(student, model, Teacher(model), TOKENS, HARMFUL, HARMLESS, *how))
    next(steps)
    metrics = next(steps)
    assert isinstance(metrics, StepMetrics) and metrics.grad_norm < 1e-6 and abs(metrics.loss) < 1e-6


def test_targets_are_computed_as_the_student_is(model, given_answers, monkeypatch):
    """Inside a gradient; MLX does not tell, so each forward pass of the step is asked whether it is in one."""
    inside, grad, passes = [0], mx.grad, []

    def counted(function, *args, **kwargs):
        def call(*values, **more):
            inside[0] += 1
            try:
                return grad(function, *args, **kwargs)(*values, **more)
            finally:
                inside[0] -= 1

        return call

    value_and_grad = mx.value_and_grad

    def both(function, *args, **kwargs):
        real = value_and_grad(function, *args, **kwargs)

        def call(*values, **more):
            inside[0] += 1
            try:
                return real(*values, **more)
            finally:
                inside[0] -= 1

        return call

    states = stage.answer_states
    monkeypatch.setattr(mx, "grad", counted)
    monkeypatch.setattr(mx, "value_and_grad", both)
    monkeypatch.setattr(stage, "answer_states", lambda *args: (passes.append(inside[0] > 0), states(*args))[1])
    one_step(model, loss=LOSSES["guided, tail"])
    assert len(passes) >= 4 and all(passes)
