"""The proof before trust: the first batch's gradients, as they were really added, against plain backpropagation.

In one process, and in K through the processes and the messages::

    before the forward of batch 0    every stage sends its weights to rank 0, the reading rank also the step's arguments
                                     rank 0 runs the user's step on a copy of the module, uncut, and its backward
    after the backward of batch 0    every stage sends what was added to p.grad
    in the iteration of d(1) + 1     rank 0 takes it, which by then has been sent, and compares

So no stage waits for anything but what others have sent before. Where batches are split, the micro-batches of the first
one are proved together, if none of them sees a step: the last one's gradient is there as many iterations later.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddg.core.execution import Channel, Execution
from lightning_ddg.core.pytree import flatten, tensors_of, unflatten
from lightning_ddg.core.rng import Batch
from lightning_ddg.core.schedule import crossings, stage_of_rank
from lightning_ddg.core.witness import Gradients, Witness
from lightning_ddg.network.cut import Cut
from lightning_ddg.plugin.backprop import Plain, Unverifiable, plain_backprop
from lightning_ddg.plugin.host import MixedPrecision
from lightning_ddg.plugin.ownership import Ownership
from lightning_ddg.plugin.redirection import Redirection
from lightning_ddg.plugin.rounding import Rounding, difference, largest, rounding_of
from lightning_ddg.plugin.site import Site
from lightning_ddg.plugin.warn import warn

# How far the loss of a batch may be, relatively, from the mean of its micro-batches' without a word.
_SAME_LOSS = 0.01

PROOF = Channel("proof", on_host=True, varied=True)


class WrongGradients(RuntimeError):
    """The first batch's gradients are not those of plain backpropagation."""


