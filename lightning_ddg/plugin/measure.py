"""Where a LightningModule's network is cut: the user says so, a checkpoint remembers, or a real batch is measured.

The arithmetic of cutting is in :mod:`~lightning_ddg.network`, which knows no Lightning; only what needs the module's
own training step and data lives here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_ddg.core.tensors import map_tensors
from lightning_ddg.network.cut import best_cut, best_stages, check_cut, cut_at, forbidden_cuts, stage_memory
from lightning_ddg.network.find import Network
from lightning_ddg.network.layers import Layers
from lightning_ddg.network.profile import NotTheSame, Profile, check_same, flop_costs, measure_profile, parameter_costs
from lightning_ddg.network.restore import trainability_kept, untouched
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.redirection import Seam, StepDone
from lightning_ddg.plugin.refusals import no_call_of

BALANCES = {"time": "measured time", "parameters": "parameters", "flops": "FLOPs"}


@dataclass(frozen=True)
class Measured:
    """What the layers, and the way between two stages, cost.

    Attributes:
        profile: Of the layers.
        seconds_per_byte: For a message from one stage to the next.
        optimizer_copies: Tensors of a parameter's size that the optimizer keeps for it.
    """

    profile: Profile
    seconds_per_byte: float
    optimizer_copies: int


@dataclass(frozen=True)
class Cut:
    """A network's layers and where its stages begin.

    Attributes:
        chain: The layers.
        starts: Positions at which stages ``2..K`` begin.
        costs: Cost of each layer.
        unit: What the costs count, for people.
        measured: What was measured to decide it, if it was.
    """

    chain: Layers
    starts: list[int]
    costs: list[float]
    unit: str
    measured: Measured | None = None

    @property
    def bounds(self) -> list[int]:
        """Where each stage begins, and the end of the last."""
        return [0, *self.starts, len(self.chain)]

    @property
    def split_points(self) -> list[str]:
        """Names of the layers that begin stages ``2..K``."""
        return [self.chain.names[start] for start in self.starts]

    def segments(self) -> list[nn.Module]:
        """The stages as modules, sharing the layers."""
        return [self.chain.segment(start, stop) for start, stop in pairwise(self.bounds)]

    def layers_of(self, stage: int) -> Sequence[nn.Module]:
        """The layers of stage ``1..K``."""
        return self.chain.modules(self.bounds[stage - 1], self.bounds[stage])


def decide_cut(
    chain: Layers,
    num_stages: int,
    split_points: list[str] | None,
    recorded: list[str] | None,
    balance: str,
    measure: Callable[[], Measured | list[float] | None],
    max_memory: int | None = None,
) -> Cut:
    """Cuts where the user says, else where an earlier run did, else evenly.

    Args:
        chain: The layers.
        num_stages: ``K``.
        split_points: The user's choice, if any.
        recorded: An earlier run's choice, if any; ignored where it does not fit, into ``max_memory`` neither.
        balance: What to even out.
        measure: Gives the costs of the layers, the same on every rank: a profile, or numbers, or ``None`` if there are
            none; called only if needed, and then on every rank.
        max_memory: Bytes that no stage may need, for ``balance="time"``.

    Raises:
        ValueError: If the network cannot be cut so.
    """
    forbidden = forbidden_cuts(chain)
    parameters = parameter_costs(chain)
    if split_points is not None:
        starts = cut_at(chain, split_points, num_stages)
        check_cut(starts, forbidden)
        return Cut(chain, starts, parameters, BALANCES["parameters"])
    earlier: list[int] | None = None
    if recorded is not None:
        # The network, or the number of stages, may be another one since.
        with suppress(ValueError):
            starts = cut_at(chain, recorded, num_stages)
            check_cut(starts, forbidden)
            if max_memory is None:
                return Cut(chain, starts, parameters, BALANCES["parameters"])
            earlier = starts
    # Before anything is measured: it says whether so many stages are possible at all.
    starts = best_cut(parameters, num_stages, forbidden)
    costs = None if balance == "parameters" else measure()
    if max_memory is not None and not isinstance(costs, Measured):
        raise ValueError(
            f"max_memory={max_memory} bytes cannot be kept, as the layers could not be measured (a warning says why)."
            " Make the training step run on the first batch, or leave `max_memory` out and give `split_points`."
        )
    if costs is None:
        return Cut(chain, starts, parameters, BALANCES["parameters"])
    if not isinstance(costs, Measured):
        return Cut(chain, best_cut(costs, num_stages, forbidden), costs, BALANCES[balance])
    profile, copies = costs.profile, costs.optimizer_copies
    if earlier is not None and max_memory is not None and max(stage_memory(profile, earlier, copies)) <= max_memory:
        return Cut(chain, earlier, profile.seconds, BALANCES[balance], costs)
    starts = best_stages(
        profile,
        num_stages,
        forbidden,
        seconds_per_byte=costs.seconds_per_byte,
        max_memory=max_memory,
        optimizer_copies=copies,
    )
    return Cut(chain, starts, profile.seconds, BALANCES[balance], costs)


def measured_costs(
    module: LightningModule, network: Network, loaders: Any, balance: str, precision: Precision, device: torch.device
) -> Profile | list[float] | None:
    """Cost of each layer for the first batch, by ``balance``; leaves the module as it was.

    The batch also goes through the whole network, uncut: both must give the same.

    Args:
        module: The LightningModule.
        network: Its network.
        loaders: The training loaders that can :meth:`~lightning_ddg.plugin.data.SourceLoader.peek`, in the user's nest.
        balance: ``"time"`` or ``"flops"``.
        precision: Whose context the forward runs in.
        device: Where to measure.

    Returns:
        The costs, or ``None`` (and a warning) if the layers cannot be measured.

    Raises:
        RuntimeError: If the layers one after the other compute something else than the network.
    """
    try:
        with trainability_kept(module):
            module.to(device)
            args, kwargs = first_call(module, network.target, network.target_name, loaders, precision, device)
            check_same(network.chain, args, kwargs, precision.train_step_context)
            if balance == "flops":
                return flop_costs(network.chain, args, kwargs)
            return measure_profile(network.chain, args, kwargs, context=precision.train_step_context)
    except NotTheSame:
        raise
    except Exception as error:  # noqa: BLE001 - any layer and any user code may fail here; training will tell
        # Not on rank zero only: the rank that reads, and so measures, is another one.
        warnings.warn(
            f"The layers could not be measured for balance={balance!r} ({type(error).__name__}: {error}),"
            f" so that the network is cut by"
            " its parameters. Give `split_points` or balance='parameters' to decide it yourself.",
            stacklevel=2,
        )
        return None
    finally:
        if device.type != "cpu":
            module.to("cpu")
        if device.type == "cuda":
            # What the whole network needed is more than a stage will.
            torch.cuda.empty_cache()


def copies_kept(optimizer: Optimizer | None) -> int:
    """How many tensors of a parameter's size an optimizer keeps for it: what its kind needs, else Adam's 2."""
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
    loaders: Any,
    precision: Precision,
    device: torch.device,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the user's training step passes to the network for the first batch.

    Args:
        module: The LightningModule, on ``device``.
        target: The module whose call is the call of the network.
        target_name: Its name.
        loaders: The training loaders that can :meth:`~lightning_ddg.plugin.data.SourceLoader.peek`, in the user's nest.
        precision: Whose context the step runs in.
        device: Where the batch goes.

    Raises:
        RuntimeError: If the step does not call the network.
    """

    unmute = compat.mute_logging(module)
    try:
        # A copy: the hooks may change the batch in place, and training will see it again.
        batch = map_tensors(torch.clone, tree_map(_peek, loaders))
        batch = compat.transfer_batch(module, precision.convert_input(batch), device)
    finally:
        unmute()
    return call_of_network(module, target, target_name, batch, precision.train_step_context)


def call_of_network(
    module: LightningModule,
    target: nn.Module,
    target_name: str,
    batch: Any,
    context: Callable[[], AbstractContextManager[object]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the user's training step passes to the network for a batch.

    Args:
        module: The LightningModule.
        target: The module whose call is the call of the network.
        target_name: Its name.
        batch: What the step takes; the step may change it in place.
        context: Entered around the step, e.g. autocast.

    Raises:
        NotCalled: If the step does not call the network.
    """

    def capture(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise StepDone((args, kwargs))

    seam = Seam(target, {})
    unmute = compat.mute_logging(module)
    try:
        with untouched(module.modules()), seam.handled_by(capture), context(), torch.enable_grad():
            module.training_step(*compat.step_arguments(module.training_step, batch))
    except StepDone as done:
        return cast(tuple[tuple[Any, ...], dict[str, Any]], done.value)
    finally:
        unmute()
        seam.remove()
    raise NotCalled(no_call_of(target_name))


def _peek(loader: Any) -> Any:
    try:
        return loader.peek()
    except StopIteration:
        raise RuntimeError("a training loader has no batch") from None
