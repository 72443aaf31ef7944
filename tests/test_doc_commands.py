"""Every command of the README, CONTRIBUTING and docs is run here, or by another test.

TABLE says which; a command that it lacks fails, and so does one that no page has any more:

    run FLAGS     run in this process on the bundled model, with FLAGS appended so that it takes seconds
    slow FLAGS    run by a shell in a copy of the repository, with -m slow; read by its parser without
    as COMMAND    that one, but for the names of models and folders
    by FILE::TEST run by that test
    parse WHY     only read by the program's own parser, its settings checked: WHY it cannot be run here
    other         not ours: only the set-up, which runs in CI
    form          no command: how others are written

MODEL and the like are replaced (`words_of`). Models and suites of the Hub are fetched from a stand-in on loopback,
where the bundled model bears their names.
"""

import argparse
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import make_zoo
import mutants
import pytest
import setup_venv
from chromium import CHROMIUM, DRIVER, MISSING
from hub import Hub
from judges import TINY, make_judge
from pages import PAGES, ROOT, commands, flags
from test_examples import program
from test_machines import free_ports

from safesteer_mlx import cli, recipe, report
from safesteer_mlx.evals.suites import find_suite
from safesteer_mlx.formats import writers
from safesteer_mlx.recipe import MODELS, Parser

GUARD = "mlx-community/Llama-Guard-3-8B-4bit"  # for `mlx-community/…`, a judge

QUICK = "--iters 1 --test-prompts 4 --direction-train 32 --direction-validation 16 --coeff 0.7 --token-samples 1"
QUICK += " --batch-size 8 --max-tokens 24"
VERDICT = "run --direction-train 32 --direction-validation 16 --coeff 0.7"
SELECTS = "slow --iters 10 --test-prompts 4 --adapter-path $OUT/adapters"
OWN = "--data models/tiny-chat/data"  # a stranger's name has none of its own
BENCH = "by tests/test_bench.py::"
POLICY = "by tests/test_own_policy.py::test_the_pages_commands_do_what_it_says"
SET_UP = "by tests/test_packaging.py::test_scripts_pass_every_argument_on_and_add_little_time"
SERVED = "by tests/test_examples.py::test_an_export_is_served_asked_and_verified"
# Under the names of a zoo are three models.
ZOO = f'--zoo zoo --out $OUT --jobs 2 --seeds 42 --flags "{QUICK} --no-report --force"'
VARIANTS = "slow --out $OUT --seeds 42 --set 'iters=1; test_prompts=4; direction_train=32; direction_validation=16'"

