"""A run's student, written as each of the things that `export` offers; readers.py asks them afterwards."""

import json
import shutil
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model

from ..method.prompts import instructions_to_train_on, prompt_sets, render_all
from ..method.rollout import Sampling, generate
from ..method.run import batch_size
from ..method.student import with_adapters
from ..system.finished import FinishedRun
from ..system.load import Loaded
from ..system.memory import this_machine
from ..system.model_files import read_object
from ..system.screen import Screen, UserError
from . import gguf
from .card import About, shown_base
from .folders import check_family, write_hf, write_mlx, write_peft
from .fuse import fuse, plan, quantization_of

TEXTS, TEXT_TOKENS = 64, 64  # of each kind, to quantize by; of the student's answer in each


@dataclass(frozen=True)
class Exported:
    """A folder that was written, its card's data, and how it is verified: what reads it, whether its greedy answers
    must be the student's, word for word, and what is read; `base` is the folder that the base was read from."""

    folder: Path
    about: About
    reader: str
    exact: bool
    against: Path
    base: Path


@dataclass(frozen=True)
class Job:
    """An export: of which run, what the command line asks for, the folder to write into and where that will go."""

    run: FinishedRun
    base: Loaded
    args: Namespace
    part: Path
    folder: Path
    screen: Screen

    def fused(self, model: nn.Module, bits: str, dtype: str | None = None) -> tuple[nn.Module, Any]:
        """A model without adapters, as `fuse.plan` has it, and the type of its plain weights; a UserError if it will
        not fit on the disk, or in memory beside the base."""
        planned = plan(model, bits, dtype)
        needed, free = planned.bytes_of(model), shutil.disk_usage(self.part).free
        if free < needed + 10**7:
            raise UserError(
                f"the export takes {needed / 1e6:,.0f} MB, but {self.part.parent} has {free / 1e6:,.0f} MB free; make "
                "room, or give an --out on another disk"
            )
        held, memory = mx.get_active_memory() + planned.new_bytes(model), this_machine().memory
        if held > memory:
            all_of_it = self.args.to != "mlx" or self.args.bits not in ("auto", "mixed")
            remedy = "give --to mlx without --bits, or take" if all_of_it else "take"
            raise UserError(
                f"the export takes {held / 1e9:,.1f} GB of memory, and this machine has {memory / 1e9:,.1f} GB for it; "
                f"{remedy} a machine with more"
            )
        texts = texts_to_quantize_by(self.run, self.base, self.screen) if planned.by_gptq else []
        with self.screen.stage("fusing") as advance:
            return fuse(model, planned, texts, advance), planned.dtype

    def exported(
        self, library: str, relation: str, what: str, use: str, reader: str, exact: bool, against: str = ""
    ) -> Exported:
        """What was written, in words as `About` has them."""
        about = About(self.folder.name, library, relation, what, use)
        return Exported(self.folder, about, reader, exact, self.folder / against, self.base.path)


def packed(base: Loaded) -> nn.Module:
    """The base as it is on disk: where it is computed in float32 instead, it is read once more."""
    if not base.widened:
        return base.model
    model, _ = load_model(base.path, trust_remote_code=base.trusted)
    model.freeze()
    return model


def texts_to_quantize_by(run: FinishedRun, base: Loaded, screen: Screen) -> list[list[int]]:
    """Prompts of training, with the student's own answers: what its layers are to compute well."""
    sets = prompt_sets(run.recipe)
    items = [item for harmful in (True, False) for item in instructions_to_train_on(run.recipe, sets, harmful)[:TEXTS]]
    rows = render_all(base.tokenizer, items)
    size = batch_size(base, run.recipe.run.generation_batch_size, screen)
    sampling = Sampling(base.eos_ids, TEXT_TOKENS, batch_size=size)
    with screen.stage("answering training prompts, to quantize by") as advance:
        answers = generate(with_adapters(base.model, run.folder), rows, sampling, progress=advance)
    return [[*row, *answer.ids] for row, answer in zip(rows, answers, strict=True)]


def _mlx(job: Job) -> Exported:
    model, _ = job.fused(with_adapters(packed(job.base), job.run.folder), job.args.bits, job.args.dtype)
    quantization = quantization_of(model)
    write_mlx(job.base, model, job.part, quantization and {"quantization": quantization})
    bits = f"{quantization['bits']} bits" if quantization else "not quantized"
    relation = "quantized" if quantization else "finetune"
    what = f"A model for MLX, {bits}: the adapters of a SafeSteer run, fused into its weights."
    use = _asked_by_mlx_lm(job, "--model {folder}")
    return job.exported("mlx", relation, what, use, "mlx", exact=job.args.bits == "32")


