"""Break what matters, one line at a time, and see that a named test notices.

    python scripts/mutants.py                all, some ten minutes on two cores
    python scripts/mutants.py divergence     those whose name holds this word

Each mutant is made in a copy of the repository. First every named test is run unbroken: a test that fails anyway would
kill anything. Ends with a table, and exit code 1 if one lives. docs/security.md says what came out.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHOD = "safesteer_mlx/method/"
WITHIN = 300  # seconds for one test


@dataclass(frozen=True)
class Mutant:
    """`old` in a file becomes `new`; `test` is to fail then."""

    name: str
    file: str
    old: str
    new: str
    test: str


def _of(file: str, test_file: str, rows: list[tuple[str, str, str, str]]) -> list[Mutant]:
    return [Mutant(name, file, old, new, f"tests/{test_file}.py::{test}") for name, old, new, test in rows]


PLAIN_STEP = "test_a_step_is_the_step_of_the_plain_loss"
RESUMED = "test_a_run_that_goes_on_ends_in_the_same_bytes"

MUTANTS = [
    *_of(
        "safesteer_mlx/system/machines.py",
        "test_machines",
        [
            (
                "gradients of several machines averaged, not added",
                "lambda mean: mean * self.size",
                "lambda mean: mean",
                "test_two_machines_make_what_one_makes_and_the_first_alone_speaks",
            ),
            (
                "every machine does all of the work, and twice counts",
                "if i // TOGETHER % self.size == self.rank",
                "if i // TOGETHER % self.size <= self.rank",
                "test_parts_are_all_there_is_and_none_twice",
            ),
        ],
    ),
    *_of(
        "safesteer_mlx/system/screen.py",
        "test_interrupted_and_odd",
        [
            (
                "a signal raised within an import",
                "if _importing(frame):",
                "if False:",
                "test_a_signal_within_an_import_comes_when_it_is_done",
            ),
        ],
    ),
    *_of(
        METHOD + "losses.py",
        "test_losses",
        [
            (
                "sign of the divergence",
                "total = (mx.exp(ls) * (ls - lt)).sum(-1)",
                "total = (mx.exp(ls) * (lt - ls)).sum(-1)",
                "test_by_hand",
            ),
            (
                "mass outside dropped from the divergence",
                "total = total + mx.exp(s.rest) * (s.rest - t.rest)",
                "total = total + 0 * s.rest",
                "test_by_hand",
            ),
            (
                "forward divergence weighted by the student",
                "return (mx.exp(lt) * (lt - ls)).sum(-1)",
                "return (mx.exp(ls) * (lt - ls)).sum(-1)",
                "test_by_hand",
            ),
            (
                "mixture's halves exchanged",
                "return (mix * mx.exp(lt) * (lt - lm) + (1 - mix) * mx.exp(ls) * (ls - lm)).sum(-1)",
                "return ((1 - mix) * mx.exp(lt) * (lt - lm) + mix * mx.exp(ls) * (ls - lm)).sum(-1)",
                "test_every_kind_restated_in_numpy",
            ),
            ("mask off by one at its beginning", "(t >= skip)", "(t > skip)", "test_skip_and_keep"),
            ("mask off by one at its end", "(t < (keep or length))", "(t <= (keep or length))", "test_skip_and_keep"),
            (
                "mean over padding too",
                "/ mx.maximum(mask.sum(-1), 1.0)",
                "/ mask.shape[-1]",
                "test_mean_is_over_positions_then_over_sequences_and_padding_is_nothing",
            ),
            (
                "loss in half precision",
                "zs, zt = student_logits.astype(mx.float32), mx.stop_gradient(teacher_logits.astype(mx.float32))",
                "zs, zt = student_logits, mx.stop_gradient(teacher_logits)",
                "test_half_precision_logits_are_computed_in_float32",
            ),
            (
                "guidance pushes what steering lowers",
                "lift = (guidance - 1) * mx.maximum(teacher - base, 0.0)",
                "lift = (guidance - 1) * (teacher - base)",
                "test_how_far_guidance_goes_by_hand",
            ),
            (
                "within a thought guidance goes nowhere that the teacher does not already",
                "if late else (teacher > 0)",
                "if False else (teacher > 0)",
                "test_a_thought_may_turn_to_a_refusal_wherever_the_teacher_writes_a_safety_token_with_1_in_20",
            ),
            (
                "chunks weighted by the first chunk's weights",
                "chunks.append(one_chunk(h, target, w[part], added[part]))",
                "chunks.append(one_chunk(h, target, w[: len(h)], added[part]))",
                "test_from_hidden_states_it_is_the_plain_loss_and_its_gradient",
            ),
        ],
    ),
    *_of(
        METHOD + "residual.py",
        "test_residual",
        [
            (
                "steering at the output instead of the input",
                "return stream.run(block, args, kwargs, x + there.astype(x.dtype))",
                "return stream.change(stream.run(block, args, kwargs, x), lambda y: y + there.astype(y.dtype))",
                "test_steering_is_the_forward_pass_with_the_vector_added",
            ),
            (
                "steering at one position",
                "x + there.astype(x.dtype))",
                "mx.concatenate([x[:, :-1], x[:, -1:] + there.astype(x.dtype)], axis=1))",
                "test_steering_adds_the_vector_at_one_block_and_every_position",
            ),
            (
                "answers are steered where prompts alone should be",
                "there = shift * where[-1][..., None] if where else shift",
                "there = shift",
                "test_the_states_of_answers_are_those_of_steered_prompts_alone",
            ),
            (
                "ablation adds the direction",
                "return (wide - (wide * r).sum(-1, keepdims=True) * r).astype(x.dtype)",
                "return (wide + (wide * r).sum(-1, keepdims=True) * r).astype(x.dtype)",
                "test_ablation_leaves_nothing_along_the_direction",
            ),
            (
                "ablation of blocks' inputs alone",
                '_override(child, "Ablated", on_output)',
                "pass",
                "test_ablation_is_the_forward_pass_with_every_part_projected",
            ),
            (
                "direction not made a unit",
                "return vector / (mx.linalg.norm(vector, axis=-1, keepdims=True) + EPS)",
                "return vector",
                "test_the_unit_vector",
            ),
        ],
    ),
    *_of(
        METHOD + "own_answers.py",
        "test_own_answers",
        [
            (
                "what a thought takes up from the prompt tells a refusal",
                "words = [{*answer[:length]} - {*prompt}",
                "words = [{*answer[:length]}",
                "test_what_a_thought_takes_up_from_the_prompt_tells_nothing",
            ),
            (
                "a model that could think and does not counts as one that does",
                "return thoughts if 2 * len(thoughts) > len(answers) else []",
                "return thoughts",
                "test_a_model_that_could_think_and_mostly_does_not_is_none_that_thinks",
            ),
        ],
    ),
    *_of(
        METHOD + "direction.py",
        "test_direction",
        [
            (
                "direction from harmless minus harmful",
                "return mean(harmful) - mean(harmless)",
                "return mean(harmless) - mean(harmful)",
                "test_mean_differences_by_hand",
            ),
            (
                "activations one position too late",
                "len(row) - n_pos + p for p",
                "len(row) - n_pos + p - 1 for p",
                "test_mean_differences_by_hand",
            ),
            (
                "a repeated opener counts twice",
                "inside_and_rest(logits, mx.array(sorted(set(refusal_ids))))",
                "inside_and_rest(logits, mx.array(sorted(refusal_ids)))",
                "test_refusal_ids_are_a_set",
            ),
        ],
    ),
    *_of(
        METHOD + "safety_tokens.py",
        "test_run",
        [
            (
                "tokens that open other answers made rarer",
                "if refusals[token] >= others[token]]",
                "if refusals[token] >= 0]",
                "test_tokens_that_open_other_answers_to_harmless_prompts_are_not_made_rarer",
            ),
        ],
    ),
    *_of(
        METHOD + "safety_tokens.py",
        "test_safety_tokens",
        [
            (
                "tokens by the base's probability",
                "sums = (mx.exp(log_base), p, change, p * change,",
                "sums = (mx.exp(log_base), p, change, mx.exp(log_base) * change,",
                "test_parts_by_hand_add_up_to_the_divergence",
            ),
            (
                "noise below p_min gets votes",
                "eligible = teacher_prob >= how.min_steered_prob",
                "eligible = teacher_prob >= 0",
                "test_tokens_below_p_min_get_no_votes_and_pass_theirs_on",
            ),
            (
                "positions behind the end of the turn are scored",
                "~np.maximum.accumulate(row)",
                "~(row & False)",
                "test_positions_from_the_bases_end_of_turn_onward_are_dropped",
            ),
        ],
    ),
    *_of(
        METHOD + "teacher.py",
        "test_teacher",
        [
            (
                "moving average the wrong way round",
                "(1 - rate) * own[name] + rate * w",
                "rate * own[name] + (1 - rate) * w",
                "test_the_moving_average_by_hand",
            )
        ],
    ),
    *_of(
        METHOD + "learning.py",
        "test_run",
        [
            (
                "all is kept whatever it refuses",
                "if learning.rise(whole) <= A_POINT:",
                "if True:",
                "test_as_much_is_kept_as_is_worth_most",
            ),
            (
                "what was learned is undone",
                ">= LEAST * learning.gain(whole)",
                ">= 0 * learning.gain(whole)",
                "test_as_much_is_kept_as_is_worth_most",
            ),
            (
                "what is kept pays for nothing",
                "- COST * self.rise(student))",
                "- self.rise(student) / COST)",
                "test_as_much_is_kept_as_is_worth_most",
            ),
        ],
    ),
    Mutant(
        "a weaker student is as strong",
        METHOD + "student.py",
        "tree_unflatten([(name, weight * strength)",
        "tree_unflatten([(name, weight)",
        "tests/test_run.py::test_half_a_change_is_half_of_what_a_layer_adds",
    ),
    *_of(
        METHOD + "learning.py",
        "test_train",
        [
            ("rate begins at 0", "(step + 1) / max(1, self.warm)", "step / max(1, self.warm)", "test_steps_and_the"),
        ],
    ),
    *_of(
        METHOD + "training_prompts.py",
        "test_train",
        [
            (
                "framed prompts judged in their frame",
                "target_ids=self.target_ids if self.harmful else ids",
                "target_ids=ids",
                "test_a_prompt_put_otherwise_has_the_target_that_it_should",
            ),
        ],
    ),
    *_of(
        METHOD + "train.py",
        "test_train",
        [
            (
                "float16 gradients not scaled",
                "mx.array(t.weights) * scale,",
                "mx.array(t.weights),",
                "test_in_float16_a_small_gradient_is_the_one_in_float32",
            ),
            (
                "an anchor that refuses as the base",
                "if not pulled and shifted is not None:",
                "if False:",
                PLAIN_STEP,
            ),
            (
                "anchor dropped",
                "anchors = settings.batch_size - per_batch if loss.anchor_ratio and harmless else 0",
                "anchors = 0",
                PLAIN_STEP,
            ),
            (
                "wrong teacher for anchor rows",
                "teacher = Teacher(base, shared_blocks=first_trained) if harmless_ones else training.teacher",
                "teacher = training.teacher",
                PLAIN_STEP,
            ),
            (
                "positions not divided by the number of answers",
                "np.maximum(weights.sum(1, keepdims=True), 1.0) / rollouts)[there]",
                "np.maximum(weights.sum(1, keepdims=True), 1.0))[there]",
                PLAIN_STEP,
            ),
            ("gradient not clipped", "grads, settings.max_grad_norm)", "grads, 1e9)", "test_the_gradient_is_clipped"),
        ],
    ),
    Mutant(
        "temperature left out of the loss",
        METHOD + "losses.py",
        "return z if temp == 1.0 else z / temp",
        "return z",
        f"tests/test_train.py::{PLAIN_STEP}",
    ),
    Mutant(
        "targets not computed as gradients are",
        METHOD + "residual.py",
        "mx.grad(traced)(mx.array(0.0))",
        "traced(mx.array(0.0))",
        "tests/test_train.py::test_targets_are_computed_as_the_student_is",
    ),
    *_of(
        METHOD + "known_prompts.py",
        "test_known_prompts",
        [
            (
                "a kept prompt read from elsewhere in its batch",
                "[one.extract(i) for one in cache]",
                "[one.extract(0) for one in cache]",
                "test_answers_to_prompts_that_were_read_before_are_read_as_ever",
            ),
            (
                "known prompts of the wrong place in the stream",
                "passed[0][i, : 1 + len(answer)]",
                "passed[0][i, 1 : 1 + len(answer)]",
                "test_answers_to_prompts_that_were_read_before_are_read_as_ever",
            ),
            (
                "a prompt read beside what is asked for",
                "self._read(self.read_with[row])",
                "self._read([row])",
                "test_prompts_are_read_beside_the_same_ones_whatever_is_asked_for_first",
            ),
            (
                "prompts beyond a sliding window kept",
                "if 1 < len(prompt) <= longest",
                "if 1 < len(prompt)",
                "test_a_prompt_that_does_not_fit_in_a_sliding_window_is_not_kept",
            ),
            (
                "kept prompts believed unseen",
                "if groups and _reads_rightly(known, [groups[0][0], groups[0][-1]]) else None",
                "if groups else None",
                "test_nothing_is_kept_where_a_prompt_is_more_than_keys_and_values",
            ),
        ],
    ),
    Mutant(
        "stale direction of a moving teacher",
        METHOD + "train.py",
        "self._vector = mx.array(new[0, self._direction.layer].astype(np.float32))",
        "pass",
        "tests/test_interrupted_and_odd.py::test_a_moving_teacher_is_refreshed",
    ),
    *_of(
        METHOD + "train.py",
        "test_checkpoint",
        [
            (
                "optimizer moments not restored",
                'training.optimizer.state = tree_unflatten(_part(saved.arrays, "optimizer"))',
                "pass",
                RESUMED,
            ),
            (
                "dropout begins anew after a resume",
                "stream_key(seed, 17, step, i)",
                "stream_key(seed, 17, step - first_step, i)",
                RESUMED,
            ),
            (
                "prompts begin anew after a resume",
                "skipped = first_step * settings.grad_accumulation_steps",
                "skipped = 0",
                RESUMED,
            ),
            (
                "one stream for the samples of all steps",
                "stream_key(seed, 1, step, i)",
                "stream_key(seed, 1, step - first_step, i)",
                RESUMED,
            ),
        ],
    ),
    *_of(
        METHOD + "rollout.py",
        "test_rollout",
        [
            (
                "end of turn not counted",
                "completions[row] = Completion(ids[row], finished, not",
                "completions[row] = Completion([i for i in ids[row] if i not in sampling.eos_ids], True, not",
                "test_each_sample_is_what_it_would_be_alone",
            ),
            (
                "temperature left out of sampling",
                "scaled = scaled * (1 / temp)",
                "scaled = scaled * 1",
                "test_a_drawn_token_is_where",
            ),
            (
                "a row drawn with another's point",
                "points[rows, np",
                "points[rows[::-1], np",
                "test_each_sample_is_what",
            ),
        ],
    ),
    Mutant(
        "LoRA scale lost in the file",
        METHOD + "student.py",
        '"lora_parameters": settings.lora_parameters,',
        '"lora_parameters": settings.lora_parameters | {"scale": 1.0},',
        "tests/test_student.py::test_mlx_lm_reads_the_adapters_as_they_were",
    ),
    *_of(
        "safesteer_mlx/evals/scores.py",
        "test_intervals",
        [
            (
                "interval formula",
                "sqrt(p * (1 - p) / total + z * z / (4 * total * total))",
                "sqrt(p * (1 - p) / total)",
                "test_wilson",
            ),
            ("McNemar one-sided", "min(1.0, 2 * sum(", "min(1.0, sum(", "test_mcnemar"),
            ("McNemar's sides", "range(min(lost, gained) + 1)", "range(lost + 1)", "test_mcnemar"),
            (
                "lost and gained exchanged",
                "return Paired(sum(c < 0 for c in changes), sum(c > 0 for c in changes))",
                "return Paired(sum(c > 0 for c in changes), sum(c < 0 for c in changes))",
                "test_pairs_are_counted",
            ),
        ],
    ),
    Mutant(
        "words that begin answers to harmless requests as often may refuse",
        METHOD + "judge.py",
        "alone = [text for text, n in counts.items() if others[text] * seldom <= n * len(harmless)]",
        "alone = [*counts]",
        "tests/test_judge.py::test_words_that_begin_answers_to_harmful_requests_alone_may_refuse",
    ),
    Mutant(
        "where some may refuse in other words one answer to each prompt tells",
        METHOD + "own_answers.py",
        "more = [*rows[:n] * ROUNDS, *rows[n:] * ROUNDS]",
        "more = [*rows]",
        "tests/test_run.py::test_where_some_may_refuse_in_words_that_are_not_known_more_answers_tell",
    ),
    Mutant(
        "what nobody could plan makes later steps seem slower",
        METHOD + "own_answers.py",
        "run.screen.pace.more(time.monotonic() - began)",
        "pass",
        "tests/test_run.py::test_where_some_may_refuse_in_words_that_are_not_known_more_answers_tell",
    ),
    Mutant(
        "what an activation begins with is dispatched by itself",
        "safesteer_mlx/system/graph.py",
        "return after | before",
        "return after",
        "tests/test_graph.py::test_what_mlx_measures_is_what_was_counted",
    ),
    Mutant(
        "a small model is computed as it is kept on the CPU too",
        "safesteer_mlx/system/load.py",
        "if not less or not in_float32(n_weights):",
        "if True:",
        "tests/test_load.py::test_on_the_cpu_a_small_model_is_computed_in_float32",
    ),
    Mutant(
        "no more safety tokens than by default, however little they explain",
        METHOD + "safety_tokens.py",
        "most = times * TokenSettings().safety_tokens",
        "most = TokenSettings().safety_tokens",
        "tests/test_run.py::test_where_so_many_tokens_explain_too_little_more_of_them_count",
    ),
    Mutant(
        "a told refusal judged by what follows",
        METHOD + "judge.py",
        """return _holds(answer[: max(answer.rfind(mark) for mark in ".!?。！？\\n") + 1], "refusal")""",
        'return _holds(answer, "refusal")',
        "tests/test_evaluate.py::test_a_refusal_is_told_once_a_sentence_of_it_can_be_read",
    ),
]


def copy_to(folder: Path) -> None:
    """The repository as git knows it, with what was changed since."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def passes(folder: Path, tests: list[str]) -> bool | None:
    """Whether tests, by the beginning of their names, pass there; None if that cannot be told."""
    file = tests[0].partition("::")[0]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    words = [file, "-k", " or ".join(test.partition("::")[2] for test in tests)]
    environment = {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"}
    try:
        code = subprocess.run(
            [*command, *words], cwd=folder, capture_output=True, check=False, timeout=WITHIN, env=environment
        ).returncode
    except subprocess.TimeoutExpired:
        return False  # one that hangs is noticed
    return {0: True, 1: False}.get(code)


def main() -> int:
    """Run them, and say which live."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="only mutants whose name holds it")
    mutants = [m for m in MUTANTS if parser.parse_args().word in m.name]
    alive, began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copy_to(folder)
        for file in sorted({m.test.partition("::")[0] for m in mutants}):
            tests = sorted({m.test for m in mutants if m.test.startswith(file)})
            if not passes(folder, tests):
                print(f"unbroken, {', '.join(tests)} do not pass, so they prove nothing")
                return 1
        for m in mutants:
            path = folder / m.file
            whole = path.read_text("utf-8")
            if whole.count(m.old) != 1:
                print(
                    f"{m.name}: its line is there {whole.count(m.old)} times; bring the mutant up to date", flush=True
                )
                alive.append(m.name)
                continue
            path.write_text(whole.replace(m.old, m.new), "utf-8")
            survived = passes(folder, [m.test]) is not False
            path.write_text(whole, "utf-8")
            alive += [m.name] * survived
            print(f"{'ALIVE ' if survived else 'killed'}  {m.name}  ({m.test})", flush=True)
    print(f"{len(mutants) - len(alive)} of {len(mutants)} killed in {time.monotonic() - began:.0f} s")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
