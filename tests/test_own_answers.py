"""What a model's own answers tell of how it refuses."""

from types import SimpleNamespace

from safesteer_mlx.method.own_answers import _lengths, read_thoughts
from safesteer_mlx.method.rollout import Completion

# What thoughts tell. Words as ids; 1 is to be taken up from the prompt, 9 how all thoughts begin.
#                      harmful, refused                            harmful, answered   harmless, answered
THOUGHT_ABOUT = [[5, 1], [5, 2], [5, 3], [5, 1], [5, 2], [5, 3], [6, 1], [6, 4], [6, 4], [6, 1]]
THOUGHTS = [[9, 1, 20, 21], [9, 2, 20, 22, 31], [9, 3, 23], [9, 1, 8, 30, 32], [9, 2, 30, 33], [9, 30, 3, 34]]
THOUGHTS += [[9, 1, 30], [9, 4, 8, 30], [9, 30, 4], [9, 30]]
REFUSED = [True] * 3 + [False] * 7


def test_a_thought_tells_by_words_that_come_before_refusals_alone():
    thoughts = read_thoughts(THOUGHT_ABOUT, THOUGHTS, REFUSED, 6, 4)
    assert thoughts.length == 4
    assert thoughts.telling == [20]  # 21, 22 and 23 once, 31 behind the thought; 1, 2 and 3 are the prompts'
    assert thoughts.first == [20]
    harmful, harmless = thoughts.undecided
    # Up to the first word that tells either way: 20, or 30. The third tells nothing: all of it but the last.
    assert harmful[:2] == [[5, 1, 9, 1], [5, 2, 9, 2]] and harmful[3:] == [[5, 1, 9, 1, 8], [5, 2, 9, 2], [5, 3, 9]]
    assert harmful[2] == [5, 3, 9, 3, 23]
    assert harmless == [[6, 1, 9, 1], [6, 4, 9, 4, 8], [6, 4, 9], [6, 1, 9]]
    assert thoughts.turns_at == 2


def test_a_word_that_others_have_too_is_no_sign_but_raises_the_odds_of_a_refusal_if_they_have_it_less_often():
    """41, before all that tells: in 3 of 3 refusals, and in so many of 7 other answers."""
    for others, leans, first in ((0, True, [41]), (1, True, [20]), (4, True, [20]), (5, False, [20])):
        having = [i < 3 + others for i in range(10)]
        thoughts = [[9, 41, *ids[1:]] if has else ids for ids, has in zip(THOUGHTS, having, strict=True)]
        found = read_thoughts(THOUGHT_ABOUT, thoughts, REFUSED, 6, 5)
        assert ((41 in found.telling), found.first) == (leans, first) and 20 in found.telling


class Thinker(SimpleNamespace):
    """As much of a tokenizer as tells thoughts: 50 ends one."""

    think_end_tokens = (50,)

    def rfind_think_end(self, ids):
        return len(ids) - 1 - ids[::-1].index(50) if 50 in ids else -1


def test_a_model_that_could_think_and_mostly_does_not_is_none_that_thinks():
    thinks, plain, cut = ([9, 8, 50, 7], "text"), ([7, 6], "text"), ([9, 9, 9], "")

    def lengths(*answers):
        return _lengths(Thinker(), [(Completion(ids, True), text) for ids, text in answers])

    assert lengths(thinks, thinks, cut, plain) == [2, 2, 3]
    assert lengths(thinks, cut, plain, plain) == []


def test_what_a_thought_takes_up_from_the_prompt_tells_nothing():
    thoughts = [[9, 7, *ids[1:]] if i < 2 else ids for i, ids in enumerate(THOUGHTS)]
    asked = [[*ids, 7] if i < 2 else ids for i, ids in enumerate(THOUGHT_ABOUT)]
    assert 7 in read_thoughts(THOUGHT_ABOUT, thoughts, REFUSED, 6, 5).telling
    assert 7 not in read_thoughts(asked, thoughts, REFUSED, 6, 5).telling


def test_thoughts_that_are_empty_tell_nothing_and_leave_the_prompts_as_they_are():
    found = read_thoughts(THOUGHT_ABOUT, THOUGHTS, REFUSED, 6, 0)
    assert (found.length, found.telling, found.first, found.turns_at) == (1, [], [], 0)
    assert [*found.undecided[0], *found.undecided[1]] == THOUGHT_ABOUT
