"""The memory plan: by hand, against measured peaks, what is lowered to fit; one copy of the weights; backing off."""

import json
import shutil
from dataclasses import replace

import fit_memory
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from shapes import memory_shape, random_model

from safesteer_mlx.align import main
from safesteer_mlx.method.residual import hidden_states
from safesteer_mlx.method.rollout import Sampling, generate, stream_key
from safesteer_mlx.method.student import make_student
from safesteer_mlx.method.teacher import steered_teacher
from safesteer_mlx.recipe import MODELS, parse_bytes, resolve
from safesteer_mlx.system import memory
from safesteer_mlx.system.memory import (
    Machine,
    fitted,
    gradient_bytes,
    plan,
    trained_values,
    with_smaller_batches,
)
from safesteer_mlx.system.model_files import Tensor, with_sizes
from safesteer_mlx.system.screen import UserError
from safesteer_mlx.system.shape import Block, read_shape, shape_of

pytestmark = pytest.mark.usefixtures("few_prompts")

CONFIG = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "vocab_size": 10,
}
# 4-bit in groups of 64 would not fit such rows; groups of 8 do, and the arithmetic is the same.
HEADERS = {
    "model.embed_tokens.weight": Tensor("BF16", (10, 8)),
    **{f"model.layers.{i}.self_attn.q_proj.weight": Tensor("U32", (8, 1)) for i in (0, 1)},
    **{f"model.layers.{i}.self_attn.q_proj.scales": Tensor("BF16", (8, 1)) for i in (0, 1)},
    **{f"model.layers.{i}.self_attn.q_proj.biases": Tensor("BF16", (8, 1)) for i in (0, 1)},
    **{f"model.layers.{i}.mlp.up_proj.weight": Tensor("BF16", (16, 8)) for i in (0, 1)},
    **{f"model.layers.{i}.input_layernorm.weight": Tensor("BF16", (8,)) for i in (0, 1)},
}
QUANTIZED = {"quantization": {"group_size": 8, "bits": 4}}
RECIPE = resolve({}, {"model": "org/model", "first_tokens": 0})[0]  # whole answers are trained on
AMPLE = Machine(10**12, "--memory-limit", False)


def test_the_shape_is_what_the_headers_say():
    shape = shape_of(CONFIG | QUANTIZED, HEADERS)
    # embedding 160; a block: 32 packed + 2 · 16 scales and biases, 256 up, 16 norm
    assert shape.weight_bytes == 160 + 2 * (32 + 32 + 256 + 16)
    assert shape.dequantized_bytes == 4 * (80 + 2 * (64 + 128 + 8))
    assert shape.linears == (((8, 8), (8, 16)),) * 2  # packed words are eight inputs each
    assert (shape.n_layers, shape.hidden, shape.kv, shape.vocabulary) == (2, 8, 4, 10)
    assert shape.activation_bytes == 2 and shape.quantized


def block_of(config, *tensors, floating="F32"):
    """The one block of a model with these weights."""
    more = {f"model.layers.0.{name}": Tensor(floating, shape) for name, shape in tensors}
    [block] = shape_of(CONFIG | {"num_hidden_layers": 1} | config, more).blocks
    return block


MLP, MOE = [("mlp.up_proj.weight", (16, 8))], [("mlp.experts.up.weight", (6, 16, 8))]
GATED = [*MLP, ("mlp.gate_proj.weight", (16, 8)), ("mlp.down_proj.weight", (8, 16))]


