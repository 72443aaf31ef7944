"""Bad input, as a user gives it: each ends in one sentence and exit code 2, and nothing is written.

What is accepted instead says so: a byte-order mark, Windows line ends, a prompt given twice or too long.
"""

import copy
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from judges import make_judge
from mlx_lm.tokenizer_utils import TokenizerWrapper
from runs import files

from safesteer_mlx.align import main
from safesteer_mlx.evals import suites
from safesteer_mlx.formats.readers import reader_for
from safesteer_mlx.method import prompts
from safesteer_mlx.method.prompts import load_instructions
from safesteer_mlx.method.rollout import Sampling
from safesteer_mlx.method.token_file import read_token_file
from safesteer_mlx.recipe import MODELS, TrainSettings, parse, read_yaml, resolve
from safesteer_mlx.system.chat_template import check_template, template_of
from safesteer_mlx.system.finished import RECORD, load_base, read_record
from safesteer_mlx.system.load import _guarded, load, read_tokenizer
from safesteer_mlx.system.model_files import Tensor, check_config, check_model_folder, check_weights, read_header
from safesteer_mlx.system.screen import Screen, UserError, exit_code, visible
from safesteer_mlx.system.shape import shape_of

pytestmark = pytest.mark.usefixtures("few_prompts")

TINY = MODELS / "tiny-chat"


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below, with its size and time of change."""
    return {str(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")}


def refused(capsys, tmp_path: Path, *argv: str) -> str:
    before = tree(tmp_path)
    assert main(["--adapter-path", str(tmp_path / "out"), *argv]) == 2
    out, said = capsys.readouterr()
    assert said.startswith("safesteer-mlx: ") and said.count("\n") == 1 and said.endswith("\n"), said
    assert "Traceback" not in said + out and "; " in said, said
    assert visible(said[:-1]) == said[:-1]
    assert len(said.replace(str(tmp_path), "")) < 600, said
    assert tree(tmp_path) == before
    return said


# Flags

LORA = "--lora-parameters"
FLAGS = {
    "--learning-rat 1": "--learning-rate",
    "--batchsize 4": "--batch-size",
    "--no-such-thing-at-all 1": "--help",
    "--seed": "--seed",
    "--seed -1": "at least 0",
    "--seed 4294967296": "at most",
    "--seed 1e400": "finite",
    "--seed 0x10": "0x10",
    "--seed ten": "ten",
    "--iters 0": "at least 1",
    "--iters 2.5": "2.5",
    "--iters -3": "-3",
    "--epochs 0": "above 0",
    "--epochs inf": "finite",
    "--epochs nan": "finite",
    "--learning-rate 0": "above 0",
    "--learning-rate 1,5": "1,5",
    "--learning-rate=-1e-4": "above 0",
    "--anchor-ratio 0.95": "at most 0.9",
    "--anchor-ratio -0.1": "at least 0",
    "--temp 0": "above 0",
    "--top-p 0": "above 0",
    "--top-p 1.01": "at most 1",
    "--top-p half": "half",
    "--max-tokens 0": "at least 1",
    "--max-prompt-length 7": "at least 8",
    "--batch-size 0": "at least 1",
    "--batch-size many": "many",
    "--micro-batch-size 0": "at least 1",
    "--micro-batch-tokens 0": "at least 1",
    "--generation-batch-size 0": "at least 1",
    "--num-layers -2": "at least -1",
    "--prune-last 1": "at most 0.99",
    "--warmup 1": "at most 0.9",
    "--weight-decay -1": "at least 0",
    "--max-grad-norm 0": "above 0",
    "--horizon 0": "at least 1",
    "--safety-tokens 0": "at least 1",
    "--min-steered-prob 2": "at most 1",
    "--direction-train 1": "at least 2",
    "--test-prompts 0": "at least 1",
    "--save-every 0": "at least 1",
    "--ema-rate 2": "at most 1",
    "--loss reverse_lk": "reverse_kl",
    "--loss 3": "grouped_reverse_kl",
    "--loss-tokens safty": "safety",
    "--teacher steeer": "steer",
    "--token-method votes": "vote",
    "--fine-tune-type qlora": "lora",
    "--preset papers": "paper",
    "--coeff strong": "auto",
    "--coeff nan": "finite",
    "--coeff-grid 1 two": "coeff_grid",
    "--coeff-grid 0 1": "above 0",
    "--coeff-grid nan": "coeff_grid",
    "--offline=yes": "--offline",
    "one --model two": "two models",
    "one two": "two",
    "-c nowhere.yaml": "nowhere.yaml",
    "./nowhere": "nowhere",
    "/nowhere/at/all": "/nowhere/at/all",
    "a/b/c/d": "a/b/c/d",
    f"{LORA} {{rank:0}}": "rank",
    f"{LORA} 3": "lora_parameters",
    f"{LORA} [8]": "lora_parameters",
    f"{LORA} {{": "YAML",
    f"{LORA} {{alpha:_2}}": "alpha",
    f"{LORA} {{rank:_0}}": "rank = 0",
    f"{LORA} {{rank:_many}}": "many",
    f"{LORA} {{rank:_true}}": "rank",
    f"{LORA} {{scale:_big}}": "scale",
    f"{LORA} {{scale:_.nan}}": "scale",
    f"{LORA} {{dropout:_1}}": "dropout",
    f"{LORA} {{keys:_all}}": "keys",
    f"{LORA} {{rank:_1,rank:_2}}": "twice",
    "--num-layers 9": "8 blocks",
    "--fine-tune-type full": "full",
    "--direction-train 9999": "9999",
    "--revision v1": "--revision v1",
}


@pytest.mark.parametrize("line", FLAGS)
def test_flags(line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert FLAGS[line] in refused(
        capsys, tmp_path, *(word.replace("_", " ") if "{" in word else word for word in line.split())
    )


# YAML

YAML = {
    "seed: [1\nloss: x\n": "line 2",
    "seed:\t1\n": "not YAML",
    "a: b: c\n": "line 1",
    "loss: reverse_kl\n  anchor: 0\n": "line 2",
    "- seed\n": "list",
    "just words": "str",
    "3": "int",
    "sed: 1\n": "did you mean seed?",
    "learning-rate: 1\n": "did you mean learning_rate?",
    "1: 2\n": "unknown key 1",
    "{[1, 2]: 3}": "not YAML",
    "seed: 1\nloss: reverse_kl\nseed: 2\n": "'seed' twice (line 3)",
    "lora_parameters: {rank: 1, rank: 2}\n": "'rank' twice",
    "seed: one\n": "one",
    "seed: true\n": "True",
    "seed: 1.5\n": "1.5",
    "seed:\n": "empty",
    "seed: [1]\n": "[1]",
    "seed: 2026-13-45\n": "not YAML",
    "seed: 2026-11-24\n": "seed",
    "seed: 1" + "0" * 400 + "\n": "finite",
    "seed: 1" + "0" * 9000 + "\n": "not YAML",
    "model: 3\n": "model = 3",
    "model: ''\n": "empty",
    'model: "a\\0b"\n': "NUL",
    "data: no\n": "data = False",
    "adapter_path: [x]\n": "adapter_path",
    "refusal_prefixes: I\n": "refusal_prefixes",
    "refusal_prefixes: []\n": "refusal_prefixes",
    "refusal_prefixes: [1, 2]\n": "refusal_prefixes",
    "coeff: true\n": "coeff",
    "coeff: .inf\n": "finite",
    "coeff_grid: [1, x]\n": "coeff_grid",
    "coeff_grid: [true]\n": "coeff_grid",
    "coeff_grid: {}\n": "coeff_grid",
    "lora_parameters: 3\n": "lora_parameters",
    "lora_parameters: {1: 2}\n": "has no 1",
    "lora_parameters: {keys: [1]}\n": "keys",
    "renormalize: 1\n": "renormalize",
    "trust_remote_code: 'yes'\n": "trust_remote_code",
    "system_prompt: ''\n": "empty",
    "seed: !!python/object/apply:os.getpid []\n": "not YAML",
    "seed: !!bool maybe\n": "not YAML",
    "seed: !!int ''\n": "not YAML",
    "seed: !!timestamp x\n": "not YAML",
    "seed: !!map [a]\n": "not YAML",
    "seed: &a [*a]\n": "seed",
    "a: &a [1,1,1,1,1,1,1,1,1]\n"
    + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    ): "unknown key",
    "seed: 1\n---\nseed: 2\n": "not YAML",
    "seed: \x07\n": "not YAML",
    "[" * 10_000: "not YAML",
    b"\xff\xfes\x00e\x00": "UTF-8",
    b"loss: \xe9\n": "UTF-8",
}


@pytest.mark.parametrize("text", YAML, ids=lambda t: repr(t)[:40])
def test_yaml(text, tmp_path, capsys):
    (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert YAML[text] in refused(capsys, tmp_path, "-c", str(tmp_path / "run.yaml"))


def test_yaml_that_is_a_folder(tmp_path, capsys):
    assert "cannot be read" in refused(capsys, tmp_path, "-c", str(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "\ufeffseed: 7\r\nlearning_rate: 3e-4\r\n", "seed: 7.0", "iters: 2"]
)
def test_yaml_that_is_accepted(text, tmp_path):
    (tmp_path / "run.yaml").write_bytes(text.encode())
    recipe, _ = resolve({}, {}, None, tmp_path / "run.yaml")
    assert recipe.run.seed == (7 if "seed" in text else 42)
    assert recipe.train.learning_rate == (3e-4 if "learning_rate" in text else TrainSettings().learning_rate)


# Data

DATA = {
    ("empty.jsonl", b""): "no prompts",
    ("empty.json", b""): "line 1",
    ("list.json", b"[]"): "no prompts",
    ("blank.txt", b"\n \r\n\t\n"): "no prompts",
    ("bom.txt", b"\xef\xbb\xbf\n"): "no prompts",
    ("object.json", b'{"instruction": "x"}'): "dict",
    ("number.json", b"3"): "int",
    ("null.json", b"null"): "NoneType",
    ("broken.json", b"[\n\n,]"): "line 3",
    ("cut.jsonl", b'{"instruction": "fine"}\n{"instruction": \n'): "line 2",
    ("words.jsonl", b"just words\n"): "line 1",
    ("two.jsonl", b'{"prompt": "a"} {"prompt": "b"}\n'): "line 1",
    ("nothing.jsonl", b"{}\n"): "nothing",
    ("keys.jsonl", b'{"question": "x", "id": 3}\n'): "'question', 'id'",
    ("number.jsonl", b'{"prompt": 3}\n'): "line 1",
    ("null.jsonl", b'"fine"\n{"instruction": null}\n'): "line 2",
    ("list.jsonl", b'{"instruction": ["x"]}\n'): "line 1",
    ("bare.jsonl", b"3\n"): "int",
    ("array.jsonl", b"[1]\n"): "list",
    ("void.jsonl", b'{"prompt": ""}\n'): "line 1",
    ("spaces.jsonl", b'"x"\n{"prompt": "  \\n"}\n'): "line 2",
    ("roleless.jsonl", b'{"messages": [{"role": "assistant", "content": "x"}]}\n'): "line 1",
    ("turnless.jsonl", b'{"messages": []}\n'): "line 1",
    ("strange.jsonl", b'{"messages": [3, null]}\n'): "line 1",
    ("parts.jsonl", b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}\n'): "line 1",
    ("utf16.jsonl", '{"prompt": "x"}\n'.encode("utf-16")): "UTF-16",
    ("utf16be.txt", b"\xfe\xff\x00x"): "UTF-16",
    ("utf16le.txt", "words".encode("utf-16-le")): "NUL",
    ("latin.txt", b"one\ntwo\ncaf\xe9\n"): "line 3",
    ("latin.jsonl", b'"one"\n"caf\xe9"\n'): "line 2",
    ("latin.json", b'["caf\xe9"]'): "line 1",
    ("nul.txt", b"one\ntw\0o\n"): "line 2",
    ("nul.jsonl", b'"one"\n"tw\\u0000o"\n'): "NUL",
    ("half.jsonl", b'"one"\n"tw\\ud800o"\n'): "lone surrogate",
    ("half.json", b'["\\udfff"]'): "item 1",
    ("deep.json", b"[" * 10_000 + b"]" * 10_000): "json",
    ("deep.jsonl", b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"): "line 1",
    ("digits.jsonl", b'"x"\n' + b"1" * 5000 + b"\n"): "line 2",
    ("prompts.csv", b"prompt\nx\n"): ".csv",
    ("prompts", b"x\n"): "nothing",
    ("prompts.JSONL", b'"x"\n'): ".JSONL",
    ("long.txt", b"word " * 2000): "--max-prompt-length",
    ("\x1b[31m.txt", b""): "⟨U+001B⟩[31m",
    ("\u202eevil.txt", b""): "⟨U+202E⟩evil",
}


@pytest.mark.parametrize("case", DATA, ids=lambda c: visible(c[0]))
def test_data(case, tmp_path, capsys):
    name, content = case
    (tmp_path / name).write_bytes(content)
    said = refused(capsys, tmp_path, "--data", str(tmp_path / name))
    assert DATA[case] in said and (visible(name) in said or name == "long.txt")


def test_data_that_is_not_there_or_is_an_empty_folder(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    for name in ("none.jsonl", "folder", "folder.jsonl/x"):
        assert "does not exist" in refused(capsys, tmp_path, "--data", str(tmp_path / name))


ACCEPTED = {
    "bom.txt": b"\xef\xbb\xbfone\ntwo\n",
    "windows.txt": b"one\r\ntwo\r\n\r\n",
    "windows.jsonl": b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n{"text": "two"}\r\n',
    "one-line.json": b'["one", {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "two"}]}]',
    "no-last-end.jsonl": b'"one"\n"two"',
    "extra-keys.jsonl": b'{"instruction": "one", "category": null, "id": [1]}\n{"prompt": "two", "completion": 3}\n',
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_data_that_is_accepted(name, tmp_path):
    (tmp_path / name).write_bytes(ACCEPTED[name])
    assert [i.text for i in load_instructions(tmp_path / name)] == ["one", "two"]


def test_a_million_lines_are_read(tmp_path):
    (tmp_path / "many.jsonl").write_bytes(b'{"instruction": "one"}\n' * 1_000_000)
    assert len(load_instructions(tmp_path / "many.jsonl")) == 1_000_000


def test_prompts_given_twice_or_too_long_are_left_out_and_said(tmp_path, capsys):
    from safesteer_mlx.method.run import make_run
    from safesteer_mlx.method.training_prompts import training_prompts
    from safesteer_mlx.system.load import load

    base = load(str(TINY))
    (tmp_path / "data.txt").write_text("add the lamp\nadd the lamp\n" + "lamp " * 600 + "\nmove the box\n")
    alone = {"reuse_direction_prompts": False, "adapter_path": str(tmp_path / "adapters")}
    recipe, _ = resolve({}, {"model": str(TINY), "data": str(tmp_path / "data.txt"), **alone})
    run = make_run(recipe, base, Screen())
    harmful, _ = training_prompts(run)
    said = capsys.readouterr().out
    assert len(harmful) == 2 and "1 prompts are there twice" in said and "1 prompts are longer than 512" in said


# Models


def header_of(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def put_header(path: Path, header: object, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def change(folder: Path, name: str = "config.json", **new) -> None:
    content = json.loads((folder / name).read_text()) | new
    (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def weights(folder: Path, edit) -> None:
    """Change the tensors, and write them as a well-formed file."""
    path = folder / "model.safetensors"
    tensors = dict(mx.load(str(path)))
    mx.eval(tensors)
    edit(tensors)
    mx.save_safetensors(str(path), tensors)


def header(folder: Path, edit) -> None:
    """Change what the header says, not the data."""
    found, body = header_of(folder / "model.safetensors")
    put_header(folder / "model.safetensors", edit(found) or found, body)


def index(folder: Path, **weight_map) -> None:
    own = dict.fromkeys(header_of(folder / "model.safetensors")[0], "model.safetensors")
    own.pop("__metadata__", None)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": own | weight_map}))


EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def link(folder: Path, name: str, target: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(target)


def python(folder: Path, name: str) -> None:
    (folder / name).write_text(f"open({str(folder.parent / 'ran')!r}, 'w').write('code ran')\n")


def settings_of(folder: Path, **new) -> None:
    change(folder, "tokenizer_config.json", **new)


def turns_end_with(folder: Path, end: object) -> None:
    change(folder, "generation_config.json", eos_token_id=end)


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)  # opening it would wait for ever


def huge(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"{}")
    os.truncate(folder / name, 10**12)  # takes no room on the disk


# As Phi-4-mini has it, for transformers.
MAPPED = {"AutoConfig": "m.M", "AutoModelForCausalLM": "m.M", "AutoTokenizer": "m.M"}
MODELS_BAD = {
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json"),
    "configuration not JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "configuration a list": (lambda f: (f / "config.json").write_text("[]"), "list"),
    "configuration binary": (lambda f: (f / "config.json").write_bytes(b"\xff\0"), "is not JSON"),
    "configuration deep": (lambda f: (f / "config.json").write_text("[" * 10_000), "is not JSON"),
    "code for the model": (
        lambda f: (python(f, "m.py"), change(f, model_file="m.py")),
        "model_file = 'm.py' in config",
    ),
    "code by auto_map": (
        lambda f: (python(f, "m.py"), change(f, auto_map={"AutoModel": "m.M"}, model_type="qwen99")),
        "auto_map = {'AutoModel': 'm.M'} in config.json",
    ),
    "code by an auto_map that is none": (
        lambda f: (python(f, "m.py"), change(f, auto_map=["m.M", None])),
        "auto_map = ['m.M', None] in config.json",
    ),
    "code for the tokenizer, whose class only config.json names": (
        lambda f: (python(f, "m.py"), change(f, auto_map=MAPPED), settings_of(f, tokenizer_class=...)),
        "auto_map = {'AutoConfig': 'm.M'",
    ),
    "code for the tokenizer, beside a class": (
        lambda f: (python(f, "m.py"), change(f, auto_map=MAPPED), settings_of(f, auto_map=MAPPED)),
        "in tokenizer_config.json",
    ),
    "code for the tokenizer": (
        lambda f: (python(f, "t.py"), change(f, "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]})),
        "t.T",
    ),
    "no architecture": (lambda f: change(f, model_type=...), "model_type = None"),
    "architecture a path": (lambda f: change(f, model_type="../../evil"), "../../evil"),
    "architecture a number": (lambda f: change(f, model_type=3), "model_type = 3"),
    "unknown architecture": (lambda f: change(f, model_type="qwen99"), "qwen99"),
    "escape in the architecture": (lambda f: change(f, model_type="a\x1b[2Jb"), "model_type"),
    "no layers": (lambda f: change(f, num_hidden_layers=0), "num_hidden_layers = 0"),
    "layers negative": (lambda f: change(f, num_hidden_layers=-1), "num_hidden_layers = -1"),
    "layers without end": (lambda f: change(f, num_hidden_layers=10**12), "1000000000000"),
    "layers in words": (lambda f: change(f, num_hidden_layers="eight"), "eight"),
    "more layers than weights": (lambda f: change(f, num_hidden_layers=9), "issing"),
    "fewer layers than weights": (lambda f: change(f, num_hidden_layers=7), "not in model"),
    "no width": (lambda f: change(f, hidden_size=...), "hidden_size"),
    "width beyond memory": (lambda f: change(f, hidden_size=10**15), "hidden_size = 1000000000000000"),
    "width zero": (lambda f: change(f, hidden_size=0), "hidden_size = 0"),
    "no vocabulary size": (lambda f: change(f, vocab_size=...), "vocab_size"),
    "vocabulary larger than the embedding": (lambda f: change(f, vocab_size=4000), "cannot be loaded"),
    "vocabulary smaller than the embedding": (lambda f: change(f, vocab_size=100), "cannot be loaded"),
    "other quantization": (lambda f: change(f, quantization={"bits": 8, "group_size": 64}), "8 bits in groups of 64"),
    "other groups": (lambda f: change(f, quantization={"bits": 4, "group_size": 32}), "groups of 32"),
    "quantization of nothing": (lambda f: change(f, quantization={}), "bits and group_size"),
    "quantization by zero": (lambda f: change(f, quantization={"bits": 0, "group_size": 0}), "bits and group_size"),
    "quantization in words": (lambda f: change(f, quantization="4bit"), "bits and group_size"),
    "quantization not told": (lambda f: change(f, quantization=..., quantization_config=...), "not in model"),
    "quantization of plain weights": (lambda f: weights(f, plain_weights), "no scales"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model*.safetensors"),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin"),
    "numpy weights": (lambda f: (f / "model.safetensors").rename(f / "weights.npz"), "weights.npz"),
    "a pickle under the right name": (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04N."), "4 bytes"),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "0 bytes"),
    "weights without tensors": (lambda f: put_header(f / "model.safetensors", {}, b""), "holds no tensor"),
    "weights cut": (lambda f: os.truncate(f / "model.safetensors", 400_000), "not fully covered"),
    "weights cut in the header": (lambda f: os.truncate(f / "model.safetensors", 400), "truncated"),
    "weights followed by more": (lambda f: (f / "model.safetensors").open("ab").write(b"x"), "not fully covered"),
    "header of 1e18 bytes": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 10**18) + b"{}"),
        "header too large",
    ),
    "header not JSON": (lambda f: put_header(f / "model.safetensors", b"nonsense", b""), "invalid JSON"),
    "header a list": (lambda f: put_header(f / "model.safetensors", [], b""), "invalid JSON"),
    "header deep": (lambda f: put_header(f / "model.safetensors", b'{"a":' * 10_000, b""), "recursion limit"),
    "tensor oversized": (lambda f: header(f, lambda h: h[NORM].update(shape=[10**12])), "invalid shape"),
    "tensor of negative size": (lambda f: header(f, lambda h: h[NORM].update(shape=[-128])), "integer `-128`"),
    "tensor beyond the file": (
        lambda f: header(f, lambda h: h[NORM].update(data_offsets=[10**12, 10**12 + 512])),
        "invalid offset for tensor",
    ),
    "tensor over another": (lambda f: header(f, lambda h: h[NORM].update(data_offsets=[256, 768])), f"`{NORM}`"),
    "offsets turned round": (lambda f: header(f, lambda h: h[NORM].update(data_offsets=[512, 0])), "no safetensors"),
    "tensor of an unknown type": (lambda f: header(f, lambda h: h[NORM].update(dtype="F3")), "F3"),
    "tensor of a type beyond MLX": (
        lambda f: header(f, lambda h: h[NORM].update(dtype="F64", shape=[64])),
        "as 'F64', which MLX does not read",
    ),
    "tensor of many dimensions": (
        lambda f: header(f, lambda h: h[NORM].update(shape=[128, *[1] * 16])),
        "'model.norm.weight' in a way",
    ),
    "tensor of another type": (lambda f: header(f, lambda h: h[NORM].update(dtype="I32")), "int32"),
    "tensor a number": (lambda f: header(f, lambda h: h.update({NORM: 3})), "no safetensors"),
    "tensor of another shape": (lambda f: header(f, lambda h: h[NORM].update(shape=[2, 64])), "shape"),
    "packed weights as floats": (
        lambda f: header(f, lambda h: h["model.layers.0.mlp.up_proj.weight"].update(dtype="F32")),
        "not uint32",
    ),
    "tensor missing": (lambda f: weights(f, lambda w: w.pop(NORM)), "issing"),
    "tensor too many": (lambda f: weights(f, lambda w: w.update(evil=mx.zeros(3))), "evil"),
    "scales missing": (lambda f: weights(f, lambda w: w.pop("model.layers.0.mlp.up_proj.scales")), "cannot be loaded"),
    "scales of nothing": (lambda f: weights(f, lambda w: w.update({"evil.scales": mx.zeros((1, 1))})), "'evil.scales'"),
    "weights twice": (lambda f: shutil.copy(f / "model.safetensors", f / "model-2.safetensors"), "in two files"),
    "index not JSON": (lambda f: (f / "model.safetensors.index.json").write_text("["), "is not JSON"),
    "index without a map": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
        "weight_map",
    ),
    "index up and out": (lambda f: index(f, evil="../../model.safetensors"), "'../../model.safetensors'"),
    "index to an absolute path": (lambda f: index(f, evil="/etc/passwd"), "'/etc/passwd'"),
    "index to a pickle": (lambda f: index(f, evil="model.bin"), "'model.bin'"),
    "index to a missing shard": (lambda f: index(f, evil="model-2.safetensors"), "lacks model-2.safetensors"),
    "index to a missing tensor": (lambda f: index(f, evil="model.safetensors"), "lacks evil"),
    "index to numbers": (lambda f: index(f, evil=3), "weight_map"),
    "link out of the folder": (lambda f: link(f, "config.json", "/etc/passwd"), "link out of"),
    "link to weights elsewhere": (
        lambda f: link(f, "model.safetensors", str(TINY / "model.safetensors")),
        "link out of",
    ),
    "link to nowhere": (lambda f: link(f, "tokenizer.json", "gone"), "leads nowhere"),
    "link in a circle": (lambda f: link(f, "tokenizer.json", "tokenizer.json"), "leads nowhere"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    "tokenizer not JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer"),
    "tokenizer of nothing": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer"),
    "tokenizer settings not JSON": (lambda f: (f / "tokenizer_config.json").write_text("x"), "is not JSON"),
    "no chat template": (lambda f: change(f, "tokenizer_config.json", chat_template=...), "no chat template"),
    "chat template broken": (lambda f: change(f, "tokenizer_config.json", chat_template="{% if"), "template"),
    "chat template refuses": (
        lambda f: change(f, "tokenizer_config.json", chat_template="{{ raise_exception('no') }}"),
        "template",
    ),
    "chat template adds nothing": (
        lambda f: change(f, "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}"),
        "template",
    ),
    "chat template leaves the sandbox": (
        lambda f: change(f, "tokenizer_config.json", chat_template="{{ ''.__class__.__mro__ }}"),
        "template",
    ),
    "no end of turn": (
        lambda f: (
            change(f, eos_token_id=...),
            (f / "generation_config.json").unlink(),
            change(f, "tokenizer_config.json", eos_token=None),
        ),
        "end-of-turn",
    ),
    "end of turn beyond the vocabulary": (
        lambda f: (change(f, eos_token_id=99999), (f / "generation_config.json").unlink()),
        "99999",
    ),
    # What a configuration says that mlx-lm uses only later, or not at all
    "rope theta in words": (lambda f: change(f, rope_theta="x"), "rope_theta = 'x', no number"),
    "rope theta null": (lambda f: change(f, rope_theta=None), "cannot be loaded, configuration: [rope]"),
    "rope theta a list": (lambda f: change(f, rope_theta=[1000.0]), "cannot be loaded, configuration: rope()"),
    "rope theta zero": (lambda f: change(f, rope_theta=0), "rope_theta = 0"),
    "rope theta infinite": (lambda f: change(f, rope_theta=float("inf")), "rope_theta = inf"),
    "epsilon negative": (lambda f: change(f, rms_norm_eps=-1e9), "rms_norm_eps = -1000000000.0"),
    "epsilon in words": (lambda f: change(f, rms_norm_eps="small"), "rms_norm_eps = 'small'"),
    "heads zero": (lambda f: change(f, num_attention_heads=0), "num_attention_heads = 0"),
    "heads not whole": (lambda f: change(f, num_attention_heads=4.5), "num_attention_heads = 4.5"),
    "heads true": (lambda f: change(f, num_key_value_heads=True), "num_key_value_heads = True"),
    "blocks that are reused, below zero": (lambda f: change(f, num_kv_reuse_layers=-(10**9)), "num_kv_reuse_layers"),
    "heads an object": (lambda f: change(f, num_attention_heads={}), "cannot be loaded, weights"),
    "vocabulary size not whole": (lambda f: change(f, vocab_size=1856.0), "cannot be loaded"),
    "weights of no numbers": (lambda f: weights(f, lambda w: w.update({NORM: w[NORM] * mx.nan})), "no numbers (NaN)"),
    "end of turn in words": (lambda f: turns_end_with(f, "x"), "token 'x', none of its 1856"),
    "end of turn negative": (lambda f: turns_end_with(f, [2, -1]), "token -1"),
    "end of turn a fraction": (lambda f: turns_end_with(f, 1e9), "token 1000000000.0"),
    "end of turn nothing": (lambda f: turns_end_with(f, [None]), "token None"),
    "end of turn an object": (lambda f: turns_end_with(f, {"a": 1}), "token {'a': 1}"),
    "generation settings a list": (lambda f: (f / "generation_config.json").write_text("[]"), "cannot be loaded"),
    "longest text -1": (lambda f: settings_of(f, model_max_length=-1), "model_max_length = -1"),
    "longest text 3": (lambda f: settings_of(f, model_max_length=3), "model_max_length = 3"),
    "longest text in words": (lambda f: settings_of(f, model_max_length="512"), "model_max_length = '512'"),
    "longest text a list": (lambda f: settings_of(f, model_max_length=[]), "model_max_length = []"),
    "tool parser unknown": (lambda f: settings_of(f, tool_parser_type="evil"), "'mlx_lm.tool_parsers.evil'"),
    "tool parser a path": (lambda f: settings_of(f, tool_parser_type="../evil"), "cannot be loaded, tokenizer"),
    "tool parser that is none": (lambda f: settings_of(f, tool_parser_type="__init__"), "cannot be loaded, tokenizer"),
    "template's module unknown": (lambda f: settings_of(f, chat_template_type="evil"), "'mlx_lm.chat_templates.evil'"),
    "special token a number": (lambda f: settings_of(f, eos_token=5), "eos_token has to be"),
    "padding on no side": (lambda f: settings_of(f, padding_side="up"), "Padding side"),
    # No regular files, or too large ones
    "a pipe as the configuration": (lambda f: pipe(f, "config.json"), "no config.json"),
    "a pipe as weights": (lambda f: pipe(f, "model.safetensors"), "model.safetensors cannot be read (it is not a reg"),
    "a pipe as more weights": (lambda f: pipe(f, "model-2.safetensors"), "it is not a regular file"),
    "a pipe as the index": (lambda f: pipe(f, "model.safetensors.index.json"), "it is not a regular file"),
    "a pipe as the tokenizer": (lambda f: pipe(f, "tokenizer.json"), "tokenizer.json cannot be read (it is not a"),
    "a pipe as the tokenizer's settings": (lambda f: pipe(f, "tokenizer_config.json"), "it is not a regular file"),
    "a pipe as generation settings": (lambda f: pipe(f, "generation_config.json"), "it is not a regular file"),
    "a pipe as special tokens": (lambda f: pipe(f, "special_tokens_map.json"), "it is not a regular file"),
    "a pipe as the chat template": (lambda f: pipe(f, "chat_template.jinja"), "it is not a regular file"),
    "a pipe as one of many templates": (
        lambda f: ((f / "additional_chat_templates").mkdir(), pipe(f, "additional_chat_templates/a.jinja")),
        "it is not a regular file",
    ),
    "a device as weights": (lambda f: link(f, "model.safetensors", "/dev/zero"), "link out of"),
    "a terabyte of configuration": (lambda f: huge(f, "config.json"), "1,000,000,000,000 bytes"),
    "a terabyte of tokenizer": (lambda f: huge(f, "tokenizer.json"), "1,000,000,000,000 bytes"),
    "a terabyte of template": (lambda f: huge(f, "chat_template.jinja"), "1,000,000,000,000 bytes"),
    # Tokenizers
    "tokenizer deep": (lambda f: (f / "tokenizer.json").write_text('{"a":' * 10_000), "cannot be loaded, tokenizer"),
    "tokenizer that panics": (
        lambda f: change(f, "tokenizer.json", model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"]}),
        "cannot be loaded, tokenizer: range end index",
    ),
    "tokenizer that panics over a normalizer": (
        lambda f: change(f, "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "cannot be loaded, tokenizer: Precompiled",
    ),
    "tokenizer of no model": (lambda f: change(f, "tokenizer.json", model=None), "cannot be loaded, tokenizer"),
    "tokenizer of added words in words": (lambda f: change(f, "tokenizer.json", added_tokens="x"), "cannot be loaded"),
    "tokenizer that splits by nonsense": (
        lambda f: change(
            f,
            "tokenizer.json",
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        ),
        "cannot be loaded, tokenizer",
    ),
    "tokenizer without words": (
        lambda f: change(f, "tokenizer.json", model={"type": "WordLevel", "vocab": {}, "unk_token": "?"}),
        "no refusal opener is a token of this model",
    ),
    "more words of no numbers": (lambda f: (f / "added_tokens.json").write_text('{"x": "y"}'), "cannot be loaded"),
    "more words a list": (lambda f: (f / "added_tokens.json").write_text("[]"), "cannot be loaded, tokenizer"),
    "special tokens a list": (lambda f: (f / "special_tokens_map.json").write_text("[1]"), "cannot be loaded"),
    "tokenizer's word below zero": (lambda f: with_token(f, -5), "cannot be loaded, tokenizer"),
    "tokenizer's word beyond 64 bits": (lambda f: with_token(f, 2**70), "cannot be loaded, tokenizer"),
}


def with_token(folder: Path, number: int, text: str = "<evil>") -> None:
    """An added token of this id, whatever the model has embeddings for."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"][text] = number
    more = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"].append({"id": number, "content": text} | more)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def plain_weights(tensors: dict[str, mx.array]) -> None:
    for name in [n for n in tensors if n.endswith((".scales", ".biases"))]:
        del tensors[name]


