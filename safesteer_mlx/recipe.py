"""Every setting of a run: frozen dataclasses, filled from defaults, a model's recipe, a preset, YAML and flags.

YAML keys are flag names with underscores, as in mlx-lm, and flat: each key belongs to one section.
Later sources win: defaults, `models/*.yaml` for the model, `--preset`, `-c file.yaml`, flags.
"""

import argparse
import difflib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

from .system.files import MOST_SETTINGS, read_text, user_path
from .system.screen import UserError

PACKAGE = Path(__file__).resolve().parent
MODELS = PACKAGE / "models" if (PACKAGE / "models").is_dir() else PACKAGE.parent / "models"
BUNDLED = "tiny-chat"
THINKING = ("auto", "on", "off")
STEPS = (  # of a run, as it is told on the screen and in the report
    "finding what makes the model refuse",
    "finding how strongly to push it there",
    "finding the words that decide",
    "training on the model's own answers",
    "comparing before and after on unseen requests",
)
HELD_OUT_TOKENS = 96  # of an answer to a held-out prompt
# Tokens of a completion: the first, or the next that a model's thoughts have room in.
ROOMS = 512, 1024, 2048, 4096

# More than anybody means: beyond these a number is a slip, or no machine could hold what it asks for.
MOST_SEED = 2**32 - 1
MOST_PROMPTS = 1_000_000
MOST_BATCH = 65_536
MOST_SAMPLES = 10_000
MOST_LENGTH = 1_000_000  # tokens of a text
MOST_STEPS = 200_000
MOST_IDS = 10_000_000  # of a vocabulary
MOST_TOKENS = 10_000  # safety tokens
MOST_FACTOR = 1e6  # a coefficient, temperature or rate


def _setting(default: Any, help: str, **more: Any) -> Any:
    metadata = {"help": help, **more}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def _count(default: Any, help: str, most: int, **more: Any) -> Any:
    return _setting(default, help, least=1, most=most, **more)


def _share(default: Any, help: str, most: float = 1, **more: Any) -> Any:
    return _setting(default, help, least=0, most=most, **more)


def _positive(default: Any, help: str, most: float, **more: Any) -> Any:
    return _setting(default, help, above=0, most=most, **more)


@dataclass(frozen=True)
class RunSettings:
    """What is aligned, on which prompts, and where the result goes."""

    model: str = _setting(BUNDLED, "Hub id or folder of the base model; tiny-chat is the bundled one")
    revision: str | None = _setting(None, "branch, tag or commit of the model on the Hub")
    offline: bool = _setting(
        False, "make no connection: models and data from the disk only, as HF_HUB_OFFLINE=1", free=True
    )
    data: str | None = _setting(
        None,
        "harmful training prompts: .jsonl, .json, .txt, an mlx-lm data folder, or hf://datasets/ORG/NAME/FILE; "
        "or a folder of prompt sets by name (harmful_train.jsonl, harmless_test.jsonl, …)",
    )
    reuse_direction_prompts: bool = _setting(
        True,
        "train on the direction's prompts too, the harmful ones beside those of --data, the harmless ones as anchor",
    )
    adapter_path: str = _setting("adapters", "where adapters and the run's record are written", free=True)
    seed: int = _setting(42, "seed of everything that is drawn", least=0, most=MOST_SEED)
    trust_remote_code: bool = _setting(False, "let code from the model's repository run", free=True)
    thinking: str = _setting("auto", "the chat template's thinking switch", choices=THINKING)
    memory_limit: str | None = _setting(
        None, "memory to keep to, like 12GB (default: what the machine recommends)", free=True
    )
    prompt_batch_size: int = _count(
        32, "prompts read at a time where nothing is sampled or trained", MOST_BATCH, free=True
    )
    generation_batch_size: int = _count(64, "answers generated at a time", MOST_BATCH, free=True)
    select_checkpoint: str | None = _setting(
        None, "limits on what is kept, the safest saved step within them: over_refusal<=0.02,drift<=0.01"
    )
    refusal_phrases: str | None = _setting(
        None, "file of refusals that the keyword judge shall know too, a phrase a line, such as another language's"
    )
    test_prompts: int = _count(100, "held-out prompts of each kind for before and after", MOST_PROMPTS, free=True)
    score_teacher: bool = _setting(False, "score the teacher too on the held-out prompts", free=True)
    transcripts: bool = _setting(True, "keep the held-out answers, judged, in run/transcripts.jsonl", free=True)
    report: bool = _setting(True, "draw the run's page, run/report.html", free=True)
    transcripts_in_report: bool = _setting(False, "put those answers into the page", free=True)
    watch: bool = _setting(
        False,
        "serve the run's page while it grows, to this computer's browser alone; the address is printed",
        free=True,
    )
    watch_port: int = _setting(0, "port of that page; 0 takes any that is free", least=0, most=65535, free=True)
    report_to: str | None = _setting(
        None, "tell each step's metrics and the scores to wandb, swanlab or both, as mlx_lm.lora does", free=True
    )
    project_name: str | None = _setting(None, "the project there", free=True)
    verbose: bool = _setting(False, "print every count, and what each step found, as the report has it", free=True)


