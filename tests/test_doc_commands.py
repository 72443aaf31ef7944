"""Every command of the README, CONTRIBUTING and docs is run here, or by another test, or read by its real parser.

TABLE says which; a command that it lacks fails, and so does one that no page has any more:

    run FLAGS     run as it stands on the bundled model, with FLAGS appended so that it takes seconds
    slow FLAGS    the same, with -m slow
    parse         read by the program's own parser, its settings checked; MODEL and the like replaced
    by FILE::TEST run by that test
    other         not ours: only the set-up, which runs in CI
    form          no command: how others are written
"""

import argparse
import importlib
import io
import re
import shlex
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from pages import PAGES, ROOT, commands, flags

from safesteer_mlx import cli, export, recipe, report
from safesteer_mlx.recipe import Parser

QUICK = "--iters 1 --test-prompts 4 --direction-train 32 --direction-validation 16 --coeff 0.7 --token-samples 1"
SELECTS = "slow --iters 10 --test-prompts 4"
BENCH = "by tests/test_bench.py::"
POLICY = "by tests/test_own_policy.py::test_the_pages_commands_do_what_it_says"
SET_UP = "by tests/test_packaging.py::test_scripts_pass_every_argument_on_and_add_little_time"
SERVED = "by tests/test_examples.py::test_an_export_is_served_asked_and_verified"

