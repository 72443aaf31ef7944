"""Settings: where each value comes from, which source wins, and what the published recipe is."""

import json
import re
from types import SimpleNamespace

import pytest

from safesteer_mlx import align
from safesteer_mlx.recipe import (
    MODELS,
    NEEDS,
    RENAMED,
    TrainSettings,
    idle,
    model_name,
    model_recipe,
    parse,
    read_yaml,
    recipe_note,
    resolve,
    result_settings,
)
from safesteer_mlx.system.screen import UserError

RECIPES = {path.stem: read_yaml(path) for path in sorted(MODELS.glob("*.yaml"))}
SHAPES = {name: recipe["match"]["shape"] for name, recipe in RECIPES.items() if "shape" in recipe["match"]}
LLAMA = SHAPES["llama-3-8b"]
OTHER = {"model": "org/other"}  # the model of nobody's recipe
PAPER = "https://arxiv.org/abs/2606.02530"
PUBLISHED = {"llama-3-8b": (5, 1e-7), "llama-3.2-3b": (5, 1e-7), "qwen2.5-7b": (7, 1e-8), "qwen3-4b-2507": (7, 1e-8)}


@pytest.mark.parametrize("name", SHAPES)
def test_each_recipe_is_found_by_its_shape_and_by_no_other(name):
    shape = SHAPES[name]
    found, settings = model_recipe({**shape, "rope_theta": 1}, "org/other")
    assert found == name and "match" not in settings
    for key, value in shape.items():
        changed = {**shape, key: value + 1 if isinstance(value, int) else f"{value}x"}
        assert model_recipe(changed, "org/other") == (None, {})


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("mlx-community/Meta-Llama-3-8B-Instruct-4bit", "llama-3-8b"),
        ("meta-llama/Llama-3.2-3B-Instruct", "llama-3.2-3b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("/home/me/models/Qwen3-4B-Instruct-2507-8bit/", "qwen3-4b-2507"),
        (str(MODELS / "tiny-chat"), "tiny-chat"),
        ("Qwen/Qwen2.5-14B-Instruct", "qwen2.5"),
        ("mlx-community/Qwen2.5-0.5B-Instruct-4bit", "qwen2.5"),
        ("Qwen/Qwen2.5-7B", None),  # no chat model
        ("mlx-community/Qwen3-8B-4bit", "qwen3"),
        ("Qwen/Qwen3-4B", "qwen3"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3"),
        ("mlx-community/Qwen3.5-4B-MLX-4bit", "qwen3.5"),
        ("mlx-community/Llama-3.2-1B-Instruct-4bit", "llama-3"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral"),
        ("mlx-community/Mistral-Small-3.2-24B-Instruct-2506-4bit", "mistral"),
        ("mlx-community/gemma-3-12b-it-qat-4bit", "gemma-3"),
        ("microsoft/phi-4", "phi-4"),
        ("mlx-community/phi-4-4bit", "phi-4"),
        ("mlx-community/Phi-4-mini-instruct-4bit", "phi-4"),
        ("microsoft/Phi-4-mini-reasoning", None),
        ("HuggingFaceTB/SmolLM3-3B", "smollm3"),
        ("mlx-community/gpt-oss-20b-MXFP4-Q8", "gpt-oss"),
        ("tiny-chat/other", None),  # a folder above the model's own does not name it
    ],
)
def test_a_recipe_is_found_by_name_whatever_the_shape(model, expected):
    assert model_recipe({}, model)[0] == expected
    for name, shape in SHAPES.items():
        assert model_recipe(shape, model)[0] == (expected or name)


def test_a_text_model_within_is_found_by_its_own_sizes():
    config = {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text", "vocab_size": 248320}}
    assert model_recipe(config, "org/renamed")[0] == "qwen3.5"
    assert model_recipe(config | {"text_config": 3}, "org/renamed") == (None, {})


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_a_family_sets_nothing_that_was_not_published(name):
    recipe = dict(RECIPES[name])
    assert set(recipe) <= {"match", "note", "published"} or name == "tiny-chat"
    assert ("published" in recipe) == (name in PUBLISHED)
    assert recipe_note(name) == recipe.get("note") and recipe_note(None) is None
    text = (MODELS / f"{name}.yaml").read_text()
    assert name == "tiny-chat" or "paper" in text or "No settings of SafeSteer" in text or "published for 3-8B" in text


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"tiny-chat"}))
def test_a_recipe_of_a_family_names_its_source_with_an_address(name):
    comment = [line for line in (MODELS / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    addresses = re.findall(r"https://[\w.-]+/[\w./-]+\w", "\n".join(comment))
    assert addresses, f"models/{name}.yaml: whose word is it?"
    assert (PAPER in addresses) == (name in PUBLISHED)


def test_a_model_of_the_bundled_ones_shape_has_no_recipe():
    config = json.loads((MODELS / "tiny-chat" / "config.json").read_text())
    assert model_recipe(config, "org/tiny-chat-of-mine") == (None, {})
    recipe, name = resolve(config, {"model": "org/tiny-chat-of-mine"})
    assert name is None and (recipe.train.longest, recipe.run.test_prompts) == (512, 100)
    recipe, name = resolve(config, {})  # the bundled one is meant
    assert name == "tiny-chat" and (recipe.train.max_tokens, recipe.run.test_prompts) == (64, 364)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_no_strength_and_no_threshold(name):
    assert set(RECIPES[name]) <= {"match", "note", "published", "max_tokens", "test_prompts"}
    assert set(RECIPES[name].get("published", {})) <= {"horizon", "min_steered_prob", "learning_rate"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_settings_of_a_model_are_those_of_the_preset_alone(name):
    plain, found = resolve(SHAPES[name], OTHER)
    assert found == name and plain == resolve({}, OTHER)[0]
    paper, _ = resolve(SHAPES[name], OTHER, "paper")
    assert (paper.tokens.horizon, paper.tokens.min_steered_prob) == PUBLISHED[name]
    assert (paper.train.fine_tune_type, paper.train.learning_rate) == ("full", 1e-6 if "llama" in name else 1e-5)


def test_the_paper_preset_is_what_was_published():
    recipe, _ = resolve({}, OTHER, "paper")
    published = {
        "loss": "reverse_kl",
        "loss_tokens": "safety",
        "anchor_ratio": 0.0,
        "guidance": 1.0,
        "adapter_strength": 1.0,
        "tail": 0,
        "reuse_direction_prompts": False,
        "renormalize": False,
        "skip_first": 0,
        "first_tokens": 0,
        "teacher": "steer",
        "ablation": "published",
        "prefill_ratio": 0.0,
        "wrap_ratio": 0.0,
        "coeff": 1.0,
        "direction_train": 128,
        "direction_validation": 32,
        "kl_threshold": 0.1,
        "steering_threshold": 0.0,
        "prune_last": 0.2,
        "safety_tokens": 50,
        "token_method": "vote",
        "inner_top_k": 200,
        "token_samples": 8,
        "horizon": 7,
        "min_steered_prob": 1e-8,
        "batch_size": 4,
        "num_generations": 8,
        "epochs": 1.0,
        "iters": None,
        "until_learned": False,
        "temp": 1.0,
        "top_p": 1.0,
        "max_tokens": 512,
        "warmup": 0.1,
        "max_grad_norm": 1.0,
        "fine_tune_type": "full",
        "learning_rate": 1e-5,
        "seed": 42,
    }
    assert {name: recipe.flat()[name] for name in published} == published
    assert resolve({}, {}, "paper")[0].train == recipe.train  # nothing is left of the bundled model's own


def test_by_default_what_can_be_is_decided_on_the_model():
    recipe, _ = resolve({}, OTHER)
    assert (recipe.teacher.coeff, recipe.loss.first_tokens, recipe.loss.guidance) == ("auto", "auto", "auto")
    assert recipe.train.until_learned
    assert (recipe.tokens.token_method, recipe.tokens.token_share) == ("part", 0.95)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--first-tokens 3", "first_tokens", 3),
        ("--first-tokens auto", "first_tokens", "auto"),
        ("--coeff auto", "coeff", "auto"),
        ("--guidance auto", "guidance", "auto"),
        ("--guidance 2", "guidance", 2.0),
        ("--adapter-strength auto", "adapter_strength", "auto"),
        ("--adapter-strength 1", "adapter_strength", 1.0),
        ("--coeff 0.5", "coeff", 0.5),
        ("--no-until-learned", "until_learned", False),
        ("--token-share 1", "token_share", 1.0),
        ("--token-method part", "token_method", "part"),
    ],
)
def test_what_is_decided_on_the_model_can_be_given(words, key, value):
    flags, *_ = parse(words.split())
    assert resolve({}, flags)[0].flat()[key] == value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("first_tokens", "soon", "first_tokens = 'soon' is not a number or auto"),
        ("first_tokens", -1, "at least 0"),
        ("adapter_strength", "weak", "adapter_strength = 'weak' is not a number or auto"),
        ("adapter_strength", 0, "above 0"),
        ("adapter_strength", 1.5, "at most 1"),
        ("first_tokens", 2.5, "first_tokens = 2.5 is not a int or str"),
        ("token_share", 0, "above 0"),
        ("token_share", 1.1, "at most 1"),
        ("token_method", "parts", "did you mean part"),
        ("coeff_refusal", 0.95, "unknown key 'coeff_refusal'"),
    ],
)
def test_what_none_of_them_can_be_is_said(key, value, message):
    with pytest.raises(UserError, match=message):
        resolve({}, {key: value})


