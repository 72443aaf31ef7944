"""`align` from end to end on tiny random models of the kinds that the zoo has no trained one of: what it writes is read
by mlx-lm, and answers as it was scored. Random weights refuse nothing, so each run is forced."""

import json
import shutil

import mlx.core as mx
import pytest
from make_zoo import with_vocabulary
from mlx_lm.utils import load as mlx_load
from mlx_lm.utils import save_config, save_model
from survey import build, configs

from safesteer_mlx.align import main
from safesteer_mlx.method.rollout import Sampling, generate
from safesteer_mlx.method.student import with_adapters
from safesteer_mlx.recipe import MODELS
from safesteer_mlx.system.load import load

pytestmark = pytest.mark.usefixtures("few_prompts")

TINY = MODELS / "tiny-chat"
FLAGS = ["--force", "--iters", "2", "--batch-size", "8", "--max-tokens", "12", "--test-prompts", "4"]
FLAGS += ["--direction-train", "16", "--direction-validation", "8", "--coeff", "20.0", "--no-report"]
QUICK = ("lfm2", "qwen3_vl")  # convolutions and attention, a text model inside another
SLOW = ("qwen3_next", "qwen3_5", "jamba", "granitemoehybrid", "nemotron_h", "mamba2", "mistral3", "gemma3", "llama4")
SLOW += ("glm4_moe", "gpt_oss", "gemma2", "gemma4", "olmo_hybrid", "kimi_linear", "minimax", "deepseek_v3", "phimoe")


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_random_model_goes_through_the_whole_run(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    size = json.loads((TINY / "config.json").read_text())["vocab_size"]
    config = with_vocabulary(configs()[0][family], size)
    model, _ = build(family, config)
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    save_model(folder, model)
    save_config(config | {"eos_token_id": 2}, folder / "config.json")
    assert main([str(folder), *FLAGS]) == 0
    assert "verdict: stop" in capsys.readouterr().out
    adapters = tmp_path / "adapters"
    rows = [json.loads(line) for line in (adapters / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(row["grad_norm"] > 0 for row in rows)
    base = load(str(folder))
    student = with_adapters(base.model, adapters)
    theirs, tokenizer = mlx_load(str(folder), adapter_path=str(adapters))
    ids = list(tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], add_generation_prompt=True))
    own, others, before = (m(mx.array([ids])).astype(mx.float32) for m in (student, theirs, base.model))
    assert mx.allclose(own, others, atol=1e-4) and not mx.allclose(own, before, atol=1e-6)
    drawn = generate(student, [ids], Sampling(base.eos_ids, 4, batch_size=1))[0].ids
    assert drawn[0] == own[0, -1].argmax().item()
