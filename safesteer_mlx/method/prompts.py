"""Instructions and how they become token ids: one user turn in the model's own chat template.

One rendering serves direction, token selection, training and evaluation (method page, section 0).
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..recipe import PACKAGE, DirectionSettings, Recipe
from ..system.files import parse_json, read_bytes, user_path
from ..system.hub import dataset_file
from ..system.screen import UserError

Rows = list[list[int]]

KINDS = (".jsonl", ".json", ".txt")
ALIKE = 0.75  # names from which on one is taken for the other misspelt (harmful.jsonl, harmless_tests.jsonl)
TODAY = datetime(2026, 1, 1)  # for every template that asks

VALIDATION_PROMPTS = 64, 32  # harmful and harmless ones that teachers are asked, at most
CHARACTERS_A_TOKEN, TEMPLATE_TOKENS, FRAME_TOKENS = 3, 40, 100  # upper estimates, before there is a tokenizer

# Two instructions that share no last token; what follows them in a rendering is the template's own.
_PROBES = ("a", "Why is it 7?", "Name one blue thing")


@dataclass(frozen=True)
class Instruction:
    """What a user asks. `answer` is the expected one where exact match decides, else empty."""

    text: str
    category: str = ""
    answer: str = ""


@dataclass(frozen=True)
class PromptSets:
    """Every set of instructions that a run uses; none overlaps another."""

    harmful_direction_train: list[Instruction]
    harmful_direction_validation: list[Instruction]
    harmful_train: list[Instruction]
    harmful_validation: list[Instruction]
    harmful_test: list[Instruction]
    harmless_direction_train: list[Instruction]
    harmless_direction_validation: list[Instruction]
    harmless_train: list[Instruction]
    harmless_validation: list[Instruction]
    harmless_test: list[Instruction]
    borderline_test: list[Instruction]
    capability_test: list[Instruction]


SETS = tuple(PromptSets.__dataclass_fields__)
# What a run decides by: of fewer prompts than these a mean, a rate or a choice says nothing.
DECIDES = [name for name in SETS if name.endswith(("_direction_train", "_validation"))]
LEAST = 8

Located = list[tuple[str, Instruction]]  # each with the file and line that it stands in


def own_prompts(model: str) -> Path | None:
    """The `data/` folder of a model's folder, if it holds prompts of the model's own, as the bundled one's does."""
    folder = user_path(model) / "data"
    return folder if any((folder / f"{name}.jsonl").is_file() for name in SETS) else None


def built_in_sets(model: str) -> PromptSets:
    """The prompts that a model's folder brings with it, else the package's."""
    return load_prompt_sets(own_prompts(model) or PACKAGE / "data")


def load_prompt_sets(folder: Path) -> PromptSets:
    """The sets of a folder that holds one JSONL file a set, named after it.

    Raises:
        UserError: a set has no file, or one that cannot be read.
    """
    if missing := [name for name in SETS if not (folder / f"{name}.jsonl").is_file()]:
        raise UserError(f"{folder} holds prompts, but no {missing[0]}.jsonl; add it, or take the others out")
    return PromptSets(**{name: load_instructions(folder / f"{name}.jsonl") for name in SETS})


def _instruction(item: Any, where: str) -> Instruction:
    if isinstance(item, str):
        item = {"instruction": item}
    if not isinstance(item, dict):
        raise UserError(f"{where} is a {type(item).__name__}; a prompt is a text or an object with 'instruction'")
    text = item.get("instruction", item.get("prompt"))
    if text is None and isinstance(item.get("messages"), list):
        turns = [m.get("content") for m in item["messages"] if isinstance(m, dict) and m.get("role") == "user"]
        text = turns[0] if turns else None
    if text is None:
        text = item.get("text")
    if not isinstance(text, str) or not text.strip():
        keys = ", ".join(repr(str(key)[:40]) for key in list(item)[:5]) or "nothing"
        raise UserError(
            f"{where} holds no prompt but {keys}; give each one a non-empty 'instruction' (or prompt, messages, text)"
        )
    if bad := next((ch for ch in text if ch == "\0" or "\ud800" <= ch <= "\udfff"), None):
        character = "a NUL character" if bad == "\0" else "half a character (a lone surrogate)"
        raise UserError(f"{where} holds {character}; save it as UTF-8 text, or take that prompt out")
    return Instruction(text, str(item.get("category", "")), "" if item.get("answer") is None else str(item["answer"]))


