"""The checks a run makes of itself."""

import json
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from safesteer_mlx import stages
from safesteer_mlx.direction import Direction, mean_differences
from safesteer_mlx.load import load
from safesteer_mlx.losses import far_enough
from safesteer_mlx.progress import Screen, UserError
from safesteer_mlx.recipe import BUNDLED, MODELS, resolve
from safesteer_mlx.residual import _override, blocks, last_logits
from safesteer_mlx.rollout import Completion
from safesteer_mlx.runfolder import as_json
from safesteer_mlx.safety_tokens import openings
from safesteer_mlx.student import adapter_config, make_student, save_adapters
from safesteer_mlx.teacher import Teacher, steered_teacher


@pytest.fixture(scope="module")
def run():
    """Recipe, base and rendered prompts of the bundled model."""
    path = str(MODELS / BUNDLED)
    base = load(path)
    recipe, _ = resolve(base.config, {"model": path})
    return recipe, base, stages.render_prompts(recipe, stages.prompt_sets(recipe), base.tokenizer)


def moved(recipe, base, by):
    """A student whose LoRA B is `by` everywhere."""
    student = make_student(base.model, recipe.train, 0, base.quantized)
    trained = tree_flatten(student.trainable_parameters())
    student.update(tree_unflatten([(n, mx.full(w.shape, by) if n.endswith("lora_b") else w) for n, w in trained]))
    return student


def test_saved_adapters_are_held_against_the_student_and_the_base(run, tmp_path):
    recipe, base, rendered = run
    config, student = adapter_config(recipe.train, recipe.run.model, 0), moved(recipe, base, 0.01)
    save_adapters(tmp_path, student, config)
    stages.check_saved(base, rendered, student, tmp_path)
    with pytest.raises(UserError, match="do not give what was trained"):
        stages.check_saved(base, rendered, moved(recipe, base, 0.02), tmp_path)
    save_adapters(tmp_path, moved(recipe, base, 0.0), config)
    with pytest.raises(UserError, match="change nothing"):
        stages.check_saved(base, rendered, moved(recipe, base, 0.0), tmp_path)


def test_a_teacher_that_is_the_base_is_refused(run):
    recipe, base, rendered = run
    nothing = Direction(-1, 3, mx.zeros(128))
    with pytest.raises(UserError, match=r"coeff = 0.85 changes nothing"):
        stages.make_teacher(recipe, base, rendered, nothing, 0.85)


def test_a_student_that_says_nothing_or_only_refuses_is_noticed(run):
    recipe, base, rendered = run
    assert stages.collapsed(recipe, base, rendered, base.model) is None
    # A student that ends its turn at once
    silent = make_student(base.model, recipe.train, 0, base.quantized)
    whole, eos = type(silent).__call__, base.eos_ids[0]

    class Silent(type(silent)):
        def __call__(self, *args, **kwargs):
            return whole(self, *args, **kwargs) + 1e4 * (mx.arange(base.vocabulary) == eos)

    silent.__class__ = Silent
    assert "16 empty answers to 16" in (stages.collapsed(recipe, base, rendered, silent) or "")
    direction = stages.find_directions(recipe, base, rendered, Screen(quiet=True)).shortlist[0]
    teacher = stages.make_teacher(recipe, base, rendered, direction, 2.0)
    assert "refuses" in (stages.collapsed(recipe, base, rendered, teacher.model) or "")


@pytest.mark.parametrize(("name", "size"), [("qwen2", 64), ("llama", 64), ("gemma2", 1)])
def test_an_architecture_that_cannot_be_batched_answers_one_at_a_time(run, tiny_model, name, size, capsys):
    # gemma2 of mlx-lm 0.32.2 fails on prompts of unequal length with grouped heads.
    recipe, _, rendered = run
    rows = [[1, 2, 3, 4 + i][: 2 + i % 3] for i in range(12)]
    rendered = replace(rendered, harmful_validation=rows)
    base = SimpleNamespace(model=tiny_model(name), eos_ids=[49], config={"model_type": name})
    checked = stages.check_padding(recipe, base, rendered, Screen())  # type: ignore[arg-type]
    assert checked.run.generation_batch_size == size
    assert ("one at a time" in capsys.readouterr().out) == (size == 1)


