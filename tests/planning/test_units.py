"""Tests of ``planning/units.py``."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_ddg.planning.units import parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [(5, 5), ("1000", 1000), ("12GB", 12 * 10**9), ("2 GiB", 2 << 30), ("800mib", 800 << 20), (" 1.5kB ", 1500)],
)
def test_bytes_are_read(text: int | str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("value", [0, -1, True, 1.5, None, "", "GB", "12 XB", "-3MB", "0GB"])
def test_what_is_no_number_of_bytes_is_refused(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"is not a number of bytes: give a positive integer, or .* '12GB' or '800MiB'"
    ):
        parse_bytes(value)


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (4194304, "4.19 MB"), (2.5e10, "25 GB")])
def test_bytes_are_shown(count: float, text: str) -> None:
    assert show_bytes(count) == text
