"""Rendering: one chat template for everything, its end, and the first tokens of refusals."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from safesteer_mlx.align import main as align
from safesteer_mlx.method import prompts
from safesteer_mlx.method.prompts import (
    DECIDES,
    SETS,
    PromptSets,
    built_in_sets,
    direction_counts,
    end_of_instruction,
    given_files,
    load_prompt_sets,
    longest_prompt,
    opener_ids,
    own_prompts,
    prompt_sets,
    prompts_from,
    render,
    sets_for,
    special_ids,
)
from safesteer_mlx.method.run import make_run, run_parts
from safesteer_mlx.recipe import MODELS, PACKAGE, resolve
from safesteer_mlx.system.load import load
from safesteer_mlx.system.screen import Screen, UserError
from safesteer_mlx.system.store import fingerprint

TINY = str(MODELS / "tiny-chat")

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ALONE = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
BOS = "<|endoftext|>" + CHATML
BARE = "{{ messages[-1].content }}"


@pytest.fixture
def tokenizer():
    return load(str(MODELS / "tiny-chat")).tokenizer


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "text"),
    [(CHATML, "<|im_end|>\n<|im_start|>assistant\n"), ("{{ messages[-1].content }} ?\nA:\n", " ?\nA:")],
)
def test_the_end_of_instruction_is_what_the_template_adds(tokenizer, template, text):
    found = end_of_instruction(with_template(tokenizer, template))
    rendered = render(tokenizer, "move the lamp")
    assert rendered[-len(found) :] == found
    assert tokenizer.decode(found).strip() == text.strip()
    # It is the template's alone: no id of the instruction is in it.
    inside = tokenizer.decode(rendered[: -len(found)])
    assert inside.endswith("move the lamp")


def test_a_template_that_adds_nothing_is_refused(tokenizer):
    with pytest.raises(UserError, match="adds nothing after an instruction"):
        end_of_instruction(with_template(tokenizer, BARE))


def test_the_beginning_of_a_text_is_there_once(tokenizer):
    ids = render(with_template(tokenizer, BOS), "move the lamp")
    [first] = tokenizer.encode("<|endoftext|>", add_special_tokens=False)
    assert ids[0] == first and ids.count(first) == 1


def test_a_system_turn_is_rendered_or_refused_in_a_sentence(tokenizer):
    assert "be careful" in tokenizer.decode(render(with_template(tokenizer, CHATML), "a", "be careful"))
    with_template(tokenizer, ALONE)
    render(tokenizer, "a")
    with pytest.raises(UserError, match=r"refuses a system turn.*another --teacher"):
        render(tokenizer, "a", "be careful")


def test_openers_are_read_where_an_answer_begins(tokenizer):
    found = opener_ids(tokenizer, ["I", "I'm", "Sorry"])
    header = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True, tokenize=False
    )
    for text, token in found.items():
        whole = tokenizer.encode(header + text, add_special_tokens=False)
        assert whole[len(tokenizer.encode(header, add_special_tokens=False))] == token
    assert tokenizer.decode([found["Sorry"]]) == "Sorry"


def test_special_tokens_and_ids_without_a_token_are_never_an_answers(tokenizer):
    vocabulary = 1856
    found = set(special_ids(tokenizer, vocabulary))
    pieces = tokenizer.get_vocab()
    assert {pieces["<|im_start|>"], pieces["<|im_end|>"], pieces["<|endoftext|>"]} <= found
    assert found >= set(range(vocabulary)) - set(pieces.values())
    assert not found & set(tokenizer.encode("move the lamp", add_special_tokens=False))
    assert max(special_ids(tokenizer, 10), default=0) < 10


def test_no_set_of_prompts_overlaps_another():
    for folder in (MODELS / "tiny-chat" / "data",):
        sets = vars(load_prompt_sets(folder))
        texts = {name: {item.text for item in items} for name, items in sets.items() if name != "capability_test"}
        for name, own in texts.items():
            assert not any(own & other for other_name, other in texts.items() if other_name != name), name


def test_the_anchors_prompts_sound_harmful_too_and_are_like_no_test():
    """A student that is held to the base on none that sounds harmful refuses these (docs/choices.md, Which harmless
    prompts). None is a test prompt in other words, as far as the rarer ones tell."""
    sets = built_in_sets("a/real-model")
    kinds = Counter(item.category for item in sets.harmless_train)
    sound_harmful = {item.category for item in sets.borderline_test}
    assert all(kinds[name] >= 20 for name in sound_harmful) and len(kinds) >= 30
    texts = {name: [set(re.findall(r"\w+", item.text.lower())) for item in getattr(sets, name)] for name in SETS}
    common = {
        word for word, n in Counter(word for own in texts.values() for ws in own for word in ws).items() if n > 20
    }
    for name in ("harmless_test", "borderline_test", "capability_test", "harmless_validation"):
        for test in (words - common for words in texts[name]):
            for own in (words - common for words in texts["harmless_train"]):
                assert len(test & own) <= max(2, 0.3 * len(test | own)), (name, test, own)


def test_a_models_own_prompts_are_used_and_else_the_packages(tmp_path):
    package = load_prompt_sets(PACKAGE / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.jsonl").write_text('{"instruction": "not a set of ours"}\n')
    for model in ("org/name", str(tmp_path), str(tmp_path / "none")):
        assert own_prompts(model) is None and built_in_sets(model) == package
    for name in PromptSets.__dataclass_fields__:
        (tmp_path / "data" / f"{name}.jsonl").write_text(f'{{"instruction": "{name} of mine"}}\n')
    assert own_prompts(str(tmp_path)) == tmp_path / "data"
    own = built_in_sets(str(tmp_path))
    assert {name: [item.text for item in items] for name, items in vars(own).items()} == {
        name: [f"{name} of mine"] for name in PromptSets.__dataclass_fields__
    }
    bundled = built_in_sets(str(MODELS / "tiny-chat"))
    assert bundled == load_prompt_sets(MODELS / "tiny-chat" / "data") != package


def test_a_set_that_is_missing_from_a_models_own_prompts_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "harmful_train.jsonl").write_text('{"instruction": "a"}\n')
    with pytest.raises(UserError, match=r"holds prompts, but no harmful_direction_train.jsonl"):
        built_in_sets(str(tmp_path))


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m" / "data").mkdir(parents=True)
    (tmp_path / "m" / "data" / "harmful_test.jsonl").write_text('{"instruction": "a"}\n')
    assert own_prompts("~/m") == tmp_path / "m" / "data"


# A policy's folder, --data FOLDER


def policy(folder, **sets):
    """A folder with these sets, each a list of prompts."""
    folder.mkdir(exist_ok=True)
    for name, rows in sets.items():
        rows = [row if isinstance(row, dict) else {"instruction": row} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def many(n, word="prompt"):
    return [f"my {word} number {i}" for i in range(n)]


def recipe(data=None, **flags):
    return resolve({}, {"model": TINY, **({} if data is None else {"data": str(data)}), **flags})[0]


def texts(items):
    return [item.text for item in items]


def test_a_folders_sets_replace_those_of_the_model_and_the_others_stay(tmp_path):
    folder = policy(tmp_path / "p", harmful_train=["a", "b"], borderline_test=["c"])
    (tmp_path / "p" / "notes.jsonl").write_text("not a prompt\n")
    (tmp_path / "p" / "._harmful_test.jsonl").write_bytes(b"\0")  # macOS's own
    for model in (TINY, "org/name"):
        ours, found = vars(built_in_sets(model)), vars(sets_for(model, folder))
        changed = {name for name in SETS if found[name] != ours[name]}
        assert changed == {"harmful_train", "borderline_test"}
        assert texts(found["harmful_train"]) == ["a", "b"] and texts(found["borderline_test"]) == ["c"]
    assert prompt_sets(recipe(folder)) == sets_for(TINY, folder)
    assert sets_for(TINY, None) == built_in_sets(TINY)


@pytest.mark.parametrize("name", ["train.jsonl", "mine.txt", "mine.json"])
def test_a_file_or_an_mlx_lm_folder_is_harmful_training_prompts_as_ever(name, tmp_path):
    path = tmp_path / name
    path.write_text('["a", "b"]' if name.endswith("json") else '"a"\n"b"\n' if name.endswith("l") else "a\nb\n")
    for file in ("valid.jsonl", "test.jsonl"):
        (tmp_path / file).write_text("mlx-lm's\n")
    data = str(tmp_path if name == "train.jsonl" else path)
    sets, ours = vars(sets_for(TINY, data)), vars(built_in_sets(TINY))
    assert texts(sets["harmful_train"]) == ["a", "b"]
    assert all(sets[other] == ours[other] for other in SETS if other != "harmful_train")


def test_train_jsonl_beside_other_sets_is_the_harmful_training_set_but_not_twice(tmp_path):
    folder = policy(tmp_path, train=["a"], harmful_test=["b"])
    assert texts(sets_for(TINY, folder).harmful_train) == ["a"]
    assert set(given_files(folder)) == {"harmful_train", "harmful_test"}
    policy(tmp_path, harmful_train=["c"])
    with pytest.raises(UserError, match=r"holds train.jsonl and harmful_train.jsonl, which are one set; keep one"):
        given_files(folder)


@pytest.mark.parametrize(
    ("file", "meant"),
    [
        ("harmfull_test.jsonl", "harmful_test"),
        ("Harmful_train.jsonl", "harmful_train"),
        ("harmless-train.jsonl", "harmless_train"),
        ("borderline.jsonl", "borderline_test"),
        ("harmless_test.txt", "harmless_test"),
        ("harmful_direction_train.JSONL", "harmful_direction_train"),
    ],
)
def test_a_file_that_is_nearly_named_after_a_set_is_refused_with_the_name(file, meant, tmp_path):
    folder = policy(tmp_path / "p", harmless_validation=many(8))
    (tmp_path / "p" / file).write_text('"a"\n')
    with pytest.raises(UserError, match=rf"{file} is no set of prompts; did you mean {meant}.jsonl\? Rename it"):
        given_files(folder)


def test_a_little_task_without_its_answer_is_refused(tmp_path):
    rows = [{"instruction": "Add 1 and 2.", "answer": 3, "category": "sums"}]
    assert sets_for(TINY, policy(tmp_path, capability_test=rows)).capability_test[0].answer == "3"
    for missing in ({}, {"answer": ""}, {"answer": None}):
        folder = policy(tmp_path, capability_test=[*rows, {"instruction": "Add 2 and 2."} | missing])
        with pytest.raises(UserError, match=r"capability_test.jsonl line 2 has no 'answer'; give"):
            sets_for(TINY, folder)


NEW, LINE = "what a model is scored on must be new to it", "one set is to be refused and the other answered"
MUST_NOT_SHARE = {
    ("harmful_test", "harmful_train"): NEW,
    ("harmful_test", "harmful_validation"): NEW,
    ("harmful_test", "harmful_direction_train"): NEW,
    ("harmful_test", "harmful_direction_validation"): NEW,
    ("harmful_test", "harmless_train"): NEW,
    ("harmless_test", "harmless_train"): NEW,
    ("borderline_test", "harmless_validation"): NEW,
    ("borderline_test", "harmful_train"): NEW,
    ("capability_test", "harmless_train"): NEW,
    ("harmful_train", "harmless_train"): LINE,
    ("harmful_validation", "harmless_train"): LINE,
    ("harmful_direction_train", "harmless_direction_train"): LINE,
    ("harmful_test", "harmless_test"): LINE,
    ("harmful_test", "borderline_test"): LINE,
    ("harmful_test", "capability_test"): LINE,
}
MAY_SHARE = [
    ("harmful_train", "harmful_validation"),
    ("harmful_train", "harmful_direction_train"),
    ("harmless_validation", "harmless_direction_validation"),
    ("harmless_test", "borderline_test"),
    ("capability_test", "harmless_test"),
]


def of(name, prompts):
    return [{"instruction": p, "answer": "1"} if name == "capability_test" else p for p in prompts]


@pytest.mark.parametrize("pair", MUST_NOT_SHARE, ids=" ".join)
def test_a_prompt_in_two_sets_that_must_not_share_one_is_refused(pair, tmp_path):
    one, other = pair
    both = {one: of(one, [*many(3, "own"), "Do  the\tThing, Straße"]), other: of(other, ["do the thing, STRASSE"])}
    folder = policy(tmp_path / "p", **both)
    with pytest.raises(UserError) as refused:
        sets_for(TINY, folder)
    said = str(refused.value)
    assert f"{one} and {other} share a prompt" in said or f"{other} and {one} share a prompt" in said
    assert f"{one}.jsonl line 4" in said and f"{other}.jsonl line 1" in said and "Thing" not in said
    assert MUST_NOT_SHARE[pair] in said and said.endswith("take it out of one of them")
    # Either beside the model's own, which nobody gave.
    for given, ours in (pair, pair[::-1]):
        theirs = getattr(built_in_sets(TINY), ours)[-1].text.upper()
        folder = policy(tmp_path / given, **{given: of(given, ["new", theirs])})
        with pytest.raises(UserError) as refused:
            sets_for(TINY, folder)
        said = str(refused.value)
        assert f"{given} and {ours} share a prompt ({folder}/{given}.jsonl line 2; built in), but" in said
        assert said.endswith(f"take it out of {given}, or give your own {ours}.jsonl")


@pytest.mark.parametrize("pair", MAY_SHARE, ids=" ".join)
def test_a_prompt_may_be_in_two_sets_of_one_use_and_of_one_kind(pair, tmp_path):
    sets = sets_for(TINY, policy(tmp_path, **{name: of(name, ["the same"]) for name in pair}))
    assert all(texts(getattr(sets, name)) == ["the same"] for name in pair)


def test_a_file_of_test_prompts_is_not_trained_on_and_what_nobody_gave_is_not_compared(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("fine\n\n" + built_in_sets(TINY).harmful_test[0].text + "\n")
    with pytest.raises(UserError, match=r"harmful_train and harmful_test share a prompt \(.*mine.txt line 3; built in"):
        sets_for(TINY, str(tmp_path / "mine.txt"))
    ours = built_in_sets(TINY)
    doubled = replace(ours, harmless_train=ours.harmful_test)
    monkeypatch.setattr(prompts, "built_in_sets", lambda model: doubled)
    assert sets_for(TINY, policy(tmp_path / "p", borderline_test=["a"])).harmless_train == ours.harmful_test


def test_a_small_set_of_the_directions_is_taken_whole_unless_a_number_was_asked_for(tmp_path, capsys):
    base = load(TINY)
    few = policy(tmp_path / "p", harmful_direction_train=many(9), harmless_direction_validation=many(8, "question"))
    run = make_run(recipe(few, adapter_path=str(tmp_path / "a")), base, Screen())
    said = capsys.readouterr().out
    assert "harmful_direction_train holds 9, and all are taken; by default it would be 128" in said
    assert "harmless_direction_validation holds 8, and all are taken; by default it would be 32" in said
    assert said.count("all are taken") == 2
    found = run.prompts
    assert [len(found.harmful_direction_train), len(found.harmless_direction_train)] == [9, 128]
    assert [len(found.harmful_direction_validation), len(found.harmless_direction_validation)] == [32, 8]
    asked = recipe(few, direction_train=64)
    with pytest.raises(UserError, match=r"harmful_direction_train holds 9 prompts, 64 are needed; lower the setting"):
        direction_counts(asked, prompt_sets(asked))
    assert direction_counts(recipe(few, direction_train=4), prompt_sets(asked))["harmful_direction_train"] == 4
    # Of the model's own there are enough, or it is a mistake.
    own = replace(built_in_sets(TINY), harmful_direction_train=prompt_sets(asked).harmful_direction_train)
    with pytest.raises(UserError, match="holds 9 prompts, 128 are needed"):
        direction_counts(recipe(), own)


@pytest.mark.parametrize("name", DECIDES)
def test_a_set_that_a_run_decides_by_must_not_be_tiny(name, tmp_path):
    enough = recipe(policy(tmp_path / "p", **{name: many(8)}))
    direction_counts(enough, prompt_sets(enough))
    policy(tmp_path / "p", **{name: many(7)})
    with pytest.raises(
        UserError, match=rf"{name}.jsonl holds 7 prompts, and a run decides by it; put at least 8 in it"
    ):
        direction_counts(enough, prompt_sets(enough))


def test_where_the_prompts_come_from_is_told_as_it_is(tmp_path):
    own = f"the model's own, {MODELS / 'tiny-chat' / 'data'}"
    both, tests = (
        policy(tmp_path / "b", harmful_train=["a"], harmless_test=["b"]),
        policy(tmp_path / "t", harmful_test="c"),
    )
    assert prompts_from(recipe()) == own
    said = f"{own}; from {both} harmless_test; harmful training prompts from {both}"
    assert prompts_from(recipe(both)) == f"{said} and the direction's"
    assert prompts_from(recipe(both, reuse_direction_prompts=False)) == said
    assert prompts_from(recipe(tests)) == f"{own}; from {tests} harmful_test"  # trained on what it always was
    assert prompts_from(recipe(tests, model="org/name")) == f"the built-in ones; from {tests} harmful_test"


def test_the_longest_prompt_and_the_fingerprint_are_those_of_the_policy(tmp_path):
    base, prompts_of = load(TINY), prompt_sets
    folder = policy(tmp_path / "p", borderline_test=["short"])
    small = longest_prompt(recipe(folder))
    first = run_parts(recipe(folder), base, prompts_of(recipe(folder)))
    policy(tmp_path / "p", borderline_test=["long " * 300])
    assert longest_prompt(recipe(folder)) >= small + 400
    policy(tmp_path / "p", borderline_test=["short"], harmless_train=["long " * 3000])  # of which none is trained on
    assert longest_prompt(recipe(folder, max_prompt_length=400)) == 400
    policy(tmp_path / "p", borderline_test=["long " * 300], harmless_train=["short one"])
    again = run_parts(recipe(folder), base, prompts_of(recipe(folder)))
    assert fingerprint(*again.values()) != fingerprint(*first.values())


def test_align_refuses_a_policy_before_it_looks_for_a_model(tmp_path, capsys):
    folder = policy(tmp_path / "p", harmful_train=["same"], harmless_train=["Same"])
    assert align(["nobody/nothing", "--offline", "--data", folder, "--adapter-path", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "harmful_train and harmless_train share a prompt" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
