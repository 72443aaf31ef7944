#!/usr/bin/env python3
"""What becomes of an aligned model that is fused and quantized: docs/export.md's table, measured.

    .venv/bin/python scripts/export_table.py adapters [--prompts 364] [--out table.md]

Takes a finished run on a quantized model, makes each kind of file of it, mlx_lm.fuse's among them, and asks each the
run's held-out prompts by `safesteer_mlx.verify`. Files are made in a temporary folder and removed.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BITS = ("auto", "mixed", "5", "6", "8", "16", "32")
NAMES = {
    "auto": "`export --to mlx`: the base's own bits, GPTQ on the student's own answers",
    "mixed": "`--bits mixed`: 6 bits where training was, the rest as it was",
    "16": "`--bits 16`: spelled out, 16 bits",
    "32": "`--bits 32`: spelled out, 32 bits",
}


OTHERS = {
    "old grid": "the change on the base's own 4-bit grid, scales and all, by rounding",
    "group 32": "4 bits in groups of 32, all weights, GPTQ",
    "touched at 8": "8 bits where training was, the rest as it was",
}


def write_other(run: Any, how: str, folder: Path) -> None:
    """A file that `export` does not offer, for comparison."""
    import mlx.core as mx
    from mlx.utils import tree_unflatten

    from safesteer_mlx.formats.folders import write_mlx
    from safesteer_mlx.formats.fuse import Grid, Plan, fuse, layers, quantization_of
    from safesteer_mlx.formats.gptq import pack
    from safesteer_mlx.formats.writers import packed, texts_to_quantize_by
    from safesteer_mlx.method.residual import view
    from safesteer_mlx.method.student import with_adapters
    from safesteer_mlx.system.finished import load_base
    from safesteer_mlx.system.screen import Screen

    base = load_base(run)
    student = view(with_adapters(packed(base), run.folder))
    every = layers(student)
    if how == "old grid":
        for layer in (layer for layer in every if layer.touched):
            old, bits = layer.inner, layer.inner.bits
            weight = layer.fused().weight.reshape(*old.scales.shape, -1)
            codes = mx.round((weight - old.biases[..., None]) / old.scales[..., None])
            codes = mx.clip(codes, 0, 2**bits - 1).astype(mx.uint8)
            old.weight = pack(codes.reshape(*codes.shape[:-2], -1), bits)
            student.update_modules(tree_unflatten([(layer.path, old)]))
        model = student
    elif how == "group 32":
        texts = texts_to_quantize_by(run, base, Screen(quiet=True))
        model = fuse(student, Plan({layer.path: Grid(4, 32) for layer in every}), texts)
    else:
        touched = {layer.path: Grid(8, layer.grid.group_size) for layer in every if layer.touched}
        model = fuse(student, Plan(touched), [])
    folder.mkdir(parents=True)
    write_mlx(base, model, folder, {"quantization": quantization_of(model)})


def call(*words: object) -> None:
    """Run a command, its output dropped unless it fails; a verdict of failed is a result."""
    result = subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, check=False)
    if result.returncode not in (0, 1):
        sys.exit(f"{' '.join(map(str, words))}:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")


def verified(run: Path, model: str, folder: Path, prompts: int) -> dict:
    """What the model in a folder answers, beside the run's base and student."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        words = ["--model", model, "--against", folder, "--test-prompts", prompts, "--out", out.name]
        call("safesteer_mlx.verify", run, *words)
        return json.loads(Path(out.name).read_text("utf-8"))


def row(name: str, size: int | None, found: dict, who: str = "shipped") -> str:
    """A line of the table."""
    cell = found["scores"][who]["outcomes"]["harmful"]
    total = sum(cell["greedy"].values())
    refused = [cell[how]["refuse"] for how in ("greedy", "sampled")]
    kl = ["", ""] if who != "shipped" else [f"{found[f'kl_{kind}']:.1e}" for kind in ("harmful", "harmless")]
    size_text = "" if size is None else f"{size / 1e6:.2f} MB"
    held = "" if who != "shipped" else "no" if found["fault"] else "yes"
    return f"| {name} | {size_text} | {refused[0]} / {refused[1]} of {total} | {kl[0]} | {kl[1]} | {held} |"


def main() -> None:
    """Make, ask, remove, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", help="where the run's base is now, if it has moved")
    parser.add_argument("--prompts", type=int, default=0, help="of each kind (default: all that the run asked)")
    parser.add_argument("--bits", nargs="+", default=[*BITS, *OTHERS], choices=[*BITS, *OTHERS], metavar="FILE")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from safesteer_mlx.system.finished import finished_run

    run = finished_run(args.run, args.model)
    model = run.recipe.run.model
    lines = [
        "| file | weights | harmful refused, greedy / sampled | KL(student ‖ file), harmful | harmless | held |",
        "|---|---|---|---|---|---|",
    ]
    scratch = Path(tempfile.mkdtemp(prefix="export-table-"))
    try:
        fused = scratch / "fused"
        call("mlx_lm", "fuse", "--model", model, "--adapter-path", args.run, "--save-path", fused)
        found = verified(args.run, model, fused, args.prompts)
        lines += [row("base", None, found, "base"), row("the scored student", None, found, "student")]
        lines.append(row("`mlx_lm.fuse`", size_of(fused), found))
        print("\n".join(lines), flush=True)
        for bits in args.bits:
            out = scratch / bits
            words = ["--to", "mlx", "--bits", bits, "--no-verify", "--out", out, "--name", "a/b"]
            if bits in OTHERS:
                write_other(run, bits, out / "a" / "b")
            else:
                call("safesteer_mlx.export", args.run, "--model", model, *words)
            found = verified(args.run, model, out / "a" / "b", args.prompts)
            lines.append(
                row((NAMES | OTHERS).get(bits, f"`--bits {bits}`: all weights"), size_of(out / "a" / "b"), found)
            )
            print(lines[-1], flush=True)
            shutil.rmtree(out)
    finally:
        shutil.rmtree(scratch)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n", "utf-8")


def size_of(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


if __name__ == "__main__":
    main()
