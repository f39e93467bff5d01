"""Verifiers: an answer and what a task says about right answers -> a `Verdict`.

All but unit tests and the judge are pure. A verdict carries the verifier's version and a digest of all that it
saw, so that a stored one can be checked and computed again.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from tools_server.config import Section

VERSION = "1"
"""Raised with every change that can change a verdict."""
JUDGE_PROMPT_VERSION = "1"
"""Of `judge.PROMPT`."""
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?:/\d+)?")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LETTER = re.compile(r"(?<![A-Za-z])([A-Z])(?![A-Za-z])")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`value` in [0, 1], anything else is refused. `valid` False: nothing could be judged, and `value` is no reward."""

    value: float
    reason: str
    inputs_digest: str
    valid: bool = True
    components: dict[str, float] = field(default_factory=dict)
    verifier: str = ""

    def __post_init__(self) -> None:
        for number in (self.value, *self.components.values()):
            if not (math.isfinite(number) and 0.0 <= number <= 1.0):
                raise ValueError(f"a verdict lies in [0, 1]; got {number}")


class Exact(Section):
    """The answer is one of `answers`, letter by letter; with `normalize` after normalisation."""

    kind: Literal["exact"]
    answers: tuple[str, ...] = Field(min_length=1)
    normalize: bool = True


class Numeric(Section):
    """The answer's last number is within `abs_tolerance` + `rel_tolerance` * |answer| of `answer`."""

    kind: Literal["numeric"]
    answer: float = Field(allow_inf_nan=False)
    abs_tolerance: float = Field(0.0, ge=0)
    rel_tolerance: float = Field(1e-6, ge=0)


class Choice(Section):
    """The answer names `answer`, a capital letter, and no other of `letters`."""

    kind: Literal["choice"]
    answer: str = Field(pattern="^[A-Z]$")
    letters: str = Field("ABCD", pattern="^[A-Z]+$")


class SetMatch(Section):
    """The answer's items, separated by commas, semicolons or lines, are `answers` in any order."""

    kind: Literal["set"]
    answers: tuple[str, ...]


class JsonMatch(Section):
    """The answer is JSON that equals `answer`; 1 and 1.0 are equal, the order of keys does not matter."""

    kind: Literal["json"]
    answer: Any


class Contains(Section):
    """The answer holds every one of `texts`, whatever its case: tau2's COMMUNICATE."""

    kind: Literal["contains"]
    texts: tuple[str, ...] = Field(min_length=1)


class UnitTests(Section):
    """The answer is a program; `tests`, appended to it, end without an error in a fresh sandbox of tool `tool`."""

    kind: Literal["tests"]
    tests: str = Field(min_length=1)
    tool: str = "python"


class Judge(Section):
    """The chat tool `tool` says whether the answer agrees with `answers`; where it cannot, `Exact` does."""

    kind: Literal["judge"]
    answers: tuple[str, ...] = Field(min_length=1)
    tool: str


Verifier = Annotated[
    Exact | Numeric | Choice | SetMatch | JsonMatch | Contains | UnitTests | Judge, Field(discriminator="kind")
]
VERIFIER: TypeAdapter[Any] = TypeAdapter(Verifier)


def verify(verifier: Any, answer: str) -> Verdict:
    """The verdict of a pure verifier."""
    value, reason = _RULES[type(verifier)](verifier, extract(answer))
    return Verdict(
        float(value),
        reason,
        digest(verifier, answer),
        components={verifier.kind: float(value)},
        verifier=label(verifier),
    )


def label(verifier: Any) -> str:
    """Name and version, e.g. "numeric/1"."""
    return f"{verifier.kind}/{VERSION}"


def digest(verifier: Any, *inputs: str) -> str:
    """SHA-256 of everything that a verdict rests on."""
    seen = json.dumps([label(verifier), verifier.model_dump(mode="json"), *inputs], sort_keys=True)
    return hashlib.sha256(seen.encode()).hexdigest()


def impure_digest(verifier: Any, question: str, answer: str) -> str:
    """The digest that unit tests and the judge put into their verdicts."""
    if isinstance(verifier, Judge):
        return digest(verifier, JUDGE_PROMPT_VERSION, question, answer)
    return digest(verifier, answer)


def extract(text: str) -> str:
    """The part that is the answer: the last `<answer>` tag, else the last `\\boxed{}`, else everything.

    Text within `<think>` is no answer.
    """
    text = text.rpartition("</think>")[2]
    for pattern in (_TAGGED, _BOXED):
        found = pattern.findall(text)
        if found:
            return found[-1].strip()
    return text.strip()


def normalize(text: str) -> str:
    """Lower case, without articles, punctuation, accents and double spaces, as SQuAD's scorer compares answers."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())  # either may undo the other
    letters = "".join(c for c in plain if not unicodedata.combining(c))
    words = re.sub(r"[^\w\s]", " ", letters).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def last_number(text: str) -> float | None:
    """The last number in `text`: 1,234.5, -2e3 or 3/4."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    numerator, _, denominator = found[-1].replace(",", "").partition("/")
    if denominator and float(denominator) == 0:
        return None
    number = float(numerator) / float(denominator or 1)
    return number if math.isfinite(number) else None


def _exact(verifier: Exact, answer: str) -> tuple[bool, str]:
    rule = normalize if verifier.normalize else str
    right = rule(answer) in {rule(expected) for expected in verifier.answers}
    return right, "equal" if right else f"equals none of {len(verifier.answers)} answers"


def _numeric(verifier: Numeric, answer: str) -> tuple[bool, str]:
    number = last_number(answer)
    if number is None:
        return False, "no number"
    allowed = verifier.abs_tolerance + verifier.rel_tolerance * abs(verifier.answer)
    off = abs(number - verifier.answer)
    return off <= allowed, f"{number:g} is off by {off:g}, allowed {allowed:g}"


def _choice(verifier: Choice, answer: str) -> tuple[bool, str]:
    named = {letter for letter in _LETTER.findall(answer) if letter in verifier.letters}
    return named == {verifier.answer}, f"names {', '.join(sorted(named)) or 'none'}"


def _set_match(verifier: SetMatch, answer: str) -> tuple[bool, str]:
    given = {normalize(item) for item in re.split(r"[,;\n]", answer)} - {""}
    expected = {normalize(item) for item in verifier.answers}
    return given == expected, f"{len(expected - given)} missing, {len(given - expected)} too many"


def _json_match(verifier: JsonMatch, answer: str) -> tuple[bool, str]:
    try:
        given = json.loads(answer)
    except (ValueError, RecursionError):
        return False, "not JSON"
    right = _typed(given) == _typed(verifier.answer)
    return right, "equal" if right else "other JSON"


def _typed(value: Any) -> Any:
    """JSON with its booleans set apart from the numbers that Python takes them for."""
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    return ("bool", value) if isinstance(value, bool) else value


def _contains(verifier: Contains, answer: str) -> tuple[bool, str]:
    plain = answer.casefold().replace(",", "")
    missing = [text for text in verifier.texts if text.casefold().replace(",", "") not in plain]
    return not missing, f"{len(missing)} of {len(verifier.texts)} texts missing"


_RULES: dict[type, Callable[[Any, str], tuple[bool, str]]] = {
    Exact: _exact,
    Numeric: _numeric,
    Choice: _choice,
    SetMatch: _set_match,
    JsonMatch: _json_match,
    Contains: _contains,
}
PURE = tuple(_RULES)
