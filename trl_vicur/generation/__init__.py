"""Generate text with a vision-language model, in this process or at an OpenAI-compatible endpoint."""

from .openai_generator import OpenAIGenerator
from .requests import ChatRequest, ChatResponse, Generator, GeneratorUnavailableError
from .transformers_generator import TransformersGenerator


__all__ = [
    "ChatRequest",
    "ChatResponse",
    "Generator",
    "GeneratorUnavailableError",
    "OpenAIGenerator",
    "TransformersGenerator",
]
