"""The exact LoRA: the same logits in a process that never sees peft_star, in the layout that other loaders expect."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_star import StarConfig, export_lora
from peft_star.tuner.layer import star_layers
from support.tiny_models import MODELS, tiny_gpt2, tiny_llama, tokens

# what a user has who never heard of peft_star
STOCK = """
import json, sys, warnings
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

warnings.simplefilter("error", UserWarning)
for job in json.load(open(sys.argv[1])):
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=getattr(torch, job["dtype"]))
    with warnings.catch_warnings():
        if job["base"].endswith("gpt2-path"):
            warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base, job["adapter"], **job["kwargs"]).eval()
    assert model.peft_config["default"].peft_type == "LORA"
    ids = torch.load(job["ids"])
    with torch.no_grad():
        result = {"adapted": model(ids).logits}
        with model.disable_adapter():
            result["base"] = model(ids).logits
        result["merged"] = model.merge_and_unload()(ids).logits
    torch.save(result, job["out"])
assert "peft_star" not in sys.modules
"""


@dataclass
class Case:
    logits: torch.Tensor
    stock: dict[str, torch.Tensor]
    adapter: Path


def patched(base: nn.Module, seed: int = 0, mixed: bool = False, **settings) -> PeftModel:
    """A model with random deltas on random neurons; with `mixed` not as many in each module."""
    torch.manual_seed(seed)
    model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", **{"num_neurons": 5, **settings})).eval()
    layers = star_layers(model.get_base_model(), "default")
    counts = {name: 5 - number % 3 if mixed else 5 for number, name in enumerate(layers)}
    neurons = {name: torch.randperm(layer.in_features)[: counts[name]] for name, layer in layers.items()}
    model.base_model.retarget("default", neurons)
    for name, layer in star_layers(model.get_base_model(), "default").items():
        layer.set_neurons("default", neurons[name], torch.randn(counts[name], layer.out_features))
    return model


CASES = {
    "llama": {},
    "llama-mixed": {"mixed": True},
    "llama-tied": {},
    "gpt2": {},
    "starcoder2": {},
    "gemma": {},
    "gemma3": {"mixed": True},
    "llama-bf16": {"dtype": torch.bfloat16},  # the base only: PEFT keeps adapters in float32
    "llama-all-bf16": {"dtype": torch.bfloat16},
    "llama-path": {"mixed": True},
    "gpt2-path": {},
    "llama-subfolder": {},
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    """Every case, exported here and loaded by one process of stock PEFT."""
    root = tmp_path_factory.mktemp("export")
    torch.save(tokens(), root / "ids.pt")
    jobs, logits = [], {}
    for name, settings in CASES.items():
        settings = dict(settings)
        dtype = settings.pop("dtype", torch.float32)
        kind = name if name in MODELS else name.partition("-")[0]
        base = MODELS[kind].build(dtype=dtype)
        directory, adapter = root / name, root / f"{name}-lora"
        base.save_pretrained(directory)
        model = patched(base, **settings)
        if name == "llama-all-bf16":
            model.to(torch.bfloat16)
        with torch.no_grad():
            logits[name] = model(tokens()).logits
        if name.endswith("-path"):
            model.save_pretrained(root / f"{name}-star")
            # the base model's name leads nowhere: the patch alone has to do
            export_lora(root / f"{name}-star", adapter)
        elif name.endswith("-subfolder"):
            model.save_pretrained(adapter)
            export_lora(model, adapter / "lora")
        else:
            export_lora(model, adapter)
        kwargs = {"subfolder": "lora"} if name.endswith("-subfolder") else {}
        jobs.append(
            {
                "base": str(directory),
                "adapter": str(adapter),
                "kwargs": kwargs,
                "ids": str(root / "ids.pt"),
                "dtype": str(dtype).removeprefix("torch."),
                "out": str(root / f"{name}.pt"),
            }
        )
    run_stock(jobs, root)
    return {
        job["base"].rpartition("/")[2]: Case(
            logits[job["base"].rpartition("/")[2]], torch.load(job["out"]), Path(job["adapter"])
        )
        for job in jobs
    }


def run_stock(jobs: list[dict], root: Path) -> None:
    (root / "jobs.json").write_text(json.dumps(jobs))
    result = subprocess.run(
        [sys.executable, "-c", STOCK, str(root / "jobs.json")], capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", CASES)
def test_stock_peft_gives_the_same_logits(cases, name):
    case = cases[name]
    precision = 5e-3 if case.logits.dtype == torch.bfloat16 else 1e-5
    tolerance = {"atol": precision, "rtol": precision}
    torch.testing.assert_close(case.stock["adapted"], case.logits, **tolerance)
    # the patch does something, so equality means something
    assert (case.stock["adapted"] - case.stock["base"]).abs().max() > 10 * precision
    if case.logits.dtype == torch.float32:
        torch.testing.assert_close(case.stock["merged"], case.logits, **tolerance)


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("-subfolder")])
def test_layout(cases, name):
    """What PEFT writes for a LoRA, and so what vLLM, SGLang and llama.cpp's converter read."""
    adapter = cases[name].adapter
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert config["use_dora"] is False and config["use_rslora"] is False
    assert config["rank_pattern"] == {} and config["alpha_pattern"] == {}
    # llama.cpp scales each module by alpha / (its own rank), vLLM by alpha / r: both are 1 only with one rank for all
    rank = config["r"]
    assert rank == config["lora_alpha"] == 5

    tensors = load_file(adapter / "adapter_model.safetensors")
    kind = MODELS[name if name in MODELS else name.partition("-")[0]]
    m, d = kind.width
    assert set(tensors) == {
        f"base_model.model.{module}.lora_{part}.weight" for module in kind.names for part in ("A", "B")
    }
    assert config["target_modules"] == sorted(kind.names)
    for key, tensor in tensors.items():
        assert tensor.dtype == (torch.bfloat16 if name == "llama-all-bf16" else torch.float32)
        if ".lora_A." in key:
            assert tensor.shape == (rank, m)
            assert set(tensor.unique().tolist()) <= {0.0, 1.0}
            assert (tensor.sum(1) <= 1).all() and (tensor.sum(0) <= 1).all()
        else:
            assert tensor.shape == (d, rank)


