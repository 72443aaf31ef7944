"""The survey's quick form: the families that differ most, every check of each, and that its checks can fail."""

from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import pytest
from survey import QUICK, Survey, build, configs, fault, in_process, page, try_family, verdict

import safesteer_mlx.method.residual as residual
from safesteer_mlx.method.passes import Passes
from safesteer_mlx.system.screen import UserError


@pytest.mark.parametrize("family", QUICK)
def test_a_family_passes_everything(family):
    result = in_process(family)
    assert verdict(result).startswith("yes"), verdict(result)


@pytest.mark.parametrize("family", ["gemma3n", "rwkv7", "nanbeige"])
def test_a_family_with_more_than_one_stream_is_refused_in_a_sentence(family):
    result = try_family(family)
    assert "one residual stream" in result["refused"] and result["fault"] == "ours"


@pytest.mark.parametrize(
    ("family", "whole"),
    [(name, True) for name in ("gemma3_text", "gemma2", "olmo2", "exaone4", "glm4", "plamo3", "gear")]
    + [(name, False) for name in ("llama", "qwen2", "gpt2", "cohere2", "mamba2", "qwen3_vl")],
)
def test_sandwich_norms_are_ablated_by_the_whole_stream(family, whole):
    survey = Survey(family)
    survey.note = ""
    survey.ablation()
    assert survey.note.startswith("whole stream (the published way leaves ") == whole, survey.note


def test_every_family_of_mlx_lm_is_known():
    import mlx_lm.models

    folder = Path(mlx_lm.models.__file__).parent
    texts = {path.stem: path.read_text("utf-8") for path in folder.glob("*.py")}
    families = {name for name, text in texts.items() if "class Model(" in text and "class ModelArgs" in text}
    known, cannot = configs()
    assert families <= known.keys() | cannot.keys(), families - known.keys() - cannot.keys()


@pytest.mark.parametrize(
    ("check", "name", "wrong"),
    [
        ("reading", "block_inputs", lambda own: lambda model, tokens: [x + 1 for x in own(model, tokens)]),
        ("head", "hidden_states", lambda own: lambda model, tokens: own(model, tokens) * 1.1),
        ("steering", "steer", lambda own: lambda model, layer, v, c=1.0: own(model, layer - 1, v, c)),
        ("ablation", "ablate", lambda own: lambda model, v, whole=False: own(model, v * 0 + 1, whole)),
    ],
)
def test_a_check_fails_where_something_is_wrong(monkeypatch, check, name, wrong):
    survey = Survey("llama")
    getattr(survey, check)()
    monkeypatch.setattr(residual, name, wrong(getattr(residual, name)))
    with pytest.raises(AssertionError):
        getattr(survey, check)()


def test_a_plan_that_is_too_low_fails(monkeypatch):
    survey = Survey("llama")
    survey.memory()
    planned, own = survey.planned, Passes.gradient
    assert planned is not None and planned > 0.95
    monkeypatch.setattr(Passes, "gradient", lambda *given: own(*given) // 2)
    with pytest.raises(AssertionError, match="of what was measured"):
        survey.memory()


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("raises", "expected"),
    [
        (lambda: Survey("recurrent_gemma"), "mlx-lm's"),  # it cannot be frozen
        (lambda: Survey("afm7"), "ours"),
        (lambda: Survey("kimi_k3"), "ours"),
        (lambda: mlx_lm.utils.load_model(Path("/nowhere")), "mlx-lm's"),
        (lambda: build("llama", {"model_type": "llama"}), "mlx-lm's"),
        (lambda: build("no_such_family", {"model_type": "llama"}), "ours"),
        (lambda: fail(ValueError("[gather_axis] Cannot calculate VJP with respect to indices")), "mlx-lm's"),
        (lambda: fail(AssertionError("no gradient")), "ours"),
        (lambda: fail(UserError("mlx-lm cannot do it")), "mlx-lm's"),
        (lambda: fail(UserError("architecture llama cannot do it")), "ours"),
    ],
)
def test_whose_limit_it_is(raises, expected):
    with pytest.raises(Exception) as error:
        raises()
    assert fault(error.value) == expected


ROWS = [
    ({"name": "a", "failed": {}, "notes": [], "planned": 1.203}, "| a | yes | 1.20 |  |"),
    ({"name": "b", "failed": {}, "notes": ["x|y", "z"], "planned": 0.9}, "| b | yes | 0.90 | x/y; z |"),
    (
        {"name": "c", "failed": {}, "notes": [], "refused": "not so", "fault": "ours"},
        "| c | refused (ours) |  | not so |",
    ),
    (
        {"name": "d", "failed": {}, "notes": [], "refused": "no", "fault": "mlx-lm's"},
        "| d | refused (mlx-lm's) |  | no |",
    ),
    (
        {"name": "e", "failed": {"head": "ValueError"}, "notes": ["x"], "fault": "ours", "planned": 1.0},
        "| e | **no** (ours) | 1.00 | head: ValueError |",
    ),
    (
        {"name": "f", "failed": {"half": "boom"}, "notes": [], "fault": "mlx-lm's"},
        "| f | **no** (mlx-lm's) |  | half: boom |",
    ),
    (
        {"name": "g", "failed": {"process": "exit -9"}, "notes": []},
        "| g | **no** (whose is not told) |  | process: exit -9 |",
    ),
]


def test_the_page_says_whose_a_limit_is_and_which_plans_are_low():
    text = page([result for result, _ in ROWS], {"h": "No Metal back-end", "i": "SystemExit|"})
    for _, row in ROWS:
        assert row in text.splitlines()
    assert "| h | – (needs Metal) | | cannot be built here: No Metal back-end |" in text
    assert "| i | – (mlx-lm's) | | cannot be built here: SystemExit/ |" in text
    assert "2 of 7 pass everything, 2 are refused, 3 fail, and 2 more" in text
    assert "measured: b (0.90)." in text


def test_the_page_has_every_family():
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text("utf-8")
    known, cannot = configs()
    for name in [*known, *cannot]:
        assert f"| {name} |" in text, name
    assert "**no**" not in text and mx is not None
