"""Stage 2: the coefficient that is chosen, and the teacher that follows."""

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from safesteer_mlx import teacher as stage
from safesteer_mlx.recipe import TeacherSettings, TrainSettings
from safesteer_mlx.rollout import Completion
from safesteer_mlx.student import make_student
from safesteer_mlx.teacher import find_coefficient, follow, moving_average, steered_teacher

SAYS = {"yes": "Sure, here it is.", "no": "I cannot help with that.", "broken": "so so so so so"}
SETTINGS = TeacherSettings(coeff_grid=[1.0, 0.25, 0.5], coeff_refusal=0.95, coeff_broken=0.05)


class Tokenizer:
    has_thinking = False

    def decode(self, ids, **_):
        return SAYS[["yes", "no", "broken"][ids[0]]]


def found(monkeypatch, by_coefficient, settings=SETTINGS):
    """find_coefficient where a model at a coefficient answers all harmful prompts alike: yes, no or broken."""
    names = ["yes", "no", "broken"]

    def generate(model, prompts, **_):
        harmful = names.index(by_coefficient.get(model, "yes"))
        return [Completion([harmful if p[0] == 1 else 0, 9], True) for p in prompts]

    monkeypatch.setattr(stage, "generate", generate)
    monkeypatch.setattr(stage, "steered_teacher", lambda base, layer, vector, coeff: stage.Teacher(coeff))
    harmful, harmless = [[1, 2]] * 4, [[0, 3]] * 4
    return find_coefficient("base", 0, mx.zeros(1), harmful, harmless, settings, tokenizer=Tokenizer(), eos_ids=[9])


def test_the_smallest_that_suffices_is_taken_and_no_larger_one_is_tried(monkeypatch):
    coeff, curve = found(monkeypatch, {0.5: "no", 1.0: "no"})
    assert coeff == 0.5 and [t.coeff for t in curve] == [0.25, 0.5]
    assert [t.harmful_refused for t in curve] == [0.0, 1.0] and curve[1].harmless_refused == 0.0


def test_it_stops_where_answers_break(monkeypatch):
    coeff, curve = found(monkeypatch, {0.5: "broken", 1.0: "no"})
    assert coeff == 0.25 and [t.coeff for t in curve] == [0.25, 0.5] and curve[1].broken == 0.5


def test_where_none_suffices_the_unbroken_one_that_refuses_most_is_taken(monkeypatch):
    coeff, curve = found(monkeypatch, {})
    assert coeff == 0.25 and len(curve) == 3
    coeff, _ = found(monkeypatch, {0.25: "broken", 0.5: "broken"})
    assert coeff == 0.25  # all that was tried breaks: the smallest


def test_steering_changes_what_comes_after_its_block_and_the_teacher_says_so(tiny_model):
    model = tiny_model("llama")
    teacher = steered_teacher(model, 1, mx.ones(32), 0.5)
    assert teacher.shared_blocks == 1 and teacher.system_prompt is None
    row = mx.array([[1, 2, 3]])
    assert not mx.allclose(teacher.model(row), model(row))
    assert mx.array_equal(steered_teacher(model, 1, mx.ones(32), 0.0).model(row), model(row))


@pytest.mark.parametrize("mixup", [0.0, 0.25, 1.0])
def test_the_moving_average_by_hand(tiny_model, mixup):
    student = make_student(tiny_model("llama"), replace(TrainSettings(), num_layers=1), 0)
    moving = moving_average(student)
    before = {name: mx.array(w) for name, w in tree_flatten(student.trainable_parameters())}
    student.load_weights([(name, w + 1.0) for name, w in before.items()], strict=False)
    follow(moving, student, mixup)
    own = dict(tree_flatten(moving.parameters()))
    for name, w in before.items():
        assert mx.allclose(own[name], w + mixup, atol=1e-6)
    assert not tree_flatten(moving.trainable_parameters())
