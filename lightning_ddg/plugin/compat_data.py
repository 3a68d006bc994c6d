"""Lightning's private parts between loaders and loops, each touch with its reason; see ``compat.py`` for all others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

from lightning_ddg.plugin import host
from lightning_ddg.plugin.compat import Undo, replaced
from lightning_ddg.plugin.host import CombinedLoader, LightningModule, Trainer, is_overridden

_DataFetcher = host.part("pytorch.loops.fetchers")._DataFetcher
_Stateful = host.part("fabric.utilities.types")._Stateful
_MODES = host.part("pytorch.utilities.combined_loader")._SUPPORTED_MODES
set_sampler_epoch = host.part("fabric.utilities.data")._set_sampler_epoch
sized_len = host.part("fabric.utilities.data").sized_len


def seed_workers(loader: Any, replica: int) -> None:
    """Seed the loader's worker processes as those of a device's, one for each replica, would be."""
    host.part("fabric.utilities.data")._auto_add_worker_init_fn(loader, replica)


def keeps_position(loader: Any) -> bool:
    """Return whether Lightning saves and restores the loader's state."""
    return isinstance(loader, _Stateful)


def loops_with_data(trainer: Trainer) -> list[Any]:
    """Return the loops that set loaders up and fetch batches."""
    fit = trainer.fit_loop
    return [fit, fit.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop]


def prediction_loader(trainer: Trainer, index: int) -> Any:
    """Return the loader of a batch to predict."""
    return cast(CombinedLoader, trainer.predict_loop._combined_loader).flattened[index]


Exchanged = Callable[[Iterator[Any] | None, Sequence[Any]], tuple[Sequence[Any], Iterator[Any]]]


def exchange_fetched(trainer: Trainer, reads: bool, exchange: Exchanged) -> Undo:
    """Stand between the fetchers of a Trainer's loops and their loaders, where no other user of these is touched.

    Nothing public lies between them: a strategy may only replace a loader, which its user would then find replaced.

    Args:
        trainer: The Trainer.
        reads: Whether this process iterates over the loaders.
        exchange: Called for each epoch, with what iterates over the combined loaders, if anything does, and with the
            loaders; returns the loaders that tell the number of batches, and what is fetched from.
    """
    original = _DataFetcher.__iter__

    def iterate(fetcher: Any) -> Any:
        combined = fetcher._combined_loader
        if combined is None or not any(loop._combined_loader is combined for loop in loops_with_data(trainer)):
            return original(fetcher)
        if reads:
            original(fetcher)
            _, fetcher.iterator = exchange(fetcher.iterator, combined.flattened)
            return fetcher
        counted, fetcher.iterator = exchange(None, combined.flattened)
        # It knows the mode's number of batches, and is never iterated.
        combined._iterator = _MODES[combined._mode]["iterator"](list(counted), combined._limits)
        fetcher.reset()
        return fetcher

    setattr(_DataFetcher, "__iter__", iterate)  # noqa: B010
    return lambda: setattr(_DataFetcher, "__iter__", original)


def after_data_set_up(trainer: Trainer, function: Callable[[Any], Any]) -> Undo:
    """Replace each loader by what a function makes of it, once a loop has taken its length."""
    undo = ExitStack()

    def patch(loop: Any) -> None:
        set_up = loop.setup_data

        def set_up_and_replace() -> None:
            set_up()
            if (combined := loop._combined_loader) is not None:
                combined.flattened = [function(loader) for loader in combined.flattened]

        undo.callback(replaced(loop, "setup_data", set_up_and_replace))

    for loop in loops_with_data(trainer):
        patch(loop)
    return undo.close


def before_transfer(module: LightningModule, function: Callable[[], None]) -> Undo:
    """Call a function when a loop has fetched a batch and is about to move it to the device."""
    transfer = module._on_before_batch_transfer

    def call_and_transfer(batch: Any, dataloader_idx: int = 0) -> Any:
        function()
        return transfer(batch, dataloader_idx)

    return replaced(module, "_on_before_batch_transfer", call_and_transfer)


