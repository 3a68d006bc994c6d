"""How those modules of ``torch.nn`` that are loops over layers call their layers, in a form that can be traced.

Their own ``forward`` looks at the values of masks, which a trace cannot do; here the looking is one recorded step. The
layers themselves are called as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import transformer


def encoder_masks(
    src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool | None, batch_first: bool
) -> tuple[Tensor | None, Tensor | None, bool]:
    """Return the two masks and the hint that ``nn.TransformerEncoder`` passes to its layers."""
    padding = F._canonical_mask(
        mask=padding,
        mask_name="src_key_padding_mask",
        other_type=F._none_or_dtype(mask),
        other_name="mask",
        target_type=src.dtype,
    )
    mask = F._canonical_mask(
        mask=mask, mask_name="mask", other_type=None, other_name="", target_type=src.dtype, check_other=False
    )
    return mask, padding, causal_hint(src, mask, is_causal, batch_first)


def causal_hint(sequence: Tensor, mask: Tensor | None, is_causal: bool | None, batch_first: bool) -> bool:
    """Return whether ``mask`` is the causal one, as both containers find out."""
    length = transformer._get_seq_len(sequence, batch_first)
    return transformer._detect_is_causal_mask(mask, is_causal, length)


def _recorded(function: Callable[..., Any], sequence: Any, *args: Any) -> Any:
    """A call that is one step of the recording, whatever it looks at."""
    return sequence.tracer.create_proxy("call_function", function, (sequence, *args), {})


def _encoder(
    module: nn.TransformerEncoder,
    src: fx.Proxy,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: Any = None,
) -> Any:
    batch_first = module.layers[0].self_attn.batch_first
    masks = _recorded(encoder_masks, src, mask, src_key_padding_mask, is_causal, batch_first)
    output: Any = src
    for layer in module.layers:
        output = layer(output, src_mask=masks[0], is_causal=masks[2], src_key_padding_mask=masks[1])
    return output if module.norm is None else module.norm(output)


def _decoder(module: nn.TransformerDecoder, *args: Any, **kwargs: Any) -> Any:
    given = _arguments(nn.TransformerDecoder.forward, module, args, kwargs)
    output, memory, hint = given.pop("tgt"), given.pop("memory"), given.pop("tgt_is_causal")
    batch_first = module.layers[0].self_attn.batch_first
    hint = _recorded(causal_hint, output, given["tgt_mask"], hint, batch_first)
    for layer in module.layers:
        output = layer(output, memory, tgt_is_causal=hint, **given)
    return output if module.norm is None else module.norm(output)


def _both(module: nn.Transformer, *args: Any, **kwargs: Any) -> Any:
    given = _arguments(nn.Transformer.forward, module, args, kwargs)
    source, padding = given.pop("src"), given.pop("src_key_padding_mask")
    mask, is_causal = given.pop("src_mask"), given.pop("src_is_causal")
    memory = module.encoder(source, mask=mask, src_key_padding_mask=padding, is_causal=is_causal)
    return module.decoder(given.pop("tgt"), memory, **given)


def _arguments(forward: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(forward).bind(module, *args, **kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "self"}


# By exact type: a subclass may have another forward.
CONTAINERS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.TransformerEncoder: _encoder,
    nn.TransformerDecoder: _decoder,
    nn.Transformer: _both,
}
