"""How long a run will take: rates that are measured, the plan by hand, and what is left as a run goes on."""

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import pytest

from safesteer_mlx.align import main
from safesteer_mlx.method import pace
from safesteer_mlx.method.pace import Rates, measure_rates, plan_seconds
from safesteer_mlx.method.rollout import Completion
from safesteer_mlx.method.run import make_run
from safesteer_mlx.method.teacher import settled
from safesteer_mlx.recipe import BUNDLED, model_name, resolve
from safesteer_mlx.recipe import STEPS as STEPS_SAID
from safesteer_mlx.system import machines, screen
from safesteer_mlx.system.hub import is_here
from safesteer_mlx.system.load import load
from safesteer_mlx.system.machines import Machines
from safesteer_mlx.system.screen import Pace, Screen, duration

READING = Rates(reading=1.0, feeding=(0.0, 0.0), batch=4, lengths=[10])
DRAWING = Rates(reading=0.0, feeding=(1.0, 3.0), batch=4, lengths=[10, 30])
STEPS = ["directions", "teacher", "tokens", "training", "scoring"]


@pytest.fixture(scope="module")
def bundled():
    return load(model_name(BUNDLED))


@pytest.fixture
def run_with(bundled, tmp_path):
    """A run of the bundled model with these settings."""

    def make(**settings):
        settings |= {"model": bundled.name, "adapter_path": str(tmp_path / "adapters")}
        return make_run(resolve(bundled.config, settings)[0], bundled, Screen(quiet=True))

    return make


def test_drawing_takes_a_feed_for_each_token_of_the_longest_or_of_all_in_full_batches():
    assert DRAWING.draw(0, 8) == 0
    assert DRAWING.draw(1, 8) == 8 * 1.0
    assert DRAWING.draw(4, 8) == 8 * 3.0
    assert DRAWING.draw(4, 20) == pytest.approx(20 * (1.0 + 2.0 * 2 / 3))  # the longest is cut at 20; on average 3 of 4
    assert DRAWING.draw(3, 100) == pytest.approx(30 * (1.0 + 2.0 * 1 / 3))  # 2 of 3
    rows, mean = 100, (10 + 20) / 2  # more than a batch: the mean counts, and half of the longest at the end
    assert DRAWING.draw(rows, 20) == pytest.approx(3.0 * (rows * mean / (pace.KEPT_BUSY * 4) + 20 / 2))


def test_rates_are_of_this_model_and_lengths_of_its_answers(run_with):
    run = run_with()
    rates = measure_rates(run)
    n = min(run.recipe.run.generation_batch_size, 96)
    assert rates.reading > 0 and rates.feeding[0] > 0 and rates.batch == len(rates.lengths) == n
    assert min(rates.lengths) >= 1 and max(rates.lengths) <= pace.HELD_OUT_TOKENS
    assert sum(rates.lengths) / n < 40  # its answers are short; nothing is counted to the limit


def test_answers_that_are_cut_by_the_clock_count_as_long_as_they_would_have_been(run_with, monkeypatch):
    monkeypatch.setattr(pace, "SECONDS", 0.0)
    cut = measure_rates(run_with()).lengths
    whole = [8] * len(cut)
    assert all(a >= 1 for a in cut) and max(cut) > max(whole)


