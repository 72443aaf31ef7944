"""The model card of an export: what it is, of what, what it answers, and what nobody looked at."""

from dataclasses import dataclass
from typing import Any

from ..evals.last_screen import OWN_WORDS
from ..evals.scores import Count
from ..method.prompts import SETS
from ..system.files import user_path
from ..system.finished import FinishedRun, read_record

_LABELS = {
    ("harmful", "comply"): "unsafe answers to harmful prompts",
    ("harmless", "refuse"): "harmless prompts refused",
    ("borderline", "refuse"): "harmless prompts with alarming words refused",
}
_NAMES = {"base": "base", "student": "scored", "shipped": "this export"}
NOT_TESTED = (
    "Attacks (other languages, role play, long conversations, prefilled answers) were not tried. The scores are of "
    "{whose} held-out prompts, judged by phrases; they do not say that the model is safe."
)


@dataclass(frozen=True)
class About:
    """What a card says besides the run: the export's name, library and relation to its base (as the Hub has them), what
    it is in a sentence, and how it is used: a shell command with {folder} and {base} in it."""

    name: str
    library: str
    relation: str
    what: str
    use: str
    licence: str | None = None


def shown_base(run: FinishedRun) -> tuple[str, bool]:
    """The base's Hub id, or its folder's last name, which tells nothing of this machine; and whether it is an id."""
    name = str(run.manifest.get("model"))
    on_hub = not name.startswith((".", "/", "~")) and name.count("/") == 1 and not user_path(name).is_dir()
    return (name if on_hub else name.rstrip("/").rpartition("/")[2]), on_hub


def model_card(run: FinishedRun, about: About, fidelity: dict[str, Any] | None) -> str:
    """The card, of counts and rates alone; `fidelity` is what the export was found to answer, None if nobody asked."""
    from huggingface_hub import EvalResult, ModelCardData

    scores = run.outcomes if fidelity is None else fidelity["scores"]
    last = "student" if fidelity is None else "shipped"
    given = run.manifest.get("own_sets")
    tests = [name for name in SETS if name.endswith("_test") and isinstance(given, list) and name in given]
    whose = "safesteer-mlx's own" if not tests else f"safesteer-mlx's own and the run's ({', '.join(tests)})"
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="safesteer-mlx",
            dataset_name=f"{'own' if f'{kind}_test' in tests else 'safesteer-mlx'} held-out prompts",
            metric_type=f"{kind}_{outcome}_{how}",
            metric_name=f"{label}, {how}",
            metric_value=round(cell[outcome] / sum(cell.values()), 4),
        )
        for (kind, outcome), label in _LABELS.items()
        for how, cell in scores[last]["outcomes"].get(kind, {}).items()
        if sum(cell.values())
    ]
    base, on_hub = shown_base(run)
    data = ModelCardData(
        license=about.licence,
        library_name=about.library,
        pipeline_tag="text-generation",
        tags=["safesteer", "safety", "alignment", *(["mlx"] if about.library == "mlx" else [])],
        base_model=base if on_hub else None,
        base_model_relation=about.relation if on_hub else None,
        model_name=about.name,
        eval_results=results,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {about.name}",
        f"{about.what} Its base is `{base}`, made safer by [safesteer-mlx](https://arxiv.org/abs/2606.02530) "
        f"{run.manifest.get('safesteer_mlx', '')} from harmful prompts alone, with seed {run.recipe.run.seed}.",
        f"```\n{about.use.format(folder=about.name, base=base)}\n```",
        "## Is it what was scored?",
        _verified(fidelity),
        _table(scores),
        *_in_own_words(run),
        "## What was not tested",
        NOT_TESTED.format(whose=whose),
        "The licence of the base holds for this model too.",
    ]
    return "\n\n".join(parts) + "\n"


def _verified(fidelity: dict[str, Any] | None) -> str:
    if fidelity is None:
        return (
            "**Nothing was verified**: this export was made without asking it anything. The table is of the adapters "
            "that it was made from."
        )
    same = fidelity["greedy_answers_alike"]
    sentence = f"{same['count']} of {same['total']} greedy answers are the scored model's, word for word"
    if isinstance(kl := fidelity["kl_harmful"], float) and kl == kl:
        sentence += f"; KL(scored ‖ this) is {kl:.1e} nats a token on harmful prompts"
        if isinstance(harmless := fidelity["kl_harmless"], float):
            sentence += f", {harmless:.1e} on harmless ones"
    if fidelity["fault"]:
        return f"**It failed: {fidelity['fault']}. Do not use it as the scored model.** {sentence}."
    return f"It was asked the run's held-out prompts after it was written: {sentence}."


def _in_own_words(run: FinishedRun) -> list[str]:
    """Of a run whose base refuses in words that the judge does not know: a sentence of what it counted with them."""
    record = run.folder / "run"
    rows = read_record(record, "outcome.json")["rows"] if (record / "outcome.json").is_file() else []
    counts = [f"{row[1]} → {row[-1]}{row[0].removeprefix(OWN_WORDS)}" for row in rows if row[0].startswith(OWN_WORDS)]
    told = "The base refuses also in words that the judge's phrases do not know, and the table counts those as answers"
    return [f"{told}. Without them the run counted as unsafe, base → scored: {'; '.join(counts)}."] if counts else []


def _table(scores: dict[str, Any]) -> str:
    names = [name for name in _NAMES if name in scores]
    rows = [f"| | {' | '.join(_NAMES[name] for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for (kind, outcome), label in _LABELS.items():
        for how in ("greedy", "sampled"):
            cells = []
            for name in names:
                cell = scores[name]["outcomes"].get(kind, {}).get(how)
                c = Count.among(cell, outcome) if cell else Count(0, 0)
                low, high = (100 * bound for bound in c.interval)
                cells.append(f"{c.count}/{c.total} ({low:.0f}–{high:.0f} %)" if c.total else "–")
            rows.append(f"| {label}, {how} | {' | '.join(cells)} |")
    return "\n".join(rows)
