"""Every way to start the processes: scripts, spawning, forking, torchrun, the command line, notebooks, SLURM.

Started scripts cost seconds each, so a test does several things in one. How failures end started processes is in
``test_failures.py``; that an installed package's commands start, in ``test_package.py``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_ddg import DDGStrategy
from lightning_ddg.cli import main
from recipes.ports import held_port
from tests.harness import environment, run_ranks
from tests.networks import SAFELY, Classifier, largest_difference, loader, quiet_trainer, state_of

ROOT = Path(__file__).parents[2]
POINTS = {2: ["net.3"], 3: ["net.2", "net.5"], 4: ["net.1", "net.3", "net.5"]}
LIMIT = 240.0

# A user's file. It knows nothing of the package, and each process says at the end of each run what it has.
PROJECT = """
import lightning.pytorch as pl
import torch
from tests.networks import Classifier, loader


class Module(Classifier):
    def on_predict_start(self):
        self.predicted = []

    def on_predict_batch_end(self, outputs, batch, batch_idx):
        self.predicted.append(outputs)

    def teardown(self, stage):
        trainer = self.trainer
        torch.save(
            {
                "stage": getattr(trainer.strategy, "stage", None),
                "node": trainer.node_rank,
                "world": trainer.world_size,
                "split": getattr(trainer.strategy, "_recorded_cut", None),
                "state": self.state_dict(),
                "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
                "predicted": getattr(self, "predicted", []),
            },
            f"{trainer.state.fn.value}-{trainer.global_rank}.pt",
        )


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader("mlp")

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a user's project in it."""
    (tmp_path / "project.py").write_text(PROJECT)
    return tmp_path


@pytest.fixture
def port() -> Iterator[int]:
    with held_port() as number:
        yield number


def project_environment(**variables: Any) -> dict[str, str]:
    """What scripts need to find the package and the project."""
    return environment(".", PYTHONWARNINGS="ignore", **variables)


def run_together(commands: Sequence[Sequence[str]], folder: Path, environments: Sequence[dict[str, str]]) -> list[str]:
    """Runs commands at the same time, and returns what each has printed; all must end well."""
    processes = [
        subprocess.Popen([sys.executable, *words], cwd=folder, env=env, stdout=-1, stderr=-1, text=True)
        for words, env in zip(commands, environments, strict=True)
    ]
    try:
        ended = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (printed, errors) in zip(processes, ended, strict=True):
        assert process.returncode == 0, printed + errors
    return [printed for printed, _ in ended]


def reports(folder: Path, what: str, processes: int) -> list[dict[str, Any]]:
    """What each rank's process has said at the end of a run."""
    return [torch.load(folder / f"{what}-{rank}.pt") for rank in range(processes)]


def trained_alone(stages: int, epochs: int = 3) -> dict[str, Tensor]:
    """The weights that all stages get in one process."""
    module = Classifier("mlp")
    strategy = DDGStrategy(num_stages=stages, split_points=POINTS[stages])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(devices=1, strategy=strategy, max_epochs=epochs).fit(module, loader("mlp"))
    return state_of(module)


# ---- scripts, started again by Lightning

SCRIPT = f"""
from lightning_ddg import DDGStrategy
from project import Module, loader
from tests.networks import quiet_trainer

POINTS = {POINTS}
module = Module("mlp")
quiet_trainer(devices=2, strategy=DDGStrategy(split_points=POINTS[2]), max_epochs=2).fit(module, loader("mlp"))
trainer = quiet_trainer(devices=2, strategy=DDGStrategy(split_points=POINTS[2]), max_epochs=1)
trainer.fit(module, loader("mlp"))
rank = trainer.global_rank

alone = quiet_trainer(devices=1, strategy="ddg").validate(module, loader("mlp"), verbose=False)
print(f"rank {{rank}}: {{alone[0]['val_loss']:.12f}}", flush=True)
try:
    quiet_trainer(devices=3, strategy="ddg")
except ValueError as error:
    print(f"rank {{rank}} refuses: {{error}}", flush=True)
"""


