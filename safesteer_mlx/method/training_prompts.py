"""The prompts that a student answers while it trains, as it reads them and as its target does."""

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np

from ..system.screen import UserError
from ..system.store import TokenId
from .framing import LONGEST, Framer, begun, takes_system_turn
from .judge import outcome
from .prompts import TEMPLATE_TOKENS, guarding_prompt, instructions_to_train_on, render, template_tokens
from .run import Run


@dataclass(frozen=True)
class TrainingPrompt:
    """A prompt as the student reads it and as its target does; `harmful` says which target.

    `text` is the instruction. `plain` is a harmful prompt as it is, which the base reads, where the student alone reads
    it in a frame or with its answer begun; None for what base and student read alike.
    """

    ids: list[int]
    target_ids: list[int]
    harmful: bool
    text: str = ""
    plain: list[int] | None = None

    @property
    def framed(self) -> bool:
        """Whether the student alone reads it in a frame or with its answer begun, not teacher and base."""
        return self.plain is not None

    def put(self, framer: Framer, rng: np.random.Generator) -> "TrainingPrompt":
        """The prompt with its answer begun, or in a frame, or as it is."""
        if (opening := framer.opening(self.text, rng)) is not None:
            ids = begun(framer.tokenizer, self.ids, opening)
        elif (ids := framer.frame(self.text, rng)) is None:
            return self
        plain = self.ids if self.harmful else None
        return replace(self, ids=ids, target_ids=self.target_ids if self.harmful else ids, plain=plain)


def training_prompts(run: Run) -> tuple[list[TrainingPrompt], list[TrainingPrompt]]:
    """Harmful and anchor prompts as student and target read them; those given twice and those over the length
    are left out, and said.

    Ours: the direction's prompts are among them. The more there are of either kind, the finer the line between them.

    Raises:
        UserError: no harmful prompt is short enough, or no harmless one where there is to be an anchor.
    """
    recipe, base, sets = run.recipe, run.base, run.prompts.sets
    limit, guard = recipe.train.max_prompt_length, guarding_prompt(recipe)
    most = limit + template_tokens(base.tokenizer) - TEMPLATE_TOKENS  # a system turn that a template adds is no prompt
    prompts: tuple[list[TrainingPrompt], list[TrainingPrompt]] = ([], [])
    for harmful, into in ((True, prompts[0]), (False, prompts[1])):
        items = instructions_to_train_on(recipe, sets, harmful)
        texts = list(dict.fromkeys(item.text for item in items))
        if len(texts) < len(items):
            run.screen.line(f"{len(items) - len(texts)} prompts are there twice and are used once")
        for text in texts:
            ids = render(base.tokenizer, text)
            target_ids = render(base.tokenizer, text, guard) if harmful and guard else ids
            if len(ids) <= most:
                into.append(TrainingPrompt(ids, target_ids, harmful, text))
        if len(into) < len(texts):
            run.screen.line(f"{len(texts) - len(into)} prompts are longer than {limit} tokens and are left out")
        if harmful and all(len(render(base.tokenizer, item.text)) > most for item in sets.harmful_train):
            raise UserError(
                f"every training prompt is longer than max_prompt_length = {limit}; raise --max-prompt-length"
            )
        if not harmful and recipe.loss.anchor_ratio and texts and not into:
            raise UserError(
                f"every harmless training prompt is longer than max_prompt_length = {limit}, so that none is left for "
                "the anchor; raise --max-prompt-length, or give --anchor-ratio 0"
            )
    return prompts


@dataclass(frozen=True)
class OwnOpenings:
    """How the base begins to answer training prompts, by instruction."""

    ids: dict[str, Annotated[list[TokenId], LONGEST]]


def find_own_openings(run: Run, prompts: tuple[list[TrainingPrompt], list[TrainingPrompt]]) -> OwnOpenings:
    """The base's own answers at temperature 1 to the training prompts, as far as training lets an answer be begun:
    those that comply, of shorter ones the first half."""
    both = [*prompts[0], *prompts[1]]
    answers = run.answers(run.base.model, [p.ids for p in both], run.sampling(LONGEST + 1, 1.0), (14,))
    outcomes = [outcome(text, run.refusals) for _, text in answers]
    compliant = [(p.text, c) for p, (c, _), what in zip(both, answers, outcomes, strict=True) if what == "comply"]
    cut = {text: c.ids[: len(c.ids) // 2] if c.finished else c.ids[:LONGEST] for text, c in compliant}
    return OwnOpenings({text: ids for text, ids in cut.items() if ids})


def make_framer(run: Run, prompts: tuple[list[TrainingPrompt], list[TrainingPrompt]]) -> Framer | None:
    """What puts prompts otherwise, as the settings ask for; None for nothing.

    The answers of a model that thinks first are not begun: what its teacher says to the prompt is a thought.
    """
    settings, tokenizer = run.recipe.train, run.base.tokenizer
    prefill = 0.0 if run.base.thinks else settings.prefill_ratio
    if prefill < settings.prefill_ratio:
        run.screen.line("--prefill-ratio does nothing here: the answers of a model that thinks first are not begun")
    if not prefill and not settings.wrap_ratio:
        return None
    own = run.once(find_own_openings, prompts).ids if prefill else {}
    systems = takes_system_turn(tokenizer)
    return Framer(tokenizer, prefill, settings.wrap_ratio, settings.max_prompt_length, systems, own)
