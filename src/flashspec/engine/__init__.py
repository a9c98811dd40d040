from flashspec.engine.engine import SpeculativeEngine
from flashspec.engine.generation import Conversation, Generation
from flashspec.engine.output import Chunk

__all__ = ["Chunk", "Conversation", "Generation", "SpeculativeEngine"]