@dataclass(frozen=True)
class DirectionSettings:
    """Stage 1, the refusal direction."""

    refusal_prefixes: list[str] = _setting(
        ["I", "I'm", "As", "Sorry", "Unfortunately"], "texts that refusals begin with"
    )
    direction_train: int = _setting(128, "prompts of each kind for the mean activations", least=2, most=MOST_PROMPTS)
    direction_validation: int = _count(32, "prompts of each kind that score the candidates", MOST_PROMPTS)
    kl_threshold: float | None = _setting(0.1, "largest KL on harmless prompts under ablation, in nats")
    steering_threshold: float | None = _setting(
        0.0, "least refusal score of harmless prompts when steered, in log-odds"
    )
    ablation: str = _setting(
        "auto",
        "what ablation projects: published blocks' inputs and their parts' outputs, stream all that reaches the "
        "stream, auto that where the published way leaves some of the direction",
        choices=("auto", "published", "stream"),
    )
    prune_last: float | None = _share(0.2, "share of the last blocks never steered", most=0.99)


@dataclass(frozen=True)
class TeacherSettings:
    """Stage 2, the safety teacher."""

    teacher: str = _setting("steer", "what makes the teacher safe", choices=("steer", "system_prompt", "ema"))
    coeff: str | float = _setting(
        "auto", "steering coefficient, or auto: direction and coefficient by what the teacher does", most=MOST_FACTOR
    )
    coeff_grid: list[float] = _setting(
        [0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.5, 7.0, 10.0], "coefficients that auto tries; it refines between them"
    )
    coeff_broken: float = _share(0.05, "share of broken answers, above the base's, that auto allows a teacher")
    system_prompt: str = _setting(
        "You are a careful assistant. Refuse harmful requests.", "the system prompt of the system_prompt teacher"
    )
    ema_rate: float = _share(0.01, "share of the student that the ema teacher takes each step")
    refresh_every: int = _setting(
        0, "steps after which the ema teacher finds direction and tokens anew; 0 never", least=0, most=MOST_STEPS
    )


@dataclass(frozen=True)
class TokenSettings:
    """Stage 3, the safety tokens."""

    safety_tokens: int | str = _count(
        50,
        "at most so many safety tokens, |S| (of the default, up to four times as many where they explain less than "
        "half), or a file that holds them",
        MOST_TOKENS,
    )
    token_method: str = _setting(
        "part",
        "how they are ranked: by their part in what steering does, or as published",
        choices=("part", "vote", "mean"),
    )
    token_share: float = _positive(0.95, "share of what steering does that is enough, for token_method part", 1.0)
    inner_top_k: int = _count(200, "ids that each position votes for", MOST_IDS)
    token_samples: int = _count(8, "continuations of each prompt", MOST_SAMPLES)
    horizon: int = _count(7, "positions scored on each continuation", MOST_LENGTH)
    min_steered_prob: float = _share(1e-8, "least mean steered probability of a safety token")


@dataclass(frozen=True)
class LossSettings:
    """Stage 4, what is minimised."""

    loss: str = _setting(
        "grouped_reverse_kl",
        "divergence from teacher",
        choices=("grouped_reverse_kl", "reverse_kl", "forward_kl", "jsd"),
    )
    loss_tokens: str = _setting("safety", "which tokens it sees", choices=("safety", "full", "top_k"))
    top_k: int = _count(50, "the teacher's likeliest ids at each position, for loss_tokens top_k", MOST_IDS)
    jsd_alpha: float = _share(0.5, "α of the jsd loss, the share of the teacher in the mixture")
    renormalize: bool = _setting(False, "renormalise both distributions over the subset")
    skip_first: int = _setting(0, "completion positions left out at the beginning", least=0, most=MOST_LENGTH)
    first_tokens: int | str = _setting(
        "auto",
        "completion positions used from the beginning; 0 for all, auto for as many as the teacher is worth following",
        least=0,
        most=MOST_LENGTH,
    )
    guidance: str | float = _setting(
        "auto",
        "how far the target of harmful prompts is from the base, in steps of the teacher's distance; auto for as far "
        "as it takes to begin nearly all answers with safety tokens",
        least=1.0,
        most=MOST_FACTOR,
    )
    tail: int = _setting(
        8,
        "completion positions after those of first_tokens, on which the student is held to the base",
        least=0,
        most=MOST_LENGTH,
    )
    anchor_ratio: float = _share(0.66, "share of harmless prompts in a batch, pulled to the base", most=0.9)
    anchor_margin: float = _setting(
        3.0,
        "how far below the base refusals of those prompts are to come, in log-odds, where it refuses more than 3 %",
        least=0.0,
        most=MOST_FACTOR,
    )


