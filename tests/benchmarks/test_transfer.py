"""Editors of facts, and the benchmark of what a repair does beyond its prompts, on a tiny model."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import editors  # noqa: E402
import transfer  # noqa: E402
from methods import make_method  # noqa: E402

EDITORS = ("rome", "memit", "alphaedit")
ROWS = [{"prompt": "we saw the cat", "completion": "b", "focus": "the cat"}]
TWO = [*ROWS, {"prompt": "where is my dog", "completion": "c", "focus": "my dog"}]
PLAIN = [{key: row[key] for key in ("prompt", "completion")} for row in ROWS]
# random weights need longer vectors than a real model's, and the short background shows all 96 directions
QUICK = {"layers": [1], "steps": 100, "weight_decay": 0.0, "clamp": 20.0, "kl_weight": 0.0}
SETTINGS = {
    "rome": QUICK,
    "memit": {**QUICK, "moment_weight": 1.0},
    "alphaedit": {**QUICK, "threshold": 1e9, "ridge": 1e-3},
}


def quick(name, **settings):
    return make_method(name, **{**SETTINGS[name], **settings})


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def sites(tokenizer, rows=ROWS):
    """Of each row the plain prompt and one behind another text, then a neutral sentence."""
    focused = [editors.Focused.of(row, index, "test") for index, row in enumerate(rows)]
    found = [editors.Site.of(row, tokenizer, before) for row in focused for before in ("", "oh, ")]
    return [*found, editors.Site.neutral(focused[0], tokenizer)]


@pytest.mark.parametrize("name", EDITORS)
def test_an_editor_makes_the_model_say_it_and_undoes_it(name, tiny_model, tiny_tokenizer):
    before, flags = weights(tiny_model), [parameter.requires_grad for parameter in tiny_model.parameters()]
    with quick(name).patched(tiny_model, tiny_tokenizer, ROWS) as outcome:
        assert outcome.success and outcome.solved == outcome.failures == 1
        assert transfer.right(outcome.model, tiny_tokenizer, PLAIN) == [True]
        changed = {key for key, tensor in weights(tiny_model).items() if not torch.equal(tensor, before[key])}
        assert changed == {"model.layers.1.mlp.down_proj.weight"}
        json.dumps(outcome.to_dict())
    now = weights(tiny_model)
    assert all(torch.equal(now[key], tensor) for key, tensor in before.items())
    assert [parameter.requires_grad for parameter in tiny_model.parameters()] == flags
    assert all("forward" not in vars(module) for module in tiny_model.modules())


@pytest.mark.parametrize("name", EDITORS)
def test_an_editor_undoes_everything_after_an_interrupt(name, tiny_model, tiny_tokenizer):
    before = weights(tiny_model)
    with pytest.raises(KeyboardInterrupt):
        with quick(name, layers=None).patched(tiny_model, tiny_tokenizer, TWO):
            raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(tiny_model).items())


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("focus", [None, "", "a horse", 3])
def test_rows_need_a_focus(name, focus, tiny_model, tiny_tokenizer):
    row = {key: value for key, value in {**ROWS[0], "focus": focus}.items() if value is not None}
    with pytest.raises(ValueError, match=f"row 1: {name} needs a 'focus', the part of the prompt's text"):
        with quick(name).patched(tiny_model, tiny_tokenizer, [*ROWS, row]):
            pass


def test_a_site_is_the_last_token_of_the_focus(tiny_tokenizer):
    plain, behind, neutral = sites(tiny_tokenizer, [{**ROWS[0], "focus": "the"}])
    for site, text in ((plain, "we saw the"), (behind, "oh, we saw the"), (neutral, "the")):
        assert site.prompt[: site.position + 1] == tuple(tiny_tokenizer(text)["input_ids"])
    assert plain.ids == plain.prompt and neutral.completion == ()


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 2])
def test_the_search_computes_what_the_whole_model_would(layer, tiny_model, tiny_tokenizer):
    rows = [{**TWO[0], "completion": "bcd"}, {**TWO[1], "prompt": "my dog is at the"}]
    found, blocks = sites(tiny_tokenizer, rows), list(tiny_model.model.layers)
    vector = torch.randn(tiny_model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    above = editors.Above(tiny_model, found, blocks[: layer + 1])
    for added in (None, vector):
        expected = []
        for site in found:

            def add(module, args, output, site=site):
                output[:, site.position] += 0 if added is None else added  # noqa: B023

            handle = blocks[layer].register_forward_hook(add)
            logits = tiny_model(torch.tensor([site.ids]), use_cache=False).logits[0]
            handle.remove()
            expected.append(logits[len(site.prompt) - 1 :])
        torch.testing.assert_close(above(added), torch.cat(expected), rtol=1e-4, atol=1e-4)


def random_keys(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_memit_solves_its_least_squares():
    keys, moment = random_keys(12, 3), torch.cov(random_keys(12, 40))
    found = quick("memit", moment_weight=5.0).shares(keys, keys, torch.linalg.cholesky(moment), [])
    torch.testing.assert_close(found, torch.linalg.solve(5.0 * moment + keys @ keys.T, keys))


def test_rome_moves_the_plain_key_as_asked():
    keys, plain, factor = random_keys(12, 2), random_keys(12, 5)[:, :2], torch.eye(12, dtype=torch.float64)
    found = quick("rome").shares(keys, plain, factor, [])
    torch.testing.assert_close((found * plain).sum(0), torch.ones(2, dtype=torch.float64))
    averaged = quick("rome", averaged=True).shares(keys, plain, factor, [])
    torch.testing.assert_close((averaged * keys).sum(0), torch.ones(2, dtype=torch.float64))


def test_alphaedit_follows_its_formula_with_earlier_keys():
    keys, earlier, basis = random_keys(12, 3), random_keys(12, 9)[:, 5:], torch.linalg.qr(random_keys(12, 7))[0]
    projection, seen = basis @ basis.T, keys @ keys.T + earlier @ earlier.T
    expected = torch.linalg.solve(projection @ seen + 2.0 * torch.eye(12, dtype=torch.float64), projection @ keys)
    found = quick("alphaedit", ridge=2.0).shares(keys, keys, basis, [earlier])
    torch.testing.assert_close(found, expected)


def test_alphaedit_leaves_what_other_text_shows(tiny_model, tiny_tokenizer):
    method = quick("alphaedit", threshold=0.1)
    before = weights(tiny_model)["model.layers.1.mlp.down_proj.weight"]
    (layer,) = method.chosen(tiny_model)
    with method.patched(tiny_model, tiny_tokenizer, ROWS):
        delta = (layer.ffn.weight - before).detach().double()
    moment = editors.second_moments(tiny_model, tiny_tokenizer, [layer], method.settings["tokens"], None)[layer.name]
    values, vectors = torch.linalg.eigh(moment)
    shown = vectors[:, values >= 0.1]
    assert 0 < shown.shape[1] < len(values) and delta.norm() > 0
    assert (delta @ shown).norm() < 1e-4 * delta.norm()


def test_layers_are_at_the_same_share_of_the_depth(tiny_model):
    # 8 and 4 to 8 of 30 layers
    for name in EDITORS:
        assert [layer.name for layer in make_method(name).chosen(tiny_model)] == ["model.layers.1"]


@pytest.mark.parametrize("name", ["memit", "alphaedit"])
def test_rows_come_in_batches(name, tiny_model, tiny_tokenizer):
    with quick(name, batch=1).patched(tiny_model, tiny_tokenizer, TWO) as outcome:
        assert len(outcome.details["losses"]) == 2 and outcome.solved > 0


# the command line

FACTS = [
    {
        "prompt": row["prompt"],
        "subject": row["focus"],
        "target_new": row["completion"],
        "rephrase_prompt": f"once {row['prompt']}",
        "locality_prompt": f"now {row['prompt']}",
    }
    for row in ({**ROWS[0], "completion": "b"}, TWO[1])
]


@pytest.fixture
def command(tiny_dir, tmp_path, monkeypatch):
    """Run the benchmark on two facts and one change; returns the results in its file."""
    change = {
        "name": "np_in1d_to_isin",
        "edit": [{"prompt": "import a\na.", "completion": "b"}, {"prompt": "x = a.", "completion": "b"}],
        "related": [{"prompt": "y = a.", "completion": "b"}],
        "near": [{"prompt": "y = c.", "completion": "d"}],
    }
    for name, rows in (("facts", FACTS), ("migrations", [change])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    file = tmp_path / "transfer.json"

    def run(*options):
        given = ["--model", tiny_dir, "--json", file, "--facts", tmp_path / "facts.jsonl"]
        given += ["--migrations", tmp_path / "migrations.jsonl", *options]
        monkeypatch.setattr(sys, "argv", ["transfer.py", *map(str, given)])
        transfer.main()
        return json.loads(file.read_text())["results"]

    return run


def test_transfer_from_the_command_line(command, tmp_path, capsys, monkeypatch):
    options = ["--methods", "logit-bias", "memit", "--rows", 0, 2, "--plot", tmp_path / "transfer.png"]
    first = command(*options, "--examples", 1)
    # two facts by both methods, the change by the one that needs no subject
    assert len(first) == 5
    fact = first["method logit-bias, facts 1, first 0"]
    assert all(len(fact[name]) == 1 for name in ("rewrite", "rephrase", "locality")) and fact["locality_kl"][0] > 0
    migration = first["method logit-bias, examples 1, change np_in1d_to_isin"]
    assert migration["related"] == [1, 1] and migration["near"] == [0, 0]
    assert migration["outcome"]["solved"] == migration["outcome"]["failures"] > 0
    printed = capsys.readouterr().out
    assert printed.count("| logit bias |") == 3 and printed.count("| MEMIT |") == 1
    assert "### Migrations that teach a new name" in printed
    assert (tmp_path / "transfer.png").stat().st_size > 10_000

    # again: nothing but what is new is measured
    measured = []
    for name in ("facts", "migration"):
        whole = getattr(transfer.Study, name)
        monkeypatch.setattr(transfer.Study, name, lambda *args, whole=whole: measured.append(args[2:]) or whole(*args))
    assert command(*options, "--examples", 1) == first and not measured
    more = command(*options, "--together", "--examples", 1, 2)
    assert {key: more[key] for key in first} == first and len(measured) == 3
    assert len(more["method memit, facts 2, first 0"]["rewrite"]) == 2
    with pytest.raises(SystemExit, match="other settings"):
        command(*options, "--margin", 0.3)
    with pytest.raises(SystemExit, match="holds results of .*facts.jsonl"):
        command(*options, "--facts", tmp_path / "others.jsonl")
    make = transfer.parse_method
    monkeypatch.setattr(transfer, "parse_method", lambda name: make(name + ":steps=3" if name == "memit" else name))
    with pytest.raises(SystemExit, match="holds memit with other settings"):
        command(*options)


def test_an_interrupted_run_goes_on(command, monkeypatch, capsys):
    whole, calls = transfer.Study.facts, []

    def stop_at_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(transfer.Study, "facts", stop_at_second)
    with pytest.raises(SystemExit) as stopped:
        command("--methods", "logit-bias", "--examples")
    assert stopped.value.code == 130 and "goes on from there" in capsys.readouterr().out
    assert len(command("--methods", "logit-bias", "--examples")) == 2 and len(calls) == 3


def test_the_subject_goes_where_it_is_read():
    star, memit, lora = (make_method(name) for name in ("star", "memit", "lora"))
    for method, focus in ((star, True), (memit, True), (memit, False)):
        assert [row["focus"] for row in transfer.given_to(method, FACTS, focus)] == ["the cat", "my dog"]
    for method, focus in ((star, False), (lora, True)):
        assert [set(row) for row in transfer.given_to(method, FACTS, focus)] == [{"prompt", "completion"}] * 2


def test_of_facts_that_contradict_each_other_the_first_is_taken():
    facts = [{"prompt": prompt, "target_new": new} for prompt, new in (("a", "1"), ("b", "2"), ("a", "3"), ("c", "4"))]
    assert transfer.consistent(facts) == [facts[0], facts[1], facts[3]]
