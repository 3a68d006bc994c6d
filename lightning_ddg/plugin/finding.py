"""What is cut: the network that the step calls once, or, where it does something else, the step itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddg.core.pytree import map_tensors
from lightning_ddg.network.find import Example, Network, called_network, find_network
from lightning_ddg.network.layers import Chain
from lightning_ddg.network.replay.chain import ReplayedChain
from lightning_ddg.plugin.collectives import collectives_refused
from lightning_ddg.plugin.first_batch import FirstBatch
from lightning_ddg.plugin.host import LightningModule
from lightning_ddg.plugin.measure import call_in_step, first_call, transferred
from lightning_ddg.plugin.program import Program, StepCalls, calls_in_step, layers_of_step, step_on
from lightning_ddg.plugin.site import Site

_log = logging.getLogger(__name__)
_CPU = torch.device("cpu")

Found = tuple[Network, Program | None]


def find(site: Site, first_batch: FirstBatch, step: Callable[[], object] | None) -> Found:
    """Find the network in the module, or take the whole step for it; every rank must find the same layers.

    Args:
        site: What is given.
        first_batch: The first training batch.
        step: Where nothing is trained, in several processes: runs an evaluation step.

    Raises:
        TypeError: There is neither.
        ValueError: What is found cannot be trained so.
    """
    if site.fits or next(site.module.parameters(), None) is not None:
        return _find(site, first_batch, step)
    with suppress(TypeError, ValueError):
        found = _find(site, first_batch, step)
        if len(found[0].chain) >= site.num_stages:
            return found
    # Evaluated only, and by every process as a whole: a network that nobody calls stands for what could be cut.
    names = site.options.split_points or [f"stage {stage}" for stage in range(2, site.num_stages + 1)]
    return Network(Chain([(name, nn.Identity()) for name in ["stage 1", *names]]), nn.Identity(), ""), None


def _find(site: Site, first_batch: FirstBatch, step: Callable[[], object] | None) -> Found:
    configure = getattr(site.module, "configure_stages", None)
    layers = configure() if callable(configure) else None
    points = site.options.split_points or site.recorded_cut or ()
    requirer = type(site.trainer.strategy).__name__
    example: Example = partial(_example, site, first_batch) if step is None else partial(_evaluated, site, step)
    with site.precision.train_step_context():
        network = partial(find_network, site.module, layers, requirer=requirer, example=example, points=points)
        if layers is not None or not site.module.automatic_optimization:
            return network(), None
        of_step = partial(_layers_of_step, site, first_batch=first_batch, points=points)
        if not site.fits:
            # An evaluation may call a network in any form; without one that can be cut, each layer is called by itself.
            with suppress(TypeError):
                alone = network()
                if len(alone.chain) >= site.num_stages:
                    return alone, None
            program = Program(site.module)
            return Network(of_step(program), site.module, ""), program
        target = target_of(site.module, requirer, example)
        calls = _calls(site, first_batch, target)
        if calls is not None and calls.keeps:
            site.options.check_carried(site.num_stages)
        found = choose(site.module, network, target, calls, of_step, site.num_stages)
        if found[1] is not None and found[1].rehearses:
            site.options.check_kept(one_process=site.one_process)
        return found


def choose(
    module: LightningModule,
    network: Callable[[], Network],
    target: nn.Module | None,
    calls: StepCalls | None,
    of_step: Callable[[Program], ReplayedChain],
    num_stages: int,
) -> Found:
    """Take the network, or the step itself, of which the program is returned too.

    Args:
        module: The LightningModule.
        network: Finds the network.
        target: The module that may be the network, if there is one.
        calls: What the training step calls; ``None`` if that is not known.
        of_step: Finds the layers of the step.
        num_stages: ``K``.

    Raises:
        TypeError: The step is not one call of a network, and cannot be cut.
    """
    name = next((name for name, part in module.named_modules() if part is target), "")
    if calls is None or calls == StepCalls([name], keeps=False) or (not calls.names and target is not None):
        return network(), None
    once = calls.names.count(name) == 1
    program = Program(module)
    try:
        chain = of_step(program)
    except (RuntimeError, ValueError) as error:
        if once:
            _log.debug("the step cannot be run in parts, but the network %r may be", name, exc_info=True)
            return network(), None
        raise TypeError(_refusal(module, calls, str(error))) from error
    if len(chain) < num_stages:
        if once:
            return network(), None
        why = f" ({chain.reasons[0]})" if chain.reasons else ""
        reason = f"it can be cut into {len(chain)} parts at most{why}, but there are {num_stages} stages."
        raise TypeError(_refusal(module, calls, reason))
    return Network(chain, module, ""), program


def _refusal(module: LightningModule, calls: StepCalls, reason: str) -> str:
    called = ", ".join(map(repr, calls.names[:6])) or "no module with trained parameters"
    return (
        f"`{type(module).__name__}.training_step` does not call one network once (it calls {called}), and cannot"
        f" be run in parts as a whole: {reason} Call one network once in it, or return its layers, in the order of the"
        " call, from `configure_stages()`."
    )


def target_of(module: LightningModule, requirer: str, example: Example) -> nn.Module | None:
    """Return the module that may be the network, if there is one."""
    try:
        return called_network(module, requirer, example)
    except TypeError:
        return None


def _calls(site: Site, first_batch: FirstBatch, target: nn.Module | None) -> StepCalls | None:
    """Which modules the training step calls; ``None`` if that is not known."""
    calls: StepCalls | None = None
    for batch in first_batch.read():
        # Where the step fails, training will say so.
        with suppress(Exception), site.first_draws(), _alone(site):
            batch = transferred(site.module, batch, site.precision, _CPU, site.first_part)
            calls = calls_in_step(site.module, target, step_on(site.module, batch))
    return site.ranks.broadcast(calls, site.ranks.reading_rank)


def _alone(site: Site) -> AbstractContextManager[object]:
    """Processes that do not take part would be waited for."""
    return nullcontext() if site.one_process else collectives_refused(site.ranks.replicas.size)


def _layers_of_step(site: Site, program: Program, first_batch: FirstBatch, points: Collection[str]) -> ReplayedChain:
    call: tuple[Any, ...] | None = None
    for batch in first_batch.read():
        with site.first_draws():
            call = map_tensors(Tensor.detach, program.first_call(batch, site.precision, _CPU, site.first_part))
    call = site.ranks.broadcast(call, site.ranks.reading_rank)
    with _alone(site):
        return layers_of_step(site.module, program, call, points)


def _example(site: Site, first_batch: FirstBatch, target: nn.Module, name: str) -> Any:
    """How the training step calls the network, on the CPU."""
    call = None
    for batch in first_batch.read():
        # Where the step fails, training will say so.
        with suppress(Exception), site.first_draws():
            call = first_call(site.module, target, name, batch, site.precision, _CPU, site.first_part)
            call = map_tensors(Tensor.detach, call)
    return site.ranks.broadcast(call, site.ranks.reading_rank)


def _evaluated(site: Site, step: Callable[[], object], target: nn.Module, name: str) -> Any:
    """How an evaluation step calls the network, on the CPU; every rank runs it."""
    with suppress(Exception), site.first_draws():
        return map_tensors(Tensor.detach, call_in_step(site.module, target, name, step))
