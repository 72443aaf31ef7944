"""The checks a run makes of itself."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from test_own_answers import Thinker

from safesteer_mlx import align
from safesteer_mlx.align import _fitted
from safesteer_mlx.method import direction, memory_plan, own_answers, rollout, safety_tokens
from safesteer_mlx.method import learning as learn
from safesteer_mlx.method import run as runs
from safesteer_mlx.method import teacher as teachers
from safesteer_mlx.method.direction import (
    Direction,
    FoundDirections,
    as_it_answers,
    find_directions,
    mean_differences,
    or_all,
    too_much_left,
)
from safesteer_mlx.method.learning import Learning, choose_strength, what_to_learn
from safesteer_mlx.method.losses import far_enough
from safesteer_mlx.method.own_answers import OwnAnswers, Thoughts, as_it_begins, find_openers, with_room_to_think
from safesteer_mlx.method.prompts import (
    Instruction,
    built_in_sets,
    prompts_from,
    render,
    render_all,
    template_tokens,
)
from safesteer_mlx.method.residual import _override, blocks, last_logits
from safesteer_mlx.method.rollout import AfterThought, Completion, Sampling, generate, has_equal_batches
from safesteer_mlx.method.run import batch_size, beside_a_prompt, make_run, most_read, sets_read
from safesteer_mlx.method.safety_tokens import SafetyTokens, check_tokens, openings
from safesteer_mlx.method.student import check_saved, lora_change, make_student, save_student, weaken
from safesteer_mlx.method.teacher import (
    VALIDATION_PROMPTS,
    ChosenTeacher,
    Teacher,
    ask,
    find_teacher,
    make_teacher,
    settled,
    steered_teacher,
    validation,
)
from safesteer_mlx.method.train import check_gradient, collapsed, make_training
from safesteer_mlx.method.training_prompts import training_prompts
from safesteer_mlx.recipe import BUNDLED, MODELS, resolve
from safesteer_mlx.system import memory
from safesteer_mlx.system.load import load
from safesteer_mlx.system.screen import Screen, UserError
from safesteer_mlx.system.store import as_json, decoded, encoded


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the bundled model."""
    path = str(MODELS / BUNDLED)
    base = load(path)
    recipe, _ = resolve(base.config, {"model": path, "adapter_path": str(tmp_path_factory.mktemp("run") / "adapters")})
    return make_run(recipe, base, Screen())


@pytest.fixture(scope="module")
def found(run):
    """Its directions."""
    return find_directions(run)


def moved(run, by):
    """A student whose LoRA B is `by` everywhere."""
    student = make_student(run.base.model, run.recipe.train, 0, run.base.quantized)
    trained = tree_flatten(student.trainable_parameters())
    student.update(tree_unflatten([(n, mx.full(w.shape, by) if n.endswith("lora_b") else w) for n, w in trained]))
    return student


def test_saved_adapters_are_held_against_the_student_and_the_base(run, tmp_path):
    run = run.with_settings(run=replace(run.recipe.run, adapter_path=str(tmp_path)))
    save_student(run, moved(run, 0.01))
    check_saved(run, moved(run, 0.01))
    with pytest.raises(UserError, match="do not give what was trained"):
        check_saved(run, moved(run, 0.02))
    save_student(run, moved(run, 0.0))
    with pytest.raises(UserError, match="change nothing"):
        check_saved(run, moved(run, 0.0))


def test_a_teacher_that_is_the_base_is_refused(run):
    nothing = Direction(-1, 3, mx.zeros(128))
    with pytest.raises(UserError, match=r"coeff = 0.85 changes nothing"):
        make_teacher(run, nothing, 0.85)


def test_a_student_that_says_nothing_or_only_refuses_is_noticed(run, found):
    base, recipe = run.base, run.recipe
    assert collapsed(run, base.model) is None
    # A student that ends its turn at once
    silent = make_student(base.model, recipe.train, 0, base.quantized)
    whole, eos = type(silent).__call__, base.eos_ids[0]

    class Silent(type(silent)):
        def __call__(self, *args, **kwargs):
            return whole(self, *args, **kwargs) + 1e4 * (mx.arange(base.vocabulary) == eos)

    silent.__class__ = Silent
    assert "16 empty answers to 16" in (collapsed(run, silent) or "")
    quiet = replace(run, base=replace(base, model=silent))  # as a base whose thoughts are cut
    assert collapsed(quiet, silent) is None
    teacher = make_teacher(run, found.shortlist[0], 2.0)
    assert "refuses" in (collapsed(run, teacher.model) or "")


@pytest.mark.parametrize(("name", "said"), [("qwen2", ""), ("llama", ""), ("gemma2", "in groups of one length")])
def test_an_architecture_that_batches_one_length_alone_answers_in_groups(tiny_model, name, said, capsys):
    # gemma2 of mlx-lm 0.32.2 fails on prompts of unequal length with grouped heads.
    rows = [[1, 2, 3, 4 + i][: 2 + i % 3] for i in range(12)]
    base = SimpleNamespace(model=tiny_model(name), eos_ids=[49], config={"model_type": name})
    size = batch_size(base, 64, Screen(), rows)  # type: ignore[arg-type]
    assert size == 64 and has_equal_batches(base.model) is bool(said)
    assert said in capsys.readouterr().out and (said or not capsys.readouterr().out)


def test_an_architecture_that_cannot_be_batched_answers_one_at_a_time(model, monkeypatch, capsys):
    monkeypatch.setattr(runs, "batches_rightly", lambda *_: False)
    rows = [[1, 2, 3, 4 + i][: 2 + i % 3] for i in range(12)]
    base = SimpleNamespace(model=model, eos_ids=[49], config={"model_type": "odd"})
    size = batch_size(base, 64, Screen(), rows)  # type: ignore[arg-type]
    assert size == 1 and not has_equal_batches(model)
    assert "one at a time" in capsys.readouterr().out


def test_want_of_memory_is_no_architecture_that_cannot_be_batched(model, monkeypatch):
    def fails(*_):
        raise memory.PagingError("sampling used 9.9 GB, the same command with --yes goes on")

    monkeypatch.setattr(runs, "generate_here", fails)
    with pytest.raises(memory.PagingError):
        runs.batches_rightly(model, [[1, 2], [1, 2, 3]], [49])


@pytest.mark.parametrize(
    ("way", "left", "whole"),
    [("auto", 0.0, False), ("auto", 0.02, True), ("published", 0.02, False), ("stream", 0.0, True)],
)
def test_ablation_projects_the_whole_stream_where_the_published_way_leaves_some(
    run, monkeypatch, capsys, way, left, whole
):
    monkeypatch.setattr(direction, "left_by_ablation", lambda *_: left)
    own = replace(run, screen=Screen(verbose=True))
    own = own.with_settings(direction=replace(run.recipe.direction, ablation=way))
    assert direction._whole_stream(own, np.ones((2, 4, run.prompts.n_eoi), np.float32)) is whole
    assert ("leaves up to 2.0%" in capsys.readouterr().out) is (way == "auto" and whole)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_what_rounding_leaves_of_a_direction_is_not_taken_for_what_norms_leave(tiny_model, dtype, monkeypatch):
    model, tokens = tiny_model("llama"), mx.array([[3, 1, 4, 1, 5]])
    model.set_dtype(dtype)
    vector, at_most = mx.random.normal((32,), key=mx.random.key(1)), 1e-3 if dtype == mx.float32 else 1e-2
    assert too_much_left(model, vector, tokens) is None
    for left, much in ((0.9 * at_most, None), (1.1 * at_most, 1.1 * at_most)):
        monkeypatch.setattr(direction, "left_by_ablation", lambda *_, left=left: left)
        assert too_much_left(model, vector, tokens) == much


def test_a_forward_pass_that_padding_changes_is_refused(model):
    rows = [[1, 2, 3, 4 + i][: 2 + i % 3] for i in range(12)]
    # What stands in the last column leaks into every position
    _override(blocks(model)[1], "Leaking", lambda call, x, *a, **k: call(x, *a, **k) + 5 * x[:, -1:])
    base = SimpleNamespace(model=model, eos_ids=[49], config={"model_type": "leaky"})
    with pytest.raises(UserError, match="padding changes what model_type leaky computes"):
        batch_size(base, 64, Screen(), rows)  # type: ignore[arg-type]


