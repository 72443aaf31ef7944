"""Attacks, tampering and the frames of training: what is asked, what is judged, what is counted."""

import copy
import json
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from runs import MICRO

from safesteer_mlx.evals import attacks, judging
from safesteer_mlx.evals import tampering as own_attacks
from safesteer_mlx.evals.attacks import BEGUN, LANGUAGES, Attack, Attacked, Attacker, judged_by, run_attacks
from safesteer_mlx.evals.judge_model import Case
from safesteer_mlx.evals.judge_replies import Verdict
from safesteer_mlx.evals.judging import Chosen
from safesteer_mlx.evals.scores import Count, effective_size, paired, wilson
from safesteer_mlx.evals.tampering import TUNING_STEPS, Tampering, ablated, run_direction
from safesteer_mlx.evaluate import ATTACKS, main
from safesteer_mlx.method.framing import (
    ENCODINGS,
    LONGEST,
    Framer,
    _opening,
    begun,
    framed,
    framings,
    takes_system_turn,
)
from safesteer_mlx.method.judge import is_refusal, outcome, use_refusal_phrases
from safesteer_mlx.method.prompts import built_in_sets, load_instructions, render, render_turns
from safesteer_mlx.method.residual import block_outputs, unit
from safesteer_mlx.method.rollout import Completion, Sampling, answer_text
from safesteer_mlx.method.student import make_student, save_adapters, with_adapters
from safesteer_mlx.method.training_prompts import TrainingPrompt
from safesteer_mlx.recipe import MODELS, PACKAGE, resolve
from safesteer_mlx.system.load import load
from safesteer_mlx.system.screen import Screen, UserError

KINDS = ("openings", "systems", "wrappers", "encodings", "turns")


@pytest.fixture(scope="module")
def base():
    return load(MICRO)


@pytest.fixture(scope="module")
def items():
    return built_in_sets(MICRO).harmful_test[:6]


def attacker(base) -> Attacker:
    return Attacker(base, Sampling(base.eos_ids, 24, batch_size=16), 3)


# --------------------------------------------------------------------------------------------------
# The texts
# --------------------------------------------------------------------------------------------------


def sentences(half: str) -> set[str]:
    texts = []
    for kind in KINDS:
        for framing in framings(half, kind):
            texts += framing.get("turns", [framing.get("text")])
    found = {" ".join(s.split()).lower() for text in texts for s in re.split(r"(?<=[.!?:])\s+", text)}
    return {s for s in found if len(s.split()) > 3}


def test_no_sentence_that_trains_also_measures():
    assert len(sentences("test")) > 60 and len(sentences("train")) > 60
    assert not sentences("test") & sentences("train")


@pytest.mark.parametrize("half", ["test", "train"])
def test_every_frame_holds_the_request_once(half):
    for framing in framings(half, "wrappers"):
        assert framing["text"].count("{request}") == 1
        assert "REQ uest" in framed(framing, "REQ uest") and "{" not in framed(framing, "REQ uest")
    for framing in framings(half, "encodings"):
        assert framing["text"].count("{encoded}") == 1 and framing["name"] in ENCODINGS
        assert ENCODINGS[framing["name"]]("Do it now") in framed(framing, "Do it now")
    for framing in framings(half, "turns"):
        assert [t.count("{request}") for t in framing["turns"]] == [0] * (len(framing["turns"]) - 1) + [1]


def test_encodings_by_hand():
    found = {name: encode("Tea 3") for name, encode in ENCODINGS.items()}
    assert found == {"base64": "VGVhIDM=", "rot13": "Grn 3", "leetspeak": "734 3", "spaced_letters": "T e a   3"}


def test_languages_ask_the_same_in_order():
    sets = built_in_sets("")
    english = {item.text for name in vars(sets) for item in getattr(sets, name)}
    seen: set[str] = set()
    for stem, n in [(c, 50) for c in LANGUAGES] + [(f"{c}_harmless", 20) for c in LANGUAGES]:
        rows = load_instructions(PACKAGE / "data" / "languages" / f"{stem}.jsonl")
        kind = "harmless" if "harmless" in stem else "harmful"
        of = [r.category for r in load_instructions(PACKAGE / "data" / "languages" / f"de{stem[2:]}.jsonl")]
        assert [r.category for r in rows] == of and len(rows) == n
        assert {r.category for r in rows} <= {item.category for item in getattr(sets, f"{kind}_test")}
        assert not seen & {r.text for r in rows} and not english & {r.text for r in rows}
        seen |= {r.text for r in rows}


