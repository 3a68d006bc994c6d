"""Tests of ``network/replay``: values that the code between layers makes, keeps and uses on both sides of a cut.

Each network is cut in 2, 3 and 4 at every layer that allows it, and must be the uncut one, to the last bit that float64
has; what cannot be so is refused, with the reason.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric

from lightning_ddg.network.replay.analysis import analyse
from lightning_ddg.network.replay.chain import ReplayedChain
from lightning_ddg.network.replay.code import forward_of
from tests.network.uncut import Call, assert_same, assert_same_step, cuts_of, made, run_parts

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def batch(size: int, seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, 4, dtype=torch.float64, generator=generator),), {}


class Net(nn.Module):
    """Four layers; subclasses say how they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))


# ---- residuals and writes in place


class PlainList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.held = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.layers = list(self.held)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.layers:
            y = F.relu(layer(x))
            skips.append(y)
            x = x + 0.5 * y
        return x + torch.stack(skips).sin().sum(0)


class InPlace(Net):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        y = self.b(x)
        x = F.relu_(self.c(self.relu(x + y)))
        x = (x + self.block(x)) * 2
        x += y
        return self.d(x)  # type: ignore[no-any-return]


class Fills(Net):
    """Writes what layers return into a new tensor."""

    make = staticmethod(torch.zeros)

    def forward(self, x: Tensor) -> Tensor:
        filled = self.make(x.shape[0], 4, 4, dtype=x.dtype)
        for index, layer in enumerate((self.a, self.b, self.c, self.d)):
            x = layer(x)
            filled[:, index] = x
        return filled


class FillsEmpty(Fills):
    make = staticmethod(torch.empty)


class Crops(Net):
    """Writes parts of its input, which random numbers choose, into a new tensor, as augmentations do."""

    def forward(self, x: Tensor) -> Tensor:
        cropped = torch.empty_strided((len(x), 3), (3, 1), dtype=x.dtype)
        for row, start in enumerate(torch.randint(0, 2, (len(x),)).tolist()):
            cropped[row] = x[row, start : start + 3]
        return self.d(self.c(self.b(self.a(F.pad(cropped, (0, 1))))))  # type: ignore[no-any-return]


# ---- autograd functions, checkpoints, hooks on tensors


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * grad, None


class Mixes(torch.autograd.Function):
    """Two inputs, two outputs, and a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, y)
        return x * y, x + y

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return 3 * a * y + b, a * x + b


class StraightThrough(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        g = self.b(h)
        s = Sign.apply(h + g)
        return self.d(self.c(Sign.apply(s * h) + g) + h)  # type: ignore[no-any-return]


class Adversary(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.a(x))
        y = self.b(h)
        return y, self.d(torch.tanh(self.c(Reversed.apply(h, 0.3)))), Reversed.apply(y, 0.5)


class TwoOutputs(Net):
    def forward(self, x: Tensor) -> Tensor:
        product, total = Mixes.apply(self.a(x), x)
        return self.d(self.c(self.b(product)) * total)  # type: ignore[no-any-return]


class Checkpoints(Net):
    """Checkpoints a method that calls two layers, a block, and code that draws."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 4))

    def part(self, x: Tensor) -> Tensor:
        return torch.tanh(self.c(F.dropout(torch.tanh(self.b(x)), 0.3, self.training)))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.part, torch.tanh(self.a(x)), use_reentrant=self.reentrant)
        x = x + checkpoint(self.block, x, use_reentrant=self.reentrant)
        return checkpoint(self.d, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


class HooksTensors(Net):
    """Scales gradients by hooks: on what is used by one stage only, and by several."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(lambda grad: grad * 2)
        y = self.b(h)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 5)
        z = self.c(y) + y
        if z.requires_grad:
            z.register_hook(lambda grad: grad * 7)
        return self.d(z)  # type: ignore[no-any-return]


class WithoutGradients(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.a(x)
        h = self.b(h)
        with torch.no_grad():
            gate = self.c(h).sigmoid()
        return self.d(h * gate) + h.detach()  # type: ignore[no-any-return]


# ---- what modules keep


class InstanceNorm(nn.Module):
    """Keeps something from its first call for its second."""

    def __init__(self, weighted: bool, attached: bool) -> None:
        super().__init__()
        self.mean = torch.zeros(1, dtype=torch.float64)
        self.attached = attached
        if weighted:
            self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 0.5, 1.5]))

    def forward(self, x: Tensor, back: bool) -> Tensor:
        weight = getattr(self, "weight", 2.0)
        if back:
            return x / weight + self.mean
        mean = x.mean(1, keepdim=True)
        self.mean = mean if self.attached else mean.detach()
        return (x - self.mean) * weight


class Reversible(Net):
    def __init__(self, weighted: bool = False, attached: bool = False, late: bool = False) -> None:
        super().__init__()
        self.norm, self.late = InstanceNorm(weighted, attached), late

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x + 3) if self.late else x + 3
        x = self.norm(x, back=False)
        x = self.c(self.b(x).tanh()) if self.late else self.c(self.b(self.a(x)).tanh())
        return self.norm(self.d(x), back=True)  # type: ignore[no-any-return]


class Leaves(nn.Module):
    """Leaves what it computed in attributes: a tensor and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.feature: Tensor | None = None
        self.features: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        self.feature, self.features = x.sin(), [x.cos()]
        return x


class TakesUp(Net):
    def __init__(self) -> None:
        super().__init__()
        self.leaves = Leaves()

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.leaves(self.a(x))))
        assert self.leaves.feature is not None
        return self.d(x) + self.leaves.feature * self.leaves.features[0]  # type: ignore[no-any-return]


