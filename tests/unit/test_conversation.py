"""What a conversation remembers, and what typed lines mean."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmctl.conversation import MAX_TEXT, ORDERS, Conversation, Lines, Order, Say, choose, from_document, means, parse, usage
from swarmctl.failure import NOT_FOUND, USAGE, Failure

ROW = {
    "code": "abc2def", "cid": "bafyx", "manifest": "bafkm", "name": "tiny", "infohash": "1" * 40,
    "infohash_v2": None, "magnet": None, "serving": True,
}  # fmt: skip


def said(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages()]


def talked(*turns: str, system: str | None = None) -> Conversation:
    conversation = Conversation(system=system)
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        conversation.ask(question)
        conversation.answered(answer)
    return conversation


# -- what is remembered -------------------------------------------------------------------------------------------------


def test_every_question_carries_what_was_said_before() -> None:
    conversation = talked("a", "1", system="be brief")
    assert conversation.ask("b") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "b"},
    ]


def test_a_question_without_an_answer_is_taken_back_and_can_be_asked_again() -> None:
    conversation = talked("a", "1")
    conversation.ask("b")
    conversation.take_back()
    assert said(conversation) == ["a", "1"]
    assert [message["content"] for message in conversation.again()] == ["a", "1", "b"]
    conversation.answered("2")
    assert said(conversation) == ["a", "1", "b", "2"]


def test_asking_again_replaces_the_answer_only_when_there_is_a_new_one() -> None:
    conversation = talked("a", "1", "b", "2")
    assert [message["content"] for message in conversation.again()] == ["a", "1", "b"]
    conversation.take_back()
    assert said(conversation) == ["a", "1", "b", "2"]
    conversation.again()
    conversation.answered("3")
    assert said(conversation) == ["a", "1", "b", "3"]


def test_the_same_question_twice_of_which_the_second_failed() -> None:
    conversation = talked("a", "1")
    conversation.ask("a")
    conversation.take_back()
    conversation.again()
    assert said(conversation) == ["a", "1", "a"]


def test_clear_keeps_the_system_prompt_and_the_model_only() -> None:
    conversation = talked("a", "1", system="be brief")
    conversation.model = "tiny"
    conversation.clear()
    assert conversation.document() == {"model": "tiny", "messages": [{"role": "system", "content": "be brief"}]}
    with pytest.raises(Failure) as failed:
        conversation.again()
    assert failed.value.code == USAGE


def test_saved_and_resumed_it_is_the_same() -> None:
    conversation = talked("a", "1", "b", "2", system="be brief")
    conversation.model = "#abc2def"
    resumed = from_document({**conversation.document(), "usage": {}})
    assert resumed.document() == conversation.document()
    assert [message["content"] for message in resumed.again()] == ["be brief", "a", "1", "b"]
    open_question = from_document({"messages": [{"role": "user", "content": "a"}]})
    assert (said(open_question), open_question.model) == ([], None)
    assert [message["content"] for message in open_question.again()] == ["a"]


@pytest.mark.parametrize(
    "document",
    [
        None, [], {}, {"messages": None}, {"messages": {}}, {"messages": ["a"]}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "tool", "content": "a"}]}, {"messages": [{"role": "user", "content": [1]}]}, {"messages": [], "model": 1},
        {"messages": [{"role": ["user"], "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
    ],
)  # fmt: skip
def test_what_is_no_conversation(document: Any) -> None:
    with pytest.raises(ValueError):
        from_document(document)


# -- what is typed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        ("hello", Say("hello")),
        ("  indented", Say("  indented")),
        ("", None),
        (" \t", None),
        ("//usr/bin", Say("/usr/bin")),
        ("/clear", Order("clear", "")),
        (" /clear ", Order("clear", "")),
        ("/model", Order("model", "")),
        ("/model  #abc2def ", Order("model", "#abc2def")),
        ("/system be brief, and kind", Order("system", "be brief, and kind")),
        ("/save a file.json", Order("save", "a file.json")),
        ("1/2", Say("1/2")),
    ],
)
def test_a_line(line: str, meaning: Say | Order | None) -> None:
    assert parse(line) == meaning
    assert Lines().feed(line) == meaning


@pytest.mark.parametrize("line", ["/", "/ clear", "/nonsense", "/CLEAR", "/usr/bin/python", "/clear now", "/retry 1", "/exit 0"])
def test_an_unknown_order_is_not_sent(line: str) -> None:
    with pytest.raises(Failure) as failed:
        parse(line)
    assert failed.value.code == USAGE
    assert failed.value.hint


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["a\\", "b"], "a\nb"),
        (["a\\", "", "never"], "a\n"),
        (["a\\", "/clear"], "a\n/clear"),
        (['"""a', "", '  b"""'], "a\n\n  b"),
        (['"""', "/clear", "c\\", '"""'], "/clear\nc\\"),
        (['"""a"""'], "a"),
        (['"""a\nb"""'], "a\nb"),  # pasted
        (["a\nb"], "a\nb"),
        (['say """'], 'say """'),
        (["/system a\\", "b"], None),
    ],
)
def test_several_lines(lines: list[str], text: str | None) -> None:
    typed = Lines()
    for line in lines:
        meaning = typed.feed(line)
        if meaning is not None:
            break
    assert not typed.open
    assert meaning == (Say(text) if text is not None else Order("system", "a\nb"))


def test_lines_that_do_not_come_to_an_end() -> None:
    typed = Lines()
    assert typed.feed("a\\") is None and typed.open
    assert typed.end() == Say("a")
    assert typed.feed('"""a') is None and typed.open
    with pytest.raises(Failure):
        typed.end()
    assert not typed.open and typed.end() is None
    typed.feed('"""a')
    typed.drop()
    assert typed.feed("b") == Say("b")
    assert typed.feed('""""""') is None and not typed.open


def test_a_text_has_a_ceiling() -> None:
    typed = Lines()
    assert typed.feed("a" * (MAX_TEXT - 2) + "\\") is None
    with pytest.raises(Failure):
        typed.feed("bcd")
    assert not typed.open


@given(st.lists(st.text(), max_size=8))
def test_whatever_is_typed_has_a_meaning_or_is_an_error(lines: list[str]) -> None:
    typed = Lines()
    for line in lines:
        try:
            meaning = typed.feed(line)
        except Failure as failure:
            assert failure.code == USAGE and not typed.open
            continue
        assert meaning is None or (isinstance(meaning, Say) and meaning.text.strip()) or meaning.name in ORDERS


def test_help_names_every_order() -> None:
    assert all(any(line.startswith(f"/{name}") for line in usage().splitlines()) for name in ORDERS)


# -- which model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "same"), [
    ("abc2def", True), ("#ABC2DEF", True), ("#abc2defgh", True), ("abc2de", False), ("bafyx", True), ("ipfs://bafyx", True),
    ("bafkm", True), ("tiny", True), ("1" * 40, True), ("other", False), ("", False), (None, False),
])  # fmt: skip
def test_which_row_is_meant(model: str | None, same: bool) -> None:
    assert means(model, ROW) is same


def test_a_model_that_nobody_has_cannot_be_chosen() -> None:
    assert choose("tiny", [ROW]) is True
    assert choose("tiny", [{**ROW, "serving": False, "local": True}]) is True
    assert choose("tiny", [{**ROW, "serving": False, "local": False}]) is False
    with pytest.raises(Failure) as failed:
        choose("other", [ROW])
    assert failed.value.code == NOT_FOUND
