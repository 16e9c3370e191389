from .registration import register

register()

from .config import StarConfig  # noqa: E402
from .layer import Linear, StarLayer  # noqa: E402
from .model import StarModel  # noqa: E402

__all__ = ["Linear", "StarConfig", "StarLayer", "StarModel"]
