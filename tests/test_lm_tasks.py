"""lm-eval's tasks: told of when it is missing; mlx-lm's own evaluator scores the model that was handed over.

lm-eval itself is not installed here: a module with its four names stands in for it.
"""

import sys
import types
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from safesteer_mlx.evals.suites import check_tasks, run_tasks
from safesteer_mlx.evaluate import main
from safesteer_mlx.method.residual import view
from safesteer_mlx.recipe import MODELS
from safesteer_mlx.system.load import load
from safesteer_mlx.system.screen import UserError


def test_without_lm_eval_one_sentence_names_the_remedy(monkeypatch):
    monkeypatch.setattr("safesteer_mlx.evals.suites.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"safesteer-mlx\[eval\]"):
        check_tasks(False, False)


def test_code_is_run_only_when_asked_for_twice(monkeypatch):
    monkeypatch.setattr("safesteer_mlx.evals.suites.find_spec", lambda name: object())
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
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry", "lm_eval.tasks")
    top, api, model, registry, manager = (types.ModuleType(name) for name in names)
    manager.TaskManager = lambda include_path=None: include_path  # type: ignore[attr-defined]
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
    for name, module in zip(names, (top, api, model, registry, manager), strict=True):
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


def test_an_own_task_is_found_by_its_file(lm_eval, tmp_path, capsys):
    base = load(str(MODELS / "tiny-chat"))
    file = tmp_path / "own.yaml"
    file.write_text("dataset_path: json\ntask: 'my_sums'\nprocess_docs: !function utils.process\n")
    found = run_tasks(base.model, base.tokenizer, [str(file), "gsm8k"], seed=0, batch_size=1)
    assert lm_eval["tasks"] == ["my_sums", "gsm8k"] and lm_eval["task_manager"] == [str(tmp_path)]
    assert "my_sums" in found and capsys.readouterr().out == ""  # mlx-lm prints a line an answer


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), ("dataset_path: json\n", "names no task"), (b"\xff", "not UTF-8 text")],
)
def test_an_own_task_that_is_none_is_a_sentence(tmp_path, capsys, content, said):
    file = tmp_path / "own.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([str(MODELS / "tiny-chat"), "--tasks", str(file)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.export
def test_a_local_task_is_run_by_lm_eval_itself(tmp_path):
    """Own YAML, own jsonl, no network: docs/evaluation.md's example."""
    import json
    import os
    import re
    import subprocess

    text = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text("utf-8")
    example = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert example is not None
    (tmp_path / "sums.yaml").write_text(example[1])
    rows = [{"question": f"Add {n} and {n + 3}.", "answer": str(2 * n + 3)} for n in range(20, 40)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "safesteer_mlx.evaluate", "--tasks", "sums.yaml", "--out", "o.json", "--offline"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "o.json").read_text())["tasks"]["base"]["sums"]
    assert found["exact_match,last_number"] > 0.9 and "Finished processing" not in result.stdout
