"""DDGStrategy: what Lightning calls. It decides who does what and when; how is in the modules it is composed of.

The order of the methods follows Lightning's own strategies. A stage may wait for the activation its forward needs and
for the gradient its backward needs, and for nothing else inside an iteration: keep collectives out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from lightning_ddg.comm.link import measure_link
from lightning_ddg.comm.mailbox import Kind, PeerError, Transport
from lightning_ddg.comm.sharing import gather_to_rank_zero, share_with_all
from lightning_ddg.comm.wire import pack
from lightning_ddg.core.delay_line import DelayLine
from lightning_ddg.core.pipeline import Pipeline, or_end_step, placeholder_maker
from lightning_ddg.core.rng import seed_of, seeded
from lightning_ddg.core.schedule import delay, rank_of_stage, stage_of_rank
from lightning_ddg.core.staged import Lockstep
from lightning_ddg.core.stale_stage import make_stage
from lightning_ddg.core.staleness import Staleness
from lightning_ddg.core.tensors import map_tensors, tensors_of
from lightning_ddg.network.find import Network, find_network
from lightning_ddg.network.profile import Profile
from lightning_ddg.planning.plan import NUM_STAGES, Plan, plan_module
from lightning_ddg.planning.report import print_cut
from lightning_ddg.planning.simulate import SECONDS_PER_BYTE
from lightning_ddg.planning.units import parse_bytes
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.agreements import Decisions, Signals, time_on_rank_zero
from lightning_ddg.plugin.callbacks import EpochEnd
from lightning_ddg.plugin.checkpoint import (
    CheckpointAssembler,
    local_optimizer_state,
    record_cut,
    recorded_cut,
)
from lightning_ddg.plugin.clipping import clip_norm_per_stage, clip_values_that_exist, remembered_clipping
from lightning_ddg.plugin.compiling import check_compilable, compile_stage
from lightning_ddg.plugin.data import RemoteLoader, SourceLoader, check_sampler, check_steps
from lightning_ddg.plugin.measure import Cut, Measured, copies_kept, decide_cut, first_call, measured_costs
from lightning_ddg.plugin.options import Options, check_backend, check_precision, check_started, check_trainer
from lightning_ddg.plugin.ownership import OptimizerGroups, Ownership, Weights, check_optimizers, keep_options
from lightning_ddg.plugin.redirection import Seam, StepDone
from lightning_ddg.plugin.stale_copies import StaleCopies
from lightning_ddg.plugin.step import check_call, check_one_step, check_step, warn_of_kept_tensors

_T = TypeVar("_T")
Execution = Pipeline | DelayLine | Lockstep

_STRATEGIES = {
    "ddg": ("popen", "Decoupled parallel backpropagation, one process per stage started as scripts"),
    "ddg_spawn": ("spawn", "Decoupled parallel backpropagation, one process per stage started by spawning"),
    "ddg_notebook": ("fork", "Decoupled parallel backpropagation, one process per stage forked from a notebook"),
}


class DDGStrategy(ParallelStrategy):
    """Trains a network cut into ``K`` stages with delayed gradients: no stage waits for another's backward.

    This is decoupled parallel backpropagation (Huo, Gu, Yang and Huang, ICML 2018, arXiv 1804.10574). With ``K``
    processes each trains one stage; with one process all stages train in it, with the same delays and the same weights.

    Args:
        num_stages: Number of stages ``K``. ``"auto"``: one per process; with one process, 2.
        split_points: Names of the submodules, relative to the LightningModule, that begin stages ``2..K``.
        balance: What the automatic cut evens out: measured ``"time"``, ``"parameters"`` or ``"flops"``.
        max_memory: What the automatic cut by time allows a stage to need on its device: bytes, or a text such as
            ``"12GB"`` or ``"800MiB"``. For several processes, without ``split_points``.
        compile: Whether each stage is compiled by ``torch.compile``; a dictionary gives its options.
        drain: When the gradients still in flight are applied without a new forward: at the end of each ``"epoch"``, of
            the ``"fit"``, or ``"never"``, which is the paper's bare algorithm.
        recompute: Whether stages keep the inputs of batches in flight only, and compute the activations again in the
            backward. The weights stay the same. In one process it has no effect unless ``staleness`` says
            ``stash=False``.
        staleness: What stages do with stale gradients; by default what the paper says.
        process_group_backend: Backend of ``torch.distributed``; by default NCCL on CUDA devices, gloo otherwise. With
            gloo, tensors on CUDA devices travel through pinned host memory.
        timeout: The longest a rank waits for a message from another.
        start_method: How processes are started: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        accelerator: As in Lightning's strategies.
        parallel_devices: As in Lightning's strategies.
        cluster_environment: As in Lightning's strategies.
        checkpoint_io: As in Lightning's strategies.
        precision_plugin: As in Lightning's strategies.

    Raises:
        ValueError: If an argument has no meaning; the message names the value and the remedy.
    """

    strategy_name = "ddg"
    # As how many processes this script has been started, once it has been.
    _processes: ClassVar[int | None] = None
    # The mesh of this process, and the default group that it was made with.
    _mesh: ClassVar[tuple[Any, DeviceMesh] | None] = None

    def __init__(
        self,
        num_stages: int | Literal["auto"] = "auto",
        split_points: list[str] | None = None,
        balance: Literal["time", "parameters", "flops"] = "time",
        max_memory: int | str | None = None,
        compile: bool | dict[str, Any] = False,
        drain: Literal["epoch", "fit", "never"] = "epoch",
        recompute: bool = False,
        staleness: Staleness | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self._options = Options(
            num_stages=num_stages,
            split_points=split_points,
            balance=balance,
            max_memory=None if max_memory is None else parse_bytes(max_memory),
            compile=compile,
            drain=drain,
            recompute=recompute,
            staleness=Staleness() if staleness is None else staleness,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self.num_nodes = 1
        self._process_group_backend = process_group_backend
        self._device_mesh: DeviceMesh | None = None
        self._recorded_cut: list[str] | None = None
        self._begin()
        self._cut: Cut | None = None
        self._segments: list[nn.Module] = []
        self._ownership: Ownership | None = None
        self._weights = Weights()
        # Of the optimizer, in several processes.
        self._groups: list[OptimizerGroups] = []
        self._checkpoints: CheckpointAssembler | None = None
        self._failure: str | None = None
        # Over all runs, or each prediction would draw what the one before it drew.
        self._evaluations = 0

    def _begin(self) -> None:
        """The state of one run, from `setup_environment` to `teardown`; what is set elsewhere outlives it."""
        self._undo = ExitStack()
        self._transport: Transport | None = None
        self._network: Network | None = None
        self._execution: Execution | None = None
        self._seam: Seam | None = None
        self._followers: StaleCopies | None = None
        self._decisions: Decisions | None = None
        self._epoch_end = EpochEnd(self)
        self._seed = 0
        self._draws = (0, 0)
        self._trained_batch: int | None = None
        self._kept_checked = False
        self._backward_ran = False
        self._whole_step = False
        self._answered = False
        self._stepped = False
        # The most batches whose gradients were added up for one step, and how many have been since the last.
        self._accumulated, self._pending = 1, 0
        self._outside_shared = True
        self._foreign_grads_checked = False
        self._clip_again: Callable[[], object] | None = None

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Registers ``"ddg"``, ``"ddg_spawn"`` and ``"ddg_notebook"``; called when the package is imported."""
        for name, (start_method, description) in _STRATEGIES.items():
            if name not in strategy_registry:
                strategy_registry.register(name, cls, description=description, start_method=start_method)

    # ---- what a user may ask

    @staticmethod
    def plan(
        module: LightningModule,
        batch: Any,
        num_stages: int | Sequence[int] = NUM_STAGES,
        *,
        recompute: bool = False,
        stash: bool = True,
    ) -> Plan:
        """Says what training a module in stages would be like, without a Trainer and without training.

        Args:
            module: The module, on the device on which it shall be measured. It is left as it was.
            batch: What its ``training_step`` takes, on the same device.
            num_stages: One number of stages, or several.
            recompute: As the strategy's argument.
            stash: As that of ``Staleness``.

        Raises:
            TypeError: If the network cannot be found.
            ValueError: If ``num_stages`` is empty.
            RuntimeError: If the training step or the layers cannot be run.
        """
        return plan_module(module, batch, num_stages, recompute=recompute, stash=stash)

    @property
    def num_stages(self) -> int:
        """Number of stages ``K``."""
        return self._options.stages(self.world_size)

    @property
    def stage(self) -> int | None:
        """Stage ``1..K`` of this process, input side first; ``None`` if it runs all stages."""
        return None if self._one_process else stage_of_rank(self.global_rank, self.num_stages)

    @property
    def delay(self) -> int | None:
        """Delay ``K - stage`` of this process's stage, in batches; ``None`` if it runs all stages."""
        stage = self.stage
        return None if stage is None else delay(stage, self.num_stages)

    @property
    def staleness(self) -> Staleness:
        """What stages do with stale gradients."""
        return self._options.staleness

    @property
    def stage_parameter_names(self) -> list[list[str]]:
        """The LightningModule's parameter names of each of the ``K`` stages, the same on every rank.

        Parameters outside the network belong to the last stage, whose process computes the loss.

        Raises:
            RuntimeError: Before the Trainer has set the strategy up.
        """
        if self._ownership is None:
            raise RuntimeError(
                "The network has not been cut yet, so that `stage_parameter_names` is not known. Read it from"
                " `on_fit_start` on, or after `trainer.fit`; where processes are spawned or forked, in these."
            )
        return self._ownership.parameter_names

    @property
    def device_mesh(self) -> DeviceMesh:
        """The processes as a mesh with the axes ``("data", "stage")``; the first has length 1.

        Raises:
            RuntimeError: In one process, or before the processes have been connected.
        """
        if self._device_mesh is None:
            raise RuntimeError("There is no device mesh in one process, nor before the Trainer has connected several.")
        return self._device_mesh

    @property
    def root_device(self) -> torch.device:
        """This process's device."""
        assert self.parallel_devices is not None
        # A process of several that runs a Trainer of one uses that Trainer's device.
        return self.parallel_devices[0 if self._one_process else self.local_rank]

    @property
    def num_processes(self) -> int:
        """Number of processes on this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """One replica of the data."""
        return {"num_replicas": 1, "rank": 0}

    @property
    def process_group_backend(self) -> str | None:
        """Backend of ``torch.distributed``."""
        return self._process_group_backend

    @property
    def precision_plugin(self) -> Precision:
        """The precision plugin; one that scales the loss is refused."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        check_precision(precision_plugin)
        self._precision_plugin = precision_plugin

    @property
    def _one_process(self) -> bool:
        return self.world_size == 1

    # ---- processes

    def _configure_launcher(self) -> None:
        environment = self.cluster_environment
        assert environment is not None
        started = environment.creates_processes_externally
        if started:
            self._check_started(environment)
        self._options.check_world_size(self.world_size)
        if self._one_process:
            return
        self._options.check_launch(type(environment).__name__ if started else None)
        if started:
            return
        if self._options.start_method == "popen":
            self._launcher = compat.SubprocessScriptLauncher(environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = compat.MultiProcessingLauncher(self, start_method=self._options.start_method)

    def _check_started(self, environment: ClusterEnvironment) -> None:
        # A script that has been started several times by a first Trainer stays so for the Trainers after it.
        started = self.world_size if self._one_process else DDGStrategy._processes or self.world_size
        name = type(environment).__name__
        check_started(started, self.num_processes, self.num_nodes, environment.local_rank(), name)
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)

    def setup_environment(self) -> None:
        super().setup_environment()
        self._failure = None
        compat.reset_seed()
        self.set_world_ranks()
        if self._one_process:
            return
        if self._options.start_method == "popen":
            DDGStrategy._processes = self.world_size
        if self._options.start_method == "fork":
            # OpenMP's threads have not come along: the first operation that waits for one would wait for ever.
            torch.set_num_threads(1)
        self._process_group_backend = backend = self._get_process_group_backend()
        assert self.cluster_environment is not None and self.parallel_devices is not None
        check_backend(backend, self.parallel_devices)
        compat.init_dist_connection(
            self.cluster_environment,
            backend,
            timeout=self._group_timeout,
            # Of a group bound to a device, torch 2.6 makes other groups by splitting it, which only NCCL can.
            device_id=self.root_device if "nccl" in backend else None,
        )
        self._options.check_world_size(dist.get_world_size())
        # Making groups waits for every rank without noticing that one is gone; a barrier notices.
        self.barrier()
        self._device_mesh = self._make_mesh()
        self._transport = self._connect_ranks()

    def _make_mesh(self) -> DeviceMesh:
        """The mesh of these processes: one for all fits, as its groups hold sockets and threads."""
        if DDGStrategy._mesh is None or DDGStrategy._mesh[0] is not dist.group.WORLD:
            axes = ("data", "stage")
            mesh = init_device_mesh(self.root_device.type, (1, self.num_stages), mesh_dim_names=axes)
            DDGStrategy._mesh = (dist.group.WORLD, mesh)
        return DDGStrategy._mesh[1]

    def _connect_ranks(self) -> Transport:
        def connect(those: list[int], backend: str) -> dist.ProcessGroup:
            return cast(dist.ProcessGroup, dist.new_group(those, timeout=self._group_timeout, backend=backend))

        ranks = list(range(self.num_stages))
        group = connect(ranks, "gloo")
        edges: dict[tuple[int, int], dist.ProcessGroup] = {}
        if "nccl" in (self._process_group_backend or ""):
            neighbours = [(rank, rank - 1) for rank in ranks[1:]] + [(rank - 1, rank) for rank in ranks[1:]]
            for edge in dict.fromkeys([*neighbours, (ranks[-1], ranks[0])]):
                edges[edge] = connect(sorted(edge), "nccl")
        names = [f"Rank {rank} (stage {stage_of_rank(rank, self.num_stages)})" for rank in ranks]
        return Transport(group, self.root_device, self._options.timeout, names, edges)

    @property
    def _group_timeout(self) -> timedelta:
        return max(self._options.timeout, timedelta(minutes=30))

    def _get_process_group_backend(self) -> str:
        if self._process_group_backend is not None:
            return self._process_group_backend
        # Processes that share a device cannot be connected by NCCL.
        shared = len(set(self.parallel_devices or ())) < self.num_processes
        return "gloo" if shared else compat.default_process_group_backend(self.root_device)

    def set_world_ranks(self) -> None:
        """Tells the cluster environment and Lightning's rank-zero functions which process this is."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        compat.set_rank_zero_only(self.global_rank)

    # ---- setting up a run

    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        module = self.lightning_module
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._refuse(trainer)
        self._install(trainer)
        self._seed = self.broadcast(torch.initial_seed())

        self.model = self.precision_plugin.convert_module(module)
        if self.num_stages > 1:
            self._network = self._find_network(trainer)
        else:
            self._ownership = Ownership(module, [module], self.stage)
        if fitting:
            self.setup_optimizers(trainer)
        if self._network is not None:
            self._divide(trainer, self._network)
        self.model_to_device()
        if self._cut is not None and self._network is not None:
            self._assemble(self._cut, self._network)
        if fitting:
            self._keep_own_parameters()
        self.setup_precision_plugin()
        if fitting:
            compat.optimizers_to_device(self.optimizers, self.root_device)
        if fitting and self._execution is not None and self._network is not None:
            self._watch(trainer, self._execution)
            self._watch_followers(self._network.target)
        # Without a seed each process has made its own; what is never trained is not shared again.
        self._share_outside(lambda tensor: True)

    def _refuse(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        check_trainer(trainer, self._layer_sync, self._one_process)
        self._options.check_casts(self.precision_plugin)
        if not self._one_process:
            check_steps(self.lightning_module)

    def _install(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        module = self.lightning_module
        self._undo.callback(compat.insert_callback(trainer, self._epoch_end))
        if self._one_process:
            return
        self._undo.callback(compat.keep_metrics_local(module))
        self._undo.callback(compat.silence_sync_dist_advice())
        self._undo.callback(clip_values_that_exist(self.precision_plugin))
        self._undo.callback(compat.silence_sigterm_broadcast(trainer))
        if trainer.state.fn == TrainerFn.FITTING and self.root_device.type != "cpu":
            self._undo.callback(compat.hide_example_input(module))
        if not self._reads:
            self._undo.callback(compat.bypass_before_batch_transfer(module))

    def _find_network(self, trainer: Trainer) -> Network:
        assert self.lightning_module is not None
        module = self.lightning_module
        configure = getattr(module, "configure_stages", None)
        layers = configure() if callable(configure) else None

        def example(target: nn.Module, name: str) -> Any:
            """How the training step calls the network, on the CPU; every rank must find the same layers."""
            fitting = trainer.state.fn == TrainerFn.FITTING
            loaders = compat.training_iterables(trainer) if fitting else None
            call = None
            # Where the step fails, training will say so.
            if loaders is not None and self._reads:
                with suppress(Exception), self._seeded(0, libraries=True):
                    call = first_call(module, target, name, loaders, self.precision_plugin, torch.device("cpu"))
                    call = map_tensors(Tensor.detach, call)
            return None if loaders is None else self.broadcast(call, src=self._reading_rank)

        points = self._options.split_points or self._recorded_cut or ()
        return find_network(module, layers, requirer=type(self).__name__, example=example, points=points)

    def setup_optimizers(self, trainer: Trainer) -> None:
        compat.reset_optimizers(self)
        super().setup_optimizers(trainer)
        check_optimizers(self.optimizers)

    def _divide(self, trainer: Trainer, network: Network) -> None:
        """Cuts the network and gives this process its part."""
        assert self.lightning_module is not None
        module, fitting = self.lightning_module, trainer.state.fn == TrainerFn.FITTING

        def measure() -> Measured | list[float] | None:
            loaders = compat.training_iterables(trainer) if fitting else None
            if loaders is None:
                return None
            costs = None
            if self._reads:
                with self._seeded(0, libraries=True):
                    costs = measured_costs(
                        module, network, loaders, self._options.balance, self.precision_plugin, self.root_device
                    )
            costs = self.broadcast(costs, src=self._reading_rank)
            if not isinstance(costs, Profile):
                return costs
            copies = copies_kept(self.optimizers[0] if self.optimizers else None)
            costs = replace(costs, recompute=self._options.recompute, stash=self.staleness.stash)
            return Measured(costs, self._seconds_per_byte(), copies)

        self._cut = decide_cut(
            network.chain,
            self.num_stages,
            self._options.split_points,
            self._recorded_cut,
            self._options.balance,
            measure,
            self._options.max_memory if fitting else None,
        )
        # What is cut only to be evaluated was not measured, and a fit that follows shall be.
        if fitting:
            self._recorded_cut = self._cut.split_points
        self._own(module, self._cut)
        if fitting and self.is_global_zero and not trainer.barebones:
            cut, measured = self._cut, self._cut.measured
            extras = () if measured is None else (measured.profile, measured.optimizer_copies)
            print_cut(cut.chain, cut.starts, cut.costs, cut.unit, *extras)

    def _own(self, module: LightningModule, cut: Cut) -> None:
        self._segments = cut.segments()
        layers = [cut.layers_of(stage) for stage in range(1, self.num_stages + 1)]
        self._ownership = Ownership(module, self._segments, self.stage, layers)
        self._ownership.check_ties()
        if not self._one_process:
            self._checkpoints = CheckpointAssembler(self._ownership, self._weights, self._gather)

    def _seconds_per_byte(self) -> float:
        """What a byte costs on its way from the first stage to the second."""
        if self._transport is None:
            return SECONDS_PER_BYTE
        second = rank_of_stage(2, self.num_stages)
        seconds = None
        if self._reads:
            seconds = measure_link(self._transport, second, self.root_device, first=True)
        elif self.global_rank == second:
            measure_link(self._transport, self._reading_rank, self.root_device, first=False)
        return cast(float, self.broadcast(seconds, src=self._reading_rank))

    def _assemble(self, cut: Cut, network: Network) -> None:
        """Puts the execution together, once all tensors are where they will be used."""
        assert self.lightning_module is not None
        module = self.lightning_module
        self._own(module, cut)
        assert self._ownership is not None
        self._options.check_recurrent(self._segments, self.root_device)
        if self._options.compile_options is not None:
            check_compilable(network)
            for stage, segment in enumerate(self._segments, start=1):
                if self.stage in (None, stage):
                    compile_stage(segment, stage, self._options.compile_options)
        self._execution = self._all_stages(self._ownership) if self._one_process else self._own_stage(module, cut)
        self._seam = Seam(network.target, self._ownership.foreign_layers, self._weights)
        self._undo.callback(self._seam.remove)

    def _all_stages(self, ownership: Ownership) -> DelayLine | Lockstep:
        self._undo.callback(clip_norm_per_stage(self.precision_plugin, ownership.stage_of))
        if not self.staleness.stash:
            return Lockstep(self._segments, self._seeded, self.staleness, self._options.recompute)
        return DelayLine(self._segments, ownership.parameters_outside, self._seeded, self.staleness)

    def _own_stage(self, module: LightningModule, cut: Cut) -> Pipeline:
        assert self._transport is not None and self.stage is not None
        placeholder = None
        self._whole_step = not module.automatic_optimization or compat.uses_step_outputs(module)
        if self._whole_step and self.stage < self.num_stages:
            placeholder = placeholder_maker(cut.chain.segment(cut.bounds[self.stage], len(cut.chain)))
            if module.automatic_optimization:
                placeholder = or_end_step(placeholder)
        late, rule = delay(self.stage, self.num_stages), self.staleness
        own = make_stage(self._segments[self.stage - 1], late, rule, self._options.recompute)
        return Pipeline(own, self.stage, self.num_stages, self._transport, self._seeded, placeholder, rule.shrink)

    def _watch_followers(self, target: nn.Module) -> None:
        """On the rank whose step goes on after the network, where copies of its layers may be used."""
        if self.stage != self.num_stages:
            return
        assert self._ownership is not None
        self._followers = StaleCopies(target, self._ownership)
        self._undo.callback(self._followers.forget)

    def _keep_own_parameters(self) -> None:
        if self._one_process:
            return
        assert self._ownership is not None
        self._groups = [OptimizerGroups(optimizer, self._ownership) for optimizer in self.optimizers]

    def show_all_parameters(self) -> None:
        """Puts the parameters of all stages into the optimizer's groups, until the hooks of this event have run."""
        for groups in self._groups:
            groups.show_all()

    def _adopt_groups(self) -> None:
        """Takes the parameters of other stages out of groups that were added, or shown by `show_all_parameters`."""
        for groups in self._groups:
            groups.adopt()

    def _watch(self, trainer: Trainer, execution: Execution) -> None:
        """Acts where strategies have no hook: after those of the module, which come after the callbacks'."""
        assert self.lightning_module is not None
        module = self.lightning_module
        signals = None if self._one_process else Signals(trainer)
        self._decisions = Decisions(trainer, execution, self.num_stages, self.is_global_zero, signals)
        self._undo.callback(self._decisions.restore)
        if not self._one_process:
            self._undo.callback(compat.save_on_exception_if(trainer, self._decisions.end_all))
        if not self.is_global_zero:
            self._undo.callback(compat.mute_training_logs(trainer, module))
        self._undo.callback(compat.filter_on_optimizer_by_identity())
        for optimizer in self.optimizers:
            # A user may step with the optimizer itself, of which Lightning knows nothing.
            self._undo.callback(optimizer.register_step_pre_hook(self._before_bare_step).remove)
            self._undo.callback(optimizer.register_step_post_hook(lambda *_: self._after_step()).remove)
        self._undo.callback(compat.on_exception_in_fit(trainer, self.on_exception))
        if not module.automatic_optimization:
            self._clip_again, undo = remembered_clipping(module)
            self._undo.callback(undo)
        for name, function in (
            ("on_fit_start", self._adopt_groups),
            ("on_train_epoch_start", self._adopt_groups),
            ("on_train_batch_end", lambda: self._after_batch_end_hooks(trainer)),
            ("on_train_epoch_end", lambda: self._after_epoch_end_hooks(trainer)),
        ):
            self._undo.callback(compat.after_hook(module, name, function))

    def model_to_device(self) -> None:
        """Moves this process's layers and everything outside the network to its device; others stay on the CPU."""
        assert self.lightning_module is not None
        foreign = {} if self._ownership is None else self._ownership.foreign_layers
        undo = [compat.keep_in_place(layer) for layer in foreign]
        try:
            self.lightning_module.to(self.root_device)
        finally:
            for function in undo:
                function()

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Modules are made on the CPU: no device need hold the whole network."""
        del empty_init
        with torch.device("cpu"), self.precision_plugin.tensor_init_context():
            yield

    # ---- data

    @property
    def _reading_rank(self) -> int:
        return 0 if self._one_process else rank_of_stage(1, self.num_stages)

    @property
    def _reads(self) -> bool:
        return self._one_process or self.global_rank == self._reading_rank

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.num_stages) if rank != self.global_rank]

    def process_dataloader(self, dataloader: object) -> object:
        """Lets the first stage's process read, and all others count along."""
        if self._one_process:
            return SourceLoader(dataloader)
        assert self._transport is not None
        transport = self._transport
        check_sampler(dataloader)
        if not self._reads:
            length = transport.take(self._reading_rank, Kind.FLAG)
            return RemoteLoader(dataloader, length, lambda: bool(transport.take(self._reading_rank, Kind.FLAG)))
        compat.seed_workers_as_one_device(dataloader)
        try:
            length = len(dataloader)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            length = None

        def announce(more: bool) -> None:
            transport.send(self._others, Kind.FLAG, more)

        transport.send(self._others, Kind.FLAG, length)
        return SourceLoader(dataloader, announce if length is None else None)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Moves the batch to the device on the process that reads, and from there to those that need it."""
        if self._transport is None:
            return super().batch_to_device(batch, device, dataloader_idx)
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if trainer.predicting:
            return self._predicted_batch(compat.prediction_loader(trainer, dataloader_idx), batch, device)
        training = trainer.training
        if self._reads:
            batch = super().batch_to_device(batch, device, dataloader_idx)
            # A snapshot: the user's step may change the batch in place while it is still on its way.
            self._transport.send([0] if training else self._others, Kind.BATCH, pack(batch, snapshot=True))
        elif training and not self.is_global_zero:
            batch = self._transport.take(self.global_rank + 1, Kind.BATCH)
        else:
            return self._transport.take(self._reading_rank, Kind.BATCH)
        if training and self.global_rank > 1:
            # Middle stages hand its shapes on, so that the reading rank need not write to all of them.
            self._transport.send(self.global_rank - 1, Kind.BATCH, pack(batch, payload=False))
        return batch

    def _predicted_batch(self, loader: SourceLoader | RemoteLoader, batch: Any, device: torch.device | None) -> Any:
        """The batch on all ranks, and which samples it is made of, for the callbacks that write predictions."""
        assert self._transport is not None
        if isinstance(loader, SourceLoader):
            batch = super().batch_to_device(batch, device)
            self._transport.send(self._others, Kind.BATCH, pack((batch, loader.new_indices()), snapshot=True))
        else:
            batch, indices = self._transport.take(self._reading_rank, Kind.BATCH)
            loader.add_indices(indices)
        return batch

    # ---- training

    def _seeded(self, stage: int, libraries: bool = False) -> AbstractContextManager[None]:
        purpose, number = self._draws
        return seeded(seed_of(self._seed, stage, number, purpose), self.root_device, libraries=libraries)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._execution is None:
            return super().training_step(*args, **kwargs)
        assert self.lightning_module is not None
        skips = compat.skips_backward(self.lightning_module.trainer)
        if skips and self._execution.waiting:
            # The weights are an average by now; gradients that were not drained before have come too late.
            self._execution.clear()
        output = self._train_one_batch(self.lightning_module, *args, **kwargs)
        if self.stage is not None and self.stage < self.num_stages and not self._kept_checked:
            # Once is enough: it is in the nature of the layers.
            self._kept_checked = True
            warn_of_kept_tensors(self._segments[self.stage - 1], self.stage)
        if skips:
            self._execution.skip()
            for parameter in self.lightning_module.parameters():
                parameter.grad = None
        return output

    def _train_one_batch(self, module: LightningModule, *args: Any, **kwargs: Any) -> Any:
        assert self._execution is not None and self._seam is not None
        number = compat.batch_number(module.trainer)
        check_one_step(number, self._trained_batch, self.optimizers)
        self._trained_batch = number
        self._draws = (0, number)
        self._backward_ran = self._answered = False
        if self._followers is not None:
            self._followers.mark()
        has_loss = self._one_process or self.stage == self.num_stages
        if not self._whole_step and not has_loss and not self._reads:
            with self.precision_plugin.train_step_context(), suppress(StepDone):
                self._execution.train((), {})
            return torch.zeros((), device=self.root_device, requires_grad=True)
        seeds, seam = self._seeded(0, libraries=True), self._seam.handled_by(self._train)
        with self.precision_plugin.train_step_context(), seeds, seam:
            return self._run_training_step(module, has_loss, *args, **kwargs)

    def _run_training_step(self, module: LightningModule, has_loss: bool, *args: Any, **kwargs: Any) -> Any:
        assert self._seam is not None and self._network is not None
        try:
            output = module.training_step(*args, **kwargs)
        except (StepDone, Exception) as error:
            # What follows the network is run here for the sake of hooks only, and may not bear a placeholder.
            in_vain = self._answered and not has_loss and module.automatic_optimization
            if not in_vain and not isinstance(error, StepDone):
                raise
            return torch.zeros((), device=self.root_device, requires_grad=True)
        check_step(self._network, module, self._seam.calls, output, self._backward_ran)
        return output

    def _train(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._seam is not None and self._execution is not None and self._network is not None
        check_call(self._network, self._seam.calls, tensors_of((args, kwargs)) if self._reads else ())
        output = self._execution.train(args, kwargs)
        self._answered = True
        return output

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the backward of the batch that is due on this stage; ``closure_loss`` counts on the last stage only."""
        if self._execution is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        assert self.lightning_module is not None
        assert self._ownership is not None
        module, plugin, ownership = self.lightning_module, self.precision_plugin, self._ownership
        if self._backward_ran:
            raise RuntimeError(
                "`manual_backward` was called more than once in a training step. Add the losses up and call it once."
            )
        self._backward_ran = not module.automatic_optimization
        self.pre_backward(closure_loss)
        closure_loss = plugin.pre_backward(closure_loss, module)

        def run() -> None:
            plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
            if not self._foreign_grads_checked and not isinstance(self._execution, DelayLine):
                # Once is enough: it is in the nature of the loss.
                self._foreign_grads_checked = True
                ownership.check_foreign_grads()

        self._execution.backward(run)
        self._pending += 1
        closure_loss = plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    def before_step(self) -> None:
        """Lets the optimizer change the weights, while what is in flight keeps those of its forward."""
        if self._execution is not None:
            self._execution.before_step()

    def _before_bare_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Lightning steps with a closure, whose forward is still to come; `EpochEnd` hears of the step after it.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self.before_step()

    def _after_step(self) -> None:
        self._stepped = True
        self._accumulated, self._pending = max(self._accumulated, self._pending), 0
        if self._execution is not None:
            self._execution.stepped()
        if self._transport is not None and self._seam is not None:
            self._weights.whole = False

    def drain(self, when: str, batch_idx: int = 0) -> None:
        """Applies the gradients in flight, if this is when they shall be: as many a step as before.

        Args:
            when: ``"epoch"`` or ``"fit"``: what has just ended.
            batch_idx: Index of the last batch, for the hooks of Lightning.
        """
        execution = self._execution
        if execution is None or when != self._options.drain:
            return
        assert self.lightning_module is not None
        module = self.lightning_module
        # A user's `optimizer_step` may set the learning rate, here on each stage another number of times.
        with ExitStack() as undo:
            for optimizer in self.optimizers:
                undo.callback(keep_options(optimizer))
            if not module.automatic_optimization:
                self._drain_manually(execution)
            while execution.waiting:
                self._drain_automatically(module, execution, batch_idx)

    def _drain_manually(self, execution: Execution) -> None:
        (optimizer,) = self.optimizers
        # What has been added up since the last step is part of the first of these.
        while execution.waiting or self._pending:
            if not self._pending:
                optimizer.zero_grad()
            for _ in range(max(1, self._accumulated - self._pending)):
                if not execution.drain():
                    break
            if self._clip_again is not None:
                self._clip_again()
            optimizer.step()

    def _drain_automatically(self, module: LightningModule, execution: Execution, batch_idx: int) -> None:
        epoch, optimizer = module.trainer.current_epoch, self._lightning_optimizers[0]
        self._stepped = False

        def closure() -> None:
            module.optimizer_zero_grad(epoch, batch_idx, cast(Optimizer, optimizer))
            for _ in range(module.trainer.accumulate_grad_batches):
                if not execution.drain():
                    break

        module.optimizer_step(epoch, batch_idx, optimizer, closure)
        if not self._stepped:
            # The user's hook steps at other batches only, but for these gradients there will be none.
            optimizer.step(lambda: None)

    def end_epoch(self, trainer: Trainer) -> None:
        """Lets all ranks end the epoch together and gives rank 0's metrics to all of them."""
        if self._transport is None:
            return
        if self._followers is not None:
            self._followers.mark(look=True)
        self._transport.send(self._others, Kind.EPOCH, None)
        for rank in self._others:
            self._transport.take(rank, Kind.EPOCH)
        self._follow_rank_zero(trainer)

    def before_batch_end_hooks(self, trainer: Trainer) -> None:
        """Readies what callbacks do at the end of a batch that needs rank 0's decision, or its metrics."""
        if self._decisions is None:
            return
        saves = self._decisions.due(compat.batch_number(trainer))
        if saves or compat.monitors_after_batch(trainer):
            self._follow_rank_zero(trainer)

    def _after_batch_end_hooks(self, trainer: Trainer) -> None:
        assert self._decisions is not None
        if self._followers is not None:
            self._followers.check()
        self._decisions.end_batch(compat.batch_number(trainer))
        if compat.plateaus_after_batch(trainer):
            self._follow_rank_zero(trainer)

    def _after_epoch_end_hooks(self, trainer: Trainer) -> None:
        if self._followers is not None:
            self._followers.check()
        self._follow_rank_zero(trainer, meet=True)

    def _follow_rank_zero(self, trainer: Trainer, meet: bool = False) -> None:
        """Gives all ranks rank 0's metrics and, where they meet, its decisions; they wait for it, so not often."""
        if self._decisions is None:
            return
        wanted = self._decisions.wanted
        if self._transport is not None:
            if self.is_global_zero:
                news = (dict(trainer.callback_metrics), wanted)
                self._transport.send(self._others, Kind.METRICS, pack(news, snapshot=True))
            else:
                metrics, wanted = self._transport.take(0, Kind.METRICS)
                trainer.callback_metrics.update(metrics)
        if meet:
            self._decisions.meet(wanted)

    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        self._trained_batch = None
        if self._execution is not None:
            self._execution.begin(self.lightning_module.trainer.global_step)
        if self._decisions is not None:
            self._decisions.begin()
            compat.keep_callback(self.lightning_module.trainer, self._epoch_end)
            self._undo.callback(time_on_rank_zero(self.lightning_module.trainer, self.is_global_zero))

    def on_train_end(self) -> None:
        """Gives every rank all the trained weights."""
        if self._decisions is not None:
            self._decisions.end()
        if self._execution is not None:
            self._execution.clear()
        if self._transport is not None and self._ownership is not None:
            share_with_all(self._transport, self._ownership.root, self._ownership.own_names, range(self.num_stages))
            self._weights.whole = True

    # ---- evaluation

    def on_validation_start(self) -> None:
        """Modules outside the network train on the last stage's process; all ranks validate with its weights."""
        assert self.lightning_module is not None
        self._share_what_trains_outside()
        self._outside_shared = False
        # A callback may exchange the weights for the validation.
        self.before_step()
        if not self.lightning_module.trainer.sanity_checking:
            self._follow_rank_zero(self.lightning_module.trainer)

    def on_validation_end(self) -> None:
        """Gives all ranks rank 0's decision to stop."""
        assert self.lightning_module is not None
        if not self.lightning_module.trainer.sanity_checking:
            self._follow_rank_zero(self.lightning_module.trainer, meet=True)

    def _share_what_trains_outside(self) -> None:
        self._share_outside(lambda tensor: tensor.requires_grad or not isinstance(tensor, nn.Parameter))

    def _share_outside(self, wanted: Callable[[Tensor], bool]) -> None:
        """Gives all ranks rank 0's parameters and buffers outside the network, those that are wanted."""
        if self._transport is None or self._ownership is None:
            return
        outside = self._ownership.names_outside(wanted)
        if outside:
            share_with_all(self._transport, self._ownership.root, outside, [0])

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._evaluating():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._evaluating():
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._evaluating():
            return super().predict_step(*args, **kwargs)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        if self._execution is None:
            yield
            return
        assert self._seam is not None
        if not self._outside_shared:
            # Once more: a callback may have exchanged the weights, for their average, since the validation started.
            self._share_what_trains_outside()
            self._outside_shared = True
        self._next_evaluation()
        with self._seeded(0, libraries=True), self._seam.handled_by(self._evaluate):
            yield

    def _evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._execution is not None
        # A step may call the network several times, for the sake of its random draws.
        self._next_evaluation()
        return self._execution.evaluate(args, kwargs)

    def _next_evaluation(self) -> None:
        self._draws = (1, self._evaluations)
        self._evaluations += 1

    # ---- collectives of Lightning

    def barrier(self, name: str | None = None) -> None:
        if self._one_process or not dist.is_initialized():
            return
        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[self.root_device.index])
        else:
            dist.barrier()

    def broadcast(self, obj: _T, src: int = 0) -> _T:
        if self._one_process or not dist.is_initialized():
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def reduce(self, tensor: Tensor | Any, group: Any | None = None, reduce_op: Any | None = "mean") -> Tensor | Any:
        """Returns the tensor as it is: there is one replica of the data, and each rank has seen all of it."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Agrees on a decision among all ranks: whether all (or any) of them say yes."""
        if self._one_process or not dist.is_initialized():
            return decision
        device = self.root_device if dist.get_backend() == "nccl" else torch.device("cpu")
        votes = torch.tensor(int(decision), device=device)
        dist.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Returns the tensor with a new first dimension of length 1: there is one replica of the data."""
        return tensor.unsqueeze(0)

    # ---- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The full state dict on rank 0; before the fit has ended, other ranks have only their own part up to date."""
        if self._checkpoints is None:
            return super().lightning_module_state_dict()
        return self._checkpoints.module_state()

    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        """The state of the user's optimizer over the whole module on rank 0, nothing elsewhere."""
        if self._checkpoints is None:
            if isinstance(optimizer, LightningOptimizer):
                optimizer = optimizer.optimizer
            return cast(dict[str, Any], super().optimizer_state(optimizer))
        (groups,) = self._groups
        return self._checkpoints.optimizer_state(groups)

    def _gather(self, own: dict[Any, Any]) -> list[dict[Any, Any]]:
        """What the other ranks have, on rank 0; an empty list on all others."""
        if self._failure is not None:
            raise PeerError(f"No checkpoint can be assembled, as other stages are out of reach. {self._failure}")
        if self._transport is not None:
            return gather_to_rank_zero(self._transport, own)
        # After a fit, `trainer.save_checkpoint` finds the ranks no longer connected.
        transport = self._connect_ranks()
        try:
            return gather_to_rank_zero(transport, own)
        finally:
            transport.disconnect()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self._one_process:
            super().load_optimizer_state_dict(checkpoint)
            return
        for groups, state in zip(self._groups, checkpoint["optimizer_states"], strict=True):
            groups.adopt()
            groups.optimizer.load_state_dict(local_optimizer_state(state, groups.optimizer, groups.whole))
            compat.optimizer_to_device(groups.optimizer, self.root_device)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes a plain Lightning checkpoint on rank 0, with the cut recorded beside what Lightning put in it."""
        if self._checkpoints is not None:
            self._checkpoints.complete_copies(checkpoint)
        if self._recorded_cut is not None:
            record_cut(checkpoint, self.num_stages, self._recorded_cut)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a checkpoint; the cut recorded in it is used again if it has this many stages."""
        # Lightning before 2.6 does not know the argument, and never gives it.
        given = {} if weights_only is None else {"weights_only": weights_only}
        loaded = super().load_checkpoint(checkpoint_path, **given)
        self._recorded_cut = recorded_cut(loaded, self.num_stages) or self._recorded_cut
        return loaded

    # ---- the end

    def on_exception(self, exception: BaseException) -> None:
        """Tells the other ranks, so that none of them waits for this one."""
        if self._failure is not None or (self._decisions is not None and self._decisions.end_all(exception)):
            return
        name = f"Rank {self.global_rank} (stage {self.stage})"
        self._failure = f"{name} failed with {type(exception).__name__}: {exception}"
        if self._transport is not None:
            self._failure = self._transport.abort(self._failure)

    def teardown(self) -> None:
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        transport, undo = self._transport, self._undo
        self._begin()
        try:
            if transport is not None:
                transport.disconnect()
        finally:
            undo.close()
            super().teardown()
