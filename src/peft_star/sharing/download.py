"""Patches by name, a directory or a Hub id, and one sentence for what the Hub's client raises, reading and pushing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
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
from huggingface_hub.utils import validate_repo_id

from ..files import recover
from .patch_files import ANY_WEIGHTS, CARD_NAME, CONFIG_NAME, LEDGER_NAME, LEDGER_WEIGHTS, REPORT_NAME, TIMES_NAME

ANSWER_SECONDS = 10  # that the Hub is given to say whether it has something

# By these words in their names are errors of the network known: httpx, httpx2 and requests share no kind.
_UNREACHABLE = ("connect", "timeout", "network")

# A kind of error, or the status of an answer or words in an error's name, and what is said of it: when something is
# read (None: nothing, look further), and when something is pushed. What comes first counts. `{missing}` is "There is
# no local model NAME", `{first}` the error's first line, `{reason}` what the Hub gave as one, in brackets.
_SENTENCES: tuple[tuple[type[BaseException] | int | tuple[str, ...], str | None, str | None], ...] = (
    (HFValidationError, "{missing}, and it is no Hub id either.", None),
    (GatedRepoError, "{name} is gated on the Hub: ask for access there, then give a token.", None),
    (RevisionNotFoundError, "The Hub has no such revision of {name}.", None),
    (RepositoryNotFoundError, "{missing}, and the Hub has none that this token may read.", None),
    (
        OfflineModeIsEnabled,
        "{missing}, and the Hub is switched off (offline mode).",
        "The Hub is switched off (offline mode).",
    ),
    # before EntryNotFoundError, which it is a kind of: what is missing is the answer, not the file
    (LocalEntryNotFoundError, "{missing}, and the Hub could not be reached.", None),
    (EntryNotFoundError, "{name} on the Hub lacks a file that a {what} has: {first}", None),
    (401, None, "The Hub does not know this token, or it may not write to {name}{reason}."),
    (403, None, "This token may not write to {name} on the Hub{reason}."),
    (404, None, "The Hub has no place {name} that this token may write to{reason}."),
    (HfHubHTTPError, None, "The Hub did not take {name}: it answered {status}{reason}."),
    (_UNREACHABLE, "{missing}, and the Hub could not be reached.", "The Hub could not be reached to push to {name}."),
    # what the client makes of a large file that the Hub did not take
    (RuntimeError, None, "The Hub did not take {name}: {error}."),
    (Exception, "{missing}, and the Hub gave no usable answer: {first}", None),
)


def find_patch(patch: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The directory of a patch: the one given, or the Hub's files in the local cache.

    A name that is no directory is asked of the Hub once; without an answer, the local cache has to hold the patch.

    Raises:
        FileNotFoundError: Nothing lies at this path, and the name can be none of a patch on the Hub.
        ValueError: It is a file.
        OSError: The Hub has no such patch, refused it or did not answer.
    """
    path = Path(patch).expanduser()
    if not path.exists():
        recover(path)
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{patch} is a file; a patch is a directory that holds {CONFIG_NAME}.")
    if looks_like_path(str(patch)):
        raise FileNotFoundError(f"There is no patch at {patch}: no such directory.")
    if "/" not in str(patch):
        raise FileNotFoundError(
            f"There is no patch {patch}: no such directory, and a patch on the Hub is named with its owner, "
            f"you/{patch}."
        )
    with in_one_sentence(str(patch), "patch"):
        files = [CONFIG_NAME, ANY_WEIGHTS, REPORT_NAME, TIMES_NAME, CARD_NAME, LEDGER_NAME, LEDGER_WEIGHTS]
        wanted: dict[str, Any] = {"allow_patterns": files, "revision": revision}
        try:
            # one request that fails at once: a download is tried again and again
            HfApi(token=token).model_info(str(patch), revision=revision, timeout=ANSWER_SECONDS)
        except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception:
            with suppress(LocalEntryNotFoundError):
                return Path(snapshot_download(str(patch), local_files_only=True, **wanted))
            raise
        return Path(snapshot_download(str(patch), token=token, **wanted))


