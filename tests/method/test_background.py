"""What the neurons do on background text."""

import gc
import weakref

import pytest
import torch
from peft import get_peft_model
from tokenizers.processors import TemplateProcessing

import peft_star.method.background as module
from peft_star import RepairArguments, StarConfig, repair
from peft_star.engine.engine import Engine
from peft_star.method.background import FLOOR, WINDOW, background_activations, background_text, moment_factor
from peft_star.models.structure import find_second_matrices
from support.byte_llama import build_model, build_tokenizer
from support.dense import moment, protected_problem
from support.tiny_models import MODELS
from support.words import QUIET, ROWS, star, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def windows(tokenizer, tokens, width):
    ids = tokenizer(background_text(), add_special_tokens=False)["input_ids"][:tokens]
    return [torch.tensor([ids[start : start + width]]) for start in range(0, len(ids), width)]


@torch.no_grad()
def inputs_of(model, modules, sequences):
    """What the modules read, sequence by sequence, by hooks of our own on whole forwards."""
    found = {name: [] for name in modules}
    for name, each in modules.items():
        each.register_forward_pre_hook(lambda module, args, kept=found[name]: kept.append(args[0]))
    for ids in sequences:
        model(input_ids=ids)
    return {name: torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]) for name, parts in found.items()}


def count_forwards(model, shapes):
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("tokens", [1, 100, WINDOW, WINDOW + 1, 600])
def test_they_are_what_the_second_matrices_read(tokens, tokenizer):
    model, same = build_model(), build_model()
    found = background_activations(Engine(model), tokenizer, find_second_matrices(model), tokens)
    wanted = inputs_of(same, find_second_matrices(same), windows(tokenizer, tokens, WINDOW))
    assert list(found) == list(wanted) and len(found) == 4
    for name, v in found.items():
        assert v.shape == (tokens, 96) and not v.requires_grad
        torch.testing.assert_close(v, wanted[name])


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_reads_windows_that_fit(name, tokenizer):
    """Models of 64 positions read windows of 64 tokens."""
    settings = {"vocab_size": len(tokenizer)}
    model, same = MODELS[name].build(**settings), MODELS[name].build(**settings)
    shapes = count_forwards(model, [])
    found = background_activations(Engine(model), tokenizer, find_second_matrices(model), 150)
    wanted = inputs_of(same, find_second_matrices(same), windows(tokenizer, 150, shapes[0][1]))
    assert sum(width for _, width in shapes) == 150
    if name != "bloom":  # has no limit
        assert shapes == [(1, 64), (1, 64), (1, 22)]
    for key, v in found.items():
        torch.testing.assert_close(v, wanted[key])


def test_a_text_shorter_than_asked_for_is_read_whole(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "background_text", lambda: "a few words")
    model = build_model()
    found = background_activations(Engine(model), tokenizer, find_second_matrices(model), 2048)
    assert {len(v) for v in found.values()} == {11}


def test_tokenizers_that_begin_every_text_with_a_token_do_not_begin_this_one():
    tokenizer, model = build_tokenizer(), build_model()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer("a")["input_ids"][0] == 1
    read = []
    model.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    background_activations(Engine(model), tokenizer, find_second_matrices(model), 5)
    assert tokenizer.decode(read[0][0]) == background_text()[:5]


def test_the_model_is_run_once_for_each_ffn_and_number_of_tokens(tokenizer):
    model = build_model()
    ffns, progress, shapes = find_second_matrices(model), [], []
    count_forwards(model, shapes)
    first = background_activations(Engine(model), tokenizer, ffns, 300, progress.append)
    assert shapes == [(1, 256), (1, 44)] and progress == [1, 1]
    again = background_activations(Engine(model), tokenizer, dict(list(ffns.items())[1:3]), 300, progress.append)
    assert len(shapes) == 2 and len(progress) == 2
    assert list(again) == list(ffns)[1:3] and all(again[name] is first[name] for name in again)
    background_activations(Engine(model), tokenizer, ffns, 200)
    assert shapes[2:] == [(1, 200)]
    other = build_model()
    background_activations(Engine(other), tokenizer, find_second_matrices(other), 300)
    assert module._CACHE[other].keys() == {(name, 300) for name in ffns}


