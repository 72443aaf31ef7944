"""The exported thing, asked by what its users will ask it with: mlx-lm, transformers, PEFT, llama.cpp, or a server.

PyTorch and llama.cpp are imported here alone, and only for an export that they read.
"""

import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..evals.fidelity import (
    KL_PROMPTS,
    Fidelity,
    Logits,
    Question,
    Replies,
    ask,
    logits_of,
    mean_kl,
    questions,
    recorded,
    replies_of,
)
from ..evals.scores import HOW
from ..method.prompts import render
from ..method.residual import hidden_states
from ..method.rollout import Completion, Ids, Sampling, answer_text, generate, has_equal_batches, set_equal_batches
from ..method.run import after_thought, batch_size
from ..method.student import with_adapters
from ..recipe import HELD_OUT_TOKENS
from ..system.files import MOST_TEMPLATE, parse_json, read_text, user_path
from ..system.finished import FinishedRun
from ..system.load import Loaded, asked_as, read_tokenizer
from ..system.screen import Advance, Screen, UserError

SERVER_SECONDS = 300  # for one answer
MOST_REPLY = 10_000_000  # bytes of it
_NO_CODE: dict[str, Any] = {"trust_remote_code": False}  # said, since transformers asks the user where nobody says


@dataclass(frozen=True)
class Reader:
    """A shipped model: what it replies and, where they can be had, its logits. `samples` is False where it
    is only asked greedily."""

    replies: Replies
    logits: Logits | None = None
    samples: bool = True


def check_installed(module: str, for_what: str) -> None:
    """Is an optional library there? Else a UserError."""
    if find_spec(module) is None:
        package = {"llama_cpp": "llama-cpp-python"}.get(module, module)
        raise UserError(f"{for_what} needs {package}; pip install 'safesteer-mlx[export]'")


def reader_for(
    kind: str,
    what: str,
    base: Loaded,
    sampling: Sampling,
    seed: int,
    thinking: str = "auto",
    served_model: str | None = None,
) -> Reader:
    """What asks `what`, a folder, a file or an address, in the way of this `kind`, with the run's switch of the chat
    template; a UserError if that cannot be."""
    if kind == "server":
        return _server(what, sampling, seed, thinking, served_model)
    path = user_path(what)
    if kind == "mlx":
        return _mlx(path, base, sampling, seed, thinking)
    if kind == "adapter":
        return _adapter(path, base, sampling, seed)
    if kind == "transformers":
        return _transformers(path, base, sampling)
    if kind == "peft":
        return _peft(path, base, sampling)
    return _llama_cpp(path, base, sampling)


def kind_of(what: str) -> str:
    """How something is asked if nobody says; a UserError if it is nothing that can be asked."""
    if what.startswith(("http://", "https://")):
        return "server"
    path = user_path(what)
    if path.is_file() and (path.suffix == ".gguf" or path.name == "Modelfile"):
        return "llama.cpp"
    if (path / "adapter_model.safetensors").is_file():
        return "peft"
    if (path / "adapters.safetensors").is_file():
        return "adapter"
    if (path / "config.json").is_file():
        return "mlx"
    raise UserError(f"{what} is no folder of a model, no .gguf file and no http address; give one of these")


def _mlx(path: Path, base: Loaded, sampling: Sampling, seed: int, thinking: str) -> Reader:
    from mlx_lm import load

    from ..system.model_files import check_model_folder

    check_model_folder(path, base.trusted)
    trust: dict[str, Any] = {"trust_remote_code": base.trusted}
    with _reading("mlx_lm.load", path):
        model, _, config = load(str(path), tokenizer_config=trust, return_config=True, **trust)  # type: ignore[misc]
    tokenizer = read_tokenizer(str(path), path, config, base.trusted)  # its own, as the base's was read
    tokenizer = asked_as(tokenizer, thinking)
    if (vocabulary := len(tokenizer.get_vocab())) != len(base.tokenizer.get_vocab()):
        raise UserError(f"{path} has a vocabulary of {vocabulary}, another than the run's model; give an export of it")
    return _mlx_reader(model, tokenizer, base, sampling, seed)


def _adapter(path: Path, base: Loaded, sampling: Sampling, seed: int) -> Reader:
    from mlx_lm import load

    trust: dict[str, Any] = {"trust_remote_code": base.trusted}
    with _reading("mlx_lm.load", path):
        model = load(str(base.path), adapter_path=str(path), tokenizer_config=trust, **trust)[0]
    return _mlx_reader(model, base.tokenizer, base, sampling, seed)


def _mlx_reader(model: nn.Module, tokenizer: Any, base: Loaded, sampling: Sampling, seed: int) -> Reader:
    model.eval()
    if has_equal_batches(base.model):
        set_equal_batches(model)
    own = replace(sampling, eos_ids=sorted(tokenizer.eos_token_ids))
    return Reader(replies_of(model, tokenizer, own, seed), logits_of(model))