def find_ledger(patch: str | Path, subfolder: str | None = None, **hub: Any) -> Path | None:
    """The directory of a patch's ledger, if it has one that can be had; a patch works without.

    Args:
        patch: A directory or a Hub id.
        subfolder: Where in it the patch lies.
        hub: Settings of `hf_hub_download`, such as `revision` and `token`.
    """
    directory = Path(patch, subfolder) if subfolder else Path(patch)
    if (directory / CONFIG_NAME).is_file():
        return directory
    try:
        files = [
            hf_hub_download(str(patch), name, subfolder=subfolder, **hub) for name in (LEDGER_WEIGHTS, LEDGER_NAME)
        ]
    except Exception as error:
        if not is_hub_failure(error):
            raise
        return None
    return Path(files[-1]).parent


def files_of(directory: Path) -> list[Path]:
    """The files and directories in a patch's directory.

    Raises:
        ValueError: One of them is a link to something elsewhere: whoever made the patch would choose which file of
            this machine is copied with it, and published.
    """
    root = directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # of Hugging Face's cache, whose files are links to what lies beside
        allowed.append(root.parents[1] / "blobs")
    found = sorted(directory.iterdir())
    for path in (*found, *directory.glob("*/*")):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise ValueError(f"{path} is a link to something outside of the patch; put the file itself there.")
    return found


def looks_like_path(name: str) -> bool:
    """Whether a name that does not exist on disk was meant as a path rather than as a Hub id."""
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") > 1
        or name.endswith("/")
        or name.lower().endswith((".gguf", ".safetensors", ".bin"))
    )


def hub_id(name: Any) -> str | None:
    """`name` when it is a model's id on the Hub, None when it is a path of this machine or nothing of a name."""
    if not isinstance(name, str) or not name or looks_like_path(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() else name


def short_name(name: str) -> str:
    """A Hub id as it is, and of a path the last part: the rest tells about a machine."""
    return hub_id(name) or next((part for part in reversed(re.split(r"[\\/]", name)) if part), name)


@contextmanager
def in_one_sentence(name: str, what: str | None = None) -> Iterator[None]:
    """Turn what the Hub's client raises in the block, a report of many lines, into one sentence; see [`hub_error`]."""
    try:
        yield
    except Exception as error:
        translated = hub_error(error, name, what)
        if translated is None:
            raise
        raise translated from error


def reading_error(error: BaseException, name: str, what: str) -> OSError:
    """What the Hub's client raised while a "model" or "patch" was read, as one sentence; see [`hub_error`]."""
    translated = hub_error(error, name, what)
    assert translated is not None  # of a reading the table has a word on everything
    return translated


def hub_error(error: BaseException, name: str, what: str | None = None) -> OSError | None:
    """What the Hub's client raised, as one sentence.

    Args:
        error: What was raised.
        name: The repository.
        what: What was to be read, "model" or "patch"; None when it was to be pushed.

    Returns:
        `OSError`: the sentence, a `FileNotFoundError` where the name can be no Hub id; None when the error has to do
        with something other than the Hub, which only a push can tell.
    """
    # a reader may wrap what the client raised; a push raises it itself, and what lies below says less
    links = list(_chain(error)) if what else [error]
    for kind, reading, pushing in _SENTENCES:
        sentence = reading if what else pushing
        if sentence is None or not any(_is_kind(link, kind) for link in links):
            continue
        said = (getattr(error, "server_message", None) or "").strip().splitlines()
        sentence = sentence.format(
            what=what,
            name=name,
            missing=f"There is no local {what} {name}",
            error=error,
            first=first_sentence(error),
            status=_status(error),
            reason=f" ({said[0].rstrip('.')})" if said else "",
        )
        return FileNotFoundError(sentence) if kind is HFValidationError else OSError(sentence)
    return None


def is_hub_failure(error: BaseException) -> bool:
    """Whether something in an exception's chain says that the Hub, and not the files, was the trouble."""
    kinds = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
    return any(isinstance(link, kinds) for link in _chain(error))


def first_sentence(error: BaseException) -> str:
    """An exception's first line, which is what a user can use of messages that run over many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _is_kind(error: BaseException, kind: type[BaseException] | int | tuple[str, ...]) -> bool:
    if isinstance(kind, type):
        return isinstance(error, kind)
    if isinstance(kind, int):
        return isinstance(error, HfHubHTTPError) and _status(error) == kind
    return any(word in type(error).__name__.lower() for word in kind)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
