"""The student: LoRA (or DoRA, or all weights) on a view of the base, in mlx-lm's own layers and files.

Adapters are read through mlx-lm's own loader, which takes a file with missing weights silently.
"""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..recipe import TrainSettings, check_lora_parameters
from ..system.files import user_path
from ..system.model_files import read_header, read_object, some
from ..system.screen import UserError
from ..system.store import save_arrays, write
from .residual import blocks, checkpoint_blocks, last_logits, view
from .run import Run

_LEAVES = {"lora_a", "lora_b", "m"}  # of mlx-lm's LoRA and DoRA layers


def make_student(base: nn.Module, settings: TrainSettings, seed: int, quantized: bool = False) -> nn.Module:
    """A trainable view of `base`; before the first step it computes exactly what the base does, unless it
    begins from the weights of `resume_adapter_file`.

    `quantized` says that the weights on disk are, even where the base is computed on dequantized ones.

    Raises:
        UserError: full fine-tuning of quantized weights, more blocks than the model has, or adapters to begin
            from that do not fit these settings.
    """
    student = untrained(base, settings, seed, quantized)
    if settings.resume_adapter_file is not None:
        _load_adapters(student, user_path(settings.resume_adapter_file), settings)
    if settings.grad_checkpoint == "on":
        checkpoint_blocks(student)
    student.eval()
    mx.eval(student.parameters())
    return student


def untrained(base: nn.Module, settings: TrainSettings, seed: int, quantized: bool = False) -> nn.Module:
    """A view of `base` with the weights that are trained as they begin, none of them computed yet; raises as
    `make_student`."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    n_layers = len(blocks(base))
    if settings.num_layers > n_layers:
        raise UserError(f"num_layers = {settings.num_layers}, but the model has {n_layers} blocks; give at most that")
    student = view(base)
    student.freeze()
    if settings.fine_tune_type == "full":
        if quantized or any(hasattr(module, "bits") for _, module in student.named_modules()):
            raise UserError("fine_tune_type = full cannot train quantized weights; use lora, or an unquantized model")
        for block in blocks(student)[-max(settings.num_layers, 0) :]:
            block.unfreeze()
    else:
        mx.random.seed(seed)  # LoRA's A is drawn from the global stream
        parameters = settings.lora_parameters
        linear_to_lora_layers(student, settings.num_layers, parameters, use_dora=settings.fine_tune_type == "dora")
        if not tree_flatten(student.trainable_parameters()):
            raise UserError(f"lora_parameters keys = {parameters.get('keys')} match no layer; leave keys out for all")
        _drop_by_row(student, seed)
    return student


class RowDropout(nn.Dropout):
    """Dropout whose mask at a row's position is told by the row's key, the position and the module's number alone:
    however a batch is cut and padded, and where a checkpointed block is computed again, it is the same.

    nn.Dropout draws from one stream in the order of calls, which differs in each of these, and there the gradient was
    of another mask than the loss. Of rows that a layer mixes first, as experts do, the mask is told by the first key.
    """

    def __init__(self, p: float, number: int, keys: mx.array):
        super().__init__(p)
        self._number, self._keys = number, keys

    def draw_from(self, keys: mx.array) -> None:
        """What the next passes are drawn from, a key a row of the batch: (B, 2) uint32."""
        self._keys = keys

    def __call__(self, x: mx.array) -> mx.array:
        if self._p_1 == 1 or not self.training:
            return x
        keep, first, second = self._p_1, self._keys[:, 0] ^ self._number, self._keys[:, 1]
        if x.ndim == 3 and len(x) == len(self._keys):
            places = second[:, None] ^ mx.arange(x.shape[1], dtype=mx.uint32)
            keys = mx.stack([mx.broadcast_to(first[:, None], places.shape), places], axis=-1)
            mask = mx.vmap(mx.vmap(lambda key: mx.random.bernoulli(keep, x.shape[2:], key=key)))(keys)
        else:
            mask = mx.random.bernoulli(keep, x.shape, key=mx.stack([first[0], second[0]]))
        return (mask * x) * (1 / keep)


def _drop_by_row(student: nn.Module, seed: int) -> None:
    """Put `RowDropout` in the place of each dropout that drops anything."""
    own = [
        (module, name, child)
        for _, module in student.named_modules()
        for name, child in module.items()
        if type(child) is nn.Dropout and child._p_1 < 1
    ]
    for number, (module, name, child) in enumerate(own):
        module[name] = RowDropout(1 - child._p_1, number, mx.random.key(seed)[None])


def row_dropouts(student: nn.Module) -> list[RowDropout]:
    """The student's dropouts, none where nothing is dropped."""
    return [module for module in student.modules() if isinstance(module, RowDropout)]


def _load_adapters(student: nn.Module, path: Path, settings: TrainSettings) -> None:
    """Give the student a file's weights, which then do what they did where they were made: mlx-lm's layers compute with
    scale · B, so a file of another scale than the student's has its B multiplied by what the two differ."""
    file = read_header(path)
    own = dict(tree_flatten(student.trainable_parameters()))
    shapes = {name: tuple(weight.shape) for name, weight in own.items()}
    remedy = "give the fine_tune_type, num_layers and lora_parameters of its adapter_config.json"
    for names, how in ((shapes.keys() - file.keys(), "lacks"), (file.keys() - shapes.keys(), "holds other weights:")):
        if names:
            raise UserError(f"resume_adapter_file = {path} {how} {some(sorted(names))}; {remedy}")
    for name, tensor in file.items():
        if tensor.shape != shapes[name] or tensor.dtype not in ("F32", "F16", "BF16"):
            raise UserError(
                f"resume_adapter_file = {path} holds other weights: {name} is {list(tensor.shape)} of {tensor.dtype}, "
                f"not {list(shapes[name])}; {remedy}"
            )
    weights = mx.load(str(path), format="safetensors")
    assert isinstance(weights, dict)
    scale, its = settings.lora_parameters["scale"], _scale_beside(path)
    if settings.fine_tune_type != "full" and its not in (None, scale):
        if not scale:
            raise UserError(
                f"resume_adapter_file = {path} was made with scale = {its:g}, which lora_parameters scale = 0 cannot "
                f"hold; give --lora-parameters with scale {its:g}"
            )
        # In float32: what is multiplied is rounded to no more than that.
        scaled = {name: w.astype(mx.float32) * (its / scale) for name, w in weights.items() if name.endswith("lora_b")}
        weights |= scaled
    student.load_weights(list(weights.items()), strict=False)


