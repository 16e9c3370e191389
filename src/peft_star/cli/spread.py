"""Options with several values, or with one that may be left out, which click has not."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

SEVERAL = ("--adapter", "--text", "--prompts")


class SpreadCommand(TyperCommand):
    """Lets `--json` name a file, and `--adapter`, `--text` and `--prompts` several things at once.

    MODEL and DATA are the only other words on the line, so words beyond those two belong to the option that they
    follow.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self.spread(list(args)))

    def spread(self, args: list[str]) -> list[str]:
        """The line as click can read it: `--adapter A B` as `--adapter A --adapter B`, `--json F` as `--output F`."""
        valued = {name for item in self.params if not getattr(item, "is_flag", False) for name in item.opts}
        words: list[tuple[int, str | None]] = []  # what is no option and not its value, and the option before it
        option, index = None, 0
        while index < len(args) and args[index] != "--":
            word = args[index]
            if word.startswith("-") and word != "-":
                option, attached, _ = word.partition("=")
                index += option in valued and not attached
            else:
                words.append((index, option))
                option = None if option == "--json" else option  # it takes one
            index += 1
        total = len(words) + len(args[index + 1 :])
        owned = [(index, option) for index, option in words if option in ("--json", *SEVERAL)]
        for index, option in reversed(owned[: max(0, total - 2)]):
            if option == "--json":
                args[index - 1 : index + 1] = ["--json"] if args[index] == "-" else ["--output", args[index]]
            else:
                args.insert(index, option)
        return args