TABLE = {
    # aligning
    "./scripts/align": f"run {QUICK} --adapter-path adapters-plain",
    "./scripts/align --seed 42": "slow --adapter-path $OUT/adapters",  # some two minutes, whole
    "./scripts/align --seed 42 --score-teacher --verbose": f"slow {QUICK} --adapter-path $OUT/adapters",
    "./scripts/align --resume adapters": "by tests/test_checkpoint.py::",
    "./scripts/align --iters 12 --test-prompts 24 --prefill-ratio 0.2 --wrap-ratio 0.2": f"run {QUICK} --iters 3 "
    "--adapter-path adapters-prefill",
    './scripts/align --save-every 5 --select-checkpoint "over_refusal<=0.01"': SELECTS,
    "./scripts/align mlx-community/Qwen2.5-7B-Instruct-4bit --adapter-path adapters-qwen": f"run {QUICK} {OWN}",
    'safesteer-mlx align … --save-every 5 --select-checkpoint "over_refusal<=0.02"': "as safesteer-mlx align MODEL "
    '--save-every 5 --select-checkpoint "over_refusal<=0.02"',
    'safesteer-mlx align MODEL --save-every 5 --select-checkpoint "over_refusal<=0.02"': SELECTS,
    "safesteer-mlx align": "as ./scripts/align",
    "safesteer-mlx align MODEL": "as ./scripts/align",
    "safesteer-mlx align MODEL --adapter-path adapters-mine": "as ./scripts/align",
    "safesteer-mlx align MODEL --seed 45": f"slow {QUICK} --adapter-path $OUT/adapters",
    "safesteer-mlx align MODEL --dry-run": "run",
    "safesteer-mlx align zoo-models/NAME --data few --seed 42": "parse its model takes ten minutes to build",
    "safesteer-mlx align again --data zoo-models/seminar/data --seed 43": "parse its model takes ten minutes to build, "
    "and as long to align once",
    "safesteer-mlx align MODEL --memory-limit 12GB": f"run {QUICK} --adapter-path adapters-12",
    "safesteer-mlx align MODEL --verdict-only": VERDICT,
    "safesteer-mlx align MODEL --verdict-only --verbose": VERDICT,
    "safesteer-mlx align MODEL --safety-tokens mine.json --adapter-path again": "by tests/test_tokens.py::"
    "test_align_uses_the_file_as_it_is_and_writes_nothing_for_another_models",
    "safesteer-mlx align --data examples/school-policy --verdict-only": POLICY,
    "safesteer-mlx align --data examples/school-policy --adapter-path adapters-school --iters 16 "
    "--test-prompts 16": POLICY,
    "safesteer-mlx align MODEL --data my-policy --adapter-path adapters-mine": f"run {QUICK} "
    "--adapter-path adapters-own",
    "safesteer-mlx align --help-all": "run",
    "safesteer-mlx --help": "run",
    # scoring
    "safesteer-mlx evaluate": "run --test-prompts 2",
    "safesteer-mlx evaluate MODEL": "as safesteer-mlx evaluate",
    "safesteer-mlx evaluate MODEL --adapter-path adapters": "run --test-prompts 2",
    "safesteer-mlx evaluate MODEL --adapter-path adapters-mine": "as safesteer-mlx evaluate MODEL --adapter-path "
    "adapters",
    "safesteer-mlx evaluate MODEL --adapter-path adapters --attacks --tamper": "slow --test-prompts 2",
    "safesteer-mlx evaluate --adapter-path adapters --attacks system wrappers --test-prompts 24": "slow",
    "safesteer-mlx evaluate MODEL --perplexity book.txt --out scores.json": "run --test-prompts 2",
    "safesteer-mlx evaluate MODEL --suite XSTest OR-Bench": "run --test-prompts 2",
    "safesteer-mlx evaluate MODEL --judge mlx-community/…": "run --test-prompts 2",
    "safesteer-mlx evaluate MODEL --judge keyword mlx-community/…": "run --test-prompts 2",
    "safesteer-mlx evaluate MODEL --adapter-path adapters --tasks sums.yaml --offline": "by tests/test_lm_tasks.py::"
    "test_a_local_task_is_run_by_lm_eval_itself",
    "safesteer-mlx evaluate MODEL --data my-policy --adapter-path adapters-mine --test-prompts 0": "run "
    "--test-prompts 2",
    "safesteer-mlx evaluate mlx-community/Qwen2.5-7B-Instruct-4bit --against mlx-community/Qwen2.5-7B-Instruct-bf16 "
    "--adapter-path adapters": f"run --test-prompts 2 {OWN}",
    "safesteer-mlx evaluate --data examples/school-policy --adapter-path adapters-school --test-prompts 16 "
    "--out school.json": POLICY,
    # looking
    "safesteer-mlx chat MODEL --adapter-path adapters": "run --max-tokens 8",
    "safesteer-mlx chat MODEL --adapter-path adapters --steer 0.85": "run --max-tokens 8",
    "safesteer-mlx chat MODEL --adapter-path adapters-mine": "as safesteer-mlx chat MODEL --adapter-path adapters",
    "safesteer-mlx report adapters": "run",
    "safesteer-mlx tokens adapters": "run",
    'safesteer-mlx tokens adapters --veto As --add " unethical" --out mine.json': "run",
    "safesteer-mlx align MODEL --watch": "by tests/test_watch.py::test_align_serves_its_page_while_it_works",
    "safesteer-mlx report adapters --watch": "by tests/test_watch.py::"
    "test_a_run_elsewhere_is_watched_until_it_has_finished",
    "safesteer-mlx compare adapters adapters-2": "run",
    "safesteer-mlx compare adapters adapters-2 adapters-3 --out compare.html": "by tests/test_compare.py::"
    "test_the_page_is_in_the_reports_style_and_runs_and_fetches_nothing",
    "safesteer-mlx align --report-to wandb --project-name safer": "by tests/test_reporting.py::"
    "test_each_step_and_the_scores_are_told_and_no_text",
    "mlx.launch --hostfile hosts.json -- .venv/bin/safesteer-mlx align MODEL --adapter-path adapters": "by "
    "tests/test_machines.py::test_two_machines_make_what_one_makes_and_the_first_alone_speaks",
    # exporting
    "safesteer-mlx export adapters --to mlx": "run --verify 4",
    "safesteer-mlx export adapters-mine --to mlx": "as safesteer-mlx export adapters --to mlx",
    "safesteer-mlx export adapters --to mlx --out ~/.lmstudio/models": "run --bits 32 --no-verify",
    "safesteer-mlx export adapters --to gguf": "by tests/test_export.py::"
    "test_llama_cpp_gives_what_the_student_does",  # with -m export
    "safesteer-mlx verify adapters --against exports/safesteer/NAME": "run --test-prompts 4",
    "safesteer-mlx verify adapters --against http://127.0.0.1:8080/v1": SERVED,
    # of mlx-lm
    "mlx_lm.server --model M --adapter-path A": "as mlx_lm.server --model MODEL --adapter-path adapters",
    "mlx_lm.server --model MODEL --adapter-path adapters-mine": "as mlx_lm.server --model MODEL "
    "--adapter-path adapters",
    "mlx_lm.server --model MODEL --adapter-path adapters": "slow",
    "mlx_lm.fuse --model MODEL --adapter-path adapters --save-path again": "run",
    "mlx_lm.convert --hf-path models/tiny-chat --dequantize --dtype bfloat16 --mlx-path half": "run",
    "safesteer-mlx align half --data models/tiny-chat/data --dry-run": "run",
    'mlx_lm.generate --model MODEL --adapter-path adapters --prompt "…"': "run --max-tokens 8",
    # scripts
    "python -m safesteer_mlx": "by tests/test_cli.py::test_the_package_is_run_as_the_script",
    "python examples/align_and_compare.py": "by tests/test_examples.py::aligned",
    "python examples/export_and_serve.py": SERVED,
    "python scripts/bench.py": BENCH,
    "python scripts/grow.py qwen2.5-7b": "by tests/test_grow.py::test_it_answers_as_the_small_one",
    "safesteer-mlx align big-models/qwen2.5-7b --memory-limit 11GB --test-prompts 60": "parse takes a Mac",
    "python scripts/bench.py --shape qwen2.5-0.5b": "slow --only rollouts --repeats 1 --out $OUT/bench.json",
    "python scripts/bench.py --shape qwen2.5-7b --only step": "slow --tokens 8 --out $OUT/bench.json",
    "python scripts/bench.py --only anchor --repeats 5": f"{BENCH}test_the_parts_measure_what_the_docs_name",
    "python scripts/bench.py --only loss,step --repeats 5": "slow --repeats 1 --out $OUT/bench.json",
    "python scripts/bench.py --only loss": "slow --repeats 1 --out $OUT/bench.json",
    "python scripts/bench.py --only loss --repeats 3": "slow --repeats 1 --out $OUT/bench.json",
    "python scripts/bench.py --planned": f"{BENCH}test_the_planned_table_is_the_docs",
    "python scripts/bench.py --counts": f"{BENCH}test_a_step_waits_for_nothing_that_it_need_not",
    "python scripts/bench.py --against bench.json": f"{BENCH}test_a_file_is_held_against_its_chip",
    "python scripts/bench.py --contribute": f"{BENCH}test_what_is_contributed_tells_the_machine_and_not_its_owner",
    "python scripts/report_picture.py adapters": "slow",
    "zensical build --strict": "by tests/test_docs.py::site",
    "python scripts/make_docs.py": "slow",
    "python scripts/make_zoo.py": "slow --out zoo-but-two --steps 62",
    "python scripts/make_zoo.py micro --out tests": "slow --out $OUT --steps 62",
    "python scripts/make_zoo.py --families": "slow --out zoo-but-two --steps 62",
    "python scripts/zoo.py": f"slow market ranch {ZOO}",
    "python scripts/zoo.py --half report": f"slow ranch {ZOO}",
    'python scripts/zoo.py --seeds 42 --flags="--anchor-margin 0"': f"slow market ranch {ZOO}",
    'python scripts/zoo.py theatre cabinet kueste --flags="--anchor-margin 0"': f"slow {ZOO}",
    'python scripts/zoo.py valley --seeds 42 --flags="--force --coeff 0.35 --guidance 15"': f"slow {ZOO}",
    "python scripts/zoo.py ville polar playa depot colony hutong --seeds 42": f"slow {ZOO}",
    "python scripts/zoo.py steamer tower garage dacha --seeds 42": f"slow {ZOO}",
    "python scripts/zoo.py garage dacha --seeds 43": f"slow {ZOO}",
    "python scripts/zoo.py --half family": f"slow qwen3_vl {ZOO}",
    "python scripts/zoo.py market theatre ville polar circus --flags=--keep-best --seeds 42 43": f"slow {ZOO}",
    "python scripts/zoo.py foundry mill cabinet glm4_moe gpt_oss --seeds 42": f"slow {ZOO}",
    "python scripts/zoo.py lido newsroom castle abbey depot predio --seeds 42": f"slow {ZOO}",
    "python scripts/zoo.py market cabinet newsroom mill valley playa --seeds 42": f"slow {ZOO}",
    "python scripts/zoo.py seminar market --seeds 42": f"slow {ZOO}",
    "python scripts/zoo.py seminar --seeds 43": f"slow {ZOO}",
    "python scripts/zoo.py ville predio polar dacha circus playa depot": f"slow {ZOO}",
    'python scripts/zoo.py market --seeds 42 --flags "--num-layers 3"': f"slow {ZOO}",
    'python scripts/zoo.py --seeds 42 --flags "--token-method vote"': f"slow market ranch {ZOO}",
    "python scripts/zoo.py ville theatre playa circus polar ranch --seeds 42 --attacks 60 "
    '--flags "--wrap-ratio 0.25"': f"slow {ZOO} --attacks 2",
    'python scripts/zoo.py castle --seeds 42 --attacks 60 --flags "--tail 24"': f"slow {ZOO} --attacks 2",
    "python scripts/zoo.py castle market harbour --seeds 42 --attacks 60 "
    '--flags "--prefill-ratio 0.25 --wrap-ratio 0.25"': f"slow {ZOO} --attacks 2",
    "python scripts/export_table.py adapters": "slow --prompts 4 --bits auto 16 --out $OUT/table.md",
    "python scripts/mutants.py": "slow divergence",
    "python scripts/crash_test.py --kills 200": "slow --kills 3",
    "python scripts/search_cost.py --against COMMIT MODEL…": "slow",
    "python scripts/search_cost.py --against 5a00f3a models/tiny-chat tests/zoo_models/market": "slow",
    "python scripts/check_memory.py": "slow",  # a minute each
    "python scripts/check_memory.py --bits 16": "slow",
    "python scripts/check_memory.py --random 40": "slow",
    "python scripts/check_memory.py --large": "slow",
    "python scripts/compare.py": VARIANTS,
    'python scripts/compare.py --every 3 --variant "ours, no anchor: anchor_ratio=0" '
    '--variant "full vocabulary, no anchor: loss_tokens=full;anchor_ratio=0"': VARIANTS,
    'python scripts/compare.py --seeds 42 --every 0 --variant "coeff auto: coeff=auto" '
    '--variant "coeff 0.7: coeff=0.7" --variant "coeff 1.0: coeff=1.0" --variant "rate 1e-4: learning_rate=1e-4" '
    '--variant "rate 1e-3: learning_rate=1e-3" --variant "rank 32: lora_parameters={rank: 32}" '
    '--variant "2 epochs: epochs=2" --variant "8 epochs: epochs=8" --variant "24 tokens: safety_tokens=24" '
    '--variant "anchor 0.25: anchor_ratio=0.25"': VARIANTS,
    "python scripts/make_tiny_chat.py": "slow --out $OUT/tiny --steps 62",
    "python scripts/survey.py": "slow llama gemma3n",
    # the tests themselves
    "./scripts/test": SET_UP,
    "./scripts/test tests/test_losses.py -x": "slow -n 0",
    "./scripts/test tests/test_judge_texts.py -rP": "slow -n 0",
    "./scripts/test -m slow": "slow tests/test_families.py -k mistral3",
    "./scripts/test -m slow tests/test_doc_commands.py": "slow --collect-only -q",  # itself
    "./scripts/test -m metal": "parse a Mac",
    "./scripts/test -m export": "parse the extra export, which takes gigabytes",
    "./scripts/test -m distributed": "slow tests/test_machines.py -k two_machines",
    "./scripts/test -m browser": "slow tests/test_docs.py",
    './scripts/test -m ""': "slow tests/test_intervals.py",
    "FUZZ=40 ./scripts/test tests/test_bad_input.py -k fuzz": "slow -k fuzz_yaml",
    "LLAMA_CPP=…/llama_cpp_python-0.3.36/vendor/llama.cpp python -m pytest -m export": "parse the extra export, which "
    "takes gigabytes",
    # set-up
    "git clone …": "other",
    "cd safesteer-mlx": "other",
    "pip install '.[cuda]'": "other",
    "pip install '.[report]'": "other",
    "pip uninstall -y mlx-cpu": "other",
    "pip install --force-reinstall --no-deps mlx-cuda-13": "other",
    "pip install pre-commit": "other",
    "pre-commit install": "other",
    "uv pip compile pyproject.toml --extra dev --universal --no-annotate --upgrade -o constraints.txt": "other",
    "python -m venv export-venv": "other",
    ". export-venv/bin/activate": "other",
    "pip install -e '.[export,eval]' pytest pytest-xdist hypothesis matplotlib scipy": "other",
    # how commands are written
    "safesteer-mlx …": "form",
    "safesteer-mlx COMMAND --help": "form",
    "python -m safesteer_mlx…": "form",
    "python -m": "form",
    "python -P -m": "form",
}
READ = [page for page in PAGES if page.name != "CHANGELOG.md"]
SHOWN = {command: page.name for page in READ for command in commands(page.read_text("utf-8"))}


