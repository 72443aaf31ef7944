"""Base, aligned and teacher in one conversation each, through standard input as a user has it."""

import io
import json
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from safesteer_mlx import chat
from safesteer_mlx.chat import ChatSession, main, make_voices
from safesteer_mlx.method.residual import _override, blocks, steer, view
from safesteer_mlx.method.rollout import Sampling, generate
from safesteer_mlx.method.student import make_student, save_adapters, with_adapters
from safesteer_mlx.recipe import MODELS, resolve
from safesteer_mlx.system.load import Loaded, load
from safesteer_mlx.system.screen import UserError

TINY = str(MODELS / "tiny-chat")
LAYER, COEFF = 3, 0.5


@pytest.fixture(scope="module")
def base() -> Loaded:
    return load(TINY)


@pytest.fixture(scope="module")
def vector():
    return 20 * mx.random.normal((128,), key=mx.random.key(3))


@pytest.fixture(scope="module")
def adapters(base, vector, tmp_path_factory):
    """Adapters that change the model, and the direction of their run."""
    settings = resolve({}, {})[0].train
    student = make_student(base.model, settings, 0)
    mx.random.seed(1)
    names = [(n, w) for n, w in tree_flatten(student.trainable_parameters()) if n.endswith("lora_b")]
    student.load_weights([(n, 0.3 * mx.random.normal(w.shape)) for n, w in names], strict=False)
    folder = tmp_path_factory.mktemp("run") / "adapters"
    save_adapters(folder, student, settings, TINY, 0)
    (folder / "run").mkdir()
    (folder / "run" / "direction.json").write_text(json.dumps({"layer": LAYER, "vector": vector.tolist()}))
    return folder


