"""What PEFT calls a tuner: the configuration, the layers and the model that carries them."""

from .config import StarConfig
from .experts import Experts
from .layer import Linear, StarLayer
from .model import StarModel

__all__ = ["Experts", "Linear", "StarConfig", "StarLayer", "StarModel"]