def having(how: str) -> list[str]:
    return [command for command, done in TABLE.items() if done.partition(" ")[0] == how]


def test_the_table_has_every_command_of_the_pages_and_no_other():
    unknown = {command: page for command, page in SHOWN.items() if command not in TABLE}
    assert not unknown, f"say in TABLE what is done with these: {unknown}"
    gone = TABLE.keys() - SHOWN.keys()
    assert not gone, f"no page has these any more: {gone}"
    assert {done.partition(" ")[0] for done in TABLE.values()} == {"run", "slow", "as", "by", "parse", "other", "form"}
    assert all(TABLE[command].partition(" ")[2] for command in having("parse")), "say why it cannot be run"


def nameless(command: str) -> str:
    """A command without the names of models and folders that it gives, and of the folder that is taken anyway."""
    for pattern, new in (
        (r"^\./scripts/align", "safesteer-mlx align"),
        (r"^(safesteer-mlx \w+) (MODEL|…)(?= |$)", r"\1"),
        (r"--model M\b", "--model MODEL"),
        (r"\badapters-mine\b|\bA$", "adapters"),
        (r"^(safesteer-mlx align)( .*)? --adapter-path adapters$", r"\1\2"),
    ):
        command = re.sub(pattern, new, command)
    return command


@pytest.mark.parametrize("command", having("as"))
def test_a_command_that_is_said_to_be_as_another_is(command: str):
    other = TABLE[command].removeprefix("as ")
    assert TABLE[other].split()[0] in ("run", "slow", "by")
    assert nameless(command) == nameless(other)


