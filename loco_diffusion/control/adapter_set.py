"""The adapters of a controller: put into the denoiser of a pipeline, kept in folders, merged, taken out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn

from loco_diffusion.adapters import peft_folder
from loco_diffusion.control import adapter_folder, layers
from loco_diffusion.control.adapter import Adapter, AdapterInfo, check_strength, listed
from loco_diffusion.control.adapter_folder import AdapterFolder, BaseDescription, ControlConfig
from loco_diffusion.control.denoiser_hooks import DenoiserHooks
from loco_diffusion.control.encoder import ConditionEncoder, EncoderConfig, TokensConfig
from loco_diffusion.control.family import Pipeline, family_of
from loco_diffusion.control.map_tokens import token_width
from loco_diffusion.control.rows import Rows
from loco_diffusion.errors import UserError
from loco_diffusion.machine import package_versions


class AdapterSet:
    """Named adapters in the denoiser of a pipeline, all switched off.

    Args:
        pipe: a pipeline around one of the denoisers that `family_of` knows.

    Raises:
        UserError: the pipeline's denoiser is of no known family.
    """

    def __init__(self, pipe: Pipeline) -> None:
        self.family = family_of(pipe)
        self._pipe = pipe
        self._denoiser = self.family.denoiser(pipe)
        self._rows = Rows(lambda: self.family.guidance_copies(pipe))
        self._hooks = DenoiserHooks(self.family, self._denoiser, self._rows)
        self._adapters: dict[str, Adapter] = {}

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
        condition_options: Mapping[str, Any] | None = None,
        encoder: EncoderConfig | None = None,
        tokens: TokensConfig | None = None,
    ) -> None:
        """Add a new adapter, and on the encoder route its condition encoder, trainable and in float32.

        Args:
            adapter_name: a new name: letters, digits, "_" and "-".
            config: of LoCO or of any peft method for layers; it is not changed.
            condition: what it is trained for; default: `adapter_name`.
            condition_options: fields of the condition with other values than by default; they are saved with it.
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
        options = dict(condition_options or {})
        info = AdapterInfo(condition or adapter_name, layers.method_name(config), encoder, tokens, options)
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
            control.condition,
            layers.method_name(content.method),
            control.encoder,
            control.tokens,
            control.condition_options,
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
                condition_options=dict(adapter.info.condition_options),
                encoder=adapter.info.encoder,
                tokens=adapter.info.tokens,
                base=self.base,
                versions=package_versions(adapter_folder.PACKAGES),
            ),
            adapter=layers.weights_of(self._denoiser, adapter_name),
            encoder=dict(adapter.encoder.state_dict()) if adapter.encoder else {},
        )
        return adapter_folder.write(Path(folder).expanduser(), content, documents)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out; after the last one the denoiser has its own layers only.

        Raises:
            UserError: the name is unknown, an adapter is fused, or a `with controller(...)` is open.
        """
        self._known(adapter_name)
        self._check_idle()
        layers.remove(self._denoiser, adapter_name)
        del self._adapters[adapter_name]
        self._follow()

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

    # Checks and construction.

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
        self._adapters[name] = Adapter(info, encoder, layers.has_strength(self._denoiser, name))
        self._follow()

    def _follow(self) -> None:
        tokens = any(adapter.info.tokens for adapter in self._adapters.values())
        self._hooks.follow(self._adapters, tokens)

    def _new_encoder(self, config: EncoderConfig) -> ConditionEncoder:
        read = token_width(self.family, self._pipe, config.input)
        width = self.family.hidden_size(self._denoiser)
        return ConditionEncoder(read, width, config, self.family.spatial)

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
        if self._hooks.inside:
            raise UserError("`with controller(...)` is open; do this outside of it, and give it all maps.")

    def _check_idle(self) -> None:
        self._check_outside()
        for name in self._fused():
            raise UserError(f"The adapter {name!r} is fused; call unfuse() first.")
