"""The tokens route: self-attentions that remember a condition's keys and values, and look at remembered ones.

A condition's tokens go through the frozen denoiser once, in a pass of their own, and every self-attention keeps
their keys and values (as the attention itself sees them, after norms and rotary positions). In denoising, each
appends what it kept to its own keys and values. Because condition tokens never see the picture, that equals one
pass over all tokens with a mask. The stock attention processors run unchanged: what they ask torch to compute
is intercepted, so that masks, IP-Adapters and torch.compile work as ever. Attentions that ask it for something
else, with another backend or in slices, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loco_diffusion.control.rows import Rows
from loco_diffusion.errors import UserError

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


def out_of_memory(nbytes: int) -> UserError:
    """The error of a condition whose keys and values take so many bytes."""
    return UserError(
        f"The memory does not suffice for the condition, whose keys and values take about {nbytes / 2**20:.1f} MB: "
        'keep them elsewhere, with Controller(pipe, cache=CacheSettings(device="cpu", dtype=torch.bfloat16)), give '
        "a smaller map, or use an adapter trained with a greater TokensConfig(stride=...)."
    )


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
        rows: of the denoiser's batch.
    """

    def __init__(self, modules: Sequence[nn.Module], linear: bool, rows: Rows) -> None:
        self._linear = linear
        self._rows = rows
        self._memory: Memory | None = None
        self._tokens = 0
        self._recalls: tuple[Recall, ...] = ()
        self._open: list[_Interception] = []
        # Hooks and not another forward, because offloading and casting replace that, and put back the one they met.
        self._hooks: list[Any] = []
        for number, module in enumerate(modules):
            self._hooks.append(module.register_forward_pre_hook(partial(self._before, number)))
            self._hooks.append(module.register_forward_hook(self._after, always_call=True))

    def __len__(self) -> int:
        return len(self._hooks) // 2

    def remove(self) -> None:
        """Give the attentions back as they were."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def remembering(self, memory: Memory, tokens: int) -> Iterator[None]:
        """In the block, keys and values are kept.

        Args:
            memory: that they are written into.
            tokens: how many of a denoiser's last tokens are the condition's; 0: all.

        Raises:
            UserError: in the block, when an attention runs in a way that cannot be intercepted.
        """
        with self._state(memory, tokens, ()):
            yield

    @contextmanager
    def recalling(self, recalls: Sequence[Recall]) -> Iterator[None]:
        """In the block, remembered keys and values are appended.

        Raises:
            UserError: in the block, for what `remembering` raises, or when the memory does not suffice.
        """
        with self._state(None, 0, tuple(recalls)):
            yield

    @contextmanager
    def _state(self, memory: Memory | None, tokens: int, recalls: tuple[Recall, ...]) -> Iterator[None]:
        before = self._memory, self._tokens, self._recalls
        self._memory, self._tokens, self._recalls = memory, tokens, recalls
        try:
            yield
        finally:
            self._memory, self._tokens, self._recalls = before
            while self._open:  # torch calls no hook after a KeyboardInterrupt
                self._open.pop().__exit__(None, None, None)

    @property
    def resume(self) -> Callable[[], Any]:
        """A context that brings the present state back, for layers that are computed again later."""
        memory, tokens, recalls = self._memory, self._tokens, self._recalls
        # What is computed again must not be kept: the first tensors are those with gradients.
        again = Memory()
        return lambda: self.recalling(recalls) if memory is None else self.remembering(again, tokens)

    def _before(self, number: int, module: nn.Module, args: Any) -> None:
        interception: _Interception
        if self._memory is not None:
            interception = _Remembering(self._linear, self._memory, number, self._tokens)
        elif self._recalls:
            interception = _Recalling(self._linear, self._recalls, number, self._rows)
        else:
            return
        interception.__enter__()
        self._open.append(interception)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._open:
            return
        interception = self._open.pop()
        interception.__exit__(None, None, None)
        if output is not None and not interception.met:  # None: it has failed
            raise UserError(
                "The denoiser's attention does not run through torch's scaled_dot_product_attention, in which the "
                "tokens route shows it the condition: call denoiser.reset_attention_backend(), turn off attention "
                "slicing and caching, or use an adapter of the encoder route."
            )


class _Interception(TorchFunctionMode):
    """Meets the first product of one attention; an IP-Adapter has others after it."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Adapters in an attention multiply, too, but not by head.
        product = func is torch.matmul and args[0].ndim == 4 if self.linear else func is _SOFTMAX
        if self.met or not product:
            return func(*args, **(kwargs or {}))
        self.met = True
        if self.linear:  # value x key, the first of its two products, sums over the keys
            return self._meet_sums(func(*args, **(kwargs or {})))
        return self._meet_keys(dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {}))

    def _meet_sums(self, sums: Tensor) -> Tensor:
        """What linear attention shall go on with."""
        raise NotImplementedError

    def _meet_keys(self, call: dict[str, Any]) -> Tensor:
        """The output of softmax attention for the arguments that torch's function is called with."""
        raise NotImplementedError


