"""The token inspector and the file it writes, which `align` takes as it is."""

import json
from dataclasses import replace

import pytest

from safesteer_mlx.align import main as align
from safesteer_mlx.method.prompts import built_in_sets, special_ids
from safesteer_mlx.method.run import run_parts
from safesteer_mlx.method.token_file import read_token_file
from safesteer_mlx.recipe import MODELS, resolve
from safesteer_mlx.system.load import Loaded, load
from safesteer_mlx.system.screen import UserError
from safesteer_mlx.system.store import fingerprint
from safesteer_mlx.tokens import _tokenizer, main

pytestmark = pytest.mark.usefixtures("few_prompts")

TINY = str(MODELS / "tiny-chat")


@pytest.fixture(scope="module")
def base() -> Loaded:
    return load(TINY)


@pytest.fixture(scope="module")
def words(base) -> list[dict]:
    """Four tokens of the bundled model, two of them with a leading space."""
    texts = ["I", "Sorry", " harmful", " help"]
    return [{"token": t, "id": base.tokenizer.encode(t, add_special_tokens=False)[0]} for t in texts]


@pytest.fixture
def run_of(tmp_path, words):
    """The adapter folder of a run with these tokens."""
    folder = tmp_path / "adapters" / "run"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"model: {TINY}\n")
    measured = {"votes": 12, "mean_delta": 1.25, "part": 0.5, "base_prob": 0.00125, "teacher_prob": 0.5}
    (folder / "tokens.json").write_text(json.dumps([row | measured for row in words]))
    return folder.parent


def refused(capsys, *argv) -> str:
    assert main([str(a) for a in argv]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


def test_the_table_has_every_token_in_quotes_with_its_numbers(run_of, words, capsys):
    assert main([str(run_of)]) == 0
    lines = capsys.readouterr().out.splitlines()
    [line] = [line for line in lines if "“ harmful”" in line]
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        "“ harmful”",
        str(words[2]["id"]),
        "12",
        "+1.25",
        "0.0013",
        "0.5",
    ]
    assert sum("“" in line for line in lines) == 4 and main([str(run_of / "run")]) == 0


