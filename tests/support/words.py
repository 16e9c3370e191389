"""Tiny models that are sure of something, rows of words for them, and settings with which they are repaired."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_star import RepairArguments, StarConfig
from peft_star.engine.batch import make_batches
from peft_star.engine.engine import Engine
from peft_star.engine.passes import teacher_forced
from peft_star.failures import encode_rows
from peft_star.method.callbacks import Journal
from peft_star.method.subject import Run, Subject
from peft_star.models.structure import find_second_matrices
from support.tiny_models import MODELS, VOCAB

ROWS = [
    {"prompt": "w5 w9 w11", "completion": " w20 w21"},
    {"prompt": "w7 w8 w30 w31", "completion": " w40"},
]
RETAIN = [{"prompt": "w50 w51", "completion": " w52 w53 w54"}]
MANY = [*ROWS, *RETAIN]  # more than a few steps solve
LAYERS = [f"model.layers.{index}.mlp.down_proj" for index in range(3)]
QUICK = {"disable_tqdm": True}
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


@contextmanager
def running(model, tokenizer, **arguments) -> Iterator[Run]:
    """What the stages of a repair of this model are given."""
    args = RepairArguments(disable_tqdm=True, **arguments)
    subject = Subject.of(model, tokenizer, args)
    with subject.frozen():
        yield Run(Engine(subject.base, args.max_batch_tokens), subject, args, Journal(args, ()))


@torch.no_grad()
def read_row(base, name, row):
    """A second matrix's inputs (T, m) in a row, and the words that the model says there (T), by a plain forward."""
    seen = []
    handle = find_second_matrices(base)[name].register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    said = base(input_ids=torch.tensor([row.input_ids])).logits[0].argmax(-1)
    handle.remove()
    return seen[0], said


def dense_delta(model, name):
    """What the patch adds to a second matrix."""
    layer = model.base_model.model.get_submodule(name)
    return layer.get_delta_weight("default").detach().clone()


def own_continuations(tokenizer, number=30, length=4, seed=0):
    """Rows that the unpatched model completes right."""
    base, rows = decided(), []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        ids = torch.randint(3, VOCAB, (1, 4), generator=generator)
        for _ in range(length):
            with torch.no_grad():
                ids = torch.cat([ids, base(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        if (ids > 2).all():
            rows.append({"prompt": tokenizer.decode(ids[0, :4]), "completion": " " + tokenizer.decode(ids[0, 4:])})
    return rows


def wrong_tokens(model, tokenizer, rows):
    batches = make_batches(encode_rows(rows, tokenizer), 500)
    return int((~teacher_forced(Engine(model), batches).right).sum())