def asked(adapters, typed: bytes, *flags: str) -> list[str]:
    command = [sys.executable, "-m", "safesteer_mlx.chat", TINY, "--adapter-path", str(adapters), "--max-tokens", "24"]
    done = subprocess.run([*command, *flags], input=typed, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()


def answer(base, model, *turns: str) -> str:
    """What a model says after these turns, the user's first: by our own engine."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    row = list(base.tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    return generate(model, [row], Sampling(base.eos_ids, 24))[0].text(base.tokenizer)


def test_each_answers_as_itself_and_keeps_its_own_history(base, vector, adapters):
    models = {
        "base": base.model,
        "aligned": with_adapters(base.model, adapters),
        "teacher": steer(base.model, LAYER, vector, COEFF),
    }
    first = {name: answer(base, model, "Name a colour.") for name, model in models.items()}
    second = {name: answer(base, model, "Name a colour.", first[name], "Why?") for name, model in models.items()}
    alone = {name: answer(base, model, "Why?") for name, model in models.items()}
    assert len(set(first.values())) == 3 and second != alone
    typed = b"Name a colour.\n\nWhy?\n/reset\nWhy?\n/quit\nNever read.\n"
    lines = asked(adapters, typed, "--steer", str(COEFF))
    expected = [f"{name}: {said.strip()}" for turn in (first, second, alone) for name, said in turn.items()]
    assert lines == "\n".join(expected).splitlines()


def test_a_teacher_that_is_steered_on_prompts_alone_talks_as_it_was_chosen(base, vector, adapters, tmp_path):
    shutil.copytree(adapters, tmp_path / "adapters")
    record = tmp_path / "adapters" / "run" / "direction.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"prompts_only": True}))
    on_prompts, everywhere = (steer(base.model, LAYER, vector, COEFF, only) for only in (True, False))
    first = answer(base, on_prompts, "Name a colour.")
    assert first != answer(base, everywhere, "Name a colour.")
    lines = asked(tmp_path / "adapters", b"Name a colour.\n", "--steer", str(COEFF))
    assert "\n".join(lines).split("teacher: ")[1] == first.strip()


def test_without_steer_there_are_two_and_bytes_that_are_no_text_are_read(adapters):
    lines = asked(adapters, b"Name \xff a colour.")
    assert [line.partition(":")[0] for line in lines if ": " in line][:2] == ["base", "aligned"]


def test_sampling_repeats_with_the_seed_and_changes_with_it(adapters):
    said = [asked(adapters, b"Name a colour.\n", "--temp", "1.5", "--seed", seed) for seed in ("1", "1", "2")]
    assert said[0] == said[1] != said[2]


def test_one_set_of_weights_serves_all(base, adapters):
    size = sum(w.nbytes for _, w in tree_flatten(base.model.parameters()))
    before = mx.get_active_memory()
    voices = make_voices(base.model, adapters, COEFF)
    mx.eval([v.parameters() for v in voices.values()])
    assert mx.get_active_memory() - before < size / 2  # the adapters' own
    assert len(blocks(voices["teacher"])) == len(blocks(base.model))


def test_a_message_is_read_and_not_the_conversation_again(base):
    shapes = []
    model = view(base.model)
    _override(blocks(model)[0], "Counted", lambda call, x, *a, **k: (shapes.append(x.shape[1]), call(x, *a, **k))[1])
    voice, turns, said = ChatSession(model), [], []
    for message in ("How do I bake bread?", "What is 12 plus 30?", "Sort these words: pear, apple"):
        turns.append({"role": "user", "content": message})
        prompt = chat.render(base.tokenizer, turns)
        shapes.clear()
        pieces = chat.stream({"v": voice}, {"v": prompt}, base.tokenizer, max_tokens=24)
        said.append("".join(text for _, text in pieces))
        assert len(voice.ids) == voice.cache[0].offset  # all that was said was read
        again = generate(base.model, [prompt], Sampling(base.eos_ids, 24))[0]
        assert said[-1] == again.text(base.tokenizer)
        read = sum(n for n in shapes if n > 1)
        assert read < len(prompt) / (1 if len(said) == 1 else 2)
        turns.append({"role": "assistant", "content": said[-1]})
    # Another conversation begins with what the template begins with.
    other = chat.render(base.tokenizer, [{"role": "user", "content": "How do I repair a bicycle?"}])
    left = voice.left_to_read(other)
    assert 1 <= len(left) < len(other) and voice.cache[0].offset == len(other) - len(left)


def test_a_cache_that_cannot_be_cut_back_is_begun_again(base, monkeypatch):
    voice = ChatSession(base.model)
    assert voice.left_to_read([1, 2, 3, 4]) == [1, 2, 3, 4]
    base.model(mx.array([[1, 2, 3, 4]]), cache=voice.cache)
    monkeypatch.setattr("mlx_lm.models.cache.can_trim_prompt_cache", lambda cache: False)
    assert voice.left_to_read([1, 2, 3, 5]) == [1, 2, 3, 5] and voice.cache[0].offset == 0


HOSTILE = "[red]\x1b]0;owned\x07\u202eabc\x9b31m[/red]"
SHOWN = "[red]⟨U+001B⟩]0;owned⟨U+0007⟩⟨U+202E⟩abc⟨U+009B⟩31m[/red]"


@pytest.mark.parametrize("interactive", [False, True], ids=["piped", "terminal"])
def test_no_escape_of_a_model_reaches_the_terminal(interactive, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    if interactive:
        monkeypatch.setenv("FORCE_COLOR", "1")
    pieces = [("base", HOSTILE[:9]), ("aligned", "fine"), ("base", HOSTILE[9:])]
    said = chat._show(iter(pieces), ["base", "aligned"], interactive)
    out = capsys.readouterr().out
    assert SHOWN in out and "fine" in out
    assert not {"\x07", "\u202e", "\x9b"} & set(out) and "\x1b]" not in out
    assert said == {"base": HOSTILE, "aligned": "fine"}  # history keeps what was said


def test_no_thought_goes_back_and_a_refused_conversation_is_told_and_gone_on_from(
    adapters, tmp_path, capsys, monkeypatch
):
    """A template like gpt-oss's, which refuses its own channels in an earlier turn; and whatever else it refuses."""
    folder, marks = tmp_path / "oss", ("<|channel|>", "<|message|>")
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("data"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])[-len(marks) :]
    for (word, place), mark in zip(words, marks, strict=True):  # the last words make room, as ids need an embedding
        merges = tokenizer["model"]["merges"]
        tokenizer["model"]["merges"] = [pair for pair in merges if "".join(pair).replace(" ", "") != word]
        tokenizer["model"]["vocab"] = {k: v for k, v in tokenizer["model"]["vocab"].items() if k != word}
        own = {"id": place, "content": mark, "special": True, "normalized": False, "single_word": False}
        tokenizer["added_tokens"].append(own | {"lstrip": False, "rstrip": False})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    refuses = "{% for m in messages %}{% if '<|channel|>' in m.content or 'No!' in m.content %}"
    refuses += "{{ raise_exception('no channels here') }}{% endif %}{% endfor %}"
    settings["chat_template"] = refuses + settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    base, prompts = load(str(folder)), []
    said = "<|channel|>analysis<|message|>They ask.<|channel|>final<|message|>It is blue.<|im_end|>"

    def stream(voices, asked, tokenizer, **options):
        prompts.append(tokenizer.decode(asked["aligned"]))
        for name, voice in voices.items():
            voice.ids = [*asked[name], *tokenizer.encode(said, add_special_tokens=False)]
            yield name, said

    monkeypatch.setattr(chat, "stream", stream)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Which?\nWhy?\nNo!\nHow?\n")))
    assert base.tokenizer.has_thinking
    assert main([str(folder), "--adapter-path", str(adapters)]) == 0
    assert len(prompts) == 3 and all("It is blue." in prompt for prompt in prompts[1:])
    assert not any(word in prompt for prompt in prompts for word in ("<|channel|>", "They ask", "No!"))
    out = [line for line in capsys.readouterr().out.splitlines() if "no channels here" in line]
    assert len(out) == 1 and "the chat template refuses several turns" in out[0] and "/reset" in out[0]


