"""Stage 2: direction and coefficient by what the teacher does, what it is asked, and the teacher that follows."""

import itertools
import types
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import build
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from safesteer_mlx.method import teacher as stage
from safesteer_mlx.method.direction import Direction, opening_probabilities
from safesteer_mlx.method.judge import is_broken, outcome
from safesteer_mlx.method.prompts import built_in_sets, render_all
from safesteer_mlx.method.rollout import AfterThought, Completion, Sampling, answer_text, generate, stream_key
from safesteer_mlx.method.student import make_student
from safesteer_mlx.method.teacher import (
    Outcomes,
    TeacherTrial,
    Validation,
    ask,
    beside,
    choose_teacher,
    ema_update,
    first_enough,
    first_passes,
    moving_average,
    opened_answers,
    shortest_opening,
    steered_teacher,
)
from safesteer_mlx.recipe import MODELS, TeacherSettings, TrainSettings
from safesteer_mlx.system.load import load

GRID = [2.0, 0.5, 4.0, 1.0]  # in any order
N = 20  # prompts of each kind


@pytest.fixture(autouse=True, scope="module")
def what_numbers_are_worked_out_with():
    """What was tuned on models, as it is in what follows."""
    tuned = {"FIRST_PASSES": (24, 16), "ENOUGH": 0.95, "ASKED": 3, "ROUNDS": 2, "GENTLER": 0.2}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in tuned.items():
            patch.setattr(stage, name, value)
        yield


def outcomes(refused, broken):
    """Of 20 harmful answers so many refuse, so many others are broken; nothing else happens."""
    harmful = ["refuse"] * refused + ["comply"] * (N - refused)
    return Outcomes(harmful, ["comply"] * N, [False] * (N - broken) + [True] * broken, [False] * N)


