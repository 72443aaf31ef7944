"""Fusing: GPTQ's formula by hand, what goes onto which grid, and that nothing else moves."""

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import survey
from conftest import build
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from safesteer_mlx.formats.fuse import MIXED_BITS, Grid, fuse, layers, plan, quantization_of
from safesteer_mlx.formats.gptq import inverse_factor, pack, quantize
from safesteer_mlx.method.residual import hidden_states, view

ROWS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6], [11, 12, 13, 14, 15, 16, 17, 18]] * 4


def flat(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def student_of(base, n_layers: int = 1, kind: str = "lora", size: float = 0.05):
    """A student whose last blocks have been trained: B is drawn."""
    student = view(base)
    student.freeze()
    mx.random.seed(3)
    linear_to_lora_layers(student, n_layers, {"rank": 4, "scale": 2.0, "dropout": 0.0}, use_dora=kind == "dora")
    drawn = [(name, size * mx.random.normal(w.shape)) for name, w in flat(student).items() if name.endswith(".lora_b")]
    student.load_weights(drawn, strict=False)
    student.eval()
    mx.eval(student.parameters())
    return student


def quantized(name: str = "llama", bits: int = 4, **more):
    base = build(name)
    nn.quantize(base, group_size=32, bits=bits, **more)
    mx.eval(base.parameters())
    return base


def test_two_columns_by_hand():
    """H = [[2, 1], [1, 2]], w = (0.4, 0.4) on a grid of whole numbers: q0 = 0, e = 0.4 / U00 and w1 = 0.4 − e U01,
    with U the factor of H⁻¹."""
    hessian = mx.array([[2.0, 1.0], [1.0, 2.0]])
    u = np.array(inverse_factor(hessian), np.float64)
    damped = np.array([[2.02, 1.0], [1.0, 2.02]])
    np.testing.assert_allclose(u.T @ u, np.linalg.inv(damped), rtol=1e-5)
    assert u[1, 0] == 0 and u[0, 1] < 0
    # Over 32 columns, two of them alive: the second takes up half of what the first lost.
    wide = np.eye(32) * 1e-6
    wide[:2, :2] = hessian
    weight = np.zeros((1, 32), np.float32)
    weight[0, :2], weight[0, 2], weight[0, 3] = 0.4, 15.0, 0.0  # a 4-bit grid of steps of one
    codes, scales, biases = quantize(mx.array(weight), mx.array(wide.astype(np.float32)), 4, 32)
    found = np.array(mx.dequantize(codes, scales, biases, 32, 4))[0]
    step = abs(float(scales[0, 0].item()))
    assert step == pytest.approx(1.0, abs=0.01)
    assert found[0] == pytest.approx(0, abs=0.02) and found[1] == pytest.approx(1, abs=0.02)  # 0.4 + 0.4 / 2 rounds up


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_packed_as_mlx_packs_them(bits):
    mx.random.seed(bits)
    weight = mx.random.normal((5, 64))
    packed, scales, biases = mx.quantize(weight, 32, bits)
    spelled = mx.dequantize(packed, scales, biases, 32, bits).reshape(5, 2, 32)
    codes = mx.round((spelled - biases[..., None]) / scales[..., None]).astype(mx.uint8).reshape(5, 64)
    assert mx.array_equal(pack(codes, bits), packed)


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_a_layer_computes_more_of_what_it_did_than_rounding_leaves(bits):
    mx.random.seed(0)
    weight = mx.random.normal((48, 64))
    x = mx.random.normal((200, 64)) @ mx.random.normal((64, 64))
    spelled = [
        mx.dequantize(*q, 32, bits) for q in (mx.quantize(weight, 32, bits), quantize(weight, x.T @ x, bits, 32))
    ]
    rounded, better = (((x @ (weight - w).T) ** 2).sum().item() for w in spelled)
    assert better < 0.85 * rounded


def test_inputs_that_are_never_used_and_weights_of_zero_do_no_harm():
    hessian = mx.zeros((32, 32))
    hessian[0, 0] = 5.0
    for weight in (mx.zeros((3, 32)), mx.random.normal((2, 3, 32))):
        packed, scales, biases = quantize(weight, hessian, 4, 32, mx.float16)
        found = mx.dequantize(packed, scales, biases, 32, 4)
        assert scales.dtype == mx.float16 and mx.all(mx.isfinite(found))
        assert found.shape == weight.shape and mx.abs(found - weight).max() < 0.5


def test_what_was_not_trained_keeps_its_bytes_and_what_was_comes_close_to_the_student():
    base = quantized()
    student = student_of(base)
    fused = fuse(student, plan(student, "auto"), ROWS)
    before, after = flat(base), flat(fused)
    assert before.keys() == after.keys()
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed and all(name.startswith("model.layers.2.") for name in changed)
    assert all(layer.grid == Grid(4, 32) for layer in layers(fused))
    # The student's change is far larger than what fusing leaves of error.
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    states = [hidden_states(model, tokens) for model in (base, student, fused)]
    assert mx.abs(states[2] - states[1]).mean() < 0.6 * mx.abs(states[0] - states[1]).mean()


def test_rounding_alone_loses_more_than_gptq():
    base = quantized()
    student = student_of(base, 3, size=0.01)
    texts = ROWS + [np.random.default_rng(i).integers(1, 50, 20).tolist() for i in range(24)]
    ours = fuse(student, plan(student, "auto"), texts)
    rounded = view(student)
    for block in rounded.layers:
        block.update_modules(_nested([(n, m.fuse()) for n, m in block.named_modules() if hasattr(m, "fuse")]))
    test = mx.array([np.random.default_rng(100 + i).integers(1, 50, 20).tolist() for i in range(8)])
    want = student(test)
    errors = [((model(test) - want) ** 2).mean().item() for model in (ours, rounded)]
    assert errors[0] < 0.8 * errors[1]


def _nested(items):
    from mlx.utils import tree_unflatten

    return tree_unflatten(items)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", ["16", "32"])
def test_spelled_out_it_is_the_student(kind, bits):
    student = student_of(quantized(), 2, kind)
    fused = fuse(student, plan(student, bits), [])
    assert {w.dtype for w in flat(fused).values()} == {mx.float16 if bits == "16" else mx.float32}
    assert quantization_of(fused) is None
    tokens = mx.array([[3, 1, 4, 1, 5]])
    both = [model(tokens).astype(mx.float32) for model in (student, fused)]
    assert mx.allclose(*both, rtol=0, atol=2e-2 if bits == "16" else 1e-4)


def test_the_number_of_bits_is_what_was_asked_for():
    student = student_of(quantized())
    for bits, touched, rest in (("mixed", MIXED_BITS, 4), ("8", 8, 8), ("5", 5, 5), ("4", 4, 4)):
        fused = fuse(student, plan(student, bits), ROWS)
        for layer in layers(fused):
            assert layer.grid and layer.grid.bits == (touched if ".2." in layer.path else rest), (bits, layer.path)
        said = quantization_of(fused)
        assert said is not None and said["bits"] == rest
        own = {path for path in said if path.startswith("model.")}
        assert bool(own) == (bits == "mixed") and all(".2." in path for path in own)


def test_a_base_without_a_grid_stays_without_one_unless_asked():
    student = student_of(build("qwen2"))
    fused = fuse(student, plan(student, "auto"), ROWS)
    tokens = mx.array([[1, 2]])
    assert quantization_of(fused) is None and mx.allclose(fused(tokens), student(tokens), rtol=0, atol=1e-5)
    eight = fuse(student, plan(student, "8"), ROWS)
    # In groups of 64 where a row can be cut so, else of 32.
    grids = {layer.path: (layer.grid, layer.width) for layer in layers(eight)}
    assert all(grid == Grid(8, min(64, width)) for grid, width in grids.values()), grids


def test_each_weight_keeps_its_own_type():
    base = build("llama")
    base.set_dtype(mx.bfloat16)
    base.model.norm.weight = base.model.norm.weight.astype(mx.float32)
    fused = fuse(student := student_of(base), plan(student, "auto"), [])
    assert {n: w.dtype for n, w in flat(fused).items()} == {n: w.dtype for n, w in flat(base).items()}


def test_a_grid_that_is_not_affine_is_left_for_an_affine_one_of_as_many_bits():
    student = student_of(quantized(mode="mxfp4"))
    fused = fuse(student, plan(student, "auto"), ROWS)
    said = quantization_of(fused)
    assert said is not None and said["mode"] == "mxfp4"
    own = {path: config for path, config in said.items() if path.startswith("model.")}
    assert own and all(".2." in path and config["mode"] == "affine" for path, config in own.items())
    tokens = mx.array([[3, 1, 4, 1, 5]])
    error = (fused(tokens) - student(tokens)).square().mean()
    assert error < (build("llama")(tokens) - student(tokens)).square().mean()


def test_experts_are_fused_too():
    from mlx_lm.models import olmoe

    args = olmoe.ModelArgs(
        model_type="olmoe",
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        vocab_size=50,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    mx.random.seed(0)
    base = olmoe.Model(args)
    base.eval()
    nn.quantize(base, group_size=32, bits=4, class_predicate=lambda path, m: hasattr(m, "to_quantized"))
    student = student_of(base)
    fused = fuse(student, plan(student, "auto"), ROWS)
    assert flat(fused).keys() == flat(base).keys()
    tokens = mx.array([[3, 1, 4, 1, 5, 9]])
    errors = [(model(tokens) - student(tokens)).square().mean().item() for model in (fused, base)]
    assert errors[0] < errors[1]
    spelled = fuse(student, plan(student, "32"), [])
    assert mx.allclose(spelled(tokens), student(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [None, 4], ids=["spelled out", "4 bits"])
def test_latent_attention_is_put_on_every_grid(bits):
    """Its maps of each head are read from both sides, so their inputs have two widths."""
    latent = {"num_hidden_layers": 2, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
    base, _ = survey.build("deepseek_v3", survey.configs()[0]["deepseek_v3"] | latent)
    if bits:
        nn.quantize(base, group_size=32, bits=bits, class_predicate=lambda path, m: hasattr(m, "to_quantized"))
    student, tokens = student_of(base), mx.array([[3, 1, 4, 1, 5, 9]])
    errors = {}
    for wanted in ("auto", "4", "5", "8", "32"):
        fused = fuse(student, plan(student, wanted), ROWS[:3])
        errors[wanted] = (fused(tokens) - student(tokens)).square().mean().item()
        if wanted not in ("auto", "32"):
            grid = fused.layers[0].self_attn.embed_q
            assert grid.bits == int(wanted) and quantization_of(fused)["bits"] == int(wanted)
    assert errors["8"] < errors["5"] and errors["32"] < 1e-9
    assert not any(name.endswith(".scales") for name in flat(fused))


def test_the_plan_knows_how_large_it_gets():
    student = student_of(quantized())
    for bits in ("auto", "mixed", "8", "16", "32"):
        planned = plan(student, bits)
        real = sum(w.nbytes for w in flat(fuse(student, planned, ROWS)).values())
        assert real <= planned.bytes_of(student) <= 1.2 * real, bits


@pytest.mark.parametrize("bits", ["mixed", "8", "16", "32"])
def test_the_plan_knows_how_much_is_held_beside_the_base(bits):
    from mlx_lm.models import llama

    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=256,
        num_hidden_layers=2,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        vocab_size=3000,
        tie_word_embeddings=False,
    )
    base = llama.Model(args)
    base.set_dtype(mx.float16)
    nn.quantize(base, group_size=64, bits=4)
    student = student_of(base)
    planned = plan(student, bits)
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    fused = fuse(student, planned, ROWS[:2])
    held = mx.get_peak_memory() - before
    assert fused.layers and 0.6 < held / planned.new_bytes(student) < 1.3


def test_fusing_leaves_the_student_as_it_was():
    student = student_of(quantized())
    before = {name: mx.array(w) for name, w in flat(student).items()}
    fuse(student, plan(student, "8"), ROWS)
    after = flat(student)
    assert before.keys() == after.keys() and all(mx.array_equal(before[n], after[n]) for n in before)