def test_a_terminal_shows_them_side_by_side(adapters):
    import pty
    import select

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "safesteer_mlx.chat", TINY, "--adapter-path", str(adapters), "--max-tokens", "4"]
    done = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"COLUMNS": "90"})
    os.close(theirs)
    out = b""

    def read_until(mark: bytes, times: int) -> None:
        nonlocal out
        while out.count(mark) < times and select.select([ours], [], [], 60)[0]:
            out += os.read(ours, 65536)

    read_until(b"> ", 1)
    os.write(ours, b"Name a colour.\n")
    read_until(b"> ", 2)
    os.write(ours, b"\x04")  # Ctrl-D
    assert done.wait(60) == 0
    os.close(ours)
    assert any("base" in line and "aligned" in line for line in out.decode().splitlines())
    assert "/reset" in out.decode()


BAD = {
    "no adapters": (["--adapter-path", "nowhere"], "nowhere"),
    "steered away": (["--steer", "-1"], "--steer -1.0 does not fit; it must be above 0"),
    "steered without end": (["--steer", "inf"], "--steer inf"),
    "no words": (["--max-tokens", "0"], "--max-tokens: 0"),
    "cold": (["--temp", "-1"], "--temp"),
    "no nucleus": (["--top-p", "0"], "--top-p"),
    "no number": (["--seed", "x"], "--seed"),
    "unknown flag": (["--stear", "1"], "--stear"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_sentence(name, adapters, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    flags, expected = BAD[name]
    flags = flags if "--adapter-path" in flags else ["--adapter-path", str(adapters), *flags]
    assert main([TINY, *flags]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1 and "Traceback" not in said


DIRECTIONS = {
    "none": (None, "holds no direction"),
    "another model's": ({"layer": 3, "vector": [1.0] * 7}, "holds no direction"),
    "a block too far": ({"layer": 99, "vector": [1.0] * 128}, "holds no direction"),
    "a system prompt": ({"layer": 0, "vector": [0.0]}, "system prompt"),
    "no numbers": ({"layer": 0, "vector": "x"}, "is not as align writes it"),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_steer_needs_the_runs_direction(name, base, adapters, tmp_path):
    found, expected = DIRECTIONS[name]
    shutil.copytree(adapters, tmp_path / "a")
    path = tmp_path / "a" / "run" / "direction.json"
    path.unlink() if found is None else path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=expected):
        make_voices(base.model, tmp_path / "a", 1.0)
