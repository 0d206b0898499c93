"""One model and its contexts of llama.cpp behind plain Python values: the only file that calls its C functions.

What aborts the process if done wrong (facts/inference.md) is kept in here: no batch is larger than `n_batch`, no more rows have
logits than there is room for, only rows that asked for them are read, and all calls come from one thread.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from typing import Final

import llama_cpp as C
import numpy as np
from numpy.typing import NDArray

from daemon.engine.protocol import GUESSES, TEXTS, Load
from daemon.engine.worker.sampling import Logits

_CONTROL_OR_UNKNOWN: Final = 8 | 1  # llama_token_attr
_DEBUG, _ERROR, _CONTINUED = 1, 4, 5  # ggml_log_level
_UNKNOWN: Final = re.compile(r"unknown model architecture: '([^']{0,64})'")
_PATH: Final = re.compile(r"'?[^\s']*/[^\s']*'?")

Row = tuple[int, int, int, bool]  # token, position, sequence, wants logits


class LlamaError(Exception):
    """llama.cpp said no. The text is one line without paths; more stands in the worker's log."""


class _Log:
    """What llama.cpp says goes to stderr, and its last error is remembered: there is no other way to learn why it failed.

    The C function must never be collected: llama.cpp would call what is no longer there, and die.
    """

    def __init__(self) -> None:
        self.error = self.path = ""
        self._level = _DEBUG
        self.function = C.llama_log_callback(self._hear)

    def _hear(self, level: int, text: bytes, _data: object) -> None:
        self._level = self._level if level == _CONTINUED else level
        # What comes after the architecture says less.
        if level == _ERROR and (line := text.decode("utf-8", "replace").strip()) and not _UNKNOWN.search(self.error):
            self.error = line
        # Every decode has some lines for those who debug it, and the log would grow with each token.
        if self._level > _DEBUG:
            os.write(2, text)

    def why(self, otherwise: str) -> str:
        """The last error without the C function's name and without paths."""
        if unknown := _UNKNOWN.search(self.error):
            return f"this llama.cpp does not know the architecture {unknown[1]!a}"
        said = _PATH.sub("...", self.error.partition(": ")[2].replace(self.path, "..."))
        return f"llama.cpp {otherwise}" + (f": {' '.join(said.split())[:200]}" if said else "")


_LOG: Final = _Log()


def has_gpu() -> bool:
    """Whether this build of llama.cpp can use one, and there is one."""
    return bool(C.llama_supports_gpu_offload())


