"""Reading, steering and ablating change what they say and nothing else, in three architectures."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import build, walk
from mlx.utils import tree_flatten

from safesteer_mlx.method.residual import (
    Plumbing,
    UnsupportedModelError,
    _override,
    ablate,
    answer_states,
    block_inputs,
    block_outputs,
    blocks,
    by_length,
    check_stream,
    checkpoint_blocks,
    head,
    hidden_states,
    last_logits,
    left_by_ablation,
    of_prompts,
    pad_right,
    plumbing,
    resume,
    resumes,
    steer,
    take_positions,
    unit,
    view,
)

ROW = [3, 7, 1, 9]


def inputs(model, rows=(ROW,)):
    return np.array(mx.stack(block_inputs(model, pad_right(rows))))  # (L, B, T, D)


def test_steering_adds_the_vector_at_one_block_and_every_position(any_model):
    vector = mx.random.normal((32,))
    plain, steered = inputs(any_model), inputs(steer(any_model, 1, vector, 0.5))
    np.testing.assert_array_equal(plain[0], steered[0])
    np.testing.assert_allclose(steered[1], plain[1], atol=1e-6)  # read before it is added
    own, x = blocks(any_model), mx.array(plain[1]) + 0.5 * vector
    moved = own[1](x, "causal") if "gemma" not in type(any_model).__module__ else own[1](x, _mask(4))
    np.testing.assert_allclose(np.array(moved), steered[2], atol=1e-4)


def _mask(n):
    from mlx_lm.models.base import create_causal_mask

    return create_causal_mask(n)


def test_views_leave_the_base_alone_and_keep_its_names(any_model):
    tokens, vector = mx.array([ROW]), mx.random.normal((32,))
    before = np.array(any_model(tokens))
    for changed in (steer(any_model, 0, vector), ablate(any_model, vector)):
        assert np.abs(np.array(changed(tokens)) - before).max() > 1e-4
        names = [[k for k, _ in tree_flatten(m.parameters())] for m in (changed, any_model)]
        assert names[0] == names[1]
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


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("quantized", [False, True])
def test_logits_of_a_quantized_head_are_not_rounded_to_half_precision(any_model, dtype, quantized):
    any_model.set_dtype(dtype)
    if quantized:
        nn.quantize(any_model, 32, 4)
    hidden = hidden_states(any_model, mx.array([ROW]))
    logits = head(any_model)(hidden)
    assert hidden.dtype == dtype and logits.dtype == (mx.float32 if quantized else dtype)
    any_model.set_dtype(mx.float32)  # the same weights and scales
    exact = np.array(head(any_model)(hidden.astype(mx.float32)))
    off = np.abs(np.array(logits.astype(mx.float32)) - exact).max()
    assert off < 1e-5 if quantized else off > 1e-5


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


def drawn(seed, scale=1.0):
    return scale * mx.random.normal((32,), key=mx.random.key(seed))


def logits(model, row=ROW):
    return np.array(model(mx.array([row])))[0]


def read_by_blocks(view, row=ROW):
    """What the blocks of a view hand to their first norm: (L, T, D), whatever the view does before that."""
    seen = []
    for block in blocks(view):
        norm = block.input_layernorm
        kind = type(norm)
        norm.__class__ = type(
            "Seen",
            (kind,),
            {"__call__": lambda self, x, kind=kind: (seen.append(x), kind.__call__(self, x))[1]},
        )
    view(mx.array([row]))
    return np.array(mx.stack(seen))[:, 0]


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma2"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_steering_is_the_forward_pass_with_the_vector_added(tiny_model, name, layer):
    model, vector = tiny_model(name), drawn(layer)
    np.testing.assert_allclose(logits(model), walk(model, ROW)[1], atol=1e-4)
    for coeff in (1.0, -0.7):
        view = steer(model, layer, vector, coeff)
        seen, out = walk(model, ROW, {layer: coeff * vector})
        np.testing.assert_allclose(logits(view), out, atol=1e-4)
        np.testing.assert_allclose(read_by_blocks(view), seen, atol=1e-4)
        at_block = read_by_blocks(view)[layer] - walk(model, ROW)[0][layer]
        np.testing.assert_allclose(at_block, np.tile(coeff * np.array(vector), (len(ROW), 1)), atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma2"])
def test_steering_on_prompts_only_leaves_answers_to_what_they_make_of_them(tiny_model, name):
    model, vector = tiny_model(name), drawn(2)
    view = steer(model, 1, vector, 0.7, prompts_only=True)
    for begins in (1, 3, 4):
        added = 0.7 * np.array(vector) * (np.arange(4) < begins)[:, None]
        with of_prompts(view, lambda begins=begins: mx.arange(4)[None] < begins):
            np.testing.assert_allclose(logits(view), walk(model, ROW, {1: mx.array(added)})[1], atol=1e-4)
    # All of it is a prompt if nobody says otherwise, and where a model is steered everywhere that makes no difference.
    np.testing.assert_array_equal(logits(view), logits(steer(model, 1, vector, 0.7)))
    everywhere = steer(model, 1, vector, 0.7)
    with of_prompts(everywhere, lambda: mx.zeros((1, 4), mx.bool_)):
        np.testing.assert_array_equal(logits(everywhere), logits(view))


@pytest.mark.parametrize("resumed", [False, True])
def test_the_states_of_answers_are_those_of_steered_prompts_alone(model, resumed):
    """Rows of unequal length, and a view that begins at the steered block."""
    prompts, answers, vector = [ROW, ROW[:2]], [[5, 2], [8, 6, 4]], drawn(3)
    view = steer(model, 1, vector, prompts_only=True)
    if resumed:
        tokens = pad_right([[*p, *a] for p, a in zip(prompts, answers, strict=True)])
        view = resume(view, 1, block_inputs(model, tokens)[1])
    states = head(model)(answer_states(view, prompts, answers)[None])[0]
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        row = [*prompt, *answer]
        added = np.array(vector) * (np.arange(len(row)) < len(prompt))[:, None]
        expected.extend(walk(model, row, {1: mx.array(added)})[1][len(prompt) - 1 : -1])
    np.testing.assert_allclose(np.array(states), np.array(expected), atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma2"])
def test_nested_views_add_both_vectors(tiny_model, name):
    model, u, v = tiny_model(name), drawn(1), drawn(2)
    for first, second in ((1, 1), (0, 2), (2, 0)):
        add = {first: u, second: 2.0 * v} if first != second else {first: u + 2.0 * v}
        once = steer(model, first, u)
        np.testing.assert_allclose(logits(steer(once, second, v, 2.0)), walk(model, ROW, add)[1], atol=1e-4)
        np.testing.assert_allclose(logits(once), walk(model, ROW, {first: u})[1], atol=1e-4)
    there_and_back = steer(steer(model, 1, u), 1, u, -1.0)
    np.testing.assert_allclose(logits(there_and_back), logits(model), atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_ablation_is_the_forward_pass_with_every_part_projected(tiny_model, name):
    model, r = tiny_model(name), drawn(3, 5.0)  # its length does not matter
    seen, out = walk(model, ROW, without=r)
    np.testing.assert_allclose(logits(ablate(model, r)), out, atol=1e-4)
    np.testing.assert_allclose(read_by_blocks(ablate(model, r)), seen, atol=1e-4)
    assert np.abs(logits(model) - out).max() > 1e-3


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma2"])
def test_no_block_sees_the_ablated_direction(tiny_model, name):
    model, r = tiny_model(name), drawn(4)
    along = np.abs(read_by_blocks(ablate(model, r)) @ np.array(unit(r)))
    assert along.max() < 1e-4
    np.testing.assert_allclose(logits(ablate(ablate(model, r), r)), logits(ablate(model, r)), atol=1e-4)


def test_ablating_takes_back_a_steering_along_the_same_direction(model):
    r = drawn(5)
    both = ablate(steer(model, 1, r, 3.0), r)  # projects first, then the inner view adds
    ablated = logits(ablate(model, r))
    np.testing.assert_allclose(logits(steer(ablate(model, r), 1, r, 3.0)), ablated, atol=1e-4)
    assert np.abs(logits(both) - ablated).max() > 1e-3


def test_the_unit_vector():
    assert unit(mx.array([3.0, 4.0])).tolist() == pytest.approx([0.6, 0.8])
    assert unit(mx.zeros(4)).tolist() == [0.0] * 4
    assert unit(mx.array([3.0, 4.0], mx.bfloat16)).dtype == mx.float32


def test_half_precision_streams_stay_in_half_precision(model):
    model.set_dtype(mx.bfloat16)
    for changed in (steer(model, 1, drawn(6)), ablate(model, drawn(6))):
        assert changed(mx.array([ROW])).dtype == mx.bfloat16


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma2"])
def test_four_bit_models_are_steered_and_share_their_weights(tiny_model, name):
    model = tiny_model(name)
    nn.quantize(model, 32, 4)
    mx.eval(model.parameters())
    vector, before = drawn(7), logits(model)
    np.testing.assert_allclose(logits(steer(model, 1, vector)), walk(model, ROW, {1: vector})[1], atol=1e-4)
    np.testing.assert_array_equal(logits(steer(model, 1, vector, 0.0)), before)
    np.testing.assert_array_equal(logits(model), before)
    mx.eval(vector)
    weights, used = sum(v.nbytes for _, v in tree_flatten(model.parameters())), mx.get_active_memory()
    views = [steer(model, layer, vector) for layer in range(3)] + [ablate(model, vector)]
    mx.eval([view.parameters() for view in views])
    assert mx.get_active_memory() - used < 0.01 * weights


def test_a_view_does_not_follow_later_edits_of_the_base(model):
    view = steer(model, 1, drawn(8))
    before = logits(view)
    model.update({"model": {"norm": {"weight": 2.0 * model.model.norm.weight}}})
    np.testing.assert_array_equal(logits(view), before)


def test_block_inputs_are_those_of_the_forward_pass(any_model):
    rows = [ROW, [2, 5], [8, 6, 4]]
    found = inputs(any_model, rows)
    assert found.shape == (3, 3, 4, 32)
    for b, row in enumerate(rows):
        np.testing.assert_allclose(found[:, b, : len(row)], walk(any_model, row)[0], atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_pass_resumed_at_a_block_is_the_whole_pass(any_model, layer):
    tokens = pad_right([ROW, [2, 5], [8, 6, 4]])
    assert resumes(any_model, tokens)
    calls = []
    counted = view(any_model)
    for i, block in enumerate(blocks(counted)):
        _override(block, "Counted", lambda call, x, *a, i=i, **k: (calls.append(i), call(x, *a, **k))[1])
    expected = np.array(counted(tokens))
    resumed = resume(counted, layer, block_inputs(any_model, tokens)[layer])
    calls.clear()
    np.testing.assert_allclose(np.array(resumed(tokens)), expected, atol=1e-5)
    assert calls == list(range(layer, 3))  # the blocks before are not run
    shifted = resume(steer(any_model, layer, drawn(2)), layer, block_inputs(any_model, tokens)[layer])
    np.testing.assert_allclose(
        np.array(shifted(tokens)), np.array(steer(any_model, layer, drawn(2))(tokens)), atol=1e-4
    )


def test_an_architecture_that_passes_more_than_the_stream_does_not_resume(model):
    first, last = blocks(model)[0], blocks(model)[-1]
    seen = []
    _override(first, "Keeping", lambda call, x, *a, **k: (seen.append(x), call(x, *a, **k))[1])
    _override(last, "Using", lambda call, x, *a, **k: call(x + seen.pop(), *a, **k) if seen else call(x, *a, **k))
    assert not resumes(model, mx.array([ROW]))


def test_a_vector_a_row_is_each_rows_own_vector(any_model):
    vectors, tokens = mx.random.normal((3, 32), key=mx.random.key(4)), pad_right([ROW, [2, 5], [8, 6, 4]])
    for change in (lambda m, v: steer(m, 1, v, 2.0), lambda m, v: ablate(m, v)):
        found = np.array(change(any_model, vectors)(tokens))
        for i in range(3):
            one = np.array(change(any_model, vectors[i])(tokens[i : i + 1]))[0]
            np.testing.assert_allclose(found[i], one, atol=1e-4)


def test_padding_is_zeros_on_the_right_and_positions_are_taken_by_row():
    assert pad_right([[1, 2], [3]]).tolist() == [[1, 2], [3, 0]]
    x = mx.arange(12).reshape(2, 3, 2)
    assert take_positions(x, mx.array([[2], [0]])).tolist() == [[[4, 5]], [[6, 7]]]


@pytest.mark.parametrize("layer", [-1, 3, 17])
def test_a_wrong_block_is_named_with_the_number_of_blocks(model, layer):
    with pytest.raises(ValueError, match=rf"{layer}\b.* 3$"):
        steer(model, layer, mx.ones(32))


@pytest.mark.parametrize("width", [1, 16, 64])
def test_a_wrong_width_is_named_with_the_models(model, width):
    with pytest.raises(ValueError, match=rf"\b{width}\b.* 32$"):
        steer(model, 0, mx.ones(width))(mx.array([ROW]))


class Body(nn.Module):
    """Blocks that are given the embedding too, by name, and return the stream as the second of two things."""

    def __init__(self, block):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.layers = [block(i) for i in range(3)]

    def __call__(self, tokens):
        e = x = self.embed(tokens)
        for block in self.layers:
            _, x = block(e, h=x)
        return x


class Odd(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.model, self.lm_head = Body(block), nn.Linear(32, 50)

    def __call__(self, tokens):
        return self.lm_head(self.model(tokens))

    @property
    def layers(self):
        return self.model.layers


class Named(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def __call__(self, e, h):
        return e, h + mx.tanh(self.linear(h)) + 0.1 * e


def test_where_the_stream_goes_is_seen_not_assumed():
    mx.random.seed(0)
    model, tokens, vector = Odd(Named), mx.array([ROW]), drawn(2)
    assert plumbing(model) == Plumbing("h", 1)
    check_stream(model, tokens)

    def by_hand(add=None):
        e = x = model.model.embed(tokens)
        seen = []
        for i, block in enumerate(model.model.layers):
            x = x + (add or {}).get(i, 0.0)
            seen.append(x)
            x = x + mx.tanh(block.linear(x)) + 0.1 * e
        return np.array(mx.stack(seen)), np.array(model.lm_head(x))

    np.testing.assert_allclose(np.array(mx.stack(block_inputs(model, tokens))), by_hand()[0], atol=1e-5)
    np.testing.assert_allclose(np.array(steer(model, 1, vector)(tokens)), by_hand({1: vector})[1], atol=1e-5)
    np.testing.assert_allclose(np.array(head(model)(hidden_states(model, tokens))), by_hand()[1], atol=1e-5)


def test_an_architecture_that_changes_the_stream_between_blocks_is_refused(model):
    tokens = mx.array([ROW])
    check_stream(model, tokens)

    class Halving(type(model.model)):
        def __call__(self, tokens, *rest):
            x = self.embed_tokens(tokens)
            for block in self.layers:
                x = 0.5 * block(x, None, None)
            return self.norm(x)

    halving = view(model)
    halving.model.__class__ = Halving
    halving(tokens)
    with pytest.raises(UnsupportedModelError, match="one residual stream"):
        check_stream(halving, tokens)


def test_ablation_of_the_whole_stream_leaves_nothing_behind_sandwich_norms(tiny_model):
    model, r, tokens = tiny_model("gemma2"), drawn(4), mx.array([ROW])
    mx.random.seed(5)
    for block in model.layers:  # norms that turn a direction: as trained ones do
        for norm in (block.post_attention_layernorm, block.post_feedforward_layernorm):
            norm.weight = mx.random.normal(norm.weight.shape)
    assert left_by_ablation(model, r, tokens) > 0.01
    behind = [x.astype(mx.float32) for x in block_outputs(ablate(model, r, whole_stream=True), tokens)]
    along = [mx.abs(x @ unit(r)).max().item() for x in behind]
    assert max(along) < 1e-4
    # And before the MLP too, which reads the stream in the middle of a block.
    seen = []
    ablated = ablate(model, r, whole_stream=True)
    for block in blocks(ablated):
        _override(block.pre_feedforward_layernorm, "Seen", lambda call, x: (seen.append(x), call(x))[1])
    ablated(tokens)
    assert max(mx.abs(x @ unit(r)).max().item() for x in seen) < 1e-4


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_where_nothing_stands_between_both_ablations_are_one(tiny_model, name):
    model, r, tokens = tiny_model(name), drawn(4), mx.array([ROW])
    assert left_by_ablation(model, r, tokens) < 1e-5
    both = [np.array(ablate(model, r, whole)(tokens)) for whole in (False, True)]
    np.testing.assert_allclose(*both, atol=1e-5)


def test_checkpoints_keep_the_gradient_of_what_blocks_hand_beside_the_stream():
    """As Gemma 4's and Hunyuan's, whose blocks use others' keys and values."""

    class Sharing(nn.Module):
        def __init__(self, i):
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def __call__(self, e, h):
            return mx.tanh(self.linear(h)) + 0.3 * e, h + mx.tanh(self.linear(h)) * e

    class Passing(Body):
        def __call__(self, tokens):
            x = self.embed(tokens)
            e = x
            for block in self.layers:
                e, x = block(e, h=x)
            return x

    mx.random.seed(0)
    model = Odd(Sharing)
    model.model.__class__ = Passing
    model.train()
    tokens = mx.array([ROW])
    grads = []
    for checkpointed in (False, True):
        own = view(model)
        if checkpointed:
            checkpoint_blocks(own)
        grad = nn.value_and_grad(own, lambda m: (m(tokens) ** 2).mean())(own)[1]
        grads.append(dict(tree_flatten(grad)))
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        np.testing.assert_allclose(np.array(grads[1][name]), np.array(grads[0][name]), atol=1e-6)
    assert max(mx.abs(g).max().item() for g in grads[0].values()) > 1e-3


def test_batches_are_of_rows_of_like_length():
    rows = [[0] * n for n in (3, 1, 4, 2, 1)]
    assert list(by_length(rows, 2)) == [[1, 4], [3, 0], [2]]
    assert list(by_length([], 2)) == []
