"""The survey's quick form: the families that differ most, every check of each, and that its checks can fail."""

import mlx.core as mx
import pytest
from survey import QUICK, Survey, configs, in_process, try_family, verdict

import safesteer_mlx.method.residual as residual


@pytest.mark.parametrize("family", QUICK)
def test_a_family_passes_everything(family):
    result = in_process(family)
    assert verdict(result).startswith("yes"), verdict(result)


@pytest.mark.parametrize("family", ["gemma3n", "rwkv7", "nanbeige"])
def test_a_family_with_more_than_one_stream_is_refused_in_a_sentence(family):
    assert "one residual stream" in try_family(family)["refused"]


def test_every_family_of_mlx_lm_is_known():
    from pathlib import Path

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


def test_the_page_has_every_family():
    from pathlib import Path

    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text("utf-8")
    known, cannot = configs()
    for name in [*known, *cannot]:
        assert f"| {name} |" in text, name
    assert "**no**" not in text and mx is not None
