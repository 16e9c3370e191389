"""Builders of tiny transformers models with random weights; nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 64
_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA_LIKE = {
    **_TOKENS,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_WITHOUT_GQA = {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"}
_GPT2_LIKE = {**_TOKENS, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_inner": 40, "n_positions": 64}


@dataclass(frozen=True)
class Tiny:
    """One architecture: how to build it, and what the second matrices of its FFNs are.

    Attributes:
        config: The name of the config class in transformers.
        settings: The config's values.
        second: The names of the second matrices, with `{}` for the layer's index.
        suffixes: What `target_modules=None` should resolve to.
        width: (in_features, out_features) of the second matrices.
    """

    config: str
    settings: dict
    second: str
    suffixes: frozenset[str]
    width: tuple[int, int] = (40, 16)
    layers: int = 3

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**{**self.settings, **settings})
        return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()

    @property
    def names(self) -> list[str]:
        return [self.second.format(index) for index in range(self.layers)]


def _tiny(config: str, settings: dict, second: str, suffix: str, **kwargs) -> Tiny:
    return Tiny(config, settings, second, frozenset({suffix}), **kwargs)


_LLAMA_NAME = "model.layers.{}.mlp.down_proj"
_HEADS = {"head_dim": 8}  # wider than hidden_size / heads, so that o_proj has in_features != out_features

MODELS: dict[str, Tiny] = {
    # CodeLlama and OpenCoder are this architecture
    "llama": _tiny("LlamaConfig", _LLAMA_LIKE, _LLAMA_NAME, "down_proj"),
    "llama-tied": _tiny("LlamaConfig", {**_LLAMA_LIKE, "tie_word_embeddings": True}, _LLAMA_NAME, "down_proj"),
    # m equal to the attention's width: only the module that holds it tells o_proj and down_proj apart
    "llama-square": _tiny(
        "LlamaConfig", {**_LLAMA_LIKE, "intermediate_size": 16}, _LLAMA_NAME, "down_proj", width=(16, 16)
    ),
    "llama-wide-heads": _tiny("LlamaConfig", {**_LLAMA_LIKE, "head_dim": 10}, _LLAMA_NAME, "down_proj"),
    "starcoder2": _tiny("Starcoder2Config", {**_LLAMA_LIKE, "use_bias": True}, "model.layers.{}.mlp.c_proj", "c_proj"),
    "gpt2": _tiny("GPT2Config", _GPT2_LIKE, "transformer.h.{}.mlp.c_proj", "mlp.c_proj"),
    "gpt_bigcode": _tiny("GPTBigCodeConfig", _GPT2_LIKE, "transformer.h.{}.mlp.c_proj", "mlp.c_proj"),
    "gpt_bigcode-mha": _tiny(
        "GPTBigCodeConfig", {**_GPT2_LIKE, "multi_query": False}, "transformer.h.{}.mlp.c_proj", "mlp.c_proj"
    ),
    "gptj": _tiny("GPTJConfig", {**_GPT2_LIKE, "rotary_dim": 4}, "transformer.h.{}.mlp.fc_out", "fc_out"),
    "codegen": _tiny("CodeGenConfig", {**_GPT2_LIKE, "rotary_dim": 4}, "transformer.h.{}.mlp.fc_out", "fc_out"),
    "gpt_neo": _tiny(
        "GPTNeoConfig",
        {
            **_TOKENS,
            "hidden_size": 16,
            "num_layers": 3,
            "num_heads": 4,
            "intermediate_size": 40,
            "attention_types": [[["global", "local", "global"], 1]],
            "max_position_embeddings": 64,
        },
        "transformer.h.{}.mlp.c_proj",
        "c_proj",
    ),
    "gpt_neox": _tiny("GPTNeoXConfig", _WITHOUT_GQA, "gpt_neox.layers.{}.mlp.dense_4h_to_h", "dense_4h_to_h"),
    "qwen2": _tiny("Qwen2Config", _LLAMA_LIKE, _LLAMA_NAME, "down_proj"),
    "qwen3": _tiny("Qwen3Config", {**_LLAMA_LIKE, **_HEADS}, _LLAMA_NAME, "down_proj"),
    "mistral": _tiny("MistralConfig", {**_LLAMA_LIKE, **_HEADS}, _LLAMA_NAME, "down_proj"),
    "gemma": _tiny("GemmaConfig", {**_LLAMA_LIKE, **_HEADS}, _LLAMA_NAME, "down_proj"),
    "gemma2": _tiny("Gemma2Config", {**_LLAMA_LIKE, **_HEADS}, _LLAMA_NAME, "down_proj"),
    "gemma3": _tiny("Gemma3TextConfig", {**_LLAMA_LIKE, **_HEADS}, _LLAMA_NAME, "down_proj"),
    "phi": _tiny("PhiConfig", _LLAMA_LIKE, "model.layers.{}.mlp.fc2", "fc2"),
    "phi3": _tiny("Phi3Config", _LLAMA_LIKE, _LLAMA_NAME, "down_proj"),
    "olmo2": _tiny("Olmo2Config", _LLAMA_LIKE, _LLAMA_NAME, "down_proj"),
    "stablelm": _tiny("StableLmConfig", _LLAMA_LIKE, _LLAMA_NAME, "down_proj"),
    "cohere": _tiny("CohereConfig", _LLAMA_LIKE, _LLAMA_NAME, "down_proj"),
    "granite": _tiny("GraniteConfig", _LLAMA_LIKE, _LLAMA_NAME, "down_proj"),
    "smollm3": _tiny("SmolLM3Config", _LLAMA_LIKE, _LLAMA_NAME, "down_proj"),
    "glm4": _tiny("Glm4Config", {**_LLAMA_LIKE, **_HEADS}, _LLAMA_NAME, "down_proj"),
    "opt": _tiny(
        "OPTConfig",
        {
            **_TOKENS,
            "hidden_size": 16,
            "ffn_dim": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
        },
        "model.decoder.layers.{}.fc2",
        "fc2",
    ),
    "falcon": _tiny(
        "FalconConfig",
        {**_WITHOUT_GQA, "ffn_hidden_size": 40, "parallel_attn": True, "new_decoder_architecture": False},
        "transformer.h.{}.mlp.dense_4h_to_h",
        "dense_4h_to_h",
    ),
    "falcon-sequential": _tiny(
        "FalconConfig",
        {**_WITHOUT_GQA, "ffn_hidden_size": 40, "parallel_attn": False, "new_decoder_architecture": False},
        "transformer.h.{}.mlp.dense_4h_to_h",
        "dense_4h_to_h",
    ),
    "falcon-new": _tiny(
        "FalconConfig",
        {**_WITHOUT_GQA, "ffn_hidden_size": 40, "new_decoder_architecture": True, "num_kv_heads": 2},
        "transformer.h.{}.mlp.dense_4h_to_h",
        "dense_4h_to_h",
    ),
    "bloom": _tiny(
        "BloomConfig",
        {**_TOKENS, "hidden_size": 16, "n_layer": 3, "n_head": 4},
        "transformer.h.{}.mlp.dense_4h_to_h",
        "dense_4h_to_h",
        width=(64, 16),
    ),
    "mpt": _tiny(
        "MptConfig",
        {**_TOKENS, "d_model": 16, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
        "transformer.blocks.{}.ffn.down_proj",
        "down_proj",
        width=(64, 16),
    ),
}


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> PreTrainedModel:
    """The model most tests use: three layers, d = 16, m = 40, 64 tokens."""
    return MODELS["llama"].build(seed, dtype, **settings)


def tiny_gpt2(seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> PreTrainedModel:
    """A model whose linear layers are `Conv1D`."""
    return MODELS["gpt2"].build(seed, dtype, **settings)


def tiny_mixtral(seed: int = 0) -> PreTrainedModel:
    """A mixture of experts, whose FFNs are fused parameters."""
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(**_LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tokens(rows: int = 2, length: int = 8, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, length) without the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)
