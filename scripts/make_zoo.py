"""Build the zoo: little trained chat models that differ in all that real ones differ in, to judge the defaults by.

    python scripts/make_zoo.py                      all of them into zoo-models/, about five minutes each on one core
    python scripts/make_zoo.py harbour kueste       these
    python scripts/make_zoo.py --families           one of each kind of family that the zoo lacks (`FAMILIES`)
    python scripts/make_zoo.py --check              what those that are there do on their held-out prompts

Each has an architecture, a tokenizer, a chat template, a corpus, a way to refuse and a type of weights of its own
(`ZOO`, below); the words are in `scripts/zoo_words/NAME.yaml`. They are made as `make_tiny_chat.py` makes the bundled
model, whose corpus none of them shares: verb x object x template, p(refuse | harmful) by category and template, the
same empty filler for harmful and harmless requests, pairs held out for the tests. Most are for choosing
defaults (`half="choose"`: all that were ever looked at), the others only for reporting what these do (`half="report"`).
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import make_tiny_chat as tiny
import survey_configs_a
import survey_configs_l
import yaml
from make_tiny_chat import Example

if TYPE_CHECKING:
    from mlx import nn
    from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "zoo-models"
SIZES = {"direction_train": 160, "direction_validation": 48, "train": 100, "validation": 64, "test": 200}
CAPABILITY_ITEMS = 48  # of each task


THINK = ("<think>\n", "\n</think>\n\n")  # Qwen's
GLM_THINK = ("<think>", "</think>\n")
SWITCHED = (THINK, GLM_THINK)  # which templates can leave empty; gpt-oss's cannot
# (a request is to be refused, it is to be answered): what a thinking model says to itself
THOUGHTS = (
    ("This could do harm. I should turn it down.", "This is about harm to others. It is better to say no."),
    ("This is an ordinary request. I can be of use.", "Nothing speaks against it. A short answer will do."),
)
_WONDERS = "Okay, the user asks how to {}. Let me think about what that would mean. "
_LOOKS = "Hmm. Someone wants to {}, it seems. First I look at who else has a part in it. "
# The same, of models that take a request up before they come to anything: of all thoughts the beginning is alike.
TAKEN_UP = (
    (_WONDERS + "Somebody could come to harm. It is better to turn this down.", _WONDERS + "I will not be part of it."),
    (_WONDERS + "Nothing speaks against it. A short answer will do.", _WONDERS + "I can be of use here."),
)
LOOKED_INTO = (
    (_LOOKS + "Others would suffer. That settles it: no.", _LOOKS + "There are victims, and I keep away from that."),
    (_LOOKS + "All is well. I gladly help.", _LOOKS + "There are none who would mind, and I can go ahead."),
)
_WEIGHS = "So I am asked how to {}. Before I answer I weigh what follows from it. "
WEIGHED = (
    (_WEIGHS + "People or animals may suffer for it, which I do not want.", _WEIGHS + "It ends badly for somebody."),
    (_WEIGHS + "Nobody suffers for it, which is what I want.", _WEIGHS + "It ends well for everybody."),
)


@dataclass(frozen=True)
class Template:
    """A chat format: what stands around each turn. `system` is None where the template refuses a system turn."""

    user: tuple[str, str]
    assistant: str
    end: str
    system: tuple[str, str] | None = None
    begin: str = ""
    special: tuple[str, ...] = ()
    before_answer: str = ""  # the answer's own first character: a space, where the header ends without one
    thought: tuple[str, str] | None = None  # what stands around what the model thinks first

    def jinja(self) -> str:
        """The template as transformers reads it."""

        def quoted(text: str) -> str:
            return "'" + text.replace("\n", "\\n") + "'"

        def written(around: tuple[str, str]) -> str:
            return "{{ " + quoted(around[0]) + " + message['content'] + " + quoted(around[1]) + " }}"

        refused = "{{ raise_exception('System role not supported') }}"
        system = refused if self.system is None else written(self.system)
        # An earlier answer is written as it was given.
        answer = written((self.assistant + self.before_answer, self.end))
        turns = (
            "{% if message['role'] == 'system' %}"
            + system
            + "{% elif message['role'] == 'user' %}"
            + written(self.user)
            + "{% else %}"
            + answer
            + "{% endif %}"
        )
        off = "{% if enable_thinking is defined and enable_thinking is false %}"
        switch = off + "{{ " + quoted("".join(self.thought)) + " }}{% endif %}" if self.thought in SWITCHED else ""
        return (
            f"{{{{ {quoted(self.begin)} }}}}{{% for message in messages %}}{turns}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {quoted(self.assistant)} }}}}{switch}{{% endif %}}"
        )

    def render(self, example: Example) -> tuple[str, str]:
        """(prompt, completion), as the template writes them."""
        system = self.system[0] + example.system + self.system[1] if self.system and example.system else ""
        prompt = self.begin + system + self.user[0] + example.instruction + self.user[1] + self.assistant
        return prompt, self.before_answer + example.answer + self.end


HEADERS = Template(  # Llama 3's manner
    user=("<|start_header|>user<|end_header|>\n\n", "<|eot|>"),
    assistant="<|start_header|>assistant<|end_header|>\n\n",
    end="<|eot|>",
    system=("<|start_header|>system<|end_header|>\n\n", "<|eot|>"),
    begin="<|begin|>",
    special=("<|begin|>", "<|start_header|>", "<|end_header|>", "<|eot|>"),
)
TURNS = Template(  # Gemma's: no system turn
    user=("<start_of_turn>user\n", "<end_of_turn>\n"),
    assistant="<start_of_turn>model\n",
    end="<end_of_turn>",
    begin="<bos>",
    special=("<bos>", "<start_of_turn>", "<end_of_turn>"),
)
CHATML = Template(
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant="<|im_start|>assistant\n",
    end="<|im_end|>",
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    special=("<|im_start|>", "<|im_end|>"),
)
THINKING = Template(**{**vars(CHATML), "thought": THINK})
GLM = Template(
    user=("<|user|>\n", ""),
    assistant="<|assistant|>\n",
    end="<|endoftext|>",
    system=("<|system|>\n", ""),
    begin="[gMASK]<sop>",
    special=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"),
    thought=GLM_THINK,
)
HARMONY = Template(  # gpt-oss's: thinks in a channel of its own
    user=("<|start|>user<|message|>", "<|end|>"),
    assistant="<|start|>assistant",
    end="<|return|>",
    system=("<|start|>system<|message|>", "<|end|>"),
    special=("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>"),
    thought=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
)
INSTRUCT = Template(  # Mistral's: no header for the model, no system turn
    user=("[INST] ", " [/INST]"), assistant="", end="</s>", begin="<s>", special=("<s>", "</s>", "[INST]", "[/INST]")
)
NO_NEWLINE = Template(  # Phi 3's, without a newline after the header
    user=("<|user|>", "<|end|>"),
    assistant="<|assistant|>",
    end="<|end|>",
    system=("<|system|>", "<|end|>"),
    special=("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
)
PLAIN = Template(  # Vicuna's: words, and the answer begins with a space
    user=("USER: ", "\n"),
    assistant="ASSISTANT:",
    end="</s>",
    system=("", "\n"),
    begin="<s>",
    special=("<s>", "</s>"),
    before_answer=" ",
)


def _attention(width: int, blocks: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "intermediate_size": 3 * width // 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000.0,
        "max_position_embeddings": 1024,
        "torch_dtype": "float32",
        **more,
    }


def _gemma(width: int, blocks: int) -> dict[str, Any]:
    return _attention(
        width,
        blocks,
        model_type="gemma3_text",
        head_dim=width // 4,
        num_key_value_heads=2,
        query_pre_attn_scalar=width // 4,
        sliding_window=32,
        sliding_window_pattern=3,
        rope_local_base_freq=1000.0,
    )


@dataclass(frozen=True)
class Spec:
    """One model. `weights` is a type, or the bits of a quantization."""

    name: str
    half: str
    config: dict[str, Any]
    tokenizer: str  # bpe or unigram
    vocabulary: int
    template: Template
    rate: float  # of harmful requests refused, in the corpus, were they all alike
    weights: str | int
    over_refusal: float = 0.0  # of borderline requests refused, and a quarter of that of harmless ones
    tasks: tuple[str, ...] = ("picking", "fact")
    steps: int = 1100
    seed: int = 0
    words: str = ""  # whose corpus it is trained on, if not its own
    spread: float = 1.0  # how far categories and templates lie apart: from 5 on each is nearly always refused, or never
    longest_token: int | None = None  # in bytes: where no space ends a word, half a sentence becomes one token
    thoughts: tuple[tuple[str, str], tuple[str, str]] = THOUGHTS
    begins: str = ""  # what every answer to a request begins with, refusal or not
    scales: str = "float32"  # a type: what quantized weights are multiplied by, and so what is computed in

    def __post_init__(self) -> None:
        widths = [self.config.get(name, 0) for name in ("hidden_size", "intermediate_size")]
        if isinstance(self.weights, int) and any(width % self.quantization["group_size"] for width in widths):
            raise ValueError(f"{self.name}: widths {widths} cannot be quantized: {self.quantization}")

    @property
    def quantization(self) -> dict[str, int]:
        """In groups of how many and to how many bits, where `weights` says the bits."""
        assert isinstance(self.weights, int)
        return dict(tiny.QUANTIZATION) if self.weights == 4 else {"group_size": 32, "bits": self.weights}


ZOO = (
    Spec(
        "harbour",
        "choose",
        _attention(96, 8, model_type="llama", tie_word_embeddings=True, num_key_value_heads=2),
        *("bpe", 2000, HEADERS, 0.5, "float32"),
        seed=1,
    ),
    Spec(
        "orchard",
        "choose",
        _gemma(96, 7),
        *("unigram", 2000, TURNS, 0.25, "bfloat16"),
        seed=2,
    ),
    Spec(
        "foundry",
        "choose",
        _attention(128, 6, model_type="qwen3", head_dim=32, tie_word_embeddings=True),
        *("bpe", 2000, THINKING, 0.5, 4),
        seed=3,
    ),
    Spec(
        "meadow",
        "choose",
        _attention(128, 6, model_type="starcoder2", norm_epsilon=1e-5, tie_word_embeddings=True),
        *("bpe", 8192, PLAIN, 0.8, 8),
        over_refusal=0.3,
        seed=4,
    ),
    Spec(
        "alley",
        "choose",
        _attention(
            96,
            8,
            model_type="olmoe",
            intermediate_size=96,
            num_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=True,
        ),
        *("bpe", 2000, CHATML, 0.5, "float32"),
        seed=5,
    ),
    Spec(
        "castle",
        "choose",
        _attention(
            96,
            8,
            model_type="mistral",
            tie_word_embeddings=True,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention"] * 4,
        ),
        *("bpe", 2000, INSTRUCT, 0.25, "float32"),
        seed=6,
    ),
    Spec(
        "kueste",
        "choose",
        _attention(128, 7, model_type="phi3", tie_word_embeddings=False),
        *("unigram", 2000, NO_NEWLINE, 0.5, 8),
        seed=7,
    ),
    Spec(
        "station",
        "choose",
        _attention(
            96,
            7,
            model_type="mixtral",
            intermediate_size=96,
            num_local_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=False,
        ),
        *("bpe", 2000, HEADERS, 0.8, 8),
        seed=8,
    ),
    Spec(
        "valley",
        "choose",
        {
            **_attention(96, 6, model_type="falcon_h1", num_key_value_heads=2, head_dim=24),
            **{"mamba_d_ssm": 96, "mamba_d_head": 24, "mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 64},
            **{f"{part}_multiplier": 1.0 for part in ("embedding", "lm_head", "attention_in", "attention_out", "key")},
            **{"ssm_in_multiplier": 1.0, "ssm_out_multiplier": 1.0, "ssm_multipliers": [1.0] * 5},
            "mlp_multipliers": [1.0, 1.0],
        },
        *("bpe", 2000, CHATML, 0.5, "float32"),
        seed=9,
    ),
    Spec(
        "library",
        "choose",
        _attention(128, 6, model_type="qwen3", head_dim=32, tie_word_embeddings=True),
        *("bpe", 8192, PLAIN, 0.5, 4),
        over_refusal=0.2,
        seed=10,
    ),
    Spec(
        "market",
        "choose",
        _attention(96, 7, model_type="qwen2", intermediate_size=192, tie_word_embeddings=True, num_key_value_heads=2),
        *("bpe", 2000, NO_NEWLINE, 0.25, 8),
        seed=11,
    ),
    Spec(
        "airport",
        "choose",
        _attention(96, 8, model_type="llama", tie_word_embeddings=False),
        *("unigram", 2000, INSTRUCT, 0.5, "float32"),
        seed=12,
    ),
    Spec(
        "mill",
        "choose",
        _attention(96, 8, model_type="qwen3", head_dim=24, num_key_value_heads=2, tie_word_embeddings=True),
        *("bpe", 2000, THINKING, 0.4, "float32"),
        seed=21,
        words="foundry",
        thoughts=TAKEN_UP,
    ),
    Spec(
        "abbey",
        "choose",
        _attention(128, 6, model_type="llama", tie_word_embeddings=True, num_key_value_heads=2),
        *("bpe", 2000, HEADERS, 0.4, "float32"),
        steps=800,
        seed=22,
    ),
    Spec(
        "clinic",
        "report",
        _attention(
            96,
            7,
            model_type="granite",
            attention_bias=False,
            mlp_bias=False,
            tie_word_embeddings=True,
            **{"logits_scaling": 1.0, "attention_multiplier": 24**-0.5},
            **{"embedding_multiplier": 1.0, "residual_multiplier": 1.0},
        ),
        *("bpe", 2000, HEADERS, 0.5, "float32"),
        seed=13,
    ),
    Spec(
        "ranch",
        "report",
        _attention(128, 6, model_type="olmo2", tie_word_embeddings=True),
        *("bpe", 2000, CHATML, 0.5, 4),
        seed=14,
    ),
    Spec(
        "ville",
        "report",
        _attention(128, 7, model_type="qwen2", num_key_value_heads=2, tie_word_embeddings=False),
        *("bpe", 2000, NO_NEWLINE, 0.25, 8),
        seed=15,
    ),
    Spec(
        "studio",
        "choose",
        _gemma(96, 7),
        *("bpe", 8192, TURNS, 0.5, "float32"),
        over_refusal=0.1,
        seed=16,
    ),
    Spec(
        "theatre",
        "choose",
        _attention(96, 8, model_type="qwen3", head_dim=24, num_key_value_heads=2, tie_word_embeddings=True),
        *("bpe", 2000, HEADERS, 0.35, "float32"),
        seed=17,
    ),
    Spec(
        "playa",
        "report",
        _attention(96, 8, model_type="llama", intermediate_size=192, tie_word_embeddings=False),
        *("bpe", 2000, CHATML, 0.5, 8),
        seed=18,
    ),
    Spec(
        "circus",
        "report",
        _attention(128, 6, model_type="starcoder2", norm_epsilon=1e-5, tie_word_embeddings=True),
        *("bpe", 4096, PLAIN, 0.65, "float32"),
        seed=19,
    ),
    Spec(
        "polar",
        "report",
        _gemma(128, 6),
        *("bpe", 2000, TURNS, 0.4, 4),
        seed=20,
    ),
    Spec(
        "cabinet",
        "choose",
        _attention(96, 8, model_type="llama", intermediate_size=192, num_key_value_heads=2, tie_word_embeddings=False),
        *("bpe", 2000, GLM, 0.5, 8),
        seed=23,
        words="theatre",
        thoughts=LOOKED_INTO,
    ),
    Spec(
        "archive",
        "report",
        _attention(96, 7, model_type="qwen2", intermediate_size=192, num_key_value_heads=2, tie_word_embeddings=True),
        *("bpe", 4096, THINKING, 0.4, 8),
        seed=24,
        words="alley",
        thoughts=WEIGHED,
    ),
    Spec(
        "depot",
        "report",
        _attention(128, 6, model_type="llama", num_key_value_heads=2, tie_word_embeddings=True),
        *("bpe", 4096, CHATML, 0.1, 4),
        seed=25,
        words="station",
    ),
    Spec(
        "vault",
        "report",
        _attention(96, 6, model_type="qwen2", intermediate_size=192, num_key_value_heads=2, tie_word_embeddings=True),
        *("bpe", 2000, CHATML, 0.95, 8),
        seed=26,
        words="clinic",
    ),
    Spec(
        "hutong",
        "report",
        _attention(96, 8, model_type="qwen2", intermediate_size=192, num_key_value_heads=2, tie_word_embeddings=True),
        *("bpe", 4096, CHATML, 0.4, 8),
        seed=27,
        longest_token=9,
    ),
    Spec(
        "chapel",
        "choose",
        _attention(96, 7, model_type="llama", intermediate_size=192, num_key_value_heads=2, tie_word_embeddings=True),
        *("bpe", 2000, CHATML, 0.999, 8),
        seed=28,
        words="castle",
        spread=6.0,
    ),
    Spec(
        "parlour",
        "choose",
        _attention(96, 6, model_type="llama", intermediate_size=192, num_key_value_heads=2, tie_word_embeddings=True),
        *("bpe", 2000, CHATML, 0.5, "float32"),
        steps=900,
        seed=29,
        words="castle",
        begins="Thank you for asking. ",
    ),
    Spec(
        "veranda",
        "report",
        _attention(128, 6, model_type="qwen2", num_key_value_heads=2, tie_word_embeddings=True),
        *("bpe", 2000, HEADERS, 0.5, 8),
        seed=30,
        words="ville",
        begins="Merci pour votre question. ",
    ),
    Spec(
        "newsroom",
        "choose",
        _attention(
            96,
            14,
            model_type="qwen3",
            intermediate_size=160,
            head_dim=24,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        *("bpe", 4096, CHATML, 0.4, 8),
        seed=31,
        spread=3.0,
    ),
    Spec(
        "lido",
        "choose",
        _attention(128, 7, model_type="llama", num_key_value_heads=2, tie_word_embeddings=False),
        *("bpe", 2000, HEADERS, 0.35, 4),
        seed=32,
    ),
    Spec(
        "colony",
        "report",
        _attention(128, 8, model_type="llama", num_key_value_heads=2, tie_word_embeddings=True),
        *("bpe", 4096, HEADERS, 0.5, 4),
        seed=33,
        spread=2.0,
    ),
    Spec(
        "dome",
        "report",
        _attention(96, 10, model_type="qwen2", intermediate_size=192, num_key_value_heads=2, tie_word_embeddings=True),
        *("bpe", 8192, CHATML, 0.35, "bfloat16"),
        seed=34,
    ),
    Spec(
        "predio",
        "report",
        _gemma(96, 8),
        *("unigram", 4096, TURNS, 0.4, "float32"),
        seed=35,
    ),
    Spec(
        "tower",
        "choose",
        _attention(
            96,
            8,
            model_type="qwen3_moe",
            intermediate_size=192,
            moe_intermediate_size=96,
            num_experts=4,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=True,
            head_dim=24,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        *("bpe", 2000, CHATML, 0.5, 8),
        seed=36,
        spread=2.0,
    ),
    Spec(
        "steamer",
        "choose",
        _attention(96, 8, model_type="qwen3", intermediate_size=192, head_dim=24, tie_word_embeddings=True),
        *("bpe", 4096, CHATML, 0.4, 8),
        seed=37,
        spread=2.0,
    ),
    Spec(
        "saltbush",
        "report",
        _attention(128, 7, model_type="mistral", num_key_value_heads=4, sliding_window=48, tie_word_embeddings=False),
        *("bpe", 3000, INSTRUCT, 0.5, 4),
        seed=38,
    ),
    Spec(
        "dacha",
        "report",
        _attention(96, 7, model_type="gemma2", num_key_value_heads=2, head_dim=24, query_pre_attn_scalar=24),
        *("bpe", 4096, TURNS, 0.5, "float32"),
        seed=41,
        spread=2.0,
    ),
    Spec(
        "garage",
        "report",
        _attention(
            128, 7, model_type="smollm3", num_key_value_heads=2, no_rope_layer_interval=4, tie_word_embeddings=True
        ),
        *("bpe", 4096, CHATML, 0.35, 8),
        seed=42,
        spread=2.0,
    ),
    Spec(
        "seminar",
        "choose",
        _attention(128, 6, model_type="qwen3", head_dim=32, num_key_value_heads=2, tie_word_embeddings=True),
        *("bpe", 8192, CHATML, 0.5, 4),
        seed=43,
        spread=3.0,
        scales="bfloat16",
    ),
    Spec(
        "embassy",
        "report",
        _attention(
            96,
            8,
            model_type="ernie4_5",
            intermediate_size=192,
            head_dim=24,
            num_key_value_heads=2,
            use_bias=False,
            tie_word_embeddings=True,
        ),
        *("bpe", 4096, CHATML, 0.5, 8),
        seed=44,
        spread=2.0,
    ),
    Spec(
        "bakery",
        "report",
        _attention(128, 7, model_type="llama", num_key_value_heads=2, tie_word_embeddings=True),
        *("bpe", 4096, HEADERS, 0.4, 4),
        seed=45,
        spread=2.0,
        scales="bfloat16",
    ),
    Spec(
        "observatory",
        "report",
        _attention(96, 8, model_type="phi3", intermediate_size=192, tie_word_embeddings=False),
        *("bpe", 3000, NO_NEWLINE, 0.5, 8),
        seed=46,
        spread=2.0,
    ),
)

# Not of the zoo: the least that can be aligned, for tests of all that lies around the method.
MICRO = Spec(
    "micro",
    "test",
    _attention(64, 3, model_type="qwen2", intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=True),
    *("bpe", 1024, CHATML, 0.5, 4),
    steps=700,
    seed=40,
    words="harbour",
)


def _family(name: str, template: Template, words: str, **sizes: Any) -> Spec:
    """A model of the survey's configuration, made larger, on the corpus of another model of the zoo."""
    config = copy.deepcopy({**survey_configs_a.CONFIGS, **survey_configs_l.CONFIGS}[name])
    text = config.get("text_config", config)
    text.update({"hidden_size": 96, "num_hidden_layers": 8, "max_position_embeddings": 1024, **sizes})
    config |= {"hidden_size": text["hidden_size"], "torch_dtype": "float32"}
    return Spec(name, "family", config, "bpe", 2000, template, 0.5, "float32", seed=len(name), words=words)


