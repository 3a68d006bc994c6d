"""What ``python -m lightning_ddg`` runs lives here; only the call of the command line belongs here.

The guard matters: a process started by ``multiprocessing`` (``strategy: ddg_spawn``) imports this file again.
"""

from lightning_ddg.cli import main

if __name__ == "__main__":
    main()