@pytest.mark.parametrize(
    ("config", "tensors", "expected"),
    [
        ({}, [("self_attn.k_proj.weight", (4, 8)), ("self_attn.o_proj.weight", (8, 12))], {"attention": (4, 8)}),
        # as wide as the stream, but not into it
        ({}, [("self_attn.q_proj.weight", (8, 8)), ("self_attn.o_proj.weight", (8, 8))], {"attention": (8, 8)}),
        ({}, GATED, {"dense": (32, 8, 0)}),
        ({"hidden_act": "gelu"}, GATED, {"dense": (32, 8, 16)}),
        ({"model_type": "gemma2"}, GATED, {"dense": (32, 8, 16)}),
        ({}, MLP, {"dense": (16, 0, 16)}),  # without a gate
        ({}, [("mlp.gate_up_proj.weight", (32, 8))], {"dense": (32, 0, 0)}),
        ({}, [("conv1d.weight", (12, 4, 1)), ("norm.weight", (8,))], {}),
        # of six experts a token passes two
        ({"num_experts_per_tok": 2}, MOE, {"experts": (32, 0, 32)}),
        ({"num_experts_per_tok": 2}, [*MOE, ("mlp.experts.gate.weight", (6, 16, 8))], {"experts": (64, 0, 0)}),
        ({"moe_topk": 9}, MOE, {"experts": (96, 0, 96)}),
        ({"topk_group": 3, "num_experts": 6}, MOE, {"experts": (16, 0, 16)}),
        ({}, [("mixer.A_log", (16, 4))], {"state": 64}),  # Mamba
        ({"model_type": "jamba"}, [("mamba.A_log", (16, 4))], {"state": 64, "chunk": 32}),
        ({"linear_key_head_dim": 4, "linear_value_head_dim": 6}, [("A_log", (3,))], {"state": 72}),
        ({"linear_attn_config": {"head_dim": 4}}, [("A_log", (1, 1, 3, 1))], {"state": 48}),
        ({"mamba_d_head": 10}, [("A_log", (3,))], {"state": 2.7 * 30, "chunk": 3}),  # Mamba 2
    ],
)
def test_what_a_block_makes_of_a_token_by_hand(config, tensors, expected):
    block, by_hand = block_of(config, *tensors), Block(**expected)
    assert (block.attention, block.dense, block.experts) == (by_hand.attention, by_hand.dense, by_hand.experts)
    assert (block.state, block.chunk) == pytest.approx((by_hand.state, by_hand.chunk))
    assert block.kept(10) == pytest.approx(by_hand.state + 10 * by_hand.chunk)


def test_activations_by_hand():
    shape = shape_of(CONFIG | QUANTIZED, HEADERS)  # a block: q of 8, up of 16 without a gate; 2 heads; bfloat16
    of_a_block = [8, 16, 0, 0, 8, 0, 2 * 3, 0, 16]
    attention, dense, nothing = [8, 0, 8, 2 * 3, 0], [16, 0, 8, 16], [0] * 4
    computed = [[*attention, *nothing, *nothing], [*[0] * 5, *dense, *nothing]]
    every = [2 * n for n in of_a_block]
    assert memory.features(shape, shape.blocks, 3, "gradient") == [[*every, *alive, 0] for alive in computed]
    assert memory.features(shape, shape.blocks, 3, "checkpointed") == [
        [*of_a_block, *alive, 2 * 8] for alive in computed
    ]
    rates = memory.RATES["forward"][2][9:]
    by_hand = max(sum(r * f for r, f in zip(rates, alive, strict=False)) for alive in computed)
    assert memory.forward_bytes(shape, 2, 3) == int(2 * 2 * 3 * by_hand)
    assert all(len(rates[2]) == len(rates[4]) for rates in memory.RATES.values())


def test_the_trained_weights_by_hand():
    shape = shape_of(CONFIG | QUANTIZED, HEADERS)
    train = RECIPE.train  # rank 8
    assert trained_values(shape, train) == 2 * 8 * ((8 + 8) + (8 + 16))
    assert trained_values(shape, replace(train, num_layers=1)) == 8 * 40
    for every in (0, -1, 2):  # 0 is all of them to mlx-lm, which puts the LoRA layers there
        given = replace(train, num_layers=every)
        assert trained_values(shape, given) == trained_values(shape, train)
        assert gradient_bytes(shape, given, 2, 3, False) == gradient_bytes(shape, train, 2, 3, False)
    assert trained_values(shape, replace(train, fine_tune_type="full")) == 2 * (64 + 128)
    assert plan(RECIPE, shape, AMPLE, 10).trained == 8 * 4 * 2 * 8 * 40


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("num_layers", [0, 1, 2, -1])
def test_the_plan_counts_the_blocks_that_are_trained(kind, num_layers):
    model, shape = random_qwen(32, 64, 2, 50)
    settings = replace(RECIPE.train, num_layers=num_layers, fine_tune_type=kind)
    student = make_student(model, settings, 0)
    trained = [w for name, w in tree_flatten(student.trainable_parameters()) if w.ndim == 2]
    assert trained_values(shape, settings) == sum(w.size for w in trained)


