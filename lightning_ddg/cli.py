"""The command line lives here: LightningCLI with this package's strategies; change here what the commands accept.

``lightning-ddg`` and ``python -m lightning_ddg`` are the same program: ``fit``, ``validate``, ``test`` and ``predict``
as :class:`~lightning.pytorch.cli.LightningCLI` has them, with two differences.

* Importing this package registered its strategies, so a YAML file may say ``strategy: ddg``.
* A module that lies next to the user's YAML file can be named as a ``class_path``, however the program was started.

Lightning's launcher starts the other stages by running the same command line again in the same directory. Both forms
can be repeated: neither reads its standard input, and neither depends on anything but ``sys.argv`` and the directory.
"""

from __future__ import annotations

import os
import sys

from lightning.pytorch.cli import ArgsType, LightningCLI

__all__ = ["main"]


def main(args: ArgsType = None) -> None:
    """Parse a command line and run it.

    The current directory is put first on ``sys.path`` if it is not there: ``python -m`` does so by itself, a console
    script does not, and both must find the same modules.

    Args:
        args: What to parse, as :class:`~lightning.pytorch.cli.LightningCLI` takes it: a list of words, or a nested
            dictionary; ``None`` means ``sys.argv``. Child processes started by Lightning see only ``sys.argv``, so
            explicit arguments suit a run in one process (or ``strategy: ddg_spawn``).

    Raises:
        SystemExit: The arguments cannot be parsed, with status 2 and a message on standard error; or they ask for
            help, with status 0.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    LightningCLI(args=args, save_config_kwargs={"overwrite": True})