def test_the_paper_trains_llama_more_slowly_and_quantized_weights_by_lora(tmp_path):
    assert resolve(LLAMA, OTHER, "paper")[0].train.learning_rate == 1e-6
    assert (
        resolve(LLAMA, OTHER)[0].train.learning_rate == TrainSettings().learning_rate
    )  # the published rate is for all weights
    quantized, _ = resolve({**LLAMA, "quantization": {"bits": 4}}, OTHER, "paper")
    assert (quantized.train.fine_tune_type, quantized.train.learning_rate) == ("lora", TrainSettings().learning_rate)
    assert (quantized.tokens.horizon, quantized.tokens.min_steered_prob) == (5, 1e-7)
    (tmp_path / "c.yaml").write_text("fine_tune_type: lora\nlearning_rate: 2e-4\n")
    mine, _ = resolve(LLAMA, OTHER | {"learning_rate": 1e-3}, "paper", tmp_path / "c.yaml")
    assert (mine.train.fine_tune_type, mine.train.learning_rate) == ("lora", 1e-3)


def test_later_sources_win(tmp_path):
    (tmp_path / "c.yaml").write_text("max_tokens: 99\ncoeff: 0.5\n")

    def found(flags, preset=None, yaml_file=None):
        recipe, _ = resolve({}, flags, preset, yaml_file)
        return recipe.teacher.coeff, recipe.train.max_tokens

    assert found(OTHER) == ("auto", None)  # default
    assert found({}) == ("auto", 64)  # the model's recipe
    assert found({}, "paper") == (1.0, 512)
    assert found({}, "paper", tmp_path / "c.yaml") == (0.5, 99)
    assert found({"coeff": 0.7}, "paper", tmp_path / "c.yaml") == (0.7, 99)
    # What a model's recipe says is published comes behind the preset, before what the user says.
    (tmp_path / "h.yaml").write_text("horizon: 3\n")
    assert resolve(LLAMA, OTHER, "paper")[0].tokens.horizon == 5
    assert resolve(LLAMA, OTHER, "paper", tmp_path / "h.yaml")[0].tokens.horizon == 3


