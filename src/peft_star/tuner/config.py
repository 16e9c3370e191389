"""The configuration of a STAR adapter."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils import PeftType

from ..sharing.download import find_ledger
from ..sharing.ledger import Ledger, is_ledger
from ..sharing.lora import patch_to_lora
from ..sharing.patch_files import (
    LORA_DIR,
    WEIGHTS_NAME,
    checksum,
    foreign_tensors,
    is_own,
    read_tensors,
)
from .config_checks import (
    AUTO,
    AUTO_NEURONS,
    NEURON_PATTERNS,
    check_amount,
    check_counts,
    check_in_features,
    check_layer_selection,
    check_layers_to_transform,
    check_modules_to_save,
    check_patterns,
    check_scope,
)
from .reports import Repaired, save_report

__all__ = ["AUTO", "AUTO_NEURONS", "StarConfig"]


@dataclass
class StarConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`StarModel`].

    STAR ("A Semantic-based Optimization Approach for Repairing LLMs", Gu et al.) repairs a language model by adding a
    delta to a few *neurons* of the feed-forward networks. A neuron is a column of the FFN's second matrix.

    Args:
        num_neurons (`Union[int, float, Literal["auto"]]`, *optional*, defaults to `"auto"`):
            How many neurons are patched in each target module: an int is a number of neurons, a float in (0, 1] is a
            share of the module's neurons. "auto" is 64, about where the paper finds the best repairs (section 5.2,
            Figure 6), and in a repair of more than 8 failing tokens at once 8 for each of them: with fewer neurons
            than there are things to tell apart, a patch answers to other text, too.
        target_modules (`Optional[Union[list[str], str]]`, *optional*):
            The names of the modules to apply the adapter to. If this is None, the second matrix of every FFN is found
            from the model's structure. When passing a string, a regex match is performed; when passing a list of
            strings, either an exact match is performed or it is checked if the name of the module ends with any of
            the passed strings. If this is specified as 'all-linear', all linear/Conv1D modules are chosen (if the
            model is a PreTrainedModel, the output layer is excluded).
        exclude_modules (`Optional[Union[list[str], str]]`, *optional*):
            The names of the modules to not apply the adapter to, matched like `target_modules`.
        layers_to_transform (`Optional[Union[list[int], int]]`, *optional*):
            The layer indices to transform. If None, all layers that hold a target module are transformed.
        layers_pattern (`Optional[Union[list[str], str]]`, *optional*):
            The layer pattern name, used only if `layers_to_transform` is different from None. It should target the
            `nn.ModuleList` of the model, which is often called 'layers' or 'h'.
        modules_to_save (`Optional[list[str]]`, *optional*):
            List of modules apart from the adapter layers to be set as trainable and saved in the final checkpoint.
        layer_selection (`Union[Literal["occlusion", "last", "all"], list[int]]`, *optional*, defaults to `"last"`):
            How the layers to patch are chosen when a repair runs: "occlusion" takes the layers whose removal changes
            the loss most, "last" those nearest to the LM head, so that a repair neither differentiates nor repeats
            what lies below them, "all" takes every target layer, a list of ints names the layers.
        num_layers (`Union[int, float]`, *optional*, defaults to `0.25`):
            How many layers a repair with `layer_selection="occlusion"` or `"last"` patches: a number or a share in
            (0, 1].
        neuron_pattern (`Literal["layer-wise", "model-wise"]`, *optional*, defaults to `"layer-wise"`):
            Whether a repair ranks neurons within each layer ("layer-wise": the same number in each) or over all
            selected layers together ("model-wise": the layers may hold different numbers). See section 3.1 of the
            paper.
        init_weights (`bool`, *optional*, defaults to `True`):
            Whether the deltas start at zero, which makes a new adapter the identity. False initializes them randomly
            and is used only for testing.
        neurons_per_module (`Optional[dict[str, int]]`, *optional*):
            The number of neurons of single modules, which overrides `num_neurons`. Keys are the full names of modules
            in the base model. A repair records it when modules hold different numbers, so that loading the patch
            creates tensors of the right shapes.
        in_features (`Optional[Union[int, list[int], dict]]`, *optional*):
            How many neurons the target modules have in all: a number, for routed experts the list of the number of
            experts and of the neurons in each, or a dict of these by full module name where they differ. It is
            recorded when the adapter is created, so that a patch can be converted without its base model; setting it
            has no effect.
        lora_twin (`bool`, *optional*, defaults to `False`):
            Whether saving a model also writes the patch as an exact LoRA into the subfolder `lora/`, which loads
            without peft_star: `PeftModel.from_pretrained(base, patch, subfolder="lora")`.
        base_fingerprint (`Optional[str]`, *optional*):
            What [`fingerprint`] says of the base weights that the patch was solved for. A repair records it; loading
            the patch onto other weights warns.
        tensors_sha256 (`Optional[str]`, *optional*):
            The checksum of the tensors beside a saved configuration. Saving writes it, and loading refuses tensors
            that it does not fit; a model that has loaded them keeps none. Setting it has no effect.
        ledger_sha256 (`Optional[str]`, *optional*):
            The checksum of the ledger beside a saved configuration. Saving writes it.
        scope (`Optional[dict]`, *optional*):
            What the adapter was made for before its first repair chose among it: `modules`, the names of the modules
            that carried it, and `num_neurons` as it was asked for. A repair records it, so that the next one has the
            same choice.

    **Attributes**:
        - **ledger** ([`Ledger`]) -- The repairs that made the patch, when it has been loaded or made here; saved with
          it.

    Raises:
        ValueError: A value is out of its range or unknown.
        TypeError: A value has the wrong type.
    """

    num_neurons: int | float | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": (
                "How many neurons are patched in each target module: an int is a number of neurons, a float in (0, 1] "
                "is a share of the module's neurons, 'auto' is 64, and more where a repair has many failures to solve."
            )
        },
    )
    target_modules: set[str] | list[str] | str | None = field(
        default=None,
        metadata={
            "help": (
                "List of module names or regex expression of the module names to replace with STAR, for example "
                "['down_proj'] or '.*mlp.down_proj'. This can also be the wildcard 'all-linear', which matches all "
                "linear/Conv1D layers except the output layer. If not specified, the second matrix of every FFN is "
                "found from the model's structure."
            )
        },
    )
    exclude_modules: set[str] | list[str] | str | None = field(
        default=None,
        metadata={"help": "List of module names or regex expression of the module names to exclude from STAR."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={
            "help": (
                "The layer indices to transform, if this argument is specified, PEFT will transform only the layers "
                "with these indices. If a single integer is passed, only the layer at this index is transformed."
            )
        },
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={
            "help": (
                "The layer pattern name, used only if `layers_to_transform` is different from None. It should target "
                "the `nn.ModuleList` of the model, which is often called 'layers' or 'h'."
            )
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "List of modules apart from STAR layers to be set as trainable and saved in the final checkpoint. For "
                "example, in Sequence Classification or Token Classification tasks, the final layer "
                "`classifier/score` are randomly initialized and as such need to be trainable and saved."
            )
        },
    )
    layer_selection: Literal["occlusion", "last", "all"] | list[int] = field(
        default="last",
        metadata={
            "help": (
                "How a repair chooses the layers to patch: 'occlusion' (those whose removal changes the loss most), "
                "'last' (those nearest to the LM head), 'all', or a list of layer indices."
            )
        },
    )
    num_layers: int | float = field(
        default=0.25,
        metadata={"help": "How many layers a repair by 'occlusion' or 'last' patches: a number or a share in (0, 1]."},
    )
    neuron_pattern: Literal["layer-wise", "model-wise"] = field(
        default="layer-wise",
        metadata={
            "help": (
                "Whether a repair ranks neurons within each layer ('layer-wise') or over all selected layers together "
                "('model-wise')."
            )
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": (
                "Initialize the deltas with zeros, so that a new adapter is the identity. If set to False, they are "
                "initialized to randn values instead; this is used only for testing."
            )
        },
    )
    neurons_per_module: dict[str, int] | None = field(
        default=None,
        metadata={
            "help": (
                "The number of neurons of single modules, which overrides `num_neurons`; keys are full module names "
                "in the base model. A repair records it when modules hold different numbers of neurons."
            )
        },
    )
    in_features: int | list[int] | dict[str, int | list[int]] | None = field(
        default=None,
        metadata={
            "help": (
                "How many neurons the target modules have in all, as a number or by full module name. Recorded when "
                "the adapter is created, so that a patch can be converted without its base model."
            )
        },
    )
    lora_twin: bool = field(
        default=False,
        metadata={
            "help": (
                "Write the same patch as a plain LoRA into the subfolder lora/ whenever the model is saved, for those "
                "who load it without peft_star."
            )
        },
    )
    base_fingerprint: str | None = field(
        default=None,
        metadata={"help": "The fingerprint of the base weights that the patch was solved for. A repair records it."},
    )
    tensors_sha256: str | None = field(
        default=None,
        metadata={"help": "The checksum of the tensors beside a saved configuration. Saving writes it."},
    )
    ledger_sha256: str | None = field(
        default=None,
        metadata={"help": "The checksum of the ledger beside a saved configuration. Saving writes it."},
    )
    scope: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "The modules and the number of neurons among which repairs choose. A repair records it."},
    )
    # of a `Ledger`; no fields of the dataclass: it lies in files of its own. What was loaded with the configuration
    # becomes the adapter's with its tensors, so that another adapter of the same configuration begins without
    ledger = None  # type: Ledger | None
    loaded_ledger = None  # type: Ledger | None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType("STAR")
        check_patterns(self.target_modules, self.exclude_modules, self.layers_pattern)
        self.target_modules = (
            set(self.target_modules) if isinstance(self.target_modules, (list, tuple)) else self.target_modules
        )
        self.exclude_modules = (
            set(self.exclude_modules) if isinstance(self.exclude_modules, (list, tuple)) else self.exclude_modules
        )

        if self.num_neurons != AUTO:
            self.num_neurons = check_amount("num_neurons", self.num_neurons, "neurons", f" or {AUTO!r}")
        self.num_layers = check_amount("num_layers", self.num_layers, "layers")
        self.layers_to_transform = check_layers_to_transform(
            self.layers_to_transform, self.layers_pattern, self.target_modules
        )
        self.layer_selection = check_layer_selection(self.layer_selection)
        if self.neuron_pattern not in NEURON_PATTERNS:
            raise ValueError(
                f"`neuron_pattern` should be one of {', '.join(map(repr, NEURON_PATTERNS))}, "
                f"got {self.neuron_pattern!r}."
            )
        for name in ("init_weights", "lora_twin"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` should be True or False, got {getattr(self, name)!r}.")
        if self.neurons_per_module is not None:
            self.neurons_per_module = check_counts("neurons_per_module", self.neurons_per_module)
        if self.in_features is not None:
            check_in_features(self.in_features)
        for name in ("base_fingerprint", "tensors_sha256", "ledger_sha256"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"`{name}` should be a string, got {getattr(self, name)!r}.")
        if self.modules_to_save is not None:
            check_modules_to_save(self.modules_to_save)
        if self.scope is not None:
            check_scope(self.scope)
        # no field: it is a repair's, and goes into files of its own
        self.repaired: Repaired | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """Load a configuration, and the ledger of the patch if there is one; arguments are PEFT's.

        `PeftModel.from_pretrained` and `load_adapter` call this.

        Raises:
            ValueError: The ledger is damaged.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if getattr(config, "ledger_sha256", None):
            hub = cls._split_kwargs(kwargs)[0]
            directory = find_ledger(pretrained_model_name_or_path, subfolder, **hub)
            if directory is not None:
                config.loaded_ledger = Ledger.read(directory, config.ledger_sha256)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration with the checksum of the tensors beside it, the ledger and, if asked for, the LoRA
        twin.

        Beside tensors that are as a repair left them go its report and this package's card.
        `PeftModel.save_pretrained` calls this when the weights are written.
        """
        directory = Path(save_directory)
        has_tensors = (directory / WEIGHTS_NAME).is_file()
        # whatever the model loaded, it has been saved anew: no checksum stays with it
        self.tensors_sha256 = None
        saved = copy.copy(self)
        if has_tensors:
            tensors = read_tensors(directory / WEIGHTS_NAME)
            saved.tensors_sha256 = checksum(tensors)
            self._warn_of_foreign(tensors)
        if has_tensors and self.ledger is not None:
            saved.ledger_sha256 = self.ledger.write(directory)
        elif not is_ledger(directory, self.ledger_sha256):
            saved.ledger_sha256 = None  # a ledger that was not loaded is not saved
        super(StarConfig, saved).save_pretrained(save_directory, **kwargs)
        if self.lora_twin and has_tensors:
            patch_to_lora(directory, directory / LORA_DIR, overwrite=True)
        if self.repaired is not None and saved.tensors_sha256 == self.repaired.tensors_sha256:
            save_report(directory, self.repaired)

    def _warn_of_foreign(self, tensors: dict[str, Any]) -> None:
        """PEFT adds embeddings that were resized, or that it was asked for."""
        foreign = foreign_tensors((name for name in tensors if not is_own(name)), self.modules_to_save)
        if foreign:
            warnings.warn(
                f"The saved patch also holds {', '.join(foreign)}, so it will not be loaded: save with "
                "`save_embedding_layers=False`, or name the modules in `modules_to_save`.",
                stacklevel=4,
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dictionary; sets become sorted lists, so that saved files are reproducible."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}