def test_what_a_stage_is_made_of_adds_up():
    found = plan(RECIPE, shape_of(CONFIG | QUANTIZED, HEADERS), AMPLE, 10)
    assert sum(found.parts["training"].values()) == found.stages["training"]
    assert all(sum(parts.values()) <= found.stages[name] for name, parts in found.parts.items())


def test_a_configuration_without_a_size_is_a_sentence():
    with pytest.raises(UserError, match="no vocab_size"):
        shape_of({key: value for key, value in CONFIG.items() if key != "vocab_size"}, HEADERS)


def random_qwen(hidden, intermediate, layers, vocabulary, dtype=mx.float32):
    model = random_model(hidden, intermediate, layers, 8, 2, vocabulary)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model, memory_shape(model)


@pytest.mark.parametrize("checkpointed", ["off", "on"])
@pytest.mark.parametrize(
    ("hidden", "intermediate", "layers", "rows", "length", "dtype"),
    [(256, 704, 6, 4, 128, mx.float32), (512, 1024, 4, 2, 96, mx.float32), (256, 768, 6, 4, 128, mx.bfloat16)],
)
def test_the_planned_activations_are_those_measured_or_a_little_more(
    hidden, intermediate, layers, rows, length, dtype, checkpointed
):
    model, shape = random_qwen(hidden, intermediate, layers, 500, dtype)
    train = replace(RECIPE.train, grad_checkpoint=checkpointed)
    student = make_student(model, train, 0)
    student.train()
    ids = mx.array(np.random.default_rng(0).integers(0, 500, (rows, length)))
    gradient = nn.value_and_grad(student, lambda m: hidden_states(m, ids).astype(mx.float32).square().sum())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradient(student))
    measured = mx.get_peak_memory() - before
    expected = gradient_bytes(shape, train, rows, length, checkpointed == "on") + 4 * trained_values(shape, train)
    assert 0.9 < expected / measured < 1.5, (expected, measured)


# Of shapes that nothing was fitted to: many heads, experts, sandwich norms, a delta net, no gate.
@pytest.mark.parametrize("which", [*range(9), 11])
def test_the_plan_holds_for_shapes_that_it_was_not_fitted_to(which):
    config, rows, length = fit_memory.CHECKED[which]
    model = fit_memory.made(config)
    shape, found = memory_shape(model, config), fit_memory.measure(model, rows, length)
    train = RECIPE.train
    assert 0.9 < gradient_bytes(shape, train, rows, length, False) / found["gradient"] < 1.4
    assert 0.9 < gradient_bytes(shape, train, rows, length, True) / found["checkpointed"] < 1.55


def test_base_teacher_and_student_share_one_copy_of_the_weights():
    model, shape = random_qwen(512, 2048, 6, 4000)
    before = mx.get_active_memory()
    student = make_student(model, RECIPE.train, 0)
    teacher = steered_teacher(model, 2, mx.ones(512), 1.0)
    mx.eval(student.parameters(), teacher.model.parameters())
    added = mx.get_active_memory() - before
    assert added - 4 * trained_values(shape, RECIPE.train) < 0.01 * shape.weight_bytes


