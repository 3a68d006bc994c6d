"""The proof before trust: faults of many kinds, planted in both executions, end the fit and are named."""

from __future__ import annotations

import contextlib
import io
import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_ddg import DDGMixin, DDGStrategy, Staleness
from lightning_ddg.comm.mailbox import GroupMailbox
from lightning_ddg.core.delay_line import DelayLine
from lightning_ddg.core.execution import ACTIVATION, GRADIENT
from lightning_ddg.core.gradient_queue import GradientQueue
from lightning_ddg.core.pipeline import Pipeline
from lightning_ddg.core.rng import Batch, seed_of, seeded
from lightning_ddg.network.layers import Segment
from lightning_ddg.plugin.data import BatchExchange
from lightning_ddg.plugin.step import StepRunner
from lightning_ddg.plugin.verify import Proof
from tests.harness import run_ranks, run_ranks_raw
from tests.networks import SAFELY, Classifier, ManualClassifier, dataset, loader, quiet_trainer, state_of


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class StraightThrough(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Sign.apply(x)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: Tensor, form: str = "scaled") -> Tensor:
        return x * self.scale if form == "scaled" else x


class Centred(nn.Module):
    """Keeps the mean from one call for the next, as reversible instance normalisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(1, dtype=torch.float64)
        self.waits = False

    def forward(self, x: Tensor) -> Tensor:
        self.waits = not self.waits
        if not self.waits:
            return x + self.mean
        self.mean = x.mean(1, keepdim=True).detach()
        return x - self.mean


class Layered(DDGMixin, Classifier):
    """Layers that are called in turn, cut in the middle."""

    def __init__(self, keeps: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            centred = [Centred()] if keeps else []
            self.net = nn.Sequential(
                nn.Linear(6, 8), nn.Tanh(), *centred, StraightThrough(), nn.Dropout(0.3), nn.Linear(8, 8), Scaled(),
                nn.Tanh(), *centred, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3),
            ).double()  # fmt: skip

    def configure_stages(self) -> Any:
        return list(self.net)

    @property
    def cut(self) -> str:
        return (
            f"net.{next(name for name, layer in list(self.net.named_children())[1:] if isinstance(layer, nn.Linear))}"
        )


Patch = contextlib.AbstractContextManager[object]


def layers_changed(change: Callable[[list[Any]], None], of: type[nn.Module]) -> Patch:
    """Change the layers, in the order of their call, of the stage that has a layer of a kind."""
    original = Segment.__init__

    def changed(self: Segment, layers: Any) -> None:
        original(self, layers)
        # A layer by itself is made into a segment too, for its costs.
        if len(layers) > 1 and any(isinstance(layer, of) for layer in self._in_order):
            change(self._in_order)

    return mock.patch.object(Segment, "__init__", changed)


def after(cls: type, name: str, change: Callable[..., Any]) -> Patch:
    """Change what a method returns: ``change(self, result, *args)``."""
    original = getattr(cls, name)

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(self, original(self, *args, **kwargs), *args)

    return mock.patch.object(cls, name, changed)


def replace_layer(kind: type[nn.Module], call: Callable[..., Any]) -> Patch:
    def change(layers: list[Any]) -> None:
        index = next(i for i, layer in enumerate(layers) if isinstance(layer, kind))
        layers[index] = lambda x, layer=layers[index]: call(layer, x)

    return layers_changed(change, kind)


def stale(layer: Scaled, x: Tensor) -> Tensor:
    return x * torch.ones_like(layer.scale)


@contextlib.contextmanager
def forgetful() -> Iterator[None]:
    """As in another process: the second stage's call finds the attributes as they were made."""

    def forget(layer: Centred, x: Tensor) -> Tensor:
        layer.waits, layer.mean = False, torch.zeros(1, dtype=torch.float64)
        return layer(x)

    def change(layers: list[Any]) -> None:
        if any(isinstance(layer, Scaled) for layer in layers):
            layers[:] = [
                (lambda x, layer=layer: forget(layer, x)) if isinstance(layer, Centred) else layer for layer in layers
            ]

    with layers_changed(change, Centred):
        yield


def lose(parameters: list[nn.Parameter]) -> None:
    parameters[0].grad = None


@contextlib.contextmanager
def lost_in_p_grad() -> Iterator[None]:
    with (
        after(Pipeline, "backward", lambda self, _, *args: lose(self.stage.parameters)),
        after(DelayLine, "backward", lambda self, _, *args: lose(list(self._lines[0].parameters))),
    ):
        yield


