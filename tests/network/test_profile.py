"""Tests of ``network/profile.py``: the figures, and that measuring leaves no trace. New measures join ``MEASURES``."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_ddg.core.stage import Stage
from lightning_ddg.network import profile as cost_module
from lightning_ddg.network.layers import Chain
from lightning_ddg.network.profile import NotTheSame, check_same, flop_costs, measure_profile, parameter_costs


def time_costs(*args: Any, **kwargs: Any) -> list[float]:
    return measure_profile(*args, **kwargs).seconds


MEASURES = [flop_costs, time_costs]
Measure = Callable[..., list[float]]


def chain_of(*layers: nn.Module) -> Chain:
    return Chain([(f"net.{i}", layer) for i, layer in enumerate(layers)])


class Repeated(nn.Module):
    """The same matrix product, some number of times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.weight = nn.Parameter(torch.eye(64))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x @ self.weight
        return x


def test_parameters_count_where_they_are_used_first() -> None:
    first, last = nn.Linear(3, 4), nn.Linear(3, 4)
    last.weight = first.weight
    assert parameter_costs(chain_of(first, nn.ReLU(), last)) == [16.0, 0.0, 4.0]


def test_flops_of_forward_and_backward() -> None:
    # A product of 2 x 4 by 4 x 8 is 128 FLOPs. The first layer's input needs no gradient, so it does two, not three.
    layers = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)
    assert flop_costs(chain_of(*layers), (torch.randn(2, 4),), {}) == [2 * 128 + 1, 1, 3 * 96 + 1]


def test_frozen_layers_before_the_first_trained_one_are_forward_only() -> None:
    frozen = nn.Linear(4, 4).requires_grad_(False)
    assert flop_costs(chain_of(frozen, nn.Linear(4, 4)), (torch.randn(1, 4),), {}) == [32 + 1, 64 + 1]


def test_a_layer_with_fifty_times_the_work_takes_longer() -> None:
    costs = time_costs(chain_of(Repeated(1), Repeated(50), Repeated(1)), (torch.randn(64, 64),), {})
    assert costs[1] > costs[0] > 0
    assert costs[1] > costs[2] > 0


def contents(queue: SimpleQueue[Any]) -> list[Any]:
    """What hooks have left there; what they append to a list is put back as it was."""
    return [queue.get() for _ in range(queue.qsize())]


def test_the_context_is_entered_around_each_forward() -> None:
    entered = []

    @contextmanager
    def context() -> Iterator[None]:
        entered.append("in")
        with torch.autocast("cpu", torch.bfloat16):
            yield
        entered.append("out")

    seen: SimpleQueue[torch.dtype] = SimpleQueue()
    probe = nn.Identity()
    probe.register_forward_hook(lambda _module, _args, output: seen.put(output.dtype))
    time_costs(chain_of(nn.Linear(2, 2), probe), (torch.randn(2, 2),), {}, repeats=1, context=context)
    # Around each layer for the bytes; around all in a warm-up, and in a repeat.
    assert entered == ["in", "out"] * (2 + 1 + 1)
    assert contents(seen) == [torch.bfloat16] * 3


def test_rounds_go_through_all_layers() -> None:
    order: SimpleQueue[str] = SimpleQueue()
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    a.register_forward_hook(lambda *_: order.put("a"))
    b.register_forward_hook(lambda *_: order.put("b"))
    time_costs(chain_of(a, b), (torch.randn(2, 2),), {}, repeats=2)
    # For the bytes, a warm-up, and two repeats.
    assert contents(order) == ["a", "b"] * 4


