"""A model from a stranger: what its files claim is checked before anything else reads them.

mlx-lm opens `model*.safetensors` and ignores the index; MLX believes a file's header and reads weights only
when they are used. So headers are read here first, by the format's own library, which believes none.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .files import check_regular
from .screen import UserError

# What MLX can read, and its bytes a value.
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4}
_BYTES |= {"U64": 8, "I64": 8, "C64": 8, "F8_E4M3": 1}
_MOST_JSON = 200_000_000  # bytes; large tokenizers take some 30 MB
_MOST_NAMED = 3  # names in one sentence
_MOST_DIMENSIONS = 16  # of a tensor

_READ = (".json", ".jinja", ".safetensors", ".model", ".tiktoken", ".txt", ".jsonl", ".py")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tiktoken.model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".h5", ".gguf")


@dataclass(frozen=True)
class Tensor:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


def bytes_of(tensor: Tensor) -> int:
    """The bytes of its data."""
    return math.prod(tensor.shape) * _BYTES[tensor.dtype]


def check_model_folder(folder: Path, trust_remote_code: bool = False) -> dict[str, Tensor]:
    """Check a model's folder without running, loading or unpickling anything of it; its tensors by name.

    Raises:
        UserError: files that lead out of the folder, code that wants to run, no or malformed weights, an
            index or a configuration that contradicts them, or no tokenizer.
    """
    _check_links(folder)
    config = read_object(folder / "config.json")
    if not trust_remote_code:
        _check_code(folder, config)
    tensors = check_weights(folder)
    _check_config(folder / "config.json", config, tensors)
    if not any((folder / name).is_file() for name in _TOKENIZERS) and not any(folder.glob("*.tiktoken")):
        raise UserError(f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model); fetch the whole model")
    return tensors


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: missing, too large, not JSON or not an object.
    """
    try:
        if path.stat().st_size > _MOST_JSON:
            raise UserError(f"{path} is {path.stat().st_size} bytes long, far too much for JSON; fetch the model again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); fetch the model again") from None
    except UserError:
        raise
    except (ValueError, RecursionError):  # broken JSON, broken UTF-8, numbers or brackets without end
        raise UserError(f"{path} is not JSON; fetch the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object; fetch the model again")
    return content


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors that a safetensors file holds, after checking that header and file agree to the byte.

    Raises:
        UserError: no such file, truncated, or a header that cannot be believed.
    """

    def wrong(what: str) -> UserError:
        return UserError(f"{path} {what}; {remedy}")

    remedy = "fetch or make the file again"
    check_regular(path, str(path), remedy)
    try:
        # Opened by Python too, whose errors name their reason; of the values, none is read.
        with path.open("rb"), safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it has no __iter__
            tensors = {name: Tensor(its.get_dtype(), tuple(its.get_shape())) for name, its in slices.items()}
    except OSError as error:
        raise wrong(f"cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise wrong(f"of {path.stat().st_size} bytes is truncated or no safetensors file ({reason:.200})") from None
    if not tensors:
        raise wrong("holds no tensor")
    for name, tensor in tensors.items():
        if len(tensor.shape) > _MOST_DIMENSIONS:
            raise wrong(f"describes tensor {name!r:.80} in a way that is no safetensors")
        if tensor.dtype not in _BYTES:
            raise wrong(f"holds {name!r:.80} as {tensor.dtype!r:.20}, which MLX does not read")
    return tensors


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {tensor.dtype}"


def _check_links(folder: Path) -> None:
    """Links may lead about the folder and, in the Hub's cache, to the blobs of the same repository."""
    real = folder.resolve()
    rooms = [real]
    if real.parent.name == "snapshots":
        rooms.append(real.parent.parent / "blobs")
    for path in folder.iterdir():
        if path.is_symlink() and path.suffix in _READ:
            try:
                target = path.resolve(strict=True)
            except (OSError, RuntimeError):  # nothing there, or a circle
                raise UserError(f"{path} is a link that leads nowhere; fetch the model again") from None
            if not any(target.is_relative_to(room) for room in rooms):
                raise UserError(f"{path} is a link out of the model's folder; put the file itself in its place")


def _check_code(folder: Path, config: dict[str, Any]) -> None:
    """Neither the model nor its tokenizer may ask for code of its own."""
    configs = {"config.json": config}
    if (folder / "tokenizer_config.json").exists():
        configs["tokenizer_config.json"] = read_object(folder / "tokenizer_config.json")
    for file, content in configs.items():
        for key in ("model_file", "auto_map"):
            if content.get(key):
                raise UserError(
                    f"model {folder} wants to run code of its own ({key} = {content[key]!r:.100} in {file}); "
                    "if you trust it, pass --trust-remote-code, else choose another model"
                )


