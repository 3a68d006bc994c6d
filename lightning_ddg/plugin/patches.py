"""What is changed of Lightning, of the user's module and of the optimizers for the length of a run, in order.

Each change undoes itself when the run ends. Why each is needed stands with the function that makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_ddg.core.execution import Execution
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.clipping import clip_norm_per_stage, clip_values_that_exist
from lightning_ddg.plugin.compat_data import bypass_before_batch_transfer
from lightning_ddg.plugin.drain import Drain
from lightning_ddg.plugin.local_metrics import keep_metrics_local
from lightning_ddg.plugin.ownership import Ownership
from lightning_ddg.plugin.site import Site


def patch_run(site: Site) -> None:
    """Change what would lock several processes together, or fail in one of them."""
    if site.one_process:
        return
    keep, trainer, module = site.undo.callback, site.trainer, site.module
    keep_metrics_local(type(trainer.strategy), site.ranks.replicas)
    if site.ranks.replicas.size == 1:
        keep(compat.silence_sync_dist_advice())
    keep(clip_values_that_exist(site.precision))
    keep(compat.silence_sigterm_broadcast(trainer))
    if site.fits and site.device.type != "cpu":
        keep(compat.hide_example_input(module))
    if not site.ranks.reads:
        keep(bypass_before_batch_transfer(module))


def patch_fit(site: Site, ownership: Ownership) -> None:
    """Change what goes by all parameters, or by the loss, where a process has a part of them."""
    keep = site.undo.callback
    if site.one_process:
        keep(clip_norm_per_stage(site.precision, ownership.stage_of))
    if not site.ranks.is_rank_zero:
        keep(compat.mute_training_logs(site.trainer, site.module))
    keep(compat.filter_on_optimizer_by_identity())
    keep(compat.on_exception_in_fit(site.trainer, site.fail))


def watch_steps(site: Site, optimizers: Sequence[Optimizer], execution: Execution, drain: Drain) -> None:
    """Hear of each step of an optimizer: a user may call the optimizer itself, of which Lightning knows nothing."""

    def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Lightning steps with a closure, whose forward is still to come; its own hook comes after that.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            execution.before_step()

    def after(*_: object) -> None:
        drain.stepped()
        execution.after_step()
        if not site.one_process:
            site.weights.stepped()

    for optimizer in optimizers:
        site.undo.callback(optimizer.register_step_pre_hook(before).remove)
        site.undo.callback(optimizer.register_step_post_hook(after).remove)
