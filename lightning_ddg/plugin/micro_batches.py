"""A batch in micro-batches: the user's step and its backward for each, in order, and one step of the optimizer.

Micro-batches follow each other without a flush. With m = 3 Lightning sees one training step, backward and update::

    Lightning     training_step                                  zero_grad   backward          optimizer.step
                  step 1, backward | step 2, backward | step 3               backward
    p.grad        set aside, then added up, then taken  -------------------> put back, added

It zeroes the gradients after its training step, where those of all micro-batches but the last have been added: so they
are put back after it. The losses count by their samples, so that the mean over the batch is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ddg.core.pytree import map_tensors
from lightning_ddg.core.split import join
from lightning_ddg.core.tensors import add_gradient
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.averaging import Averaging
from lightning_ddg.plugin.one_log import OneLog
from lightning_ddg.plugin.site import Part, Site
from lightning_ddg.plugin.step import StepRunner
from lightning_ddg.plugin.verify import Proof

Gradients = list[Tensor | None]


class MicroBatches:
    """Runs training steps in micro-batches, or on the whole batch where it is not split.

    Args:
        site: What the run is built of.
        runner: Runs the user's step.
        proof: Compares the first batch's gradients with those of plain backpropagation, if that is wanted.
        averaging: Takes the mean of gradients over replicas.
    """

    def __init__(self, site: Site, runner: StepRunner, proof: Proof | None, averaging: Averaging) -> None:
        self.step = runner.step
        self._site, self._runner, self._proof, self._averaging = site, runner, proof, averaging
        self._uses_outputs = compat.uses_step_outputs(site.module)
        self._keeps_old = compat.looks_before_zeroing(site.module)
        # Of all micro-batches of this batch but the last.
        self._parameters: list[nn.Parameter] = []
        self._added: Gradients = []
        self._others_have_loss = False

    @property
    def skipped(self) -> bool:
        """Whether no micro-batch has a loss."""
        return self._runner.step.skipped and not self._others_have_loss

    def train(self, optimizers: Sequence[Optimizer], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the training step, and the backward of all micro-batches but the last; return what stands for the batch.

        That is the mean of the losses, through which the last one's gradient flows, and the other outputs, joined.

        Raises:
            ValueError: If the batch cannot be split, or the outputs cannot be joined.
        """
        self._added, self._others_have_loss = [], False
        if self._site.micro_batches == 1 or compat.skips_backward(self._site.trainer):
            return self._runner.train(optimizers, args, kwargs)
        batch, *rest = args
        parts = self._site.parts(batch)
        if len(parts) == 1:
            return self._runner.train(optimizers, args, kwargs)
        if self._proof is not None:
            self._proof.begin(self._site.training_batch(compat.batch_number(self._site.trainer)), args, kwargs)
        self._parameters = list(self._site.module.parameters())
        before = self._put([None] * len(self._parameters))
        if self._site.trainer.accumulate_grad_batches == 1 and not self._keeps_old:
            # They are of the last step, and would take memory until they are zeroed.
            before = [None] * len(before)
        logs, outputs = OneLog(self._site.module), []
        with logs.collecting():
            for number, part in enumerate(parts):
                logs.begin(part.size)
                outputs.append(self._runner.train(optimizers, (part.batch, *rest), kwargs, number))
                if number < len(parts) - 1:
                    outputs[-1] = self._backward_now(outputs[-1], part, optimizers)
        self._added = self._put(before)
        return self._of_batch(outputs, parts)

    def passes_over(self) -> bool:
        """Called when the backward begins: return whether there is no loss; if so, run the backwards that are due.

        Raises:
            RuntimeError: As :meth:`TrainingStep.backward`.
        """
        self.step.backward()
        if not self.skipped:
            return False
        self._put_back()
        passes = self._runner.passes_over()
        self._complete()
        return passes

    def backward(
        self, loss: Tensor, optimizer: Optimizer | None, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Tensor:
        """Run the backwards that are due, with the hooks around them; return the loss."""
        plugin, module = self._site.precision, self._site.module
        scaled = plugin.pre_backward(loss, module)
        self._put_back()
        # The last micro-batch may have none.
        if not self._runner.passes_over():
            self._runner.backward(loss, lambda: plugin.backward(scaled, module, optimizer, *args, **kwargs))
        self._complete()
        return plugin.post_backward(scaled, module)

    def _complete(self) -> None:
        """All of the batch has gone."""
        self._runner.flush()
        self._averaging.after_backward()

    def _backward_now(self, output: Any, part: Part, optimizers: Sequence[Optimizer]) -> Any:
        """Run the backward of a micro-batch; return its output without a graph."""
        module, (loss, _) = self._site.module, compat.loss_and_extra(output, self._site.trainer.accumulate_grad_batches)
        if not self._runner.passes_over():
            self._others_have_loss = True
            weighted = loss * part.weight
            self._runner.backward(weighted, lambda: self._site.precision.backward(weighted, module, optimizers[0]))
        kept = output if self._uses_outputs else compat.loss_and_extra(output, 1)[0]
        return map_tensors(Tensor.detach, kept)

    def _of_batch(self, outputs: list[Any], parts: list[Part]) -> Any:
        pairs = [compat.loss_and_extra(output, 1) for output in outputs]
        # The last first: only through it flows a gradient. Where it has none, what stands for it carries none.
        total = pairs[-1][0] * parts[-1].weight
        for (loss, _), part in zip(pairs[:-1], parts[:-1], strict=True):
            total = total + loss * part.weight
        if not self._uses_outputs or not all(extra for _, extra in pairs):
            return total
        try:
            extra = join([map_tensors(Tensor.detach, extra) for _, extra in pairs], [part.size for part in parts])
        except ValueError:
            # Elsewhere the outputs are made of a placeholder, for the sake of hooks.
            if self._site.has_loss:
                raise
            return total
        return {**extra, "loss": total}

    def _put(self, grads: Gradients) -> Gradients:
        """Set the gradients of all parameters; return those before."""
        before = [parameter.grad for parameter in self._parameters]
        for parameter, grad in zip(self._parameters, grads, strict=True):
            parameter.grad = grad
        return before

    def _put_back(self) -> None:
        added, self._added = self._added, []
        for parameter, grad in zip(self._parameters if added else (), added, strict=True):
            if grad is not None:
                add_gradient(parameter, grad)
