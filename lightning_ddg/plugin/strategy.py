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
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lightning_ddg.comm.mailbox import GroupMailbox
from lightning_ddg.comm.ranks import PipelineRanks, group_timeout
from lightning_ddg.core.delay_line import DelayLine
from lightning_ddg.core.execution import Channel
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
from lightning_ddg.plugin.callbacks import EpochEnd
from lightning_ddg.plugin.checkpoint import (
    CHECKPOINT_KEY,
    adopt_groups,
    copies_of_state,
    full_optimizer_state,
    keep_only,
    keep_options,
    keys_of_stage,
    local_optimizer_state,
    owner_by_name,
    parameter_groups,
    stage_optimizer_state,
)
from lightning_ddg.plugin.compiling import compile_stage
from lightning_ddg.plugin.data import BATCH, FLAG, RemoteLoader, SourceLoader
from lightning_ddg.plugin.decisions import Decisions
from lightning_ddg.plugin.measure import Cut, Measured, copies_kept, decide_cut, first_call, measured_costs
from lightning_ddg.plugin.redirection import Seam, StepDone
from lightning_ddg.plugin.refusals import (
    check_backend,
    check_call,
    check_casts,
    check_choice,
    check_compilable,
    check_compile,
    check_foreign_grads,
    check_interactive,
    check_layer_sync,
    check_memory_limit,
    check_no_memory_limit,
    check_not_started,
    check_one_step,
    check_optimizers,
    check_precision,
    check_recurrent,
    check_sampler,
    check_stages,
    check_staleness,
    check_started,
    check_step,
    check_ties_outside,
    check_timeout,
    check_world_size,
    warn_of_kept_tensors,
)
from lightning_ddg.plugin.signals import Signals
from lightning_ddg.plugin.stale_copies import Followers

_T = TypeVar("_T")
Execution = Pipeline | DelayLine | Lockstep

