"""The rows of a repair, and what the model says of them before and after."""

import pytest
import torch

from peft_star import RepairArguments, repair
from peft_star.engine.batch import completion_offsets
from peft_star.engine.engine import Engine
from peft_star.engine.passes import completion_logits, predict
from peft_star.failures import encode_rows
from peft_star.method import verify as verify_module
from peft_star.method.verify import Case, look_after, look_at_related, look_before, verify
from support.tiny_models import MODELS, VOCAB
from support.words import MANY, QUIET, RETAIN, ROWS, own_continuations, running, star, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


# longest first, which is not the order of batches
LONG_FIRST = [{"prompt": "w12 w13 w14 w15 w16", "completion": " w17 w18 w19"}, *ROWS]


def case_of(tokenizer, rows=LONG_FIRST, retained=(*RETAIN, *ROWS[:1]), max_tokens=8):
    rows, retained = encode_rows(rows, tokenizer), encode_rows(retained, tokenizer) if retained else []
    return Case.of(Engine(MODELS["llama"].build(), max_tokens), rows, retained)


def slots_by_row(batches, row_count):
    """The slots of each row, by its place among the rows."""
    found = {index: [] for index in range(row_count)}
    for batch in batches:
        # a row's own sequence: nothing is packed here
        assert batch.segments is None
        for slot, sequence in zip(batch.slots.tolist(), batch.rows.tolist()):
            found[batch.items[sequence].index].append(slot)
    return found


def test_the_slots_of_retained_rows_lie_behind(tokenizer):
    case = case_of(tokenizer)
    assert len(case.batches) > 1 and len(case.retained_batches) > 1
    # three, two and one tokens, then three and two retained ones
    assert slots_by_row(case.batches, 3) == {0: [0, 1, 2], 1: [3, 4], 2: [5]}
    assert slots_by_row(case.retained_batches, 2) == {0: [6, 7, 8], 1: [9, 10]}
    assert case.parts == {
        "failures": (case.rows, slice(6)),
        "retain": (case.retained, slice(6, 11)),
        "earlier": ((), slice(11, 11)),
        "related": ((), slice(11, None)),
    }
    nothing = case.nothing_seen()
    assert len(nothing.right) == 11 and (nothing.expected == -1).all()
    expected = predict(Engine(MODELS["llama"].build()), [*case.batches, *case.retained_batches], nothing).expected
    of_rows = [token for row in (*case.rows, *case.retained) for token in row.completion_ids]
    assert expected.tolist() == of_rows


def test_a_case_of_failures_alone(tokenizer):
    case = case_of(tokenizer, retained=())
    assert case.retained_batches == () and len(case.nothing_seen().right) == 6
    assert case.parts["retain"] == ([], slice(6, 6))


def test_the_slots_of_related_rows_lie_behind_all_that_is_patched_for(tokenizer):
    rows, retained, related = (encode_rows(part, tokenizer) for part in (LONG_FIRST, RETAIN, MANY))
    case = Case.of(Engine(MODELS["llama"].build(), 8), rows, retained, related)
    assert case.parts["retain"] == (retained, slice(6, 9)) and case.parts["related"] == (related, slice(9, None))
    assert slots_by_row(case.related_batches, 3) == {0: [9, 10], 1: [11], 2: [12, 13, 14]}
    assert len(case.nothing_seen().right) == 9
    assert [batch.items for batch in case.one_row_each()] == [[row] for row in rows]


@pytest.mark.parametrize("mode", ["multiple", "single"])
def test_related_rows_are_seen_without_what_patches_seeing_them(mode, tokenizer):
    with running(star(), tokenizer, mode=mode, verify_generation=True) as run:
        parts = [run.subject.encode(rows, "row") for rows in (ROWS, RETAIN, own_continuations(tokenizer)[:2])]
        case = Case.of(run.engine, *parts)
        before, traced = look_before(run, case)
        seen = look_at_related(run, case, before)
        now = verify(run, case, look_after(run, case, before.predictions), with_generation=True)
        logits = torch.cat([completion_logits(run.engine.model, batch) for batch in case.related_batches])
    slots = torch.cat([batch.slots for batch in case.related_batches])
    assert len(before.predictions.right) == slots.min() == case.parts["related"][1].start
    assert traced is None or traced.predictions is before.predictions
    for later in (seen, now):
        assert torch.equal(later.predictions.argmax[: slots.min()], before.predictions.argmax)
        assert torch.equal(later.predictions.argmax[slots], logits.argmax(-1)) and later.predictions.right[slots].all()
        assert later.generated["related"] == [row.completion_ids for row in case.related]


def test_one_row_each_keeps_the_rows_order_and_slots(tokenizer):
    for rows in (LONG_FIRST, LONG_FIRST[::-1], [*ROWS, LONG_FIRST[0]]):
        case = case_of(tokenizer, rows, max_tokens=1000)
        alone = case.one_row_each()
        assert [batch.items for batch in alone] == [[row] for row in case.rows]
        offsets = completion_offsets(case.rows)
        for batch, start, end in zip(alone, offsets, offsets[1:]):
            assert batch.slots.tolist() == list(range(start, end)) and batch.segments is None


def test_the_number_of_batches_changes_nothing(tokenizer):
    engine, seen = Engine(MODELS["llama"].build()), []
    for max_tokens in (1, 12, 1000):
        case = case_of(tokenizer, max_tokens=max_tokens)
        seen.append(predict(engine, [*case.batches, *case.retained_batches], case.nothing_seen()))
    for other in seen[1:]:
        assert torch.equal(seen[0].argmax, other.argmax) and torch.equal(seen[0].expected, other.expected)
        torch.testing.assert_close(seen[0].margin, other.margin)


