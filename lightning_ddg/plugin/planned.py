"""A plan of cuts for a LightningModule, without a fit: what is cut is found, and measured on a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import nn

from lightning_ddg.core.pytree import map_tensors
from lightning_ddg.core.split import even_sizes, length_of, split
from lightning_ddg.core.staleness import Staleness
from lightning_ddg.network.cut import CostModel
from lightning_ddg.network.find import find_network
from lightning_ddg.network.profile import NotTheSame, check_same, measure_profile
from lightning_ddg.network.replay.chain import ReplayedChain
from lightning_ddg.network.restore import in_mode
from lightning_ddg.planning.plan import NUM_STAGES, Plan, make_plan
from lightning_ddg.planning.simulate import SECONDS_PER_BYTE
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.finding import Found, choose, target_of
from lightning_ddg.plugin.host import LightningModule
from lightning_ddg.plugin.measure import NotCalled, call_of_network, logging_muted
from lightning_ddg.plugin.options import check_slack
from lightning_ddg.plugin.program import Program, calls_in_step, layers_of_step, step_on


def plan_module(
    module: LightningModule,
    batch: Any,
    num_stages: int | Sequence[int] = NUM_STAGES,
    *,
    optimizer_copies: int = 2,
    recompute: bool = False,
    stash: bool = True,
    micro_batches: int | Sequence[int] = (),
    finish: float = 0.0,
    slack: int = 0,
    latency_ms: float = 0.0,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Plan:
    """Find a module's network, measure it on a batch, and plan cuts of it; leave the module as it was.

    Args:
        module: The module, on the device on which it shall be measured.
        batch: What its ``training_step`` takes, on the same device.
        num_stages: One number of stages, or several.
        optimizer_copies: Tensors of a parameter's size that the optimizer will keep for it.
        recompute: Whether stages shall run forwards again instead of keeping activations.
        stash: Whether stages shall keep the weights of batches in flight.
        micro_batches: A number of micro-batches into which the batch is split for a comparison, or several.
        finish: The last part of a fit that is synchronous, in 0..1, whose cost is to be known.
        slack: How many batches more are in flight between neighbours: the strategy's.
        latency_ms: Milliseconds that any message is under way, one way; the slack that hides it is printed.
        context: Entered around each forward, e.g. autocast.

    Raises:
        TypeError: The network cannot be found.
        ValueError: ``num_stages`` is empty, the network cannot be cut at all, the batch not be split, or ``finish``,
            ``slack`` or ``latency_ms`` has no meaning.
        RuntimeError: The training step does not call the network, or it or the layers fail, or the layers one after the
            other compute something else than the network.
    """
    numbers = [num_stages] if isinstance(num_stages, int) else list(dict.fromkeys(num_stages))
    if not numbers:
        raise ValueError(f"num_stages={num_stages!r} names no number of stages: give one, or several, such as [2, 4].")
    Staleness(finish=finish)  # says what is wrong with it
    check_slack(slack)
    _check_latency(latency_ms)
    counts = [micro_batches] if isinstance(micro_batches, int) else list(dict.fromkeys(micro_batches))
    parts = {count: _first_of(batch, count) for count in counts}
    configure = getattr(module, "configure_stages", None)
    layers = configure() if callable(configure) else None

    with in_mode(module, training=True), logging_muted(module):
        network, program = _found(module, layers, batch, min(numbers), context)

        def call(part: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if program is None:
                return _call_of_network(module, network.target, network.target_name, part, context)
            return program.call(compat.step_arguments(module.training_step, map_tensors(torch.clone, part))), {}

        whole = call(batch)
        try:
            check_same(network.chain, *whole, context)
            profile = measure_profile(network.chain, *whole, context=context)
            profiles = {
                count: measure_profile(network.chain, *call(part), context=context) for count, part in parts.items()
            }
        except NotTheSame:
            raise
        except Exception as error:
            raise RuntimeError(
                f"The layers could not be measured one after the other ({type(error).__name__}: {error}). They must"
                " run so for training in stages too; return others from `configure_stages()`."
            ) from error
    model = CostModel(profile, recompute, stash, optimizer_copies, SECONDS_PER_BYTE, latency_ms / 1e3, slack)
    split_models = {count: replace(model, profile=one) for count, one in profiles.items()}
    return make_plan(network.chain, model, numbers, split_models, finish)


def _found(
    module: LightningModule,
    layers: Any,
    batch: Any,
    num_stages: int,
    context: Callable[[], AbstractContextManager[object]],
) -> Found:
    """The network, or the step itself."""

    def example(target: nn.Module, name: str) -> Any:
        call = _call_of_network(module, target, name, batch, context)
        return map_tensors(torch.Tensor.detach, call)

    def of_step(program: Program) -> ReplayedChain:
        arguments = compat.step_arguments(module.training_step, map_tensors(torch.clone, batch))
        return layers_of_step(module, program, program.call(arguments), ())

    network = partial(find_network, module, layers, example=example)
    if layers is not None or not module.automatic_optimization:
        return network(), None
    target = target_of(module, "DDGStrategy", example)
    calls = None
    # Where the step fails, the call of the network will say so.
    with suppress(Exception), context():
        calls = calls_in_step(module, target, step_on(module, map_tensors(torch.clone, batch)))
    return choose(module, network, target, calls, of_step, num_stages)


def _check_latency(latency_ms: Any) -> None:
    number = isinstance(latency_ms, float | int) and not isinstance(latency_ms, bool)
    if not number or not isfinite(latency_ms) or latency_ms < 0:
        raise ValueError(
            f"latency_ms={latency_ms!r} is not how long a message is under way: give milliseconds one way, 0 or more."
        )


def _first_of(batch: Any, count: int) -> Any:
    """The first, and so the largest, of a batch's micro-batches."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"micro_batches={count!r} is not a number of micro-batches: give a positive integer.")
    length = length_of(batch) if count > 1 else 1
    if count > length:
        raise ValueError(f"micro_batches={count}, but the batch has {length} samples: give no more than these.")
    return split(batch, even_sizes(length, count))[0] if count > 1 else batch


def _call_of_network(
    module: LightningModule,
    target: nn.Module,
    name: str,
    batch: Any,
    context: Callable[[], AbstractContextManager[object]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the training step passes to the network, the module ``target``."""
    try:
        # A copy: the step may change its batch in place.
        return call_of_network(module, target, name, map_tensors(torch.clone, batch), context)
    except NotCalled:
        raise
    except Exception as error:
        raise RuntimeError(
            f"`training_step` failed before it called the network ({type(error).__name__}: {error}). Give the batch as"
            " the training step takes it, on the module's device."
        ) from error
