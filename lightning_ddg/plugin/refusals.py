"""What cannot work is refused here, by a message that names the value and the remedy.

The errors of finding and cutting a network are in :mod:`~lightning_ddg.network`. Add a refusal with its test; remove
one when the thing it refuses works.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.data import DistributedSampler

from lightning_ddg.core.staleness import Staleness
from lightning_ddg.network.find import Network

_CHOICES = {
    "balance": ("time", "parameters", "flops"),
    "drain": ("epoch", "fit", "never"),
    "start_method": ("popen", "spawn", "fork", "forkserver"),
}


def check_choice(name: str, value: Any) -> None:
    """Refuses an unknown value of an argument that has a fixed set of them.

    Raises:
        ValueError: Naming the known ones.
    """
    if value not in _CHOICES[name]:
        raise ValueError(f"{name}={value!r} is not known. Use one of {', '.join(map(repr, _CHOICES[name]))}.")


def check_stages(num_stages: Any, split_points: Any) -> None:
    """Refuses a number of stages that is none, and split points that are not one for each stage after the first.

    Raises:
        ValueError: Naming both.
        TypeError: If ``split_points`` is a string.
    """
    if num_stages != "auto" and (not isinstance(num_stages, int) or isinstance(num_stages, bool) or num_stages < 1):
        raise ValueError(f"num_stages={num_stages!r} is not a number of stages. Use a positive integer or 'auto'.")
    if isinstance(split_points, str):
        raise TypeError(
            f"split_points={split_points!r} is a string. Use a list of submodule names:"
            f" split_points=[{split_points!r}]."
        )
    if split_points is not None and num_stages != "auto" and len(split_points) != num_stages - 1:
        raise ValueError(
            f"split_points={split_points!r} begin {len(split_points)} stages after the first, but"
            f" num_stages={num_stages} needs {num_stages - 1}. Name the submodules that begin stages 2 to {num_stages}."
        )


def check_compile(compile: Any, num_stages: Any) -> None:
    """Refuses options that ``torch.compile`` cannot take, and stages that are none.

    Raises:
        TypeError: If it is neither a bool nor a dictionary.
        ValueError: If there is one stage only.
    """
    if not isinstance(compile, bool | dict):
        raise TypeError(f"compile={compile!r} is neither a bool nor a dictionary of torch.compile's options. Use True.")
    if compile is not False and num_stages == 1:
        raise ValueError(
            "compile needs stages to compile, but num_stages=1 cuts nothing. Compile the network in your module:"
            " `self.net.compile()`."
        )
    asked = compile if isinstance(compile, dict) else {}
    graphs = asked.get("mode") if asked.get("mode") in ("reduce-overhead", "max-autotune") else None
    if graphs is not None or (asked.get("options") or {}).get("triton.cudagraphs"):
        raise ValueError(
            f"compile={compile!r} records CUDA graphs, which a new forward overwrites, while stages have several"
            " batches in flight. Use mode='max-autotune-no-cudagraphs', or no mode."
        )


def check_backend(backend: str, devices: Sequence[torch.device]) -> None:
    """Refuses to let NCCL connect processes that share a device.

    Raises:
        ValueError: Naming the devices.
    """
    if "nccl" in backend and len(set(devices)) < len(devices):
        raise ValueError(
            f"process_group_backend={backend!r} cannot connect processes that share a device, as those on"
            f" {', '.join(map(str, devices))} do. Use process_group_backend='gloo', or a device for each process."
        )


def check_recurrent(staleness: Staleness, segments: Iterable[nn.Module], device: torch.device) -> None:
    """Refuses today's weights in a backward of layers that keep their weights in a form of their own.

    Raises:
        ValueError: Naming the kind of layer and the device.
    """
    if staleness.stash or device.type != "cuda":
        return
    kinds = {type(part).__name__ for segment in segments for part in segment.modules() if isinstance(part, nn.RNNBase)}
    if kinds:
        raise ValueError(
            f"stash=False uses today's weights in a backward, but on {device} {', '.join(sorted(kinds))} keeps them in"
            " another form from its forward. Leave stash=False out, or train on the CPU."
        )


def check_staleness(staleness: Any, recompute: Any, compile: Any) -> None:
    """Refuses rules that are none, and one that compiled code would not follow.

    Raises:
        TypeError: If ``staleness`` is no ``Staleness``, or ``recompute`` no bool.
        ValueError: If compiled stages shall use today's weights in their backward.
    """
    if not isinstance(staleness, Staleness | None):
        raise TypeError(f"staleness={staleness!r} is no Staleness. Use lightning_ddg.Staleness(...), or leave it out.")
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute={recompute!r} is not a bool. Use True or False.")
    if staleness is not None and not staleness.stash and not recompute and compile is not False:
        raise ValueError(
            "stash=False uses today's weights in a backward, but what is compiled may keep weights in another form from"
            " its forward. Use recompute=True with it, or leave `compile` out."
        )


def check_casts(staleness: Staleness, recompute: bool, plugin: Precision) -> None:
    """Refuses today's weights in a backward that would use those cast in its forward.

    Raises:
        ValueError: Naming the precision.
    """
    if isinstance(plugin, MixedPrecision) and not staleness.stash and not recompute:
        raise ValueError(
            f"stash=False uses today's weights in a backward, but precision={plugin.precision!r} keeps copies of the"
            " weights from its forward. Use recompute=True with it, or another precision: 'bf16-true' or '32-true'."
        )


def check_timeout(timeout: Any) -> None:
    """Refuses a limit that is none.

    Raises:
        ValueError: If it is not a positive ``timedelta``.
    """
    if not isinstance(timeout, timedelta) or timeout <= timedelta(0):
        raise ValueError(f"timeout={timeout!r} is not a limit. Use a positive datetime.timedelta.")


def check_world_size(num_stages: Any, split_points: Sequence[str] | None, world_size: int) -> None:
    """Refuses several processes that are not as many as the stages.

    Raises:
        ValueError: Naming both numbers.
    """
    if world_size == 1:
        return
    if num_stages != "auto" and num_stages != world_size:
        raise ValueError(
            f"num_stages={num_stages} stages cannot be trained by {world_size} processes: each process trains one"
            f" stage. Use devices={num_stages}, num_stages={world_size} or num_stages='auto', or one process."
        )
    if split_points is not None and len(split_points) + 1 != world_size:
        raise ValueError(
            f"split_points={list(split_points)!r} make {len(split_points) + 1} stages, but there are {world_size}"
            f" processes, and each trains one stage. Use devices={len(split_points) + 1}, or name {world_size - 1}"
            " split points."
        )


def check_started(started: int, devices: int, num_nodes: int, local_rank: int, environment: str) -> None:
    """Refuses a Trainer that counts otherwise than whoever has started its processes.

    Args:
        started: The number of processes started.
        devices: The Trainer's number of processes on a node.
        num_nodes: The Trainer's number of nodes.
        local_rank: Which process of its node this is.
        environment: Who has started it, for the message.

    Raises:
        ValueError: Naming the numbers.
    """
    asked = f"devices={devices} and num_nodes={num_nodes} ask for {devices * num_nodes}"
    if started != devices * num_nodes:
        raise ValueError(
            f"{asked} processes, but {started} have been started ({environment}). Let devices x num_nodes be {started},"
            f" or start {devices * num_nodes}. A script that trains in turn with several numbers of stages can use"
            " strategy='ddg_spawn' throughout."
        )
    if started > 1 and local_rank >= devices:
        raise ValueError(
            f"{asked} processes, {devices} on each node, but this is process {local_rank} of its node, counted from 0"
            f" ({environment}). Let `devices` be the number of processes on each node."
        )


def check_not_started(start_method: str, environment: str) -> None:
    """Refuses to start processes where somebody else has started them.

    Raises:
        ValueError: Naming both.
    """
    if start_method != "popen":
        raise ValueError(
            f"start_method={start_method!r} would start processes, but they have been started already"
            f" ({environment}). Use strategy='ddg' (start_method='popen'), which takes those there are."
        )


def check_interactive(start_method: str) -> None:
    """Refuses to start processes from a notebook or a Python shell in a way that needs a script.

    Raises:
        ValueError: Naming the way that works there.
    """
    if start_method != "fork" and (hasattr(sys, "ps1") or sys.flags.interactive):
        raise ValueError(
            f"start_method={start_method!r} starts a script again, but this is a notebook or an interactive session."
            " Use strategy='ddg_notebook' (start_method='fork'), or one process (devices=1)."
        )


def check_memory_limit(max_memory: int | None, split_points: Any, balance: str) -> None:
    """Refuses a limit to each stage's memory where something else decides the cut.

    Raises:
        ValueError: Naming both.
    """
    if max_memory is None:
        return
    other = f"{split_points=}" if split_points is not None else f"{balance=}"
    if split_points is not None or balance != "time":
        raise ValueError(
            f"max_memory={max_memory} bytes has no part in a cut by {other}: it is kept by the cut by measured time."
            " Leave out one of the two."
        )


def check_no_memory_limit(max_memory: int | None) -> None:
    """Refuses a limit to each stage's memory where all stages share one process.

    Raises:
        ValueError: Naming the limit.
    """
    if max_memory is not None:
        raise ValueError(
            f"max_memory={max_memory} bytes limits a stage's device, but with one process all stages share one. Leave"
            " it out, or use as many devices as stages."
        )


def check_precision(plugin: Any) -> None:
    """Refuses a precision that scales the loss.

    Raises:
        ValueError: For ``"16-mixed"``.
    """
    if getattr(plugin, "scaler", None) is not None or getattr(plugin, "precision", None) == "16-mixed":
        raise ValueError(
            f"precision={plugin.precision!r} scales the loss, and has to skip a batch whose gradient overflows, on all"
            " stages; but the last stage has applied that batch's gradient before the first has computed its own. Use"
            " precision='bf16-mixed'."
        )


def check_layer_sync(layer_sync: Any) -> None:
    """Refuses the synchronisation of layers between replicas.

    Raises:
        ValueError: For ``sync_batchnorm=True``.
    """
    if layer_sync is not None:
        raise ValueError(
            "sync_batchnorm=True synchronises the replicas of a layer, but each stage has only one, and its BatchNorm"
            " sees the whole batch already. Remove sync_batchnorm=True."
        )


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuses several optimizers, and those that need the loss more than once a step.

    Raises:
        ValueError: Naming their types.
    """
    if len(optimizers) > 1:
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise ValueError(
            f"`configure_optimizers` returned {len(optimizers)} optimizers ({names}), but delayed gradients are applied"
            " with one. Use one optimizer with parameter groups."
        )
    lbfgs = [optimizer for optimizer in optimizers if isinstance(optimizer, LBFGS)]
    if lbfgs:
        raise ValueError(
            f"{type(lbfgs[0]).__name__} evaluates the loss several times in a step, which delayed gradients cannot do."
            " Use an optimizer that needs one gradient a step, such as SGD or AdamW."
        )


