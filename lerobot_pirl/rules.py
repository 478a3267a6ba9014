"""What an option may be: a test of its value, and the same in words for the sentence that refuses it."""

import ipaddress
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import field, fields, is_dataclass
from typing import Any, NamedTuple

_SHOWN_CHARACTERS = 100


class Rule(NamedTuple):
    """What an option may be.

    Attributes:
        allowed: in words, following "it must be".
        holds: whether a value, of whatever type, is allowed.
    """

    allowed: str
    holds: Callable[[Any], bool]


def integer(low: int, high: int) -> Rule:
    """Return the rule for whole numbers in a range, both ends included; true and false are none."""
    return Rule(f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def is_finite(value: Any) -> bool:
    """Return whether a value is a number that a float can hold; true and false are none."""
    limit = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -limit <= value <= limit


def number(allowed: str, holds: Callable[[float], bool]) -> Rule:
    """Return the rule for finite numbers of which ``holds`` is true."""
    return Rule(allowed, lambda value: is_finite(value) and holds(value))


def between(low: float, high: float) -> Rule:
    """Return the rule for numbers in a range, both ends included."""
    return number(f"a number from {low:g} to {high:g}", lambda value: low <= value <= high)


def one_of(*names: str) -> Rule:
    """Return the rule for one of some names."""
    return Rule(
        "one of " + ", ".join(map(repr, names)), lambda value: isinstance(value, str) and value in names
    )


def many(allowed: str, item: Rule, shortest: int, longest: int) -> Rule:
    """Return the rule for a list of so many items."""

    def holds(value: Any) -> bool:
        return (
            isinstance(value, list | tuple)
            and shortest <= len(value) <= longest
            and all(map(item.holds, value))
        )

    return Rule(allowed, holds)


def or_null(rule: Rule) -> Rule:
    """Return the rule that allows null besides."""
    return Rule(f"{rule.allowed} or null", lambda value: value is None or rule.holds(value))


def is_loopback(host: str) -> bool:
    """Return whether an address is this machine's own, for sure: a name may lead anywhere."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_host(host: Any) -> bool:
    if not isinstance(host, str) or len(host) > 253:
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", host) is not None
    return True


def names_folder(value: Any) -> bool:
    """Return whether a text can be part of a path: without NUL, and no longer than file systems take."""
    return (
        isinstance(value, str)
        and "\0" not in value
        and len(value) <= 1000
        and all(len(part.encode(errors="replace")) <= 200 for part in value.split("/"))
    )


FLAG = Rule("true or false", lambda value: isinstance(value, bool))
HOST = Rule("a host name or an IP address", _is_host)
FILE = Rule("the name of a file", lambda value: isinstance(value, str) and value != "" and "\0" not in value)
POSITIVE = number("a finite number > 0", lambda value: value > 0)


def shown(value: Any) -> str:
    """Return a value as a sentence shows it: long ones cut short."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def refusal(name: str, value: Any, allowed: str) -> ValueError:
    """Return the error for an option whose value is not allowed."""
    return ValueError(f"{name}={shown(value)} is not allowed; it must be {allowed}")


def option(default: Any, rule: Rule) -> Any:
    """Return the dataclass field of an option with its default and its rule."""
    return field(default=default, metadata={"rule": rule})


def of(cls: type) -> dict[str, Rule]:
    """Return the rules of a dataclass's options by name; a group of options has none of its own."""
    return {each.name: each.metadata["rule"] for each in fields(cls) if not is_dataclass(each.type)}


def check(config: Any, rules: Mapping[str, Rule], prefix: str = "") -> None:
    """Raise the ValueError for the first attribute of ``config`` that breaks its rule."""
    for name, rule in rules.items():
        value = getattr(config, name)
        if not rule.holds(value):
            raise refusal(f"{prefix}{name}", value, rule.allowed)
