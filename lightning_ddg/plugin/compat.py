"""Every touch of Lightning's private parts, each with its reason; the tests say when one has moved.

Nothing else in the package uses a name of Lightning that begins with an underscore, but for what concerns data, in
``compat_data.py``. Each function that changes something returns the function that undoes it.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from lightning_ddg.plugin import host
from lightning_ddg.plugin.attached import Undo as Undo
from lightning_ddg.plugin.attached import replaced as replaced
from lightning_ddg.plugin.host import (
    BaseFinetuning,
    Callback,
    LightningModule,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    ParallelStrategy,
    Strategy,
    Timer,
    Trainer,
    is_overridden,
    is_param_in_hook_signature,
    rank_zero_only,
)
from lightning_ddg.plugin.warn import warn_on_rank_zero

# Used as they are; their names are Lightning's own without the underscore.
MultiProcessingLauncher = host.part("pytorch.strategies.launchers")._MultiProcessingLauncher
SubprocessScriptLauncher = host.part("pytorch.strategies.launchers")._SubprocessScriptLauncher
default_process_group_backend = host.part("fabric.utilities.distributed")._get_default_process_group_backend_for_device
init_dist_connection = host.part("fabric.utilities.distributed")._init_dist_connection
optimizer_to_device = host.part("fabric.utilities.optimizer")._optimizer_to_device
optimizers_to_device = host.part("fabric.utilities.optimizer")._optimizers_to_device
reset_seed = host.part("fabric.utilities.seed").reset_seed

#: The method of the Trainer that is running while loops are, as tracebacks name it.
RUNS_LOOPS = "_run_stage"

# Since Lightning 2.6.
WeightAveraging: type[Callback] | None = getattr(host.part("pytorch.callbacks"), "WeightAveraging", None)
StochasticWeightAveraging = host.part("pytorch.callbacks").StochasticWeightAveraging
Closure = host.part("pytorch.loops.optimization.automatic").Closure
ClosureResult = host.part("pytorch.loops.optimization.automatic").ClosureResult


def silence_sigterm_broadcast(trainer: Trainer) -> Undo:
    """Since 2.5.2 every training batch starts with a broadcast from rank 0, which would lock all stages together."""
    loop = trainer.fit_loop.epoch_loop
    if not hasattr(loop, "_broadcast_sigterm_tensor"):
        return lambda: None
    return replaced(loop, "_broadcast_sigterm_tensor", lambda: None)


def on_sigterm(trainer: Trainer, handle: Callable[[int], object]) -> Undo:
    """Lightning's handler waits, inside the signal handler, for a broadcast that other ranks may never join.

    Must be called before Lightning registers its handlers, which is when a strategy has been set up.
    """
    return replaced(trainer._signal_connector, "_sigterm_notifier_fn", lambda number, frame: handle(number))


def mark_sigterm(trainer: Trainer) -> None:
    """Make Lightning's loops raise ``SIGTERMException`` at the end of the batch."""
    trainer._signal_connector.received_sigterm = True


def save_on_exception_if(trainer: Trainer, allowed: Callable[[BaseException], bool]) -> Undo:
    """Let callbacks save on an exception only where the other stages are in reach."""
    undo = ExitStack()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False):
            undo.callback(replaced(callback, "on_exception", _if_allowed(callback.on_exception, allowed)))
    return undo.close


