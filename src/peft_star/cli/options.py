"""Options that a dataclass declares: names, types, defaults and help are its fields', and written nowhere else."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import GenericAlias
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

AMOUNT_OR_AUTO = int | float | Literal["auto"]


def _is_amount(kind: Any) -> bool:
    return kind in (int | float, AMOUNT_OR_AUTO)


@dataclass(frozen=True)
class Option:
    """An option and the field that it sets.

    Attributes:
        field: The field's name.
        name: The option as it is typed, such as `--lr`. Of a switch that is on by default, it is what turns it off; of
            one that may be on, off or neither, what turns it off stands behind a slash.
        kind: The field's type. `int | float`, maybe "auto", is an amount (see [`parse_amount`]); of lists and tuples,
            the option is repeated for each item.
        default: The field's default.
        help: The field's `metadata["help"]`.
    """

    field: str
    name: str
    kind: Any
    default: Any
    help: str

    @property
    def turns_off(self) -> bool:
        """Whether the option turns off what is on by default."""
        return self.default is True

    def parameter(self) -> inspect.Parameter:
        """The parameter that tells Typer of the option."""
        kind: Any = self.kind
        default = self.default
        if _is_amount(kind):
            kind, default = str, str(default)
        elif get_origin(kind) is Literal:
            kind = str  # whoever checks the field says more than Typer would
        elif get_origin(kind) in (list, tuple):
            kind, default = GenericAlias(list, get_args(kind)[:1]), list(default)
        elif self.turns_off:
            default = False
        return inspect.Parameter(
            self.field,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, typer.Option(self.name, help=self.help)],
        )

    def read(self, value: Any) -> Any:
        """The field's value from what Typer has read."""
        if _is_amount(self.kind):
            return parse_amount(self.name, value, "auto" if self.kind == AMOUNT_OR_AUTO else None)
        if self.turns_off:
            return not value
        return tuple(value) if get_origin(self.kind) is tuple else value

    def words(self, value: Any) -> list[str]:
        """What to type for this value: nothing for the default."""
        if value == self.default:
            return []
        if isinstance(value, bool):
            on, _, off = self.name.partition("/")
            return [on if value or not off else off]
        items = value if isinstance(value, (list, tuple)) else [value]
        return [word for item in items for word in (self.name, str(item))]


class Options(tuple[Option, ...]):
    """A set of options.

    It annotates the parameter of a command that stands for all of them, and that gets what they set: a dict from
    fields to values.
    """

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields' values from what Typer has read."""
        return {option.field: option.read(values[option.field]) for option in self}

    def words(self, values: Mapping[str, Any]) -> list[str]:
        """The part of a command line that sets these values; what is a default is left out."""
        return [word for option in self for word in option.words(values[option.field])]


def options_of(
    declared: type,
    names: Mapping[str, str] | None = None,
    *,
    first: Collection[str] = (),
    only: Collection[str] | None = None,
    left_out: Collection[str] = (),
) -> Options:
    """The options that set a dataclass's fields.

    Args:
        declared: The dataclass. Its fields have defaults, and `metadata["help"]`.
        names: The option by field, where it is not the field's name (of a switch that is on by default: with `--no-`
            before it).
        first: The fields whose options come first, in this order; the others keep the dataclass's.
        only: The fields that have an option, if not all.
        left_out: The fields that have none.

    Raises:
        ValueError: One of these names no field.
    """
    names, first = names or {}, list(first)
    fields = {field.name: field for field in dataclasses.fields(declared)}
    if unknown := {*names, *first, *(only or ()), *left_out} - fields.keys():
        raise ValueError(f"{declared.__name__} has no {', '.join(sorted(unknown))}.")
    kinds = get_type_hints(declared)
    shown = [name for name in fields if name not in left_out and (only is None or name in only)]
    shown.sort(key=lambda name: first.index(name) if name in first else len(first))
    options = []
    for name in shown:
        field = fields[name]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        typed = ("--no-" if default is True else "--") + name.replace("_", "-")
        options.append(Option(name, names.get(name, typed), kinds[name], default, field.metadata["help"]))
    return Options(options)


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """The function with a parameter for each option, in place of those that are annotated with [`Options`]."""
    signature = inspect.signature(function, eval_str=True)
    tables = {}
    parameters = []
    for name, parameter in signature.parameters.items():
        table = next((item for item in get_args(parameter.annotation)[1:] if isinstance(item, Options)), None)
        if table is None:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        else:
            tables[name] = table
            parameters += [option.parameter() for option in table]

    @functools.wraps(function)
    def wrapper(**values: Any) -> None:
        read = {name: table.read(values) for name, table in tables.items()}
        taken = {option.field for table in tables.values() for option in table}
        function(**{name: value for name, value in values.items() if name not in taken}, **read)

    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def parse_amount(option: str, text: str, word: str | None = None) -> int | float | str:
    """A count ("64"), a share ("0.1") or the `word`, if there is one."""
    if word is not None and text == word:
        return text
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if value > 0 and (kind is int or value <= 1):
                return value
    raise ValueError(
        f"{option} is {text!r}; give a whole number of at least 1, or a share greater than 0 and up to 1.0"
        + (f", or {word}." if word else ".")
    )
