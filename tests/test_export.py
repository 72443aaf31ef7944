"""Exports: what is written, that it is what was scored, what is said of it, and every way it is refused."""

import copy
import hashlib
import json
import os
import re
import shlex
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
import yaml
from mlx.utils import tree_flatten

from safesteer_mlx import export, verify
from safesteer_mlx.evals import heldout
from safesteer_mlx.evals.heldout import HeldOut, held_out_prompts
from safesteer_mlx.evals.scores import transcripts
from safesteer_mlx.export import main
from safesteer_mlx.formats import readers, writers
from safesteer_mlx.formats.card import About, model_card
from safesteer_mlx.formats.folders import copy_tokenizer, write_peft
from safesteer_mlx.formats.fuse import plan
from safesteer_mlx.formats.gguf import modelfile, pre_tokenizer
from safesteer_mlx.formats.writers import WRITERS, Exported, Job
from safesteer_mlx.method.prompts import prompt_sets
from safesteer_mlx.method.rollout import Sampling
from safesteer_mlx.method.student import make_student, save_adapters, with_adapters
from safesteer_mlx.recipe import HELD_OUT_TOKENS, MODELS, resolve
from safesteer_mlx.system.finished import FinishedRun, finished_run
from safesteer_mlx.system.load import load
from safesteer_mlx.system.screen import Screen, UserError

TINY = str(MODELS / "tiny-chat")
ASKED = 8


