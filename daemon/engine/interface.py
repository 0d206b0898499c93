"""What answers a chat: the local engine, a peer, or any upstream. One interface, so that routing does not care which."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A validated chat. `messages` are OpenAI's: dicts with `role` and `content` (text)."""

    messages: tuple[dict[str, Any], ...]
    max_tokens: int | None = None  # None: until the context is full
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """One piece of an answer. The last one has `finish` and `usage`; an answer without them was cut off."""

    text: str = ""
    finish: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How one model is loaded; None means the setting of `engine.*`."""

    context: int | None = None
    threads: int | None = None
    gpu_layers: int | None = None
    slots: int | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """A loaded model: what its worker said when it was ready."""

    context: int
    slots: int
    free_slots: int
    pid: int
    tokens_per_second: float = 0.0
    options: ServeOptions = field(default_factory=ServeOptions)


class Provider(Protocol):
    """Whoever answers. Closing the iterator cancels the generation where it runs."""

    def chat(self, request: ChatRequest) -> AsyncIterator[Delta]:
        """Deltas until one has `finish`. Raises `UsageError` (does not fit), `Busy`, `InferenceError` or `Unserved`."""
        ...


class Engine(Protocol):
    """Local inference: one child process per loaded model, by the blake3 of the model."""

    async def load(self, key: str, path: Path, options: ServeOptions) -> Served:
        """Raises `ModelLoadError`, `NoMemory`, or `UsageError` for options that do not fit the model."""
        ...

    async def unload(self, key: str) -> bool:
        """End the worker and give its memory back; False when it was not loaded."""
        ...

    def served(self) -> dict[str, Served]: ...

    def provider(self, key: str) -> Provider:
        """Raises `NotFound` when the model is not loaded."""
        ...

    async def close(self) -> None: ...
