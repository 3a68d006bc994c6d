"""Plain backpropagation of the user's own training step, on a copy of the module and with the draws of the stages."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ddg.core.pytree import map_tensors
from lightning_ddg.core.rng import Batch, Generators, untouched
from lightning_ddg.network.cut import Cut
from lightning_ddg.network.replay.chain import ReplayedChain, stages_called
from lightning_ddg.network.replay.turns import Turns
from lightning_ddg.network.restore import trial
from lightning_ddg.plugin.collectives import collectives_refused
from lightning_ddg.plugin.host import LightningModule
from lightning_ddg.plugin.redirection import Redirection, StepDone
from lightning_ddg.plugin.replica import replica_of
from lightning_ddg.plugin.site import Site


class Unverifiable(Exception):
    """What the gradients should be cannot be known, for a reason."""


@dataclass(frozen=True)
class Plain:
    """What plain backpropagation gives.

    Attributes:
        loss: The loss.
        grads: By the name of each parameter, the gradient w.r.t. it, on the CPU.
        device: Where it was computed.
        split: Of a batch that is split, in evaluation mode: the loss of the whole batch, and the mean of its
            micro-batches'. ``None`` if it is not split, or that is not to be had.
    """

    loss: Tensor
    grads: dict[str, Tensor | None]
    device: torch.device
    split: tuple[float, float] | None = None


def plain_backprop(
    site: Site,
    cut: Cut,
    redirection: Redirection,
    batch: Batch,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    weights: dict[str, Tensor],
    micro_batches: int = 1,
) -> Plain:
    """Run the user's training step on a copy of the module with the network uncut, and its backward.

    Nothing is left behind. Where the device is too small, it runs on the CPU.

    Args:
        site: What the run is built of.
        cut: Where the stages begin.
        redirection: What has taken the place of the network's call.
        batch: The batch's number and seed.
        args: The step's arguments.
        kwargs: Its keyword arguments.
        weights: By name, parameters and buffers that this process has other values of.
        micro_batches: How many are run, where the batch is split: their losses are added up by their weights.

    Raises:
        Unverifiable: With the reason, in a form that follows "as".
    """
    devices = [site.device] if site.device.type == "cpu" else [site.device, torch.device("cpu")]
    if any(parameter.is_meta for parameter in site.module.parameters()):
        raise Unverifiable("some parameters have no values in this process")
    for device in devices:
        # Processes that do not take part would be waited for.
        size = site.ranks.replicas.size
        alone = contextlib.nullcontext() if site.one_process else collectives_refused(size)
        try:
            with trial(site.module.modules(), [site.device]), _silence(), alone, _gradients_kept(site.module):
                one = batch._replace(device=device)
                return _run(site, cut, redirection, one, args, kwargs, weights, micro_batches)
        except Unverifiable:
            raise
        except (torch.OutOfMemoryError, MemoryError) as error:
            if device is devices[-1]:
                raise Unverifiable(f"the whole module fits neither {site.device} nor the host's memory") from error
        except Exception as error:
            raise Unverifiable(
                f"the training step could not be run on a copy of the module ({_said(error)})"
            ) from error
        finally:
            if site.device.type == "cuda":
                # What the whole network needed is more than a stage will.
                torch.cuda.empty_cache()
    raise AssertionError("unreachable")


def _run(
    site: Site,
    cut: Cut,
    redirection: Redirection,
    batch: Batch,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    weights: dict[str, Tensor],
    micro_batches: int,
) -> Plain:
    here = batch.device
    try:
        replica, copies = replica_of(site.module)
        args, kwargs = _copied((tuple(args), kwargs))
    except Exception as error:
        raise Unverifiable(f"{type(site.module).__name__} cannot be copied ({_said(error)})") from error
    replica.to(here)
    named = dict([*replica.named_parameters(remove_duplicate=False), *replica.named_buffers(remove_duplicate=False)])
    for name in weights.keys() & named.keys():
        named[name].detach().copy_(weights[name])
    if here != site.device:
        args, kwargs = map_tensors(lambda tensor: tensor.to(here), (args, kwargs))
    draws = _Turns(cut, copies, batch) if isinstance(cut.chain, ReplayedChain) else _Draws(cut, copies, batch)
    whole_step = redirection.target is None
    draws.watch(replica if whole_step else copies[id(redirection.target)], "training_step" if whole_step else "forward")
    total, drew = torch.zeros(()), False
    for number, part in enumerate(site.parts(args[0])[:micro_batches]):
        draws.batch = batch._replace(micro=number)
        with site.precision.train_step_context(), draws.batch.draws(0), torch.enable_grad():
            before = Generators(here)
            loss, ran = _loss_of(replica, (part.batch, *args[1:]), kwargs)
            drew |= draws.drew or not before.unchanged()
        if not ran:
            if replica.automatic_optimization:
                loss = loss / site.trainer.accumulate_grad_batches * part.weight
            replica.backward(loss)
        total = loss.detach() if number == 0 else total + loss.detach()
    if drew and here.type != site.device.type:
        raise Unverifiable(
            f"the whole module does not fit {site.device}, and would draw other random numbers on the CPU"
        )
    if drew and site.options.compile_options is not None:
        raise Unverifiable("the network draws random numbers, and what is compiled draws others")
    grads = {name: _on_host(parameter.grad) for name, parameter in replica.named_parameters()}
    split = _split_loss(site, replica, args, kwargs, here)
    return Plain(total.to("cpu", copy=True), grads, here, split)


def _split_loss(
    site: Site, replica: LightningModule, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device
) -> tuple[float, float] | None:
    """The loss of a batch that is split, and the mean of its micro-batches', where nothing random makes them differ."""
    parts = site.parts(args[0])
    if len(parts) == 1:
        return None
    replica.eval()
    with contextlib.suppress(Exception), site.precision.train_step_context(), torch.no_grad(), untouched(device):
        before = Generators(device)
        whole, _ = _loss_of(replica, args, kwargs)
        losses = [_loss_of(replica, (part.batch, *args[1:]), kwargs)[0] * part.weight for part in parts]
        return (float(whole), float(sum(losses))) if before.unchanged() else None
    return None


