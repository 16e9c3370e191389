"""Repair language models: locate buggy neurons, solve neuron patches, share them as PEFT adapters (STAR)."""

from .registration import register

register()

from .method.arguments import RepairArguments  # noqa: E402
from .method.callbacks import RepairCallback, RepairState  # noqa: E402
from .method.check import CheckReport, check  # noqa: E402
from .method.prior_guided import PriorGuidedSGD  # noqa: E402
from .method.repair import RepairInterrupted, prepare, repair  # noqa: E402
from .method.revert import RevertReport, revert  # noqa: E402
from .method.unfinished import Unfinished  # noqa: E402
from .models.fingerprint import fingerprint  # noqa: E402
from .report import RepairReport  # noqa: E402
from .sharing.combine import diff, stack  # noqa: E402
from .sharing.entries import Entry  # noqa: E402
from .sharing.ledger import Ledger  # noqa: E402
from .sharing.recorded import log, revert_patch  # noqa: E402
from .tuner import Linear, StarConfig, StarLayer, StarModel  # noqa: E402
from .tuner.patches import combine_patches, export_lora, swap_patch  # noqa: E402

__version__ = "0.2.0"

__all__ = [
    "CheckReport",
    "Entry",
    "Ledger",
    "Linear",
    "PriorGuidedSGD",
    "RepairArguments",
    "RepairCallback",
    "RepairInterrupted",
    "RepairReport",
    "RepairState",
    "RevertReport",
    "StarConfig",
    "StarLayer",
    "StarModel",
    "Unfinished",
    "check",
    "combine_patches",
    "diff",
    "export_lora",
    "fingerprint",
    "log",
    "prepare",
    "repair",
    "revert",
    "revert_patch",
    "stack",
    "swap_patch",
]
