"""A patch that is repaired again and again: how each method goes on with what it has done, and what is kept of it.

    with series(make_method("star"), base, tokenizer) as patch:
        patch.add(first_rows)
        patch.add(next_rows)  # on top
        patch.save(folder)    # series(..., kept=folder) goes on from there

STAR builds upon its adapter and holds what its ledger names. SGD and adapters train on, with a new optimiser for each
batch of rows and no earlier row in it. Editors edit the edited weights, as in their papers' sequential settings: C is
that of the unedited model, and AlphaEdit has the keys of all earlier batches in its equation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from baselines import Descent
from editors import Editor, Focused
from interface import MAX_BATCH_TOKENS, Method, Problem, frozen, padded
from methods import Star
from peft_star.engine.engine import Engine
from peft_star.failures import encode_rows
from peft_star.loading import load_patch

TENSORS = "series.safetensors"
Row = dict[str, Any]


class Series(ABC):
    """One patch on a model.

    Attributes:
        model: What to run: the base itself, or the `PeftModel` around it.
    """

    model: nn.Module

    def __init__(self, method: Any, base: nn.Module, tokenizer, margin: float):
        self.method, self.base, self.tokenizer, self.margin = method, base, tokenizer, margin

    @abstractmethod
    def on(self, kept: Path | None):
        """A context manager that puts the patch on, empty or as it was kept, and takes it off on leaving."""

    @abstractmethod
    def add(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Repair these rows, too; returns what the method has to say of it, as JSON types."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Keep the patch in an empty folder."""


class StarSeries(Series):
    """One adapter, with its ledger."""

    @contextmanager
    def on(self, kept: Path | None) -> Iterator[None]:
        if kept is None:
            with self.method.install(self.base) as self.model:
                yield
            return
        self.model = load_patch(self.base, kept)
        try:
            yield
        finally:
            self.model.unload()

    def add(self, rows: Sequence[Row]) -> dict[str, Any]:
        report = self.method.repair(self.model, self.tokenizer, rows, margin=self.margin)
        said = [sentence for problem in report.problems for sentence in problem.warnings]
        return {
            "steps": report.steps,
            "phases": report.seconds,
            "left_out": sum("was left out" in sentence for sentence in said),
            "earlier_broken": report.earlier.get("broken", 0),
            "own_texts": dict(report.harm),
        }

    def save(self, folder: Path) -> None:
        # nothing resizes embeddings here, and to look whether something did PEFT asks the Hub
        self.model.save_pretrained(folder, save_embedding_layers=False)


class DescentSeries(Series):
    """Parameters that are trained on."""

    @contextmanager
    def on(self, kept: Path | None) -> Iterator[None]:
        with self.method.install(self.base) as self.patch:
            self.model = self.patch.model
            if kept is not None:
                _put_back(self.patch.parameters, load_file(kept / TENSORS))
            yield

    def add(self, rows: Sequence[Row]) -> dict[str, Any]:
        batches = padded(encode_rows(rows, self.tokenizer), self.base)
        everything = torch.ones(sum(map(len, batches)), dtype=torch.bool)
        return {"steps": self.method.solve(self.patch, batches, everything, self.margin)}

    def save(self, folder: Path) -> None:
        _keep(folder, _numbered(self.patch.parameters))


class EditorSeries(Series):
    """Matrices that are edited, and the keys of what they were edited for."""

    @contextmanager
    def on(self, kept: Path | None) -> Iterator[None]:
        self.model = self.base
        self.layers = self.method.chosen(self.base)
        self.earlier: dict[str, list[torch.Tensor]] = {}
        # of the unedited model; known from then on
        self.method.statistics(self.base, self.tokenizer, self.layers)
        originals = _numbered(self._matrices())
        try:
            if kept is not None:
                tensors = load_file(kept / TENSORS)
                _put_back(self._matrices(), tensors)
                self.earlier = {layer.name: [tensors[layer.name]] for layer in self.layers if layer.name in tensors}
            yield
        finally:
            _put_back(self._matrices(), originals)

    def add(self, rows: Sequence[Row]) -> dict[str, Any]:
        focused = [Focused.of(row, index, self.method.name) for index, row in enumerate(rows)]
        engine, encoded = Engine(self.base, MAX_BATCH_TOKENS), encode_rows(focused, self.tokenizer)
        problem = Problem(engine, self.tokenizer, focused, encoded, self.margin, "multiple")
        steps, losses = self.method.edit(problem, self.layers, self.earlier)
        return {"steps": steps, "losses": losses}

    def save(self, folder: Path) -> None:
        keys = {name: torch.cat(parts, 1).contiguous() for name, parts in self.earlier.items()}
        _keep(folder, {**_numbered(self._matrices()), **keys})

    def _matrices(self) -> list[torch.Tensor]:
        return [layer.matrix for layer in self.layers]


def _numbered(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies by number."""
    return {str(number): tensor.detach().cpu().clone().contiguous() for number, tensor in enumerate(tensors)}


def _keep(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / TENSORS)


@torch.no_grad()
def _put_back(tensors: Sequence[torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    for number, tensor in enumerate(tensors):
        tensor.copy_(values[str(number)])


KINDS: dict[type[Method], type[Series]] = {Star: StarSeries, Descent: DescentSeries, Editor: EditorSeries}


def kind_of(method: Method) -> type[Series]:
    """How a method goes on.

    Raises:
        ValueError: It cannot.
    """
    for known, kind in KINDS.items():
        if isinstance(method, known):
            return kind
    raise ValueError(f"{method.name} has no way to go on with a patch; choose STAR, SGD, an adapter or an editor.")


@contextmanager
def series(
    method: Method, base: nn.Module, tokenizer, *, margin: float = 0.01, kept: Path | None = None
) -> Iterator[Series]:
    """A patch to be repaired again and again; on leaving, `base` is bit-exactly as it was.

    Args:
        method: STAR, gradient descent or an editor.
        base: A plain transformers causal LM.
        tokenizer: Its tokenizer.
        margin: See [`Method.patched`].
        kept: A folder that `save` has filled; left out: a new patch.

    Raises:
        ValueError: There is no way to go on with this method's patches.
    """
    patch = kind_of(method)(method, base, tokenizer, margin)
    with frozen(base), patch.on(kept):
        yield patch
