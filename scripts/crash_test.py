"""Kill a run at random moments, go on until it is done, and compare its bytes with an uninterrupted run's.

    python scripts/crash_test.py --kills 200
    python scripts/crash_test.py --kills 50 -- --coeff auto      the search for a coefficient too, slowly

A run is a process, killed by SIGKILL after a random time and started again with `--yes`. When one is done, its
adapters and record must be those of the run that was left alone, byte for byte; then the next begins, until the
kills are used up. Runs are forked from a process that has imported everything and computed nothing, so that the
kills fall into the run's own work.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import safesteer_mlx  # noqa: F401  before mlx

MICRO = str(Path(__file__).resolve().parent.parent / "tests" / "micro")  # of which a run takes seconds
SHORT = [MICRO, "--force", "--iters", "4", "--save-every", "1", "--test-prompts", "1", "--direction-train", "32"]
SHORT += ["--direction-validation", "16", "--token-samples", "1", "--batch-size", "4", "--max-tokens", "16"]
SHORT += ["--horizon", "2", "--num-generations", "2", "--coeff", "1", "--no-report", "--anchor-cache"]
ASKED = 8, 4  # validation prompts, so that the kills fall on training rather than on the search
COMPARED = ["adapters.safetensors", "adapter_config.json"]
COMPARED += [f"run/{name}" for name in ("direction.json", "tokens.json", "metrics.jsonl", "before_after.json")]


def run(folder: Path, flags: list[str], seconds: float | None = None) -> int | None:
    """The exit code of a run in a process of its own; None if it was killed after `seconds`."""
    child = os.fork()
    if child == 0:
        from safesteer_mlx.align import main
        from safesteer_mlx.method import safety_tokens, teacher

        teacher.VALIDATION_PROMPTS = safety_tokens.VALIDATION_PROMPTS = ASKED
        log = os.open(folder.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os._exit(main(["--adapter-path", str(folder), *SHORT, *flags]))
    end = None if seconds is None else time.monotonic() + seconds
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if end is not None and time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(done[1])


def crash(scratch: Path, kills: int, seed: int, flags: list[str]) -> str | None:
    """Kill and go on; what went wrong, or None."""
    import mlx_lm.generate
    import mlx_lm.utils  # noqa: F401

    from safesteer_mlx.method import train  # noqa: F401

    rng, killed, finished = random.Random(seed), 0, 0
    whole, folder = scratch / "whole", scratch / "killed"
    began = time.monotonic()
    if run(whole, flags) != 0:
        return "the run that is left alone fails: " + (scratch / "log").read_text()
    seconds = time.monotonic() - began
    print(f"a run takes {seconds:.1f} s", flush=True)
    while killed < kills or folder.exists():
        code = run(folder, ["--yes", *flags], rng.uniform(0, 0.5) * seconds if killed < kills else None)
        if code is None:
            killed += 1
            continue
        if code != 0:
            return f"exit code {code} after {killed} kills: " + (scratch / "log").read_text()
        different = [name for name in COMPARED if (folder / name).read_bytes() != (whole / name).read_bytes()]
        if different:
            return f"after {killed} kills these differ: {', '.join(different)}"
        finished += 1
        folder.rename(scratch / f"done-{finished}")
        print(f"{killed} kills, {finished} runs finished, {time.monotonic() - began:.0f} s", flush=True)
    print("each finished run has the bytes of the run that was left alone")
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="further flags of the runs, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        wrong = crash(Path(scratch), args.kills, args.seed, args.flags)
    if wrong:
        print(wrong, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
