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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipe import PACKAGE, Parser, at_least
from .system.files import user_path
from .system.hub import prepare
from .system.screen import Screen, UserError, exit_code

if TYPE_CHECKING:
    from .formats.card import About
    from .system.finished import FinishedRun
    from .system.load import Loaded

FORMATS = ("mlx", "adapter", "hf", "peft", "gguf", "gguf-lora", "hub")
BITS = ("auto", "4", "5", "6", "8", "16", "32", "mixed")
TEXTS, TEXT_TOKENS = 64, 64  # of each kind, to quantize by; of the student's answer in each
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


@dataclass(frozen=True)
class Exported:
    """A folder that was written, its card's data, and how it is verified: what reads it, and whether its greedy answers
    must be the student's, word for word; `base` is the folder that the base was read from."""

    folder: Path
    about: "About"
    reader: str
    exact: bool
    against: str = ""  # the file in the folder that is read, if it is not the folder
    base: Path = Path()


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: _run(argv))


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


def _run(argv: list[str] | None) -> int:
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


def _write(run: "FinishedRun", args: Namespace, folder: Path, screen: Screen) -> Exported:
    """Write the export beside where it goes, and put it there in one step; the base is loaded for it alone."""
    from .system.finished import load_base

    base = load_base(run, args.trust_remote_code)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        exported = WRITERS[args.to](run, base, args, part, screen)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return replace(exported, folder=folder, base=base.path)


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what will not fit on the disk.

    Raises:
        UserError: less is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + 10**7:
        raise UserError(
            f"the export takes {needed / 1e6:,.0f} MB, but {folder.parent} has {free / 1e6:,.0f} MB free; make room, "
            "or give an --out on another disk"
        )


def _mlx(run: "FinishedRun", base: "Loaded", args: Namespace, folder: Path, screen: Screen) -> Exported:
    from .formats.card import About
    from .formats.fuse import fuse, plan, quantization_of
    from .formats.mlx_folder import write_mlx
    from .method.student import with_adapters

    student = with_adapters(_packed(base), run.folder)
    planned = plan(student, args.bits, args.dtype)
    check_space(folder, planned.bytes_of(student))
    texts = _texts(run, base, screen) if planned.by_gptq else []
    with screen.stage("fusing") as advance:
        model = fuse(student, planned, texts, advance)
    quantization = quantization_of(model)
    write_mlx(base, model, quantization, folder)
    bits = f"{quantization['bits']} bits" if quantization else "not quantized"
    about = About(
        _name(folder),
        "mlx",
        "quantized" if quantization else "finetune",
        f"A model for MLX, {bits}: the adapters of a SafeSteer run, fused into its weights.",
        "mlx_lm.chat --model {folder}",
    )
    return Exported(folder, about, "mlx", exact=args.bits == "32")


def _spelled_out(model: Any, bits: str, dtype: str | None, folder: Path, screen: Screen) -> tuple[Any, Any]:
    """A model without adapters and without quantized weights, 16 or 32 bits each, and their type."""
    from .formats.fuse import fuse, plan

    planned = plan(model, bits, dtype)
    check_space(folder, planned.bytes_of(model))
    with screen.stage("fusing") as advance:
        return fuse(model, planned, [], advance), planned.dtype


def _hf(run: "FinishedRun", base: "Loaded", args: Namespace, folder: Path, screen: Screen) -> Exported:
    from .formats.card import About
    from .formats.hf import check_family, write_hf
    from .method.student import with_adapters

    if args.bits not in ("auto", "16", "32"):
        raise UserError(f"--bits {args.bits} is for --to mlx; give 16 or 32")
    check_family(base.config, "hf")
    student = with_adapters(_packed(base), run.folder)
    model, dtype = _spelled_out(student, "32" if args.bits == "32" else "16", args.dtype, folder, screen)
    write_hf(base, model, dtype, folder)
    about = About(
        _name(folder),
        "transformers",
        "finetune",
        f"A model for transformers, {str(dtype).rpartition('.')[2]}: the adapters of a SafeSteer run, fused into it.",
        "transformers chat {folder}",
    )
    return Exported(folder, about, "transformers", exact=args.bits == "32")


