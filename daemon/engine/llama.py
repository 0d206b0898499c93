"""One model and one context of llama.cpp behind plain Python values: the only file that calls its C functions.

What aborts the process if done wrong (facts/inference.md) is kept in here: no batch is larger than `n_batch`, samplers
are checked for NULL, only rows that asked for logits are sampled, and all calls come from one thread.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import llama_cpp as C

from daemon.engine.interface import Sampling
from daemon.engine.protocol import Load

BATCH: Final = 512  # tokens in one decode at most
_CONTROL_OR_UNKNOWN: Final = 8 | 1  # llama_token_attr

Row = tuple[int, int, int, bool]  # token, position, sequence, wants logits


class LlamaError(Exception):
    """llama.cpp said no. The text is one line; more stands in the worker's log."""


class Llama:
    """A loaded model with a KV cache of `context` cells that `slots` sequences share."""

    def __init__(self, load: Load) -> None:
        # Straight to stderr: a Python log callback that is collected too early aborts the process.
        C.llama_log_set(C.llama_log_callback(), None)
        C.llama_backend_init()
        model_params = C.llama_model_default_params()
        model_params.n_gpu_layers = load["gpu_layers"]
        self._model = C.llama_model_load_from_file(str(Path(load["path"])).encode(), model_params)
        if not self._model:
            raise LlamaError("llama.cpp refused the file; it may be damaged or of an architecture this release does not know")
        self._vocab = C.llama_model_get_vocab(self._model)
        self._context = C.llama_init_from_model(self._model, _context_params(load))
        if not self._context:
            raise LlamaError("llama.cpp could not make the context; a smaller one may fit")
        self._memory = C.llama_get_memory(self._context)
        if not C.llama_model_has_decoder(self._model) or not self._memory:
            raise LlamaError("this is no model that writes text")
        self._batch = C.llama_batch_init(BATCH, 0, 1)
        self._pieces: dict[int, bytes] = {}
        self.context = int(C.llama_n_ctx(self._context))
        self.vocabulary = int(C.llama_vocab_n_tokens(self._vocab))
        # Recurrent state cannot be rolled back to the middle of a sequence.
        self.can_roll_back = not (C.llama_model_is_recurrent(self._model) or C.llama_model_is_hybrid(self._model))

    # --- the vocabulary ---

    def special(self) -> dict[str, str]:
        """The texts of the begin and end tokens, empty where the model has none."""
        return {"bos_token": self._text(C.llama_vocab_bos(self._vocab)), "eos_token": self._text(C.llama_vocab_eos(self._vocab))}

    def first_token(self) -> int | None:
        """The token every prompt begins with, for models that want one."""
        return int(C.llama_vocab_bos(self._vocab)) if C.llama_vocab_get_add_bos(self._vocab) else None

    def control_texts(self) -> re.Pattern[str] | None:
        """Matches the text of every token that the tokeniser would take as a control token."""
        attribute = C.llama_vocab_get_attr
        tokens = [token for token in range(self.vocabulary) if attribute(self._vocab, token) & _CONTROL_OR_UNKNOWN]
        texts = sorted({text for token in tokens if (text := self._text(token))}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    def tokenise(self, text: str, control: bool) -> list[int]:
        """Tokens of `text`; `control` says whether the texts of control tokens count as such."""
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 16
        tokens = (C.llama_token * room)()
        count = C.llama_tokenize(self._vocab, raw, len(raw), tokens, room, False, control)
        if count < 0:
            raise LlamaError("the text cannot be tokenised")
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        """The bytes that `token` adds to an answer; none for control tokens."""
        if token not in self._pieces:
            self._pieces[token] = self._bytes(token, special=False)
        return self._pieces[token]

    def ends(self, token: int) -> bool:
        return bool(C.llama_vocab_is_eog(self._vocab, token))

    def _text(self, token: int) -> str:
        return "" if token < 0 else self._bytes(token, special=True).decode("utf-8", "replace")

    def _bytes(self, token: int, special: bool) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        length = C.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = C.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[: max(length, 0)]

    # --- the KV cache ---

    def decode(self, rows: Sequence[Row]) -> bool:
        """Run up to `BATCH` rows; False when the KV cache has no room for them (nothing has changed then)."""
        if not 0 < len(rows) <= BATCH:
            raise ValueError(f"a batch of {len(rows)} rows")
        batch = self._batch
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = logits
        batch.n_tokens = len(rows)
        result = C.llama_decode(self._context, batch)
        if result not in (0, 1):
            raise LlamaError(f"llama.cpp could not decode (error {result})")
        return bool(result == 0)

    def forget(self, sequence: int, position: int) -> bool:
        """Drop what `sequence` holds from `position` on; False when only all of it can be dropped (nothing has changed then)."""
        if position and not self.can_roll_back:
            return bool(C.llama_memory_seq_pos_max(self._memory, sequence) == position - 1)
        # A sliding window that is not kept in full says True and answers wrongly: the first position must still be there.
        if position and C.llama_memory_seq_pos_min(self._memory, sequence) != 0:
            return False
        return bool(C.llama_memory_seq_rm(self._memory, sequence, position, -1))

    def share(self, source: int, target: int, end: int) -> None:
        """Let the empty `target` have the first `end` cells of `source` too; they are not copied. Needs `can_roll_back`."""
        C.llama_memory_seq_cp(self._memory, source, target, 0, end)

    def set_threads(self, count: int) -> None:
        C.llama_set_n_threads(self._context, count, count)

    def sampler(self, sampling: Sampling, seed: int) -> Sampler:
        return Sampler(self._context, list(_stages(sampling, seed, self.vocabulary, self.context)))


class Sampler:
    """How one answer draws its tokens; it remembers what it drew, for the penalties."""

    def __init__(self, context: int, stages: Sequence[int | None]) -> None:
        self._context = context
        self._chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        for stage in stages:
            if not stage:
                raise LlamaError("llama.cpp refused the sampling parameters")
            C.llama_sampler_chain_add(self._chain, stage)

    def draw(self, row: int) -> int:
        """The next token after row `row` of the last batch, which must have asked for logits."""
        return int(C.llama_sampler_sample(self._chain, self._context, row))

    def close(self) -> None:
        if self._chain:
            C.llama_sampler_free(self._chain)
            self._chain = None


def _stages(sampling: Sampling, seed: int, vocabulary: int, context: int) -> Iterator[int | None]:
    """In the order of llama.cpp's own server: penalties, top_k, top_p, min_p, temperature, draw."""
    if sampling.repeat_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty:
        repeat, frequency, presence = sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty
        yield C.llama_sampler_init_penalties(vocabulary, context, repeat, frequency, presence)
    if sampling.temperature <= 0:
        yield C.llama_sampler_init_greedy()
        return
    if sampling.top_k > 0:
        yield C.llama_sampler_init_top_k(min(sampling.top_k, vocabulary))
    if sampling.top_p < 1:
        yield C.llama_sampler_init_top_p(sampling.top_p, 1)
    if sampling.min_p > 0:
        yield C.llama_sampler_init_min_p(sampling.min_p, 1)
    yield C.llama_sampler_init_temp(sampling.temperature)
    yield C.llama_sampler_init_dist(seed)


def _context_params(load: Load) -> C.llama_context_params:
    params = C.llama_context_default_params()
    params.n_ctx = load["context"]
    params.n_batch = params.n_ubatch = BATCH
    params.n_seq_max = load["slots"]
    params.n_outputs_max = load["slots"]  # cuts the compute buffer from 514 to 34 MiB
    params.n_threads = params.n_threads_batch = load["threads"]
    params.kv_unified = True  # split caches stop batching when sequence ids have gaps
    params.swa_full = True  # otherwise prefixes of sliding-window models cannot be reused
    params.no_perf = True
    return params
