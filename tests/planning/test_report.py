"""Tests of ``planning/report.py``: what the tables say and how they are printed."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from torch import nn

from lightning_ddg.network.cut import CostModel, Costs, Cut
from lightning_ddg.network.layers import Chain
from lightning_ddg.network.profile import Profile
from lightning_ddg.planning.report import cut_table, link_line, print_cut, uneven_line
from lightning_ddg.planning.units import show_bytes


def make_chain() -> Chain:
    sizes = [(4, 4), (4, 4), (4, 4), (4, 300), (300, 4)]
    return Chain([(f"net.{i}", nn.Linear(a, b)) for i, (a, b) in enumerate(sizes)])


def cut_of(chain: Chain, starts: list[int], costs: list[float], unit: str) -> Cut:
    return Cut(chain, starts, Costs(costs, unit))


def render(chain: Chain, starts: list[int], costs: list[float], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(cut_table(cut_of(chain, starts, costs, "measured time")))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rows() -> None:
    table = cut_table(cut_of(make_chain(), [3, 4], [1.0, 1.0, 2.0, 3.0, 1.0], "measured time"))
    assert [column.header for column in table.columns] == [
        "stage",
        "layers",
        "parameters",
        "share of measured time",
        "delay",
    ]
    rows = list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))
    assert rows == [
        ("1", "net.0 … net.2 (3)", "60", "50.0%", "2"),
        ("2", "net.3 (1)", "1,500", "37.5%", "1"),
        ("3", "net.4 (1)", "1,204", "12.5%", "0"),
    ]


def test_slack_makes_delays_longer() -> None:
    table = cut_table(cut_of(make_chain(), [3, 4], [1.0, 1.0, 2.0, 3.0, 1.0], "measured time"), slack=2)
    assert list(table.columns[4].cells) == ["6", "3", "0"]


@pytest.mark.parametrize(
    ("latency", "slack", "line"),
    [
        (0.0, 0, None),
        # Of stages of 10, 10 and 5 ms.
        (0.0002, 0, "link: 0.20 ms one way, 1 GB/s"),
        (0.019, 0, "link: 19.0 ms one way, 1 GB/s; slack=4 would hide it: 10.0 ms per batch instead of 33.7 ms"),
        (0.019, 4, "link: 19.0 ms one way, 1 GB/s"),
    ],
)
def test_a_measured_link_is_said_and_what_would_hide_it(
    latency: float, slack: int, line: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = Profile([0.002] * 5, [0.003] * 5, [0, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0] * 5, [1_000] * 5)
    model = CostModel(profile, seconds_per_byte=1e-9, latency=latency, slack=slack)
    cut = Cut(make_chain(), [2, 4], Costs.measured(model))
    assert link_line(cut) == line
    print_cut(cut, slack=slack)
    assert ("link: " in capsys.readouterr().out) == (line is not None)
    assert link_line(cut_of(make_chain(), [3], [1.0] * 5, "parameters")) is None


def test_what_was_measured_has_columns_of_its_own() -> None:
    profile = Profile([1.0] * 5, [1.0] * 5, [0, 10, 20, 3_000, 4_000_000], [0, 1, 2, 300, 400], [0] * 5, [1_000] * 5)
    model = CostModel(profile, optimizer_copies=1)
    table = cut_table(Cut(make_chain(), [3, 4], Costs.measured(model)))
    assert [column.header for column in table.columns][-2:] == ["sends per batch", "memory"]
    # The activation on to the next stage, the gradient back to the one before.
    assert list(table.columns[-2].cells) == ["3 kB", "4 MB", "400 B"]
    memory = model.stage_memory([3, 4])
    assert list(table.columns[-1].cells) == [show_bytes(size) for size in memory]
    assert memory != CostModel(profile, optimizer_copies=2).stage_memory([3, 4])


def test_a_stage_that_does_its_forward_again_has_a_larger_share() -> None:
    nothing = [0] * 5
    model = CostModel(Profile([1.0] * 5, [1.0] * 5, nothing, nothing, nothing, nothing), recompute=True)
    table = cut_table(Cut(make_chain(), [2], Costs.measured(model)))
    assert list(table.columns[3].cells) == ["50.0%", "50.0%"]  # 2 layers of 3, and 3 layers of 2


def test_costs_of_zero_have_a_share_of_zero() -> None:
    table = cut_table(cut_of(Chain([("a", nn.ReLU()), ("b", nn.ReLU())]), [1], [0.0, 0.0], "parameters"))
    assert list(table.columns[3].cells) == ["0.0%", "0.0%"]


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(2, 2)
    chain = Chain([("a", layer), ("b", layer)])
    assert list(cut_table(cut_of(chain, [], [1.0, 1.0], "parameters")).columns[2].cells) == ["6"]


def test_long_names_are_folded_not_lost_at_width_80() -> None:
    names = [f"backbone.encoder.layers.block{i:02}.attention_and_feed_forward" for i in range(4)]
    text = render(Chain([(name, nn.Linear(1000, 1000)) for name in names]), [2], [1.0] * 4, 80)
    assert max(map(len, text.splitlines())) <= 80
    cells = [line.split("│")[2].strip() for line in text.splitlines() if line.startswith("│")]
    assert names[0] in "".join(cells)
    assert names[3] in "".join(cells)
    assert "2,002,000" in text
    assert "50.0%" in text


def test_labels_are_not_markup() -> None:
    chain = Chain([("layers[red]", nn.ReLU()), ("layers[/red]", nn.ReLU())])
    assert "layers[red] … layers[/red] (2)" in render(chain, [], [1.0, 1.0], 80)


def test_print_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_cut(cut_of(make_chain(), [3, 4], [1.0] * 5, "measured time"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "Network cut into 3 stages"
    assert max(map(len, lines)) <= 100
    assert any("share of" in line for line in lines)
    assert any("measured time" in line for line in lines)
    assert lines[-1] == 'split_points: ["net.3", "net.4"]'


def test_the_line_to_paste_is_never_broken(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"layers[{'x' * 60}{i}]" for i in range(6)]
    print_cut(cut_of(Chain([(name, nn.ReLU()) for name in names]), [1, 2, 3, 4, 5], [1.0] * 6, "parameters"))
    line = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(line.removeprefix("split_points: ")) == names[1:]


def test_one_stage(capsys: pytest.CaptureFixture[str]) -> None:
    print_cut(cut_of(make_chain(), [], [1.0] * 5, "parameters"))
    out = capsys.readouterr().out
    assert out.splitlines()[0].strip() == "Network cut into 1 stage"
    assert "split_points: []" in out


def test_an_uneven_cut_says_why() -> None:
    chain = make_chain()
    line = uneven_line(cut_of(chain, [4], [1.0, 1.0, 1.0, 6.0, 1.0], "measured time"))
    assert line is not None
    assert line.startswith("Stage 1 has 90% of the measured time and sets the pace of all: 4 places to cut")
    assert "the dearest layer is 'net.3'" in line
    assert "`configure_stages()`, or fewer stages" in line
    assert uneven_line(cut_of(chain, [3], [1.0, 1.0, 1.0, 2.0, 1.0], "measured time")) is None
    assert uneven_line(cut_of(chain, [4], [1.0, 1.0, 1.0, 6.0, 1.0], "parameters")) is None
    two = Chain([("net.0", nn.Linear(4, 4)), ("net.1", nn.Linear(4, 4))])
    assert "one place to cut" in str(uneven_line(cut_of(two, [1], [1.0, 9.0], "FLOPs")))


def test_an_uneven_cut_is_printed_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    print_cut(cut_of(make_chain(), [4], [1.0, 1.0, 1.0, 6.0, 1.0], "measured time"))
    assert "Stage 1 has 90% of the measured time" in capsys.readouterr().out