class KeepsItself(Net):
    """Adds up in its own attributes, which each call begins anew."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.hidden = [self.a(x)]
        self.penalty = self.hidden[0].square().mean()
        self.hidden.append(self.b(self.hidden[0]))
        self.penalty = self.penalty + self.hidden[1].square().mean()
        return self.d(self.c(self.hidden[1])) + self.hidden[0], self.penalty


class Reads(Net):
    """Reads a buffer in several stages."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 0.5, 1.5]))
        self.length = 0

    def forward(self, x: Tensor) -> Tensor:
        self.length = x.shape[0]
        return self.d(self.c(self.b(self.a(x) * self.scale)) * self.scale) * self.length  # type: ignore[no-any-return]


# ---- calls


class Siamese(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 4))

    def half(self, x: Tensor) -> Tensor:
        return self.block(self.b(torch.tanh(self.a(x))))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.tanh(self.c((self.half(x) - self.half(x.flip(0))).abs())))  # type: ignore[no-any-return]


class Pyramid(nn.Module):
    """Returns features of every depth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.deep, self.deeper = (
            nn.Linear(4, 4),
            nn.LayerNorm(4),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        found = [F.relu(self.norm(self.stem(x)), inplace=True)]
        found.append(self.deep(found[0].sin()))
        return [*found, self.deeper(found[1].cos())]


class Changes(Net):
    """Compares the features of two inputs, as networks that detect changes do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Pyramid()

    def forward(self, x: Tensor) -> Tensor:
        before, after = self.encoder(x), self.encoder(x.flip(0))
        shallow, middle, deep = [one - other for one, other in zip(after, before, strict=True)]
        return self.d(torch.cat([self.c(deep + middle), shallow]))  # type: ignore[no-any-return]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        chosen = weights.argmax(-1)
        output = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if mine.any():
                output[mine] = expert(x[mine]) * weights[mine][:, number : number + 1]
        return output


class Mixture(Net):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.experts(self.b(self.a(x)))))  # type: ignore[no-any-return]


@dataclasses.dataclass
class Result:
    y: Tensor
    more: Any = None


class Nested(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(4, 4), nn.Linear(4, 4), kind

    def forward(self, x: Tensor, state: Tensor) -> Any:
        y = self.first(x)
        z = self.second(y)
        if self.kind == "dict":
            return {"x": z, "state": [state + y, (y, None)]}
        return Result(z, y)


class Structures(Net):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = Nested("dict"), Nested("dict"), Nested("dataclass")

    def forward(self, x: Tensor) -> Result:
        one = self.one(x, x)
        two = self.two(one["x"], one["state"][0])
        three = self.three(two["x"] + one["state"][1][0], x)
        return Result(self.d(three.y) + three.more, (two["state"][0], {"k": three.more}))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = nn.Linear(4, 4), nn.Linear(4, 4)
        self.one = nn.MultiheadAttention(4, 2, dropout=0.1)
        self.two = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.a(x)
        y, first = self.one(x, x, x)
        y, second = self.two(x + y, y, y)
        return self.d(x + y), first, second


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Linear(4, 4))
        self.b = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.c = parametrizations.orthogonal(nn.Linear(4, 4))
        self.d = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(torch.tanh(self.b(torch.tanh(self.a(x))))))  # type: ignore[no-any-return]


