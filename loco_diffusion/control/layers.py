"""Adapter layers of any peft method in a denoiser: put in, switched on for a while, merged, taken out.

Adapters are switched by the layers' lists of active adapters, and not by peft's functions for it, because
those also switch requires_grad and unmerge. A layer skips an adapter that is not in its list, so the base
model's output comes out bit for bit.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loco_diffusion.adapters.peft_folder import one_line
from loco_diffusion.errors import UserError

_UNCHANGED_BASE_INITS = (True, False, "gaussian", "orthogonal")


def layers_of(denoiser: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, Any]]:
    """Paths and adapter layers, outer before inner ones; only those with the adapter, if one is named."""
    for path, module in denoiser.named_modules():
        if isinstance(module, BaseTunerLayer) and (
            adapter_name is None or adapter_name in module._all_available_adapter_names()
        ):
            yield path, module


def parameters_of(denoiser: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """The parameters of one adapter."""
    found: list[nn.Parameter] = []
    for _, layer in layers_of(denoiser, adapter_name):
        names = dict.fromkeys(layer.adapter_layer_names)  # peft lists DoRA's magnitudes twice
        for container in (getattr(layer, name) for name in names):
            if adapter_name in container:
                entry = container[adapter_name]
                found.extend([entry] if isinstance(entry, nn.Parameter) else entry.parameters())
    return found


def inject(denoiser: nn.Module, config: PeftConfig, adapter_name: str) -> None:
    """Put an adapter's layers into the denoiser: float32, trainable, switched off. The base is frozen.

    Other adapters keep their state. If it fails, the denoiser is as it was, apart from being frozen.

    Args:
        denoiser: the model.
        config: of any method that peft can inject; it is not changed.
        adapter_name: a new name.

    Raises:
        UserError: the config would train or change the base, peft or the method refuses it, or the denoiser is
            offloaded layer by layer.
    """
    check_config(config)
    if any(parameter.is_meta for parameter in denoiser.parameters()):
        raise UserError(
            "The denoiser is offloaded layer by layer, where no adapter can be put in; call pipe.remove_all_hooks(), "
            "load the adapter, and call pipe.enable_sequential_cpu_offload() again."
        )
    config = copy.deepcopy(config)
    config.inference_mode = False
    existing = [(layer, layer._active_adapter) for _, layer in layers_of(denoiser)]
    trainable = [p for layer, _ in existing for p in layer.parameters() if p.requires_grad]
    try:
        with warnings.catch_warnings():  # peft warns of every adapter after the first
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            inject_adapter_in_model(config, denoiser, adapter_name)
    except Exception as error:  # methods raise many types for configs that do not fit the model
        _restore(existing)
        remove(denoiser, adapter_name)
        raise UserError(f"The adapter {adapter_name!r} does not fit the model: {one_line(error)}") from error
    # diffusers' own adapter functions refuse to work without this flag.
    denoiser._hf_peft_config_loaded = True  # type: ignore[assignment]
    new = parameters_of(denoiser, adapter_name)
    trainable += [p for p in new if p.requires_grad]
    denoiser.requires_grad_(False)
    for parameter in trainable:
        parameter.requires_grad_(True)
    for parameter in new:
        parameter.data = parameter.data.float()
    for _, layer in layers_of(denoiser, adapter_name):
        layer._active_adapter = []
        layer.train(denoiser.training)  # new modules start in training mode, with dropout
    _restore(existing)
    _offload_again(denoiser)


def _offload_again(denoiser: nn.Module) -> None:
    """Let group offloading know of layers that have come or gone, as diffusers' own adapter functions do."""
    from diffusers.hooks import group_offloading

    group_offloading._maybe_remove_and_reapply_group_offloading(denoiser)


def check_name(denoiser: nn.Module, adapter_name: str) -> None:
    """Raise UserError if an adapter cannot have this name in this denoiser."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", adapter_name):
        raise UserError(f"{adapter_name!r} cannot name an adapter; use letters, digits, _ and -.")
    if adapter_name in getattr(denoiser, "peft_config", {}):
        raise UserError(
            f"There already is an adapter {adapter_name!r}; delete it first or choose another name."
        )
    # peft finds an adapter's weights by the name in the path.
    if any(adapter_name in path.split(".") for path, _ in denoiser.named_parameters()):
        raise UserError(
            f"{adapter_name!r} is the name of a part of the model; choose another name for the adapter."
        )


def method_name(config: PeftConfig) -> str:
    """peft's name of the config's method, for example "LORA"."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def check_config(config: PeftConfig) -> None:
    """Raise UserError if an adapter would train or change the base model, or is none of layers."""
    method = method_name(config)
    if config.is_prompt_learning:
        raise UserError(f"{method} trains prompts, not layers; use a method such as LoCO, LoRA or OFT.")
    if getattr(config, "modules_to_save", None):
        raise UserError("modules_to_save in the adapter's config would change the base; leave it empty.")
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise UserError(f'bias={bias!r} in the adapter\'s config would change the base; use "none".')
    start = getattr(config, "init_lora_weights", True)
    if start not in _UNCHANGED_BASE_INITS:
        raise UserError(f"init_lora_weights={start!r} would change the base model's weights; use True.")