def choice(*curves, ids=(7,), grid=GRID, base_broken=0, base_opened=0.0, **more):
    """choose_teacher among directions that are curves: a coefficient's (opened, answers that refuse, broken ones).

    Returns the choice, and the (number of the direction, coefficient) that were asked for answers, in turn.
    """
    asked = []
    wanted = TeacherSettings(coeff_grid=grid, coeff_broken=0.06)  # 2.4 of 40 answers

    def fake_ask(base, teacher, prompts):
        if teacher == "base":
            return outcomes(0, base_broken)
        asked.append(teacher)
        number, coeff = teacher
        return outcomes(*curves[number](coeff)[1:])

    def fake_passes(base, direction, coeffs, refusal_ids, prompts):
        assert refusal_ids == ids
        opened = [curves[direction.layer](c)[0] if c else base_opened for c in coeffs]
        return [TeacherTrial(-1, direction.layer, c, o, 0.0, 0.0) for c, o in zip(coeffs, opened, strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "ask", fake_ask)
        patch.setattr(stage, "first_passes", fake_passes)
        patch.setattr(stage, "steered_teacher", lambda base, layer, vector, c: stage.Teacher((layer, c)))
        directions = [Direction(-1, number, mx.zeros(1)) for number in range(len(curves))]
        base, prompts = types.SimpleNamespace(model="base"), Validation([], [], 0, 2, 20, 8)
        found = choose_teacher(base, directions, ids, prompts, wanted, **more)
    return found, asked


# What is chosen


def test_the_larger_coefficient_is_taken_where_it_refuses_more():
    # At 0.5 each answer is likelier than not to open as a refusal, so that greedy answers would all refuse.
    curve = {0.5: (0.6, 12, 0), 1.0: (0.97, 19, 0), 2.0: (0.98, 18, 0), 4.0: (0.98, 17, 0)}
    found, asked = choice(lambda c: curve.get(c, (0.9, 15, 0)))
    assert found.coeff == 1.0 and found.teacher.refused == 19 / 20
    assert asked == [(0, c) for c in (1.0, 0.5, 2.0, 0.7071, 1.4142)]  # halfway: √(0.5 · 1) and √(1 · 2)


def test_where_the_base_refuses_nearly_all_the_gentlest_coefficient_is_not_enough():
    curve = {0.5: (0.945, 19, 0), 1.0: (0.985, 20, 0), 2.0: (0.99, 20, 0)}
    for base_opened, first in ((0.5, 0.5), (0.93, 1.0)):
        _, asked = choice(lambda c: curve.get(c, (0.9, 15, 0)), base_opened=base_opened)
        assert asked[0] == (0, first)


def test_it_goes_where_more_is_refused_and_then_between():
    curve = {0.5: (0.5, 5, 0), 1.0: (0.96, 12, 0), 2.0: (1.0, 16, 0), 4.0: (1.0, 15, 0), 1.4142: (1.0, 17, 0)}
    found, asked = choice(curve.__getitem__)
    assert asked == [(0, c) for c in (1.0, 0.5, 2.0, 1.4142, 4.0)]
    assert found.coeff == 1.4142 and found.direction.layer == 0
    assert [(t.coeff, t.refused) for t in found.trials] == [(c, curve[c][1] / 20) for c in sorted(curve)]


def test_a_teacher_whose_answers_break_loses_whatever_it_refuses():
    # Direction 0 refuses more, but 3 of its 40 answers are broken; with 2 it would be sound.
    for broken, best in ((3, 1), (2, 0)):
        found, _ = choice(lambda c, b=broken: (1.0, 17, b), lambda c: (0.9, 10, 0))
        assert found.direction.layer == best
    # A base that breaks one answer itself allows its teacher one more.
    found, _ = choice(lambda c: (1.0, 17, 3), lambda c: (0.9, 10, 0), base_broken=1)
    assert found.direction.layer == 0 and found.base.broken == 1 / 40


def test_where_none_is_sound_the_least_broken_is_taken():
    found, _ = choice(lambda c: (1.0, 0, 20 if c > 0.6 else 9), lambda c: (1.0, 10, 10))
    assert (found.direction.layer, found.coeff, found.teacher.broken) == (0, 0.5, 9 / 40)


def test_of_two_alike_the_likelier_and_then_the_gentler_is_taken():
    assert choice(lambda c: (0.8, 10, 0), lambda c: (0.9, 10, 0))[0].direction.layer == 1
    alike = TeacherTrial(-1, 1, 1.0, harmful_opened=0.5, kl=2.0, refused=0.75)
    assert alike.value == pytest.approx(0.75 + 2 * 0.5 - 0.2 * 2.0)
    assert replace(alike, kl=1.0).value > alike.value
    assert replace(alike, over_refused=1.0).value == alike.value  # what the anchor removes does not count
    assert TeacherTrial(-1, 1, 1.0).value == 0.0


def test_three_directions_are_asked_for_answers_and_all_are_kept_as_trials():
    opened = [0.5, 0.9, 0.3, 0.8, 0.7]
    found, asked = choice(*[lambda c, p=p: (p, 10, 0) for p in opened])
    assert asked[:3] == [(number, 0.5) for number in (1, 3, 4)]
    assert {number for number, _ in asked} == {1, 3, 4} and found.direction.layer == 1
    assert {t.layer for t in found.trials} == {0, 1, 2, 3, 4}
    assert {t.layer for t in found.trials if t.refused is None} >= {0, 2}


point = st.tuples(st.integers(0, 100).map(lambda x: x / 100), st.integers(0, 10), st.integers(0, 10))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(point, min_size=9, max_size=9), min_size=1, max_size=5), st.booleans(), st.integers(0, 5))
def test_the_best_of_what_was_asked_is_chosen_and_all_lies_on_or_between_the_grid(tables, tokens, base_broken):
    curves = [lambda c, table=table: table[min(8, int(2 * c))] for table in tables]
    ticks = []
    ids = (7,) if tokens else ()
    more = {"ids": ids, "base_broken": base_broken, "progress": lambda done, total: ticks.append((done, total))}
    found, asked = choice(*curves, **more)

    def rank(number, coeff):
        opened, refused, broken = curves[number](coeff)
        over = max(0, broken - base_broken - 2)
        return -over, TeacherTrial(-1, number, coeff, opened if tokens else None, 0.0, 0.0, refused / N).value

    best = max(rank(*key) for key in asked)
    assert rank(found.direction.layer, found.coeff) == pytest.approx(best)
    assert (found.direction.layer, found.coeff) in asked and len(set(asked)) == len(asked)
    assert found.teacher == outcomes(*curves[found.direction.layer](found.coeff)[1:])
    assert found.base == outcomes(0, base_broken)
    for _, coeff in asked:
        assert coeff in GRID or (0.5 < coeff < 4.0 and coeff == round(coeff, 4))
    told = {(t.layer, t.coeff) for t in found.trials if t.refused is not None}
    assert told == set(asked) and len(found.trials) == len({(t.layer, t.coeff) for t in found.trials})
    assert ticks == sorted(ticks) and ticks[-1][0] == ticks[-1][1]


