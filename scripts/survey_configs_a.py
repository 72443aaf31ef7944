"""Tiny configurations of mlx-lm's model families, A to K: one for each module of mlx_lm.models that has a model.

`Model(ModelArgs.from_dict(CONFIGS[name]))` is a random model with every kind of block that the family mixes,
small enough for MLX's CPU backend, and wide enough that its weights can be quantized in groups of 32.
"""

from typing import Any

VOCABULARY = 160
HIDDEN = 64
ROPE = 10_000.0

BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": ROPE,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
TIED = BASE | {"tie_word_embeddings": True}
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
ROUTED = {  # DeepSeek's names; the first block is dense
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 1,
    "topk_group": 1,
}
GROUPS = {"n_group": 2, "topk_group": 1}
LATENT = {  # latent attention has a head of its own for every query head
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
INDEXER = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 4}
BAILING = (
    BASE
    | EXPERTS
    | GROUPS
    | {
        "num_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "use_qk_norm": True,
        "use_bias": False,
        "use_qkv_bias": False,
    }
)
GPT = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_head": 4, "n_layer": 4, "n_positions": 256}
KIMI = LATENT | {  # three linear blocks to one of latent attention, counted from 1
    "num_experts": 4,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "mla_use_nope": True,
    "linear_attn_config": {
        "kda_layers": [1, 2, 3],
        "full_attn_layers": [4],
        "num_heads": 2,
        "head_dim": 32,
        "short_conv_kernel_size": 4,
    },
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 32,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
GRANITE = TIED | {
    "logits_scaling": 8.0,
    "attention_multiplier": 0.0625,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 64,
}
DEEPSEEK_YARN = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
HUNYUAN_ROPE = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1}
WINDOWED = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
ALTERNATING = ["sliding_attention", "full_attention"] * 2


def nested(text_type: str, text: dict[str, Any]) -> dict[str, Any]:
    """What a multimodal wrapper's configuration keeps of a language model's."""
    return {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "text_config": text | {"model_type": text_type}}


