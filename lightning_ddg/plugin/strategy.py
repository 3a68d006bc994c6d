"""DDGStrategy: what Lightning calls, and nothing else. What is done is in the modules that a run is assembled from.

The order of the methods follows Lightning's own strategies. A stage may wait for the activation that its forward needs
and for the gradient that its backward needs, and for nothing else inside an iteration: keep collectives out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ddg.core.staleness import Staleness
from lightning_ddg.planning.units import parse_bytes
from lightning_ddg.plugin import compat, host
from lightning_ddg.plugin.assembly import Run, build, move_all_but
from lightning_ddg.plugin.checkpoint import CheckpointAssembler, record_cut, recorded_cut
from lightning_ddg.plugin.data import BatchExchange, check_steps, put_loader_states, run_on_cpu
from lightning_ddg.plugin.options import Options, check_trainer, rules
from lightning_ddg.plugin.ownership import Weights, check_optimizers
from lightning_ddg.plugin.planned import plan_module
from lightning_ddg.plugin.processes import StageProcesses
from lightning_ddg.plugin.site import Site

_T = TypeVar("_T")


class DDGStrategy(StageProcesses):
    """Train a network cut into ``K`` stages with delayed gradients: no stage waits for another's backward.

    This is decoupled parallel backpropagation (Huo, Gu, Yang and Huang, ICML 2018, arXiv 1804.10574). With ``K``
    processes each trains one stage; with one process all stages train in it, with the same delays and the same weights.

    Args:
        num_stages: Number of stages ``K``. ``"auto"``: one per process; with one process, 2.
        split_points: Names of the submodules, relative to the host.LightningModule, that begin stages ``2..K``.
        balance: What the automatic cut evens out: measured ``"time"``, ``"parameters"`` or ``"flops"``.
        max_memory: What the automatic cut by time allows a stage to need on its device, with several processes and
            without ``split_points``: bytes, or a text such as ``"12GB"`` or ``"800MiB"``.
        compile: Whether each stage is compiled by ``torch.compile``; a dictionary gives its options.
        drain: When the gradients still in flight are applied without a new forward: at the end of each ``"epoch"``, of
            the ``"fit"``, or ``"never"``, which is the paper's bare algorithm.
        micro_batches: Into how many micro-batches each batch is split, with one step for all, so that a gradient is at
            most ``ceil((K - 1)(1 + slack) / m)`` updates old. ``"auto"``: as many as make that one.
        eval_micro_batches: The same in evaluation by K processes, where samples go by themselves. ``"auto"``: ``4 K``.
        slack: How many batches more are in flight between neighbours, to hide a link's latency: a number ``s`` makes
            each delay ``1 + s`` times as long. ``lightning-ddg plan --latency_ms`` says how many a link needs.
        recompute: Whether stages keep the inputs of batches in flight only, and compute activations again in the
            backward, to the same weights. In one process it has an effect with ``stash=False`` only.
        verify: Whether the first batch's gradients are compared with backpropagation's: a difference ends the fit.
        staleness: What stages do with stale gradients; by default what the paper says. ``"corrected"`` is
            ``extrapolate=True`` with ``micro_batches="auto"``, or as many micro-batches as are given.
        process_group_backend: By default NCCL on CUDA devices, else gloo, which copies what is on devices to the host.
        timeout: The longest a rank waits for a message from another.
        start_method: How processes are started: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        accelerator: As in Lightning's strategies; so are the arguments after it.

    Raises:
        ValueError: If an argument has no meaning; the message names the value and the remedy.
    """

    strategy_name = "ddg"

    def __init__(
        self,
        num_stages: int | Literal["auto"] = "auto",
        split_points: list[str] | None = None,
        balance: Literal["time", "parameters", "flops"] = "time",
        max_memory: int | str | None = None,
        compile: bool | dict[str, Any] = False,
        drain: Literal["epoch", "fit", "never"] = "epoch",
        micro_batches: int | Literal["auto"] = 1,
        eval_micro_batches: int | Literal["auto"] = 1,
        slack: int = 0,
        recompute: bool = False,
        verify: bool = True,
        staleness: Staleness | Literal["corrected"] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        accelerator: host.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: host.ClusterEnvironment | None = None,
        checkpoint_io: host.CheckpointIO | None = None,
        precision_plugin: host.Precision | None = None,
    ) -> None:
        options = Options(
            num_stages=num_stages,
            split_points=split_points,
            balance=balance,
            max_memory=None if max_memory is None else parse_bytes(max_memory),
            compile=compile,
            drain=drain,
            eval_micro_batches=eval_micro_batches,
            slack=slack,
            recompute=recompute,
            verify=verify,
            **rules(staleness, micro_batches),
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        super().__init__(options, accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin)
        self._run: Run | None = None
        self._exchange: BatchExchange | None = None
        self._undo = ExitStack()
        self._checkpoints: CheckpointAssembler | None = None
        self._recorded_cut: list[str] | None = None
        self._begin_with: Callable[[Callable[[], object]], None] | None = None
        self._weights = Weights()
        # Over all runs, or each prediction would draw what the one before it drew.
        self._evaluations = count()

    # ---- what a user may ask

    plan = staticmethod(plan_module)

    @property
    def stage_parameter_names(self) -> list[list[str]]:
        """The LightningModule's parameter names of each of the ``K`` stages, the same on every rank.

        Parameters outside the network belong to the last stage, whose process computes the loss.

        Raises:
            RuntimeError: Before the host.Trainer has set the strategy up.
        """
        if self.num_stages == 1:
            return [[name for name, _ in cast(host.LightningModule, self.lightning_module).named_parameters()]]
        if self._checkpoints is None:
            raise RuntimeError(
                "The network has not been cut yet, so that `stage_parameter_names` is not known. Read it from"
                " `on_fit_start` on, or after `trainer.fit`; where processes are spawned or forked, in these."
            )
        return self._checkpoints.ownership.parameter_names

    @property
    def run(self) -> Run | None:
        """What trains, from ``setup`` to ``teardown``; ``None`` before and after, and where there is one stage."""
        return self._run

    # ---- setting up a run

    @override
    def setup(self, trainer: host.Trainer) -> None:
        module = cast(host.LightningModule, self.lightning_module)
        check_trainer(trainer, self._layer_sync, self.world_size == 1, self.data_parallel_size)
        self._options.check_casts(self.precision_plugin)
        if self.world_size > 1:
            check_steps(module)
        if self.num_stages == 1:
            super().setup(trainer)
            return
        cast(host.Accelerator, self.accelerator).setup(trainer)
        site = Site(
            trainer=trainer,
            module=module,
            options=self._options,
            num_stages=self.num_stages,
            ranks=self._ranks,
            precision=self.precision_plugin,
            device=self.root_device,
            seed=self.broadcast(torch.initial_seed()),
            evaluations=self._evaluations,
            recorded_cut=self._recorded_cut,
            weights=self._weights,
            undo=self._undo,
            fail=self.on_exception,
        )
        self._exchange = BatchExchange(self._ranks, trainer)
        self._undo.callback(self._exchange.install(module))
        self.model = self.precision_plugin.convert_module(module)
        if site.fits or site.one_process:
            self._begin(site)
        else:
            # The first step will tell how the network is called.
            self._begin_with = partial(self._begin, site)

    def _begin(self, site: Site, step: Callable[[], object] | None = None) -> None:
        trainer, self._begin_with = site.trainer, None
        run = self._run = build(site, partial(self._optimizers_of, trainer, site.fits), step)
        parts = (run.ownership, self._weights, run.groups, self._ranks.gather, run.share_for_saving)
        self._checkpoints = CheckpointAssembler(*parts)
        self.setup_precision_plugin()
        if site.fits:
            # What is cut only to be evaluated was not measured, and a fit that follows shall be.
            self._recorded_cut = run.cut.split_points
            compat.optimizers_to_device(self.optimizers, self.root_device)

    def _optimizers_of(self, trainer: host.Trainer, fits: bool) -> list[Optimizer]:
        if fits:
            self.setup_optimizers(trainer)
        return self.optimizers

    @override
    def setup_optimizers(self, trainer: host.Trainer) -> None:
        compat.reset_optimizers(self)
        super().setup_optimizers(trainer)
        check_optimizers(self.optimizers)

    @override
    def model_to_device(self) -> None:
        """Move the module, but not the layers of other processes' stages."""
        foreign = () if self._run is None else self._run.ownership.foreign_layers
        move_all_but(foreign, cast(host.LightningModule, self.lightning_module), self.root_device)

    # ---- data

    @override
    def process_dataloader(self, dataloader: object) -> object:
        return dataloader if self._exchange is None else self._exchange.loader(dataloader)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move the batch to the device on the process that reads, and from there to those that need it."""
        move = partial(super().batch_to_device, device=device, dataloader_idx=dataloader_idx)
        return move(batch) if self._exchange is None else self._exchange.batch(batch, move, dataloader_idx)

    # ---- training

    @override
    def on_train_start(self) -> None:
        if self._run is not None:
            self._run.begin_training()

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._run is None:
            return super().training_step(*args, **kwargs)
        return self._run.step.train(self.optimizers, args, kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward of the batch that is due on this stage; ``closure_loss`` counts on the last stage only."""
        if (run := self._run) is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        if run.step.passes_over():
            return closure_loss
        self.pre_backward(closure_loss)
        loss = run.step.backward(closure_loss, optimizer, args, kwargs)
        run.drain.added()
        self.post_backward(loss)
        return loss

    @override
    def on_train_end(self) -> None:
        if self._run is not None:
            self._run.end_training()

    # ---- evaluation

    @override
    def on_validation_start(self) -> None:
        if self._run is not None:
            self._run.begin_validation()

    @override
    def on_validation_end(self) -> None:
        if self._run is not None:
            self._run.end_validation()

    @override
    def on_test_end(self) -> None:
        if self._run is not None:
            self._run.evaluation.end()

    on_predict_end = on_test_end

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(super().validation_step, args, kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(super().test_step, args, kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(super().predict_step, args, kwargs)

    def _evaluate(self, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._begin_with is not None:
            self._begin_with(partial(run_on_cpu, getattr(self.lightning_module, step.__name__), args, kwargs))
        with nullcontext() if self._run is None else self._run.evaluation.step():
            return step(*args, **kwargs)

    # ---- checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the full state dict on rank 0; on others it is so after a fit, and where users' hooks will see it."""
        state = None if self._checkpoints is None else self._checkpoints.module_state()
        return super().lightning_module_state_dict() if state is None else state

    @override
    def optimizer_state(self, optimizer: Optimizer | host.LightningOptimizer) -> dict[str, Any]:
        """Return the state of the user's optimizer over the whole module on rank 0, nothing elsewhere."""
        optimizer = optimizer.optimizer if isinstance(optimizer, host.LightningOptimizer) else optimizer
        state = None if self._checkpoints is None else self._checkpoints.optimizer_state(optimizer)
        return super().optimizer_state(optimizer) if state is None else state

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self._checkpoints is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        self._checkpoints.load_optimizer_states(self.optimizers, checkpoint["optimizer_states"], self.root_device)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a plain Lightning checkpoint on rank 0, with the cut recorded beside what Lightning put in it."""
        if self._checkpoints is not None and self._ranks.others:
            self._checkpoints.complete_copies(checkpoint)
            put_loader_states(self._ranks, checkpoint)
        if self._recorded_cut is not None:
            record_cut(checkpoint, self.num_stages, self._recorded_cut)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint; the cut recorded in it is used again if it has this many stages."""
        # Lightning before 2.6 does not know the argument, and never gives it.
        given = {} if weights_only is None else {"weights_only": weights_only}
        loaded = super().load_checkpoint(checkpoint_path, **given)
        self._recorded_cut = recorded_cut(loaded, self.num_stages) or self._recorded_cut
        return loaded

    # ---- the end

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Tell the other ranks, so that none of them waits for this one."""
        if self._run is None or not self._run.agreements.end_all(exception):
            self._tell(exception)

    @override
    def teardown(self) -> None:
        self._run = None
        try:
            self._ranks.disconnect()
        finally:
            self._undo.close()
            super().teardown()
