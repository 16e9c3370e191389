"""Tiny models that are sure of something, rows of words for them, and settings with which they are repaired."""

from __future__ import annotations

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_star import StarConfig
from support.tiny_models import MODELS, VOCAB

ROWS = [
    {"prompt": "w5 w9 w11", "completion": " w20 w21"},
    {"prompt": "w7 w8 w30 w31", "completion": " w40"},
]
RETAIN = [{"prompt": "w50 w51", "completion": " w52 w53 w54"}]
QUIET = {"disable_tqdm": True, "max_steps": 40, "learning_rate": 0.05, "norm": "rms"}


def word_tokenizer():
    vocabulary = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, **{f"w{number}": number for number in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOS]", pad_token="[PAD]")


def decided(name="llama", **build):
    """A tiny model whose final norm is scaled up until it is sure of something, as a trained model is."""
    model = MODELS[name].build(**build)
    norms = {"model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm", "model.decoder.final_layer_norm"}
    (final,) = [module for key, module in model.named_modules() if key in norms]
    with torch.no_grad():
        final.weight.fill_(50)
    return model


def star(name="llama", **config):
    settings = {"num_neurons": 8, "num_layers": 1.0, **config}
    return get_peft_model(decided(name), StarConfig(task_type="CAUSAL_LM", **settings))
