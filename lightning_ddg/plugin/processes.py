"""The processes, as Lightning asks for them: how many there are, how they are started, connected and counted.

Each process trains one stage; one process alone trains all. Stage ``k`` of ``K`` is rank ``K - k``, so that rank 0,
which logs and decides in Lightning, has the loss.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from lightning_ddg.comm.interface import choose_interface
from lightning_ddg.comm.ranks import LocalRanks, PipelineRanks, Ranks
from lightning_ddg.core.schedule import delay, stage_of_rank
from lightning_ddg.core.staleness import Staleness
from lightning_ddg.plugin import compat, first_error, host
from lightning_ddg.plugin.checkpoint_file import WholeFileCheckpointIO
from lightning_ddg.plugin.collectives import check_outside_step, gathered, reduced
from lightning_ddg.plugin.host import (
    Accelerator,
    CheckpointIO,
    ClusterEnvironment,
    LightningModule,
    ParallelStrategy,
    Precision,
)
from lightning_ddg.plugin.launcher import ForkLauncher, ScriptLauncher, kill_if_stopped
from lightning_ddg.plugin.options import Options, check_backend, check_precision, check_started
from lightning_ddg.plugin.warn import warn

_T = TypeVar("_T")


#: The least time that processes are given to start: they import, and may be started one after the other.
_STARTING = timedelta(minutes=5)

_STRATEGIES = {
    "ddg": ("popen", "Decoupled parallel backpropagation, one process per stage started as scripts"),
    "ddg_spawn": ("spawn", "Decoupled parallel backpropagation, one process per stage started by spawning"),
    "ddg_notebook": ("fork", "Decoupled parallel backpropagation, one process per stage forked from a notebook"),
}


class StageProcesses(ParallelStrategy):
    """What a strategy whose processes are stages says of them; what they do is the subclass's business.

    Args:
        options: The strategy's options.
        accelerator: As in Lightning's strategies.
        parallel_devices: As in Lightning's strategies.
        cluster_environment: As in Lightning's strategies.
        checkpoint_io: As in Lightning's strategies; by default, files appear whole or not at all.
        precision_plugin: As in Lightning's strategies.
    """

    # As how many processes this script has been started, once it has been.
    _started: ClassVar[int | None] = None

    def __init__(
        self,
        options: Options,
        accelerator: Accelerator | None,
        parallel_devices: list[torch.device] | None,
        cluster_environment: ClusterEnvironment | None,
        checkpoint_io: CheckpointIO | None,
        precision_plugin: Precision | None,
    ) -> None:
        super().__init__(accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin)
        self.num_nodes = 1
        self._options = options
        self._ranks: Ranks = LocalRanks(1)
        # The ID of rank 0's process, which may be the one that has started this one.
        self._first_process: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the run out where a Trainer is copied or pickled."""
        return dict(vars(self), _run=None, _undo=ExitStack(), _checkpoints=None, _exchange=None, _ranks=LocalRanks(1))

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register ``"ddg"``, ``"ddg_spawn"`` and ``"ddg_notebook"``; called when the package is imported."""
        for name, (start_method, description) in _STRATEGIES.items():
            if name not in strategy_registry:
                strategy_registry.register(name, cls, description=description, start_method=start_method)

    @override
    def __repr__(self) -> str:
        # All that a Trainer of the other package says of a strategy that is none of its own.
        mixed = host.if_mixed()
        return super().__repr__() if mixed is None else f"<{type(self).__name__}: {mixed}>"

    @property
    def num_stages(self) -> int:
        """Number of stages ``K``."""
        return self._options.stages(self.world_size)

    @property
    def stage(self) -> int | None:
        """Stage ``1..K`` of this process, input side first; ``None`` if it runs all stages."""
        return None if self.world_size == 1 else stage_of_rank(self.global_rank, self.num_stages)

    @property
    def data_parallel_size(self) -> int:
        """Number of pipelines ``D``, replicas of each other, each of which reads its share of the data."""
        return self._options.replicas(self.world_size)

    @property
    def replica(self) -> int:
        """Which pipeline ``0..D-1`` this process belongs to."""
        return 0 if self.world_size == 1 else self.global_rank // self.num_stages

    @property
    def is_distributed(self) -> bool:
        """Whether there are several replicas: if so, Lightning divides the data and reduces what is logged."""
        return self.data_parallel_size > 1

    @property
    def delay(self) -> int | None:
        """Delay ``(K - stage)(1 + slack)`` of this process's stage, in batches; ``None`` if it runs all stages."""
        return None if self.stage is None else delay(self.stage, self.num_stages, self._options.slack)

    @property
    def staleness(self) -> Staleness:
        """What stages do with stale gradients."""
        return self._options.staleness

    @property
    def device_mesh(self) -> DeviceMesh:
        """The processes as a mesh with the axes ``("data", "stage")``, of the lengths ``D`` and ``K``.

        Raises:
            RuntimeError: In one process, or before the processes have been connected.
        """
        return self._ranks.mesh

    @property
    @override
    def root_device(self) -> torch.device:
        devices = cast(list[torch.device], self.parallel_devices)
        # A process of several that runs a Trainer of one uses that Trainer's device.
        return devices[0 if self.world_size == 1 else self.local_rank]

    @property
    def num_processes(self) -> int:
        """Number of processes on this node."""
        return len(self.parallel_devices or ())

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.data_parallel_size, "rank": self.replica}

    @property
    def process_group_backend(self) -> str | None:
        """Backend of ``torch.distributed``; ``None`` while it is not known which devices there are."""
        devices = self.parallel_devices
        if self._options.process_group_backend is not None or devices is None:
            return self._options.process_group_backend
        # Processes that share a device cannot be connected by NCCL.
        shared = len(set(devices)) < len(devices)
        return "gloo" if shared else compat.default_process_group_backend(self.root_device)

    @property
    @override
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    @override
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        check_precision(precision_plugin)
        self._precision_plugin = precision_plugin

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if isinstance(self._launcher, ForkLauncher) and self._launcher.failed:
            warn(
                f"No checkpoint is written to {str(filepath)!r}: this process only waits for those that train, which"
                " have ended, and has none of their weights. Save every so many steps, or start by `ddg` or torchrun."
            )
            return
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = WholeFileCheckpointIO()
        # One that wraps another, to write in the background.
        wrapping: Any = self._checkpoint_io
        if getattr(wrapping, "checkpoint_io", wrapping) is None:
            wrapping.checkpoint_io = WholeFileCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    @override
    def checkpoint_io(self, io: CheckpointIO | None) -> None:
        self._checkpoint_io = io

    @override
    def _configure_launcher(self) -> None:
        environment = cast(ClusterEnvironment, self.cluster_environment)
        started_by = type(environment).__name__ if environment.creates_processes_externally else None
        if started_by is not None:
            # A script that has been started several times by a first Trainer stays so for the Trainers after it.
            started = 1 if self.world_size == 1 else StageProcesses._started or self.world_size
            local_rank = environment.local_rank()
            check_started(started, self.num_processes, self.num_nodes, local_rank, started_by)
            environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        self._options.check_world_size(self.world_size)
        if self.world_size == 1:
            return
        self._options.check_launch(started_by)
        if started_by is not None:
            return
        if self._options.start_method == "popen":
            self._launcher = ScriptLauncher(environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = ForkLauncher(self, start_method=self._options.start_method)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self.world_size > 1 and self._options.start_method == "forkserver":
            # All other processes draw on as the script has drawn, which is what plain Lightning does.
            compat.reset_seed()
        self.set_world_ranks()
        self._ranks = self._connected() if self.world_size > 1 else LocalRanks(self.num_stages)
        self._first_process = self._ranks.broadcast(os.getpid())

    def _connected(self) -> Ranks:
        if self._options.start_method == "popen":
            StageProcesses._started = self.world_size
        if self._options.start_method == "fork":
            # OpenMP's threads have not come along: the first operation that waits for one would wait for ever.
            torch.set_num_threads(1)
        backend = cast(str, self.process_group_backend)
        check_backend(backend, self.parallel_devices or [])
        choose_interface(cast(ClusterEnvironment, self.cluster_environment).main_address)
        compat.init_dist_connection(
            cast(ClusterEnvironment, self.cluster_environment),
            backend,
            timeout=max(self._options.timeout, _STARTING),
            # Of a group bound to a device, torch 2.6 makes other groups by splitting it, which only NCCL can.
            device_id=self.root_device if "nccl" in backend else None,
        )
        self._options.check_world_size(dist.get_world_size())
        first_error.silence_told()
        options = self._options
        return PipelineRanks.connect(self.num_stages, self.root_device, options.timeout, backend, options.slack)

    def _tell(self, exception: BaseException) -> None:
        """Tell the other ranks what ends this one, and who reads its output what has come first."""
        if not self._ranks.others:
            return
        rank = self._ranks.name
        trainer = cast(LightningModule, self.lightning_module).trainer
        first_error.sign(exception, rank, self._ranks.abort(first_error.reason(rank, trainer, exception)))
        if os.getppid() == self._first_process:
            atexit.register(kill_if_stopped, self._first_process)

    def set_world_ranks(self) -> None:
        """Tell the cluster environment and Lightning's rank-zero functions which process this is."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        compat.set_rank_zero_only(self.global_rank)

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Make modules on the CPU: no device need hold the whole network."""
        del empty_init
        with torch.device("cpu"), self.precision_plugin.tensor_init_context():
            yield

    # ---- collectives of Lightning

    @override
    def barrier(self, name: str | None = None) -> None:
        check_outside_step("barrier")
        self._ranks.barrier()

    @override
    def broadcast(self, obj: _T, src: int = 0) -> _T:
        check_outside_step("broadcast")
        return self._ranks.broadcast(obj, src)

    @override
    def reduce(self, tensor: Tensor | Any, group: Any | None = None, reduce_op: Any | None = "mean") -> Tensor | Any:
        """Reduce over the replicas of the data; with one, return the tensor as it is: each rank has seen all of it.

        Every rank with this stage has to call it, in a training step those of the last stage.

        Raises:
            ValueError: For an operation that is not known.
        """
        return tensor if self.data_parallel_size == 1 else reduced(self._ranks.replicas, tensor, reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Agree on a decision among all ranks: whether all (or any) of them say yes."""
        check_outside_step("reduce_boolean_decision")
        return self._ranks.agree(decision, all)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Return the tensors of all replicas of the data, stacked along a new first dimension of length ``D``.

        Raises:
            ValueError: For ``sync_grads=True`` with several replicas.
        """
        if self.data_parallel_size == 1:
            return tensor.unsqueeze(0)
        return gathered(self._ranks.replicas, tensor, sync_grads)