def tokens(explained=0.9, openings=(0.5, 0.2), nats=1.0, count=1):
    return SafetyTokens([{"id": 3 + i} for i in range(count)], explained, list(openings), nats)


@pytest.mark.parametrize(
    ("change", "settings", "said", "remedy"),
    [
        ({"explained": 0.49}, {}, "explain only 49% of what steering does", ""),
        ({"explained": 0.49}, {"safety_tokens": 1}, "explain only 49%", "more --safety-tokens or "),
        ({"explained": 0.49, "count": 2}, {"safety_tokens": 1}, "the 2 safety tokens", "more --safety-tokens or "),
        ({"explained": 0.49}, {"token_method": "vote"}, "explain only 49%", "--token-method part or "),
        ({"openings": [0.05, 0.09]}, {}, "at a probability of only 0.09", "--coeff auto or "),
    ],
)
def test_tokens_that_would_teach_nothing_stop_the_run_unless_it_is_forced(run, change, settings, said, remedy, capsys):
    coeff = replace(run.recipe.teacher, coeff=0.7)
    run = run.with_settings(tokens=replace(run.recipe.tokens, **settings), teacher=coeff)
    check_tokens(run, tokens())
    check_tokens(run, tokens(explained=0.5, openings=[0.0, 0.1]))  # at the limits
    assert not capsys.readouterr().out
    check_tokens(run, tokens(**change, nats=0.009))  # of which no share tells anything
    assert "there is little to learn" in capsys.readouterr().out
    thinker = replace(run, base=replace(run.base, thinks=True))
    check_tokens(thinker, tokens(explained=0.25))  # of thoughts less is enough
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match="explain only 24%"):
        check_tokens(thinker, tokens(explained=0.24))
    with pytest.raises(UserError, match=said) as error:
        check_tokens(run, tokens(**change, nats=0.01))
    assert str(error.value).endswith(f"little of that; give {remedy}--loss-tokens full (or --force)")
    for given in (
        replace(run, force=True),
        run.with_settings(tokens=replace(run.recipe.tokens, safety_tokens="mine.json")),
        run.with_settings(loss=replace(run.recipe.loss, loss_tokens="full")),
    ):
        check_tokens(given, tokens(**change))
        assert said in capsys.readouterr().out


def test_a_base_that_ends_its_turn_at_once_on_harmful_prompts_is_told_by_its_other_answers(run, found, monkeypatch):
    rows = run.prompts.harmful_validation[:4]
    ends = sorted({int(t) for t in np.array(last_logits(run.base.model, rows).argmax(-1))})
    monkeypatch.setattr(type(run.base), "eos_ids", ends)
    few = replace(run, prompts=replace(run.prompts, harmful_validation=rows))
    one = few.with_settings(tokens=replace(run.recipe.tokens, token_samples=2))
    teacher = make_teacher(one, found.shortlist[0], 2.0)
    directions = replace(found, harmful=rows, harmless=found.harmless[:8])
    tokens = safety_tokens.find_tokens(one, teacher, directions)
    assert tokens.nats > 0 and len(tokens.openings) == 1
    first = openings(teacher.model, rows, tokens.ids, 32)[:, :-1].sum(-1).mean()
    assert tokens.openings == [pytest.approx(first)] and 0 < tokens.explained <= 1


def test_what_is_to_be_learned_goes_as_far_beyond_the_teacher_as_guidance_says(run):
    base = run.base
    few = replace(
        run.prompts,
        harmful_validation=run.prompts.harmful_validation[:8],
        harmless_validation=run.prompts.harmless_validation[:3],
    )
    run = replace(run, prompts=few)
    vector = 60 * mx.random.normal((base.config["hidden_size"],), key=mx.random.key(3))
    teacher, rows = steered_teacher(base.model, 2, vector, 1.0), few.harmful_validation
    change = last_logits(teacher.model, rows) - last_logits(base.model, rows)
    ids = np.array(mx.argsort(-change.mean(0)))[: base.vocabulary // 2]
    raised = SafetyTokens([{"id": int(i)} for i in ids], 0.9, [0.9], 1.0)

    def target(guidance):
        given = run.with_settings(loss=replace(run.recipe.loss, guidance=guidance))
        ready, learning = what_to_learn(given, teacher, raised)
        assert learning is not None and learning.prompts == [*rows, *few.harmless_validation]
        return ready.recipe.loss.guidance, learning

    (_, plain), (_, guided) = target(1.0), target(2.0)
    np.testing.assert_allclose(plain.teacher[:8], openings(teacher.model, rows, ids, 8), rtol=1e-6)
    np.testing.assert_allclose(guided.base, plain.base)
    np.testing.assert_allclose(guided.teacher.sum(1), 1, rtol=1e-4)
    odds = [np.log(p[:8, :-1].sum(1) / p[:8, -1]) for p in (plain.base, plain.teacher, guided.teacher)]
    assert (odds[1] > odds[0]).any()
    beyond = np.maximum(np.minimum(odds[1] - odds[0], np.maximum(6 - odds[1], 0)), 0)
    np.testing.assert_allclose(odds[2] - odds[1], beyond, atol=1e-3)
    within = guided.teacher[:, :-1] / guided.teacher[:, :-1].sum(1, keepdims=True)
    np.testing.assert_allclose(within, plain.teacher[:, :-1] / plain.teacher[:, :-1].sum(1, keepdims=True), rtol=1e-5)
    # Harmless prompts are held to the base.
    held = openings(base.model, few.harmless_validation, ids, 8)
    np.testing.assert_allclose(guided.base[8:], held, rtol=1e-6)
    np.testing.assert_allclose(guided.teacher[8:], held, rtol=1e-6)
    # Left to the model, it is what the model needs.
    guidance, found = target("auto")
    assert guidance == far_enough(odds[1], odds[0])
    np.testing.assert_allclose(found.teacher, target(guidance)[1].teacher)


def test_the_anchor_s_target_is_as_far_below_the_base_as_the_margin_says(run):
    """Where answers begin, and on the tokens that only refuse; what is on the way to it is learned, not moved."""
    base, few = run.base, replace(run.prompts, harmful_validation=run.prompts.harmful_validation[:8])
    vector = 60 * mx.random.normal((base.config["hidden_size"],), key=mx.random.key(3))
    teacher = steered_teacher(base.model, 2, vector, 1.0)
    everywhere = openings(base.model, few.harmless_validation, range(base.vocabulary - 1), 32)[:, :-1]
    ids = np.argsort(-everywhere.mean(0))[:12]  # likely ones, so that there is something to lower
    refusing = [int(i) for i in ids[1:3]]
    tokens = SafetyTokens([{"id": int(i)} for i in ids], 0.9, [0.9], 1.0)

    def target(margin, refusing):
        given = replace(run, prompts=few).with_settings(
            loss=replace(run.recipe.loss, guidance=1.0, anchor_margin=margin)
        )
        learning = what_to_learn(given, teacher, replace(tokens, refusing=refusing))[1]
        assert learning is not None
        return learning

    plain, eased = target(0.0, []), target(1.5, refusing)
    np.testing.assert_array_equal(plain.base, eased.base)
    np.testing.assert_array_equal(plain.teacher[:8], eased.teacher[:8])
    np.testing.assert_array_equal(plain.teacher[8:], plain.base[8:])
    within = np.append(np.isin(ids, refusing), False)
    before, after = (p[8:, within].sum(1) for p in (eased.base, eased.teacher))
    expected = np.minimum(1.5, np.maximum(np.log(before / (1 - before)) + np.log(0.97 / 0.03), 0))
    np.testing.assert_allclose(np.log(before / (1 - before)) - np.log(after / (1 - after)), expected, atol=1e-4)
    assert expected.max() == 1.5
    np.testing.assert_allclose(eased.teacher.sum(1), 1)
    others = eased.teacher[8:, ~within] / eased.base[8:, ~within]
    np.testing.assert_allclose(others, np.broadcast_to(others[:, :1], others.shape))
    learned = np.concatenate([eased.teacher[:8], eased.base[8:]])  # harmless ones may be anywhere between
    assert eased.share(eased.teacher) == eased.share(learned) == 1 and plain.share(eased.teacher) < 0.99


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        # 3 opens refusals alone; 4 as many of each kind; 5 more that help; 6 none at all.
        ([([3, 9], True), ([4, 9], True), ([4, 9], False), ([5, 9], True), ([5, 9], False), ([5], False)], [3, 4, 6]),
        ([([9, 9, 9, 9, 5], False)], [3, 4, 5, 6]),  # further on than what is taught
    ],
)
def test_tokens_that_open_other_answers_to_harmless_prompts_are_not_made_rarer(run, monkeypatch, answers, expected):
    drawn = [(Completion(ids, True), "I can't help with that." if refused else "Sure.") for ids, refused in answers]
    asked = []

    def answer(self, model, rows, sampling, stream=(), progress=None):
        asked.append((model, rows, sampling.temp))
        return drawn

    monkeypatch.setattr(type(run), "answers", answer)
    few = run.with_settings(tokens=replace(run.recipe.tokens, horizon=4))
    assert safety_tokens._only_refusing(few, [3, 4, 5, 6]) == expected
    assert asked == [(run.base.model, run.prompts.harmless_validation, 1.0)]
    thinks = replace(few, base=replace(few.base, thinks=True))
    assert safety_tokens._only_refusing(thinks, [3, 4, 5, 6]) == [3, 4, 5, 6] and len(asked) == 1
    # What refuses in words that the judge does not know refuses too.
    assert safety_tokens._only_refusing(replace(few, refusals=["Sure."]), [3, 4, 5, 6]) == [3, 4, 5, 6]


