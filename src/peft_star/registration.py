"""Makes PEFT know the method STAR. This module is the only place where the package changes anything in PEFT."""

from __future__ import annotations

import importlib.metadata
from typing import Any

SUPPORTED_PEFT = ">=0.21,<0.22"
_NAME = "STAR"


class _IncompatiblePeft(Exception):
    """Something in PEFT is not what this package expects; the message says what."""


def _extend_peft_type() -> None:
    """Add the member `STAR` to the enum `PeftType`, as `register_peft_method` takes only names it finds there."""
    from peft.utils import peft_types

    PeftType: Any = peft_types.PeftType
    if _NAME not in PeftType.__members__:
        member = str.__new__(PeftType, _NAME)
        member._name_ = _NAME
        member._value_ = _NAME
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType._member_names_)
        # EnumType refuses `PeftType.STAR = ...` once a member exists, hence type.__setattr__ and before the maps
        type.__setattr__(PeftType, _NAME, member)
        PeftType._member_names_.append(_NAME)
        PeftType._member_map_[_NAME] = member
        PeftType._value2member_map_[_NAME] = member
        if hasattr(PeftType, "_hashable_values_"):  # Python 3.13 and later
            PeftType._hashable_values_.append(_NAME)

    member = PeftType.__members__[_NAME]
    if PeftType(_NAME) is not member or member not in list(PeftType) or getattr(PeftType, _NAME) is not member:
        raise _IncompatiblePeft("the enum PeftType could not be extended")


def _register_method() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType, register_peft_method

    from .tuner import StarConfig, StarModel

    star = PeftType(_NAME)
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(star)
    if registered is None:
        register_peft_method(name="star", config_cls=StarConfig, model_cls=StarModel, prefix="star_")
    elif registered.__module__ == StarConfig.__module__:
        # imported again: keep the classes of the newest import, so that isinstance checks agree with what users see
        PEFT_TYPE_TO_CONFIG_MAPPING[star] = StarConfig
        PEFT_TYPE_TO_TUNER_MAPPING[star] = StarModel
        PEFT_TYPE_TO_PREFIX_MAPPING[star] = "star_"
    else:
        raise _IncompatiblePeft(f"PEFT already has a method called STAR, from {registered.__module__}")


def register() -> None:
    """Register STAR with PEFT; calling it again is harmless.

    Raises:
        ImportError: The installed PEFT is not one that this package works with.
    """
    try:
        _extend_peft_type()
        _register_method()
    except (_IncompatiblePeft, ImportError, AttributeError, TypeError, ValueError, KeyError) as exc:
        try:
            version = importlib.metadata.version("peft")
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
        raise ImportError(
            f"peft_star could not register the method STAR with PEFT {version} ({exc}); "
            f'it supports PEFT {SUPPORTED_PEFT}: run `pip install "peft{SUPPORTED_PEFT}"`.'
        ) from exc
