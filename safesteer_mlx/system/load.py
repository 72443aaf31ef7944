"""A model and its tokenizer, from a Hub id or a folder, through mlx-lm."""

import copy
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..recipe import RunSettings
from .chat_template import check_template, rendered_elsewhere
from .files import user_path
from .hub import headers, is_offline, local_folder, model_folder
from .model_files import (
    Tensor,
    check_config,
    check_ends,
    check_loaded,
    check_model_folder,
    check_weights,
    read_object,
    vocabulary,
    with_sizes,
    write_header,
)
from .screen import UserError
from .shape import in_float32

# What stands beside the weights and decides what a model reads, computes and ends with.
BESIDE = ("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
BESIDE += ("tokenizer*", "vocab*", "chat_template*", "*.jinja", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class Loaded:
    """A frozen base model: `path` the folder it came from, `quantized` whether its weights are there, `widened` whether
    it is computed in float32 though they are kept in less."""

    name: str
    path: Path
    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    quantized: bool
    widened: bool
    thinks: bool  # it may, before it answers, as its template is switched
    trusted: bool = False  # code from its repository may run
    alike: bool = False  # without a thought: its answers begin alike, and tell further on what they do

    @property
    def turns_late(self) -> bool:
        """How an answer begins does not tell what it does."""
        return self.thinks or self.alike

    @property
    def vocabulary(self) -> int:
        """V of the logits, from the configuration."""
        return vocabulary(self.name, self.config)

    @property
    def eos_ids(self) -> list[int]:
        """Ids that end the model's turn."""
        return sorted(self.tokenizer.eos_token_ids)

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over the names and bytes of the weight files."""
        return _hash_of(self.path, ["model*.safetensors"])

    @cached_property
    def settings_hash(self) -> str:
        """SHA-256 over the names and bytes of the configuration, the tokenizer's files and the chat template."""
        return _hash_of(self.path, BESIDE)


def _hash_of(folder: Path, patterns: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}):
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            hashlib.file_digest(handle, lambda: digest)
    return digest.hexdigest()


def find(name: str, revision: str | None = None, with_code: bool = False) -> Path:
    """The local folder of a model, downloaded from the Hub if `name` is not a folder.

    Raises:
        UserError: no such folder or repository, no access, or no configuration in it.
    """
    path = user_path(name)
    if not path.exists():
        if _is_path(name):
            raise UserError(f"model folder {name} does not exist; give an existing folder or a Hub id like org/name")
        path = model_folder(name, revision, with_code)
    elif revision is not None:
        raise UserError(f"--revision {revision} is for models of the Hub, but {name} is a folder here; leave it out")
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json; give the folder of an MLX or Hugging Face model")
    return path


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~"))


def config_and_headers(name: str, revision: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A model's configuration, with the sizes that mlx-lm fills in, and its tensors' types and shapes; of a model on
    the Hub, no weights are fetched. A UserError as `find`, or if a file cannot be believed."""
    if user_path(name).exists() or _is_path(name) or is_offline():
        path = find(name, revision)
        config, tensors = read_object(path / "config.json"), check_weights(path)
    else:
        config, entries = headers(name, revision)
        tensors = {tensor: Tensor(dtype, shape) for tensor, (dtype, shape) in entries.items()}
    check_config(name, config, tensors)
    return with_sizes(config), tensors


def load(
    name: str, trust_remote_code: bool = False, thinking: str = "auto", revision: str | None = None, chat: bool = True
) -> Loaded:
    """Load and freeze a model. No code from its repository runs unless `trust_remote_code` says so.

    `thinking` sets the switch of the chat template, wherever the tokenizer renders it; auto leaves it as mlx-lm does.
    `chat` is False for a judge that is handed plain text: it needs no chat template.

    On the CPU backend a small model is computed in float32 (`in_float32`), on Metal as it is kept.

    Raises:
        UserError: as `find`, `check_model_folder` and `read_tokenizer`, or the model is of an unknown architecture,
            has weights that do not fit it, computes nothing, or has no end-of-turn token or no switch for thinking.
    """
    from mlx_lm.utils import load_model

    path = find(name, revision, trust_remote_code)
    check_model_folder(path, trust_remote_code)
    with _explained(name, "weights"):
        # Lazily: nothing is read or computed before the weights' shapes and types are checked.
        model, config = load_model(path, lazy=True, trust_remote_code=trust_remote_code)
    tokenizer = read_tokenizer(name, path, config, trust_remote_code, chat)
    if not tokenizer.eos_token_ids:
        raise UserError(f"model {name} names no end-of-turn token; set eos_token_id in its config.json")
    if thinking != "auto":
        _check_switch(tokenizer)
    tokenizer = asked_as(tokenizer, thinking)
    check_loaded(name, model, tokenizer, vocabulary(name, config))
    quantized = any(hasattr(module, "bits") for _, module in model.named_modules())
    model, widened = _as_computed(model)
    mx.eval(model.parameters())
    model.eval()
    try:
        model.freeze()
    except AttributeError as error:  # recurrent_gemma, whose class forgets to set itself up
        raise UserError(
            f"model {name} is of an architecture that mlx-lm cannot freeze ({error}); choose another"
        ) from None
    with _explained(name, "configuration"):
        _compute(model)
    thinks = tokenizer.has_thinking and thinking != "off"
    return Loaded(name, path, model, tokenizer, config, quantized, widened, thinks, trust_remote_code)


def _as_computed(model: nn.Module) -> tuple[nn.Module, bool]:
    """The model as it is computed with on this machine, and whether that is in float32 though it was kept in less."""
    from mlx_lm.utils import dequantize_model

    bits = {name: module.bits for name, module in model.named_modules() if hasattr(module, "bits")}
    n_weights, less = 0, bool(bits)
    weights: Any = tree_flatten(model.parameters())  # of its two types this one
    for path, weight in weights:
        module, _, name = path.rpartition(".")
        if module not in bits:
            n_weights, less = n_weights + weight.size, less or weight.dtype in (mx.float16, mx.bfloat16)
        elif name == "weight":
            n_weights += weight.size * 32 // bits[module]
    if not less or not in_float32(n_weights):
        return model, False
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    return model, True


def load_unread(
    name: str, config: dict[str, Any], tensors: dict[str, Tensor], trust_remote_code: bool = False
) -> nn.Module:
    """The model of a configuration and headers as `load` makes it, whose weights are not read and need not be here;
    whether they fit is left to `load`.

    Raises:
        UserError: as `load`, of its architecture.
    """
    from mlx_lm.utils import load_model

    with tempfile.TemporaryDirectory() as scratch, _explained(name, "weights"):
        path = user_path(name)
        if not path.exists():  # on the Hub: a file that is all hole behind its header
            path = Path(scratch)
            (path / "config.json").write_text(json.dumps(config))
            write_header(path / "model.safetensors", tensors)
        model, _ = load_model(path, lazy=True, strict=False, trust_remote_code=trust_remote_code)
    return _as_computed(model)[0]


def may_think(settings: RunSettings, config: dict[str, Any]) -> bool:
    """Whether the model of a run may think before it answers: as `--thinking` says, else by its tokenizer, if that is
    on this machine; no weights are read."""
    if settings.thinking != "auto" or (folder := local_folder(settings.model, settings.revision)) is None:
        return settings.thinking == "on"
    try:
        tokenizer = read_tokenizer(settings.model, folder, config, settings.trust_remote_code)
    except UserError:  # which is told when the model is loaded
        return False
    _read_channels(tokenizer)
    return tokenizer.has_thinking


def read_tokenizer(
    name: str, folder: Path, config: dict[str, Any], trust_remote_code: bool = False, chat: bool = True
) -> Any:
    """The tokenizer of a checked folder, whose ids all have an embedding and whose template is known to end.

    Raises:
        UserError: it cannot be loaded, has no chat template (if `chat`), or as `check_template`.
    """
    from mlx_lm.utils import load_tokenizer

    size, ends = vocabulary(name, config), config.get("eos_token_id")
    if ends is not None:
        check_ends(name, ends, size)
    options = {"trust_remote_code": trust_remote_code}
    with _explained(name, "tokenizer"):
        tokenizer = _panics_unseen(lambda: load_tokenizer(folder, options, eos_token_ids=ends))
    if chat and not tokenizer.has_chat_template:
        raise UserError(
            f"model {name} has no chat template; choose its instruct version, or, for a judge, a --judge-template with "
            "[raw]"
        )
    if chat and tokenizer.chat_template is not None:
        with _explained(name, "chat template"):
            template = tokenizer.get_chat_template()
        check_template(name, template)
    return _guarded(name, tokenizer, size)


def find_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False, chat: bool = True
) -> tuple[Any, int]:
    """The tokenizer of a model that is not loaded, and its V. Raises as `find`, `check_model_folder` and
    `read_tokenizer`."""
    path = find(name, revision, trust_remote_code)
    check_model_folder(path, trust_remote_code)
    config = with_sizes(read_object(path / "config.json"))
    return read_tokenizer(name, path, config, trust_remote_code, chat), vocabulary(name, config)


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """A stranger's files can make mlx-lm and transformers raise anything: it becomes one sentence."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # tokenizers, whose panics are no Exception, too
        sentence = f"{what}: {_reason(error)}; is it a text model that mlx-lm supports?"
        raise UserError(f"model {name} cannot be loaded, {sentence}") from None


def _reason(error: BaseException) -> str:
    """What it says, in a line that is not too long."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def _panics_unseen(call: Callable[[], Any]) -> Any:
    """What a call gives; what a library in Rust writes about its own panic, before it raises it, is not shown. All else
    that is written meanwhile is, afterwards.

    No context manager: a Ctrl-C while one is entered or left would leave the standard error hidden."""
    try:
        shown = os.dup(2)
    except OSError:  # closed: nobody sees anything
        return call()
    with tempfile.TemporaryFile() as written:
        sys.stderr.flush()
        try:
            os.dup2(written.fileno(), 2)
            return call()
        except BaseException as error:
            if type(error).__name__ == "PanicException":
                written.truncate(0)
            raise
        finally:
            os.dup2(shown, 2)
            os.close(shown)
            written.seek(0)
            while words := written.read(1 << 16):
                os.write(2, words)


def _compute(model: nn.Module) -> None:
    """Read two tokens, as sampling does: what a configuration says wrongly is often used only here. A ValueError if
    what comes out is no number."""
    from mlx_lm.models.cache import make_prompt_cache

    if mx.isnan(model(mx.zeros((1, 2), mx.int32), cache=make_prompt_cache(model))).any():
        raise ValueError("it computes no numbers (NaN)")


def _guarded(name: str, tokenizer: Any, size: int) -> Any:
    """A view of a tokenizer that gives no id beyond the embedding's rows, where MLX would read other memory, and
    whose chat template fails in one sentence.

    Added tokens may have such ids (Gemma 3's pictures, the padding of Llama 2's children), as long as nothing that
    the model reads holds them; so each text is looked at, not the list of tokens.
    """

    def checked(ids: Any) -> Any:
        if isinstance(ids, list) and max(ids, default=0) >= size:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"a text or the chat template holds {token!r:.80} (id {max(ids)}), for which model {name} has no "
                f"embedding among its {size}; take it out, or choose another model"
            )
        return ids

    def encode(*args: Any, **options: Any) -> Any:
        with _explained(name, "tokenizer"):
            return checked(_panics_unseen(lambda: tokenizer.encode(*args, **options)))

    def apply_chat_template(turns: Any, *args: Any, **options: Any) -> Any:
        try:
            with rendered_elsewhere(name):
                return checked(_panics_unseen(lambda: tokenizer.apply_chat_template(turns, *args, **options)))
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # as in _explained
            system = turns[0]["role"] == "system"
            what = "a system turn" if system else "a single user turn" if len(turns) == 1 else "several turns"
            more = ", or another --teacher" if system else ""
            raise UserError(
                f"the chat template refuses {what} ({_reason(error)}); choose a model whose template takes it{more}"
            ) from None

    view = copy.copy(tokenizer)
    vars(view).update(encode=encode, apply_chat_template=apply_chat_template)
    return view


def _read_channels(tokenizer: Any) -> None:
    """Have a tokenizer tell gpt-oss's thinking, which mlx-lm does not: it stands in a channel before the final one."""
    if tokenizer.has_thinking or not {"<|channel|>", "<|message|>"} <= tokenizer.get_vocab().keys():
        return
    for which, channel in (("start", "analysis"), ("end", "final")):
        header = f"<|channel|>{channel}<|message|>"
        setattr(tokenizer, f"_think_{which}", header)
        setattr(tokenizer, f"_think_{which}_tokens", tuple(tokenizer.encode(header, add_special_tokens=False)))


def asked_as(tokenizer: Any, thinking: str) -> Any:
    """A tokenizer that tells a model's thinking, and whose chat template thinks, or does not, as `--thinking` says."""
    _read_channels(tokenizer)
    if thinking == "auto":
        return tokenizer
    view = copy.copy(tokenizer)
    view.apply_chat_template = partial(tokenizer.apply_chat_template, enable_thinking=thinking == "on")
    return view


def _check_switch(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "a"}]
    on, off = (
        tokenizer.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=switch)
        for switch in (True, False)
    )
    if on == off:
        raise UserError("the chat template has no thinking switch; leave --thinking at auto")
