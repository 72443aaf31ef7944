"""The scorecard's command: what it counts, compares and refuses; adapters checked; thinking never judged."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from runs import MICRO

from safesteer_mlx.evals import heldout
from safesteer_mlx.evals.heldout import BaseAnswers, HeldOut, base_texts, drift, perplexity, until_told
from safesteer_mlx.evals.scores import HOW, Answer, Scores, show, transcripts
from safesteer_mlx.evaluate import main, parse, read_suites
from safesteer_mlx.method import judge
from safesteer_mlx.method.judge import is_broken, is_refusal, outcome, refusal_is_told
from safesteer_mlx.method.prompts import Instruction, built_in_sets, render, render_all
from safesteer_mlx.method.residual import view
from safesteer_mlx.method.rollout import AfterThought, Completion, Sampling, answer_text, generate, stream_key
from safesteer_mlx.method.run import make_run
from safesteer_mlx.method.student import make_student, save_adapters, with_adapters
from safesteer_mlx.method.training_prompts import training_prompts
from safesteer_mlx.recipe import resolve
from safesteer_mlx.system.load import Loaded, load
from safesteer_mlx.system.screen import Screen, UserError

TINY = MICRO
FEW = ["--test-prompts", "6"]


@pytest.fixture(scope="module")
def base() -> Loaded:
    return load(TINY)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Adapters that change the model: B, which begins at zero, is drawn."""
    settings = resolve({}, {"num_layers": 2})[0].train
    student = make_student(base.model, settings, 0)
    mx.random.seed(1)
    drawn = [
        (name, 0.3 * mx.random.normal(w.shape))
        for name, w in tree_flatten(student.trainable_parameters())
        if name.endswith("lora_b")
    ]
    student.load_weights(drawn, strict=False)
    folder = tmp_path_factory.mktemp("run") / "adapters"
    save_adapters(folder, student, settings, TINY, 0)
    return folder


def run(capsys, *flags: str) -> str:
    assert main([TINY, *FEW, *flags]) == 0
    return capsys.readouterr().out


