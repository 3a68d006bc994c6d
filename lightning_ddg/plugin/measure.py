"""A LightningModule's network, measured on a batch as the module's own training step passes it on.

Called when a fit needs the costs of the layers to cut by, and for a plan of cuts without a fit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_ddg.core.pytree import map_tensors
from lightning_ddg.core.split import even_sizes, length_of, split
from lightning_ddg.network.cut import CostModel, Costs
from lightning_ddg.network.find import Network, find_network
from lightning_ddg.network.layers import Call
from lightning_ddg.network.profile import NotTheSame, check_same, flop_costs, measure_profile
from lightning_ddg.network.restore import in_mode, trainability_kept, untouched
from lightning_ddg.planning.plan import NUM_STAGES, Plan, make_plan
from lightning_ddg.planning.simulate import SECONDS_PER_BYTE
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.host import LightningModule, Precision
from lightning_ddg.plugin.redirection import Redirection, StepDone
from lightning_ddg.plugin.step import no_call_of


def measured_costs(
    module: LightningModule,
    network: Network,
    call: Callable[[torch.device], Call],
    balance: str,
    precision: Precision,
    device: torch.device,
) -> Costs:
    """Return what each layer costs for the first batch, by ``balance``; leave the module as it was.

    The batch also goes through the whole network, uncut: both must give the same. Where the layers cannot be measured,
    a warning says why, and they cost their parameters.

    Args:
        module: The LightningModule.
        network: Its network.
        call: Returns the arguments of the network's call for the first batch, on a device.
        balance: ``"time"`` or ``"flops"``.
        precision: Whose context the forward runs in.
        device: Where to measure.

    Raises:
        NotTheSame: The layers one after the other compute something else than the network.
    """
    unmute = compat.mute_logging(module)
    try:
        with trainability_kept(module), untouched(module.modules()):
            module.to(device)
            args, kwargs = call(device)
            check_same(network.chain, args, kwargs, precision.train_step_context)
            if balance == "flops":
                return Costs(flop_costs(network.chain, args, kwargs), "FLOPs")
            profile = measure_profile(network.chain, args, kwargs, context=precision.train_step_context)
            return Costs.measured(CostModel(profile))
    except NotTheSame:
        raise
    except Exception as error:  # noqa: BLE001 - any layer and any user code may fail here; training will tell
        # Not on rank zero only: the rank that reads, and so measures, is another one.
        warnings.warn(
            f"The layers could not be measured for balance={balance!r} ({type(error).__name__}: {error}),"
            " so that the network is cut by its parameters. Give `split_points` or balance='parameters' to decide"
            " it yourself.",
            stacklevel=2,
        )
        return Costs.by_parameters(network.chain)
    finally:
        unmute()
        if device.type != "cpu":
            module.to("cpu")
        if device.type == "cuda":
            # What the whole network needed is more than a stage will.
            torch.cuda.empty_cache()


def copies_kept(optimizer: Optimizer | None) -> int:
    """Return how many tensors of a parameter's size an optimizer keeps for it: what its kind needs, else Adam's 2."""
    if isinstance(optimizer, torch.optim.SGD):
        return int(any(group["momentum"] for group in optimizer.param_groups))
    if optimizer is not None and any(group.get("amsgrad") for group in optimizer.param_groups):
        return 3
    return 2


class NotCalled(RuntimeError):
    """A training step has ended without a call of the network."""


def first_call(
    module: LightningModule,
    target: nn.Module,
    target_name: str,
    batch: Any,
    precision: Precision,
    device: torch.device,
    part: Callable[[Any], Any] = lambda batch: batch,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what the user's training step passes to the network for the first batch.

    Args:
        module: The LightningModule, on ``device``.
        target: The module whose call is the call of the network.
        target_name: Its name.
        batch: The first training batch; the step may change it in place.
        precision: Whose context the step runs in.
        device: Where the batch goes.
        part: Returns the micro-batch of the batch that the step gets, or all of it.

    Raises:
        NotCalled: The step does not call the network.
    """

    batch = transferred(module, batch, precision, device, part)
    return call_of_network(module, target, target_name, batch, precision.train_step_context)


