"""The tokens route: self-attentions that remember a condition's keys and values, and look at remembered ones.

A condition's tokens go through the frozen denoiser once, in a pass of their own, and every self-attention keeps
their keys and values (as the attention itself sees them, after norms and rotary positions). In denoising, each
appends what it kept to its own keys and values. Because condition tokens never see the picture, that equals one
pass over all tokens with a mask. The stock attention processors run unchanged: what they ask torch to compute
is intercepted, so that masks, IP-Adapters and torch.compile work as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loco_diffusion.control.rows import spread

_SOFTMAX = torch.nn.functional.scaled_dot_product_attention
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")


@dataclass
class Memory:
    """What the self-attentions keep of one batch of conditions.

    Attributes:
        layers: by the attention's number: keys and values, each (B, heads, tokens, head size), or the sums
            (B, heads, ...) that a linear attention makes of them.
    """

    layers: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in layer)

    @property
    def reusable(self) -> bool:
        """Whether it serves later calls: it has no graph, which serves one backward pass only."""
        tensors = [tensor for layer in self.layers.values() for tensor in layer]
        return not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors)

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Memory:
        """The same elsewhere, or with fewer digits; attentions bring each layer back when they need it."""
        layers = self.layers.items()
        return Memory({number: tuple(t.to(device, dtype) for t in layer) for number, layer in layers})


@dataclass(frozen=True)
class Recall:
    """A memory that denoising looks at.

    Attributes:
        memory: of the condition.
        bias: what is added to the logits of the condition's keys, (B,) or (1,), float32: the logarithm of the
            strength, -inf where a row does not see it; None: 0.
    """

    memory: Memory
    bias: Tensor | None = None


class SelfAttentions:
    """The self-attentions of a denoiser, with a switch between their own work, remembering and recalling.

    Args:
        modules: in any fixed order, which is that of the numbers in a memory.
        linear: whether they sum up keys and values (Sana) instead of comparing each key with each query.
        copies: how often a pipeline repeats the batch for classifier-free guidance, see `rows.spread`.
    """

    def __init__(self, modules: Sequence[nn.Module], linear: bool, copies: Callable[[], int]) -> None:
        self._modules = modules
        self._linear = linear
        self._copies = copies
        self._memory: Memory | None = None
        self._tokens = 0
        self._recalls: tuple[Recall, ...] = ()
        self._originals = [vars(module).get("forward") for module in modules]  # offloading sets one, too
        for number, module in enumerate(modules):
            module.forward = self._switched(number, module.forward)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the attentions back as they were."""
        for module, original in zip(self._modules, self._originals, strict=True):
            del module.forward
            if original is not None:
                module.forward = original

    @contextmanager
    def remembering(self, memory: Memory, tokens: int) -> Iterator[None]:
        """In the block, keys and values are kept.

        Args:
            memory: that they are written into.
            tokens: how many of a denoiser's last tokens are the condition's; 0: all.
        """
        before = self._memory, self._tokens, self._recalls
        self._memory, self._tokens, self._recalls = memory, tokens, ()
        try:
            yield
        finally:
            self._memory, self._tokens, self._recalls = before

    @contextmanager
    def recalling(self, recalls: Sequence[Recall]) -> Iterator[None]:
        """In the block, remembered keys and values are appended."""
        before = self._memory, self._tokens, self._recalls
        self._memory, self._recalls = None, tuple(recalls)
        try:
            yield
        finally:
            self._memory, self._tokens, self._recalls = before

    @property
    def resume(self) -> Callable[[], Any]:
        """A context that brings the present state back, for layers that are computed again later."""
        memory, tokens, recalls = self._memory, self._tokens, self._recalls
        # What is computed again must not be kept: the first tensors are those with gradients.
        again = Memory()
        return lambda: self.recalling(recalls) if memory is None else self.remembering(again, tokens)

    def _switched(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def switched(*args: Any, **kwargs: Any) -> Any:
            if self._memory is not None:
                with _Remembering(self._memory, number, self._tokens, self._linear):
                    return forward(*args, **kwargs)
            if self._recalls:
                layers = [(recall.memory.layers[number], recall.bias) for recall in self._recalls]
                with _Recalling(layers, self._copies, self._linear):
                    return forward(*args, **kwargs)
            return forward(*args, **kwargs)

        return switched


class _Remembering(TorchFunctionMode):
    """Keeps what one attention attends to."""

    def __init__(self, memory: Memory, number: int, tokens: int, linear: bool) -> None:
        super().__init__()
        self.memory, self.number, self.tokens, self.linear = memory, number, tokens, linear

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is _SOFTMAX:
            call = dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {})
            pair = call["key"], call["value"]
            self.memory.layers[self.number] = tuple(t[:, :, -self.tokens :] for t in pair)
        elif self.linear and _is_product(func, result) and self.number not in self.memory.layers:
            self.memory.layers[self.number] = (result,)  # value x key, the first of its two products
        return result


class _Recalling(TorchFunctionMode):
    """Appends what was kept to what one attention attends to."""

    def __init__(
        self,
        layers: Sequence[tuple[tuple[Tensor, ...], Tensor | None]],
        copies: Callable[[], int],
        linear: bool,
    ) -> None:
        super().__init__()
        self.layers, self.copies, self.linear = layers, copies, linear

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _SOFTMAX:
            call = dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {})
            return func(**self._appended(call))
        result = func(*args, **(kwargs or {}))
        if self.linear and _is_product(func, result):
            self.linear = False  # only the first product, value x key, sums over the keys
            for (sums,), bias in self.layers:
                factor = 1.0 if bias is None else self._like(bias.exp().view(-1, 1, 1, 1), result)
                result = result + factor * self._like(sums, result)
        return result

    def _appended(self, call: dict[str, Any]) -> dict[str, Any]:
        key, value = call["key"], call["value"]
        kept = [[self._like(t, key).expand(len(key), -1, -1, -1) for t in pair] for pair, _ in self.layers]
        call["attn_mask"] = self._mask(call, [len_of(pair[0]) for pair in kept])
        call["key"] = torch.cat([key, *(pair[0] for pair in kept)], dim=2)
        call["value"] = torch.cat([value, *(pair[1] for pair in kept)], dim=2)
        return call

    def _mask(self, call: dict[str, Any], lengths: list[int]) -> Tensor | None:
        mask, key = call.get("attn_mask"), call["key"]
        biases = [bias for _, bias in self.layers]
        if mask is None and all(bias is None for bias in biases):
            return None
        if mask is None:
            mask = key.new_zeros(1, 1, 1, len_of(key))
        elif mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=key.dtype).masked_fill(~mask, -torch.inf)
        parts = [mask]
        for bias, length in zip(biases, lengths, strict=True):
            logits = key.new_zeros(1, 1, 1, 1) if bias is None else self._like(bias.view(-1, 1, 1, 1), key)
            parts.append(logits.expand(-1, -1, -1, length))
        shape = [max(part.shape[axis] for part in parts) for axis in range(3)]
        return torch.cat([part.to(key.dtype).expand(*shape, -1) for part in parts], dim=-1)

    def _like(self, kept: Tensor, like: Tensor) -> Tensor:
        return spread(kept.to(like), len(like), self.copies)


def _is_product(func: Any, result: Any) -> bool:
    """Whether this is one of the two products of a linear attention, and not one of an adapter's."""
    return func is torch.matmul and result.ndim == 4


def len_of(keys: Tensor) -> int:
    """The number of keys (B, heads, keys, head size)."""
    return keys.shape[2]