def _restore(active: Iterable[tuple[Any, Any]]) -> None:
    for layer, names in active:
        layer._active_adapter = names


def remove(denoiser: nn.Module, adapter_name: str) -> None:
    """Take an adapter out; layers that have no other give way to the base's own."""
    for path, layer in list(layers_of(denoiser, adapter_name)):
        layer.delete_adapter(adapter_name)
        if not layer._all_available_adapter_names():
            _replace(denoiser, path, layer.base_layer)
    configs = getattr(denoiser, "peft_config", {})
    configs.pop(adapter_name, None)
    if not configs:
        if hasattr(denoiser, "peft_config"):
            del denoiser.peft_config
        denoiser._hf_peft_config_loaded = False  # type: ignore[assignment]
    _offload_again(denoiser)


def _replace(denoiser: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(denoiser.get_submodule(parent), name, module)


def config_of(denoiser: nn.Module, adapter_name: str) -> PeftConfig:
    """The config that an adapter was injected with."""
    configs: Any = denoiser.peft_config
    return configs[adapter_name]


def weights_of(denoiser: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """An adapter's weights under the names they have in the base model, without the adapter's name."""
    weights = get_peft_model_state_dict(denoiser, adapter_name=adapter_name, save_embedding_layers=False)
    # An adapter of another method that was added later has wrapped the layers of this one.
    return {name.replace(".base_layer.", "."): tensor for name, tensor in weights.items()}


def set_weights(denoiser: nn.Module, adapter_name: str, weights: Mapping[str, Tensor]) -> None:
    """Load weights into the adapter that was injected last.

    Raises:
        UserError: names or shapes differ from the adapter's.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in weights_of(denoiser, adapter_name).items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if given != expected:
        wrong = sorted(set(given.items()) ^ set(expected.items()))[0][0]
        state = "missing" if wrong not in given else "of another shape" if wrong in expected else "unexpected"
        raise UserError(
            f"The adapter's weights do not match its configuration ({wrong} is {state}); save it again."
        )
    set_peft_model_state_dict(denoiser, dict(weights), adapter_name=adapter_name)


def has_strength(denoiser: nn.Module, adapter_name: str) -> bool:
    """Whether the method can be applied in part; OFT, BOFT and HRA, for example, cannot."""
    for _, layer in layers_of(denoiser, adapter_name):
        before = _scaling(layer, adapter_name)
        reached = set()
        for scale in (2.0, 3.0):
            _set_scale(layer, adapter_name, scale)
            reached.add(_scaling(layer, adapter_name))
        if len(reached) == 1:
            return False
        layer.scaling[adapter_name] = before
    return True


def _scaling(layer: Any, adapter_name: str) -> float | None:
    return getattr(layer, "scaling", {}).get(adapter_name)


def _set_scale(layer: Any, adapter_name: str, scale: float) -> None:
    if _scaling(layer, adapter_name) is not None:
        with warnings.catch_warnings():  # of methods that have the entry, but no use for it
            warnings.simplefilter("ignore")
            layer.set_scale(adapter_name, scale)


@contextmanager
def activated(denoiser: nn.Module, strengths: Mapping[str, float]) -> Iterator[None]:
    """Switch adapters on, beside those that are on, and put back what was there at the end.

    Args:
        denoiser: the model.
        strengths: by name, in the order in which the adapters apply.
    """
    changed: list[tuple[Any, Any, dict[str, float]]] = []
    try:
        for _, layer in layers_of(denoiser) if strengths else ():
            present = layer._all_available_adapter_names()
            names = [name for name in strengths if name in present]
            if not names:
                continue
            scaling = getattr(layer, "scaling", {})
            changed.append((layer, layer._active_adapter, {n: scaling[n] for n in names if n in scaling}))
            for name in names:
                _set_scale(layer, name, strengths[name])
            layer._active_adapter = [n for n in layer.active_adapters if n not in names] + names
        yield
    finally:
        for layer, active, scaling in changed:
            layer._active_adapter = active
            if scaling:
                layer.scaling.update(scaling)


def switch_off(found: Iterable[Any], adapter_names: Container[str]) -> None:
    """Switch adapters off that others have switched on: peft does, for example, when the active one is deleted."""
    for layer in found:
        if any(name in adapter_names for name in layer.active_adapters):
            layer._active_adapter = [name for name in layer.active_adapters if name not in adapter_names]


def check_effective(denoiser: nn.Module, adapter_name: str, fused: bool) -> None:
    """Raise UserError if an adapter of a controller would not act, or not in all its layers; `fused` says whether
    the controller has it in the base weights."""
    found = [layer for _, layer in layers_of(denoiser, adapter_name)]
    if not found:
        raise UserError(
            f"The adapter {adapter_name!r} has been taken out of the denoiser, as pipe.unload_lora_weights() does; "
            "load it into a new Controller, and take other adapters out with pipe.delete_adapters()."
        )
    if fused:
        if not all(adapter_name in layer.merged_adapters for layer in found):
            raise UserError(
                f"The adapter {adapter_name!r} has been taken out of the base weights, as pipe.unfuse_lora() does; "
                "call controller.unfuse(), and fuse it again."
            )
        return
    if any(layer.disable_adapters for layer in found):
        raise UserError("The pipeline's adapters are disabled; call pipe.enable_lora() first.")
    check_projections(denoiser)


def check_projections(denoiser: nn.Module) -> None:
    """Raise UserError if layers that adapters turn are replaced by their fusion."""
    if any(_is_fused(module) for module in denoiser.modules()):
        raise UserError(
            "The denoiser's query, key and value projections are fused, which leaves out their adapters; call "
            "denoiser.unfuse_qkv_projections() first."
        )


def _is_fused(attention: nn.Module) -> bool:
    from diffusers.models.attention import AttentionModuleMixin

    if not getattr(attention, "fused_projections", False):
        return False
    # Older attentions keep the mark when the fusion is undone; their processor tells.
    processor = type(getattr(attention, "processor", None)).__name__
    return isinstance(attention, AttentionModuleMixin) or processor.startswith("Fused")


State = list[tuple[Any, Any, dict[str, float]]]
"""Adapter layers, their lists of active adapters and their scales."""


def state_of(denoiser: nn.Module) -> State:
    """Which adapters are on, for `in_state`."""
    return [
        (layer, layer._active_adapter, dict(getattr(layer, "scaling", {})))
        for _, layer in layers_of(denoiser)
    ]


@contextmanager
def in_state(state: State) -> Iterator[None]:
    """In the block, the adapters are on that were on when the state was taken."""
    before: State = [
        (layer, layer._active_adapter, dict(getattr(layer, "scaling", {}))) for layer, *_ in state
    ]
    try:
        _enter(state)
        yield
    finally:
        _enter(before)


def _enter(state: State) -> None:
    for layer, active, scaling in state:
        layer._active_adapter = active
        if scaling:
            layer.scaling.update(scaling)


def merge(denoiser: nn.Module, adapter_name: str, strength: float) -> None:
    """Write an adapter into the base weights, computed in float32."""
    for _, layer in layers_of(denoiser, adapter_name):
        scaling = dict(getattr(layer, "scaling", {}))
        _set_scale(layer, adapter_name, strength)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already following adapters were merged")
                layer.merge(adapter_names=[adapter_name])
        finally:
            if scaling:
                layer.scaling.update(scaling)


def unmerge(denoiser: nn.Module, adapter_names: Container[str]) -> None:
    """Take adapters out of the base weights again, with whatever else the same layers have merged."""
    for _, layer in layers_of(denoiser):
        if any(name in adapter_names for name in layer.merged_adapters):
            layer.unmerge()


@contextmanager
def without_layers(denoiser: nn.Module) -> Iterator[None]:
    """The denoiser with the base's own layers only, so that it can be saved; the adapters come back after.

    Raises:
        UserError: an adapter, of the controller or not, is merged into them.
    """
    for _, layer in layers_of(denoiser):
        for name in layer.merged_adapters:
            raise UserError(f"The adapter {name!r} is fused into the base weights; unfuse it before saving.")
    outer: dict[str, Any] = {}
    for path, layer in layers_of(denoiser):
        if not any(path.startswith(f"{other}.") for other in outer):
            outer[path] = layer
    try:
        for path, layer in outer.items():
            _replace(denoiser, path, layer.get_base_layer())
        yield
    finally:
        for path, layer in outer.items():
            _replace(denoiser, path, layer)
