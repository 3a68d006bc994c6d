"""What each layer of a chain costs: parameters, FLOPs, or measured seconds.

A new measure is a new function here; it returns one number per layer and leaves no trace on the network.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from lightning_ddg.partition.chain import Chain

_Meter = Callable[[Callable[[], Any]], tuple[float, Any]]


def parameter_costs(chain: Chain) -> list[float]:
    """Return the number of parameters of each layer; a shared one counts where it is used first."""
    counted: set[int] = set()
    costs = []
    for layer in _layers(chain):
        new = [parameter for parameter in layer.parameters() if id(parameter) not in counted]
        counted.update(map(id, new))
        costs.append(float(sum(parameter.numel() for parameter in new)))
    return costs


def flop_costs(chain: Chain, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[float]:
    """Return the FLOPs of each layer's forward and backward, plus one, so that no layer is free.

    Counted by ``torch.utils.flop_counter``: matrix products, convolutions and attention; element-wise work counts zero.

    Args:
        chain: The layers, in the mode (train or eval) and on the device they are to be costed in.
        args: Positional arguments of the network's call, on the same device.
        kwargs: Keyword arguments of the network's call.
    """

    def meter(work: Callable[[], Any]) -> tuple[float, Any]:
        with FlopCounterMode(display=False) as counter:
            output = work()
        return counter.get_total_flops() + 1.0, output

    layers = _layers(chain)
    with _no_trace(layers, _cuda_devices(layers, args, kwargs)):
        return _measure(layers, args, kwargs, nullcontext, meter)


def time_costs(
    chain: Chain,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    repeats: int = 5,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[float]:
    """Return the median seconds of each layer's forward and backward, after one warm-up.

    Each repeat goes through all layers, so that a busy moment of the machine is spread over them.

    Args:
        chain: The layers, in the mode (train or eval) and on the device they are to be costed in.
        args: Positional arguments of the network's call, on the same device.
        kwargs: Keyword arguments of the network's call.
        repeats: How many times each layer is measured.
        context: Entered around each forward, e.g. autocast.

    Raises:
        ValueError: ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: measure each layer at least once.")
    layers = _layers(chain)
    devices = _cuda_devices(layers, args, kwargs)

    def meter(work: Callable[[], Any]) -> tuple[float, Any]:
        _synchronize(devices)
        start = time.perf_counter()
        output = work()
        _synchronize(devices)
        return time.perf_counter() - start, output

    with _no_trace(layers, devices):
        rounds = [_measure(layers, args, kwargs, context, meter) for _ in range(1 + repeats)]
    # A clock that is too coarse to see a layer must not make it free.
    return [max(median(seconds), 1e-9) for seconds in zip(*rounds[1:], strict=True)]


def _layers(chain: Chain) -> list[nn.Module]:
    return [chain.segment(position, position + 1) for position in range(len(chain))]


def _measure(
    layers: Sequence[nn.Module],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    context: Callable[[], AbstractContextManager[object]],
    meter: _Meter,
) -> list[float]:
    """Pass one batch through the layers, and meter the forward and backward of each on its own."""
    # The network's own inputs need no gradient.
    call = _map_tensors(Tensor.detach, (tuple(args), dict(kwargs)))
    costs = []
    for layer in layers:
        # Cut off from the layer before it.
        inputs = _map_tensors(lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad), call)
        leaves = [tensor for tensor in _tensors(inputs) if tensor.requires_grad]
        # The layer gets a copy: it may write into its input, which autograd does not allow on a leaf.
        layer_args, layer_kwargs = _map_tensors(Tensor.clone, inputs)
        cost, output = meter(partial(_forward_backward, layer, layer_args, layer_kwargs, leaves, context))
        costs.append(cost)
        call = ((output,), {})
    return costs


def _forward_backward(
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: Sequence[Tensor],
    context: Callable[[], AbstractContextManager[object]],
) -> Any:
    with context():
        output = layer(*args, **kwargs)
    heads = [tensor for tensor in _tensors(output) if tensor.requires_grad]
    tails = [*leaves, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    if heads and tails:
        # Not `backward`: it would touch `.grad` and run the hooks that wait for it.
        torch.autograd.grad(heads, tails, [torch.ones_like(head) for head in heads], allow_unused=True)
    return output


def _map_tensors(function: Callable[[Tensor], Any], nest: Any) -> Any:
    """Replace each tensor in a nest of tuples, lists, dicts and dataclasses."""

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            # Neither `replace` nor plain assignment: the first runs `__init__`, the second fails on a frozen one.
            new = copy(leaf)
            for field in dataclasses.fields(leaf):
                object.__setattr__(new, field.name, _map_tensors(function, getattr(leaf, field.name)))
            return new
        return leaf

    return tree_map(visit, nest)


def _tensors(nest: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map_tensors(found.append, nest)
    return found


def _cuda_devices(layers: Sequence[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.device]:
    tensors = _tensors((tuple(args), dict(kwargs)))
    for layer in layers:
        tensors += [*layer.parameters(), *layer.buffers()]
    return sorted({tensor.device for tensor in tensors if tensor.is_cuda}, key=str)


def _synchronize(devices: Sequence[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


@contextmanager
def _no_trace(layers: Sequence[nn.Module], devices: Sequence[torch.device]) -> Iterator[None]:
    """Compute gradients whatever the caller's mode, then put buffers and torch's generators back."""
    tables = {id(module): module._buffers for layer in layers for module in layer.modules()}
    saved = [
        (table, {name: (buffer, None if buffer is None else buffer.detach().clone()) for name, buffer in table.items()})
        for table in tables.values()
    ]
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for table, buffers in saved:
                # A forward may also have bound another tensor to the name, or added a name.
                table.clear()
                for name, (buffer, value) in buffers.items():
                    table[name] = buffer
                    if buffer is not None and value is not None:
                        buffer.copy_(value)
