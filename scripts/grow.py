"""The bundled model inside the shape of a large one: it answers as before, and costs what the large one costs.

    python scripts/grow.py qwen2.5-7b             writes big-models/qwen2.5-7b (4.3 GB, in 4 bits)
    safesteer-mlx align big-models/qwen2.5-7b --memory-limit 11GB

So a whole run can be measured at real size with no download: its memory, its seconds, its stages. The small weights
fill a corner of each large matrix, the rest is zero; blocks between the small one's add nothing. One more dimension of
the hidden state is the same for every token: it is what keeps the large vocabulary's other tokens from being drawn.
"""

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safesteer_mlx  # isort: skip  # noqa: F401  before mlx
import mlx.core as mx
import numpy as np
from shapes import QWEN_7B

ROOT = Path(__file__).resolve().parent.parent
SMALL = ROOT / "models" / "tiny-chat"
SHAPES = {"qwen2.5-7b": QWEN_7B}  # of the bundled model's family, with no fewer heads of keys and values
GROUP, WORDS = 64, 8  # columns that share a scale, and the 32-bit words that hold them in 4 bits
CONSTANT = 0.01  # in the dimension that every token shares
UNUSED = -3e5  # what the head makes of that dimension for a token that the tokenizer has not


class Quantized:
    """A matrix in 4 bits, by its parts: `words` (R, C / 8), `scales` and `biases` (R, C / 64)."""

    def __init__(self, words: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> None:
        self.words, self.scales, self.biases = words, scales, biases

    @classmethod
    def zeros(cls, rows: int, columns: int) -> "Quantized":
        groups = columns // GROUP
        return cls(
            np.zeros((rows, groups * WORDS), np.uint32), *(np.zeros((rows, groups), np.float32) for _ in range(2))
        )

    def place(self, other: "Quantized", rows: Sequence[int], groups: Sequence[int]) -> None:
        """Another's rows, and its groups of columns, at these: the same codes, so nothing is rounded again."""
        words = [group * WORDS + i for group in groups for i in range(WORDS)]
        self.words[np.ix_(rows, words)] = other.words
        self.scales[np.ix_(rows, groups)] = other.scales
        self.biases[np.ix_(rows, groups)] = other.biases

    def set_first(self, rows: slice, group: int, value: float) -> None:
        """One value, in the first column of a group that is zero."""
        self.words[rows, group * WORDS], self.scales[rows, group] = 1, value

    def tensors(self, name: str) -> dict[str, mx.array]:
        scales, biases = (mx.array(part).astype(mx.bfloat16) for part in (self.scales, self.biases))
        return {f"{name}.weight": mx.array(self.words), f"{name}.scales": scales, f"{name}.biases": biases}


class Grown:
    """The tensors of the large model, by name."""

    def __init__(self, shape: dict[str, Any], small: Path = SMALL) -> None:
        self.shape, self.config = shape, json.loads((small / "config.json").read_text())
        self.weights = {name: np.array(value) for name, value in mx.load(str(small / "model.safetensors")).items()}
        self.width, self.heads = self.config["hidden_size"], self.config["num_attention_heads"]
        self.head, self.large_head = self.width // self.heads, shape["hidden"] // shape["heads"]
        self.tensors: dict[str, mx.array] = {}

    def grow(self) -> dict[str, mx.array]:
        """All of them."""
        small, large = self.config["num_hidden_layers"], self.shape["layers"]
        places = {i * large // small: i for i in range(small)}
        self._embed()
        for layer in range(large):
            self._block(f"model.layers.{layer}.", places.get(layer))
        self._norm("model.norm.weight", self.weights["model.norm.weight"], constant=1.0)
        return self.tensors

    def _keep(self, name: str, matrix: Quantized) -> None:
        self.tensors |= matrix.tensors(name)
        mx.eval(self.tensors)

    def _read(self, name: str, scale: float = 1.0) -> Quantized:
        words, scales, biases = (self.weights[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
        return Quantized(words, scales * scale, biases * scale)

    def _norm(self, name: str, values: np.ndarray, constant: float = 0.0) -> None:
        """The mean of squares is over a larger width: what it divides by is smaller by this root."""
        whole = np.zeros(self.shape["hidden"], np.float32)
        whole[: self.width], whole[self.width] = values, constant
        self.tensors[name] = mx.array(whole * math.sqrt(self.width / self.shape["hidden"])).astype(mx.bfloat16)

    def _embed(self) -> None:
        known, group = self._read("model.embed_tokens"), self.width // GROUP
        rows = len(known.words)
        for name, where, value in (
            ("model.embed_tokens", slice(None), CONSTANT),
            ("lm_head", slice(rows, None), UNUSED),
        ):
            matrix = Quantized.zeros(self.shape["vocabulary"], self.shape["hidden"])
            matrix.place(known, range(rows), range(group))
            matrix.set_first(where, group, value)
            self._keep(name, matrix)

    def _block(self, name: str, source: int | None) -> None:
        shape, of = self.shape, f"model.layers.{source}."
        hidden, inner = shape["hidden"], shape["intermediate"]
        self._attention(f"{name}self_attn.", None if source is None else f"{of}self_attn.")
        ends = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        for part, (rows, columns) in ends.items():
            matrix = Quantized.zeros(rows, columns)
            if source is not None:
                small = self._read(f"{of}mlp.{part}")
                matrix.place(small, range(len(small.words)), range(small.scales.shape[1]))
            self._keep(f"{name}mlp.{part}", matrix)
        for part in ("input_layernorm", "post_attention_layernorm"):
            values = np.ones(self.width) if source is None else self.weights[f"{of}{part}.weight"]
            self._norm(f"{name}{part}.weight", values)

    def _attention(self, name: str, of: str | None) -> None:
        shape, head, half = self.shape, self.large_head, self.head // 2
        ratio, shared = head // self.head, shape["heads"] // shape["kv_heads"]
        # Rotary pairs lie half a head apart, and every `ratio`-th of the large head turns as fast as one of the small.
        turned = [ratio * i for i in range(half)] + [head // 2 + ratio * i for i in range(half)]
        for part, heads, step, within, scale in (
            # the scores are divided by the root of a head's size
            ("q_proj", shape["heads"], shared * head, turned, math.sqrt(ratio)),
            ("k_proj", shape["kv_heads"], head, turned, 1.0),
            ("v_proj", shape["kv_heads"], head, list(range(self.head)), 1.0),
        ):
            matrix, bias = Quantized.zeros(heads * head, shape["hidden"]), np.zeros(heads * head, np.float32)
            if of is not None:
                rows = [h * step + i for h in range(self.heads) for i in within]
                matrix.place(self._read(of + part, scale), rows, range(self.width // GROUP))
                bias[rows] = self.weights[f"{of}{part}.bias"] * scale
            self._keep(name + part, matrix)
            self.tensors[f"{name}{part}.bias"] = mx.array(bias).astype(mx.bfloat16)
        matrix = Quantized.zeros(shape["hidden"], shape["heads"] * head)
        if of is not None:
            small = self._read(f"{of}o_proj")
            # A head of the large one begins a group of its own, which the head's words fill more than once: what they
            # become the second time does not matter, since of the large head's other values all are zero.
            own, per = self.head // 8, GROUP // self.head
            words = [h * own + i for h in range(self.heads) for i in list(range(own)) * per]
            groups = [h // per for h in range(self.heads)]
            apart = Quantized(small.words[:, words], small.scales[:, groups], small.biases[:, groups])
            matrix.place(apart, range(self.width), [h * shared * head // GROUP for h in range(self.heads)])
        self._keep(f"{name}o_proj", matrix)


def config_of(small: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    """The large model's config.json."""
    return small | {
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "intermediate_size": shape["intermediate"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "vocab_size": shape["vocabulary"],
        "rms_norm_eps": small["rms_norm_eps"] * small["hidden_size"] / shape["hidden"],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def write(shape: dict[str, Any], folder: Path) -> None:
    """The large model in a folder, with the small one's tokenizer and prompts."""
    shutil.copytree(SMALL, folder, ignore=shutil.ignore_patterns("model.safetensors"), dirs_exist_ok=True)
    grown = Grown(shape)
    mx.save_safetensors(str(folder / "model.safetensors"), grown.grow(), metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config_of(grown.config, shape), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", type=Path, default=ROOT / "big-models", help="the folder it is written into")
    args = parser.parse_args()
    write(SHAPES[args.shape], args.out / args.shape)
    print(f"wrote {args.out / args.shape}")


if __name__ == "__main__":
    main()