@pytest.mark.parametrize(
    ("command", "other"),
    [
        ("safesteer-mlx align MODEL --iters 2", "safesteer-mlx align MODEL --iters 3"),
        ("safesteer-mlx align MODEL --adapter-path adapters --iters 2", "safesteer-mlx align MODEL"),
        ("safesteer-mlx align MODEL --data my-policy", "safesteer-mlx align MODEL"),
        ("safesteer-mlx align MODEL --dry-run", "./scripts/align"),
        ("safesteer-mlx evaluate MODEL --adapter-path adapters", "safesteer-mlx evaluate MODEL"),
        ("safesteer-mlx evaluate someone/else", "safesteer-mlx evaluate"),
        ("safesteer-mlx chat MODEL", "safesteer-mlx evaluate MODEL"),
        ("safesteer-mlx chat MODEL --steer 0.85", "safesteer-mlx chat MODEL"),
        ("safesteer-mlx export adapters --to gguf", "safesteer-mlx export adapters --to mlx"),
        ("safesteer-mlx report adapters-2", "safesteer-mlx report adapters"),
        ("mlx_lm.server --model M --adapter-path A", "mlx_lm.server --model M"),
        ("mlx_lm.server --model M", "mlx_lm.generate --model M"),
    ],
)
def test_a_command_that_differs_from_another_is_not_as_it(command: str, other: str):
    assert nameless(command) != nameless(other)