def transferred(
    module: LightningModule, batch: Any, precision: Precision, device: torch.device, part: Callable[[Any], Any]
) -> Any:
    """Return a batch, or the part of it that ``part`` returns, as the training step gets it."""
    unmute = compat.mute_logging(module)
    try:
        return part(compat.transfer_batch(module, precision.convert_input(batch), device))
    finally:
        unmute()


def call_of_network(
    module: LightningModule,
    target: nn.Module,
    target_name: str,
    batch: Any,
    context: Callable[[], AbstractContextManager[object]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what the user's training step passes to the network for a batch.

    Args:
        module: The LightningModule.
        target: The module whose call is the call of the network.
        target_name: Its name.
        batch: What the step takes; the step may change it in place.
        context: Entered around the step, e.g. autocast.

    Raises:
        NotCalled: The step does not call the network.
    """

    def step() -> object:
        return module.training_step(*compat.step_arguments(module.training_step, batch))

    return call_in_step(module, target, target_name, step, context)


def call_in_step(
    module: LightningModule,
    target: nn.Module,
    target_name: str,
    step: Callable[[], object],
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a step of a module passes to the network: see :func:`call_of_network`."""

    def capture(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            # A teacher's call, say: nothing is trained by it.
            return target.forward(*args, **kwargs)
        raise StepDone((args, kwargs))

    redirection = Redirection(target)
    unmute = compat.mute_logging(module)
    try:
        with untouched(module.modules()), redirection.handled_by(capture), context(), torch.enable_grad():
            step()
    except StepDone as done:
        return cast(tuple[tuple[Any, ...], dict[str, Any]], done.value)
    finally:
        unmute()
        redirection.remove()
    raise NotCalled(no_call_of(target_name))


def run_on_cpu(step: Callable[..., object], args: Any, kwargs: Any) -> object:
    """Run a step on copies of its arguments on the CPU."""
    args, kwargs = map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), (args, kwargs))
    return step(*args, **kwargs)


def plan_module(
    module: LightningModule,
    batch: Any,
    num_stages: int | Sequence[int] = NUM_STAGES,
    *,
    optimizer_copies: int = 2,
    recompute: bool = False,
    stash: bool = True,
    micro_batches: int | Sequence[int] = (),
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
        context: Entered around each forward, e.g. autocast.

    Raises:
        TypeError: The network cannot be found.
        ValueError: ``num_stages`` is empty, the network cannot be cut at all, or the batch not be split.
        RuntimeError: The training step does not call the network, or it or the layers fail, or the layers one after the
            other compute something else than the network.
    """
    numbers = [num_stages] if isinstance(num_stages, int) else list(dict.fromkeys(num_stages))
    if not numbers:
        raise ValueError(f"num_stages={num_stages!r} names no number of stages: give one, or several, such as [2, 4].")
    counts = [micro_batches] if isinstance(micro_batches, int) else list(dict.fromkeys(micro_batches))
    parts = {count: _first_of(batch, count) for count in counts}
    configure = getattr(module, "configure_stages", None)
    layers = configure() if callable(configure) else None

    def example(target: nn.Module, name: str) -> Any:
        call = _call_of_network(module, target, name, batch, context)
        return map_tensors(torch.Tensor.detach, call)

    with in_mode(module, training=True):
        network = find_network(module, layers, example=example)
        args, kwargs = _call_of_network(module, network.target, network.target_name, batch, context)
        try:
            check_same(network.chain, args, kwargs, context)
            profile = measure_profile(network.chain, args, kwargs, context=context)
            profiles = {}
            for count, part in parts.items():
                args, kwargs = _call_of_network(module, network.target, network.target_name, part, context)
                profiles[count] = measure_profile(network.chain, args, kwargs, context=context)
        except NotTheSame:
            raise
        except Exception as error:
            raise RuntimeError(
                f"The layers could not be measured one after the other ({type(error).__name__}: {error}). They must"
                " run so for training in stages too; return others from `configure_stages()`."
            ) from error
    model = CostModel(profile, recompute, stash, optimizer_copies, SECONDS_PER_BYTE)
    split_models = {count: replace(model, profile=one) for count, one in profiles.items()}
    return make_plan(network.chain, model, numbers, split_models)


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