class Functional(Net):
    """Uses the weights of its layers without calling them."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.b(self.a(x)), self.c.weight, self.c.bias)
        return self.d(x)  # type: ignore[no-any-return]


# ---- random numbers


class Masks(Net):
    def forward(self, x: Tensor) -> Tensor:
        mask = (torch.rand(x.shape[0], 1, dtype=x.dtype) > 0.5).to(x.dtype)
        h = self.b(self.a(x) * mask)
        more = torch.bernoulli(torch.full_like(h, 0.5))
        noise = torch.empty_like(h).normal_()
        h = self.c(h * more + noise) * mask
        order = torch.randperm(x.shape[0])
        return self.d(h[order])[order.argsort()] * more + noise + (1 - mask) * h  # type: ignore[no-any-return]


class Head(nn.Module):
    """Draws before each of its layers, the first of which may be the first of a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.one, self.two = nn.Dropout(0.3), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.drop(torch.tanh(self.one(self.drop(x)))))  # type: ignore[no-any-return]


class Packs(nn.Module):
    """Packs its sequences by lengths that come with them: the code between the layers needs values at once."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.mid, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(len(x)) % 4 + 1
        packed = pack_padded_sequence(x.unsqueeze(2), lengths, batch_first=True, enforce_sorted=False)
        output, (last, _) = self.lstm(packed)
        padded, _ = pad_packed_sequence(output, batch_first=True)
        return self.head(torch.tanh(self.mid(last[-1] + padded.mean(1))))


class Drops(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.b(self.a(x)), 0.2, self.training))  # type: ignore[no-any-return]


class Adapts(nn.Module):
    """A layer that is given others: it calls one, and looks at the weights of another, also to decide by them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, called: nn.Module, looked_at: nn.Linear) -> Tensor:
        weight = looked_at.weight + called(torch.eye(4, dtype=x.dtype)).T
        if weight.detach().sum() > 100:
            weight = weight * 2
        return x @ (weight / weight.norm(dim=1).detach()) * self.scale


class Given(Net):
    def __init__(self, before: bool = False) -> None:
        super().__init__()
        self.adapts, self.before = Adapts(), before

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.before:
            return self.d(self.c(self.b(y) + self.adapts(y, self.c, self.b)))  # type: ignore[no-any-return]
        z = self.c(self.b(y))
        return self.d(z + self.adapts(y, self.c, self.b))  # type: ignore[no-any-return]


class Hidden:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Opens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, hidden: Hidden) -> Tensor:
        hidden.tensor = hidden.tensor.relu_()
        return self.fc(hidden.tensor)  # type: ignore[no-any-return]


class Hides(Net):
    """A layer is given a tensor in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.opens = Opens()

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        hidden = Hidden(self.c(y))
        return self.d(self.opens(hidden) + hidden.tensor + y)  # type: ignore[no-any-return]


class Passes(nn.Module):
    """A block that hands on its mask, and returns what it makes of no layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        return self.out(self.fc(x) * mask).tanh(), mask, {"weights": torch.ones_like(x), "count": len(x)}


class PassesOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Passes(), Passes()
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, mask, kept = self.first(x, torch.arange(4) % 2)
        y, mask, more = self.second(y, mask)
        if mask.sum() > 2:
            return y, kept["weights"], mask
        return self.head(y * mask) / kept["count"], kept["weights"] + more["weights"], mask


class WritesIntoAView(Net):
    """Writes what a layer returns into a part of a tensor, and uses the whole of it later."""

    def __init__(self, of_input: bool) -> None:
        super().__init__()
        self.of_input = of_input

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = (x if self.of_input else y) * 2
        z[:, 0:1] = self.b(y)[:, :1]
        return self.d(self.c(y) + z)  # type: ignore[no-any-return]


