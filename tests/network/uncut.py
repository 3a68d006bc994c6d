"""Compares a network that is cut with the uncut one: outputs and all gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddg.comm.wire import describe, pack, unpack
from lightning_ddg.core.pytree import map_tensors, tensors_of
from lightning_ddg.network.balance import forbidden_cuts
from lightning_ddg.network.replay.chain import ReplayedChain

Call = tuple[tuple[Any, ...], dict[str, Any]]


def made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double().train()


def doubled(call: Call) -> Call:
    args, kwargs = map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, call)
    return args, kwargs


@contextmanager
def without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def sent(value: Any) -> Any:
    """A value as it arrives in another process, cut off from the graph."""
    packed = pack(value, snapshot=True)
    return unpack(describe(packed.meta), packed.payload)


def cuts_of(chain: ReplayedChain, num_stages: int) -> list[tuple[int, ...]]:
    forbidden = forbidden_cuts(chain)
    allowed = [position for position in range(1, len(chain)) if position not in forbidden]
    return list(combinations(allowed, num_stages - 1))


def segments_of(chain: ReplayedChain, cut: Sequence[int]) -> list[nn.Module]:
    return [chain.segment(start, stop) for start, stop in pairwise([0, *cut, len(chain)])]


def run_parts(chain: ReplayedChain, cut: Sequence[int], call: Call) -> Any:
    first, *others = segments_of(chain, cut)
    value = first(*call[0], **call[1])
    for segment in others:
        value = segment(value)
    return value


def loss_of(output: Any) -> Tensor:
    if getattr(output, "loss", None) is not None:
        output = output.loss
    tensors = [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]
    return sum((tensor.sin().sum() for tensor in tensors), torch.zeros(()))


def grads_of(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    ours, theirs = tensors_of(ours), tensors_of(theirs)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def assert_same_step(chain: ReplayedChain, cut: Sequence[int], call: Call, ours: nn.Module, theirs: nn.Module) -> None:
    """One forward and backward: the same output, and the same gradients."""
    ours.zero_grad()
    theirs.zero_grad()
    torch.manual_seed(1)
    expected = theirs(*call[0], **call[1])
    torch.manual_seed(1)
    output = run_parts(chain, cut, call)
    assert_same(output, expected)
    loss_of(expected).backward()
    loss_of(output).backward()
    grads, expected_grads = grads_of(ours), grads_of(theirs)
    assert [name for name, grad in grads.items() if grad is None] == [n for n, g in expected_grads.items() if g is None]
    assert_same(list(grads.values()), list(expected_grads.values()))
    assert any(grad is not None and grad.abs().max() > 0 for grad in grads.values())
