"""What `align --verdict-only` costs beside another commit's: row-tokens through decoder blocks, and seconds of CPU.

    python scripts/search_cost.py --against 5a00f3a models/tiny-chat tests/zoo_models/market

Both find direction and coefficient with the same counts of prompts and ask the verdict's questions, in turns, each in
a process of its own; `--against` is checked out into a temporary folder. A row-token is one token of one row in one
block, of prompts and answers alike.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SAME = ["--direction-train", "128", "--direction-validation", "32", "--coeff", "auto"]
COUNTED = """
import json, sys, time
try:
    from safesteer_mlx.system import load as loading
except ImportError:  # before there were rooms
    from safesteer_mlx import load as loading
from safesteer_mlx.align import main
own, count = loading.load, [0]
def load(*args, **options):
    base = own(*args, **options)
    for block in {type(block) for block in base.model.layers}:
        def counted(self, x, *args, plain=block.__call__, **options):
            count[0] += x.shape[0] * x.shape[1]
            return plain(self, x, *args, **options)
        block.__call__ = counted
    return base
loading.load = load
import safesteer_mlx.recipe as recipe
renamed = "--verdict-only" in open(recipe.__file__).read()
main([*sys.argv[1:], "--verdict-only" if renamed else "--check"])
print(json.dumps({"row_tokens": count[0], "seconds": time.process_time()}))
"""


def cost(tree: Path, model: Path) -> dict[str, Any]:
    """Row-tokens and CPU seconds of one check with the package of a tree."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", COUNTED, str(model), *SAME]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--against", required=True, metavar="COMMIT")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        subprocess.run(["git", "worktree", "add", "--detach", other, args.against], cwd=ROOT, check=True)
        try:
            print("| model | row-tokens, ours / other | ratio | CPU seconds, ours / other | ratio |")
            print("|---|---|---|---|---|")
            for model in args.models:
                ours, theirs = cost(ROOT, model.resolve()), cost(other, model.resolve())
                cells = [
                    f"{ours[key]:,.0f} / {theirs[key]:,.0f} | {ours[key] / theirs[key]:.2f}"
                    for key in ("row_tokens", "seconds")
                ]
                print(f"| {model.name} | {' | '.join(cells)} |", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
