"""Several machines at one run: processes of this machine, over loopback, are what Macs on a cable are."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import build
from runs import MICRO, few_sets

from safesteer_mlx.method import direction
from safesteer_mlx.method.residual import steer
from safesteer_mlx.method.safety_tokens import contrast_tokens, select_tokens
from safesteer_mlx.system import machines, screen
from safesteer_mlx.system.machines import Machines
from safesteer_mlx.system.screen import UserError

SHORT = [MICRO, "--force", "--iters", "4", "--save-every", "2", "--test-prompts", "4", "--coeff", "0.85"]
SHORT += ["--data", "few", "--adapter-path", "adapters", "--batch-size", "12", "--token-samples", "2"]
SHORT += ["--no-report", "--offline", "--anchor-cache"]
ALIGN = [sys.executable, "-m", "safesteer_mlx.align"]
ENVIRONMENT = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(n: int, folder: Path, *flags: str, program: list[str] = ALIGN) -> list[subprocess.Popen]:
    """What `mlx.launch` starts, one process a machine, of which each can be held and heard by itself. A machine has a
    folder of its own, if there is one of its number."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(n)]))
    return [
        subprocess.Popen(
            [*program, *flags],
            cwd=own if (own := folder / str(rank)).is_dir() else folder,
            env=ENVIRONMENT | {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Code, output and our own errors of each; MLX's ring has words of its own."""
    results = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        results.append((process.returncode, out, re.sub(r"(?m)^\[ring\].*\n", "", err)))
    return results


def made(folder: Path) -> tuple[list[float], dict[str, mx.array], dict]:
    """Losses, adapters and scores (without the drift, whose digits are the last)."""
    losses = [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = json.loads((folder / "run" / "before_after.json").read_text())
    for score in scores.values():
        score.pop("drift"), score.pop("drift_outside")
    return losses, mx.load(str(folder / "adapters.safetensors")), scores


def assert_alike(folder: Path, other: Path) -> None:
    (losses, weights, scores), (other_losses, other_weights, other_scores) = made(folder), made(other)
    assert losses == pytest.approx(other_losses, abs=1e-5) and scores == other_scores
    for name, weight in weights.items():
        assert mx.abs(weight - other_weights[name]).max().item() < 1e-4, name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run on one machine."""
    folder = few_sets(tmp_path_factory.mktemp("alone"))
    subprocess.run([*ALIGN, *SHORT], cwd=folder, env=ENVIRONMENT, check=True)
    return folder / "adapters"


@pytest.mark.distributed
def test_two_machines_make_what_one_makes_and_the_first_alone_speaks(alone, tmp_path):
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "-p", str(free_ports(1)[0]), "--"]
    run = subprocess.run(
        [*launch, *ALIGN, *SHORT],
        cwd=few_sets(tmp_path),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0 and not run.stderr, run.stderr
    assert run.stdout.count("machines: 2, each with the whole model") == 1
    assert run.stdout.count("5 of 5: ") == run.stdout.count("unsafe answers: ") == 1
    assert_alike(alone, tmp_path / "adapters")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapters", "few"]


@pytest.mark.distributed
def test_a_machine_that_dies_ends_all_and_others_go_on_from_there(alone, tmp_path):
    first, _, third = processes = start(3, few_sets(tmp_path), *SHORT)
    states = tmp_path / "adapters" / "run" / "checkpoint"
    until = time.monotonic() + 200
    while not list(states.glob("step-*.json")) and time.monotonic() < until:
        assert first.poll() is None
        time.sleep(0.02)
    third.send_signal(signal.SIGKILL)
    (code, out, said), (other_code, other_out, _), _ = ended(processes)
    assert code == other_code == 2 and not other_out
    assert re.fullmatch(r"safesteer-mlx: another machine of this run does not answer \(.*\); see .*\n", said)
    assert re.search(r"stopped after [23] of 4 steps; the adapters so far are in adapters", out)
    assert (tmp_path / "adapters" / "adapters.safetensors").exists()

    results = ended(start(2, tmp_path, *SHORT, "--yes"))
    assert [code for code, *_ in results] == [0, 0] and "going on after step" in results[0][1]
    assert results[1][1:] == ("", "")
    assert_alike(alone, tmp_path / "adapters")


@pytest.mark.distributed
def test_settings_are_those_of_the_first_and_files_are_held_against_its_own(tmp_path):
    for rank in (0, 1):
        few_sets(tmp_path / str(rank), skip=rank)
    (tmp_path / "0" / "mine.yaml").write_text("learning_rate: 0.002\n")  # the second has no such file
    first, second = ended(start(2, tmp_path, *SHORT, "-c", "mine.yaml"))
    what = "machine 2 has other prompts than the first; every machine needs the same model, files and versions"
    assert first[0] == second[0] == 2 and what in first[2] and first[2].count("\n") == 1
    assert second[2].startswith("safesteer-mlx: machine 2: ") and not second[1]


@pytest.mark.distributed
def test_what_is_wrong_on_all_is_told_once(tmp_path):
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "-p", str(free_ports(1)[0]), "--"]
    run = subprocess.run([*launch, *ALIGN, "--seeds", "1"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True)
    assert run.stderr.decode().count("safesteer-mlx:") == 1 and b"did you mean --seed" in run.stderr


def readings() -> dict[str, np.ndarray]:
    """What the stages read off a model together, by name; `few` is of fewer prompts than there are machines."""
    model = build("llama")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 48, int(n)).tolist() for n in rng.integers(4, 12, 23)]
    harmful, harmless, ids = prompts[:12], prompts[12:], [1, 2, 3]
    found = {
        "means": direction.mean_differences(model, harmful, harmless, 2, 4),
        "means of few": direction.mean_differences(model, harmful[:1], harmless[:3], 2),
        "refusal scores": direction.refusal_scores(model, prompts, ids, 4),
        "refusal scores of few": direction.refusal_scores(model, prompts[:1], ids),
    }
    vector = direction.Direction(-1, 1, mx.array(rng.normal(size=32).astype(np.float32)))
    curves = direction.opening_probabilities(model, vector, (0.5, 1.0), harmful, harmless, ids, 8)
    found["first passes"] = np.stack(curves)
    teacher = steer(model, 1, vector.vector)
    for few, rows in (("", prompts), (" of few", prompts[:2])):
        answers = [rng.integers(0, 48, int(n)).tolist() for n in rng.integers(0, 5, len(rows))]
        how = {"eot_ids": [0], "banned_ids": [5], "inner_top_k": 3, "min_steered_prob": 1e-3}
        contrast = contrast_tokens(model, teacher, rows, answers, batch_size=4, deciding=len(rows) // 2, **how)
        found |= {f"{name}{few}": np.asarray(value) for name, value in vars(contrast).items() if name != "positions"}
        tokens = select_tokens(contrast, 5, "part", among=range(48))
        found[f"tokens{few}"] = tokens
        found[f"explained{few}"] = contrast.explained(tokens)
        for name, where in (("it decides", contrast.where_it_decides), ("it turns", contrast.where_thoughts_turn)):
            of = where(tokens, range(len(rows)))
            means = contrast.mean(contrast.positions.kl, of), contrast.mean(contrast.teacher_mass(tokens), of)
            found[f"where {name}{few}"] = np.array([contrast.explained(tokens, of)[-1], *means])
        found[f"farthest{few}"] = np.array(contrast.farthest_mean(range(len(rows))))
        found[f"openings{few}"] = contrast.openings(tokens, range(1, len(rows)))
    return found


@pytest.fixture(scope="module")
def read_together(tmp_path_factory):
    """`readings` of 1, 2 and 3 machines, each machine's own."""
    folder = tmp_path_factory.mktemp("read")
    code = (
        "import sys, numpy; sys.path.insert(0, sys.argv[1]); import test_machines as t; at = t.machines.join(); "
        "numpy.savez(f'{at.size}-{at.rank}.npz', **t.readings())"
    )
    for n in (2, 3):
        results = ended(start(n, folder, str(Path(__file__).parent), program=[sys.executable, "-c", code]))
        assert not any(code for code, *_ in results), results
    return {tuple(map(int, p.stem.split("-"))): dict(np.load(p)) for p in folder.glob("*.npz")} | {(1, 0): readings()}


OF_CONTRAST = ["votes", "mean_delta", "base_prob", "steered_prob", "eligible", "n_positions", "part", "divergence"]
OF_CONTRAST += ["raised", "tokens", "explained", "where it decides", "where it turns", "farthest", "openings"]


READ = [f"{name}{few}" for name in ("means", "refusal scores", *OF_CONTRAST) for few in ("", " of few")]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["first passes", *READ])
def test_what_is_read_in_parts_is_what_one_machine_reads(read_together, name):
    one = read_together[1, 0][name]
    assert one.size
    for (size, rank), found in read_together.items():
        assert found[name].shape == one.shape and found[name].dtype == one.dtype, (size, rank)
        np.testing.assert_allclose(found[name], one, rtol=2e-5, atol=1e-6, err_msg=f"{rank} of {size}")
    for size in (2, 3):  # all of them go on from the same, to the last digit
        assert len({read_together[size, rank][name].tobytes() for rank in range(size)}) == 1


def test_a_machine_that_cannot_be_reached_is_a_sentence(tmp_path, monkeypatch):
    hosts = tmp_path / "hosts.json"
    hosts.write_text("no hosts")
    monkeypatch.setattr(machines, "_here", Machines())
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    monkeypatch.setenv("MLX_RANK", "0")
    with pytest.raises(UserError, match=r"^the machines of this run cannot meet \(.*\); check the hosts and ports"):
        machines.join()
    hosts.write_text("\n")  # what mlx.launch -n 1 writes
    assert machines.join() == Machines()


def test_one_that_has_left_does_all():
    assert Machines(2, 1).part(5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 16])
def test_parts_are_all_there_is_and_none_twice(size, n):
    parts = [Machines(rank, size).part(n) for rank in range(size)]
    assert sorted(i for part in parts for i in part) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= machines.TOGETHER


def test_one_alone_exchanges_nothing():
    one, tree, numbers = Machines(), {"a": mx.array([1.0])}, np.ones(3)
    assert one.add(numbers) is numbers
    assert one.gather(3) == [3] and one.share("x") == "x" and one.total(tree) is tree
    assert one.share_arrays(tree) is tree and one.each(range(3), lambda own: [i + 1 for i in own]) == [1, 2, 3]


def test_who_started_together_is_told_by_the_launcher(monkeypatch):
    for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert screen.started_rank() is None and machines.join() == Machines()
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert screen.started_rank() == 3
    monkeypatch.setenv("MLX_RANK", "1")
    assert screen.started_rank() == 1
    monkeypatch.setenv("MLX_RANK", "first")
    assert screen.started_rank() is None