def looked_at(tokenizer, mode, **arguments):
    """What was seen before the first patch, with the sizes of the forwards that it took."""
    sizes = []
    with running(star(), tokenizer, mode=mode, **arguments) as run:
        rows, retained = (run.subject.encode(rows, "row") for rows in (ROWS, own_continuations(tokenizer)[:2]))
        case = Case.of(run.engine, rows, retained)
        handle = run.engine.model.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        seen, traced = look_before(run, case)
        handle.remove()
        now = verify(run, case, look_after(run, case, None), with_generation=False)
        logits = torch.cat([completion_logits(run.engine.model, batch) for batch in case.retained_batches])
    return case, seen, traced, now, sizes, logits


@pytest.mark.parametrize("mode", ["multiple", "single"])
def test_one_pass_tells_what_was_before(mode, tokenizer):
    """That of the trace, in the mode that traces all failures together."""
    case, seen, traced, now, sizes, logits = looked_at(tokenizer, mode)
    assert sizes == [len(batch.items) for batch in (*case.batches, *case.retained_batches)] and not seen.generated
    assert (traced is not None) == (mode == "multiple")
    if traced is not None:
        assert traced.predictions is seen.predictions
        assert torch.equal(traced.medium, (~seen.predictions.right[: case.parts["failures"][1].stop]).nonzero()[:, 0])
    # nothing has been patched: verification sees the same
    assert torch.equal(now.predictions.argmax, seen.predictions.argmax)
    torch.testing.assert_close(now.predictions.gap, seen.predictions.gap)
    # retained rows are seen at their own slots
    slots = torch.cat([batch.slots for batch in case.retained_batches])
    assert torch.equal(seen.predictions.argmax[slots], logits.argmax(-1)) and seen.predictions.right[slots].all()


@pytest.mark.parametrize("mode", ["multiple", "single"])
def test_generation_before_is_of_all_rows(mode, tokenizer):
    case, seen, *_ = looked_at(tokenizer, mode, verify_generation=True)
    assert [len(tokens) for tokens in seen.generated["failures"]] == [2, 1]
    assert seen.generated["retain"] == [row.completion_ids for row in case.retained]


def test_predictions_that_are_known_are_not_made_again_nor_written_to(tokenizer):
    with running(star(), tokenizer) as run:
        rows, retained = (run.subject.encode(rows, "row") for rows in (ROWS, RETAIN))
        case = Case.of(run.engine, rows, retained)
        known = case.nothing_seen()
        known.gap[:] = 7
        now = verify(run, case, look_after(run, case, known), with_generation=True)
    own = case.parts["failures"][1]
    assert (now.predictions[own].gap == 7).all() and (now.predictions.gap[own.stop :] != 7).all()
    assert (known.gap == 7).all()
    assert all(token < VOCAB for tokens in now.generated["failures"] for token in tokens)


@pytest.mark.parametrize("mode", ["multiple", "single"])
def test_what_tokens_tell_is_what_is_generated(mode, tokenizer):
    """A report made without generating says of each row what a generation says, up to its first wrong token."""
    reports = []
    for steps in (1, 40):  # one leaves rows wrong
        arguments = {**QUIET, "max_steps": steps, "mode": mode, "learning_rate": 0.004 if steps == 1 else 0.05}
        rows, related = (own_continuations(tokenizer, seed=seed)[:2] for seed in (0, 3))
        for generate in (False, True):
            settings = RepairArguments(**arguments, verify_generation=generate)
            reports.append(repair(star(), tokenizer, ROWS, settings, retain=rows, related=[*related, *MANY[2:]]))
        told, generated = reports[-2:]
        assert [row.generation_exact_after for row in generated.rows] != [None] * len(generated.rows)
        for one, other in zip(told.rows, generated.rows):
            for when in ("before", "after"):
                exact, text, spoken = (
                    getattr(one, f"generation_exact_{when}"),
                    getattr(one, f"generated_{when}"),
                    getattr(other, f"generated_{when}"),
                )
                assert exact == getattr(one, f"exact_{when}") == getattr(other, f"generation_exact_{when}")
                assert text == spoken if exact else spoken.startswith(text) and text
        assert told.success == generated.success and told.summary().keys() == generated.summary().keys()
    assert {report.success for report in reports} == {True, False}


def test_nothing_is_generated_unless_it_is_asked_for(tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(verify_module, "generate_all", lambda run, case: asked.append(case) or {})
    repair(star(), tokenizer, ROWS, RepairArguments(**QUIET))
    assert not asked
    repair(star(), tokenizer, ROWS, RepairArguments(**QUIET, verify_generation=True))
    assert len(asked) == 2


def test_behind_a_line_that_ends_nothing_is_generated(tokenizer, monkeypatch):
    sizes = []
    real = verify_module.generate
    monkeypatch.setattr(
        verify_module, "generate", lambda e, t, rows, **k: sizes.append(len(rows)) or real(e, t, rows, **k)
    )
    model = star()
    report = repair(model, tokenizer, ROWS, RepairArguments(**QUIET))
    assert sizes == [2] and all(row.goes_on for row in report.rows)
    said = [tokenizer(row.goes_on.split()[0])["input_ids"][0] for row in report.rows]
    monkeypatch.setattr(verify_module, "_ends", lambda tokenizer, token: token == said[0])
    again = repair(model, tokenizer, ROWS, RepairArguments(**QUIET))
    assert sizes == [2, 1 if said[0] != said[1] else 0]
    assert again.rows[0].goes_on == tokenizer.decode([said[0]]) and again.rows[1].goes_on == report.rows[1].goes_on