def check_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of all weight files; the index, if there is one, must say the same."""
    files = sorted(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    index_map: dict[str, Any] = {}
    if index.exists():
        index_map = read_object(index).get("weight_map", {})
        if not isinstance(index_map, dict) or not all(isinstance(file, str) for file in index_map.values()):
            raise UserError(f"{index} has no weight_map of tensor to file; fetch the model again")
        for file in sorted(set(index_map.values())):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(
                    f"{index} names {file!r:.100}, no safetensors file of its folder; fetch the model again"
                )
            if not (folder / file).is_file():
                raise UserError(f"{folder} lacks {file}, which its index names; fetch the model again")
    if not files:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        holds = f"holds weights as {pickles[0]}, which are not read, but no" if pickles else "holds no"
        raise UserError(f"{folder} {holds} model*.safetensors; fetch them or convert the model with mlx_lm.convert")
    tensors: dict[str, Tensor] = {}
    for file in files:
        its = read_header(file)
        if twice := sorted(tensors.keys() & its.keys()):
            raise UserError(f"{folder} holds {twice[0]!r:.80} in two files; keep one set of weights there")
        if missing := sorted(name for name, place in index_map.items() if place == file.name and name not in its):
            raise UserError(f"{file} lacks {some(missing)}, which the index places there; fetch the model again")
        tensors |= its
    if missing := sorted(index_map.keys() - tensors.keys()):
        raise UserError(f"{index} names {some(missing)} outside model*.safetensors; fetch the model again")
    return tensors


def _check_config(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind.replace("-", "_").replace(".", "_").isidentifier():
        raise UserError(
            f"{path} names no architecture (model_type = {kind!r:.80}); choose a model that mlx-lm supports"
        )
    text = config.get("text_config") or config
    if not isinstance(text, dict):
        raise UserError(f"{path} has a text_config that is no object; fetch the model again")
    for key in ("num_hidden_layers", "n_layers", "num_layers"):
        layers = text.get(key)
        if key in text and (type(layers) is not int or not 1 <= layers <= len(tensors)):
            raise UserError(
                f"{path} has {key} = {layers!r:.40} for weights of {len(tensors)} tensors; fetch the model again"
            )
    quantization = config.get("quantization")
    if quantization is None:
        return
    sizes = [quantization.get(key) for key in ("bits", "group_size")] if isinstance(quantization, dict) else [None]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(f"{path} has no whole bits and group_size in quantization; fetch the model again")
    if not any(name.endswith(".scales") for name in tensors):
        raise UserError(f"{path} says that the weights are quantized, but they have no scales; fetch the model again")
    if any(isinstance(value, dict) for value in quantization.values()):
        return  # bits that differ by layer, which mlx-lm checks against the weights
    bits, group = sizes
    for name in tensors:
        stem = name.removesuffix(".scales")
        if stem == name:
            continue
        # Weights of 32/bits values a word, scales of one a group: rows must come out equally long.
        weight, scales = tensors.get(f"{stem}.weight"), tensors[name]
        if weight is None or not weight.shape or not scales.shape:
            raise UserError(f"{path.parent} has {name!r:.80} without a weight beside it; fetch the model again")
        if weight.dtype == "U32" and scales.dtype != "U8" and weight.shape[-1] * 32 != scales.shape[-1] * group * bits:
            raise UserError(
                f"{path} says {bits} bits in groups of {group}, but {stem!r:.80} is packed {_shape(weight)} "
                f"with scales {_shape(scales)}; fetch the model again"
            )


def some(names: list[str]) -> str:
    """The first few names."""
    rest = len(names) - _MOST_NAMED
    return ", ".join(f"{n:.80}" for n in names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def check_loaded(name: str, model: Any, tokenizer: Any, vocabulary: int) -> None:
    """What only the built model tells: types of its weights, and that every word has an embedding.

    An id beyond the embedding would not raise: MLX would read memory that is not the embedding's.

    Raises:
        UserError: a weight of the wrong type, or a tokenizer that knows more words than the model.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    packed = {f"{path}.weight".lstrip(".") for path, module in model.named_modules() if hasattr(module, "bits")}
    scales = {weight.removesuffix("weight") + "scales" for weight in packed}
    for path, weight in tree_flatten(model.parameters()):
        assert isinstance(weight, mx.array)
        floating = mx.issubdtype(weight.dtype, mx.floating)
        good = weight.dtype == mx.uint32 if path in packed else floating or path in scales
        if not good:
            want = "uint32" if path in packed else "floating point"
            raise UserError(f"model {name} holds {path} as {weight.dtype}, not {want}; fetch the model again")
    added = set(tokenizer.added_tokens_decoder)
    beyond = [i for i in tokenizer.get_vocab().values() if i >= vocabulary and i not in added]
    ends = [i for i in tokenizer.eos_token_ids if not 0 <= i < vocabulary]
    if beyond or ends:
        raise UserError(
            f"model {name} has a tokenizer with id {max(beyond or ends)}, beyond its vocabulary of {vocabulary}; "
            "take the tokenizer of this very model"
        )
