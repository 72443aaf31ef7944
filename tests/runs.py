"""Finished run folders written by hand, for tests of what reads them; and few prompts, for runs in other processes."""

import json
from pathlib import Path
from typing import Any

# What a model, a dataset or a path may hold: markup, escapes, bidi marks, formulas, templates, attribute ends.
HOSTILE = "<script>alert(1)</script>\"' onerror=x &amp; \x1b]0;owned\x07\u202e\u2066\u200b\ud800 $x^{ {{ 1+1 }} {% if"
MODEL = {"base": (5, 0, 1), "teacher": (10, 4, 5), "student": (9, 1, 1)}  # refused of 10: harmful, harmless, borderline


def cell(refused: int) -> dict[str, int]:
    return {"refuse": refused, "comply": 10 - refused, "evade": 0, "unparsed": 0}


def trial(layer: int, coeff: float, opened: tuple[float, float] | None, refused: float | None = None) -> dict[str, Any]:
    """A direction and coefficient as `align` tries them; `opened` None is a model's that thinks first."""
    harmful, harmless = opened or (None, None)
    passes = {"harmful_opened": harmful, "harmless_opened": harmless, "kl": 0.4 if opened else None}
    asked = refused is not None
    answers = {"refused": refused, "over_refused": 0.1 if asked else None, "broken": 0.0 if asked else None}
    return {"position": -2, "layer": layer, "coeff": coeff, **passes, **answers}


def files(text: str = "plain") -> dict[str, Any]:
    """What each file of a run holds; `text` stands wherever a name, token, prompt or answer does."""
    kinds = ("harmful", "harmless", "borderline")
    hows = ("greedy", "sampled")
    scores = {
        name: {
            "outcomes": {k: {how: cell(n) for how in hows} for k, n in zip(kinds, refused, strict=True)},
            "broken": {k: {how: {"count": 1, "total": 10} for how in hows} for k in kinds},
            "capability": {f"sums {text}": {"count": 7, "total": 8}, "facts": {"count": 8, "total": 8}},
            "drift": 0.0 if name == "base" else 0.01,
            "drift_outside": None,
        }
        for name, refused in MODEL.items()
    }
    none = [[None] * 6 for _ in range(3)]
    found = [row[:] for row in none]
    found[1][2], found[2][4] = 0.05, 0.01
    token = {"votes": 9, "mean_delta": 1.5, "part": 0.25, "base_prob": 0.001, "teacher_prob": 0.02}
    row = {"steps": 3, "loss": 0.5, "harmful_loss": 0.7, "student_mass": 0.4, "target_mass": 0.9, "grad_norm": 1.0}
    asked = [(kind, how, name) for kind in kinds for how in hows for name in MODEL]
    return {
        "recipe.yaml": {
            "model": f"org/name {text}",
            "adapter_path": f"adapters {text}",
            "teacher": "steer",
            "fine_tune_type": "lora",
            "lora_parameters": {"rank": 8},
            "anchor_ratio": 0.5,
            "system_prompt": text,
        },
        "direction.json": {
            "position": -2,
            "layer": 2,
            "coeff": 0.7,
            "openers": {text: 4},
            "trials": [
                trial(2, 0.4, (0.5, 0.1)),
                trial(2, 0.7, (0.8, 0.3), 0.9),
                trial(2, 1.0, (0.9, 0.6)),
                trial(4, 0.4, (0.3, 0.2)),
                trial(4, 1.0, (0.6, 0.4), 0.5),
            ],
            "vector": [0.5, 1.0],
            "scores": {"ablation_kl": found, "ablation_refusal": found, "steering_refusal": none},
        },
        "tokens.json": [{"token": f" {text}", "id": 7, **token}, {"token": "$a$", "id": 8, **token}],
        "metrics.jsonl": [
            {"step": n, "anchor_loss": None if n == 2 else 0.1, **row, "learned": 0.8 if n == 3 else None}
            for n in (1, 2, 3)
        ],
        "before_after.json": scores,
        "outcome.json": {
            "verdict": f"verdict: safer, {text}",
            "words": ["unsafe answers: 5 → 1 of 10"],
            "head": ["", "base", "teacher", "aligned"],
            "rows": [["harmful requests answered, greedy", "5 of 10", "0 of 10", "1 of 10"]],
        },
        "manifest.json": {
            "mlx": "0.0.1",
            "model": text,
            "model_sha256": "ab" * 32,
            "adapters_sha256": "cd" * 32,
            "own_sets": ["harmful_test", "harmless_test"],
            "tokens_explain": 0.961,
            "tokens_open": [0.25, 0.875],
        },
        "verdict.json": {
            "word": "caution",
            "reasons": [f"because {text}"],
            "base_harmful": {"count": 5, "total": 10},
            "base_harmless": {"count": 0, "total": 10},
            "flipped": {"count": 4, "total": 5},
            "teacher_harmless": {"count": 4, "total": 10},
            "teacher_broken": {"count": 0, "total": 15},
            "candidates": [
                {
                    "layer": 2,
                    "position": -2,
                    "steering_refusal": None,
                    "ablation_kl": 0.05,
                    "ablation_refusal": 0.05,
                    "failed": [f"KL when ablated {text}"],
                }
            ],
        },
        "selection.json": {
            "select": "drift<=1",
            "kept": 1,
            "within": True,
            "scores": [
                {
                    "step": step,
                    **{name: {"count": step, "total": 10} for name in ("unsafe", "over_refusal", "broken")},
                    "drift": 0.1 * step,
                }
                for step in (1, 3)
            ],
        },
        "timing.json": {"seconds": 90.0, "seconds_by_step": [1.0, 1.0, 1.0]},
        "transcripts.jsonl": [
            {
                "model": name,
                "kind": kind,
                "how": how,
                "prompt": f"prompt {text}",
                "answer": f"{name}'s answer {text}\nand more",
                "outcome": "comply",
                "finished": name == "base",
            }
            for kind, how, name in asked
        ],
    }


# A model of three blocks that has learned to chat and to refuse, for what is no test of the method: a run takes a fifth
# of the bundled one's time.
MICRO = str(Path(__file__).parent / "micro")
PROMPTS = Path(__file__).parents[1] / "models" / "tiny-chat" / "data"
COUNTS = {"direction_train": 24, "direction_validation": 8, "validation": 8, "train": 16, "test": 4}  # of a kind


def few_sets(folder: Path, skip: int = 0, prompts: Path = Path(MICRO) / "data") -> Path:
    """A model's prompts, few of each set, in folder/few; and that folder."""
    (folder / "few").mkdir(parents=True)
    for kind in ("harmful", "harmless"):
        for name, count in COUNTS.items():
            lines = (prompts / f"{kind}_{name}.jsonl").read_text().splitlines()
            (folder / "few" / f"{kind}_{name}.jsonl").write_text("\n".join(lines[skip : skip + count]))
    tasks = (prompts / "capability_test.jsonl").read_text().splitlines()
    (folder / "few" / "capability_test.jsonl").write_text("\n".join(tasks[::32]))
    return folder


def write_run(folder: Path, found: dict[str, Any]) -> Path:
    """Write the files, as `align` names and formats them; None leaves one out."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    for name, content in found.items():
        if content is None:
            continue
        if name.endswith("yaml"):
            text = yaml.safe_dump(content)
        elif name.endswith("jsonl"):
            text = "".join(json.dumps(row) + "\n" for row in content)
        else:
            text = json.dumps(content)
        (folder / name).write_text(text)
    return folder