class Clock:
    """Time that passes only when a layer says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Takes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, forward: float, backward: float) -> Tensor:
        ctx.clock, ctx.seconds = clock, backward
        clock.now += forward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.clock.now += ctx.seconds
        return grad, None, None, None


class Timed(nn.Module):
    def __init__(self, clock: Clock, forward: float, backward: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.times = clock, forward, backward

    def forward(self, x: Tensor) -> Tensor:
        return Takes.apply(x * self.scale, *self.times)  # type: ignore[no-any-return]


class Alone(nn.Module):
    """A layer that does not fit into the device's memory beside what others keep for their backward."""

    def __init__(self, clock: Clock, forward: float, backward: float) -> None:
        super().__init__()
        self.layer = Timed(clock, forward, backward)
        self.waiting = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.waiting:
            raise torch.OutOfMemoryError("too large")
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("fits", [True, False])
def test_seconds_are_those_of_training(monkeypatch: pytest.MonkeyPatch, fits: bool) -> None:
    clock = Clock()
    monkeypatch.setattr(cost_module, "time", clock)
    ones_like = torch.ones_like

    def slow_ones_like(tensor: Tensor) -> Tensor:
        clock.now += 100.0
        return ones_like(tensor)

    # In training the gradients come from the next layer.
    monkeypatch.setattr(torch, "ones_like", slow_ones_like)
    first, second = Timed(clock, 2.0, 4.0), Alone(clock, 5.0, 6.0)
    order: SimpleQueue[str] = SimpleQueue()
    first.register_forward_hook(lambda *_: order.put("forward"))

    def kept(_module: nn.Module, _args: Any, output: Tensor) -> None:
        second.waiting += not fits
        output.register_hook(lambda _gradient: second.__setattr__("waiting", 0))

    first.register_forward_hook(kept)
    profile = measure_profile(chain_of(first, second, nn.ReLU(inplace=True)), (torch.randn(2),), {}, repeats=3)
    assert profile.forward == pytest.approx([2, 5, 0], abs=1e-8)
    assert profile.backward == pytest.approx([4, 6, 0], abs=1e-8)
    assert order.qsize() == (5 if fits else 9), (
        "for the bytes, a warm-up, three repeats; those that did not fit once more"
    )


class TimedSplit(nn.Module):
    """Two tensors for the next layer, one of them as it came: what a cut inside a residual block sees."""

    def __init__(self, clock: Clock, forward: float, backward: float) -> None:
        super().__init__()
        self.layer = Timed(clock, forward, backward)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


class TimedJoin(nn.Module):
    def __init__(self, clock: Clock, forward: float, backward: float) -> None:
        super().__init__()
        self.layer = Timed(clock, forward, backward)

    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        return self.layer(both[0]) + both[1]  # type: ignore[no-any-return]


def test_what_passes_a_layer_by_does_not_begin_its_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(cost_module, "time", clock)
    chain = chain_of(
        Timed(clock, 1.0, 2.0), TimedSplit(clock, 3.0, 4.0), TimedJoin(clock, 5.0, 6.0), Timed(clock, 7.0, 8.0)
    )
    profile = measure_profile(chain, (torch.randn(2),), {}, repeats=1)
    assert profile.forward == pytest.approx([1, 3, 5, 7])
    assert profile.backward == pytest.approx([2, 4, 6, 8])


def test_fewer_repeats_than_one_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats=0: measure each layer at least once"):
        time_costs(chain_of(nn.ReLU()), (torch.randn(2),), {}, repeats=0)


def test_bytes_of_parameters_of_what_crosses_and_of_what_is_kept() -> None:
    tied = nn.Linear(8, 8, bias=False)
    layers = nn.Linear(4, 8), nn.Sigmoid(), tied, nn.ReLU(), tied, nn.Linear(8, 2).requires_grad_(False)
    profile = measure_profile(chain_of(*layers), (torch.randn(16, 4),), {}, repeats=1)
    assert profile.parameters == [4 * 40, 0, 4 * 64, 0, 0, 0]
    wide = 4 * 16 * 8
    assert profile.crossing == [0, *[wide] * 5]
    assert profile.crossing_grad == [0, *[wide] * 5]
    # The first keeps its input, sigmoid and ReLU their outputs; what a product keeps is what the layer before it kept.
    # The loss needs the output.
    assert profile.activations == [4 * 16 * 4, wide, 0, wide, 0, 4 * 16 * 2]
    assert all(len(costs) == 6 and min(costs) > 0 for costs in (profile.forward, profile.backward))


class Add(nn.Module):
    """Keeps nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Carry(nn.Module):
    """Works on the first of two values and hands the second on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.layer(values[0]), values[1]