def bypass_before_batch_transfer(module: LightningModule) -> Undo:
    """Hide from the user's hooks the stand-ins that the loader yields on a rank that does not read."""
    return replaced(module, "_on_before_batch_transfer", lambda batch, dataloader_idx=0: batch)


def leave_out_loader_states(trainer: Trainer) -> Undo:
    """Save empty states of the training loaders, where they are not iterated and so are not asked."""

    def empty_states() -> dict[str, Any]:
        combined = trainer.fit_loop._combined_loader
        states: list[Any] = [] if combined is None else [{} for one in combined.flattened if isinstance(one, _Stateful)]
        return {"combined_loader": states} if states else {}

    return replaced(trainer.fit_loop, "on_save_checkpoint", empty_states)


def loader_states(checkpoint: dict[str, Any]) -> list[Any]:
    """Return the states of the training loaders in a checkpoint."""
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    return cast(list[Any], loop.get("state_dict", {}).get("combined_loader", []))


def restore_loops(trainer: Trainer) -> None:
    """Restore the loops of a checkpoint before their time, which changes nothing when Lightning does so again.

    Data that is set up early is then what it would be later: at the checkpoint's epoch, loaders in its states.
    """
    trainer._checkpoint_connector.restore_loops()


def acts_at_fit_start(trainer: Trainer) -> bool:
    """Return whether user code runs between the strategy's set-up and the loop's, and might make the data."""
    hooks = [callback.on_fit_start for callback in trainer.callbacks]  # type: ignore[attr-defined]
    packages = {(getattr(hook, "__module__", None) or "").partition(".")[0] for hook in hooks}
    return is_overridden("on_fit_start", trainer.lightning_module) or bool(
        packages - {"lightning", "pytorch_lightning", "lightning_ddg"}
    )


def request_training_data(trainer: Trainer) -> Any:
    """Return what the user gives as training loaders."""
    return host.part("pytorch.trainer.connectors.data_connector")._request_dataloader(trainer.fit_loop._data_source)


def flat(loaders: Any) -> list[Any]:
    """Return the loaders in what a user gives, in the loops' order."""
    return (loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)).flattened


def set_up_training_data(trainer: Trainer, loaders: Any = None) -> None:
    """Set the fit loop's data up, as it would itself; from loaders that have been requested already, if given."""
    loop = trainer.fit_loop
    with ExitStack() as undo:
        if loaders is not None:
            undo.callback(replaced(loop._data_source, "dataloader", lambda: loaders))
        loop.setup_data()
    # The loop says it too, but only when the first batch has been read: in a resumed fit of another epoch's order.
    epoch: Any = loop.epoch_progress.current
    for loader in () if loop._combined_loader is None else loop._combined_loader.flattened:
        set_sampler_epoch(loader, epoch.processed)


def first_fetched(trainer: Trainer) -> list[Any]:
    """Return the first batch that will be trained, in a list, without taking it away; an empty list if there is none.

    What is given to the loop again is given by the same iterator: a stream may not begin twice.
    """
    fetcher: Any = trainer.fit_loop._data_fetcher
    if fetcher is None:
        return []
    if getattr(fetcher, "batches", None):
        return [fetcher.batches[0][0]]
    owner, name = (fetcher.iterator, "source") if hasattr(fetcher.iterator, "source") else (fetcher, "iterator")
    # A combined loader is its own iterator, but begins again where one asks it for that.
    rest = iter(partial(next, getattr(owner, name), None), None)
    first = list(itertools.islice(rest, 1))
    setattr(owner, name, itertools.chain(first, rest))
    return [batch for batch, _, _ in first]


def forget_training_data(trainer: Trainer) -> None:
    """Let the fit loop set its data up anew, as if it had not yet."""
    loop = trainer.fit_loop
    if loop._data_fetcher is not None:
        loop._data_fetcher.teardown()
    loop._data_fetcher = loop._combined_loader = None
    loop.max_batches = float("inf")
    loop._last_train_dl_reload_epoch = float("-inf")