def test_where_answers_begin_alike_as_much_more_is_planned(run_with, monkeypatch):
    """Told by the answers by which lengths are: refusals and others have their first three tokens in common."""
    run = run_with(test_prompts=20)
    begin, refuses, answers = [10, 11, 12], [20, 30], [21, 31]
    n = run.recipe.run.generation_batch_size
    said = [Completion([*begin, *(refuses if i % 3 == 0 and i < n / 2 else answers)], True) for i in range(n)]
    monkeypatch.setattr(pace, "generate_here", lambda _, rows, *__: said[: len(rows)])
    monkeypatch.setattr(pace, "is_refusal", lambda text: text == run.base.tokenizer.decode([*begin, *refuses]))
    rates = measure_rates(run)
    assert rates.alike == 3
    assert measure_rates(replace(run, base=replace(run.base, thinks=True))).alike == 0  # planned otherwise
    reading = replace(READING, lengths=[40])
    seconds = [dict(zip(STEPS, plan_seconds(run, replace(reading, alike=n)), strict=True)) for n in (0, 3, 20)]
    assert seconds[0]["training"] < seconds[1]["training"] < seconds[2]["training"]
    assert [s["scoring"] for s in seconds] == [seconds[0]["scoring"]] * 3
    # Where it is said how much is taught, that holds.
    told = run_with(test_prompts=20, first_tokens=3)
    assert plan_seconds(told, replace(reading, alike=20)) == plan_seconds(told, reading)
    # What begins otherwise tells at once.
    said[:] = [Completion([*(refuses if i % 3 == 0 and i < n / 2 else answers)], True) for i in range(n)]
    monkeypatch.setattr(pace, "is_refusal", lambda text: text == run.base.tokenizer.decode(refuses))
    assert measure_rates(run).alike == 0


def test_what_the_machine_does_for_a_moment_is_not_the_models(run_with, monkeypatch):
    """One batch in nine takes a thousand times as long."""
    now, reads = [0.0], []

    def read(_, rows):
        reads.append(rows)
        now[0] += 1000.0 if len(reads) == 3 else 1.0
        return mx.zeros(1)

    monkeypatch.setattr(pace, "last_logits", read)
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pace, "generate_here", lambda _, rows, *__: [Completion([1], True)] * len(rows))
    monkeypatch.setattr(pace, "READ", (9, 10_000.0))
    rates = measure_rates(run_with())
    assert len(reads) == 10 and rates.reading == pytest.approx(1.0 / (len(reads[0]) * max(map(len, reads[0]))))
    reads.clear()
    monkeypatch.setattr(pace, "READ", (9, 0.5))  # seconds: enough after one
    measure_rates(run_with())
    assert len(reads) == 2


def test_a_full_batch_takes_more_than_one_whose_rows_end(run_with, monkeypatch):
    """One row takes a second a token; two take two on average, while one of them ends at half: three together."""
    now = [0.0]

    def generate(_, rows, *__):
        now[0] += 8.0 if len(rows) == 1 else 16.0
        return [Completion([1] * length, True) for length in ([8] if len(rows) == 1 else [8, 4])]

    monkeypatch.setattr(pace, "last_logits", lambda *_: mx.zeros(1))
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pace, "generate_here", generate)
    rates = measure_rates(run_with(generation_batch_size=2))
    assert rates.feeding == pytest.approx((1.0, 3.0)) and rates.draw(2, 8) == pytest.approx(16.0)


def test_answers_that_are_thought_about_take_as_long_as_they_are(run_with, monkeypatch):
    run = run_with(test_prompts=20, iters=10, max_tokens=400)
    thinker = replace(run, base=replace(run.base, thinks=True))
    with monkeypatch.context() as patch:
        patch.setattr(pace, "SECONDS", 0.0)  # none has ended when the clock cuts them
        assert max(measure_rates(run).lengths) == 96 < max(measure_rates(thinker).lengths) <= 400
    # Those that ended behind their thought would have gone on for nobody.
    tokenizer = SimpleNamespace(think_end_tokens=(50,), eos_token_ids={0})
    thinker = replace(thinker, base=replace(thinker.base, tokenizer=tokenizer))
    answers = [Completion([7] * 10 + [50] + [7] * 96, False, True), Completion([7] * 20, True)]
    monkeypatch.setattr(pace, "generate_here", lambda _, rows, *__: [answers[i % 2] for i in range(len(rows))])
    assert {*measure_rates(thinker).lengths} == {107, 20}
    # The search, the teacher and the scores wait for the longest, training for as much as is taught.
    short, long = (replace(DRAWING, lengths=[n]) for n in (96, 400))
    for own, factor in ((run, 1), (thinker, 400 / 96)):
        few, many = (dict(zip(STEPS, plan_seconds(own, rates), strict=True)) for rates in (short, long))
        for step in ("directions", "scoring"):
            assert many[step] == pytest.approx(factor * few[step], rel=0.01)