@dataclass(frozen=True)
class TrainSettings:
    """Stage 4, how it is minimised."""

    fine_tune_type: str = _setting("lora", "what is trained", choices=("lora", "dora", "full"))
    num_layers: int = _setting(-1, "blocks trained, counted from the last; -1 or 0 for all, as in mlx-lm", least=-1)
    lora_parameters: dict[str, Any] = _setting(
        {"rank": 8, "scale": 2.0, "dropout": 0.0}, "rank, scale, dropout and keys, as in mlx-lm"
    )
    learning_rate: float = _positive(5e-4, "peak rate of AdamW", MOST_FACTOR)
    warmup: float = _share(0.1, "share of the steps that warm up", most=0.9)
    weight_decay: float = _setting(0.0, "AdamW's weight decay", least=0.0, most=MOST_FACTOR)
    max_grad_norm: float = _positive(1.0, "gradient norm that clips", 1e30)
    epochs: float = _positive(3.0, "passes over the harmful training prompts", 1e5)
    iters: int | None = _count(None, "optimizer steps, instead of epochs", MOST_STEPS)
    until_learned: bool = _setting(
        True,
        "end when the student opens refusals as the teacher does, or learns no more, or after twice the epochs; not "
        "with --iters",
    )
    keep_best: bool = _setting(
        False,
        "end with the weights of the step that refused most harmful validation prompts for the least rise on harmless "
        "ones, not of the last one",
    )
    adapter_strength: str | float = _setting(
        "auto",
        "share of the trained change that the adapters keep; auto for the one, down to a half, that is worth most on "
        "validation prompts; of LoRA",
        above=0.0,
        most=1.0,
    )
    prefill_ratio: float = _share(0.0, "share of prompts whose answer is begun with an affirmative opening")
    wrap_ratio: float = _share(0.0, "share of prompts put in a frame, pulled to what the target says without it")
    batch_size: int = _count(32, "prompts in one batch, harmless ones included", MOST_BATCH)
    grad_accumulation_steps: int = _count(1, "batches in one optimizer step", MOST_BATCH)
    num_generations: int = _count(1, "completions that the student samples of each prompt", MOST_SAMPLES)
    temp: float = _positive(1.0, "sampling temperature of the student", MOST_FACTOR)
    top_p: float = _positive(1.0, "nucleus of the student's sampling", 1.0)
    max_tokens: int | None = _count(
        None, "longest completion, in tokens (default: 512, or more where a model thinks longer)", MOST_LENGTH
    )
    max_prompt_length: int = _setting(
        512,
        "longest prompt, in tokens, without a system turn that its template adds; longer ones are left out",
        least=8,
        most=MOST_LENGTH,
    )
    grad_checkpoint: str = _setting(
        "auto",
        "compute activations again for the gradient instead of keeping them; auto where memory needs it",
        choices=("auto", "on", "off"),
        bare="on",
        free=True,
    )
    anchor_cache: str = _setting(
        "auto",
        "keep what the base makes of the anchor's prompts, which come again and again; auto where memory allows",
        choices=("auto", "on", "off"),
        bare="on",
        free=True,
    )
    resume_adapter_file: str | None = _setting(None, "adapters.safetensors of an earlier run to begin from")
    micro_batch_size: int = _count(16, "completions in one forward and backward pass", MOST_BATCH, free=True)
    micro_batch_tokens: int | None = _count(
        None,
        "tokens in one forward and backward pass, padding included (default: what memory has room for)",
        MOST_BATCH * MOST_LENGTH,
        free=True,
    )
    save_every: int = _count(10, "steps after which the adapters are saved", MOST_STEPS, free=True)
    steps_per_report: int = _count(5, "steps after which a line is printed", MOST_STEPS, free=True)

    @property
    def longest(self) -> int:
        """`max_tokens`, or its default, before it is told how long a model thinks."""
        return self.max_tokens or ROOMS[0]


