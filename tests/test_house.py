"""The house keeps its shape: imports point down, and blocks are touched in one file."""

import ast
from pathlib import Path

import pytest

from safesteer_mlx.recipe import PACKAGE

LEVELS = {
    **dict.fromkeys(("__init__", "progress", "judge", "intervals"), 0),
    **dict.fromkeys(("recipe", "scores", "hub", "checks", "backoff"), 1),
    **dict.fromkeys(("load", "prompts", "residual", "losses", "runfolder", "rollout", "memory"), 2),
    **dict.fromkeys(("direction", "student", "safety_tokens", "checkpoint"), 3),
    **dict.fromkeys(("suites", "adapters", "judge_model", "lm_tasks", "figures", "token_file"), 3),
    **dict.fromkeys(("teacher", "measure", "report", "chat"), 4),
    **dict.fromkeys(("train", "evaluate", "tokens"), 5),
    "stages": 6,
    **dict.fromkeys(("verdict", "selection"), 7),
    "align": 8,
    "cli": 9,
    "__main__": 10,
}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.stem)
def test_imports_point_down(path: Path):
    assert path.stem in LEVELS, f"give {path.stem} a level"
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [a.name for a in node.names]
            for name in names:
                if name in LEVELS:
                    assert LEVELS[name] < LEVELS[path.stem], f"{path.stem} imports {name}"
        if isinstance(node, ast.Attribute) and path.stem != "residual":
            assert node.attr not in ("layers", "__class__"), f"{path.stem}:{node.lineno} touches blocks"
