"""Kill a run at random moments, go on until it is done, and compare its bytes with an uninterrupted run's.

    python scripts/crash_test.py --kills 200

A run is a subprocess, killed by SIGKILL after a random time and started again with `--yes`. When one is
done, its adapters and record must be those of the run that was left alone, byte for byte; then the next
begins, until the kills are used up.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHORT = ["--iters", "6", "--save-every", "2", "--test-prompts", "2", "--direction-train", "48"]
SHORT += ["--direction-validation", "24", "--token-samples", "1", "--batch-size", "8", "--max-tokens", "24"]
COMPARED = ["adapters.safetensors", "adapter_config.json"]
COMPARED += [f"run/{name}" for name in ("direction.json", "tokens.json", "metrics.jsonl", "before_after.json")]


def command(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "safesteer_mlx.align", "--adapter-path", str(folder), *SHORT, *flags]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="further flags of the runs, after --")
    args = parser.parse_args()
    rng, killed, finished = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        whole, folder = Path(scratch) / "whole", Path(scratch) / "killed"
        began = time.monotonic()
        subprocess.run(command(whole, *args.flags), check=True, capture_output=True)
        seconds = time.monotonic() - began
        while killed < args.kills or folder.exists():
            process = subprocess.Popen(
                command(folder, "--yes", *args.flags), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            try:
                output, _ = process.communicate(
                    timeout=rng.uniform(0.15, 0.9) * seconds if killed < args.kills else None
                )
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
                continue
            if process.returncode != 0:
                print(output.decode(errors="replace"))
                print(f"exit code {process.returncode} after {killed} kills")
                return 1
            different = [name for name in COMPARED if (folder / name).read_bytes() != (whole / name).read_bytes()]
            if different:
                print(f"after {killed} kills these differ: {', '.join(different)}")
                return 1
            finished += 1
            folder.rename(Path(scratch) / f"done-{finished}")
    print(f"{killed} kills, {finished} runs finished, each the same bytes as the run that was left alone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