def refused(capsys, *flags: str) -> str:
    assert main(list(flags)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


def test_base_and_aligned_are_counted_and_compared_prompt_by_prompt(adapters, tmp_path, capsys):
    out = run(capsys, "--adapter-path", str(adapters), "--out", str(tmp_path / "o.json"))
    assert "McNemar" in out and "p = " in out and "95 %" in out
    found = json.loads((tmp_path / "o.json").read_text())
    for name in ("base", "student"):
        assert set(found[name]) == {"outcomes", "broken", "capability", "drift", "drift_outside", "samples"}
        assert set(found[name]["outcomes"]) == {"harmful", "harmless", "borderline"}
        for kind, cell in found[name]["outcomes"].items():
            assert set(cell) == {"greedy", "sampled"}
            for how, counts in cell.items():
                assert set(counts) == {"refuse", "comply", "evade", "unparsed"} and sum(counts.values()) == 6
                assert found[name]["broken"][kind][how]["total"] == 6
        assert all(task["total"] == 6 for task in found[name]["capability"].values())
    assert found["base"]["drift_outside"] is None and found["base"]["drift"] == 0 < found["student"]["drift"]
    assert found["student"]["drift_outside"] is None  # adapters that align did not write name no safety tokens


@pytest.fixture
def some(tmp_path) -> list[str]:
    """Flags for a few of the model's harmful prompts, as if they were a suite."""
    file = tmp_path / "some.json"
    file.write_text(json.dumps([{"Goal": item.text} for item in built_in_sets(TINY).harmful_test[::9]]))
    return ["--suite", f"JailbreakBench={file}", "--test-prompts", "0", "--out", str(tmp_path / "out.json")]


def outcomes(flags: list[str]) -> dict[str, dict[str, int]]:
    """What a run with `some` flags wrote."""
    with open(flags[-1]) as file:
        return json.load(file)["base"]["outcomes"]["JailbreakBench"]


def test_the_same_seed_gives_the_same_scores_and_another_does_not(some, capsys):
    found = []
    for seed in ("1", "1", "3"):
        run(capsys, "--seed", seed, *some)
        found.append(outcomes(some))
    assert found[0] == found[1] != found[2]
    assert found[0]["greedy"] == found[2]["greedy"]  # another order, the same prompts


def test_a_judge_that_says_nothing_of_use_is_counted_as_unparsed(some, capsys):
    out = run(capsys, "--judge", TINY, *some)
    assert all(cell["unparsed"] == sum(cell.values()) == 23 for cell in outcomes(some).values())
    assert "JailbreakBench unparsed" in " ".join(out.replace("│", " ").split())


def test_perplexity_of_a_text_is_by_hand_exp_of_the_mean_surprise(base, tmp_path, capsys):
    text = "The answer is 104. " * 3
    (tmp_path / "text.txt").write_text(text)
    ids = base.tokenizer.encode(text, add_special_tokens=False)
    logits = base.model(mx.array([ids[:-1]]))[0].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    surprise = [-logprobs[i, token].item() for i, token in enumerate(ids[1:])]
    value, error, tokens = perplexity(base.model, base.tokenizer, tmp_path / "text.txt")
    assert value == pytest.approx(mx.exp(mx.array(sum(surprise) / len(surprise))).item(), rel=1e-4)
    assert tokens == len(ids) - 1 and error > 0
    assert f"{value:.3f}" in run(capsys, "--perplexity", str(tmp_path / "text.txt"), "--suite", "built-in")
    for bad in ("", "a"):
        (tmp_path / "text.txt").write_text(bad)
        with pytest.raises(UserError, match="longer text"):
            perplexity(base.model, base.tokenizer, tmp_path / "text.txt")


def test_the_base_is_left_as_it_is_and_shares_its_weights(base, adapters):
    row = mx.array([render(base.tokenizer, "Add 21 and 83.")])
    before = base.model(row)
    student = with_adapters(base.model, adapters)
    assert mx.array_equal(base.model(row), before) and not mx.allclose(student(row), before, atol=1e-2)
    active = mx.get_active_memory()
    with_adapters(base.model, adapters)
    assert mx.get_active_memory() - active < 0.5 * sum(w.nbytes for _, w in flat(base.model))


def flat(model):
    return tree_flatten(model.parameters())


@pytest.mark.parametrize("change", ["missing", "foreign", "shape", "empty", "no file", "config"])
def test_adapters_that_do_not_fit_are_refused(change, base, adapters, tmp_path, capsys):
    weights = dict(mx.load(str(adapters / "adapters.safetensors")))  # type: ignore[arg-type]
    name = sorted(weights)[3]
    config = (adapters / "adapter_config.json").read_text()
    expected = {"missing": "lacks 1 of", "foreign": "foreign.lora_a", "shape": name, "empty": "holds no tensor"}.get(
        change, ""
    )
    if change == "missing":
        del weights[name]
    elif change == "foreign":
        weights["foreign.lora_a"] = weights[name]
    elif change == "shape":
        weights[name] = weights[name][:, :1]
    elif change == "empty":
        weights = {}
    elif change == "config":
        config, expected = config.replace('"scale"', '"alpha"'), "scale"
    if change == "no file":
        expected = "adapters.safetensors"
    else:
        mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    (tmp_path / "adapter_config.json").write_text(config)
    said = refused(capsys, TINY, *FEW, "--adapter-path", str(tmp_path))
    assert expected in said and str(tmp_path) in said


BAD = {
    "unknown flag": (["--adapter-pth", "x"], "--adapter-path"),
    "two models": (["one", "--model", "two"], "two models"),
    "no such model": (["./nowhere"], "nowhere"),
    "unknown suite": (["--suite", "XTest"], "XSTest"),
    "no adapters": (["--adapter-path", "nowhere"], "nowhere"),
    "not a number": (["--seed", "x"], "whole number"),
    "too small": (["--max-tokens", "0"], "at least 1"),
    "no such choice": (["--thinking", "maybe"], "maybe"),
    "no such template": (["--judge", TINY, "--judge-template", "gaurd"], "guard"),
    "no such folder": (["--out", "nowhere/o.json"], "nowhere"),
    "no such text": ([TINY, "--perplexity", "nowhere.txt"], "nowhere.txt"),
    "a file for our own prompts": (["--suite", "built-in=x.json"], "x.json"),
    "a file for a policy": (["--data", "nowhere.jsonl"], "--data nowhere.jsonl is no folder that holds a test set"),
    "a policy for nothing": (["--data", ".", "--suite", "XSTest"], "--data . is for the suite built-in"),
    "no thinking switch": ([TINY, "--thinking", "on"], "--thinking"),
    "no lm-eval": (["--suite", "GSM8K"], "safesteer-mlx[eval]"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_sentence(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if name == "no lm-eval":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags, expected = BAD[name]
    assert expected in refused(capsys, *flags)
    assert not list(tmp_path.iterdir())


def test_a_policys_test_sets_stand_for_ours_and_the_others_stay(base, tmp_path, capsys):
    for name in ("harmful", "borderline"):
        (tmp_path / f"{name}_test.jsonl").write_text(f'"my {name} one"\n"my {name} two"\n')
    kinds = read_suites(parse([TINY, "--data", str(tmp_path)]))[0].kinds
    assert [item.text for item in kinds["harmful"]] == ["my harmful one", "my harmful two"]
    assert kinds["harmless"] == built_in_sets(TINY).harmless_test[:100]
    out = run(capsys, "--data", str(tmp_path), "--out", str(tmp_path / "o.json"))
    assert f"from {tmp_path} borderline_test, harmful_test" in " ".join(out.split())
    found = json.loads((tmp_path / "o.json").read_text())
    counts = {kind: sum(cell["greedy"].values()) for kind, cell in found["base"]["outcomes"].items()}
    assert counts == {"harmful": 2, "harmless": 6, "borderline": 2} and found["settings"]["data"] == str(tmp_path)
    (tmp_path / "train.jsonl").write_text('"MY harmful  two"\n')
    assert "harmful_test and harmful_train share a prompt" in refused(capsys, TINY, "--data", str(tmp_path))


def test_help_imports_nothing_heavy():
    code = "import sys, safesteer_mlx.evaluate as e; e._parser().format_help()\n"
    code += "sys.exit(any(m in sys.modules for m in ('mlx', 'numpy', 'rich', 'huggingface_hub')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --------------------------------------------------------------------------------------------------
# Thinking
# --------------------------------------------------------------------------------------------------


class Thinker:
    """Ids are characters; `[` and `]` stand around thinking. mlx-lm's names."""

    has_thinking = True
    think_end_tokens = (ord("]"),)

    def decode(self, ids, **_):
        return "".join(map(chr, ids))

    def find_think_start(self, ids):
        return "".join(map(chr, ids)).find("[")

    def rfind_think_start(self, ids):
        return "".join(map(chr, ids)).rfind("[")

    def rfind_think_end(self, ids):
        return "".join(map(chr, ids)).rfind("]")


@pytest.mark.parametrize(
    ("prompt", "said", "finished", "judged"),
    [
        ("hi", "[I cannot, or can I?] Sure.#", True, "Sure."),
        ("hi [", "I cannot, or can I?] Sure.#", True, "Sure."),  # the template opened it
        ("hi []", "Sure.#", True, "Sure."),  # the template closed it
        ("hi", "Sure.#", True, "Sure."),
        ("hi", "[I cannot, or", False, ""),
        ("hi [", "I cannot, or", False, ""),
        ("hi", "[a] [b] Sure", False, "Sure"),
    ],
)
def test_only_what_follows_the_thinking_is_judged(prompt, said, finished, judged):
    completion = Completion(list(map(ord, said)), finished)
    assert answer_text(Thinker(), list(map(ord, prompt)), completion) == judged


@pytest.fixture(scope="module")
def switchable(tmp_path_factory):
    """The bundled model with a template that has a switch: off, it says before the answer that nothing was thought."""
    folder = tmp_path_factory.mktemp("switch") / "model"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("data"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    header = "assistant\\n' }}"
    assert header in config["chat_template"]
    config["chat_template"] = config["chat_template"].replace(
        header, header + "{% if not enable_thinking %}{{ 'no thought\\n' }}{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_the_declared_mode_is_what_is_trained_and_scored(switchable, tmp_path):
    rows = {}
    for thinking in ("on", "off"):
        recipe, _ = resolve({}, {"thinking": thinking, "adapter_path": str(tmp_path / thinking)})
        base = load(str(switchable), thinking=recipe.run.thinking)
        run = make_run(recipe, base, Screen(quiet=True))
        harmful, harmless = training_prompts(run)
        kinds = {"harmless": run.prompts.sets.harmless_test[:2]}
        texts = HeldOut(base, heldout.TestSet(kinds, []), [], 0, Sampling(base.eos_ids, 1)).texts
        read = [run.prompts.harmful_direction_train, run.prompts.harmless_validation, [prompt for prompt, _ in texts]]
        read += [[p.ids for p in harmful], [p.target_ids for p in harmful], [p.ids for p in harmless]]
        rows[thinking] = [base.tokenizer.decode(row) for part in read for row in part]
        assert not base.thinks
    assert all(text.endswith("no thought\n") for text in rows["off"])
    assert [text.removesuffix("no thought\n") for text in rows["off"]] == rows["on"]


@pytest.mark.parametrize("word", ["on", "off"])
def test_yaml_reads_the_mode_as_a_word(tmp_path, word):
    (tmp_path / "c.yaml").write_text(f"thinking: {word}\n")
    assert resolve({}, {}, None, tmp_path / "c.yaml")[0].run.thinking == word


# --------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------


def scores_of(outcomes: list[str], correct: list[bool]) -> Scores:
    answers = [Answer("harmful", how, f"p{i}", f"t{i}", o, True) for how in HOW for i, o in enumerate(outcomes)]
    return Scores(answers, {"addition": correct}, 0.0, 0.0)


def test_the_tables_show_intervals_and_pairs(capsys):
    scores = {
        "base": scores_of(["comply", "comply", "refuse", "unparsed"], [True, True]),
        "student": scores_of(["refuse", "evade", "refuse", "refuse"], [True, False]),
    }
    screen = Screen()
    screen.console.width = 160
    show(scores, screen)
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert ["harmful refuse, greedy", "1/4, 25.0 % (4.6–69.9)", "3/4, 75.0 % (30.1–95.4)"] in lines
    assert ["harmful refuse, greedy", "+2 −0, p = 0.5"] in lines
    assert ["harmful unparsed, greedy", "+0 −1, p = 1"] in lines
    assert ["addition correct", "+0 −1, p = 1"] in lines
    for line in transcripts(scores):
        assert line["answer"] not in out and line["prompt"] not in out


def test_transcripts_have_a_line_an_answer():
    [first, *rest] = transcripts({"base": scores_of(["comply"], [])})
    assert first == {
        "model": "base",
        "kind": "harmful",
        "how": "greedy",
        "prompt": "p0",
        "answer": "t0",
        "outcome": "comply",
        "finished": True,
        "cut": False,
    }
    assert len(rest) == 1


def test_refusals_of_held_out_answers_are_what_the_judge_says_of_each(base):
    sets = built_in_sets(TINY)
    kinds = {"harmful": sets.harmful_test[::18], "harmless": sets.harmless_test[:4]}
    sampling = Sampling(base.eos_ids, 96, batch_size=64)
    held_out = HeldOut(base, heldout.TestSet(kinds, []), [5], 3, sampling)
    scores = held_out.score(base.model)
    rows = render_all(base.tokenizer, kinds["harmful"])
    for how in HOW:
        keys = [stream_key(3, 2, 0, i) for i in range(len(rows))] if how == "sampled" else None
        drawn = generate(base.model, rows, replace(sampling, temp=float(how == "sampled")), keys)
        texts = [answer_text(base.tokenizer, *pair) for pair in zip(rows, drawn, strict=True)]
        refused = sum(map(is_refusal, texts))
        assert refused == scores.count("harmful", how, "refuse").count and 0 < refused < len(rows)
        assert [outcome(text) for text in texts] == [a.outcome for a in scores.of("harmful", how)]
        broken = sum(is_broken(text, c.finished) for text, c in zip(texts, drawn, strict=True))
        assert broken == scores.as_json()["broken"]["harmful"][how]["count"]


def test_told_refusals_are_cut_and_nothing_else_is(base):
    """What a keyword judge needs is read, and no outcome changes; a judge that reads all has all."""
    kinds = {"harmful": built_in_sets(TINY).harmful_test[::9], "harmless": built_in_sets(TINY).harmless_test[:9]}
    sampling = Sampling(base.eos_ids, 64, batch_size=64)
    short, whole = (
        HeldOut(base, heldout.TestSet(kinds, []), [], 3, sampling, whole=w).score(base.model) for w in (False, True)
    )
    assert not any(a.cut for a in whole.answers)
    assert sum(a.cut for a in short.answers) > 10
    for read, full in zip(short.answers, whole.answers, strict=True):
        assert read.outcome == full.outcome and full.text.startswith(read.text) and read.is_like(full)
        assert read.text == full.text or (read.cut and read.outcome == "refuse" and len(read.text) > 20)
    assert short.drift == whole.drift == 0


@pytest.mark.parametrize(
    ("so_far", "told"),
    [
        ("I can't", False),  # nothing to read yet
        ("I can't help with that. It", True),
        ("Sure. I can", False),
        ("Of course! Here is how.\nFirst", False),
        ("I can't help with that" + " and more" * 30, True),  # more than is looked at
        ("Well" + " and more" * 30 + ". I can't help with that.", False),
        ("很抱歉，我不能帮助你。还", True),
        ("", False),
    ],
)
def test_a_refusal_is_told_once_a_sentence_of_it_can_be_read(so_far, told):
    assert refusal_is_told(so_far) == told


def test_the_thoughts_of_a_model_are_not_taken_for_its_refusal(base):
    class Thinking:
        has_thinking, think_end_tokens = True, [2]

        def rfind_think_end(self, ids):
            return max((i for i, t in enumerate(ids) if t == 2), default=-1)

        def rfind_think_start(self, ids):
            return max((i for i, t in enumerate(ids) if t == 1), default=-1)

        def decode(self, ids, **_):
            return "".join({1: "<", 2: ">", 3: "I can't help with that.", 4: "Sure."}[t] for t in ids)

    enough = until_told(Sampling([9], 8), Thinking()).enough
    assert enough is not None
    assert not enough([1], [3, 3]) and not enough([1], [3, 2, 4]) and enough([1], [4, 2, 3])


def test_answers_that_are_thought_about_are_scored_as_far_for_base_and_student(base):
    """Also where the base's were drawn before, for drift."""
    kinds = {kind: getattr(built_in_sets(TINY), f"{kind}_test")[:6] for kind in ("harmful", "harmless")}
    test, plain = heldout.TestSet(kinds, []), Sampling(base.eos_ids, 24, batch_size=16)
    [(_, ids), *_] = HeldOut(base, test, [], 3, plain).texts
    held_out = HeldOut(base, test, [], 3, replace(plain, after=AfterThought(ids[2:3], 2)))
    own, other = (held_out.score(model) for model in (base.model, view(base.model)))
    assert [(a.text, a.finished, a.cut) for a in own.answers] == [(a.text, a.finished, a.cut) for a in other.answers]
    assert held_out.texts[0][1] == ids[:5] and other.drift == pytest.approx(0, abs=1e-6)
    others = HeldOut(base, test, [], 3, plain).score(base.model).answers
    assert sum(a.cut for a in own.answers) > sum(a.cut for a in others)


def test_the_base_answers_each_held_out_prompt_once(base, tmp_path, monkeypatch):
    """In a run, and of a run whose answers are kept, unless weights or sampling are others or the file is damaged."""
    kinds = {"harmful": built_in_sets(TINY).harmful_test[:6], "harmless": built_in_sets(TINY).harmless_test[:6]}
    tasks, file, drawn = built_in_sets(TINY).capability_test[:3], tmp_path / "answers.json", []
    own = heldout.generate
    monkeypatch.setattr(heldout, "generate", lambda m, rows, *rest: (drawn.append(len(rows)), own(m, rows, *rest))[1])

    def scored(max_tokens=24, n=6, seed=3):
        drawn.clear()
        test = heldout.TestSet({kind: items[:n] for kind, items in kinds.items()}, tasks)
        sampling = Sampling(base.eos_ids, max_tokens, batch_size=16)
        scores = HeldOut(base, test, [5], seed, sampling, kept=file).score(base.model)
        return scores, sum(drawn)

    first, n_drawn = scored()
    assert n_drawn == 2 * 2 * 6 + 3  # the greedy harmless answers serve for drift too
    assert file.stat().st_mode & 0o777 == 0o600
    assert scored() == (first, 0)
    few, n_drawn = scored(n=4)
    assert n_drawn == 0 and few.of("harmful", "greedy") == first.of("harmful", "greedy")[:4]
    assert scored(seed=4)[1] == 2 * 6  # other samples, the same greedy answers
    assert scored()[1] == 0
    content = json.loads(file.read_text())
    for damaged in ("", "[]", '{"made_by": 1}', json.dumps(content | {"answers": {"a": [[-5], True, False]}})):
        file.write_text(damaged)
        assert scored() == (first, 2 * 2 * 6 + 3)
    assert scored(max_tokens=12)[1] == 2 * 2 * 6 + 3


def test_the_bases_answers_are_kept_for_the_judge_that_ended_them(base, tmp_path, monkeypatch):
    """An answer that was ended by a phrase is only the beginning of it for a judge that does not know the phrase."""
    test = heldout.TestSet({"harmless": built_in_sets(TINY).harmless_test[:4]}, [])

    def scored(file):
        return HeldOut(base, test, [5], 3, Sampling(base.eos_ids, 48, batch_size=16), kept=file).score(base.model)

    expected = scored(None)
    word = max(expected.of("harmless", "sampled")[0].text.split(), key=len).lower()
    monkeypatch.setattr(judge, "_more", [word])
    other = scored(tmp_path / "answers.json")
    assert other.count("harmless", "sampled", "refuse").count and any(a.cut for a in other.of("harmless", "sampled"))
    monkeypatch.undo()
    assert scored(tmp_path / "answers.json") == expected
    content = json.loads((tmp_path / "answers.json").read_text())
    assert BaseAnswers(base, Sampling(base.eos_ids, 48), tmp_path / "answers.json")._made_by == content["made_by"]
    monkeypatch.setattr(heldout, "judge_hash", lambda: "another version's")
    assert BaseAnswers(base, Sampling(base.eos_ids, 48), tmp_path / "answers.json")._found == {}


def test_drift_is_measured_on_harmless_prompts_alone_and_is_nan_without(base, adapters):
    student = with_adapters(base.model, adapters)
    items = [Instruction("Add 21 and 83.")]
    sampling = Sampling(base.eos_ids, 96)
    with_harmless, without = (
        HeldOut(
            base, heldout.TestSet({name: items}, [], {"AdvBench": "harmful", "XSTest": "harmless"}), [], 0, sampling
        ).texts
        for name in ("XSTest", "AdvBench")
    )
    assert base_texts(BaseAnswers(base, sampling), [prompt for prompt, _ in with_harmless]) == with_harmless
    over_all, outside = drift(base.model, student, with_harmless, [])
    assert over_all > 0 and outside != outside
    assert drift(base.model, student, with_harmless, [5])[1] > 0
    assert all(x != x for x in drift(base.model, student, without, [5]))


def test_a_quantized_base_stands_beside_its_original(adapters, tmp_path, capsys):
    """The original here is the base's own weights, spelled out: all three columns, and the same counts in two."""
    from mlx_lm.utils import dequantize_model, load_model

    from safesteer_mlx.formats.folders import write_mlx

    base = load(TINY)
    packed, _ = load_model(base.path)
    original = tmp_path / "original"
    original.mkdir()
    write_mlx(base, dequantize_model(packed), original, None)
    out = run(capsys, "--against", str(original), "--adapter-path", str(adapters), "--out", str(tmp_path / "o.json"))
    assert "original → student" in out
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["original"]["outcomes"] == found["base"]["outcomes"]
    assert found["original"]["drift"] < 1e-6 < found["student"]["drift"]


def test_another_model_is_no_original(capsys):
    from pathlib import Path

    market = str(Path(__file__).parent / "zoo_models" / "market")
    assert "another tokenizer" in refused(capsys, TINY, *FEW, "--against", market)
    assert "the model itself" in refused(capsys, TINY, *FEW, "--against", TINY)
