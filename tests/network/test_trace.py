"""Tests of ``network/trace``: what is followed, what is watched, what is refused."""

from __future__ import annotations

import copy
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ddg.network.balance import best_cut, forbidden_cuts
from lightning_ddg.network.trace.chain import TracedChain
from lightning_ddg.network.trace.recording import Untraceable
from tests.networks import GPT, UNet

X = torch.randn(3, 4)


class Net(nn.Module):
    """Three layers; subclasses say how they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


def run(chain: TracedChain, *args: Any, bounds: list[int] | None = None, **kwargs: Any) -> Any:
    """Run the network in parts, by default layer by layer."""
    parts = [chain.segment(a, b) for a, b in pairwise(bounds or range(len(chain) + 1))]
    value = parts[0](*args, **kwargs)
    for part in parts[1:]:
        value = part(value)
    return value


def assert_same(network: nn.Module, chain: TracedChain, *args: Any, **kwargs: Any) -> None:
    torch.manual_seed(0)
    wanted = network(*args, **kwargs)
    torch.manual_seed(0)
    torch.testing.assert_close(run(chain, *args, **kwargs), wanted, rtol=0, atol=0)


# ---- layers


def test_a_layer_is_a_call_of_a_module_with_parameters_and_what_follows_it() -> None:
    chain = TracedChain(UNet(), "net")
    assert chain.names[:3] == ["net.down1.0", "net.down1.1", "net.down2.0"]
    assert [type(module).__name__ for module in chain.modules(1, 3)] == ["BatchNorm2d", "ReLU", "Conv2d"]


def test_segments_share_the_modules_and_keep_all_names() -> None:
    network = GPT()
    chain = TracedChain(network, "model")
    names = [name for part in (0, 5) for name, _ in chain.segment(part, (5, len(chain))[part > 0]).named_parameters()]
    assert sorted(names) == sorted(f"model.{name}" for name, _ in network.named_parameters())
    assert chain.segment(0, 1).model.tokens is network.tokens
    assert chain.segment(0, 1).model.positions is network.positions


def test_what_is_changed_in_place_is_changed_in_place() -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            left, same = hidden[:, :2], hidden
            left += 1.0
            same *= 2.0
            size = before = hidden.shape[0]
            size += 3
            hidden = self.b(hidden)
            hidden -= before
            hidden /= size
            return self.c(hidden)

    network = InPlace()
    assert_same(network, TracedChain(network, ""), X)


def test_a_module_called_twice_has_two_labels_and_stays_in_one_stage() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(self.b(self.a(x))))

    chain = TracedChain(Twice(), "")
    assert chain.names == ["a", "b", "a:2", "c"]
    assert set(forbidden_cuts(chain)) == {1, 2}
    assert best_cut([1.0] * 4, 2, forbidden_cuts(chain)) == [3]


def test_a_layer_of_only_one_mode_begins_no_stage() -> None:
    class Auxiliary(Net):
        def forward(self, x: Tensor) -> Any:
            x = self.a(x)
            return (self.c(x), self.b(x)) if self.training else self.c(x)

    network = Auxiliary()
    chain = TracedChain(network, "")
    assert chain.names == ["a", "c"]
    assert {name for name, _ in chain.segment(1, 2).named_parameters()} == {"b.weight", "b.bias", "c.weight", "c.bias"}
    assert_same(network, chain, X)
    network.eval()
    assert_same(network, chain, X)


def test_positions_that_enclose_no_layer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"from position 2 to 2: the chain has 3 layers, so 0 <= start < stop <= 3"):
        TracedChain(Net(), "").segment(2, 2)


def test_a_network_without_parameters_is_refused() -> None:
    with pytest.raises(Untraceable, match="no module with parameters is called"):
        TracedChain(nn.Sequential(nn.ReLU()), "")


# ---- buffers


class Buffered(Net):
    """Reads a buffer in two layers, and may write it in the second."""

    def __init__(self, write: bool) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x) * self.scale)
        if self.write:
            self.scale[:2].mul_(0.9)
        return self.c(x * self.scale)


def test_a_buffer_that_is_only_read_may_be_read_in_several_stages() -> None:
    network = Buffered(write=False)
    chain = TracedChain(network, "")
    assert forbidden_cuts(chain) == {}
    assert_same(network, chain, X)


def test_a_buffer_that_is_written_stays_in_one_stage() -> None:
    network = Buffered(write=True)
    chain = TracedChain(network, "")
    assert set(forbidden_cuts(chain)) == {1}
    run(chain, X, bounds=[0, 2, 3])
    assert network.scale.tolist() == pytest.approx([0.9, 0.9, 1, 1])


# ---- what is watched


class Watched(Net):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0
        self.inner = nn.ModuleDict({"drop": Inner()})

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.a(x), 0.5, training=self.training)
        return self.inner["drop"](self.b(x)) / self.temperature


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.5, training=self.training)


def test_functional_dropout_follows_the_mode_of_its_own_module() -> None:
    network = Watched()
    chain = TracedChain(network, "")
    assert_same(network, chain, X)
    network.inner.eval()
    assert_same(network, chain, X)
    network.eval()
    assert_same(network, chain, X)
    network.inner.train()
    assert_same(network, chain, X)


def test_a_plain_attribute_that_changes_is_seen() -> None:
    network = Watched().eval()
    chain = TracedChain(network, "")
    for network.temperature in (1.0, 2.0, 3.5, 1.0):
        assert_same(network, chain, X)


def test_tracing_leaves_the_network_as_it_was() -> None:
    network = Watched()
    network.inner.eval()
    state = random.getstate(), torch.get_rng_state()
    TracedChain(network, "")
    assert (network.training, network.inner.training) == (True, False)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert "__getattribute__" not in vars(nn.Module)


class Forms(Net):
    """Called in several ways."""

    def forward(self, x: Any, extra: Tensor | None = None, times: int = 1) -> Any:
        x = x["x"] if isinstance(x, dict) else x
        x = self.b(self.a(x)) * times
        return self.c(x) if extra is None else self.c(x + extra)


def test_each_form_of_the_call_has_its_own_graph() -> None:
    network = Forms()
    chain = TracedChain(network, "")
    assert_same(network, chain, X)
    assert_same(network, chain, X, torch.ones(4))
    assert_same(network, chain, X, extra=torch.ones(4), times=3)
    assert_same(network, chain, {"x": X, "other": [torch.ones(1), None, "text"]})
    for times in range(100):
        assert_same(network, chain, X, times=times)


def test_other_batch_sizes_need_no_other_graph() -> None:
    network = UNet()
    chain = TracedChain(network, "")
    for batch, size in ((2, 8), (3, 8), (1, 12)):
        assert_same(network, chain, torch.randn(batch, 1, size, size))
    assert sum(len(recordings) for recordings in chain._recordings._known.values()) == 2


def test_a_call_that_takes_another_way_past_the_cut_is_refused() -> None:
    class Skipping(Net):
        def forward(self, x: Tensor, short: bool = False) -> Tensor:
            return self.a(x) if short else self.c(self.b(self.a(x)))

    chain = TracedChain(Skipping(), "net")
    with pytest.raises(RuntimeError, match=r"cut before its layer 'net.c', which it does not call.*`split_points`"):
        run(chain, X, short=True, bounds=[0, 2, 3])


def test_a_call_that_needs_weights_that_no_stage_holds_is_refused() -> None:
    class Optional(Net):
        def forward(self, x: Tensor, more: bool = False) -> Tensor:
            return self.c(self.b(self.a(x))) if more else self.c(self.a(x))

    chain = TracedChain(Optional(), "net")
    with pytest.raises(
        RuntimeError, match=r"uses 'net.b' in this call.*no stage holds it. Call the network in the same"
    ):
        run(chain, X, more=True)


# ---- conditions


def test_assertions_are_followed_and_kept() -> None:
    chain = TracedChain(GPT(), "")
    tokens = torch.zeros(2, 8, dtype=torch.long)
    run(chain, tokens)
    with pytest.raises(
        ValueError, match=r"ends in an error for this input: .*networks.py:\d+: `assert length <= .*Mend"
    ):
        run(chain, torch.zeros(2, 9, dtype=torch.long))


def test_a_check_that_raises_is_followed_and_kept() -> None:
    class Checking(Net):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 4:
                raise ValueError("not four")
            return super().forward(x)

    network = Checking()
    chain = TracedChain(network, "")
    assert_same(network, chain, X)
    with pytest.raises(ValueError, match="ends in an error for this input: .*`if x.shape"):
        run(chain, torch.randn(3, 5))


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.mean() > 0 else self.b(x)


def test_a_part_that_cannot_be_followed_is_one_layer() -> None:
    network = nn.Sequential(Net(), Branching(), nn.Linear(4, 2))
    chain = TracedChain(network, "net")
    assert chain.names == ["net.0.a", "net.0.b", "net.0.c", "net.1", "net.2"]
    assert "x.mean() > 0" in chain.opaque[network[1]]
    assert_same(network, chain, X)
    assert_same(network, chain, -X)


class Assigning(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x)
        return self.last


class Drawing(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if random.random() < 2 else x


class Reading(Net):
    trainer: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.trainer.global_step


class Casting(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.a(x)


class Hidden(Net):
    def __init__(self) -> None:
        super().__init__()
        self.secret = [nn.Linear(4, 4)]

    def forward(self, x: Tensor) -> Tensor:
        return self.secret[0](x)


class Calling(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Branching, r"test_trace.py:\d+: `return self.a\(x\) if x.mean\(\) > 0.*what it does depends on the input"),
        (Assigning, r"`self.last = self.a\(x\)` \(TraceError: the forward assigns to `self.last`"),
        (Drawing, r"test_trace.py:\d+: this forward draws random numbers of its own"),
        (Reading, r"reads `self.trainer`, which changes as the training goes on"),
        (Casting, r"`with torch.autocast.*enters `autocast`"),
        (Hidden, r"a Linear with parameters is called that is not a submodule of the network"),
        (Calling, r"the forward calls the network itself"),
    ],
)
def test_what_a_trace_would_get_wrong_is_refused(kind: type[nn.Module], reason: str) -> None:
    network = kind()
    attributes = dict(vars(network))
    with pytest.raises(Untraceable, match=reason):
        TracedChain(network, "")
    assert vars(network) == attributes


def test_a_new_form_that_cannot_be_followed_is_refused() -> None:
    class Late(Net):
        def forward(self, x: Tensor, choose: bool = False) -> Tensor:
            return super().forward(x) if not choose or x.mean() > 0 else x

    chain = TracedChain(Late(), "")
    with pytest.raises(
        TypeError, match=r"Late is called as it has not been before.*x.mean\(\) > 0.*`configure_stages\(\)`"
    ):
        run(chain, X, choose=True)


# ---- values


def test_random_tensors_and_new_tensors_are_made_in_each_call() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x) + torch.rand(4) + torch.randn(x.shape[0], 1)
            return self.b(x) * torch.linspace(0, 1, 4) + torch.zeros(len(self._modules) + 1)

    network = Noisy()
    assert_same(network, TracedChain(network, ""), X)


def test_other_threads_find_torch_as_it_is_while_a_network_is_traced() -> None:
    """Messages arrive in a thread of their own, which makes tensors, at any time."""
    other = nn.Linear(4, 4)
    made: list[Tensor] = []

    class Interrupted(Net):
        def arrive(self) -> None:
            self.arrived = True
            with torch.inference_mode():
                made.append(other(torch.empty(2, 4).copy_(torch.zeros(4))))

        def forward(self, x: Tensor) -> Tensor:
            with ThreadPoolExecutor(1) as threads:
                threads.submit(self.arrive).result()
            return self.c(self.b(self.a(x)) + torch.ones(4))

    network = Interrupted()
    chain = TracedChain(network, "")
    assert_same(network, chain, X)
    assert made
    assert all(type(tensor) is Tensor for tensor in made)


def test_gradients_stay_off_where_they_were_off() -> None:
    class Partly(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.b(self.a(x))
            return self.c(x)

    network = Partly()
    run(TracedChain(network, ""), X).sum().backward()
    assert network.a.weight.grad is network.b.weight.grad is None
    assert network.c.weight.grad is not None
    assert torch.is_grad_enabled()


def test_an_error_in_a_part_without_gradients_leaves_them_on() -> None:
    class Failing(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.a(x)
            return self.c(x)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(TracedChain(Failing(), ""), torch.randn(3, 5))
    assert torch.is_grad_enabled()


def test_a_copied_segment_runs_its_own_weights() -> None:
    network = GPT()
    rest = TracedChain(network, "net").segment(0, 3)
    copied = copy.deepcopy(rest).to("meta")
    assert {parameter.device.type for parameter in copied.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}
    _, *values = copied(torch.zeros(2, 5, dtype=torch.long, device="meta"))
    assert values[-1].device.type == "meta"