class Proof:
    """Compares the first batch's gradients with those of plain backpropagation, and ends a fit that has others.

    Args:
        site: What the run is built of.
        cut: Where the network is cut.
        ownership: Whose parameter is whose.
        redirection: What has taken the place of the network's call.
    """

    def __init__(self, site: Site, cut: Cut, ownership: Ownership, redirection: Redirection) -> None:
        self._site, self._cut, self._ownership, self._redirection = site, cut, ownership, redirection
        self._begun = self._over = False
        # Whether rules for stale gradients act on those that are proved.
        self._stale = True
        # The backwards so far, and how many belong to what is proved.
        self._backwards, self._proved = 0, 1
        self._witness: Witness | None = None
        self._parameters: dict[int, dict[str, nn.Parameter]] = {}
        self._plain: Plain | None = None
        self._scale = 0.0
        # Of each stage, the parameters that differ, and how; `None` where its gradients never came.
        self._found: dict[int, dict[str, str] | None] = {}
        self._loss: str | None = None

    def witness(self, execution: Execution) -> Execution:
        """Let the proof see what an execution adds to ``p.grad``."""
        stages, slack = self._site.num_stages, self._site.options.slack
        self._witness = Witness(execution, stages, self._parameters_of, self._added, slack)
        return self._witness

    # ---- called while training

    def begin(self, batch: Batch, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Called before each training step; the first is the one that is proved."""
        if self._begun:
            return
        self._begun = True
        self._stale = self._witness is None or not self._witness.synchronous
        self._parameters = self._by_stage()
        ranks = self._site.ranks
        # With today's weights in the backward, only the first micro-batch's gradient is sure to come before any step.
        if self._witness is not None and self._site.options.staleness.stash:
            self._proved = self._witness.count = len(self._site.parts(args[0]))
        if not ranks.is_rank_zero:
            call = (tuple(args), kwargs) if ranks.reads else None
            ranks.mailbox.send(0, PROOF, (self._own_state(), call), snapshot=True)
            return
        weights: dict[str, Tensor] = {}
        for rank in ranks.others:
            own, call = ranks.mailbox.take(rank, PROOF)
            weights |= own
            if call is not None:
                args, kwargs = _on_devices_of((tuple(args), kwargs), call)
        try:
            self._plain = plain_backprop(
                self._site, self._cut, self._redirection, batch, args, kwargs, weights, self._proved
            )
        except Unverifiable as reason:
            self._warn(str(reason))
            return
        self._check_mean(self._plain)
        sizes = map(largest, self._plain.grads.values())
        self._scale = max((size for size in sizes if isfinite(size)), default=0.0)

    def loss(self, loss: Tensor) -> None:
        """Called with each loss, before its backward; that of the first batch is compared."""
        self._backwards += 1
        if self._backwards != self._proved or self._plain is None:
            return
        got, wanted = loss.detach().to("cpu", torch.float64), self._plain.loss.to(torch.float64)
        allowed = self._rounding(loss.dtype).relative * max(1.0, float(wanted.abs()))
        if not torch.allclose(got, wanted, rtol=0, atol=allowed, equal_nan=True):
            self._loss = f"the loss is {float(got):.6g} instead of {float(wanted):.6g}"

    def after_backward(self) -> None:
        """Called after the backwards of each batch: when that of d(1) + 1 has run here, stage 1's of batch 0 has.

        Raises:
            WrongGradients: If a gradient, or the loss, is wrong.
        """
        if self._begun and not self._over:
            self._look(wait=self._backwards > self._site.delay(1) + self._proved)

    def after_epoch(self) -> None:
        """Called when the ranks have met at an epoch's end: what they have sent before is here.

        Raises:
            WrongGradients: If a gradient, or the loss, is wrong.
        """
        if self._begun and not self._over:
            self._look(wait=False)

    def end(self) -> None:
        """Called when training has ended: gradients that have not been computed never will be.

        Raises:
            WrongGradients: If a gradient, or the loss, is wrong.
        """
        ranks = self._site.ranks
        if not self._begun or self._over:
            return
        if ranks.is_rank_zero:
            for stage in range(1, self._site.num_stages + 1) if self._site.one_process else ():
                self._found.setdefault(stage, None)
            self._look(wait=True)
        elif ranks.stage not in self._found:
            ranks.mailbox.send(0, PROOF, None)
        self._over = True

    # ---- what is known

    def _parameters_of(self, stage: int) -> list[nn.Parameter]:
        return list(self._parameters[stage].values())

    def _by_stage(self) -> dict[int, dict[str, nn.Parameter]]:
        """The parameters of each stage by name, from the input side; those outside the network come last."""
        names = {parameter: name for name, parameter in self._site.module.named_parameters()}
        segments = enumerate(self._ownership.segments, start=1)
        stage_of = self._ownership.stage_of
        stages = {n: [p for p in segment.parameters() if p in names and stage_of(p) == n] for n, segment in segments}
        stages[self._site.num_stages] += self._ownership.parameters_outside
        return {stage: {names[p]: p for p in parameters} for stage, parameters in stages.items()}

    def _own_state(self) -> dict[str, Tensor]:
        module = self._site.module
        named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        own = set(self._ownership.own_names)
        return {name: tensor.detach() for name, tensor in named if name in own}

    def _added(self, stage: int, grads: Gradients) -> None:
        """Called by the witness, on the rank of the stage."""
        named = dict(zip(self._parameters[stage], map(_on_host, grads), strict=True))
        if self._site.ranks.is_rank_zero:
            self._found[stage] = self._differences(stage, named)
        else:
            self._found[stage] = {}
            self._site.ranks.mailbox.send(0, PROOF, named)

    def _look(self, *, wait: bool) -> None:
        """Take what other stages have sent; judge when it is all there."""
        ranks = self._site.ranks
        if not ranks.is_rank_zero:
            return
        for rank in ranks.others:
            stage = stage_of_rank(rank, self._site.num_stages)
            if stage not in self._found and (wait or ranks.mailbox.has(rank, PROOF)):
                grads = ranks.mailbox.take(rank, PROOF)
                self._found[stage] = None if grads is None else self._differences(stage, grads)
        if len(self._found) == self._site.num_stages:
            self._judge()

    def _differences(self, stage: int, grads: dict[str, Tensor | None]) -> dict[str, str]:
        """The parameters of a stage whose gradients differ, in their order, and how."""
        if self._plain is None:
            return {}
        shrink = self._site.options.staleness.shrink if self._stale else 1.0
        factor = shrink ** crossings(stage, self._site.num_stages)
        found = {}
        for name, parameter in self._parameters[stage].items():
            wanted = self._plain.grads.pop(name, None)
            wanted = wanted if wanted is None or factor == 1 else wanted * factor
            text = difference(grads.get(name), wanted, self._rounding(parameter.dtype), self._scale)
            if text is not None:
                found[name] = text
        return found

    def _rounding(self, dtype: torch.dtype) -> Rounding:
        site, plain = self._site, self._plain
        if isinstance(site.precision, MixedPrecision):
            dtype = torch.bfloat16
        moved = plain is not None and plain.device.type != site.device.type
        if moved and dtype == torch.float32:
            # A GPU may multiply numbers that it has rounded to TF32, whose mantissa is that of float16.
            dtype = torch.float16
        return rounding_of(dtype, reordered=moved or site.options.compile_options is not None)

    # ---- the end

    def _judge(self) -> None:
        """End the proof, and with it the fit if it fails."""
        plain, self._plain, self._parameters, self._over = self._plain, None, {}, True
        wrong = [(stage, *item) for stage, found in sorted(self._found.items()) for item in (found or {}).items()]
        if wrong or self._loss is not None:
            raise WrongGradients(_message(wrong, self._loss))
        missing = [stage for stage, found in sorted(self._found.items()) if found is None]
        if missing and plain is not None:
            self._warn(f"the training ended before those of stage {', '.join(map(str, missing))} were due", part=True)

    def _check_mean(self, plain: Plain) -> None:
        """Warn of a loss that is no mean over samples: micro-batches have another one."""
        whole, mean = plain.split or (0.0, 0.0)
        allowed = max(_SAME_LOSS, self._rounding(plain.loss.dtype).relative)
        if isfinite(whole) and isfinite(mean) and abs(whole - mean) > allowed * max(abs(whole), abs(mean)):
            warn(
                f"micro_batches={self._site.options.micro_batches!r}: the loss of the first batch is {whole:.6g}, but"
                f" the mean of its micro-batches' is {mean:.6g} (each by its number of samples, in evaluation mode),"
                " and that is what is trained. It is the same for a loss that is a mean over samples. Make it one (not"
                " a sum), or leave micro_batches out if the loss compares samples with each other.",
            )

    def _warn(self, reason: str, *, part: bool = False) -> None:
        warn(
            f"The first batch's gradients are {'only in part' if part else 'not'} compared with those of plain"
            f" backpropagation, as {reason}. DDGStrategy(verify=False) leaves the comparison out, and this warning.",
        )


def _message(wrong: Sequence[tuple[int, str, str]], loss: str | None) -> str:
    if wrong:
        stage, name, text = wrong[0]
        others = f" So it is with {len(wrong)} parameters in all." if len(wrong) > 1 else ""
        also = "" if loss is None else f" Also, {loss}."
        what = (
            f"The first parameter from the input side that differs is {name!r} (stage {stage}): {text}.{others}{also}"
        )
    else:
        what = f"All gradients are the same, but {loss}."
    return (
        "The stages do not compute the first batch's gradients as plain backpropagation of `training_step` does, and"
        f" would train something else. {what} What usually causes it: a value that is detached between two layers, or"
        " computed by an autograd.Function or a reentrant checkpoint that the cut has lost; an attribute that a module"
        " keeps from one call for the next; a layer that is called in two forms; something random that neither torch"
        " nor `random` nor NumPy draws, or in two stages together; a `backward` that runs more than once. Change"
        " that, return the layers from `configure_stages()`, or cut elsewhere (`split_points`)."
        " DDGStrategy(verify=False) leaves this comparison out."
    )


def _on_host(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.detach().to("cpu", copy=True)


def _on_devices_of(own: Any, received: Any) -> Any:
    """Return a received pytree with its tensors where those of this rank's own are."""
    structure, tensors = flatten(received)
    here = [tensor.device for tensor in tensors_of(own)]
    if len(here) == len(tensors):
        tensors = [tensor.to(device) for tensor, device in zip(tensors, here, strict=True)]
    return unflatten(structure, tensors)