def test_two_ways_to_choose_the_step_exclude_each_other(tmp_path):
    (tmp_path / "own.yaml").write_text("keep_best: true\n")
    select = {"select_checkpoint": "drift<=1"}
    for flags, file in (({**select, "keep_best": True}, None), (select, tmp_path / "own.yaml")):
        with pytest.raises(UserError, match=r"^keep_best and select_checkpoint both .* leave one of them out$"):
            resolve({}, flags, yaml_file=file)
    assert resolve({}, {**select, "keep_best": False}, yaml_file=tmp_path / "own.yaml")[0].run.select_checkpoint


def test_a_flag_that_does_nothing_is_named(tmp_path, monkeypatch, capsys):
    flags = {"top_k": 20, "refresh_every": 5, "jsd_alpha": 0.3, "loss": "jsd", "seed": 3}
    expected = [
        "--top-k does nothing without --loss-tokens top_k",
        "--refresh-every does nothing without --teacher ema",
    ]
    assert idle(resolve({}, flags)[0], flags) == expected
    partners = {"loss_tokens": "top_k", "teacher": "ema"}
    assert idle(resolve({}, flags | partners)[0], flags) == []
    for other, (name, value) in NEEDS.items():  # of names and values that there are
        assert idle(resolve({}, {name: value})[0], [other]) == []
    monkeypatch.setattr(align, "align_model", lambda *_, **__: SimpleNamespace(not_aligned=None))
    monkeypatch.chdir(tmp_path)
    assert align.main(["--ema-rate", "0.5", "--yes"]) == 0
    assert "--ema-rate does nothing without --teacher ema\n" in capsys.readouterr().out


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match=r"learning_rat.*learning_rate"):
        resolve({}, {"learning_rat": 1e-4})
    with pytest.raises(UserError, match="choose paper"):
        resolve({}, {}, "papers")


