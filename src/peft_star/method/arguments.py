"""The settings of one repair run; what a patch *is* (layers, neurons) lives in `StarConfig`."""

from __future__ import annotations

import math
import operator
from dataclasses import asdict, dataclass, field
from typing import Any

MODES = ("multiple", "single")
ALGORITHMS = ("protected", "prior-guided")
NORMS = ("std", "rms", "max", "l2")
OCCLUSIONS = ("first-order", "exact")
REACHES = ("problem", "prompt")
SERVED = ("base", "fp32", "bf16", "fp16", "q8_0")


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; choose one of {', '.join(map(repr, choices))}.")


def _finite(name: str, value: Any, **bounds: float) -> None:
    """Raise unless `value` is a finite number within `above`, `at_least`, `at_most`, `below`."""
    tests = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le, "below": operator.lt}
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` is {value!r}; give a number.")
    if not math.isfinite(value) or not all(tests[kind](value, bound) for kind, bound in bounds.items()):
        wanted = " and ".join(f"{kind.replace('_', ' ')} {bound:g}" for kind, bound in bounds.items())
        raise ValueError(f"`{name}` is {value!r}; give a finite number {wanted}.")


def _count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` is {value!r}; give a whole number of at least 1.")
    if value < 1:
        raise ValueError(f"`{name}` is {value}; give a whole number of at least 1.")