@pytest.fixture
def copied(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in TINY.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("name", MODELS_BAD)
def test_models(name, copied, tmp_path, capsys):
    spoil, expected = MODELS_BAD[name]
    spoil(copied)
    assert expected in refused(capsys, tmp_path, str(copied))
    assert not (tmp_path / "ran").exists()


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
REPLACED = "{% set n = namespace(x='aaaa') %}{% for i in range(20) %}{% set n.x = n.x.replace('a', 'aaaaaaaa') %}"
TEMPLATES = {
    "without end": (LOOP, "does not end within a second"),
    "without end for a long text": (
        "{% if messages[0].content | length > 99 %}" + LOOP + "{% endif %}",
        "within a second",
    ),
    "without end for a system turn": (
        "{% if messages[0].role == 'system' %}" + LOOP + "{% endif %}",
        "within a second",
    ),
    "without end for a dialogue": ("{% if messages | length > 2 %}" + LOOP + "{% endif %}", "does not end"),
    "without end without thinking": ("{% if not enable_thinking %}" + LOOP + "{% endif %}", "does not end"),
    "a number too large": ("{{ 10 ** (10 ** 9) }}", "does not end"),
    "a width": ("{{ '%999999999d' % 1 }}", "more than 512 MB"),
    "a text many times": ("{{ ('a' * 999999999) | length }}", "more than 512 MB"),
    "a list many times": ("{{ ([1] * 999999999) | length }}", "more than 512 MB"),
    "replaced again and again": (REPLACED + "{% endfor %}{{ n.x | length }}", "more than 512 MB"),
    "centred": ("{{ 'a'.center(10 ** 10) }}", "more than 512 MB"),
    "long when rendered": ("{{ 'a' * 2000000 }}", "more than 1000000 characters"),
    "long": ("a" * 64_001, "64001 characters, more than 64000"),
    "a number": (5, "no text but a int"),
    "true": (True, "no text but a bool"),
    "a list": ([], "multiple chat templates"),
    "an object of numbers": ({"default": 1}, "no text but a int"),
    "lists without a name": ([{"template": "a"}], "cannot be loaded, tokenizer"),
    "including": ("{% include 'config.json' %}", "refuses a single user turn"),
    "importing": ("{% import 'config.json' as c %}", "refuses a single user turn"),
    "half a character": ("\ud800", "refuses a single user turn"),
    "half a character when rendered": ("{{ '\\ud800' }}", "refuses a single user turn"),
    "brackets in brackets": ("{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}", "refuses a single user turn"),
    "lists in lists": ("{{ " + "[" * 30_000 + "]" * 30_000 + " }}", "refuses a single user turn"),
    "conditions in conditions": ("{% if 1 %}" * 3_000 + "{% endif %}" * 3_000, "refuses a single user turn"),
    "a macro in itself": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "refuses a single user turn"),
    "divided by zero": ("{{ 1 // 0 }}", "refuses a single user turn (integer division"),
    "a date of no form": ("{{ strftime_now(5) }}", "refuses a single user turn"),
    "unknown filter": ("{{ messages | evil }}", "No filter named 'evil'"),
    "nothing": ("", "adds nothing"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(name, copied, tmp_path, capsys):
    template, expected = TEMPLATES[name]
    settings_of(copied, chat_template=template)
    started = time.monotonic()
    assert expected in refused(capsys, tmp_path, str(copied))
    assert time.monotonic() - started < 20  # 2, where no other process wants the processor


PANICS = {
    "in its model": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"]}},
    "in its normalizer": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "at a text": {
        "post_processor": {
            "type": "TemplateProcessing",
            **{"single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}], "pair": [], "special_tokens": {}},
        }
    },
}


@pytest.mark.parametrize("name", PANICS)
def test_of_a_panic_only_our_sentence_is_shown(name, copied, capfd):
    change(copied, "tokenizer.json", **PANICS[name])
    assert of_the_tokenizer(copied, lambda base: base.tokenizer.encode("a")) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "cannot be loaded, tokenizer: " in said and "panicked" not in said


def test_what_is_written_while_a_tokenizer_works_is_shown(base, capfd, monkeypatch):
    def encode(text):
        os.write(2, b"natively\n")
        print("by Python", file=sys.stderr)
        raise {"interrupt": KeyboardInterrupt, "error": ValueError("no such text")}[text]

    loud = _guarded("m", SimpleNamespace(encode=encode), 9)
    for text, kind in (("interrupt", KeyboardInterrupt), ("error", UserError)):
        with pytest.raises(kind):
            loud.encode(text)
        assert sorted(capfd.readouterr().err.splitlines()) == ["by Python", "natively"]
    shown = os.dup(2)
    os.close(2)
    try:
        assert base.tokenizer.encode("a")
    finally:
        os.dup2(shown, 2)
        os.close(shown)


def with_template(base, template: str):
    """The bundled model's tokenizer with another template, as `load` would give it."""
    tokenizer = copy.copy(base.tokenizer._tokenizer)
    tokenizer.chat_template = template
    check_template("m", template)
    return _guarded("m", TokenizerWrapper(tokenizer), base.vocabulary)


LAST = "messages[-1].content"
AT_A_TEXT = {
    "a loop": ("{% if 'x' in " + LAST + " %}" + LOOP + "{% endif %}", "does not end within a second"),
    "a loop at a turn": ("{% if messages | length == 5 %}" + LOOP + "{% endif %}", "within a second"),
    "a loop at a length": ("{% if " + LAST + " | length == 3 %}" + LOOP + "{% endif %}", "within a second"),
    "a loop by chance": ("{% if range(90000) | random and 'x' in " + LAST + " %}" + LOOP + "{% endif %}", "a second"),
    "a number too large": ("{{ (10 ** (10 ** (" + LAST + " | int))) % 7 }}", "within a second"),
    "a width": ("{% if 'x' in " + LAST + " %}{{ '%999999999d' % 1 }}{% endif %}", "more than 512 MB"),
    "as many as it says": ("{{ (['a'] * " + LAST + " | int) | length }}", "more than 512 MB"),
    "a text many times": ("{{ ('a' * " + LAST + " | int) | length }}", "more than 512 MB"),
    "written many times": ("{{ 'a' * (" + LAST + " | int // 200) }}", "more than 1000000 characters"),
    "replaced again and again": (
        "{% if 'x' in " + LAST + " %}" + REPLACED + "{% endfor %}{{ n.x | length }}{% endif %}",
        "more than 512 MB",
    ),
}
EVIL = {"a loop at a turn": "a", "a number too large": "9", "a loop at a length": "abc"} | {
    name: "999999999" for name in ("as many as it says", "a text many times", "written many times")
}


@pytest.mark.parametrize("name", AT_A_TEXT)
def test_a_template_that_does_its_worst_at_some_text_alone(name, base):
    template, expected = AT_A_TEXT[name]
    tokenizer = with_template(base, template + "{{ " + LAST + " }}<|im_start|>")
    turns = [{"role": "user", "content": EVIL.get(name, "an x")}] * (5 if "turn" in name else 1)
    plain = [{"role": "user", "content": "move it"}]
    ids = tokenizer.apply_chat_template(plain)
    started = time.monotonic()
    with pytest.raises(UserError, match=f"the chat template of model m .*{expected}.*; choose another model"):
        tokenizer.apply_chat_template(turns)
    assert time.monotonic() - started < 20  # 2, where no other process wants the processor
    assert tokenizer.apply_chat_template(plain) == ids and ids  # in a process that is new


SECRET = "move the zyxwv lamp"


def rows(folder: Path, **sets: list[object]) -> list[str]:
    folder = folder / "data"
    folder.mkdir()
    for name, items in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(i if isinstance(i, str) else f"{json.dumps(i)}\n" for i in items))
    return ["--data", str(folder)]


ONE = {"instruction": SECRET}
UNTOLD = {
    "raised by a template": lambda t, b: with_template(b, "{{ raise_exception('no ' ~ " + LAST + ") }}"),
    "raised with much else": lambda t, b: with_template(b, "{{ raise_exception(" + LAST + " ~ 'a' * 2000) }}"),
    "missing in a template": lambda t, b: with_template(b, "{{ {}[" + LAST + "].x }}"),
    "no number": lambda t, b: with_template(b, "{{ strftime_now([" + LAST + "]) }}{{ " + LAST + " + 1 }}"),
    "in two sets": lambda t, b: rows(t, harmful_train=[ONE], harmful_test=[ONE]),
    "half a line": lambda t, b: rows(t, harmful_train=[json.dumps(ONE)[:-2]]),
    "of another form": lambda t, b: rows(t, harmful_train=[{"text": [SECRET]}]),
    "a list": lambda t, b: rows(t, harmful_train=[[SECRET]]),
    "without an answer": lambda t, b: rows(t, capability_test=[ONE]),
    "too long": lambda t, b: [*rows(t, harmful_train=[{"instruction": SECRET * 3}]), "--max-prompt-length", "8"],
    "too few": lambda t, b: [*rows(t, harmful_train=[ONE]), "--direction-train", "100000"],
}


@pytest.mark.parametrize("case", UNTOLD)
def test_what_is_said_holds_no_prompt(case, base, tmp_path, capsys):
    made = UNTOLD[case](tmp_path, base)
    if isinstance(made, list):
        assert main(["--adapter-path", str(tmp_path / "out"), *made]) == 2
    else:
        assert exit_code(lambda: prompts.render(made, SECRET) and None) == 2
    said = "".join(capsys.readouterr())
    assert "safesteer-mlx: " in said and "zyxwv" not in said, said


SAME = [
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}",
    "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}|{{ messages | tojson(separators=(',', ':')) }}",
    "{{ tools }} {{ documents }} {{ add_generation_prompt }} {{ enable_thinking }} {{ eos_token }} {{ no_such }}",
    "{% set n = namespace(a=1, b='') %}{% set n.b = n.b ~ 'c' %}{{ n.a + 1 }}{{ n.b }}",
    "{{ dict(a=1, b=[2]).items() | list }}{{ dict.fromkeys('ab', 1) }}",
    "{% macro f(x, y=2) %}{{ x }}-{{ y }}{% endmacro %}{{ f(1) }}{{ f(1, y=3) }}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ strftime_now('%d %b %Y') }}",
    "{{ messages[0].content.split() | join('|') | upper }}{{ messages[0].content[::-1] }}{{ 'ä€😀' }}",
    "{%- if messages[0].role is string -%}  {{- 'a' -}}  {%- endif -%}  {{ 7 // 2 }}{{ 7 / 2 }}{{ '%05.2f' % 2.5 }}",
    "{{ [3, 1] | sort | first }}{{ messages | map(attribute='role') | list }}{{ messages | selectattr('x') | list }}",
]
REFUSED = [
    "{{ raise_exception('not ' ~ messages[0].role) }}",
    "{{ namespace(_a=1) }}",
    "{{ ''.__class__.x.y }}",
    "{{",
]


@pytest.mark.parametrize("template", [*SAME, *REFUSED])
def test_a_template_is_rendered_as_transformers_does(template, base):
    tokenizer = with_template(base, template)
    turns = [{"role": "user", "content": " Why is “it” 7?\n"}, {"role": "assistant", "content": "a\x0b\u2028"}]
    theirs = TokenizerWrapper(tokenizer._tokenizer).apply_chat_template
    if template in SAME:
        assert tokenizer.apply_chat_template(turns, tokenize=False) == theirs(turns, tokenize=False) != ""
        return
    with pytest.raises(Exception) as error:
        theirs(turns)
    with pytest.raises(UserError, match="the chat template refuses several turns") as ours:
        tokenizer.apply_chat_template(turns)
    assert "namespace" in template or " ".join(str(error.value).split())[:50].rstrip(".") in str(ours.value)


def test_the_process_of_a_template_ends_with_who_has_it(base, tmp_path):
    template = template_of("m", "{{ messages[0].content }}")
    process = template._process
    assert process is not None and process.poll() is None
    for _ in range(500):  # without waiting for one to start
        assert template.render(messages=[{"content": "a"}]) == "a"
    assert template._process is process
    del template
    template_of.cache_clear()
    assert process.poll() is not None


def test_what_real_templates_use_is_not_refused(copied):
    """Trying a template must not fail where transformers renders it; and the date that is written is one date."""
    from safesteer_mlx.method.prompts import TODAY, render
    from safesteer_mlx.system.load import load

    template = (
        "{{ strftime_now('%d %b %Y') }}{% set n = namespace(last='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{% if loop.index > 9 %}{% break %}{% endif %}"
        "{% set n.last = m.content %}{% endfor %}{% generation %}{{ n.last | tojson(indent=1) }}{% endgeneration %}"
        "{{ dict(a=1).items() | list }}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    settings_of(copied, chat_template=template)
    tokenizer = load(str(copied)).tokenizer
    text = tokenizer.decode(render(tokenizer, "move it"))
    assert text == TODAY.strftime("%d %b %Y") + "\"move it\"[('a', 1)]<|im_start|>"


def test_an_index_into_an_array_is_held_to_it():
    with pytest.raises(UserError, match="altup_active_idx = 1000000000, no whole number from 0 to 0"):
        check_config("c", {"model_type": "gemma3n", "text_config": {"altup_active_idx": 10**9}}, {})


# Ids that have no embedding: MLX would read what else is in memory


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A model whose tokenizer knows a word with the id 2e9; nothing of its own holds it."""
    folder = tmp_path_factory.mktemp("evil") / "model"
    shutil.copytree(TINY, folder)
    with_token(folder, 2_000_000_000)
    return folder


def said_to_chat(folder: Path, adapters: Path, text: str) -> int:
    from safesteer_mlx.chat import main as chat

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return chat([str(folder), "--adapter-path", str(adapters.parent), "--max-tokens", "2"])


def of_the_tokenizer(folder: Path, use) -> int:
    from safesteer_mlx.system.load import load

    return exit_code(lambda: use(load(str(folder))) and None)


def evaluated(folder: Path, *argv: str) -> int:
    from safesteer_mlx.evaluate import main as evaluate

    return evaluate([str(folder), "--test-prompts", "2", "--max-tokens", "2", *argv])


def prompts_with_it(folder: Path, name: str) -> str:
    (folder / name).write_text('{"instruction": "move the <evil> lamp"}\n' * 3)
    return str(folder)


def judged(base, role: str):
    from safesteer_mlx.evals.judge_model import Template, render_case

    return render_case(base.tokenizer, Template([(role, "{request} {answer} <evil>")], "yes_no"), "a", "b")


def attacked(base):
    from safesteer_mlx.evals.attacks import Attacker

    own = Attacker.__new__(Attacker)
    object.__setattr__(own, "base", base)
    return list(own._template(["move <evil>"]))


IDS = {
    "a prompt to train on": lambda m, a, t: main(
        [str(m), "--data", prompts_with_it(t, "a.jsonl") + "/a.jsonl", "--adapter-path", str(t / "out")]
    ),
    "a prompt to test on": lambda m, a, t: evaluated(m, "--data", prompts_with_it(t, "harmful_test.jsonl")),
    "a message": lambda m, a, t: said_to_chat(m, a, "move the <evil> lamp\n"),
    "the chat template": lambda m, a, t: (settings_of(m, chat_template="<evil>"), said_to_chat(m, a, "a\n"))[1],
    "a text for the perplexity": lambda m, a, t: (
        (t / "a.txt").write_text("move it <evil> there"),
        evaluated(m, "--perplexity", str(t / "a.txt")),
    )[1],
    "an attack without a template": lambda m, a, t: of_the_tokenizer(m, attacked),
    "a system prompt": lambda m, a, t: of_the_tokenizer(m, lambda b: prompts.render(b.tokenizer, "a", "be <evil>")),
    "several turns": lambda m, a, t: of_the_tokenizer(
        m, lambda b: prompts.render_turns(b.tokenizer, [{"role": "user", "content": "<evil>"}] * 3)
    ),
    "an opening": lambda m, a, t: of_the_tokenizer(m, lambda b: prompts.opening_ids(b.tokenizer, "a", "Sure <evil>")),
    "a prefix of refusals": lambda m, a, t: of_the_tokenizer(m, lambda b: prompts.opener_ids(b.tokenizer, ["<evil>"])),
    "a judge's turn": lambda m, a, t: of_the_tokenizer(m, lambda b: judged(b, "user")),
    "a judge's raw text": lambda m, a, t: of_the_tokenizer(m, lambda b: judged(b, "raw")),
    "a piece of text alone": lambda m, a, t: of_the_tokenizer(m, lambda b: b.tokenizer.encode("<evil>")),
}


@pytest.mark.parametrize("name", IDS)
def test_ids_without_an_embedding(name, evil, adapters, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(evil, model)
    assert IDS[name](model, adapters, tmp_path) == 2
    said = capsys.readouterr().err.replace("[transformers] ", "")
    assert "'<evil>' (id 2000000000)" in said and "no embedding among its 1856" in said and "Traceback" not in said


def test_a_text_that_no_tokenizer_takes_is_a_sentence(base):
    """As an argument that is no UTF-8 reaches Python."""
    with pytest.raises(UserError, match=r"tokenizer: .*; "):
        base.tokenizer.encode("\udcff")


def test_a_token_without_an_embedding_that_nothing_holds_is_no_matter(evil, capsys):
    from safesteer_mlx.system.load import load

    base = load(str(evil))
    assert max(prompts.render(base.tokenizer, "move the lamp")) < base.vocabulary


TOKENS_BAD = {
    "2e9": [{"token": "x", "id": 2_000_000_000}],
    "-1e9": [{"token": "x", "id": -1_000_000_000}],
    "the first beyond": [{"token": "x", "id": 1856}],
    "beyond 64 bits": [{"token": "x", "id": 2**70}],
    "a fraction": [{"token": "x", "id": 1.5}],
    "1e308": [{"token": "x", "id": 1e308}],
    "true": [{"token": "x", "id": True}],
    "null": [{"token": "x", "id": None}],
    "no text": [{"id": 5}],
    "a number": 5,
    "nothing": [],
    "another word": [{"token": "no such word", "id": 5}],
}


@pytest.fixture(scope="module")
def base():
    from safesteer_mlx.system.load import load

    return load(str(TINY))


@pytest.mark.parametrize("name", TOKENS_BAD)
def test_a_runs_tokens(name, base, tmp_path):
    """By hand, or another model's: `evaluate` measures drift without them."""
    from safesteer_mlx.evals.scorecard import safety_tokens

    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "tokens.json"
    file.write_text(json.dumps(TOKENS_BAD[name]))
    with pytest.raises(UserError, match=r"tokens\.json.*; "):
        safety_tokens(tmp_path / "run", base)


ADAPTER_SETTINGS_BAD = {
    "scale a list": ({"scale": [2.0]}, "scale = [2.0] must be a number"),
    "scale in words": ({"scale": "big"}, "scale"),
    "scale infinite": ({"scale": float("inf")}, "scale"),
    "rank a list": ({"rank": [8]}, "rank = [8] must be"),
    "rank zero": ({"rank": 0}, "rank = 0"),
    "rank without end": ({"rank": 10**12}, "rank"),
    "dropout a list": ({"dropout": []}, "dropout"),
    "dropout of all": ({"dropout": 1}, "dropout"),
    "keys a number": ({"keys": 5}, "keys"),
    "keys of numbers": ({"keys": [5]}, "keys"),
    "parameters a list": ([], "lora_parameters"),
    "parameters null": (None, "lora_parameters"),
}


@pytest.mark.parametrize("name", [*ADAPTER_SETTINGS_BAD, "layers in words", "settings a list", "other shape", "a pipe"])
def test_settings_of_adapters(name, adapters, tmp_path, capsys):
    shutil.copytree(adapters.parent, folder := tmp_path / "adapters")
    wrong, expected = ADAPTER_SETTINGS_BAD.get(name, ({}, "adapters"))
    file = "adapter_config.json"
    if name in ADAPTER_SETTINGS_BAD:
        own = json.loads((folder / file).read_text())["lora_parameters"]
        change(folder, file, lora_parameters=own | wrong if isinstance(wrong, dict) else wrong)
    elif name == "layers in words":
        change(folder, file, num_layers="all")
    elif name == "settings a list":
        (folder / file).write_text("[]")
    elif name == "other shape":
        spoiled(lambda w, k: w.update({k: w[k].T}))(folder / "adapters.safetensors")
    else:
        pipe(folder, "adapters.safetensors")
    assert said_to_chat(TINY, folder / file, "move the lamp\n") == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1 and "; " in said


def test_a_run_that_says_that_code_may_run_is_not_believed(copied, tmp_path, capsys):
    """It may be a stranger's: who goes on with it, exports or verifies it says so anew."""
    python(copied, "m.py")
    change(copied, model_file="m.py")
    record = tmp_path / "adapters" / "run"
    record.mkdir(parents=True)
    (record / "recipe.yaml").write_text(f"model: {copied}\ntrust_remote_code: true\n")
    assert main(["--resume", str(record.parent)]) == 2 and "--trust-remote-code" in capsys.readouterr().err
    recipe, _ = resolve({}, {"model": str(copied), "trust_remote_code": True})
    with pytest.raises(UserError, match="--trust-remote-code"):
        load_base(SimpleNamespace(recipe=recipe))  # type: ignore[arg-type]
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_would_run_if_it_were_trusted(copied, tmp_path):
    """The refusals above hold something: the same file runs under the flag."""
    python(copied, "m.py")
    change(copied, model_file="m.py")
    assert main([str(copied), "--trust-remote-code", "--adapter-path", str(tmp_path / "out")]) == 2  # defines no Model
    assert (tmp_path / "ran").read_text() == "code ran"


@pytest.mark.parametrize("kind", ["llama", "xverse"])
def test_code_that_mlx_lm_has_no_need_of_is_neither_run_nor_asked_about(kind, tmp_path, monkeypatch):
    """Loaded, and read as an export is, whether transformers knows the architecture too or only mlx-lm does."""
    folder = make_judge(tmp_path / "model", "safe", ("safe", "unsafe"), (1.0, 0.0))
    python(folder, "m.py")
    change(folder, model_type=kind, auto_map=MAPPED)
    questions = []
    monkeypatch.setattr("builtins.input", lambda *words: questions.append(words) or "y")
    base = load(str(folder))
    read = reader_for("mlx", str(folder), base, Sampling(base.eos_ids, 4), 0)
    assert base.tokenizer.encode("Sorry") and read.samples
    assert not (tmp_path / "ran").exists() and questions == []


def test_a_link_within_the_cache_of_the_hub_is_fine(copied, tmp_path):
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(copied.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert EMBED in check_model_folder(snapshot)


def test_pickles_beside_good_weights_are_never_opened(copied):
    from safesteer_mlx.system.load import load

    for name in ("pytorch_model.bin", "model.pt", "model.pkl", "weights.npz"):
        os.mkfifo(copied / name)  # opening it would wait for ever
    assert load(str(copied)).quantized


def test_a_tokenizer_with_more_words_than_the_embedding_is_refused(copied, tmp_path, capsys):
    content = json.loads((copied / "tokenizer.json").read_text())
    content["model"]["vocab"]["stray"] = 5000
    (copied / "tokenizer.json").write_text(json.dumps(content))
    assert "id 5000, beyond its vocabulary of 1856" in refused(capsys, tmp_path, str(copied))


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "C64", "U16"])
def test_a_header_is_read_whatever_the_type_of_the_values(dtype, tmp_path):
    """numpy, which never sees them, knows only some."""
    size = {"F8_E4M3": 1, "C64": 8}.get(dtype, 2)
    entry = {"dtype": dtype, "shape": [3, 1], "data_offsets": [0, 3 * size]}
    put_header(tmp_path / "a.safetensors", {"a": entry}, bytes(3 * size))
    assert read_header(tmp_path / "a.safetensors") == {"a": Tensor(dtype, (3, 1))}


def test_of_a_name_given_twice_the_header_check_and_mlx_believe_the_same(tmp_path):
    first, last = ({"dtype": dtype, "shape": [2], "data_offsets": [0, 8]} for dtype in ("F32", "I32"))
    twice = f'{{"a": {json.dumps(first)}, "a": {json.dumps(last)}}}'
    put_header(tmp_path / "a.safetensors", twice.encode(), bytes(8))
    assert read_header(tmp_path / "a.safetensors") == {"a": Tensor("I32", (2,))}
    assert mx.load(str(tmp_path / "a.safetensors"))["a"].dtype == mx.int32


# Adapters to begin from


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    from safesteer_mlx.method.student import make_student, save_adapters
    from safesteer_mlx.system.load import load

    folder = tmp_path_factory.mktemp("adapters")
    student = make_student(load(str(TINY)).model, TrainSettings(), 0, True)
    save_adapters(folder, student, TrainSettings(), "tiny", 0)
    return folder / "adapters.safetensors"


def spoiled(edit):
    def spoil(path: Path) -> None:
        tensors = dict(mx.load(str(path)))
        mx.eval(tensors)
        edit(tensors, next(iter(sorted(tensors))))
        mx.save_safetensors(str(path), tensors)

    return spoil


ADAPTERS_BAD = {
    "missing": (lambda p: p.unlink(), "cannot be read"),
    "empty": (lambda p: p.write_bytes(b""), " of 0 bytes is truncated"),
    "text": (lambda p: p.write_text("not a safetensors file"), "truncated or no safetensors"),
    "cut": (lambda p: os.truncate(p, p.stat().st_size - 1), "not fully covered"),
    "header of 1e18 bytes": (lambda p: p.write_bytes(struct.pack("<Q", 10**18)), "header too large"),
    "other shape": (spoiled(lambda w, k: w.update({k: w[k].T})), "not ["),
    "other rank": (spoiled(lambda w, k: w.update({n: mx.zeros((3, 3)) for n in w})), "not ["),
    "whole numbers": (spoiled(lambda w, k: w.update({k: w[k].astype(mx.int32)})), "I32"),
    "tensor missing": (spoiled(lambda w, k: w.pop(k)), "lacks model.layers.0"),
    "foreign tensor": (spoiled(lambda w, k: w.update(evil=mx.zeros(1))), "evil"),
    "foreign tensors only": (spoiled(lambda w, k: (w.clear(), w.update(a=mx.zeros(1)))), "and 109 more"),
}


@pytest.mark.parametrize("name", ADAPTERS_BAD)
def test_adapters(name, adapters, tmp_path, capsys):
    spoil, expected = ADAPTERS_BAD[name]
    shutil.copy(adapters, tmp_path / "start.safetensors")
    spoil(tmp_path / "start.safetensors")
    said = refused(capsys, tmp_path, "--resume-adapter-file", str(tmp_path / "start.safetensors"))
    assert "start.safetensors" in said and (expected in said or ("more" in expected and " more" in said)), said


# The output folder


def test_output_folders(tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    (tmp_path / "hidden" / ".git").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    for name, expected in {
        "thesis": "thesis.txt",
        "hidden": "not a safesteer-mlx run",
        "file": "is a file",
        "file/below": "is a file",
        "n" * 300: "too long",
        "new\x1b[2J/../file": "is a file",
    }.items():
        assert expected in refused(capsys, tmp_path, "--adapter-path", str(tmp_path / name))


def test_an_output_folder_that_may_not_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "read-only" in refused(capsys, tmp_path)


def test_a_disk_that_fills_up_is_a_sentence(tmp_path, capsys, monkeypatch):
    from safesteer_mlx import align

    def full(*args, **more):
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(align, "align_model", full)
    assert "No space left on device" in refused(capsys, tmp_path)


# As a process


@pytest.mark.parametrize(
    "argv", [["--learning-rat", "1"], ["-c", "none.yaml"], ["--data", "\udcff.txt"], ["./\x1b]0;title\x07"]], ids=repr
)
def test_the_process_ends_with_2_and_one_line(argv, tmp_path):
    command = [sys.executable, "-m", "safesteer_mlx.align", *argv]
    path = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=os.environ | path)
    assert done.returncode == 2 and not done.stdout and done.stderr.count(b"\n") == 1
    assert b"Traceback" not in done.stderr and b"\x1b" not in done.stderr and not list(tmp_path.iterdir())


# The screen

NASTY = ["\x1b[31mred", "\x1b]8;;http://x\x07link", "a\rb", "a\nb", "\u202eevil", "\u2066x", "\x9b2J", "\x00", "\ud800"]


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_no_text_is_obeyed_by_the_terminal(text, capsys):
    from rich.console import Console

    screen = Screen()
    screen.line(f"line {text} [bold]kept[/bold] :warning:")
    screen.table(f"title {text}", ["", text], [[f"[red]{text}[/red]", text]])
    out = capsys.readouterr().out
    assert "[bold]kept[/bold] :warning:" in out and "[red]" in out
    assert all(ch.isprintable() or ch == "\n" for ch in out) and text not in out
    screen.console = Console(force_terminal=True, markup=False, emoji=False)
    with screen.stage(f"stage {text}") as advance:
        advance(1, 2, f"note {text} [red]")
    assert text not in capsys.readouterr().out


# Fuzz: nothing but a result or our own sentence ever comes out

MORE = int(os.environ.get("FUZZ", "1"))  # times as many, by hand: CONTRIBUTING.md
QUICK = settings(
    max_examples=60 * MORE,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # to shrink a failure could take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
)
prompt_like = st.dictionaries(
    st.sampled_from(["instruction", "prompt", "messages", "text", "role", "content"]), json_values
)
keys = st.sampled_from(sorted(resolve({}, {})[0].flat())) | st.text()


def only_user_errors(read, *args) -> None:
    try:
        read(*args)
    except UserError as error:
        assert len(str(error)) < 1000


@QUICK
@given(
    content=st.binary()
    | st.text().map(lambda t: t.encode("utf-8", "surrogatepass"))
    | st.lists(json_values | prompt_like).map(lambda v: json.dumps(v).encode()),
    kind=st.sampled_from([".json", ".jsonl", ".txt"]),
)
def test_fuzz_data(content, kind, tmp_path):
    (tmp_path / f"data{kind}").write_bytes(content)
    only_user_errors(load_instructions, tmp_path / f"data{kind}")


@QUICK
@given(
    st.binary()
    | st.text(alphabet="abc:{}[]&*!-? \n\t'\"#|>%@`,0123.").map(str.encode)
    | st.dictionaries(keys, json_values).map(lambda v: json.dumps(v).encode())
)
def test_fuzz_yaml(tmp_path, content):
    (tmp_path / "run.yaml").write_bytes(content)
    only_user_errors(read_yaml, tmp_path / "run.yaml")
    only_user_errors(resolve, {}, {}, None, tmp_path / "run.yaml")


@QUICK
@given(
    st.lists(
        st.sampled_from(["--seed", "--lora-parameters", "--coeff-grid", "--loss", "--model", "-c", "--", "=", "-1"])
        | st.text(),
        max_size=5,
    )
)
def test_fuzz_flags(argv):
    if "-h" in argv or "--help" in argv:
        return
    only_user_errors(lambda: resolve({}, parse(argv)[0]))


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "X"]) | json_values,
        "shape": st.lists(st.integers(-2, 9)) | json_values,
        "data_offsets": st.lists(st.integers(-1, 99), max_size=3) | json_values,
    },
)


