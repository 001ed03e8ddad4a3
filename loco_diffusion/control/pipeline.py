"""What turns a stock pipeline into one whose call takes condition maps."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any

from torch import Tensor

from loco_diffusion.control.controller import Controller
from loco_diffusion.control.maps import ConditionMap, map_tensor, resize_map

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_OWN = (
    inspect.Parameter("control", _KEYWORD, default=None),
    inspect.Parameter("control_strength", _KEYWORD, default=1.0),
    inspect.Parameter("control_start", _KEYWORD, default=0.0),
    inspect.Parameter("control_end", _KEYWORD, default=1.0),
    inspect.Parameter("control_unconditional", _KEYWORD, default=True),
)


class ControlledPipeline:
    """To be named before a stock pipeline class as a base: the same components and no others.

    No ``__init__``: the stock one, whose annotations ``from_pipe`` reads, is the right one. The call has the
    stock call's signature and five arguments more; it hands everything else on unchanged.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        signature = inspect.signature(cls._stock().__call__)  # type: ignore[operator]
        stock = list(signature.parameters.values())
        last = [parameter for parameter in stock if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        own = [parameter for parameter in _OWN if parameter.name not in signature.parameters]

        def call(self: ControlledPipeline, *args: Any, **arguments: Any) -> Any:
            return self._call(*args, **arguments)

        call.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*stock[: len(stock) - len(last)], *own, *last]
        )
        call.__doc__ = ControlledPipeline._call.__doc__
        cls.__call__ = call  # type: ignore[method-assign]

    @classmethod
    def _stock(cls) -> type:
        """The class of diffusers that is controlled."""
        return next(base for base in cls.__mro__ if base.__module__.startswith("diffusers."))

    @cached_property
    def controller(self) -> Controller:
        """The Controller of this pipeline, for adding, saving, fusing and deleting adapters."""
        return Controller(self)

    def load_control_adapter(self, path: str | os.PathLike[str], adapter_name: str | None = None) -> str:
        """Load an adapter.

        Args:
            path: the adapter's folder, or the id of a Hugging Face Hub repository.
            adapter_name: its name in `control`; default: the condition it was trained for.

        Returns:
            The name.

        Raises:
            UserError: the adapter is damaged or for another base model; the pipeline stays as it was.
        """
        return self.controller.load_adapter(path, adapter_name)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the base as a stock pipeline, without adapters (they have `controller.save_adapter`).

        Args:
            save_directory: the folder.
            *args, **kwargs: as for the stock pipeline.

        Raises:
            UserError: an adapter is fused.
        """
        pipe: Any = self
        stock: Any = self._stock()
        settings = {
            name: pipe.config[name] for name in stock._get_signature_keys(stock)[1] if name in pipe.config
        }
        with self.controller.without_adapters() if "controller" in vars(self) else nullcontext():
            stock(**pipe.components, **settings).save_pretrained(save_directory, *args, **kwargs)

    def _call(
        self,
        *args: Any,
        control: Mapping[str, ConditionMap] | None = None,
        control_strength: float | Mapping[str, float] = 1.0,
        control_start: float | Mapping[str, float] = 0.0,
        control_end: float | Mapping[str, float] = 1.0,
        control_unconditional: bool = True,
        **arguments: Any,
    ) -> Any:
        """Generate under condition maps; every argument not named here is the stock pipeline's.

        Args:
            control: ready condition maps by adapter name: each a PIL picture, a list of them (as many as
                prompts), or a float tensor (B, 3, H, W) in [0, 1]. A map of another size than height x width
                is resized, stretched if need be, in the way that keeps the condition's look: see
                `loco_diffusion.control.resize_map`. A map extracted at the right size is better.
            control_strength: one for all maps or by name; 0 is no control, 1 is as trained.
            control_start: the share of the steps after which a condition begins to act; one for all, or by name.
            control_end: the share of the steps after which it no longer acts; likewise.
            control_unconditional: whether the unconditional half of classifier-free guidance is controlled, too.
            height: in pixels; default: the first map's, rounded down to a whole token, else the stock default.
            width: as height.
            max_sequence_length: tokens of the prompt; default: the tokenizer's limit or the stock default, the
                smaller one.
            use_resolution_binning: default: with maps False, so that the picture lies where the maps lie, else
                the stock default. True draws at another size and crops: give it only where the size is one of
                the base's own.

        Returns:
            What the stock pipeline returns.

        Raises:
            UserError: an unknown adapter name, or a map, strength, start or end that is not usable.
        """
        stock = self._stock().__call__  # type: ignore[operator]
        signature = inspect.signature(stock)
        bound = signature.bind(self, *args, **arguments)
        call = bound.arguments
        family = self.controller.family
        if "max_sequence_length" in signature.parameters:
            call.setdefault("max_sequence_length", family.text_length(self))
        maps = {name: map_tensor(value, name) for name, value in (control or {}).items()}
        if maps:
            if "use_resolution_binning" in signature.parameters:
                call.setdefault("use_resolution_binning", False)
            self._fit(maps, call, family.token_pixels(self))
        with self.controller(
            maps,
            strength=control_strength,
            start=control_start,
            end=control_end,
            unconditional=control_unconditional,
        ):
            return stock(*bound.args, **bound.kwargs)

    def _fit(self, maps: dict[str, Tensor], call: dict[str, Any], token: int) -> None:
        """Bring maps and the picture to one size."""
        first = next(iter(maps.values()))
        for side, default in zip(("height", "width"), first.shape[-2:], strict=True):
            # Stock pipelines round down, too.
            call[side] = max(1, (call.get(side) or default) // token) * token
        adapters = self.controller.adapters
        for name in maps.keys() & adapters.keys():  # the controller refuses names that are unknown
            maps[name] = resize_map(maps[name], adapters[name].condition, call["height"], call["width"])
