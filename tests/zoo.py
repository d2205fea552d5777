"""A tiny random model of every causal-LM type that transformers knows, as one table of configuration overrides.

Every model is 64 wide, has 4 layers, 4 heads of 16 (2 of keys and values where the class groups them), a vocabulary of
128 and float32 weights. Where a class has several kinds of layer, the four layers show them.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

WIDTH, LAYERS, VOCABULARY, POSITIONS = 64, 4, 128, 256
PAD, BOS, EOS, FIRST = 0, 1, 2, 4  # ids from FIRST on have no special meaning in any of the models

# Multimodal or composite classes, each around the text decoder on the right.
WRAPPERS: dict[str, str] = {
    "blt": "llama-like blocks over byte patches",
    "dots3_note": "dots3_note_text",
    "emu3": "a llama-like text model without a type in the mapping",
    "fuyu": "persimmon",
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "gemma4_assistant": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "gemma4_unified_assistant": "gemma4_unified_text",
    "git": "a bert-like decoder that reads images",
    "got_ocr2": "qwen2",
    "llama4": "llama4_text",
    "mllama": "a llama with cross-attention layers",
    "moss_transcribe_diarize": "qwen3",
    "musicgen": "a decoder of audio codes",
    "musicgen_melody": "a decoder of audio codes",
    "phi4_multimodal": "phi3",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen4_exp": "qwen4_exp_text",
}
UNBUILDABLE: dict[str, str] = {
    **{wrapper: f"wraps a decoder: {inner}" for wrapper, inner in WRAPPERS.items()},
    "reformer": "reversible layers: two streams, no hidden states per layer and no ordinary cache",
}
# Logits of a position that depend on what comes after it.
NOT_CAUSAL: dict[str, str] = {
    "cpmant": "the prompt is read in both directions",
    "prophetnet": "the n-gram streams depend on the length of the whole sequence",
    "xlnet": "attention is bidirectional unless a permutation mask is given, as generate() does",
}
# Greedy generation of one prompt with a cache that is not the one without.
CACHE_DIFFERS: dict[str, str] = {
    "cpmant": NOT_CAUSAL["cpmant"],
    "prophetnet": NOT_CAUSAL["prophetnet"],
}
_POSITIONS = "learned positions are counted from the first padding token"
_BLOCKS = "keys are compressed in blocks that are counted from the first padding token"
_STATE = "the recurrent state runs over the padding"
# Greedy generation of the second row of a batch, padded on the left with an attention mask, that is not that of the
# row alone.
PADDING_DIFFERS: dict[str, str] = {
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart"), _POSITIONS),
    **dict.fromkeys(("mvp", "pegasus", "plbart", "trocr", "whisper", "xlm"), _POSITIONS),
    **dict.fromkeys(("deepseek_v4", "minimax_m3_vl_text"), _BLOCKS),
    **dict.fromkeys(("recurrent_gemma", "rwkv", "xlstm"), _STATE),
    "glm_moe_dsa": "with a cache, rows after the first choose other keys; without one they agree",
    "minimax": "with a cache, the linear layers do not leave the padding out; without one they do",
    "prophetnet": NOT_CAUSAL["prophetnet"],
    "xlnet": "generate() passes no mask on",
}
# Classes whose forward pass fails with bfloat16 weights on a CPU.
NO_BFLOAT16: dict[str, str] = {"xlnet": "it multiplies float32 relative positions with the weights"}
# Parameters without an effect on the logits, by a pattern that their name contains.
NO_EFFECT: dict[str, str] = {
    r"\.(encoder_attn|cross_attn)(_layer_norm)?\.": "cross-attention, which a decoder alone does not run",
    r"\.(k_proj|key|key_proj|Wk|k_lin)\.bias$": "cancels in the softmax where nothing rotates the key",
    r"pooler\.": "the pooler is no part of a language model",
    r"indexer\.": "only chooses keys: a small change need not change the choice",
    r"\.mask_emb$|\.r_s_bias$|\.seg_embed$": "xlnet without permutation mask or segments",
}
TYPES: tuple[str, ...] = tuple(sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(UNBUILDABLE)))

LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
)
# By the name of the field, for every class that has it; what a class means otherwise by a name is in OVERRIDES.
COMMON: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "attention_hidden_size", "lru_width"), WIDTH),
    **dict.fromkeys(("embedding_size", "embedding_dim", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_head", "kv_channels", "linear_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "dff", "d_inner", "dim_ff"), 160),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dense_intermediate_size", "intermediate_size_mlp"), 160),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 144),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_experts_intermediate_size"), 136),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 136),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), POSITIONS),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "model_max_length"), POSITIONS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("sliding_window", "attention_window_size", "sliding_window_size", "window_size"), 8),
    # Latent attention and its indexer.
    **{"q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    **{"index_topk": 8, "index_head_dim": 16, "index_n_heads": 8},
    # State-space and linear-attention mixers.
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 8},
    **{"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 8},
    **{"state_size": 16, "time_step_rank": 4, "mamba_dt_rank": 4, "mamba_d_ssm": 128, "n_mamba_heads": 2},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"linear_num_heads": 4, "use_mamba_kernels": False},
    # Ids, modes and regularisation.
    **{"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "decoder_start_token_id": BOS},
    **dict.fromkeys(("sep_token_id", "cls_token_id", "eod_token_id", "mask_token_id", "forced_eos_token_id"), None),
    **{"is_decoder": True, "is_encoder_decoder": False},
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "embedding_dropout"), 0.0),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_p", "mlp_dropout"), 0.0),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "emb_pdrop", "classifier_dropout"), 0.0),
    **dict.fromkeys(("residual_dropout", "resid_dropout", "embed_dropout", "summary_first_dropout"), 0.0),
    **dict.fromkeys(("layerdrop", "encoder_layerdrop", "decoder_layerdrop"), 0.0),
    # Multipliers whose defaults belong to a larger width.
    **{"attention_multiplier": 0.25, "query_pre_attn_scalar": 16},
}

# Where a class leaves one of these unset it means that the feature is off, and off it stays.
OFF_BY_DEFAULT = ("sliding_window", "q_lora_rank", "n_group", "topk_group")

SLIDING_FULL = {"layer_types": ("sliding_attention", "full_attention")}
FULL_SLIDING = {"layer_types": ("full_attention", "sliding_attention")}
LINEAR_FULL = {"layer_types": ("linear_attention", "full_attention")}
CONV_FULL = {"layer_types": ("conv", "full_attention")}
DENSE_SPARSE = {"mlp_layer_types": ("dense", "sparse")}
GROUPED = {"n_group": 2, "topk_group": 1}  # experts are chosen within the best group
LATENT = {"num_key_value_heads": 4, "head_dim": 8}  # one key per head; the head size is that of the rotary part
GATED_WINDOW = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16}
INKLING = {"layer_types": ("hybrid_sliding", "hybrid"), **GATED_WINDOW, "d_rel": 8, "rel_extent": 32}
UNPADDED = {"unpadded_vocab_size": VOCABULARY}
PER_LAYER_INPUT = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16}


def _odd(layers: int) -> list[int]:
    return list(range(1, layers, 2))


def _even(layers: int) -> list[int]:
    return list(range(0, layers, 2))


# A tuple is a pattern: repeated, it fills a list with one entry per layer. A function is called with the layer count.
OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": SLIDING_FULL,
    "axk1": {**LATENT, **DENSE_SPARSE, **GROUPED},
    "axk2": {**LATENT, **DENSE_SPARSE},
    # The head size of the linear layers is read from head_dim, which then becomes that of the rotary part.
    "bailing_hybrid": {**LINEAR_FULL, **DENSE_SPARSE, "num_key_value_heads": 4, "qk_rope_head_dim": 16},
    "bamba": {"attn_layer_indices": _odd},
    "beam": {**SLIDING_FULL, **DENSE_SPARSE, **GROUPED},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "codegen": {"rotary_dim": 8},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {**SLIDING_FULL, "logit_scale": 0.5},
    "cohere2_moe": {**SLIDING_FULL, **DENSE_SPARSE, "logit_scale": 0.5},
    "cohere_compass_text": {
        **SLIDING_FULL,
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": None},
    },
    "cpmant": {
        **{"dim_head": 16, "prompt_length": 4, "prompt_types": 4, "segment_types": 4},
        **{"position_bias_num_buckets": 32, "position_bias_max_distance": 64},
    },
    "cwm": FULL_SLIDING,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 144, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": {**LATENT, **GROUPED},
    "deepseek_v32": {**LATENT, **GROUPED, **DENSE_SPARSE},
    "deepseek_v4": {
        "layer_types": ("heavily_compressed_attention", "compressed_sparse_attention"),
        "mlp_layer_types": ("hash_moe", "moe"),
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        **{"num_key_value_heads": 1, "partial_rotary_factor": 0.5, "o_groups": 2, "o_lora_rank": 32},
    },
    "doge": {"keep_window_size": 16},
    "dots1": SLIDING_FULL,
    "dots3_note_text": {
        **LATENT,
        **DENSE_SPARSE,
        "layer_types": ("indexed_attention", "sliding_attention"),
        **{"head_dim": 24, "swa_head_dim": 24, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4},
        **{"swa_q_lora_rank": 32, "swa_kv_lora_rank": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16},
    },
    "electra": {"embedding_size": 32},
    "exaone4": SLIDING_FULL,
    "exaone_moe": {**SLIDING_FULL, **DENSE_SPARSE},
    "flint": {**FULL_SLIDING, "mlp_only_layers": _even},
    "gemma2": SLIDING_FULL,
    "gemma3_text": SLIDING_FULL,
    "gemma3n_text": {
        **SLIDING_FULL,
        **PER_LAYER_INPUT,
        **{"num_kv_shared_layers": 2, "laurel_rank": 8, "activation_sparsity_pattern": (0.5, 0.0)},
    },
    "gemma4_text": {**SLIDING_FULL, **PER_LAYER_INPUT, "global_head_dim": 32},
    "gemma4_unified_text": {**SLIDING_FULL, "global_head_dim": 32},
    "glm4_moe_lite": {**LATENT, **DENSE_SPARSE},
    "glm_moe_dsa": {**LATENT, **DENSE_SPARSE, "indexer_types": ("full", "shared")},
    "gpt_neo": {"attention_types": lambda layers: [[_repeat(("global", "local"), layers), 1]]},
    "gpt_oss": SLIDING_FULL,
    "gptj": {"rotary_dim": 8},
    "granite_swa": FULL_SLIDING,
    "granitemoe_swa": FULL_SLIDING,
    "granitemoehybrid": LINEAR_FULL,
    # Two stacks of half the layers each, run in cycles.
    "hrm_text": {"num_hidden_layers": lambda layers: max(1, layers // 2), "embedding_scale": 8.0},
    "hy_v3": DENSE_SPARSE,
    "hy_v4": {**LATENT, **DENSE_SPARSE, "indexer_types": ("full", "shared")},
    "inkling2_text": {**INKLING, **UNPADDED, "n_layers_per_attn_res_block": 2},
    "inkling_text": {**INKLING, **UNPADDED, **DENSE_SPARSE, "logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 3, "expert_layer_offset": 2},
    "kimi_linear": {**LINEAR_FULL, **DENSE_SPARSE, **LATENT},
    "kolibri1": SLIDING_FULL,
    "laguna": {**FULL_SLIDING, **DENSE_SPARSE},
    "lfm2": {**CONV_FULL, "intermediate_size": 240, "block_multiple_of": 16},
    "lfm2_moe": CONV_FULL,
    "lfm3": {"layer_types": ("conv", "full_attention", "conv", "sliding_attention")},
    "llama4_text": {
        "layer_types": ("chunked_attention", "full_attention"),
        **{"attention_chunk_size": 8, "no_rope_layers": (1, 0), "interleave_moe_layer_step": 2},
        **{"moe_layers": _odd, "num_experts_per_tok": 1},
    },
    "longcat_flash": {**LATENT, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "mellum": {**FULL_SLIDING, **DENSE_SPARSE},
    "mimo_v2_flash": {**FULL_SLIDING, **DENSE_SPARSE, "v_head_dim": 12},
    "minicpm3": {**LATENT, "scale_emb": 4, "dim_model_base": 32},
    "minimax": {**LINEAR_FULL, "block_size": 8},
    "minimax_m3_vl_text": {
        **DENSE_SPARSE,
        "layer_types": ("full_attention", "minimax_m3_sparse"),
        **{"rotary_dim": 8, "index_block_size": 4, "index_topk_blocks": 2, "index_n_heads": 2},
    },
    "ministral": SLIDING_FULL,
    "modernbert-decoder": {**FULL_SLIDING, "cls_token_id": BOS, "sep_token_id": EOS, "local_attention": 16},
    # The class cuts its cache to the window but masks nothing: a window within reach would depend on the cache.
    "moshi": {"audio_vocab_size": VOCABULARY, "sliding_window": POSITIONS, "ffn_dim": 320},
    "nemotron_h": {"layers_block_type": ("linear_attention", "moe", "full_attention", "mlp")},
    "olmo3": SLIDING_FULL,
    "olmo_hybrid": LINEAR_FULL,
    "prophetnet": {"num_buckets": 8, "relative_max_distance": 16},
    "qwen2_moe": {"decoder_sparse_step": 2},
    "qwen3_5_moe_text": LINEAR_FULL,
    "qwen3_5_text": LINEAR_FULL,
    "qwen3_moe": {"decoder_sparse_step": 2},
    "qwen3_next": {**LINEAR_FULL, "decoder_sparse_step": 2},
    "qwen4_exp_text": {
        "layer_types": ("linear_attention", "indexed_attention"),
        **{"hc_count": 2, "hc_lowrank": 16, "ple_embed_dim": WIDTH, "ngram_vocab_size_base": 64},
        **{"indexer_n_heads": 8, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8},
        **{"indexer_compress_ratio": 2, "split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 8},
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 96},
    "roc_bert": {
        **{"pronunciation_embed_dim": 16, "pronunciation_vocab_size": VOCABULARY},
        **{"shape_embed_dim": 16, "shape_vocab_size": VOCABULARY},
    },
    "vaultgemma": SLIDING_FULL,
    "xlm": {"causal": True, "mask_token_id": 3},
    "xlstm": {"chunk_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": {
        "layers_block_type": ("linear_attention", "hybrid"),
        **{"num_key_value_heads": 4, "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 32},
    },
    "zamba2": {
        "layers_block_type": ("linear_attention", "hybrid"),
        **{"num_key_value_heads": 4, "n_mamba_heads": 8, "adapter_rank": 8},
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}


_VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_heads": 2},
    **{"patch_size": 8, "image_size": 16, "out_hidden_size": WIDTH, "vision_output_dim": 64, "depth": 1},
}
_QWEN_VISION = {**_VISION, "num_position_embeddings": 16}
_IMAGE_TOKEN = VOCABULARY - 1
#: Multimodal types: the type of the decoder inside and the rest of the config.
COMPOSITES: dict[str, tuple[str, dict[str, Any]]] = {
    "fuyu": ("persimmon", {"image_size": 16, "patch_size": 4, "image_token_id": _IMAGE_TOKEN}),
    "gemma3": (
        "gemma3_text",
        {
            "vision_config": {"model_type": "siglip_vision_model", **_VISION},
            **{"mm_tokens_per_image": 4, "image_token_index": _IMAGE_TOKEN},
        },
    ),
    "got_ocr2": (
        "qwen2",
        {
            "vision_config": {
                **_VISION,
                "output_channels": 16,
                "mlp_dim": 64,
                "window_size": 2,
                "global_attn_indexes": [0],
            },
            "image_token_index": _IMAGE_TOKEN,
        },
    ),
    "qwen3_5": ("qwen3_5_text", {"vision_config": _QWEN_VISION, "image_token_id": _IMAGE_TOKEN}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {"vision_config": _QWEN_VISION, "image_token_id": _IMAGE_TOKEN}),
    "moss_transcribe_diarize": (
        "qwen3",
        {
            "audio_config": {
                **{"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64},
                **{"num_mel_bins": 16, "max_source_positions": 32},
            },
            "audio_token_id": _IMAGE_TOKEN,
        },
    ),
    "gemma4_unified": (
        "gemma4_unified_text",
        {
            "vision_config": {"patch_size": 8, "mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": WIDTH},
            **{"audio_config": None, "image_token_id": _IMAGE_TOKEN},
        },
    ),
}
_WHOLE = frozenset(COMPOSITES) & set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
ALL: tuple[str, ...] = tuple(sorted({*TYPES, *COMPOSITES}))


def config(model_type: str, *, layers: int = LAYERS, **overrides: Any) -> PretrainedConfig:
    """A tiny configuration of ``model_type``; ``overrides`` may use the common names of the class's attribute map."""
    if model_type in COMPOSITES:
        inner, rest = COMPOSITES[model_type]
        text = config(inner, layers=layers, **overrides).to_dict()
        tied = {name: value for name, value in overrides.items() if name == "tie_word_embeddings"}
        return CONFIG_MAPPING[model_type](text_config=text, **rest, **tied)
    if model_type not in TYPES:
        reason = UNBUILDABLE.get(model_type, "transformers has no causal LM of this type")
        raise ValueError(f"no tiny {model_type!r}: {reason}")
    kind = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(kind)}
    off = {name for name in OFF_BY_DEFAULT if getattr(kind, name, None) is None}
    values = {name: value for name, value in COMMON.items() if name in fields - off}
    values |= {name: layers for name in LAYER_COUNTS if name in fields}
    values |= {name: _for_layers(value, layers) for name, value in OVERRIDES.get(model_type, {}).items()}
    values |= {kind.attribute_map.get(name, name): value for name, value in overrides.items()}
    return kind(**values)


