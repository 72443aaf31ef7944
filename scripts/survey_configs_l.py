"""Tiny configs of mlx-lm's model modules, names l to z, for the survey of architectures.

CONFIGS: module name -> the dict for ModelArgs.from_dict (deep-copy it first: some ModelArgs change it in place).
CANNOT: module name -> why there is no tiny model. NOTES: module name -> what fails although the forward pass works.
"""

BASE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
SHARED_MOE = MOE | {"shared_expert_intermediate_size": 64}
# the names that came with DeepSeek
ROUTED_MOE = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "n_group": 1,
    "topk_group": 1,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
# key width 32: what the Metal kernels want, too
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
SLIDING_FIRST = {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
FULL_FIRST = {"sliding_window": 8, "layer_types": ["full_attention"] + ["sliding_attention"] * 3}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 128,
}
LONG_ROPE = {
    "type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i / 4 for i in range(8)],
    "original_max_position_embeddings": 128,
}
LLAMA4_ROPE = YARN_ROPE | {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"type": "mrope", "mrope_section": [2, 3, 3]}
QWEN35_ROPE = {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}

LFM2 = {
    "layer_types": ["conv", "conv", "full_attention", "conv"],
    "conv_L_cache": 3,
    "conv_bias": False,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    # 192 becomes 128: two thirds of it
    "block_dim": 64,
    "block_ff_dim": 192,
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 32,
}
LONGCAT = MLA | {
    "num_layers": 4,
    "ffn_hidden_size": 128,
    "expert_ffn_hidden_size": 64,
    "moe_topk": 2,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "zero_expert_type": "identity",
    "attention_method": "MLA",
    "routed_scaling_factor": 1.5,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}

