"""The options of an optimizer in its next steps: what the learning rate's scheduler would make of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_ddg.core.extrapolation import Options, Outlook
from lightning_ddg.plugin.host import is_overridden, rank_zero_info
from lightning_ddg.plugin.site import Site


def outlook_of(site: Site, optimizers: Sequence[Optimizer]) -> Outlook | None:
    """Return what is known of the optimizer's steps, if the rule asks for that.

    Raises:
        ValueError: If the rule needs another optimizer.
    """
    rule = site.options.staleness
    if not site.fits or not optimizers or not (rule.extrapolate or rule.compensate):
        return None
    (optimizer,) = optimizers
    if rule.compensate:
        check_momentum(optimizer)

    def options(groups: Sequence[Options], count: int) -> list[Sequence[Options]]:
        return next_options(groups, count, optimizer, _schedulers(site))

    outlook = Outlook(optimizer, options)
    if rule.extrapolate:
        rank_zero_info(_said(outlook, site.options.micro_batches_for(site.num_stages)))
    return outlook


def _said(outlook: Outlook, micro_batches: int) -> str:
    """What becomes of stale gradients, in a sentence."""
    optimizer = outlook.optimizer
    name = type(optimizer).__name__
    known = any(outlook.knows(parameter) for group in optimizer.param_groups for parameter in group["params"])
    how = f"by {name}'s own recursion" if known else f"on the line of the last step, as none is known for {name}"
    parts = f", and a batch travels in up to {micro_batches} micro-batches" if micro_batches > 1 else ""
    return f"Stale gradients are corrected: forwards run on weights that are extrapolated {how}{parts}."


def check_momentum(optimizer: Optimizer) -> None:
    """Refuse spike compensation of what has no momentum as SGD has it.

    Raises:
        ValueError: Naming the optimizer.
    """
    name = type(optimizer).__name__
    if type(optimizer) is not SGD:
        raise ValueError(
            f"compensate=True makes late gradients up through the momentum of torch.optim.SGD, but the optimizer is"
            f" {name}. Use SGD with momentum, or extrapolate=True, which serves every optimizer."
        )
    for index, group in enumerate(optimizer.param_groups):
        if not 0 < group["momentum"] < 1:
            raise ValueError(
                f"compensate=True makes late gradients up through the momentum of {name}, but group {index} has"
                f" momentum={group['momentum']}. Use one between 0 and 1, or leave compensate out."
            )


def next_options(
    groups: Sequence[Options], count: int, optimizer: Optimizer, schedulers: Sequence[LRScheduler]
) -> list[Sequence[Options]]:
    """Return the groups' options in each of the next steps, the first of which has today's.

    Copies of the schedulers are stepped aside, on copies of the groups. Where one cannot be copied or stepped further,
    the options stay as they are from there on.

    Args:
        groups: The optimizer's.
        count: How many steps.
        optimizer: Whom the schedulers schedule.
        schedulers: Are stepped after each step.
    """
    aside = [{key: _own(value) for key, value in group.items() if key != "params"} for group in groups]
    steps: list[Sequence[Options]] = [[dict(group) for group in aside]]
    if not schedulers or count == 1:
        return steps * count
    try:
        memo: dict[int, Any] = {id(optimizer): SimpleNamespace(param_groups=aside, step=_stepped, _opt_called=True)}
        copies = [copy.deepcopy(scheduler, memo) for scheduler in schedulers]
        while len(steps) < count:
            for scheduler in copies:
                scheduler.step()
            steps.append([{key: _own(value) for key, value in group.items()} for group in aside])
    except Exception:  # noqa: BLE001 - a scheduler may refuse in any way, as OneCycleLR does at its end
        steps += [steps[-1]] * (count - len(steps))
    return steps


def _schedulers(site: Site) -> list[LRScheduler]:
    """Those that Lightning steps after each step of the optimizer; when others step nobody knows beforehand."""
    module = site.module
    if not module.automatic_optimization or is_overridden("lr_scheduler_step", module):
        return []
    return [
        config.scheduler
        for config in site.trainer.lr_scheduler_configs
        if config.interval == "step" and config.frequency == 1 and not config.reduce_on_plateau
        if isinstance(config.scheduler, LRScheduler)
    ]


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _stepped() -> None:
    """Stand for an optimizer's step, which schedulers look for."""


_stepped._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