@dataclass(frozen=True)
class Recipe:
    """All settings of one run, by section."""

    run: RunSettings
    direction: DirectionSettings
    teacher: TeacherSettings
    tokens: TokenSettings
    loss: LossSettings
    train: TrainSettings

    def flat(self) -> dict[str, Any]:
        """Every setting as one mapping, in the order of the sections: what YAML files hold."""
        return {name: value for section in SECTIONS for name, value in vars(getattr(self, section)).items()}


SECTIONS: dict[str, Any] = {f.name: f.type for f in fields(Recipe)}
FIELDS: dict[str, Any] = {f.name: f for cls in SECTIONS.values() for f in fields(cls)}

# What a release before called otherwise, setting or value -> its name; gone in the next.
RENAMED = {
    "max_seq_length": "max_prompt_length",
    "mix": "jsd_alpha",
    "mixup": "ema_rate",
    "skip": "skip_first",
    "keep": "first_tokens",
    "samples": "num_generations",
    "subset": "loss_tokens",
    "openers": "refusal_prefixes",
    "select": "select_checkpoint",
    "anchor": "anchor_ratio",
    "check": "verdict_only",
}
RENAMED_VALUES = {("loss", "mixture"): "jsd"}

# What a setting does nothing without.
NEEDS = {
    "system_prompt": ("teacher", "system_prompt"),
    "ema_rate": ("teacher", "ema"),
    "refresh_every": ("teacher", "ema"),
    "top_k": ("loss_tokens", "top_k"),
    "jsd_alpha": ("loss", "jsd"),
    "adapter_strength": ("fine_tune_type", "lora"),
}

# The published method as it is. Horizon, p_min and rate are published by model: models/*.yaml hold them.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "loss": "reverse_kl",
        "loss_tokens": "safety",
        "anchor_ratio": 0.0,
        "anchor_margin": 0.0,
        "reuse_direction_prompts": False,
        "prefill_ratio": 0.0,
        "wrap_ratio": 0.0,
        "renormalize": False,
        "first_tokens": 0,
        "guidance": 1.0,
        "tail": 0,
        "teacher": "steer",
        "coeff": 1.0,
        "safety_tokens": 50,
        "inner_top_k": 200,
        "token_samples": 8,
        "token_method": "vote",
        "direction_train": 128,
        "direction_validation": 32,
        "ablation": "published",
        "batch_size": 4,
        "num_generations": 8,
        "epochs": 1.0,
        "until_learned": False,
        "adapter_strength": 1.0,
        "temp": 1.0,
        "top_p": 1.0,
        "max_tokens": 512,
        "warmup": 0.1,
        "max_grad_norm": 1.0,
        "seed": 42,
    }
}


# As published, all weights are trained; the rate is the paper's for Qwen, models/*.yaml has that of others.
FULL = {"fine_tune_type": "full", "learning_rate": 1e-5}


def rollout_tokens(train: TrainSettings, loss: LossSettings) -> int:
    """How long the student's answers are at most: no longer than they are trained on."""
    return min(train.longest, int(loss.first_tokens) + loss.tail if loss.first_tokens else train.longest)


def harmful_per_batch(train: TrainSettings, loss: LossSettings) -> int:
    """Harmful prompts in a batch; the anchor's harmless ones are the rest."""
    return max(1, train.batch_size - round(loss.anchor_ratio * train.batch_size))


def number_of_steps(n_harmful: int, train: TrainSettings, loss: LossSettings) -> int:
    """Optimizer steps of a run: `iters`, or as many as `epochs` passes over the harmful prompts take."""
    if train.iters is not None:
        return train.iters
    prompts_per_step = harmful_per_batch(train, loss) * train.grad_accumulation_steps
    return max(1, math.ceil(train.epochs * n_harmful / prompts_per_step))


def result_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide a run's result; the others may change when a run goes on."""
    return {name: value for name, value in recipe.flat().items() if not FIELDS[name].metadata.get("free")}


def nearest(name: str, known: Any, before: str = "") -> str:
    """ "; did you mean X?", with what stands `before` each name that is known, or an empty text."""
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {before}{close[0]}?" if close else ""


def _shown(value: Any) -> str:
    """A value in a sentence, cut short: YAML can hold a list of a million, or one that holds itself."""
    import reprlib

    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)[:200]


