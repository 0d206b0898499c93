"""The GGUF reader against files made byte by byte. R-numbers are rows of the list of bad inputs."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.engine import blas
from daemon.engine.gguf import MAX_ARRAY, MAX_KEYS, GgufHeader, inspect
from daemon.engine.memory import estimate_embedding, estimate_memory
from daemon.errors import NotFound, SwarmError, UsageError
from tests.unit.gguf_files import ARRAY, BOOL, I8, I32, METADATA, STRING, U32, U64, header, padded, text, tiny_gguf

DATA = bytes(4096)
ONE = ("w", (64,), I8, 0)


def read(tmp_path: Path, content: bytes) -> GgufHeader:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return inspect(path)


def refused(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, content)
    assert str(tmp_path) not in str(caught.value)
    return str(caught.value)


def with_entry(*entries: tuple[str, int, object]) -> list[tuple[str, int, object]]:
    names = {entry[0] for entry in entries}
    return [entry for entry in METADATA if entry[0] not in names] + list(entries)


def test_a_valid_file_tells_its_facts(tmp_path: Path) -> None:
    found = inspect(tiny_gguf(tmp_path / "tiny.gguf", 5000))
    assert found.size == 5000
    assert found.facts.architecture == "llama"
    assert found.facts.name == "Tiny"
    assert found.facts.quantization == "Q8_0"
    assert found.facts.license == "apache-2.0"
    assert found.facts.context_length == 512
    assert found.facts.parameters == found.tensor_bytes
    assert found.vocabulary == 4
    assert found.chat_template is not None and "messages" in found.chat_template
    assert found.facts.chat_template_hash is not None and len(found.facts.chat_template_hash) == 64


@pytest.mark.parametrize("size", [2048, 4097, 1 << 20, (3 << 20) + 1])
def test_tiny_files_have_the_size_and_bytes_asked_for(tmp_path: Path, size: int) -> None:
    first, again = tiny_gguf(tmp_path / "a.gguf", size), tiny_gguf(tmp_path / "b.gguf", size)
    other = tiny_gguf(tmp_path / "c.gguf", size, seed=1)
    assert first.stat().st_size == size == inspect(first).size
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("size", [0, 1, 3, 4, 8, 23])
def test_a_file_of_a_few_bytes_is_refused(tmp_path: Path, size: int) -> None:
    assert "GGUF" in refused(tmp_path, header()[:size])


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"<!DOCTYPE html><html>" + DATA, "a web page"),
        (b"\n  <html>" + DATA, "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
        (b"\x80\x04\x95" + DATA, "a Python pickle"),
        (b"PK\x03\x04" + DATA, "a zip archive"),
        (struct.pack("<Q", 100) + b'{"a":1}' + DATA, "a safetensors file"),
        (b"", "it is empty"),
        (b"hello world, hello world, hello world", "does not begin with GGUF"),
    ],
)
def test_r11_another_kind_of_file_is_named(tmp_path: Path, content: bytes, kind: str) -> None:
    message = refused(tmp_path, content)
    assert "not a GGUF" in message and kind in message


@pytest.mark.parametrize(("version", "word"), [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")])
def test_an_unknown_version_is_refused(tmp_path: Path, version: int, word: str) -> None:
    assert word in refused(tmp_path, padded(header(version=version)) + DATA)


@pytest.mark.parametrize("count", [2**64 - 1, 2**40, MAX_KEYS + 1])
def test_r6_absurd_counts_are_refused(tmp_path: Path, count: int) -> None:
    assert "keys" in refused(tmp_path, header(keys=count) + DATA)
    assert "tensors" in refused(tmp_path, header(tensor_count=max(count, 1 << 20)) + DATA)


def test_r6_counts_past_the_end_of_the_file_are_refused(tmp_path: Path) -> None:
    assert "damaged" in refused(tmp_path, header(keys=len(METADATA) + 1))
    assert "damaged" in refused(tmp_path, header(tensor_count=3))


@pytest.mark.parametrize("count", [2**61, 2**64 - 1, MAX_ARRAY + 1, MAX_ARRAY, 5000])
@pytest.mark.parametrize("kind", [STRING, U32, U64, BOOL])
def test_r7_absurd_arrays_are_refused(tmp_path: Path, count: int, kind: int) -> None:
    entry = text("x") + struct.pack("<IIQ", ARRAY, kind, count)
    content = header(keys=len(METADATA) + 1) + entry
    assert "damaged" in refused(tmp_path, content)


@pytest.mark.parametrize(
    ("entry", "count"),
    [(struct.pack("<IIQ", ARRAY, I32, 4096) + bytes(4 * 4096), 512), (struct.pack("<I", STRING) + text("x" * 60_000), 35)],
)
def test_r7_many_values_that_each_are_small_enough_are_refused(tmp_path: Path, entry: bytes, count: int) -> None:
    entries = b"".join(text(f"x{number}") + entry for number in range(count))
    assert "larger than those of any model" in refused(tmp_path, header(keys=len(METADATA) + count) + entries)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 10**6])
def test_r7_absurd_texts_are_refused(tmp_path: Path, length: int) -> None:
    head = header(keys=len(METADATA) + 1)
    refused(tmp_path, head + text("x") + struct.pack("<IQ", STRING, length) + DATA)
    refused(tmp_path, head + struct.pack("<Q", length) + DATA)
    refused(tmp_path, head + text("x") + struct.pack("<IIQQ", ARRAY, STRING, 2, length) + DATA)


def test_r7_arrays_of_arrays_are_refused(tmp_path: Path) -> None:
    entry = text("x") + struct.pack("<IIQ", ARRAY, ARRAY, 1)
    assert "unknown type 9" in refused(tmp_path, header(keys=len(METADATA) + 1) + entry + DATA)


@pytest.mark.parametrize("shape", [(2**63, 2), (2**32, 2**32), (2**62, 2**62, 2**62, 2**62), (0,), (64, 0)])
def test_r8_sizes_that_overflow_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    assert "shape" in refused(tmp_path, padded(header(tensors=[("w", shape, I8, 0)])) + DATA)


def test_r8_offsets_that_overflow_when_added_are_refused(tmp_path: Path) -> None:
    tensors = [("a", (64,), I8, 0), ("b", (64,), I8, 2**64 - 32)]
    assert "cut short" in refused(tmp_path, padded(header(tensors=tensors)) + DATA)


def test_r9_a_tensor_larger_than_the_file_is_refused(tmp_path: Path) -> None:
    assert "cut short" in refused(tmp_path, padded(header(tensors=[("w", (4097,), I8, 0)])) + DATA)
    read(tmp_path, padded(header(tensors=[("w", (4096,), I8, 0)])) + DATA)


@pytest.mark.parametrize("kind", [2**32 - 1, 4, 5, 31, 43, 1000])
def test_r10_an_unknown_tensor_type_is_refused(tmp_path: Path, kind: int) -> None:
    assert "unknown tensor type" in refused(tmp_path, padded(header(tensors=[("w", (64,), kind, 0)])) + DATA)


@pytest.mark.parametrize("offset", [1, 31, 33, 2**64 - 1])
def test_r10_an_unaligned_offset_is_refused(tmp_path: Path, offset: int) -> None:
    assert "not aligned" in refused(tmp_path, padded(header(tensors=[("w", (64,), I8, offset)])) + DATA)


def test_r10_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    tensors = [("a", (64,), I8, 0), ("b", (64,), I8, 32)]
    assert "overlap" in refused(tmp_path, padded(header(tensors=tensors)) + DATA)
    read(tmp_path, padded(header(tensors=[("a", (64,), I8, 64), ("b", (64,), I8, 0)])) + DATA)


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1, 1)])
def test_r10_too_few_or_many_dimensions_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    assert "dimensions" in refused(tmp_path, padded(header(tensors=[("w", shape, I8, 0)])) + DATA)


@pytest.mark.parametrize("alignment", [0, 13, 33, 2**31])
def test_r10_an_impossible_alignment_is_refused(tmp_path: Path, alignment: int) -> None:
    metadata = with_entry(("general.alignment", U32, alignment))
    assert "alignment" in refused(tmp_path, padded(header(metadata, [ONE])) + DATA)


def test_rows_of_broken_blocks_are_refused(tmp_path: Path) -> None:
    q4_0 = 2
    assert "whole blocks" in refused(tmp_path, padded(header(tensors=[("w", (33,), q4_0, 0)])) + DATA)
    assert read(tmp_path, padded(header(tensors=[("w", (64, 2), q4_0, 0)])) + DATA).tensor_bytes == 4 * 18


def test_what_comes_twice_is_refused(tmp_path: Path) -> None:
    assert "comes twice" in refused(tmp_path, padded(header([*METADATA, METADATA[0]])) + DATA)
    assert "comes twice" in refused(tmp_path, padded(header(tensors=[ONE, ("w", (64,), I8, 64)])) + DATA)


@pytest.mark.parametrize("architecture", ["", "Llama", "../x", "a b", "x" * 65, "\x1b[2J"])
def test_an_impossible_architecture_is_refused(tmp_path: Path, architecture: str) -> None:
    metadata = with_entry(("general.architecture", STRING, architecture))
    assert "architecture" in refused(tmp_path, padded(header(metadata, [ONE])) + DATA)


def test_a_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    assert "split into 3 files" in refused(tmp_path, padded(header([*METADATA, ("split.count", U32, 3)], [ONE])) + DATA)


def test_a_huge_chat_template_is_refused(tmp_path: Path) -> None:
    metadata = with_entry(("tokenizer.chat_template", STRING, "x" * ((1 << 20) + 1)))
    assert "chat template" in refused(tmp_path, padded(header(metadata, [ONE])) + DATA)


def test_long_texts_and_arrays_are_skipped_over_window_borders(tmp_path: Path) -> None:
    words = ["w" * (i % 97) for i in range(60_000)]
    metadata = with_entry(
        ("long", STRING, "y" * (3 << 20)),
        ("many", ARRAY, (STRING, words)),
        ("numbers", ARRAY, (I32, list(range(600_000)))),
        ("last", U32, 7),
    )
    found = read(tmp_path, padded(header(metadata, [ONE])) + DATA)
    assert found.values["last"] == 7
    assert not {"long", "many", "numbers"} & set(found.values)


def test_a_folder_or_nothing_at_the_path_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        inspect(tmp_path)
    with pytest.raises(NotFound, match="no such file"):
        inspect(tmp_path / "none.gguf")


def test_memory_is_weights_and_kv_and_logits(tmp_path: Path) -> None:
    found = inspect(tiny_gguf(tmp_path / "tiny.gguf", 5000))
    small, large = estimate_memory(found, 256, 1, 64), estimate_memory(found, 512, 1, 64)
    assert large - small == 256 * 2 * 2 * (16 + 16) * 2 + 64 * 256 * 2  # tokens x layers x KV heads x (key + value) x f16, and the mask
    assert estimate_memory(found, 256, 2, 64) - small == 2 * 4 * found.vocabulary
    assert small > found.tensor_bytes
    # Whoever embeds has a row of logits for each token of a batch, twice.
    assert estimate_embedding(found, 1, 128) - estimate_embedding(found, 1, 64) > 64 * 2 * 4 * found.vocabulary


def test_openblas_reads_the_formats_that_llama_cpp_unpacks_for_every_token(tmp_path: Path) -> None:
    """Their largest matrix is then once more in memory, as f32."""

    def found(*kinds: int) -> GgufHeader:
        matrices = [(f"blk.{number}.ffn_up.weight", (64, 64), kind, 8192 * number) for number, kind in enumerate(kinds)]
        metadata = [*METADATA, ("llama.feed_forward_length", U32, 64)]
        return read(tmp_path, padded(header(metadata, matrices)) + bytes(8192 * len(kinds)))

    q4_1, q5_1, q8_0 = 3, 7, 8
    assert blas.reads(found(q4_1, q5_1, q8_0))
    assert not blas.reads(found(q4_1, q8_0, q8_0))
    plain, unpacked = (estimate_memory(found(kind), 256, 1, 64) - found(kind).tensor_bytes for kind in (q8_0, q4_1))
    assert unpacked - plain == 4 * 64 * 64


VALID = padded(header(tensors=[("a", (64,), I8, 0), ("b", (64, 2), I8, 64)])) + bytes(192)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=8), st.integers(0, len(VALID)))
def test_a_mutated_file_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], cut: int
) -> None:
    content = bytearray(VALID)
    for at, byte in changes:
        content[at] = byte
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    for data in (bytes(content), bytes(content[:cut])):
        path.write_bytes(data)
        try:
            found = inspect(path)
        except SwarmError as error:
            assert isinstance(error, UsageError)
        else:
            assert 0 <= found.tensor_bytes <= len(data)
            assert estimate_memory(found, 4096, 4, 512) > 0
