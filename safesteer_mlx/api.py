"""The package as a library: a model is loaded, aligned and scored in a few lines, with the commands' own defaults.

`safesteer_mlx.load`, `.align` and `.evaluate` are these functions.
"""

from pathlib import Path
from typing import Any

from .align import Aligned, align_model
from .evals.heldout import HeldOut, TestSet, held_out_prompts
from .evals.scores import Scores
from .method.prompts import sets_to_score
from .method.rollout import Sampling
from .method.run import batch_size
from .method.student import with_adapters
from .recipe import BUNDLED, HELD_OUT_TOKENS, Recipe, model_name, resolve
from .system import load as loading
from .system.load import Loaded
from .system.screen import Screen, UserError

__all__ = ["Aligned", "Loaded", "Recipe", "Scores", "UserError", "align", "evaluate", "load"]


def load(
    model: str = BUNDLED, *, revision: str | None = None, thinking: str = "auto", trust_remote_code: bool = False
) -> Loaded:
    """Load and freeze a model: a folder, a Hub id, or `tiny-chat`, the bundled one.

    Raises:
        UserError: there is no such model, or it is none that can be aligned.
    """
    return loading.load(model_name(model), trust_remote_code, thinking, revision)


def align(
    base: Loaded,
    adapter_path: str | Path = "adapters",
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    check: bool = False,
    force: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> Aligned:
    """Align a model as `safesteer-mlx align` does, and return what came of it; `settings` are the YAML keys.

    `preset` is `paper` or None, `config` a YAML file, `check` ends with the verdict, `force` goes on past every alarm.
    A run that made nothing safer says why in `not_aligned`. One that is in the folder already is replaced if it has
    finished, gone on with if it was stopped, and left as it is by `check`.

    Raises:
        UserError: a setting that does not fit, or what stopped the run.
    """
    settings |= {"model": base.name, "adapter_path": str(adapter_path)}
    recipe, _ = resolve(base.config, settings, preset, None if config is None else Path(config))
    return align_model(recipe, base, Screen(quiet), check=check, force=force)


def evaluate(
    base: Loaded,
    adapter_path: str | Path | None = None,
    *,
    test_prompts: int | None = 100,
    max_tokens: int = HELD_OUT_TOKENS,
    seed: int = 42,
    data: str | Path | None = None,
    quiet: bool = True,
) -> dict[str, Scores]:
    """Score a model on held-out prompts, `base` and, with adapters, `student`; None takes all prompts.

    The prompts are the built-in ones, but for the sets that `data`, a folder, holds by name.

    Raises:
        UserError: the adapters are not this model's, or `data` holds no test set, or one that cannot be used.
    """
    screen, sets = Screen(quiet), sets_to_score(base.name, None if data is None else str(data))
    sampling = Sampling(base.eos_ids, max_tokens, batch_size=batch_size(base, 64, screen))
    test = TestSet(*held_out_prompts(sets, test_prompts))
    models = {"base": base.model}
    if adapter_path is not None:
        models["student"] = with_adapters(base.model, Path(adapter_path))
    return dict(HeldOut(base, test, [], seed, sampling).score_each(models, screen))
