"""Tiny random models, built in place: no tokenizer, no files."""

import os

# A process a core runs the tests; OpenBLAS's own threads would fight over them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import safesteer_mlx  # isort: skip  # noqa: F401  before MLX, so that OpenBLAS takes precedence

import importlib
import inspect
import json
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_causal_mask
from safetensors.numpy import save_file

from safesteer_mlx.recipe import MODELS


def build(name: str, seed: int = 0):
    """A random float32 model of 3 blocks, width 32, vocabulary 50."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    more = {"tie_word_embeddings": False} if name == "llama" else {}
    if name == "gemma2":
        more = {"head_dim": 8, "query_pre_attn_scalar": 8}
    args = module.ModelArgs(
        model_type=name,
        hidden_size=32,
        num_hidden_layers=3,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        vocab_size=50,
        **more,
    )
    mx.random.seed(seed)
    model = module.Model(args)
    model.eval()
    mx.eval(model.parameters())
    return model


# What bad input may take, of the processor and of memory: a case of these files that takes more fails. Where a machine
# takes more than a second to start Python with mlx-lm and end it, as many cases do, twice that is allowed.
TABLES = ("test_bad_input.py", "test_files.py", "test_interrupted_and_odd.py")
MOST_SECONDS, MOST_BYTES = 2.0, 512 * 2**20
LONGER = ("test_models[tokenizer without words]",)  # is told by what the base answers


def _memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes; 0 where the system does not say."""
    if not Path("/proc/self/status").exists():
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


_had = 0  # the most memory that this process had before its peak began anew


def _children() -> int:
    """The most memory that any child had that has ended, in bytes, told only where it is more than this process ever
    had: a child's counts from what its parent had when it was made, which may be in an earlier test than its end (a
    template's process is kept). The system counts roughly, by some MB where there are many cores."""
    peak, own = (
        resource.getrusage(of).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        for of in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)
    )
    return peak if peak > max(own, _had) + 2**25 else 0


def _processor() -> float:
    """Seconds of the processor that this process and its children took so far. The system adds a child's when it has
    ended, which may be in a later test than its work: those of children at work are read where it shows them."""
    took = sum(os.times()[:4])
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                took += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return took


@cache
def _most_seconds() -> float:
    began = sum(os.times()[2:4])
    subprocess.run([sys.executable, "-c", "import safesteer_mlx, mlx_lm"], check=True)
    return max(MOST_SECONDS, 2 * (sum(os.times()[2:4]) - began))