def _loss_of(replica: LightningModule, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, bool]:
    """Run the step; return the loss, and whether its backward has run, as in manual optimization."""
    try:
        output: Any = replica.training_step(*args, **kwargs)
    except StepDone as done:
        return cast(Tensor, done.value), True
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or not replica.automatic_optimization:
        raise Unverifiable("`training_step` gave no loss for it")
    return loss, False


class _Turns:
    """Lets an uncut network, or step, draw as the stages do that run its code.

    Attributes:
        drew: Whether anything has been drawn.
        batch: What is drawn for.
    """

    def __init__(self, cut: Cut, copies: dict[int, Any], batch: Batch) -> None:
        self.drew = False
        self.batch, self._turns = batch, Turns()
        self._called = {copies[id(part)]: stage for part, stage in stages_called(cut.segments()).items()}

    def watch(self, target: nn.Module, name: str) -> None:
        """Take part in the calls of a method."""
        original = getattr(target, name)

        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            with self._turns.taken(self._called, self.batch, watched=True) as streams:
                output = original(*args, **kwargs)
            self.drew |= streams.drew
            return output

        vars(target)[name] = method


class _Draws:
    """Lets layers that are called in turn draw as their stages do: the generators are seeded where each begins.

    Attributes:
        drew: Whether anything has been drawn.
        batch: What is drawn for.
    """

    def __init__(self, cut: Cut, copies: dict[int, Any], batch: Batch) -> None:
        self.drew = False
        self.batch = batch
        self._seeded: Generators | None = None
        self._calls: dict[nn.Module, int] = {}
        self._inside = False
        # The call of which module begins which stage; a module without parameters may be called before.
        self._begins: dict[nn.Module, dict[int, int]] = {}
        for stage, start in enumerate(cut.starts, start=2):
            first = cut.chain.modules(start, start + 1)[0]
            before = sum(module is first for module in cut.chain.modules(0, start))
            self._begins.setdefault(copies[id(first)], {})[before] = stage

    def watch(self, target: nn.Module, name: str) -> None:
        """Take part in the calls of a method."""
        original = getattr(target, name)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with untouched(self.batch.device):
                self._calls, self._inside = dict.fromkeys(self._begins, 0), True
                self._begin(1)
                try:
                    return original(*args, **kwargs)
                finally:
                    self._look()
                    self._inside = False

        vars(target)[name] = forward
        for module in self._begins:
            module.register_forward_pre_hook(self._called, prepend=True)

    def _called(self, module: nn.Module, _args: Any) -> None:
        stages = self._begins[module]
        if self._inside:
            self._calls[module] += 1
        # Activation checkpointing calls it again in the backward, to draw the same.
        if self._inside or self._calls.get(module) == 1:
            stage = stages.get(self._calls[module] - 1)
            if stage is not None:
                self._begin(stage)

    def _begin(self, stage: int) -> None:
        self._look()
        self.batch.begin_draws(stage)
        self._seeded = Generators(self.batch.device)

    def _look(self) -> None:
        self.drew |= self._seeded is not None and not self._seeded.unchanged()


def _copied(value: Any) -> Any:
    try:
        return map_tensors(torch.clone, value)
    except Exception:  # noqa: BLE001 - what does not pickle may still be copied
        return copy.deepcopy(value)


def _on_host(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.detach().to("cpu", copy=True)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What the step says, it will say again."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _gradients_kept(module: nn.Module) -> Iterator[None]:
    """See that the copy's backward does not reach the original.

    Raises:
        Unverifiable: It did; the gradients are as before.
    """
    before = [(parameter, parameter.grad, _version(parameter.grad)) for parameter in module.parameters()]
    reached = []
    try:
        yield
    finally:
        for parameter, grad, version in before:
            if parameter.grad is not grad or _version(grad) != version:
                reached.append(parameter)
                parameter.grad = grad if _version(grad) == version else None
    if reached:
        raise Unverifiable("a copy of the module goes on using the original's parameters")


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor._version
