"""Settings: where each value comes from, which source wins, and what the published recipe is."""

import pytest

from safesteer_mlx.progress import UserError
from safesteer_mlx.recipe import MODELS, mathematics, model_name, model_recipe, parse, read_yaml, resolve

RECIPES = {path.stem: read_yaml(path) for path in sorted(MODELS.glob("*.yaml"))}
LLAMA = RECIPES["llama-3-8b"]["match"]


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_is_found_by_its_configuration_and_by_no_other(name):
    match = RECIPES[name]["match"]
    found, settings = model_recipe({**match, "rope_theta": 1})
    assert found == name and "match" not in settings
    for key, value in match.items():
        changed = {**match, key: value + 1 if isinstance(value, int) else f"{value}x"}
        assert model_recipe(changed)[0] is None


@pytest.mark.parametrize(
    ("name", "horizon", "least"), [("qwen2.5-7b", 7, 1e-8), ("llama-3-8b", 5, 1e-7), ("llama-3.2-3b", 5, 1e-7)]
)
def test_the_published_token_settings(name, horizon, least):
    recipe, found = resolve(RECIPES[name]["match"], {})
    assert found == name
    assert (recipe.tokens.horizon, recipe.tokens.min_steered_prob) == (horizon, least)
    assert (recipe.tokens.safety_tokens, recipe.tokens.inner_top_k, recipe.tokens.token_samples) == (50, 200, 8)


def test_the_paper_preset_is_what_was_published():
    recipe, _ = resolve({}, {}, "paper")
    assert (recipe.loss.loss, recipe.loss.subset, recipe.loss.anchor, recipe.loss.renormalize) == (
        "reverse_kl",
        "safety",
        0.0,
        False,
    )
    assert (recipe.teacher.teacher, recipe.teacher.coeff) == ("steer", 1.0)
    train = recipe.train
    assert (train.batch_size, train.samples, train.epochs, train.temp, train.max_tokens) == (4, 8, 1.0, 1.0, 512)
    assert (train.warmup, train.max_grad_norm) == (0.1, 1.0)
    assert (train.fine_tune_type, train.learning_rate) == ("full", 1e-5)


def test_the_paper_trains_llama_more_slowly_and_quantized_weights_by_lora(tmp_path):
    assert resolve(LLAMA, {}, "paper")[0].train.learning_rate == 1e-6
    assert resolve(LLAMA, {})[0].train.learning_rate == 3e-4  # the published rate is for all weights
    quantized, _ = resolve({**LLAMA, "quantization": {"bits": 4}}, {}, "paper")
    assert (quantized.train.fine_tune_type, quantized.train.learning_rate) == ("lora", 3e-4)
    (tmp_path / "c.yaml").write_text("fine_tune_type: lora\nlearning_rate: 2e-4\n")
    mine, _ = resolve(LLAMA, {"learning_rate": 1e-3}, "paper", tmp_path / "c.yaml")
    assert (mine.train.fine_tune_type, mine.train.learning_rate) == ("lora", 1e-3)


def test_later_sources_win(tmp_path):
    config = RECIPES["tiny-chat"]["match"]
    (tmp_path / "c.yaml").write_text("horizon: 3\ncoeff: 0.5\n")

    def found(flags, preset=None, yaml_file=None):
        recipe, _ = resolve(config, flags, preset, yaml_file)
        return recipe.teacher.coeff, recipe.tokens.horizon

    assert resolve({}, {})[0].teacher.coeff == "auto"  # default
    assert found({}) == (0.85, 8)  # the model's recipe
    assert found({}, "paper") == (1.0, 8)
    assert found({}, "paper", tmp_path / "c.yaml") == (0.5, 3)
    assert found({"coeff": 0.7}, "paper", tmp_path / "c.yaml") == (0.7, 3)


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match=r"learning_rat.*learning_rate"):
        resolve({}, {"learning_rat": 1e-4})
    with pytest.raises(UserError, match="choose paper"):
        resolve({}, {}, "papers")


def test_names_known_from_mlx_lm_mean_the_same_here():
    words = (
        "--model m --data d.jsonl --fine-tune-type dora --num-layers 4 --batch-size 2 --iters 9 --learning-rate 1e-4"
    )
    words += " --steps-per-report 3 --save-every 5 --adapter-path a --max-seq-length 99 --grad-checkpoint --seed 1"
    words += " --resume-adapter-file r.safetensors --grad-accumulation-steps 2"
    flags, preset, yaml_file = parse(words.split())
    recipe, _ = resolve({}, flags, preset, yaml_file)
    assert recipe.run.model == "m" and recipe.run.adapter_path == "a" and recipe.run.seed == 1
    train = recipe.train
    assert (train.fine_tune_type, train.num_layers, train.batch_size, train.iters) == ("dora", 4, 2, 9)
    assert (train.grad_checkpoint, train.grad_accumulation_steps, train.save_every) == ("on", 2, 5)
    assert parse(["--grad-checkpoint", "off"])[0]["grad_checkpoint"] == "off"


def test_a_run_may_go_on_with_another_batch_split_but_not_with_another_rate():
    base, free, other = (
        resolve({}, f)[0] for f in ({}, {"micro_batch_size": 1, "grad_checkpoint": True}, {"iters": 3})
    )
    assert mathematics(base) == mathematics(free) != mathematics(other)


def test_the_bundled_model_is_meant_where_no_folder_of_that_name_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_name(None) == model_name("tiny-chat") == str(MODELS / "tiny-chat")
    (tmp_path / "tiny-chat").mkdir()
    assert model_name("tiny-chat") == "tiny-chat" and model_name("org/name") == "org/name"
