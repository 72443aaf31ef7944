"""Rendering: one chat template for everything, its end, and the first tokens of refusals."""

import pytest

from safesteer_mlx.method.prompts import (
    PromptSets,
    built_in_sets,
    end_of_instruction,
    load_prompt_sets,
    opener_ids,
    own_prompts,
    render,
    special_ids,
)
from safesteer_mlx.recipe import MODELS, PACKAGE
from safesteer_mlx.system.load import load
from safesteer_mlx.system.screen import UserError

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