def _scale_beside(path: Path) -> float | None:
    """The scale that adapters were made with, by the `adapter_config.json` beside them; None where it says none.

    Raises:
        UserError: the file cannot be read, or its scale is no number.
    """
    file = path.parent / "adapter_config.json"
    if not file.exists():
        return None
    given = read_object(file, "mend it, or move the adapters elsewhere").get("lora_parameters")
    if not isinstance(given, dict) or "scale" not in given:
        return None
    return check_lora_parameters({"scale": given["scale"]}, str(file))["scale"]


def bytes_trained(student: nn.Module) -> int:
    """Bytes of the weights that training changes."""
    return sum(weight.nbytes for _, weight in tree_flatten(student.trainable_parameters()))  # pyright: ignore


def lora_change(student: nn.Module) -> dict[str, mx.array]:
    """The B of each of the student's LoRA layers, which adds scale · B A to what the base's computes."""
    trained = tree_flatten(student.trainable_parameters())
    return {name: weight for name, weight in trained if name.endswith("lora_b")}  # pyright: ignore


def weaken(student: nn.Module, change: dict[str, mx.array], strength: float) -> None:
    """Give the student this share of a `lora_change`."""
    student.update(tree_unflatten([(name, weight * strength) for name, weight in change.items()]))


def first_trained_block(student: nn.Module) -> int:
    """The lowest block that holds a trained weight: what is below computes what the base does."""
    return next(i for i, block in enumerate(blocks(student)) if tree_flatten(block.trainable_parameters()))


def save_adapters(folder: Path, student: nn.Module, settings: TrainSettings, model: str, seed: int) -> None:
    """Write `adapters.safetensors` and `adapter_config.json` as mlx-lm reads them, each replaced in one step."""
    config = {
        "fine_tune_type": settings.fine_tune_type,
        "learning_rate": settings.learning_rate,
        "lora_parameters": settings.lora_parameters,
        "model": model,
        "num_layers": settings.num_layers,
        "seed": seed,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_arrays(folder / "adapters.safetensors", dict(sorted(tree_flatten(student.trainable_parameters()))))
    write(folder / "adapter_config.json", json.dumps(config, indent=4).encode())


def with_adapters(base: nn.Module, folder: Path) -> nn.Module:
    """A view of `base` with the folder's adapters: one set of weights for both, `base` left as it is.

    Raises:
        UserError: no adapters there, or they are not this model's: a weight missing, foreign, or of another shape.
    """
    from mlx_lm.tuner.utils import load_adapters

    file = folder / "adapter_config.json"
    config = read_object(file, "make the adapters again")
    if config.get("fine_tune_type", "lora") != "full":
        if not isinstance(given := config.get("lora_parameters"), dict):
            raise UserError(f"{file} has no lora_parameters; make the adapters again")
        known = ("rank", "scale", "dropout", "keys")  # older files hold others, which mlx-lm does not read
        check_lora_parameters({key: given[key] for key in known if key in given}, str(file))
    names = set(read_header(folder / "adapters.safetensors"))
    model = view(base)
    try:
        load_adapters(model, str(folder))
        mx.eval(last_logits(model, [[0]]))  # weights of another shape fail only when they are used
    except Exception as error:  # a stranger's files can make mlx-lm raise anything
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"--adapter-path {folder} does not fit this model ({lines[-1].strip()[:150]}); "
            "give the model it was made for"
        ) from None
    expected = {name for name, _ in tree_flatten(model.parameters()) if name.rsplit(".", 1)[-1] in _LEAVES}
    if missing := sorted(expected - names):
        raise UserError(
            f"--adapter-path {folder} lacks {len(missing)} of its {len(expected)} weights ({missing[0]} first); "
            "make the adapters again"
        )
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return model


def save_student(run: Run, student: nn.Module) -> None:
    """`save_adapters`, to the run's folder."""
    if run.store.ours:
        settings = run.recipe.run
        save_adapters(Path(settings.adapter_path), student, run.recipe.train, settings.model, settings.seed)


def check_saved(run: Run, student: nn.Module) -> None:
    """Hold what mlx-lm reads from the run's folder against the student in memory.

    Raises:
        UserError: they differ, or the adapters change nothing.
    """
    if not run.store.ours:
        return
    folder, rows = Path(run.recipe.run.adapter_path), run.prompts.harmful_validation[:4]
    saved = with_adapters(run.base.model, folder)
    from_disk, in_memory, base = (last_logits(model, rows) for model in (saved, student, run.base.model))
    if not mx.allclose(from_disk, in_memory, rtol=1e-3, atol=1e-3):
        raise UserError(f"the adapters in {folder} do not give what was trained; run the same command again with --yes")
    if mx.array_equal(from_disk, base):
        raise UserError(f"the adapters in {folder} change nothing; raise --learning-rate or --epochs")