def test_without_tokens_that_tell_each_direction_is_asked_once_at_the_coefficient_nearest_1(monkeypatch):
    monkeypatch.setattr(stage, "first_passes", None)  # as for a model that thinks first
    refused = {0: 4, 1: 12, 2: 8, 3: 2}
    curves = [lambda c, n=n: (1.0, refused[n] + (c == 0.7), 0) for n in refused]
    found, asked = choice(*curves, ids=(), grid=[0.2, 0.7, 1.2, 3.0])
    assert asked[:4] == [(n, 1.2) for n in range(4)]
    assert {n for n, _ in asked[4:]} == {1} and (found.direction.layer, found.coeff) == (1, 0.7)
    assert all(t.harmful_opened is t.kl is None for t in found.trials) and len(found.trials) == len(asked)


def test_where_answers_begin_alike_the_first_passes_read_on_to_where_they_tell():
    model, ids = build("qwen2"), [7, 30]
    plain, told = [[3, 8, 1], [4, 4]], [[3, 8, 1, 9, 9], [4, 4, 9]]
    direction = Direction(-1, 1, mx.ones(32))
    prompts = Validation(plain[:1], plain[1:], 0, 7, 20, 8, undecided=[told[:1], told[1:]])
    [found] = stage.first_passes(types.SimpleNamespace(model=model), direction, [0.5], ids, prompts)
    by_hand = [float(x[0]) for x in opening_probabilities(model, direction, [0.5], told[:1], told[1:], ids)]
    assert [found.harmful_opened, found.harmless_opened, found.kl] == pytest.approx(by_hand, abs=1e-6)


def test_no_direction_leaves_nothing_to_choose():
    with pytest.raises(ValueError, match=r"^0 directions"):
        choice()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_refined_trials_are_measured_as_the_grids_are_and_rise_where_the_curve_does(seed, monkeypatch):
    model, ids = build("qwen2", seed), [7, 30]
    base = types.SimpleNamespace(model=model)
    vector = 20 * model.model.embed_tokens.weight[mx.array(ids)].sum(0)
    directions = [Direction(-1, 2, vector)]  # tied embeddings: it raises what it is made of
    rows = [[3, 8, 1], [4, 4, 9, 11, 2], [5], [6, 7, 20]]
    prompts = Validation(rows[:2], rows[2:], 0, 7, 20, 8)
    monkeypatch.setattr(stage, "ask", lambda base, model, prompts: outcomes(10, 0))
    found = choose_teacher(base, directions, ids, prompts, TeacherSettings(coeff_grid=GRID))
    coeffs = [t.coeff for t in found.trials]
    assert coeffs == sorted(coeffs) and set(coeffs) > set(GRID)  # some are refined
    for t in found.trials:
        by_hand = opening_probabilities(model, directions[0], [t.coeff], rows[:2], rows[2:], ids)
        assert (t.harmful_opened, t.harmless_opened, t.kl) == pytest.approx([x[0] for x in by_hand], abs=1e-6)
    opened = [t.harmful_opened for t in found.trials]
    assert all(a < b for a, b in itertools.pairwise(opened))


# Its parts


@pytest.mark.parametrize(
    ("coeff", "asked", "expected"),
    [
        (1.0, [1.0], [0.5, 2.0]),
        (0.5, [0.5], [1.0]),  # nothing below the least, nothing above the largest
        (4.0, [4.0], [2.0]),
        (1.0, [0.5, 1.0, 2.0], [0.7071, 1.4142]),
        (1.4142, [1.0, 1.4142, 2.0], [1.1892, 1.6818]),  # the nearest that were asked: √(1 · √2) and √(√2 · 2)
        (2.0, [1.0, 2.0], [1.4142, 4.0]),
    ],
)
def test_the_coefficients_beside_one(coeff, asked, expected):
    assert beside(coeff, GRID, asked) == expected


def test_the_first_that_opens_nearly_as_many_refusals_as_any():
    curve = [TeacherTrial(-1, 1, c, opened) for c, opened in ((0.5, 0.3), (1.0, 0.76), (2.0, 0.8), (4.0, 0.1))]
    assert first_enough(curve).coeff == 1.0  # 0.95 · 0.8 = 0.76
    assert first_enough([replace(t, harmful_opened=0.0) for t in curve]).coeff == 0.5


