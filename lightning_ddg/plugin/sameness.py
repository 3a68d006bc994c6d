"""Whether all ranks were given the same: arguments, the Trainer's options, the module and the optimizer.

Each rank trains a stage by what it was given itself. Where that differs, as in a script that reads another file on
another host, the stages would train another model than anybody has asked for, and nothing would look wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_ddg.plugin import host
from lightning_ddg.plugin.host import LightningModule, Trainer
from lightning_ddg.plugin.site import Site

_TRAINER = (
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "max_epochs", "min_epochs", "max_steps",
    "min_steps", "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches",
    "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "overfit_batches",
    "reload_dataloaders_every_n_epochs", "precision",
)  # fmt: skip
#: What a rank may have for itself.
_OWN = {"timeout"}
_SHOWN = 5
_LONGEST = 80

Facts = dict[str, str]


def facts_of_run(site: Site) -> Facts:
    """Return what a rank knows before the network is cut."""
    options = {name: value for name, value in asdict(site.options).items() if name not in _OWN}
    facts = {f"the strategy's `{name}`": _text(value) for name, value in options.items()}
    facts |= {f"the Trainer's `{name}`": _text(getattr(site.trainer, name, None)) for name in _TRAINER}
    facts |= {f"the version of {name}": number for name, number in _versions().items()}
    facts["what the Trainer runs"] = repr(str(site.trainer.state.fn))
    facts["`automatic_optimization`"] = repr(site.module.automatic_optimization)
    facts |= {f"the type of {_called(name)}": type(child).__name__ for name, child in site.module.named_modules()}
    facts |= {f"the parameter {name!r}": _tensor(tensor) for name, tensor in site.module.named_parameters()}
    facts |= {f"the buffer {name!r}": _tensor(tensor) for name, tensor in site.module.named_buffers()}
    return facts


def facts_of_optimizers(trainer: Trainer, module: LightningModule, optimizers: Sequence[Optimizer]) -> Facts:
    """Return what a rank knows of the optimizers and the learning rates' schedulers."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    facts = {"the number of optimizers": str(len(optimizers))}
    for optimizer in optimizers:
        facts["the optimizer"] = type(optimizer).__name__
        for index, group in enumerate(optimizer.param_groups):
            where = f"of the optimizer's group {index}"
            facts[f"the parameters {where}"] = ", ".join(names.get(id(one), "?") for one in group["params"])
            facts |= {f"`{key}` {where}": value for key, value in _plain(group).items()}
    for index, config in enumerate(trainer.lr_scheduler_configs):
        where = f"of the scheduler {index}"
        facts[f"the type {where}"] = type(config.scheduler).__name__
        settings = {key: getattr(config, key) for key in ("interval", "frequency", "monitor", "reduce_on_plateau")}
        state = config.scheduler.state_dict() if hasattr(config.scheduler, "state_dict") else {}
        facts |= {f"`{key}` {where}": value for key, value in {**_plain(state), **_plain(settings)}.items()}
    return facts


def differences(facts: Sequence[Facts]) -> list[str]:
    """Return what differs between rank 0 and others, from the facts of each rank."""
    found = []
    for rank, others in enumerate(facts[1:], start=1):
        for name in dict.fromkeys((*facts[0], *others)):
            mine, theirs = (_short(one.get(name, "absent")) for one in (facts[0], others))
            if facts[0].get(name) != others.get(name):
                found.append(f"{name} is {mine} on rank 0, but {theirs} on rank {rank}")
    return found


def check_same_on_all_ranks(facts: Sequence[Facts]) -> None:
    """Refuse ranks that were not given the same.

    Args:
        facts: What each rank knows.

    Raises:
        ValueError: On every rank, naming what differs, with both values.
    """
    found = differences(facts)
    if found:
        more = f" (and {len(found) - _SHOWN} more differences)" if len(found) > _SHOWN else ""
        raise ValueError(
            f"The ranks were not given the same: {'; '.join(found[:_SHOWN])}{more}. Each rank trains its stage by what"
            " it was given itself, and together they would train a model that nobody asked for. Give all ranks the same"
            " arguments, module and optimizer."
        )


def _versions() -> dict[str, str]:
    try:
        own = version("lightning-ddg")
    except PackageNotFoundError:
        own = "not installed"
    return {"torch": torch.__version__, host.HOST: host.part("pytorch").__version__, "lightning_ddg": own}


def _text(value: object) -> str:
    """Its text without where it lies in memory, which each process has for itself."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _called(name: str) -> str:
    return f"the module {name!r}" if name else "the LightningModule"


def _tensor(tensor: Tensor) -> str:
    if is_lazy(tensor):
        return "not initialised"
    kind = str(tensor.dtype).removeprefix("torch.")
    trained = ", frozen" if isinstance(tensor, nn.Parameter) and not tensor.requires_grad else ""
    return f"{kind} of the shape {tuple(tensor.shape)}{trained}"


def _plain(values: Mapping[str, Any]) -> Facts:
    """What can be compared by its text: numbers, texts, and lists of them."""
    facts = {}
    for key, value in values.items():
        value = value.tolist() if isinstance(value, Tensor) else value
        if key != "params" and _is_plain(value):
            facts[key] = repr(value)
    return facts


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