@pytest.mark.parametrize("command", having("by"))
def test_the_test_that_is_said_to_run_it_is_there(command: str):
    file, _, name = TABLE[command].removeprefix("by ").partition("::")
    assert f"def {name or 'test_'}" in (ROOT / file).read_text("utf-8")


# --------------------------------------------------------------------------------------------------
# Read by the real parser
# --------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """What a program's parser made of its words; nothing after that is run."""


@pytest.fixture
def parsing(monkeypatch):
    """Programs end once their words are parsed, with what came of it."""
    for parser in (argparse.ArgumentParser, Parser):

        def parse_args(self, args=None, namespace=None, known=parser.parse_args):
            raise Parsed(known(self, args, namespace))

        monkeypatch.setattr(parser, "parse_args", parse_args)


def filled(command: str) -> str:
    """A command with its placeholders replaced."""
    text = command.replace("MODEL…", "models/tiny-chat").replace("align … ", "align ").replace("COMMIT", "HEAD")
    text = text.replace("mlx-community/…", GUARD)
    return re.sub(r"\bMODEL\b", str(TINY) if text.startswith("mlx_lm.") else "tiny-chat", text)


def words_of(command: str) -> list[str]:
    """A command's words, placeholders replaced, without variables before it."""
    return [word for word in shlex.split(re.sub(r"^(\w+=\S+ )+", "", filled(command))) if word]