FAMILIES: dict[str, dict[str, Any]] = {
    "Klear": BASE | EXPERTS | {"mlp_only_layers": [0], "decoder_sparse_step": 1, "n_shared_experts": 1},
    "afm7": {
        "vocab_size": VOCABULARY,
        "hidden_dim": HIDDEN,
        "hidden_dim_scale_factor": 2.0,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "rope_theta": ROPE,
    },
    "afmoe": BASE
    | EXPERTS
    | {
        "layer_types": WINDOWED,
        "sliding_window": 8,
        "num_dense_layers": 1,
        "num_shared_experts": 1,
        "mup_enabled": True,
    },
    "apertus": BASE | {"post_norm": False, "qk_norm": True, "rope_scaling": LLAMA3},
    "baichuan_m1": BASE
    | {
        "sliding_window": 8,
        "sliding_window_layers": [1, 3],
        "conv_window": 2,
        "num_swa_attention_heads": 2,
        "num_swa_key_value_heads": 2,
    },
    "bailing_hybrid": BAILING | LATENT | {"layer_group_size": 2, "group_norm_size": 2, "partial_rotary_factor": 0.5},
    "bailing_moe": BAILING,
    "bailing_moe_linear": BAILING | {"layer_group_size": 2, "group_norm_size": 2, "partial_rotary_factor": 0.5},
    "bailing_moe_v3": BAILING | LATENT | {"layer_group_size": 2, "short_conv_kernel_size": 4},
    "cohere": TIED | {"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "use_qk_norm": True},
    "cohere2": TIED | {"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "sliding_window": 8, "sliding_window_pattern": 4},
    "dbrx": {
        "vocab_size": VOCABULARY,
        "d_model": HIDDEN,
        "n_layers": 4,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": ROPE},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.01},
    },
    "deepseek": BASE | ROUTED,
    "deepseek_v2": BASE | ROUTED | LATENT | {"topk_method": "greedy", "rope_scaling": DEEPSEEK_YARN},
    "deepseek_v3": BASE | ROUTED | LATENT | GROUPS | {"rope_scaling": DEEPSEEK_YARN},
    "deepseek_v32": BASE | ROUTED | LATENT | GROUPS | INDEXER | {"rope_scaling": DEEPSEEK_YARN},
    "deepseek_v41": nested(
        "deepseek_v41",
        BASE
        | ROUTED
        | INDEXER
        | {  # a window alone, every token kept, pairs pooled (and candidates chosen), what these share, an index alone
            "num_hidden_layers": 5,
            "num_key_value_heads": 1,
            "compress_ratios": [0, 1, 2, 2, 2],
            "kv_source_layer_ids": [1, 2],
            "index_source_layer_ids": [1, 2, 4],
            "candidate_source_layer_id": 2,
            "candidate_topk_blocks": 1,
            "candidate_block_size": 2,
            "head_dim": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "o_groups": 2,
            "o_lora_rank": 32,
            "scoring_func": "sqrtsoftplus",
            "sliding_window": 8,
            "rope_scaling": YARN,
        },
    ),
    "dots1": BASE | ROUTED | {"scoring_func": "noaux_tc"},
    "ernie4_5": TIED | {"use_bias": False},
    "ernie4_5_moe": TIED
    | {
        "use_bias": False,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 64,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
        "moe_capacity": [64, 64, 64],
    },
    "exaone": TIED | {"num_layers": 4, "layer_norm_epsilon": 1e-5, "rope_scaling": LLAMA3},
    "exaone4": BASE | {"sliding_window": 8, "sliding_window_pattern": "LLLG", "rope_scaling": LLAMA3},
    "exaone_moe": BASE
    | EXPERTS
    | {
        "num_shared_experts": 1,
        "sliding_window": 8,
        "layer_types": WINDOWED,
        "is_moe_layer": [False, True, True, True],
    },
    "falcon_h1": TIED  # the real multipliers of a tied head make a random model's logits 150 times smaller
    | MAMBA
    | {"mamba_d_ssm": 128, "mamba_rms_norm": True, "embedding_multiplier": 1.0, "lm_head_multiplier": 1.0},
    "gear": TIED
    | {"layer_types": ["conv_mixer", "sliding_attention", "conv_mixer", "full_attention"], "sliding_window": 8},
    "gemma": TIED,
    "gemma2": TIED | {"query_pre_attn_scalar": 16},
    "gemma3": nested(
        "gemma3_text",
        TIED
        | {
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "sliding_window_pattern": 4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "gemma3_text": TIED | {"query_pre_attn_scalar": 16, "sliding_window": 8, "sliding_window_pattern": 4},
    "gemma3n": nested(
        "gemma3n_text",
        TIED
        | {
            "layer_types": ALTERNATING,
            "num_kv_shared_layers": 2,
            "sliding_window": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 32,
            "rope_local_base_freq": ROPE,
            "final_logit_softcapping": 30.0,
            "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
            "altup_num_inputs": 4,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 32,
        },
    ),
    "gemma4": nested(  # the mixture of experts
        "gemma4_text",
        TIED
        | {
            "layer_types": WINDOWED,
            "sliding_window": 8,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
        },
    ),
    "gemma4_text": TIED  # the small dense ones
    | {
        "layer_types": ALTERNATING,
        "sliding_window": 8,
        "global_head_dim": 32,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 32,
        "use_double_wide_mlp": True,
    },
    "glm": BASE | {"attention_bias": True},
    "glm4": BASE | {"attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4_moe": BASE | ROUTED | {"rope_scaling": None, "use_qk_norm": True, "partial_rotary_factor": 0.5},
    "glm4_moe_lite": BASE | ROUTED | LATENT,
    "glm_moe_dsa": BASE
    | ROUTED
    | LATENT
    | INDEXER
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}},
    "gpt2": GPT | {"n_ctx": 256, "layer_norm_epsilon": 1e-5},
    "gpt_bigcode": GPT | {"n_inner": 128, "layer_norm_epsilon": 1e-5, "multi_query": True},
    "gpt_neox": BASE | {"layer_norm_eps": 1e-5, "rotary_emb_base": 10_000, "rotary_pct": 0.25},
    "gpt_oss": BASE
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ALTERNATING,
        "sliding_window": 8,
        "rope_scaling": YARN,
    },
    "gptj": GPT | {"rotary_dim": 8, "layer_norm_epsilon": 1e-5},
    "granite": GRANITE,
    "granitemoe": GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": GRANITE
    | MAMBA
    | {
        "layer_types": ["mamba", "mamba", "attention", "mamba"],
        "position_embedding_type": "nope",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 128,
    },
    "helium": BASE,
    "hunyuan": TIED
    | {
        "num_experts": 4,
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": HUNYUAN_ROPE,
    },
    "hunyuan_v1_dense": TIED | {"use_qk_norm": True, "rope_scaling": HUNYUAN_ROPE},
    "internlm2": BASE | {"bias": False, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "internlm3": BASE | {"bias": False, "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
    "iquestloopcoder": BASE | {"loop_num": 2, "loop_window_size": 8},
    "jamba": BASE
    | {
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "mamba_dt_rank": 32,
    },
    "kimi_k25": nested("kimi_k2", BASE | ROUTED | LATENT | {"rope_scaling": DEEPSEEK_YARN}),
    "kimi_k3": nested(
        "kimi_linear",
        BASE
        | KIMI
        | {
            "hidden_act": "situ",
            "activation_situ_beta": 4.0,
            "attn_res_block_size": 2,
            "mla_use_output_gate": True,
            "routed_expert_hidden_size": 32,
            "latent_moe_use_norm": True,
        },
    ),
    "kimi_linear": BASE | KIMI | {"model_max_length": 256},
    "kimi_vl": nested("deepseek_v3", BASE | ROUTED | LATENT),
}
CONFIGS: dict[str, dict[str, Any]] = {name: config | {"model_type": name} for name, config in FAMILIES.items()}
CANNOT: dict[str, str] = {
    "bitnet": "RuntimeError '[metal_kernel] No Metal back-end.', raised by BitLinear in bitlinear_layers.py:130",
}
NOTES: dict[str, str] = {
    "gemma3n": "logits differ with and without a cache: without one, KV-shared blocks use their own k_proj, v_proj",
}
