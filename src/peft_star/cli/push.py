"""The command `peft-star push`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..loading import find_patch
from .app import Json, Private, Token, command, finish
from .patches import push_patch


@command()
def push(
    patch: Annotated[str, typer.Argument(metavar="PATCH", help="A patch's directory.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="A repository on the Hub, such as you/your-patch.")],
    private: Private = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made when it is missing.")] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Message of the commit.", show_default=False)
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Add the same patch as a plain LoRA in lora/, for those without peft_star.")
    ] = False,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Upload PATCH to the Hub: adapter, card, report, picture and LoRA twin, in one commit.

    The repository is created when it does not exist. Paths of this machine do not go along.
    """
    options = {"commit_message": message} if message else {}
    directory = find_patch(patch, token=token)
    url = push_patch(
        directory, repo, as_json, token=token, private=private or None, revision=revision, lora=lora, **options
    )
    finish({"patch": patch, "repo": repo, "revision": revision, "pushed_to": url}, as_json)
