"""Loading: every weight format mlx-lm writes, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model, quantize_model, save_config, save_model
from runs import MICRO

from safesteer_mlx.align import main
from safesteer_mlx.method import prompts
from safesteer_mlx.method import run as runs
from safesteer_mlx.method.prompts import load_instructions, render_all
from safesteer_mlx.method.residual import last_logits
from safesteer_mlx.recipe import MODELS, resolve
from safesteer_mlx.system import shape
from safesteer_mlx.system.load import load
from safesteer_mlx.system.screen import UserError

TINY = Path(MICRO)
FORMATS = {
    "float32": {"dtype": mx.float32},
    "float16": {"dtype": mx.float16},
    "bfloat16": {"dtype": mx.bfloat16},
    "8-bit": {"group_size": 64, "bits": 8},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}


def converted(folder: Path, *, dtype=None, **quantization) -> Path:
    """The model in another format, written as mlx_lm.convert writes it."""
    import mlx_lm

    model, _, config = mlx_lm.load(str(TINY), return_config=True)  # type: ignore[misc]
    model = dequantize_model(model)
    config = {key: value for key, value in config.items() if not key.startswith("quantization")}
    if dtype is not None:
        model.set_dtype(dtype)
    else:
        model, config = quantize_model(model, config, **quantization)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    return {name: converted(folder / name, **how) for name, how in FORMATS.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_loads_and_computes_nearly_the_same(formats, name):
    rows = render_all(load(str(TINY)).tokenizer, load_instructions(TINY / "data" / "harmful_test.jsonl")[:16])
    base, other = load(str(TINY)), load(str(formats[name]))
    assert other.quantized == ("dtype" not in FORMATS[name])
    expected, found = (np.array(mx.softmax(last_logits(m.model, rows), axis=-1)) for m in (base, other))
    # Half the summed difference of two distributions; mxfp4 rounds weights that were rounded before.
    distance = 0.5 * np.abs(expected - found).sum(-1).mean()
    assert distance < {"mxfp4": 0.25, "bfloat16": 0.02}.get(name, 0.01)


@pytest.mark.parametrize("name", FORMATS)
def test_on_the_cpu_a_small_model_is_computed_in_float32(formats, name, monkeypatch):
    """Its kernels for anything else are many times slower. The weights are those that are kept, to the bit."""
    widened = load(str(formats[name]))
    monkeypatch.setattr(shape, "_SMALL", 0)
    kept = load(str(formats[name]))
    weights, own = (dict(tree_flatten(model.model.parameters())) for model in (widened, kept))
    assert widened.widened == (name != "float32") and not kept.widened
    assert {w.dtype for w in weights.values()} == {mx.float32}
    if widened.quantized:
        own = dict(tree_flatten(dequantize_model(kept.model).parameters()))
    else:
        assert {w.dtype for w in own.values()} == {FORMATS[name]["dtype"]}
    assert weights.keys() == own.keys() and all(mx.array_equal(w, weights[key]) for key, w in own.items())


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("bfloat16", ["--fine-tune-type", "full", "--learning-rate", "1e-4", "--batch-size", "4"]),
        ("float32", ["--preset", "paper", "--batch-size", "2", "--num-generations", "2"]),
        ("8-bit", []),
        ("mxfp4", ["--fine-tune-type", "dora"]),
    ],
)
def test_every_format_is_aligned_and_mlx_lm_reads_the_result(formats, name, flags, few_prompts, tmp_path, monkeypatch):
    if name == "bfloat16":  # as it is computed on Metal
        monkeypatch.setattr(shape, "_SMALL", 0)
    # A copy has no prompts of its own, and the package's are beyond this little model.
    monkeypatch.setattr(runs, "prompt_sets", lambda recipe: prompts.built_in_sets(str(TINY)))
    short = ["--iters", "2", "--test-prompts", "2", "--direction-train", "32", "--direction-validation", "8"]
    short += ["--token-samples", "1", "--horizon", "2", "--max-tokens", "16", "--no-report", "--force"]
    assert main([str(formats[name]), "--adapter-path", str(tmp_path / "adapters"), *short, *flags]) == 0
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    kind = "full" if name in ("bfloat16", "float32") else "dora" if "dora" in flags else "lora"
    assert config["fine_tune_type"] == kind

    from mlx_lm import load as mlx_lm_load

    student, tokenizer = mlx_lm_load(str(formats[name]), adapter_path=str(tmp_path / "adapters"))  # type: ignore[misc]
    base = load(str(formats[name])).model
    rows = render_all(tokenizer, load_instructions(TINY / "data" / "harmful_test.jsonl")[:8])
    distance = mx.abs(mx.softmax(last_logits(student, rows)) - mx.softmax(last_logits(base, rows))).sum(-1)
    assert 1e-4 < distance.max().item() < 2


def test_experts_in_half_precision_compute_on_the_cpu(tmp_path):
    """MLX's CPU backend multiplies experts' weights in float32 alone."""
    packed = load(str(Path(__file__).parent / "zoo_models" / "station"))
    kept = dequantize_model(packed.model)
    kept.set_dtype(mx.bfloat16)
    save_model(tmp_path, kept)
    save_config({k: v for k, v in packed.config.items() if not k.startswith("quant")}, tmp_path / "config.json")
    for file in packed.path.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    rows = render_all(packed.tokenizer, load_instructions(packed.path / "data" / "harmful_test.jsonl")[:2])
    with pytest.raises(RuntimeError, match="float32"):
        mx.eval(last_logits(kept, rows))
    assert mx.isfinite(last_logits(load(str(tmp_path)).model, rows)).all()


def test_full_fine_tuning_of_quantized_weights_is_refused(tmp_path, capsys):
    assert main(["--fine-tune-type", "full", "--adapter-path", str(tmp_path / "a")]) == 2
    assert "cannot train quantized weights; use lora" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_an_architecture_that_cannot_be_frozen_is_a_sentence(monkeypatch):
    """recurrent_gemma of mlx-lm 0.32.2."""

    def freeze(self, **_):
        raise AttributeError("'Model' object has no attribute '_no_grad'")

    monkeypatch.setattr("mlx_lm.models.qwen2.Model.freeze", freeze, raising=False)
    with pytest.raises(UserError, match="mlx-lm cannot freeze"):
        load(str(MODELS / "tiny-chat"))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"])
def test_what_stands_beside_the_weights_is_a_part_of_what_makes_a_run(name, tmp_path):
    """Another template makes other prompts, another configuration computes otherwise."""
    recipe, sets = resolve({}, {})[0], prompts.built_in_sets(str(TINY))
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("data"))
    base = load(str(tmp_path / "model"))
    (tmp_path / "model" / "README.md").write_text("hi")
    before = runs.run_parts(recipe, base, sets)
    assert before == runs.run_parts(recipe, load(str(tmp_path / "model")), sets)
    with (tmp_path / "model" / name).open("a") as file:
        file.write("\n")
    after = runs.run_parts(recipe, replace(base), sets)
    assert [part for part in before if before[part] != after[part]] == ["configuration, tokenizer or chat template"]
