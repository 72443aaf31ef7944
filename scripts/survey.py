#!/usr/bin/env python3
"""Every model family of the installed mlx-lm, tried: docs/models.md's table.

    .venv/bin/python scripts/survey.py                     all of them, some fifteen minutes; writes docs/models.md
    .venv/bin/python scripts/survey.py gemma2 qwen3_next   some of them, on the screen

Each is a tiny random model (`survey_configs_a.py`, `survey_configs_l.py`), in a process of its own: a crash is a
result. What this project does with it is held against a second way that shares no code with it, made by wrapping the
`__call__` of the blocks' classes. A family that is refused in one sentence before anything is done counts as *refused*;
one that is done wrongly, or ends in anything but such a sentence, has failed.
"""

import argparse
import copy
import importlib
import json
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
SECONDS = 240  # for one family
ROWS = [[5, 9, 3, 17, 33, 2, 8], [4, 6, 21, 13], [7, 7, 30, 11, 2, 90]]
BACKEND = "[GatherMM::eval] Currently only supports float32"  # what MLX's CPU backend says of experts
GREEDY = 5  # tokens generated
PASS = (4, 32)  # rows and tokens of the pass whose memory is measured
LEAST, ENOUGH = 0.75, 0.95  # planned over measured: below it a plan is wrong, or told to be low
QUICK = {  # the families of the gate, and why these
    "llama": "what most others are",
    "gemma3_text": "sandwich norms, sliding windows, tied and scaled embedding",
    "cohere2": "attention and MLP beside each other, scaled logits",
    "qwen3_next": "recurrent and attention blocks mixed, experts",
    "mamba2": "recurrent blocks alone, another name for the list of blocks",
    "deepseek_v3": "latent attention, dense and expert blocks",
    "gpt2": "other names throughout, learned positions",
    "qwen3_vl": "a text model inside another",
}


PAGE = """\
# Model families

<!-- Written by scripts/survey.py; do not edit. -->

Every family of {versions}, as a tiny random model with every kind of block that
it mixes. Each is read, steered and ablated, answers steered in batches, gets a student that is trained (all blocks, the
last two, with checkpoints), saved, fused and read back, is tried in bfloat16 and at 4 bits, and has its memory planned;
what its blocks take and return is held against a second way. This says that the mechanics are right, not that alignment
works on trained models of the family: [zoo.md](zoo.md#hybrids-models-inside-others) has those that were tried.

{counts}, and {more} more cannot be built here.

    .venv/bin/python scripts/survey.py

*Refused* is said in one sentence before anything is done, and beside it whose limit it is: *ours*, or *mlx-lm's*, whose
code cannot do it for anyone. *Whole stream*: the published ablation leaves more than a thousandth of the stream along
the direction (its largest share behind any block is told), so all that reaches the stream is projected (`--ablation`);
what trained models have of it stands in [verdict.md](verdict.md#what-the-published-ablation-leaves). *In groups of one
length*, *one at a time*: mlx-lm does not batch prompts of unequal length rightly, or none, which is noticed.
*Experts in half precision*: MLX's CPU backend multiplies experts' weights in float32 alone, in which runs compute
small models there; that was not run on Metal.

*Memory* is planned over measured: the peak of a training pass through all blocks ({rows} rows of {length} tokens, no
checkpoints), above weights and gradients, the median of three, which differ by some 5 %. What is planned is counted on
the pass's own operations; [memory.md](memory.md) has larger shapes. Below {least} a family fails.

{below}

| family | | memory | notes |
|---|---|---|---|
"""


def configs() -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Tiny configurations by family, and what cannot be built, with the reason."""
    import survey_configs_a as a
    import survey_configs_l as z

    return {**a.CONFIGS, **z.CONFIGS}, {**a.CANNOT, **z.CANNOT}


def build(name: str, config: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """A random float32 model, of the survey's configuration or another; weights that begin as zeros are drawn too, and
    those of norms, which begin alike and would only scale: no direction would get past one behind a block's part."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    config = copy.deepcopy(config or configs()[0][name])
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(copy.deepcopy(config)))
    drawn = [
        (path, 0.1 * mx.random.normal(w.shape).astype(w.dtype))
        for path, w in tree_flatten(model.parameters())
        if mx.issubdtype(w.dtype, mx.floating) and w.ndim > 1 and not mx.any(w).item()
    ]
    drawn += [
        (path, w + mx.random.uniform(-0.5, 0.5, w.shape).astype(w.dtype))
        for path, w in tree_flatten(model.parameters())
        if path.endswith("weight") and w.ndim == 1
    ]
    model.update(tree_unflatten(drawn))
    model.set_dtype(mx.float32)
    model.eval()
    mx.eval(model.parameters())
    return model, config


