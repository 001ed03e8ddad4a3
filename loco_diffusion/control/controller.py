"""Control of a diffusers pipeline by condition maps, through adapters in its frozen denoiser."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loco_diffusion.adapters import peft_folder
from loco_diffusion.control import adapter_folder, layers
from loco_diffusion.control.adapter import (
    Adapter,
    AdapterInfo,
    Window,
    check_strength,
    listed,
    resolve_strengths,
    resolve_windows,
)
from loco_diffusion.control.adapter_folder import AdapterFolder, BaseDescription, ControlConfig
from loco_diffusion.control.attention import SelfAttentions
from loco_diffusion.control.conditioning import Condition, Conditioning
from loco_diffusion.control.encoder import ConditionEncoder, EncoderConfig, TokensConfig
from loco_diffusion.control.family import Pipeline, family_of
from loco_diffusion.control.map_tokens import MapTokens
from loco_diffusion.control.maps import ConditionMap
from loco_diffusion.control.preparation import DEFAULT_CACHE, CacheSettings, Preparation
from loco_diffusion.control.rows import Rows
from loco_diffusion.errors import UserError
from loco_diffusion.machine import package_versions


class Controller:
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
        self.family = family_of(pipe)
        self._pipe = pipe
        self._denoiser = self.family.denoiser(pipe)
        self._rows = Rows(lambda: self.family.guidance_copies(pipe))
        self._preparation = Preparation(self.family, pipe, self._denoiser, cache)
        self._adapters: dict[str, Adapter] = {}
        self._hooks: list[Any] = []
        self._layers: list[Any] = []
        self._inside = False
        self._conditioning: Conditioning | None = None
        self._attentions: SelfAttentions | None = None

    # Adapters.

    @cached_property
    def base(self) -> BaseDescription:
        """The base model, as it was before the first adapter: later it may be fused, or spread over devices."""
        return adapter_folder.describe_base(self._pipe)

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The adapters by name, in the order in which they were added, which is that of their rotations."""
        return {name: adapter.info for name, adapter in self._adapters.items()}

    def add_adapter(
        self,
        adapter_name: str,
        config: PeftConfig,
        *,
        condition: str | None = None,
        encoder: EncoderConfig | None = None,
        tokens: TokensConfig | None = None,
    ) -> None:
        """Add a new adapter, and on the encoder route its condition encoder, trainable and in float32.

        Args:
            adapter_name: a new name: letters, digits, "_" and "-".
            config: of LoCO or of any peft method for layers; it is not changed.
            condition: what it is trained for; default: `adapter_name`.
            encoder: settings of the encoder route, which is the default one: EncoderConfig().
            tokens: settings of the tokens route, to take that instead.

        Raises:
            UserError: settings of both routes are given, the name is taken or not usable, the config does not
                fit the denoiser or would change the base, an adapter is fused, or a `with controller(...)` is
                open.
        """
        if encoder is not None and tokens is not None:
            raise UserError("There are settings for both routes; give encoder=..., or tokens=....")
        if tokens is None and encoder is None:
            encoder = EncoderConfig()
        info = AdapterInfo(condition or adapter_name, layers.method_name(config), encoder, tokens)
        self._attach(adapter_name, config, info, None, None)

    def load_adapter(self, path_or_hub_id: str | os.PathLike[str], adapter_name: str | None = None) -> str:
        """Load an adapter that `save_adapter` wrote; it is frozen until `trainable_parameters` is called.

        Args:
            path_or_hub_id: the adapter's folder, or the id of a Hugging Face Hub repository that holds it.
            adapter_name: what to call it; default: the condition it was trained for.

        Returns:
            The adapter's name.

        Raises:
            UserError: files are missing or damaged, the adapter belongs to another base model, its weights
                are not finite or do not fit, or for what `add_adapter` refuses. The pipeline stays as it was.
        """
        folder = peft_folder.find(path_or_hub_id)
        content = adapter_folder.read(folder)
        adapter_folder.check_base(folder, content.control.base, self.base, self._denoiser)
        control = content.control
        name = adapter_name or control.condition
        info = AdapterInfo(
            control.condition, layers.method_name(content.method), control.encoder, control.tokens
        )
        try:
            self._attach(name, content.method, info, content.adapter, content.encoder)
        except RuntimeError as error:
            raise UserError(
                f"The condition encoder in {folder} does not match its configuration; save the adapter again."
            ) from error
        for group in self.trainable_parameters(name).values():
            for parameter in group:
                parameter.requires_grad_(False)
        return name

    def save_adapter(
        self,
        folder: str | os.PathLike[str],
        adapter_name: str,
        documents: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Write an adapter to a folder of its own, atomically; an adapter that is there is replaced.

        The folder has peft's two files, which PeftModel.from_pretrained reads too, and the condition encoder.

        Args:
            folder: new, empty, or an adapter's.
            adapter_name: of the adapter.
            documents: contents of files for people, by their names among `adapter_folder.DOCUMENTS`, such as the
                model card.

        Returns:
            The folder.

        Raises:
            UserError: the name is unknown, the folder holds something else or cannot be written, or weights
                are not finite.
        """
        adapter = self._known(adapter_name)
        content = AdapterFolder(
            method=layers.config_of(self._denoiser, adapter_name),
            control=ControlConfig(
                route=adapter.info.route,
                condition=adapter.info.condition,
                encoder=adapter.info.encoder,
                tokens=adapter.info.tokens,
                base=self.base,
                versions=package_versions(adapter_folder.PACKAGES),
            ),
            adapter=layers.weights_of(self._denoiser, adapter_name),
            encoder=dict(adapter.encoder.state_dict()) if adapter.encoder else {},
        )
        return adapter_folder.write(Path(folder).expanduser(), content, documents or {})

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out; after the last one the denoiser has its own layers only.

        Raises:
            UserError: the name is unknown, an adapter is fused, or a `with controller(...)` is open.
        """
        self._known(adapter_name)
        self._check_idle()
        layers.remove(self._denoiser, adapter_name)
        del self._adapters[adapter_name]
        self._preparation.forget(adapter_name)
        self._find_layers()
        if not self._adapters:
            self._remove_hooks()

    def trainable_parameters(self, adapter_name: str) -> dict[str, list[nn.Parameter]]:
        """The parameters under "adapter" and "encoder" (none on the tokens route), switched to requires_grad,
        also after `load_adapter`.

        Raises:
            UserError: the name is unknown.
        """
        encoder = self._known(adapter_name).encoder
        groups = {
            "adapter": layers.parameters_of(self._denoiser, adapter_name),
            "encoder": list(encoder.parameters()) if encoder else [],
        }
        for parameter in (p for group in groups.values() for p in group):
            parameter.requires_grad_(True)
        return groups

    # Merging.

    def fuse(self, adapter_name: str, strength: float = 1.0) -> None:
        """Write an adapter into the base weights: control then costs one addition per denoiser call.

        The condition still has to be given in `with controller(...)`, at this strength. Unlike an adapter
        that is not fused, it stays in the weights without a condition. Several can be fused.

        Raises:
            UserError: the name is unknown, the adapter is of the tokens route (whose denoising passes need the
                base's own weights), the strength is 0, not finite or not possible for the method, the base
                weights cannot be merged (quantised), or a `with controller(...)` is open.
        """
        check_strength(adapter_name, self._known(adapter_name), strength)
        if self._adapters[adapter_name].info.tokens is not None:
            raise UserError(
                f"The adapter {adapter_name!r} is of the tokens route, whose denoising passes need the base's own "
                "weights; leave it unfused."
            )
        if strength == 0:
            raise UserError(f"The adapter {adapter_name!r} cannot be fused at strength 0; leave it unfused.")
        self._check_outside()
        layers.check_projections(self._denoiser)
        wanted = {**self._fused(), adapter_name: strength}
        self.unfuse()
        try:
            for name, adapter in self._adapters.items():  # rotations do not commute: the order of the unfused
                if name in wanted:
                    layers.merge(self._denoiser, name, wanted[name])
                    adapter.fused = wanted[name]
        except Exception:
            layers.unmerge(self._denoiser, self._adapters)
            for adapter in self._adapters.values():
                adapter.fused = None
            raise

    def unfuse(self) -> None:
        """Take all fused adapters out of the base weights, exact up to the rounding of the weights' dtype.

        Raises:
            UserError: a `with controller(...)` is open.
        """
        self._check_outside()
        if self._fused():
            layers.check_projections(self._denoiser)
            layers.unmerge(self._denoiser, self._adapters)
            for adapter in self._adapters.values():
                adapter.fused = None

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """In the block the denoiser has its own layers only, as `save_pretrained` needs it.

        Raises:
            UserError: an adapter is fused, or a `with controller(...)` is open.
        """
        self._check_idle()
        with layers.without_layers(self._denoiser):
            yield

    # Control.

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
        layers.switch_off(self._layers, self._adapters)
        self._inside = True
        self._rows.unconditional, self._rows.later = unconditional, False
        try:
            conditions = {
                name: self._condition(name, maps[name], strengths[name], windows[name], keep) for name in maps
            }
            self._conditioning = Conditioning(
                self.family, self._pipe, self._denoiser, self._attentions, conditions, self._rows
            )
            with self.family.watched(self._pipe), self._conditioning.applied():
                yield
        finally:
            self._conditioning = None
            self._inside = False

    def _condition(
        self, name: str, given: Tensor | MapTokens, strength: float, window: Window, keep: Tensor | None
    ) -> Condition:
        adapter, prepare = self._adapters[name], self._preparation
        if adapter.info.tokens is not None:
            assert self._attentions is not None
            unconditional = self._rows.unconditional
            if adapter.info.tokens.joint:
                joint = prepare.joint(name, adapter, given, strength, keep, unconditional)
                return Condition(joint=joint, window=window)
            recall = prepare.recall(name, adapter, self._attentions, given, strength, keep, unconditional)
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

    # Hooks: they stay while there are adapters, because compiled models ignore hooks that come later.

    def _install_hooks(self) -> None:
        input_layer = self.family.input_layer(self._denoiser)
        if isinstance(input_layer, BaseTunerLayer):  # the wrapper would take the hook with it
            input_layer = input_layer.get_base_layer()
        self._hooks = [
            self._denoiser.register_forward_pre_hook(self._before_denoiser, with_kwargs=True),
            self._denoiser.register_forward_hook(self._after_denoiser),
            input_layer.register_forward_hook(self._after_input_layer),
        ]

    def _find_layers(self) -> None:
        found = (layer for name in self._adapters for _, layer in layers.layers_of(self._denoiser, name))
        self._layers = list(dict.fromkeys(found))

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._attentions is not None:
            self._attentions.remove()
            self._attentions = None

    def _before_denoiser(self, module: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        if not self._inside and not torch.compiler.is_compiling():
            layers.switch_off(self._layers, self._adapters)
        features = self._conditioning.features if self._conditioning else None
        # Reading the grid waits for the device, so only where it is read once; a compiled graph cannot.
        if features is not None and features.drawn_grid is None and not torch.compiler.is_compiling():
            # Some pipelines give the latents by position, which is the first one in every transformer.
            named = {"hidden_states": args[0], **arguments} if args else arguments
            features.drawn_grid = self.family.grid(named)

    def _after_denoiser(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._conditioning is not None:
            self._conditioning.called()

    def _after_input_layer(self, module: nn.Module, args: tuple[Any, ...], hidden: Tensor) -> Tensor | None:
        if self._conditioning is None or self._conditioning.features is None:
            return None
        return self._conditioning.features.add(hidden)

    # Checks and construction.

    def _check_together(self, names: Collection[str]) -> None:
        tokens = [self._adapters[name].info.tokens for name in names]
        joint = [settings for settings in tokens if settings is not None and settings.joint]
        if joint and len(joint) < len(tokens):  # whose tokens the others would turn, or not see
            raise UserError(
                "Joint conditions go with joint ones only; give the others in a `with controller(...)` of their own."
            )

    def _attach(
        self,
        name: str,
        config: PeftConfig,
        info: AdapterInfo,
        weights: Mapping[str, Tensor] | None,
        encoder_weights: Mapping[str, Tensor] | None,
    ) -> None:
        self._check_idle()
        _ = self.base  # while it can be seen
        if info.tokens and info.tokens.joint:
            self.family.joint_forward(self._denoiser, [], self._rows)  # refuses where there is none
        encoder = self._new_encoder(info.encoder) if info.encoder else None
        if encoder and encoder_weights is not None:
            encoder.load_state_dict(encoder_weights)
        layers.check_name(self._denoiser, name)
        layers.inject(self._denoiser, config, name)
        if weights is not None:
            try:
                layers.set_weights(self._denoiser, name, weights)
            except Exception:
                layers.remove(self._denoiser, name)
                raise
        if not self._hooks:
            self._install_hooks()
        if info.tokens and self._attentions is None:
            modules = self.family.self_attentions(self._denoiser)
            self._attentions = SelfAttentions(modules, self.family.linear_attention, self._rows)
        self._adapters[name] = Adapter(info, encoder, layers.has_strength(self._denoiser, name))
        self._find_layers()

    def _new_encoder(self, config: EncoderConfig) -> ConditionEncoder:
        width = self.family.hidden_size(self._denoiser)
        return ConditionEncoder(
            self._preparation.token_width(config.input), width, config, self.family.spatial
        )

    def _known(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise UserError(f"There is no adapter {name!r}; loaded are {listed(self._adapters)}.")
        return self._adapters[name]

    def _fused(self) -> dict[str, float]:
        return {n: adapter.fused for n, adapter in self._adapters.items() if adapter.fused is not None}

    def _check_effective(self, names: Iterable[str]) -> None:
        """Raise UserError if these adapters would not act on the pipeline as they should."""
        fused = self._fused()
        for name in names:
            if fused and name not in fused:
                raise UserError(
                    f"The adapter {name!r} is not fused, but {next(iter(fused))!r} is; fuse both or call unfuse()."
                )
            if self.family.denoiser(self._pipe) is not self._denoiser:
                raise UserError("The pipeline has another denoiser now; make a new Controller for it.")
            layers.check_effective(self._denoiser, name, fused=bool(fused))

    def _check_outside(self) -> None:
        if self._inside:
            raise UserError("`with controller(...)` is open; do this outside of it, and give it all maps.")

    def _check_idle(self) -> None:
        self._check_outside()
        for name in self._fused():
            raise UserError(f"The adapter {name!r} is fused; call unfuse() first.")
