"""How the model itself answers today, read off its answers to the direction's prompts: with what tokens its refusals
begin, or how it thinks before them, and in what words it refuses that the judge does not know (method page, 1).
"""

import time
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np

from ..recipe import HELD_OUT_TOKENS, ROOMS, DirectionSettings, Recipe
from ..system import machines
from ..system.load import Loaded
from ..system.screen import Advance, Screen, UserError, silent
from ..system.store import TokenId
from . import rollout
from .judge import HARDLY_ELSE, PERHAPS, go_on_as_refusals, in_other_words, is_refusal, unknown_refusals
from .prompts import Instruction, Rows, built_in_sets, opener_ids, render_all
from .rollout import Completion, Ids, Sampling, stream_key
from .run import REFUSAL_TOKENS, Run, after_thought, batch_size

LEANS = 1.5  # as many times: with which a thought may go either way, and goes to a refusal oftener
CUT = 0.25  # of the answers that may be cut while they think
TOLD_BY_OPENERS = 1 / 16  # of the refusals: where fewer begin with a token that tells, first tokens tell nothing
REFUSED = 1 / 16  # of the harmful prompts: where fewer are refused, refusals are few
COMMON = 1 / 16  # of the answers that do not refuse, begun with one token
ROUNDS = 4  # answers to each prompt, where some may refuse in words that the judge does not know
PROBES, PROBE_TOKENS = 8, 16  # answers, and tokens of each, that tell whether a model begins to think
PROBE_BATCH = 4  # answers at a time that tell how long it thinks


@dataclass(frozen=True)
class Thoughts:
    """How a model thinks before it answers, which begins alike for all prompts: in how many tokens, by the median; the
    tokens that come oftener before refusals; those that come before refusals alone and are the first that tell; harmful
    and harmless prompts with so much of the thought as tells nothing yet; and how many tokens of thoughts that is, by
    the median. `alike` are answers of a model that does not think, if they begin alike all the same. Of no `length`, if
    their first tokens tell."""

    length: Annotated[int, "thought"] = 0
    telling: list[TokenId] = field(default_factory=list)
    first: list[TokenId] = field(default_factory=list)
    undecided: list[list[list[TokenId]]] = field(default_factory=list)
    turns_at: Annotated[int, "thought"] = 0
    alike: bool = False


NONE = Thoughts()


@dataclass(frozen=True)
class OwnAnswers:
    """How the model answers the direction's prompts today: which harmful and harmless ones it refuses, the first tokens
    of refusals, its thoughts, what speaks against all that, in sentences, and with what words it begins refusals that
    the judge does not know."""

    openers: dict[str, int]
    harmful_refused: list[bool]
    harmless_refused: list[bool]
    thoughts: Thoughts = NONE
    cautions: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


def find_openers(run: Run) -> OwnAnswers:
    """First tokens of refusals: the recipe's texts, and those that the model itself begins its refusals with.

    Read off answers at temperature 1: the likeliest of many openers would hide the others. None, where refusals begin
    as other answers do, of a vocabulary of bytes most of all.

    Raises:
        UserError: none of the texts is a token of this model, and it refuses nothing.
    """
    rows = [*run.prompts.harmful_direction_train, *run.prompts.harmless_direction_train]
    n = len(run.prompts.harmful_direction_train)
    with run.screen.stage("reading how the model refuses") as advance:
        answers = run.answers(run.base.model, rows, run.sampling(REFUSAL_TOKENS, temp=1.0), (4,), advance)
    also, cautions = _in_other_words(run, rows, [text for _, text in answers])
    refusals = [is_refusal(text, also) for _, text in answers]
    share = f"{sum(refusals[:n])} of {n} harmful prompts are refused"
    refused = refusals[:n], refusals[n:]
    if run.base.thinks and (thoughts := _lengths(run.base.tokenizer, answers)):
        run.screen.line(f"the model thinks first; {share}")
        ended = [i for i, (completion, text) in enumerate(answers) if completion.finished or text]
        _check_thoughts(len(answers) - len(ended), len(answers), run.recipe.train.longest, run.force, run.screen)
        ended = ended or [*range(len(answers))]
        ids = [answers[i][0].ids for i in ended]
        n_harmful = sum(i < n for i in ended)
        told = read_thoughts(
            [rows[i] for i in ended], ids, [refusals[i] for i in ended], n_harmful, int(np.median(thoughts))
        )
        return OwnAnswers({}, *refused, told, cautions, also)
    ids = [completion.ids for completion, _ in answers]
    openers = _own_openers(run, ids, refusals, n)
    if openers is None:
        alike = replace(read_thoughts(rows, ids, refusals, n, REFUSAL_TOKENS), alike=True)
        run.screen.detail(f"refusals begin as other answers do, for {alike.turns_at} tokens; {share}")
        return OwnAnswers({}, *refused, alike, cautions, also)
    run.screen.detail(f"openers: {', '.join(repr(text) for text in openers) or 'none'}; {share}")
    return OwnAnswers(openers, *refused, cautions=cautions, refusals=also)