class Wrapped:
    """The second way: while it holds, every block's class calls `before(i, args)` and `after(i, out)`."""

    def __init__(self, own: list[Any], before: Callable = lambda i, args: args, after: Callable = lambda i, out: out):
        self.number = {id(block): i for i, block in enumerate(own)}
        self.classes = {type(block): type(block).__call__ for block in own}
        self.before, self.after = before, after

    def __enter__(self) -> None:
        for cls, call in self.classes.items():

            def wrapped(block, *args, call=call, **kwargs):
                i = self.number.get(id(block))
                if i is None:
                    return call(block, *args, **kwargs)
                return self.after(i, call(block, *self.before(i, args), **kwargs))

            cls.__call__ = wrapped

    def __exit__(self, *error) -> None:
        for cls, call in self.classes.items():
            cls.__call__ = call


def stream_of(out: Any) -> Any:
    """The stream in what a block returns, by its shape alone."""
    import mlx.core as mx

    return out if isinstance(out, mx.array) else next(part for part in out if part is not None and part.ndim == 3)


def added(out: Any, shift: Any) -> Any:
    """What a block returns, with `shift` added to its stream."""
    import mlx.core as mx

    if isinstance(out, mx.array):
        return out + shift
    at = next(i for i, part in enumerate(out) if part is not None and part.ndim == 3)
    return type(out)(part + shift if i == at else part for i, part in enumerate(out))


def alike(a: Any, b: Any, within: float = 1e-3) -> bool:
    """Whether two arrays are, by their largest difference; −∞, a token that is never said, is like itself alone."""
    import mlx.core as mx

    a, b = a.astype(mx.float32), b.astype(mx.float32)
    if a.shape != b.shape:
        return False
    size = mx.where(mx.isinf(b), 0.0, b).abs().max()
    return bool((mx.where(a == b, 0.0, (a - b).abs()).max() <= within * (size + 1e-6)).item())


def are_numbers(logits: Any) -> bool:
    """Whether no logit is NaN or +∞."""
    import mlx.core as mx

    return bool(mx.all(logits < mx.inf).item())