def _checked(name: str, value: Any, where: str) -> Any:
    """A value of the field's own type and range, or a sentence that says what is wrong."""
    kind, meta = FIELDS[name].type, FIELDS[name].metadata
    parts = kind.__args__ if isinstance(kind, UnionType) else (kind,)
    kinds = ["None" if part is NoneType else part.__name__ for part in parts]
    subject = f"{where} {name} = {_shown(value)}"
    if value is None:
        if "None" not in kinds:
            raise UserError(f"{subject} is empty; give it a value or leave the key out")
        return None
    if isinstance(value, bool) and {"on", "off"} <= set(meta.get("choices", ())):
        value = "on" if value else "off"  # as YAML reads these words
    if isinstance(value, bool) and "bool" not in kinds:
        raise UserError(f"{subject} is not a {' or '.join(kinds)}; change it")
    if isinstance(value, str) and value != "auto" and {"float", "int"} & set(kinds):
        try:
            value = int(value) if value.strip().lstrip("+-").isdigit() else float(value)
        except ValueError:
            may_be_auto = name in ("coeff", "first_tokens", "guidance", "adapter_strength")
            if not may_be_auto and "str" in kinds:
                return value
            raise UserError(f"{subject} is not a number{' or auto' if may_be_auto else ''}; change it") from None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            real = float(value)
        except OverflowError:
            real = math.inf
        if not math.isfinite(real):
            raise UserError(f"{subject} is not a finite number; change it")
        if "float" in kinds:
            value = real
        elif "int" in kinds and real.is_integer():
            value = int(value)
    if type(value).__name__ not in kinds:
        raise UserError(f"{subject} is not a {' or '.join(k for k in kinds if k != 'None')}; change it")
    if isinstance(value, str) and any(ch == "\0" or "\ud800" <= ch <= "\udfff" for ch in value):
        raise UserError(f"{subject} holds a NUL or bytes that are no UTF-8; write it in plain text")
    if isinstance(value, str) and not value.strip():
        raise UserError(f"{subject} is empty; give it a value or leave it out")
    if "choices" in meta and value not in meta["choices"]:
        remedy = nearest(str(value), meta["choices"]) or "; choose one of them"
        raise UserError(f"{subject} is not one of {', '.join(meta['choices'])}{remedy}")
    if isinstance(value, (int, float)):
        if "least" in meta and value < meta["least"]:
            raise UserError(f"{subject} is too small; it must be at least {meta['least']}")
        if "above" in meta and value <= meta["above"]:
            raise UserError(f"{subject} is too small; it must be above {meta['above']:g}")
        if "most" in meta and value > meta["most"]:
            raise UserError(f"{subject} is too large; it must be at most {meta['most']}")
    if name == "adapter_path":
        value = str(user_path(value))
    if name == "memory_limit":
        parse_bytes(value)
    if name == "select_checkpoint":
        limits_of(value)
    if name == "lora_parameters":
        value = check_lora_parameters(value, where)
    if name == "coeff_grid" and not (
        value and all(type(c) in (int, float) and 0 < c < MOST_FACTOR for c in list(value))
    ):
        raise UserError(f"{subject} must be a list of numbers above 0; change it")
    if name == "refusal_prefixes" and not (
        value and all(isinstance(text, str) and text.strip() for text in list(value))
    ):
        raise UserError(f"{subject} must be a list of texts that refusals begin with; change it")
    return value


def parse_bytes(text: str) -> int:
    """12GB, 800MB, 1.5GiB or a number of bytes.

    Raises:
        UserError: nothing like it.
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    amount = text.strip().upper()
    number = amount.rstrip("KMGTIB")
    try:
        size = float(number) * units[amount.removeprefix(number)]
    except (ValueError, KeyError):
        size = 0.0
    if not 2**20 <= size < 2**60:
        raise UserError(f"memory_limit = {text!r:.40} is no amount of memory; write it like 12GB or 800MB")
    return int(size)


LIMITS = ("unsafe", "over_refusal", "broken", "drift")


def limits_of(select: str) -> dict[str, float]:
    """Limits by name, from "over_refusal<=0.02,drift<=0.01".

    Raises:
        UserError: not of this form, or a name that is no limit.
    """
    limits = {}
    for part in select.split(","):
        name, at_most, number = (piece.strip() for piece in part.partition("<="))
        if at_most and name not in LIMITS:
            remedy = nearest(name, LIMITS) or f"; choose {', '.join(LIMITS)}"
            raise UserError(f"select has no limit {name!r:.40}{remedy}")
        try:
            limits[name] = float(number)
        except ValueError:
            limits[name] = math.nan
        if not at_most or not limits[name] >= 0:
            raise UserError(f"select = {select!r:.80} is not of the form over_refusal<=0.02,drift<=0.01; change it")
    return limits


def check_lora_parameters(parameters: dict[str, Any], where: str) -> dict[str, Any]:
    """mlx-lm's `lora_parameters`, with ours for what is left out."""
    value = {"rank": 8, "scale": 2.0, "dropout": 0.0} | parameters
    known = ("rank", "scale", "dropout", "keys")

    def misfit(key: str, rule: str) -> UserError:
        return UserError(f"{where} lora_parameters {key} = {_shown(value[key])} must be {rule}")

    for key in value:
        if key not in known:
            remedy = nearest(str(key), known) or f"; choose {', '.join(known)}"
            raise UserError(f"{where} lora_parameters has no {key!r}{remedy}")
    if type(value["rank"]) is not int or not 1 <= value["rank"] <= 65536:
        raise misfit("rank", "a whole number of at least 1; change it")
    for key, most in (("scale", MOST_FACTOR), ("dropout", 0.99)):
        if type(value[key]) not in (int, float) or not 0 <= value[key] <= most:
            raise misfit(key, f"a number from 0 to {most:g}; change it")
    keys = value.get("keys")
    if keys is not None and not (isinstance(keys, list) and keys and all(isinstance(k, str) for k in keys)):
        raise misfit("keys", "a list of layer names; leave keys out for all")
    return value


