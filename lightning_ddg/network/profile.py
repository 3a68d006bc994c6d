"""What each layer of a network costs: parameters, FLOPs, or measured seconds and bytes.

Measuring leaves no trace on the network.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_ddg.core.pytree import map_tensors, tensors_of
from lightning_ddg.core.tensors import carries_grad
from lightning_ddg.network.layers import Layers
from lightning_ddg.network.restore import gpus_of, trial


def parameter_costs(chain: Layers) -> list[float]:
    """Return the number of parameters of each layer; a shared one counts where it is used first."""
    return [float(size) for size in _new_sizes([list(layer.parameters()) for layer in _layers(chain)], Tensor.numel)]


def flop_costs(chain: Layers, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[float]:
    """Return the FLOPs of each layer's forward and backward, plus one, so that no layer is free.

    Counted by ``torch.utils.flop_counter``: matrix products, convolutions and attention; element-wise work counts zero.
    The call's tensors must be on the device of the layers.
    """
    layers = _layers(chain)
    with _trial(layers, args, kwargs), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        forward, backward = _train_through(chain, args, kwargs, nullcontext, counter.get_total_flops)
    return [there + back + 1.0 for there, back in zip(forward, backward, strict=True)]


@dataclass(frozen=True)
class Profile:
    """What each of the L layers costs, measured on one batch.

    Attributes:
        forward: Seconds of each layer's forward.
        backward: Seconds of each layer's backward.
        crossing: Bytes that cross a cut just before each layer, on their way forward; 0 before the first, as its stage
            reads the batch itself.
        crossing_grad: Bytes of the gradients that come back across that cut.
        activations: Bytes that are kept for a backward, for one batch, by the layer that made them: what a layer
            receives is counted with an earlier one, what the network returns with its last.
        parameters: Bytes of each layer's trainable parameters; a shared one counts where it is used first.
        frozen: Bytes of each layer's other parameters and its buffers, counted likewise; empty if there are none.
    """

    forward: list[float]
    backward: list[float]
    crossing: list[int]
    crossing_grad: list[int]
    activations: list[int]
    parameters: list[int]
    frozen: Sequence[int] = ()

    @property
    def seconds(self) -> list[float]:
        """Seconds of each layer's forward and backward, each done once."""
        return [forward + backward for forward, backward in zip(self.forward, self.backward, strict=True)]


def measure_profile(
    chain: Layers,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    repeats: int = 5,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Profile:
    """Measure every layer: the median seconds after one warm-up, and the bytes it makes, keeps and passes on.

    A repeat is what training does with a batch: forward through all layers, then backward through all, with the clock
    read in between. So layers find caches and memory as they will, and a busy moment of the machine is spread over
    them. If the activations of the whole network do not fit into the device's memory, the backward of each layer comes
    right after its forward instead.

    Args:
        chain: The layers, in the mode (train or eval) and on the device they are to be costed in.
        args: Positional arguments of the network's call, on the same device.
        kwargs: Keyword arguments of the network's call.
        repeats: How many times each layer is measured.
        context: Entered around each forward, e.g. autocast.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: measure each layer at least once.")
    layers = _layers(chain)
    devices = gpus_of(layers, tensors_of((tuple(args), dict(kwargs))))

    def clock() -> float:
        for device in devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def measure() -> tuple[list[float], list[float]]:
        # Layer by layer, a device can measure a network that it cannot train.
        with suppress(torch.OutOfMemoryError):
            return _train_through(chain, args, kwargs, context, clock)
        return _pass_through(layers, args, kwargs, context, clock)

    memory = _Memory(layers)
    with _trial(layers, args, kwargs), torch.enable_grad(), _no_garbage_collection():
        _pass_through(layers, args, kwargs, context, clock, memory)
        memory.returned()
        measure()
        rounds = [measure() for _ in range(repeats)]
    # A clock that is too coarse to see a layer must not make it free.
    forward, backward = (
        [max(median(seconds), 1e-9) for seconds in zip(*(parts[which] for parts in rounds), strict=True)]
        for which in (0, 1)
    )
    trainable = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
    frozen = [[t for t in (*layer.parameters(), *layer.buffers()) if not t.requires_grad] for layer in layers]
    # What the last layer returns crosses no cut.
    crossing, crossing_grad = memory.crossing[:-1], memory.crossing_grad[:-1]
    sizes = [_new_sizes(tensors, _bytes) for tensors in (trainable, frozen)]
    return Profile(forward, backward, crossing, crossing_grad, memory.kept, *sizes)


class NotTheSame(RuntimeError):
    """The layers, one after the other, do not compute what the network computes."""


def check_same(
    chain: Layers,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Compare the layers, one after the other, with the network as a whole, on one batch and with the same draws.

    Raises:
        NotTheSame: What they return differs by more than rounding.
    """
    layers = _layers(chain)

    def cut(*args: Any, **kwargs: Any) -> Any:
        value = layers[0](*args, **kwargs)
        for layer in layers[1:]:
            value = layer(value)
        return value

    outputs = []
    for network in (chain.whole, cut):
        with _trial(layers, args, kwargs), torch.no_grad(), context():
            # A copy: the network may write into its input.
            call = map_tensors(Tensor.clone, (tuple(args), dict(kwargs)))
            outputs.append(tensors_of(network(*call[0], **call[1])))
    try:
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-2, atol=1e-3, equal_nan=True)
    except AssertionError as error:
        raise NotTheSame(
            f"The network, cut into its layers from {chain.names[0]!r} to {chain.names[-1]!r}, computes something else "
            "than as a whole: its `forward` does more than call its layers. Return its layers, in the order of "
            f"the call, from `configure_stages()`. ({str(error).strip().splitlines()[0]})"
        ) from error