class Survey:
    """The checks of one family; each raises what is wrong."""

    def __init__(self, name: str):
        import mlx.core as mx

        from safesteer_mlx.method.residual import blocks, check_stream
        from safesteer_mlx.system.screen import UserError

        self.name, self.planned = name, None
        self.model, self.config = build(name)
        self.row = mx.array([ROWS[0]])
        self.plain = self.model(self.row)
        check_stream(self.model, self.row)
        try:
            self.model.freeze()
        except AttributeError as error:  # as `load` says
            raise UserError(f"mlx-lm cannot freeze it ({error})") from None
        self.blocks = blocks(self.model)
        outputs: list[Any] = []
        with Wrapped(self.blocks, after=lambda i, out: (outputs.append(stream_of(out)), out)[1]):
            self.model(self.row)
        self.outputs = outputs
        width = outputs[0].shape[-1]
        self.vector = mx.random.normal((width,), key=mx.random.key(3)) * outputs[-1].abs().mean()

    def reading(self) -> None:
        """What goes into each block is what the one before returned."""
        from safesteer_mlx.method.residual import block_inputs

        found = block_inputs(self.model, self.row)
        assert len(found) == len(self.blocks) == len(self.outputs), "blocks are missing"
        for i in range(1, len(found)):
            assert alike(found[i], self.outputs[i - 1]), f"input of block {i}"

    def head(self) -> None:
        """Hidden states and head are the model."""
        from safesteer_mlx.method.residual import head, hidden_states

        assert alike(head(self.model)(hidden_states(self.model, self.row)), self.plain), "head(hidden) is not the model"

    def steering(self) -> None:
        """Adding to a block's input is adding to what the one before returns."""
        from safesteer_mlx.method.residual import steer

        for layer in {1, len(self.blocks) - 1}:
            found = steer(self.model, layer, self.vector)(self.row)
            shift = self.vector

            def after(i: int, out: Any, layer: int = layer, shift: Any = shift) -> Any:
                return added(out, shift) if i == layer - 1 else out

            with Wrapped(self.blocks, after=after):
                expected = self.model(self.row)
            assert alike(found, expected), f"steered at block {layer}"
            assert not alike(found, self.plain, 1e-5), f"steering at block {layer} changes nothing"

    def ablation(self) -> None:
        """Nothing of the direction is left behind any block, by the way that would be taken."""
        import mlx.core as mx

        from safesteer_mlx.method.direction import LEFT
        from safesteer_mlx.method.residual import ablate, blocks, left_by_ablation, unit

        published = left_by_ablation(self.model, self.vector, self.row)
        whole = published > LEFT
        ablated, streams = ablate(self.model, self.vector, whole), []
        with Wrapped(blocks(ablated), after=lambda i, out: (streams.append(stream_of(out)), out)[1]):
            ablated(self.row)
        r = unit(self.vector)
        left = max((mx.abs(x @ r) / mx.linalg.norm(x, axis=-1)).max().item() for x in streams)
        assert left <= LEFT, f"{left:.1%} of the stream is left"
        self.note = f"whole stream (the published way leaves {published:.1%})" if whole else ""

    def generation(self) -> None:
        """Steered answers in batches are those one at a time, or it is noticed that they are not."""
        from safesteer_mlx.method.residual import steer
        from safesteer_mlx.method.rollout import Sampling, generate, set_equal_batches
        from safesteer_mlx.method.run import batches_rightly

        steered = steer(self.model, 1, self.vector)
        alone = [generate(steered, [row], Sampling([], GREEDY, batch_size=1))[0].ids for row in ROWS]
        for row, ids in zip(ROWS, alone, strict=True):
            first = int(steered(self._rows([row]))[0, -1].argmax().item())
            assert ids[0] == first, "the first token is not the forward pass's"
        if not batches_rightly(self.model, ROWS, []):
            set_equal_batches(steered)
            if not batches_rightly(steered, [row[:4] for row in ROWS], []):
                self.note = "one at a time"
                return
            self.note = "in groups of one length"
        rows = [*ROWS, ROWS[0][::-1], ROWS[1][::-1]]  # two more, of lengths that are there
        alone = [generate(steered, [row], Sampling([], GREEDY, batch_size=1))[0].ids for row in rows]
        assert [c.ids for c in generate(steered, rows, Sampling([], GREEDY))] == alone, "batches change answers"

    def training(self) -> None:
        """A student has a gradient, of all blocks and of the last two, and the same with checkpoints."""
        import mlx.core as mx
        import mlx.nn as nn
        from mlx.utils import tree_flatten

        from safesteer_mlx.method.residual import answer_states, head
        from safesteer_mlx.method.student import make_student
        from safesteer_mlx.recipe import resolve

        prompts, answers = [row[:3] for row in ROWS], [row[3:] for row in ROWS]
        for layers in (-1, 2):
            grads = []
            for checkpointed in ("off", "on"):
                settings = {"num_layers": layers, "grad_checkpoint": checkpointed}
                student = make_student(self.model, resolve({}, settings)[0].train, 0)
                student.train()

                def loss(student: Any) -> Any:
                    z = head(student)(answer_states(student, prompts, answers)[None]).astype(mx.float32)
                    return (z * mx.sin(mx.arange(z.shape[-1]))).mean()

                grads.append(dict(tree_flatten(nn.value_and_grad(student, loss)(student)[1])))
            sizes = [sum(g.square().sum().item() for g in grad.values()) for grad in grads]
            assert sizes[0] > 0 and sizes[0] < float("inf"), "no gradient"
            assert all(alike(grads[1][n], g, 1e-2) or g.abs().max().item() < 1e-7 for n, g in grads[0].items()), (
                "checkpoint"
            )

    def reload(self) -> None:
        """Adapters, and the fused model, are read back by mlx-lm as they were."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        from safesteer_mlx.formats.fuse import fuse, plan
        from safesteer_mlx.method.student import make_student, save_adapters, with_adapters
        from safesteer_mlx.recipe import resolve

        train = resolve({}, {"num_layers": 2})[0].train
        student = make_student(self.model, train, 0)
        own_file = self._again(self.model)
        own = tree_flatten(student.trainable_parameters())
        student.load_weights([(n, 0.05 * mx.random.normal(w.shape)) for n, w in own if "lora_b" in n], strict=False)
        expected = student(self.row)
        with tempfile.TemporaryDirectory() as folder:
            save_adapters(Path(folder), student, train, "m", 0)
            assert alike(with_adapters(self.model, Path(folder))(self.row), expected), "adapters"
        if not alike(own_file, self.plain, 5e-3):
            self.note = "mlx-lm does not read back its own file of it"
            return
        fused = fuse(student, plan(student, "auto"), [])
        assert alike(self._again(fused), expected, 5e-3), "fused and reloaded"

    def _again(self, model: Any) -> Any:
        """The logits of a model that mlx-lm has written and read."""
        from mlx_lm.utils import load_model, save_config, save_model

        with tempfile.TemporaryDirectory() as folder:
            save_model(folder, model)
            save_config(copy.deepcopy(self.config), Path(folder) / "config.json")
            again, _ = load_model(Path(folder))
            return again(self.row)

    def half(self) -> None:
        """In bfloat16 it is read, steered, and gives numbers."""
        import mlx.core as mx

        from safesteer_mlx.method.residual import check_stream, steer

        model, _ = build(self.name)
        model.set_dtype(mx.bfloat16)
        check_stream(model, self.row)
        assert are_numbers(steer(model, 1, self.vector)(self.row)), "not finite"

    def four_bits(self) -> None:
        """With 4-bit weights it is read, and a student of it is made and fused again."""
        from mlx_lm.utils import quantize_model

        from safesteer_mlx.formats.fuse import fuse, plan, quantization_of
        from safesteer_mlx.method.residual import check_stream
        from safesteer_mlx.method.student import make_student
        from safesteer_mlx.recipe import resolve

        model, config = build(self.name)
        model, _ = quantize_model(model, config, 32, 4)
        check_stream(model, self.row)
        student = make_student(model, resolve({}, {"num_layers": 2})[0].train, 0)
        fused = fuse(student, plan(student, "auto"), [ROWS[0]])
        assert quantization_of(fused), "fused without a grid"
        assert are_numbers(fused(self.row)), "not finite"

    def memory(self) -> None:
        """There is a plan, it knows the blocks, and what a training pass takes."""
        import mlx.core as mx
        from check_memory import measure
        from shapes import memory_shape

        from safesteer_mlx.method.memory_plan import plan
        from safesteer_mlx.method.passes import Passes
        from safesteer_mlx.recipe import resolve
        from safesteer_mlx.system.memory import this_machine
        from safesteer_mlx.system.screen import UserError

        shape, recipe = memory_shape(self.model, self.config), resolve({}, {})[0]
        assert shape.n_layers == len(self.blocks), f"{shape.n_layers} blocks planned, {len(self.blocks)} there"
        passes = Passes(self.model, shape)
        try:
            plan(recipe, passes, this_machine(), 64)
        except UserError as error:
            assert "cannot be followed" in str(error), str(error)
            self.note = "memory is not planned, since it decides what to compute while it computes"
            return
        cache = mx.set_cache_limit(0)
        measured = median(measure(self.model, *PASS, ("off",))["gradient"] for _ in range(3))
        mx.set_cache_limit(cache)
        self.planned = passes.gradient(recipe.train, *PASS, False) / measured
        assert self.planned >= LEAST, f"planned {self.planned:.2f} of what was measured"

    @staticmethod
    def _rows(rows: list[list[int]]) -> Any:
        import mlx.core as mx

        return mx.array(rows)


CHECKS = (
    "reading",
    "head",
    "steering",
    "ablation",
    "generation",
    "training",
    "reload",
    "half",
    "four_bits",
    "memory",
)


def fault(error: Exception) -> str:
    """Whose it is: mlx-lm's, where its code raised it or the sentence says so, else ours."""
    where, said = traceback.extract_tb(error.__traceback__)[-1].filename, str(error)
    return "mlx-lm's" if "mlx_lm" in Path(where).parts or said.startswith("mlx-lm") or "VJP" in said else "ours"


