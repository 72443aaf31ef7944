"""What leaves a run: `python -m safesteer_mlx.export RUN --to mlx | adapter | hf | peft | gguf | gguf-lora | hub`.

An export is asked the run's held-out prompts, in a process of its own, and held against the student that the run
scored; one that does not answer as that student is marked failed, exit code 1.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipe import PACKAGE, Parser, at_least
from .system.files import user_path, write_out
from .system.hub import prepare
from .system.screen import Screen, UserError, command_line

if TYPE_CHECKING:
    from .formats.writers import Exported
    from .system.finished import FinishedRun

FORMATS = ("mlx", "adapter", "hf", "peft", "gguf", "gguf-lora", "hub")
BITS = ("auto", "4", "5", "6", "8", "16", "32", "mixed")
NEEDED = dict.fromkeys(("gguf", "gguf-lora"), ("torch", "gguf"))  # to write it
ASKED_WITH = {"hf": ("torch",), "peft": ("torch", "peft"), "gguf": ("llama_cpp",), "gguf-lora": ("llama_cpp",)}
DTYPES = ("float16", "bfloat16", "float32")
_GGUF = {"auto": "16", "8": "16"}
# What to try after an export of so many bits that failed.
WOULD_HOLD = {
    "mlx": {"auto": "mixed", "4": "mixed", "5": "mixed", "6": "8", "mixed": "8", "8": "16", "16": "32"},
    "hf": {"auto": "32", "16": "32"},
    "gguf": _GGUF,
    "gguf-lora": _GGUF,
}


def _parser() -> Parser:
    parser = Parser("export", "Write what a run made for others to use, and check that it answers as what was scored.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of adapters that align wrote")
    add("--to", choices=FORMATS, help="what to write; hub: upload it to the Hugging Face Hub as well")
    add("--as", dest="form", choices=FORMATS[:-1], default="adapter", help="what hub uploads (default: adapter)")
    add("--public", action="store_true", help="for all to see on the Hub (default: private)")
    add(
        "--bits",
        choices=BITS,
        default="auto",
        help="of the weights (default: auto, the base's own by GPTQ; mixed: 6 where training was, the rest as it is)",
    )
    add("--dtype", choices=DTYPES, help="of weights that are spelled out (default: float16, or the model's bfloat16)")
    add("--out", type=Path, default=Path("exports"), metavar="DIR", help="folder of models (default: exports)")
    add("--name", metavar="PUBLISHER/NAME", help="of the model in it (default: safesteer/ and the base's name)")
    add("--llama-cpp", type=Path, metavar="DIR", help="llama.cpp's source, for gguf (default: its scripts in PATH)")
    add("--model", help="where the run's base is now, if it has moved")
    add("--verify", type=at_least(1), default=100, metavar="N", help="ask N prompts of each kind (default: 100)")
    add("--no-verify", action="store_true", help="ask the export nothing; its card says so")
    add("--force", action="store_true", help="export a run that made nothing safer")
    add("--offline", action="store_true", help="fetch nothing from the Hub, as HF_HUB_OFFLINE=1")
    add("--trust-remote-code", action="store_true", help="let code from the model's repository run")
    return parser


@command_line
def main(argv: list[str]) -> int:
    """Write, verify and upload; 1 for an export that does not answer as its student."""
    args = _parser().parse_args(argv)
    if args.to is None:
        raise UserError(f"say with --to what to write: {', '.join(FORMATS)}")
    args.upload = args.to == "hub"
    args.to = args.form if args.upload else args.to
    if args.dtype is not None:
        if args.to not in ("mlx", "hf") or args.bits not in ("auto", "16", "32"):
            raise UserError(f"--dtype {args.dtype} is for --to mlx and hf without quantized weights; leave it out")
        args.bits = "32" if args.dtype == "float32" else "16"
    if args.upload and args.name is None:
        raise UserError("--to hub needs --name ORGANISATION/NAME, where to put it on the Hub")
    prepare(args.offline)
    from .formats.readers import check_installed
    from .system.finished import finished_run

    run, screen = finished_run(args.run, args.model), Screen()
    if (reason := run.manifest.get("not_aligned")) and not args.force:
        raise UserError(f"the run in {args.run} is not aligned ({reason}); --force exports it all the same")
    for module in NEEDED.get(args.to, ()) + (() if args.no_verify else ASKED_WITH.get(args.to, ())):
        check_installed(module, f"--to {args.to}")
    exported = _write(run, args, _target(run, args), screen)
    _write_card(run, args, exported, None)  # until it is verified
    fidelity = None if args.no_verify else _verified(run, args, exported)
    return _finish(run, args, exported, fidelity, screen)


def _target(run: "FinishedRun", args: Namespace) -> Path:
    """The folder to write, which must not exist."""
    name = args.name
    if name is None:
        base = Path(run.recipe.run.model.rstrip("/")).name
        more = {"mlx": "" if args.bits == "auto" else f"-{args.bits}" + ("" if args.bits == "mixed" else "bit")}
        name = f"safesteer/{base}-safesteer{more.get(args.to, f'-{args.to}')}"
    parts = name.split("/")
    if len(parts) != 2 or not all(part and part.strip(".") and part.isprintable() for part in parts):
        raise UserError(f"--name {name} is not of the form PUBLISHER/NAME; give one like safesteer/my-model")
    folder = user_path(args.out) / name
    if folder.exists():
        raise UserError(f"{folder} exists already; give another --name or --out, or remove it")
    return folder


def _write(run: "FinishedRun", args: Namespace, folder: Path, screen: Screen) -> "Exported":
    """Write the export beside where it goes, and put it there in one step; the base is loaded for it alone."""
    from .formats.writers import WRITERS, Job
    from .system.finished import load_base

    base = load_base(run, args.trust_remote_code)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        exported = WRITERS[args.to](Job(run, base, args, part, folder, screen))
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return exported


def _verified(run: "FinishedRun", args: Namespace, exported: "Exported") -> dict[str, Any]:
    """What the export answers, asked in a process of its own, to which this one leaves the memory; a UserError if it
    cannot be asked."""
    import mlx.core as mx

    mx.clear_cache()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "fidelity.json"
        # -P: no json.py of the working folder is run, as it is not where export itself is the console script.
        command = [sys.executable, "-P", "-m", "safesteer_mlx.verify", str(run.folder), "--with", exported.reader]
        command += ["--against", str(exported.against), "--test-prompts", str(args.verify)]
        command += ["--out", str(out), "--model", str(exported.base), "--offline"]
        command += ["--exact"] if exported.exact else []
        command += ["--trust-remote-code"] if args.trust_remote_code else []
        path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
        code = subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": path}).returncode
        if code not in (0, 1) or not out.is_file():
            own, against = (shlex.quote(str(path)) for path in (run.folder, exported.against))
            raise UserError(
                f"{exported.folder} was written, but could not be verified (see above); mend that and ask again: "
                f"safesteer-mlx verify {own} --with {exported.reader} --against {against}"
            )
        return json.loads(out.read_text("utf-8"))


def _write_card(run: "FinishedRun", args: Namespace, exported: "Exported", fidelity: dict[str, Any] | None) -> None:
    from .formats.card import model_card, shown_base
    from .system.hub import licence

    base, on_hub = shown_base(run)
    about = replace(exported.about, licence=licence(base) if args.upload and on_hub else None)
    write_out(exported.folder / "README.md", model_card(run, about, fidelity))


def _finish(
    run: "FinishedRun", args: Namespace, exported: "Exported", fidelity: dict[str, Any] | None, screen: Screen
) -> int:
    """Write the card, say what was made and how it is used, and upload it if that was asked."""
    if fidelity is None:
        screen.line("nothing was verified; the export's README.md says so")
    else:
        _write_card(run, args, exported, fidelity)
        if fidelity["fault"]:
            better = WOULD_HOLD.get(args.to, {}).get(args.bits)
            more = f"; --bits {better} keeps more" if better else ""
            screen.line(f"failed: {exported.folder} is marked so in its README.md{more}")
            return 1
    screen.line(f"exported: {exported.folder}")
    if args.upload:
        from .system.hub import upload

        screen.line(f"uploaded: {upload(exported.folder, args.name, args.public)}")
    names = {"folder": shlex.quote(str(exported.folder)), "base": shlex.quote(run.recipe.run.model)}
    screen.line(f"use it: {exported.about.use.format(**names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
