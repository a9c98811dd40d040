"""Exact speculative decoding with a bandit that learns which drafter to use while the text is being written."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashspec.config import BanditConfig, FlashSpecConfig, MetricsConfig, SamplingConfig
    from flashspec.core import Arm, FlashSpecError, GenerationResult
    from flashspec.drafters import get_drafter, list_drafters, register
    from flashspec.engine import SpeculativeEngine
    from flashspec.kernels import TRITON_AVAILABLE

__version__ = "0.1.0"

_HOME = {
    "Arm": "flashspec.core",
    "BanditConfig": "flashspec.config",
    "FlashSpecConfig": "flashspec.config",
    "FlashSpecError": "flashspec.core",
    "GenerationResult": "flashspec.core",
    "MetricsConfig": "flashspec.config",
    "SamplingConfig": "flashspec.config",
    "SpeculativeEngine": "flashspec.engine",
    "TRITON_AVAILABLE": "flashspec.kernels",
    "get_drafter": "flashspec.drafters",
    "list_drafters": "flashspec.drafters",
    "register": "flashspec.drafters",
}
__all__ = [
    "TRITON_AVAILABLE",
    "Arm",
    "BanditConfig",
    "FlashSpecConfig",
    "FlashSpecError",
    "GenerationResult",
    "MetricsConfig",
    "SamplingConfig",
    "SpeculativeEngine",
    "get_drafter",
    "list_drafters",
    "register",
]


def __getattr__(name: str) -> Any:  # lazily: `flashspec --help` must not wait for torch
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'flashspec' has no attribute {name!r}")
