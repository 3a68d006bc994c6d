"""From what is given to a run: find the network, cut it, move each process's part to its device, put it together.

:func:`build` is that chain, one step a line. What it makes, a :class:`Run`, exists from the strategy's ``setup`` to its
``teardown``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_ddg.comm.link import Link
from lightning_ddg.comm.ranks import Ranks
from lightning_ddg.core.delay_line import DelayLine
from lightning_ddg.core.evaluator import Evaluator
from lightning_ddg.core.execution import Execution, Observers
from lightning_ddg.core.extrapolation import Outlook
from lightning_ddg.core.pipeline import Pipeline
from lightning_ddg.core.stage import Stage
from lightning_ddg.core.staged import Staged
from lightning_ddg.network.cut import Costs, Cut, decide_cut
from lightning_ddg.network.find import Network
from lightning_ddg.network.replay.chain import ReplayedSegment
from lightning_ddg.network.restore import untouched
from lightning_ddg.planning.report import print_cut
from lightning_ddg.planning.simulate import SECONDS_PER_BYTE
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.agreements import Agreements, time_on_rank_zero
from lightning_ddg.plugin.averaging import Averaging
from lightning_ddg.plugin.clipping import remembered_clipping
from lightning_ddg.plugin.collectives import collectives_refused
from lightning_ddg.plugin.compiling import compile_stage
from lightning_ddg.plugin.data import share_generators
from lightning_ddg.plugin.drain import Drain
from lightning_ddg.plugin.evaluation import Evaluation
from lightning_ddg.plugin.feedback import StepFeedback
from lightning_ddg.plugin.finding import find
from lightning_ddg.plugin.finish import Finish
from lightning_ddg.plugin.first_batch import FirstBatch
from lightning_ddg.plugin.foreign_hooks import misses_explained
from lightning_ddg.plugin.hooks import FitHooks
from lightning_ddg.plugin.host import rank_zero_info
from lightning_ddg.plugin.late_parameters import LateParameters
from lightning_ddg.plugin.measure import copies_kept, first_call, measured_costs
from lightning_ddg.plugin.micro_batches import MicroBatches
from lightning_ddg.plugin.next_options import outlook_of
from lightning_ddg.plugin.options import Options
from lightning_ddg.plugin.ownership import OptimizerGroups, Ownership
from lightning_ddg.plugin.patches import patch_fit, patch_run, watch_steps
from lightning_ddg.plugin.placeholder import Placeholder, end_step, or_end_step, zeros_like_output
from lightning_ddg.plugin.program import Program, ProgramRunner
from lightning_ddg.plugin.redirection import Redirection
from lightning_ddg.plugin.sameness import check_same_on_all_ranks, facts_of_optimizers, facts_of_run
from lightning_ddg.plugin.sharing import Sharing
from lightning_ddg.plugin.site import Site
from lightning_ddg.plugin.stale_copies import StaleCopies
from lightning_ddg.plugin.step import StepRunner, warn_of_kept_tensors
from lightning_ddg.plugin.verify import Proof

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A network in stages, from the strategy's ``setup`` to its ``teardown``.

    Attributes:
        site: What it was built of.
        cut: Where the network is cut.
        ownership: Which tensors are whose.
        groups: Of each optimizer, the parameter groups over the whole module; none where one process has all.
        execution: Trains the stages.
        step: Runs training steps, in micro-batches if that is wanted.
        evaluation: Runs evaluation steps.
        sharing: Gives every rank all weights.
        drain: Applies gradients in flight.
        finish: Makes the last part of a fit synchronous.
        agreements: What rank 0 decides for all.
        hooks: Act at the moments of a fit.
        proof: Compares the first batch's gradients with those of plain backpropagation, if that is wanted.
    """

    site: Site
    cut: Cut
    ownership: Ownership
    groups: list[OptimizerGroups]
    execution: Execution
    step: MicroBatches
    evaluation: Evaluation
    sharing: Sharing
    drain: Drain
    finish: Finish
    agreements: Agreements
    hooks: FitHooks
    proof: Proof | None

    @property
    def options(self) -> Options:
        """The strategy's options."""
        return self.site.options

    @property
    def ranks(self) -> Ranks:
        """The processes."""
        return self.site.ranks

    @property
    def observers(self) -> Observers:
        """Who looks on while it trains."""
        return self.ranks.observers

    def begin_training(self) -> None:
        """Called when training begins, by a fit or by a learning rate finder."""
        trainer = self.site.trainer
        self.finish.check()
        self.step.step.forget()
        self.execution.begin(trainer.global_step)
        self.agreements.begin()
        compat.keep_callback(trainer, self.hooks)
        self.site.undo.callback(time_on_rank_zero(trainer, self.ranks.decides))

    def end_training(self) -> None:
        """Called when training has ended: give every rank all the trained weights, as the users' hooks left them."""
        self.agreements.end()
        self.execution.clear()
        if self.proof is not None:
            self.proof.end()
        self.sharing.end()
        share_generators(self.ranks)

    def begin_validation(self) -> None:
        """Called when a validation starts, on every rank."""
        self.evaluation.begin()
        self.agreements.follow()

    def end_validation(self) -> None:
        """Called when a validation has ended, on every rank."""
        self.agreements.follow(meet=True)
        self.evaluation.end()

    def share_for_saving(self) -> bool:
        """Give every rank all weights if hooks of the user's are asked what to save; return whether that is so."""
        return self.sharing.share_if(compat.looks_when_saving(self.site.trainer, self.site.module))