def _if_allowed(hook: Callable[..., None], allowed: Callable[[BaseException], bool]) -> Callable[..., None]:
    @functools.wraps(hook)
    def save_or_warn(trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if allowed(exception):
            hook(trainer, module, exception)
        else:
            warn_on_rank_zero(
                f"No checkpoint is saved on {type(exception).__name__}: the weights of the other stages are out of"
                " reach. For such cases save regularly: ModelCheckpoint(every_n_train_steps=..., save_last=True)."
            )

    return save_or_warn


def mute_logging(module: LightningModule) -> Undo:
    """Let the training step log nothing, while the layers are measured."""
    return replaced(module, "log", lambda *args, **kwargs: None)


def mute_training_logs(trainer: Trainer, module: LightningModule) -> Undo:
    """On a rank without the loss, what is logged while training is a placeholder; rank 0's values are relayed."""
    log = module.log

    def log_unless_training(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if not trainer.training:
            log(name, value, *args, **kwargs)
        elif isinstance(value, Metric):
            # Lightning resets a metric that it logs; this one has seen placeholders only, and would keep them all.
            value.reset()

    return replaced(module, "log", log_unless_training)


def hold_metrics(trainer: Trainer, kind: type[dict[str, Any]]) -> None:
    """Hold ``callback_metrics`` in a dictionary of another kind: Lightning puts what this rank has logged there.

    Until the next run, which begins with a new one.
    """
    connector = trainer._logger_connector
    connector._callback_metrics = kind(connector._callback_metrics)


def forget_in_metrics(module: LightningModule, unknown: Callable[[Any], bool]) -> None:
    """Reset the metrics that have kept values of which a process does not know what they are."""
    for metric in module.modules():
        if isinstance(metric, Metric):
            states = [getattr(metric, name) for name in metric._defaults]
            if any(unknown(item) for state in states for item in (state if isinstance(state, list) else [state])):
                metric.reset()


def loss_and_extra(output: Any, normalize: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the loss in what a training step has returned, divided by a number, and what else is there.

    Raises:
        MisconfigurationException: If there is no loss, as Lightning says it.
    """
    result = ClosureResult.from_training_step_output(output, normalize)
    return result.closure_loss, result.extra


def last_value(metric: Metric) -> Any:
    """Return the value of a metric for the last batch that it has seen, which is logged for the step."""
    return metric._forward_cache


def set_last_value(metric: Metric, value: torch.Tensor) -> None:
    """Set it."""
    metric.__dict__["_forward_cache"] = value


def uses_step_outputs(module: LightningModule) -> bool:
    """Return whether hooks may use what a training step has returned or collected, so that every rank must have it.

    Lightning's own callbacks use no more than the loss.
    """
    return (
        is_overridden("on_train_batch_end", module)
        or is_overridden("on_train_epoch_end", module)
        or (module._trainer is not None and _of_users(module.trainer, "on_train_batch_end"))
    )


def looks_before_zeroing(module: LightningModule) -> bool:
    """Return whether code of the user's may look at the gradients of a step that has been made, or keep them."""
    hooks = ("optimizer_zero_grad", "on_before_zero_grad")
    return any(is_overridden(name, module) for name in hooks) or _of_users(module.trainer, "on_before_zero_grad")


def _of_users(trainer: Trainer, *names: str) -> bool:
    """Return whether any callback has one of these hooks that is neither Lightning's nor ours."""
    hooks = [getattr(callback, name) for callback in trainer.callbacks for name in names]  # type: ignore[attr-defined]
    return bool({hook.__module__.partition(".")[0] for hook in hooks} - {host.HOST, "lightning_ddg"})


def looks_after_epoch(trainer: Trainer, module: LightningModule) -> bool:
    """Return whether code of the user's may look at weights between the end of an epoch and the next step."""
    names = ("on_train_epoch_end", "on_train_epoch_start")
    return any(is_overridden(name, module) for name in names) or _of_users(trainer, *names)


def looks_when_saving(trainer: Trainer, module: LightningModule) -> bool:
    """Return whether code of the user's may look at weights when a checkpoint is put together."""
    return is_overridden("on_save_checkpoint", module) or _of_users(trainer, "on_save_checkpoint", "state_dict")


def current_hook(module: LightningModule) -> str:
    """Return the name of the hook that is running, of the module or of a callback; empty if none is."""
    return module._current_fx_name or ""


def after_averages(trainer: Trainer, name: str, function: Callable[[], object]) -> Undo:
    """Call a function after a hook in which Lightning's callbacks exchange the weights for their average."""
    undo = ExitStack()
    kinds = tuple(kind for kind in (StochasticWeightAveraging, WeightAveraging) if kind is not None)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, kinds):
            undo.callback(after_hook(callback, name, function))
    return undo.close


def after_hook(module: LightningModule | Callback, name: str, function: Callable[[], object]) -> Undo:
    """Call a function after a hook of the module, which comes after the callbacks'; a strategy's hook is missing."""
    hook = getattr(module, name)

    @functools.wraps(hook)
    def hook_and_function(*args: Any, **kwargs: Any) -> Any:
        result = hook(*args, **kwargs)
        function()
        return result

    return replaced(module, name, hook_and_function)


def hide_example_input(module: LightningModule) -> Undo:
    """Keep Lightning from calling a network with it that is spread over several devices.

    The summary of a model and the graph that a logger draws are made by such a call, on each process.
    """
    if module.example_input_array is None:
        return lambda: None
    warn_on_rank_zero(
        "`example_input_array` is not used in this fit, as each process has one stage only on its device: a summary"
        " shows no sizes, and loggers draw no graph. Leave the attribute out to be rid of this warning."
    )
    return replaced(module, "_example_input_array", None)


def before_others_set_up(kind: type[Strategy], function: Callable[[], object]) -> Undo:
    """Call a function before a strategy that is none of this kind sets several processes up, in a later run."""
    setup = Strategy.setup_environment

    def setup_environment(self: Strategy) -> None:
        if isinstance(self, ParallelStrategy) and not isinstance(self, kind):
            function()
        setup(self)

    setattr(Strategy, "setup_environment", setup_environment)  # noqa: B010
    return lambda: setattr(Strategy, "setup_environment", setup)


def silence_sync_dist_advice() -> Undo:
    """Lightning advises `sync_dist=True` for every epoch metric; with one replica of the data it changes nothing."""
    before = list(warnings.filters)
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*when logging on epoch level.*")
    added = [entry for entry in warnings.filters if entry not in before]

    def undo() -> None:
        for entry in added:
            if entry in warnings.filters:
                warnings.filters.remove(entry)  # type: ignore[attr-defined]

    return undo


def insert_callback(trainer: Trainer, callback: Callback) -> Undo:
    """Put a callback before all others: strategies have no hook at the end of a batch or an epoch."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.insert(0, callback)
    return lambda: callbacks.remove(callback)


def keep_callback(trainer: Trainer, callback: Callback) -> None:
    """Put a callback among those of a learning rate finder, which has taken all others away until it is done."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if callback not in callbacks:
        # Not the first: there the finder looks for its own.
        callbacks.append(callback)


def on_exception_in_fit(trainer: Trainer, tell: Callable[[BaseException], object]) -> Undo:
    """Tell of an exception where it happens: a learning rate finder waits for all ranks before it lets it go on."""
    run = trainer.fit_loop.run

    def run_and_tell() -> None:
        try:
            run()
        except BaseException as error:
            tell(error)
            raise

    return replaced(trainer.fit_loop, "run", run_and_tell)


def set_rank_zero_only(rank: int) -> None:
    """Tell both of Lightning's rank-zero decorators which rank this is, as its own strategies do."""
    rank_zero_only.rank = host.part("fabric.utilities.rank_zero").rank_zero_only.rank = rank  # type: ignore[attr-defined]


def keep_in_place(module: nn.Module) -> Undo:
    """Make ``.to(device)`` of a parent leave a module where it is."""
    return replaced(module, "_apply", lambda fn, recurse=True: module)


def transfer_batch(module: LightningModule, batch: Any, device: torch.device) -> Any:
    """Run the user's three hooks of a batch's transfer, as the loop does, although no loop has fetched it."""
    batch = LightningModule._on_before_batch_transfer(module, batch, dataloader_idx=0)
    return module._apply_batch_transfer_handler(batch, device=device, dataloader_idx=0)


def step_arguments(step: Callable[..., Any], batch: Any) -> list[Any]:
    """Return the arguments of a training step: the batch, and its index where the step asks for one."""
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    return [batch, 0] if takes_index else [batch]


def is_last_batch(trainer: Trainer) -> bool:
    """Return whether the batch just trained ends the epoch or the fit."""
    ends_epoch = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
    return ends_epoch or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps)


def batch_index(trainer: Trainer) -> int:
    """Return the index of the training batch in its epoch, also where the step fetches it."""
    return trainer.fit_loop.epoch_loop.batch_idx


def batch_number(trainer: Trainer) -> int:
    """Return the number of the training batch, counted through the whole fit; a resumed fit goes on counting."""
    return trainer.fit_loop.epoch_loop.total_batch_idx


def logger_step(trainer: Trainer) -> int:
    """Return the step with which Lightning logs the current training batch."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def warn_of_no_loss() -> None:
    """Say once that a training step has returned ``None``, as Lightning does where it sees that."""
    message = "`training_step` returned `None`. If this was on purpose, ignore this warning..."
    if message not in Closure.warning_cache:
        Closure.warning_cache.add(message)
        warn_on_rank_zero(message)


def without_outputs(trainer: Trainer, skipped: Callable[[], bool]) -> Undo:
    """Let hooks find no outputs of a skipped batch, as Lightning has it: the loss of 0 that stands there is ours.

    A step that returns ``None`` is refused by Lightning in several processes, and has no backward, in which the
    gradients of earlier batches would be applied.
    """
    optimization = trainer.fit_loop.epoch_loop.automatic_optimization
    run = optimization.run

    def run_and_forget(*args: Any, **kwargs: Any) -> Any:
        outputs = run(*args, **kwargs)
        return {} if skipped() else outputs

    return replaced(optimization, "run", run_and_forget)


def accumulates(trainer: Trainer) -> bool:
    """Return whether no step of the optimizer follows the batch that is trained, in automatic optimization."""
    return bool(trainer.fit_loop._should_accumulate())


def skips_backward(trainer: Trainer) -> bool:
    """Return whether this batch has no backward: stochastic weight averaging ends with an epoch of forwards."""
    return trainer.fit_loop._skip_backward


def on_timer_check(timer: Timer, check: Callable[[], None]) -> Undo:
    """Call this after every batch, where a Timer would ask rank 0 whether its time is up."""
    return replaced(timer, "_check_time_remaining", lambda _: check())


def saves_by_time(callback: ModelCheckpoint) -> bool:
    """Return whether a checkpoint has a ``train_time_interval``."""
    return callback._train_time_interval is not None


def is_save_due(callback: ModelCheckpoint) -> bool:
    """Return whether the ``train_time_interval`` of a checkpoint has passed by its own clock, which training starts."""
    last, interval = callback._last_time_checked, callback._train_time_interval
    return last is not None and interval is not None and time.monotonic() - last >= interval.total_seconds()


def make_save_due(callback: ModelCheckpoint) -> None:
    """Let a checkpoint with a ``train_time_interval`` find that it has passed."""
    callback._last_time_checked = float("-inf")


def monitors_after_batch(trainer: Trainer) -> bool:
    """Return whether a checkpoint that monitors a metric may be saved after this batch."""
    return any(
        isinstance(callback, ModelCheckpoint)
        and callback.monitor is not None
        and callback._every_n_train_steps > 0
        and trainer.global_step % callback._every_n_train_steps == 0
        for callback in trainer.checkpoint_callbacks
    )


def plateaus_after_batch(trainer: Trainer) -> bool:
    """Return whether a ReduceLROnPlateau looks at its metric after this batch."""
    return any(
        config.reduce_on_plateau
        and config.interval == "step"
        and (trainer.fit_loop.batch_idx + 1) % config.frequency == 0
        for config in trainer.lr_scheduler_configs
    )


def filter_on_optimizer_by_identity() -> Undo:
    """Let BaseFinetuning recognise a parameter that an optimizer has by what it is, not by its values.

    Lightning compares values, which are stale for the parameters of other ranks, and may be on another device.
    """
    original = BaseFinetuning.__dict__["filter_on_optimizer"]

    def filter_on_optimizer(optimizer: torch.optim.Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        params = list(params)
        new = [parameter for parameter in params if id(parameter) not in known]
        if len(new) < len(params):
            warn_on_rank_zero(f"{len(params) - len(new)} parameters to unfreeze are in the optimizer already.")
        return new

    setattr(BaseFinetuning, "filter_on_optimizer", staticmethod(filter_on_optimizer))  # noqa: B010
    return lambda: setattr(BaseFinetuning, "filter_on_optimizer", original)


def validation_interval(trainer: Trainer) -> float | None:
    """Return the seconds between validations, where ``val_check_interval`` is a time (since Lightning 2.6)."""
    return getattr(trainer, "_val_check_time_interval", None)


def lightning_optimizers(trainer: Trainer) -> list[Any]:
    """Return the optimizers as a module's ``optimizers()`` gives them to the user."""
    return list(trainer.strategy._lightning_optimizers)


def reset_optimizers(strategy: Strategy) -> None:
    """Forget the optimizers of an earlier fit, as Lightning's own strategies do before they make new ones."""
    strategy._reset_optimizers_and_schedulers()


def trainer_of(module: object) -> Trainer | None:
    """Return the Trainer of a module, if it has one: its property raises where there is none."""
    return getattr(module, "_trainer", None)
