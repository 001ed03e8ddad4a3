"""From the maps of a user to conditions that a denoiser can meet; what was made is kept for the next time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loco_diffusion.adapters.optimizer_steps import optimizer_steps
from loco_diffusion.control import layers
from loco_diffusion.control.adapter import Adapter
from loco_diffusion.control.attention import Memory, Recall, SelfAttentions, out_of_memory
from loco_diffusion.control.conditioning import recomputing
from loco_diffusion.control.encoder import ConditionEncoder, EncoderInput
from loco_diffusion.control.family import Family, Pipeline
from loco_diffusion.control.features import Features
from loco_diffusion.control.joint import JointCondition
from loco_diffusion.control.map_tokens import MapTokens, map_tokens, token_width
from loco_diffusion.control.maps import ConditionMap, map_tensor, resize_map
from loco_diffusion.errors import UserError


@dataclass(frozen=True)
class CacheSettings:
    """Where the keys and values of conditions are kept between denoiser calls.

    Attributes:
        device: None for the denoiser's; "cpu" saves its memory and costs a transfer for each layer and step.
        dtype: None for the denoiser's.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None


DEFAULT_CACHE = CacheSettings()


@dataclass(frozen=True)
class _Kept:
    """Keys and values of a condition, and what they were made of; without a stamp they serve once."""

    memory: Memory
    tokens: Tensor
    stamp: tuple[Any, ...] | None


