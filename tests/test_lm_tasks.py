"""lm-eval's tasks: told of when it is missing; mlx-lm's own evaluator scores the model that was handed over.

lm-eval itself is not installed here: a module with its four names stands in for it.
"""

import sys
import types

import mlx.core as mx
import mlx.nn as nn
import pytest

from safesteer_mlx.evals.lm_tasks import check_tasks, run_tasks
from safesteer_mlx.method.residual import view
from safesteer_mlx.recipe import MODELS
from safesteer_mlx.system.load import load
from safesteer_mlx.system.screen import UserError


def test_without_lm_eval_one_sentence_names_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"safesteer-mlx\[eval\]"):
        check_tasks(False, False)


def test_code_is_run_only_when_asked_for_twice(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    check_tasks(False, False)
    for confirmed, allowed in ((False, "1"), (True, "0")):
        monkeypatch.setenv("HF_ALLOW_CODE_EVAL", allowed)
        with pytest.raises(UserError, match="confirm-run-unsafe-code"):
            check_tasks(True, confirmed)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    check_tasks(True, True)


@pytest.fixture
def lm_eval(monkeypatch):
    """What mlx-lm imports of lm-eval, and a `simple_evaluate` that asks for one log-likelihood and one answer."""
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
    top, _, model, registry = (types.ModuleType(name) for name in names)
    model.LM = type("LM", (), {})  # type: ignore[attr-defined]
    registry.register_model = lambda name: lambda cls: cls  # type: ignore[attr-defined]
    asked = {}

    def simple_evaluate(model, tasks, **options):
        asked.update(options, tasks=tasks)
        if "unknown" in tasks:
            raise KeyError("unknown")
        chat = model.apply_chat_template([{"role": "user", "content": "Add 21 and 83."}])
        asked["chat"] = chat
        request = types.SimpleNamespace(args=(chat, "1+3=4, 2+8=10. The answer is 104"))
        [(logprob, _)] = model.loglikelihood([request])
        until = types.SimpleNamespace(args=(chat, {"until": ["\n"], "max_gen_toks": 40}))
        [text] = model.generate_until([until])
        return {"results": {tasks[0]: {"logprob": logprob, "right": float("104" in text)}}}

    top.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    for name, module in zip(names, (top, types.ModuleType("lm_eval.api"), model, registry), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    yield asked
    sys.modules.pop("mlx_lm.evaluate", None)


def test_the_model_handed_over_is_the_one_that_is_scored(lm_eval):
    base = load(str(MODELS / "tiny-chat"))
    options = {"seed": 3, "batch_size": 2, "limit": 5}
    found = run_tasks(base.model, base.tokenizer, ["gsm8k"], **options)
    assert found["gsm8k"]["right"] == 1 and found["gsm8k"]["logprob"] > -3
    assert lm_eval["limit"] == 5 and lm_eval["fewshot_random_seed"] == 3 and lm_eval["apply_chat_template"]
    assert lm_eval["chat"].endswith("assistant\n")

    mute = view(base.model)  # the same weights but for a last norm of zeros: all tokens are as likely
    mute.model.norm = nn.RMSNorm(mute.model.norm.weight.size)
    mute.model.norm.weight = mx.zeros_like(mute.model.norm.weight)
    flat = run_tasks(mute, base.tokenizer, ["gsm8k"], **options)
    assert flat["gsm8k"]["logprob"] < -10 and flat["gsm8k"]["right"] == 0


def test_a_task_that_lm_eval_does_not_know_is_a_sentence(lm_eval):
    base = load(str(MODELS / "tiny-chat"))
    with pytest.raises(UserError, match="unknown"):
        run_tasks(base.model, base.tokenizer, ["unknown"], seed=0, batch_size=1)