def try_family(name: str) -> dict[str, Any]:
    """Every check of one family, in this process."""
    import safesteer_mlx  # noqa: F401  before MLX
    from safesteer_mlx.system.screen import UserError

    result: dict[str, Any] = {"name": name, "failed": {}, "notes": []}
    try:
        survey = Survey(name)
    except UserError as error:
        return {**result, "refused": str(error), "fault": fault(error)}
    except Exception as error:  # whatever it is, it is the result
        return {**result, "failed": {"build": f"{type(error).__name__}: {error}"[:200]}, "fault": fault(error)}
    for check in CHECKS:
        survey.note = ""
        try:
            getattr(survey, check)()
        except UserError as error:
            result["failed"][check] = f"refused: {error}"[:200]
            result["fault"] = fault(error)
        except Exception as error:
            if BACKEND in str(error):
                result["notes"].append("experts in half precision: not on MLX's CPU backend")
                continue
            if "VJP" in str(error):  # which `train` says in one sentence
                sentence = f"mlx-lm's code has no gradient here ({error})"[:200]
                return {**result, "refused": sentence, "fault": fault(error)}
            where = traceback.extract_tb(error.__traceback__)[-1]
            result["failed"][check] = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"[
                :240
            ]
            result["fault"] = fault(error)
        if survey.note:
            result["notes"].append(survey.note)
    return {**result, "planned": survey.planned}


