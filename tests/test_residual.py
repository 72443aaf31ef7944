"""Reading, steering and ablating change what they say and nothing else, in three architectures."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import build
from mlx.utils import tree_flatten

from safesteer_mlx.residual import ablate, block_inputs, blocks, head, hidden_states, last_logits, pad_right, steer

ROW = [3, 7, 1, 9]


def inputs(model, rows=(ROW,)):
    positions = mx.array([list(range(len(rows[0])))] * len(rows))
    return np.array(block_inputs(model, pad_right(rows), positions))  # (L, B, T, D)


def test_steering_adds_the_vector_at_one_block_and_every_position(any_model):
    vector = mx.random.normal((32,))
    plain, steered = inputs(any_model), inputs(steer(any_model, 1, vector, 0.5))
    np.testing.assert_array_equal(plain[0], steered[0])
    np.testing.assert_allclose(steered[1] - plain[1], np.zeros_like(plain[1]), atol=1e-6)  # read before it is added
    own, x = blocks(any_model), mx.array(plain[1]) + 0.5 * vector
    moved = own[1](x, "causal") if "gemma" not in type(any_model).__module__ else own[1](x, _mask(4))
    np.testing.assert_allclose(np.array(moved), steered[2], atol=1e-4)


def _mask(n):
    from mlx_lm.models.base import create_causal_mask

    return create_causal_mask(n)


def test_views_leave_the_base_alone_and_keep_its_names(any_model):
    tokens, vector = mx.array([ROW]), mx.random.normal((32,))
    before = np.array(any_model(tokens))
    for view in (steer(any_model, 0, vector), ablate(any_model, vector)):
        assert np.abs(np.array(view(tokens)) - before).max() > 1e-4
        assert [k for k, _ in tree_flatten(view.parameters())] == [k for k, _ in tree_flatten(any_model.parameters())]
    np.testing.assert_array_equal(np.array(any_model(tokens)), before)
    np.testing.assert_array_equal(np.array(steer(any_model, 2, vector, 0.0)(tokens)), before)


def test_steering_twice_adds_twice(model):
    vector, tokens = mx.random.normal((32,)), mx.array([ROW])
    twice = steer(steer(model, 1, vector), 1, vector)(tokens)
    np.testing.assert_allclose(np.array(twice), np.array(steer(model, 1, vector, 2.0)(tokens)), atol=1e-5)


def test_ablation_leaves_nothing_along_the_direction(model):
    vector = mx.random.normal((32,))
    r = np.array(vector / mx.linalg.norm(vector))
    ablated = inputs(ablate(model, vector))
    assert np.abs(ablated[1:] @ r).max() < 1e-4 < np.abs(inputs(model)[1:] @ r).max()
    nothing = ablate(model, mx.zeros(32))(mx.array([ROW]))
    np.testing.assert_array_equal(np.array(nothing), np.array(model(mx.array([ROW]))))


@pytest.mark.parametrize("quantized", [False, True])
def test_hidden_states_and_head_are_the_model(any_model, quantized):
    if quantized:
        nn.quantize(any_model, 32, 4)
    tokens = mx.array([ROW])
    logits = head(any_model)(hidden_states(any_model, tokens))
    np.testing.assert_array_equal(np.array(logits), np.array(any_model(tokens)))


def test_gradients_flow_through_hidden_states_and_head(model):
    tokens = mx.array([ROW])

    def gradients(forward):
        grads = nn.value_and_grad(model, lambda m: mx.square(forward(m)).mean())(model)[1]
        return [np.array(g) for _, g in tree_flatten(grads)]

    for got, want in zip(
        gradients(lambda m: head(m)(hidden_states(m, tokens))), gradients(lambda m: m(tokens)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_padding_on_the_right_changes_no_real_position(any_model):
    rows = [ROW, ROW[:2], [*ROW, 4, 4, 4]]
    together = np.array(last_logits(any_model, rows))
    for got, row in zip(together, rows, strict=True):
        np.testing.assert_allclose(got, np.array(any_model(mx.array([row])))[0, -1], atol=1e-4)


def test_views_add_no_weights():
    model = build("llama")
    weights = sum(v.nbytes for _, v in tree_flatten(model.parameters()))
    before = mx.get_active_memory()
    views = [steer(model, 1, mx.ones(32)), ablate(model, mx.ones(32))]
    mx.eval([v.parameters() for v in views])
    assert mx.get_active_memory() - before < 0.01 * weights


def test_wrong_block_and_wrong_width_raise(model):
    with pytest.raises(ValueError, match="layer 3"):
        steer(model, 3, mx.ones(32))
    with pytest.raises(ValueError, match="16"):
        steer(model, 0, mx.ones(16))(mx.array([ROW]))