def _adapter(run: "FinishedRun", base: "Loaded", args: Namespace, folder: Path, screen: Screen) -> Exported:
    from .formats.card import About, shown_base
    from .system.model_files import read_object
    from .system.store import write

    _no_bits(args)
    shutil.copyfile(run.folder / "adapters.safetensors", folder / "adapters.safetensors")
    config = read_object(run.folder / "adapter_config.json") | {"model": shown_base(run)[0]}
    write(folder / "adapter_config.json", json.dumps(config, indent=4).encode())
    about = About(
        _name(folder),
        "mlx",
        "adapter",
        "The adapters of a SafeSteer run, for mlx-lm.",
        "mlx_lm.chat --model {base} --adapter-path {folder}",
    )
    return Exported(folder, about, "adapter", exact=True)


def _no_bits(args: Namespace) -> None:
    if args.bits != "auto":
        raise UserError(f"--bits {args.bits} is for fused models; --to {args.to} has none")


def _peft(run: "FinishedRun", base: "Loaded", args: Namespace, folder: Path, screen: Screen) -> Exported:
    from .formats.card import About, shown_base
    from .formats.hf import check_family
    from .formats.peft_adapter import write_peft
    from .method.student import with_adapters

    _no_bits(args)
    check_family(base.config, "peft")
    write_peft(with_adapters(base.model, run.folder), shown_base(run)[0], folder)
    about = About(
        _name(folder),
        "peft",
        "adapter",
        "Adapters for PEFT, to put on the base's unquantized weights.",
        "python -c \"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('{folder}')\"",
    )
    return Exported(folder, about, "peft", exact=True)


def _gguf(run: "FinishedRun", base: "Loaded", args: Namespace, folder: Path, screen: Screen) -> Exported:
    from .formats import gguf
    from .formats.card import About, shown_base
    from .formats.hf import check_family, write_hf
    from .formats.peft_adapter import write_peft
    from .method.student import with_adapters

    if args.bits not in ("auto", "8", "16"):
        raise UserError(f"--bits {args.bits} is for --to mlx; give 8 (q8_0) or 16 (f16)")
    check_family(base.config, args.to)
    converter, kind = gguf.find_converter(args.llama_cpp), "f16" if args.bits == "16" else "q8_0"
    name, adapter = _name(folder).removesuffix(f"-{args.to}"), None
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{args.to}-") as scratch:
        hf, peft = Path(scratch, "hf"), Path(scratch, "peft")
        packed = _packed(base)
        student = with_adapters(packed, run.folder)
        if args.to == "gguf-lora":
            peft.mkdir()
            write_peft(student, shown_base(run)[0], peft)
            name, adapter = name.removesuffix("-safesteer"), f"{name}-adapter.gguf"
        write_hf(base, *_spelled_out(student if adapter is None else packed, "32", None, folder, screen), hf)
        with screen.stage("converting"):
            gguf.convert(converter, [str(hf), "--outtype", kind], folder / f"{name}-{kind}.gguf")
            if adapter is not None:
                script = gguf.find_converter(args.llama_cpp, gguf.LORA_CONVERTER)
                gguf.convert(script, ["--base", str(hf), str(peft), "--outtype", "f32"], folder / adapter)
    (folder / "Modelfile").write_text(gguf.modelfile(base, f"{name}-{kind}.gguf", adapter), "utf-8")
    fused = "the adapters of a SafeSteer run, fused into its weights."
    beside = "the base, and the adapter of a SafeSteer run beside it."
    about = About(
        _name(folder),
        "gguf",
        "quantized" if adapter is None else "adapter",
        f"A model for llama.cpp, LM Studio and Ollama, {kind}: {fused if adapter is None else beside}",
        f"ollama create {_name(folder).lower()} -f {{folder}}/Modelfile",
    )
    return Exported(folder, about, "llama.cpp", exact=False, against="Modelfile")


WRITERS = {"mlx": _mlx, "adapter": _adapter, "hf": _hf, "peft": _peft, "gguf": _gguf, "gguf-lora": _gguf}