@QUICK
@given(
    start=st.binary(max_size=8) | st.just(None),
    content=st.binary() | st.dictionaries(st.text(), entries | json_values).map(lambda v: json.dumps(v).encode()),
    body=st.binary(max_size=99),
)
def test_fuzz_adapters(start, content, body, tmp_path):
    path = tmp_path / "adapters.safetensors"
    path.write_bytes((struct.pack("<Q", len(content)) if start is None else start) + content + body)
    only_user_errors(read_header, path)


@QUICK
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_fuzz_a_flipped_bit_in_a_header(at, bit, tmp_path, adapters):
    raw = bytearray(adapters.read_bytes())
    raw[at % (8 + struct.unpack("<Q", raw[:8])[0])] ^= 1 << bit
    (tmp_path / "adapters.safetensors").write_bytes(raw)
    only_user_errors(read_header, tmp_path / "adapters.safetensors")


@st.composite
def edited(draw, plain):
    """JSON in which one value, wherever it stands, is another, is gone, or is deep or long without end."""
    plain = json.loads(json.dumps(plain))
    places = [(plain, key) for key in (plain if isinstance(plain, dict) else range(len(plain)))]
    for owner, key in places:
        if isinstance(owner[key], (dict, list)):
            places += [
                (owner[key], k) for k in (owner[key] if isinstance(owner[key], dict) else range(len(owner[key])))
            ]
    owner, key = draw(st.sampled_from(places))
    new = draw(json_values | st.sampled_from([1e308, -(10**40), 10**9, -1, "1e9", [[]], {"a": {}}, None, "\ud800"]))
    if isinstance(owner, dict) and draw(st.booleans()) and draw(st.booleans()):
        del owner[key]
    else:
        owner[key] = new
    return plain