def test_what_is_remembered_goes_with_the_model_and_no_hook_stays(tokenizer):
    model = build_model()
    background_activations(Engine(model), tokenizer, find_second_matrices(model), 10)
    hooks = [each for each in model.modules() if each._forward_pre_hooks or each._forward_hooks]
    assert not hooks and module._CACHE[model]
    gone = weakref.ref(model)
    del model, hooks
    gc.collect()
    assert gone() is None


def test_an_interrupted_reading_is_forgotten(tokenizer):
    model = build_model()
    ffns = find_second_matrices(model)

    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        background_activations(Engine(model), tokenizer, ffns, 600, interrupt)
    assert not [each for each in model.modules() if each._forward_pre_hooks]
    same = build_model()
    wanted = background_activations(Engine(same), tokenizer, find_second_matrices(same), 600)
    for name, v in background_activations(Engine(model), tokenizer, ffns, 600).items():
        assert torch.equal(v, wanted[name])


@pytest.mark.parametrize("mode", ["multiple", "single"])
def test_a_repair_reads_the_text_once(mode):
    model = star()
    shapes = count_forwards(model.base_model.model, [])
    repair(model, word_tokenizer(), ROWS, RepairArguments(mode=mode, background=200, reach="prompt", **QUIET))
    assert shapes.count((1, 64)) == 3 and shapes.count((1, 8)) == 1


@pytest.mark.parametrize("mode", ["multiple", "single"])
def test_without_background_no_text_is_read(mode):
    model = star()
    shapes = count_forwards(model.base_model.model, [])
    report = repair(model, word_tokenizer(), ROWS, RepairArguments(mode=mode, background=0, **QUIET))
    assert report.success and (1, 64) not in shapes


def test_the_background_moves_less_under_protection(tokenizer):
    """Tokens whose word was decided by the background's own neurons: their logits stay nearer to what they were."""
    rows = [{"prompt": "parse(", "completion": "xyz"}, {"prompt": "open the", "completion": " door"}]
    moved = {}
    for background in (0, 512):
        base = build_model()
        with torch.no_grad():
            base.model.norm.weight.fill_(5)
        text = windows(tokenizer, 512, WINDOW)
        with torch.no_grad():
            before = torch.cat([base(input_ids=ids).logits for ids in text], 1).log_softmax(-1)
        model = get_peft_model(base, StarConfig(task_type="CAUSAL_LM", num_neurons=32))
        report = repair(model, tokenizer, rows, RepairArguments(background=background, disable_tqdm=True))
        assert report.success
        with torch.no_grad():
            after = torch.cat([model(input_ids=ids).logits for ids in text], 1).log_softmax(-1)
        moved[background] = (before.exp() * (before - after)).sum(-1).mean().item()
    assert moved[512] < 0.7 * moved[0], moved


# its second moment


def test_the_factor_is_that_of_the_second_moment_with_its_floor():
    _, background, _ = protected_problem(2, 7, 3)
    factor = moment_factor(background.float())
    assert factor.dtype == torch.float64 and factor.triu(1).abs().max() == 0
    torch.testing.assert_close(factor @ factor.T, moment(background), rtol=1e-5, atol=1e-5)


def test_neurons_that_the_background_never_shows_are_not_free():
    _, background, _ = protected_problem(1, 6, 2)
    background[:, 2] = 0
    factor = moment_factor(background)
    assert (factor @ factor.T)[2, 2] == pytest.approx(FLOOR * background.square().mean().item())
    assert torch.isfinite(moment_factor(torch.zeros(5, 6))).all()
