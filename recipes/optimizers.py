"""Optimizers that bear delayed gradients live here, with the settings under which they do.

AdamW is what they are compared with. NAdam has the momentum and the schedule of Ajanthan et al. (arXiv 2505.01099, ICML
2025). Muon orthogonalises the momentum of matrices (K. Jordan, 2024; its step is scaled as in arXiv 2502.16982, so that
AdamW's learning rates suit it), and what is no matrix has AdamW. SOAP is Adam in the eigenbasis of Shampoo's
preconditioner (arXiv 2409.11321), of which basis rotation for pipelines (arXiv 2602.03515) is a form. The last two are
`pytorch-optimizer`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from pytorch_optimizer import SOAP, Muon
from torch import nn
from torch.optim import AdamW, NAdam, Optimizer

Name = Literal["adamw", "nadam", "muon", "soap"]

#: Steps times NAdam's ``momentum_decay``: that of Ajanthan et al., 50,000 steps at 0.004.
RISE = 200.0


def make_optimizer(
    name: Name,
    hidden: Sequence[nn.Parameter],
    decayed: Sequence[nn.Parameter],
    others: Sequence[nn.Parameter],
    lr: float,
    weight_decay: float,
    steps: int,
) -> Optimizer:
    """Make an optimizer of a whole network.

    Args:
        name: Which one.
        hidden: Matrices between hidden layers: Muon's; with weight decay.
        decayed: Other parameters with weight decay, such as the last layer's weights.
        others: Parameters without weight decay.
        lr: The learning rate.
        weight_decay: Taken from the weights themselves, times the learning rate, as AdamW does.
        steps: Of the whole training. NAdam's momentum rises over all of it: its ``momentum_decay`` is 200 / ``steps``,
            as with the default of 0.004 a short training would never see a high momentum.

    Raises:
        ValueError: If there is no such optimizer.
    """
    groups = [
        {"params": [*hidden, *decayed], "weight_decay": weight_decay},
        {"params": list(others), "weight_decay": 0.0},
    ]
    if name == "adamw":
        return AdamW(groups, lr=lr, betas=(0.9, 0.99))
    if name == "nadam":
        options = {"momentum_decay": RISE / steps, "decoupled_weight_decay": True}
        return NAdam(groups, lr=lr, betas=(0.99, 0.999), **options)
    if name == "soap":
        return SOAP(groups, lr=lr, betas=(0.95, 0.95), precondition_frequency=10)
    if name == "muon":
        by_adam = {"use_muon": False, "lr": lr, "betas": (0.9, 0.99), "eps": 1e-8}
        return Muon(
            [
                {"params": list(hidden), "use_muon": True, "lr": lr, "weight_decay": weight_decay},
                {"params": list(decayed), "weight_decay": weight_decay, **by_adam},
                {"params": list(others), "weight_decay": 0.0, **by_adam},
            ],
            use_adjusted_lr=True,
        )
    raise ValueError(f"optimizer={name!r}: give one of {', '.join(map(repr, get_args(Name)))}.")
