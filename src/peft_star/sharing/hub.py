"""Sharing patches on the Hub: `push` uploads a directory, and `model.push_to_hub` keeps this package's card.

A patch's own files tell nothing about this machine then: a base model that is no Hub id is blanked in the upload.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import PushToHubMixin

from ..files import read_json, write_json
from ..report import RepairReport
from .card import clean_card, write_card
from .download import files_of, hub_id, in_one_sentence
from .lora import patch_to_lora
from .patch_files import (
    ANY_WEIGHTS,
    CARD_NAME,
    CONFIG_NAME,
    LEDGER_NAME,
    LEDGER_WEIGHTS,
    LORA_DIR,
    PLOT_NAME,
    REPORT_NAME,
    TIMES_NAME,
    Patch,
    is_patch,
    patch_folders,
    write_config,
)

COMMIT_MESSAGE = "Upload a STAR patch"


def push(
    directory: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = COMMIT_MESSAGE,
    lora: bool = False,
) -> str:
    """Upload a patch that lies on disk, with its card, report and LoRA twin, in one commit.

    The directory stays as it is; the card and the configurations are made ready in a copy. Of the directory go its
    files, adapters with names, and `lora/`. Of an earlier patch in the repository nothing is left.

    Args:
        directory: A patch as `peft-star repair` or `save_pretrained` wrote it.
        repo_id: The repository; it is created when it does not exist.
        token: Access token; by default that of `HF_TOKEN` or of `hf auth login`.
        private: Whether a new repository is private.
        revision: A branch; it is created when it does not exist.
        commit_message: The commit's message.
        lora: Whether to write the LoRA twin now.

    Returns:
        The address of the repository, or of the branch.

    Raises:
        ValueError: The directory holds no patch or a damaged one, or `repo_id` can be no repository's name.
        OSError: The Hub refused or could not be reached.
    """
    directory = Path(directory).expanduser()
    folders = patch_folders(directory)
    for folder in folders:
        Patch.read(folder)
    check_repo_id(repo_id)
    check_token(token)
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary)
        for path in files_of(directory):
            if path.is_file() and not path.name.startswith("."):
                shutil.copyfile(path, staging / path.name)
            elif path in folders or (path.name == LORA_DIR and (path / CONFIG_NAME).is_file()):
                shutil.copytree(path, staging / path.name, ignore=shutil.ignore_patterns(".*"))
        if lora:
            shutil.rmtree(staging / LORA_DIR, ignore_errors=True)
            patch_to_lora(directory, staging / LORA_DIR)
        api = HfApi(token=token)
        with in_one_sentence(repo_id):
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.model_info(url.repo_id).private:
                raise ValueError(
                    f"{url.repo_id} exists and is public; only a new repository can be made private here."
                )
            make_ready(staging, url.repo_id, token=token)
            if revision and not revision.startswith("refs/pr"):
                api.create_branch(url.repo_id, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=url.repo_id,
                folder_path=staging,
                commit_message=commit_message,
                revision=revision,
                delete_patterns=[
                    ANY_WEIGHTS,
                    REPORT_NAME,
                    TIMES_NAME,
                    PLOT_NAME,
                    LEDGER_NAME,
                    LEDGER_WEIGHTS,
                    f"{LORA_DIR}/*",
                ],
            )
    return f"{url}/tree/{revision}" if revision else str(url)


def make_ready(directory: Path, repo_id: str, *, token: str | bool | None = None) -> None:
    """Write the card of a patch for its repository, and blank what names a path of this machine, in place."""
    # a relative path such as models/tiny looks like an id once the working directory is another
    is_base = functools.cache(lambda name: HfApi(token=token).repo_exists(name))
    write_card(directory, repo_id=repo_id, is_base=is_base)
    for card in directory.glob(f"*/{CARD_NAME}"):
        clean_card(card, is_base)
    for name in (CONFIG_NAME, REPORT_NAME):
        for path in (directory / name, *directory.glob(f"*/{name}")):
            if path.is_file():
                _blank_base(path, is_base)


def _blank_base(path: Path, is_base: Callable[[str], bool]) -> None:
    data = read_json(path)
    config = data.get("config") if path.name == REPORT_NAME and isinstance(data, dict) else data
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} is damaged: it holds no configuration.")
    base = hub_id(config.get("base_model_name_or_path"))
    if config.get("base_model_name_or_path") and not (base and is_base(base)):
        config["base_model_name_or_path"] = None
        write = write_json if path.name == REPORT_NAME else write_config
        write(path, data)


def keep_own_card(model: Any) -> None:
    """See to it that the next `model.push_to_hub` uploads this package's card instead of a generic one.

    `PeftModel.push_to_hub` is transformers': it saves the model, replaces the card by a generic one, and hands the
    directory to `_upload_modified_files`. None of it can be overridden by a tuner, so this sets that last step on the
    one instance. What it sets knows no model: the instance can be freed, copied and pickled as before.
    """
    if isinstance(model, PushToHubMixin) and hasattr(PushToHubMixin, "_upload_modified_files"):
        model._upload_modified_files = _upload_modified_files  # type: ignore[method-assign, assignment]


def _upload_modified_files(working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    directory = Path(working_dir)
    if any(is_patch(folder) for folder in patch_folders(directory)):
        if (directory / REPORT_NAME).is_file():
            with contextlib.suppress(ImportError):  # matplotlib is an extra
                RepairReport.load(directory / REPORT_NAME).plot(directory / PLOT_NAME)
        make_ready(directory, repo_id, token=kwargs.get("token"))
        kwargs["commit_message"] = kwargs.get("commit_message") or COMMIT_MESSAGE
    # of the instance it needs nothing but the class's name, for a message
    return PushToHubMixin()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def check_repo_id(repo_id: str) -> None:
    """Raise unless `repo_id` can be the name of a repository on the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"{repo_id!r} is no name for a repository on the Hub; give one such as you/your-patch."
        ) from None


def check_token(token: str | None) -> None:
    """Raise when there is no token at all: without one nothing can be pushed."""
    if not (token or get_token()):
        raise ValueError("Pushing to the Hub needs a token: give one, set HF_TOKEN, or run `hf auth login`.")
