from flashspec.drafters.base import DraftContext, Drafter, NoDraft, Proposer
from flashspec.drafters.registry import get_drafter, list_drafters, register

__all__ = ["DraftContext", "Drafter", "NoDraft", "Proposer", "get_drafter", "list_drafters", "register"]
