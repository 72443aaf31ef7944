"""A finished run, read back: what was aligned, how, and what came of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from ..method.judge import use_refusal_phrases
from ..recipe import MOST_TOKENS, Recipe, current_names, model_name, read_yaml, resolve
from .files import read_json, user_path
from .load import Loaded, load
from .screen import UserError
from .store import decoded, sha256_of

# What the files of a run's record hold, as far as anything reads it back; `RECORD` says which file holds which.


class Count(TypedDict):
    """So many of so many."""

    count: int
    total: int


class Scored(TypedDict):
    """A model in before_after.json: outcomes and broken answers by kind and decoding, tasks, drift."""

    outcomes: Annotated[dict[str, dict[str, dict[str, int]]], 20]
    broken: Annotated[dict[str, dict[str, Count]], 20]
    capability: Annotated[dict[str, Count], 100]
    drift: float | None
    drift_outside: float | None


class Vector(TypedDict):
    """The direction itself, and the block that it is added before."""

    layer: int
    vector: Annotated[list[float], 1_000_000]
    prompts_only: NotRequired[bool]  # whether it is added at the tokens of a prompt only


Map = Annotated[list[Annotated[list[float | None], 500]], 100]


class Maps(TypedDict):
    """The three tests of every candidate, by position and block."""

    ablation_kl: Map
    ablation_refusal: Map
    steering_refusal: Map


class Trial(TypedDict):
    """A direction and coefficient that was tried."""

    position: int
    layer: int
    coeff: float
    harmful_opened: float | None
    harmless_opened: float | None
    refused: float | None
    over_refused: float | None


class Direction(Vector):
    position: int
    coeff: float
    openers: Annotated[dict[str, int], 1000]
    trials: NotRequired[Annotated[list[Trial], 1000]]
    scores: Maps


class Token(TypedDict):
    token: str
    id: int
    votes: int
    mean_delta: float
    part: NotRequired[float | None]
    base_prob: float
    teacher_prob: float


class Step(TypedDict):
    step: int
    loss: float | None
    harmful_loss: float | None
    anchor_loss: float | None
    student_mass: float | None
    target_mass: float | None
    grad_norm: float | None
    learned: NotRequired[float | None]
    worth: NotRequired[float | None]


class Answered(TypedDict):
    model: str
    kind: str
    how: str
    prompt: str
    answer: str
    outcome: str
    finished: bool
    cut: NotRequired[bool]


class Candidate(TypedDict):
    """A direction, its published scores, and the tests that it failed."""

    layer: int
    position: int
    steering_refusal: float | None
    ablation_kl: float | None
    ablation_refusal: float | None
    failed: Annotated[list[str], 10]


class Verdict(TypedDict):
    word: str
    reasons: Annotated[list[str], 100]
    flipped: Count
    base_harmless: Count
    teacher_harmless: Count
    candidates: NotRequired[Annotated[list[Candidate], 10]]


class Outcome(TypedDict):
    """outcome.json: what the run said last."""

    verdict: str
    words: Annotated[list[str], 10]
    head: Annotated[list[str], 10]
    rows: Annotated[list[Annotated[list[str], 10]], 20]


class SavedStep(TypedDict):
    """A step that was scored for --select-checkpoint."""

    step: int
    unsafe: Count
    over_refusal: Count
    broken: Count
    drift: float | None


class Selection(TypedDict):
    select: str
    kept: int
    within: bool
    scores: Annotated[list[SavedStep], 2000]


class Timing(TypedDict):
    seconds: float
    peak_bytes: NotRequired[int]


class Manifest(TypedDict):
    """manifest.json: versions and hashes."""

    model_sha256: NotRequired[str]
    model_settings_sha256: NotRequired[str]  # of its configuration, tokenizer and chat template
    adapters_sha256: NotRequired[str]
    thinks: NotRequired[bool]  # whether the base thought before it answered
    not_aligned: NotRequired[str | None]
    tokens_explain: NotRequired[float]  # the share of what steering does that the safety tokens explain
    tokens_open: NotRequired[Annotated[list[float], 1000]]  # the teacher's probability of them, by place in the answer


MOST_ROWS = 200_000  # as the limits above: a page can still be drawn of it

RECORD: dict[str, Any] = {
    "direction.json": Direction,
    "tokens.json": Annotated[list[Token], MOST_TOKENS],
    "metrics.jsonl": Annotated[list[Step], MOST_ROWS],
    "before_after.json": Annotated[dict[str, Scored], 10],
    "manifest.json": Manifest,
    "timing.json": Timing,
    "transcripts.jsonl": Annotated[list[Answered], MOST_ROWS],
    "outcome.json": Outcome,
    "verdict.json": Verdict,
    "selection.json": Selection,
}


def read_record(folder: Path, name: str, kind: Any = None) -> Any:
    """What a file in a run's own folder holds, checked; `kind` where less of it is wanted than all. A UserError if it
    is missing, cannot be read, or is not as `align` writes it."""
    path = folder / name
    if not path.exists():
        raise UserError(f"{folder} holds no {name}; give the run/ folder of a run that has finished")
    content = read_json(path, str(path), "make the run again")
    try:
        return decoded(kind or RECORD[name], content)
    except ValueError as error:
        raise UserError(f"{path} is not as align writes it ({error!s:.100}); make the run again") from None


@dataclass(frozen=True)
class FinishedRun:
    """`folder` holds the adapters, and `folder/run` the record."""

    folder: Path
    recipe: Recipe
    manifest: dict[str, Any]
    outcomes: dict[str, Any]  # before_after.json


def finished_run(folder: Path, model: str | None = None) -> FinishedRun:
    """Read the run in a folder of adapters, or in the `run/` of one. `model` is where its base is now, if it has moved.

    Raises:
        UserError: there is no run, it is not finished, or its adapters are gone or are others.
    """
    given, folder = folder, user_path(folder)
    if folder.name == "run" and not (folder / "run").is_dir():
        folder = folder.absolute().parent
    record = folder / "run"
    if not (record / "recipe.yaml").is_file():
        raise UserError(f"{given} holds no run of align; give the folder that --adapter-path named")
    if not (record / "manifest.json").is_file():
        raise UserError(f"the run in {given} is not finished; go on with it first: align --resume {given}")
    manifest = read_record(record, "manifest.json")
    for file in ("adapters.safetensors", "adapter_config.json"):
        if not (folder / file).is_file():
            raise UserError(f"{given} holds a run, but no {file}; run align again")
    if sha256_of(folder / "adapters.safetensors") != manifest.get("adapters_sha256"):
        raise UserError(f"the adapters in {given} are not those that its run scored; run align again")
    settings = current_names(read_yaml(record / "recipe.yaml"))
    if model is not None:
        settings |= {"model": model_name(model), "revision": None}
    elif (name := str(settings.get("model"))).startswith("/") and not Path(name).exists():
        raise UserError(f"the base of the run in {given}, {name}, is gone; say with --model where it is now")
    return FinishedRun(folder, resolve({}, settings)[0], manifest, read_record(record, "before_after.json"))


def load_base(run: FinishedRun, trust_remote_code: bool = False) -> Loaded:
    """The base that the run aligned; a UserError as `load`, or if its weights or what stands beside are others.

    That code may run is said anew: the run may be a stranger's, and says what it likes.
    """
    settings = run.recipe.run
    use_refusal_phrases(settings.refusal_phrases)
    base = load(settings.model, trust_remote_code, settings.thinking, settings.revision)
    if base.weights_hash != run.manifest.get("model_sha256"):
        raise UserError(
            f"{settings.model} holds other weights than the run in {run.folder} aligned; say with --model where "
            "those are"
        )
    if base.settings_hash != run.manifest.get("model_settings_sha256", base.settings_hash):
        raise UserError(
            f"{settings.model} holds another configuration, tokenizer or chat template than the run in {run.folder} "
            "aligned; say with --model where those are"
        )
    return base