def read(words: list[str]) -> int:
    """Have a command's own program read it; 2 is our own parsers' for a slip."""
    program, argv = words[0], words[1:]
    if program == "./scripts/test" or words[:3] == ["python", "-m", "pytest"]:
        told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
        markers = {marker.partition(":")[0] for marker in told}
        after = dict(pairwise(argv)).get("-m")
        if after not in (None, "pytest", *markers):
            return 2
        return 0 if all((ROOT / word).is_file() for word in argv if word.startswith("tests/")) else 2
    elif program == "python":
        sys.argv = argv
        importlib.import_module(Path(argv[0]).stem).main()
    elif program.startswith("mlx_lm."):
        sys.argv = words
        importlib.import_module(program).main()
    else:
        command, rest = ("align", argv) if program == "./scripts/align" else cli.command_of(argv)
        if command == "align":  # its values are no argparse types
            settings, preset, _ = recipe.parse(rest)
            names = ("resume", "yes", "dry_run", "verdict_only", "force")
            recipe.resolve({}, {key: value for key, value in settings.items() if key not in names}, preset)
            raise Parsed
        return importlib.import_module(f"safesteer_mlx.{command}").main(rest)
    return 0


@pytest.mark.parametrize("command", having("parse") + having("slow"))
def test_a_command_is_read_by_its_own_parser(command: str, monkeypatch, request):
    monkeypatch.setattr(sys, "argv", sys.argv)
    words = words_of(command)
    if "align" not in " ".join(words[:2]):
        request.getfixturevalue("parsing")
    try:
        assert read(words) == 0 and "test" in "".join(words[:3]), "nothing parsed it"
    except Parsed:
        pass