# configs with everything at the top
FLAT: dict[str, dict] = {
    "laguna": FULL_FIRST
    | SHARED_MOE
    | {
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        "num_attention_heads_per_layer": [4, 8, 8, 8],
        "moe_routed_scaling_factor": 1.5,
        "rope_parameters": {
            "full_attention": YARN_ROPE | {"partial_rotary_factor": 0.5},
            "sliding_attention": PLAIN_ROPE | {"partial_rotary_factor": 1.0},
        },
    },
    "lfm2": LFM2,
    "lfm2_moe": LFM2 | MOE | {"num_dense_layers": 1, "use_expert_bias": True},
    # the MLP's width is a multiple of 256
    "lille-130m": {
        "block_size": 256,
        "n_embd": 64,
        "n_head": 4,
        "n_kv_heads": 2,
        "n_layer": 4,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "llama": {"rope_scaling": LLAMA3_ROPE},
    "llama4_text": {"intermediate_size_mlp": 128, "no_rope_layers": [1, 1, 1, 0], "use_qk_norm": True},
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": LONGCAT | {"ngram_vocab_size_ratio": 4, "emb_neighbor_num": 3, "emb_split_num": 1},
    "mamba": {
        "state_size": 16,
        "conv_kernel": 4,
        "time_step_rank": 32,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
    },
    "mamba2": {
        "num_heads": 4,
        "head_dim": 32,
        "state_size": 32,
        "n_groups": 1,
        "conv_kernel": 4,
        "time_step_rank": "auto",
        "time_step_limit": [0.0, float("inf")],
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
    },
    "mellum": SLIDING_FIRST | MOE | {"rope_parameters": {"full_attention": YARN_ROPE, "sliding_attention": PLAIN_ROPE}},
    "mimo": {"num_nextn_predict_layers": 1},
    "mimo_v2_flash": ROUTED_MOE
    | {
        "hybrid_layer_pattern": [0, 1, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1],
        "n_shared_experts": None,
        "routed_scaling_factor": None,
        "sliding_window_size": 8,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "attention_value_scale": 0.707,
        "v_head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
        "swa_rope_theta": 1000.0,
        "partial_rotary_factor": 0.5,
        "layernorm_epsilon": 1e-5,
    },
    "minicpm": {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 12},
    "minicpm3": MLA | {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 12, "rope_scaling": LONG_ROPE},
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 0, "rotary_dim": 8},
    "ministral3": SLIDING_FIRST | {"rope_parameters": LLAMA4_ROPE},
    "mistral4": ROUTED_MOE | MLA | {"head_dim": 48, "rope_parameters": LLAMA4_ROPE, "rope_interleave": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # the last layer has no RoPE
    "muse_glimmer": SLIDING_FIRST
    | {
        "rope_parameters": PLAIN_ROPE,
        "layer_rope_theta": [10000.0, 10000.0, 10000.0, 0],
        "post_norm_eps": 1e-8,
        "qk_scale_factor": 3.87,
        "final_logit_softcapping": 20.0,
        "output_multiplier": 0.2,
    },
    "nanbeige": {"num_loops": 2},
    "nanochat": {},
    # the MLPs' width is a multiple of 256
    "nemotron-nas": {
        "hidden_act": "silu",
        "rope_scaling": LLAMA3_ROPE,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 5.25}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"replace_with_linear": True}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True}},
        ],
        "num_hidden_layers": 5,
    },
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    # one block each: Mamba-2, MLP, attention, MoE
    "nemotron_h": ROUTED_MOE
    | {
        "hybrid_override_pattern": "M-*E",
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "mamba_proj_bias": False,
        "ssm_state_size": 32,
        "n_groups": 2,
        "conv_kernel": 4,
        "moe_shared_expert_intermediate_size": 64,
        "mlp_bias": False,
        "use_bias": False,
        "use_conv_bias": True,
        "layer_norm_epsilon": 1e-5,
    },
    "olmo2": {},
    "olmo3": SLIDING_FIRST,
    "olmo_hybrid": DELTA_NET
    | {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_allow_neg_eigval": True,
        "layer_norm_epsilon": 1e-5,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "openelm": {
        "model_dim": 64,
        "num_transformer_layers": 4,
        "num_query_heads": [4, 4, 8, 8],
        "num_kv_heads": [2, 2, 4, 4],
        "ffn_multipliers": [1.0, 2.0, 2.0, 3.0],
        "ffn_dim_divisor": 32,
    },
    "phi": {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    "phi3": {"rope_scaling": LONG_ROPE, "original_max_position_embeddings": 128},
    # it writes -inf at token ids up to 100,351, whatever the vocabulary
    "phi3small": {
        "vocab_size": 100352,
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 128,
        "gegelu_limit": 20.0,
        "layer_norm_epsilon": 1e-5,
    },
    "phimoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_scaling": LONG_ROPE | {"short_mscale": 1.2, "long_mscale": 1.2},
        "original_max_position_embeddings": 128,
    },
    # the experts' width is 4 * model_dim
    "phixtral": {
        "num_vocab": 160,
        "model_dim": 64,
        "num_heads": 4,
        "num_layers": 4,
        "rotary_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "plamo": {"n_shared_head": 2},
    "plamo2": {
        "hidden_size_per_head": 16,
        "attention_window_size": 256,
        "mamba_num_heads": 8,
        "mamba_d_state": 32,
        "mamba_d_conv": 4,
        "mamba_step": 2,
        "tie_word_embeddings": True,
    },
    "plamo3": {"window_size": 8, "sliding_window_pattern": 4, "rope_local_theta": 1000.0},
    # half of intermediate_size is the gate
    "qwen": {"kv_channels": 16, "intermediate_size": 256, "layer_norm_epsilon": 1e-5, "no_bias": True},
    "qwen2": {},
    "qwen2_moe": SHARED_MOE,
    "qwen3": {},
    "qwen3_moe": MOE | {"decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "qwen3_next": DELTA_NET
    | SHARED_MOE
    | {
        "full_attention_interval": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "partial_rotary_factor": 0.25,
    },
    # half of intermediate_size is the gate
    "recurrent_gemma": {
        "block_types": ["recurrent", "recurrent", "attention"],
        "num_key_value_heads": 1,
        "intermediate_size": 256,
        "attention_window_size": 8,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
    },
    # its quant_predicate quantizes the LoRAs in groups of 64
    "rwkv7": {
        "head_dim": 32,
        "a_low_rank_dim": 64,
        "v_low_rank_dim": 64,
        "gate_low_rank_dim": 64,
        "decay_low_rank_dim": 64,
        "norm_eps": 1e-5,
    },
    "seed_oss": {"attention_bias": True},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0], "tie_word_embeddings": True},
    "solar_open": ROUTED_MOE | {"partial_rotary_factor": 1.0, "rope_scaling": YARN_ROPE},
    "spark2_5": SLIDING_FIRST
    | {
        "rope_parameters": {
            "full_attention": PLAIN_ROPE | {"partial_rotary_factor": 0.5},
            "sliding_attention": PLAIN_ROPE | {"partial_rotary_factor": 1.0},
        },
        "tie_word_embeddings": True,
    },
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5},
    "starcoder2": {"norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "step3p5": FULL_FIRST
    | {
        "num_attention_groups": 2,
        "attention_other_setting": {"num_attention_heads": 8, "num_attention_groups": 2},
        "rope_theta": [10000.0, 1000.0, 1000.0, 1000.0],
        "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0],
        "rope_scaling": LLAMA3_ROPE,
        "yarn_only_types": ["full_attention"],
        "moe_layers_enum": "1,2,3",
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_intermediate_size": 64,
        "share_expert_dim": 64,
        "swiglu_limits": [0.0, 0.0, 0.0, 7.0],
        "swiglu_limits_shared": [0.0, 0.0, 0.0, 16.0],
    },
    "talkie": {},
    "telechat3": {"rope_scaling": YARN_ROPE | {"rope_type": "telechat3-yarn"}},
    "youtu_llm": MLA | {"tie_word_embeddings": True},
}