def build(
    site: Site, set_up_optimizers: Callable[[], Sequence[Optimizer]], step: Callable[[], object] | None = None
) -> Run:
    """Build a run.

    Args:
        site: What is given.
        set_up_optimizers: Makes the optimizers over the whole module; none if nothing is trained.
        step: Where nothing is trained, in several processes: runs an evaluation step, of which the network is found.

    Raises:
        TypeError: If the network cannot be found.
        ValueError: If it cannot be cut, or trained so, or if the ranks were not given the same.
    """
    check_same_on_all_ranks(site.ranks.exchange(facts_of_run(site)))
    patch_run(site)
    # First, as in Lightning: data that the cut may need can depend on it.
    optimizers = set_up_optimizers()
    if site.fits:
        site.options.check_micro_batches(site.module, site.num_stages)
        check_same_on_all_ranks(site.ranks.exchange(facts_of_optimizers(site.trainer, site.module, optimizers)))
    first_batch = FirstBatch(site)
    network, program = find(site, first_batch, step)
    cut = divide(site, network, program, optimizers, first_batch)
    move_all_but(foreign_layers(cut, site.ranks.stage), site.module, site.device)
    segments = segments_in_place(site, cut)
    ownership = ownership_of(site, cut, segments)
    groups = [] if site.one_process else [OptimizerGroups(one, ownership) for one in optimizers]
    execution = make_execution(site, cut, segments, ownership, outlook_of(site, optimizers))
    redirection = Redirection(
        network.target if program is None else None,
        ownership.foreign_layers,
        lambda: not site.weights.readable,
        partial(compat.current_hook, site.module),
    )
    site.undo.callback(redirection.remove)
    proof = Proof(site, cut, ownership, redirection) if site.fits and site.options.verify else None
    execution = execution if proof is None else proof.witness(execution)
    around = alone(site, cut)
    runner = make_step(site, network, program, cut, ownership, execution, redirection, proof, around)
    averaging = Averaging(site, ownership)
    steps = MicroBatches(site, runner, proof, averaging)
    sharing = Sharing(site, ownership)
    evaluation = Evaluation(site, cut, execution, redirection, ownership, around)
    agreements = Agreements(site.trainer, site.ranks, site.delay(1) + 1)
    drain = make_drain(site, execution, optimizers, averaging)
    finish = Finish(site.options.staleness.finish, site.trainer, execution, drain)
    copies = StaleCopies(network.target, ownership)
    site.undo.callback(copies.forget)
    late = LateParameters(site.module)
    hooks = FitHooks(execution, site.ranks, drain, finish, agreements, groups, copies, late, sharing, site.fail, proof)
    if site.fits:
        patch_fit(site, ownership)
        watch_steps(site, optimizers, execution, drain)
        site.undo.callback(compat.without_outputs(site.trainer, lambda: steps.skipped))
        site.undo.callback(agreements.install())
        site.undo.callback(hooks.install(site.trainer, site.module))
    # Without a seed each process has made its own weights; what is never trained is not shared again.
    site.ranks.share_first(site.module, ownership.own_names)
    evaluation.share_outside(lambda tensor: True)
    parts = (site, cut, ownership, groups, execution, steps, evaluation, sharing, drain, finish, agreements, hooks)
    return Run(*parts, proof)


