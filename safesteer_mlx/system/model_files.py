"""A model from a stranger: what its files claim is checked before anything else reads them.

mlx-lm opens `model*.safetensors` and ignores the index; MLX believes a file's header and reads weights only
when they are used. So headers are read here first, by the format's own library, which believes none.
"""

import copy
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from safetensors import SafetensorError, safe_open

from .files import check_regular, read_bytes
from .screen import UserError

# What MLX can read, and its bytes a value.
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4}
_BYTES |= {"U64": 8, "I64": 8, "C64": 8, "F8_E4M3": 1}
_MOST_BYTES = 200_000_000  # of a file that is no weights; large tokenizers take some 30 MB
_MOST_NAMED = 3  # names in one sentence
_MOST_DIMENSIONS = 16  # of a tensor

_READ = (".json", ".jinja", ".safetensors", ".model", ".tiktoken", ".txt", ".jsonl", ".py")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tiktoken.model")
_CHAT_TEMPLATES = "additional_chat_templates"  # a folder that transformers reads too
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".h5", ".gguf")

# Numbers of a configuration: by name the least, the most and whether they are whole. Null is for mlx-lm's own value;
# lists and objects, as some families have them by block, are left to mlx-lm, whose errors are told in a sentence too.
_WHOLE, _FACTOR, _EPSILON = (1, 10**9, True), (1e-9, 1e30, False), (0, 1e3, False)
_NUMBERS = {
    **dict.fromkeys(("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"), _WHOLE),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "partial_rotary_factor"), _FACTOR),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), _EPSILON),
    "num_kv_reuse_layers": (0, 1000, True),  # AFM builds as many
    "altup_active_idx": (0, 0, True),  # Gemma 3n's is 0; any other may be read beyond an array's end
}
HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")  # how families name the number of heads
_SIZES = ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
_LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
_SHORTEST = 16  # tokens that a tokenizer must take: no conversation is shorter


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
        UserError: files that lead out of the folder or are none, code that wants to run, no or malformed weights, an
            index or a configuration that contradicts them, or no tokenizer.
    """
    _check_files(folder)
    of_tokenizer = folder / "tokenizer_config.json"
    config, settings = read_object(folder / "config.json"), read_object(of_tokenizer) if of_tokenizer.exists() else {}
    if not trust_remote_code:
        _check_code(folder, config, settings)
    longest = settings.get("model_max_length")
    if longest is not None and (type(longest) not in (int, float) or not longest >= _SHORTEST):
        raise UserError(
            f"{of_tokenizer} has model_max_length = {longest!r:.40}, no number of at least {_SHORTEST}; fetch the "
            "model again"
        )
    tensors = check_weights(folder)
    check_config(str(folder / "config.json"), config, tensors)
    if not any((folder / name).is_file() for name in _TOKENIZERS) and not any(folder.glob("*.tiktoken")):
        raise UserError(f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model); fetch the whole model")
    return tensors


def read_object(path: Path, remedy: str = "fetch the model again") -> dict[str, Any]:
    """The JSON object in a file; a UserError if it is missing, too large, no regular file, no JSON or no object."""
    content = read_bytes(path, str(path), remedy, _MOST_BYTES)
    try:
        content = json.loads(content.decode())
    except (ValueError, RecursionError):  # broken JSON, broken UTF-8, numbers or brackets without end
        raise UserError(f"{path} is not JSON; {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object; {remedy}")
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


def write_header(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file of these tensors whose values are a hole: it has its size, and takes a header's room."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + bytes_of(tensor)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _check_files(folder: Path) -> None:
    """Whatever is read must be a regular file. Links may lead about the folder and, in the Hub's cache, to the blobs of
    the same repository."""
    real = folder.resolve()
    rooms = [real]
    if real.parent.name == "snapshots":
        rooms.append(real.parent.parent / "blobs")
    for path in [*folder.iterdir(), *folder.glob(f"{_CHAT_TEMPLATES}/*")]:
        if path.suffix not in _READ:
            continue
        if path.is_symlink():
            try:
                target = path.resolve(strict=True)
            except (OSError, RuntimeError):  # nothing there, or a circle
                raise UserError(f"{path} is a link that leads nowhere; fetch the model again") from None
            if not any(target.is_relative_to(room) for room in rooms):
                raise UserError(f"{path} is a link out of the model's folder; put the file itself in its place")
        if not path.is_dir():
            most = None if path.suffix in (".safetensors", ".jsonl") else _MOST_BYTES
            check_regular(path, str(path), "fetch the model again", most)


def with_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose text part has the sizes that it leaves to mlx-lm (Gemma 3's heads and vocabulary)."""
    text = config.get("text_config") or config
    if isinstance(text.get("vocab_size"), int) and any(isinstance(text.get(key), int) for key in HEADS):
        return config
    made = _made(config)
    inner = made.get("text_config")
    made = made if inner is None else _made(inner) if isinstance(inner, dict) else vars(inner)
    left = {key: made[key] for key in _SIZES if text.get(key) is None and isinstance(made.get(key), int)}
    return config | ({"text_config": text | left} if text is not config else left)


def _made(config: dict[str, Any]) -> dict[str, Any]:
    """What mlx-lm makes of a configuration; the same if it makes nothing of it, which loading it will tell."""
    try:
        return vars(_arguments(config).from_dict(copy.deepcopy(config)))
    except Exception:  # a stranger's values, which can raise anything; or no architecture
        return config


