"""Each package imports only what stands before it, and no module imports another in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "peft_star"
ORDER = [
    {"failures", "row_checks", "row_files", "report", "files", "cache", "text", "models"},
    {"sharing", "engine"},
    {"tuner", "evaluation", "loading"},
    {"method"},
    {"__init__", "registration", "lm_eval"},
    {"cli", "__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(ORDER) for name in names}
MODULES = {".".join(path.relative_to(SRC).with_suffix("").parts): path for path in sorted(SRC.rglob("*.py"))}


def imports(module: str) -> set[str]:
    """The package's modules that a module imports, also within functions and for type checkers."""
    package, found = module.split(".")[:-1], set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                names = (".".join([*base, alias.name]), ".".join(base), ".".join([*base, "__init__"]))
                found.add(next(name for name in names if name in MODULES))
    return found


def test_no_import_goes_up():
    for module in MODULES:
        for other in imports(module):
            assert FLOOR[other.split(".")[0]] <= FLOOR[module.split(".")[0]], f"{module} imports {other}"


def test_no_import_goes_in_a_circle():
    order = list(TopologicalSorter({module: imports(module) - {module} for module in MODULES}).static_order())
    assert len(order) == len(MODULES) > 50


def test_every_module_has_its_place():
    assert {module.split(".")[0] for module in MODULES} == set(FLOOR)