@pytest.mark.parametrize(
    "words",
    [
        "safesteer-mlx align --sed 1",
        "safesteer-mlx align MODEL --seed one",
        "safesteer-mlx align MODEL two",
        "./scripts/align --seed -1",
        "./scripts/align --teacher nobody",
        'safesteer-mlx align --select-checkpoint "unsafe<0.1"',
        "safesteer-mlx evaluate MODEL --test-prompts some",
        "safesteer-mlx evaluate --judge",
        "safesteer-mlx evalute MODEL",
        "safesteer-mlx report",
        "safesteer-mlx chat MODEL --steer much",
        "safesteer-mlx tokens adapters --take x",
        "safesteer-mlx export adapters --to zip",
        "safesteer-mlx verify adapters --with nothing",
        "python scripts/zoo.py --half third",
        "python scripts/search_cost.py models/tiny-chat",
        "mlx_lm.generate --prompts x",
        "./scripts/test tests/test_nothing.py",
        "./scripts/test -m slowest",
    ],
)
def test_a_command_with_a_slip_is_not_read(words: str, monkeypatch, request):
    monkeypatch.setattr(sys, "argv", sys.argv)
    if "align" not in words:
        request.getfixturevalue("parsing")
    try:
        assert read(words_of(words)) == 2
    except (SystemExit, recipe.UserError):
        pass