@pytest.mark.parametrize(("ratio", "margin", "is_asked"), [(0.66, 3.0, True), (0.66, 0.0, False), (0.0, 3.0, False)])
def test_tokens_that_only_refuse_are_found_where_the_anchor_goes_below_the_base(
    run, found, monkeypatch, ratio, margin, is_asked
):
    monkeypatch.setattr(safety_tokens, "_only_refusing", lambda run, tokens: tokens[:1])
    one = replace(run, prompts=replace(run.prompts, harmful_validation=run.prompts.harmful_validation[:4]))
    one = one.with_settings(
        tokens=replace(run.recipe.tokens, token_samples=1),
        loss=replace(run.recipe.loss, anchor_ratio=ratio, anchor_margin=margin),
    )
    teacher = make_teacher(one, found.shortlist[0], 2.0)
    tokens = safety_tokens.find_tokens(one, teacher, replace(found, harmless=found.harmless[:8]))
    assert tokens.refusing == (tokens.ids[:1].tolist() if is_asked else [])
    training = make_training(one, run.base.model, teacher, tokens, ([], []), None)
    assert (training.refusing is None) is not is_asked


@pytest.mark.parametrize("late", ["thinks", "alike"])
@pytest.mark.parametrize("most", [99, 1])
def test_a_model_that_thinks_first_is_asked_where_its_thoughts_part(run, monkeypatch, capsys, most, late):
    """Both kinds of prompts are read with what is thought before the teacher is farthest from the base, as many at a
    time as memory has room for; so they are where answers that begin alike part."""
    whole = learn.answer_states

    def answer_states(model, prompts, answers):
        if len(prompts) > most:
            raise RuntimeError("[metal::malloc] Unable to allocate 123 bytes")
        return whole(model, prompts, answers)

    monkeypatch.setattr(learn, "answer_states", answer_states)
    base, horizon = run.base, 5
    few = replace(
        run.prompts,
        harmful_validation=run.prompts.harmful_validation[:6],
        harmless_validation=run.prompts.harmless_validation[:4],
    )
    run = replace(run, prompts=few, base=replace(base, **{late: True}))
    run = run.with_settings(tokens=replace(run.recipe.tokens, horizon=horizon))
    vector = 60 * mx.random.normal((base.config["hidden_size"],), key=mx.random.key(3))
    teacher = steered_teacher(base.model, 2, vector, 1.0)
    change = last_logits(teacher.model, few.harmful_validation) - last_logits(base.model, few.harmful_validation)
    ids = np.array(mx.argsort(-change.mean(0)))[: base.vocabulary // 2]
    ready, learning = what_to_learn(run, teacher, SafetyTokens([{"id": int(i)} for i in ids], 0.9, [0.9], 1.0))
    assert learning is not None and ready.recipe.loss.guidance != "auto"
    lengths = []
    for kind, rows, read in (
        ("harmful", few.harmful_validation, learning.prompts[:6]),
        ("harmless", few.harmless_validation, learning.prompts[6:]),
    ):
        by = teacher.model if kind == "harmful" else base.model
        sampling = Sampling(base.eos_ids, horizon, 1.0, batch_size=run.recipe.run.generation_batch_size)
        thoughts = generate(by, rows, sampling, [run.key(16, i) for i in range(len(rows))])
        for row, begun, thought in zip(rows, read, thoughts, strict=True):
            every = [[*row, *thought.ids[:n]] for n in range(len(thought.ids))]
            own, its = (openings(model, every, ids, 8) for model in (base.model, teacher.model))
            p, q = (of[:, :-1].sum(1) for of in (its, own))
            apart = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
            assert begun == every[int(np.argmax(apart))], kind
            lengths.append(len(begun) - len(row))
    assert len(set(lengths)) > 1
    assert ("in reading thoughts: going on with 1 at a time" in capsys.readouterr().err) is (most == 1)


def test_a_system_prompt_teacher_of_a_model_that_thinks_is_asked_below_it(run):
    """Of harmless prompts too: without it, it is the base, and nothing would be apart."""
    guard, base, horizon = "Never help with anything.", run.base, 5
    sets = run.prompts.sets
    rows = [render_all(base.tokenizer, items[:4]) for items in (sets.harmful_validation, sets.harmless_validation)]
    guarded = [
        render_all(base.tokenizer, items[:4], guard) for items in (sets.harmful_validation, sets.harmless_validation)
    ]
    names = ("harmful_validation", "harmless_validation")
    few = dict(zip((*names, *(f"{name}_guarded" for name in names)), (*rows, *guarded), strict=True))
    run = replace(run, prompts=replace(run.prompts, **few), base=replace(base, thinks=True))
    run = run.with_settings(tokens=replace(run.recipe.tokens, horizon=horizon))
    change = last_logits(base.model, guarded[0]) - last_logits(base.model, rows[0])
    ids = np.array(mx.argsort(-change.mean(0)))[: base.vocabulary // 2]
    tokens = SafetyTokens([{"id": int(i)} for i in ids], 0.9, [0.9], 1.0)
    _, learning = what_to_learn(run, Teacher(base.model, guard), tokens)
    assert learning is not None
    sampling = Sampling(base.eos_ids, horizon, 1.0, batch_size=run.recipe.run.generation_batch_size)
    keys = [run.key(16, i) for i in range(4)]
    for which, by in enumerate((guarded, rows)):  # who writes: the teacher below its system prompt, the base without
        thoughts = generate(base.model, by[which], sampling, keys)
        for i, thought in enumerate(thoughts):
            cut = [thought.ids[:n] for n in range(len(thought.ids))]
            read = ([[*row, *part] for part in cut] for row in (guarded[which][i], rows[which][i]))
            of = (openings(base.model, every, ids, 8) for every in read)
            p, q = (np.stack([table[:, :-1].sum(1), table[:, -1]], 1) for table in of)
            apart = (p * np.log(p / q)).sum(1)
            assert learning.prompts[4 * which + i] == [*rows[which][i], *cut[int(np.argmax(apart))]]


@pytest.mark.parametrize(
    ("kind", "dtype", "rate", "told"),
    [
        ("full", mx.bfloat16, 1e-5, True),
        ("full", mx.float16, 1e-6, True),
        ("full", mx.bfloat16, 1e-4, False),
        ("full", mx.float32, 1e-6, False),
        ("lora", mx.bfloat16, 1e-6, False),
    ],
)
def test_a_rate_that_half_precision_rounds_away_is_said(run, tiny_model, capsys, kind, dtype, rate, told):
    model = tiny_model("qwen2")
    model.set_dtype(dtype)
    run = run.with_settings(train=replace(run.recipe.train, fine_tune_type=kind, learning_rate=rate))
    student = make_student(model, run.recipe.train, 0)
    make_training(run, student, Teacher(model), SafetyTokens([{"id": 5}], 0.9, [0.9], 1.0), ([], []), None)
    assert (f"learning_rate = {rate:g} is small for weights in half precision" in capsys.readouterr().out) is told


def student_of(harmful, harmless):
    """P(S) on a harmful prompt and a harmless one, of a student with this share of its change."""
    return lambda s: np.array([[mass(s), 1 - mass(s)] for mass in (harmful, harmless)])


SAME, LINE = {}, lambda s: s
STRENGTH = {
    "refuses harmless prompts": (student_of(lambda s: 0.9, LINE), SAME, 0.5),
    "undoes what it learned": (student_of(LINE, LINE), SAME, 0.85),  # 0.75 of 0.9 is more than four fifths
    "loses more than it saves": (student_of(lambda s: 4 * s, LINE), SAME, 1.0),
    "saves most in between": (student_of(lambda s: min(s, 0.7), lambda s: s / 10), SAME, 0.7),
    "saves hardly more": (student_of(lambda s: 0.29 * s, lambda s: s / 10), SAME, 1.0),  # -0.01, -0.005 at a half
    "refuses no more harmless prompts": (student_of(lambda s: 1 - s, lambda s: 0.009), SAME, 1.0),
    "given": (None, {"adapter_strength": 0.25}, 0.25),
    "given for steps that are chosen": (None, {"adapter_strength": 0.25, "select_checkpoint": "drift<=1"}, 0.25),
    "steps are chosen": (student_of(lambda s: 0.9, LINE), {"select_checkpoint": "drift<=1"}, 1.0),
    "nothing is known": (None, SAME, 1.0),
    "other weights": (student_of(lambda s: 0.9, LINE), {"fine_tune_type": "dora"}, 1.0),
}


@pytest.mark.parametrize("case", STRENGTH)
def test_as_much_is_kept_as_is_worth_most(run, monkeypatch, capsys, case):
    reads, settings, expected = STRENGTH[case]
    train = {name: value for name, value in settings.items() if name != "select_checkpoint"}
    run = run.with_settings(
        train=replace(run.recipe.train, **train),
        run=replace(run.recipe.run, select_checkpoint=settings.get("select_checkpoint")),
    )
    student = make_student(run.base.model, run.recipe.train, 0)
    weaken(student, {name: mx.ones_like(weight) for name, weight in lora_change(student).items()}, 1.0)

    def share(model):
        [left] = {round(b.max().item(), 6) for b in lora_change(model).values()}
        return left

    monkeypatch.setattr(learn, "openings", lambda model, *_: reads(share(model)))
    base = np.array([[0.1, 0.9], [0.0, 1.0]])
    learning = reads and Learning([[1], [2]], np.array([5]), base, base, n_harmful=1)
    assert choose_strength(run, student, learning) == expected == share(student)
    told = capsys.readouterr().out
    assert (f"{expected:.0%} of what was trained is kept" in told) is (expected < 1)
    assert ("worth most on validation prompts" in told) is (expected < 1 and "adapter_strength" not in settings)


def test_half_a_change_is_half_of_what_a_layer_adds(run):
    student = make_student(run.base.model, run.recipe.train, 0)
    change = {
        name: mx.random.normal(weight.shape, key=mx.random.key(1)) for name, weight in lora_change(student).items()
    }
    x = mx.random.normal((1, 3, run.base.config["hidden_size"]), key=mx.random.key(2))
    layer = blocks(student)[0].self_attn.q_proj
    outputs = {}
    for strength in (0.0, 0.5, 1.0):
        weaken(student, change, strength)
        outputs[strength] = layer(x)
    assert mx.allclose(outputs[0.5], (outputs[0.0] + outputs[1.0]) / 2, atol=1e-5)
    assert not mx.allclose(outputs[1.0], outputs[0.0], atol=1e-2)


@pytest.mark.parametrize(("keep_best", "measured"), [(True, False), (True, True), (False, False)])
def test_that_nothing_tells_the_best_step_is_said(run, capsys, keep_best, measured):
    run = run.with_settings(train=replace(run.recipe.train, keep_best=keep_best))
    table = np.array([[0.1, 0.9]])
    learning = Learning([[1]], np.array([5]), table, table, 1) if measured else None
    student = make_student(run.base.model, run.recipe.train, 0)
    tokens = SafetyTokens([{"id": 5}], 0.9, [0.9], 1.0)
    make_training(run, student, Teacher(run.base.model), tokens, ([], []), learning)
    told = "--keep-best does nothing here" in capsys.readouterr().out
    assert told is (keep_best and not measured)


def test_the_directions_prompts_are_trained_on_too_unless_not_wanted(run):
    recipe, sets = run.recipe, run.prompts.sets
    harmful, anchors = training_prompts(run)
    assert len(harmful) == len(sets.harmful_train) + len(sets.harmful_direction_train)
    assert len(anchors) == len(sets.harmless_train) + len(sets.harmless_direction_train)
    alone = replace(recipe, run=replace(recipe.run, reuse_direction_prompts=False))
    fewer = training_prompts(replace(run, recipe=alone))
    assert (harmful[: len(fewer[0])], anchors[: len(fewer[1])]) == fewer and len(fewer[0]) == len(sets.harmful_train)
    for given, said in ((recipe, "mine.txt and the direction's"), (alone, "mine.txt")):
        mine = replace(given, run=replace(given.run, data="mine.txt"))
        assert prompts_from(mine).endswith(f"harmful training prompts from {said}")


def test_tokens_are_those_with_which_answers_refuse_if_any_is(run, monkeypatch, capsys):
    asked = []

    def opened(base, teacher, prompts):
        asked.append(prompts)
        return [
            (Completion([5, i % 2], False), "I cannot help with that." if i % 2 else "Of course.") for i in range(8)
        ]

    monkeypatch.setattr(safety_tokens, "opened_answers", opened)
    run = replace(run, screen=Screen(verbose=True))
    short, teacher = run.with_settings(tokens=replace(run.recipe.tokens, horizon=3)), Teacher(run.base.model)
    directions = SimpleNamespace(thoughts=Thoughts())
    assert safety_tokens._refusing(short, teacher, directions) == ([1], [0, 5])
    other = replace(short, refusals=["Of course."])  # by which all of them refuse
    assert safety_tokens._refusing(other, teacher, directions) == ([0, 1, 5], [])
    prompts, _ = asked
    assert prompts.opening == 3 and not len(prompts.harmless)
    assert prompts.harmful == run.prompts.harmful_validation[: VALIDATION_PROMPTS[0]] * safety_tokens.TOLD
    monkeypatch.setattr(safety_tokens, "opened_answers", lambda *_: [(Completion([5], False), "Of course.")])
    assert safety_tokens._refusing(short, teacher, directions) == (None, [])
    assert "no token that opens the teacher's answers tells a refusal" in capsys.readouterr().out


def test_the_tokens_of_a_thought_are_those_that_the_models_own_thoughts_tell_refusals_by(run, monkeypatch):
    directions = SimpleNamespace(thoughts=Thoughts(9, [3, 8]))
    run = replace(run, base=replace(run.base, thinks=True))
    among = []
    monkeypatch.setattr(safety_tokens, "_refusing", None)  # needs no answers
    monkeypatch.setattr(safety_tokens, "select_tokens", lambda *args: among.append(args[-1]) or np.array([8]))
    selected = safety_tokens._selected(run, Teacher(run.base.model), explaining({8: 0.9}), directions, range(4))
    assert selected.tolist() == [8] and among == [[3, 8]]


def explaining(shares):
    """A contrast in which so many tokens more explain so much, whichever is their last."""
    every = np.array([True])
    return SimpleNamespace(
        where_it_decides=lambda tokens, harmful: every,
        where_thoughts_turn=lambda tokens, harmful: every,
        explained=lambda tokens, of: np.array([shares[int(token)] for token in tokens]),
    )


@pytest.mark.parametrize(
    ("refusing", "tame", "raised", "counts"),
    [
        (0.5, 0.8, 0.9, [3]),
        (0.49, 0.5, 0.6, [3, 6]),  # without a token that opens other answers as often
        (0.49, 0.49, 0.5, [3, 5]),
        (0.3, 0.4, 0.49, [3]),
        (None, 0.1, 0.2, [3, 5]),
    ],
)
def test_where_tokens_that_refuse_explain_too_little_all_that_steering_raises_count(
    refusing, tame, raised, counts, run, monkeypatch, capsys
):
    """If that is enough for a run to go on."""
    run = replace(run, screen=Screen(verbose=True))
    by_among = {(3,): [] if refusing is None else [3], (3, 6): [3, 6], (3, 5, 6): [3, 5]}
    monkeypatch.setattr(safety_tokens, "_refusing", lambda *_: ([3], [5]))
    monkeypatch.setattr(
        safety_tokens, "select_tokens", lambda *args: np.array(by_among[tuple(map(int, args[-1]))], np.int64)
    )
    directions = SimpleNamespace(thoughts=Thoughts())
    contrast = explaining({3: refusing, 6: tame, 5: raised})
    contrast.raised = np.array([i in (3, 5, 6) for i in range(8)])
    contrast.eligible = np.array([i != 7 for i in range(8)])
    selected = safety_tokens._selected(run, Teacher(run.base.model), contrast, directions, range(4))
    assert selected.tolist() == counts
    said = capsys.readouterr().out
    assert ("tokens that refuse explain 49% of what" in said) is (refusing == 0.49)
    assert ("all that it raises count, but 1" in said) is (counts == [3, 6])
    if counts == [3, 6]:  # what refuses and is not raised is held on harmless prompts all the same
        monkeypatch.setattr(safety_tokens, "_refusing", lambda *_: ([2, 3, 7], [5]))
        by_among |= {(2, 3, 7): [3]}
        assert safety_tokens._selected(run, Teacher(run.base.model), contrast, directions, range(4)).tolist() == [
            3,
            6,
            2,
        ]
        few = run.with_settings(tokens=replace(run.recipe.tokens, safety_tokens=2))
        assert safety_tokens._selected(few, Teacher(run.base.model), contrast, directions, range(4)).tolist() == [3, 2]


@pytest.mark.parametrize(
    ("shares", "given", "count"),
    [
        ((0.5, 0.6, 0.7), {}, 50),
        ((0.49, 0.5, 0.7), {}, 100),
        ((0.3, 0.4, 0.5), {}, 200),
        ((0.1, 0.2, 0.3), {}, 200),  # for which a run ends
        ((0.3, 0.4, 0.5), {"safety_tokens": 100}, 100),  # as it was said
        ((0.3, 0.4, 0.5), {"token_method": "vote"}, 50),  # as published
    ],
)
def test_where_so_many_tokens_explain_too_little_more_of_them_count(shares, given, count, run, monkeypatch, capsys):
    run = replace(run, screen=Screen(verbose=True))
    most = given.get("safety_tokens", 50)
    run = run.with_settings(tokens=replace(run.recipe.tokens, **given | {"safety_tokens": most}))
    monkeypatch.setattr(safety_tokens, "_refusing", lambda *_: (None, []))
    monkeypatch.setattr(safety_tokens, "select_tokens", lambda contrast, most, *_: np.arange(most))
    contrast = explaining([share for share, n in zip(shares, (50, 50, 100), strict=True) for _ in range(n)])
    directions = SimpleNamespace(thoughts=Thoughts())
    selected = safety_tokens._selected(run, Teacher(run.base.model), contrast, directions, range(4))
    assert len(selected) == count
    said = capsys.readouterr().out
    steps = [(50, shares[0], 100), (100, shares[1], 200)][: [50, 100, 200].index(count) if most == 50 else 0]
    assert said.count("may count") == len(steps)
    assert all(
        f"{n} tokens explain {share:.0%} of what steering does, so {more} may" in said for n, share, more in steps
    )


def test_a_teacher_of_a_model_that_thinks_writes_the_thought(run):
    undecided = [[[1, 2]], [[3]]]
    alike = Thoughts(30, [], [], undecided, 5, alike=True)  # only so far, and as much more as of other answers
    assert validation(run, SimpleNamespace(thoughts=alike)).opening == 7
    run = replace(run, base=replace(run.base, thinks=True))
    for length, opening in ((0, 2), (1, 2), (30, 30), (500, 128)):
        asked = validation(run, SimpleNamespace(thoughts=Thoughts(length, [], [], undecided, 5)))
        assert (asked.opening, asked.undecided, asked.least_opening) == (opening, undecided, 6)


def test_answers_that_are_thought_about_end_as_soon_as_others_do(run):
    """Behind their thought, wherever a few tokens tell what an answer does: for the search, the teacher, the scores."""
    tokenizer = SimpleNamespace(think_end_tokens=(50, 51), eos_token_ids={0})
    thinker = replace(run, base=replace(run.base, thinks=True, tokenizer=tokenizer))
    how = thinker.sampling(96)
    assert how.max_tokens == max(96, run.recipe.train.longest) and how.after == AfterThought((50, 51), 96)
    asked = validation(thinker, SimpleNamespace(thoughts=Thoughts(30)))
    assert asked.after == AfterThought((50, 51), teachers.VALIDATION_TOKENS)
    assert run.sampling(96).max_tokens == 96 and run.sampling(96).after is None
    assert validation(run, SimpleNamespace(thoughts=Thoughts())).after is None


@pytest.mark.parametrize(
    ("which", "opened", "thinks"),
    [
        (None, "", False),
        (None, "<", True),  # the template begins the thought
        (None, "<>", False),  # and ends it
        (0, "", True),  # the model begins an answer so
        (3, "", True),
    ],
)
def test_a_few_answers_tell_that_a_model_does_not_begin_to_think(which, opened, thinks, run, monkeypatch):
    """Before 256 are drawn, as long as a thought may be."""
    base, requests = run.base, []
    assert as_it_begins(base, 42) is base
    rows = render_all(base.tokenizer, built_in_sets(base.name).harmless_validation[:8])
    first = generate(base.model, rows[3:4], Sampling(base.eos_ids, 8, 1.0), [runs.stream_key(42, 17, 3)])[0].ids
    marks = {"<": (500, 501) if which is None else (first[which],), ">": (502,)}
    tokenizer = copy.copy(base.tokenizer)
    tokenizer._think_start, tokenizer._think_end = marks
    tokenizer._think_start_tokens, tokenizer._think_end_tokens = marks.values()
    header = [token for mark in opened for token in marks[mark]]
    monkeypatch.setattr(own_answers, "render_all", lambda *_: [[*row, *header] for row in rows])
    monkeypatch.setattr(
        rollout, "generate", lambda m, r, how, keys, *rest: requests.append(how) or generate(m, r, how, keys)
    )
    able = replace(base, thinks=True, tokenizer=tokenizer)
    assert as_it_begins(able, 42) == (able if thinks else replace(able, thinks=False))
    assert [how.max_tokens for how in requests] == [16]

    def plan_memory(_, model, __):
        assert model.thinks is thinks
        raise UserError("memory is planned by it")

    monkeypatch.setattr(align, "_fitted", plan_memory)
    with pytest.raises(UserError, match="by it"):
        align.align_model(run.recipe, able, Screen(quiet=True))


@pytest.mark.parametrize(
    ("lengths", "most"),
    [
        ([10] * 8, 512),
        ([416] * 8, 512),  # with the 96 of an answer behind it
        ([417] * 8, 1024),
        ([10] * 7 + [3000], 512),  # of eight one may be longer
        ([10] * 6 + [1500, 3000], 2048),
        ([None] * 7 + [1500], 512),  # hardly one thinks
        ([10] * 6 + [4096] * 2, 4096),
        ([10] * 5 + [4096] * 3, "3 of 8 answers were still thinking after 4096 tokens"),
    ],
)
def test_an_answer_may_be_as_long_as_the_thoughts_of_a_model_need(lengths, most, run, monkeypatch, capsys):
    def answers(base, prompts, sampling, seed, stream, advance):
        assert sampling.max_tokens == 4096 and len(prompts) == 8 and len({*prompts}) == 8
        ids = [[5] if n is None else [5] * n if n == 4096 else [5] * n + [50, 8] for n in lengths]
        return [(Completion(one, len(one) < 4096), "" if len(one) == 4096 else "Plant a bulb.") for one in ids]

    recipe = replace(run.recipe, train=replace(run.recipe.train, max_tokens=None))
    tokenizer = Thinker()
    tokenizer.eos_token_ids = {0}
    thinker = replace(run.base, thinks=True, tokenizer=tokenizer)
    monkeypatch.setattr(own_answers, "batch_size", lambda base, wanted, *_: wanted)
    monkeypatch.setattr(own_answers, "_asked", answers)
    screen = Screen()
    if isinstance(most, str):
        with pytest.raises(UserError, match=most + ".*give --max-tokens 16384, or --thinking off"):
            with_room_to_think(recipe, thinker, screen)
        assert with_room_to_think(recipe, thinker, screen, force=True).train.max_tokens == 4096
        return
    longer = with_room_to_think(recipe, thinker, screen)
    assert longer == replace(recipe, train=replace(recipe.train, max_tokens=most))
    assert (f"an answer may take {most:,}" in capsys.readouterr().out) is (most > 512)
    monkeypatch.delattr(own_answers, "_asked")
    assert with_room_to_think(recipe, run.base, screen).train.max_tokens == 512
    given = replace(recipe, train=replace(recipe.train, max_tokens=16))
    assert with_room_to_think(given, thinker, screen) is given


def test_memory_is_planned_for_the_thoughts_of_a_model(run, monkeypatch):
    recipe = replace(run.recipe, train=replace(run.recipe.train, max_tokens=None))
    longer = replace(recipe, train=replace(recipe.train, max_tokens=2048))
    monkeypatch.setattr(own_answers, "with_room_to_think", lambda *_: longer)

    def plan_memory(planned, *_):
        assert planned.train == longer.train
        raise UserError("memory is planned by it")

    monkeypatch.setattr(align, "_fitted", plan_memory)
    with pytest.raises(UserError, match="by it"):
        align.align_model(recipe, run.base, Screen(quiet=True))


def test_a_model_that_could_think_and_does_not_is_like_one_that_cannot(run, monkeypatch):
    able = replace(run, base=replace(run.base, thinks=True))
    monkeypatch.setattr(own_answers, "_lengths", lambda *_: [])
    monkeypatch.setattr(runs.Run, "answer_tokens", lambda self, enough: enough)
    found, plain = find_openers(able), find_openers(run)
    assert found == plain and found.openers and not found.thoughts.length
    assert as_it_answers(able, SimpleNamespace(thoughts=Thoughts(), refusals=())) == run
    assert as_it_answers(able, SimpleNamespace(thoughts=Thoughts(7), refusals=())) == able


def answering(run, monkeypatch, *answers):
    """The run, in which answers are these: (ids, finished, text), the last one again and again."""
    each = [(Completion(list(ids), finished), text) for ids, finished, text in answers]

    def fake(self, model, rows, *_):
        return (each + each[-1:] * len(rows))[: len(rows)]

    monkeypatch.setattr(runs.Run, "answers", fake)
    return run


def test_of_few_refusals_an_opener_is_known_by_shares(run, monkeypatch):
    first = {text: run.base.tokenizer.encode(text, add_special_tokens=False)[0] for text in ("I", "Sorry")}
    no, yes = "I cannot help with that.", "I would begin with a map."
    n = len(run.prompts.harmful_direction_train)
    other = ([1], True, "Begin with a map.")
    for refusals, kept in ((1, True), (n // 16, False)):
        answers = [([first["I"]], True, no)] + [([first["Sorry"]], True, no)] * (refusals - 1)
        answers += [([first["I"]], True, yes)] * 2 + [other]
        found = find_openers(answering(run, monkeypatch, *answers))
        assert sum(found.harmful_refused) == refusals and (first["I"] in found.openers.values()) == kept


@pytest.mark.parametrize("told", [2, 1])
def test_refusals_that_begin_as_other_answers_do_are_told_further_on(told, run, monkeypatch):
    """Unless a sixteenth of them begins otherwise, or there are few."""
    n, other = len(run.prompts.harmful_direction_train), ([5, 6, 7, 9], True, "Thanks. Begin with a map.")
    no = "Thanks. I cannot help with that."
    late, soon = ([5, 6, 8, 9], True, no), ([4, 6, 8, 9], True, no)
    answers = [soon] * told + [late] * (32 - told) + [other]
    found = find_openers(answering(run, monkeypatch, *answers))
    assert sum(found.harmful_refused) == 32 and found.thoughts.alike is (told == 1)
    if told == 2:
        assert 4 in found.openers.values() and found.thoughts == Thoughts()
        return
    # Behind two tokens, token 8 comes before refusals alone, and 7 before other answers.
    assert not found.openers and found.thoughts.turns_at == 2 and found.thoughts.first == [8]
    harmful = run.prompts.harmful_direction_train
    assert found.thoughts.undecided[0] == [[*harmful[0], 4, 6], *([*row, 5, 6] for row in harmful[1:])]
    late_run = as_it_answers(run, SimpleNamespace(thoughts=found.thoughts, refusals=[]))
    assert late_run.base.turns_late and not late_run.base.thinks and late_run.sampling(96).max_tokens == 96
    how = validation(late_run, SimpleNamespace(thoughts=found.thoughts))
    assert (how.opening, how.least_opening, how.after) == (4, 3, None)
    # Of a few refusals nobody can tell.
    few = find_openers(answering(run, monkeypatch, *[late] * (n // 16 - 1), other))
    assert few.openers and not few.thoughts.alike


@pytest.mark.parametrize(
    ("refused", "others", "kept"),
    [
        ([], 256, False),
        (["Sorry"], 255, False),
        (["I"], 255, False),  # all of either tells nothing
        (["I", "I", "Sorry"], 253, False),
        (["I", "I", "Sorry"], 100, True),  # more of the refusals than of the others
        ([], 16, True),  # a sixteenth of the others
        ([], 17, False),
    ],
)
def test_what_opens_the_answers_of_a_base_that_hardly_refuses_is_no_opener(refused, others, kept, run, monkeypatch):
    first = {text: run.base.tokenizer.encode(text, add_special_tokens=False)[0] for text in ("I", "Sorry")}
    answers = [([first[word]], True, "I cannot help with that.") for word in refused]
    answers += [([first["I"]], True, "I would begin.")] * others + [([1], True, "Begin with a map.")]
    openers = find_openers(answering(run, monkeypatch, *answers)).openers
    assert first["Sorry"] in openers.values() and (first["I"] in openers.values()) == kept


def test_where_refusals_begin_as_other_answers_do_directions_are_tried(run, monkeypatch):
    """So do those of a vocabulary of bytes or letters."""
    words = run.recipe.direction.refusal_prefixes
    each = [ids[0] for word in words if (ids := run.base.tokenizer.encode(word, add_special_tokens=False))]
    n = len(run.prompts.harmful_direction_train)
    answers = [([each[i % 5]], True, "I cannot help with that.") for i in range(n // 3)]
    answers += [([each[i % 5]], True, "Begin with a map.") for i in range(2 * n - n // 3)]
    found = find_directions(answering(run, monkeypatch, *answers))
    assert not found.openers and found.shortlist and len(found.harmful_train) == n // 3
    assert [c for c in found.cautions if c.startswith("refusals of this model begin as its other answers do")]
    # What the user says that refusals begin with is taken at its word.
    settings = replace(run.recipe.direction, refusal_prefixes=["Sorry", "No"])
    given = find_openers(answering(run.with_settings(direction=settings), monkeypatch, *answers))
    assert list(given.openers) == ["Sorry", "No"]


@pytest.mark.parametrize("kept", [True, False])
def test_refusals_in_words_that_are_not_known_are_a_caution(kept, run, monkeypatch):
    """With an example, unless the model's answers are not to be kept."""
    n = len(run.prompts.harmful_direction_train)
    one, other = ([5], True, "Mi ne volas. Petu ion alian."), ([1], True, "Begin with a map.")
    quiet = run.with_settings(run=replace(run.recipe.run, transcripts=kept))
    found = find_directions(answering(quiet, monkeypatch, *[one] * 5, *[other] * (n - 5), other))
    [caution] = [c for c in found.cautions if "--refusal-phrases" in c]
    assert caution.startswith(f"5 of {4 * n} answers to harmful requests begin with") and ("Mi ne" in caution) == kept
    assert not found.refusals and not as_it_answers(run, found).refusals  # by what follows nobody can tell


@pytest.mark.parametrize(("onward", "counts"), [("Petu ion alian.", True), ("Begin with a map.", False)])
def test_refusals_in_words_that_are_not_known_count_where_something_is_chosen(onward, counts, run, monkeypatch):
    """If they go on as the known ones do: a warning before an answer is none."""
    n = len(run.prompts.harmful_direction_train)
    one, other = ([5], True, f"Mi ne volas. {onward}"), ([1], True, "Nu. Begin with a map.")
    known = ([4], True, "I cannot help with that. Petu ion alian.")
    answers = [*[one] * 5, *[known] * 10, *[other] * (n - 15), other]
    own, found = (find(answering(run, monkeypatch, *answers)) for find in (find_openers, find_directions))
    assert sum(own.harmful_refused) == 10 + 5 * counts and (5 in own.openers.values()) == counts
    assert found.refusals == own.refusals == ["Mi ne volas."] * counts
    cautions = [c for c in found.cautions if "go on as refusals do, and count as refusals where" in c]
    assert len(cautions) == counts
    chosen = as_it_answers(run, found)
    asked = validation(chosen, found)
    monkeypatch.setattr(teachers, "opened_answers", lambda *_: [(Completion([5], True), one[2])] * 2)
    outcomes = ask(run.base, run.base.model, replace(asked, harmful=asked.harmful[:1], harmless=asked.harmless[:1]))
    assert outcomes.harmful == ["refuse" if counts else "comply"]
    all_so = collapsed(answering(chosen, monkeypatch, one), run.base.model)
    assert (all_so is not None) == counts


def test_where_some_may_refuse_in_words_that_are_not_known_more_answers_tell(run, monkeypatch):
    """Four to each prompt: of three, none is often enough, and others had not come at all."""
    n, m = (len(getattr(run.prompts, f"{kind}_direction_train")) for kind in ("harmful", "harmless"))
    one, another = (([5], True, f"{words} Petu ion alian.") for words in ("Mi ne volas.", "Tio ne eblas."))
    known, other = ([4], True, "I cannot help with that. Petu ion alian."), ([1], True, "Nu. Begin with a map.")
    first = [*[known] * 10, *[other] * (n - 13 + m)]  # and three: what is drawn behind these is to harmful prompts too
    seconds = []  # of which the plan of the run's time knows nothing
    monkeypatch.setattr(type(run.screen.pace), "more", lambda _, more: seconds.append(more))
    for few, told in ((3, ["Tio ne eblas.", "Mi ne volas."]), (2, [])):
        answers = [*[one] * few, *[other] * (3 - few), *first, *[one] * 2, *[another] * 6, other]
        own = find_openers(answering(run, monkeypatch, *answers))
        assert own.refusals == told and sum(own.harmful_refused) == 10 + few * bool(told)
    assert len(seconds) == 1 and seconds[0] > 0


def test_a_direction_is_never_the_mean_of_a_few_refused_prompts(run, found, monkeypatch, capsys):
    every = [[i] for i in range(64)]
    for few, kept in ((0, 64), (1, 64), (3, 64), (4, 4), (64, 64)):
        assert len(or_all(every, every[:few])) == kept
    assert or_all([], []) == [] and or_all(every[:2], every[:1]) == every[:1]
    assert or_all(every, every[:3], every[9:20]) == every[9:20] and or_all(every, every[:3], every[9:10]) == every
    assert not any("begin as a refusal" in caution for caution in found.cautions)
    keep = direction.filter_by_refusal_score
    monkeypatch.setattr(
        direction, "filter_by_refusal_score", lambda m, harmful, *rest: (harmful[:1], keep(m, harmful, *rest)[1])
    )
    cut = replace(
        run,
        prompts=replace(run.prompts, harmful_direction_train=(rows := run.prompts.harmful_direction_train[:40])),
        screen=Screen(verbose=True),
    )
    few = "only 1 of its answers to 40 harmful requests seem to begin as a refusal, so "
    alone = direction._find_directions(cut, OwnAnswers(found.openers, [False] * 38 + [True] * 2, []), 32)
    assert alone.harmful_train == rows
    assert [c for c in alone.cautions if c.startswith(f"{few}all were used")]
    capsys.readouterr()
    # those that its answers refuse, where three do, which no first token tells
    alone = direction._find_directions(cut, OwnAnswers(found.openers, [False] * 37 + [True] * 3, []), 32)
    assert alone.harmful_train == rows[37:] and not any("begin as a refusal" in caution for caution in alone.cautions)
    assert f"{few}the 3 were used that it refuses at temperature 1" in capsys.readouterr().out


@pytest.mark.parametrize("find", [direction._find_directions, direction._untested_directions])
def test_a_model_of_two_blocks_has_directions(find, run, found):
    base = load(run.base.name)
    base.model.model.layers = base.model.model.layers[:2]
    sets = run.prompts.harmful_direction_train, run.prompts.harmless_direction_train
    refused = ([harmful] * len(rows) for harmful, rows in zip((True, False), sets, strict=True))
    directions = find(replace(run, base=base), OwnAnswers(found.openers, *refused), 32)
    assert directions.shortlist and {one.layer for one in directions.shortlist} == {1}


def test_thoughts_that_mostly_do_not_end_stop_the_run(run, monkeypatch, capsys):
    tokenizer = Thinker()
    tokenizer.eos_token_ids = {0}
    thinker = replace(run, base=replace(run.base, thinks=True, tokenizer=tokenizer))
    n = len(run.prompts.harmful_direction_train) + len(run.prompts.harmless_direction_train)
    cut, ended = ([5] * 9, False, ""), ([5, 50, 8], True, "Sorry, I cannot help with that.")
    for n_cut in (n // 4, n // 4 + 1):
        some = answering(thinker, monkeypatch, *[cut] * n_cut, ended)
        if n_cut == n // 4:
            assert find_openers(some).thoughts.length == 1  # of those that ended
            continue
        with pytest.raises(
            UserError, match=rf"{n_cut} of {n} answers were still thinking after 64 tokens.*--max-tokens 256"
        ):
            find_openers(some)
        capsys.readouterr()
        find_openers(replace(some, force=True))
        assert "were still thinking" in capsys.readouterr().out
    assert find_openers(replace(answering(thinker, monkeypatch, cut), force=True)).thoughts.length == 9


def test_prompts_that_are_longer_than_the_model_reads_are_left_out_of_every_set(tmp_path, run, monkeypatch, capsys):
    (tmp_path / "own").mkdir()
    sets = {"harmless_validation": 9, "harmful_direction_train": 9, "borderline_test": 1, "harmless_train": 1}
    for name, count in sets.items():
        texts = [f"Why is {name} number {i}?" for i in range(count)] + [f"{name} " * 9000]
        (tmp_path / "own" / f"{name}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    settings = {"model": run.base.name, "data": str(tmp_path / "own"), "adapter_path": str(tmp_path / "adapters")}
    recipe = resolve(run.base.config, settings)[0]
    mine = make_run(recipe, run.base, Screen())
    said = " ".join(capsys.readouterr().out.split())
    for name, count in sets.items():
        assert f"{name}: 1 prompts are longer than 4,096 tokens and are left out" in said
        assert len(getattr(mine.prompts.sets, name)) == count
    assert max(len(row) for rows in vars(mine.prompts).values() if isinstance(rows, list) for row in rows) < 100
    # Nor is memory planned for them.
    planned, fitted = [], memory_plan.fitted
    monkeypatch.setattr(memory_plan, "fitted", lambda *given: planned.append(given[3]) or fitted(*given))
    monkeypatch.setattr(memory, "set_limits", lambda machine: None)
    _fitted(recipe, run.base, Screen(quiet=True))
    assert planned == [4096]


@pytest.mark.parametrize(("settings", "kept"), [({}, "on"), ({"iters": 2}, "off"), ({"anchor_cache": "off"}, "off")])
def test_by_default_a_run_keeps_what_its_base_makes_of_the_anchors_prompts(run, monkeypatch, settings, kept):
    monkeypatch.setattr(memory, "set_limits", lambda machine: None)
    recipe = resolve(run.base.config, {"model": run.base.name, **settings})[0]
    assert _fitted(recipe, run.base, Screen(quiet=True)).train.anchor_cache == kept


def test_an_anchor_without_a_prompt_short_enough_is_an_error(run):
    long = [Instruction(f"Why is it so? {'It is. ' * 200}{i}") for i in range(2)]
    sets = replace(run.prompts.sets, harmless_train=long)
    own = replace(run, prompts=replace(run.prompts, sets=sets))
    own = own.with_settings(run=replace(run.recipe.run, reuse_direction_prompts=False))
    with pytest.raises(UserError, match="so that none is left for the anchor; raise --max-prompt-length"):
        training_prompts(own)
    harmful, anchors = training_prompts(own.with_settings(loss=replace(run.recipe.loss, anchor_ratio=0.0)))
    assert harmful and not anchors
    longer = own.with_settings(train=replace(run.recipe.train, max_prompt_length=4096))
    assert len(training_prompts(longer)[1]) == 2


def test_a_system_turn_that_a_template_adds_is_no_part_of_a_prompts_length(run, monkeypatch, tmp_path):
    """Some add 500 tokens of it; memory is planned for them."""
    tokenizer = copy.copy(run.base.tokenizer)
    template, turn = tokenizer._chat_template, "Be kind. " * 300
    long = replace(run, base=replace(run.base, tokenizer=tokenizer))
    plain, rows = training_prompts(run), [run.base.tokenizer.encode(turn, add_special_tokens=False)]
    whole = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: [*rows[0], *whole(*a, **k)], raising=False)
    assert template == run.base.tokenizer._chat_template and len(rows[0]) > 512
    assert template_tokens(run.base.tokenizer) == 40 < len(rows[0]) < template_tokens(tokenizer)
    for mine, its in zip(training_prompts(long), plain, strict=True):
        assert [p.text for p in mine] == [p.text for p in its]
    limit = replace(run.recipe.train, max_prompt_length=8)
    with pytest.raises(UserError, match="longer than max_prompt_length = 8"):
        training_prompts(long.with_settings(train=limit))
    planned, fitted = [], memory_plan.fitted
    monkeypatch.setattr(memory_plan, "fitted", lambda *given: planned.append(given) or fitted(*given))
    monkeypatch.setattr(memory, "set_limits", lambda machine: None)
    kept = [_fitted(run.recipe, one.base, Screen(quiet=True)) for one in (run, long)]
    more = template_tokens(tokenizer) - 40
    assert planned[1][3] == planned[0][3] + more
    assert [given[0].train.max_prompt_length for given in planned] == [512, 512 + more]
    assert [recipe.train.max_prompt_length for recipe in kept] == [512, 512]


def test_of_learned_positions_prompt_and_answer_share_the_table(run, capsys):
    """mlx reads on behind the table's end, in other memory."""
    config = {"model_type": "gpt2", "n_positions": 512}
    assert most_read(config, 448) == 64 and most_read({"max_position_embeddings": 512}, 448) == 4096
    with pytest.raises(UserError, match=r"gpt2 has 512 positions, .* may take 449; .*lower --max-tokens"):
        most_read(config, 449)
    base, long = replace(run.base, config=config), Instruction("Why is it so? " * 60)
    sets = replace(run.prompts.sets, harmless_test=[Instruction("Why?"), long])
    beside = beside_a_prompt(run.recipe, base)
    assert beside > 96 and 512 - beside < len(render(base.tokenizer, long.text)) < 512
    capsys.readouterr()
    kept = sets_read(base, run.recipe, sets, Screen())
    assert kept == replace(sets, harmless_test=sets.harmless_test[:1])
    assert f"harmless_test: 1 prompts are longer than {512 - beside} tokens" in capsys.readouterr().out
    guarded = replace(run.recipe, teacher=replace(run.recipe.teacher, teacher="system_prompt"))
    assert beside_a_prompt(guarded, base) > beside
    with pytest.raises(UserError, match="lower --max-tokens"):
        sets_read(base, replace(run.recipe, train=replace(run.recipe.train, max_tokens=400)), sets, Screen())


@pytest.mark.parametrize("thinks", [False, True])
def test_memory_is_planned_for_as_much_of_a_thought_as_may_be_taught(thinks, run, monkeypatch):
    planned, fitted = [], memory_plan.fitted
    monkeypatch.setattr(memory_plan, "fitted", lambda recipe, *rest: planned.append(recipe) or fitted(recipe, *rest))
    monkeypatch.setattr(memory, "set_limits", lambda machine: None)
    found = _fitted(run.recipe, replace(run.base, thinks=thinks), Screen(quiet=True))
    assert found.tokens == run.recipe.tokens and found.loss == run.recipe.loss
    assert planned[0].tokens.horizon == (128 if thinks else 7)


def test_first_steps_without_a_gradient_are_noticed():
    check_gradient([1e-5, 2e-4, 0.0])
    with pytest.raises(UserError, match=r"first 3 steps had no gradient to speak of \(norm 9e-05\)"):
        check_gradient([1e-5, 9e-5, 0.0])


def test_what_the_teacher_teaches_is_what_decides_what_an_answer_does(run):
    def taught(run, opening):
        recipe = settled(run, opening).recipe
        return recipe.loss.first_tokens, recipe.tokens.horizon

    assert run.recipe.loss.first_tokens == "auto" and run.recipe.tokens.horizon == 7
    assert taught(run, 7) == (7, 7) and taught(run, 2) == (2, 2)
    longer = settled(run, 16).recipe  # of a model that thinks first: found as far, on so many fewer continuations
    assert (longer.loss.first_tokens, longer.tokens.horizon, longer.tokens.token_samples) == (16, 16, 3)
    assert taught(run.with_settings(loss=replace(run.recipe.loss, first_tokens=3)), 2) == (3, 7)
    assert taught(run.with_settings(tokens=replace(run.recipe.tokens, token_method="vote")), 2) == (2, 7)


def test_what_was_found_is_read_back_exactly(run, found, monkeypatch):
    again = decoded(FoundDirections, json.loads(as_json(encoded(found))))
    assert again.openers == found.openers and again.failed == found.failed and again.harmless == found.harmless
    for a, b in zip(found.shortlist, again.shortlist, strict=True):
        assert (a.position, a.layer) == (b.position, b.layer) and mx.array_equal(a.vector, b.vector)
    assert np.array_equal(again.scores.steering_refusal, found.scores.steering_refusal, equal_nan=True)
    # The prompts are those that the directions were found from.
    prompts, best = (again.harmful_train, again.harmless_train), again.shortlist[0]
    means = mean_differences(run.base.model, *prompts, -best.position, run.recipe.run.prompt_batch_size)
    assert mx.array_equal(best.vector, mx.array(means[0, best.layer].astype(np.float32)))
    assert 0 < len(prompts[0]) < len(run.prompts.harmful_direction_train)
    fixed = run.with_settings(teacher=replace(run.recipe.teacher, coeff=0.5))
    monkeypatch.setattr(teachers, "VALIDATION_PROMPTS", (16, 8))
    chosen = find_teacher(fixed, found)
    read = decoded(ChosenTeacher, json.loads(as_json(encoded(chosen))))
    assert (read.coeff, read.trials, read.base, read.teacher) == (0.5, [], chosen.base, chosen.teacher)
    assert read.opening == chosen.opening and 1 <= chosen.opening <= 7
    assert mx.array_equal(read.direction.vector, found.shortlist[0].vector)
