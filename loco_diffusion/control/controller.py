"""Control of a diffusers pipeline by condition maps, through adapters in its frozen denoiser."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor

from loco_diffusion.control.adapter import Window, resolve_strengths, resolve_windows
from loco_diffusion.control.adapter_set import AdapterSet
from loco_diffusion.control.conditioning import Condition, Conditioning
from loco_diffusion.control.family import Pipeline
from loco_diffusion.control.map_tokens import MapTokens
from loco_diffusion.control.maps import ConditionMap
from loco_diffusion.control.preparation import DEFAULT_CACHE, CacheSettings, Preparation
from loco_diffusion.errors import UserError


class Controller(AdapterSet):
    """Adds named adapters to a pipeline and runs it, unchanged, under condition maps:

        controller = Controller(pipe)
        controller.load_adapter("path/to/canny")
        with controller(canny=edges, strength=0.8):
            pipe("a red cube", height=512, width=512)

    In the `with` block the condition encoders' features are added to the denoiser's embedded input, and the
    adapters turn its layers. Outside of it, without a map, or at strength 0 the pipeline gives what it gives
    without adapters, bit for bit. The base's weights never change, except by `fuse`.

    Args:
        pipe: a pipeline around one of the denoisers that `family_of` knows.
        cache: where keys and values of the tokens route are kept.

    Raises:
        UserError: the pipeline's denoiser is of no known family.
    """

    def __init__(self, pipe: Pipeline, cache: CacheSettings = DEFAULT_CACHE) -> None:
        super().__init__(pipe)
        self._preparation = Preparation(self.family, pipe, self._denoiser, cache)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._preparation.forget(adapter_name)

    def __call__(
        self,
        control: Mapping[str, ConditionMap | MapTokens] | None = None,
        /,
        *,
        strength: float | Mapping[str, float] = 1.0,
        start: float | Mapping[str, float] = 0.0,
        end: float | Mapping[str, float] = 1.0,
        unconditional: bool = True,
        keep: Tensor | None = None,
        **named_maps: ConditionMap | MapTokens,
    ) -> AbstractContextManager[None]:
        """The context in which the pipeline, or its denoiser alone, is controlled.

        Condition maps are encoded at its beginning, under the gradient and autocast modes that hold there. For
        training, the backward pass must be in the block, too, and there must be only one.

        Args:
            control: ready condition maps by adapter name; each is a PIL picture, a list of them (a batch), or
                a float tensor (B, 3, H, W) in [0, 1], of the size of the picture to draw, or `map_tokens` of
                such a tensor. B is 1 or divides the number of pictures.
            strength: one for all, or by name (default 1). On the encoder route a factor on features and angles,
                on the tokens route one on the attention to the condition. 0 is no control.
            start: the share of the denoising steps after which a condition begins to act; as strength.
            end: the share of the steps after which it no longer acts.
            unconditional: whether the unconditional half of classifier-free guidance sees the conditions, too;
                without, guidance also strengthens the control. Adapters of the encoder route turn both halves.
            keep: (B,) bool for training, False where a row's condition is dropped.
            named_maps: as `control`; both may be given.

        Raises:
            UserError: a name is unknown or given twice, a map, strength, start or end is not usable, joint
                conditions are mixed with others, only some adapters are fused, or the pipeline's adapters are
                disabled or left out. When the denoiser runs, for conditions of the tokens route also at the
                block's beginning: a map is for another size, there are more maps than
                pictures, attention cannot show the condition, or the memory is full.
        """
        given = dict(control or {})
        for name in given.keys() & named_maps.keys():
            raise UserError(f"The map for {name!r} is given twice; give it once.")
        given |= named_maps
        for name in given:
            self._known(name)
        strengths = resolve_strengths(self._adapters, given, strength)
        windows = resolve_windows(given, start, end)
        maps = {
            name: self._preparation.usable(name, adapter, given[name])
            for name, adapter in self._adapters.items()
            if name in given
        }
        batches = {len(m) for m in maps.values()} | ({len(keep)} if keep is not None and maps else set())
        if len(batches - {1}) > 1:
            sizes = " and ".join(str(batch) for batch in sorted(batches))
            raise UserError(f"The condition maps come in batches of {sizes}; give the same number of each.")
        maps = {name: m for name, m in maps.items() if strengths[name] != 0}
        self._check_together(maps)
        return self._controlled(maps, strengths, windows, keep, unconditional)

    @contextmanager
    def _controlled(
        self,
        maps: dict[str, Tensor | MapTokens],
        strengths: dict[str, float],
        windows: dict[str, Window],
        keep: Tensor | None,
        unconditional: bool,
    ) -> Iterator[None]:
        self._check_outside()
        self._check_effective(maps)
        self._hooks.switch_off()
        self._hooks.inside = True
        self._rows.unconditional, self._rows.later = unconditional, False
        try:
            conditions = {
                name: self._condition(name, maps[name], strengths[name], windows[name], keep) for name in maps
            }
            conditioning = Conditioning(
                self.family, self._pipe, self._denoiser, self._hooks.attentions, conditions, self._rows
            )
            self._hooks.conditioning = conditioning
            with self.family.watched(self._pipe), conditioning.applied():
                yield
        finally:
            self._hooks.conditioning = None
            self._hooks.inside = False

    def _condition(
        self, name: str, given: Tensor | MapTokens, strength: float, window: Window, keep: Tensor | None
    ) -> Condition:
        adapter, prepare = self._adapters[name], self._preparation
        if adapter.info.tokens is not None:
            attentions = self._hooks.attentions
            assert attentions is not None
            unconditional = self._rows.unconditional
            if adapter.info.tokens.joint:
                joint = prepare.joint(name, adapter, given, strength, keep, unconditional)
                return Condition(joint=joint, window=window)
            recall = prepare.recall(name, adapter, attentions, given, strength, keep, unconditional)
            return Condition(recall=recall, window=window)
        assert adapter.encoder is not None
        # Here and not in the denoiser's call: with offloading, calling the VAE sends the denoiser away.
        features = prepare.features(name, adapter.encoder, given, strength, keep)
        turning = None if adapter.fused is not None else strength
        return Condition(features, turning=turning, window=window)

    @property
    def cache_nbytes(self) -> int:
        """Memory, in bytes, of the keys and values that are kept of the last conditions (tokens route)."""
        return self._preparation.nbytes

    def clear_cache(self) -> None:
        """Forget what is kept of the last conditions; needed only after writes into ``parameter.data``."""
        self._preparation.clear()

    def _check_together(self, names: Collection[str]) -> None:
        tokens = [self._adapters[name].info.tokens for name in names]
        joint = [settings for settings in tokens if settings is not None and settings.joint]
        if joint and len(joint) < len(tokens):  # whose tokens the others would turn, or not see
            raise UserError(
                "Joint conditions go with joint ones only; give the others in a `with controller(...)` of their own."
            )
