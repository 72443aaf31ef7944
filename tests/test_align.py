"""The whole method on the bundled model, as a user runs it: what is written, repeated, and refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from runs import MICRO

from safesteer_mlx.align import main
from safesteer_mlx.chat import make_voices
from safesteer_mlx.evals import last_screen, verdict
from safesteer_mlx.method import direction, learning, residual, safety_tokens
from safesteer_mlx.method import teacher as teachers
from safesteer_mlx.recipe import MODELS
from safesteer_mlx.system.load import load
from safesteer_mlx.system.screen import Pace

pytestmark = pytest.mark.usefixtures("few_prompts")

TINY = MODELS / "tiny-chat"
SHORT = ["--iters", "2", "--test-prompts", "4", "--direction-train", "32", "--direction-validation", "16"]
SHORT += ["--token-samples", "1", "--coeff", "0.7", "--no-report"]


def aligned(folder: Path, *flags: str) -> Path:
    assert main(["--adapter-path", str(folder), *SHORT, *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return aligned(tmp_path_factory.mktemp("run") / "adapters", "--test-prompts", "12", "--report", "--score-teacher")


def test_writes_what_mlx_lm_reads_and_the_record_beside_it(finished):
    assert {p.name for p in finished.iterdir()} == {"adapters.safetensors", "adapter_config.json", "run"}
    record = {p.name for p in (finished / "run").iterdir()}
    assert record >= {"recipe.yaml", "direction.json", "tokens.json", "metrics.jsonl", "before_after.json"}
    assert (finished / "run").stat().st_mode & 0o777 == 0o700
    assert record >= {"report.html", "figures"} and (finished / "run" / "figures").stat().st_mode & 0o777 == 0o700
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in (finished / "run").rglob("*") if p.is_file())
    lines = [json.loads(line) for line in (finished / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    manifest = json.loads((finished / "run" / "manifest.json").read_text())
    assert 0.5 < manifest["tokens_explain"] <= 1 and 0.1 < max(manifest["tokens_open"]) < 1
    timing = json.loads((finished / "run" / "timing.json").read_text())
    assert len(timing["seconds_by_step"]) == 2 and 0 < sum(timing["seconds_by_step"]) < timing["seconds"]


def test_answers_are_kept_for_their_owner_alone_and_not_at_all_if_not_wanted(finished, tmp_path, capsys):
    import shutil

    scores = json.loads((finished / "run" / "before_after.json").read_text())
    lines = [json.loads(line) for line in (finished / "run" / "transcripts.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 3 * 2 * 12  # models, kinds, ways of decoding, prompts
    assert set(lines[0]) == {"model", "kind", "how", "prompt", "answer", "outcome", "finished", "cut"}
    for model, found in scores.items():
        own = [line for line in lines if (line["model"], line["kind"], line["how"]) == (model, "harmful", "sampled")]
        counts = found["outcomes"]["harmful"]["sampled"]
        assert {o: sum(line["outcome"] == o for line in own) for o in counts} == counts
    folder = tmp_path / "adapters"
    shutil.copytree(finished, folder)
    aligned(folder, "--iters", "1", "--no-transcripts")
    assert not (folder / "run" / "transcripts.jsonl").exists()  # nor the replaced run's
    assert not (folder / "run" / "base_answers.json").exists()
    said = capsys.readouterr().out
    assert not any(line["answer"] in said for line in lines if len(line["answer"]) > 20)


def test_a_second_run_says_that_it_replaces_the_first_and_a_report_it_cannot_draw(
    finished, tmp_path, capsys, monkeypatch
):
    import shutil

    from safesteer_mlx import report

    monkeypatch.setattr(report, "find_spec", lambda name: None)  # no matplotlib
    shutil.copytree(finished, tmp_path / "adapters")
    aligned(tmp_path / "adapters", "--iters", "1", "--report")
    said = " ".join(capsys.readouterr().out.split())
    assert "earlier run, which this one replaces" in said
    assert "no report: the report needs matplotlib; pip install 'safesteer-mlx[report]'" in said
    assert not (tmp_path / "adapters" / "run" / "report.html").exists()  # nor the replaced run's


def test_two_runs_with_one_seed_give_identical_bytes(finished, nothing_prepared, tmp_path):
    again = aligned(tmp_path / "adapters", "--test-prompts", "12", "--score-teacher")
    for name in ("adapters.safetensors", "run/direction.json", "run/tokens.json", "run/metrics.jsonl"):
        assert (finished / name).read_bytes() == (again / name).read_bytes(), name
    assert (finished / "run/before_after.json").read_bytes() == (again / "run/before_after.json").read_bytes()


def test_the_saved_adapter_loaded_by_mlx_lm_is_the_student_that_was_scored(finished):
    from mlx_lm import load

    from safesteer_mlx.method.judge import is_refusal
    from safesteer_mlx.method.prompts import load_instructions, render_all
    from safesteer_mlx.method.rollout import Sampling, generate
    from safesteer_mlx.recipe import HELD_OUT_TOKENS

    model, tokenizer = load(str(TINY), adapter_path=str(finished))  # type: ignore[misc]
    prompts = render_all(tokenizer, load_instructions(TINY / "data" / "harmful_test.jsonl")[:12])
    answers = generate(model, prompts, Sampling(sorted(tokenizer.eos_token_ids), HELD_OUT_TOKENS))
    scored = json.loads((finished / "run" / "before_after.json").read_text())["student"]["outcomes"]["harmful"]
    assert sum(is_refusal(a.text(tokenizer)) for a in answers) == scored["greedy"]["refuse"]


def test_the_student_moved_and_the_teacher_refuses_more_than_the_base(finished, tmp_path):
    scores = json.loads((finished / "run" / "before_after.json").read_text())
    assert scores["base"]["drift"] == 0
    assert 0 < scores["student"]["drift"] < scores["teacher"]["drift"]
    refused = {name: s["outcomes"]["harmful"]["sampled"]["refuse"] for name, s in scores.items()}
    assert refused["teacher"] > refused["base"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss", "reverse_kl", "--anchor-ratio", "0", "--adapter-strength", "0.5"],
        ["--loss", "reverse_kl", "--renormalize", "--skip-first", "1", "--first-tokens", "6"],
        ["--loss", "forward_kl", "--loss-tokens", "top_k", "--top-k", "20"],
        ["--loss", "jsd", "--jsd-alpha", "0.3", "--loss-tokens", "full"],
        ["--token-method", "mean", "--horizon", "1"],
        ["--teacher", "system_prompt"],
        ["--teacher", "ema", "--ema-rate", "0.5", "--refresh-every", "1"],
        ["--fine-tune-type", "dora", "--num-layers", "2"],
        ["--preset", "paper", "--batch-size", "2", "--num-generations", "2"],
        ["--grad-accumulation-steps", "2", "--batch-size", "4"],
    ],
    ids=" ".join,
)
def test_every_variant_runs_to_the_end(flags, tmp_path):
    short = [MICRO, "--batch-size", "8", "--max-tokens", "24"]
    folder = aligned(tmp_path / "adapters", *short, *flags, "--force")  # two steps of some of them make nothing safer
    assert (folder / "adapters.safetensors").stat().st_size > 0
    strength = json.loads((folder / "run" / "manifest.json").read_text())["adapter_strength"]
    assert strength == 0.5 if "--adapter-strength" in flags else strength in [1.0, *learning.STRENGTHS]


def test_a_teacher_of_the_prompt_only_is_that_from_end_to_end(tmp_path, monkeypatch):
    """In every stage behind its choice, in the record, and where the record is read again."""
    built, made = [], teachers.steered_teacher
    monkeypatch.setattr(teachers, "steered_teacher", lambda *given: built.append(given[-1]) or made(*given))

    def on_prompts_only(run, prompts, chosen, answers, most):
        assert list(answers) == [1] and most == run.recipe.tokens.horizon
        built.clear()
        return replace(chosen, opening=4, prompts_only=True)

    monkeypatch.setattr(teachers, "_or_on_prompts_only", on_prompts_only)
    short = [MICRO, "--batch-size", "8", "--max-tokens", "24", "--direction-validation", "13", "--force"]
    folder = aligned(tmp_path / "adapters", *short)
    assert built == [True] and json.loads((folder / "run" / "direction.json").read_text())["prompts_only"] is True
    steered, steer = [], residual.steer
    monkeypatch.setattr(residual, "steer", lambda *given: steered.append(given[-1]) or steer(*given))
    make_voices(load(MICRO).model, folder, 0.7)
    assert steered == [True]


def test_what_the_model_refuses_in_other_words_is_told_last_too(tmp_path, monkeypatch):
    """Where it was seen to before: such sentences count where something is chosen, and in the last lines."""
    opened, told, judged = direction.find_openers, last_screen.outcome, verdict.not_aligned
    seen = []
    monkeypatch.setattr(direction, "find_openers", lambda run: replace(opened(run), refusals=["Mi ne volas."]))
    monkeypatch.setattr(last_screen, "outcome", lambda *content: seen.append(content[-1]) or told(*content))
    monkeypatch.setattr(verdict, "not_aligned", lambda *content: seen.append(content[-1]) or judged(*content))
    short = [MICRO, "--batch-size", "8", "--max-tokens", "24", "--direction-validation", "12", "--force"]
    aligned(tmp_path / "adapters", *short)
    assert seen == [["Mi ne volas."]] * 2


def test_coeff_auto_finds_a_teacher_that_refuses_and_keeps_what_was_tried(nothing_prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "VALIDATION_PROMPTS", (16, 8))
    planned = []
    monkeypatch.setattr(Pace, "correct", lambda pace, seconds: planned.append((pace.step, len(seconds))))
    folder = aligned(tmp_path / "adapters", "--coeff", "auto")
    assert planned == [(2, 5)]  # by what was found in the second of five steps
    found = json.loads((folder / "run" / "direction.json").read_text())
    trials = {(t["layer"], t["position"], t["coeff"]): t for t in found["trials"]}
    chosen = trials[found["layer"], found["position"], found["coeff"]]
    asked = [t for t in trials.values() if t["refused"] is not None]
    assert len(asked) >= 4 and len(trials) > len(asked)
    assert chosen["refused"] >= 0.8 and chosen["broken"] <= 0.1
    assert max(t["refused"] for t in asked) - chosen["refused"] <= 0.15
    # Between the grid's coefficients, steering refuses as between them.
    line = sorted((t["coeff"], t["harmful_opened"]) for t in trials.values() if t["layer"] == chosen["layer"])
    line = [share for coeff, share in line if coeff <= 1.0]
    assert line == sorted(line)


@pytest.mark.usefixtures("unsaved")
def test_a_run_that_learns_nothing_says_so_last_and_recommends_no_adapter(tmp_path, capsys):
    folder = tmp_path / "adapters"
    command = [MICRO, "--adapter-path", str(folder), *SHORT, "--learning-rate", "4e-6"]
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert "not aligned: training brought the model 0% of the way" in err and "are not to be used" in err
    assert "mlx_lm.generate" not in out
    # What was trained and scored is there all the same, and a forced run ends with the same words.
    assert (folder / "run" / "before_after.json").is_file()
    assert "0% of the way" in json.loads((folder / "run" / "manifest.json").read_text())["not_aligned"]
    assert main([*command, "--force", "--report"]) == 0
    assert "<b>Not aligned:</b> training brought the model 0%" in (folder / "run" / "report.html").read_text()
    out = capsys.readouterr().out
    assert "not aligned" in out.splitlines()[-1] and "mlx_lm.generate" not in out


def test_tokens_that_explain_too_little_end_a_run_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(safety_tokens, "EXPLAINS_LITTLE", 1.01)
    folder = tmp_path / "adapters"
    assert main(["--adapter-path", str(folder), *SHORT]) == 2
    assert "of what steering does; training on them would teach little of that" in capsys.readouterr().err
    assert not (folder / "adapters.safetensors").exists() and not (folder / "run" / "metrics.jsonl").exists()


def test_help_is_quick_to_import():
    code = "import sys, safesteer_mlx.align as a; sys.exit(any(m in sys.modules for m in ('mlx', 'numpy', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


BAD = {
    "no model folder": (["./nowhere"], "nowhere"),
    "not a Hub id": (["a b c/d e"], "a b c/d e"),
    "unknown flag": (["--learning-rat", "1"], "--learning-rate"),
    "rate zero": (["--learning-rate", "0"], "learning_rate"),
    "rate negative": (["--learning-rate", "-1"], "learning_rate"),
    "rate not a number": (["--learning-rate", "fast"], "fast"),
    "rate NaN": (["--learning-rate", "nan"], "finite"),
    "epochs zero": (["--epochs", "0"], "epochs"),
    "iters zero": (["--iters", "0"], "iters"),
    "iters not whole": (["--iters", "1.5"], "iters"),
    "batch size zero": (["--batch-size", "0"], "batch_size"),
    "unknown loss": (["--loss", "reverse_lk"], "reverse_kl"),
    "unknown teacher": (["--teacher", "steeer"], "steer"),
    "unknown preset": (["--preset", "papers"], "paper"),
    "anchor too large": (["--anchor-ratio", "1.5"], "anchor_ratio"),
    "coefficient in words": (["--coeff", "strong"], "coeff"),
    "two models": (["one", "--model", "two"], "two models"),
    "no configuration": (["-c", "nowhere.yaml"], "nowhere.yaml"),
    "rank zero": (["--lora-parameters", "{rank: 0}"], "rank"),
    "unknown LoRA key": (["--lora-parameters", "{alpha: 2}"], "alpha"),
    "more blocks than there are": (["--num-layers", "9"], "8 blocks"),
    "full on quantized weights": (["--fine-tune-type", "full"], "full"),
    "no safety tokens": (["--safety-tokens", "0"], "safety_tokens"),
    "half a safety token": (["--safety-tokens", "1.5"], "safety_tokens"),
    "no token file": (["--safety-tokens", "nowhere.json"], "nowhere.json"),
    "no data file": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "more prompts than there are": (["--direction-train", "9999"], "9999"),
    "no block is left": (["--prune-last", "0.9", "--steering-threshold", "50"], "lower --prune-last"),
}


def refused(capsys, argv: list[str]) -> str:
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_sentence_and_writes_nothing(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    argv, expected = BAD[name]
    assert expected in refused(capsys, argv)
    assert not list(tmp_path.iterdir())


FILES = {
    "empty.jsonl": ("", "no prompts"),
    "bad.jsonl": ('{"instruction": "fine"}\n{"instruction": \n', "line 2"),
    "keyless.jsonl": ('{"question": "what"}\n', "line 1"),
    "list.json": ('{"instruction": "not a list"}', "list"),
    "broken.json": ("[\n\n,]", "line 3"),
    "blank.txt": ("\n \n", "no prompts"),
    "prompts.csv": ("a,b\n", ".csv"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_data_file_is_named_with_its_line(name, tmp_path, capsys):
    text, expected = FILES[name]
    (tmp_path / name).write_text(text)
    said = refused(capsys, ["--data", str(tmp_path / name), "--adapter-path", str(tmp_path / "out")])
    assert expected in said and name in said
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_holds_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "thesis.txt" in refused(capsys, ["--adapter-path", str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_models_without_what_a_chat_needs_are_refused(tmp_path, capsys):
    import shutil

    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(capsys, [str(tmp_path / "empty"), "--adapter-path", str(tmp_path / "out")])
    model = tmp_path / "model"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("data"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    assert "chat template" in refused(capsys, [str(model), "--adapter-path", str(tmp_path / "out")])
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_file": "run_me.py"}))
    (model / "run_me.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "run_me.py" in refused(capsys, [str(model), "--adapter-path", str(tmp_path / "out")])
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_yaml_keys_are_flag_names_and_flags_win(tmp_path, capsys):
    from safesteer_mlx.recipe import parse, resolve

    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 1e-5\nnum_layers: 4\nlora_parameters: {rank: 4}\n")
    flags, preset, path = parse(["-c", str(file), "--num-layers", "2"])
    recipe, _ = resolve({}, flags, preset, path)
    assert recipe.train.learning_rate == 1e-5 and recipe.train.num_layers == 2
    assert recipe.train.lora_parameters == {"rank": 4, "scale": 2.0, "dropout": 0.0}
    file.write_text("learnin_rate: 1e-5\n")
    assert "learning_rate" in refused(capsys, ["-c", str(file), "--adapter-path", str(tmp_path / "out")])
    recipe, name = resolve(json.loads((TINY / "config.json").read_text()), {}, "paper")
    assert name == "tiny-chat" and recipe.loss.loss == "reverse_kl" and recipe.loss.anchor_ratio == 0


def test_data_takes_every_format(tmp_path):
    from safesteer_mlx.method.prompts import load_instructions

    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.json").write_text('[{"instruction": "one", "category": "c"}, "two"]')
    (tmp_path / "train.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "one"}]}\n{"prompt": "two", "completion": "x"}\n{"text": "three"}\n'
    )
    found = [[i.text for i in load_instructions(tmp_path / p)] for p in ("a.txt", "b.json", ".")]
    assert found == [["one", "two"], ["one", "two"], ["one", "two", "three"]]


def test_a_loss_that_is_not_a_number_stops_with_a_sentence_and_keeps_the_last_good_step(tmp_path, monkeypatch, capsys):
    import mlx.core as mx

    import safesteer_mlx.method.train as stage

    whole, calls = stage.localized_loss, []

    def breaks(*args, **options):
        calls.append(1)
        value, each, masses = whole(*args, **options)
        return value, each * (mx.nan if len(calls) > 6 else 1), masses

    monkeypatch.setattr(stage, "localized_loss", breaks)
    folder = tmp_path / "adapters"
    assert "not finite at step" in refused(capsys, ["--adapter-path", str(folder), *SHORT, "--iters", "6"])
    weights = mx.load(str(folder / "adapters.safetensors"))
    assert all(mx.isfinite(w).all().item() for w in weights.values())


@pytest.mark.parametrize("which", [0, 7])
def test_mlx_lm_generate_says_what_the_student_said(finished, which):
    from mlx_lm import load

    from safesteer_mlx.method.prompts import load_instructions, render
    from safesteer_mlx.method.rollout import Sampling, generate

    model, tokenizer = load(str(TINY), adapter_path=str(finished))  # type: ignore[misc]
    text = load_instructions(TINY / "data" / "harmful_test.jsonl")[which].text
    [ours] = generate(model, [render(tokenizer, text)], Sampling(sorted(tokenizer.eos_token_ids), 64))
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(TINY), "--adapter-path", str(finished)]
    command += ["--prompt", text, "--max-tokens", "64", "--temp", "0", "--verbose", "False"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ours.text(tokenizer).strip()
