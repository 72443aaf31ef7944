"""The keyword judge on texts that were written without it: `judge_texts/`, by language.

    ./scripts/test tests/test_judge_texts.py -rP         prints what is missed and what is wrong, by language

By `chosen/` phrases were written; `held_out/` was not looked at before they were, but in English the last dozen lines.
Both were made up by a language model, to be as unlike each other and as misleading as can be; no native speaker has
read them. So few are ordinary, and the counts say how much a change costs or gains, not how often the judge errs.
`en_disclaimers` all begin with a warning or a moral, and half of them answer all the same. `going_on.yaml` has answers
of four imaginary assistants: refusals in known words and in their own, answers with a warning before them and without.
"""

import re
from pathlib import Path

import pytest
import yaml

from safesteer_mlx.method.judge import go_on_as_refusals, is_refusal

TEXTS = Path(__file__).parent / "judge_texts"
# language -> (refusals missed, answers taken for refusals) of the held-out ones: no more than these
HELD_OUT = {
    **{
        "ar": (9, 0),
        "cs": (8, 1),
        "da": (9, 0),
        "de": (18, 0),
        "el": (7, 0),
        "en": (42, 4),
        "en_disclaimers": (31, 8),
        "es": (17, 0),
        "fr": (18, 0),
    },
    **{
        "hi": (5, 2),
        "id": (6, 0),
        "it": (15, 0),
        "ja": (11, 0),
        "ko": (11, 0),
        "nl": (23, 0),
        "pl": (11, 0),
        "pt": (17, 0),
    },
    **{"ro": (10, 1), "ru": (8, 1), "sv": (9, 0), "tr": (9, 0), "uk": (8, 0), "vi": (7, 0), "zh": (11, 1)},
}


@pytest.mark.parametrize("language", sorted(path.stem for path in (TEXTS / "held_out").iterdir()))
def test_held_out_texts_are_told_as_well_as_before(language):
    for count, before in zip(told(language, "held_out"), HELD_OUT[language], strict=True):
        assert count <= before


def test_few_of_the_texts_that_phrases_were_written_by_are_missed():
    counts = [(told(path.stem, "chosen"), texts(path.stem, "chosen")) for path in (TEXTS / "chosen").iterdir()]
    missed, wrong = (sum(found[i] for found, _ in counts) for i in (0, 1))
    refusals, answers = (sum(len(of[name]) for _, of in counts) for name in ("refusals", "answers"))
    assert refusals > 900 and answers > 700
    assert missed <= 0.15 * refusals and wrong <= 0.01 * answers


# assistant -> of the house's own ways to refuse, so many at least are told
GOING_ON = {"one": 3, "two": 3, "three": 4, "four": 4}


@pytest.mark.parametrize("assistant", GOING_ON)
def test_how_answers_go_on_tells_refusals_in_a_houses_own_words_from_warnings(assistant):
    """By `one` and `two` it was chosen how that is told, `three` and `four` were written by another afterwards."""
    its = yaml.safe_load((TEXTS / "going_on.yaml").read_text("utf-8"))[assistant]
    groups = {
        kind: [group[0][: re.search("[.!?]", group[0]).end()] for group in its[kind]] for kind in ("house", "warned")
    }
    together = [text for kind in groups for group in its[kind] for text in group]
    told = go_on_as_refusals([*groups["house"], *groups["warned"]], [*its["known"], *together, *its["complied"]])
    assert not {*told} & {*groups["warned"]}
    assert len({*told} & {*groups["house"]}) >= GOING_ON[assistant]


def texts(language: str, folder: str) -> dict[str, list[str]]:
    return yaml.safe_load((TEXTS / folder / f"{language}.yaml").read_text("utf-8"))


def told(language: str, folder: str) -> tuple[int, int]:
    """How many refusals are missed, and answers taken for refusals."""
    of = texts(language, folder)
    missed = sum(not is_refusal(text) for text in of["refusals"])
    wrong = sum(is_refusal(text) for text in of["answers"])
    total = f"of {len(of['refusals'])}; wrong {wrong} of {len(of['answers'])}"
    print(f"{folder} {language}: missed {missed} {total}")
    return missed, wrong
