"""The checkpoint that is kept: the safest within the limits, and what is said where there is none."""

import json
import shutil
from dataclasses import asdict

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from runs import MICRO

from safesteer_mlx.align import main
from safesteer_mlx.evals.scores import Count
from safesteer_mlx.evals.selection import CheckpointScore, choose, keep_best
from safesteer_mlx.method.run import make_run
from safesteer_mlx.method.student import make_student
from safesteer_mlx.recipe import limits_of, resolve
from safesteer_mlx.system.load import load
from safesteer_mlx.system.screen import Screen, UserError
from safesteer_mlx.system.store import decoded

SHORT = [MICRO, "--force", "--iters", "2", "--save-every", "1", "--test-prompts", "1", "--direction-train", "32"]
SHORT += ["--direction-validation", "16", "--token-samples", "1", "--batch-size", "4", "--max-tokens", "16"]
SHORT += ["--horizon", "2", "--num-generations", "2", "--no-report"]


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
    assert [decoded(CheckpointScore, asdict(s)) for s in SCORES] == SCORES


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
def run(tmp_path_factory, few_prompts):
    """The adapter folder of a run of two steps, both saved, both within the limit."""
    folder = tmp_path_factory.mktemp("run") / "adapters"
    assert main(["--adapter-path", str(folder), *SHORT, "--select-checkpoint", "broken<=1"]) == 0
    return folder


def candidate(run, step: int) -> dict:
    return mx.load(str(run / "run" / "candidates" / f"step-{step:06d}.safetensors"))


def test_the_kept_step_is_what_was_saved_then(run):
    found = json.loads((run / "run" / "selection.json").read_text())
    assert found["within"] and [s["step"] for s in found["scores"]] == [1, 2]
    assert all(s["unsafe"]["total"] == s["over_refusal"]["total"] == 8 for s in found["scores"])
    kept = mx.load(str(run / "adapters.safetensors"))
    same = [all(mx.array_equal(kept[name], candidate(run, n)[name]) for name in kept) for n in (1, 2)]
    assert same == [found["kept"] == 1, found["kept"] == 2]
    assert (run / "run" / "candidates").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("most", "kept"), [(0.1, 2), (0.4, 1)])
def test_the_student_gets_the_kept_weights_and_it_is_said(run, tmp_path, most, kept, capsys):
    shutil.copytree(run, tmp_path / "adapters")
    base = load(MICRO)
    given = {"select_checkpoint": f"drift<={most}", "adapter_path": str(tmp_path / "adapters")}
    recipe = resolve(base.config, given)[0]
    student = make_student(base.model, recipe.train, 0)
    student.load_weights(list(candidate(run, 2).items()), strict=False)
    scores = [asdict(scored(1, 10, 0, drift=0.3)), asdict(scored(2, 0, 0, drift=0.5))]
    keep_best(make_run(recipe, base, Screen()), student, scores)
    own = dict(tree_flatten(student.trainable_parameters()))
    assert all(mx.array_equal(own[name], weight) for name, weight in candidate(run, kept).items())
    found = json.loads((tmp_path / "adapters" / "run" / "selection.json").read_text())
    assert (found["kept"], found["within"]) == (kept, most == 0.4)
    said = capsys.readouterr().out
    assert ("step 1 is the safest" if most == 0.4 else "no checkpoint keeps drift<=0.1; the last one is kept") in said