def test_names_known_from_mlx_lm_mean_the_same_here():
    words = (
        "--model m --data d.jsonl --fine-tune-type dora --num-layers 4 --batch-size 2 --iters 9 --learning-rate 1e-4"
    )
    words += " --steps-per-report 3 --save-every 5 --adapter-path a --max-prompt-length 99 --grad-checkpoint --seed 1"
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
    assert result_settings(base) == result_settings(free) != result_settings(other)


def test_the_bundled_model_is_meant_where_no_folder_of_that_name_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_name(None) == model_name("tiny-chat") == str(MODELS / "tiny-chat")
    (tmp_path / "tiny-chat").mkdir()
    assert model_name("tiny-chat") == "tiny-chat" and model_name("org/name") == "org/name"


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_still_works_and_tells_the_new_one(old, new, tmp_path, capsys):
    flag = "--" + old.replace("_", "-")
    if old == "check":
        assert parse([flag])[0] == {new: True}
    else:
        value = {"subset": "full", "openers": "No", "select": "drift<=1"}.get(old, "16" if "max" in old else "0.5")
        value = "2" if old in ("skip", "keep", "samples") else value
        current = parse(["--" + new.replace("_", "-"), value])[0]
        assert parse([f"{flag}={value}"])[0] == parse([flag, value])[0] == current
        told = capsys.readouterr().err
        assert told.count("\n") == 2 and f"{flag} is now --{new.replace('_', '-')}; the old name works until" in told
        (tmp_path / "c.yaml").write_text(f"{old}: {[value] if old == 'openers' else value}\n")
        resolved = resolve({}, {}, None, tmp_path / "c.yaml")[0].flat()
        assert resolved != resolve({}, {})[0].flat() or resolved[new] == 0.5  # jsd_alpha's default is the value given
        with pytest.raises(UserError, match=f"{old} is {new}'s old name|{new}"):
            (tmp_path / "c.yaml").write_text(f"{old}: {value}\n{new}: {value}\n")
            resolve({}, {}, None, tmp_path / "c.yaml")
    assert "is now" in capsys.readouterr().err


def test_an_old_word_of_the_loss_is_its_new_one(capsys):
    current = resolve({}, {"loss": "jsd", "jsd_alpha": 0.3})[0]
    assert resolve({}, {"loss": "mixture", "mix": 0.3})[0].loss == current.loss
    said = capsys.readouterr().err
    assert "loss = mixture is now loss = jsd" in said and "mix is now jsd_alpha" in said
