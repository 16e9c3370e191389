"""Names of patches and models, and one sentence for whatever the Hub's client raises. The client itself is asked in
test_hub.py and test_loading.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from peft_star.sharing.download import hub_error, hub_id, in_one_sentence, is_hub_failure, short_name


def answered(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError, said: str | None = None) -> HfHubHTTPError:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} of many\nlines", response=response, server_message=said)


class ConnectTimeout(Exception):
    """As httpx and requests name theirs, which share no kind."""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (HFValidationError("no"), "There is no local model me/x, and it is no Hub id either."),
        (answered(403, GatedRepoError), "me/x is gated on the Hub: ask for access there, then give a token."),
        (answered(404, RevisionNotFoundError), "The Hub has no such revision of me/x."),
        (
            answered(401, RepositoryNotFoundError),
            "There is no local model me/x, and the Hub has none that this token may read.",
        ),
        (OfflineModeIsEnabled("off"), "There is no local model me/x, and the Hub is switched off (offline mode)."),
        (LocalEntryNotFoundError("gone"), "There is no local model me/x, and the Hub could not be reached."),
        (EntryNotFoundError("no x\nat all"), "me/x on the Hub lacks a file that a model has: no x"),
        (ConnectTimeout(), "There is no local model me/x, and the Hub could not be reached."),
        (answered(500), "There is no local model me/x, and the Hub gave no usable answer: 500 of many"),
        (KeyError(), "There is no local model me/x, and the Hub gave no usable answer: KeyError"),
    ],
)
def test_reading(error: Exception, sentence: str) -> None:
    translated = hub_error(error, "me/x", "model")
    assert str(translated) == sentence
    assert isinstance(translated, FileNotFoundError) == isinstance(error, HFValidationError)
    wrapped = ValueError("500 of many" if "usable" in sentence else "no x")  # by a library on the way
    wrapped.__cause__ = error
    if not isinstance(error, KeyError):
        assert str(hub_error(wrapped, "me/x", "model")) == sentence


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OfflineModeIsEnabled("off"), "The Hub is switched off (offline mode)."),
        (answered(401), "The Hub does not know this token, or it may not write to me/x."),
        (answered(403, said="No rights.\nAt all."), "This token may not write to me/x on the Hub (No rights)."),
        (answered(404, RepositoryNotFoundError), "The Hub has no place me/x that this token may write to."),
        (answered(500, said="Broken"), "The Hub did not take me/x: it answered 500 (Broken)."),
        (ConnectTimeout(), "The Hub could not be reached to push to me/x."),
        (RuntimeError("too large"), "The Hub did not take me/x: too large."),
    ],
)
def test_pushing(error: Exception, sentence: str) -> None:
    with pytest.raises(OSError) as raised, in_one_sentence("me/x"):
        raise error
    assert str(raised.value) == sentence and raised.value.__cause__ is error


def test_a_push_leaves_errors_of_other_things_alone() -> None:
    for error in (ValueError("damaged"), FileNotFoundError("gone"), HFValidationError("no")):
        with pytest.raises(type(error)) as raised, in_one_sentence("me/x"):
            raise error
        assert raised.value is error
    # what lies below a large file's failure says less than the failure
    failed = RuntimeError("the upload of x.safetensors failed")
    failed.__cause__ = answered(403)
    assert str(hub_error(failed, "me/x")) == "The Hub did not take me/x: the upload of x.safetensors failed."


def test_what_was_the_hubs_fault() -> None:
    wrapped = ValueError("no")
    assert not is_hub_failure(wrapped)
    wrapped.__context__ = answered(500)
    assert is_hub_failure(wrapped)


def test_what_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    names = ("gpt2", "me/tiny", "here", "/x", "./x", "a/b/c", "x.gguf", "not a name", "", None)
    assert [name for name in names if hub_id(name)] == ["gpt2", "me/tiny"]
    assert [short_name(name) for name in ("me/tiny", "/a/b", "a\\b", "a/b/c/", "./here")] == [
        "me/tiny",
        "b",
        "b",
        "c",
        "here",
    ]