def _arguments(config: dict[str, Any]) -> Any:
    """mlx-lm's own class of a configuration's architecture; None if it has none."""
    from mlx_lm.utils import _get_classes

    try:
        return _get_classes(config)[1]
    except Exception:  # as above: a name that is no text, say
        return None


def vocabulary(name: str, config: dict[str, Any]) -> int:
    """V, the rows of the embedding, from a model's configuration; a UserError if it does not say."""
    text = config.get("text_config") or config
    if type(size := text.get("vocab_size")) is not int or size < 1:
        raise UserError(f"model {name} has vocab_size = {size!r:.40} in its config.json; fetch the model again")
    return size


def _check_code(folder: Path, config: dict[str, Any], settings: dict[str, Any]) -> None:
    """Neither the model nor its tokenizer may ask for code of its own."""
    wants = [("config.json", "model_file", config)]
    if not _is_idle(config.get("auto_map"), config, settings):
        wants.append(("config.json", "auto_map", config))
    wants += [("tokenizer_config.json", key, settings) for key in ("model_file", "auto_map")]
    for file, key, content in wants:
        if content.get(key):
            raise UserError(
                f"model {folder} wants to run code of its own ({key} = {content[key]!r:.100} in {file}); "
                "if you trust it, pass --trust-remote-code, else choose another model"
            )


def code_of(folder: Path) -> set[Path]:
    """The `.py` files in a model's folder that its configuration or its tokenizer asks for, and what those import."""
    names: list[str] = []
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        settings = read_object(path) if path.exists() else {}
        names += re.findall(r'"(\w+)\.\w+"', json.dumps([settings.get("auto_map"), settings.get("model_file")]))
    files: set[Path] = set()
    while names:
        path = folder / f"{names.pop()}.py"
        if path.is_file() and path not in files:
            files.add(path)
            names += re.findall(r"^\s*(?:from|import)\s+\.(\w+)", path.read_text("utf-8", "replace"), re.MULTILINE)
    return files


def _is_idle(auto_map: Any, config: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether nothing runs of what a config.json maps for transformers: mlx-lm has the architecture itself, and the
    tokenizer is of a class that its own file names."""
    if not isinstance(auto_map, dict) or ("AutoTokenizer" in auto_map and not settings.get("tokenizer_class")):
        return False
    return _arguments(config) is not None


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


def check_config(path: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Check what mlx-lm and the plan for memory will go by; `path` says where it stands.

    Raises:
        UserError: an architecture, a number or a quantization that cannot be meant, or not for these weights.
    """

    def wrong(what: str) -> UserError:
        return UserError(f"{path} {what}; fetch the model again")

    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind.replace("-", "_").replace(".", "_").isidentifier():
        raise UserError(
            f"{path} names no architecture (model_type = {kind!r:.80}); choose a model that mlx-lm supports"
        )
    text = config.get("text_config") or config
    if not isinstance(text, dict):
        raise wrong("has a text_config that is no object")
    for key in _LAYERS:
        layers = text.get(key)
        if key in text and (type(layers) is not int or not 1 <= layers <= len(tensors)):
            raise wrong(f"has {key} = {layers!r:.40} for weights of {len(tensors)} tensors")
    for key, (least, most, whole) in _NUMBERS.items():
        value = text.get(key)
        if value is None or isinstance(value, list | dict):
            continue
        if type(value) not in ((int,) if whole else (int, float)) or not least <= value <= most:
            raise wrong(f"has {key} = {value!r:.40}, no {'whole ' * whole}number from {least:g} to {most:g}")
    packing = config.get("quantization_config")
    if isinstance(packing, dict) and type(packing.get("bits")) not in (int, NoneType):
        raise wrong("has no whole bits in quantization_config")
    quantization = config.get("quantization")
    if quantization is None:
        return
    sizes = [quantization.get(key) for key in ("bits", "group_size")] if isinstance(quantization, dict) else [None]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise wrong("has no whole bits and group_size in quantization")
    if not any(name.endswith(".scales") for name in tensors):
        raise wrong("says that the weights are quantized, but they have no scales")
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
            raise wrong(f"is beside {name!r:.80}, but no weight is")
        if weight.dtype == "U32" and scales.dtype != "U8" and weight.shape[-1] * 32 != scales.shape[-1] * group * bits:
            packed, by = (f"{list(t.shape)} of {t.dtype}" for t in (weight, scales))
            raise wrong(f"says {bits} bits in groups of {group}, but {stem!r:.80} is packed {packed} with scales {by}")


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
        want, good = "floating point", mx.issubdtype(weight.dtype, mx.floating) or path in scales
        if path in packed:
            want, good = "uint32", weight.dtype == mx.uint32
        if not good:
            raise UserError(f"model {name} holds {path} as {weight.dtype}, not {want}; fetch the model again")
    added = set(tokenizer.added_tokens_decoder)
    beyond = [i for i in tokenizer.get_vocab().values() if i >= vocabulary and i not in added]
    if beyond:
        raise UserError(
            f"model {name} has a tokenizer with id {max(beyond)}, beyond its vocabulary of {vocabulary}; "
            "take the tokenizer of this very model"
        )
    check_ends(name, tokenizer.eos_token_ids, vocabulary)


def check_ends(name: str, ends: Any, vocabulary: int) -> None:
    """Refuse (UserError) what ends a model's turn, one token or several, if it is no token of its own."""
    for end in ends if isinstance(ends, list | set) else [ends]:
        if type(end) is not int or not 0 <= end < vocabulary:
            raise UserError(
                f"model {name} ends its turn with token {end!r:.40}, none of its {vocabulary}; mend eos_token_id in "
                "its config.json and generation_config.json"
            )
