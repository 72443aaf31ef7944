"""Bad input, as a user gives it: each ends in one sentence and exit code 2, and nothing is written.

What is accepted instead says so: a byte-order mark, Windows line ends, a prompt given twice or too long.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from safesteer_mlx.align import main
from safesteer_mlx.method.prompts import load_instructions
from safesteer_mlx.recipe import MODELS, TrainSettings, parse, read_yaml, resolve
from safesteer_mlx.system.model_files import Tensor, check_model_folder, read_header
from safesteer_mlx.system.screen import Screen, UserError, visible

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
    from dataclasses import replace

    from safesteer_mlx.method.run import make_run
    from safesteer_mlx.method.train import training_prompts
    from safesteer_mlx.system.load import load

    base = load(str(TINY))
    (tmp_path / "data.txt").write_text("add the lamp\nadd the lamp\n" + "lamp " * 600 + "\nmove the box\n")
    alone = {"reuse_direction_prompts": False}
    recipe, _ = resolve({}, {"model": str(TINY), "data": str(tmp_path / "data.txt"), **alone})
    run = make_run(recipe, base, Screen())
    harmful, _ = training_prompts(run)
    said = capsys.readouterr().out
    assert len(harmful) == 2 and "1 prompts are there twice" in said and "1 prompts are longer than 512" in said
    small = replace(base, config={"vocab_size": max(harmful[0].ids)})
    with pytest.raises(UserError, match="no embedding"):
        training_prompts(replace(run, base=small))


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
        lambda f: (python(f, "m.py"), change(f, auto_map={"AutoModel": "m.M"})),
        "auto_map = {'AutoModel': 'm.M'} in config.json",
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
    "width beyond memory": (lambda f: change(f, hidden_size=10**15), "cannot be loaded"),
    "width zero": (lambda f: change(f, hidden_size=0), "cannot be loaded"),
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
}


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


def test_code_of_a_model_would_run_if_it_were_trusted(copied, tmp_path):
    """The refusals above hold something: the same file runs under the flag."""
    python(copied, "m.py")
    change(copied, model_file="m.py")
    assert main([str(copied), "--trust-remote-code", "--adapter-path", str(tmp_path / "out")]) == 2  # defines no Model
    assert (tmp_path / "ran").read_text() == "code ran"


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
    from safesteer_mlx.method.student import adapter_config, make_student, save_adapters
    from safesteer_mlx.system.load import load

    folder = tmp_path_factory.mktemp("adapters")
    student = make_student(load(str(TINY)).model, TrainSettings(), 0, True)
    save_adapters(folder, student, adapter_config(TrainSettings(), "tiny", 0))
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

QUICK = settings(
    max_examples=60,
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
