"""What strangers wrote never reaches a terminal as it is."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmctl import render


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("SmolLM2-135M Q4_1.gguf", "SmolLM2-135M Q4_1.gguf"),
        ("\x1b[2Jx", "\\x1b[2Jx"),
        ("\x1b]52;c;aGk=\x07", "\\x1b]52;c;aGk=\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("a\u202egfug.exe", "a\\u202egfug.exe"),
        ("a\u200bb\ufeff", "a\\u200bb\\ufeff"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("p\u0430ypal", "p\\u0430ypal"),  # a Cyrillic letter among Latin ones
        ("\u043c\u043e\u0434\u0435\u043b\u044c", "\u043c\u043e\u0434\u0435\u043b\u044c"),  # a Russian word
        ("mod\u00e8le \u6a21\u578b", "mod\u00e8le \u6a21\u578b"),
        ("a\u00a0b", "a\\xa0b"),
    ],
)
def test_r12_r17_names_are_escaped(name: str, shown: str) -> None:
    assert render.safe(name) == shown


@given(st.text())
def test_a_safe_name_is_one_visible_line(name: str) -> None:
    shown = render.safe(name)
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in shown)
    assert len(shown.splitlines()) <= 1


def test_a_safe_name_is_not_endless() -> None:
    assert len(render.safe("x" * 10_000)) == 403


@given(st.text(), st.integers(0, 50))
def test_r16_answers_are_harmless_however_they_are_split(text: str, place: int) -> None:
    shown = render.answer_text(text[:place]) + render.answer_text(text[place:])
    assert shown == render.answer_text(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t" for c in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def test_answers_keep_what_text_needs() -> None:
    family = "\U0001f468\u200d\U0001f469"  # joined by a zero-width joiner
    assert render.answer_text(f"a\r\n\tb {family} \u05d0\u200f") == f"a\n\tb {family} \u05d0\u200f"
    assert render.answer_text("\x1b[31mred") == "\\x1b[31mred"


@pytest.mark.parametrize(
    ("count", "shown"), [(None, "?"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (98 * 1024**2, "98.0 MiB"), (5 * 1024**4, "5.0 TiB")]
)
def test_sizes(count: int | None, shown: str) -> None:
    assert render.size(count) == shown


def test_times_and_keys() -> None:
    now = datetime(2026, 11, 21, tzinfo=UTC)
    assert render.from_now("2026-11-21T00:00:09Z", now) == "in 9 s"
    assert render.from_now("2026-11-20T23:59:00Z", now) == "60 s ago"
    assert (render.short_key("ed25519:0123456789"), render.short_key(None)) == ("01234567", "-")


def test_a_piped_table_is_plain() -> None:
    text = render.table(("a", "name"), [("1", "[bold]x[/bold]"), ("22", "y\x1b")], "none")
    assert text.splitlines() == ["a   name", "1   [bold]x[/bold]", "22  y\\x1b"]
    assert render.table(("a",), [], "none") == "none"