def test_padding_only_where_neurons_are_missing(cases):
    tensors = load_file(cases["llama-mixed"].adapter / "adapter_model.safetensors")
    used = [int(tensor.any(1).sum()) for key, tensor in sorted(tensors.items()) if ".lora_A." in key]
    assert used == [5, 4, 3]
    for key, tensor in tensors.items():
        if ".lora_A." in key:
            other = tensors[key.replace("lora_A", "lora_B")]
            assert torch.equal(tensor.any(1), other.any(0))


def test_conv1d_is_recorded(cases):
    config = json.loads((cases["gpt2"].adapter / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True


def test_update_is_the_delta_exactly(tmp_path):
    model = patched(tiny_llama(), mixed=True)
    export_lora(model, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, layer in star_layers(model.get_base_model(), "default").items():
        up, down = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in ("B", "A"))
        assert torch.equal(up @ down, layer.get_delta_weight("default"))


def test_model_and_patch_give_the_same_files(tmp_path):
    model = patched(tiny_llama(), mixed=True)
    model.save_pretrained(tmp_path / "star")
    assert export_lora(model, tmp_path / "a") == tmp_path / "a"
    export_lora(str(tmp_path / "star"), str(tmp_path / "b"))
    for file in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_named_adapter_and_transformers_integration(tmp_path):
    model = patched(tiny_llama())
    model.add_adapter("other", StarConfig(num_neurons=2, target_modules=["1.mlp.down_proj"], init_weights=False))
    export_lora(model, tmp_path / "other", adapter_name="other")
    assert len(load_file(tmp_path / "other" / "adapter_model.safetensors")) == 2
    assert json.loads((tmp_path / "other" / "adapter_config.json").read_text())["r"] == 2

    base = tiny_llama()
    base.add_adapter(StarConfig(num_neurons=3, init_weights=False))
    export_lora(base, tmp_path / "integration")
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "integration").eval()
    torch.testing.assert_close(lora(tokens()).logits, base(tokens()).logits)


def test_a_module_whose_name_ends_another_ones(tmp_path):
    """Only a regex selects `0.fc2` and not `wrapped.0.fc2`."""

    def build():
        torch.manual_seed(0)
        model = nn.Module()
        for name in ("a", "b"):
            setattr(model, name, nn.Module())
        model.a.fc, model.fc = nn.Linear(6, 4), nn.Linear(4, 6)
        model.b.a = nn.Module()
        model.b.a.fc = nn.Linear(6, 4)
        model.forward = lambda x: model.b.a.fc(model.fc(model.a.fc(x)))
        return model

    model = get_peft_model(build(), StarConfig(num_neurons=2, target_modules=r"a\.fc", init_weights=False))
    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(build(), tmp_path / "lora")
    assert [key for key, _ in lora.named_modules() if key.endswith("lora_A")] == ["base_model.model.a.fc.lora_A"]
    x = torch.randn(3, 6)
    torch.testing.assert_close(lora(x), model(x))
    model.save_pretrained(tmp_path / "star")
    export_lora(tmp_path / "star", tmp_path / "again")
    files = [(tmp_path / name / "adapter_config.json").read_text() for name in ("lora", "again")]
    assert files[0] == files[1]


def test_large_rank_and_hub_base_in_the_card(tmp_path):
    base = tiny_llama(intermediate_size=600, hidden_size=640)
    base.config._name_or_path = "someone/some-model"
    model = get_peft_model(base, StarConfig(num_neurons=1.0, init_weights=False))
    model.peft_config["default"].base_model_name_or_path = "someone/some-model"
    export_lora(model, tmp_path / "lora")
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "base_model: someone/some-model" in card and "rank 600 is more than it can load" in card
    model.peft_config["default"].base_model_name_or_path = str(tmp_path)
    export_lora(model, tmp_path / "lora", overwrite=True)
    assert str(tmp_path) not in (tmp_path / "lora" / "README.md").read_text()


def test_many_neurons_have_as_many_ranks_as_directions(tmp_path):
    """vLLM loads no rank above 512, and a delta on 600 neurons that write 16 numbers has 16 directions at most."""
    model = get_peft_model(tiny_llama(intermediate_size=600), StarConfig(num_neurons=1.0, init_weights=False)).eval()
    export_lora(model, tmp_path / "lora")
    width = model.get_base_model().config.hidden_size
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == width
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, layer in star_layers(model.get_base_model(), "default").items():
        up, down = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in ("B", "A"))
        torch.testing.assert_close(up @ down, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
    lora = PeftModel.from_pretrained(tiny_llama(intermediate_size=600), tmp_path / "lora").eval()
    torch.testing.assert_close(lora(tokens()).logits, model(tokens()).logits)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert f"of rank {width}. It is exact" in card and "as many directions as float32 tells apart" in card
    assert "--max-lora-rank 16" in card and "one-hot" not in card


def test_fewer_directions_in_one_module_are_padded(tmp_path):
    model = get_peft_model(tiny_llama(intermediate_size=600), StarConfig(num_neurons=1.0, init_weights=False)).eval()
    layers = star_layers(model.get_base_model(), "default")
    first = next(iter(layers.values()))
    with torch.no_grad():
        first.star_delta["default"][:] = torch.outer(torch.randn(600), torch.randn(first.out_features))
    export_lora(model, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    downs = [values for name, values in tensors.items() if "lora_A" in name]
    assert len({values.shape for values in downs}) == 1
    assert sorted(int(values.any(dim=1).sum()) for values in downs)[0] == 1
    for name, layer in layers.items():
        up, down = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in ("B", "A"))
        torch.testing.assert_close(up @ down, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)


# widths


def test_widths_are_recorded(tmp_path):
    model = patched(tiny_llama())
    assert model.peft_config["default"].in_features == 40
    model.save_pretrained(tmp_path)
    assert StarConfig.from_pretrained(tmp_path).in_features == 40
    model.add_adapter("all", StarConfig(num_neurons=2, target_modules="all-linear"))
    widths = model.peft_config["all"].in_features
    assert widths["model.layers.0.mlp.down_proj"] == 40 and widths["model.layers.0.self_attn.q_proj"] == 16
    assert model.peft_config["default"].in_features == 40


def strip_widths(directory: Path, **changes) -> None:
    """Make a patch as it was before widths were recorded."""
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["in_features"]
    path.write_text(json.dumps({**config, **changes}))


def test_a_patch_without_widths_asks_its_base_model(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = patched(tiny_llama())
    model.save_pretrained(tmp_path / "star")
    export_lora(model, tmp_path / "a")
    strip_widths(tmp_path / "star", base_model_name_or_path=str(tmp_path / "base"))
    export_lora(tmp_path / "star", tmp_path / "b")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


@pytest.mark.parametrize("base", [None, "nobody/no-such-model", "/nowhere/model.gguf"])
def test_a_patch_without_widths_or_base_asks_for_the_model(tmp_path, base):
    patched(tiny_llama()).save_pretrained(tmp_path / "star")
    strip_widths(tmp_path / "star", base_model_name_or_path=base)
    with pytest.raises(ValueError, match="does not record how wide.*pass that model to export_lora"):
        export_lora(tmp_path / "star", tmp_path / "lora")
    # such a patch still loads, and loading fills in what was missing
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "star")
    export_lora(model, tmp_path / "lora")


@pytest.mark.parametrize("value", [0, -3, True, 1.5, "40", {"a": 0}, {"a": 1.5}, {1: 2}])
def test_bad_widths(value):
    with pytest.raises((TypeError, ValueError), match="in_features"):
        StarConfig(in_features=value)


# bad input


def test_output_must_be_empty(tmp_path):
    model = patched(tiny_llama())
    out = tmp_path / "lora"
    out.mkdir()
    export_lora(model, out)
    with pytest.raises(ValueError, match="is not empty; pass overwrite=True"):
        export_lora(model, out)
    with torch.no_grad():
        for layer in star_layers(model.get_base_model()).values():
            layer.star_delta["default"].zero_()
    export_lora(model, out, overwrite=True)
    tensors = load_file(out / "adapter_model.safetensors")
    assert not any(tensor.any() for key, tensor in tensors.items() if "lora_B" in key)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_output_is_never_something_else(tmp_path):
    model = patched(tiny_llama())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="holds no adapter_config.json"):
        export_lora(model, tmp_path / "notes", overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        export_lora(model, tmp_path / "notes" / "diary.txt")
    model.save_pretrained(tmp_path / "star")
    with pytest.raises(ValueError, match="is or holds the input"):
        export_lora(tmp_path / "star", tmp_path / "star", overwrite=True)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"


def test_nothing_is_left_of_a_failed_export(tmp_path, monkeypatch):
    model = patched(tiny_llama())

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export_lora(model, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_star_patch(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["down_proj"])).save_pretrained(tmp_path / "lora")
    tiny_llama().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="adapter of type LORA, not a STAR patch"):
        export_lora(tmp_path / "lora", tmp_path / "out")
    with pytest.raises(ValueError, match="holds a model"):
        export_lora(tmp_path / "base", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="There is no patch"):
        export_lora(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(TypeError, match="takes a model or the path of a patch, got a int"):
        export_lora(3, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_exported(tmp_path):
    with pytest.raises(ValueError, match="no STAR adapter 'default'; it has none at all"):
        export_lora(tiny_llama(), tmp_path / "out")
    with pytest.raises(ValueError, match="no STAR adapter 'default'; it has none at all"):
        export_lora(get_peft_model(tiny_llama(), LoraConfig(target_modules=["down_proj"])), tmp_path / "out")
    model = patched(tiny_gpt2())
    with pytest.raises(ValueError, match="no STAR adapter 'other'; it has only 'default'"):
        export_lora(model, tmp_path / "out", adapter_name="other")
    model.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged into the base weights; unmerge it"):
        export_lora(model, tmp_path / "out")
    model.unmerge_adapter()
    with torch.no_grad():
        star_layers(model.get_base_model())["transformer.h.0.mlp.c_proj"].star_delta["default"][0, 0] = torch.inf
    with pytest.raises(ValueError, match="transformer.h.0.mlp.c_proj holds NaN or infinite"):
        export_lora(model, tmp_path / "out")
    empty = get_peft_model(tiny_llama(), StarConfig(num_neurons=2), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="holds no values yet"):
        export_lora(empty, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_modules_to_save_are_refused(tmp_path):
    config = transformers.LlamaConfig(**MODELS["llama"].settings, num_labels=3)
    base = transformers.AutoModelForSequenceClassification.from_config(config)
    model = get_peft_model(base, StarConfig(task_type="SEQ_CLS", num_neurons=2))
    model.save_pretrained(tmp_path / "star")
    for source in (model, tmp_path / "star"):
        with pytest.raises(ValueError, match="also holds whole modules .*score.*which a plain LoRA cannot"):
            export_lora(source, tmp_path / "out")


def test_damaged_patches(tmp_path):
    patched(tiny_llama()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("star_neurons"))
    save_file({**tensors, key: torch.tensor([0, 1, 2, 3, 40], dtype=torch.int32)}, path)
    with pytest.raises(ValueError, match="damaged: its tensors are not those that were saved"):
        export_lora(tmp_path, tmp_path / "out")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "tensors_sha256": None}))
    with pytest.raises(ValueError, match=r"should be in \[0, 40\), got 40"):
        export_lora(tmp_path, tmp_path / "out")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        export_lora(tmp_path, tmp_path / "out")