def test_where_the_base_refuses_nearly_all_a_coefficient_must_add_a_third_of_what_any_adds():
    curve = [TeacherTrial(-1, 1, c, opened) for c, opened in ((0.25, 0.945), (0.5, 0.965), (1.0, 0.99), (2.0, 0.97))]
    assert first_enough(curve).coeff == 0.25 and first_enough(curve, 0.93).coeff == 0.5  # 0.93 + 0.06 / 3 = 0.95
    assert first_enough(curve, 0.85).coeff == 0.25  # 0.95 · 0.99 is more
    assert first_enough(curve, 0.995).coeff == 1.0  # none adds anything: the one that takes least away


def test_first_passes_take_the_first_prompts_and_half_of_them_at_a_time_when_memory_is_exhausted(monkeypatch, capsys):
    seen = []

    def fake(model, direction, coeffs, *sets):
        seen.append([model, *sets])
        if sets[-1] > 4:
            raise RuntimeError("[metal::malloc] Unable to allocate 123 bytes")
        return np.array([[0.1, 0.2], [0.3, 0.4], [5.0, 6.0]])

    monkeypatch.setattr(stage, "opening_probabilities", fake)
    rows = [[i] for i in range(99)]
    prompts = Validation(rows[:30], rows[30:], 0, 7, 20, 64, 9)
    found = first_passes(types.SimpleNamespace(model="m"), Direction(-2, 3, mx.ones(1)), [1.0, 2.0], [7], prompts)
    assert seen == [["m", rows[:24], rows[30:46], [7], size] for size in (9, 4)]
    assert found == [TeacherTrial(-2, 3, 1.0, 0.1, 0.3, 5.0), TeacherTrial(-2, 3, 2.0, 0.2, 0.4, 6.0)]
    assert "going on with 4 at a time" in capsys.readouterr().err


def test_what_answers_do_as_shares():
    harmful, harmless = ["refuse", "refuse", "comply", "evade"], ["refuse", "comply"]
    found = Outcomes(harmful, harmless, [False, True, False, True], [False, True])
    assert (found.refused, found.over_refused, found.broken) == (1 / 4, 1 / 2, 3 / 6)
    nothing = Outcomes([], [], [], [])
    assert (nothing.refused, nothing.over_refused, nothing.broken) == (0, 0, 0)


# Asking


@pytest.fixture(scope="module")
def tiny():
    return load(str(MODELS / "tiny-chat"))


@pytest.fixture(scope="module")
def validation(tiny):
    sets = built_in_sets(str(MODELS / "tiny-chat"))
    rows = (render_all(tiny.tokenizer, items[:6]) for items in (sets.harmful_validation, sets.harmless_validation))
    return Validation(*rows, seed=5, opening=4, max_tokens=16, batch_size=8)


def strong(base, coeff):
    """A teacher steered in some direction, far enough to change answers."""
    vector = 60 * mx.random.normal((base.config["hidden_size"],), key=mx.random.key(3))
    return steered_teacher(base.model, 2, vector, coeff).model


def test_a_teacher_has_the_same_luck_twice_and_in_any_batch(tiny, validation):
    teacher = strong(tiny, 1.0)
    found = ask(tiny, teacher, validation)
    assert found == ask(tiny, teacher, validation) == ask(tiny, teacher, replace(validation, batch_size=5))
    own = ask(tiny, tiny.model, validation)
    assert found != own == ask(tiny, strong(tiny, 0.0), validation)  # not steered, it is the base
    assert len(own.harmful) == len(own.broken_harmful) == len(own.harmless) == len(own.broken_harmless) == 6


def test_the_base_is_asked_for_its_own_answers(tiny, validation):
    rows = [*validation.harmful, *validation.harmless]
    keys = [stream_key(5, 3, 0, i) for i in range(12)]
    answers = generate(tiny.model, rows, Sampling(tiny.eos_ids, 16, 1.0), keys)
    texts = [answer_text(tiny.tokenizer, row, a) for row, a in zip(rows, answers, strict=True)]
    found = ask(tiny, tiny.model, replace(validation, opening=99))
    assert [*found.harmful, *found.harmless] == [outcome(text) for text in texts]
    assert [*found.broken_harmful, *found.broken_harmless] == [is_broken(text, True) for text in texts]
    assert {"refuse", "comply"} <= {*found.harmful, *found.harmless}