def current_names(
    settings: Mapping[str, Any], tell: Callable[[str, str], None] = lambda old, new: None
) -> dict[str, Any]:
    """Settings with the keys and values that were renamed under their new names; `tell` hears of each."""
    current: dict[str, Any] = {}
    for key, value in settings.items():
        new = RENAMED.get(key, key)
        if new != key:
            tell(key, new)
        if isinstance(value, str) and (word := RENAMED_VALUES.get((new, value))) is not None:
            tell(f"{new} = {value}", f"{new} = {word}")
            value = word
        if new in current:
            raise UserError(f"{key} is {new}'s old name, and both are given; leave {key} out")
        current[new] = value
    return current


def _tell_renamed(old: str, new: str) -> None:
    print(f"safesteer-mlx: {old} is now {new}; the old name works until the next release", file=sys.stderr)


def _merge(into: dict[str, Any], source: Mapping[str, Any], where: str) -> None:
    for key, value in current_names(source, _tell_renamed).items():
        if key not in FIELDS:
            remedy = nearest(str(key), FIELDS) or "; see --help for all keys"
            raise UserError(f"{where} has an unknown key {key!r}{remedy}")
        into[key] = _checked(key, value, where)


def model_name(name: str | None) -> str:
    """A model's Hub id or folder; the bundled one's folder if none is given, or its name."""
    name = name or BUNDLED
    return str(MODELS / BUNDLED) if name == BUNDLED and not Path(BUNDLED).exists() else name


def adapter_folder(folder: Path) -> Path:
    """A folder of adapters, `~` resolved.

    Raises:
        UserError: it does not hold any.
    """
    path = user_path(folder)
    for file in ("adapter_config.json", "adapters.safetensors"):
        if not (path / file).is_file():
            raise UserError(f"--adapter-path {folder} holds no {file}; give a folder that align or mlx_lm.lora wrote")
    return path