class Copies(Net):
    """Copies tensors between its layers, of which some follow from them and some do not."""

    def forward(self, x: Tensor) -> Tensor:
        ones = copy.deepcopy(torch.ones(4))
        y = self.b(self.a(x))
        kept = copy.deepcopy({"mean": y.detach().mean(), "ones": ones, "none": torch.empty(0)})
        return self.d(self.c(y) * kept["ones"]) - kept["mean"] + kept["none"].sum()  # type: ignore[no-any-return]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "writes into a part of an input": (lambda: WritesIntoAView(True), 3),
    "writes into a part of an output": (lambda: WritesIntoAView(False), 3),
    "copies of tensors": (Copies, 3),
    "blocks that pass on a mask": (PassesOn, 4),
    "a layer is given others": (Given, 2),
    "a layer is given a later one": (lambda: Given(before=True), 2),
    "a layer is given an object": (Hides, 3),
    "residual over a plain list": (PlainList, 3),
    "in place": (InPlace, 5),
    "fills a tensor": (Fills, 3),
    "fills an empty tensor": (FillsEmpty, 3),
    "crops its input": (Crops, 3),
    "straight-through": (StraightThrough, 3),
    "gradient reversal": (Adversary, 3),
    "function of two outputs": (TwoOutputs, 3),
    "checkpoints": (lambda: Checkpoints(False), 3),
    "reentrant checkpoints": (lambda: Checkpoints(True), 2),
    "hooks on tensors": (HooksTensors, 3),
    "without gradients": (WithoutGradients, 3),
    "keeps an input's mean": (Reversible, 3),
    "keeps a layer's mean": (lambda: Reversible(late=True), 3),
    "keeps a layer's mean, attached": (lambda: Reversible(attached=True, late=True), 3),
    "a layer keeps its mean": (lambda: Reversible(weighted=True, attached=True, late=True), 1),
    "takes up what a layer left": (TakesUp, 4),
    "keeps in itself": (KeepsItself, 3),
    "reads a buffer": (Reads, 3),
    "siamese": (Siamese, 5),
    "features of two inputs": (Changes, 5),
    "mixture of experts": (Mixture, 4),
    "structures": (Structures, 6),
    "attention": (Attends, 3),
    "parametrized": (Parametrized, 4),
    "functional use": (Functional, 2),
    "random masks": (Masks, 3),
    "drops in a head": (Drops, 3),
    "packed sequences": (Packs, 2),
}


def assert_all_cuts(network: nn.Module, first: Call, calls: list[Call], cuts: int) -> None:
    """Cut in 2, 3 and 4 wherever it is possible, and compare with the uncut network."""
    theirs = copy.deepcopy(network)
    chain = ReplayedChain(network, "net", first)
    assert len(cuts_of(chain, 2)) == cuts
    for num_stages in (2, 3, 4):
        for cut in cuts_of(chain, num_stages):
            for call in calls:
                assert_same_step(chain, cut, call, network, theirs)


@pytest.mark.parametrize("name", NETWORKS)
def test_cut_anywhere_it_is_the_uncut_network(name: str) -> None:
    make, cuts = NETWORKS[name]
    network = made(make)
    assert_all_cuts(network, batch(3), [batch(3), batch(5, seed=1)], cuts)
    network.eval()
    chain = ReplayedChain(network, "net", batch(3))
    with torch.no_grad():
        for cut in combinations(range(1, len(chain)), min(2, len(chain) - 1)):
            torch.manual_seed(1)
            expected = network(*batch(4)[0])
            torch.manual_seed(1)
            assert_same(run_parts(chain, cut, batch(4)), expected)


# ---- hooks and other ways to change what a module's call does


class Hooked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.tanh = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.tanh(self.c(self.block(self.tanh(self.b(self.a(x)))))))  # type: ignore[no-any-return]


def hooks_on_blocks(network: Any) -> None:
    network.block.register_forward_hook(lambda module, args, output: output * 2)
    network.block.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    network.block[2].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    network.b.register_forward_hook(lambda module, args, output: output.sin())
    network.tanh.register_forward_hook(lambda module, args, output: output * 2)


def hooks_that_carry(network: Any) -> None:
    store: dict[str, Tensor] = {}
    network.a.register_forward_hook(lambda module, args, output: store.update(a=output))
    network.d.register_forward_hook(lambda module, args, output: output + store["a"])


def hooks_on_backward(network: Any) -> None:
    network.block.register_full_backward_hook(lambda module, given, got: (given[0] * 3,))
    network.c.register_full_backward_hook(lambda module, given, got: (given[0] * 5,))