class Fork(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x + 2


class Join(nn.Module):
    def forward(self, values: tuple[Tensor, Tensor]) -> Tensor:
        return values[0] * values[1]


def test_what_a_layer_keeps_counts_where_it_was_made() -> None:
    # The sum, which the product needs, would be kept in the stage that sends it as well.
    profile = measure_profile(chain_of(nn.Linear(8, 8), Add(), nn.Linear(8, 2)), (torch.randn(16, 8),), {}, repeats=1)
    assert profile.activations == [4 * 16 * 8, 4 * 16 * 8, 4 * 16 * 2]
    # Two layers further on as well, and in place as well.
    layers = nn.Linear(8, 8), Fork(), Carry(nn.ReLU(inplace=True)), Carry(Add()), Join()
    profile = measure_profile(chain_of(*layers), (torch.randn(16, 8),), {}, repeats=1)
    assert profile.activations == [4 * 16 * 8, 2 * 4 * 16 * 8, 0, 4 * 16 * 8, 4 * 16 * 8]
    assert profile.crossing == [0, 512, 1024, 1024, 1024]


def test_bytes_of_frozen_parameters_and_of_buffers() -> None:
    tied = nn.Linear(8, 8).requires_grad_(False)
    norm = nn.BatchNorm1d(8)
    norm.bias.requires_grad_(False)
    profile = measure_profile(chain_of(tied, norm, tied), (torch.randn(16, 8),), {}, repeats=1)
    # Mean, variance and a count of 8 bytes.
    assert profile.frozen == [4 * 72, 4 * (8 + 8 + 8) + 8, 0]
    assert profile.parameters == [0, 4 * 8, 0]


@pytest.mark.parametrize("start", range(1, 6))
def test_a_stage_keeps_per_batch_what_the_profile_says(start: int) -> None:
    def layers() -> list[nn.Module]:
        return [
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.Flatten(),
            nn.Linear(64, 8),
        ]  # fmt: skip

    x = torch.randn(5, 2, 8, 8)
    profile = measure_profile(chain_of(*layers()), (x,), {}, repeats=1)
    chain = chain_of(*layers())
    stages = [Stage(chain.segment(0, start), 1), Stage(chain.segment(start, 6), 1)]
    kept = []
    for number, stage in enumerate(stages):
        weights = {weight.untyped_storage().data_ptr() for weight in stage.module.parameters()}
        alive: dict[int, Tensor] = {}

        def save(tensor: Tensor, weights: set[int] = weights, alive: dict[int, Tensor] = alive) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                alive.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            output = stage.forward(x, received=number == 1)
        # It is held until the backward.
        alive[output.untyped_storage().data_ptr()] = output
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in alive.values()))
        x = output.detach().clone().requires_grad_()
    assert sum(profile.activations[:start]) == kept[0]
    assert profile.crossing[start] + sum(profile.activations[start:]) == kept[1]


def test_integers_and_what_needs_no_gradient_have_no_bytes_on_the_way_back() -> None:
    profile = measure_profile(
        chain_of(Embed("tuple"), Pick()), (torch.randn(3, 4),), {"index": torch.tensor([0, 2])}, repeats=1
    )
    assert profile.crossing == [0, 4 * 12 + 8 * 2]
    assert profile.crossing_grad == [0, 4 * 12]


def test_layers_that_compute_something_else_than_the_network_are_refused() -> None:
    layers = nn.ModuleList([nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()])
    factors = [1.0]
    chain = Chain(
        [(f"net.layers.{index}", layer) for index, layer in enumerate(layers)],
        lambda x: layers[2](layers[1](layers[0](x))) * factors[0],
    )
    before = copy.deepcopy(layers.state_dict())
    x = torch.randn(5, 4)
    check_same(chain, (x,), {})
    factors[0] = 3.0
    message = r"its layers from 'net.layers.0' to 'net.layers.2', computes something else.*`configure_stages\(\)`"
    with pytest.raises(NotTheSame, match=message):
        check_same(chain, (x,), {})
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())


# No trace.