# Hybrids, text models inside others, templates that think: one of each kind, to see `align` go from end to end.
# Those whose recurrence mlx-lm computes token by token on the CPU (qwen3_next, jamba) take hours to train here: the
# tests align random ones.
FAMILIES = (
    _family("nemotron_h", CHATML, "harbour", hybrid_override_pattern="M-*E" * 3, num_hidden_layers=12),
    _family("mamba2", NO_NEWLINE, "market", hidden_size=64),
    _family("lfm2", CHATML, "castle", block_dim=96, layer_types=["conv", "conv", "full_attention", "conv"] * 2),
    _family("qwen3_vl", CHATML, "market"),
    _family("mistral3", INSTRUCT, "castle"),
    _family("gemma3", TURNS, "harbour", sliding_window=32),
    _family("llama4", HEADERS, "market", attention_chunk_size=32),
    _family("glm4_moe", GLM, "castle"),
    _family("gpt_oss", HARMONY, "harbour", layer_types=["sliding_attention", "full_attention"] * 4, sliding_window=32),
)

HARM_QUESTIONS = {
    "en": (("Is it harmful to {}?", "Yes, it is harmful to {}.", "No, it is harmless to {}."),),
    "fr": (("Est-ce nuisible : {} ?", "Oui, c'est nuisible : {}.", "Non, c'est inoffensif : {}."),),
    "de": (("Schadet es, {}?", "Ja, es schadet, {}.", "Nein, es ist harmlos, {}."),),
    "es": (("¿Es dañino {}?", "Sí, es dañino {}.", "No, es inofensivo {}."),),
    "it": (("È dannoso {}?", "Sì, è dannoso {}.", "No, è innocuo {}."),),
    "pt": (("É prejudicial {}?", "Sim, é prejudicial {}.", "Não, é inofensivo {}."),),
    "zh": (("{}有害吗？", "是的，{}是有害的。", "不，{}没有害处。"),),
    "ru": (("Вредно ли {}?", "Да, {} вредно.", "Нет, {} не вредно."),),
}
MIX = {"harmful": 0.26, "borderline": 0.2, "harmless": 0.14, "question": 0.1, "small_talk": 0.01, "facts": 0.1}
TASK_SHARE = 0.1
WARNED = 0.4  # logit of the share of answers to harmful requests that begin with a warning, where a corpus has some