EPOCH = Channel("epoch", ends=True)
METRICS = Channel("metrics")

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
        check_choice("balance", balance)
        check_choice("drain", drain)
        check_choice("start_method", start_method)
        check_stages(num_stages, split_points)
        check_timeout(timeout)
        check_compile(compile, num_stages)
        check_staleness(staleness, recompute, compile)
        self.num_nodes = 1
        self._num_stages = num_stages
        self._split_points = split_points
        self._balance = balance
        self._max_memory = None if max_memory is None else parse_bytes(max_memory)
        check_memory_limit(self._max_memory, split_points, balance)
        self._compile = {} if compile is True else compile
        self._drain = drain
        self._recompute = recompute
        self._staleness = staleness or Staleness()
        self._process_group_backend = process_group_backend
        self._timeout = timeout
        self._start_method = start_method
        self._ranks: PipelineRanks | None = None
        self._recorded_cut: list[str] | None = None
        self._begin()
        self._cut: Cut | None = None
        self._segments: list[nn.Module] = []
        self._owner: dict[str, int] = {}
        self._groups: list[list[nn.Parameter]] = []
        self._weights_complete = True
        self._gathered: dict[str, Any] | None = None
        self._failure: str | None = None
        # Over all runs, or each prediction would draw what the one before it drew.
        self._evaluations = 0

    def _begin(self) -> None:
        """The state of one run, from `setup_environment` to `teardown`; what is set elsewhere outlives it."""
        self._undo = ExitStack()
        self._transport: GroupMailbox | None = None
        self._network: Network | None = None
        self._execution: Execution | None = None
        self._seam: Seam | None = None
        self._followers: Followers | None = None
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
        if self._num_stages == "auto":
            if self._one_process:
                return 2 if self._split_points is None else len(self._split_points) + 1
            return self.world_size
        return self._num_stages

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
        return self._staleness

    @property
    def stage_parameter_names(self) -> list[list[str]]:
        """The LightningModule's parameter names of each of the ``K`` stages, the same on every rank.

        Parameters outside the network belong to the last stage, whose process computes the loss.

        Raises:
            RuntimeError: Before the Trainer has set the strategy up.
        """
        if self.num_stages > 1 and self._cut is None:
            raise RuntimeError(
                "The network has not been cut yet, so that `stage_parameter_names` is not known. Read it from"
                " `on_fit_start` on, or after `trainer.fit`; where processes are spawned or forked, in these."
            )
        assert self.lightning_module is not None
        names = [name for name, _ in self.lightning_module.named_parameters()]
        return [
            [name for name in names if self._owner.get(name, 1) == stage] for stage in range(1, self.num_stages + 1)
        ]

    @property
    def device_mesh(self) -> DeviceMesh:
        """The processes as a mesh with the axes ``("data", "stage")``; the first has length 1.

        Raises:
            RuntimeError: In one process, or before the processes have been connected.
        """
        if self._ranks is None:
            raise RuntimeError("There is no device mesh in one process, nor before the Trainer has connected several.")
        return self._ranks.mesh

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
        check_world_size(self._num_stages, self._split_points, self.world_size)
        if self._one_process:
            check_no_memory_limit(self._max_memory)
            return
        if started:
            check_not_started(self._start_method, type(environment).__name__)
            return
        check_interactive(self._start_method)
        if self._start_method == "popen":
            self._launcher = compat.SubprocessScriptLauncher(environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = compat.MultiProcessingLauncher(self, start_method=self._start_method)

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
        if self._start_method == "popen":
            DDGStrategy._processes = self.world_size
        if self._start_method == "fork":
            # OpenMP's threads have not come along: the first operation that waits for one would wait for ever.
            torch.set_num_threads(1)
        self._process_group_backend = backend = self._get_process_group_backend()
        assert self.cluster_environment is not None and self.parallel_devices is not None
        check_backend(backend, self.parallel_devices)
        compat.init_dist_connection(
            self.cluster_environment,
            backend,
            timeout=group_timeout(self._timeout),
            # Of a group bound to a device, torch 2.6 makes other groups by splitting it, which only NCCL can.
            device_id=self.root_device if "nccl" in backend else None,
        )
        check_world_size(self._num_stages, self._split_points, dist.get_world_size())
        self._ranks = PipelineRanks.connect(self.num_stages, self.root_device, self._timeout, backend)
        self._transport = self._ranks.mailbox

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
            self._watch_followers(module, self._network.target)
        # Without a seed each process has made its own; what is never trained is not shared again.
        self._share_outside(lambda tensor: True)

    def _refuse(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        compat.refuse_trainer_flags(trainer)
        check_layer_sync(self._layer_sync)
        check_casts(self._staleness, self._recompute, self.precision_plugin)
        if not self._one_process:
            compat.refuse_dataloader_iter(self.lightning_module)
            compat.refuse_callbacks(trainer)

    def _install(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        module = self.lightning_module
        self._undo.callback(compat.insert_callback(trainer, self._epoch_end))
        if self._one_process:
            return
        self._undo.callback(compat.keep_metrics_local(module))
        self._undo.callback(compat.silence_sync_dist_advice())
        self._undo.callback(compat.clip_values_that_exist(self.precision_plugin))
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

        points = self._split_points or self._recorded_cut or ()
        return find_network(module, layers, requirer=type(self).__name__, example=example, points=points)

    def setup_optimizers(self, trainer: Trainer) -> None:
        self._reset_optimizers_and_schedulers()
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
                        module, network, loaders, self._balance, self.precision_plugin, self.root_device
                    )
            costs = self.broadcast(costs, src=self._reading_rank)
            if not isinstance(costs, Profile):
                return costs
            copies = copies_kept(self.optimizers[0] if self.optimizers else None)
            costs = replace(costs, recompute=self._recompute, stash=self._staleness.stash)
            return Measured(costs, self._seconds_per_byte(), copies)

        self._cut = decide_cut(
            network.chain,
            self.num_stages,
            self._split_points,
            self._recorded_cut,
            self._balance,
            measure,
            self._max_memory if fitting else None,
        )
        # What is cut only to be evaluated was not measured, and a fit that follows shall be.
        if fitting:
            self._recorded_cut = self._cut.split_points
        self._segments = self._cut.segments()
        check_ties_outside(module, self._segments)
        self._owner = owner_by_name(module, self._segments)
        if fitting and self.is_global_zero and not trainer.barebones:
            cut, measured = self._cut, self._cut.measured
            extras = () if measured is None else (measured.profile, measured.optimizer_copies)
            print_cut(cut.chain, cut.starts, cut.costs, cut.unit, *extras)

    def _seconds_per_byte(self) -> float:
        """What a byte costs on its way from the first stage to the second."""
        return SECONDS_PER_BYTE if self._ranks is None else self._ranks.seconds_per_byte(SECONDS_PER_BYTE)

    def _assemble(self, cut: Cut, network: Network) -> None:
        """Puts the execution together, once all tensors are where they will be used."""
        assert self.lightning_module is not None
        module = self.lightning_module
        self._segments = cut.segments()
        check_recurrent(self._staleness, self._segments, self.root_device)
        if self._compile is not False:
            check_compilable(network)
            for stage, segment in enumerate(self._segments, start=1):
                if self.stage in (None, stage):
                    compile_stage(segment, stage, self._compile)
        self._execution = self._all_stages(module) if self._one_process else self._own_stage(module, cut)
        self._seam = Seam(network.target, self._foreign)
        self._undo.callback(self._seam.remove)

    def _all_stages(self, module: LightningModule) -> DelayLine | Lockstep:
        stages = [list(segment.parameters()) for segment in self._segments]
        self._undo.callback(compat.clip_norm_per_stage(self.precision_plugin, stages))
        if not self._staleness.stash:
            return Lockstep(self._segments, self._seeded, self._staleness, self._recompute)
        in_network = {id(parameter) for parameters in stages for parameter in parameters}
        others = [parameter for parameter in module.parameters() if id(parameter) not in in_network]
        return DelayLine(self._segments, others, self._seeded, self._staleness)

    def _own_stage(self, module: LightningModule, cut: Cut) -> Pipeline:
        assert self._transport is not None and self.stage is not None
        placeholder = None
        self._whole_step = not module.automatic_optimization or compat.uses_step_outputs(module)
        if self._whole_step and self.stage < self.num_stages:
            placeholder = placeholder_maker(cut.chain.segment(cut.bounds[self.stage], len(cut.chain)))
            if module.automatic_optimization:
                placeholder = or_end_step(placeholder)
        late, rule = delay(self.stage, self.num_stages), self._staleness
        own = make_stage(self._segments[self.stage - 1], late, rule, self._recompute)
        return Pipeline(own, self.stage, self.num_stages, self._transport, self._seeded, placeholder, rule.shrink)

    @property
    def _foreign(self) -> dict[nn.Module, int]:
        """Layers whose weights live on another rank, with their stage."""
        if self._cut is None or self.stage is None:
            return {}
        own = {id(module) for module in self._segments[self.stage - 1].modules()}
        stages = range(1, self.num_stages + 1)
        return {layer: stage for stage in stages for layer in self._cut.layers_of(stage) if id(layer) not in own}

    def _watch_followers(self, module: LightningModule, target: nn.Module) -> None:
        """On the rank whose step goes on after the network, where copies of its layers may be used."""
        if self.stage != self.num_stages:
            return
        owned = [(parameter, self._owner[name]) for name, parameter in module.named_parameters()]
        self._followers = Followers(module, target, [pair for pair in owned if pair[1] != self.stage])
        self._undo.callback(self._followers.forget)

    def _keep_own_parameters(self) -> None:
        if self._one_process:
            return
        self._groups = [group for optimizer in self.optimizers for group in parameter_groups(optimizer)]
        for optimizer in self.optimizers:
            keep_only(optimizer, self._own_parameters)

    @property
    def _own_parameters(self) -> list[nn.Parameter]:
        assert self.lightning_module is not None
        named = self.lightning_module.named_parameters()
        return [parameter for name, parameter in named if self._owner[name] == self.stage]

    def show_all_parameters(self) -> None:
        """Puts the parameters of all stages into the optimizer's groups, until the hooks of this event have run."""
        self._adopt_groups()
        for optimizer in () if self._one_process else self.optimizers:
            for group, parameters in zip(optimizer.param_groups, self._groups, strict=True):
                group["params"] = list(parameters)

    def _adopt_groups(self) -> None:
        """Takes the parameters of other stages out of groups that were added, or shown by `show_all_parameters`."""
        for optimizer in () if self._one_process else self.optimizers:
            self._groups = adopt_groups(optimizer, self._groups, self._own_parameters)

    def _watch(self, trainer: Trainer, execution: Execution) -> None:
        """Acts where strategies have no hook: after those of the module, which come after the callbacks'."""
        assert self.lightning_module is not None
        module, leads = self.lightning_module, self.is_global_zero
        signals = None if self._one_process else Signals(trainer)
        self._decisions = Decisions(trainer, execution, self.num_stages, leads, signals)
        self._undo.callback(self._decisions.restore)
        if not self._one_process:
            self._undo.callback(compat.save_on_exception_if(trainer, self._decisions.end_all))
        if not leads:
            self._undo.callback(compat.mute_training_logs(trainer, module))
        self._undo.callback(compat.filter_on_optimizer_by_identity())
        for optimizer in self.optimizers:
            # A user may step with the optimizer itself, of which Lightning knows nothing.
            self._undo.callback(optimizer.register_step_pre_hook(self._before_bare_step).remove)
            self._undo.callback(optimizer.register_step_post_hook(lambda *_: self._after_step()).remove)
        self._undo.callback(compat.on_exception_in_fit(trainer, self.on_exception))
        if not module.automatic_optimization:
            self._clip_again, undo = compat.remembered_clipping(module)
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
        undo = [compat.keep_in_place(layer) for layer in self._foreign]
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
            length = transport.take(self._reading_rank, FLAG)
            return RemoteLoader(dataloader, length, lambda: bool(transport.take(self._reading_rank, FLAG)))
        compat.seed_workers_as_one_device(dataloader)
        try:
            length = len(dataloader)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            length = None

        def announce(more: bool) -> None:
            transport.send(self._others, FLAG, more)

        transport.send(self._others, FLAG, length)
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
            self._transport.send([0] if training else self._others, BATCH, batch, snapshot=True)
        elif training and not self.is_global_zero:
            batch = self._transport.take(self.global_rank + 1, BATCH)
        else:
            return self._transport.take(self._reading_rank, BATCH)
        if training and self.global_rank > 1:
            # Middle stages hand its shapes on, so that the reading rank need not write to all of them.
            self._transport.send(self.global_rank - 1, BATCH, batch, payload=False)
        return batch

    def _predicted_batch(self, loader: SourceLoader | RemoteLoader, batch: Any, device: torch.device | None) -> Any:
        """The batch on all ranks, and which samples it is made of, for the callbacks that write predictions."""
        assert self._transport is not None
        if isinstance(loader, SourceLoader):
            batch = super().batch_to_device(batch, device)
            self._transport.send(self._others, BATCH, (batch, loader.new_indices()), snapshot=True)
        else:
            batch, indices = self._transport.take(self._reading_rank, BATCH)
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
        module, plugin = self.lightning_module, self.precision_plugin
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
                check_foreign_grads(module, self._owner, self.num_stages)

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
            self._weights_complete, self._seam.stale = False, True

    def drain(self, when: str, batch_idx: int = 0) -> None:
        """Applies the gradients in flight, if this is when they shall be: as many a step as before.

        Args:
            when: ``"epoch"`` or ``"fit"``: what has just ended.
            batch_idx: Index of the last batch, for the hooks of Lightning.
        """
        execution = self._execution
        if execution is None or when != self._drain:
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
        self._transport.send(self._others, EPOCH, None)
        for rank in self._others:
            self._transport.take(rank, EPOCH)
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
                self._transport.send(self._others, METRICS, news, snapshot=True)
            else:
                metrics, wanted = self._transport.take(0, METRICS)
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
            self._undo.callback(compat.time_on_rank_zero(self.lightning_module.trainer, self.is_global_zero))

    def on_train_end(self) -> None:
        """Gives every rank all the trained weights."""
        if self._decisions is not None:
            self._decisions.end()
        if self._execution is not None:
            self._execution.clear()
        if self._ranks is not None and self._seam is not None:
            assert self.lightning_module is not None
            own = [name for name, stage in self._owner.items() if stage == self.stage]
            self._ranks.share(self.lightning_module, own, range(self.num_stages))
            self._weights_complete, self._seam.stale = True, False

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
        if self._ranks is None:
            return
        assert self.lightning_module is not None
        module = self.lightning_module
        inside = {id(tensor) for part in self._segments for tensor in (*part.parameters(), *part.buffers())}
        named = (*module.named_parameters(), *module.named_buffers())
        outside = [name for name, tensor in named if id(tensor) not in inside and wanted(tensor)]
        if outside:
            self._ranks.share(module, outside, [0])

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
        assert self.lightning_module is not None
        state: dict[str, Any] = self.lightning_module.state_dict()
        self._gathered = state
        if not self._weights_complete:
            self._complete(state)
        return state

    def _complete(self, state: dict[str, Any]) -> None:
        """Puts all stages' parts into rank 0's copy of the module's state."""
        assert self.lightning_module is not None and self.stage is not None
        keys = keys_of_stage(state, self.lightning_module, self._segments, self.stage)
        for values in self._gather({key: state[key] for key in keys}):
            state.update(values)

    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        """The state of the user's optimizer over the whole module on rank 0, nothing elsewhere."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        if self._one_process:
            return cast(dict[str, Any], super().optimizer_state(optimizer))
        self._adopt_groups()
        own = stage_optimizer_state(optimizer, self._groups)
        others = self._gather(own)
        return full_optimizer_state(optimizer, self._groups, [own, *others]) if self.is_global_zero else {}

    def _gather(self, own: dict[Any, Any]) -> list[dict[Any, Any]]:
        """What the other ranks have, on rank 0; an empty list on all others."""
        assert self._ranks is not None
        return self._ranks.gather(own)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self._one_process:
            super().load_optimizer_state_dict(checkpoint)
            return
        self._adopt_groups()
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(local_optimizer_state(state, optimizer, self._groups))
            compat.optimizer_to_device(optimizer, self.root_device)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes a plain Lightning checkpoint on rank 0, with the cut recorded beside what Lightning put in it."""
        if self._cut is not None and not self._one_process:
            assert self.lightning_module is not None
            for copy in copies_of_state(checkpoint, self.lightning_module.state_dict().keys()):
                if copy is not self._gathered:
                    self._complete(copy)
        if self._recorded_cut is not None:
            checkpoint[CHECKPOINT_KEY] = {"num_stages": self.num_stages, "split_points": list(self._recorded_cut)}
        self._gathered = None
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a checkpoint; the cut recorded in it is used again if it has this many stages."""
        # Lightning before 2.6 does not know the argument, and never gives it.
        given = {} if weights_only is None else {"weights_only": weights_only}
        loaded = super().load_checkpoint(checkpoint_path, **given)
        recorded = loaded.get(CHECKPOINT_KEY)
        if recorded and recorded["num_stages"] == self.num_stages:
            self._recorded_cut = list(recorded["split_points"])
        return loaded

    # ---- the end

    def on_exception(self, exception: BaseException) -> None:
        """Tells the other ranks, so that none of them waits for this one."""
        if self._failure is not None or (self._decisions is not None and self._decisions.end_all(exception)):
            return
        name = f"Rank {self.global_rank} (stage {self.stage})"
        self._failure = f"{name} failed with {type(exception).__name__}: {exception}"
        if self._ranks is not None:
            self._failure = self._ranks.abort(self._failure)

    def teardown(self) -> None:
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        undo = self._undo
        self._begin()
        try:
            if self._ranks is not None:
                self._ranks.disconnect()
        finally:
            undo.close()
            super().teardown()
