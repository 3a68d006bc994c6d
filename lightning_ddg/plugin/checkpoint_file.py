"""How a checkpoint is written: beside its file, and moved there when it is whole and on the disk.

Lightning writes to the folder for temporary files first. Where that is on another file system the move is a copy over
the old checkpoint, and whoever is killed meanwhile, or meets a full disk, has neither the old one nor the new one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from lightning_ddg.plugin import host


class WholeFileCheckpointIO(host.TorchCheckpointIO):
    """Lightning's way to write checkpoints, but that a file in a local folder is always a whole checkpoint.

    Whenever the process is killed, the file holds the old checkpoint or the new one. A killed process may leave a
    hidden file ``.NAME.PID.part`` beside it, which may be deleted. Tensors are written one by one, without a copy of
    the whole file in memory.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What to write.
            path: Where; what is no local path (``"s3://..."``) is Lightning's business.
            storage_options: As in Lightning's own: none may be given.

        Raises:
            OSError: The disk is full, or the folder cannot be written to; what was there before is unchanged.
        """
        if storage_options is not None or "://" in os.fspath(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except BaseException as error:
            part.unlink(missing_ok=True)
            reason = _os_error(error)
            if reason is not None:
                raise OSError(
                    reason.errno,
                    f"The checkpoint {str(target)!r} could not be written ({reason}); what was there before is"
                    " unchanged. Free space, or choose another folder, as with `dirpath` of ModelCheckpoint.",
                ) from None
            raise
        _sync_folder(target.parent)


def _os_error(error: BaseException | None) -> OSError | None:
    """Return what the system said, which torch's writer hides behind an error of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _sync_folder(folder: Path) -> None:
    """Wait until the disk knows the file under its name, where the system lets one wait for that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