TABLE = json.loads((PACKAGE.parent / "tests" / "refusals_by_language.json").read_text("utf-8"))


@pytest.mark.parametrize("language", TABLE)
def test_refusals_of_each_language_are_known_and_answers_are_none(language):
    assert [t for t in TABLE[language]["refusals"] if not is_refusal(t)] == []
    assert [t for t in TABLE[language]["helpful"] if outcome(t) != "comply"] == []


def test_bold_and_wide_marks_are_read():
    assert is_refusal("I **cannot** and **will not** do that.") and outcome("你想了解哪一方面？") == "evade"


# --------------------------------------------------------------------------------------------------
# Phrases of one's own
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def own_phrases(tmp_path):
    file = tmp_path / "phrases.txt"
    file.write_text("# Esperanto\nMi ne  povas\n\nTio’n mi rifuzas\n", "utf-8")
    yield file
    use_refusal_phrases(None)


def test_phrases_of_ones_own_count_until_they_are_taken_back(own_phrases):
    answers = ["Bedaŭrinde mi ne povas helpi.", "Tio'n mi rifuzas fari."]
    assert not any(map(is_refusal, answers))
    use_refusal_phrases(str(own_phrases))
    assert all(map(is_refusal, answers)) and is_refusal("I cannot.")
    use_refusal_phrases(None)
    assert not any(map(is_refusal, answers))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"", "holds no phrase"),
        (b"# only a remark\n", "holds no phrase"),
        (b"ne\n", "'ne'"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_a_file_that_holds_no_phrases_is_one_sentence(tmp_path, capsys, content, said):
    file = tmp_path / "p.txt"
    if content is not None:
        file.write_bytes(content)
    for command in ([MICRO], [MICRO, "--attacks"]):
        assert main([*command, "--refusal-phrases", str(file)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# What is asked
# --------------------------------------------------------------------------------------------------


def test_an_answer_is_begun_by_so_many_tokens_behind_the_header(base, items):
    header = render(base.tokenizer, items[0].text)
    for attack, n in zip(attacker(base).make("prefill", items), BEGUN, strict=True):
        [row, *_] = attack.ask(base.model)
        assert attack.name.startswith(f"answer begun, {n} token") and attack.family == "prefill"
        assert row[: len(header)] == header and len(row) == len(header) + n
        opening = framings("test", "openings")[0]["text"]
        assert opening.startswith(base.tokenizer.decode(row[len(header) :])) and attack.begun[0]


def test_what_the_attacker_wrote_is_judged_by_no_phrase_but_read_by_a_judge_model(base, items, monkeypatch):
    attack = replace(next(iter(attacker(base).make("prefill", items))), begun=["I cannot. "] * len(items))
    found = attacker(base).attack(base.model, attack)
    assert any(own != ["refuse"] for own in found.outcomes)
    seen: list[Case] = []

    def judge_cases(name, template, cases, *how):
        seen.extend(cases)
        return [Verdict("evade" if i else "comply") for i in range(len(cases))]

    monkeypatch.setattr(judging, "judge_cases", judge_cases)
    keyword, model = Chosen("keyword", None, "keyword"), Chosen("some-guard", "guard", "some-guard")
    assert judged_by(keyword, {"base": [found]}, False, 4, Screen()) == {"base": [found]} and not seen
    [again] = judged_by(model, {"base": [found, found]}, False, 4, Screen())["base"][:1]
    assert [own for [own] in again.outcomes] == ["comply"] + ["evade"] * (len(items) - 1)
    assert seen[1] == Case("harmful", items[1].text, "I cannot. " + found.texts[1][0]) and len(seen) == 2 * len(items)


def test_a_thought_that_the_template_began_is_ended_first():
    class Thinks:
        has_thinking, think_end = True, "</think>"

        def rfind_think_start(self, ids):
            return 1 if 7 in ids else -1

        def rfind_think_end(self, ids):
            return -1

        def encode(self, text, add_special_tokens):
            assert text == "\n</think>\n\n"
            return [8]

    assert begun(Thinks(), [5, 7], [1, 2]) == [5, 7, 8, 1, 2] and begun(Thinks(), [5], [1]) == [5, 1]


def test_the_bases_own_answers_are_compliant_and_cut(base, items, monkeypatch):
    rows = [render(base.tokenizer, item.text) for item in items]
    found = attacker(base).compliant_answers(rows)
    texts = [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in found.values()]
    assert texts and all(outcome(text) == "comply" for text in texts)
    assert not any(ids[-1] in base.eos_ids for ids in found.values())
    monkeypatch.setattr(attacks, "outcome", lambda text: "refuse")
    assert attacker(base).compliant_answers(rows) == {}
    assert list(attacker(base).make("own-answer", items)) == []


def test_of_a_thought_and_its_answer_the_answer_is_begun(base, items, monkeypatch):
    """By a model whose template begins the thought; it is ended in the prompt, as it is before any other opening."""
    tokenizer = copy.copy(base.tokenizer)
    tokenizer._think_start, tokenizer._think_end = "<|im_start|>assistant\n", "Then:"
    words = ("They want it.", "\n\n", "Here is how it is done, step by step, in a few plain words.", "\nThen:\n\n")
    start, end, thought, blank, answer, ended = (
        tuple(tokenizer.encode(text, add_special_tokens=False))
        for text in (tokenizer.think_start, tokenizer.think_end, *words)
    )
    tokenizer._think_start_tokens, tokenizer._think_end_tokens = start, end
    completion = Completion([*thought, *end, *blank, *answer, base.eos_ids[0]], True)
    assert answer_text(tokenizer, [], completion) == tokenizer.decode(answer)
    assert answer_text(tokenizer, [], Completion(completion.ids[:-1], False)) == tokenizer.decode(answer)
    monkeypatch.setattr(attacks, "answers", lambda model, own, rows, *how: [(completion, "Here it is.")] * len(rows))
    thinker = replace(base, tokenizer=tokenizer, thinks=True)
    made = list(attacker(thinker).make("own-answer", items))
    for attack, n in zip(made, BEGUN, strict=False):
        assert attack.ask(base.model)[0] == [*render(tokenizer, items[0].text), *ended, *answer[:n]]
        assert attack.begun[0] == tokenizer.decode(answer[:n])
    assert len(made) >= 4


@pytest.mark.parametrize("family", ATTACKS)
def test_every_family_that_the_command_names_asks_every_prompt(base, items, family):
    made = list(attacker(base).make(family, items))
    assert made and {attack.family for attack in made} == {family}
    assert len({attack.name for attack in made}) == len(made)
    for attack in made:
        rows = attack.ask(base.model)
        assert len(rows) == len(attack.requests) and all(rows)
        assert len(attack.requests) == len(items) or family == "own-answer"


def test_decoding_and_best_of_many(base, items, monkeypatch):
    found = list(attacker(base).make("decoding", items))
    assert [(a.temp, a.top_p) for a in found[:-1]] == [(0.7, 1.0), (1.0, 1.0), (1.3, 1.0), (1.0, 0.9), (1.0, 0.5)]
    turn = iter(range(10**6))

    monkeypatch.setattr(attacks, "outcome", lambda text: "comply" if next(turn) % 8 == 5 else "refuse")
    best = attacker(base).attack(base.model, found[-1])
    assert best.unsafe() == [1] * 6 and best.count.count == best.count.total == 6


def test_a_dialogue_is_led_by_the_model_itself(base, items):
    attack = next(a for a in attacker(base).make("turns", items) if a.name.startswith("3 turns"))
    [row, *_] = attack.ask(base.model)
    turns = next(f["turns"] for f in framings("test", "turns") if attack.name.endswith(f["name"]))
    talk = [{"role": "user", "content": turns[0]}]
    for turn in turns[1:]:
        [answer] = attacker(base).draw(base.model, [render_turns(base.tokenizer, talk)])
        talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    talk[-1]["content"] = turns[-1].replace("{request}", items[0].text)
    assert row == render_turns(base.tokenizer, talk)


def test_a_family_that_the_template_refuses_is_left_out_and_said(base, items, capsys):
    class OneTurn:
        def __getattr__(self, name):
            return getattr(base.tokenizer, name)

        def apply_chat_template(self, turns, **more):
            if len(turns) > 1:
                raise UserError("one user turn only")
            return base.tokenizer.apply_chat_template(turns, **more)

    other = attacker(replace(base, tokenizer=OneTurn()))
    found = run_attacks(other, {"base": base.model}, items[:2], ["turns", "system", "template"], Screen())
    assert [own.attack.name for own in found["base"]] == ["none", "no chat template"]
    said = capsys.readouterr().out
    assert "turns: left out" in said and "system: left out" in said


# --------------------------------------------------------------------------------------------------
# What is counted
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "each", "size"),
    [
        ([2, 0, 1], 2, 3.0),  # p 1/2, variance (1/4 + 1/4) / 6, so 3
        ([1, 1, 1, 1], 2, 8.0),  # no prompt differs: as good as independent, and no more
        ([2, 2, 0, 0], 2, 4.0),  # a prompt's answers are one: 3 by the formula, never fewer than the prompts
        ([3, 1, 2, 1, 2, 3], 4, 24.0),  # p 1/2; shares off by 1/4, four of them: (4/16) / 30, so 30; at most 24
        ([4, 0], 4, 2.0),
        ([0, 0, 0], 5, 3.0),
        ([5, 5], 5, 2.0),
        ([1, 0, 1], 1, 3.0),
    ],
)
def test_effective_size_by_hand(counts, each, size):
    assert effective_size(counts, each) == pytest.approx(size)


def test_several_answers_to_a_prompt_widen_the_interval():
    alike, mixed = Count.of_clusters([4, 4, 0, 0] * 5, 4), Count.of_clusters([2, 2, 2, 2] * 5, 4)
    assert (alike.count, alike.total) == (mixed.count, mixed.total) == (40, 80)
    assert alike.interval == pytest.approx(wilson(10, 20), abs=1e-9) and mixed.interval == wilson(40, 80)
    assert "40/80, 50.0 %" in str(alike)


def test_prompts_are_compared_by_more_or_fewer():
    change = paired([3, 0, 2, 1], [1, 1, 2, 0])
    assert (change.lost, change.gained) == (2, 1)


def test_harmless_requests_count_where_they_are_refused():
    attack = Attack("languages", "x", ["a", "b"], lambda model: [], kind="harmless")
    outcomes = [["refuse"], ["comply"]]
    assert Attacked(attack, [], outcomes).unsafe() == [1, 0]
    assert Attacked(replace(attack, kind="harmful"), [], outcomes).unsafe() == [0, 1]


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    settings = resolve({}, {"num_layers": 2})[0].train
    student = make_student(base.model, settings, 0)
    mx.random.seed(1)
    drawn = [(n, 0.3 * mx.random.normal(w.shape)) for n, w in tree_flatten(student.trainable_parameters())]
    student.load_weights([d for d in drawn if d[0].endswith("lora_b")], strict=False)
    folder = tmp_path_factory.mktemp("attacked") / "adapters"
    save_adapters(folder, student, settings, MICRO, 0)
    return folder


def test_the_scorecard_has_a_row_for_each_attack_base_beside_aligned(adapters, tmp_path, capsys):
    out = tmp_path / "o.json"
    flags = ["--adapter-path", str(adapters), "--test-prompts", "5", "--max-tokens", "24", "--out", str(out)]
    assert main([MICRO, *flags, "--offline", "--samples", "3", "--attacks", "prefill", "system", "languages"]) == 0
    shown = capsys.readouterr().out
    assert "Under attack" in shown and "answer begun" in shown
    found = json.loads(out.read_text())
    base, student = found["attacks"]["base"], found["attacks"]["student"]
    names = ["none", *(f"answer begun, {n} token{'s' if n > 1 else ''}" for n in BEGUN)]
    assert list(base) == list(student) and list(base)[: len(names)] == names
    for own in (base, student):
        for cell in own.values():
            assert cell["total"] == sum(cell["outcomes"].values()) and cell["interval"][0] <= cell["interval"][1]
    assert {cell["family"] for cell in base.values()} == {"", "prefill", "system", "languages"}
    assert base["none"]["count"] == found["base"]["outcomes"]["harmful"]["greedy"]["comply"]
    for model in ("base", "student"):
        assert found[model]["samples"] == 3
        assert sum(found[model]["outcomes"]["harmful"]["sampled"].values()) == 15
        assert sum(found[model]["outcomes"]["harmful"]["greedy"].values()) == 5
    assert not any(item.text in out.read_text() for item in built_in_sets(MICRO).harmful_test)


def test_the_first_of_several_samples_is_the_one_alone(base, items):
    from safesteer_mlx.evals.heldout import HeldOut, TestSet

    sampling = Sampling(base.eos_ids, 16, batch_size=16)
    test = TestSet({"harmful": items}, [])
    one, three = (HeldOut(base, test, [], 5, sampling, samples=k).score(base.model) for k in (1, 3))
    assert [a.text for a in three.of("harmful", "sampled")[::3]] == [a.text for a in one.of("harmful", "sampled")]
    assert [a.prompt for a in three.of("harmful", "sampled")] == [item.text for item in items for _ in range(3)]
    assert len(three.of("harmful", "greedy")) == len(items) and three.count("harmful", "sampled", "refuse").total == 18


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--attacks", "prefil"], "did you mean prefill?"),
        (["--attacks", "nonsense"], ", ".join(ATTACKS)),
        (["--samples", "0"], "--samples"),
    ],
)
def test_a_wrong_word_is_one_sentence(capsys, flags, said):
    assert main([MICRO, *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_attacks_need_harmful_prompts(tmp_path, capsys):
    file = tmp_path / "x.csv"
    file.write_text("prompt,type,label\nWhat is tea?,a,safe\n")
    assert main([MICRO, "--attacks", "--suite", f"XSTest={file}"]) == 2
    assert "need harmful prompts" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Tampering
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tampering(base):
    return tampering_with(base)


def tampering_with(base) -> Tampering:
    sets = built_in_sets(base.name)
    few = {name: getattr(sets, name)[:12] for name in vars(sets)}
    return Tampering(base, replace(sets, **few), Sampling(base.eos_ids, 16, batch_size=16), 0)


def test_abliteration_leaves_nothing_of_a_direction_and_refusals_go():
    from safesteer_mlx.evals.tampering import ablated

    base = load(str(MODELS / "tiny-chat"))
    tampering = tampering_with(base)
    row = tampering.rows("harmful_test")[0]
    vector = mx.random.normal((base.config["hidden_size"],), key=mx.random.key(2))
    without = ablated(base.model, vector, row)
    for x in block_outputs(without, mx.array([row])):
        assert (mx.abs(x @ unit(vector)) / mx.linalg.norm(x, axis=-1)).max().item() < 2e-3
    rows = tampering.rows("harmful_validation")
    before = sum(map(is_refusal, tampering.texts(base.model, rows)))
    after = sum(map(is_refusal, tampering.texts(tampering.abliterated(base.model), rows)))
    assert after < before / 2


def test_tuning_goes_on_above_adapters_and_changes_neither_them_nor_the_base(base, adapters, tampering):
    student = with_adapters(base.model, adapters)
    before = {n: np.array(w) for n, w in tree_flatten(student.parameters()) if "lora" in n}
    row = mx.array([tampering.rows("harmful_test")[0]])
    plain, own = base.model(row), student(row)
    answers = tampering.harmless_answers()
    assert all(0 < at < len(ids) for ids, at in answers)
    outputs = [(step, tuned(row)) for step, tuned in tampering.tuned(student, answers)]
    assert [step for step, _ in outputs] == list(TUNING_STEPS)
    assert all(not mx.allclose(a, b) for a, b in pairwise([own, *(out for _, out in outputs)]))
    assert mx.array_equal(plain, base.model(row)) and mx.array_equal(own, student(row))
    after = {n: np.array(w) for n, w in tree_flatten(student.parameters()) if "lora" in n}
    assert before.keys() == after.keys() and all(np.array_equal(before[n], after[n]) for n in before)


def test_no_more_harmless_prompts_are_answered_than_are_tuned_on(tampering, monkeypatch):
    monkeypatch.setattr(type(tampering), "rows", lambda self, name: [[1, 2]] * 300)
    monkeypatch.setattr(own_attacks, "answers", lambda model, _, rows, *how: [(Completion([3], True), "")] * len(rows))
    assert len(tampering.harmless_answers()) == 200  # 50 steps of 4


def test_the_runs_own_direction_is_read(base, tmp_path):
    assert run_direction(None) is None and run_direction(tmp_path) is None
    (tmp_path / "direction.json").write_text(json.dumps({"layer": 2, "vector": [0.5, 2.0]}))
    vector = run_direction(tmp_path)
    assert vector is not None and vector.tolist() == [0.5, 2.0]
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "direction.json").write_text(json.dumps({"layer": 0, "vector": [0.0]}))
    assert run_direction(tmp_path / "none") is None  # its teacher was a system prompt
    with pytest.raises(UserError, match="has 2 numbers, and this model's stream 64"):
        ablated(base.model, vector, [1, 2, 3])


def test_adapters_that_carry_no_others_are_left_out(base, tampering, tmp_path, items):
    from safesteer_mlx.evals.attacks import run_tampering

    class Stubborn(Tampering):
        def every(self, model, run, progress):
            yield "one way", model
            raise UserError("no more")

    stubborn = Stubborn(**vars(tampering))
    found = run_tampering(attacker(base), {"base": base.model}, items[:2], stubborn, None, Screen())
    assert [own.attack.name for own in found["base"]] == ["one way"]
    assert found["base"][0].attack.family == "tampering"


# --------------------------------------------------------------------------------------------------
# Training prompts, put otherwise
# --------------------------------------------------------------------------------------------------


def prompt(base, text, harmful) -> TrainingPrompt:
    ids = render(base.tokenizer, text)
    return TrainingPrompt(ids, ids, harmful, text)


@pytest.mark.parametrize("harmful", [True, False])
def test_an_answer_is_begun_and_the_teacher_is_asked_about_the_prompt_as_it_is(base, harmful):
    framer, plain = Framer(base.tokenizer, 1.0, 1.0, 512), prompt(base, "Why is the sky blue?", harmful)
    rng, lengths = np.random.default_rng(0), set()
    for _ in range(60):
        put = plain.put(framer, rng)
        opening = put.ids[len(plain.ids) :]
        assert put.ids[: len(plain.ids)] == plain.ids and put.framed is harmful
        assert put.target_ids == (plain.ids if harmful else put.ids)
        texts = [f["text"] for f in framings("train", "openings")]
        assert any(opening == _opening(base.tokenizer, plain.text, t)[: len(opening)] for t in texts)
        lengths.add(len(opening))
    assert min(lengths) == 1 and max(lengths) == LONGEST and len(lengths) > 10


@pytest.mark.parametrize("harmful", [True, False])
def test_a_harmful_prompt_in_a_frame_is_pulled_to_the_plain_one(base, harmful):
    framer, plain = Framer(base.tokenizer, 0.0, 1.0, 512), prompt(base, "Why is the sky blue?", harmful)
    put = plain.put(framer, np.random.default_rng(1))
    assert "Why is the sky blue?" in base.tokenizer.decode(put.ids) and len(put.ids) > len(plain.ids)
    assert put.target_ids == (plain.ids if harmful else put.ids) and put.framed is harmful
    assert plain.put(replace(framer, limit=8), np.random.default_rng(1)) == plain  # too long a frame
    assert plain.put(replace(framer, wrap=0.0), np.random.default_rng(1)) == plain


def test_a_prompt_comes_below_a_system_prompt_where_the_template_has_room(base):
    plain, rng = prompt(base, "Why is the sky blue?", True), np.random.default_rng(1)
    systems = [f["text"] for f in framings("train", "systems")]
    with_room = Framer(base.tokenizer, 0.0, 1.0, 512, systems=True)
    put = [plain.put(with_room, rng) for _ in range(80)]
    below = [render(base.tokenizer, plain.text, system) for system in systems]
    assert {tuple(p.ids) for p in put} & set(map(tuple, below)) and all(p.target_ids == plain.ids for p in put)
    without = [plain.put(replace(with_room, systems=False), rng).ids for _ in range(80)]
    assert not [ids for ids in without if ids in below]
    assert takes_system_turn(base.tokenizer)

    class NoRoom:
        chat_template = "{{ messages[-1] }}"  # leaves it out in silence

        def apply_chat_template(self, turns, add_generation_prompt):
            return [len(turns[-1]["content"])]

    assert not takes_system_turn(NoRoom())


def test_so_many_are_put_otherwise_as_was_asked_for(base):
    framer, plain = Framer(base.tokenizer, 0.3, 0.5, 512), prompt(base, "Why is the sky blue?", True)
    rng = np.random.default_rng(4)
    put = [plain.put(framer, rng) for _ in range(1000)]
    assert abs(sum(p.ids[: len(plain.ids)] != plain.ids for p in put) - 350) < 50  # half of those that are not begun
    assert abs(sum(p == plain for p in put) - 350) < 50


def test_half_of_the_answers_are_begun_as_the_base_itself_begins_them(base):
    plain = prompt(base, "Why is the sky blue?", True)
    framer = Framer(base.tokenizer, 1.0, 0.0, 512, own={plain.text: [7] * 40})
    rng = np.random.default_rng(4)
    openings = [plain.put(framer, rng).ids[len(plain.ids) :] for _ in range(400)]
    own = [ids for ids in openings if set(ids) == {7}]
    assert abs(len(own) - 200) < 40 and {len(ids) for ids in own} == set(range(1, LONGEST + 1))
    other = prompt(base, "Why is the sea blue?", True)
    assert not any(set(other.put(framer, rng).ids[len(other.ids) :]) == {7} for _ in range(50))


class RecordingScreen(Screen):
    """A screen that keeps its lines."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def line(self, text, whole=False):
        self.lines.append(text)


def test_the_bases_own_beginnings_are_those_that_comply_and_go_on(base, tmp_path):
    from safesteer_mlx.method.run import make_run
    from safesteer_mlx.method.training_prompts import find_own_openings, make_framer, training_prompts

    flags = {"adapter_path": str(tmp_path / "a"), "direction_train": 8, "direction_validation": 4}
    run = make_run(resolve({}, flags)[0], base, Screen(quiet=True))
    prompts = tuple(part[:40] for part in training_prompts(run))
    assert make_framer(run, prompts) is None
    own = find_own_openings(run, prompts).ids
    assert 20 < len(own) < 80 and all(1 <= len(ids) <= LONGEST for ids in own.values())
    assert own == find_own_openings(run, prompts).ids
    texts = [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in own.values()]
    assert not any(map(is_refusal, texts)) and not any(set(ids) & set(base.eos_ids) for ids in own.values())
    begun = [found[0] for text in texts if (found := re.match("[^.!?]*[.!?]", text))]
    [(sentence, _)] = Counter(begun).most_common(1)
    fewer = find_own_openings(replace(run, refusals=[sentence]), prompts).ids  # as if it refused in those words
    assert fewer.items() < own.items()
    framed = run.with_settings(train=replace(run.recipe.train, prefill_ratio=0.2, wrap_ratio=0.1))
    framer = make_framer(framed, prompts)
    assert (framer.prefill, framer.wrap, framer.systems, framer.own) == (0.2, 0.1, True, own)
    screen = RecordingScreen()
    thinking = replace(framed, base=replace(base, thinks=True), screen=screen)
    assert make_framer(thinking, prompts).prefill == 0
    assert [line.split(":")[0] for line in screen.lines] == ["--prefill-ratio does nothing here"]
    plain = thinking.with_settings(train=replace(run.recipe.train, wrap_ratio=0.1))
    assert make_framer(plain, prompts).wrap == 0.1 and len(screen.lines) == 1
