"""The house keeps its shape: imports point down, and blocks are touched in one file."""

import ast
from pathlib import Path

import mlx_lm.models
import pytest
from mlx_lm.utils import MODEL_REMAPPING

from safesteer_mlx.recipe import PACKAGE

# From the bottom up: a module imports only what stands in a row before its own.
ORDER = [
    "system.screen",
    "system.files system.machines system.serve",
    "recipe system.hub system.model_files system.chat_template",
    "method.judge",
    "evals.scores evals.judge_replies",
    "evals.last_screen",
    "system.shape system.graph",
    "system.load system.memory system.store method.residual method.losses",
    "method.prompts method.rollout system.finished formats.gptq formats.gguf",
    "formats.card formats.fuse method.token_file method.framing",
    "evals.suites evals.judge_model evals.figures",
    "method.run",
    "method.own_answers method.student formats.folders",
    "method.direction",
    "method.known_prompts method.passes",
    "method.memory_plan",
    "method.teacher",
    "method.safety_tokens",
    "method.learning method.training_prompts",
    "method.train",
    "method.pace",
    "evals.heldout evals.verdict",
    "evals.tampering evals.judging evals.reporting",
    "evals.attacks evals.fidelity evals.selection report",
    "evals.scorecard formats.readers formats.writers",
    "align evaluate chat tokens compare verify export",
    "api cli",
    "__main__",
    "direction losses residual safety_tokens",
]
LEVELS = {name: level for level, row in enumerate(ORDER) for name in row.split()}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
}


def imported(name: str, tree: ast.AST) -> set[str]:
    """The package's modules that a module imports, wherever in it."""
    folder, found = name.split(".")[:-1], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folder[: len(folder) - node.level + 1]
            at = ".".join([*above, *([node.module] if node.module else [])])
            found |= {at} if at in MODULES else {f"{at}.{a.name}".strip(".") for a in node.names}
    return found & set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down_and_blocks_are_touched_in_one_file(name: str):
    assert name in LEVELS, f"give {name} a level"
    tree = ast.parse(MODULES[name].read_text())
    for other in imported(name, tree):
        assert LEVELS[other] < LEVELS[name], f"{name} imports {other}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and name != "method.residual":
            assert node.attr not in ("layers", "__class__"), f"{name}:{node.lineno} touches blocks"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_function_takes_more_than_seven_things(name: str):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.FunctionDef):
            given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            taken = [a for a in given if a not in ("self", "cls")]
            assert len(taken) <= 7, f"{name}:{node.lineno} {node.name} takes {len(taken)}"


PARTICIPLES = {"found", "said", "done", "asked", "drawn"}  # they tell what was done, not what a variable holds


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_local_names_what_it_holds(name: str):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            assert node.id not in PARTICIPLES, f"{name}:{node.lineno}: name what {node.id} holds"


# Where a file may be read without the limits of system/files.py, which is of the package or the program's own.
OWN_FILES = {"system.files", "system.model_files", "system.hub", "method.judge", "align", "export", "formats.gguf"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_are_read_and_homes_found_in_one_place(name: str):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr != "expanduser" or name == "system.files", f"{name}:{node.lineno}: use user_path"
            unbounded = node.attr in ("read_text", "read_bytes") and name not in OWN_FILES
            assert not unbounded, f"{name}:{node.lineno}: read through system/files.py"


FAMILIES = {*MODEL_REMAPPING} | {
    path.stem for path in Path(mlx_lm.models.__path__[0]).glob("*.py") if "class ModelArgs" in path.read_text("utf-8")
}
# The tables that may name a family of mlx-lm; all else is told by a model's files, or seen in a forward pass.
NAMED_IN = {
    "system.shape": {"_WITH_POSITION_TABLE"},  # what nothing but the name tells
    "formats.folders": {"_SAME_NAMES", "_EXPERTS"},  # transformers' names of weights, of the families that were tried
    "formats.gguf": {"_KNOWN_SPLITS"},  # llama.cpp's names for ways to split a text, some of them families'
}


def families_named(name: str, text: str) -> list[str]:
    """Where a module names a family outside its tables."""
    tree = ast.parse(text)
    allowed: set[ast.AST] = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if {ast.unparse(target) for target in targets if target} & NAMED_IN.get(name, set()):
            allowed |= set(ast.walk(node))
    return [
        f"{name}:{node.lineno} names {node.value}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in FAMILIES and node not in allowed
    ]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_families_are_named_in_one_table(name: str):
    assert not families_named(name, MODULES[name].read_text())


@pytest.mark.parametrize(
    ("name", "text", "n"),
    [
        ("align", 'if kind == "gemma2": pass', 1),
        ("align", 'if kind in ("llama", "qwen3_next"): pass', 2),
        ("method.residual", 'ODD = {"dbrx": 1}', 1),
        ("method.residual", '_FAMILIES = {"dbrx": 1}', 1),
        ("system.shape", '_WITH_POSITION_TABLE = {"dbrx"}', 0),
        ("system.shape", '_OTHERS = {"dbrx": 1}', 1),
        ("system.shape", 'def f(kind): return kind == "jamba"', 1),
        ("formats.folders", '_SAME_NAMES = ("gemma",)', 0),
        ("formats.gguf", '_SAME_NAMES = ("gemma",)', 1),
        ("system.load", 'kind = config.get("model_type", "mistral")', 1),  # a name that mlx-lm maps to another
        ("system.load", 'kind = config.get("model_type", "model")  # gemma2', 0),
    ],
)
def test_a_family_named_elsewhere_is_found(name: str, text: str, n: int):
    assert len(families_named(name, text)) == n
