"""What `evaluate` tells of a base and its aligned form, or of an original and what was quantized from it."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..method.prompts import FRAME_TOKENS, render, sets_to_score
from ..method.rollout import Sampling
from ..method.run import batch_size, not_too_long
from ..method.student import with_adapters
from ..method.token_file import read_token_file
from ..recipe import model_name
from ..system.load import Loaded, load
from ..system.screen import Screen, UserError
from ..system.store import BASE_ANSWERS
from .attacks import Attacker, attacks_json, judged_by, run_attacks, run_tampering, show_attacks
from .heldout import HeldOut, TestSet, perplexity, until_told
from .judging import check_judges, choose_judges, judge_all
from .scores import show
from .suites import run_tasks
from .tampering import Tampering


@dataclass(frozen=True)
class Scoring:
    """Models that read prompts as the base does, in the order of the columns; what they are asked, all of which has its
    kind in the test; and how: `args` is the command line."""

    args: Namespace
    test: TestSet
    tasks: list[str]
    families: Sequence[str]  # of attacks
    base: Loaded
    models: dict[str, nn.Module]
    screen: Screen

    @property
    def run(self) -> Path | None:
        """The record of the run that made the adapters, if they are a run's."""
        return self.args.adapter_path and self.args.adapter_path / "run"

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn."""
        return Sampling(self.base.eos_ids, self.args.max_tokens, batch_size=self.args.batch_size)

    def perplexities(self) -> dict[str, Any]:
        """Of the text that `--perplexity` names."""
        results, keys = {}, ("perplexity", "standard_error", "tokens")
        for name, model in self.models.items():
            value, error, tokens = perplexity(model, self.base.tokenizer, self.args.perplexity)
            self.screen.line(
                f"perplexity of {self.args.perplexity}, {name}: {value:.3f} ± {error:.3f} over {tokens} tokens"
            )
            results[name] = dict(zip(keys, (value, error, tokens), strict=True))
        return results

    def scores(self) -> dict[str, Any]:
        """Outcomes, capability and drift."""
        args, base = self.args, self.base
        judges = choose_judges(args.judge, args.judge_template)
        check_judges(judges, args.trust_remote_code)
        whole = any(judge.template is not None for judge in judges)
        kept = self.run and self.run / BASE_ANSWERS
        kept = kept if kept and kept.is_file() else None
        tokens = safety_tokens(self.run, base)
        held_out = HeldOut(base, self.test, tokens, args.seed, self.sampling, args.samples, whole, kept)
        scores = {}
        for name, own in held_out.score_each(self.models, self.screen):
            scores[name] = own
            if base.tokenizer.has_thinking and (cut := sum(not (a.finished or a.text) for a in own.answers)):
                self.screen.line(
                    f"{cut} answers of the {name} ran out of --max-tokens while thinking, and count as evasions"
                )
        judged = judge_all(judges, scores, self.test.kind_of, args.trust_remote_code, args.batch_size, self.screen)
        scores = judged.first()
        show(scores, self.screen, f"Judge: {judges[0].label}")
        judged.show(self.screen)
        result = {name: s.as_json() for name, s in scores.items()} | {"kinds": self.test.kind_of}
        return result | ({"judges": judged.as_json()} if args.judge != ["keyword"] else {})

    def attacked(self) -> dict[str, Any]:
        """The first harmful set under attack, and after tampering."""
        args, base, sampling = self.args, self.base, self.sampling
        items = next(self.test.kinds[name] for name, kind in self.test.kind_of.items() if kind == "harmful")
        judge = choose_judges(args.judge, args.judge_template)[0]
        attacker = Attacker(base, sampling if judge.template else until_told(sampling, base.tokenizer), args.seed)
        results = run_attacks(attacker, self.models, items, self.families, self.screen)
        if args.tamper:
            tampering = Tampering(base, sets_to_score(args.model, args.data), sampling, args.seed)
            for name, attacks in run_tampering(attacker, self.models, items, tampering, self.run, self.screen).items():
                results[name] += attacks
        results = judged_by(judge, results, args.trust_remote_code, args.batch_size, self.screen)
        show_attacks(results, self.screen)
        return attacks_json(results)

    def task_results(self) -> dict[str, Any]:
        """Of lm-eval's tasks."""
        args, limit = self.args, self.args.test_prompts or None
        how = {"seed": args.seed, "batch_size": args.batch_size, "limit": limit}
        how["confirm_run_unsafe_code"] = args.confirm_run_unsafe_code
        results = {name: run_tasks(m, self.base.tokenizer, self.tasks, **how) for name, m in self.models.items()}
        for name, tasks in results.items():
            for task, metrics in tasks.items():
                numbers = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items() if isinstance(value, float))
                self.screen.line(f"{task}, {name}: {numbers}")
        return results


def score(
    args: Namespace, test: TestSet, tasks: list[str], families: Sequence[str], base: Loaded, screen: Screen
) -> dict[str, Any]:
    """Score the base, and the aligned model if there are adapters; print the tables, return what --out holds."""
    args.batch_size = batch_size(base, args.batch_size, screen)
    leave_out_long(test, base, screen, args.max_tokens + FRAME_TOKENS)
    models = {} if args.against is None else {"original": _original(args, base)}
    models["base"] = base.model
    if args.adapter_path is not None:
        models["student"] = with_adapters(base.model, args.adapter_path)
    scoring = Scoring(args, test, tasks, families, base, models, screen)
    result: dict[str, Any] = {"settings": {k: v for k, v in vars(args).items() if k != "positional_model"}}
    if args.perplexity is not None:
        result["perplexity"] = scoring.perplexities()
    if test.kinds:
        result |= scoring.scores()
    if families or args.tamper:
        result["attacks"] = scoring.attacked()
    if tasks:
        result["tasks"] = scoring.task_results()
    return result


def leave_out_long(test: TestSet, base: Loaded, screen: Screen, beside: int = 0) -> None:
    """Take out prompts of more tokens than are read, and say how many; `beside` as `most_read`.

    Raises:
        UserError: as `not_too_long`.
    """
    for name, items in test.kinds.items():
        test.kinds[name] = not_too_long(base, name, items, screen, beside)


def _original(args: Namespace, base: Loaded) -> nn.Module:
    """The model that the base was quantized from; a UserError if it reads prompts otherwise, so that it is another."""
    original = load(model_name(args.against), args.trust_remote_code, args.thinking)
    same = original.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    if not same or render(original.tokenizer, "Why?") != render(base.tokenizer, "Why?"):
        raise UserError(
            f"--against {args.against} has another tokenizer or chat template than {base.name}; give its own"
        )
    return original.model


def safety_tokens(run: Path | None, base: Loaded) -> list[int]:
    """The run's own safety tokens, if align wrote these adapters: drift is measured without them too."""
    path = run and run / "tokens.json"
    return read_token_file(path, base.tokenizer, base.vocabulary) if path and path.exists() else []
