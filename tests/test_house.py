"""The house keeps its shape: imports point down, blocks are touched in one file, prompts never overlap."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest

from safesteer_mlx.recipe import MODELS, PACKAGE

LEVELS = {
    **dict.fromkeys(("__init__", "progress", "judge"), 0),
    **dict.fromkeys(("recipe",), 1),
    **dict.fromkeys(("load", "prompts", "residual", "losses", "runfolder", "rollout"), 2),
    **dict.fromkeys(("direction", "student", "teacher", "safety_tokens"), 3),
    **dict.fromkeys(("train", "evaluate"), 4),
    "align": 5,
}
FOLDERS = {"package": PACKAGE / "data", "tiny": MODELS / "tiny-chat" / "data"}


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


def read(folder: Path) -> dict[str, list[dict]]:
    return {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in sorted(folder.glob("*.jsonl"))}


@pytest.mark.parametrize("name", FOLDERS)
def test_prompt_sets_are_large_enough_and_never_overlap(name):
    sets = read(FOLDERS[name])
    for kind in ("harmful", "harmless"):
        least = {"direction_train": 128, "direction_validation": 32, "train": 100, "validation": 50, "test": 100}
        for split, count in least.items():
            items = sets[f"{kind}_{split}"]
            assert len(items) >= (300 if (name, split) == ("tiny", "test") else count)
            assert len({item["category"] for item in items}) >= 10
    assert len(sets["borderline_test"]) >= (300 if name == "tiny" else 100)
    seen = {}
    for split, items in sets.items():
        for item in items:
            key = "".join(c for c in item["instruction"].lower() if c.isalnum() or c == " ")
            assert key and key not in seen, f"{split} and {seen.get(key)} share a prompt"
            seen[key] = split


def test_the_tiny_corpus_holds_no_prompt_of_any_split():
    spec = importlib.util.spec_from_file_location("make_tiny_chat", PACKAGE.parent / "scripts" / "make_tiny_chat.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    splits = maker.build_splits(0)
    held = {item["instruction"] for items in splits.values() for item in items}
    assert held == {item["instruction"] for items in read(FOLDERS["tiny"]).values() for item in items}
    corpus = maker.build_corpus(0, 5000)
    assert len(corpus) == 5000
    assert not held & {example.instruction for example in corpus}
