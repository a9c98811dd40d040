"""Fit a drafter to a target, from text that the target writes itself."""

from flashspec.training.command import Outcome, train_drafter
from flashspec.training.settings import Kind, Settings

__all__ = ["Kind", "Outcome", "Settings", "train_drafter"]
