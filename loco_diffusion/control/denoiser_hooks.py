"""What happens in each call of a denoiser that has adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loco_diffusion.control import layers
from loco_diffusion.control.attention import SelfAttentions
from loco_diffusion.control.conditioning import Conditioning
from loco_diffusion.control.family import Family
from loco_diffusion.control.rows import Rows


class DenoiserHooks:
    """Hooks of a denoiser; they stay while there are adapters, because compiled models ignore hooks that come later.

    Outside of a `with controller(...)` they keep adapters off that others switch on.

    Args:
        family: of the pipeline.
        denoiser: its denoiser.
        rows: of its batch.

    Attributes:
        conditioning: what acts now; None outside of a `with controller(...)`, and at its very beginning.
        inside: whether a `with controller(...)` is open.
        attentions: the denoiser's self-attentions, if an adapter is of the tokens route.
    """

    def __init__(self, family: Family, denoiser: nn.Module, rows: Rows) -> None:
        self.conditioning: Conditioning | None = None
        self.inside = False
        self.attentions: SelfAttentions | None = None
        self._family = family
        self._denoiser = denoiser
        self._rows = rows
        self._layers: list[Any] = []
        self._names: list[str] = []
        self._hooks: list[Any] = []

    def follow(self, adapter_names: Iterable[str], tokens: bool) -> None:
        """Install what adapters need, or take it out again.

        Args:
            adapter_names: of all that there are.
            tokens: whether one is of the tokens route.
        """
        self._names = list(adapter_names)
        found = (layer for name in self._names for _, layer in layers.layers_of(self._denoiser, name))
        self._layers = list(dict.fromkeys(found))
        if not self._names:
            self._remove()
            return
        if not self._hooks:
            self._install()
        if tokens and self.attentions is None:
            modules = self._family.self_attentions(self._denoiser)
            self.attentions = SelfAttentions(modules, self._family.linear_attention, self._rows)

    def switch_off(self) -> None:
        """Switch the adapters off."""
        layers.switch_off(self._layers, self._names)

    def _install(self) -> None:
        input_layer = self._family.input_layer(self._denoiser)
        if isinstance(input_layer, BaseTunerLayer):  # the wrapper would take the hook with it
            input_layer = input_layer.get_base_layer()
        self._hooks = [
            self._denoiser.register_forward_pre_hook(self._before_denoiser, with_kwargs=True),
            self._denoiser.register_forward_hook(self._after_denoiser),
            input_layer.register_forward_hook(self._after_input_layer),
        ]

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.attentions is not None:
            self.attentions.remove()
            self.attentions = None

    def _before_denoiser(self, module: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        if not self.inside and not torch.compiler.is_compiling():
            self.switch_off()
        self._rows.alone = self._family.asks_one_half(arguments)
        features = self.conditioning.features if self.conditioning else None
        # A compiled graph cannot read the grid, which may be on the device.
        if features is not None and not torch.compiler.is_compiling():
            # Some pipelines give the latents by position, which is the first one in every transformer.
            named = {"hidden_states": args[0], **arguments} if args else arguments
            features.drawn_grid = self._family.grid(named)

    def _after_denoiser(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.conditioning is not None:
            self.conditioning.called()

    def _after_input_layer(self, module: nn.Module, args: tuple[Any, ...], hidden: Tensor) -> Tensor | None:
        if self.conditioning is None or self.conditioning.features is None:
            return None
        return self.conditioning.features.add(hidden)