def check_ties_outside(root: nn.Module, segments: Sequence[nn.Module]) -> None:
    """Refuses a parameter that a module outside the network shares with a stage before the last.

    Raises:
        ValueError: Naming the parameter and the stage.
    """
    stage_of = {
        id(parameter): stage for stage, segment in enumerate(segments, start=1) for parameter in segment.parameters()
    }
    inside = {id(module) for segment in segments for module in segment.modules()}
    known = {name for segment in segments for name, _ in segment.named_parameters()}
    for module_name, module in root.named_modules():
        if id(module) in inside:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            stage = stage_of.get(id(parameter), len(segments))
            where = f"{module_name}.{name}" if module_name else name
            if stage < len(segments) and where not in known:
                raise ValueError(
                    f"The parameter {where!r} is tied to one of stage {stage}, but lies outside the network and so on"
                    f" stage {len(segments)}. Untie it, or make its module part of the network (`configure_stages`) and"
                    " keep both in one stage (`split_points`)."
                )


def check_compilable(network: Network) -> None:
    """Refuses to compile a network that runs its own code in every stage.

    Raises:
        ValueError: Naming it.
    """
    if not network.chain.compilable:
        raise ValueError(
            f"The network ({describe(network.target_name)}) cannot be traced and runs its own code in every stage,"
            " which torch.compile cannot follow. Leave `compile` out and compile its layers in your module"
            " (`layer.compile()`), or return its layers from `configure_stages()`."
        )


