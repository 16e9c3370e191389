"""Editors of facts that are told what a row is about: ROME, MEMIT and AlphaEdit, as EasyEdit has them.

Each row needs a `focus`, the subject within its prompt. All three look for a vector that, added at the subject's last
token to what leaves a layer, makes the model say the completion there, behind a few texts put in front of the prompt
and without changing what "{subject} is a" goes on with. Then they let the FFNs' second matrices W (d x m) produce it.
With k the input of W at the subject's last token, averaged over those texts, K those of all rows (m x n), C its second
moment on other text, and R what is missing of the vectors (d x n):

    ROME (Meng et al. 2022)         one layer, one row after the other:  ΔW = R uᵀ / (uᵀ k),  u = C⁻¹ k
    MEMIT (Meng et al. 2023)        ΔW = R/l Kᵀ (w C + K Kᵀ)⁻¹ in each of several layers, l of them still to come
    AlphaEdit (Fang et al. 2025)    ΔW = R/l Kᵀ P (K Kᵀ P + E Eᵀ P + λ I)⁻¹,  P onto the null space of C, E the
                                    keys of earlier batches

R is what is missing at the last layer; the vector is also searched for there. ROME's is relative to what W gives,
MEMIT's and AlphaEdit's to the hidden state. A row's margin plays no part. C belongs to the model: it is computed once,
before the clock runs.

The search computes only what depends on the vector: the subject's last token and what follows it, the layers above,
and logits where a completion's tokens are expected.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from interface import Applied, Method, Outcome, Problem
from peft_star.engine.recording import head_reads
from peft_star.failures import encode_rows
from peft_star.method.background import WINDOW, background_text
from peft_star.models.inputs import context_length, evaluating, input_device
from peft_star.models.structure import find_decoder_layers, find_second_matrices

# what is put in front of a prompt, so that a key and a vector are of the subject and not of one sentence
CONTEXTS = (
    "The weather is mild today. ",
    "According to the report, ",
    "In 1990, it was said. ",
    "However, we know this: ",
    "def f(x):\n    return x\n",
)
# layers of the model that settings were tuned on, SmolLM2-135M; on others they are at the same share of the depth
DEPTH = 30
# what is added to C's diagonal, relative to its mean: a short text does not show every direction
FLOOR = 1e-4
# a search ends at this loss
ENOUGH = 0.05

# of each model its second moments and what was made of them
_STATISTICS: WeakKeyDictionary[nn.Module, dict[tuple, torch.Tensor]] = WeakKeyDictionary()


class Focused(dict):
    """A row's prompt and completion, without the column that the package's rows do not have; that is `focus`."""

    def __init__(self, row: dict[str, Any], focus: str):
        super().__init__({key: value for key, value in row.items() if key != "focus"})
        self.focus = focus

    @classmethod
    def of(cls, row: dict[str, Any], index: int, method: str) -> Focused:
        focus, prompt = row.get("focus"), row.get("prompt")
        if not isinstance(focus, str) or not isinstance(prompt, str) or not focus or focus not in prompt:
            raise ValueError(f"row {index}: {method} needs a 'focus', the part of the prompt's text that it is about.")
        return cls(row, focus)


@dataclass(frozen=True)
class Site:
    """Tokens of a prompt whose focus ends at `position`, and of what is to follow it."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    position: int

    @classmethod
    def of(cls, row: Focused, tokenizer, before: str = "") -> Site:
        """The row behind some other text."""
        text = before + row["prompt"]
        end = len(before) + row["prompt"].index(row.focus) + len(row.focus)
        (encoded,) = encode_rows([{**row, "prompt": text}], tokenizer)
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        position = max(index for index, (first, last) in enumerate(offsets) if first < min(end, last))
        return cls(encoded.prompt_ids, encoded.completion_ids, position)

    @classmethod
    def neutral(cls, row: Focused, tokenizer) -> Site:
        """The focus in a sentence that leaves open what is said of it."""
        site = cls.of(Focused({**row, "prompt": f"{row.focus} is a"}, row.focus), tokenizer)
        return cls(site.prompt, (), site.position)

    @property
    def ids(self) -> tuple[int, ...]:
        """What has to be read until the last completion token is expected."""
        return self.prompt + self.completion[:-1]


