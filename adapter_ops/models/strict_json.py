"""A strict JSON parser for files of unknown origin, and a check of its results against a pattern."""

import json
import math
from typing import Any

_DEPTH = 32  # levels of nesting
_WORDS = {int: "a whole number", str: "a string", dict: "an object", list: "a list"}


def parse(text: str | bytes, where: str) -> Any:
    """Parses a JSON text without the leniences of Python's parser.

    Args:
        text: the JSON text. Bytes are read as UTF-8.
        where: the subject of error messages, such as "the header of a.safetensors".

    Returns:
        The value of the text: a dict, list, str, int, float, bool or None. Integers fit into 64 bits, and floats are
        finite.

    Raises:
        ValueError: the text is not JSON or not UTF-8, an object has a key twice, a number is NaN, infinite or an
            integer that does not fit into 64 bits, or the nesting is deeper than 32 levels.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite, parse_int=_int64
        )
    except RecursionError:
        raise ValueError(f"{where} nests deeper than {_DEPTH} levels") from None
    except ValueError as error:
        raise ValueError(f"{where} is no valid JSON: {error}") from error
    level = [value]
    for _ in range(_DEPTH):
        level = [
            item for v in level if isinstance(v, (dict, list)) for item in (v.values() if isinstance(v, dict) else v)
        ]
    if level:
        raise ValueError(f"{where} nests deeper than {_DEPTH} levels")
    return value


def check(value: Any, pattern: Any, where: str) -> None:
    """Checks a value that `parse` returned against a pattern.

    Args:
        value: the value to check.
        pattern: one of the types int, str, dict and list; (pattern, None) where null is allowed too; [pattern] for
            every item of a list; {str: pattern} for every value of an object; or a dictionary of the fields that an
            object must have and their patterns. Other fields of the object are ignored.
        where: the subject of error messages, as in `parse`.

    Raises:
        ValueError: the value does not match. The message names the item, key or field, what it is and what it has to
            be. True and False are not whole numbers.
    """
    if isinstance(pattern, tuple):
        if value is None:
            return
        pattern = pattern[0]
    kind = pattern if isinstance(pattern, type) else type(pattern)
    found: Any = type(value)
    if found is not kind:  # isinstance would take True for a whole number
        raise ValueError(f"{where} is {short(value)}, expected {_WORDS[kind]}")
    if isinstance(pattern, list):
        for i, item in enumerate(value):
            check(item, pattern[0], f"{where}, item {i}")
    elif isinstance(pattern, dict) and str in pattern:
        for key, item in value.items():
            check(item, pattern[str], f"{where}, key {short(key)}")
    elif isinstance(pattern, dict):
        for field, inner in pattern.items():
            if field not in value:
                raise ValueError(f"{where} lacks the field {field!r}")
            check(value[field], inner, f"{where}, field {field!r}")


def short(value: Any) -> str:
    """Returns the repr of a value for an error message. What is longer than 40 characters is cut off."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"an object has the key {short(key)} twice")
        fields[key] = value
    return fields


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{short(text)} is not a finite number")
    return number


def _int64(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{short(text)} does not fit into 64 bits")
    return int(text)