class _Remembering(_Interception):
    """Keeps what one attention attends to."""

    def __init__(self, linear: bool, memory: Memory, number: int, tokens: int) -> None:
        super().__init__(linear)
        self.memory, self.number, self.tokens = memory, number, tokens

    def _meet_sums(self, sums: Tensor) -> Tensor:
        self.memory.layers[self.number] = (sums,)
        return sums

    def _meet_keys(self, call: dict[str, Any]) -> Tensor:
        pair = call["key"], call["value"]
        self.memory.layers[self.number] = tuple(t[:, :, -self.tokens :] for t in pair)
        return _SOFTMAX(**call)


class _Recalling(_Interception):
    """Appends what was kept to what one attention attends to."""

    def __init__(self, linear: bool, recalls: Sequence[Recall], number: int, rows: Rows) -> None:
        super().__init__(linear)
        self.recalls, self.number, self.rows = recalls, number, rows

    def _meet_sums(self, sums: Tensor) -> Tensor:
        total = sums
        for recall in self.recalls:
            (kept,) = recall.memory.layers[self.number]
            factor = 1.0 if recall.bias is None else self._bias(recall.bias, sums).exp()
            total = total + factor * self._like(kept, sums)
        return total

    def _meet_keys(self, call: dict[str, Any]) -> Tensor:
        try:
            return _SOFTMAX(**self._appended(call))
        except torch.OutOfMemoryError as error:
            raise out_of_memory(sum(recall.memory.nbytes for recall in self.recalls)) from error

    def _appended(self, call: dict[str, Any]) -> dict[str, Any]:
        key, value = call["key"], call["value"]
        pairs = [recall.memory.layers[self.number] for recall in self.recalls]
        kept = [[self._like(t, key).expand(len(key), -1, -1, -1) for t in pair] for pair in pairs]
        call["attn_mask"] = self._mask(call, [len_of(pair[0]) for pair in kept])
        call["key"] = torch.cat([key, *(pair[0] for pair in kept)], dim=2)
        call["value"] = torch.cat([value, *(pair[1] for pair in kept)], dim=2)
        return call

    def _mask(self, call: dict[str, Any], lengths: list[int]) -> Tensor | None:
        mask, key = call.get("attn_mask"), call["key"]
        biases = [recall.bias for recall in self.recalls]
        if mask is None and all(bias is None for bias in biases):
            return None
        if mask is None:
            mask = key.new_zeros(1, 1, 1, len_of(key))
        elif mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=key.dtype).masked_fill(~mask, -torch.inf)
        parts = [mask]
        for bias, length in zip(biases, lengths, strict=True):
            logits = key.new_zeros(1, 1, 1, 1) if bias is None else self._bias(bias, key)
            parts.append(logits.expand(-1, -1, -1, length))
        shape = [max(part.shape[axis] for part in parts) for axis in range(3)]
        return torch.cat([part.to(key.dtype).expand(*shape, -1) for part in parts], dim=-1)

    def _bias(self, bias: Tensor, like: Tensor) -> Tensor:
        return self.rows.spread_or_drop(bias.to(like).view(-1, 1, 1, 1), len(like), nothing=-torch.inf)

    def _like(self, kept: Tensor, like: Tensor) -> Tensor:
        return self.rows.spread(kept.to(like), len(like))


def len_of(keys: Tensor) -> int:
    """The number of keys (B, heads, keys, head size)."""
    return keys.shape[2]