def _asked_by_mlx_lm(job: Job, flags: str) -> str:
    """mlx-lm's command, with the run's switch of the chat template: chat takes none, generate does."""
    if (thinking := job.run.recipe.run.thinking) == "auto":
        return f"mlx_lm.chat {flags}"
    switch = f'{{{{"enable_thinking": {json.dumps(thinking == "on")}}}}}'  # doubled braces, since `use` is a format
    return f"mlx_lm.generate {flags} --chat-template-config '{switch}' --prompt Hello"


def _hf(job: Job) -> Exported:
    if job.args.bits not in ("auto", "16", "32"):
        raise UserError(f"--bits {job.args.bits} is for --to mlx; give 16 or 32")
    check_family(job.base.config, "hf")
    exact = job.args.bits == "32"
    student = with_adapters(packed(job.base), job.run.folder)
    model, dtype = job.fused(student, "32" if exact else "16", job.args.dtype)
    write_hf(job.base, model, dtype, job.part)
    kind = str(dtype).rpartition(".")[2]
    what = f"A model for transformers, {kind}: the adapters of a SafeSteer run, fused into it."
    return job.exported("transformers", "finetune", what, "transformers chat {folder}", "transformers", exact)


def _adapter(job: Job) -> Exported:
    _no_bits(job)
    shutil.copyfile(job.run.folder / "adapters.safetensors", job.part / "adapters.safetensors")
    config = read_object(job.run.folder / "adapter_config.json") | {"model": shown_base(job.run)[0]}
    (job.part / "adapter_config.json").write_text(json.dumps(config, indent=4), "utf-8")
    use = _asked_by_mlx_lm(job, "--model {base} --adapter-path {folder}")
    return job.exported("mlx", "adapter", "The adapters of a SafeSteer run, for mlx-lm.", use, "adapter", exact=True)


def _no_bits(job: Job) -> None:
    if job.args.bits != "auto":
        raise UserError(f"--bits {job.args.bits} is for fused models; --to {job.args.to} has none")


def _peft(job: Job) -> Exported:
    _no_bits(job)
    check_family(job.base.config, "peft")
    shown, on_hub = shown_base(job.run)
    name = shown if on_hub and not job.base.quantized else None  # else nothing that PEFT can fetch by itself
    write_peft(with_adapters(job.base.model, job.run.folder), name, job.part)
    use = "python -c \"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('{folder}')\""
    if name is None:
        base = "UNQUANTIZED_BASE" if job.base.quantized else "{base}"
        use = (
            'python -c "from peft import PeftModel as P; from transformers import AutoModelForCausalLM as M; '
            f"P.from_pretrained(M.from_pretrained('{base}'), '{{folder}}')\""
        )
        use += "  # put in its name: transformers reads no weights that MLX quantized" if job.base.quantized else ""
    what = "Adapters for PEFT, to put on the base's unquantized weights."
    return job.exported("peft", "adapter", what, use, "peft", exact=True)


def _gguf(job: Job) -> Exported:
    args, name, adapter = job.args, job.folder.name.removesuffix(f"-{job.args.to}"), None
    if args.bits not in ("auto", "8", "16"):
        raise UserError(f"--bits {args.bits} is for --to mlx; give 8 (q8_0) or 16 (f16)")
    check_family(job.base.config, args.to)
    converter, kind = gguf.find_converter(args.llama_cpp), "f16" if args.bits == "16" else "q8_0"
    fused, relation = "the adapters of a SafeSteer run, fused into its weights.", "quantized"
    with tempfile.TemporaryDirectory(dir=job.folder.parent, prefix=f".{args.to}-") as scratch:
        hf, peft = Path(scratch, "hf"), Path(scratch, "peft")
        base = packed(job.base)
        model = with_adapters(base, job.run.folder)
        if args.to == "gguf-lora":
            peft.mkdir()
            write_peft(model, None, peft)
            name, adapter, model = name.removesuffix("-safesteer"), f"{name}-adapter.gguf", base
            fused, relation = "the base, and the adapter of a SafeSteer run beside it.", "adapter"
        write_hf(job.base, *job.fused(model, "32"), hf)
        with job.screen.stage("converting"):
            gguf.convert(converter, [str(hf), "--outtype", kind], job.part / f"{name}-{kind}.gguf")
            if adapter is not None:
                script = gguf.find_converter(args.llama_cpp, gguf.LORA_CONVERTER)
                gguf.convert(script, ["--base", str(hf), str(peft), "--outtype", "f32"], job.part / adapter)
    (job.part / "Modelfile").write_text(gguf.modelfile(job.base, f"{name}-{kind}.gguf", adapter), "utf-8")
    what = f"A model for llama.cpp, LM Studio and Ollama, {kind}: {fused}"
    use = f"ollama create {job.folder.name.lower()} -f {{folder}}/Modelfile"
    return job.exported("gguf", relation, what, use, "llama.cpp", exact=False, against="Modelfile")


WRITERS = {"mlx": _mlx, "adapter": _adapter, "hf": _hf, "peft": _peft, "gguf": _gguf, "gguf-lora": _gguf}