@pytest.mark.parametrize(
    ("settings", "dearer"),
    [
        ({"test_prompts": 200}, ["scoring"]),
        ({"score_teacher": True}, ["scoring"]),
        ({"iters": 500}, ["training"]),
        ({"num_generations": 2, "iters": 40}, ["training"]),
        ({"token_samples": 16}, ["tokens"]),
        ({"direction_validation": 64}, ["directions", "tokens"]),
    ],
)
def test_what_is_asked_for_more_makes_its_own_step_longer(run_with, settings, dearer):
    few = {"test_prompts": 20, "iters": 40, "direction_validation": 16}
    few, more = (plan_seconds(run_with(**own), READING) for own in (few, few | settings))
    assert [name for name, a, b in zip(STEPS, few, more, strict=True) if b > a] == dearer
    assert all(b >= a for a, b in zip(few, more, strict=True))


def test_scoring_is_two_models_answers_and_training_its_rows(run_with):
    run = run_with(test_prompts=20, iters=10, first_tokens=3, tail=5, grad_accumulation_steps=1)
    settings, prompts = run.recipe.train, run.prompts
    found_from = [*prompts.harmful_direction_train, *prompts.harmless_direction_train]
    prompt = sum(map(len, found_from)) / len(found_from)
    planned = dict(zip(STEPS, plan_seconds(run, READING), strict=True))
    n_tasks = 20 * len({item.category for item in prompts.sets.capability_test})
    # Greedy and sampled answers share a reading; drift reads 64 prompts with their answers twice.
    assert planned["scoring"] == pytest.approx(2 * (prompt * (3 * 20 + n_tasks) + 2 * 64 * (prompt + 10)))
    rows = settings.batch_size * settings.num_generations
    a_step = rows * prompt + pace.PASSES * rows * (prompt + 8)  # rollouts of 3 + 5 tokens
    a_step += prompt * (len(prompts.harmful_validation) + len(prompts.harmless_validation)) / 3
    a_step += prompt * 16 / settings.save_every
    assert planned["training"] == pytest.approx(10 * a_step)


def test_more_prompts_to_train_on_take_longer(run_with, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"How is thing {i} broken?\n" for i in range(300)))
    runs = run_with(), run_with(data=str(tmp_path / "prompts.txt"))
    n_direction, n_bundled, n_own = len(runs[0].prompts.sets.harmful_direction_train), 100, 300
    few, many = (plan_seconds(run, READING)[STEPS.index("training")] for run in runs)
    assert many / few == pytest.approx((n_own + n_direction) / (n_bundled + n_direction), rel=0.1)


def test_several_machines_share_it(run_with, monkeypatch):
    run = run_with()
    alone = plan_seconds(run, READING)
    monkeypatch.setattr(machines, "_here", replace(Machines(), size=2))
    assert plan_seconds(run, READING) == [seconds / 2 for seconds in alone]


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    return now


def test_what_is_left_follows_the_steps_that_are_done(clock):
    run = Pace([10.0, 20.0, 30.0])
    run.next()
    assert run.left() == 60.0
    clock[0] += 4
    assert run.left() == 56.0 and run.left(of_stage=16.0) == 16.0 + 50.0
    assert run.left(of_stage=2.0) == 56.0 and run.left(of_stage=2.0, is_step=True) == 2.0 + 50.0
    clock[0] += 16  # the first step took twice as long
    run.next()
    assert run.left() == pytest.approx((20 + 10) / (10 + 10) * 50)
    clock[0] += 1000
    assert run.left() == pytest.approx(1.5 * 30)  # what is over time has nothing left
    run.next()
    clock[0] += 7
    assert run.as_json() == {"planned": [10.0, 20.0, 30.0], "took": [20.0, 1000.0, 7.0]}
    run.next()
    assert run.left() == 0.0


