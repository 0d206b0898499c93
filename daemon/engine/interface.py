"""What answers: the local engine, a peer, or any upstream. One interface, so that routing does not care which."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

FinishReason = Literal["stop", "length", "tool_calls"]
ToolChoice = Literal["auto", "none", "required"]
Capability = Literal["chat", "completions", "embeddings", "tools", "json_schema", "logprobs", "logit_bias"]
CAPABILITIES: frozenset[Capability] = frozenset(get_args(Capability))


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt: those that were in the KV cache already


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn, in the order of llama.cpp's own server: bias, penalties, top_k, top_p, min_p, temperature."""

    max_tokens: int | None = None  # None: until the context is full
    temperature: float = 0.8  # 0: always the likeliest token
    top_p: float = 0.95
    top_k: int = 40  # 0: all
    min_p: float = 0.05
    repeat_penalty: float = 1.0  # 1: none
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None  # None: another one each time
    stop: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # by token; -100 forbids and 100 forces, as OpenAI has it
    logprobs: int | None = None  # how many of the likeliest tokens to name beside each drawn one; None: no logprobs at all


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may ask for. `parameters` is the JSON schema of its arguments, an object."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})

    def as_json(self) -> dict[str, Any]:
        """What OpenAI calls the function of a tool."""
        return {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A validated chat. `messages` are OpenAI's: dicts with `role` and `content` (text).

    An assistant's message may have `tool_calls` ({"id", "type": "function", "function": {"name", "arguments": JSON text}}), and
    one of the role `tool` has `tool_call_id`.
    """

    messages: tuple[dict[str, Any], ...]
    sampling: Sampling = field(default_factory=Sampling)
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    forced_tool: str | None = None  # with "required": the one tool to call
    parallel_tool_calls: bool = True
    schema: Mapping[str, Any] | None = None  # JSON schema that the answer follows; {"type": "object"}: any JSON object


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A text, or its tokens, to go on with; no chat template."""

    prompt: str | tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)


Request = ChatRequest | CompletionRequest


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts, or their tokens, each to become one vector."""

    inputs: tuple[str | tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector of length 1 per input, as little-endian float32."""

    vectors: tuple[bytes, ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that was drawn, or could have been. `logprob` is natural, before temperature and other filters."""

    bytes: bytes  # may be half a character
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    drawn: Candidate
    likeliest: tuple[Candidate, ...] = ()  # likeliest first


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the call `index`: its first piece has `id` and `name`, each brings more of the JSON text of its arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """One piece of an answer. The last one has `finish` and `usage`; an answer without them was cut off."""

    text: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens behind this piece
    finish: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How one model is loaded; None means the setting of `engine.*`."""

    context: int | None = None
    threads: int | None = None
    gpu_layers: int | None = None
    slots: int | None = None
    batch: int | None = None  # tokens in one decode at most
    keep_alive: float | None = None  # seconds without a chat after which the worker is ended; negative: never


ModelState = Literal["idle", "loading", "loaded", "restarting"]


@dataclass(frozen=True, slots=True)
class Served:
    """A local model as it is now. What its worker said when it was ready stays known while it is unloaded."""

    context: int
    slots: int
    free_slots: int  # requests that could be answered at once; none while its worker is about to be started again
    pid: int | None  # None: it has no worker
    tokens_per_second: float = 0.0  # 0: not measured yet
    options: ServeOptions = field(default_factory=ServeOptions)  # as they are in force
    state: ModelState = "loaded"
    memory: int = 0  # bytes that its worker takes, by the estimate
    restarts: int = 0  # workers that were started because one had died
    reason: str | None = None  # why the last worker died, or could not be loaded
    expires: float | None = None  # seconds until it is unloaded; None: not while it answers, or never


class Source(Protocol):
    """The file of a model, and whether it may be loaded."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...

    async def check(self) -> None:
        """Asked before every load. Raises `NotFound`, or `Refused` when the file is not what it should be."""
        ...


class Provider(Protocol):
    """Whoever answers. Closing an iterator cancels the generation where it runs."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What it can do; anything else raises `UsageError`."""
        ...

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        """Deltas until one has `finish`. Raises `UsageError` (does not fit), `Busy`, `ModelLoadError`, `InferenceError` or `Unserved`."""
        ...

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Raises as `generate` does."""
        ...


class Engine(Protocol):
    """Local inference: one child process per loaded model, by the blake3 of the model.

    A model that is *kept* has its worker started again when that dies; others are loaded when somebody asks.
    """

    async def keep(self, key: str, source: Source, options: ServeOptions) -> Served:
        """Load with `options` and keep. A model that is kept or loaded so already is left as it is; a worker that runs with other
        options is ended once the new ones are known to fit.

        Raises `ModelLoadError`, `NoMemory`, `UsageError` for options that do not fit the model, what `source` raises, and
        `Unavailable` when it was stopped meanwhile.
        """
        ...

    async def keep_idle(self, key: str, source: Source, options: ServeOptions, tokens_per_second: float) -> Served:
        """The same, but loaded when somebody asks; `tokens_per_second` is what was measured before. Raises as `keep` does."""
        ...

    async def unload(self, key: str) -> bool:
        """Keep it no longer, end its worker or its loading and give the memory back; False when there was nothing to end."""
        ...

    def models(self) -> dict[str, Served]:
        """Those that are kept or have a worker."""
        ...

    def provider(self, key: str, source: Source) -> Provider:
        """What answers for a model, the same object for ever: it loads the model when it has to."""
        ...

    async def close(self) -> None: ...