def make_run(folder: Path, kind: str = "lora", num_layers: int = 3, model: str = TINY, thinking: str = "auto") -> Path:
    """A finished run as align leaves it, but its adapters are drawn: what the student answers is other, not better."""
    base = load(model, thinking=thinking)
    recipe, _ = resolve(
        base.config,
        {
            "model": model,
            "thinking": thinking,
            "adapter_path": str(folder),
            "test_prompts": ASKED,
            "num_layers": num_layers,
            "fine_tune_type": kind,
        },
    )
    student = make_student(base.model, recipe.train, 0, quantized=True)
    mx.random.seed(1)
    own = dict(tree_flatten(student.trainable_parameters()))
    drawn = [(name, 0.7 * mx.random.normal(w.shape)) for name, w in own.items() if name.endswith("lora_b")]
    student.load_weights(drawn, strict=False)
    save_adapters(folder, student, recipe.train, model, 0)
    kinds, _ = held_out_prompts(prompt_sets(recipe), ASKED)
    test = heldout.TestSet(kinds, [])
    held_out = HeldOut(base, test, [], recipe.run.seed, Sampling(base.eos_ids, HELD_OUT_TOKENS))
    scores = dict(held_out.score_each({"base": base.model, "student": student}, Screen(quiet=True)))
    run = folder / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.flat()))
    (run / "transcripts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in transcripts(scores)))
    (run / "before_after.json").write_text(json.dumps({name: s.as_json() for name, s in scores.items()}))
    manifest = {
        "safesteer_mlx": "0",
        "model": model,
        "model_sha256": base.weights_hash,
        "adapters_sha256": hashlib.sha256((folder / "adapters.safetensors").read_bytes()).hexdigest(),
        "not_aligned": None,
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("finished") / "adapters")


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """One that a test may spoil."""
    shutil.copytree(finished, tmp_path / "adapters")
    return tmp_path / "adapters"


def refused(capsys, *words: str) -> str:
    assert main(list(map(str, words))) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said, said
    return said


def test_an_mlx_folder_is_the_student_keeps_the_untouched_bytes_and_says_what_it_is(
    finished, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(writers, "TEXTS", 16)  # to quantize by; otherwise most of the time is its
    assert main([str(finished), "--to", "mlx", "--out", str(tmp_path), "--verify", "8"]) == 0
    said = capfd.readouterr().out
    folder = tmp_path / "safesteer" / "tiny-chat-safesteer"
    assert f"exported: {folder}" in said and f"mlx_lm.chat --model {folder}" in said
    assert "verified" in said and "KL(student ‖ shipped)" in said
    assert not list(tmp_path.rglob("*.part")) and not list(folder.rglob("*.jsonl"))

    before, after = mx.load(f"{TINY}/model.safetensors"), mx.load(str(folder / "model.safetensors"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed and {name.split(".")[2] for name in changed} == {"5", "6", "7"}  # the last three blocks
    assert (folder / "model.safetensors").stat().st_size < 1.01 * Path(f"{TINY}/model.safetensors").stat().st_size
    assert (folder / "tokenizer.json").read_bytes() == Path(f"{TINY}/tokenizer.json").read_bytes()

    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "mlx" and "safesteer" in front["tags"]
    assert front["model-index"][0]["results"][0]["metrics"]
    assert "word for word" in card and "not tried" in card and "base_model" not in front
    assert str(MODELS) not in card and str(tmp_path) not in card  # nothing of this machine
    prompts = [json.loads(line)["prompt"] for line in (finished / "run" / "transcripts.jsonl").read_text().splitlines()]
    assert not any(prompt in card for prompt in prompts)


def test_of_the_base_s_folder_nothing_is_copied_but_what_belongs_to_the_model(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "export"
    base.mkdir()
    folder.mkdir()
    mapped = {"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "org/other--mine.Mine"}
    contents = {
        "config.json": json.dumps({"auto_map": mapped, "model_file": "own_mlx.py"}),
        "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["tokenizer_own.Own", None]}}),
        "modeling_own.py": "from .layers_own import Layer\nfrom .gone import Gone",
        "layers_own.py": "from .modeling_own import Own",
    }
    kept = {"tokenizer.json", "vocab.txt", "merges.txt", "chat_template.jinja", "generation_config.json", "own_mlx.py"}
    kept |= {"tokenizer_own.py", "preprocessor_config.json", "LICENSE.txt", "NOTICE"}
    kept |= contents.keys() - {"config.json"}
    left = {"trainer_state.json", "args.json", "notes.txt", "prompts.json", "train.py", "mine.py", "tokenizer_run.py"}
    left |= {"config.json", "model.safetensors", "adapter_config.json", "README.md", "data.jsonl"}
    for name in kept | left:
        (base / name).write_text(contents.get(name, ""))
    copy_tokenizer(base, folder)
    assert {path.name for path in folder.iterdir()} == kept


def test_an_export_that_is_not_the_student_is_marked_failed(finished, tmp_path, capfd, monkeypatch):
    from safesteer_mlx.formats import fuse, writers

    # As if fusing lost all that was trained.
    lost = fuse.view_without_adapters
    monkeypatch.setattr(writers, "fuse", lambda student, *rest: fuse.fuse(lost(student), *rest))
    assert main([str(finished), "--to", "mlx", "--bits", "16", "--out", str(tmp_path), "--verify", "8"]) == 1
    said = capfd.readouterr().out
    assert "failed: it answers as the base does" in said and "--bits 32" in said and "exported:" not in said
    assert "It failed" in next(tmp_path.rglob("README.md")).read_text()


def test_a_card_says_whose_the_prompts_are():
    def card(**manifest):
        outcomes = {"outcomes": {"harmful": {"greedy": {"refuse": 1, "comply": 1}}}, "broken": {}, "capability": {}}
        run = FinishedRun(Path("a"), resolve({}, {})[0], {"model": "org/name"} | manifest, {"student": outcomes})
        return model_card(run, About("name", "mlx", "adapter", "It is one.", "use"), None)

    for manifest in ({}, {"own_sets": []}, {"own_sets": ["harmful_train"]}, {"own_sets": 3}):
        assert "of safesteer-mlx's own held-out prompts" in card(**manifest)
        assert "safesteer-mlx held-out prompts" in card(**manifest)
    given = card(own_sets=["harmful_test", "harmful_train", "# no set_test"])
    assert "of safesteer-mlx's own and the run's (harmful_test) held-out prompts" in given
    assert "name: own held-out prompts" in given and "# no set" not in given


def test_a_card_counts_refusals_in_the_base_s_own_words_too(tmp_path):
    (tmp_path / "run").mkdir()
    outcomes = {"outcomes": {"harmful": {"greedy": {"refuse": 3, "comply": 97}}}, "broken": {}, "capability": {}}
    run = FinishedRun(tmp_path, resolve({}, {})[0], {"model": "org/name"}, {"student": outcomes})

    def card(*rows):
        told = {"verdict": "safer", "words": ["quotes"], "head": ["", "base", "aligned"], "rows": list(rows)}
        (tmp_path / "run" / "outcome.json").write_text(json.dumps(told))
        return model_card(run, About("name", "mlx", "adapter", "It is one.", "use"), None)

    judged = ["harmful requests answered, greedy", "97 of 100", "97 of 100"]
    own = [[f"but for refusals in its own words, {how}", "49 of 100", "2 of 100"] for how in ("greedy", "sampled")]
    assert "base → scored: 49 of 100 → 2 of 100, greedy; 49 of 100 → 2 of 100, sampled." in card(judged, *own)
    assert "words that the judge" not in card(judged) and "quotes" not in card(judged, *own)


def test_nothing_verified_is_said(finished, tmp_path, capsys):
    assert main([str(finished), "--to", "adapter", "--no-verify", "--out", str(tmp_path), "--name", "me/mine"]) == 0
    assert "nothing was verified" in capsys.readouterr().out
    folder = tmp_path / "me" / "mine"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "adapter_config.json", "adapters.safetensors"]
    assert "**Nothing was verified**" in (folder / "README.md").read_text()
    assert (folder / "adapters.safetensors").read_bytes() == (finished / "adapters.safetensors").read_bytes()
    assert json.loads((folder / "adapter_config.json").read_text())["model"] == "tiny-chat"  # and no path of ours


@pytest.mark.parametrize(
    ("spoil", "flags", "said"),
    [
        (lambda f: (f / "run" / "manifest.json").unlink(), [], "not finished"),
        (lambda f: shutil.rmtree(f / "run"), [], "holds no run"),
        (lambda f: (f / "adapters.safetensors").unlink(), [], "no adapters.safetensors"),
        (lambda f: (f / "adapters.safetensors").write_bytes(b"other"), [], "not those that its run scored"),
        (lambda f: (f / "run" / "manifest.json").write_text("{"), [], "not JSON"),
        (lambda f: None, ["--to", "onnx"], "invalid choice: 'onnx'"),
        (lambda f: None, ["--name", "../../up"], "PUBLISHER/NAME"),
        (lambda f: None, ["--name", "one"], "PUBLISHER/NAME"),
        (lambda f: None, ["--to", "hub"], "--name ORGANISATION/NAME"),
        (lambda f: None, ["--verify", "0"], "at least 1"),
        (lambda f: None, ["--to", "adapter", "--bits", "8"], "--bits 8 is for fused models"),
        (lambda f: None, ["--model", "/nowhere/model"], "/nowhere/model does not exist"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence_and_leaves_nothing(copied, tmp_path, capsys, spoil, flags, said):
    spoil(copied)
    out = tmp_path / "out"
    words = ["--to", "mlx", *flags] if "--to" not in flags else flags
    assert said in refused(capsys, copied, *words, "--out", out)
    assert not [path for path in out.rglob("*") if path.is_file() or path.name.startswith(".")]


def test_another_base_than_the_run_s_is_refused(copied, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    weights = mx.load(str(other / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    mx.save_safetensors(str(other / "model.safetensors"), weights)
    assert "holds other weights" in refused(capsys, copied, "--to", "mlx", "--model", other, "--out", tmp_path / "out")


def test_another_chat_template_than_the_run_s_is_refused_where_the_run_recorded_its_own(copied, tmp_path, capsys):
    other, path = tmp_path / "other", copied / "run" / "manifest.json"
    shutil.copytree(TINY, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings["chat_template"] = settings["chat_template"].replace("assistant\\n", "assistant: ")
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    words = [copied, "--to", "adapter", "--no-verify", "--model", other, "--out", tmp_path / "out"]
    manifest = json.loads(path.read_text()) | {"model_settings_sha256": load(TINY).settings_hash}
    path.write_text(json.dumps(manifest))
    said = refused(capsys, *words)
    assert f"{other} holds another configuration, tokenizer or chat template than the run in" in said
    path.write_text(json.dumps(manifest | {"model_settings_sha256": load(str(other)).settings_hash}))
    assert main([*map(str, words)]) == 0


def test_a_run_that_made_nothing_safer_is_exported_by_force_alone(copied, tmp_path, capsys):
    path = copied / "run" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"not_aligned": "too few"}))
    words = [copied, "--to", "adapter", "--no-verify", "--out", tmp_path / "out"]
    assert "is not aligned (too few)" in refused(capsys, *words)
    assert main([*map(str, words), "--force"]) == 0


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize("to", ["adapter", "peft"])
def test_all_files_of_an_export_are_for_the_same_readers(finished, tmp_path, to, umask):
    before = os.umask(umask)
    try:
        assert main([str(finished), "--to", to, "--no-verify", "--out", str(tmp_path)]) == 0
    finally:
        os.umask(before)
    [folder] = (tmp_path / "safesteer").iterdir()
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 3 and set(modes.values()) == {0o666 & ~umask}


def test_a_folder_that_exists_is_left_alone(finished, tmp_path, capsys):
    there = tmp_path / "safesteer" / "tiny-chat-safesteer"
    there.mkdir(parents=True)
    assert "exists already" in refused(capsys, finished, "--to", "mlx", "--out", tmp_path)
    assert not list(there.iterdir())


def test_a_full_disk_is_told_before_anything_is_written(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert "make room" in refused(capsys, finished, "--to", "mlx", "--out", tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() or path.name.startswith(".")]


def test_too_little_memory_is_told_before_anything_is_written(finished, tmp_path, capsys, monkeypatch):
    from safesteer_mlx.system import memory

    def of(size: float):
        monkeypatch.setattr(writers, "this_machine", lambda: memory.Machine(int(size), "physical memory"))

    base, out = load(TINY), tmp_path / "out"
    student = with_adapters(base.model, finished)
    new = {bits: plan(student, bits).new_bytes(student) for bits in ("auto", "32")}
    assert new["auto"] < new["32"] / 2
    monkeypatch.setattr(mx, "get_active_memory", lambda: 5 * 10**9)
    of(5e9 + (new["auto"] + new["32"]) / 2)
    for words in (["--to", "hf"], ["--to", "mlx", "--bits", "32"]):
        words += ["--dtype", "float32"] if "hf" in words else []
        said = refused(capsys, finished, *words, "--no-verify", "--out", out)
        assert "takes 5.0 GB of memory" in said and "give --to mlx without --bits, or take a machine with more" in said
    of(4e9)
    assert "4.0 GB for it; take a machine with more" in refused(capsys, finished, "--to", "mlx", "--out", out)
    assert not [path for path in out.rglob("*") if path.is_file() or path.name.startswith(".")]


def test_a_failure_or_ctrl_c_while_writing_leaves_nothing(finished, tmp_path, capsys, monkeypatch):
    from safesteer_mlx.formats import folders

    for error, code in ((OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(folders, "copy_tokenizer", fail)
        assert main([str(finished), "--to", "mlx", "--bits", "8", "--out", str(tmp_path / "out")]) == code
        assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() or path.name.startswith(".")]


def test_a_family_that_a_format_lacks_is_named(finished, tmp_path, capsys, monkeypatch):
    from safesteer_mlx.formats import folders, readers

    monkeypatch.setattr(folders, "_SAME_NAMES", ("llama",))
    monkeypatch.setattr(readers, "find_spec", lambda name: name)
    for form in ("hf", "peft", "gguf"):
        said = refused(capsys, finished, "--to", form, "--out", tmp_path / "out")
        assert "not for model_type qwen2" in said and "--to mlx" in said


def test_a_number_of_bits_that_a_format_lacks_is_named(finished, tmp_path, capsys, monkeypatch):
    from safesteer_mlx.formats import readers

    monkeypatch.setattr(readers, "find_spec", lambda name: name)
    for form, bits in (("hf", "4"), ("gguf", "mixed"), ("peft", "16")):
        words = [finished, "--to", form, "--bits", bits, "--out", tmp_path / "out"]
        assert f"--bits {bits} is for" in refused(capsys, *words)


def test_the_type_of_spelled_out_weights_is_what_was_asked_for(finished, tmp_path, capsys):
    for dtype, stored in (("bfloat16", mx.bfloat16), ("float16", mx.float16), ("float32", mx.float32)):
        words = [finished, "--to", "mlx", "--dtype", dtype, "--no-verify", "--out", tmp_path / dtype]
        assert main(list(map(str, words))) == 0
        weights = mx.load(str(next((tmp_path / dtype).rglob("model.safetensors"))))
        assert {w.dtype for w in weights.values()} == {stored}
    for words in (["--to", "peft", "--dtype", "float16"], ["--to", "mlx", "--bits", "4", "--dtype", "float16"]):
        assert "--dtype float16 is for" in refused(capsys, finished, *words)


def test_llama_cpp_s_source_is_asked_for(finished, tmp_path, capsys, monkeypatch):
    from safesteer_mlx.formats import readers

    monkeypatch.setattr(readers, "find_spec", lambda name: name)
    words = [finished, "--to", "gguf", "--out", tmp_path / "out"]
    assert "holds no convert_hf_to_gguf.py" in refused(capsys, *words, "--llama-cpp", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "say with --llama-cpp" in refused(capsys, *words)


def test_peft_s_files_are_mlx_lm_s_turned_round(finished, tmp_path):
    """lora_a (I, R) → lora_A (R, I); alpha = scale × rank; the trained blocks named."""
    write_peft(with_adapters(load(TINY).model, finished), "org/base", tmp_path)
    own, theirs = (mx.load(str(p)) for p in (finished / "adapters.safetensors", tmp_path / "adapter_model.safetensors"))
    assert len(own) == len(theirs)
    for name, weight in own.items():
        other = theirs["base_model.model." + name.replace("lora_a", "lora_A.weight").replace("lora_b", "lora_B.weight")]
        assert mx.array_equal(weight.T, other), name
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    settings = json.loads((finished / "adapter_config.json").read_text())["lora_parameters"]
    assert config["r"] == settings["rank"] and config["lora_alpha"] == settings["scale"] * settings["rank"]
    assert config["layers_to_transform"] == [5, 6, 7] and config["layers_pattern"] == "layers"
    assert "self_attn.q_proj" in config["target_modules"] and not config["use_dora"]


def test_peft_is_not_sent_to_a_base_that_transformers_cannot_read(finished, tmp_path):
    run, base = finished_run(finished), load(TINY)
    parts = {"folder": "F", "base": "B"}
    for quantized, name, named, holds in (
        (True, "org/model-4bit", None, "M.from_pretrained('UNQUANTIZED_BASE'), 'F')"),
        (False, "org/model", "org/model", "AutoPeftModelForCausalLM as M; M.from_pretrained('F')"),
        (False, "/here/model", None, "M.from_pretrained('B'), 'F')"),
    ):
        own = replace(run, manifest=run.manifest | {"model": name})
        args = Namespace(bits="auto", to="peft")
        job = Job(own, replace(base, quantized=quantized), args, tmp_path, tmp_path, Screen(quiet=True))
        use = WRITERS["peft"](job).about.use.format(**parts)
        assert holds in use and ("transformers reads no" in use) is quantized
        compile(shlex.split(use, comments=True)[2], "use", "exec")
        assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == named


def test_peft_is_asked_on_a_base_whose_weights_are_spelled_out(tmp_path, monkeypatch):
    """Where they stay packed, as on Metal; the CPU backend spells out those of a small model by itself."""
    import sys
    from types import SimpleNamespace

    import transformers

    base = load(TINY)
    kept = replace(base, model=writers.packed(base), widened=False)
    assert base.widened and any(hasattr(m, "bits") for _, m in kept.model.named_modules())
    before = {name: mx.array(w) for name, w in tree_flatten(kept.model.parameters())}
    weights = {}

    def read(folder, **_):
        assert "quantization" not in json.loads((folder / "config.json").read_text())
        weights.update(mx.load(str(folder / "model.safetensors")))
        mx.eval(weights)
        raise ValueError("enough")

    monkeypatch.setattr(readers, "check_installed", lambda *_: None)
    monkeypatch.setitem(sys.modules, "peft", SimpleNamespace())
    monkeypatch.setattr(transformers, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=read))
    with pytest.raises(UserError, match="enough"):
        readers.reader_for("peft", str(tmp_path), kept, Sampling(base.eos_ids, 8), 0)
    spelled_out = dict(tree_flatten(base.model.parameters()))
    assert weights.keys() == spelled_out.keys() and {w.dtype for w in weights.values()} == {mx.float32}
    assert all(mx.allclose(weights[name], w, atol=1e-6) for name, w in spelled_out.items())
    after = dict(tree_flatten(kept.model.parameters()))  # the student is still on it
    assert all(w.dtype == before[name].dtype and mx.array_equal(w, before[name]) for name, w in after.items())


def test_a_modelfile_says_the_template_and_where_answers_end():
    text = modelfile(load(TINY), "m.gguf", "a.gguf")
    assert text.startswith("FROM ./m.gguf\nADAPTER ./a.gguf\n") and 'PARAMETER stop "<|im_end|>"' in text
    turn = "<|im_start|>user\n{{ end }}{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>"
    assert turn in text and "{{ if .System }}<|im_start|>system\n{{ .System }}" in text


@pytest.mark.parametrize("adds", [True, False])
def test_ollama_puts_the_token_that_begins_a_text_before_it_by_itself(adds, tmp_path):
    """As Llama 3, Gemma and Mistral have it; a template's own stays where the tokenizer, so the GGUF, adds none."""
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("data"))
    path = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    bos = settings["eos_token"]
    settings |= {"bos_token": bos, "chat_template": "{{ bos_token }}" + settings["chat_template"]}
    path.write_text(json.dumps(settings))
    base = load(str(tmp_path / "model"))
    if adds:
        path = tmp_path / "model" / "tokenizer.json"
        content = json.loads(path.read_text())
        begun = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {bos: {"id": bos, "ids": [base.tokenizer.bos_token_id], "tokens": [bos]}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": begun,
            "pair": [*begun, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": special,
        }
        path.write_text(json.dumps(content))
        base = load(str(tmp_path / "model"))
    own = "" if adds else bos
    assert f'TEMPLATE """{{{{ if .System }}}}{own}<|im_start|>system' in modelfile(base, "m.gguf")
    assert f"{{{{ else }}}}{own}<|im_start|>user" in modelfile(base, "m.gguf")


def test_an_end_token_of_another_script_is_written_as_it_is():
    base, end = load(TINY), "<｜end▁of▁sentence｜>"
    view = copy.copy(base.tokenizer)
    vars(view).update(convert_ids_to_tokens=lambda i: end)
    assert f'PARAMETER stop "{end}"' in modelfile(replace(base, tokenizer=view), "m.gguf")


@pytest.mark.parametrize(("reader", "against"), [("llama.cpp", "Modelfile"), ("transformers", "")])
def test_how_to_ask_an_export_again_that_could_not_be_asked(reader, against, finished, tmp_path, monkeypatch):
    (tmp_path / "Modelfile").write_text("FROM ./m.gguf\n")
    about = About("name", "gguf", "quantized", "It is one.", "use")
    exported = Exported(tmp_path, about, reader, False, tmp_path / against, Path(TINY))
    monkeypatch.setattr(export.subprocess, "run", lambda *_, **__: Namespace(returncode=2))
    with pytest.raises(UserError) as raised:
        export._verified(finished_run(finished), Namespace(verify=1, trust_remote_code=False), exported)
    advice, kinds = shlex.split(str(raised.value).rpartition("safesteer-mlx verify ")[2]), []

    def read(kind, what, *_):
        kinds.append((kind, what))
        raise UserError("enough")

    monkeypatch.setattr(readers, "reader_for", read)
    assert verify.main([*advice, "--test-prompts", "1"]) == 2
    assert kinds == [(reader, str(tmp_path / against))]


def test_a_tokenizer_is_known_by_how_it_splits_alone():
    own = json.loads(Path(f"{TINY}/tokenizer.json").read_text())
    assert pre_tokenizer(own) == "qwen2"
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert pre_tokenizer({"pre_tokenizer": level}) == "gpt-2"
    split = {"type": "Split", "pattern": {"Regex": "x"}}
    for other in ({}, {"pre_tokenizer": {"type": "Metaspace"}}, {"pre_tokenizer": {"pretokenizers": [split, level]}}):
        assert pre_tokenizer(other) is None


# With the extra `export`; docs/export.md has the command, and what it printed last.

SMALL_LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def moved(**more) -> dict:
    return SMALL_LLAMA | more


FAMILIES = {
    "llama": moved(),
    "mistral": moved(model_type="mistral", sliding_window=None),
    "qwen2": moved(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": moved(model_type="qwen3", head_dim=16),
    "gemma": moved(model_type="gemma", head_dim=16, tie_word_embeddings=True),
    "gemma2": moved(model_type="gemma2", head_dim=16, query_pre_attn_scalar=16, tie_word_embeddings=True),
    "gemma3_text": moved(
        model_type="gemma3_text",
        num_hidden_layers=6,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=64,
        tie_word_embeddings=True,
    ),
    "olmo2": moved(model_type="olmo2", num_key_value_heads=4),
    "phi3": moved(model_type="phi3", pad_token_id=0),
    "starcoder2": moved(model_type="starcoder2", norm_epsilon=1e-5, tie_word_embeddings=True),
    "mixtral": moved(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
    "olmoe": moved(model_type="olmoe", num_key_value_heads=4, num_experts=4, num_experts_per_tok=2),
    "qwen2_moe": moved(
        model_type="qwen2_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    ),
    "qwen3_moe": moved(
        model_type="qwen3_moe",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
    ),
}


@pytest.mark.export
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_the_same_to_transformers(family, tmp_path):
    """A random model of the family, written as a transformers folder: the logits of both libraries agree."""
    from importlib import import_module

    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from safesteer_mlx.formats.folders import check_family, write_hf

    base = load(TINY)
    config = FAMILIES[family] | {"vocab_size": 1856, "rope_theta": 10000.0, "max_position_embeddings": 512}
    config |= {"bos_token_id": 0, "eos_token_id": 2}
    full = AutoConfig.for_model(**config).to_dict() | config  # what mlx-lm asks for and we did not say
    check_family(config, "hf")
    module = import_module(f"mlx_lm.models.{'llama' if family == 'mistral' else family}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(full))
    model.eval()
    import dataclasses

    write_hf(dataclasses.replace(base, model=model, config=full), model, mx.float32, tmp_path / "hf")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = np.random.default_rng(0).integers(3, 1000, 24).tolist()
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([ids])).logits[0].numpy()
    found = np.array(model(mx.array([ids]))[0])
    assert np.abs(found - expected).max() < 1e-3 * max(1.0, np.abs(expected).max())


def kl(said: str) -> float:
    """KL(student ‖ shipped) on answers to harmful prompts, as the table has it."""
    return float(re.search(r"shipped\), harmful[ │]+([.\d]+e[-+]\d+)", said)[1])  # type: ignore[index]


@pytest.mark.export
@pytest.mark.parametrize(("words", "most"), [(["hf", "--bits", "32"], 1e-6), (["hf"], 1e-2), (["peft"], 1e-6)])
def test_transformers_and_peft_give_what_the_student_does(finished, tmp_path, capfd, words, most):
    """In float32 the same ids; in half precision a student that was drawn, and babbles, goes other ways at ties."""
    assert main([str(finished), "--to", *words, "--out", str(tmp_path), "--verify", "8"]) == 0
    said = capfd.readouterr().out
    assert kl(said) < most and ("24/24" in said or words == ["hf"])


@pytest.mark.export
def test_peft_reads_dora(tmp_path, capfd):
    run = make_run(tmp_path / "adapters", "dora", -1)
    assert main([str(run), "--to", "peft", "--out", str(tmp_path / "out"), "--verify", "4"]) == 0
    assert "12/12" in capfd.readouterr().out


@pytest.mark.export
@pytest.mark.parametrize(
    ("words", "most"), [(["gguf"], 0.1), (["gguf", "--bits", "16"], 1e-2), (["gguf-lora", "--bits", "16"], 1e-2)]
)
def test_llama_cpp_gives_what_the_student_does(finished, tmp_path, capfd, words, most):
    """Needs llama.cpp's source: LLAMA_CPP names its folder."""
    import os

    source = os.environ.get("LLAMA_CPP")
    assert source, "LLAMA_CPP names no folder of llama.cpp's source; docs/export.md says where it comes from"
    assert main([str(finished), "--to", *words, "--llama-cpp", source, "--out", str(tmp_path), "--verify", "8"]) == 0
    assert kl(capfd.readouterr().out) < most
    assert next(tmp_path.rglob("Modelfile")).read_text().startswith("FROM ./")


@pytest.mark.parametrize("trusted", [True, False])
def test_code_that_may_run_may_wherever_the_base_or_its_export_is_read_again(trusted, tmp_path, monkeypatch):
    base = load(str(MODELS / "tiny-chat"))
    assert load(base.name, trust_remote_code=True).trusted and not base.trusted
    base, how = replace(base, trusted=trusted, widened=True), []

    def read(*_, **options):
        how.append(options)
        raise RuntimeError("enough")

    monkeypatch.setattr("mlx_lm.load", read)
    monkeypatch.setattr(writers, "load_model", read)
    sampling = Sampling(base.eos_ids, 4)
    with pytest.raises(RuntimeError):
        writers.packed(base)
    for reads in (
        lambda: readers._adapter(tmp_path, base, sampling, 0),
        lambda: readers._mlx(base.path, base, sampling, 0, "auto"),
    ):
        with pytest.raises(UserError, match="enough"):
            reads()
    assert [own["trust_remote_code"] for own in how] == [trusted] * 3
    assert all(own["tokenizer_config"] == {"trust_remote_code": trusted} for own in how[1:])
    shutil.copytree(base.path, tmp_path / "own")
    config = json.loads((base.path / "config.json").read_text()) | {"model_file": "own.py"}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="enough" if trusted else "--trust-remote-code"):
        readers._mlx(tmp_path / "own", base, sampling, 0, "auto")