class Tokenizer:
    has_thinking = False

    def decode(self, ids, **_):
        return " ".join(["I cannot help", "go go go go", "Water", "it"][i] for i in ids)


@pytest.mark.parametrize("guarded", [False, True])
def test_the_teacher_opens_an_answer_and_the_base_goes_on(monkeypatch, guarded):
    calls = []
    opened = [Completion([0], False), Completion([2], False), Completion([2, 3, 9], True)]
    rest = [Completion([1, 9], True), Completion([3], False)]

    def generate(model, read, sampling, keys):
        calls.append((model, read, [k.tolist() for k in keys], sampling.max_tokens, sampling.temp))
        return {"teacher": opened, "base": rest}[model]

    monkeypatch.setattr(stage, "generate", generate)
    base = types.SimpleNamespace(model="base", tokenizer=Tokenizer(), eos_ids=[9])
    seen = ([[8, 1], [8, 2]], [[8, 3]]) if guarded else None
    prompts = Validation([[1], [2]], [[3]], 5, 3, 10, 8, system_prompted=seen)
    found = ask(base, "teacher", prompts)
    first, then = ([stream_key(5, 3, part, i).tolist() for i in range(3)] for part in (0, 1))
    read = [*seen[0], *seen[1]] if guarded else [[1], [2], [3]]
    # The third has ended; the base never sees the system prompt.
    assert calls == [("teacher", read, first, 3, 1.0), ("base", [[1, 0], [2, 2]], then[:2], 7, 1.0)]
    assert found == Outcomes(["refuse", "comply"], ["comply"], [True, False], [False])


@pytest.mark.parametrize("opening", [1, 3, 4, 8, 16])
def test_an_answer_in_two_parts_is_no_longer_behind_its_thought_than_in_one(opening, tiny, validation, monkeypatch):
    """Wherever the thought ended, as much of the answer is read."""
    monkeypatch.setattr(stage, "answer_text", lambda _, __, answer: answer.ids)
    asked = replace(validation, opening=opening)
    whole = [ids for _, ids in opened_answers(tiny, tiny.model, asked)]
    ends = set[int]()
    for mark in {(ids[i],) for ids in whole for i in (0, 2, 4, 9) if i < len(ids)}:
        after = AfterThought(mark, 3)
        answers = opened_answers(tiny, tiny.model, replace(asked, after=after))
        for ids, (opened, cut) in zip(whole, answers, strict=True):
            ends |= {at for at in range(len(ids)) if tuple(ids[at : at + 1]) == mark}
            most = next((n for n in range(len(ids)) if after.enough(ids[:n]) == n), len(ids))
            assert cut == ids[:most] and opened.ids == cut[:opening]
    assert min(ends) < 2 and max(ends) > 8


@pytest.mark.parametrize(
    ("refused", "most", "expected"),
    [
        ({1: 0.9, 2: 0.8, 4: 0.5, 7: 0.3}, 7, 1),  # the more it writes, the more it spoils
        ({1: 0.4, 2: 0.8, 4: 0.82, 7: 0.8}, 7, 2),  # the first token alone decides little
        ({1: 0.76, 2: 0.8, 4: 0.7, 7: 0.8}, 7, 1),  # nearly the best is enough
        ({1: 0.2, 2: 0.3, 4: 0.4, 7: 0.9}, 7, 7),
        ({1: 0.2, 2: 0.3, 4: 0.4, 7: 0.9}, 4, 4),  # no longer than what tokens are found on
        ({1: 0.0, 2: 0.0, 4: 0.0, 7: 0.0}, 7, 1),
    ],
)
def test_the_fewest_tokens_that_decide_what_answers_do(refused, most, expected, monkeypatch):
    def outcomes(opening):
        n = round(100 * refused[opening])
        return Outcomes(["refuse"] * n + ["comply"] * (100 - n), [], [False] * 100, [])

    asked = []
    monkeypatch.setattr(stage, "ask", lambda base, teacher, q: asked.append(q.opening) or outcomes(q.opening))
    prompts = Validation([[1]], [], 0, 2, 10, 8)
    known = {2: outcomes(2)}
    told = shortest_opening("base", "teacher", prompts, Outcomes([], [], [], []), known, most)
    assert told == (expected, outcomes(expected)) and sorted(known) == [n for n in (1, 2, 4, 7) if n <= most]
    assert asked == [n for n in (1, 4, 7) if n <= most]  # two were asked before