def _name(folder: Path) -> str:
    """What a folder that is being written will be called."""
    return folder.name.removeprefix(".").removesuffix(".part")


def _packed(base: "Loaded") -> Any:
    """The base as it is on disk: where it is computed on dequantized weights, it is read once more."""
    if not base.dequantized_for_speed:
        return base.model
    from mlx_lm.utils import load_model

    model, _ = load_model(base.path)
    model.freeze()
    return model


def _texts(run: "FinishedRun", base: "Loaded", screen: Screen) -> list[list[int]]:
    """Prompts of training, with the student's own answers: what its layers are to compute well."""
    from .method.prompts import instructions_to_train_on, prompt_sets, render_all
    from .method.rollout import Sampling, generate
    from .method.run import batch_size
    from .method.student import with_adapters

    sets = prompt_sets(run.recipe)
    items = [item for harmful in (True, False) for item in instructions_to_train_on(run.recipe, sets, harmful)[:TEXTS]]
    rows = render_all(base.tokenizer, items)
    size = batch_size(base, run.recipe.run.generation_batch_size, screen)
    sampling = Sampling(base.eos_ids, TEXT_TOKENS, batch_size=size)
    with screen.stage("answering training prompts, to quantize by") as advance:
        answers = generate(with_adapters(base.model, run.folder), rows, sampling, progress=advance)
    return [[*row, *answer.ids] for row, answer in zip(rows, answers, strict=True)]


def _verified(run: "FinishedRun", args: Namespace, exported: Exported) -> dict[str, Any]:
    """What the export answers, asked in a process of its own, to which this one leaves the memory.

    Raises:
        UserError: it cannot be asked.
    """
    import mlx.core as mx

    mx.clear_cache()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "fidelity.json"
        # -P: no json.py of the working folder is run, as it is not where export itself is the console script.
        command = [sys.executable, "-P", "-m", "safesteer_mlx.verify", str(run.folder), "--with", exported.reader]
        command += ["--against", str(exported.folder / exported.against), "--test-prompts", str(args.verify)]
        command += ["--out", str(out), "--model", str(exported.base), "--offline"]
        command += ["--exact"] if exported.exact else []
        command += ["--trust-remote-code"] if args.trust_remote_code else []
        path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
        code = subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": path}).returncode
        if code not in (0, 1) or not out.is_file():
            raise UserError(
                f"{exported.folder} was written, but could not be verified (see above); mend that and ask again: "
                f"safesteer-mlx verify {run.folder} --against {exported.folder}"
            )
        return json.loads(out.read_text("utf-8"))


def _write_card(run: "FinishedRun", args: Namespace, exported: Exported, fidelity: dict[str, Any] | None) -> None:
    from .formats.card import model_card, shown_base
    from .system.hub import licence
    from .system.store import write

    base, on_hub = shown_base(run)
    about = replace(exported.about, licence=licence(base) if args.upload and on_hub else None)
    card = exported.folder / "README.md"
    write(card, model_card(run, about, fidelity).encode())
    card.chmod(0o644)  # for others to read, as all else in the folder


def _finish(
    run: "FinishedRun", args: Namespace, exported: Exported, fidelity: dict[str, Any] | None, screen: Screen
) -> int:
    """Write the card, say what was made and how it is used, and upload it if that was asked."""
    if fidelity is not None:
        _write_card(run, args, exported, fidelity)
    if fidelity is not None and fidelity["fault"]:
        better = WOULD_HOLD.get(args.to, {}).get(args.bits)
        more = f"; --bits {better} keeps more" if better else ""
        screen.line(f"failed: {exported.folder} is marked so in its README.md{more}")
        return 1
    if fidelity is None:
        screen.line("nothing was verified; the export's README.md says so")
    screen.line(f"exported: {exported.folder}")
    if args.upload:
        from .system.hub import upload

        screen.line(f"uploaded: {upload(exported.folder, args.name, args.public)}")
    names = {"folder": shlex.quote(str(exported.folder)), "base": shlex.quote(run.recipe.run.model)}
    screen.line(f"use it: {exported.about.use.format(**names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