@cache
def _all_imported() -> None:
    from safesteer_mlx.system.load import load

    load(str(MODELS / "tiny-chat"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if item.path.name not in TABLES:
        return (yield)
    global _had
    _all_imported()
    most = _most_seconds()
    _had = max(_had, _memory("VmHWM"))
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    held, began, before = _memory("VmRSS"), _processor(), _children()
    result = yield
    took, grew = _processor() - began, _memory("VmHWM") - held
    grew = max(grew, peak) if (peak := _children()) > before else grew
    item.user_properties.append(("took", (took, grew)))
    if hasattr(item, "callspec") and item.name not in LONGER:
        assert took <= most, f"{took:.1f} s of the processor, more than {most:.1f}"
        assert grew <= MOST_BYTES, f"{grew >> 20} MB, more than {MOST_BYTES >> 20}"
    return result


def pytest_terminal_summary(terminalreporter):
    took = [
        (*value, report.nodeid)
        for report in terminalreporter.stats.get("passed", [])
        if report.when == "call"
        for name, value in report.user_properties
        if name == "took"
    ]
    for which, title in enumerate(("slowest", "largest")):
        for row in sorted(took, key=lambda row: -row[which])[:3]:
            terminalreporter.line(f"{title} of the tables: {row[0]:.1f} s, {row[1] >> 20} MB, {row[2]}")


# The files that take longest, longest first; begun last, they would leave the other cores idle.
LONG = (
    "zoo",
    "checkpoint",
    "align",
    "machines",
    "verdict",
    "export",
    "load",
    "verify",
    "evaluate",
    "bench",
    "examples",
)
LONG += ("hub", "own_policy", "attacks", "packaging", "families", "doc_commands", "interrupted_and_odd")


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist would begin the files with most tests, which are quick ones


def pytest_collection_modifyitems(items):
    place = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True)
def _adapters_of_the_checkout_are_its_users(monkeypatch):
    """No test opens `adapters` at the top, which `./scripts/align` wrote and a run may be writing."""
    from safesteer_mlx.system.store import RunFolder

    own, made = Path(__file__).parents[1] / "adapters", RunFolder.__init__

    def init(self, adapters: Path) -> None:
        assert adapters.absolute() != own, "give the test a folder of its own"
        made(self, adapters)

    monkeypatch.setattr(RunFolder, "__init__", init)


_COUNTED: dict[tuple, int] = {}  # what passes take, in this process


@pytest.fixture(autouse=True)
def _passes_of_a_model_are_traced_once(monkeypatch, request):
    """Not again for each run of the same model; but for where tracing is what is tested."""
    if request.path.name == "test_memory.py":
        return
    from safesteer_mlx.method.passes import Passes

    own = Passes._once

    def once(self, key, count):
        if not hasattr(self.model, "args"):
            return own(self, key, count)
        weights = tuple((name, w.shape, str(w.dtype)) for name, w in tree_flatten(self.model.parameters()))
        whole = (type(self.model), str(vars(self.model.args)), weights, key)
        if whole not in _COUNTED:
            _COUNTED[whole] = own(self, key, count)
        return _COUNTED[whole]

    monkeypatch.setattr(Passes, "_once", once)


_PREPARED: dict[tuple, object] = {}  # what stages 1 to 3 found in this process


def _once(self, find, *found):
    """`Run.once`, but that what a stage finds is found once for all runs that only differ in what comes after it."""
    from safesteer_mlx.method import direction, teacher

    recipe = self.recipe
    settings = [recipe.direction, recipe.teacher.teacher]
    if find is not direction.find_directions:  # the first stage reads no other
        settings += [recipe.teacher, recipe.tokens, recipe.loss.first_tokens]
    key = (
        find,
        self.base.weights_hash,
        self.base.thinks,
        repr(settings),
        repr((recipe.run.seed, recipe.run.prompt_batch_size, recipe.run.generation_batch_size)),
        (teacher.VALIDATION_PROMPTS, hash(repr(self.prompts))),
    )

    def finds(*_):
        if key not in _PREPARED:
            _PREPARED[key] = find(self, *found)
        return _PREPARED[key]

    kind = inspect.signature(find).return_annotation
    return self.store.once(find.__name__.removeprefix("find_"), finds, kind)


def _fewer(sets):
    """The sets with less in those of which a run reads all: prompts to train on, twice as many to validate by as the
    search asks, and two of each little task."""
    from safesteer_mlx.evals.heldout import first_of_each
    from safesteer_mlx.method.teacher import VALIDATION_PROMPTS

    counts = {"harmful_train": 64, "harmless_train": 64}
    counts |= {f"{kind}_validation": 2 * n for kind, n in zip(("harmful", "harmless"), VALIDATION_PROMPTS, strict=True)}
    few = {name: getattr(sets, name)[:count] for name, count in counts.items()}
    return replace(sets, **few, capability_test=first_of_each(sets.capability_test, 2))


@pytest.fixture(scope="module")
def few_prompts():
    """For tests of something else than the search: it, checkpoint selection and the check for a collapse ask four
    prompts a kind, and the sets hold few; runs that only differ in what comes after stages 1 to 3 share what these
    found, and a model is timed and its padding checked once.
    """
    from safesteer_mlx.evals import selection
    from safesteer_mlx.method import pace, prompts, run, safety_tokens, teacher, train

    timed, batched = {}, {}
    measure_rates, can_batch, built_in_sets = pace.measure_rates, run.can_batch, prompts.built_in_sets

    def rates(run):
        key = run.base.weights_hash, run.recipe.run.generation_batch_size
        return timed[key] if key in timed else timed.setdefault(key, measure_rates(run))

    def batches(base, prompts):
        key = base.weights_hash
        return batched[key] if key in batched else batched.setdefault(key, can_batch(base, prompts))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "SECONDS", 0.0)
        patch.setattr(pace, "measure_rates", rates)
        patch.setattr(run, "can_batch", batches)
        patch.setattr(run.Run, "once", _once)
        patch.setattr(prompts, "built_in_sets", lambda model: _fewer(built_in_sets(model)))
        patch.setattr(selection, "PROMPTS", 4)
        patch.setattr(train, "COLLAPSE_PROMPTS", 4)
        for module in (teacher, safety_tokens):
            patch.setattr(module, "VALIDATION_PROMPTS", (4, 4))
        yield