class Preparation:
    """Makes the conditions of one controller.

    The tokens of each adapter's last map, and on the tokens route its keys and values, are kept and used again
    for the same map; keys and values as long as no weight and no other adapter of the denoiser changes. The text
    of condition passes is kept, too. Changes written into ``parameter.data`` leave no trace: call :meth:`clear`
    after them.
    """

    def __init__(self, family: Family, pipe: Pipeline, denoiser: nn.Module, settings: CacheSettings) -> None:
        self._family = family
        self._pipe = pipe
        self._denoiser = denoiser
        self._settings = settings
        self._maps: dict[str, tuple[Tensor, MapTokens]] = {}
        self._memories: dict[str, _Kept] = {}
        self._text: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values that are kept."""
        return sum(kept.memory.nbytes for kept in self._memories.values())

    def clear(self) -> None:
        """Forget what was kept."""
        self._maps.clear()
        self._memories.clear()
        self._text.clear()

    def forget(self, name: str) -> None:
        """Forget what was kept of one adapter."""
        self._maps.pop(name, None)
        self._memories.pop(name, None)

    def usable(self, name: str, adapter: Adapter, given: ConditionMap | MapTokens) -> Tensor | MapTokens:
        """A map as a tensor, or as tokens, of the right kind for an adapter.

        Raises:
            UserError: it is not.
        """
        info = adapter.info
        if not isinstance(given, MapTokens):
            multiple = self._family.token_pixels(self._pipe) * (info.tokens.stride if info.tokens else 1)
            return map_tensor(given, name, multiple)
        wanted = info.encoder.input if info.encoder else "latents"
        if given.input != wanted:
            raise UserError(f"The tokens for {name!r} are of {given.input}, but its encoder reads {wanted}.")
        width = token_width(self._family, self._pipe, wanted)
        if given.tokens.shape[-1] != width:
            raise UserError(
                f"The tokens for {name!r} are {given.tokens.shape[-1]} wide, but its encoder reads {width}; make "
                "them with map_tokens for this pipeline."
            )
        return given

    def features(
        self,
        name: str,
        encoder: ConditionEncoder,
        given: Tensor | MapTokens,
        strength: float,
        keep: Tensor | None,
    ) -> Features:
        """A condition of the encoder route.

        Args:
            name: of the adapter.
            encoder: its encoder; it is moved to where the pipeline computes.
            given: from `usable`.
            strength: a factor on the features.
            keep: (B,) bool, or None for all.
        """
        tokens = self._tokens(name, given, encoder.config.input)
        device = self._pipe._execution_device
        with torch.inference_mode(False):  # parameters moved in inference mode could never be trained
            encoder.to(device)
        source = tokens.as_map() if self._family.spatial else tokens.tokens
        features = strength * encoder(source.to(device))
        if keep is not None:
            features = features * keep.to(device).view(-1, *[1] * (features.ndim - 1))
        return Features(features, tokens.grid)

    def recall(
        self,
        name: str,
        adapter: Adapter,
        attentions: SelfAttentions,
        given: Tensor | MapTokens,
        strength: float,
        keep: Tensor | None,
        unconditional: bool,
    ) -> Recall:
        """A condition of the tokens route; arguments as for `features`.

        Args:
            unconditional: whether the unconditional half of guidance sees the condition.

        Raises:
            UserError: the memory does not suffice for the condition, or an attention cannot show it.
        """
        tokens, stride = self._condition_tokens(name, adapter, given)
        kept = self._memories.pop(name, None)
        if (
            kept is None
            or not torch.equal(kept.tokens, tokens.tokens)
            or kept.stamp != self._stamp(tokens, stride)
        ):
            memory = self._condition_pass(name, attentions, tokens, stride)
            kept = _Kept(memory, tokens.tokens, self._stamp(tokens, stride) if memory.reusable else None)
        if kept.stamp is not None:
            self._memories[name] = kept
        return Recall(kept.memory, _bias(strength, keep, unconditional))

    def joint(
        self,
        name: str,
        adapter: Adapter,
        given: Tensor | MapTokens,
        strength: float,
        keep: Tensor | None,
        unconditional: bool,
    ) -> JointCondition:
        """A condition of the tokens route that sees the picture; arguments as for `recall`."""
        tokens, stride = self._condition_tokens(name, adapter, given)
        return JointCondition(name, tokens.tokens, tokens.grid, stride, _bias(strength, keep, unconditional))

    def _condition_tokens(
        self, name: str, adapter: Adapter, given: Tensor | MapTokens
    ) -> tuple[MapTokens, int]:
        """The tokens of the tokens route, and their stride."""
        assert adapter.info.tokens is not None
        stride = adapter.info.tokens.stride
        if isinstance(given, Tensor) and stride > 1:
            given = resize_map(given, adapter.info.condition, *(side // stride for side in given.shape[-2:]))
        return self._tokens(name, given, "latents"), stride

    def _tokens(self, name: str, given: Tensor | MapTokens, input: EncoderInput) -> MapTokens:
        if isinstance(given, MapTokens):
            return given
        kept = self._maps.get(name)
        if kept is not None and kept[1].input == input and torch.equal(kept[0], given):
            return kept[1]
        tokens = map_tokens(self._family, self._pipe, given, input)
        if not tokens.tokens.is_inference():
            self._maps[name] = given, tokens
        return tokens

    def _condition_pass(
        self, name: str, attentions: SelfAttentions, tokens: MapTokens, stride: int
    ) -> Memory:
        """What the stock forward of the condition alone, at time 0, with the adapter on, leaves behind."""
        device = self._pipe._execution_device
        latents = self._family.unpack(tokens.tokens, *tokens.grid).to(device)
        if not self._text:
            with torch.inference_mode(False):  # or what is kept could not serve a backward pass
                self._text = self._family.condition_text(self._pipe)
        text = {name: values.to(device) for name, values in self._text.items()}
        memory = Memory()
        own = math.prod(tokens.grid) if self._family.text_in_condition else 0
        with (
            layers.activated(self._denoiser, {name: 1.0}),
            attentions.remembering(memory, own),
            recomputing(self._denoiser, attentions),
        ):
            time = torch.zeros(len(latents), device=device)
            try:
                self._family.predict(self._denoiser, latents, time, text, stride=stride)
                memory = memory.to(self._settings.device, self._settings.dtype)
            except torch.OutOfMemoryError as error:
                raise out_of_memory(self._expected_nbytes(tokens, len(attentions))) from error
        if len(memory.layers) < len(attentions):
            raise UserError(
                f"Only {len(memory.layers)} of {len(attentions)} self-attentions have seen the condition {name!r}, "
                "because others are skipped: turn off the denoiser's caching with denoiser.disable_cache()."
            )
        return memory

    def _expected_nbytes(self, tokens: MapTokens, attentions: int) -> int:
        """Keys and values of a condition, as if all attentions were as wide as the input layer's output."""
        denoiser: Any = self._denoiser
        width = self._family.hidden_size(denoiser)
        size = (self._settings.dtype or denoiser.dtype).itemsize
        return 2 * attentions * len(tokens) * math.prod(tokens.grid) * width * size

    def _stamp(self, tokens: MapTokens, stride: int) -> tuple[Any, ...]:
        """Changes when a weight of the denoiser changes, or what is switched on or merged in it, or the grid.

        Addresses are left out: offloading and casting change them.
        """
        weights = [(t._version, t.dtype) for t in self._denoiser.parameters() if not t.is_inference()]
        switches = [
            (*layer.active_adapters, *layer.merged_adapters, *getattr(layer, "scaling", {}).items())
            for layer in self._denoiser.modules()
            if isinstance(layer, BaseTunerLayer)
        ]
        return tokens.grid, stride, optimizer_steps(), weights, switches


def _bias(strength: float, keep: Tensor | None, unconditional: bool) -> Tensor | None:
    """The bias of a condition's keys: log(strength), -inf where a row's condition is dropped."""
    if strength == 1 and keep is None and unconditional:
        return None
    bias = torch.tensor([math.log(strength)])
    return bias if keep is None else torch.where(keep.cpu(), bias, -torch.inf)
