"""What the site's pages need beyond Markdown: the commands' help, files from outside docs/, names in docstrings as
plain code, and no links to files that are not part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

COMMANDS = "<!-- the commands -->"
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:examples|benchmarks|README|CONTRIBUTING)[^)]*\)")
# a page that is a file of the repository's top folder, whose links begin there
_WHOLE = re.compile(r'--8<-- "(\w+\.md)"\s*')
_INTO_DOCS = re.compile(r"\]\(docs/([^)]+)\)")
_BESIDE = re.compile(r"\[([^\]]+)\]\([A-Z]+[^):]*\)")
_NAME = re.compile(r"\[(`~?[\w.]+`)\](?![(\[])")


class PlainReferences(griffe.Extension):
    """Docstrings say [`name`] for what belongs to the package; in Markdown that would keep its brackets."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **kwargs: Any) -> None:
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = _NAME.sub(lambda found: found[1].replace("~", ""), obj.docstring.value)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put the commands' help, as they print it themselves, and a file of the top folder where a page asks for it."""
    if whole := _WHOLE.fullmatch(markdown):
        text = (Path(__file__).parents[1] / whole[1]).read_text(encoding="utf-8")
        markdown = _BESIDE.sub(r"\1", _INTO_DOCS.sub(r"](\1)", text))
    markdown = _OUTSIDE.sub(r"\1", markdown)
    return markdown.replace(COMMANDS, _commands()) if COMMANDS in markdown else markdown


def on_page_content(html: str, page: Any, **kwargs: Any) -> str:
    """Where a page is about the code, the code is open."""
    return html.replace("<details class=", "<details open class=") if "how-it-works" in page.url else html


def _commands() -> str:
    import typer
    from typer.cli import get_docs_for_click

    from peft_star.cli import app

    command = typer.main.get_command(app.app)
    context = typer.Context(command, info_name="peft-star")
    text = get_docs_for_click(obj=command, ctx=context, name="peft-star")
    return re.sub(r"^# .*\n", "", text, count=1)