def _by_ids(
    base: Loaded, sampling: Sampling, greedy: Callable[[Ids, int], list[int]], logits_of_one: Callable[[Ids, Ids], Any]
) -> Reader:
    """A reader that is given ids and gives ids or logits, one prompt at a time."""

    def reply(question: Question, sampled: bool) -> tuple[str, bool]:
        prompt = render(base.tokenizer, question.text)
        ids = greedy(prompt, sampling.max_tokens)
        ids = ids[: sampling.most(prompt, ids)]
        end = next((i for i, token in enumerate(ids) if token in sampling.eos_ids), None)
        completion = Completion(ids if end is None else ids[: end + 1], end is not None)
        return answer_text(base.tokenizer, prompt, completion), completion.finished

    def logits(prompts: Sequence[Ids], answers: Sequence[Ids]) -> mx.array:
        return mx.concatenate([mx.array(logits_of_one(*pair)) for pair in zip(prompts, answers, strict=True)])

    return Reader(_one_by_one(reply), logits, samples=False)


def _one_by_one(reply: Callable[[Question, bool], tuple[str, bool]]) -> Replies:
    def replies(asked: Sequence[Question], sampled: bool, progress: Advance) -> list[tuple[str, bool]]:
        texts = []
        for n, question in enumerate(asked, start=1):
            texts.append(reply(question, sampled))
            progress(n, len(asked))
        return texts

    return replies


@contextmanager
def _reading(library: str, path: Path) -> Iterator[None]:
    """What a library prints while it loads is dropped; what it raises at files that do not fit becomes a sentence."""
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    except Exception as error:
        raise UserError(f"{library} cannot read {path} ({type(error).__name__}: {error!s:.150})") from None


def _torch_reader(model: Any, base: Loaded, sampling: Sampling) -> Reader:
    import torch  # type: ignore[import-not-found]

    model.eval()
    eos = list(sampling.eos_ids)

    def greedy(prompt: Ids, most: int) -> list[int]:
        with torch.no_grad():
            out = model.generate(
                torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=most,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=eos,
                pad_token_id=eos[0],
            )
        return out[0, len(prompt) :].tolist()

    def logits(prompt: Ids, answer: Ids) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float().numpy()

    return _by_ids(base, sampling, greedy, logits)


def _transformers(path: Path, base: Loaded, sampling: Sampling) -> Reader:
    check_installed("torch", "asking with transformers")
    from transformers import AutoModelForCausalLM

    with _reading("transformers", path):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", local_files_only=True, output_loading_info=True, device_map=None, **_NO_CODE
        )
    missing = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if missing:
        raise UserError(
            f"transformers knows this family's weights by other names ({missing[0]} first); export --to mlx"
        )
    return _torch_reader(model, base, sampling)


def _peft(path: Path, base: Loaded, sampling: Sampling) -> Reader:
    for library in ("torch", "peft"):
        check_installed(library, "asking with PEFT")
    import tempfile

    import peft  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    from .folders import write_hf
    from .fuse import fuse, plan

    with tempfile.TemporaryDirectory() as scratch, _reading("PEFT", path):
        # No adapters to fuse: quantized weights are spelled out, which they are only on the CPU backend already.
        write_hf(base, fuse(base.model, plan(base.model, "32"), []), mx.float32, Path(scratch) / "base")
        model = AutoModelForCausalLM.from_pretrained(
            Path(scratch) / "base", dtype="auto", local_files_only=True, **_NO_CODE
        )
        model = peft.PeftModel.from_pretrained(model, str(path))
    return _torch_reader(model, base, sampling)


def _llama_cpp(path: Path, base: Loaded, sampling: Sampling) -> Reader:
    check_installed("llama_cpp", "asking with llama.cpp")
    import llama_cpp  # type: ignore[import-not-found]

    files = {"FROM": str(path), "ADAPTER": None}
    if path.name == "Modelfile":
        text = read_text(path, str(path), "give an export's Modelfile", MOST_TEMPLATE)
        lines = [line.split(maxsplit=1) for line in text.splitlines()]
        files |= {line[0]: str(path.parent / line[1]) for line in lines if len(line) == 2 and line[0] in files}
    with _reading("llama.cpp", path):
        model = llama_cpp.Llama(
            files["FROM"], lora_path=files["ADAPTER"], n_ctx=0, n_gpu_layers=0, logits_all=True, verbose=False
        )

    def greedy(prompt: Ids, most: int) -> list[int]:
        ids: list[int] = []
        for token in model.generate(list(prompt), temp=0.0, repeat_penalty=1.0, reset=True):
            ids.append(int(token))
            if token in sampling.eos_ids or len(ids) >= most:
                break
        return ids

    def logits(prompt: Ids, answer: Ids) -> np.ndarray:
        model.reset()
        model.eval([*prompt, *answer])
        return np.array(model.scores[len(prompt) - 1 : len(prompt) + len(answer) - 1], np.float32)

    return _by_ids(base, sampling, greedy, logits)