CONFIG = json.loads((TINY / "config.json").read_text())


@QUICK
@given(edited(CONFIG))
@example(CONFIG | {"num_hidden_layers": 10**9})
def test_fuzz_configs(config):
    def read() -> None:
        check_config("m", config, check_weights(TINY))
        shape_of(config, check_weights(TINY))

    only_user_errors(read)


@QUICK
@given(data=st.data())
def test_fuzz_the_record_of_a_run(data, tmp_path):
    name = data.draw(st.sampled_from(sorted(RECORD)))
    whole = files()[name]
    content = data.draw(edited(whole) | json_values)
    lines = content if name.endswith(".jsonl") and isinstance(content, list) else [content]
    (tmp_path / name).write_text("\n".join(json.dumps(line) for line in lines))
    only_user_errors(read_record, tmp_path, name)


PIECES = """
{% for m in messages %} | {% endfor %} | {% if x %} | {% endif %} | {{ m.role }} | {{ messages }} | {{ n * n }} | {{
| }} | {% set n = 9 %} | {% | %} | {{ 'a' * n }} | {{ messages[0].content }} | {% break %} | {% macro f() %} | {{ f() }}
| {{ raise_exception('no') }} | {% endmacro %} | {{ range(n) }} | {% include 'a' %} | {{ m.content | tojson }} | {# a #}
| {{ (1).__class__ }} | <|im_end|> | {{ strftime_now('%Y') }}
"""
pieces = st.sampled_from([piece.strip() for piece in PIECES.replace("\n|", " |").split(" |")]) | st.text(max_size=9)