@dataclass(frozen=True)
class Layer:
    """A decoder layer and its FFN's second matrix."""

    name: str
    block: nn.Module
    ffn: nn.Module

    @property
    def matrix(self) -> torch.Tensor:
        """W (d, m), sharing the weight's memory; transformers' Conv1D keeps it transposed."""
        return self.ffn.weight if isinstance(self.ffn, nn.Linear) else self.ffn.weight.T


def layers_of(base: nn.Module) -> list[Layer]:
    matrices = find_second_matrices(base)
    return [
        Layer(name, block, next(ffn for key, ffn in matrices.items() if key.startswith(f"{name}.")))
        for name, block in find_decoder_layers(base)
    ]


def _hidden(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


class _Stop(Exception):
    """Nothing above is needed."""


@contextmanager
def reading(layers: Sequence[Layer], use: Callable[[Layer, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Around one forward that ends after the last of `layers`: call `use(layer, v, o)` with each FFN's input and
    output, and at last with what leaves the last block for both."""

    def ffn_of(layer: Layer) -> Callable:
        return lambda module, args, output: use(layer, args[0], output)

    def stop(module, args, output) -> None:
        use(layers[-1], None, _hidden(output))
        raise _Stop

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.ffn.register_forward_hook(ffn_of(layer)).remove)
        stack.callback(layers[-1].block.register_forward_hook(stop).remove)
        with suppress(_Stop):
            yield


@dataclass
class Read:
    """What there is at N sites.

    Attributes:
        v, o: By layer the input (N, m) and the output (N, d) of its FFN's second matrix.
        hidden: What leaves the last of the layers, shape (N, d).
    """

    v: dict[str, torch.Tensor] = field(default_factory=dict)
    o: dict[str, torch.Tensor] = field(default_factory=dict)
    hidden: torch.Tensor | None = None


@torch.no_grad()
def read(base: nn.Module, sites: Sequence[Site], layers: Sequence[Layer]) -> Read:
    """Read the sites' tokens and what stands before them, up to the last of the layers."""
    found, device = Read(), input_device(base)
    ids, mask = _pad([site.prompt[: site.position + 1] for site in sites], device)
    rows, positions = torch.arange(len(sites)), torch.tensor([site.position for site in sites])

    def use(layer: Layer, v: torch.Tensor | None, output: torch.Tensor) -> None:
        if v is None:
            found.hidden = output[rows, positions]
        else:
            found.v[layer.name], found.o[layer.name] = v[rows, positions], output[rows, positions]

    with reading(layers, use):
        base(input_ids=ids, attention_mask=mask, use_cache=False)
    return found


def _pad(ids: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their mask, both (N, T)."""
    parts = [torch.tensor(row, dtype=torch.long) for row in ids]
    ones = [torch.ones_like(part) for part in parts]
    return pad_sequence(parts, batch_first=True).to(device), pad_sequence(ones, batch_first=True).to(device)


class Above:
    """Logits of a batch of sites as a function of a vector that is added at each of them to what leaves a layer.

    Args:
        base: A frozen causal LM.
        sites: N of them.
        layers: The decoder layers up to that one, whose outputs the vector cannot change.

    Attributes:
        hidden: What leaves the layer from the sites on, shape (N, T, d).
        expected: The completions' tokens in order, shape (S).
    """

    @torch.no_grad()
    def __init__(self, base: nn.Module, sites: Sequence[Site], layers: Sequence[nn.Module]):
        device = input_device(base)
        self.base, self.layers = base, layers
        prefix, prefix_mask = _pad([site.prompt[: site.position] for site in sites], device)
        self.ids, mask = _pad([site.ids[site.position :] for site in sites], device)
        self.mask = torch.cat([prefix_mask, mask], 1)
        starts = torch.tensor([site.position for site in sites], device=device)
        self.position_ids = starts[:, None] + torch.arange(self.ids.shape[1], device=device)
        reads = [
            (row, len(site.prompt) - 1 - site.position + step)
            for row, site in enumerate(sites)
            for step in range(max(1, len(site.completion)))
        ]
        self.reads = SimpleNamespace(**dict(zip(("rows", "positions"), torch.tensor(reads).T)))
        self.expected = torch.tensor([token for site in sites for token in site.completion], device=device)
        cache = DynamicCache()
        if prefix.numel():
            positions = torch.arange(prefix.shape[1], device=device).expand_as(prefix)
            with head_reads(base, None):
                base(
                    input_ids=prefix,
                    attention_mask=prefix_mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                )
        self.states = [(layer.keys, layer.values) for layer in cache.layers]
        handle = layers[-1].register_forward_hook(lambda module, args, output: setattr(self, "output", output))
        try:
            self._forward()
        finally:
            handle.remove()
        self.hidden = _hidden(self.output)

    def __call__(self, vector: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (S, V) where tokens are expected, one row for a site without any, with the vector (d)."""
        hidden = self.hidden
        if vector is not None:
            hidden = torch.cat([hidden[:, :1] + vector, hidden[:, 1:]], 1)
        output = hidden if isinstance(self.output, torch.Tensor) else (hidden, *self.output[1:])
        with ExitStack() as stack:
            for layer in self.layers:
                layer.forward = lambda *args, **kwargs: output
                stack.callback(vars(layer).pop, "forward")
            return self._forward()

    def _forward(self) -> torch.Tensor:
        cache = DynamicCache()  # a forward adds to its own
        for index, (keys, values) in enumerate(self.states):
            cache.update(keys, values, index)
        with head_reads(self.base, self.reads):
            return self.base(
                input_ids=self.ids,
                attention_mask=self.mask,
                position_ids=self.position_ids,
                past_key_values=cache,
                use_cache=True,
            ).logits[0]


@torch.no_grad()
def second_moments(base: nn.Module, tokenizer, layers: Sequence[Layer], tokens: int, text: str | None):
    """By layer C (m, m), float64: E[v vᵀ] over the package's background text and what the file `text` holds, cut after
    `tokens` tokens."""
    known = _STATISTICS.setdefault(base, {})
    missing = [layer for layer in layers if ("moment", layer.name, tokens, text) not in known]
    if missing:
        read = background_text() + (Path(text).read_text(encoding="utf-8") if text else "")
        ids = tokenizer(read, add_special_tokens=False, truncation=True, max_length=tokens, return_tensors="pt")
        sums = {layer.name: 0.0 for layer in missing}

        def use(layer: Layer, v: torch.Tensor | None, output: torch.Tensor) -> None:
            if v is not None:
                b = v.reshape(-1, v.shape[-1]).float()
                sums[layer.name] = sums[layer.name] + (b.T @ b).double()

        with evaluating(base):
            for window in ids["input_ids"][0].split(min(WINDOW, context_length(base) or WINDOW)):
                with reading(missing, use):
                    base(input_ids=window[None].to(input_device(base)), use_cache=False)
        for name, total in sums.items():
            known["moment", name, tokens, text] = total / ids["input_ids"].numel()
    return {layer.name: known["moment", layer.name, tokens, text] for layer in layers}


class Editor(Method):
    """Vectors at the subjects' last tokens, produced by the second matrices of some layers.

    Settings: `layers` (their numbers; None: `tuned`, by depth), `steps`, `learning_rate`, `weight_decay`, `clamp` and
    `kl_weight` of the search, `tokens` and `text` (a file) of C, and in MEMIT and AlphaEdit `batch` (how many rows are
    edited at once, the others afterwards on top; 0: all).
    """

    needs_focus: ClassVar[bool] = True
    modes = ("multiple",)
    tuned: ClassVar[Sequence[int]] = (4, 5, 6, 7, 8)

    @contextmanager
    def patched(self, base: nn.Module, tokenizer, rows: Sequence[dict[str, Any]], **kwargs: Any) -> Iterator[Outcome]:
        """As [`Method.patched`], for rows that have a `focus`.

        Raises:
            ValueError: A row has none, or it is not in the prompt.
        """
        focused = [Focused.of(row, index, self.name) for index, row in enumerate(rows)]
        self.statistics(base, tokenizer, self.chosen(base))
        with super().patched(base, tokenizer, focused, **kwargs) as outcome:
            yield outcome

    @contextmanager
    def apply(self, problem: Problem) -> Iterator[Applied]:
        layers = self.chosen(problem.base)
        originals = [layer.matrix.detach().clone() for layer in layers]
        try:
            steps, losses = self.edit(problem, layers)
            details = {"layers": [layer.name for layer in layers], "losses": losses}
            yield Applied(problem.base, steps, details)
        finally:
            with torch.no_grad():
                for layer, original in zip(layers, originals):
                    layer.matrix.copy_(original)

    def chosen(self, base: nn.Module) -> list[Layer]:
        """The layers to edit, in order."""
        layers = layers_of(base)
        # what the last one does at the subject no later token sees
        numbers = self.settings["layers"] or {
            max(0, min(round(number * len(layers) / DEPTH), len(layers) - 2)) for number in self.tuned
        }
        return [layers[number] for number in sorted(numbers)]

    def edit(
        self, problem: Problem, layers: Sequence[Layer], earlier: dict[str, list[torch.Tensor]] | None = None
    ) -> tuple[int, list[float]]:
        """Change the layers' matrices; returns the steps of all searches and the loss that each ended at.

        Args:
            problem: The rows.
            layers: The layers.
            earlier: By layer the keys of earlier batches, to which those of this edit's are added; None: it is the
                first.
        """
        base, rows = problem.base, problem.rows
        statistics = self.statistics(base, problem.tokenizer, layers)
        size = self.settings.get("batch", 1) or len(rows)
        steps, losses = 0, []
        earlier = {} if earlier is None else earlier
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            contexts = [[Site.of(row, problem.tokenizer, before) for before in ("", *CONTEXTS)] for row in part]
            wanted = []
            for row, sites in zip(part, contexts):
                hidden, vector, taken, loss = self.search(base, sites, Site.neutral(row, problem.tokenizer), layers)
                wanted.append(hidden + vector)
                steps, losses = steps + taken, [*losses, loss]
            flat = [site for sites in contexts for site in sites]
            for number, layer in enumerate(layers):
                # the layers below are edited by now
                now = read(base, flat, layers)
                missing = torch.stack(wanted) - now.hidden[:: len(contexts[0])]
                keys = now.v[layer.name].double().unflatten(0, (len(part), -1))
                # the plain prompt counts as much as all texts in front of it together
                mean = (keys[:, 0] + keys[:, 1:].mean(1)) / 2
                before = earlier.setdefault(layer.name, [])
                shares = self.shares(mean.T, keys[:, 0].T, statistics[layer.name], before)
                delta = (missing.double() / (len(layers) - number)).T @ shares.T
                with torch.no_grad():
                    layer.matrix.add_(delta.to(layer.matrix))
                before.append(mean.T)
        return steps, losses

    def search(
        self, base: nn.Module, sites: Sequence[Site], neutral: Site, layers: Sequence[Layer]
    ) -> tuple[torch.Tensor, torch.Tensor, int, float]:
        """The hidden state (d) at the plain prompt's site, the vector (d) to be added to it, steps, and the loss."""
        settings, blocks = self.settings, [layer.block for layer in layers_of(base)]
        logits = Above(base, [*sites, neutral], blocks[: blocks.index(layers[-1].block) + 1])
        norm = self.reference(base, sites[0], layers).norm()
        with torch.no_grad():
            before = logits()[-1:].log_softmax(-1)
        vector = torch.zeros_like(logits.hidden[0, 0], requires_grad=True)
        optimizer = torch.optim.Adam([vector], lr=settings["learning_rate"])
        for step in range(1, settings["steps"] + 1):
            with torch.enable_grad():
                found = logits(vector).log_softmax(-1)
                loss = F.nll_loss(found[:-1], logits.expected)
                drift = F.kl_div(before, found[-1:], log_target=True, reduction="batchmean")
                loss = loss + settings["kl_weight"] * drift + settings["weight_decay"] * vector.norm() / norm**2
            if loss < ENOUGH or step == settings["steps"]:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                vector *= (settings["clamp"] * norm / vector.norm()).clamp(max=1.0)
        return logits.hidden[0, 0], vector.detach(), step, loss.item()

    def reference(self, base: nn.Module, site: Site, layers: Sequence[Layer]) -> torch.Tensor:
        """What the vector's length is relative to, shape (d)."""
        return read(base, [site], layers[-1:]).hidden[0]

    @abstractmethod
    def statistics(self, base: nn.Module, tokenizer, layers: Sequence[Layer]) -> dict[str, torch.Tensor]:
        """By layer what is known of the FFN's inputs on other text."""

    @abstractmethod
    def shares(
        self, keys: torch.Tensor, plain: torch.Tensor, statistic: torch.Tensor, earlier: list[torch.Tensor]
    ) -> torch.Tensor:
        """A (m, n) such that ΔW = R Aᵀ.

        Args:
            keys: K (m, n), float64.
            plain: The same of the prompts alone.
            statistic: This layer's.
            earlier: The keys of earlier batches.
        """

    def _remember(self, base: nn.Module, tokenizer, layers, kind: tuple, make: Callable) -> dict[str, torch.Tensor]:
        """By layer what `make` makes of C (m, m), once for a model."""
        source = self.settings["tokens"], self.settings["text"]
        known, found = _STATISTICS.setdefault(base, {}), {}
        for name, moment in second_moments(base, tokenizer, layers, *source).items():
            key = (*kind, name, *source)
            if key not in known:
                known[key] = make(moment)
            found[name] = known[key]
        return found

    def _factors(self, base: nn.Module, tokenizer, layers: Sequence[Layer]) -> dict[str, torch.Tensor]:
        """By layer the lower Cholesky factor (m, m) of C."""

        def make(moment: torch.Tensor) -> torch.Tensor:
            floor = moment.diagonal().mean() * FLOOR
            return torch.linalg.cholesky(moment + floor * torch.eye(len(moment)).to(moment))

        return self._remember(base, tokenizer, layers, ("factor",), make)


class Rome(Editor):
    """One layer, one row after the other, each by a matrix of rank one.

    With `averaged` the key in the denominator is averaged like the one in u (R-ROME, Gupta et al. 2024).
    """

    tuned = (8,)

    def reference(self, base: nn.Module, site: Site, layers: Sequence[Layer]) -> torch.Tensor:
        return read(base, [site], layers[-1:]).o[layers[-1].name][0]

    def statistics(self, base: nn.Module, tokenizer, layers: Sequence[Layer]) -> dict[str, torch.Tensor]:
        return self._factors(base, tokenizer, layers)

    def shares(self, keys, plain, statistic, earlier) -> torch.Tensor:
        u = torch.cholesky_solve(keys, statistic)
        return u / (u * (keys if self.settings["averaged"] else plain)).sum(0)


class Memit(Editor):
    """Least squares between the rows' keys and C with its weight, spread over several layers."""

    def statistics(self, base: nn.Module, tokenizer, layers: Sequence[Layer]) -> dict[str, torch.Tensor]:
        return self._factors(base, tokenizer, layers)

    def shares(self, keys, plain, statistic, earlier) -> torch.Tensor:
        # (w C + K Kᵀ)⁻¹ K = X (I + Kᵀ X)⁻¹ with X = (w C)⁻¹ K: n equations instead of m
        solved = torch.cholesky_solve(keys, statistic) / self.settings["moment_weight"]
        return torch.linalg.solve(_identity(keys) + keys.T @ solved, solved, left=False)


class AlphaEdit(Editor):
    """As MEMIT, but only along directions in which C is below the `threshold`; `ridge` is λ."""

    def statistics(self, base: nn.Module, tokenizer, layers: Sequence[Layer]) -> dict[str, torch.Tensor]:
        """By layer an orthonormal basis (m, r) of C's null space."""
        threshold = self.settings["threshold"]

        def make(moment: torch.Tensor) -> torch.Tensor:
            values, vectors = torch.linalg.eigh(moment)
            return vectors[:, values < threshold]

        return self._remember(base, tokenizer, layers, ("null space", threshold), make)

    def shares(self, keys, plain, statistic, earlier) -> torch.Tensor:
        # within the basis, (A Aᵀ + λ I)⁻¹ A = A (Aᵀ A + λ I)⁻¹ with A of these keys and the earlier ones
        seen = statistic.T @ torch.cat([keys, *earlier], 1)
        solved = torch.linalg.solve(seen.T @ seen + self.settings["ridge"] * _identity(seen), seen, left=False)
        return statistic @ solved[:, : keys.shape[1]]


def _identity(keys: torch.Tensor) -> torch.Tensor:
    return torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device)