@dataclass
class RepairArguments:
    """How [`repair`] runs.

    Args:
        learning_rate (`float`): The factor of Algorithm 1 (paper section 3.3): each step moves a parameter by
            `learning_rate` times the prior's magnitude. With `"protected"`, the strength of a push is searched up to
            100 times this (and further where a ridge weakens it).
        damping, growth (`float`): With `"prior-guided"`, factors of an entry's step size when its gradient's sign
            turns, and when it stays; 1 and 1 are Algorithm 1 to the letter (see [`PriorGuidedSGD`]).
        algorithm (`str`): `"protected"` pushes each failure as strongly as it needs, found by forward passes, through
            neurons' combinations that tell it from background text; `"prior-guided"` is the paper's Algorithm 1 with
            its fixed steps.
        reach (`str`): How far a repair by `"protected"` reaches. `"problem"` also aims at other contexts in which the
            model would fail in this way: a row that names no `focus` is searched for one, what the neurons do at the
            rows' other tokens is protected, and once all is solved the pushes grow, by what several rows of a problem
            tell of each other, and as far as the model's words in the rows stay as they were. `"prompt"` repairs these
            rows and little else.
        generalization (`float`): With `"protected"`, how much the neurons' activations at a failure are averaged with
            those in the contexts before it in which the expected token is plausible. 0 repairs this failure and little
            else; with 5, say, related failures move further, and so does other text.
        background (`int`): Tokens of background text that `"protected"` protects; 0: none.
        max_steps (`int`): At most this many steps for one set of failures (paper section 4.4: 10).
        mode (`str`): `"multiple"` solves all failures together with one prior; `"single"` solves them one after the
            other, each with a prior of its own (paper section 4, RQ1).
        norm (`str`): The `norm` of equation 1, per vector: `"std"` (unit standard deviation), `"rms"` (the root mean
            square of the hidden state that the patched layer hands on: a step moves a representation by the same share
            in every layer and model), `"max"` (largest entry 1) or `"l2"` (unit length).
        ridge (`float`): Ridge of the least squares (equation 2), relative to the mean of the system's diagonal. The
            first steps of `"protected"` have a larger one, so that rows share a push as far as their neurons'
            activations agree.
        margin (`float`): A token counts as solved when its probability exceeds that of every other token by more than
            this; a little above 0 keeps it solved under the rounding of other batch shapes.
        occlusion (`str`): How a layer's importance is measured: `"first-order"` reads it off the trace,
            `"exact"` runs one forward pass per layer with that layer skipped (paper section 3.1).
        max_rounds (`int`): In `"single"` mode, how often failures that a later patch undid are taken up again.
        max_batch_tokens (`int`): Tokens (padding included) of one forward-backward.
        max_harm (`float`): The acceptance gate: the share of texts that the model says by itself, on prompts of prose,
            code and chat that come with the package, that may come out changed. A repair that changes more starts
            again without reaching beyond its rows, and then without the rows that cost most, which are reported. 1:
            as many as it takes. Without `background` nothing is measured.
        serve (`tuple[str, ...]`): The arithmetics of what will serve the model: `"bf16"`, `"fp16"`, `"fp32"`,
            `"q8_0"` (llama.cpp's 8-bit blocks), or `"base"`: the base's own data type (one of 16 bits is held against
            float32, since engines round in it each in its way) or, where `load_model` read it from a `.gguf` file,
            that of the file, with activations as llama.cpp rounds them. Failures get the margins that they need to
            hold in each, and the report says whether they do. An empty tuple: the model's own alone.
        verify_generation (`bool`, optional): Also generate greedily from all rows, before and after, and compare with
            the completions. From a row all of whose tokens are right teacher-forced its completion is generated, so
            without it the report says the same, but for the texts of wrong rows behind their first wrong token. False:
            nothing is generated, not even what the model goes on to say behind the completions.
        keep_earlier (`bool`): What earlier repairs of the patch have solved or retained must stay right: their rows,
            from the patch's ledger, are treated like retained ones.
        ledger_rows (`bool`): The ledger keeps the rows, so that a later repair can look at them and `check` run them
            again. Without, it keeps the neurons' activations at the failing tokens, which a later repair protects.
        note (`str`): What the ledger's entry says of the repair.
        allow_other_base (`bool`): Build upon a patch although it was solved for other base weights.
        disable_tqdm (`bool`): No progress bars.

    Raises:
        ValueError, TypeError: One sentence that names the argument and says what to give instead.
    """

    # of these fields, `peft-star repair` makes its options: the help is the option's
    learning_rate: float = field(
        default=1e-2,
        metadata={
            "help": (
                "Learning rate: each step moves a parameter by this times the prior's magnitude. With protected, the "
                "strength of a push is searched up to 100 times this."
            )
        },
    )
    damping: float = field(
        default=0.5,
        metadata={"help": "With prior-guided: factor of an entry's step size when its gradient's sign turns."},
    )
    growth: float = field(
        default=1.2,
        metadata={"help": "With prior-guided: factor of an entry's step size when its gradient's sign stays."},
    )
    algorithm: str = field(
        default="protected",
        metadata={
            "help": (
                "protected: push each failure as strongly as it needs and protect background text; prior-guided: the "
                "paper's Algorithm 1."
            )
        },
    )
    reach: str = field(
        default="problem",
        metadata={
            "help": (
                "problem: also aim at other contexts in which the model would fail in this way; prompt: repair these "
                "rows and little else."
            )
        },
    )
    generalization: float = field(
        default=0.0,
        metadata={
            "help": (
                "With protected: above 0 (5, say), prompts in which the expected tokens are plausible move further, "
                "and so does other text."
            )
        },
    )
    background: int = field(
        default=2048, metadata={"help": "With protected: tokens of background text that are protected; 0: none."}
    )
    max_steps: int = field(default=10, metadata={"help": "At most this many steps for one set of failures."})
    mode: str = field(
        default="multiple",
        metadata={"help": "multiple: one prior for all failures; single: one after the other, each with its own."},
    )
    norm: str = field(
        default="std", metadata={"help": "Norm of the semantic delta (equation 1): std, rms, max or l2."}
    )
    ridge: float = field(
        default=1e-4,
        metadata={"help": "Ridge of the least squares (equation 2), relative to the mean of the system's diagonal."},
    )
    margin: float = field(default=0.01, metadata={"help": "Lead in probability at which a token counts as solved."})
    occlusion: str = field(
        default="first-order",
        metadata={
            "help": (
                "How a layer's importance is measured: first-order reads it off the trace; exact runs one forward "
                "pass per layer."
            )
        },
    )
    max_rounds: int = field(
        default=3,
        metadata={"help": "With mode single: how often failures that a later patch undid are taken up again."},
    )
    max_batch_tokens: int = field(
        default=2048, metadata={"help": "Tokens (padding included) of one forward-backward."}
    )
    max_harm: float = field(
        default=0.5,
        metadata={
            "help": (
                "The share of the model's own texts that may come out changed; rows that would change more are left "
                "out. 1: as many as it takes."
            )
        },
    )
    serve: tuple[str, ...] = field(
        default=("base",),
        metadata={
            "help": (
                "The arithmetic that will serve the model, in which the repair is to hold, too: bf16, fp16, fp32, "
                "q8_0, or base (the base's own). Repeat it for several."
            )
        },
    )
    verify_generation: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Also generate greedily from all rows before and after, and compare with the completions, which right "
                "tokens tell, too; or generate nothing, not even what is said behind the completions."
            )
        },
    )
    keep_earlier: bool = field(
        default=True,
        metadata={"help": "Whether what earlier repairs of the patch solved must stay right, or may break."},
    )
    ledger_rows: bool = field(
        default=True,
        metadata={"help": "Whether the patch's ledger keeps the rows, or activations at the failing tokens alone."},
    )
    note: str = field(default="", metadata={"help": "What the ledger's entry says of the repair."})
    allow_other_base: bool = field(
        default=False, metadata={"help": "Build upon a patch although it was solved for other base weights."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bars."})

    def __post_init__(self) -> None:
        _finite("learning_rate", self.learning_rate, above=0)
        _finite("damping", self.damping, above=0, at_most=1)
        _finite("growth", self.growth, at_least=1)
        _finite("generalization", self.generalization, at_least=0)
        _finite("max_harm", self.max_harm, at_least=0, at_most=1)
        _finite("ridge", self.ridge, at_least=0)
        _finite("margin", self.margin, at_least=0, below=1)
        for name in ("max_steps", "max_rounds", "max_batch_tokens"):
            _count(name, getattr(self, name))
        if isinstance(self.background, bool) or not isinstance(self.background, int) or self.background < 0:
            raise ValueError(f"`background` is {self.background!r}; give a number of tokens, or 0 for no protection.")
        if not isinstance(self.note, str):
            raise TypeError(f"`note` is {self.note!r}; give text.")
        if not isinstance(self.serve, (str, list, tuple)):
            raise TypeError(f"`serve` is {self.serve!r}; give a tuple of {', '.join(map(repr, SERVED))}.")
        self.serve = (self.serve,) if isinstance(self.serve, str) else tuple(dict.fromkeys(self.serve))
        for name in self.serve:
            _choice("serve", name, SERVED)
        _choice("mode", self.mode, MODES)
        _choice("algorithm", self.algorithm, ALGORITHMS)
        _choice("reach", self.reach, REACHES)
        _choice("norm", self.norm, NORMS)
        _choice("occlusion", self.occlusion, OCCLUSIONS)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return {**asdict(self), "serve": list(self.serve)}
