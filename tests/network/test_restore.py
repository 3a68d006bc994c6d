"""Tests of ``restore.py``: what a trial run has done to a module is undone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_ddg.network.restore import untouched


class Restless(nn.Module):
    """Changes all that a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.late: nn.Module | None = None
        self.register_buffer("count", torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.late is None:
            self.late = nn.Linear(2, 2)
            self.scale = nn.Parameter(torch.ones(()))
        self.count += 1
        self.seen.append(len(x))
        self.inner.weight.data = self.inner.weight.data * 2
        out: Tensor = self.late(self.inner(x))
        return out


def test_what_a_forward_leaves_is_taken_away() -> None:
    module = Restless()
    before = {
        name: (value, value.data_ptr(), value.clone()) for name, value in module.state_dict(keep_vars=True).items()
    }
    with untouched(module.modules()):
        module(torch.ones(3, 2))
        assert len(module.state_dict()) > len(before)
    after = module.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (value, address, copied) in before.items():
        assert after[name] is value
        assert after[name].data_ptr() == address
        assert torch.equal(after[name], copied)
    assert module.late is None
    assert module.seen == []
    assert not hasattr(module, "scale")
