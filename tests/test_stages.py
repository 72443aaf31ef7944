"""The checks a run makes of itself."""

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from safesteer_mlx import stages
from safesteer_mlx.direction import Direction
from safesteer_mlx.load import load
from safesteer_mlx.progress import Screen, UserError
from safesteer_mlx.recipe import BUNDLED, MODELS, resolve
from safesteer_mlx.residual import _override, blocks
from safesteer_mlx.student import adapter_config, make_student, save_adapters


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
    nothing = Direction(-1, 3, mx.zeros(128), None)  # type: ignore[arg-type]
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
    direction = stages.find_direction(recipe, base, rendered, Screen(quiet=True)).direction
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