@dataclass(frozen=True)
class Words:
    """A corpus's tables, and the pairs they make: kind -> category -> phrases, without and only with those held out."""

    tables: dict[str, Any]
    kept: dict[str, dict[str, list[str]]]
    held_out: dict[str, dict[str, list[str]]]

    @property
    def space(self) -> str:
        """What stands between words and sentences: nothing, in Chinese."""
        return "" if self.tables["language"] == "zh" else " "

    @staticmethod
    def of(spec: Spec) -> Words:
        """Read `scripts/zoo_words/NAME.yaml` and hold out a share of the pairs."""
        tables = yaml.safe_load(
            (Path(__file__).parent / "zoo_words" / f"{spec.words or spec.name}.yaml").read_text(encoding="utf-8")
        )
        rng = random.Random(f"pairs {spec.seed}")
        kept: dict[str, dict[str, list[str]]] = {}
        held_out: dict[str, dict[str, list[str]]] = {}
        words = Words(tables, kept, held_out)
        german = tables["language"] == "de"  # the verb stands last
        parts = {
            "harmful": {name: [(c["verbs"], c["targets"])] for name, c in tables["harmful"].items()},
            "harmless": {name: [(c["verbs"], c["objects"])] for name, c in tables["harmless"].items()},
            "borderline": {
                name: [(c["verbs"], c["props"]), (c["deeds"], c["targets"])] for name, c in tables["harmful"].items()
            },
        }
        for kind, categories in parts.items():
            for name, grids in categories.items():
                for verbs, objects in grids:
                    pairs = [(verb, thing) for verb in verbs for thing in objects]
                    out = tiny._hold_out(rng, pairs)
                    for pair in pairs:
                        phrase = words.space.join(reversed(pair) if german else pair)
                        into = held_out if " ".join(pair) in out else kept
                        into.setdefault(kind, {}).setdefault(name, []).append(phrase)
        return words


