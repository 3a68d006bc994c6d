"""A GPT lives here, written as people write it by hand; the network and how it is trained may be changed here.

Pre-norm blocks, learned positions and GELU as in Radford et al., *Language Models are Unsupervised Multitask Learners*,
2019; the head has weights of its own.
"""

from __future__ import annotations

import math

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from recipes.optimizers import Name, make_optimizer

Batch = tuple[Tensor, Tensor]  # inputs and targets, both (batch, context): the targets are one token ahead

FLOOR = 0.1  # the learning rate ends at this part of its peak


class SelfAttention(nn.Module):
    """Causal self-attention with several heads.

    Args:
        width: Size of a token's vector.
        heads: Number of heads; each takes ``width / heads`` of it.
        dropout: Probability of leaving out a weight of the attention, or an output.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, t, width)`` to the same shape; position ``i`` sees positions up to ``i``."""
        b, t, c = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = q.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        k = k.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        v = v.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = self.out(y.transpose(1, 2).reshape(b, t, c))
        return functional.dropout(y, self.dropout, training=self.training)


class Block(nn.Module):
    """Attention, then two linear layers, each normalised before and added to what came in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, t, width)`` to the same shape."""
        x = x + self.attention(self.norm1(x))
        y = self.down(functional.gelu(self.up(self.norm2(x))))
        return x + functional.dropout(y, self.dropout, training=self.training)


class GPT(nn.Module):
    """A decoder-only transformer.

    Args:
        vocabulary: Number of tokens.
        n_layers: Number of blocks.
        width: Size of a token's vector.
        heads: Attention heads of a block.
        context: The longest text that it takes, in tokens.
        dropout: Of embeddings, attention and blocks, while training.

    Raises:
        ValueError: If ``width`` is no multiple of ``heads``.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        n_layers: int = 12,
        width: int = 384,
        heads: int = 6,
        context: int = 256,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is no multiple of heads={heads}: give each head the same share")
        self.context = context
        self.dropout = dropout
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self._initialize(n_layers)

    def _initialize(self, n_layers: int) -> None:
        """Start as GPT-2 does: small weights, and smaller ones where a block adds to the residual stream."""
        nn.init.normal_(self.position, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                adds = name.endswith(("attention.out", "down"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * n_layers) if adds else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(batch, t)`` to the logits of the token after each, ``(batch, t, vocabulary)``."""
        _, t = tokens.shape
        assert t <= self.context, f"a text of {t} tokens is longer than context={self.context}: give a longer context"
        x = self.token(tokens) + self.position[:t]
        x = functional.dropout(x, self.dropout, training=self.training)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def warmup_then_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """The factor of the learning rate at a step: a linear rise to 1, then half a cosine down to ``FLOOR``.

    Loshchilov and Hutter, *SGDR*, ICLR 2017, equation 5, without restarts; the rise is GPT-2's and GPT-3's.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))


class LanguageModel(LightningModule):
    """Trains a network to say which token comes next.

    The weights of the linear layers alone decay; the learning rate warms up, then falls along a cosine over all steps
    of the fit.

    Args:
        network: Maps tokens ``(batch, t)`` to logits ``(batch, t, vocabulary)``.
        lr: The learning rate after the warm-up.
        weight_decay: Of the weights of linear layers.
        warmup_steps: Steps of the warm-up.
        optimizer: ``"adamw"``, or one that bears delayed gradients better: ``"nadam"``, ``"muon"`` or ``"soap"``, see
            ``recipes/optimizers.py``.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        optimizer: Name = "adamw",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="network")
        self.network = network
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.optimizer = optimizer
        self.val_mean = MeanMetric()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(batch, t)`` to the logits of the token after each, ``(batch, t, vocabulary)``."""
        return self.network(tokens)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean cross-entropy per token, in nats."""
        inputs, targets = batch
        return functional.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.val_mean(loss, weight=len(batch[0]))
        self.log("val_loss", self.val_mean, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.log("val_perplexity", self.val_mean.compute().exp(), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        linear = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        chosen = set(linear)
        others = [parameter for parameter in self.parameters() if parameter not in chosen]
        total = int(self.trainer.estimated_stepping_batches)
        # The last gives the logits, which Muon is not for.
        optimizer = make_optimizer(self.optimizer, linear[:-1], linear[-1:], others, self.lr, self.weight_decay, total)
        schedule = LambdaLR(optimizer, lambda step: warmup_then_cosine(step, self.warmup_steps, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