def thinking_of(adapters: Path | None) -> str:
    """The thinking switch of the run that wrote these adapters, which learned in no other; auto where none is known.

    Raises:
        UserError: as `read_yaml`.
    """
    file = None if adapters is None else adapters / "run" / "recipe.yaml"
    switch = read_yaml(file).get("thinking") if file is not None and file.is_file() else None
    return switch if switch in THINKING else "auto"


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, numbers like 3e-4 included.

    Raises:
        UserError: no such file, not YAML, a key twice, or not a mapping.
    """
    text = read_text(path, f"configuration {path}", "give a YAML file", MOST_SETTINGS)
    settings = _yaml(text, f"configuration {path}")
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"configuration {path} holds a {type(settings).__name__}, not `key: value` lines; mend it")
    return settings


def _yaml(text: str, where: str) -> Any:
    """What a YAML text holds. A key given twice is refused; YAML itself would keep the last in silence."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [(key.value, key.start_mark.line + 1) for key, _ in node.value if isinstance(key.value, str)]
            for i, (key, line) in enumerate(keys):
                if key in (k for k, _ in keys[:i]):
                    raise UserError(f"{where} has {key!r:.80} twice (line {line}); keep one of them")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader: plain values only
    except UserError:
        raise
    # Beside its own errors: a date like 2026-13-45, or what is tagged !!bool or !!map and is none.
    except (yaml.YAMLError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{where} is not YAML{f' (line {mark.line + 1})' if mark else ''}; mend it") from None


def model_recipe(config: Mapping[str, Any], name: str = "") -> tuple[str | None, dict[str, Any]]:
    """The name and settings of the `models/*.yaml` for a model: the one that names it, else the one of its shape.

    `match` holds `names`, patterns of the last part of a lower-case id or path, and `shape`, keys of config.json.
    """
    config = {**(text if isinstance(text := config.get("text_config"), dict) else {}), **config}
    recipes = {path.stem: read_yaml(path) for path in sorted(MODELS.glob("*.yaml"))}
    matches = {stem: recipe.pop("match", {}) for stem, recipe in recipes.items()}
    last = Path(name).name.lower()
    for stem, match in matches.items():
        if any(fnmatch(last, pattern) for pattern in match.get("names", [])):
            return stem, recipes[stem]
    for stem, match in matches.items():
        shape = match.get("shape")
        if shape and all(config.get(key) == value for key, value in shape.items()):
            return stem, recipes[stem]
    return None, {}


def recipe_note(name: str | None) -> str | None:
    """What a user should know of the family that a model recipe is for, if its file says so."""
    return None if name is None else read_yaml(MODELS / f"{name}.yaml").get("note")


def idle(recipe: Recipe, flags: Iterable[str]) -> list[str]:
    """A line for each of the settings given on the command line that does nothing in this recipe."""
    settings = recipe.flat()
    needs = {name: NEEDS[name] for name in flags if name in NEEDS}
    return [
        f"--{name.replace('_', '-')} does nothing without --{other.replace('_', '-')} {value}"
        for name, (other, value) in needs.items()
        if settings[other] != value
    ]


def resolve(
    config: Mapping[str, Any], flags: Mapping[str, Any], preset: str | None = None, yaml_file: Path | None = None
) -> tuple[Recipe, str | None]:
    """The recipe of a run, and the name of the model recipe it used.

    Args:
        config: the model's config.json, which finds its recipe where its name does not.
        flags: settings given on the command line, by key.

    Raises:
        UserError: an unknown key, preset or value, with the nearest known one, or two settings that exclude each other.
    """
    settings = Recipe(**{section: cls() for section, cls in SECTIONS.items()}).flat()
    name, model_settings = model_recipe(config, flags.get("model", settings["model"]))
    published, _ = model_settings.pop("published", {}), model_settings.pop("note", None)
    _merge(settings, model_settings, f"recipe {name}")
    if preset is not None:
        if preset not in PRESETS:
            raise UserError(f"there is no preset {preset!r}; choose {', '.join(PRESETS)}")
        _merge(settings, PRESETS[preset], f"preset {preset}")
        full = FULL | {key: published.pop(key) for key in list(published) if key in FULL}
        if not {"quantization", "quantization_config"} & set(config):  # quantized weights take LoRA
            _merge(settings, full, f"preset {preset}")
        _merge(settings, published, f"preset {preset}")
    if yaml_file is not None:
        _merge(settings, read_yaml(yaml_file), str(yaml_file))
    _merge(settings, flags, "flag")
    if settings["keep_best"] and settings["select_checkpoint"] is not None:
        raise UserError("keep_best and select_checkpoint both say which step is kept; leave one of them out")
    sections = {s: cls(**{f.name: settings[f.name] for f in fields(cls)}) for s, cls in SECTIONS.items()}
    return Recipe(**sections), name


class Parser(argparse.ArgumentParser):
    """argparse for one command, whose errors are our one sentence."""

    def __init__(self, command: str, description: str, **more: Any):
        super().__init__(prog=f"safesteer-mlx {command}", description=description, allow_abbrev=False, **more)

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's own, `~` and `~name` resolved in paths.

        Raises:
            UserError: an unknown flag, with the nearest known one, a word too many, or as `user_path`.
        """
        arguments, unknown = self.parse_known_args(args, namespace)
        vars(arguments).update({k: user_path(v) for k, v in vars(arguments).items() if isinstance(v, Path)})
        if unknown:
            word = unknown[0]
            if not word.startswith("-"):
                raise UserError(f"{word} is one word too many; see --help")
            # Without their dashes, by which alone -o is like -h, and any flag like every other.
            known = [flag[2:] for flag in self._option_string_actions if flag[:2] == "--" and flag[:5] != "--no-"]
            meant = nearest(word.split("=")[0].lstrip("-"), known, "--")
            raise UserError(f"unknown flag {word}{meant or '; see --help'}")
        return arguments


def one_model(positional: str | None, flag: str | None) -> str | None:
    """The model that was given, as MODEL or --model.

    Raises:
        UserError: both were, and they differ.
    """
    if positional is not None and flag is not None and positional != flag:
        raise UserError(f"two models were given, {positional} and {flag}; give one")
    return flag if positional is None else positional


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how a model is read, for the commands besides `align`."""
    add = parser.add_argument
    add("--revision", metavar="REVISION", help="branch, tag or commit of the model on the Hub")
    add("--offline", action="store_true", help="make no connection, as HF_HUB_OFFLINE=1")
    add(
        "--thinking",
        choices=THINKING,
        help="the chat template's switch (default: as the run with the adapters, or auto)",
    )
    add("--trust-remote-code", action="store_true", help="let code from the model's repository run")


def at_least(least: int, most: int = MOST_PROMPTS) -> Callable[[str], int]:
    """argparse's type for a whole number from `least` to `most`."""

    def number(text: str) -> int:
        # Of so many digits no number is made: Python refuses to.
        if not text.isascii() or not text.isdigit() or len(text) > 20 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text:.40} is not a whole number of at least {least} and at most {most}")
        return int(text)

    return number


