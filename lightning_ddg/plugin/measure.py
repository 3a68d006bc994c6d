"""A LightningModule's network, measured on a batch as the module's own training step passes it on.

Called when a fit needs the costs of the layers to cut by, and for a plan of cuts without a fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_ddg.network.cut import CostModel, Costs
from lightning_ddg.network.find import Network
from lightning_ddg.network.layers import Call
from lightning_ddg.network.profile import NotTheSame, check_same, flop_costs, measure_profile
from lightning_ddg.network.restore import trainability_kept, untouched
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.host import LightningModule, Precision
from lightning_ddg.plugin.redirection import Redirection, StepDone
from lightning_ddg.plugin.step import no_call_of
from lightning_ddg.plugin.warn import warn


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
    try:
        with logging_muted(module), trainability_kept(module), untouched(module.modules()):
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
        warn(
            f"The layers could not be measured for balance={balance!r} ({type(error).__name__}: {error}),"
            " so that the network is cut by its parameters. Give `split_points` or balance='parameters' to decide"
            " it yourself.",
        )
        return Costs.by_parameters(network.chain)
    finally:
        if device.type != "cpu":
            module.to("cpu")
        if device.type == "cuda":
            # What the whole network needed is more than a stage will.
            torch.cuda.empty_cache()


@contextmanager
def logging_muted(module: LightningModule) -> Iterator[None]:
    """Let the training step log nothing inside."""
    unmute = compat.mute_logging(module)
    try:
        yield
    finally:
        unmute()


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
    with logging_muted(module):
        return part(compat.transfer_batch(module, precision.convert_input(batch), device))


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
