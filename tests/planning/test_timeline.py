"""Tests of ``planning/timeline.py``: what is in a picture is read back from its SVG form, where text stays text."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot

from lightning_ddg.planning.simulate import Work, simulate, steady_state
from lightning_ddg.planning.timeline import Panel, draw_timeline
from lightning_ddg.planning.units import show_ms

TIMES = Work([0.010, 0.010], [0.020, 0.020], [0.0], [0.0])


def panel(title: str = "a schedule") -> Panel:
    return Panel(title, simulate(TIMES, 8), 2, steady_state(TIMES).period)


def texts(path: Path) -> list[str]:
    return [re.sub("<[^>]*>", "", text).strip() for text in re.findall(r"<text.*?</text>", path.read_text(), re.DOTALL)]


def test_a_row_for_each_stage_a_number_in_each_box_and_the_period_marked(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "picture.svg"
    draw_timeline([panel()], path, span=(0.0, 0.15))
    found = texts(path)
    assert {"a schedule", "stage 1", "stage 2", "time (ms)", "period 30.0 ms", "forward", "backward", "wait"} <= {
        *found
    }
    numbers = [text for text in found if text in "0123456789"]
    # Stage 1: F0 F1, B0 F2 B1 F3 B2 F4 B3; stage 2: F0 B0 ... F4, and the half of B4; and the 0 of the axis.
    assert sorted(numbers) == sorted("01" + "0213243" + "0011223344" + "0")


def test_only_the_span_is_drawn(tmp_path: Path) -> None:
    draw_timeline([panel()], tmp_path / "picture.svg", span=(0.07, 0.10))
    # Stage 1: B0 from 40 to 60, F2 to 70, B1 to 90, F3 to 100; stage 2: F2 from 70 to 80, B2 to 100.
    numbers = [text for text in texts(tmp_path / "picture.svg") if text in "0123456789"]
    assert sorted(numbers) == sorted("13" + "22" + "05")


def test_panels_share_a_scale(tmp_path: Path) -> None:
    draw_timeline([panel("above"), panel("below")], tmp_path / "picture.svg", span=(0.0, 0.1))
    found = texts(tmp_path / "picture.svg")
    assert {"above", "below"} <= {*found}
    assert found.count("time (ms)") == 1
    assert found.count("period 30.0 ms") == 2


def test_the_same_numbers_give_the_same_file(tmp_path: Path) -> None:
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for path in (first, second):
        draw_timeline([panel()], path, span=(0.0, 0.1))
    assert first.read_text() == second.read_text()


def test_png_by_the_suffix_and_no_global_state(tmp_path: Path) -> None:
    names = ("font.family", "svg.fonttype", "svg.hashsalt")
    before = [pyplot.rcParams[name] for name in names]
    draw_timeline([panel()], str(tmp_path / "picture.PNG"), span=(0.0, 0.1))
    assert (tmp_path / "picture.PNG").read_bytes().startswith(b"\x89PNG")
    assert not pyplot.get_fignums()
    assert [pyplot.rcParams[name] for name in names] == before


@pytest.mark.parametrize("name", ["picture.jpg", "picture"])
def test_an_unknown_kind_of_picture_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name}' is of no known kind: let its name end in \.png or \.svg"):
        draw_timeline([panel()], tmp_path / name, span=(0.0, 0.1))


@pytest.mark.parametrize(("panels", "span"), [([], (0.0, 1.0)), ([panel()], (1.0, 1.0))])
def test_an_empty_picture_is_refused(panels: list[Panel], span: tuple[float, float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{len(panels)} panels from {span[0]} s to 1.0 s: there is nothing to draw"):
        draw_timeline(panels, tmp_path / "picture.png", span=span)


def test_without_matplotlib_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'matplotlib is missing: pip install "lightning-ddg\[plot\]"'):
        draw_timeline([panel()], tmp_path / "picture.png", span=(0.0, 0.1))


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0001234, "0.12 ms"), (0.009996, "10.0 ms"), (0.0999, "99.9 ms"), (0.12345, "123 ms"), (12.3456, "12,346 ms")],
)
def test_milliseconds(seconds: float, shown: str) -> None:
    assert show_ms(seconds) == shown
