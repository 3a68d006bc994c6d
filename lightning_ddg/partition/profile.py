"""What each layer takes, sends and keeps, measured on a real batch; and what a cut makes of it.

A new figure that a plan or a cut needs is measured here, in the same passes; it leaves no trace on the network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddg.partition.chain import Chain
from lightning_ddg.partition.cost import _cuda_devices, _layers, _map_tensors, _no_trace, _synchronize, _tensors
from lightning_ddg.partition.cut import best_cut


@dataclass(frozen=True)
class Profile:
    """One batch's way through a network of L layers; every list has L entries.

    Attributes:
        forward: Seconds of each layer's forward.
        backward: Seconds of each layer's backward.
        crossing: Bytes that cross a cut before layer p; 0 for p = 0.
        crossing_grad: Bytes of the gradients that come back over it; 0 for p = 0.
        activations: Bytes that each layer keeps for its backward while a batch is in flight.
        parameters: Bytes of each layer's parameters; a shared one counts where it is used first.
    """

    forward: list[float]
    backward: list[float]
    crossing: list[int]
    crossing_grad: list[int]
    activations: list[int]
    parameters: list[int]


def measure_profile(
    chain: Chain,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    repeats: int = 5,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Profile:
    """Measures every layer in turn; the median of the repeats after one warm-up.

    Args:
        chain: The layers, in the mode (train or eval) and on the device they are to be measured in.
        args: Positional arguments of the network's call, on the same device.
        kwargs: Keyword arguments of the network's call.
        repeats: How many times each layer is timed.
        context: Entered around each forward, e.g. autocast.
    """
    layers = _layers(chain)
    devices = _cuda_devices(layers, args, kwargs)
    times: list[list[tuple[float, float]]] = []
    crossing, crossing_grad, activations = [0], [0], []
    with _no_trace(layers, devices):
        for number in range(1 + repeats):
            times.append([])
            call = _map_tensors(Tensor.detach, (tuple(args), dict(kwargs)))
            for layer in layers:
                inputs = _map_tensors(lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad), call)
                leaves = [tensor for tensor in _tensors(inputs) if tensor.requires_grad]
                layer_args, layer_kwargs = _map_tensors(Tensor.clone, inputs)
                kept = _Kept(layer)
                saving: AbstractContextManager[object] = nullcontext() if number else kept.hooks()
                _synchronize(devices)
                start = time.perf_counter()
                with context(), saving:
                    output = layer(*layer_args, **layer_kwargs)
                _synchronize(devices)
                middle = time.perf_counter()
                heads = [tensor for tensor in _tensors(output) if tensor.requires_grad]
                tails = [*leaves, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
                if heads and tails:
                    torch.autograd.grad(heads, tails, [torch.ones_like(head) for head in heads], allow_unused=True)
                _synchronize(devices)
                times[-1].append((middle - start, time.perf_counter() - middle))
                if not number:
                    activations.append(kept.total)
                    crossing.append(sum(map(_bytes, _tensors(output))))
                    crossing_grad.append(sum(map(_bytes, heads)))
                call = ((output,), {})
    forward, backward = (
        [max(median(row[at][which] for row in times[1:]), 1e-9) for at in range(len(layers))] for which in (0, 1)
    )
    counted: set[int] = set()
    parameters = []
    for layer in layers:
        new = [parameter for parameter in layer.parameters() if id(parameter) not in counted]
        counted.update(map(id, new))
        parameters.append(sum(map(_bytes, new)))
    return Profile(forward, backward, crossing[:-1], crossing_grad[:-1], activations, parameters)


class _Kept:
    """Bytes of the storages that autograd saves, each once, without those of the layer's parameters and buffers."""

    def __init__(self, layer: nn.Module) -> None:
        self.total = 0
        owned = (*layer.parameters(), *layer.buffers())
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in owned}

    def hooks(self) -> AbstractContextManager[object]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def best_stages(
    profile: Profile, num_stages: int, forbidden: Collection[int] = (), *, seconds_per_byte: float = 0.0
) -> list[int]:
    """The K - 1 positions at which stages 2 to K start, so that the slowest stage is as fast as it can be.

    Raises:
        ValueError: If the layers cannot be cut into so many stages.
    """
    del seconds_per_byte
    return best_cut([f + b for f, b in zip(profile.forward, profile.backward, strict=True)], num_stages, forbidden)


def stage_memory(profile: Profile, starts: Sequence[int], optimizer_copies: int = 2) -> list[int]:
    """Bytes that each stage holds: weights, gradients, stashed weights, optimizer state, batches in flight."""
    num_stages = len(starts) + 1
    held = []
    for stage, (start, stop) in enumerate(pairwise([0, *starts, len(profile.forward)]), start=1):
        delay = num_stages - stage
        weights = sum(profile.parameters[start:stop])
        held.append(weights * (2 + delay + optimizer_copies) + sum(profile.activations[start:stop]) * (delay + 1))
    return held


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
