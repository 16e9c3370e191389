"""Options made from a dataclass: what is written there once is what the command line reads, shows and repeats."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from peft_star.cli.options import options_of, parse_amount, with_options


@dataclass
class Settings:
    rate: float = field(default=0.5, metadata={"help": "How fast."})
    max_steps: int = field(default=3, metadata={"help": "How often."})
    amount: int | float = field(default=64, metadata={"help": "How many."})
    kind: Literal["round", "square"] = field(default="round", metadata={"help": "What form."})
    limit: float | None = field(default=None, metadata={"help": "How far."})
    check: bool = field(default=True, metadata={"help": "Whether to look."})
    force: bool = field(default=False, metadata={"help": "Whether to push."})
    names: list[str] = field(default_factory=list, metadata={"help": "Which."})
    forms: tuple[str, ...] = field(default=("a",), metadata={"help": "In which forms."})
    hidden: int = field(default=1, metadata={"help": "Nothing to see."})


TABLE = options_of(Settings, {"max_steps": "--steps"}, first=("kind", "max_steps"), left_out=("hidden",))


@pytest.fixture
def seen() -> list[Any]:
    return []


@pytest.fixture
def app(seen: list[Any]) -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @with_options
    def command(word: str, *, settings: Annotated[dict[str, Any], TABLE], other: bool = False) -> None:
        """A command."""
        seen.append((word, settings, other))

    return app


@pytest.mark.parametrize(
    ("typed", "settings"),
    [
        ("", {}),
        ("--kind square --steps 4 --rate 0.25", {"kind": "square", "max_steps": 4, "rate": 0.25}),
        ("--amount 0.5", {"amount": 0.5}),
        ("--amount 5", {"amount": 5}),
        ("--limit 0.0", {"limit": 0.0}),
        ("--no-check --force", {"check": False, "force": True}),
        ("--names x --names y", {"names": ["x", "y"]}),
        ("--forms b --forms c", {"forms": ("b", "c")}),
    ],
)
def test_what_is_typed_is_what_the_fields_hold(
    app: typer.Typer, seen: list[Any], typed: str, settings: dict[str, Any]
) -> None:
    result = CliRunner().invoke(app, ["word", *typed.split()])
    assert result.exit_code == 0, result.output
    ((word, values, other),) = seen
    assert (word, other) == ("word", False)
    assert Settings(**values) == Settings(**settings)
    assert type(values["amount"]) is type(Settings(**settings).amount)
    assert TABLE.words(values) == typed.split()


def test_help_is_the_fields(app: typer.Typer) -> None:
    lines = CliRunner().invoke(app, ["--help"]).output.splitlines()
    shown = [line.split()[0] for line in lines if line.strip().startswith("--")]
    order = "--kind --steps --rate --amount --limit --no-check --force --names --forms --other --help"
    assert [name for name in shown if name in order.split()] == order.split()
    text = " ".join(" ".join(lines).split())
    for expected in ("How fast.", "default: 0.5]", "How many.", "default: 64]", "Whether to look.", "In which forms."):
        assert expected in text
    assert "Nothing to see." not in text


def test_only_some_fields() -> None:
    assert [option.name for option in options_of(Settings, only=("rate", "amount"))] == ["--rate", "--amount"]


@pytest.mark.parametrize("setting", ["names", "first", "only", "left_out"])
def test_fields_that_are_not_there(setting: str) -> None:
    value = {"speed": "--speed"} if setting == "names" else ("speed",)
    with pytest.raises(ValueError, match="Settings has no speed"):
        options_of(Settings, **{setting: value})


def test_an_option_is_declared_once() -> None:
    def command(rate: float, settings: Annotated[dict[str, Any], TABLE]) -> None: ...

    command.__annotations__ = {"rate": float, "settings": Annotated[dict[str, Any], TABLE]}
    with pytest.raises(ValueError, match="rate"):
        with_options(command)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "0.0", "nan", "inf", "many", ""])
def test_amounts(text: str) -> None:
    assert (parse_amount("--x", "3"), parse_amount("--x", "1.0"), parse_amount("--x", "0.1")) == (3, 1.0, 0.1)
    with pytest.raises(ValueError, match=f"--x is '{text}'; give a whole number of at least 1, or a share"):
        parse_amount("--x", text)