def test_a_token_cannot_speak_to_the_terminal(run_of, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    hostile = "[red]\x1b[31m\u202eabc\n\ud800[/]"
    (run_of / "run" / "tokens.json").write_text(json.dumps([{"token": hostile, "id": 5, "votes": "\x1b"}]))
    assert main([str(run_of)]) == 0
    said = capsys.readouterr().out
    assert not {"\x1b", "\u202e", "\ud800"} & set(said)
    assert "“[red]⟨U+001B⟩[31m⟨U+202E⟩abc⟨U+000A⟩⟨U+D800⟩[/]”" in said and "–" in said


def test_veto_and_add_write_texts_and_ids(run_of, words, base, tmp_path, capsys):
    out = tmp_path / "mine.json"
    red = base.tokenizer.encode(" red", add_special_tokens=False)
    number = base.tokenizer.encode(" blue", add_special_tokens=False)
    assert len(red) == len(number) == 1
    flags = ["--veto", "Sorry", f"id:{words[3]['id']}", "--add", " red", f"id:{number[0]}", "--out", str(out)]
    assert main([str(run_of), *flags]) == 0
    expected = [words[0], words[2], {"token": " red", "id": red[0]}, {"token": " blue", "id": number[0]}]
    assert json.loads(out.read_text()) == expected
    assert f"align with --safety-tokens {out}" in capsys.readouterr().out.replace("\n", " ")
    assert read_token_file(out, base.tokenizer, base.vocabulary) == [row["id"] for row in expected]
    assert "exists already" in refused(capsys, run_of, *flags)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--veto", "harmful"], "leading space"),
        (["--veto", "I", "Sorry", " harmful", " help"], "leaves no safety token"),
        (["--add", "I"], "already"),
        (["--add", "many words in here"], "tokens of this model; give a single one"),
        (["--add", "id:999999"], "none of this model's"),
        (["--add", "id:" + 5000 * "9"], "give a single one, or id:NUMBER"),
        (["--add", "<|im_end|>"], "special token"),
        (["--ad", "x"], "--ad"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence_and_writes_nothing(flags, expected, run_of, tmp_path, capsys):
    out = tmp_path / "mine.json"
    assert expected in refused(capsys, run_of, *flags, "--out", out)
    assert not out.exists()


def test_a_vocabulary_that_is_left_to_mlx_lm_is_known(gemma_folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"model: {gemma_folder}\n")
    tokenizer, vocabulary = _tokenizer(tmp_path, False)
    assert vocabulary == 262208 and tokenizer.encode("Sorry", add_special_tokens=False)


def test_a_folder_without_tokens_or_room_is_one_sentence(run_of, tmp_path, capsys):
    assert "tokens.json" in refused(capsys, tmp_path / "nowhere")
    assert "there is no folder" in refused(capsys, run_of, "--veto", "I", "--out", tmp_path / "no" / "folder.json")


# What align takes

BAD_FILES = {
    "not JSON": ("[", "is not JSON"),
    "no list": ('{"id": 5}', "is not a list"),
    "empty": ("[]", "is not a list"),
    "an id alone": ("[5]", "is not a list"),
    "a truth for an id": ('[{"token": "I", "id": true}]', "is not a list"),
    "no such id": ('[{"token": "I", "id": 999999}]', "none of this model's"),
    "below zero": ('[{"token": "I", "id": -1}]', "none of this model's"),
    "another model's": ('[{"token": "illegal\\u001b", "id": 43}]', "“illegal⟨U+001B⟩”, id 43, is “"),
    "twice": ('[{"token": "I", "id": 43}, {"token": "I", "id": 43}]', "twice"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_does_not_fit_is_one_sentence_with_its_name(name, base, tmp_path):
    text, expected = BAD_FILES[name]
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match=r"t\.json") as told:
        read_token_file(tmp_path / "t.json", base.tokenizer, base.vocabulary)
    assert expected in str(told.value) and "\n" not in str(told.value)


def test_a_special_token_is_refused(base, tmp_path):
    special = special_ids(base.tokenizer, base.vocabulary)[0]
    (tmp_path / "t.json").write_text(json.dumps([{"token": base.tokenizer.decode([special]), "id": special}]))
    with pytest.raises(UserError, match="special token"):
        read_token_file(tmp_path / "t.json", base.tokenizer, base.vocabulary)


def test_align_uses_the_file_as_it_is_and_writes_nothing_for_another_models(words, tmp_path, capsys):
    chosen = [words[2], words[0]]
    (tmp_path / "t.json").write_text(json.dumps(chosen))
    flags = ["--safety-tokens", str(tmp_path / "t.json"), "--adapter-path", str(tmp_path / "a"), "--iters", "1"]
    flags += ["--test-prompts", "2", "--direction-train", "32", "--direction-validation", "16", "--token-samples", "1"]
    flags += ["--coeff", "0.7", "--no-report"]
    assert align([*flags, "--force"]) == 0  # two words are little of what steering does, one step teaches little
    rows = json.loads((tmp_path / "a" / "run" / "tokens.json").read_text())
    assert [{"token": row["token"], "id": row["id"]} for row in rows] == chosen  # its order, too
    assert all(row["votes"] >= 0 and row["teacher_prob"] > 0 for row in rows)  # measured all the same
    capsys.readouterr()
    (tmp_path / "t.json").write_text('[{"token": "I", "id": 44}]')
    assert align([*flags[:3], str(tmp_path / "b"), *flags[4:]]) == 2
    assert "in this model" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_an_edited_file_is_another_run(base, words, tmp_path):
    """A stopped run does not go on with other tokens than it began with."""
    path = tmp_path / "t.json"
    recipe = resolve({}, {"safety_tokens": str(path)})[0]
    recipe = replace(recipe, run=replace(recipe.run, model=TINY))
    made = []
    for rows in (words[:2], words[:3], words[:2]):
        path.write_text(json.dumps(rows))
        made.append(fingerprint(*run_parts(recipe, base, built_in_sets(TINY)).values()))
    assert made[0] == made[2] != made[1]