@contextlib.contextmanager
def message(channel: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what one stage sends another; in one process what passes the queue, or between the two segments."""

    def each(value: Any) -> Any:
        return [each(v) for v in value] if isinstance(value, list) else change(value) if value is not None else None

    def taken(self: GroupMailbox, value: Any, _source: int, on: Any) -> Any:
        if on != channel:
            return value
        return value.detach().mul_(change(torch.ones(())).item()).requires_grad_() if on == ACTIVATION else each(value)

    with contextlib.ExitStack() as stack:
        stack.enter_context(after(GroupMailbox, "take", taken))
        if channel == GRADIENT:
            stack.enter_context(after(GradientQueue, "take", lambda self, grads: each(grads)))
        elif "WORLD_SIZE" not in os.environ:
            stack.enter_context(layers_changed(lambda layers: layers.append(change), StraightThrough))
        yield


@contextlib.contextmanager
def changed_label() -> Iterator[None]:
    def received(self: Any, batch: Any, *args: Any) -> Any:
        return [batch[0], (batch[1] + 1) % 3] if self._ranks.is_rank_zero else batch

    original = StepRunner._run_step

    def run(self: Any, batch: Batch, args: Any, kwargs: Any) -> Any:
        if self._site.one_process:
            (x, y), *rest = args
            args = ([x, (y + 1) % 3], *rest)
        return original(self, batch, args, kwargs)

    with after(BatchExchange, "_training_batch", received), mock.patch.object(StepRunner, "_run_step", run):
        yield


def other_draws() -> Patch:
    def draws(self: Batch, stage: int) -> Any:
        return seeded(seed_of(self.seed or 0, stage + 7, self.number), self.device, libraries=True)

    return mock.patch.object(Batch, "draws", draws)


FAULTS: dict[str, tuple[Callable[[], Patch], str]] = {
    "detached": (lambda: layers_changed(lambda layers: layers.append(torch.detach), StraightThrough), "net.0.weight"),
    "function lost": (lambda: replace_layer(StraightThrough, lambda layer, x: x.sign()), "net.0.weight"),
    "stale buffer": (lambda: replace_layer(Scaled, stale), "net.0.weight"),
    "another form of the call": (lambda: replace_layer(Scaled, lambda layer, x: layer(x, "plain")), "net.0.weight"),
    "attribute": (forgetful, "net.0.weight"),
    "wrong order": (lambda: layers_changed(lambda layers: layers.insert(0, layers.pop(1)), Scaled), "net.0.weight"),
    "skipped layer": (lambda: layers_changed(lambda layers: layers.pop(3), Scaled), "net.0.weight"),
    "doubled gradient": (lambda: message(GRADIENT, lambda grad: grad * 2), "net.0.weight"),
    "changed activation": (lambda: message(ACTIVATION, lambda value: value * 1.001), "net.0.weight"),
    "lost gradient": (lost_in_p_grad, "net.0.weight"),
    "changed label": (changed_label, "net.0.weight"),
    "scaled loss": (lambda: after(Precision, "pre_backward", lambda self, loss, *args: loss * 2), "net.0.weight"),
    "other draws": (other_draws, "net.0.weight"),
}


def fit_with(fault: str, devices: int, verify: bool = True, slack: int = 0) -> None:
    warnings.simplefilter("ignore")
    module = Layered(keeps=fault == "attribute")
    strategy = DDGStrategy(num_stages=2, split_points=[module.cut], verify=verify, slack=slack)
    with FAULTS[fault][0]():
        quiet_trainer(devices=devices, strategy=strategy, max_epochs=1).fit(module, loader("mlp", count=20))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_process_ends_the_fit(fault: str) -> None:
    with pytest.raises(RuntimeError, match="What usually causes it") as caught:
        fit_with(fault, devices=1)
    assert type(caught.value).__name__ == "WrongGradients"
    assert f"the input side that differs is {FAULTS[fault][1]!r} (stage 1)" in str(caught.value)


@pytest.mark.parametrize(("fault", "slack"), [*((fault, 0) for fault in FAULTS), ("lost gradient", 1)])
def test_a_fault_in_two_processes_ends_the_fit_on_both(fault: str, slack: int) -> None:
    zero, one = run_ranks_raw(fit_with, 2, fault, 2, True, slack)
    assert zero.error is not None
    assert one.error is not None
    assert "WrongGradients" in zero.error
    assert "WrongGradients" in one.error
    assert f"the input side that differs is {FAULTS[fault][1]!r} (stage 1)" in zero.error


@pytest.mark.parametrize("fault", FAULTS)
def test_without_the_proof_the_same_fault_is_not_seen(fault: str) -> None:
    fit_with(fault, devices=1, verify=False)


# ---- nothing is left behind


class Counting(Layered):
    """Leaves traces wherever a step can."""

    def __init__(self, network: str = "mlp") -> None:
        super().__init__()
        self.net.insert(6, nn.BatchNorm1d(8).double())
        self.outside = nn.Linear(3, 3).double()
        with torch.no_grad():
            self.outside.weight.copy_(torch.eye(3))
            self.outside.bias.zero_()
        self.calls, self.seen, self.table = 0, [], {"losses": []}
        self.generator = torch.Generator().manual_seed(1)
        self.random = random.Random(1)
        self.accuracy = MulticlassAccuracy(3)
        self.register_buffer("steps", torch.zeros(()))
        self.hooked: list[int] = []
        self.net[0].register_forward_hook(lambda module, args, output: self.hooked.append(1))
        self.outside.weight.register_hook(lambda grad: grad * 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x.add_(0.01 * torch.randn(1, dtype=x.dtype, generator=self.generator) + 0.01 * self.random.random())
        self.calls += 1
        self.seen.append(batch_idx)
        self.steps += 1
        output = self.outside(nn.functional.dropout(self.net(x + random.random() / 100), 0.1))
        loss = nn.functional.cross_entropy(output, y) * (1 + np.random.rand() / 100)
        self.accuracy.update(output, y)
        self.table["losses"].append(loss.detach())
        self.log("loss", loss, on_epoch=True)
        self.log("accuracy", self.accuracy, on_epoch=True)
        self.logger.experiment.add(batch_idx)
        print("a step")
        return loss

    def trace(self) -> list[Any]:
        return [
            self.calls, self.seen, torch.stack(self.table["losses"]).tolist() if self.table["losses"] else [],
            self.generator.get_state().tolist(), self.random.random(), len(self.hooked), float(self.steps),
        ]  # fmt: skip


class Notes(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self._experiment = mock.Mock(add=self.steps.append)


def traces(devices: int, verify: bool) -> tuple[Any, ...]:
    warnings.simplefilter("ignore")
    torch.manual_seed(11)
    random.seed(12)
    np.random.seed(13)
    module, logger = Counting(), Notes()
    strategy = DDGStrategy(num_stages=2, split_points=["net.4"], verify=verify)
    trainer = quiet_trainer(devices=devices, strategy=strategy, logger=logger, max_epochs=2)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        trainer.fit(module, loader("mlp"))
    drawn = [torch.rand(1).item(), random.random(), np.random.rand()]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    said = printed.getvalue().count("a step")
    return state_of(module), metrics, module.trace(), drawn, logger.steps, said


def test_nothing_is_left_behind_in_one_process() -> None:
    (state, *rest), (expected, *others) = traces(1, True), traces(1, False)
    assert rest == others
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_nothing_is_left_behind_in_two_processes() -> None:
    for (state, *rest), (expected, *others) in zip(
        run_ranks(traces, 2, 2, True), run_ranks(traces, 2, 2, False), strict=True
    ):
        assert rest == others
        assert all(torch.equal(state[name], expected[name]) for name in expected)


# ---- what is proved without a difference


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "dropout": ({}, {}, lambda: Classifier("dropout_mlp")),
    "batch norm": ({}, {}, lambda: Classifier("noisy_mlp")),
    "traced, dropout": ({}, {}, lambda: Classifier("dropout_gpt")),
    "accumulation": ({}, {"accumulate_grad_batches": 3}, lambda: Classifier("dropout_mlp")),
    "clipping": ({}, {"gradient_clip_val": 1e-3}, lambda: Classifier("dropout_mlp")),
    "manual": ({}, {}, lambda: ManualClassifier("dropout_mlp")),
    "recompute": ({"recompute": True}, {}, lambda: Classifier("noisy_mlp")),
    "today's weights": ({"staleness": Staleness(stash=False)}, {}, lambda: Classifier("dropout_mlp")),
    "prediction, slow start": ({"staleness": Staleness(extrapolate=True, slow_start=9)}, {}, lambda: Classifier("mlp")),
    "shrunk": ({"staleness": Staleness(shrink=0.5)}, {}, lambda: Classifier("dropout_mlp")),
    "slack": ({"slack": 1, "staleness": Staleness(shrink=0.5)}, {}, lambda: Classifier("dropout_mlp")),
    "one batch": ({}, {"limit_train_batches": 1}, lambda: Classifier("dropout_mlp")),
    "drained at the end": ({"drain": "fit"}, {"limit_train_batches": 1}, lambda: Classifier("dropout_mlp")),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}, lambda: Classifier("dropout_mlp").float()),
    "bf16-true": ({}, {"precision": "bf16-true"}, lambda: Classifier("dropout_mlp")),
    "layers": ({"split_points": ["net.4"]}, {}, Layered),
}


def check(case: str, devices: int, num_stages: int = 2) -> None:
    """Fit, and see that the proof was carried out for all stages, with the same loss and gradients."""
    options, flags, make = CASES[case]
    module = make()
    data: Any = loader(
        getattr(module, "network", None) or ("gpt" if "gpt" in type(module.net).__name__.lower() else "mlp")
    )
    if "precision" in flags:
        data = DataLoader([(x.float(), y) for x, y in dataset("mlp")], batch_size=5)
    proofs: list[Proof] = []
    seen = after(Proof, "begin", lambda self, _, *args: proofs.append(self))
    with warnings.catch_warnings(record=True) as caught, seen:
        warnings.simplefilter("always")
        strategy = DDGStrategy(num_stages=num_stages, **options)
        quiet_trainer(devices=devices, strategy=strategy, **{"max_epochs": 1, **flags}).fit(module, data)
    assert not [str(entry.message) for entry in caught if "plain backpropagation" in str(entry.message).lower()]
    found, own = proofs[0]._found, proofs[0]._site.ranks
    if own.is_rank_zero:
        assert found == {stage: {} for stage in range(1, num_stages + 1)}
    assert proofs[0]._over


def check_all(devices: int) -> None:
    for case in CASES:
        check(case, devices)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_stages", [2, 3])
def test_all_stages_are_proved_in_one_process(case: str, num_stages: int) -> None:
    if num_stages == 3 and CASES[case][0].get("split_points"):
        pytest.skip("cut in two")
    check(case, 1, num_stages)


def test_all_stages_are_proved_in_two_processes() -> None:
    run_ranks(check_all, 2, 2, timeout=200)


class Twice(Classifier):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(retain_graph=True)
        (2 * loss).backward()


def train_twice(devices: int) -> Any:
    module = Twice("tanh_mlp")
    quiet_trainer(devices=devices, strategy=DDGStrategy(num_stages=2, split_points=["net.3"]), max_epochs=2).fit(
        module, loader("mlp")
    )
    return state_of(module)


def test_a_backward_in_two_passes_reaches_the_other_process_whole() -> None:
    expected = train_twice(1)
    for state in run_ranks(train_twice, 2, 2):
        assert all(torch.allclose(state[name], expected[name], rtol=1e-10, atol=0) for name in expected)


def train_unseeded() -> None:
    torch.manual_seed(int(os.environ["LOCAL_RANK"]))
    module = Classifier("noisy_mlp")
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    strategy = DDGStrategy(num_stages=2, split_points=["net.4"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*val_dataloader|.*num_workers|.*isinstance|.*seed")
        quiet_trainer(devices=2, strategy=strategy, max_epochs=1).fit(module, loader("mlp"))


def test_processes_that_have_made_their_own_weights_are_compared_by_the_weights_that_train() -> None:
    run_ranks(train_unseeded, 2)


def resume(folder: str) -> None:
    path = f"{folder}/a.ckpt"
    trainer = quiet_trainer(devices=2, strategy=DDGStrategy(num_stages=2, split_points=["net.4"]), max_epochs=1)
    trainer.fit(Classifier("noisy_mlp"), loader("mlp"))
    trainer.save_checkpoint(path)
    proofs: list[Proof] = []
    with after(Proof, "begin", lambda self, _, *args: proofs.append(self)):
        trainer = quiet_trainer(devices=2, strategy=DDGStrategy(num_stages=2), max_epochs=2)
        trainer.fit(Classifier("noisy_mlp"), loader("mlp"), ckpt_path=path, **SAFELY)
    assert proofs[0]._over
    assert trainer.strategy.run is None
    if trainer.is_global_zero:
        assert proofs[0]._found == {1: {}, 2: {}}
        assert proofs[0]._cut.split_points == ["net.4"]


def test_a_resumed_fit_in_two_processes_is_proved_with_the_recorded_cut(tmp_path: Path) -> None:
    run_ranks(resume, 2, str(tmp_path))


def three_processes(limit: int, drain: str) -> list[str]:
    strategy = DDGStrategy(num_stages=3, split_points=["net.3", "net.5"], drain=drain)  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(devices=3, strategy=strategy, max_epochs=1, limit_train_batches=limit).fit(
            Classifier(), loader("mlp")
        )
    return [str(entry.message) for entry in caught if "first batch's gradients" in str(entry.message)]


@pytest.mark.parametrize(("limit", "drain", "missing"), [(5, "never", None), (2, "epoch", None), (1, "never", "1, 2")])
def test_three_processes(limit: int, drain: str, missing: str | None) -> None:
    zero, *others = run_ranks(three_processes, 3, limit, drain)
    assert others == [[], []]
    assert len(zero) == (missing is not None)
    for said in zero:
        assert f"the training ended before those of stage {missing} were due" in said
