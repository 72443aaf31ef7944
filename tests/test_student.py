"""The student: what is trained, and files that mlx-lm reads as its own."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from safesteer_mlx.method.prompts import built_in_sets
from safesteer_mlx.method.residual import last_logits
from safesteer_mlx.method.run import given_adapters, run_parts
from safesteer_mlx.method.student import (
    RowDropout,
    bytes_trained,
    first_trained_block,
    make_student,
    row_dropouts,
    save_adapters,
)
from safesteer_mlx.recipe import MODELS, TrainSettings, resolve
from safesteer_mlx.system.load import load
from safesteer_mlx.system.screen import UserError

SETTINGS = TrainSettings(lora_parameters={"rank": 4, "scale": 2.0, "dropout": 0.0})


def names(student):
    return [name for name, _ in tree_flatten(student.trainable_parameters())]


def test_keys_and_num_layers_say_what_is_trained(tiny_model):
    model = tiny_model("llama")
    keys = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    student = make_student(model, replace(SETTINGS, num_layers=2, lora_parameters=keys), 0)
    assert {name.rsplit(".", 1)[0] for name in names(student)} == {f"model.layers.{i}.self_attn.q_proj" for i in (1, 2)}
    assert first_trained_block(student) == 1
    assert bytes_trained(student) == 2 * 4 * 4 * (32 + 32)
    every = make_student(model, SETTINGS, 0)
    assert first_trained_block(every) == 0 and len(names(every)) == 3 * 7 * 2


def test_before_the_first_step_it_computes_what_the_base_does(tiny_model):
    model, rows = tiny_model("llama"), [[1, 2, 3], [4, 5]]
    for kind in ("lora", "dora"):
        student = make_student(model, replace(SETTINGS, fine_tune_type=kind), 0)
        assert mx.allclose(last_logits(student, rows), last_logits(model, rows), atol=1e-5)
    full = make_student(model, replace(SETTINGS, fine_tune_type="full", num_layers=1), 0)
    assert all(name.startswith("model.layers.2.") for name in names(full))


def test_the_seed_draws_the_adapters(tiny_model):
    model = tiny_model("llama")
    one, same, other = (dict(tree_flatten(make_student(model, SETTINGS, s).trainable_parameters())) for s in (1, 1, 2))
    assert all(mx.array_equal(one[name], same[name]) for name in one)
    assert any(not mx.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 4}, "num_layers = 4, but the model has 3 blocks"),
        ({"lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["none"]}}, "match no layer"),
    ],
)
def test_settings_that_do_not_fit_are_a_sentence(tiny_model, changes, said):
    with pytest.raises(UserError, match=said):
        make_student(tiny_model("llama"), replace(SETTINGS, **changes), 0)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_lm_reads_the_adapters_as_they_were(tmp_path, kind):
    from mlx_lm import load as mlx_lm_load

    base = load(str(MODELS / "tiny-chat"))
    settings = replace(resolve({}, {})[0].train, fine_tune_type=kind, num_layers=3)
    student = make_student(base.model, settings, 0)
    mx.random.seed(3)
    zero = [(name, w) for name, w in tree_flatten(student.trainable_parameters()) if name.endswith("lora_b")]
    drawn = [(name, 0.05 * mx.random.normal(w.shape)) for name, w in zero]
    student.load_weights(drawn, strict=False)
    save_adapters(tmp_path / "adapters", student, settings, base.name, 0)
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == kind and config["num_layers"] == 3
    assert config["lora_parameters"] == settings.lora_parameters
    read, _ = mlx_lm_load(str(MODELS / "tiny-chat"), adapter_path=str(tmp_path / "adapters"))  # type: ignore[misc]
    rows = [[5, 6, 7], [8, 9]]
    found, ours, before = (last_logits(model, rows) for model in (read, student, base.model))
    assert mx.allclose(found, ours, rtol=1e-3, atol=1e-2) and not mx.allclose(ours, before, atol=0.1)


def made_with(folder, model, settings):
    """Adapters with this scale, which change something; and the file of them."""
    student = make_student(model, settings, 0)
    mx.random.seed(3)
    drawn = [(name, 0.05 * mx.random.normal(w.shape)) for name, w in tree_flatten(student.trainable_parameters())]
    student.load_weights([(name, w) for name, w in drawn if name.endswith("lora_b")], strict=False)
    save_adapters(folder, student, settings, "model", 0)
    return student, folder / "adapters.safetensors"


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("scale", [20.0, 2.0, 0.3, 0.0])
def test_adapters_to_begin_from_do_what_they_did_whatever_their_scale(tiny_model, tmp_path, kind, scale):
    model, rows = tiny_model("llama"), [[1, 2, 3], [4, 5]]
    settings = replace(SETTINGS, fine_tune_type=kind, lora_parameters=SETTINGS.lora_parameters | {"scale": scale})
    made, file = made_with(tmp_path, model, settings)
    ours = replace(SETTINGS, fine_tune_type=kind, resume_adapter_file=str(file))
    student = make_student(model, ours, 1)
    assert mx.allclose(last_logits(student, rows), last_logits(made, rows), atol=1e-5)
    assert scale == 0 or not mx.allclose(last_logits(made, rows), last_logits(model, rows), atol=1e-3)
    if scale == 2.0:  # the same: not a bit is touched
        weights = dict(tree_flatten(made.trainable_parameters()))
        assert all(mx.array_equal(w, weights[name]) for name, w in tree_flatten(student.trainable_parameters()))


def test_adapters_of_which_nothing_tells_the_scale_are_taken_as_they_are(tiny_model, tmp_path):
    model = tiny_model("llama")
    made, file = made_with(tmp_path, model, SETTINGS)
    weights, config = dict(tree_flatten(made.trainable_parameters())), tmp_path / "adapter_config.json"
    for content in (None, "{}", '{"lora_parameters": {"rank": 4}}', '{"lora_parameters": 7}'):
        config.write_text(content) if content else config.unlink()
        student = make_student(model, replace(SETTINGS, resume_adapter_file=str(file)), 1)
        assert all(mx.array_equal(w, weights[name]) for name, w in tree_flatten(student.trainable_parameters()))


@pytest.mark.parametrize(
    ("own", "content", "said"),
    [
        (0.0, '{"lora_parameters": {"scale": 20}}', r"with scale = 20, which lora_parameters scale = 0 .* scale 20$"),
        (
            2.0,
            '{"lora_parameters": {"scale": "x"}}',
            "adapter_config.json lora_parameters scale = 'x' must be a number",
        ),
        (2.0, "[", "adapter_config.json is not JSON; mend it"),
    ],
)
def test_a_scale_that_cannot_be_taken_over_is_a_sentence(tiny_model, tmp_path, own, content, said):
    model = tiny_model("llama")
    _, file = made_with(tmp_path, model, SETTINGS)
    (tmp_path / "adapter_config.json").write_text(content)
    settings = replace(SETTINGS, lora_parameters=SETTINGS.lora_parameters | {"scale": own})
    with pytest.raises(UserError, match=said):
        make_student(model, replace(settings, resume_adapter_file=str(file)), 1)


def test_other_adapters_at_the_same_path_are_another_run(tiny_model, tmp_path):
    file, own = tmp_path / "made" / "adapters.safetensors", tmp_path / "run"
    flags = {"resume_adapter_file": str(file), "adapter_path": str(own)}
    recipe, _ = resolve({}, flags)
    with pytest.raises(UserError, match="cannot be read"):
        given_adapters(recipe)
    hashes = set()
    for scale in (2.0, 20.0):
        made_with(
            file.parent,
            tiny_model("llama"),
            replace(SETTINGS, lora_parameters=SETTINGS.lora_parameters | {"scale": scale}),
        )
        assert len(given_adapters(recipe)) == 2 and given_adapters(recipe) == given_adapters(recipe)
        hashes.add(tuple(given_adapters(recipe)))
    mx.save_safetensors(str(file), {"lora_b": mx.ones(3)})
    hashes.add(tuple(given_adapters(recipe)))
    assert len(hashes) == 3
    base = load(str(MODELS / "tiny-chat"))
    parts = run_parts(recipe, base, built_in_sets(base.name))
    assert parts["adapters to begin from"] == given_adapters(recipe)
    # Those that the run writes over say nothing of what it began from; without any a run is called as before.
    for other in ({**flags, "adapter_path": str(file.parent)}, {}):
        recipe, _ = resolve({}, other)
        assert given_adapters(recipe) == []
        assert run_parts(recipe, base, built_in_sets(base.name))["adapters to begin from"] == []


def test_a_mask_is_told_by_row_position_and_module_alone():
    keys = mx.array([[1, 2], [3, 4], [5, 6]], mx.uint32)
    one, other = (RowDropout(0.25, number, keys) for number in (0, 1))
    whole = one(mx.ones((3, 40, 64)))
    assert set(np.unique(np.array(whole)).tolist()) == {0.0, np.float32(1 / 0.75)}
    assert abs(whole.mean().item() - 1) < 0.05
    for axis in range(3):
        assert min(np.array(whole).mean((axis, 2 if axis != 2 else 1)).tolist()) > 0.7  # each its own share
    one.draw_from(keys[1:])
    assert mx.array_equal(one(mx.ones((2, 50, 64)))[:, :40], whole[1:])  # another batch, longer rows
    assert all(
        (one(mx.ones((2, 40, 64))) == x).mean().item() < 0.8 for x in (other(mx.ones((3, 40, 64)))[1:], whole[:2])
    )
    assert (whole[:, 1:] == whole[:, :-1]).mean().item() < 0.8  # where two masks are alike by chance: 0.625
    mixed = one(mx.ones((30, 64)))  # of rows that are mixed, the same each time
    assert mx.array_equal(mixed, one(mx.ones((30, 64)))) and abs(mixed.mean().item() - 1) < 0.1
    one.eval()
    assert mx.array_equal(one(mx.ones((3, 4, 5))), mx.ones((3, 4, 5)))


def test_dropout_is_by_row_where_anything_is_dropped(tiny_model):
    model = tiny_model("llama")
    dropped = replace(SETTINGS, lora_parameters=SETTINGS.lora_parameters | {"dropout": 0.25})
    assert row_dropouts(make_student(model, SETTINGS, 0)) == []
    own = row_dropouts(make_student(model, dropped, 0))
    assert [d._number for d in own] == list(range(3 * 7)) and {d._p_1 for d in own} == {0.75}
    assert names(make_student(model, dropped, 0)) == names(make_student(model, SETTINGS, 0))