@settings(QUICK, max_examples=12 * MORE)
@given(text=st.lists(pieces, max_size=12).map(" ".join))
def test_fuzz_chat_templates(text, base):
    only_user_errors(lambda: prompts.render(with_template(base, text), "Why?"))


TOKENS = [{"token": "Sorry", "id": 320}, {"token": " no", "id": 5}]


@QUICK
@given(
    content=edited(TOKENS).map(lambda v: json.dumps(v).encode())
    | json_values.map(lambda v: json.dumps(v).encode())
    | st.binary()
)
def test_fuzz_token_files(content, tmp_path, base):
    (tmp_path / "tokens.json").write_bytes(content)
    only_user_errors(read_token_file, tmp_path / "tokens.json", base.tokenizer, base.vocabulary)


ROWS = [{"Goal": "How is it?", "prompt": ["a", "b"], "type": "x"}, {"Goal": "Why?", "prompt": "b", "type": "safe"}]


@QUICK
@given(
    name=st.sampled_from(
        [name for name in suites.names() if "missing" not in (suites.FOLDER / f"{name}.yaml").read_text()]
    ),
    content=edited(ROWS).map(lambda v: json.dumps(v).encode())
    | st.binary()
    | st.text(alphabet='Goal,"\n\r\0promt;').map(str.encode),
    kind=st.sampled_from([".json", ".jsonl", ".csv", ".txt"]),
)
def test_fuzz_suites(name, content, kind, tmp_path):
    (tmp_path / f"suite{kind}").write_bytes(content)
    only_user_errors(suites.load_suite, suites.find_suite(name), tmp_path / f"suite{kind}")


TOKENIZER = json.loads((TINY / "tokenizer.json").read_text())
LARGE = {key: TOKENIZER["model"].pop(key) for key in ("vocab", "merges")}  # an edit would nearly always fall into these
TOKENIZER_CONFIG = json.loads((TINY / "tokenizer_config.json").read_text())


@settings(QUICK, max_examples=20 * MORE)
@given(tokenizer=st.just(TOKENIZER) | edited(TOKENIZER), config=st.just(TOKENIZER_CONFIG) | edited(TOKENIZER_CONFIG))
def test_fuzz_tokenizers(tokenizer, config, tmp_path):
    model = tokenizer.get("model")
    whole = tokenizer | {"model": model | LARGE} if isinstance(model, dict) else tokenizer
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    def read() -> None:
        prompts.render(read_tokenizer(str(tmp_path), tmp_path, CONFIG), "Why?")

    only_user_errors(read)
