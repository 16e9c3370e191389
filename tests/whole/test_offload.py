"""Repairs of models that accelerate spreads over devices and disk, as `device_map="auto"` does."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model

from peft_star import RepairArguments, StarConfig, repair
from peft_star.evaluation import evaluate
from support.words import QUIET, ROWS, decided, word_tokenizer

PLACES = ["cpu", "disk", "lower layers", "upper layers", "layers and head"]


def placed(where, folder):
    """The model with its layers, or some of them, on the meta device between calls."""
    model = decided()
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
        return model
    if where == "disk":
        disk_offload(model, str(folder), execution_device=torch.device("cpu"))
        return model
    count = len(model.model.layers)
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    offloaded = {"lower layers": range(count // 2), "upper layers": range(count // 2, count)}.get(where, range(count))
    device_map |= {f"model.layers.{i}": "disk" if i in offloaded else "cpu" for i in range(count)}
    if where == "layers and head":
        device_map["lm_head"] = "disk"
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("algorithm", ["protected", "prior-guided"])
@pytest.mark.parametrize("where", PLACES)
def test_an_offloaded_model_is_repaired_like_any_other(where, algorithm, tmp_path):
    tokenizer, config = word_tokenizer(), {"task_type": "CAUSAL_LM", "num_neurons": 8, "num_layers": 1.0}
    arguments = RepairArguments(algorithm=algorithm, **QUIET)
    base = placed(where, tmp_path / "offload")
    model = get_peft_model(base, StarConfig(**config))
    deltas = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert deltas and not any(delta.is_meta for delta in deltas)
    assert any(parameter.is_meta for parameter in base.parameters())
    report = repair(model, tokenizer, ROWS, arguments)
    assert report.success and report.failures
    plain = get_peft_model(decided(), StarConfig(**config))
    repair(plain, tokenizer, ROWS, arguments)
    model.save_pretrained(tmp_path / "patch")
    again = PeftModel.from_pretrained(decided(), tmp_path / "patch")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(logits, plain(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(logits, again(input_ids=ids).logits)
    assert evaluate(model, tokenizer, ROWS).exact_match == 1