def test_a_plan_made_later_is_of_the_steps_that_have_not_begun(clock):
    run = Pace([10.0, 20.0, 30.0])
    run.next()
    clock[0] += 20
    run.correct([99.0, 40.0, 60.0])
    run.next()
    assert run.left() == pytest.approx((20 + 10) / (10 + 10) * 100)
    assert run.as_json()["planned"] == [10.0, 20.0, 30.0]


def test_what_nobody_could_plan_makes_the_steps_to_come_no_longer(clock):
    run = Pace([10.0, 20.0, 30.0])
    run.next()
    clock[0] += 40
    run.more(30.0)
    run.next()
    assert run.left() == 50.0
    assert run.as_json() == {"planned": [10.0, 20.0, 30.0], "took": [40.0, 0.0]}
    Pace([]).more(1.0)  # of a run that nobody watches


def test_once_it_is_known_how_much_is_taught_the_steps_with_it_are_planned_by_that(run_with):
    """A row is drawn in 2 + 8 tokens by what is planned at first, in 13 + 8 once 13 tokens are to be taught."""
    run, rates = run_with(), replace(DRAWING, batch=96, feeding=(1.0, 1.0))
    first, then = (dict(zip(STEPS, plan_seconds(own, rates), strict=True)) for own in (run, settled(run, 13)))
    assert then["training"] > 1.5 * first["training"] and then["tokens"] > first["tokens"]
    assert then["scoring"] == first["scoring"]


def test_a_run_without_a_plan_says_nothing_of_it(capsys):
    assert Pace([]).left(9.0) == 0.0
    shown = Screen()
    shown.step(["finding", "training"])
    assert capsys.readouterr().out == "1 of 2: finding\n"


def test_the_screen_tells_the_whole_runs_time(clock, capsys):
    shown = Screen()
    shown.plan([600.0, 1200.0])
    shown.step(["finding", "training"])
    with shown.stage("reading") as advance:
        clock[0] += 20
        advance(1, 4, "note")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "time: about 30 minutes in all, by what was measured just now"
    assert lines[1] == "1 of 2: finding (about 30 minutes left)"
    assert lines[2].startswith("reading: 1/4, 0.1/s, 60 s left note; the run: about 30 minutes left")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "about 5 seconds"),
        (42, "about 40 seconds"),
        (95, "about 2 minutes"),
        (3000, "about 50 minutes"),
        (7500, "about 2 h 05 min"),
    ],
)
def test_a_time_is_told_to_the_digit_it_can_hold(seconds, said):
    assert duration(seconds) == said


def test_a_dry_run_plans_time_where_the_weights_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "Time, planned by what was measured just now" in said and "time:" not in said
    table = said[said.index("Time, planned") :]
    assert all(step[:30] in table for step in STEPS_SAID) and table.count("about") == len(STEPS_SAID) + 1
    assert not list(tmp_path.iterdir())
    assert main(["--dry-run", "--memory-limit", "2MB"]) == 0  # nothing is loaded that does not fit
    assert "time: not known before the weights are on this machine, and fit" in capsys.readouterr().out


def test_weights_are_here_with_every_shard_that_the_index_names(tmp_path):
    assert is_here(model_name(BUNDLED)) and not is_here(str(tmp_path)) and not is_here("no/such-model")
    (tmp_path / "a.safetensors").touch()
    assert is_here(str(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    assert not is_here(str(tmp_path))
    (tmp_path / "b.safetensors").touch()
    assert is_here(str(tmp_path))
    for broken in ("[]", "{", '{"weight_map": 3}'):
        index.write_text(broken)
        assert not is_here(str(tmp_path))