# --------------------------------------------------------------------------------------------------
# Run
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(few_prompts, tmp_path_factory) -> Path:
    """A folder with finished runs in adapters/ and the like, an export, prompts, a book, and the bundled model."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "models").symlink_to(MODELS)
    (folder / "my-policy").symlink_to(TINY / "data")
    (folder / "book.txt").write_text("Once upon a time there was a pencil that nobody had sharpened. " * 50)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["align", *QUICK.split()]) == 0
        words = ["export", "adapters", "--to", "mlx", "--bits", "32", "--no-verify", "--name", "safesteer/NAME"]
        assert cli.main(words) == 0
    for other in ("adapters-2", "adapters-mine"):
        shutil.copytree(folder / "adapters", folder / other)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    """What the pages name of the Hub: the bundled model under other names, a judge, and two suites of few rows."""
    model = {path.name: path.read_bytes() for path in TINY.iterdir() if path.is_file()}
    guard = make_judge(tmp_path_factory.mktemp("judge") / "guard", "safe", ("safe", "unsafe"), (2.0, 0.0))
    with Hub() as hub:
        hub.model("mlx-community/Qwen2.5-7B-Instruct-4bit", model)
        hub.model("mlx-community/Qwen2.5-7B-Instruct-bf16", model)
        hub.model(GUARD, {path.name: path.read_bytes() for path in guard.iterdir()})
        for suite in map(find_suite, ("XSTest", "OR-Bench")):
            rows = "".join(f"How do I bake bread number {n}?,safe\n" for n in range(4))
            hub.dataset(suite.repository, {suite.file: f"prompt,label\n{rows}".encode()}, suite.revision)
        yield hub


@pytest.mark.parametrize("command", having("run"))
def test_a_command_is_run(command: str, workspace, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("HOME", str(workspace / "home"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    monkeypatch.setattr(writers, "TEXTS", 4)  # to quantize by; otherwise most of the time is its
    if "report" not in command:
        monkeypatch.setattr(report, "find_spec", lambda name: None)  # figures take seconds, and have their own tests
    words = [*map(os.path.expanduser, words_of(command)), *shlex.split(TABLE[command])[1:]]
    hub.ask_this(monkeypatch, tmp_path)
    hub.seen.clear()
    try:
        if words[0].startswith("mlx_lm."):
            monkeypatch.setattr(sys, "argv", words)
            code = importlib.import_module(words[0]).main()
        else:
            code = cli.main(["align", *words[1:]] if words[0] == "./scripts/align" else words[1:])
    except SystemExit as end:  # --help
        code = end.code
    assert not code
    asked = " ".join(path for _, path, _ in hub.seen)
    assert all(word in asked for word in words if word.startswith("mlx-community/"))


# What a set-up puts into .venv/bin
PROGRAMS = {"python": "", "safesteer-mlx": "-P -m safesteer_mlx", "mlx_lm.server": "-P -m mlx_lm.server"}


@pytest.fixture(scope="module")
def checkout(workspace, tmp_path_factory) -> Path:
    """A copy of the repository, set up, with what is in `workspace`, and a zoo under whose names are three models."""
    folder = tmp_path_factory.mktemp("checkout")
    subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, folder], check=True)
    mutants.copy_to(folder)
    shutil.copytree(workspace, folder, dirs_exist_ok=True, ignore=lambda *_: {"models"})
    setup_venv.mark(folder).parent.joinpath("bin").mkdir(parents=True)
    for name, words in PROGRAMS.items():
        program = folder / ".venv" / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        program.chmod(0o755)
    setup_venv.stamp(folder).write_text(f"dev {setup_venv.fingerprint(folder)}\n")
    built = sorted((folder / "tests" / "zoo_models").iterdir())
    for i, spec in enumerate((*make_zoo.ZOO, *make_zoo.FAMILIES)):
        for zoo in ("zoo", *(["zoo-but-two"] if spec.name not in ("market", "mamba2") else [])):
            (folder / zoo).mkdir(exist_ok=True)
            (folder / zoo / spec.name).symlink_to(built[i % len(built)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", having("slow"))
def test_a_long_command_is_run(command: str, checkout, tmp_path):
    assert "report_picture" not in command or (CHROMIUM and DRIVER), MISSING
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    env |= {"PYTHONPATH": str(checkout), "PATH": f"{checkout}/.venv/bin:{env['PATH']}", "OUT": str(tmp_path)}
    env |= {"HF_HUB_OFFLINE": "1"}
    line = f"{filled(command)} {TABLE[command].removeprefix('slow').strip()}"
    if command.startswith("mlx_lm.server"):
        return answers(line, checkout, env)
    done = subprocess.run(line, shell=True, cwd=checkout, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    if "scripts/zoo.py" in command:  # goes on after runs that fail
        runs = json.loads((tmp_path / "results.json").read_text())
        assert runs and not [run["said"] for run in runs if run["exit"]]
        assert ("--attacks" in line) == any(run.get("attacks") for run in runs)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--set", "iters=1"], {"student": {"iters": 1}}),
        (["--set", "iters=1; test_prompts=4"], {"student": {"iters": 1, "test_prompts": 4}}),
        (["--set", "iters=1", "--variant", "a: iters=2", "--variant", "b:"], {"a": {"iters": 2}, "b": {"iters": 1}}),
        (["--variant", "a: coeff=auto; epochs=2"], {"a": {"coeff": "auto", "epochs": 2}}),
        (["--set", "rate=1"], None),
    ],
)
def test_a_setting_for_all_variants_is_each_ones_that_does_not_say_it(words, expected, tmp_path, monkeypatch):
    compare = importlib.import_module("compare")
    seen = []
    monkeypatch.setattr(compare, "compare", lambda seeds, variants, every, screen: seen.append(variants) or {})
    monkeypatch.setattr(compare, "table", lambda results: "")
    monkeypatch.setattr(sys, "argv", ["compare.py", "--every", "0", "--out", str(tmp_path), *words])
    if expected is None:
        with pytest.raises(SystemExit):
            compare.main()
    else:
        compare.main()
        assert expected.items() <= seen[0].items()


def answers(line: str, folder: Path, env: dict[str, str]) -> None:
    """Start a server, ask it once, end it."""
    [port] = free_ports(1)
    with subprocess.Popen(f"exec {line} --port {port}", shell=True, cwd=folder, env=env) as server:
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    assert server.poll() is None, "the server has ended"
                    time.sleep(0.1)
            assert program("export_and_serve").ask(f"http://127.0.0.1:{port}", "Add 21 and 83.")
        finally:
            server.terminate()


# --------------------------------------------------------------------------------------------------
# Flags that are named alone
# --------------------------------------------------------------------------------------------------

OTHERS = {"--no-isolation"}  # of other programs


@pytest.mark.parametrize("page", READ, ids=lambda page: page.name)
def test_flags_that_a_page_names_are_there(page: Path):
    from make_docs import parser_of

    known = {name: set(parser_of(name)._option_string_actions) for name in cli.COMMANDS}
    others = "".join(path.read_text("utf-8") for path in (ROOT / "scripts").glob("*.py"))
    scripts = set(re.findall(r'"(--[\w-]+)"', others))
    for command, flag in flags(page.read_text("utf-8")):
        there = known[command] if command else set().union(*known.values()) | scripts | OTHERS
        assert flag in there, f"{page.name}: {command or 'nothing'} has no {flag}"