def given_files(data: str | None) -> dict[str, Path]:
    """The sets that `--data` gives, by name, and the file of each: those that a folder holds by name, else
    `harmful_train` alone, from a file, the train.jsonl of a folder, or a data set of the Hub (not fetched here).

    Raises:
        UserError: a file that is nearly named after a set, or two files for one.
    """
    if data is None:
        return {}
    path = user_path(data)
    if not path.is_dir():
        return {"harmful_train": path}
    try:
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    given = {}
    for file in files:
        if file.stem in SETS and file.suffix == ".jsonl":
            given[file.stem] = file
        # A set that is not found by its name would leave ours in its place, in silence.
        elif file.suffix.lower() in KINDS and (close := difflib.get_close_matches(file.stem.lower(), SETS, 1, ALIKE)):
            raise UserError(f"{file} is no set of prompts; did you mean {close[0]}.jsonl? Rename it, or take it away")
    train = path / "train.jsonl"
    if "harmful_train" in given and train.is_file():
        raise UserError(f"{path} holds train.jsonl and harmful_train.jsonl, which are one set; keep one of them")
    if not given or train.is_file():
        given["harmful_train"] = train
    return given


def load_data(data: str | None) -> dict[str, Located]:
    """The sets that `--data` gives, by name.

    Raises:
        UserError: as `given_files`, a file that cannot be had or read, or a little task without its answer.
    """
    fetched = data is not None and data.startswith("hf://")
    files = {"harmful_train": dataset_file(str(data))} if fetched else given_files(data)
    given = {name: _located(path) for name, path in files.items()}
    for where, item in given.get("capability_test", []):
        if not item.answer.strip():
            raise UserError(f"{where} has no 'answer'; give the text that a right answer to this little task ends with")
    return given


def load_instructions(path: Path) -> list[Instruction]:
    """Instructions from .jsonl, .json (a list), .txt (one a line), or the train.jsonl of an mlx-lm data folder.

    Raises:
        UserError: the file is missing, empty, of another kind, or malformed; the line is named.
    """
    return [item for _, item in _located(path)]


def _located(path: Path) -> Located:
    text = _text(path := path / "train.jsonl" if path.is_dir() else path)
    if path.suffix == ".json":
        items = _json(text, str(path))
        if not isinstance(items, list):
            raise UserError(f"{path} holds a {type(items).__name__}; a .json prompt file is a list")
        located = [(where := f"{path} item {i + 1}", _instruction(item, where)) for i, item in enumerate(items)]
    else:
        located = []
        for number, line in enumerate(text.split("\n"), 1):
            if line := line.strip():
                where = f"{path} line {number}"
                located.append((where, _instruction(_json(line, where) if path.suffix == ".jsonl" else line, where)))
    if not located:
        raise UserError(f"{path} holds no prompts; put at least one in it")
    return located


def _text(path: Path) -> str:
    if not path.exists():
        raise UserError(
            f"{path} does not exist; --data takes a .jsonl, .json or .txt file, an mlx-lm data folder, or a folder of "
            "prompt sets by name (harmful_train.jsonl, harmless_test.jsonl, …)"
        )
    if path.suffix not in KINDS:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}; --data takes .jsonl, .json, .txt or a folder")
    content = read_bytes(path, str(path), "give a file of prompts")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16 text; save it as UTF-8")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line} is not UTF-8 text; save the file as UTF-8") from None


def _json(text: str, where: str) -> Any:
    """The value in a JSON text; a text of many lines names its own."""
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        line = "" if " line " in where else f" line {error.lineno}"
        raise UserError(f"{where}{line} is not JSON ({error.msg}); mend that line") from None
    except ValueError:  # ten thousand brackets, or a number of ten thousand digits
        raise UserError(f"{where} is JSON nested too deep or with too long a number; mend it") from None


def render(tokenizer: Any, instruction: str, system: str | None = None) -> list[int]:
    """The ids of one user turn and the assistant's header, in the model's own chat template.

    Raises:
        UserError: a system turn for a template that refuses one.
    """
    turns = [{"role": "user", "content": instruction}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    return render_turns(tokenizer, turns)


def render_turns(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    """The ids of a conversation that ends with a user turn, and the assistant's header.

    Raises:
        UserError: the template refuses such a conversation.
    """
    with _dated():
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True))


@contextmanager
def _dated() -> Iterator[None]:
    """It is `TODAY` for chat templates: Llama 3.2, Mistral Small, SmolLM3 and gpt-oss write today's date, and a run
    would go on with other prompts tomorrow."""
    from transformers.utils import chat_template_utils

    # A function given to the template would reach it as a text since transformers 5.23.
    module: Any = chat_template_utils
    own, module.datetime = module.datetime, _Today
    try:
        yield
    finally:
        module.datetime = own