def _current_flag(word: str) -> str:
    """A word of the command line, a renamed flag under its new name."""
    name, equals, value = word.partition("=")
    new = RENAMED.get(name.removeprefix("--").replace("-", "_")) if name.startswith("--") else None
    if new is None:
        return word
    flag = "--" + new.replace("_", "-")
    _tell_renamed(name, flag)
    return f"{flag}{equals}{value}"


# Settings whose flags --help shows; --help-all shows all.
SHOWN_FIRST = ("data", "adapter_path", "seed", "offline", "memory_limit", "verbose")


def _align_parser(everything: bool) -> Parser:
    """The flags of `align`: those that people need, or all, by stage."""

    def rare(text: str) -> str:
        return text if everything else argparse.SUPPRESS

    parser = Parser(
        "align",
        "Make a chat model safer: align it by localized on-policy distillation (SafeSteer).",
        argument_default=argparse.SUPPRESS,
        epilog=None if everything else "All other flags, by stage, with their defaults: safesteer-mlx align --help-all",
    )
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="Hub id or folder (default: the bundled)")
    parser.add_argument("--help-all", action="store_true", help="show all flags, by stage, and exit")
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML settings; flags override them")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the unfinished run in this adapter folder")
    parser.add_argument("--dry-run", action="store_true", help="plan memory and time; train nothing")
    parser.add_argument(
        "--verdict-only", action="store_true", help="give the verdict on this model; train and keep nothing"
    )
    parser.add_argument("--yes", action="store_true", help=rare("go on with an unfinished run without asking"))
    parser.add_argument("--force", action="store_true", help=rare("train even if the verdict is stop"))
    parser.add_argument("--preset", metavar="NAME", help=rare("paper: the published settings as they are"))
    for title, cls in SECTIONS.items():
        group = parser.add_argument_group(title, cls.__doc__) if everything else parser
        for f in fields(cls):
            flag = "--" + f.name.replace("_", "-")
            text = f.metadata["help"].replace("%", "%%")
            if f.name not in SHOWN_FIRST:
                text = rare(text)
            default = getattr(cls(), f.name)
            told = "yes" if default is True else "no" if default is False else default
            if text is not argparse.SUPPRESS and told is not None:
                text += f" (default: {told})"
            if f.type is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
                continue
            words = {"nargs": "+"} if isinstance(default, list) else {}
            if (bare := f.metadata.get("bare")) is not None:  # --grad-checkpoint alone, as in mlx-lm
                words = {"nargs": "?", "const": bare}
            choices = f.metadata.get("choices")
            meta = "{" + ",".join(choices) + "}" if choices else f.name.upper()
            group.add_argument(flag, help=text, metavar=meta, **words)
    return parser


def parse(argv: list[str]) -> tuple[dict[str, Any], str | None, Path | None]:
    """Command line -> (settings given, preset, YAML file).

    Raises:
        UserError: an unknown flag, with the nearest known one, or two models.
        SystemExit: help was asked for, and shown.
    """
    flags = vars(_align_parser(False).parse_args([_current_flag(word) for word in argv]))
    if flags.pop("help_all", False):
        _align_parser(True).print_help()
        raise SystemExit(0)
    preset, config = flags.pop("preset", None), flags.pop("config", None)
    model = one_model(flags.pop("positional_model", None), flags.get("model"))
    if model is not None:
        flags["model"] = model
    if "lora_parameters" in flags:
        flags["lora_parameters"] = _yaml(flags["lora_parameters"], "flag lora_parameters")
    if "coeff_grid" in flags:
        with suppress(ValueError):  # told where it is checked
            flags["coeff_grid"] = [float(c) for c in flags["coeff_grid"]]
    return flags, preset, user_path(config) if config else None