class Caching(nn.Module):
    """Binds, replaces and adds buffers in its forward, as some layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.mask = torch.ones_like(x)
        self.register_buffer("late", torch.ones(1))
        return x * self.mask


@pytest.mark.parametrize("measure", MEASURES)
def test_measuring_leaves_no_trace(measure: Measure) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(), Caching(), nn.Flatten(),
        nn.Linear(144, 2), nn.LayerNorm(2),
    )  # fmt: skip
    net[6].eval()
    net(torch.randn(2, 1, 8, 8)).sum().backward()
    net[4]._buffers.pop("late")
    net[4].mask = None
    net[0].bias.grad = None
    buffers = dict(net.named_buffers())
    before = copy.deepcopy(net.state_dict())
    grads = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in net.named_parameters()}
    modes = [module.training for module in net.modules()]
    x = torch.randn(4, 1, 8, 8)
    kept = x.clone()
    fired = []
    net[0].weight.register_post_accumulate_grad_hook(lambda _: fired.append(1))
    state = torch.get_rng_state()

    costs = measure(chain_of(*net), (x,), {})

    assert len(costs) == len(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert not x.requires_grad
    assert not fired
    assert [module.training for module in net.modules()] == modes
    assert dict(net.named_buffers()).keys() == buffers.keys()
    assert all(buffer is buffers[name] for name, buffer in net.named_buffers())
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for name, parameter in net.named_parameters():
        grad, value = grads[name]
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)


def test_an_error_in_a_layer_leaves_no_trace_either() -> None:
    norm = nn.BatchNorm1d(2)
    chain = chain_of(norm, nn.Dropout(), nn.Linear(3, 3))
    x = torch.randn(4, 2)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        time_costs(chain, (x,), {})
    assert torch.equal(norm.running_mean, torch.zeros(2))
    assert norm.num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("measure", MEASURES)
def test_the_callers_grad_mode_does_not_matter(measure: Measure, mode: Callable[[], Any]) -> None:
    chain = chain_of(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with mode():
        costs = measure(chain, (torch.randn(2, 4),), {})
        assert not torch.is_grad_enabled()
    if measure is flop_costs:
        assert costs == flop_costs(chain, (torch.randn(2, 4),), {})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("measure", MEASURES)
def test_the_generator_of_the_device_is_put_back(measure: Measure) -> None:
    chain = chain_of(nn.Linear(4, 8).cuda(), nn.Dropout())
    state = torch.cuda.get_rng_state()
    assert all(cost > 0 for cost in measure(chain, (torch.randn(2, 4, device="cuda"),), {}))
    assert torch.equal(torch.cuda.get_rng_state(), state)


# What passes between layers.


class Pair(NamedTuple):
    x: Tensor
    index: Tensor


@dataclass(frozen=True)
class Record:
    x: Tensor
    parts: list[Tensor]
    name: str


class Embed(nn.Module):
    """Takes positional and keyword arguments, returns a nest."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, index: Tensor) -> Any:
        x = self.linear(x)
        nests = {
            "tuple": (x, [index, "text"], None),
            "namedtuple": Pair(x, index),
            "dict": {"x": x, "index": index},
            "dataclass": Record(x, [index, x], "text"),
        }
        return nests[self.kind]


class Pick(nn.Module):
    """Takes the nest; its tensors must arrive in the same places, the floating one with a gradient."""

    def forward(self, nest: Any) -> Tensor:
        match nest:
            case Record(x, [index, Tensor()], "text") | Pair(x, index) | {"x": x, "index": index}:
                pass
            case (x, [index, "text"], None):
                pass
        assert x.requires_grad
        assert index.dtype is torch.long
        assert not index.requires_grad
        return x[index]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("kind", ["tuple", "namedtuple", "dict", "dataclass"])
def test_nests_between_layers(measure: Measure, kind: str) -> None:
    chain = chain_of(Embed(kind), Pick(), nn.Linear(4, 2))
    costs = measure(chain, (torch.randn(3, 4),), {"index": torch.tensor([0, 2])})
    assert all(cost > 0 for cost in costs)
    if measure is flop_costs:
        assert costs == [2 * 96 + 1, 1, 3 * 32 + 1]


@pytest.mark.parametrize("measure", MEASURES)
def test_layers_without_parameters_or_gradient(measure: Measure) -> None:
    chain = chain_of(nn.Flatten(), nn.Embedding(4, 2), nn.Identity())
    costs = measure(chain, (torch.ones(2, 2, dtype=torch.long),), {})
    assert all(cost > 0 for cost in costs)


def test_garbage_is_not_collected_while_layers_are_timed() -> None:
    class Littering(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.litter = [[number] for number in range(1000)]
            return x + 1

    collected = []
    before = gc.get_threshold()
    gc.callbacks.append(lambda phase, _info: collected.append(phase))
    gc.set_threshold(50)
    try:
        Littering()(torch.ones(1))
        assert collected
        collected.clear()
        measure_profile(chain_of(Littering()), (torch.ones(1),), {}, repeats=3)
        at_most = len(collected)
        assert gc.isenabled()
    finally:
        gc.set_threshold(*before)
        gc.callbacks.pop()
    # What comes before and after the timing may be collected in; a thousand lists a round were not.
    assert at_most < 20
