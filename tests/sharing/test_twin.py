"""The LoRA twin that `model.save_pretrained` writes beside a patch when it is asked for."""

import subprocess
import sys

import torch
from peft import get_peft_model

from peft_star import StarConfig
from support.tiny_models import MODELS


def save(tmp_path, **config):
    base = MODELS["llama"].build()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", num_neurons=8, init_weights=False, **config))
    model.save_pretrained(tmp_path / "patch")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, tmp_path / "logits.pt")
    return tmp_path / "patch"


def test_no_twin_unless_asked_for(tmp_path):
    assert not (save(tmp_path) / "lora").exists()


def test_the_twin_loads_from_its_subfolder_without_this_package(tmp_path):
    save(tmp_path, lora_twin=True)
    code = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
path = Path(sys.argv[1])
base = AutoModelForCausalLM.from_pretrained(path / "base").eval()
model = PeftModel.from_pretrained(base, path / "patch", subfolder="lora")
with torch.no_grad():
    logits = model(input_ids=torch.arange(3, 20)[None]).logits
torch.testing.assert_close(logits, torch.load(path / "logits.pt"), rtol=1e-5, atol=1e-5)
assert "peft_star" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_saving_again_replaces_the_twin(tmp_path):
    patch = save(tmp_path, lora_twin=True)
    first = (patch / "lora" / "adapter_model.safetensors").read_bytes()
    torch.manual_seed(1)
    model = get_peft_model(
        MODELS["llama"].build(1), StarConfig(task_type="CAUSAL_LM", num_neurons=4, init_weights=False, lora_twin=True)
    )
    model.save_pretrained(patch)
    assert (patch / "lora" / "adapter_model.safetensors").read_bytes() != first