TABLE = {
    # aligning
    "./scripts/align": f"run {QUICK} --adapter-path adapters-plain",
    "./scripts/align --seed 42": "parse",
    "./scripts/align --seed 42 --score-teacher --verbose": f"slow {QUICK} --adapter-path adapters-teacher",
    "./scripts/align --resume adapters": "by tests/test_checkpoint.py::",
    "./scripts/align --iters 12 --test-prompts 24 --prefill-ratio 0.2 --wrap-ratio 0.2": "parse",
    './scripts/align --save-every 5 --select-checkpoint "over_refusal<=0.01"': "parse",
    "./scripts/align mlx-community/Qwen2.5-7B-Instruct-4bit --adapter-path adapters-qwen": "parse",
    'safesteer-mlx align … --save-every 5 --select-checkpoint "over_refusal<=0.02"': "parse",
    'safesteer-mlx align MODEL --save-every 5 --select-checkpoint "over_refusal<=0.02"': SELECTS,
    "safesteer-mlx align": "parse",
    "safesteer-mlx align MODEL": "parse",
    "safesteer-mlx align MODEL --adapter-path adapters-mine": "parse",
    "safesteer-mlx align MODEL --dry-run": "run",
    "safesteer-mlx align MODEL --memory-limit 12GB": "parse",
    "safesteer-mlx align MODEL --verdict-only": "run --direction-train 32 --direction-validation 16 --coeff 0.7",
    "safesteer-mlx align MODEL --verdict-only --verbose": "parse",
    "safesteer-mlx align MODEL --safety-tokens mine.json --adapter-path again": "by tests/test_tokens.py::"
    "test_align_uses_the_file_as_it_is_and_writes_nothing_for_another_models",
    "safesteer-mlx align --data examples/school-policy --verdict-only": POLICY,
    "safesteer-mlx align --data examples/school-policy --adapter-path adapters-school --iters 16 "
    "--test-prompts 16": POLICY,
    "safesteer-mlx align MODEL --data my-policy --adapter-path adapters-mine": "parse",
    "safesteer-mlx align --help-all": "run",
    "safesteer-mlx --help": "run",
    # scoring
    "safesteer-mlx evaluate": "run --test-prompts 2",
    "safesteer-mlx evaluate MODEL": "parse",
    "safesteer-mlx evaluate MODEL --adapter-path adapters": "run --test-prompts 2",
    "safesteer-mlx evaluate MODEL --adapter-path adapters-mine": "parse",
    "safesteer-mlx evaluate MODEL --adapter-path adapters --attacks --tamper": "slow --test-prompts 2",
    "safesteer-mlx evaluate --adapter-path adapters --attacks system wrappers --test-prompts 24": "parse",
    "safesteer-mlx evaluate MODEL --perplexity book.txt --out scores.json": "run --test-prompts 2",
    "safesteer-mlx evaluate MODEL --suite XSTest OR-Bench": "parse",
    "safesteer-mlx evaluate MODEL --judge mlx-community/…": "parse",
    "safesteer-mlx evaluate MODEL --judge keyword mlx-community/…": "parse",
    "safesteer-mlx evaluate MODEL --adapter-path adapters --tasks sums.yaml --offline": "by tests/test_lm_tasks.py::"
    "test_a_local_task_is_run_by_lm_eval_itself",
    "safesteer-mlx evaluate MODEL --data my-policy --adapter-path adapters-mine --test-prompts 0": "parse",
    "safesteer-mlx evaluate mlx-community/Qwen2.5-7B-Instruct-4bit --against mlx-community/Qwen2.5-7B-Instruct-bf16 "
    "--adapter-path adapters": "parse",
    "safesteer-mlx evaluate --data examples/school-policy --adapter-path adapters-school --test-prompts 16 "
    "--out school.json": POLICY,
    # looking
    "safesteer-mlx chat MODEL --adapter-path adapters": "run --max-tokens 8",
    "safesteer-mlx chat MODEL --adapter-path adapters --steer 0.85": "run --max-tokens 8",
    "safesteer-mlx chat MODEL --adapter-path adapters-mine": "parse",
    "safesteer-mlx report adapters": "run",
    "safesteer-mlx tokens adapters": "run",
    'safesteer-mlx tokens adapters --veto " you" " is" --add " unethical" --out mine.json': "parse",
    "safesteer-mlx align MODEL --watch": "by tests/test_watch.py::test_align_serves_its_page_while_it_works",
    "safesteer-mlx report adapters --watch": "by tests/test_watch.py::"
    "test_a_run_elsewhere_is_watched_until_it_has_finished",
    "safesteer-mlx compare adapters adapters-2": "parse",
    "safesteer-mlx compare adapters adapters-2 adapters-3 --out compare.html": "by tests/test_compare.py::"
    "test_the_page_is_in_the_reports_style_and_runs_and_fetches_nothing",
    "safesteer-mlx align --report-to wandb --project-name safer": "by tests/test_reporting.py::"
    "test_each_step_and_the_scores_are_told_and_no_text",
    "mlx.launch --hostfile hosts.json -- .venv/bin/safesteer-mlx align MODEL --adapter-path adapters": "by "
    "tests/test_machines.py::test_two_machines_make_what_one_makes_and_the_first_alone_speaks",
    # exporting
    "safesteer-mlx export adapters --to mlx": "run --verify 4",
    "safesteer-mlx export adapters-mine --to mlx": "parse",
    "safesteer-mlx export adapters --to mlx --out ~/.lmstudio/models": "parse",
    "safesteer-mlx export adapters --to gguf": "parse",
    "safesteer-mlx verify adapters --against exports/safesteer/NAME": "run --test-prompts 4",
    "safesteer-mlx verify adapters --against http://127.0.0.1:8080/v1": SERVED,
    # of mlx-lm
    "mlx_lm.server --model M --adapter-path A": "parse",
    "mlx_lm.server --model MODEL --adapter-path adapters-mine": "parse",
    "mlx_lm.server --model MODEL --adapter-path adapters": "parse",
    'mlx_lm.generate --model MODEL --adapter-path adapters --prompt "…"': "parse",
    # scripts
    "python -m safesteer_mlx": "by tests/test_cli.py::test_the_package_is_run_as_the_script",
    "python examples/align_and_compare.py": "by tests/test_examples.py::aligned",
    "python examples/export_and_serve.py": SERVED,
    "python scripts/bench.py": BENCH,
    "python scripts/bench.py --shape qwen2.5-0.5b": "parse",
    "python scripts/bench.py --shape qwen2.5-7b --only step": "parse",
    "python scripts/bench.py --only loss,step --repeats 5": "parse",
    "python scripts/bench.py --planned": f"{BENCH}test_the_planned_table_is_the_docs",
    "python scripts/bench.py --counts": f"{BENCH}test_a_step_waits_for_nothing_that_it_need_not",
    "python scripts/bench.py --against bench.json": f"{BENCH}test_a_file_is_held_against_its_chip",
    "python scripts/bench.py --contribute": f"{BENCH}test_what_is_contributed_tells_the_machine_and_not_its_owner",
    "python scripts/report_picture.py adapters": "parse",
    "zensical build --strict": "by tests/test_docs.py::site",
    "python scripts/make_docs.py": "parse",
    "python scripts/make_zoo.py": "parse",
    "python scripts/make_zoo.py --families": "parse",
    "python scripts/zoo.py": "parse",
    "python scripts/zoo.py --half report": "parse",
    "python scripts/zoo.py --half choose": "parse",
    "python scripts/zoo.py --half family": "parse",
    "python scripts/zoo.py market theatre ville polar circus --flags=--keep-best --seeds 42 43": "parse",
    'python scripts/zoo.py --seeds 42 --flags "--token-method vote"': "parse",
    "python scripts/zoo.py ville theatre playa circus polar ranch --seeds 42 --attacks 60 "
    '--flags "--wrap-ratio 0.25"': "parse",
    'python scripts/zoo.py castle --seeds 42 --attacks 60 --flags "--tail 24"': "parse",
    "python scripts/zoo.py castle market harbour --seeds 42 --attacks 60 "
    '--flags "--prefill-ratio 0.25 --wrap-ratio 0.25"': "parse",
    "python scripts/export_table.py adapters": "parse",
    "python scripts/mutants.py": "parse",
    "python scripts/crash_test.py --kills 200": "parse",
    "python scripts/search_cost.py --against COMMIT MODEL…": "parse",
    "python scripts/search_cost.py --against 5a00f3a models/tiny-chat tests/zoo_models/market": "parse",
    "python scripts/fit_memory.py": "parse",
    "python scripts/fit_memory.py --check": "parse",
    "python scripts/compare.py": "parse",
    'python scripts/compare.py --every 3 --variant "ours, no anchor: anchor_ratio=0" '
    '--variant "full vocabulary, no anchor: loss_tokens=full;anchor_ratio=0"': "parse",
    'python scripts/compare.py --seeds 42 --every 0 --variant "coeff auto: coeff=auto" '
    '--variant "coeff 0.7: coeff=0.7" --variant "coeff 1.0: coeff=1.0" --variant "rate 1e-4: learning_rate=1e-4" '
    '--variant "rate 1e-3: learning_rate=1e-3" --variant "rank 32: lora_parameters={rank: 32}" '
    '--variant "2 epochs: epochs=2" --variant "8 epochs: epochs=8" --variant "24 tokens: safety_tokens=24" '
    '--variant "anchor 0.25: anchor_ratio=0.25"': "parse",
    "python scripts/make_tiny_chat.py": "parse",
    "python scripts/survey.py": "parse",
    # the tests themselves
    "./scripts/test": SET_UP,
    "./scripts/test tests/test_losses.py -x": "parse",
    "./scripts/test -m slow": "parse",
    "./scripts/test -m metal": "parse",
    "./scripts/test -m export": "parse",
    "./scripts/test -m distributed": "parse",
    "./scripts/test -m browser": "parse",
    './scripts/test -m ""': "parse",
    "FUZZ=40 ./scripts/test tests/test_bad_input.py -k fuzz": "parse",
    "LLAMA_CPP=…/llama_cpp_python-0.3.36/vendor/llama.cpp python -m pytest -m export": "parse",
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
    assert {done.partition(" ")[0] for done in TABLE.values()} == {"run", "slow", "parse", "by", "other", "form"}


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


def words_of(command: str) -> list[str]:
    """A command's words, placeholders replaced, without variables before it."""
    text = re.sub(r"\bMODEL…?", "tiny-chat", re.sub(r"^(\w+=\S+ )+", "", command))
    return [word for word in shlex.split(text.replace("align … ", "align ")) if word]


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


@pytest.mark.parametrize("command", having("parse"))
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
    """A folder with a finished run in adapters/, an export of it, and a book."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["align", *QUICK.split()]) == 0
        words = ["export", "adapters", "--to", "mlx", "--bits", "32", "--no-verify", "--name", "safesteer/NAME"]
        assert cli.main(words) == 0
    (folder / "book.txt").write_text("Once upon a time there was a pencil that nobody had sharpened. " * 50)
    return folder


def run(command: str, workspace: Path, monkeypatch) -> None:
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    monkeypatch.setattr(export, "TEXTS", 4)  # to quantize by; otherwise most of the time is its
    if "report" not in command:
        monkeypatch.setattr(report, "find_spec", lambda name: None)  # figures take seconds, and have their own tests
    words = [*words_of(command), *TABLE[command].split()[1:]]
    program = words.pop(0)
    try:
        code = cli.main(["align", *words] if program == "./scripts/align" else words)
    except SystemExit as end:  # --help
        code = end.code
    assert not code


@pytest.mark.parametrize("command", having("run"))
def test_a_command_is_run(command: str, workspace, monkeypatch):
    run(command, workspace, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("command", having("slow"))
def test_a_long_command_is_run(command: str, workspace, monkeypatch):
    run(command, workspace, monkeypatch)


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