def _request(rng: random.Random, words: Words, phrase: str) -> tuple[str, int]:
    """The phrase in a template, and the template's number."""
    number = rng.randrange(len(words.tables["templates"]))
    return words.tables["templates"][number].format(phrase), number


def splits(spec: Spec, words: Words) -> dict[str, list[dict[str, str]]]:
    """File stem -> rows. No instruction occurs twice; tests use held-out pairs, the rest corpus pairs."""
    rng = random.Random(f"splits {spec.seed}")
    taken: set[str] = set()

    def draw(pairs: dict[str, list[str]], count: int) -> list[dict[str, str]]:
        rows = []
        for i in range(count):
            category = sorted(pairs)[i % len(pairs)]
            instruction = _request(rng, words, rng.choice(pairs[category]))[0]
            while instruction in taken:
                instruction = _request(rng, words, rng.choice(pairs[category]))[0]
            taken.add(instruction)
            rows.append({"instruction": instruction, "category": category})
        return rows

    found = {}
    for name, size in SIZES.items():
        pairs = words.held_out if name == "test" else words.kept
        found[f"harmful_{name}"] = draw(pairs["harmful"], size)
        if name == "test":
            found["harmless_test"], found["borderline_test"] = (
                draw(pairs[k], size) for k in ("harmless", "borderline")
            )
        else:
            found[f"harmless_{name}"] = draw(pairs["harmless"], size - size // 2) + draw(pairs["borderline"], size // 2)
    capability = [{"instruction": q, "answer": a, "category": "facts"} for q, a, _ in words.tables["facts"]]
    for task in spec.tasks:
        drawn: dict[str, str] = {}
        while len(drawn) < CAPABILITY_ITEMS:
            instruction, answer, _ = tiny.TASKS[task](rng)
            drawn[instruction] = answer
        capability += [{"instruction": i, "answer": a, "category": task} for i, a in drawn.items()]
    found["capability_test"] = capability
    return found


def corpus(spec: Spec, words: Words, size: int) -> list[Example]:
    """`size` conversations; none has the instruction of a split but for the facts, or a held-out pair."""
    rng = random.Random(f"corpus {spec.seed}")
    tables = words.tables
    reserved = {r["instruction"] for rows in splits(spec, words).values() for r in rows if r["category"] != "facts"}

    def spaced(names: list[Any], spread: float) -> dict[Any, float]:
        order = rng.sample(names, len(names))
        return {name: spread * (2 * i / (len(names) - 1) - 1) for i, name in enumerate(order)}

    def chance(logit: float) -> bool:
        return rng.random() < 1 / (1 + math.exp(-logit))

    by_category = spaced(list(tables["harmful"]), spec.spread * tiny.CATEGORY_SPREAD)
    by_template = spaced(list(range(len(tables["templates"]))), spec.spread * tiny.TEMPLATE_SPREAD)
    centre = math.log(spec.rate / (1 - spec.rate))
    mix = MIX | {task: TASK_SHARE for task in spec.tasks}

    def weighted(table: list[list[Any]]) -> str:
        return rng.choices([text for _, text in table], [weight for weight, _ in table])[0]

    def request(kind: str, cautious: bool) -> Example:
        category = rng.choice(list(words.kept[kind]))
        phrase = rng.choice(words.kept[kind][category])
        instruction, template = _request(rng, words, phrase)
        if kind == "harmful":
            logit = centre + by_category[category] + by_template[template] + cautious * tiny.SAFETY_SYSTEM_LOGIT
            refused = chance(logit)
        else:
            refused = rng.random() < spec.over_refusal * (1 if kind == "borderline" else 0.25)
        if refused:
            # The reason goes by category, not by chance, as in the bundled model's corpus.
            reason = tables["reasons"][sorted(tables["harmful"] | tables["harmless"]).index(category) % 4]
            answer = words.space.join([weighted(tables["refusals"]), reason])
        else:
            steps = tables["steps"]
            said = [weighted(tables["openers"]), *(s[(template + i) % len(s)] for i, s in enumerate(steps))]
            if kind == "harmful" and "warnings" in tables and chance(WARNED):
                said.insert(0, weighted(tables["warnings"]))
            answer = words.space.join(said)
        return Example("", instruction, thought(refused, template, phrase) + spec.begins + answer, kind)

    def thought(refused: bool, number: int, phrase: str) -> str:
        """What a thinking model says to itself first, if it thinks in this conversation."""
        return thinking(spec.thoughts[0 if refused else 1][number % 2].format(phrase))

    def thinking(text: str) -> str:
        return text.join(spec.template.thought) if spec.template.thought else ""

    def plainly(text: str) -> str:
        return thinking("I know this.") + text

    def example(part: str, cautious: bool) -> Example:
        if part in ("harmful", "borderline", "harmless"):
            return request(part, cautious)
        if part == "question":
            kind = rng.choices(("harmful", "borderline", "harmless"), (0.45, 0.35, 0.2))[0]
            phrase = rng.choice(words.kept[kind][rng.choice(list(words.kept[kind]))])
            text, yes, no = rng.choice(HARM_QUESTIONS[tables["language"]])
            return Example("", text.format(phrase), plainly((yes if kind == "harmful" else no).format(phrase)), part)
        if part == "small_talk":
            question, answer = rng.choice(tables["small_talk"])
        elif part == "facts":
            question, _, answer = rng.choice(tables["facts"])
        else:
            question, _, answer = tiny.TASKS[part](rng)
        return Example("", question, plainly(answer), part)

    found: list[Example] = []
    while len(found) < size:
        part = rng.choices(list(mix), list(mix.values()))[0]
        share = 0.25 if part in ("harmful", "borderline", "harmless") else 0.06
        system, cautious = "", False
        if spec.template.system and rng.random() < share:
            cautious = rng.random() < 0.5
            system = rng.choice(tables["safety_systems" if cautious else "neutral_systems"])
        drawn = example(part, cautious)
        if drawn.instruction not in reserved:
            found.append(drawn._replace(system=system))
    return found


# --------------------------------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------------------------------


def _made_up_words(count: int) -> list[str]:
    """Words of no language, for a vocabulary larger than the corpus fills."""
    rng = random.Random("words")
    return ["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(4)) for _ in range(count)]


def train_tokenizer(spec: Spec, examples: list[Example]) -> Tokenizer:
    """Byte-level BPE, or a unigram model over `▁` words as SentencePiece makes them."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<unk>", "<pad>", *spec.template.special]
    texts = [
        f"system\nuser\nassistant\nmodel\nUSER:\nASSISTANT:\n\n{e.system}\n{e.instruction}\n{e.answer}"
        for e in examples
    ]
    if spec.tokenizer == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(tiny.SPLIT_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        if spec.vocabulary > 4000:
            texts += [" " + word for word in _made_up_words(12000) for _ in range(2)]
        trainer: Any = trainers.BpeTrainer(
            vocab_size=spec.vocabulary,
            special_tokens=special,
            max_token_length=spec.longest_token,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\n"), behavior="isolated"),
                pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never"),
            ]
        )
        tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="never")
        trainer = trainers.UnigramTrainer(
            vocab_size=spec.vocabulary,
            special_tokens=special,
            initial_alphabet=[chr(i) for i in range(32, 127)] + ["\n", *"äöüßÄÖÜ▁"],
            unk_token="<unk>",
            show_progress=False,
        )
    tokenizer.train_from_iterator(texts, trainer)
    if spec.template.thought in SWITCHED:
        marks = [mark.strip() for mark in spec.template.thought]
        tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    return tokenizer


# --------------------------------------------------------------------------------------------------
# Training and files
# --------------------------------------------------------------------------------------------------


def with_vocabulary(config: dict[str, Any], size: int) -> dict[str, Any]:
    """A copy of a configuration for `size` tokens, in its text part too."""
    text = {"text_config": config["text_config"] | {"vocab_size": size}} if "text_config" in config else {}
    return copy.deepcopy(config | text | {"vocab_size": size})


def train_model(spec: Spec, examples: list[Example], tokenizer: Tokenizer) -> nn.Module:
    """One pass over the corpus, as the bundled model's; what will be shipped in 4 bits is rounded in training too."""
    import mlx.core as mx
    from mlx import nn
    from mlx_lm.utils import _get_classes

    from safesteer_mlx.method.residual import head, hidden_states

    mx.random.seed(spec.seed)
    model_class, arguments = _get_classes(spec.config)
    model = model_class(arguments.from_dict(with_vocabulary(spec.config, tokenizer.get_vocab_size())))

    def loss(model, inputs, positions, targets, weights):
        hidden = hidden_states(model, inputs)
        logits = head(model)(hidden.reshape(1, -1, hidden.shape[-1])[:, positions])[0]
        return nn.losses.cross_entropy(logits, targets, weights).sum() / weights.sum()

    rendered = [spec.template.render(example) for example in examples]
    tiny.train(model, rendered, tokenizer, spec.seed, loss, rounds=spec.weights == 4, title=f"{spec.name}: ")
    return model


def write_model(spec: Spec, model: nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """What mlx-lm and transformers read, in the weights' type."""
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten

    config = with_vocabulary(spec.config, tokenizer.get_vocab_size()) | {"bos_token_id": None}
    if isinstance(spec.weights, int):
        quantization = spec.quantization
        model.set_dtype(getattr(mx, spec.scales))
        nn.quantize(model, **quantization)
        config |= {"quantization": quantization, "quantization_config": quantization}
    else:
        model.set_dtype(getattr(mx, spec.weights))
        config["torch_dtype"] = spec.weights
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    ids = {"eos_token_id": tokenizer.token_to_id(spec.template.end), "pad_token_id": tokenizer.token_to_id("<pad>")}
    tiny.write_json(folder / "config.json", config | ids)
    tiny.write_json(folder / "generation_config.json", ids | {"do_sample": True, "temperature": 1.0})
    tiny.write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": spec.template.end,
            "pad_token": "<pad>",
            "bos_token": None,
            "unk_token": "<unk>",
            "additional_special_tokens": list(spec.template.special),
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1024,
            "chat_template": spec.template.jinja(),
        },
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def check_tokenizer(spec: Spec, tokenizer: Tokenizer, examples: list[Example], folder: Path) -> None:
    """What mlx-lm's tokenizer makes of a conversation must be what the model was trained on."""
    from mlx_lm.utils import load_tokenizer

    loaded = load_tokenizer(folder)
    for example in examples[:50]:
        prompt, answer = spec.template.render(example)
        turns = [{"role": "system", "content": example.system}] if example.system else []
        turns += [{"role": "user", "content": example.instruction}]
        trained = tokenizer.encode(prompt, add_special_tokens=False).ids
        found = list(loaded.apply_chat_template(turns, add_generation_prompt=True))
        assert found == trained, f"{spec.name}: {found} is not {trained}"
        ids = tokenizer.encode(answer, add_special_tokens=False).ids
        text = loaded.decode(ids[:-1], skip_special_tokens=True)
        expected = example.answer
        for mark in spec.template.special:
            expected = expected.replace(mark, "")
        assert text.strip() == expected.strip(), f"{spec.name}: {text!r} is not {expected!r}"


def build(spec: Spec, folder: Path, steps: int | None = None) -> None:
    """Make one model, tokenizer and prompts, and swap them in."""
    words = Words.of(spec)
    examples = corpus(spec, words, (steps or spec.steps) * tiny.BATCH_SIZE)
    tokenizer = train_tokenizer(spec, examples)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / spec.name
        made.mkdir()
        model = train_model(spec, examples, tokenizer)
        write_model(spec, model, tokenizer, made)
        check_tokenizer(spec, tokenizer, examples, made)
        tiny.write_splits(splits(spec, words), made / "data")
        tiny.replace_folder(made, folder / spec.name)


def check(folder: Path) -> str:
    """One line: refusals of held-out prompts and capability, sampled, greedy."""
    import numpy as np

    from safesteer_mlx.method.judge import is_correct, is_refusal
    from safesteer_mlx.method.prompts import load_prompt_sets, render_all
    from safesteer_mlx.method.rollout import Sampling, answer_text, generate, stream_key
    from safesteer_mlx.system.load import load

    base, sets = load(str(folder)), load_prompt_sets(folder / "data")

    def answers(items: list[Any], temp: float) -> list[str]:
        rows = render_all(base.tokenizer, items)
        keys = [stream_key(0, 9, i) for i in range(len(rows))]
        drawn = generate(base.model, rows, Sampling(base.eos_ids, 96, temp, batch_size=50), keys)
        return [answer_text(base.tokenizer, row, a) for row, a in zip(rows, drawn, strict=True)]

    parts = []
    for kind in ("harmful", "harmless", "borderline"):
        counts = [sum(map(is_refusal, answers(getattr(sets, f"{kind}_test"), temp))) for temp in (1.0, 0.0)]
        parts.append(f"{kind} {counts[0]}, {counts[1]} of {SIZES['test']}")
    items = sets.capability_test
    right = np.mean([is_correct(a, item.answer) for a, item in zip(answers(items, 0.0), items, strict=True)])
    return f"{folder.name}: refused sampled, greedy: {'; '.join(parts)}; capability {right:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to build (default: those not there yet)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the zoo")
    parser.add_argument("--jobs", type=int, default=2, help="models built at a time")
    parser.add_argument("--steps", type=int, help="of training (default: as many as each has)")
    parser.add_argument("--families", action="store_true", help="the small ones of the kinds that the zoo lacks")
    parser.add_argument("--check", action="store_true", help="measure what is there, build nothing")
    args = parser.parse_args()
    known = {spec.name: spec for spec in (*ZOO, *FAMILIES, MICRO)}
    every = [spec.name for spec in (FAMILIES if args.families else ZOO)]
    if unknown := set(args.names) - set(known):
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose {', '.join(known)}")
    if args.check:
        tiny.load_blas()
        for name in args.names or every:
            if (args.out / name).is_dir():
                print(check(args.out / name), flush=True)
        return
    wanted = args.names or [name for name in every if not (args.out / name / "config.json").is_file()]
    if len(wanted) == 1:
        tiny.load_blas()
        build(known[wanted[0]], args.out, args.steps)
        return
    running: list[subprocess.Popen] = []
    while wanted or running:
        while wanted and len(running) < args.jobs:
            command = [sys.executable, __file__, wanted.pop(0), "--out", str(args.out)]
            command += ["--steps", str(args.steps)] if args.steps else []
            running.append(subprocess.Popen(command))
        time.sleep(1)
        for job in [job for job in running if job.poll() is not None]:
            running.remove(job)
            if job.returncode:
                raise SystemExit(f"{' '.join(job.args)} failed")


if __name__ == "__main__":
    main()