def divide(
    site: Site, network: Network, program: Program | None, optimizers: Sequence[Optimizer], first_batch: FirstBatch
) -> Cut:
    """Cut the network; rank 0 prints where."""
    options = site.options
    cut = decide_cut(
        network.chain,
        site.num_stages,
        options.split_points,
        site.recorded_cut,
        partial(_measure, site, network, program, optimizers, first_batch),
        options.max_memory if site.fits else None,
        options.allow_ties(one_process=site.one_process),
    )
    if site.fits and site.trainer.is_global_zero and not site.trainer.barebones:
        print_cut(cut, "batch" if site.micro_batches == 1 else "micro-batch", options.slack)
    _log.debug("rank %d: the network is cut at %s", site.ranks.world.rank, cut.split_points)
    return cut


def _measure(
    site: Site, network: Network, program: Program | None, optimizers: Sequence[Optimizer], first_batch: FirstBatch
) -> Costs:
    """What to even out, the same on every rank."""
    costs = Costs.by_parameters(network.chain)
    if site.options.balance == "parameters" or not site.fits:
        return costs
    for batch in first_batch.read():
        with site.first_draws():
            call = partial(_call_of, site, network, program, batch)
            costs = measured_costs(site.module, network, call, site.options.balance, site.precision, site.device)
    costs = site.ranks.broadcast(costs, site.ranks.reading_rank)
    if costs.model is None:
        return costs
    link = site.ranks.link(Link(0.0, SECONDS_PER_BYTE))
    model = replace(
        costs.model,
        recompute=site.options.recompute,
        stash=site.options.staleness.stash,
        optimizer_copies=copies_kept(optimizers[0] if optimizers else None),
        seconds_per_byte=link.seconds_per_byte,
        latency=link.latency,
        slack=site.options.slack,
    )
    return replace(costs, model=model)


