"""What every stage of a run reads, in one frozen object, and the ways that all of them share: from prompts to answers,
and from what a stage found to what is kept of it."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import __version__
from ..recipe import HELD_OUT_TOKENS, MOST_LENGTH, Recipe, result_settings
from ..system import machines
from ..system.files import user_path
from ..system.load import Loaded
from ..system.model_files import read_header
from ..system.screen import Advance, Screen, UserError, silent
from ..system.shape import has_position_table
from ..system.store import Known, Store, fingerprint, sha256_of
from .judge import judge_hash, own_phrases, use_refusal_phrases
from .prompts import (
    FRAME_TOKENS,
    Instruction,
    Prompts,
    PromptSets,
    Rows,
    built_in_sets,
    direction_counts,
    guarding_prompt,
    prompt_sets,
    render,
    render_all,
    render_prompts,
)
from .residual import block_inputs, check_stream, last_logits, view
from .rollout import AfterThought, Completion, Sampling, answers, generate_here, set_equal_batches, stream_key
from .token_file import read_token_file

T = TypeVar("T")

REFUSAL_TOKENS = 32  # of an answer, enough to tell a refusal
READ = 4096, 32_768  # tokens of a prompt: a small model may be asked so many, and no model more than these
LEAST_READ = 64  # tokens of a prompt that a model with a table of positions must have left
TOLD_BY = 4  # tokens of an answer, enough to tell whether batches change it


@dataclass(frozen=True)
class Run:
    """Settings, the frozen base, its prompts, what is shown, and what is kept; `force` goes on past every alarm.

    `refusals` are words with which the base begins refusals and that the judge does not know: they count where
    something is chosen by what answers do, and in no score."""

    recipe: Recipe
    base: Loaded
    prompts: Prompts
    screen: Screen
    store: Store
    force: bool = False
    refusals: Sequence[str] = ()

    def answer_tokens(self, enough: int) -> int:
        """The longest answer to judge, in tokens: `enough`, or what an answer may have where thinking comes first."""
        return max(enough, self.recipe.train.longest) if self.base.thinks else enough

    def sampling(self, enough: int, temp: float = 0.0) -> Sampling:
        """How answers are drawn of which `enough` tokens tell what they do, behind the thought if there is one."""
        size, after = self.recipe.run.generation_batch_size, after_thought(self.base, enough)
        return Sampling(self.base.eos_ids, self.answer_tokens(enough), temp, batch_size=size, after=after)

    def key(self, *which: int) -> mx.array:
        """The run's random key for something that is drawn."""
        return stream_key(self.recipe.run.seed, *which)

    def answers(
        self,
        model: nn.Module,
        rows: Sequence[Sequence[int]],
        sampling: Sampling,
        stream: tuple[int, ...] = (),
        progress: Advance = silent,
    ) -> list[tuple[Completion, str]]:
        """What `model` answers to each prompt, and its text; `stream` numbers the random streams, if it is sampled."""
        keys = [self.key(*stream, i) for i in range(len(rows))] if sampling.temp else None
        return answers(model, self.base.tokenizer, rows, sampling, keys, progress)

    def once(self, find: Callable[..., T], *results: Any) -> T:
        """What a stage finds in this run from earlier results, or found before: `find_tokens` is kept as `tokens`."""
        name = find.__name__.removeprefix("find_")
        kind = inspect.signature(find).return_annotation
        return self.store.once(name, lambda: find(self, *results), kind)

    def with_settings(self, **sections: Any) -> "Run":
        """The run with sections of its recipe replaced."""
        return replace(self, recipe=replace(self.recipe, **sections))


def after_thought(base: Loaded, enough: int) -> AfterThought | None:
    """Where the answers of a model end that thinks first: `enough` tokens behind the thought; None for any other."""
    end = base.tokenizer.think_end_tokens if base.thinks else None
    return AfterThought(end, enough) if end else None