def test_a_forward_pass_that_padding_changes_is_refused(run, model):
    recipe, _, rendered = run
    rendered = replace(rendered, harmful_validation=[[1, 2, 3, 4 + i][: 2 + i % 3] for i in range(12)])
    # What stands in the last column leaks into every position
    _override(blocks(model)[1], "Leaking", lambda call, x, *a, **k: call(x, *a, **k) + 5 * x[:, -1:])
    base = SimpleNamespace(model=model, eos_ids=[49], config={"model_type": "leaky"})
    with pytest.raises(UserError, match="padding changes what model_type leaky computes"):
        stages.check_padding(recipe, base, rendered, Screen())  # type: ignore[arg-type]


def tokens(explained=0.9, openings=(0.5, 0.2)):
    return stages.SafetyTokens([{"id": 3}], explained, list(openings))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"explained": 0.49}, "explain only 49% of what steering does"),
        ({"openings": [0.05, 0.09]}, "at a probability of only 0.09"),
    ],
)
def test_tokens_that_would_teach_nothing_stop_the_run_unless_it_is_forced(run, change, said, capsys):
    recipe = run[0]
    stages.check_tokens(recipe, tokens(), False, Screen())
    stages.check_tokens(recipe, tokens(explained=0.5, openings=[0.0, 0.1]), False, Screen())  # at the limits
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match=said) as error:
        stages.check_tokens(recipe, tokens(**change), False, Screen())
    assert "--token-method part" in str(error.value) and "--force" in str(error.value)
    by_hand = replace(recipe, tokens=replace(recipe.tokens, safety_tokens="mine.json"))
    for given, force in (
        (recipe, True),
        (by_hand, False),
        (replace(recipe, loss=replace(recipe.loss, subset="full")), False),
    ):
        stages.check_tokens(given, tokens(**change), force, Screen())
        assert said in capsys.readouterr().out