BIG = shape_of(
    {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        **{"quantization": {"group_size": 64, "bits": 4}},
    },
    {
        name: Tensor(kind, shape)
        for stem, outputs, inputs in [
            ("model.embed_tokens", 152064, 3584),
            ("lm_head", 152064, 3584),
            *(
                (f"model.layers.{i}.{part}", o, n)
                for i in range(28)
                for part, o, n in (
                    ("self_attn.q_proj", 3584, 3584),
                    ("self_attn.k_proj", 512, 3584),
                    ("self_attn.v_proj", 512, 3584),
                    ("self_attn.o_proj", 3584, 3584),
                    ("mlp.gate_proj", 18944, 3584),
                    ("mlp.up_proj", 18944, 3584),
                    ("mlp.down_proj", 3584, 18944),
                )
            ),
        ]
        for name, kind, shape in (
            (f"{stem}.weight", "U32", (outputs, inputs // 8)),
            (f"{stem}.scales", "BF16", (outputs, inputs // 64)),
            (f"{stem}.biases", "BF16", (outputs, inputs // 64)),
        )
    },
)


def test_a_4_bit_7b_model_fits_in_8_gb_at_the_published_lengths():
    found = fitted(RECIPE, BIG, Machine(8 * 10**9, "--memory-limit", False), 512)
    assert RECIPE.train.longest == RECIPE.train.max_prompt_length == 512
    assert found.fits and 4.2e9 < found.weights < 4.4e9
    assert found.recipe.train.grad_checkpoint == "on" and found.recipe.train.micro_batch_size >= 1
    assert "fits with prompt batch size" in memory.summary(RECIPE, found)
    # What is the run's mathematics stays.
    assert found.recipe.train.batch_size == RECIPE.train.batch_size


@pytest.mark.parametrize("memory_limit", [4.9e9, 5.1e9, 5.3e9, 5.6e9, 6e9, 7e9, 8e9, 10e9, 12e9, 16e9])
@pytest.mark.parametrize("keep", [{}, {"first_tokens": 0}])
def test_no_piece_of_a_batch_takes_more_than_was_planned(memory_limit, keep):
    from safesteer_mlx.method.train import micro_batches

    recipe = resolve({}, {"model": "org/model", "max_tokens": 64, **keep})[0]
    found = fitted(recipe, BIG, Machine(int(memory_limit), "--memory-limit", False), 512)
    train, answer = found.recipe.train, 15 if not keep else 64
    assert train.micro_batch_size == 16  # so many short ones go together, if they are short enough
    cut, planned = train.micro_batch_tokens, found.stages["training"]
    assert cut % (512 + answer) == 0 if memory_limit < 6e9 else cut is None or cut > 512
    rng = np.random.default_rng(int(memory_limit) % 1000)
    for _ in range(20):
        lengths = sorted((answer + rng.integers(8, 513, 21)).tolist())
        for piece in micro_batches(lengths, train.micro_batch_size, cut):
            rows, longest = len(lengths[piece]), max(lengths[piece])
            took = memory.gradient_bytes(BIG, train, rows, longest, train.grad_checkpoint == "on")
            assert took + memory.loss_bytes(BIG, rows * answer) <= planned


def test_where_memory_is_tight_short_completions_go_together():
    tight = fitted(RECIPE, BIG, Machine(8 * 10**9, "--memory-limit", False), 512)
    tokens = tight.recipe.train.micro_batch_tokens
    assert tokens is not None and tokens < 16 * 1024 and f"micro batch tokens {tokens}" in memory.summary(RECIPE, tight)
    assert f"activations of {tokens:,} tokens" in tight.parts["training"]
    given = replace(RECIPE, train=replace(RECIPE.train, micro_batch_tokens=tokens))
    assert memory.plan(given, BIG, AMPLE, 512).stages["training"] < fitted(RECIPE, BIG, AMPLE, 512).stages["training"]
    assert fitted(given, BIG, AMPLE, 512).recipe.train.micro_batch_tokens == tokens  # what was asked for is kept


def test_what_is_not_trained_on_is_not_planned_for():
    whole, begun = (
        memory.plan(resolve({}, {"model": "org/model", **keep})[0], BIG, AMPLE, 512)
        for keep in ({"first_tokens": 0}, {})
    )
    assert begun.stages["training"] < whole.stages["training"] / 1.5


def test_what_was_asked_for_is_kept_where_it_fits_and_the_knob_is_named_where_nothing_does():
    assert fitted(RECIPE, BIG, AMPLE, 512).recipe.train == replace(RECIPE.train, grad_checkpoint="off")
    assert fitted(RECIPE, BIG, AMPLE, 512).recipe.train.grad_checkpoint == "off"
    small = fitted(RECIPE, BIG, Machine(4 * 10**9, "--memory-limit", False), 512)
    assert not small.fits and "weights alone are too large" in memory.summary(RECIPE, small)
    tight = fitted(RECIPE, BIG, Machine(int(5.2e9), "--memory-limit", False), 512)
    assert not tight.fits and "lower --" in memory.summary(RECIPE, tight)


@pytest.mark.parametrize(
    ("text", "found"),
    [("12GB", 12e9), ("1.5gib", 1.5 * 2**30), ("800 MB", 8e8), ("16000000", 16e6)],
)
def test_an_amount_of_memory(text, found):
    assert parse_bytes(text) == found


@pytest.mark.parametrize("text", ["lots", "12 elephants", "-1GB", "0", "1e99GB", "nanGB", "GB"])
def test_what_is_no_amount_of_memory_is_a_sentence(text):
    with pytest.raises(UserError, match="write it like 12GB"):
        parse_bytes(text)


def test_a_dry_run_reads_headers_alone_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODELS / "tiny-chat", tmp_path / "model", ignore=shutil.ignore_patterns("data", "tokenizer*"))
    monkeypatch.setattr(mx, "load", None)  # no weights are read
    assert main([str(tmp_path / "model"), "--dry-run", "--memory-limit", "12GB"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "peak" in said and "of 12.00 GB, fits" in said and "time: not measured, " in said
    for part in ("activations of 32 prompts", "keys and values of 64 answers", "activations of 16 completions", "loss"):
        assert f"of it {part}" in said
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    (tmp_path / "adapters" / "run").mkdir(parents=True)
    (tmp_path / "adapters" / "run" / "recipe.yaml").touch()
    (tmp_path / "adapters" / "run" / "timing.json").write_text(json.dumps({"seconds": 90}))
    assert main([str(tmp_path / "model"), "--dry-run"]) == 0
    assert "time: 1.5 minutes" in capsys.readouterr().out


def test_sizes_that_a_configuration_leaves_to_mlx_lm_are_planned_with(gemma_folder, monkeypatch, capsys):
    """Gemma 3's 4B: 8 heads, 4 of keys and values, 256 wide, and a vocabulary of 262208."""
    shape = read_shape(gemma_folder)
    assert (shape.heads, shape.kv, shape.vocabulary, shape.n_layers) == (8, 4 * 256, 262208, 34)
    monkeypatch.chdir(gemma_folder.parent)
    assert main([str(gemma_folder), "--dry-run", "--memory-limit", "64GB"]) == 0
    assert "fits" in capsys.readouterr().out


def test_what_a_configuration_says_itself_is_never_filled_in():
    text = {"model_type": "gemma3_text", "hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128}
    config = {"model_type": "gemma3", "text_config": text}  # as the 27B's, without its vocabulary
    more = {"num_key_value_heads": 4, "vocab_size": 262208}
    assert with_sizes(config) == {"model_type": "gemma3", "text_config": text | more}
    flat = {"model_type": "gemma3_text", "num_attention_heads": 4, "vocab_size": 50}
    assert with_sizes(flat) is flat and "text_config" not in with_sizes({"model_type": "gemma3_text"})
    assert with_sizes({"model_type": "gemma3_text"})["vocab_size"] == 262144
    for odd in ({"model_type": "no_such"}, {"model_type": "qwen2"}, {}, {"model_type": "gemma3", "text_config": {}}):
        assert with_sizes(odd).get("hidden_size") is None


def test_answers_that_are_thought_about_are_planned_as_long_as_they_may_be():
    machine = Machine(8 * 10**9, "--memory-limit", False)
    plain, told = (fitted(RECIPE, BIG, machine, 128, *judged) for judged in ((), (96,)))
    assert plain == told and "scoring" not in plain.stages
    for judged in (512, 2048):
        found = fitted(RECIPE, BIG, machine, 128, judged)
        rows = found.recipe.run.generation_batch_size
        assert rows < plain.recipe.run.generation_batch_size or judged == 512
        assert found.stages["sampling"] == memory.sampling_bytes(BIG, rows, 128, judged)
        assert found.stages["scoring"] > memory.forward_bytes(BIG, 16, 128 + judged)
        same = ("direction", "safety tokens", "training")
        assert [found.stages[name] for name in same] == [plain.stages[name] for name in same]
    assert "lower --max-tokens" in memory.summary(RECIPE, fitted(RECIPE, BIG, machine, 128, 32_768))


def test_prompts_are_planned_as_long_as_they_are_where_they_are_read_uncut():
    """Only training leaves out those beyond --max-prompt-length."""
    short, long = (memory.plan(RECIPE, BIG, AMPLE, n) for n in (512, 4096))
    assert short.stages["training"] == long.stages["training"]
    rows = RECIPE.run.prompt_batch_size
    read = [memory.forward_bytes(BIG, rows, n) for n in (512, 4096)]
    assert long.stages["direction"] - short.stages["direction"] == read[1] - read[0]
    assert long.stages["safety tokens"] - short.stages["safety tokens"] > 7 * read[0]
    rows = RECIPE.run.generation_batch_size
    assert long.stages["sampling"] == memory.sampling_bytes(BIG, rows, 4096, 96)
    long = fitted(RECIPE, BIG, Machine(12 * 10**9, "--memory-limit", False), 4096)
    assert long.fits and long.recipe.run.prompt_batch_size < RECIPE.run.prompt_batch_size


def test_a_dry_run_knows_by_the_tokenizer_that_a_model_may_think(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(MODELS / "tiny-chat", folder, ignore=shutil.ignore_patterns("data"))

    def planned(*flags):
        assert main([str(folder), "--dry-run", "--memory-limit", "12GB", *flags]) == 0
        said = capsys.readouterr().out
        return "scoring, while it runs" in said, said[said.index("keys and values of") :].split("│")[1].strip()

    plain = planned()
    assert not plain[0] and plain == planned("--max-tokens", "2048") == planned("--thinking", "off")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for i, mark in enumerate(("<think>", "</think>")):
        added = {"id": 100_000 + i, "content": mark, "special": False, "normalized": False, "single_word": False}
        tokenizer["added_tokens"].append(added | {"lstrip": False, "rstrip": False})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert planned("--thinking", "off") == plain
    assert planned()[0] and planned()[1] != plain[1] != planned("--max-tokens", "2048")[1]
    (folder / "tokenizer.json").unlink()  # of a model that is not here nothing is fetched for it
    assert planned() == plain and planned("--thinking", "on")[0]


def test_the_work_is_halved_until_it_fits_and_that_is_said(capsys):
    asked = []

    def work(size):
        asked.append(size)
        if size > 4:
            raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008)")
        return "done"

    assert with_smaller_batches(20, work, "training") == ("done", 2) and asked == [20, 10, 5, 2]
    assert capsys.readouterr().err.splitlines()[-1].endswith("going on with 2 at a time")
    with pytest.raises(UserError, match="even one at a time"):
        with_smaller_batches(2, lambda size: (_ for _ in ()).throw(MemoryError()), "training")
    with pytest.raises(RuntimeError, match="shape"):
        with_smaller_batches(8, lambda size: (_ for _ in ()).throw(RuntimeError("[matmul] shape mismatch")), "training")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:…OutOfMemory)"),
            "memory",
        ),
        (RuntimeError("[metal::malloc] Resource limit (499000) exceeded."), "memory"),
        (RuntimeError("[malloc_or_wait] Unable to allocate 12 bytes."), "memory"),
        (MemoryError("std::bad_alloc"), "memory"),
        (
            RuntimeError(
                "[METAL] Command buffer execution failed: Impacting Interactivity "
                "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
            ),
            "display",
        ),
        (
            RuntimeError(
                "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
                "(00000002:kIOGPUCommandBufferCallbackErrorTimeout)"
            ),
            "display",
        ),
        (RuntimeError("[matmul] Last dimension of first input must match"), None),
        (ValueError("insufficient memory"), None),
    ],
)
def test_what_metal_dies_of_is_known_by_its_words_and_halved(error, said, capsys):
    def work(size):
        if size > 1:
            raise error
        return size

    if said is None:
        with pytest.raises(type(error)):
            with_smaller_batches(4, work, "training")
        return
    assert with_smaller_batches(4, work, "training") == (1, 1)
    told = capsys.readouterr().err.splitlines()[-1]
    assert said in told and "going on with 1 at a time" in told
    assert ("AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1" in told) == (said == "display")
    with pytest.raises(UserError, match="even one at a time") as alone:
        with_smaller_batches(1, lambda size: work(size + 1), "training")
    assert ("display sleep" in str(alone.value)) == (said == "display")


def test_a_run_stops_before_the_machine_works_on_its_disk(monkeypatch):
    def work(size):
        return mx.ones((size, 250_000)).sum().item()  # a megabyte each

    monkeypatch.setattr(memory, "_physical", lambda: 10**12)
    with_smaller_batches(40, work, "training")
    before = mx.get_peak_memory()
    monkeypatch.setattr(memory, "_physical", lambda: int(before / memory.PAGES))
    with_smaller_batches(1, work, "training")  # what was used before, by whoever, stops nothing
    with pytest.raises(memory.PagingError, match=r"training used .* GB, and this machine has .*--yes goes on"):
        with_smaller_batches(before // 10**6 + 40, work, "training")


def dbrx(forgets=True):
    config = {"model_type": "dbrx" if not forgets else "other", "d_model": 64, "n_layers": 1, "n_heads": 4}
    config |= {"vocab_size": 100, "ffn_config": {"moe_top_k": 2, "ffn_hidden_size": 128}}
    names = {
        f"blocks.0.ffn.experts.{e}.{w}.weight": s for e in range(8) for w, s in (("w1", (128, 64)), ("w2", (64, 128)))
    }
    return shape_of(config, {name: Tensor("F32", shape) for name, shape in names.items()})


def test_of_experts_that_lie_apart_those_that_a_token_passes_are_counted():
    stacked = {"blocks.0.ffn.experts.w1.weight": (8, 128, 64), "blocks.0.ffn.experts.w2.weight": (8, 64, 128)}
    config = {"d_model": 64, "n_layers": 1, "n_heads": 4, "vocab_size": 100, "num_experts_per_tok": 2}
    together = shape_of(config, {name: Tensor("F32", shape) for name, shape in stacked.items()})
    assert dbrx().blocks == together.blocks and dbrx().blocks[0].experts[0] == 2 * 128
    assert sorted(dbrx().linears[0]) == sorted(together.linears[0])


def test_a_family_that_keeps_what_it_checkpoints_is_never_checkpointed_to_fit():
    """dbrx asks its experts in turn and evaluates meanwhile (measured: scripts/fit_memory.py, 0.9 to 1.7)."""
    shape, train = dbrx(forgets=False), RECIPE.train
    assert shape.blocks == dbrx().blocks
    assert gradient_bytes(shape, train, 2, 64, False) == pytest.approx(
        2.4 * gradient_bytes(dbrx(), train, 2, 64, False)
    )
    assert gradient_bytes(shape, train, 2, 64, True) == pytest.approx(1.7 * gradient_bytes(shape, train, 2, 64, False))
    tight = replace(AMPLE, memory=memory.plan(RECIPE, shape, AMPLE, 128).peak // 2, source="--memory-limit")
    assert fitted(RECIPE, shape, tight, 128).recipe.train.grad_checkpoint == "off"
    assert fitted(RECIPE, dbrx(), replace(tight, memory=10**6), 128).recipe.train.grad_checkpoint == "on"


def test_what_is_sampled_does_not_depend_on_how_memory_split_the_batch(tiny_model, monkeypatch, capsys):
    from safesteer_mlx.method import rollout

    model = tiny_model("llama")
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [1, 2, 3]]
    keys = [stream_key(7, i) for i in range(4)]
    sampling = Sampling([49], 6, 1.0, batch_size=4)
    whole = generate(model, prompts, sampling, keys)
    real = rollout._generate

    def short(*args):
        if args[2].batch_size > 1:
            raise RuntimeError("[malloc] Unable to allocate 1 bytes.")
        return real(*args)

    monkeypatch.setattr(rollout, "_generate", short)
    assert generate(model, prompts, sampling, keys) == whole
    assert "in sampling: going on with 1 at a time" in capsys.readouterr().err


@pytest.mark.metal
def test_limits_are_set_on_metal():
    machine = memory.this_machine("2GB")
    before = mx.set_memory_limit(10**9)
    memory.set_limits(machine)
    assert mx.set_memory_limit(before) == 2 * 10**9
    assert memory.too_much(RuntimeError("Insufficient Memory"))


def test_a_card_has_its_own_memory(monkeypatch):
    """As MLX 0.32 tells of a CUDA device."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "device_info", lambda: {"total_memory": 8 * 10**9, "device_name": "NVIDIA H200"})
    assert memory.this_machine() == Machine(8 * 10**9, "the card's memory", False)
    assert memory.this_machine("2GB") == Machine(2 * 10**9, "--memory-limit", False)


@pytest.mark.parametrize("leave", [False, True])
def test_the_planned_caches_are_those_measured_or_more(leave):
    """Of answers that all go to the end, and where some leave before it and others join."""
    model, shape = random_qwen(256, 512, 3, 500, mx.float32)
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 500, (32, 6)).tolist()
    short = Sampling([], 154, batch_size=16, enough=lambda prompt, ids: leave and prompt[0] % 3 == 0 and len(ids) > 100)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    generate(model, prompts, short)
    measured = mx.get_peak_memory() - before
    planned = memory.sampling_bytes(shape, 16, 6, 154)
    assert 1.2 < planned / measured < 2.2, (planned, measured)