def make_run(recipe: Recipe, base: Loaded, screen: Screen, force: bool = False) -> Run:
    """Render the prompts, check how this architecture batches, open the run's folder.

    Raises:
        UserError: what a user can mend, in one sentence.
    """
    use_refusal_phrases(recipe.run.refusal_phrases)
    sets = sets_read(base, recipe, prompt_sets(recipe), screen)
    prompts = render_prompts(recipe, sets, base.tokenizer)
    for name, count in direction_counts(recipe, sets).items():
        if count < (wanted := getattr(recipe.direction, name.split("_", 1)[1])):
            screen.line(f"prompts: {name} holds {count}, and all are taken; by default it would be {wanted}")
    size = batch_size(base, recipe.run.generation_batch_size, screen, prompts.harmful_validation)
    recipe = replace(recipe, run=replace(recipe.run, generation_batch_size=size))
    parts = {name: fingerprint(part) for name, part in run_parts(recipe, base, sets).items()}
    of_all = {name: value for name, value in result_settings(recipe).items() if name != "model"}  # its weights tell
    check_alike(parts | {"settings": fingerprint(of_all)})
    folder = Path(recipe.run.adapter_path)
    store = Store(folder, parts, known_of(recipe, base, prompts))
    if other := store.other_parts():
        raise UserError(
            f"--adapter-path {folder} holds an unfinished run with other {' and other '.join(other)}; give them as "
            "they were to go on, or another folder"
        )
    return Run(recipe, base, prompts, screen, store, force)


def known_of(recipe: Recipe, base: Loaded, prompts: Prompts) -> Known:
    """What a state may hold of this model and these prompts; where no direction is looked for, one of no length."""
    inputs = block_inputs(base.model, mx.array(prompts.harmful_validation[:1]))
    one = recipe.teacher.teacher == "system_prompt"
    return {
        "token": range(base.vocabulary),
        "block": range(len(inputs)),
        "position": range(-prompts.n_eoi, 0),
        "opening": range(1, MOST_LENGTH),
        "thought": range(MOST_LENGTH),
        "candidates": {(1 if one else prompts.n_eoi, len(inputs))},
        "stream": {(1,) if one else inputs[0].shape[-1:]},
        "prompt": {tuple(row) for rows in vars(prompts).values() if isinstance(rows, list) for row in rows},
    }


def run_parts(recipe: Recipe, base: Loaded, sets: PromptSets) -> dict[str, Any]:
    """All that decides a run's result, by what a user would call it."""
    versions = {name: version(name) for name in ("mlx", "mlx-lm", "transformers")}
    versions |= {"safesteer-mlx": __version__, "judge": judge_hash()}
    parts = {"weights": base.weights_hash, "configuration, tokenizer or chat template": base.settings_hash}
    parts |= {"settings": result_settings(recipe), "prompts": asdict(sets)}
    parts |= {"versions": versions, "safety tokens": given_tokens(recipe, base), "refusal phrases": own_phrases()}
    return parts | {"adapters to begin from": given_adapters(recipe)}


def check_alike(parts: dict[str, str]) -> None:
    """Refuse a run on several machines that are not about to do the same, told by the fingerprints of its parts.

    Raises:
        UserError: on one of them, another model, other prompts, settings or versions are found than on the first.
    """
    first, *others = machines.here().gather(parts)
    for number, own in enumerate(others, start=2):
        if other := [name for name in first | own if own.get(name) != first.get(name)]:
            raise UserError(
                f"machine {number} has other {' and other '.join(other)} than the first; every machine needs the same "
                "model, files and versions (docs/several-macs.md)"
            )


def given_tokens(recipe: Recipe, base: Loaded) -> np.ndarray | None:
    """The ids in the file that `safety_tokens` names, (K,) int64; None where it is a number.

    Raises:
        UserError: the file cannot be read, or does not fit the model's vocabulary.
    """
    file = recipe.tokens.safety_tokens
    return np.array(read_token_file(Path(file), base.tokenizer, base.vocabulary)) if isinstance(file, str) else None


def given_adapters(recipe: Recipe) -> list[str]:
    """The hashes of the adapters to begin from and of the file beside them, which says their scale; none of any, or of
    those in the run's own folder, which the run writes over.

    Raises:
        UserError: the adapters cannot be read.
    """
    if recipe.train.resume_adapter_file is None:
        return []
    file = user_path(recipe.train.resume_adapter_file)
    read_header(file)
    if file.resolve().parent == Path(recipe.run.adapter_path).resolve():
        return []
    return [sha256_of(path) for path in (file, file.with_name("adapter_config.json")) if path.is_file()]


def batch_size(base: Loaded, wanted: int, screen: Screen, prompts: Rows | None = None) -> int:
    """Answers at a time, told by some prompts, the model's own or the package's if none are given: 1 where no batch is
    right.

    Raises:
        UserError: as `can_batch`.
    """
    prompts = prompts or render_all(base.tokenizer, built_in_sets(base.name).harmful_validation)
    if can_batch(base, prompts) or wanted == 1:
        return wanted
    least, alike = min(map(len, prompts)), view(base.model)
    set_equal_batches(alike)
    if batches_rightly(alike, [row[-least:] for row in prompts[:4]], base.eos_ids):
        set_equal_batches(base.model)
        screen.line("mlx-lm does not batch this architecture rightly: answers are generated in groups of one length")
        return wanted
    screen.line("mlx-lm does not batch this architecture rightly: answers are generated one at a time, slowly")
    return 1


