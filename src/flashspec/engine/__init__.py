from flashspec.engine.engine import DEFAULT_DRAFTERS, SpeculativeEngine
from flashspec.engine.generation import Conversation, Generation
from flashspec.engine.output import Chunk

__all__ = ["DEFAULT_DRAFTERS", "Chunk", "Conversation", "Generation", "SpeculativeEngine"]
