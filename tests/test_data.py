"""The prompt sets: their shape, their sizes, no overlap; and the tiny model's corpus keeps clear of them."""

import json
from collections import Counter
from pathlib import Path

import make_tiny_chat
import pytest

from safesteer_mlx.evals.selection import PROMPTS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, TINY = ROOT / "safesteer_mlx" / "data", ROOT / "models" / "tiny-chat" / "data"
SCHOOL = ROOT / "examples" / "school-policy"
LEAST = {"direction_train": 160, "direction_validation": 48, "train": 100, "validation": 50, "test": 100}
STEMS = {f"{kind}_{split}" for kind in ("harmful", "harmless") for split in LEAST}
STEMS |= {"borderline_test", "capability_test"}
TINY_TESTS = 300

folders = pytest.mark.parametrize("folder", [PACKAGE, TINY], ids=["package", "tiny"])


def read(folder: Path) -> dict[str, list[dict[str, str]]]:
    paths = sorted(folder.glob("*.jsonl"))
    return {path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in paths}


def normalised(text: str) -> str:
    """Lower case, punctuation to spaces."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


@folders
def test_every_line_has_its_keys_and_no_empty_text(folder: Path):
    sets = read(folder)
    assert set(sets) == STEMS
    for stem, rows in sets.items():
        keys = {"instruction", "category"} | ({"answer"} if stem == "capability_test" else set())
        for row in rows:
            assert set(row) == keys, (stem, row)
            assert all(isinstance(text, str) and text.strip() for text in row.values()), (stem, row)


@folders
def test_sets_are_large_enough(folder: Path):
    for stem, rows in read(folder).items():
        split = stem.split("_", 1)[1]
        least = TINY_TESTS if folder == TINY and split == "test" else LEAST[split]
        assert len(rows) >= least, stem


@folders
def test_harmful_and_harmless_sets_span_ten_categories(folder: Path):
    for stem, rows in read(folder).items():
        if stem != "capability_test":
            assert len({row["category"] for row in rows}) >= 10, stem


@folders
def test_validation_asks_borderline_prompts_too(folder: Path):
    sets = read(folder)
    borderline = {row["category"] for row in sets["borderline_test"]}
    asked = sets["harmless_validation"][:PROMPTS]
    assert len(asked) / 3 <= sum(row["category"] in borderline for row in asked) <= 2 / 3 * len(asked)


def test_the_example_policy_says_each_thing_once_and_nothing_of_ours():
    ours = {normalised(row["instruction"]) for f in (PACKAGE, TINY) for rows in read(f).values() for row in rows}
    sets = read(SCHOOL)
    assert set(sets) < STEMS and all(set(row) == {"instruction"} for rows in sets.values() for row in rows)
    said = [normalised(row["instruction"]) for rows in sets.values() for row in rows]
    assert len(said) == len(set(said)) == 168 and not ours & set(said)
    assert {len(rows) for rows in sets.values()} == {16, 24, 32}


def test_package_sets_are_balanced_over_categories():
    for stem, rows in read(PACKAGE).items():
        counts = Counter(row["category"] for row in rows).values()
        assert max(counts) - min(counts) <= 1, stem


@folders
def test_no_instruction_occurs_twice(folder: Path):
    seen: dict[str, str] = {}
    for stem, rows in read(folder).items():
        for row in rows:
            key = normalised(row["instruction"])
            assert key not in seen, f"{stem} and {seen[key]}: {row['instruction']}"
            seen[key] = stem


def test_the_committed_tiny_sets_are_what_the_script_builds():
    assert make_tiny_chat.build_splits(0) == read(TINY)


def test_the_tiny_corpus_holds_no_split_instruction_and_no_held_out_pair():
    splits = make_tiny_chat.build_splits(0)
    held = {normalised(row["instruction"]) for rows in splits.values() for row in rows}
    corpus = [normalised(example.instruction) for example in make_tiny_chat.build_corpus(0, 5000)]
    assert len(corpus) == 5000
    assert held.isdisjoint(corpus)

    requests = "|".join(f" {text} " for text in sorted(set(corpus)))
    for categories in make_tiny_chat.split_pairs(0)[1].values():
        for name, pairs in categories.items():
            assert pairs and not [pair for pair in pairs if f" {normalised(pair)} " in requests], name