def most_read(config: dict[str, Any], beside: int = 0) -> int:
    """Ids of a prompt at most: what the model was made for, within what a machine can read in reasonable time; where
    positions are a table, what it leaves with `beside` other ids, of the answer most of all.

    Raises:
        UserError: that is too little.
    """
    text = config.get("text_config") or config
    names = ["max_position_embeddings", "n_positions", "n_ctx"]
    table = has_position_table(text)
    numbers = (text.get(name) for name in (names[1:] if table else names))
    made_for = next((number for number in numbers if type(number) is int), None)
    if made_for is None:
        return READ[1]
    if not table:
        return min(max(made_for, READ[0]), READ[1])
    if made_for - beside < LEAST_READ:
        raise UserError(
            f"model_type {text['model_type']} has {made_for:,} positions, of which an answer and what stands around a "
            f"prompt may take {beside:,}; choose another model, or lower --max-tokens"
        )
    return min(made_for - beside, READ[1])


def beside_a_prompt(recipe: Recipe, base: Loaded) -> int:
    """Tokens that a run may put beside a prompt: a frame, the teacher's system prompt, and the answer."""
    guard = base.tokenizer.encode(guarding_prompt(recipe) or "", add_special_tokens=False)
    return FRAME_TOKENS + len(guard) + max(recipe.train.longest, HELD_OUT_TOKENS)


def not_too_long(
    base: Loaded, name: str, items: list[Instruction], screen: Screen, beside: int = 0
) -> list[Instruction]:
    """The prompts of a set that are read, of no more than `most_read` tokens; how many are not is said.

    Raises:
        UserError: none of them is, or as `most_read`.
    """
    most = most_read(base.config, beside)
    # A token is a byte at least, so that hardly any prompt need be rendered for this.
    fit = [i for i in items if len(i.text.encode()) < most / 2 or len(render(base.tokenizer, i.text)) <= most]
    if items and not fit:
        raise UserError(f"every prompt of {name} is longer than the {most:,} tokens that are read; give others")
    if len(fit) < len(items):
        screen.line(f"{name}: {len(items) - len(fit)} prompts are longer than {most:,} tokens and are left out")
    return fit


def sets_read(base: Loaded, recipe: Recipe, sets: PromptSets, screen: Screen) -> PromptSets:
    """A run's sets, as far as they are read; a UserError as `not_too_long`."""
    beside = beside_a_prompt(recipe, base)
    return PromptSets(**{name: not_too_long(base, name, items, screen, beside) for name, items in vars(sets).items()})


def can_batch(base: Loaded, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether answers can be generated in batches, told by the shortest and the longest of some prompts: in some
    architectures of mlx-lm prompts of unequal length fail side by side, or change each other's answers.

    Raises:
        UserError: padding changes the forward pass itself, or blocks cannot be read and steered.
    """
    ordered = sorted(prompts, key=len)
    rows = [list(row) for row in ordered[:4] + ordered[-4:]]
    check_stream(base.model, mx.array(rows[:1]))
    together = last_logits(base.model, rows)
    alone = mx.concatenate([last_logits(base.model, [row]) for row in rows])
    if not mx.allclose(together, alone, rtol=0.05, atol=0.05 * mx.abs(alone).max().item()):
        kind = base.config.get("model_type")
        raise UserError(
            f"padding changes what model_type {kind} computes, so prompts of unequal length cannot be read together; "
            "choose another model"
        )
    return batches_rightly(base.model, [*rows[:2], *rows[-2:]], base.eos_ids)


def batches_rightly(model: nn.Module, rows: Sequence[Sequence[int]], eos_ids: Sequence[int]) -> bool:
    """Whether answers to prompts of unequal length begin side by side as they do alone."""
    few = Sampling(eos_ids, TOLD_BY)
    try:
        together = generate_here(model, rows, few)
    except UserError:  # of memory, not of how batches work
        raise
    except (ValueError, RuntimeError, AttributeError, TypeError, IndexError):
        return False
    alone = [generate_here(model, [row], replace(few, batch_size=1))[0] for row in rows]
    near_ties = 0 if model(mx.array([list(rows[0])])).dtype == mx.float32 else 1  # that half precision may turn
    return sum(a.ids != b.ids for a, b in zip(together, alone, strict=True)) <= near_ties
