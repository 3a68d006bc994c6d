"""Hooks of the user's on layers, which keep what the step looks for: in one process as always, else named errors."""

from __future__ import annotations

import re
import warnings
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_ddg import DDGStrategy
from lightning_ddg.plugin.foreign_hooks import misses_explained
from tests.harness import run_ranks
from tests.networks import Classifier, loader, quiet_trainer

KEPT: dict[str, Any] = {}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Linear(6, 6).double(), nn.ReLU(), nn.Linear(6, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.relu(self.first(x)))


class Blocks(nn.Module):
    """Stages run its code: blocks, and modules without parameters between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.relu, self.layer2, self.head = Block(), nn.ReLU(), Block(), nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.relu(self.layer1(x))))


def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
    KEPT[name] = output.detach()


class Keeper(pl.Callback):
    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept["it"] = output.detach()


class Hooked(Classifier):
    """Keeps something of one module, in one of many ways; the step takes it up as people do."""

    def __init__(self, network: str, where: str, how: str) -> None:
        super().__init__("tanh_mlp")
        torch.manual_seed(1)
        if network == "blocks":
            self.net = Blocks()
        self.how, self.kept, self.listed, self.keeper = how, {}, [], Keeper()
        self.hook_on(self.get_submodule(where))
        KEPT.clear()

    def hook_on(self, module: nn.Module) -> None:
        if self.how in ("dict", "loss", "step"):
            module.register_forward_hook(lambda _, args, output: self.kept.update(it=output))
        elif self.how == "pre":
            module.register_forward_pre_hook(lambda _, args: self.kept.update(it=args[0]))
        elif self.how == "attribute":
            module.register_forward_hook(lambda _, args, output: setattr(self, "seen", output))
        elif self.how == "list":
            module.register_forward_hook(lambda _, args, output: self.listed.append(output))
        elif self.how == "global":
            module.register_forward_hook(partial(keep, "it"))
        elif self.how == "callback":
            module.register_forward_hook(self.keeper.hook)
        elif self.how == "backward":
            module.register_full_backward_hook(lambda _, given, taken: self.kept.update(it=taken[0]))

    def found(self) -> Tensor:
        if self.how == "attribute":
            return self.seen  # type: ignore[return-value]
        if self.how == "list":
            found = torch.stack(self.listed)
            self.listed.clear()
            return found
        kept = {"global": KEPT, "callback": self.keeper.kept}.get(self.how, self.kept)
        return kept["it"]  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.how == "step":
            # More than one call of one network: the step itself is cut.
            for layer in self.net:
                x = layer(x)
            loss = nn.functional.cross_entropy(x, y)
        else:
            loss = nn.functional.cross_entropy(self(x), y)
        if self.how == "backward" and batch_idx == 0:
            return loss
        self.log("kept", self.found().mean())
        return loss + self.found().mean() if self.how in ("loss", "step") else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None


def missed(error: str, where: str, kind: str) -> str:
    return rf"The step failed with {error}.* Hooks of yours on '{where}' \({kind}, stage 1\) fire in another process.*"


#: The network, where the hook is, what it does, and what two processes say: nothing where all is in the last stage.
CASES = [
    ("mlp", "net.0", "dict", missed("KeyError: 'it'", "net.0", "Linear")),
    ("mlp", "net.1", "loss", missed("KeyError", "net.1", "Tanh")),
    ("mlp", "net.2", "pre", missed("KeyError", "net.2", "Linear")),
    ("mlp", "net.0", "backward", missed("KeyError", "net.0", "Linear")),
    ("mlp", "net.0", "step", missed("KeyError", "net.0", "Linear")),
    ("blocks", "net.layer1", "dict", missed("KeyError", "net.layer1", "Block")),
    ("blocks", "net.layer1.first", "global", missed("KeyError", "net.layer1.first", "Linear")),
    ("blocks", "net.layer1.first", "callback", missed("KeyError", "net.layer1.first", "Linear")),
    ("blocks", "net.layer1.relu", "attribute", missed("AttributeError", "net.layer1.relu", "ReLU")),
    ("blocks", "net.layer1.second", "list", missed("RuntimeError: stack expects", "net.layer1.second", "Linear")),
    ("blocks", "net.relu", "loss", "has left an output of 'layer1' where it is used after the call, as a hook may"),
    ("mlp", "net.6", "dict", None),
    ("mlp", "net.4", "pre", None),
    ("blocks", "net.head", "loss", None),
]
SPLITS = {"mlp": "net.4", "blocks": "net.head"}


def outcome(network: str, where: str, how: str, devices: int) -> Any:
    strategy = DDGStrategy(2, [SPLITS[network]])
    trainer = quiet_trainer(devices=devices, strategy=strategy, max_epochs=1, num_sanity_val_steps=0)
    try:
        trainer.fit(Hooked(network, where, how), loader("mlp", 10))
    except Exception as error:  # noqa: BLE001 - what each rank says is what is tested
        return f"{type(error).__name__}: {error}"
    return float(trainer.callback_metrics.get("kept", 0.0))


def outcomes(devices: int) -> list[Any]:
    warnings.simplefilter("ignore")
    return [outcome(network, where, how, devices) for network, where, how, _ in CASES]


def test_what_hooks_keep_is_found_or_the_error_names_hook_and_stage() -> None:
    alone, (last, first) = outcomes(1), run_ranks(outcomes, 2, 2)
    for (network, where, how, message), one, two, elsewhere in zip(CASES, alone, last, first, strict=True):
        assert isinstance(one, float), (where, how, one)
        if message is None:
            assert two == elsewhere == pytest.approx(one, rel=1e-9), (network, where, how)
            continue
        assert re.search(f"{message}.*train in one process", two), (where, how, two)
        assert re.search(r"Rank 0 \(stage 2\) failed while training .*, with RuntimeError", elsewhere)


def kept_with_a_way_out() -> list[tuple[str, str]]:
    class Lenient(Hooked):
        def found(self) -> Tensor:
            return self.kept.get("it", torch.zeros(1))  # type: ignore[no-any-return]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet_trainer(devices=2, strategy=DDGStrategy(2, ["net.4"]), max_epochs=1)
        trainer.fit(Lenient("mlp", "net.0", "dict"), loader("mlp", 10))
    return [(str(one.message), one.filename) for one in caught if "leaves tensors" in str(one.message)]


def test_a_step_that_goes_on_without_is_warned_of_in_the_users_line() -> None:
    last, first = run_ranks(kept_with_a_way_out, 2)
    assert last == []
    ((message, file),) = first
    assert re.search(r"Stage 1 leaves tensors .* their hooks do \(what a hook of net.0 keeps\).*return them", message)
    assert file == __file__


def test_other_errors_stay_what_they_are() -> None:
    module = nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
    elsewhere = {module[0]: 1}
    with pytest.raises(KeyError, match="bang"), misses_explained(module, elsewhere):
        raise KeyError("bang")  # the one hook is torch's own
    module[0].register_forward_hook(keep)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), misses_explained(module, elsewhere):
        module[1](torch.zeros(1, 3))  # not raised by the user's line
    message = "failed with ValueError: bang. Hooks of yours on '0' .*Linear, stage 1"
    with pytest.raises(RuntimeError, match=message), misses_explained(module, elsewhere):
        raise ValueError("bang")