class _Today(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return TODAY


def render_all(tokenizer: Any, instructions: Sequence[Instruction], system: str | None = None) -> list[list[int]]:
    """`render` for each."""
    return [render(tokenizer, item.text, system) for item in instructions]


def end_of_instruction(tokenizer: Any) -> list[int]:
    """The template's ids after the instruction's last one: the longest suffix all renderings share."""
    rows = [render(tokenizer, probe) for probe in _PROBES]
    n = 0
    while n < min(map(len, rows)) and len({row[-n - 1] for row in rows}) == 1:
        n += 1
    if not n:
        raise UserError("the chat template adds nothing after an instruction; SafeSteer needs one with a model turn")
    return rows[0][-n:]


def opening_ids(tokenizer: Any, request: str, opening: str) -> list[int]:
    """The ids of an answer's opening, as the tokenizer writes it behind the header of an answer to this request; none
    where it would join it to the header."""
    turns = [{"role": "user", "content": request}]
    header = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    before, both = (tokenizer.encode(text, add_special_tokens=False) for text in (header, header + opening))
    return both[len(before) :] if both[: len(before)] == before else []


def opener_ids(tokenizer: Any, openers: Sequence[str]) -> dict[str, int]:
    """The first token of an answer that begins with each opener, as this tokenizer writes it there."""
    return {opener: ids[0] for opener in openers if (ids := opening_ids(tokenizer, _PROBES[1], opener))}


def special_ids(tokenizer: Any, vocabulary: int) -> list[int]:
    """Ids that no answer's text holds: special and added tokens, any `<|…|>` piece, ids beyond the tokenizer."""
    pieces = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    special |= {i for piece, i in pieces.items() if "<|" in piece}
    special |= set(range(vocabulary)) - set(pieces.values())
    return sorted(i for i in special if i < vocabulary)


@dataclass(frozen=True)
class Prompts:
    """A run's prompts: the sets, and those of stages 1 to 3 as ids, sampled with the run's seed where a stage takes
    fewer than there are."""

    sets: PromptSets
    n_eoi: int  # P, ids of the template after an instruction
    harmful_direction_train: Rows
    harmless_direction_train: Rows
    harmful_direction_validation: Rows
    harmless_direction_validation: Rows
    harmful_direction_validation_guarded: Rows  # the same under the teacher's system prompt, if it has one
    harmful_validation: Rows
    harmless_validation: Rows
    harmful_validation_guarded: Rows
    harmless_validation_guarded: Rows


def prompt_sets(recipe: Recipe) -> PromptSets:
    """The prompts of a run: as `sets_for`."""
    return sets_for(recipe.run.model, recipe.run.data)


def sets_for(model: str, data: str | None) -> PromptSets:
    """The model's own prompts, if its folder brings some, else the package's, with the sets of `--data` in their place.

    Raises:
        UserError: a set cannot be read, or a prompt of `--data` is in two sets that must not share one.
    """
    given = load_data(data)
    sets = replace(built_in_sets(model), **{name: [item for _, item in own] for name, own in given.items()})
    _check_overlap(sets, given)
    return sets


def sets_to_score(model: str, data: str | None) -> PromptSets:
    """As `sets_for`, where nothing is trained: `--data` is then a folder with test sets.

    Raises:
        UserError: it is not, or as `sets_for`.
    """
    if data is not None and not any(name.endswith("_test") for name in given_files(data)):
        raise UserError(f"--data {data} is no folder that holds a test set (harmful_test.jsonl, …); give one")
    return sets_for(model, data)


def _check_overlap(sets: PromptSets, given: dict[str, Located]) -> None:
    """Refuse a prompt of `given` that stands in another set too, which must not hold it.

    Raises:
        UserError: there is one.
    """
    at = {name: {_same(item.text): i for i, item in reversed([*enumerate(own)])} for name, own in vars(sets).items()}
    for name, own in given.items():
        for other in SETS:
            reason, shared = _apart(name, other), at[name].keys() & at[other].keys()
            if reason is None or not shared:
                continue
            text = min(shared, key=at[name].__getitem__)  # the first of them
            where, there, remedy = own[at[name][text]][0], "built in", f"{name}, or give your own {other}.jsonl"
            if other in given:
                there, remedy = given[other][at[other][text]][0], "one of them"
            raise UserError(
                f"{name} and {other} share a prompt ({where}; {there}), but {reason}; take it out of {remedy}"
            )


def _same(text: str) -> str:
    """What two spellings of one instruction share: letters whatever their case, words whatever is between them."""
    return " ".join(text.casefold().split())


def _apart(one: str, other: str) -> str | None:
    """Why two sets must not share a prompt; None if they may."""
    if one.endswith("_test") != other.endswith("_test"):
        return "what a model is scored on must be new to it"
    if one.startswith("harmful_") != other.startswith("harmful_"):
        return "one set is to be refused and the other answered"
    return None


def prompts_from(recipe: Recipe) -> str:
    """Where the prompts come from, in words."""
    run, given = recipe.run, given_files(recipe.run.data)
    beside = run.reuse_direction_prompts and "harmful_train" in given
    return sources(run.model, run.data, given) + (" and the direction's" if beside else "")


def sources(model: str, data: str | None, given: Iterable[str]) -> str:
    """Where prompts come from, in words, if `data` gave these sets; those of training stand last."""
    own = own_prompts(model)
    source = "the built-in ones" if own is None else f"the model's own, {own}"
    names = list(given)
    if others := ", ".join(name for name in names if name != "harmful_train"):
        source += f"; from {data} {others}"
    return f"{source}; harmful training prompts from {data}" if "harmful_train" in names else source


def template_tokens(tokenizer: Any) -> int:
    """How many tokens a chat template puts around an instruction, a system turn of its own among them; no fewer than
    are estimated without it, and of these alone a prompt's length counts."""
    return max(TEMPLATE_TOKENS, len(render(tokenizer, _PROBES[0])) - 1)


def longest_prompt(recipe: Recipe, template: int = TEMPLATE_TOKENS) -> int:
    """Tokens of the longest prompt of the run with its template, estimated; of sets that are only trained on, none is
    longer than is allowed there."""
    sets = vars(prompt_sets(recipe))
    around = template + (FRAME_TOKENS if recipe.train.prefill_ratio or recipe.train.wrap_ratio else 0)
    longest = {name: max(len(item.text) for item in items) // CHARACTERS_A_TOKEN for name, items in sets.items()}
    most = {name: recipe.train.max_prompt_length for name in ("harmful_train", "harmless_train")}
    return max(min(own + around, most.get(name, own + around)) for name, own in longest.items())


def direction_counts(recipe: Recipe, sets: PromptSets) -> dict[str, int]:
    """How many prompts of each of the direction's sets the run draws: as many as the settings ask for, or all of a
    set of `--data` that holds fewer, if nobody set the number.

    Raises:
        UserError: a set holds too few.
    """
    given, settings, usual = given_files(recipe.run.data), recipe.direction, DirectionSettings()
    counts = {}
    for name in DECIDES:
        there, split = len(getattr(sets, name)), name.split("_", 1)[1]
        if name in given and there < LEAST:
            raise UserError(f"{given[name]} holds {there} prompts, and a run decides by it; put at least {LEAST} in it")
        if not split.startswith("direction_"):
            continue
        counts[name] = count = getattr(settings, split)
        if there < count and name in given and count == getattr(usual, split):
            counts[name] = there
        elif there < count:
            raise UserError(f"{name} holds {there} prompts, {count} are needed; lower the setting or add prompts")
    return counts


def render_prompts(recipe: Recipe, sets: PromptSets, tokenizer: Any) -> Prompts:
    """Sample and render the prompts of stages 1 to 3.

    Raises:
        UserError: a set holds fewer prompts than the settings ask for.
    """
    n_eoi = len(end_of_instruction(tokenizer))  # first: a template that is unfit is told before all else
    counts, guard = direction_counts(recipe, sets), guarding_prompt(recipe)

    def sample(name: str, which: int) -> list[Instruction]:
        items = getattr(sets, name)
        indices = np.random.default_rng([recipe.run.seed, which]).permutation(len(items))[: counts[name]]
        return [items[i] for i in sorted(indices)]

    render_each = partial(render_all, tokenizer)
    scoring = sample("harmful_direction_validation", 2)
    return Prompts(
        sets=sets,
        n_eoi=n_eoi,
        harmful_direction_train=render_each(sample("harmful_direction_train", 0)),
        harmless_direction_train=render_each(sample("harmless_direction_train", 1)),
        harmful_direction_validation=render_each(scoring),
        harmless_direction_validation=render_each(sample("harmless_direction_validation", 3)),
        harmful_direction_validation_guarded=render_each(scoring, guard) if guard else [],
        harmful_validation=render_each(sets.harmful_validation),
        harmless_validation=render_each(sets.harmless_validation),
        harmful_validation_guarded=render_each(sets.harmful_validation, guard) if guard else [],
        harmless_validation_guarded=render_each(sets.harmless_validation, guard) if guard else [],
    )


def guarding_prompt(recipe: Recipe) -> str | None:
    """The system prompt that makes the teacher, if one does."""
    return recipe.teacher.system_prompt if recipe.teacher.teacher == "system_prompt" else None


def instructions_to_train_on(recipe: Recipe, sets: PromptSets, harmful: bool) -> list[Instruction]:
    """Those of one kind, the direction's after the others."""
    own = sets.harmful_train if harmful else sets.harmless_train
    more = sets.harmful_direction_train if harmful else sets.harmless_direction_train
    return [*own, *more] if recipe.run.reuse_direction_prompts else own
