"""A model as a GGUF file for llama.cpp, with a Modelfile for Ollama, by llama.cpp's own converter.

Run as a module it is the process that the converter works in: `… CONVERTER ARGUMENT …`.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..system.files import user_path
from ..system.load import Loaded
from ..system.screen import UserError

CONVERTER = "convert_hf_to_gguf.py"
LORA_CONVERTER = "convert_lora_to_gguf.py"

# The converter knows a byte-level tokenizer by what it makes of one text, so it refuses one that splits in a known way
# but was trained on something else. What splits exactly as these do is read by llama.cpp as these are.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_KNOWN_SPLITS = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
}


def find_converter(given: Path | None, name: str = CONVERTER) -> Path:
    """llama.cpp's script of this name: in the folder that was given, or among the programs. Else a UserError."""
    if given is not None:
        path = user_path(given) / name
        if not path.is_file():
            raise UserError(f"--llama-cpp {given} holds no {name}; give the folder of llama.cpp's source")
        return path
    if program := shutil.which(name):
        return Path(program).resolve()
    raise UserError(f"--to gguf needs llama.cpp's {name}; say with --llama-cpp where its source is (docs/export.md)")


def convert(script: Path, arguments: list[str], out: Path) -> None:
    """Run one of llama.cpp's converters, in a process of its own; a UserError with its last line if it failed."""
    command = [sys.executable, "-m", "safesteer_mlx.formats.gguf", str(script), *arguments, "--outfile", str(out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if result.returncode or not out.is_file():
        lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()] or ["it said nothing"]
        raise UserError(f"llama.cpp's converter cannot convert this model ({lines[-1].strip()[:200]}); give --to mlx")


def pre_tokenizer(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer.json splits a text, if it is one of the known ways exactly."""
    own = tokenizer.get("pre_tokenizer") or {}
    parts = own.get("pretokenizers", [own]) if isinstance(own, dict) else []
    splits = [part.get("pattern", {}).get("Regex") for part in parts if part.get("type") == "Split"]
    levels = [part for part in parts if part.get("type") == "ByteLevel"]
    if len(levels) != 1 or len(splits) + 1 != len(parts) or levels[0].get("add_prefix_space"):
        return None
    if not splits and levels[0].get("use_regex", True):
        return "gpt-2"
    return _KNOWN_SPLITS.get(splits[0]) if len(splits) == 1 else None


def modelfile(base: Loaded, gguf: str, adapter: str | None = None) -> str:
    """Ollama's Modelfile: the file, the chat template as far as Ollama's form of it goes, and where an answer ends.

    A turn's header and end are read off the model's own template, without the token that begins every text: Ollama
    puts that before the prompt itself, as the GGUF says.
    """
    bos, begins = base.tokenizer.bos_token, base.tokenizer.encode("a")[:1] == [base.tokenizer.bos_token_id]

    def render(turns: list[dict[str, str]], **options: Any) -> str:
        text = base.tokenizer.apply_chat_template(turns, tokenize=False, **options)
        return text.removeprefix(bos) if begins else text

    user, reply = "⟦user⟧", "⟦reply⟧"
    turn = [{"role": "user", "content": user}]
    prompt = render(turn, add_generation_prompt=True)
    answered = render([*turn, {"role": "assistant", "content": reply}])
    before, _, after = prompt.partition(user)
    end = answered.rpartition(reply)[2]
    template = f"{before}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}{end}"
    try:
        guarded = render([{"role": "system", "content": "⟦system⟧"}, *turn], add_generation_prompt=True)
    except Exception:  # many templates refuse a system turn
        guarded = ""
    head, mark, tail = guarded.partition("⟦system⟧")
    if mark and tail.endswith(prompt[len(before) :]):
        middle = tail.partition(user)[0]
        template = (
            f"{{{{ if .System }}}}{head}{{{{ .System }}}}{middle}{{{{ else }}}}{before}{{{{ end }}}}"
            f"{template[len(before) :]}"
        )
    lines = [f"FROM ./{gguf}", *([] if adapter is None else [f"ADAPTER ./{adapter}"]), f'TEMPLATE """{template}"""']
    pieces = [base.tokenizer.convert_ids_to_tokens(i) for i in base.eos_ids]
    stops = [f"PARAMETER stop {json.dumps(piece, ensure_ascii=False)}" for piece in pieces]
    return "\n".join([*lines, *stops]) + "\n"


def _convert_here(script: str, arguments: list[str]) -> None:
    """Run the converter in this process, its check of the tokenizer widened."""
    sys.path.insert(0, str(Path(script).parent))
    try:
        from conversion.base import TextModel  # type: ignore[import-not-found]
    except ImportError:
        pass  # an older llama.cpp, all in one file
    else:
        own = TextModel.get_vocab_base_pre

        def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
            try:
                return own(self, tokenizer)
            except NotImplementedError:
                path = Path(self.dir_model) / "tokenizer.json"
                name = pre_tokenizer(json.loads(path.read_text("utf-8"))) if path.is_file() else None
                if name is None:
                    raise
                return name

        TextModel.get_vocab_base_pre = get_vocab_base_pre
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    _convert_here(sys.argv[1], sys.argv[2:])
