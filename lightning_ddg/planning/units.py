"""Bytes and seconds as text: parsed and shown."""

from __future__ import annotations

import re

_FACTORS = {"B": 1}
_FACTORS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
_FACTORS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)}


def parse_bytes(value: int | str) -> int:
    """Return a number of bytes: ``1000`` and ``"1000"`` as they are, ``"12GB"`` as 12 * 10^9, ``"2 GiB"`` as 2 * 2^30.

    Raises:
        ValueError: It is no positive number of bytes.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value) if isinstance(value, str) else None
    factor = None if match is None else _FACTORS.get(match[2].upper() or "B")
    if match is None or factor is None or float(match[1]) == 0:
        raise ValueError(
            f"{value!r} is not a number of bytes: give a positive integer, or a text such as '12GB' or '800MiB'."
        )
    return round(float(match[1]) * factor)


def show_bytes(count: float) -> str:
    """Return a number of bytes with three digits and a decimal unit, e.g. ``"4.19 MB"``."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def show_ms(seconds: float) -> str:
    """Return seconds as milliseconds with three digits, or as many as there are before the point."""
    number = seconds * 1e3
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:,.{digits}f} ms"
