"""Tests of the loop in ``docs/core.md``: the page's own code, by which both executions train the same weights."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "core.md"


def loop() -> dict[str, Any]:
    """What the code of the page defines."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)  # noqa: S102
    return names


def stages(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.2)).double() for _ in range(count)]


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 3).double(), torch.randn(4, 3).double()) for _ in range(9)]


def weights(parts: list[nn.Module]) -> list[Tensor]:
    return [parameter.detach() for part in parts for parameter in part.parameters()]


def in_a_process(count: int) -> tuple[int, list[Tensor]]:
    # As torchrun sets it.
    os.environ["RANK"] = os.environ["LOCAL_RANK"]
    parts = stages(count)
    names = loop()
    seen: list[int] = []
    connect = names["PipelineRanks"].connect

    class Ranks:
        @staticmethod
        def connect(*args: Any) -> Any:
            made = connect(*args)
            seen.append(made.stage)
            return made

    names["PipelineRanks"] = Ranks
    names["in_processes"](parts, batches())
    return seen[0], weights([parts[seen[0] - 1]])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_and_one_process_train_the_same_weights(count: int) -> None:
    parts = stages(count)
    loop()["in_one_process"](parts, batches())
    assert all((one - other).abs().max() > 0 for one, other in zip(weights(parts), weights(stages(count)), strict=True))
    for stage, got in run_ranks(in_a_process, count, count):
        for mine, alone in zip(got, weights([parts[stage - 1]]), strict=True):
            assert torch.allclose(mine, alone, rtol=0.0, atol=1e-12)