@pytest.mark.parametrize(("own", "expected"), [(0, 1), (0.88, 1), (0.94, 2), (1.0, 7)])
def test_where_the_base_refuses_nearly_all_an_opening_must_add_half_of_what_any_adds(own, expected, monkeypatch):
    def outcomes(share):
        return Outcomes(["refuse"] * round(100 * share) + ["comply"] * round(100 - 100 * share), [], [False] * 100, [])

    shares = {1: 0.95, 2: 0.98, 4: 0.96, 7: 1.0}
    monkeypatch.setattr(stage, "ask", lambda base, teacher, q: outcomes(shares[q.opening]))
    prompts, known = Validation([[1]], [], 0, 2, 10, 8), {2: outcomes(0.98)}
    assert shortest_opening("base", "teacher", prompts, outcomes(own), known, 7)[0] == expected


def test_an_opening_goes_beyond_what_tells_nothing(monkeypatch):
    """A teacher that writes less changes nothing: that as many answers refuse is chance."""
    asked = []
    monkeypatch.setattr(stage, "ask", lambda base, teacher, q: asked.append(q.opening) or outcomes(5, 0))
    prompts = Validation([[1]], [], 0, 30, 40, 8, least_opening=6)
    known = {30: outcomes(5, 0)}
    assert shortest_opening("base", "teacher", prompts, outcomes(0, 0), known, 30)[0] == 7 and asked == [7, 16]


@pytest.mark.parametrize(
    ("refused", "on_prompts", "broken", "expected"),
    [
        (0.9, None, 0.0, False),  # little is left, and it is not asked
        (0.7, {2: 0.7, 4: 0.78, 7: 0.74}, 0.0, False),  # three in four of what was left
        (0.7, {2: 0.7, 4: 0.82, 7: 0.84}, 0.0, True),
        (0.7, {2: 0.7, 4: 0.82, 7: 0.84}, 0.1, False),  # but says nothing so often
    ],
)
def test_a_teacher_is_steered_on_the_prompt_only_where_that_leaves_less(
    refused, on_prompts, broken, expected, monkeypatch
):
    def outcomes(share, broken=0.0):
        n, bad = round(100 * share), round(100 * broken)
        return Outcomes(["refuse"] * n + ["comply"] * (100 - n), [], [False] * (100 - bad) + [True] * bad, [])

    run = types.SimpleNamespace(base="base")
    monkeypatch.setattr(stage, "make_teacher", lambda run, direction, coeff, prompts_only: stage.Teacher("on prompts"))
    monkeypatch.setattr(stage, "ask", lambda base, teacher, q: outcomes(on_prompts[q.opening], broken))
    chosen = stage.ChosenTeacher(Direction(-1, 1, mx.zeros(1)), 1.0, [], outcomes(0.4), outcomes(refused), 1)
    prompts = Validation([[1]], [], 0, 2, 10, 8)
    new = stage._or_on_prompts_only(run, prompts, chosen, {1: outcomes(refused)}, 7)
    assert new.prompts_only is expected and new.coeff == 1.0
    assert new == (replace(chosen, opening=4, teacher=outcomes(0.82), prompts_only=True) if expected else chosen)


# The teachers


def test_steering_changes_what_comes_after_its_block_and_the_teacher_says_so(tiny_model):
    model = tiny_model("llama")
    teacher = steered_teacher(model, 1, mx.ones(32), 0.5)
    assert teacher.shared_blocks == 1 and teacher.system_prompt is None
    row = mx.array([[1, 2, 3]])
    assert not mx.allclose(teacher.model(row), model(row))
    assert mx.array_equal(steered_teacher(model, 1, mx.ones(32), 0.0).model(row), model(row))


@pytest.mark.parametrize("mixup", [0.0, 0.25, 1.0])
def test_the_moving_average_by_hand(tiny_model, mixup):
    student = make_student(tiny_model("llama"), replace(TrainSettings(), num_layers=1), 0)
    moving = moving_average(student)
    before = {name: mx.array(w) for name, w in tree_flatten(student.trainable_parameters())}
    student.load_weights([(name, w + 1.0) for name, w in before.items()], strict=False)
    ema_update(moving, student, mixup)
    own = dict(tree_flatten(moving.parameters()))
    for name, w in before.items():
        assert mx.allclose(own[name], w + mixup, atol=1e-6)
    assert not tree_flatten(moving.trainable_parameters())
