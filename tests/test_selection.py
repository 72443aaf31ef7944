"""The checkpoint that is kept: the safest within the limits, and what is said where there is none."""

import json
from dataclasses import asdict

import mlx.core as mx
import pytest

from safesteer_mlx.align import main
from safesteer_mlx.intervals import Count
from safesteer_mlx.progress import UserError
from safesteer_mlx.recipe import limits_of
from safesteer_mlx.selection import CheckpointScore, choose

SHORT = ["--iters", "2", "--save-every", "1", "--test-prompts", "1", "--direction-train", "32", "--no-report"]
SHORT += ["--direction-validation", "16", "--token-samples", "1", "--batch-size", "4", "--max-tokens", "16"]
SHORT += ["--horizon", "2", "--samples", "2"]


pytestmark = pytest.mark.usefixtures("few_prompts")


def scored(step: int, unsafe: int, over: int, drift: float = 0.001, broken: int = 0) -> CheckpointScore:
    return CheckpointScore(step, Count(unsafe, 100), Count(over, 100), Count(broken, 200), drift)


SCORES = [scored(5, 40, 0), scored(10, 10, 2), scored(15, 4, 3, 0.01), scored(20, 4, 3, 0.02), scored(25, 0, 30)]


@pytest.mark.parametrize(
    ("limits", "step"),
    [
        ("over_refusal<=1", 25),
        ("over_refusal<=0.03", 15),  # as safe as step 20, and drifted less
        ("over_refusal<=0.02", 10),
        ("over_refusal<=0.029, drift <= 1e-3", 10),
        ("over_refusal<=0", 5),
        ("over_refusal<=0,unsafe<=0.39", None),
    ],
)
def test_the_safest_within_the_limits_is_chosen(limits, step):
    found = choose(SCORES, limits_of(limits))
    assert (found and found.step) == step


def test_scores_are_read_back_as_they_were():
    assert [CheckpointScore.of(asdict(s)) for s in SCORES] == SCORES


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("over_refusals<=0.1", "did you mean over_refusal"),
        ("speed<=1", "choose unsafe, over_refusal, broken, drift"),
        ("over_refusal<0.1", "of the form"),
        ("over_refusal<=few", "of the form"),
        ("drift<=-1", "of the form"),
        ("drift<=0.1,", "of the form"),
    ],
)
def test_what_is_no_limit_is_a_sentence(text, said):
    with pytest.raises(UserError, match=said):
        limits_of(text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, few_prompts):
    """Two runs of two steps: one whose limit every step keeps, one whose limit none can."""
    folder = tmp_path_factory.mktemp("runs")
    for name, limit in (("some", "broken<=1"), ("none", "drift<=0")):
        assert main(["--adapter-path", str(folder / name), *SHORT, "--select", limit]) == 0
    return folder


def test_the_kept_step_is_what_was_saved_then(runs):
    found = json.loads((runs / "some" / "run" / "selection.json").read_text())
    assert found["within"] and [s["step"] for s in found["scores"]] == [1, 2]
    assert all(s["unsafe"]["total"] == s["over_refusal"]["total"] == 8 for s in found["scores"])
    kept = mx.load(str(runs / "some" / "adapters.safetensors"))
    own = [mx.load(str(runs / "some" / "run" / "candidates" / f"step-00000{n}.safetensors")) for n in (1, 2)]
    same = [all(mx.array_equal(kept[name], w[name]) for name in kept) for w in own]
    assert same == [found["kept"] == 1, found["kept"] == 2]
    assert (runs / "some" / "run" / "candidates").stat().st_mode & 0o777 == 0o700


def test_where_none_keeps_the_limits_the_last_is_kept_and_it_is_said(runs):
    found = json.loads((runs / "none" / "run" / "selection.json").read_text())
    assert not found["within"] and found["kept"] == 2
    kept = mx.load(str(runs / "none" / "adapters.safetensors"))
    last = mx.load(str(runs / "none" / "run" / "candidates" / "step-000002.safetensors"))
    assert all(mx.array_equal(kept[name], last[name]) for name in kept)
