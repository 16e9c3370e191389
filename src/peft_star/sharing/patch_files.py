"""A patch as files: what they are called, and the one place where they are read, checked and written."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ..files import check_output, read_json, write_json
from ..models.names import PEFT_PREFIX, plain_name

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
ANY_WEIGHTS = "adapter_model.*"  # also in what form other versions of PEFT save them
REPORT_NAME = "repair_report.json"
LEDGER_NAME, LEDGER_WEIGHTS = "repair_ledger.json", "repair_ledger.safetensors"
TIMES_NAME = "repair_report.times.json"
CARD_NAME, PLOT_NAME = "README.md", "report.png"
# where in a patch's directory the same patch lies as a LoRA
LORA_DIR = "lora"

INDEX_DTYPE = torch.int32
NEURONS, DELTA = "star_neurons", "star_delta"
BASE_PARTS = {"original_module", "base_layer"}
CHECKSUM = "tensors_sha256"  # where the configuration keeps what `checksum` says
LEDGER_CHECKSUM = "ledger_sha256"  # ... and what the ledger's says
# of a configuration, what is read without PEFT, which would look at its type
_TEXTS = ("base_model_name_or_path", "revision", "task_type", "base_fingerprint", CHECKSUM, LEDGER_CHECKSUM)
# of deltas: what the arithmetic of patches knows
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Patch:
    """A patch by the plain names of its modules, in order of depth.

    Attributes:
        config: What its `adapter_config.json` says.
        neurons: From module names to integer indices (k,) of neurons; k may differ between modules.
        deltas: From module names to deltas (k, d_out), in the order of the neurons.
        others: Names of other tensors in the file, which belong to `modules_to_save`.
    """

    config: dict[str, Any]
    neurons: dict[str, torch.Tensor]
    deltas: dict[str, torch.Tensor]
    others: tuple[str, ...] = ()

    @classmethod
    def read(cls, directory: Path) -> Patch:
        """Read a patch from a directory, and check what can be checked without its base model.

        Raises:
            ValueError: The directory holds no STAR patch, a damaged one, or one with tensors that its configuration
                does not name.
        """
        config, path = read_patch_config(directory), directory / WEIGHTS_NAME
        tensors = read_tensors(path)
        patch = cls(config, *_sort_tensors(tensors, path))
        check_names(patch.others, config.get("modules_to_save"), str(path))
        check_checksum(tensors, config.get(CHECKSUM), str(path))
        return patch

    def check(self, shapes: Mapping[str, tuple[int, int]], where: str = "") -> Patch:
        """Hold the patch against the modules that it is for.

        Args:
            shapes: The number of neurons and of outputs of each module.
            where: What stands before a module's name in messages.

        Returns:
            The patch with neurons in the data type that layers keep them in.

        Raises:
            ValueError, TypeError: Neurons or a delta do not fit; the message names the module.
        """
        neurons = {}
        for name, indices in self.neurons.items():
            in_features, out_features = shapes[name]
            neurons[name] = check_neurons(indices, in_features, f"{where}{name}")
            check_delta(self.deltas[name], neurons[name].numel(), out_features, f"{where}{name}")
        return replace(self, neurons=neurons)

    def summary(self) -> list[dict[str, Any]]:
        """Each module's name, neurons, number of outputs, and its delta's Frobenius norm and largest entry."""
        return [
            {
                "name": name,
                "neurons": self.neurons[name].tolist(),
                "outputs": delta.shape[1],
                "norm": float(delta.float().norm()),
                "max": float(delta.float().abs().max()) if delta.numel() else 0.0,
            }
            for name, delta in self.deltas.items()
        ]


def read_patch_config(directory: Path) -> dict[str, Any]:
    """A patch's `adapter_config.json`, checked to be that of a STAR patch.

    Raises:
        ValueError: It is missing, damaged, or that of another method.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        is_model = (directory / "config.json").is_file()
        raise ValueError(f"{directory} holds {'a model' if is_model else 'no patch'}: it has no {CONFIG_NAME}.")
    try:
        config = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    peft_type = config.get("peft_type") if isinstance(config, dict) else None
    if peft_type != "STAR":
        raise ValueError(f"{directory} holds an adapter of type {peft_type}, not a STAR patch.")
    wrong = next((key for key in _TEXTS if not isinstance(config.get(key), str | None)), None)
    if wrong:
        raise ValueError(f"{path} is damaged: its `{wrong}` is {type(config[wrong]).__name__}, and no text.")
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(map(is_module_name, saved))):
        raise ValueError(f"{path} is damaged: its `modules_to_save` is no list of names of modules.")
    return config


