"""Judges made up for tests: a model whose next token depends on the last one alone, and whose logits are known.

Its blocks add nothing, each token of its script has a coordinate of its own, and so the head's column of that
coordinate is what it says next. It reads nothing of the case: it says the same of every answer.
"""

import json
import shutil
from math import sqrt
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer

from safesteer_mlx.recipe import MODELS

TINY = MODELS / "tiny-chat"
WIDTH = 16
SURE = 20.0


def make_judge(folder: Path, said: str, words: tuple[str, str], logits: tuple[float, float], chat: bool = True) -> Path:
    """A judge that says `said`, whose deciding word is one of `words`, (safe, unsafe) with these logits there.

    Without `chat` it has no chat template.
    """
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("data", "*.safetensors"))
    word = next(w for w in words if w in said.split())
    at = said.rindex(word) if word == words[0] else said.index(word)
    before, after = said[:at], said[at + len(word) :]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [part for part in (before, *words, after) if part]
    tokenizer.add_tokens(tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {part: tokenizer.token_to_id(part) for part in tokens}
    config = json.loads((folder / "config.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if not chat:
        del settings["chat_template"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    args = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "intermediate_size": WIDTH,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-9,
        "vocab_size": tokenizer.get_vocab_size(),
        "tie_word_embeddings": False,
        "eos_token_id": config["eos_token_id"],
    }
    (folder / "config.json").write_text(json.dumps(args))

    model = llama.Model(llama.ModelArgs.from_dict(args))
    # Coordinate 0 is whatever ends the prompt, the others are the script's.
    place = {token: i + 1 for i, token in enumerate(ids.values())}
    embedding = mx.zeros((args["vocab_size"], WIDTH))
    embedding[:, 0] = 1.0
    for token, i in place.items():
        embedding[token] = mx.zeros(WIDTH)
        embedding[token, i] = 1.0
    head = mx.zeros((args["vocab_size"], WIDTH))

    def then(last: int, *following: tuple[int, float]) -> None:
        for token, logit in following:
            head[token, last] = logit / sqrt(WIDTH)  # the norm makes √WIDTH of a 1 alone

    deciding = [(ids[w], logit) for w, logit in zip(words, logits, strict=True)]
    if before:
        then(0, (ids[before], SURE))
        then(place[ids[before]], *deciding)
    else:
        then(0, *deciding)
    for w in words:
        then(place[ids[w]], (ids[after] if after and w == word else args["eos_token_id"], SURE))
    if after:
        then(place[ids[after]], (args["eos_token_id"], SURE))
    weights = {
        name: mx.zeros_like(w) if name.endswith(("o_proj.weight", "down_proj.weight")) else w
        for name, w in tree_flatten(model.parameters())
    }
    weights |= {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder
