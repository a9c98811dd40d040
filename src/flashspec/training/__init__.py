"""Fit a drafter to a target, from text that the target writes itself."""

from flashspec.training.command import Outcome, earlier_seconds, train_drafter
from flashspec.training.settings import Kind, Settings

__all__ = ["Kind", "Outcome", "Settings", "earlier_seconds", "train_drafter"]