def _layers(chain: Layers) -> list[nn.Module]:
    return [chain.segment(position, position + 1) for position in range(len(chain))]


def _trial(layers: Sequence[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
    devices = gpus_of(layers, tensors_of((tuple(args), dict(kwargs))))
    return trial((module for layer in layers for module in layer.modules()), devices)


def _new_sizes(groups: Sequence[Sequence[Tensor]], size: Callable[[Tensor], int]) -> list[int]:
    """Size of the tensors of each group that no earlier group has."""
    counted: set[int] = set()
    sizes = []
    for group in groups:
        new = {id(tensor): tensor for tensor in group if id(tensor) not in counted}
        counted.update(new)
        sizes.append(sum(map(size, new.values())))
    return sizes


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pass_through(
    layers: Sequence[nn.Module],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    context: Callable[[], AbstractContextManager[object]],
    clock: Callable[[], float],
    memory: _Memory | None = None,
) -> tuple[list[float], list[float]]:
    """Pass one batch through the layers, each cut off from the one before; return what ``clock`` says of each."""
    # The network's own inputs need no gradient.
    call = map_tensors(Tensor.detach, (tuple(args), dict(kwargs)))
    forward, backward = [], []
    for layer in layers:
        inputs = map_tensors(lambda tensor: tensor.detach().requires_grad_(carries_grad(tensor)), call)
        leaves = [tensor for tensor in tensors_of(inputs) if tensor.requires_grad]
        # The layer gets a copy: it may write into its input, which autograd does not allow on a leaf.
        layer_args, layer_kwargs = map_tensors(Tensor.clone, inputs)
        given = tensors_of(call), tensors_of((layer_args, layer_kwargs))
        watch = nullcontext() if memory is None else memory.watching(*given)
        start = clock()
        with watch, context():
            output = layer(*layer_args, **layer_kwargs)
        forward.append(clock() - start)
        heads = [tensor for tensor in tensors_of(output) if carries_grad(tensor)]
        tails = [*leaves, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
        grads = [torch.ones_like(head) for head in heads]
        start = clock()
        if heads and tails:
            # Not `backward`: it would touch `.grad` and run the hooks that wait for it.
            torch.autograd.grad(heads, tails, grads, allow_unused=True)
        backward.append(clock() - start)
        if memory is not None:
            memory.passed_on(tensors_of(output))
        call = ((output,), {})
    return forward, backward


def _train_through(
    chain: Layers,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    context: Callable[[], AbstractContextManager[object]],
    clock: Callable[[], float],
) -> tuple[list[float], list[float]]:
    """Train on one batch, without a step; return what ``clock`` says of each layer's forward and backward.

    A layer ends where the next one begins. Its backward begins when the first gradient w.r.t. what that one was given
    is there: autograd goes through the layers in reverse.
    """
    # A copy: the network may write into its input, which is needed again. Its own inputs need no gradient.
    args, kwargs = map_tensors(lambda tensor: tensor.detach().clone(), (tuple(args), dict(kwargs)))
    starts: list[tuple[int, float]] = []
    began: dict[int, float] = {}
    passed: set[tuple[int, int]] = set()

    def begins(position: int, gradient: Tensor) -> None:
        began.setdefault(position, clock())

    def given(position: int, value: Any) -> None:
        """Watch what the layers before a position have made."""
        made = [tensor for tensor in tensors_of(value) if carries_grad(tensor)]
        for tensor in made:
            if tensor.grad_fn is not None and (id(tensor), tensor._version) not in passed:
                tensor.register_hook(partial(begins, position - 1))  # type: ignore[no-untyped-call]
        passed.clear()
        passed.update((id(tensor), tensor._version) for tensor in made)

    def note(position: int, call: Any) -> None:
        given(position, call)
        starts.append((position, clock()))

    starts.append((0, clock()))
    with context():
        output = chain.watched(note, *args, **kwargs)
    starts.append((len(chain), clock()))
    given(len(chain), output)
    forward = [0.0] * len(chain)
    for (position, start), (_, end) in pairwise(starts):
        forward[position] += end - start
    made = [tensor for tensor in tensors_of(output) if carries_grad(tensor)]
    tails = {id(p): p for layer in _layers(chain) for p in layer.parameters() if p.requires_grad}
    grads = [torch.ones_like(tensor) for tensor in made]
    if made and tails:
        # Not `backward`: it would touch `.grad` and run the hooks that wait for it.
        torch.autograd.grad(made, list(tails.values()), grads, allow_unused=True)
    backward: list[float] = []
    ended = clock()
    for position in range(len(chain)):
        start = began.get(position, ended)
        backward.append(ended - start)
        ended = start
    return forward, backward


class _Memory:
    """Adds up the bytes that layers keep for their backward and pass on, while a batch goes through them."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.kept: list[int] = []
        self.crossing = [0]
        self.crossing_grad = [0]
        self._weights = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
        # By the address of what the next layer is given: the layer that made it, and whether it is counted already.
        self._maker: dict[int, int] = {}
        self._counted: set[int] = set()
        self._uncounted: dict[int, int] = {}

    @contextmanager
    def watching(self, passed: Sequence[Tensor], copies: Sequence[Tensor]) -> Iterator[None]:
        """Count what is saved inside, with the layer that made it; ``copies`` stand for what was passed on."""
        position = len(self.kept)
        self.kept.append(0)
        addresses = [(_address(original), _address(copy)) for original, copy in zip(passed, copies, strict=True)]
        self._counted = {copy for original, copy in addresses if original in self._counted}
        self._maker = {copy: self._maker.get(original, position) for original, copy in addresses}
        # They stay alive until the count, so that no two are found at the same address.
        found: dict[int, Tensor] = {}

        def save(tensor: Tensor) -> Tensor:
            if _address(tensor) not in self._weights:
                found.setdefault(_address(tensor), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            yield
        for address, tensor in found.items():
            if address not in self._counted:
                self.kept[self._maker.get(address, position)] += tensor.untyped_storage().nbytes()
        self._counted |= set(found)

    def passed_on(self, outputs: Sequence[Tensor]) -> None:
        """Count what the layer gives to the next one."""
        last = len(self.kept) - 1
        self._maker = {address: self._maker.get(address, last) for address in map(_address, outputs)}
        self._counted &= set(self._maker)
        self._uncounted = {
            _address(tensor): tensor.untyped_storage().nbytes()
            for tensor in outputs
            if carries_grad(tensor) and _address(tensor) not in self._counted
        }
        self.crossing.append(sum(map(_bytes, outputs)))
        self.crossing_grad.append(sum(_bytes(tensor) for tensor in outputs if carries_grad(tensor)))

    def returned(self) -> None:
        """Count what the last layer gave, which the loss needs."""
        for address, size in self._uncounted.items():
            self.kept[self._maker[address]] += size


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector away: it comes after so many allocations, and so to the same layer in every round."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
