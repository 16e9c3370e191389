"""A patched tiny model, which is repaired once for all tests of what it says."""

from __future__ import annotations

import pytest
from peft import PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase

from peft_star import RepairArguments, StarConfig, repair
from support.byte_llama import build_model
from support.evaluated import ROWS


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer) -> PreTrainedTokenizerBase:
    return tiny_tokenizer


@pytest.fixture(scope="session")
def patched(tokenizer) -> PeftModel:
    """A model that says exactly ROWS. Not to be changed."""
    model = get_peft_model(build_model(), StarConfig(task_type="CAUSAL_LM", num_neurons=32))
    report = repair(model, tokenizer, ROWS, RepairArguments(learning_rate=0.05, max_steps=200, disable_tqdm=True))
    assert report.success
    return model
