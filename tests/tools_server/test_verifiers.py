"""Verifiers: what counts as right, and that a verdict can be trusted."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools_server.verifiers import VERIFIER, Verdict, digest, extract, last_number, normalize, verify


def value(verifier, answer):
    return verify(VERIFIER.validate_python(verifier), answer).value


EXACT = {"kind": "exact", "answers": ["The Eiffel Tower", "Eiffelturm"]}
NUMERIC = {"kind": "numeric", "answer": 1234.5, "abs_tolerance": 0.05, "rel_tolerance": 0}
CHOICE = {"kind": "choice", "answer": "B"}
SET = {"kind": "set", "answers": ["red", "Green", "blue"]}
JSON = {"kind": "json", "answer": {"a": [1, 2.0, True], "b": None}}
CONTAINS = {"kind": "contains", "texts": ["$1,200", "Monday"]}


@pytest.mark.parametrize(
    ("verifier", "answer", "expected"),
    [
        (EXACT, "eiffel tower", 1),
        (EXACT, "  EIFFELTURM! ", 1),
        (EXACT, "<think>Eiffel Tower?</think> Louvre", 0),
        (EXACT, "I say <answer>Louvre</answer>, no, <answer>the Eiffel-Tower</answer>", 1),
        (EXACT, r"so \boxed{Eiffel Tower}", 1),
        (EXACT, "The Eiffel Tower or the Louvre", 0),
        (EXACT | {"normalize": False}, "eiffel tower", 0),
        (EXACT | {"normalize": False}, "Eiffelturm", 1),
        (NUMERIC, "about 1,234.5 dollars", 1),
        (NUMERIC, "first 7, then 1234.55", 1),
        (NUMERIC, "1234.56", 0),
        (NUMERIC, "none", 0),
        ({"kind": "numeric", "answer": 0.75}, "3/4", 1),
        ({"kind": "numeric", "answer": 0.75}, "3/0", 0),
        ({"kind": "numeric", "answer": -2000}, "-2e3", 1),
        ({"kind": "numeric", "answer": 0}, "1e999", 0),
        (CHOICE, "B", 1),
        (CHOICE, "The answer is (B).", 1),
        (CHOICE, "B or C", 0),
        (CHOICE, "Because", 0),
        (SET, "blue, red; green", 1),
        (SET, "blue\nred", 0),
        (SET, "blue, red, green, pink", 0),
        (JSON, '{"b": null, "a": [1.0, 2, true]}', 1),
        (JSON, '{"b": null, "a": [1, 2, 1]}', 0),
        (JSON, '{"a": [1, 2, true]}', 0),
        (JSON, "[" * 100_000, 0),
        (CONTAINS, "On monday you get $1200 back.", 1),
        (CONTAINS, "On Monday.", 0),
    ],
)
def test_what_is_right(verifier, answer, expected):
    assert value(verifier, answer) == expected


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_is_read_back(number):
    assert last_number(f"It is {number!r}") == number


@given(st.text())
def test_any_text_has_one_answer_and_one_normal_form(text):
    assert normalize(normalize(text)) == normalize(text)
    assert extract(extract(text)) is not None
    for verifier in (EXACT, NUMERIC, CHOICE, SET, JSON, CONTAINS):
        verdict = verify(VERIFIER.validate_python(verifier), text)
        assert verdict == verify(VERIFIER.validate_python(verifier), text)
        assert verdict.value in (0.0, 1.0)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -0.1, 1.5])
def test_a_verdict_is_finite_and_bounded_or_refused(number):
    with pytest.raises(ValueError, match=r"a verdict lies in \[0, 1\]"):
        Verdict(number, "", "")
    with pytest.raises(ValueError, match=r"a verdict lies in \[0, 1\]"):
        Verdict(0.0, "", "", components={"x": number})


def test_the_digest_is_of_all_inputs():
    one = VERIFIER.validate_python(EXACT)
    other = VERIFIER.validate_python(EXACT | {"answers": ["Louvre"]})
    digests = {digest(one, "a"), digest(one, "b"), digest(other, "a"), digest(one, "a", "")}
    assert len(digests) == 4
    assert digest(one, "a") == digest(VERIFIER.validate_python(json.loads(json.dumps(EXACT))), "a")