def test_what_is_to_be_learned_goes_as_far_beyond_the_teacher_as_guidance_says(run):
    recipe, base, rendered = run
    few = replace(
        rendered,
        harmful_validation=rendered.harmful_validation[:8],
        harmless_validation=rendered.harmless_validation[:3],
    )
    vector = 60 * mx.random.normal((base.config["hidden_size"],), key=mx.random.key(3))
    teacher, rows = steered_teacher(base.model, 2, vector, 1.0), few.harmful_validation
    change = last_logits(teacher.model, rows) - last_logits(base.model, rows)
    ids = np.array(mx.argsort(-change.mean(0)))[: base.vocabulary // 2]
    raised = stages.SafetyTokens([{"id": int(i)} for i in ids], 0.9, [0.9])

    def target(guidance):
        given = replace(recipe, loss=replace(recipe.loss, guidance=guidance))
        settled, learning = stages.what_to_learn(given, base, few, teacher, raised)
        assert learning is not None and learning.prompts == [*rows, *few.harmless_validation]
        return settled.loss.guidance, learning

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
    thinks = replace(base, thinks=True)
    assert stages.settled(recipe, thinks, 2).loss.guidance == 1.0
    assert stages.what_to_learn(recipe, thinks, few, teacher, raised)[1] is None


def test_the_directions_prompts_are_trained_on_too_unless_not_wanted(run):
    recipe, base, _ = run
    sets = stages.prompt_sets(recipe)
    screen = Screen(quiet=True)
    harmful, anchors = stages.training_prompts(recipe, sets, base, screen)
    assert len(harmful) == len(sets.harmful_train) + len(sets.harmful_direction_train)
    assert len(anchors) == len(sets.harmless_train) + len(sets.harmless_direction_train)
    alone = replace(recipe, run=replace(recipe.run, reuse_direction_prompts=False))
    fewer = stages.training_prompts(alone, sets, base, screen)
    assert (harmful[: len(fewer[0])], anchors[: len(fewer[1])]) == fewer and len(fewer[0]) == len(sets.harmful_train)
    for given, said in ((recipe, "mine.txt and the direction's"), (alone, "mine.txt")):
        mine = replace(given, run=replace(given.run, data="mine.txt"))
        assert stages.prompts_from(mine).endswith(f"harmful training prompts from {said}")


def test_tokens_are_those_with_which_answers_refuse_if_any_is(run, monkeypatch, capsys):
    recipe, base, rendered = run
    asked = []

    def opened(base, teacher, prompts):
        asked.append(prompts)
        return [
            (Completion([5, i % 2], False), "I cannot help with that." if i % 2 else "Of course.") for i in range(8)
        ]

    monkeypatch.setattr(stages, "opened_answers", opened)
    short = replace(recipe, tokens=replace(recipe.tokens, horizon=3))
    assert stages._refusing(short, base, rendered, Teacher(base.model), Screen()) == [1]
    [prompts] = asked
    assert prompts.opening == 3 and not len(prompts.harmless)
    assert prompts.harmful == rendered.harmful_validation[: stages.ASKED[0]] * stages.TOLD
    monkeypatch.setattr(stages, "opened_answers", lambda *_: [(Completion([5], False), "Of course.")])
    assert stages._refusing(short, base, rendered, Teacher(base.model), Screen()) is None
    assert "no token that opens the teacher's answers tells a refusal" in capsys.readouterr().out


def test_first_steps_without_a_gradient_are_noticed():
    stages._check_gradient([1e-5, 2e-4, 0.0])
    with pytest.raises(UserError, match=r"first 3 steps had no gradient to speak of \(norm 9e-05\)"):
        stages._check_gradient([1e-5, 9e-5, 0.0])


def test_what_the_teacher_teaches_is_what_decides_what_an_answer_does(run):
    recipe, base, _ = run

    def settled(recipe, base, opening):
        found = stages.settled(recipe, base, opening)
        return found.loss.keep, found.tokens.horizon

    assert recipe.loss.keep == "auto" and recipe.tokens.horizon == 7
    assert settled(recipe, base, 7) == (7, 7) and settled(recipe, base, 2) == (2, 2)
    assert settled(recipe, replace(base, thinks=True), 7) == (0, 7)  # all it says
    given = replace(recipe, loss=replace(recipe.loss, keep=3))
    assert settled(given, base, 2) == (3, 7)
    published = replace(recipe, tokens=replace(recipe.tokens, token_method="vote"))
    assert settled(published, base, 2) == (2, 7)


def test_what_was_found_is_read_back_exactly(run):
    recipe, base, rendered = run
    found = stages.find_directions(recipe, base, rendered, Screen(quiet=True))
    again = stages.FoundDirections.of(json.loads(as_json(found.plain())))
    assert again.openers == found.openers and again.failed == found.failed and again.harmless == found.harmless
    for a, b in zip(found.shortlist, again.shortlist, strict=True):
        assert (a.position, a.layer) == (b.position, b.layer) and mx.array_equal(a.vector, b.vector)
    assert np.array_equal(again.scores.steering_refusal, found.scores.steering_refusal, equal_nan=True)
    # The prompts are those that the directions were found from.
    prompts, best = (again.harmful_direction, again.harmless_direction), again.shortlist[0]
    means = mean_differences(base.model, *prompts, -best.position, recipe.run.prompt_batch_size)
    assert mx.array_equal(best.vector, mx.array(means[0, best.layer].astype(np.float32)))
    assert 0 < len(prompts[0]) < len(rendered.harmful_direction)
    fixed = replace(recipe, teacher=replace(recipe.teacher, coeff=0.5))
    chosen = stages.find_teacher(fixed, base, rendered, found, Screen(quiet=True))
    read = stages.ChosenTeacher.of(json.loads(as_json(chosen.plain())))
    assert (read.coeff, read.trials, read.base, read.teacher) == (0.5, [], chosen.base, chosen.teacher)
    assert read.opening == chosen.opening and 1 <= chosen.opening <= 7
    assert mx.array_equal(read.direction.vector, found.shortlist[0].vector)