def read_patch_modules(directory: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What a patch holds: one entry for each patched module, and the names of other tensors (`modules_to_save`).

    Raises:
        ValueError: As of [`Patch.read`].
    """
    patch = Patch.read(directory)
    return patch.summary(), list(patch.others)


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 of a patch's tensors, whatever their order and devices: their names, data types, shapes and bytes.

    Args:
        tensors: By names as in the file; what wrappers and PEFT put before a module's name does not count.
    """
    digest = hashlib.sha256()
    plain = [(plain_name(name), tensor) for name, tensor in tensors.items()]
    for name, tensor in sorted(plain, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_names(others: Iterable[str], modules_to_save: Iterable[str] | None, what: str) -> None:
    """Refuse tensors other than neurons and deltas, unless `modules_to_save` names them: a patch could replace any
    weight of its base.

    Args:
        others: The names of tensors that are neither neurons nor deltas.
        modules_to_save: As the patch's configuration says.
        what: What is refused, for the message.

    Raises:
        ValueError: One sentence.
    """
    foreign = foreign_tensors(others, modules_to_save)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ValueError(
            f"{what} holds {foreign[0]}{more}, which its configuration does not name; a patch may hold nothing but "
            "the neurons and deltas of its modules, and its `modules_to_save`."
        )


def check_checksum(tensors: Mapping[str, torch.Tensor], expected: str | None, what: str) -> None:
    """Refuse tensors, by names as in the file, that are not those that were saved; earlier patches know no checksum.

    Raises:
        ValueError: One sentence.
    """
    if expected is not None and expected != checksum(tensors):
        raise ValueError(f"{what} is damaged: its tensors are not those that were saved (their checksum differs).")


def foreign_tensors(names: Iterable[str], modules_to_save: Iterable[str] | None) -> list[str]:
    """Those of the tensors that lie in no module that PEFT takes for one of `modules_to_save`: by the end of its
    name."""
    saved = tuple(modules_to_save or ())
    return [name for name in names if not saved or not _lies_in(name, saved)]


def _lies_in(name: str, saved: tuple[str, ...]) -> bool:
    # beside a module that is saved PEFT keeps the base model's, by a name of its own
    of_base = not BASE_PARTS.isdisjoint(plain_name(name).split("."))
    return not of_base and any(owner.endswith(saved) for owner in _owners(name))


def is_module_name(name: Any) -> bool:
    """Whether a value of a configuration can be the name of a module, or the end of one."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) is not None


def is_own(name: str) -> bool:
    """Whether a tensor is a patch's own by its name: neurons or a delta."""
    return name.rpartition(".")[2] in (NEURONS, DELTA)


def _owners(name: str) -> list[str]:
    """The plain names of the modules that a tensor lies in."""
    parts = plain_name(name).split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def is_patch(directory: Path) -> bool:
    """Whether a directory holds a STAR patch, by its configuration."""
    try:
        read_patch_config(directory)
    except ValueError:
        return False
    return True


def patch_folders(directory: Path) -> list[Path]:
    """Where in a directory patches lie: at its top, and one level below for adapters with names."""
    found = [directory] if (directory / CONFIG_NAME).is_file() else []
    found += [path.parent for path in sorted(directory.glob(f"*/{CONFIG_NAME}")) if is_patch(path.parent)]
    return found or [directory]


def write_adapter(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write an adapter's weights and configuration in PEFT's format.

    Args:
        directory: It exists.
        config: In JSON types.
        tensors: By names as in the base model.
    """
    named = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(named, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    write_config(directory / CONFIG_NAME, config)


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write an adapter's configuration as PEFT does: in ASCII, which it reads in whatever encoding a machine has."""
    write_json(path, config, indent=2, sort_keys=True, ensure_ascii=True)


def check_patch_output(path: Path, overwrite: bool, inputs: tuple[str | Path | None, ...] = ()) -> None:
    """Refuse an output where no adapter could or should be written; an earlier one goes with its LoRA twin.

    Args and errors: as of [`check_output`].
    """
    check_output(path, overwrite, CONFIG_NAME, inputs, part=f"{LORA_DIR}/{CONFIG_NAME}")


def check_neurons(neurons: torch.Tensor | Sequence[int], in_features: int, name: str) -> torch.Tensor:
    """Return `neurons` as an int32 vector (k,), or say what is wrong with it.

    Args:
        neurons: Indices of neurons in any order.
        in_features: The number of neurons of the module.
        name: The module, for the message.

    Raises:
        TypeError: The indices are not integers.
        ValueError: The indices are not a vector, empty, repeated or out of range.
    """
    if not isinstance(neurons, torch.Tensor):
        neurons = torch.as_tensor(neurons)
    if not _is_integral(neurons):
        raise TypeError(f"The neurons of {name} should be integer indices, got a tensor of dtype {neurons.dtype}.")
    if neurons.dim() != 1:
        raise ValueError(f"The neurons of {name} should be a vector, got a tensor of shape {tuple(neurons.shape)}.")
    if neurons.numel() == 0:
        raise ValueError(f"The neurons of {name} are empty; a patched module needs at least one neuron.")
    # in int64, so that unsigned or small integer types neither wrap around nor miss an operator
    wide = neurons.to(torch.int64)
    if wide.min() < 0 or wide.max() >= in_features:
        bad = wide[(wide < 0) | (wide >= in_features)][0].item()
        raise ValueError(f"The neurons of {name} should be in [0, {in_features}), got {bad}.")
    if torch.unique(wide).numel() != wide.numel():
        raise ValueError(f"The neurons of {name} should be unique, but some index occurs twice.")
    return wide.to(INDEX_DTYPE)


def check_delta(delta: torch.Tensor, num_neurons: int, out_features: int, name: str) -> None:
    """Say what is wrong with the `delta` (k, d_out) of the module `name`, if anything is.

    Raises:
        TypeError: The delta is not a floating point tensor.
        ValueError: The delta has the wrong shape or holds NaN or infinity.
    """
    if not isinstance(delta, torch.Tensor) or not delta.dtype.is_floating_point:
        raise TypeError(f"The delta of {name} should be a floating point tensor.")
    if tuple(delta.shape) != (num_neurons, out_features):
        raise ValueError(
            f"The delta of {name} should have the shape {(num_neurons, out_features)} (neurons, out_features), "
            f"got {tuple(delta.shape)}."
        )
    if not torch.isfinite(delta).all():
        raise ValueError(f"The delta of {name} holds NaN or infinite values.")


def _is_integral(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file, by the names that they have there.

    Raises:
        ValueError: There is no such file, or it is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {path.name}.")
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


def _sort_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], tuple[str, ...]]:
    """The neurons and the deltas among the tensors of a file, by module, and the names of the others."""
    parts: dict[str, dict[str, torch.Tensor]] = {NEURONS: {}, DELTA: {}}
    others = []
    for key, tensor in tensors.items():
        module, _, attribute = key.removeprefix(PEFT_PREFIX).rpartition(".")
        if attribute in parts:
            parts[attribute][module] = tensor
        else:
            others.append(key)
    names = sorted(parts[NEURONS].keys() | parts[DELTA].keys(), key=_natural)
    if not names:
        raise ValueError(f"{path} holds no patched neuron.")
    for name in names:
        if not is_module_name(name):
            raise ValueError(f"{path} is damaged: {name[:60]!r} can be the name of no module.")
        damage = _damage(name, parts[NEURONS].get(name), parts[DELTA].get(name))
        if damage:
            raise ValueError(f"{path} is damaged: {damage}.")
    neurons, deltas = ({name: part[name] for name in names} for part in parts.values())
    # of unsigned types torch knows little
    neurons = {name: found if found.dtype == INDEX_DTYPE else found.to(torch.int64) for name, found in neurons.items()}
    return neurons, deltas, tuple(sorted(others))


def _damage(name: str, neurons: torch.Tensor | None, delta: torch.Tensor | None) -> str | None:
    """What is wrong with a module's tensors whatever model they are for, if anything is."""
    if neurons is None or delta is None:
        return f"{name} lacks its {'neurons' if neurons is None else 'delta'}"
    if delta.dtype not in _DTYPES:
        return f"the delta of {name} is of the type {str(delta.dtype).removeprefix('torch.')}, and no patch's"
    shaped = neurons.dim() == 1 and delta.dim() == 2 and len(neurons) == len(delta) and delta.shape[1] > 0
    if not shaped or not _is_integral(neurons):
        return f"the neurons and the delta of {name} do not belong together"
    wide = neurons.to(torch.int64)
    if len(wide) and (wide.min() < 0 or len(wide.unique()) < len(wide)):
        return f"{name} names neurons that cannot be"
    if not delta.isfinite().all():
        return f"the delta of {name} is not finite"
    return None


def _natural(name: str) -> list[Any]:
    """Sort key that puts layer 10 behind layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