def _for_layers(value: Any, layers: int) -> Any:
    if isinstance(value, tuple):
        return _repeat(value, layers)
    return value(layers) if callable(value) else value


def _repeat(pattern: tuple[Any, ...], layers: int) -> list[Any]:
    return list(itertools.islice(itertools.cycle(pattern), layers))


# Modules whose own parameters are applied as x @ w with another axis of w as the input than the last.
INPUT_AXIS = {"AriaExperts": 1, "GptOssExperts": 1, "Llama4TextExperts": 1, "XLNetRelativeAttention": 0}
TIED_SCALE = 0.25  # of an embedding that is also the head: logits of size 2 rather than 8
# Classes that multiply the embedding by the root of the width: an untied one is drawn that much smaller.
SCALED_EMBEDDING = (
    *("bigbird_pegasus", "biogpt", "ctrl", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text"),
    *("gemma4_unified_text", "hrm_text", "recurrent_gemma", "vaultgemma", "xglm"),
)
NOISE = 0.1  # of everything that starts at a value with a meaning: norms, biases, decays, gates, sinks
ROUTER_BUFFERS = ("e_score_correction_bias", "expert_bias", "layer_scalar")


def build(model_type: str, seed: int = 0, *, layers: int = LAYERS, **overrides: Any) -> PreTrainedModel:
    """A tiny model of ``model_type`` in float32 and eval mode; the same weights for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The whole of a multimodal model, as it is published: AutoModelForCausalLM may take its text decoder only.
        auto = AutoModelForImageTextToText if model_type in _WHOLE else AutoModelForCausalLM
        made = auto.from_config(config(model_type, layers=layers, **overrides), dtype=torch.float32)
        randomise(made, seed)
    return made.eval()


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights in place: matrices that keep activations near 1, and everything else near, but not at, its default."""
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    tied = head is not None and any(head.weight is module.weight for module in _embeddings(model))
    embedding = (
        TIED_SCALE if tied else WIDTH**-0.5 if model.config.get_text_config().model_type in SCALED_EMBEDDING else 1.0
    )
    tokens = model.get_input_embeddings().weight
    done: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in done or not parameter.requires_grad:  # sinusoids are not trained
                    continue
                done.add(id(parameter))
                noise = torch.randn(parameter.shape, generator=generator)
                scale = _scale(module, name, parameter)
                if scale is None:
                    parameter.add_(NOISE * noise)
                elif parameter is tokens:
                    parameter.copy_(embedding * noise)
                else:
                    parameter.copy_(scale * noise)
            for name, buffer in module.named_buffers(recurse=False):
                if name in ROUTER_BUFFERS:
                    buffer.add_(NOISE * torch.randn(buffer.shape, generator=generator))
                if name == "tid2eid":  # the experts of a token, by its id
                    buffer.copy_(torch.rand(len(buffer), 4, generator=generator).argsort(1)[:, : buffer.shape[1]])
        for module in _embeddings(model):
            if module.padding_idx is not None:  # loading a checkpoint zeroes this row in some classes
                module.weight[module.padding_idx] = 0


def _embeddings(model: PreTrainedModel) -> list[nn.Embedding]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


def _scale(module: nn.Module, name: str, parameter: nn.Parameter) -> float | None:
    """The deviation of a freshly drawn weight; None where the value that the class gave it is to be kept."""
    if isinstance(module, nn.Embedding):
        return 1.0
    if isinstance(module, nn.Conv1d) and name == "weight":
        return float(parameter[0].numel()) ** -0.5
    if isinstance(module, Conv1D) and name == "weight":
        return float(parameter.shape[0]) ** -0.5
    if parameter.ndim < 2 or "norm" in type(module).__name__.lower():
        return None
    # A matrix of a class's own (experts, routers) was drawn around 0; a table of decays or of biases was not.
    drawn = isinstance(module, nn.Linear) or parameter.mean().abs() < parameter.std()
    return float(parameter.shape[INPUT_AXIS.get(type(module).__name__, -1)]) ** -0.5 if drawn else None


def ids(length: int = 12, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids without a special meaning, ``batch x length``."""
    return torch.randint(FIRST, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def save(
    model_type: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Save a tiny model in ``folder``, for ``AutoModelForCausalLM.from_pretrained``; returns it in ``dtype``."""
    model = build(model_type, seed, **overrides)
    model.save_pretrained(folder)
    if dtype != torch.float32:  # loaded rather than cast: some classes keep some of their weights in float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        model.save_pretrained(folder)
    return model