def describe(target_name: str) -> str:
    """How the user's step calls the network of that name."""
    return f"`self.{target_name}`" if target_name else "`self(...)`"


def no_call_of(target_name: str) -> str:
    """The message for a training step that does not call the network of that name."""
    return (
        f"`training_step` did not call the network ({describe(target_name)}). Call it exactly once in every training"
        " step, by this name; a step that calls its layers one by one should call the module that holds them."
    )


def check_call(network: Network, calls: int, inputs: Sequence[Tensor]) -> None:
    """Refuses a call of the network, in a training step, that its stages could not answer.

    Args:
        network: The network.
        calls: How many times this step has called it, this call included.
        inputs: The tensors of this call.

    Raises:
        RuntimeError: For a second call, a call without gradients, or an input that requires one.
    """
    name = describe(network.target_name)
    if calls > 1:
        raise RuntimeError(
            f"The network ({name}) was called {calls} times in one training step, but its stages do one"
            " forward a batch. Concatenate the inputs along the batch dimension, call it once and split the output."
        )
    if not torch.is_grad_enabled():
        raise RuntimeError(
            f"The network ({name}) was called under `torch.no_grad` in a training step. Call it with"
            " gradients, exactly once; a second network without gradients should be another module."
        )
    if any(tensor.requires_grad for tensor in inputs):
        raise RuntimeError(
            f"An input of the network ({name}) requires a gradient: something before it would be trained,"
            " but its gradient ends at the first stage. Make those layers part of the network (`configure_stages`), or"
            " detach the input."
        )


