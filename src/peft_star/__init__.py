"""Repair language models: locate buggy neurons, solve neuron patches, share them as PEFT adapters (STAR)."""

from .registration import register

register()

from .method.arguments import RepairArguments  # noqa: E402
from .method.callbacks import RepairCallback, RepairState  # noqa: E402
from .method.prior_guided import PriorGuidedSGD  # noqa: E402
from .method.repair import RepairInterrupted, prepare, repair  # noqa: E402
from .models.fingerprint import fingerprint  # noqa: E402
from .report import RepairReport  # noqa: E402
from .sharing.lora import export_lora  # noqa: E402
from .tuner.config import StarConfig  # noqa: E402
from .tuner.layer import Linear, StarLayer  # noqa: E402
from .tuner.model import StarModel  # noqa: E402
from .tuner.patches import combine_patches, swap_patch  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Linear",
    "PriorGuidedSGD",
    "RepairArguments",
    "RepairCallback",
    "RepairInterrupted",
    "RepairReport",
    "RepairState",
    "StarConfig",
    "StarLayer",
    "StarModel",
    "combine_patches",
    "export_lora",
    "fingerprint",
    "prepare",
    "repair",
    "swap_patch",
]