@dataclass
class _Server:
    """An OpenAI-compatible server's chat."""

    url: str
    longest: int  # answer, in tokens
    model: str | None
    seed: int
    thinking: str
    names: list[str] = field(default_factory=list)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that the server answers; a UserError if it does not, or with an error."""
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=SERVER_SECONDS) as response:
                return parse_json(response.read(MOST_REPLY))
        except urllib.error.HTTPError as error:
            text = error.read(200).decode("utf-8", "replace")
            which = f"; it serves {', '.join(self.names[:5])}: give one with --served-model" if self.names else ""
            raise UserError(f"the server {self.url} answers HTTP {error.code} ({text.strip()}){which}") from None
        except (OSError, ValueError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"the server {self.url} does not answer ({reason}); start it, or check the address"
            ) from None

    def reply(self, question: Question, sampled: bool) -> tuple[str, bool]:
        """What it says to one question, in a conversation of its own."""
        body = {
            "messages": [{"role": "user", "content": question.text}],
            "max_tokens": self.longest,
            "temperature": 1.0 if sampled else 0.0,
            "top_p": 1.0,
            "seed": (self.seed * 1_000_003 + question.place[0] * 10_007 + question.place[1]) % 2**31,
        } | ({} if self.model is None else {"model": self.model})
        if self.thinking != "auto":  # as mlx_lm.server, llama.cpp's and vLLM's take it
            body["chat_template_kwargs"] = {"enable_thinking": self.thinking == "on"}
        try:
            choice = self.ask("/chat/completions", body)["choices"][0]
            text = choice["message"].get("content")
            if not isinstance(text, str | None):
                raise TypeError("no text")
            return text or "", choice["finish_reason"] == "stop"
        except (KeyError, IndexError, TypeError, AttributeError):
            raise UserError(
                f"the server {self.url} answers with no chat completion; is it OpenAI-compatible?"
            ) from None


def _server(url: str, sampling: Sampling, seed: int, thinking: str, model: str | None) -> Reader:
    url = url.rstrip("/").removesuffix("/v1") + "/v1"
    server = _Server(url, sampling.max_tokens, model, seed, thinking)
    try:
        server.names = [str(entry["id"]) for entry in server.ask("/models")["data"]]
    except (UserError, KeyError, TypeError):
        pass  # only for what is said if it answers no chat: mlx_lm.server lists none where the Hub's cache is empty
    return Reader(_one_by_one(server.reply))


def compare(
    run: FinishedRun, base: Loaded, against: str, kind: str, n: int | None, served_model: str | None, screen: Screen
) -> Fidelity:
    """Ask `against`, in the way of this `kind`, the first `n` held-out prompts of each kind (None: all that the run
    asked), and hold the answers against those of the run's base and student; a UserError if it cannot be asked.

    The student's own answers are those that the run kept; if it kept none, base and student are asked again. `exact`
    in what is returned says that the student computes in float32, so that its like can be told from it by a hair.
    """
    recipe, seed = run.recipe, run.recipe.run.seed
    base = replace(base, thinks=run.manifest.get("thinks", base.thinks))  # as scored: one that could may not have
    longest = max(HELD_OUT_TOKENS, recipe.train.longest) if base.thinks else HELD_OUT_TOKENS
    size = batch_size(base, recipe.run.generation_batch_size, screen)
    sampling = Sampling(base.eos_ids, longest, batch_size=size, after=after_thought(base, HELD_OUT_TOKENS))
    student, prompts = with_adapters(base.model, run.folder), questions(run, base, n)
    if (scores := recorded(run, prompts)) is None:
        scores = {}
        for name, model in (("base", base.model), ("student", student)):
            with screen.stage(f"asking the {name} again") as advance:
                scores[name] = ask(replies_of(model, base.tokenizer, sampling, seed), prompts, HOW, advance)

    reader = reader_for(kind, against, base, sampling, seed, recipe.run.thinking, served_model)
    with screen.stage(f"asking {against}") as advance:
        scores["shipped"] = ask(reader.replies, prompts, HOW if reader.samples else HOW[:1], advance)
    kl = dict.fromkeys(("harmful", "harmless"), math.nan)
    for name in kl if reader.logits is not None else ():
        rows = [render(base.tokenizer, q.text) for q in prompts if q.kind == name][:KL_PROMPTS]
        own = [c.ids for c in generate(student, rows, sampling)]
        kl[name] = mean_kl(student, reader.logits, rows, own)
    in_full = hidden_states(student, mx.array([[0]])).dtype == mx.float32
    return Fidelity(scores, kl["harmful"], kl["harmless"], exact=in_full)
