"""Texts to tokens, where llama.cpp needs more room than a token for each byte: no such vocabulary is at hand, so its function is played."""

from __future__ import annotations

import ctypes

import pytest

from daemon.engine.worker import llama
from daemon.engine.worker.llama import Llama, LlamaError


@pytest.fixture
def model() -> Llama:
    made = object.__new__(Llama)  # only its vocabulary is used
    made._vocab = 0
    return made


def test_a_text_may_have_more_tokens_than_bytes(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenize(_vocab: int, _raw: bytes, length: int, tokens: ctypes.Array[ctypes.c_int32], room: int, *_flags: bool) -> int:
        count = 20 * length
        if room < count:
            return -count
        tokens[:count] = list(range(count))
        return count

    monkeypatch.setattr(llama.C, "llama_tokenize", tokenize)
    assert model.tokenise("ab", control=False) == list(range(40))


def test_a_text_that_llama_cpp_gives_up_is_an_error(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.C, "llama_tokenize", lambda *given: -1)
    with pytest.raises(LlamaError, match="tokenised"):
        model.tokenise("ab", control=False)