@pytest.fixture
def nothing_prepared(few_prompts):
    """For a test of what the stages find, twice: no run before it is drawn on."""
    _PREPARED.clear()


@pytest.fixture
def unsaved(monkeypatch):
    """Every picture is drawn but none is saved, for tests of something else: one stands for all."""
    from safesteer_mlx.evals import figures

    def picture(draw, print_too=True):
        draw(figures.LIGHT)
        return figures.Picture(b"<svg/>", b"<svg/>", b"\x89PNG")

    monkeypatch.setattr(figures, "picture", picture)


@pytest.fixture(params=["qwen2", "llama", "gemma2"])
def any_model(request):
    return build(request.param)


@pytest.fixture
def model():
    return build("qwen2")


@pytest.fixture
def tiny_model():
    """tiny_model(name, seed=0): as `build`, for tests that want several."""
    return build


def walk(model, row, add=None, without=None):
    """The whole forward pass spelled out, for one row: block inputs (L, T, D) and logits (T, V), in numpy.

    `add` maps a block to what is added to its input. `without` (D,) is projected out as ablation does it,
    in the blocks of qwen2 and llama. Block inputs are those that the blocks see, after either.
    """
    body, tokens = model.model, mx.array([row])
    gemma = "gemma" in type(model).__module__
    assert without is None or not gemma
    r = None if without is None else without / mx.linalg.norm(without)

    def project(x):
        return x if r is None else x - mx.sum(x * r, axis=-1, keepdims=True) * r

    x, mask, seen = body.embed_tokens(tokens), create_causal_mask(len(row)), []
    x = x * 32**0.5 if gemma else x
    for i, block in enumerate(body.layers):
        x = project(x + (add or {}).get(i, 0.0))
        seen.append(x)
        if gemma:
            x = block(x, mask)
        else:
            x = x + project(block.self_attn(block.input_layernorm(x), mask))
            x = x + project(block.mlp(block.post_attention_layernorm(x)))
    x = body.norm(x)
    logits = model.lm_head(x) if "lm_head" in model else body.embed_tokens.as_linear(x)
    if gemma:
        logits = 30.0 * mx.tanh(logits / 30.0)
    return np.array(mx.stack(seen))[:, 0], np.array(logits)[0]


@pytest.fixture
def gemma_folder(tmp_path):
    """The configuration of Gemma 3's 4B as it is published, which leaves heads and vocabulary to the library, beside
    weights of as many blocks (no more than their names are meant) and the bundled model's tokenizer."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    folder = tmp_path / "gemma-3-4b-it"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, 106]}))
    names = [f"language_model.model.layers.{i}.self_attn.q_proj.weight" for i in range(34)]
    save_file({name: np.zeros((2, 2560), np.float16) for name in names}, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS / "tiny-chat" / name, folder)
    return folder