def test_a_script_trains_twice_and_then_validates_in_each_process(project: Path) -> None:
    (project / "script.py").write_text(SCRIPT)
    (printed,) = run_together([["script.py"]], project, [project_environment()])
    module = Classifier("mlp")
    for epochs in (2, 1):
        strategy = DDGStrategy(num_stages=2, split_points=POINTS[2])
        quiet_trainer(devices=1, strategy=strategy, max_epochs=epochs).fit(module, loader("mlp"))
    (expected,) = quiet_trainer(devices=1).validate(module, loader("mlp"), verbose=False)
    for rank, report in enumerate(reports(project, "fit", 2)):
        assert report["stage"] == 2 - rank
        assert largest_difference(report["state"], state_of(module)) <= 1e-12
        assert f"rank {rank}: {expected['val_loss']:.12f}" in printed
        assert f"rank {rank} refuses: devices=3 and num_nodes=1 ask for 3 processes, but 2 have been started" in printed


# ---- processes started from the main one: spawned, forked

FIRST_EPOCHS, ALL_EPOCHS = 2, 3


def trainer_of(start_method: str, stages: int, **flags: Any) -> Any:
    strategy = DDGStrategy(split_points=POINTS[stages], start_method=start_method)  # type: ignore[arg-type]
    return quiet_trainer(devices=stages, strategy=strategy, **flags)


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_the_main_process_gets_the_weights_and_trains_on(
    start_method: str, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_PORT", str(port))
    warnings.simplefilter("ignore")
    saves = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    module = Classifier("mlp")
    trainer = trainer_of(start_method, 2, callbacks=[saves], enable_checkpointing=True, max_epochs=FIRST_EPOCHS)
    trainer.fit(module, loader("mlp"), loader("mlp"))
    assert largest_difference(state_of(module), trained_alone(2, FIRST_EPOCHS)) <= 1e-12
    assert Path(saves.best_model_path).exists()
    (validated,) = quiet_trainer(devices=1).validate(module, loader("mlp"), verbose=False)
    assert validated["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]), abs=1e-12)
    last = str(tmp_path / "last.ckpt")
    trainer_of(start_method, 2, max_epochs=ALL_EPOCHS).fit(module, loader("mlp"), ckpt_path=last, **SAFELY)
    assert largest_difference(state_of(module), trained_alone(2, ALL_EPOCHS)) <= 1e-12


class CountsThreads(Classifier):
    """Looks how many threads the process of its stage uses."""

    def on_fit_start(self) -> None:
        assert torch.get_num_threads() == 1


def fork_after_threads(folder: str) -> dict[str, Any]:
    """In a main process that has used several threads, as a notebook has: their pool does not survive a fork."""
    warnings.simplefilter("ignore")
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        del os.environ[name]
    torch.set_num_threads(4)
    module, data = CountsThreads("mlp"), loader("mlp")
    torch.randn(1 << 20).sin().sum()
    module(data.dataset[:][0]).sum().backward()
    module.zero_grad()

    first = trainer_of("fork", 2, default_root_dir=folder, max_epochs=FIRST_EPOCHS)
    first.fit(module, data, data)
    trained = state_of(module)
    results = {name: getattr(first, name)(module, data, verbose=False)[0] for name in ("validate", "test")}
    first.predict(module, data, return_predictions=False)
    torch.randn(1 << 20).sin().sum()
    module = CountsThreads("mlp")
    trainer_of("fork", 3, max_epochs=FIRST_EPOCHS).fit(module, data)
    return {"trained": trained, "again": state_of(module), "threads": torch.get_num_threads(), **results}


def test_forked_processes_survive_the_threads_of_the_main_one(tmp_path: Path) -> None:
    (result,) = run_ranks(fork_after_threads, 1, str(tmp_path))
    module = Classifier("mlp")
    module.load_state_dict(trained_alone(2, FIRST_EPOCHS))
    assert largest_difference(result["trained"], state_of(module)) <= 1e-12
    (expected,) = quiet_trainer(devices=1).test(module, loader("mlp"), verbose=False)
    assert result["test"]["test_loss"] == pytest.approx(expected["test_loss"], abs=1e-12)
    assert result["validate"]["val_loss"] == pytest.approx(expected["test_loss"], abs=1e-12)
    assert largest_difference(result["again"], trained_alone(3, FIRST_EPOCHS)) <= 1e-12
    assert result["threads"] == 4, "the main process keeps its own"


# ---- torchrun, and nodes

TORCHRUN = ["-m", "torch.distributed.run"]

NODES = """
import json, sys
from lightning_ddg import DDGStrategy
from project import Module, loader
from tests.networks import quiet_trainer

points, flags = json.loads(sys.argv[1])
quiet_trainer(strategy=DDGStrategy(split_points=points), **flags).fit(Module("mlp"), loader("mlp"))
"""


def check_nodes(project: Path, num_nodes: int, devices: int) -> None:
    """The last node in rank order has the first stages, and every process has all weights."""
    stages = num_nodes * devices
    expected = trained_alone(stages)
    for rank, report in enumerate(reports(project, "fit", stages)):
        assert (report["stage"], report["world"]) == (stages - rank, stages)
        assert report["node"] == rank // devices
        assert largest_difference(report["state"], expected) <= 1e-12


@pytest.mark.parametrize(
    ("num_nodes", "devices"),
    [pytest.param(1, 3, marks=pytest.mark.slow), (2, 1), pytest.param(2, 2, marks=pytest.mark.slow)],
    ids=str,
)
def test_torchrun(num_nodes: int, devices: int, project: Path, port: int) -> None:
    (project / "script.py").write_text(NODES)
    argument = json.dumps([POINTS[num_nodes * devices], {"devices": devices, "num_nodes": num_nodes}])
    address = [f"--nnodes={num_nodes}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    agent = [*TORCHRUN, f"--nproc-per-node={devices}", *address]
    commands = [[*agent, f"--node-rank={node}", "script.py", argument] for node in range(num_nodes)]
    run_together(commands, project, [project_environment()] * num_nodes)
    check_nodes(project, num_nodes, devices)


@pytest.mark.slow
def test_a_script_started_once_on_each_node(project: Path, port: int) -> None:
    (project / "script.py").write_text(NODES)
    argument = json.dumps([POINTS[4], {"devices": 2, "num_nodes": 2}])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    nodes = [project_environment(NODE_RANK=node, **address) for node in range(2)]
    run_together([["script.py", argument]] * 2, project, nodes)
    check_nodes(project, 2, 2)


# ---- the command line

PLAIN = """
import sys
from lightning.pytorch.cli import LightningCLI
from project import Data, Module

if __name__ == "__main__":
    assert not any(name.startswith("lightning_ddg") for name in sys.modules)
    LightningCLI(Module, Data)
"""

CONFIG = """
trainer:
  accelerator: cpu
  devices: 2
  strategy: {strategy}
  max_epochs: 2
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: run
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: run, filename: last, enable_version_counter: false}}
"""
BY_CLASS_PATH = json.dumps({"class_path": "lightning_ddg.DDGStrategy", "init_args": {"split_points": POINTS[2]}})
MODEL = """
model:
  class_path: project.Module
data:
  class_path: project.Data
"""


@pytest.mark.parametrize("launcher", [pytest.param("script", marks=pytest.mark.slow), "torchrun"])
def test_a_plain_lightning_cli_needs_no_import_for_a_class_path(launcher: str, project: Path, port: int) -> None:
    (project / "train.py").write_text(PLAIN)
    (project / "config.yaml").write_text(CONFIG.format(strategy=BY_CLASS_PATH))
    program = [] if launcher == "script" else [*TORCHRUN, "--nproc-per-node=2", f"--master-port={port}"]
    run_together([[*program, "train.py", "fit", "--config", "config.yaml"]], project, [project_environment()])
    expected = trained_alone(2, 2)
    for rank, report in enumerate(reports(project, "fit", 2)):
        assert report["stage"] == 2 - rank
        assert largest_difference(report["state"], expected) <= 1e-12


def command(folder: str, words: list[str]) -> str:
    """Runs one command of the package's command line as one of its processes; returns what it prints."""
    warnings.simplefilter("ignore")
    os.chdir(folder)
    sys.argv = ["lightning-ddg", *words]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main()
    return printed.getvalue()


def test_the_commands_that_follow_a_fit_and_a_printed_config(project: Path) -> None:
    (project / "config.yaml").write_text(CONFIG.format(strategy="ddg") + MODEL)
    asked = ["--config", "config.yaml", f"--trainer.strategy={BY_CLASS_PATH}"]
    (printed,) = run_ranks(command, 1, str(project), ["fit", *asked, "--print_config"])
    (project / "printed.yaml").write_text(printed)
    assert not list(project.glob("fit-*"))

    run_ranks(command, 2, str(project), ["fit", "--config", "printed.yaml"])
    fits = reports(project, "fit", 2)
    assert [report["stage"] for report in fits] == [2, 1]
    assert largest_difference(fits[1]["state"], trained_alone(2, 2)) <= 1e-12
    assert "split_points" in (project / "run" / "config.yaml").read_text()

    by_name = ["--config", "config.yaml", "--ckpt_path", "run/last.ckpt"]
    module = Classifier("mlp")
    module.load_state_dict(fits[0]["state"])
    (expected,) = quiet_trainer(devices=1).test(module, loader("mlp"), verbose=False)
    for name, metric in (("validate", "val_loss"), ("test", "test_loss")):
        run_ranks(command, 2, str(project), [name, *by_name])
        for rank, report in enumerate(reports(project, name, 2)):
            assert report["stage"] == 2 - rank
            assert report["metrics"][metric] == pytest.approx(expected["test_loss"], abs=1e-12)

    run_ranks(command, 2, str(project), ["predict", *by_name])
    predictions = torch.cat([module.predict_step(batch, 0) for batch in loader("mlp")])
    for report in reports(project, "predict", 2):
        assert torch.equal(torch.cat(report["predicted"]), predictions)

    run_ranks(command, 2, str(project), ["fit", *by_name, "--trainer.max_epochs=3"])
    resumed = reports(project, "fit", 2)
    assert [report["split"] for report in resumed] == [POINTS[2]] * 2, "the checkpoint's cut"
    assert largest_difference(resumed[0]["state"], trained_alone(2, 3)) <= 1e-12


# ---- notebooks and interactive sessions

CELLS = (
    """
import warnings
warnings.simplefilter("ignore")
import torch
from lightning_ddg import DDGStrategy
from project import Module, loader
from tests.networks import quiet_trainer

torch.set_num_threads(4)
torch.randn(1 << 20).sin().sum()
try:
    quiet_trainer(devices=2, strategy="ddg")
except ValueError as error:
    print(error)
""",
    """
module = Module("mlp")
quiet_trainer(devices=2, strategy="ddg_notebook", max_epochs=1).fit(module, loader("mlp"))
""",
    f"""
module = Module("mlp")
strategy = DDGStrategy(split_points={POINTS[2]}, start_method="fork")
trainer = quiet_trainer(devices=2, strategy=strategy, max_epochs=2)
trainer.fit(module, loader("mlp"), loader("mlp"))
""",
    """
(alone,) = quiet_trainer(devices=1).validate(module, loader("mlp"), verbose=False)
(together,) = trainer.validate(module, loader("mlp"), verbose=False)
assert abs(alone["val_loss"] - together["val_loss"]) < 1e-12
torch.save(module.state_dict(), "notebook.pt")
""",
)


def test_a_notebook(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    folders = {"IPYTHONDIR": project / "ipython", "JUPYTER_RUNTIME_DIR": project / "runtime"}
    for name, value in project_environment(**folders).items():
        monkeypatch.setenv(name, value)
    # The kernel is this Python's, whatever the machine's list of kernels says.
    kernels = project / "kernels" / "kernels" / "this"
    kernels.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernels / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "this", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(project / "kernels"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="this", resources={"metadata": {"path": str(project)}}
    )
    client.execute()
    shown = [[output.get("text") or output["data"]["text/plain"] for output in cell.outputs] for cell in notebook.cells]
    assert "Use strategy='ddg_notebook' (start_method='fork'), or one process (devices=1)" in "".join(shown[0])
    assert 'split_points: ["net.3"]' in "".join(shown[2]), "what a forked process prints is seen"
    assert largest_difference(torch.load(project / "notebook.pt"), trained_alone(2, 2)) <= 1e-12
    assert [report["stage"] for report in reports(project, "fit", 2)] == [2, 1]


@pytest.mark.parametrize("name", ["ddg", "ddg_spawn"])
def test_an_interactive_session_is_told_what_works_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(ValueError, match="interactive session. Use strategy='ddg_notebook'.*or one process"):
        quiet_trainer(devices=2, strategy=name)
    assert quiet_trainer(devices=1, strategy=name).strategy.num_stages == 2
    quiet_trainer(devices=2, strategy="ddg_notebook")


# ---- processes that somebody else has started


@pytest.mark.parametrize("devices", ["auto", 1])
def test_one_process_trains_two_stages(devices: Any) -> None:
    strategy = quiet_trainer(devices=devices, strategy="ddg").strategy
    assert (strategy.world_size, strategy.num_stages, strategy.stage) == (1, 2, None)


def slurm(rank: int, per_node: int, nodes: int) -> dict[str, int]:
    """The variables that SLURM gives the process of a rank."""
    return {
        "SLURM_NTASKS": per_node * nodes,
        "SLURM_NTASKS_PER_NODE": per_node,
        "SLURM_NNODES": nodes,
        "SLURM_PROCID": rank,
        "SLURM_NODEID": rank // per_node,
        "SLURM_LOCALID": rank % per_node,
    }


def torchrun(rank: int, per_node: int, nodes: int) -> dict[str, Any]:
    """The variables that torchrun gives the process of a rank."""
    return {
        "TORCHELASTIC_RUN_ID": "some",
        "WORLD_SIZE": per_node * nodes,
        "RANK": rank,
        "GROUP_RANK": rank // per_node,
        "LOCAL_RANK": rank % per_node,
    }


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, Any]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("started", [slurm, torchrun])
@pytest.mark.parametrize(("per_node", "nodes"), [(2, 1), (2, 2), (1, 3)])
def test_stages_follow_the_ranks_of_who_starts_the_processes(
    started: Any, per_node: int, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = per_node * nodes
    for rank in range(world):
        set_all(monkeypatch, started(rank, per_node, nodes))
        strategy = quiet_trainer(devices=per_node, num_nodes=nodes, strategy="ddg").strategy
        assert strategy.launcher is None
        assert (strategy.world_size, strategy.num_stages, strategy.global_rank) == (world, world, rank)
        assert (strategy.stage, strategy.delay) == (world - rank, rank)
        assert (strategy.node_rank, strategy.local_rank) == (rank // per_node, rank % per_node)
        assert strategy.is_global_zero == (rank == 0)


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        torchrun(0, 3, 1),
        {"devices": 2},
        "devices=2 and num_nodes=1 ask for 2 processes, but 3 have been started .TorchElasticEnvironment.*be 3, or",
    ),
    (torchrun(0, 2, 1), {"devices": "auto"}, "devices=1 and num_nodes=1 ask for 1 processes, but 2 .*be 2, or start 1"),
    (torchrun(0, 1, 1), {"devices": 2}, "ask for 2 processes, but 1 have been started .*or start 2"),
    (
        torchrun(3, 4, 1),
        {"devices": 2, "num_nodes": 2},
        "4 processes, 2 on each node, but this is process 3 of its node.*Let `devices` be",
    ),
    (slurm(0, 2, 2), {"devices": 2}, "devices=2 and num_nodes=1 ask for 2 processes, but 4 .*SLURMEnvironment"),
    (slurm(0, 2, 2), {"devices": 4}, "devices=4.*ntasks-per-node=2.*Set `devices=2`"),
    (
        torchrun(0, 2, 1),
        {"devices": 2, "strategy": "ddg_spawn"},
        "start_method='spawn' would start processes.*TorchElasticEnvironment.*Use strategy='ddg'",
    ),
    (
        torchrun(0, 3, 1),
        {"devices": 3, "strategy": DDGStrategy(num_stages=2)},
        "num_stages=2 stages cannot be trained by 3 processes",
    ),
]


@pytest.mark.parametrize(("variables", "flags", "message"), WRONG, ids=[message[:30] for _, _, message in WRONG])
def test_a_trainer_that_counts_otherwise_is_refused(
    variables: dict[str, Any], flags: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, variables)
    with pytest.raises(ValueError, match=message):
        quiet_trainer(**{"strategy": "ddg", **flags})