def check_step(network: Network, module: Any, calls: int, output: Any, backward_ran: bool) -> None:
    """Refuses a training step that has ended without what every batch needs.

    Args:
        network: The network.
        module: The LightningModule.
        calls: How many times the step has called the network.
        output: What the step returned.
        backward_ran: Whether ``manual_backward`` was called; of no interest in automatic optimization.

    Raises:
        RuntimeError: Without a call of the network, a loss, or a backward.
    """
    if not calls:
        raise RuntimeError(no_call_of(network.target_name))
    step = f"`{type(module).__name__}.training_step`"
    if module.automatic_optimization and output is None:
        raise RuntimeError(
            f"{step} returned None, but the other stages cannot skip a batch. Return the loss for every batch,"
            " multiplied by 0 where it should not count."
        )
    if not module.automatic_optimization and not backward_ran:
        raise RuntimeError(
            f"{step} ended without `self.manual_backward(loss)`, which every batch needs once. Call it exactly once,"
            " and not `loss.backward()`."
        )


def check_one_step(number: int, before: int | None, optimizers: Sequence[Optimizer]) -> None:
    """Refuses an optimizer whose step runs the training step several times, as sharpness-aware minimisation does.

    Args:
        number: Of the batch whose training step is about to run.
        before: Of that whose training step ran before it.
        optimizers: There is one.

    Raises:
        RuntimeError: Naming the optimizer.
    """
    if number == before:
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise RuntimeError(
            f"{names} runs the training step a second time for the same batch (number {number}), but in stages a batch"
            " has one forward and one backward. Use an optimizer that calls its closure once."
        )


def check_sampler(loader: Any) -> None:
    """Refuses a sampler that would leave out a part of the data: one process reads for all.

    Raises:
        ValueError: Naming the number of replicas.
    """
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    for sampler in samplers:
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise ValueError(
                f"A data loader has a {type(sampler).__name__} with num_replicas={sampler.num_replicas}, which gives"
                " each process a part of the data, but here one process reads for all stages. Leave the sampler out"
                " (shuffle=True), or give it num_replicas=1, rank=0."
            )


def warn_of_kept_tensors(segment: nn.Module, stage: int) -> None:
    """Warns of tensors that a forward has left on layers: the loss, in another process, does not see them.

    Args:
        segment: The layers of a stage before the last, after a training forward.
        stage: Its number.
    """
    kept = [
        f"{name}.{attribute}".lstrip(".")
        for name, module in segment.named_modules()
        for attribute, value in vars(module).items()
        # What a hook makes of other parameters before each forward is no result of it, nor is an RNN's list of them.
        if attribute != "_flat_weights" and not {f"{attribute}_g", f"{attribute}_orig"} & module._parameters.keys()
        if any(isinstance(item, Tensor) and item.grad_fn is not None for item in _items(value))
    ]
    if kept:
        warnings.warn(
            f"Stage {stage} leaves tensors with gradients in attributes of its layers ({', '.join(kept[:3])}"
            f"{', ...' if len(kept) > 3 else ''}). The loss is computed in another process, which does not see them: if"
            " it uses them, return them from the network's forward, or train in one process (`devices=1`).",
            stacklevel=2,
        )


def _items(value: Any) -> Iterable[Any]:
    if type(value) is dict:
        return value.values()
    return value if isinstance(value, list | tuple) else [value]


def check_foreign_grads(root: nn.Module, owner: Mapping[str, int], stage: int) -> None:
    """Refuses a loss that uses the weights of other stages directly: it would use stale ones.

    Raises:
        RuntimeError: Naming the parameter and its stage.
    """
    for name, parameter in root.named_parameters():
        if owner[name] != stage and parameter.grad is not None:
            raise RuntimeError(
                f"The loss uses the parameter {name!r} directly, but its weights live on stage {owner[name]}, in"
                " another process. For an L2 penalty use the optimizer's `weight_decay`."
            )
