from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.cid import Cid
from registry.codes import code_of_cid, code_of_infohash_v2, codes_of, is_code, normalise, short, told_apart
from registry.errors import Malformed

DIGESTS = st.binary(min_size=32, max_size=32)


def test_known_codes() -> None:
    # base32 of RFC 4648, section 10: "foobar" is MZXW6YTBOI
    infohash = b"foobar".hex() + "00" * 26
    assert code_of_infohash_v2(infohash).startswith("mzxw6ytboi")
    assert short(code_of_infohash_v2(infohash)) == "mzxw6yt"
    cid = Cid("raw", bytes.fromhex(infohash)).canonical
    assert codes_of(cid, "00" * 32) == ("a" * 52, code_of_cid(cid))
    assert codes_of(cid, None) == (code_of_cid(cid),)


@given(DIGESTS)
def test_a_code_is_a_function_of_the_digest(digest: bytes) -> None:
    code = code_of_infohash_v2(digest.hex())
    assert len(code) == 52 and is_code(code) and normalise(code) == code
    assert code_of_cid(Cid("raw", digest).canonical) == code_of_cid(Cid("dag-pb", digest).canonical) == code


@pytest.mark.parametrize("text", ["#ABC2def", "abc2def", " #abc2def\n", "ABC2DEF"])
def test_the_hash_sign_and_the_case_are_optional(text: str) -> None:
    assert normalise(text) == "abc2def"


@pytest.mark.parametrize(
    "text", ["", "#", "abc2de", "a" * 53, "abc1def", "abc2de/", "../abc2def", "##abc2def", "abc2 def", "abc2de\u212a", "#abc2def\x00"]
)
def test_what_is_no_code_is_malformed(text: str) -> None:
    assert not is_code(text)
    with pytest.raises(Malformed):
        normalise(text)


@pytest.mark.parametrize("infohash", ["", "0" * 40, "0" * 63, "G" * 64, "A" * 64, "0" * 65])
def test_only_a_v2_infohash_has_a_code(infohash: str) -> None:
    with pytest.raises(Malformed):
        code_of_infohash_v2(infohash)


def test_codes_are_told_apart_by_as_little_as_will_do() -> None:
    a, b, c = "aaaaaaab" + "c" * 44, "aaaaaaac" + "c" * 44, "z" * 52
    assert told_apart([a, b, c]) == ("aaaaaaab", "aaaaaaac", "zzzzzzzz")
    assert told_apart([a, c]) == (a[:7], c[:7])
    assert told_apart([a, a]) == (a[:7], a[:7])
    assert told_apart([]) == ()