def _in_other_words(run: Run, rows: Rows, texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """With what words the model begins refusals that the judge does not know; and what is told of them, or if nobody
    can tell, of those that may refuse.

    Where there may be some, more answers are drawn: who refuses in many ways says none of them often."""
    n, began = len(run.prompts.harmful_direction_train), time.monotonic()
    if not unknown_refusals(texts[:n], texts[n:], chance=PERHAPS):
        return [], []
    with run.screen.stage("reading in what other words it may refuse") as advance:  # the same answers first, but longer
        more = [*rows[:n] * ROUNDS, *rows[n:] * ROUNDS]
        longer = run.answers(run.base.model, more, run.sampling(2 * REFUSAL_TOKENS, temp=1.0), (4,), advance)
    run.screen.pace.more(time.monotonic() - began)
    harmful, harmless = ([text for _, text in part] for part in (longer[: n * ROUNDS], longer[n * ROUNDS :]))
    unknown = unknown_refusals(harmful, harmless)
    refusing = go_on_as_refusals(unknown, harmful)
    perhaps = [*unknown] if refusing is None else refusing
    if not perhaps:
        return [], []
    some = f"{sum(unknown[words] for words in perhaps)} of {len(harmful)} answers to harmful requests "
    return refusing or [], [some + in_other_words(perhaps, run.recipe.run.transcripts, bool(refusing))]


def alike_for(run: Run, rows: Rows, answers: Sequence[Ids], refusals: Sequence[bool], n_harmful: int) -> int:
    """For how many tokens refusals begin as other answers do, by a few of them; 0 where their first tokens tell."""
    if not any(refusals[:n_harmful]) or _own_openers(run, answers, refusals, n_harmful) is not None:
        return 0
    return read_thoughts(rows, answers, refusals, n_harmful, REFUSAL_TOKENS).turns_at


def _own_openers(run: Run, answers: Sequence[Ids], refusals: Sequence[bool], n_harmful: int) -> dict[str, int] | None:
    """The recipe's texts and the tokens that tell a refusal, with their ids; None where hardly a refusal begins so.

    Of the recipe's own texts, those with which this model begins other answers are left out. Of few refusals, shares
    are compared, as there are so many more of the others; and what opens many of those must open more of them.

    Raises:
        UserError: as `find_openers`.
    """
    openings = [{*answer[:1]} for answer in answers]
    in_refusals, in_others = _counts(openings, refusals, n_harmful)
    n_refusals, n_others = sum(refusals[:n_harmful]), max(1, len(refusals) - sum(refusals))
    few = n_refusals < REFUSED * n_harmful

    def is_own(token: int) -> bool:
        if not few:
            return in_others[token] <= max(1, in_refusals[token])
        expected = in_others[token] * n_refusals / n_others
        if in_others[token] > COMMON * n_others:
            return in_refusals[token] > expected
        return expected <= max(1, in_refusals[token])

    prefixes = run.recipe.direction.refusal_prefixes
    openers = opener_ids(run.base.tokenizer, prefixes)
    if not (openers or any(refusals)):
        raise UserError(
            "no refusal opener is a token of this model; give --refusal-prefixes texts that its refusals begin with"
        )
    if built_in := prefixes == DirectionSettings().refusal_prefixes:  # not the user's own, who knows the model
        openers = {text: token for text, token in openers.items() if is_own(token)}
    for token in _telling(openings, refusals, n_harmful):
        openers.setdefault(run.base.tokenizer.decode([token]), token)
    covered = sum(in_refusals[token] for token in {*openers.values()})
    return None if built_in and not few and covered < TOLD_BY_OPENERS * n_refusals else openers


def _check_thoughts(cut: int, total: int, most: int, force: bool, screen: Screen) -> None:
    """Stop where many thoughts do not end, so that nobody knows what the answers would be."""
    if cut <= CUT * total:
        return
    fault = f"{cut} of {total} answers were still thinking after {most} tokens, so that what they do cannot be told"
    if not force:
        raise UserError(f"{fault}; give --max-tokens {4 * most}, or --thinking off where the template can (or --force)")
    screen.line(fault)


def _counts(
    openings: Sequence[Set[int]], refusals: Sequence[bool], n_harmful: int
) -> tuple[Counter[int], Counter[int]]:
    """How many refusals of harmful prompts, the first ones, have each token in their opening, and how many answers."""
    pairs = list(zip(openings, refusals, strict=True))
    in_refusals = Counter(token for tokens, refusal in pairs[:n_harmful] if refusal for token in tokens)
    return in_refusals, Counter(token for tokens, refusal in pairs if not refusal for token in tokens)


def _telling(
    openings: Sequence[Set[int]], refusals: Sequence[bool], n_harmful: int, oftener: float = HARDLY_ELSE
) -> list[int]:
    """The tokens that one refusal in fifty opens with, two at least, and so many times as often as other answers, the
    commonest first."""
    in_refusals, in_others = _counts(openings, refusals, n_harmful)
    n_refusals, n_others = sum(refusals[:n_harmful]), len(refusals) - sum(refusals)
    return [
        token
        for token, count in in_refusals.most_common()
        if count >= max(2, n_refusals / 50) and in_others[token] / max(1, n_others) <= count / n_refusals / oftener
    ]


def read_thoughts(
    prompts: Rows, answers: Sequence[Ids], refusals: Sequence[bool], n_harmful: int, length: int
) -> Thoughts:
    """What the first `length` tokens of answers tell, of which the first `n_harmful` are to harmful prompts."""
    length = max(1, length)
    # What is in the prompt is only taken up.
    words = [{*answer[:length]} - {*prompt} for prompt, answer in zip(prompts, answers, strict=True)]
    sure, first = _telling(words, refusals, n_harmful), set[int]()
    others = _telling(words, [not refusal for refusal in refusals], n_harmful)
    undecided: list[list[list[int]]] = [[], []]
    places: list[int] = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tells = words[i] & {*sure, *others}
        place = next((at for at, token in enumerate(answer[:length]) if token in tells), length - 1)
        first.update(answer[place : place + 1])
        places.append(place)
        undecided[i >= n_harmful].append([*prompt, *answer[:place]])
    leaning = _telling(words, refusals, n_harmful, LEANS)
    return Thoughts(length, leaning, sorted(first & {*sure}), undecided, int(np.median(places)))


def _lengths(tokenizer: Any, answers: Sequence[tuple[Completion, str]]) -> list[int]:
    """How many tokens were thought before each answer, or until the length ran out; none for a model that could think
    and mostly does not."""
    thoughts = _thoughts(tokenizer, answers)
    return thoughts if 2 * len(thoughts) > len(answers) else []


def _thoughts(tokenizer: Any, answers: Sequence[tuple[Completion, str]]) -> list[int]:
    """How many tokens were thought before those of the answers that were thought about, or until the length ran out."""
    ends = [tokenizer.rfind_think_end(completion.ids) for completion, _ in answers]
    pairs = zip(answers, ends, strict=True)
    return [len(c.ids) if end < 0 else end for (c, text), end in pairs if end >= 0 or not text]


def as_it_begins(base: Loaded, seed: int) -> Loaded:
    """A model that could think first and begins none of a few answers with a thought, as one that cannot: else 256
    answers would be waited for as long as a thought may be, before it is told."""
    if not base.thinks:
        return base
    prompts = built_in_sets(base.name).harmless_validation[:PROBES]
    sampling = Sampling(base.eos_ids, PROBE_TOKENS, 1.0, batch_size=1)  # how batches work here is not known yet
    probes = _asked(base, prompts, sampling, seed, 17)
    return base if _thoughts(base.tokenizer, probes) else replace(base, thinks=False)


def with_room_to_think(recipe: Recipe, base: Loaded, screen: Screen, force: bool = False) -> Recipe:
    """The recipe with `max_tokens` as given, or 512; where nearly all of a few thoughts and the answers behind them
    need more, the first of `ROOMS` that has room for them. Memory and time are planned for so many.

    Raises:
        UserError: many thoughts do not end in the last of these, without `force`.
    """
    if recipe.train.max_tokens is not None:
        return recipe
    most = ROOMS[0]
    if base.thinks:
        sets = built_in_sets(base.name)
        prompts = [*sets.harmful_validation[: PROBES // 2], *sets.harmless_validation[: PROBES // 2]]
        # Memory is not planned yet, so few are asked at a time.
        size = batch_size(base, PROBE_BATCH, Screen(quiet=True))
        sampling = Sampling(base.eos_ids, ROOMS[-1], 1.0, batch_size=size, after=after_thought(base, REFUSAL_TOKENS))
        with screen.stage("seeing how long the model thinks") as advance:
            probes = _asked(base, prompts, sampling, recipe.run.seed, 18, advance)
        unended = sum(not completion.finished and not text for completion, text in probes)
        _check_thoughts(unended, len(probes), ROOMS[-1], force, screen)
        lengths, longer = sorted(_thoughts(base.tokenizer, probes)), len(probes) // 8
        needed = lengths[-1 - longer] + HELD_OUT_TOKENS if len(lengths) > longer else 0
        most = machines.here().share(next((length for length in ROOMS if length >= needed), ROOMS[-1]))
        if most > ROOMS[0]:
            screen.line(f"the model thinks for {int(np.median(lengths)):,} tokens or so: an answer may take {most:,}")
    return replace(recipe, train=replace(recipe.train, max_tokens=most))


def _asked(
    base: Loaded, prompts: Sequence[Instruction], sampling: Sampling, seed: int, stream: int, advance: Advance = silent
) -> list[tuple[Completion, str]]:
    """What the base answers, before there is a run."""
    rows = render_all(base.tokenizer, prompts)
    keys = [stream_key(seed, stream, i) for i in range(len(rows))]
    return rollout.answers(base.model, base.tokenizer, rows, sampling, keys, advance)
