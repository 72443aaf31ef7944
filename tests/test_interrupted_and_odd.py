"""Runs that were interrupted at an awkward moment, and models, flags and data that are not the usual ones."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from safesteer_mlx import evaluate, padding, prompts, stages
from safesteer_mlx.progress import Screen
from safesteer_mlx.recipe import resolve

RECIPE = resolve({}, {})[0]
UNEQUAL = [[1, 2, 3, 4 + i][: 2 + i % 3] for i in range(12)]


def loaded(model, **more):
    """A model with as much around it as its stage needs: a tokenizer whose every answer is "Of course."."""
    tokenizer = SimpleNamespace(has_thinking=False, decode=lambda *_, **__: "Of course.")
    return SimpleNamespace(model=model, tokenizer=tokenizer, eos_ids=[49], config={}, thinks=False, **more)


def test_a_student_that_cannot_be_batched_is_asked_one_at_a_time_whether_it_collapsed(tiny_model):
    # gemma2 of mlx-lm 0.32.2 fails on prompts of unequal length with grouped heads.
    base = loaded(tiny_model("gemma2"))
    recipe = replace(RECIPE, run=replace(RECIPE.run, generation_batch_size=1))
    rendered = SimpleNamespace(harmless_validation=UNEQUAL)
    assert stages.collapsed(recipe, base, rendered, base.model) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "size"), [("llama", 64), ("gemma2", 1)])
def test_evaluate_asks_an_architecture_that_cannot_be_batched_one_at_a_time(
    name, size, tiny_model, monkeypatch, capsys
):
    used = []
    monkeypatch.setattr(prompts, "render_all", lambda *_: UNEQUAL)
    monkeypatch.setattr(evaluate, "_scores", lambda *given: used.append(given[4]) or {})
    monkeypatch.setattr(evaluate, "_tasks", lambda *given: used.append(given[4]) or {})
    asked = evaluate.Asked({"harmful": []}, {}, [], [SimpleNamespace()])  # type: ignore[list-item]
    evaluate.score(evaluate.parse([]), asked, loaded(tiny_model(name)), Screen())  # type: ignore[arg-type]
    assert used == [size, size] and (padding.ONE_AT_A_TIME in capsys.readouterr().out) == (size == 1)
