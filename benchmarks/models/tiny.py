"""Tiny random causal language models of every architecture that transformers has: tens of thousands of parameters each."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import transformers

VOCAB, WIDTH = 211, 32
MOST_PARAMETERS = 10_000_000  # of a model that is called tiny

# Of whichever of these fields a configuration has; transformers' aliases (n_embd and the like) count.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True,
    # feed-forward and attention
    "intermediate_size": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "d_ff": 48, "dff": 48, "num_key_value_heads": 2,
    "head_dim": 8, "global_head_dim": 8, "rotary_dim": 4, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "attention_hidden_size": WIDTH, "embedding_size": WIDTH,
    "input_embedding_size": WIDTH, "output_embedding_size": WIDTH, "num_kv_heads": 2, "dim_model": WIDTH, "dim_head": 8, "dim_ff": 48,
    # experts
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_shared_experts": 1, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4,
    # recurrences
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "state_size": 8, "ssm_state_size": 8, "n_groups": 1, "time_step_rank": 4, "mamba_dt_rank": 4,
    # embeddings for each layer
    "num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
}  # fmt: skip
# Latent attention has as many key heads as heads, of qk_nope_head_dim + qk_rope_head_dim.
LATENT = {"num_key_value_heads": 4, "head_dim": 8}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
SLIDING_THEN_FULL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
CAP = {"final_logit_softcapping": 1.7}
SCALING = {"logits_scaling": 3.1}


def each(model_types: str, *parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {model_type: {name: value for part in parts for name, value in part.items()} for model_type in model_types.split()}


# What a tiny configuration needs besides; scales, caps and biases are given values that change the logits.
SPECIAL: dict[str, dict[str, Any]] = {
    **each("axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 sarvam_mla youtu", LATENT),
    **each("beam gemma2 gemma3_text gemma4_unified_text nanochat vaultgemma inkling2_text inkling2_loop_text", CAP),
    **each("granite granitemoe granitemoeshared granite_swa granitemoe_swa hyperclovax", SCALING),
    **each("cohere cohere2 cohere2_moe", {"logit_scale": 0.37}),
    **each("qwen3_next qwen3_5_text qwen3_5_moe_text", HYBRID),
    **each("gemma3n_text gemma4_text", CAP, SLIDING_THEN_FULL),
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"logit_scale": 0.37, "layer_types": ["full_attention"] * 2,
                            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "ctrl": {"n_embd": WIDTH, "n_layer": 2, "n_head": 4},
    "dbrx": {"d_model": WIDTH, "n_heads": 4, "n_layers": 2, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}, 
             "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": WIDTH},
             "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "doge": {"is_moe": True},
    "dots3_note_text": LATENT,
    "ernie4_5_moe": {"use_bias": True},
    "falcon_h1": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.4},
    "flint": {"mlp_only_layers": [0]},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**SCALING, "layer_types": ["mamba", "attention"]},
    "inkling_text": {"logits_mup_width_multiplier": 3.1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minicpm3": {**LATENT, "dim_model_base": 10},
    "mpt": {"n_layers": 2},
    "opt": {"word_embed_proj_dim": 16},
    "phimoe": {"lm_head_bias": True},
    "recurrent_gemma": {"logits_soft_cap": 1.7, "lru_width": WIDTH},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 8, "feed_forward_size": 48},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": WIDTH},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16, "pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB},
    "xlstm": {"output_logit_soft_cap": 1.7},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "num_key_value_heads": 4,
              "attention_head_dim": 16, "attention_hidden_size": 64},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_key_value_heads": 4, "n_mamba_heads": 8, "adapter_rank": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip


# Of towers that read images or sounds.
TOWER: dict[str, Any] = {
    "hidden_size": WIDTH, "embed_dim": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "depth": 2,
    "num_attention_heads": 4, "num_heads": 4, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1], "image_size": 16,
    "patch_size": 4, "num_position_embeddings": 16,
}  # fmt: skip


# Of these transformers 4 makes no tiny model, or one that does not run by itself.
_SINCE_5 = {"apertus", "dbrx", "doge", "jamba", "jetmoe", "qwen2_5_vl", "recurrent_gemma", "zamba"}


def there(model_types: Iterable[str]) -> list[str]:
    """Those that the installed transformers has, and can run when they are tiny."""
    broken = _SINCE_5 if transformers.__version__.startswith("4.") else set()
    return [name for name in model_types if name in transformers.CONFIG_MAPPING and name not in broken]


def accepted(kind: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Those of the sizes that a class of configurations has fields for."""
    known = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "__dataclass_fields__", ()), *kind.attribute_map}
    return {name: value for name, value in sizes.items() if name in known}


def _nested(model_type: str, kind: Any) -> dict[str, Any]:
    """Configurations inside of one that has one for text and others for towers."""
    made = kind()
    inside = {}
    for name in ("text_config", "vision_config", "audio_config"):
        part = getattr(made, name, None)
        if part is None:
            continue
        own = part.model_type
        is_listed = name == "text_config" and own in transformers.CONFIG_MAPPING and own != model_type
        inside[name] = tiny_config(own).to_dict() if is_listed else accepted(type(part), SIZES if name == "text_config" else TOWER)
    return inside


def tiny_config(model_type: str, **changes: Any) -> Any:
    kind = transformers.CONFIG_MAPPING[model_type]
    sizes = accepted(kind, SIZES) | (_nested(model_type, kind) if "text_config" in accepted(kind, {"text_config": None}) else {})
    # A field and its alias, both given, would fight.
    special = {**SPECIAL.get(model_type, {}), **changes}
    named = {kind.attribute_map.get(name, name) for name in special}
    return kind(**{name: value for name, value in sizes.items() if kind.attribute_map.get(name, name) not in named}, **special)


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """In evaluation mode, of float32. ValueError where the architecture's configuration is not made tiny by what is above."""
    config = tiny_config(model_type, **changes)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{model_type} has {parameters} parameters, wanted at most {MOST_PARAMETERS}: say in SPECIAL what makes it tiny")
    torch.manual_seed(seed)
    return spread(transformers.AutoModelForCausalLM.from_config(config).eval())


def spread(model: Any) -> Any:
    """The model with larger weights: as it is initialised, its logits are so small that a forgotten cap or bias would hide in rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            bias.normal_()
    return model