def _call_of(
    site: Site, network: Network, program: Program | None, batch: Any, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How stage 1 is called for a batch, on a device."""
    if program is None:
        name, part = network.target_name, site.first_part
        return first_call(site.module, network.target, name, batch, site.precision, device, part)
    return program.first_call(batch, site.precision, device, site.first_part), {}


def foreign_layers(cut: Cut, stage: int | None) -> list[nn.Module]:
    """Return the layers of other processes' stages that this process's does not have too."""
    if stage is None:
        return []
    own = set(cut.segments()[stage - 1].modules())
    return [layer for other in range(1, len(cut.bounds)) for layer in cut.layers_of(other) if layer not in own]


def move_all_but(foreign: Iterable[nn.Module], module: nn.Module, device: torch.device) -> None:
    """Move a module to a device, except some of its layers, which stay where they are."""
    with ExitStack() as undo:
        for layer in foreign:
            undo.callback(compat.keep_in_place(layer))
        module.to(device)


def segments_in_place(site: Site, cut: Cut) -> list[nn.Module]:
    """Return the stages as modules, compiled if wanted, once all tensors are where they will be used."""
    segments = cut.segments()
    site.options.check_recurrent(segments, site.device)
    if site.options.compile_options is not None:
        for stage, segment in enumerate(segments, start=1):
            if site.ranks.stage in (None, stage):
                site.undo.callback(compile_stage(segment, stage, site.options.compile_options))
    return segments


def make_evaluator(site: Site, segment: nn.Module, stage: int) -> Evaluator:
    """Make what evaluates with one of several processes."""
    modules = list(site.module.modules())
    return Evaluator(
        segment,
        stage,
        site.num_stages,
        site.ranks.mailbox,
        site.options.eval_micro_batches_for(site.num_stages),
        modules,
        partial(untouched, modules),
        lambda why: rank_zero_info(f"Batches are evaluated whole, one after the other: {why}."),
    )


def ownership_of(site: Site, cut: Cut, segments: Sequence[nn.Module]) -> Ownership:
    """Say whose tensor is whose, and refuse what cannot be kept apart."""
    layers = [cut.layers_of(stage) for stage in range(1, site.num_stages + 1)]
    ownership = Ownership(site.module, segments, site.ranks.stage, layers)
    ownership.check_ties()
    return ownership


def make_execution(
    site: Site, cut: Cut, segments: Sequence[nn.Module], ownership: Ownership, outlook: Outlook | None
) -> Execution:
    """Choose and make what trains the stages of this process."""
    rule, recompute, slack = site.options.staleness, site.options.recompute, site.options.slack
    stage = site.ranks.stage
    if stage is not None:
        own = Stage(segments[stage - 1], site.delay(stage), rule, recompute, outlook)
        ties, ranks = ownership.ties, site.ranks
        evaluator = make_evaluator(site, segments[stage - 1], stage)
        return Pipeline(own, stage, site.num_stages, ranks.mailbox, rule.shrink, ranks.observers, ties, evaluator)
    if not rule.stash:
        return Staged(segments, rule, recompute, site.ranks.observers, outlook, slack)
    whole = partial(cut.chain.at_once, segments)
    site.undo.callback(cut.chain.release)
    return DelayLine(segments, ownership.parameters_outside, rule, site.ranks.observers, whole, outlook, slack)


def make_step(
    site: Site,
    network: Network,
    program: Program | None,
    cut: Cut,
    ownership: Ownership,
    execution: Execution,
    redirection: Redirection,
    proof: Proof | None,
    around: Callable[[], AbstractContextManager[object]],
) -> StepRunner:
    """Make what runs training steps: the user's own where the loss or the batch is, or where hooks need its outputs."""
    stage, module = site.ranks.stage, site.module
    placeholder: Placeholder = end_step
    first_forward: Callable[[], None] = _nothing
    if stage is not None and not site.has_loss:
        first_forward = partial(warn_of_kept_tensors, ownership.segments[stage - 1], stage)
        if program is None and (not module.automatic_optimization or compat.uses_step_outputs(module)):
            placeholder = zeros_like_output(cut.chain.segment(cut.bounds[stage], len(cut.chain)))
            if module.automatic_optimization:
                placeholder = or_end_step(placeholder)
    # A delay line has all gradients of a batch at once, also those that a loss takes past the network.
    at_once = stage is None and site.options.staleness.stash
    first_backward = _nothing if at_once else ownership.check_foreign_grads
    parts = (site, network, execution, redirection, placeholder, first_forward, first_backward, proof, around)
    if program is None:
        return StepRunner(*parts)
    own = None if stage is None else cast(ReplayedSegment, ownership.segments[stage - 1])
    return ProgramRunner(program, None if own is None else StepFeedback(site, own), *parts)


def alone(site: Site, cut: Cut) -> Callable[[], AbstractContextManager[object]]:
    """Make what surrounds a step of which other processes run other parts: nobody joins it, and hooks fire there."""
    if site.one_process:
        return nullcontext
    owners, own = cut.chain.owners(cut.starts), site.ranks.stage
    elsewhere = {part: stage for module, stage in owners.items() if stage != own for part in module.modules()}

    @contextmanager
    def surrounded() -> Iterator[None]:
        with collectives_refused(site.ranks.replicas.size), misses_explained(site.module, elsewhere):
            yield

    return surrounded


def make_drain(site: Site, execution: Execution, optimizers: Sequence[Optimizer], averaging: Averaging) -> Drain:
    """Make what applies gradients in flight."""
    clip_again: Callable[[], object] = _nothing
    if site.fits and not site.module.automatic_optimization:
        clip_again, undo = remembered_clipping(site.module)
        site.undo.callback(undo)
    return Drain(site.options.drain, site.module, execution, optimizers, clip_again, averaging, site.micro_batches)


def _nothing() -> None:
    """Check nothing."""