CHANGES: dict[str, tuple[Callable[[Any], None], int]] = {
    "hooks on blocks": (hooks_on_blocks, 5),
    "hooks that carry": (hooks_that_carry, 5),
    "hooks on the backward": (hooks_on_backward, 4),
    "compiled": (lambda network: network.block.compile(backend="eager"), 4),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_calls_are_those_of_the_uncut_network(name: str) -> None:
    change, cuts = CHANGES[name]
    network = made(Hooked)
    theirs = copy.deepcopy(network)
    change(network)
    change(theirs)
    chain = ReplayedChain(network, "net", batch(3))
    assert len(cuts_of(chain, 2)) == cuts
    for num_stages in (2, 3, 4):
        for cut in cuts_of(chain, num_stages):
            for call in (batch(3), batch(5)):
                assert_same_step(chain, cut, call, network, theirs)


def test_a_scripted_block_is_one_layer() -> None:
    network = made(Hooked)
    theirs = copy.deepcopy(network)
    network.block = torch.jit.script(network.block)  # type: ignore[no-untyped-call]
    chain = ReplayedChain(network, "net", batch(3))
    assert chain.names == [f"net.{name}" for name in ("a", "b", "block", "c", "d")]
    for num_stages in (2, 3, 4):
        for cut in cuts_of(chain, num_stages):
            assert_same_step(chain, cut, batch(5), network, theirs)


class Forms(Net):
    """Called in another way, it does other things between its layers."""

    def forward(self, x: Tensor, labels: Tensor | None = None, other: bool = False) -> dict[str, Tensor]:
        h = self.a(x)
        y = self.b(h)
        output = {"y": self.d(self.c(y * h.sin() + h if other else y + h.sin()))}
        if labels is not None:
            output["loss"] = F.cross_entropy(output["y"], labels)
        return output


def test_other_forms_of_the_call_are_those_of_the_uncut_network() -> None:
    network = made(Forms)
    x = batch(3)[0]
    calls: list[Call] = [
        (x, {"labels": torch.arange(3)}),
        (x, {}),
        (x, {"other": True}),
        (batch(2)[0], {"labels": torch.arange(2), "other": True}),
    ]
    assert_all_cuts(network, calls[0], calls, 3)


# ---- what is refused


class Updates(Net):
    """Each call changes what is kept for the next: a buffer in place, or anew, or a number."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4))
        self.how, self.count = how, 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x) * self.scale.clone())
        with torch.no_grad():
            if self.how == "in place":
                self.scale.mul_(0.9).add_(x.mean(0), alpha=0.1)
            elif self.how == "anew":
                self.scale = 0.9 * self.scale + 0.1 * x.mean(0)
            else:
                self.count += 1
        return self.d(self.c(x * self.scale.clone())) / (1 + self.count)  # type: ignore[no-any-return]


class Around(Net):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.block = Updates(how)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.block(self.b(self.a(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("how", "name"), [("in place", "scale"), ("anew", "scale"), ("counts", "count")])
def test_code_that_changes_what_it_keeps_is_not_cut(how: str, name: str) -> None:
    network = made(lambda: Updates(how))
    found = analyse(network, forward_of(network), batch(3))
    assert set(found.forbidden.values()) == {f"its own code changes {name!r}, in each stage again"}
    assert set(found.forbidden) == {1, 2, 3}
    # A block that does so is a layer.
    ours = made(lambda: Around(how))
    theirs = copy.deepcopy(ours)
    chain = ReplayedChain(ours, "net", batch(3))
    assert chain.names == [f"net.{name}" for name in ("a", "b", "block", "c", "d")]
    for _ in range(2):
        assert_same_step(chain, [2, 3], batch(5), ours, theirs)
    assert ours.block.count == theirs.block.count  # type: ignore[union-attr]
    assert_same(ours.block.scale, theirs.block.scale)  # type: ignore[union-attr]


class Trains(Net):
    """Called in training only, as a loss that holds the network is: evaluated, its shapes do not fit."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        return self.d(self.c(x if self.training else x[:, :2]))  # type: ignore[no-any-return]


class LeavesBehind(Net):
    """Tells a metric, or itself, how its output is to be read, when it is evaluated."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.loss, self.where = MeanMetric(), where

    def forward(self, x: Tensor) -> Tensor:
        x = self.d(self.c(self.b(self.a(x))))
        if not self.training and self.where:
            (self.loss if self.where == "metric" else self).read = "exp"
        return x  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "evaluates"),
    [
        (Trains, False),
        (lambda: LeavesBehind("metric"), False),
        (lambda: LeavesBehind("itself"), False),
        (lambda: LeavesBehind(""), True),
    ],
)
def test_what_cannot_be_evaluated_in_stages_is_trained_in_them(make: Callable[[], nn.Module], evaluates: bool) -> None:
    network = made(make)
    theirs = copy.deepcopy(network)
    chain = ReplayedChain(network, "net", batch(3))
    assert chain.evaluates == evaluates
    assert chain.names == ["net.a", "net.b", "net.c", "net.d"]
    for cut in cuts_of(chain, 2):
        assert_same_step(chain, cut, batch(5), network, theirs)


class LayerDrop(PlainList):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or random.random() < 0.99:
                x = torch.tanh(layer(x))
        return x


def test_layers_dropped_by_random_numbers_of_python_are_not_cut() -> None:
    network = made(LayerDrop)
    found = analyse(network, forward_of(network), batch(3))
    assert len(found.layers) > 1
    assert set(found.forbidden) == set(range(1, len(found.layers)))
    assert all("draws random numbers from Python or NumPy before" in reason for reason in found.forbidden.values())


class Encodes(Packs):
    """Encodes and decodes by the same layers: the first is called again after an LSTM, on packed sequences."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.embed, self.packed = nn.Linear(1, 1), packed

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for part in x.unsqueeze(2).chunk(2, 1):
            embedded = self.embed(part)
            if self.packed:
                lengths = torch.full((len(x),), 2)
                embedded = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
            output, state = self.lstm(embedded, state)
        if self.packed:
            output, _ = pad_packed_sequence(output, batch_first=True)
        return self.head(self.mid(output[:, -1]))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("packed", "cuts"), [(False, 3), (True, 2)])
