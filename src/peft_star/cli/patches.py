"""What several commands do with patches: find, check, save, push."""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict

from ..files import KeptElsewhere, bytes_of, new_directory
from ..loading import REPORT_NAME, check_fit, find_patch, read_patch_config
from ..models.fingerprint import check_base
from ..models.names import PEFT_PREFIX
from ..report import RepairReport
from ..sharing.card import PLOT_NAME, write_card
from ..sharing.download import first_sentence
from ..sharing.hub import push
from ..sharing.patch_files import write_adapter
from .app import EXIT_INTERRUPTED, fail
from .console import escape, quiet, status, stderr_console


@dataclass(frozen=True)
class FoundPatch:
    """A patch on this machine.

    Attributes:
        name: What the user calls it: a directory, or a Hub id.
        directory: Where its files are.
        config: Its configuration.
    """

    name: str
    directory: Path
    config: dict[str, Any]


def find_patches(names: list[str], *, revision: str | None = None, token: str | None = None) -> list[FoundPatch]:
    """Find each patch, download it if need be, and read its configuration."""
    directories = [find_patch(name, revision=revision, token=token) for name in names]
    return [FoundPatch(name, directory, read_patch_config(directory)) for name, directory in zip(names, directories)]


def check_patches(base: Any, patches: list[FoundPatch], allow_other_base: bool, does: str) -> None:
    """Raise ValueError unless every patch fits this base and was solved for its weights; `does`: what is done then."""
    for patch in patches:
        check_fit(base, patch.directory, patch.name)
        try:
            check_base(base, patch.config, allow_mismatch=allow_other_base)
        except ValueError as error:
            raise ValueError(f"{patch.name}: {error} (--allow-other-base {does} it all the same.)") from error


def save_patch(
    model: Any, report: RepairReport, path: Path, command: str | None = None, *, overwrite: bool = False
) -> int:
    """Write a patch with its report and card, complete or not at all, and return its size in bytes.

    Args:
        model: It holds the patch.
        report: What its repair reported.
        path: The directory to write.
        command: What made the patch, for the card.
        overwrite: Whether what `path` holds may be replaced.

    Raises:
        OSError: It could not be written; the message says where the patch is kept instead.
    """
    try:
        with new_directory(path, overwrite) as temporary:
            with quiet():
                # nothing resizes embeddings here, and to look whether something did PEFT asks the Hub
                model.save_pretrained(temporary, save_embedding_layers=False)
            report.save(temporary / REPORT_NAME)
            with contextlib.suppress(ImportError):  # matplotlib is an extra
                report.plot(temporary / PLOT_NAME)
            write_card(temporary, report, command=command)
    except KeptElsewhere:
        raise
    except KeyboardInterrupt:
        fail(f"Interrupted while saving; the patch is kept in {keep_patch(model, report, path)}.", EXIT_INTERRUPTED)
    except Exception as error:
        kept = keep_patch(model, report, path)
        reason = first_sentence(error).rstrip(".")
        raise OSError(f"The patch could not be saved in {path} ({reason}); it is kept in {kept}.") from error
    return bytes_of(path)


def keep_patch(model: Any, report: RepairReport, path: Path) -> Path:
    """Write the patch and its report, and nothing else that could fail, beside `path` or else among temporary files.

    Returns:
        The new directory.
    """
    path = path.expanduser().absolute()
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name.removeprefix(PEFT_PREFIX): tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    for parent in (path.parent, Path(tempfile.gettempdir())):
        directory = None
        try:
            directory = Path(tempfile.mkdtemp(prefix=f"{path.name[:100]}.kept-", dir=parent))
            write_adapter(directory, {}, tensors)
            config = copy.copy(model.peft_config["default"])
            config.inference_mode, config.lora_twin, config.repaired = True, False, None
            ledger, config.ledger, config.ledger_sha256 = config.ledger, None, None
            config.save_pretrained(directory)  # in the place of the empty one
        except Exception:  # a full disk is one of safetensors' own kind
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)
            continue
        with contextlib.suppress(Exception):  # what went wrong before may do so again
            report.save(directory / REPORT_NAME)
            config.ledger = ledger
            config.save_pretrained(directory)
        return directory
    raise OSError(f"The patch could not be saved in {path}, nor beside it, nor among temporary files.")


def push_patch(directory: Path, repo: str, as_json: bool, **kwargs: Any) -> str:
    """Push a patch and return its address; `kwargs` are those of [`push`]."""
    with status(f"Pushing to {repo}", as_json), quiet():
        url = push(directory, repo, **kwargs)
    if not as_json:
        stderr_console().print(f"Pushed to {escape(url)}", soft_wrap=True)
    return url
