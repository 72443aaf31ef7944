"""The house keeps its shape: imports point down, and blocks are touched in one file."""

import ast

import pytest

from safesteer_mlx.recipe import PACKAGE

# From the bottom up: a module imports only what stands in a row before its own.
ORDER = [
    "system.screen",
    "system.files system.machines system.serve",
    "recipe system.hub system.model_files system.chat_template",
    "method.judge",
    "evals.scores evals.agreement evals.judge_replies",
    "evals.last_screen",
    "system.shape",
    "system.load system.memory system.store method.residual method.losses",
    "method.prompts method.rollout system.finished formats.gptq formats.mlx_folder formats.gguf",
    "formats.card formats.fuse formats.hf method.token_file method.framing",
    "evals.suites evals.judge_model evals.figures",
    "method.run",
    "method.direction method.student formats.peft_adapter",
    "method.teacher",
    "method.safety_tokens",
    "method.train",
    "method.pace",
    "evals.heldout evals.verdict",
    "evals.tampering evals.judging evals.reporting",
    "evals.attacks evals.fidelity evals.lm_tasks evals.selection report",
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


# Where a file may be read without the limits of system/files.py, which is of the package or the program's own.
OWN_FILES = {"system.files", "system.model_files", "system.hub", "method.judge", "align", "export", "formats.gguf"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_are_read_and_homes_found_in_one_place(name: str):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr != "expanduser" or name == "system.files", f"{name}:{node.lineno}: use user_path"
            unbounded = node.attr in ("read_text", "read_bytes") and name not in OWN_FILES
            assert not unbounded, f"{name}:{node.lineno}: read through system/files.py"
