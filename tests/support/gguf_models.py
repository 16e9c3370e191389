"""Tiny models as `.gguf` files."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaForCausalLM

from support.byte_llama import build_tokenizer

_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """A Llama's weights by the names and in the order of rows that llama.cpp wants."""
    config = model.config
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
    }
    for number, layer in enumerate(model.model.layers):
        for name, tensor in _BLOCK.items():
            tensors[f"blk.{number}.{tensor}.weight"] = layer.get_submodule(name).weight
    for name, tensor in tensors.items():
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # the halves that are rotated together lie side by side
            tensors[name] = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def write_llama(path: Path, model: LlamaForCausalLM, matrices: str = "F32", **values: int) -> Path:
    """Write a Llama and the tokenizer of bytes as a `.gguf` file.

    Args:
        path: The file.
        model: The model, with tied embeddings.
        matrices: The type of all matrices, as GGUF calls it.
        values: More that the file says, as numbers.
    """
    config, tokenizer = model.config, build_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    for key, value in values.items():
        writer.add_uint32(key.replace("__", "."), value)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_scores([0.0] * len(tokenizer))  # of which no merges follow, and there are none
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, tensor in llama_tensors(model).items():
        kind = gguf.GGMLQuantizationType[matrices if tensor.dim() > 1 else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(tensor.numpy()), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """The type and the unpacked values of each tensor in a `.gguf` file."""
    reader = gguf.GGUFReader(path)
    return {
        tensor.name: (tensor.tensor_type.name, np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in reader.tensors
    }


def read_values(path: Path) -> dict[str, object]:
    """All that a `.gguf` file says beside its tensors."""
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