# the twin that `model.save_pretrained` writes beside a patch when it is asked for


def saved(tmp_path, **config):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", num_neurons=8, init_weights=False, **config))
    model.save_pretrained(tmp_path / "patch")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, tmp_path / "logits.pt")
    return tmp_path / "patch"


def test_no_twin_unless_asked_for(tmp_path):
    assert not (saved(tmp_path) / "lora").exists()


def test_the_twin_loads_from_its_subfolder_without_this_package(tmp_path):
    saved(tmp_path, lora_twin=True)
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
    patch = saved(tmp_path, lora_twin=True)
    first = (patch / "lora" / "adapter_model.safetensors").read_bytes()
    torch.manual_seed(1)
    model = get_peft_model(
        tiny_llama(seed=1), StarConfig(task_type="CAUSAL_LM", num_neurons=4, init_weights=False, lora_twin=True)
    )
    model.save_pretrained(patch)
    assert (patch / "lora" / "adapter_model.safetensors").read_bytes() != first


# the real model


@pytest.mark.slow
def test_real_model(smollm2_dir, tmp_path, record_property):
    base = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    torch.manual_seed(0)
    model = patched(base, num_neurons=64)
    with torch.no_grad():
        for layer in star_layers(model.get_base_model()).values():
            layer.star_delta["default"].mul_(0.1)
    ids = torch.randint(1000, 40000, (2, 48))
    torch.save(ids, tmp_path / "ids.pt")
    with torch.no_grad():
        logits = model(ids).logits
    model.save_pretrained(tmp_path / "star")
    export_lora(tmp_path / "star", tmp_path / "lora")
    job = {"base": str(smollm2_dir), "adapter": str(tmp_path / "lora"), "kwargs": {}, "ids": str(tmp_path / "ids.pt")}
    run_stock([{**job, "dtype": "float32", "out": str(tmp_path / "out.pt")}], tmp_path)
    stock = torch.load(tmp_path / "out.pt")
    difference = float((stock["adapted"] - logits).abs().max())
    record_property("max_logit_difference", difference)
    print(f"largest difference {difference:.3g} of logits up to {float(logits.abs().max()):.3g}")
    assert (stock["base"] - logits).abs().max() > 1
    assert difference < 1e-3