def in_process(name: str) -> dict[str, Any]:
    """`try_family` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"name": name, "failed": {"time": f"more than {SECONDS} s"}, "notes": []}
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"name": name, "failed": {"process": f"exit {done.returncode}: {last}"[:200]}, "notes": []}


def verdict(result: dict[str, Any]) -> str:
    """yes, refused, or what fails, in words."""
    if refused := result.get("refused"):
        return f"refused: {refused}"
    if not result["failed"]:
        return "yes" + (f" ({', '.join(result['notes'])})" if result["notes"] else "")
    return "; ".join(f"{check}: {text}" for check, text in result["failed"].items())


def page(results: list[dict[str, Any]], cannot: dict[str, str]) -> str:
    """docs/models.md."""
    from importlib.metadata import version

    good = [r for r in results if verdict(r).startswith("yes")]
    refused = [r for r in results if "refused" in r]
    failed = [r for r in results if r not in good and r not in refused]
    versions = f"mlx-lm {version('mlx-lm')} (MLX {version('mlx')}, Linux, CPU backend)"
    counts = f"{len(good)} of {len(results)} pass everything, {len(refused)} are refused, {len(failed)} fail"
    planned = {r["name"]: r["planned"] for r in results if r.get("planned") is not None}
    low = ", ".join(f"{name} ({ratio:.2f})" for name, ratio in planned.items() if round(ratio, 2) < ENOUGH)
    below = textwrap.fill(f"Planned below {ENOUGH} of what was measured: {low or 'none'}.", 120)
    sizes = {"rows": PASS[0], "length": PASS[1], "least": LEAST, "below": below}
    lines = [PAGE.format(versions=versions, counts=counts, more=len(cannot), **sizes).rstrip()]
    for r in results:
        word = "yes" if r in good else "refused" if r in refused else "**no**"
        whose = "" if r in good else f" ({r.get('fault', 'whose is not told')})"
        notes = "; ".join(r["notes"]) if r in good else verdict(r).removeprefix("refused: ")
        ratio = f"{planned[r['name']]:.2f}" if r["name"] in planned else ""
        lines.append(f"| {r['name']} | {word}{whose} | {ratio} | {notes.replace('|', '/')} |")
    for name, reason in cannot.items():
        whose = "needs Metal" if "Metal" in reason else "mlx-lm's"
        lines.append(f"| {name} | – ({whose}) | | cannot be built here: {reason.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try families; write the page if all were tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(try_family(args.one)))
        return
    known, cannot = configs()
    results = []
    for name in args.families or sorted(known, key=str.lower):
        results.append(in_process(name))
        print(f"{name}: {verdict(results[-1])}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    if not args.families:
        (ROOT / "docs" / "models.md").write_text(page(results, cannot), "utf-8")
    n_good = sum(verdict(r).startswith("yes") for r in results)
    n_refused = sum("refused" in r for r in results)
    print(f"{n_good} of {len(results)} pass everything, {n_refused} are refused, {len(cannot)} cannot be built")


if __name__ == "__main__":
    main()