class Llama:
    """A loaded model with a KV cache of `context` cells that `slots` sequences share.

    A model without a decoder has no such cache: it can only embed.
    """

    def __init__(self, load: Load) -> None:
        _LOG.path = load["path"]
        C.llama_log_set(_LOG.function, None)
        C.llama_backend_init()
        if not load["blas"]:
            _leave_out_blas()
        self._threads = self._alone = load["threads"]
        model_params = C.llama_model_default_params()
        model_params.n_gpu_layers = load["gpu_layers"]
        self._model = C.llama_model_load_from_file(load["path"].encode(), model_params)
        if not self._model:
            raise LlamaError(_LOG.why("refused the file"))
        self._vocab = C.llama_model_get_vocab(self._model)
        self.vocabulary = int(C.llama_vocab_n_tokens(self._vocab))
        if C.llama_model_has_encoder(self._model) and C.llama_model_has_decoder(self._model):
            raise LlamaError("it translates from an encoder to a decoder, which is not supported")
        # Guesses need logits too. Room for logits of all rows would cost 514 instead of 34 MiB.
        self.outputs = load["slots"] + GUESSES
        self._pieces: dict[int, bytes] = {}
        self._embedder: _Embedder | None = None
        self._context = self._open(load)
        self._memory = C.llama_get_memory(self._context)
        self.writes = bool(C.llama_model_has_decoder(self._model) and self._memory)
        self.batch = int(C.llama_n_batch(self._context))
        self.width = int(C.llama_model_n_embd_out(self._model))  # numbers in a vector of a text
        self.longest_text = min(self.batch, int(C.llama_model_n_ctx_train(self._model)))
        self.context = int(C.llama_n_ctx(self._context)) if self.writes else self.longest_text
        self._rows = _Batch(self.batch)
        # Recurrent state cannot be rolled back to the middle of a sequence.
        self.can_roll_back = not (C.llama_model_is_recurrent(self._model) or C.llama_model_is_hybrid(self._model))

    def _open(self, load: Load) -> int:
        params = C.llama_context_default_params()
        params.n_ctx = load["context"]
        # Every answer that runs needs a row in each batch.
        params.n_batch = params.n_ubatch = max(load["batch"], self.outputs)
        params.n_seq_max = load["slots"]
        params.n_outputs_max = self.outputs
        params.n_threads = params.n_threads_batch = load["threads"]
        params.kv_unified = True  # split caches stop batching when sequence ids have gaps
        params.swa_full = True  # otherwise prefixes of sliding-window models cannot be reused
        params.no_perf = True
        context = C.llama_init_from_model(self._model, params)
        if not context:
            raise LlamaError(_LOG.why("could not make the context; a smaller one may fit"))
        return int(context)

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

    def tokenise(self, text: str, control: bool, whole: bool = False) -> list[int]:
        """Tokens of `text`. `control`: the texts of control tokens count as such; `whole`: with what the model wants around a text."""
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 16
        tokens = (C.llama_token * room)()
        count = C.llama_tokenize(self._vocab, raw, len(raw), tokens, room, whole, control)
        if count < 0:  # some vocabularies spell one character out as several words
            room = -count
            tokens = (C.llama_token * room)()
            count = C.llama_tokenize(self._vocab, raw, len(raw), tokens, room, whole, control)
        if count < 0:
            raise LlamaError("the text cannot be tokenised")
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        """The bytes that `token` adds to an answer; none for control tokens."""
        if token not in self._pieces:
            self._pieces[token] = self._bytes(token, special=False)
        return self._pieces[token]

    def spell(self, token: int) -> bytes:
        """The bytes of `token`, also of a control token."""
        return self._bytes(token, special=True)

    def controls(self, token: int) -> bool:
        return bool(C.llama_vocab_get_attr(self._vocab, token) & _CONTROL_OR_UNKNOWN)

    def native_tokeniser(self) -> tuple[int, int]:
        """The vocabulary and the function `llama_tokenize`, for native code that tokenises by itself, in whatever thread."""
        function = ctypes.cast(C.llama_cpp._lib.llama_tokenize, ctypes.c_void_p).value
        assert function is not None
        return int(self._vocab), function

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
        """Run up to `batch` rows, of which `outputs` have logits; False when the KV cache has no room (nothing has changed then)."""
        if sum(row[3] for row in rows) > self.outputs:
            raise ValueError("too many rows with logits")
        result = C.llama_decode(self._context, self._rows.fill(rows))
        if result not in (0, 1):
            raise LlamaError(f"llama.cpp could not decode (error {result})")
        return bool(result == 0)

    def logits(self, row: int) -> Logits:
        """What the model says after row `row` of the last batch, which must have asked for it. Valid until the next `decode`."""
        return _floats(C.llama_get_logits_ith(self._context, row), self.vocabulary)

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

    def set_threads(self, count: int, alone: int | None = None) -> None:
        """For a batch, and at most `alone` for a single token; None: as before."""
        self._threads = count
        self._alone = self._alone if alone is None else alone
        C.llama_set_n_threads(self._context, min(self._alone, count), count)
        if self._embedder is not None:
            self._embedder.set_threads(count)

    # --- embeddings ---

    def embed(self, texts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """One vector of length 1 for each text, in one decode: at most `TEXTS` texts and `batch` tokens together."""
        if self._embedder is None:
            self._embedder = _Embedder(self._model, self.width, self.batch, self._threads)
        return self._embedder.embed(texts)


class _Embedder:
    """A second context on the same model, because one context either writes or embeds. Made when it is first needed."""

    def __init__(self, model: int, width: int, batch: int, threads: int) -> None:
        self._width = width
        if C.llama_model_has_decoder(model):
            # It computes logits for every token of a text, and BLAS would unpack the output matrix for them: up to gigabytes.
            _leave_out_blas()
        self._rows = _Batch(batch)
        params = C.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = batch  # a text that is pooled must be in one batch
        params.n_seq_max = TEXTS
        params.n_threads = params.n_threads_batch = threads
        params.embeddings = params.kv_unified = params.swa_full = params.no_perf = True
        self._context = C.llama_init_from_model(model, params)
        if self._context and C.llama_pooling_type(self._context) == C.LLAMA_POOLING_TYPE_NONE:
            C.llama_free(self._context)
            params.pooling_type = C.LLAMA_POOLING_TYPE_MEAN
            self._context = C.llama_init_from_model(model, params)
        if not self._context:
            raise LlamaError(_LOG.why("could not make a context for embeddings"))
        if C.llama_pooling_type(self._context) == C.LLAMA_POOLING_TYPE_RANK:
            C.llama_free(self._context)
            raise LlamaError("the model ranks texts, it does not embed them")
        self._memory = C.llama_get_memory(self._context)

    def embed(self, texts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        if len(texts) > TEXTS:
            raise ValueError(f"{len(texts)} texts in one batch")
        rows = [(token, at, sequence, True) for sequence, text in enumerate(texts) for at, token in enumerate(text)]
        result = C.llama_decode(self._context, self._rows.fill(rows))
        if result:
            raise LlamaError(f"llama.cpp could not decode (error {result})")
        found = [_floats(C.llama_get_embeddings_seq(self._context, sequence), self._width).copy() for sequence in range(len(texts))]
        if self._memory:
            C.llama_memory_clear(self._memory, True)
        return [vector / max(float(np.linalg.norm(vector)), 1e-12) for vector in found]

    def set_threads(self, count: int) -> None:
        C.llama_set_n_threads(self._context, count, count)


class _Batch:
    """A `llama_batch` of fixed size, filled through NumPy: one sequence per row never changes."""

    def __init__(self, size: int) -> None:
        self._width = size
        self._batch = C.llama_batch_init(size, 0, 1)
        view = np.ctypeslib.as_array
        self._tokens, self._positions = view(self._batch.token, (size,)), view(self._batch.pos, (size,))
        self._logits = view(self._batch.logits, (size,))
        view(self._batch.n_seq_id, (size,))[:] = 1

    def fill(self, rows: Sequence[Row]) -> C.llama_batch:
        count = len(rows)
        if not 0 < count <= self._width:
            raise ValueError(f"a batch of {count} rows")
        tokens, positions, sequences, logits = zip(*rows, strict=True)
        self._tokens[:count], self._positions[:count], self._logits[:count] = tokens, positions, logits
        for i, sequence in enumerate(sequences):
            self._batch.seq_id[i][0] = sequence
        self._batch.n_tokens = count
        return self._batch


def _leave_out_blas() -> None:
    """Contexts that are made from now on do without BLAS, where llama.cpp was built with one."""
    ggml = C.llama_cpp._lib  # a handle finds the functions of what the library is linked with, too
    ggml.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    ggml.ggml_backend_unload.argtypes = [ctypes.c_void_p]
    if blas := ggml.ggml_backend_reg_by_name(b"BLAS"):
        ggml.ggml_backend_unload(blas)


def _floats(pointer: ctypes._Pointer[ctypes.c_float], count: int) -> NDArray[np.float32]:
    """A view of C memory."""
    if not pointer:
        raise LlamaError("llama.cpp computed nothing for a row")
    address = ctypes.addressof(pointer.contents)
    return np.frombuffer(memoryview((ctypes.c_float * count).from_address(address)), np.float32)