def test_a_layer_called_again_after_one_whose_shape_no_other_stage_knows_stays_with_it(packed: bool, cuts: int) -> None:
    network = made(lambda: Encodes(packed))
    assert_all_cuts(network, batch(3), [batch(3), batch(5, seed=1)], cuts)
    chain = ReplayedChain(network, "net", batch(3))
    reason = "a LSTM of a later stage is called before, and the shape of its output depends on values"
    assert chain.reasons == ([reason] if packed else [])


class Chooses(Net):
    """Calls one of its layers, by values that a layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.d(self.c(self.experts[int(self.gate(h).mean(0).argmax())](h)))  # type: ignore[no-any-return]


def test_a_layer_that_no_stage_holds_is_refused_when_it_is_called() -> None:
    network = made(Chooses)
    with torch.no_grad():
        network.gate.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))  # type: ignore[union-attr]
    theirs = copy.deepcopy(network)
    chain = ReplayedChain(network, "net", batch(3))
    assert "net.experts.0" in chain.names
    for cut in cuts_of(chain, 2):
        assert_same_step(chain, cut, batch(5), network, theirs)
    with torch.no_grad():
        network.gate.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))  # type: ignore[union-attr]
    theirs.load_state_dict(network.state_dict())
    refused = 0
    for cut in cuts_of(chain, 2):
        try:
            assert_same_step(chain, cut, batch(5), network, theirs)
        except RuntimeError as error:
            refused += "split_points" in str(error)
    # It is in the last stage, as all that was not called: the stage of the chosen one's caller may be another.
    assert refused == 2


def test_the_survey_leaves_the_attributes_as_they_were() -> None:
    network = made(TakesUp)
    network.leaves.features.append(torch.ones(1))  # type: ignore[union-attr, operator]
    before = {name: dict(vars(module)) for name, module in network.named_modules()}
    features = list(network.leaves.features)  # type: ignore[union-attr, arg-type]
    ReplayedChain(network, "net", batch(3))
    assert {name: dict(vars(module)) for name, module in network.named_modules()} == before
    assert network.leaves.features == features  # type: ignore[union-attr]
    assert "hidden" not in vars(made(KeepsItself))
    keeps = made(KeepsItself)
    ReplayedChain(keeps, "net", batch(3))
    assert "hidden" not in vars(keeps)