# wrappers: the language model's config is the text_config
NESTED: dict[str, dict] = {
    "lfm2-vl": LFM2 | {"model_type": "lfm2"},
    # num_experts_per_tok has to be 1; layer 3 is the one without RoPE and chunks
    "llama4": {
        "model_type": "llama4_text",
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 128,
        "attention_chunk_size": 8,
        "use_qk_norm": True,
        "rope_scaling": LLAMA3_ROPE,
    },
    # blocks of 2 keys, 2 of them kept: the choice matters from 5 tokens on
    "minimax_m3_vl": {
        "model_type": "minimax_m3_vl_text",
        "moe_layer_freq": [0, 1, 1, 1],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "dense_intermediate_size": 128,
        "shared_intermediate_size": 64,
        "partial_rotary_factor": 0.5,
        "sparse_attention_config": {
            "sparse_attention_freq": [0, 0, 1, 1],
            "sparse_num_index_heads": 2,
            "sparse_index_dim": 16,
            "sparse_block_size": 2,
            "sparse_topk_blocks": 2,
            "sparse_local_block": 1,
        },
    },
    "mistral3": {"model_type": "ministral3", "rope_parameters": LLAMA4_ROPE},
    "pixtral": {"model_type": "mistral"},
    # only widths from 128 on are packed, rotated only from 512 on; packed weights start as zeros
    "prism_hadamard_qwen35": DELTA_NET
    | {
        "model_type": "qwen3_5_text",
        "intermediate_size": 512,
        "full_attention_interval": 4,
        "rope_parameters": QWEN35_ROPE,
    },
    "qwen2_vl": {"model_type": "qwen2_vl_text", "rope_scaling": MROPE},
    "qwen3_5": DELTA_NET | {"model_type": "qwen3_5_text", "full_attention_interval": 4, "rope_parameters": QWEN35_ROPE},
    "qwen3_5_moe": DELTA_NET
    | SHARED_MOE
    | {"model_type": "qwen3_5_moe_text", "full_attention_interval": 4, "rope_parameters": QWEN35_ROPE},
    "qwen3_vl": {"model_type": "qwen3_vl_text", "rope_scaling": MROPE | {"type": "default"}},
    "qwen3_vl_moe": MOE
    | {
        "model_type": "qwen3_vl_moe_text",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "rope_scaling": MROPE | {"type": "default"},
    },
}

# what a wrapper has beside its text_config
TOP = {
    "prism_hadamard_qwen35": {
        "schema_version": 2,
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": f"model.layers.{i}.mlp.down_proj", "block": 512, "embedding": False, "dtype": "float16"}
            for i in range(4)
        ],
    },
}

CONFIGS: dict[str, dict] = {name: BASE | {"model_type": name} | own for name, own in FLAT.items()}
CONFIGS |= {
    name: {"model_type": name, "vocab_size": 160} | TOP.get(name, {}) | {"text_config": BASE | text}
    for name, text in NESTED.items()
}
CONFIGS = {name: CONFIGS[name] for name in sorted(CONFIGS)}

CANNOT: dict[str, str] = {
    "muse_spark": "RuntimeError: [metal_kernel] No Metal back-end, kernels/qk_norm_rope.py, qk_norm_rope()",
    "olmo": "SystemExit on import without hf_olmo; with it ValueError in attend(): scores += the mask 'causal'",
}

NOTES: dict[str, str] = {
    "plamo3": "cached logits differ from position 8 on: the mask's window is window_size + 1, the cache's one less",
    "prism_hadamard_qwen35": "the packed down_proj start as zeros (scales, too): they add nothing until filled",
    "recurrent_gemma": "freeze(), trainable_parameters(): AttributeError _no_grad; __init__ has no super().__init__()",
    "talkie": "all logits are 0 until lm_head, a bare array that starts as zeros, is filled",
}
