"""Which base model an adapter belongs to, beyond its architecture: a few of its weights, and its revision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import mean

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

PARAMETERS, VALUES = 8, 16  # of each kind, matrices and biases; and of each parameter

RELATED = 0.5
"""The least mean cosine of related weights. Fine-tuned, distilled, rounded and merged models keep above 0.9 of their
origin's direction; of separately trained ones, the cosine of so many values is 0 with a deviation of 0.06."""


def sample_weights(denoiser: nn.Module) -> dict[str, list[float]]:
    """Some values of some of the base's own weights, by name, enough to tell one training from another.

    Matrices tell most, but quantised ones cannot be compared; biases always can. Norms are all alike.
    """
    own = {name: p for name, p in _base_parameters(denoiser) if p.is_floating_point() and p.numel() >= VALUES}
    matrices = [name for name, p in own.items() if p.ndim >= 2]
    biases = [name for name, p in own.items() if name.endswith(".bias") and p.ndim == 1]
    chosen = [*_spread(matrices, PARAMETERS), *_spread(biases, PARAMETERS)]
    return {name: [float(f"{value:.4g}") for value in _values(own[name])] for name in chosen}


def are_related(sample: Mapping[str, list[float]], denoiser: nn.Module) -> bool:
    """Whether a denoiser's weights are those of a sample, or descend from them; True if none can be compared."""
    own = dict(_base_parameters(denoiser))
    cosines = []
    for name, values in sample.items():
        if name in own and own[name].is_floating_point() and own[name].numel() >= VALUES:
            there, here = torch.tensor(values), _values(own[name])
            if len(there) == VALUES and there.any() and here.any():
                cosines.append(float(nn.functional.cosine_similarity(there, here, dim=0)))
    return not cosines or mean(cosines) >= RELATED


def revision_of(name_or_path: str | None) -> str | None:
    """The commit of a model from the Hugging Face Hub, as it lies in the cache; None for anything else."""
    if not name_or_path:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(name_or_path, "model_index.json")
    except HFValidationError:  # a path
        return None
    if not isinstance(file, str):
        return None
    _, _, commit = file.replace("\\", "/").rpartition("/snapshots/")
    return commit.partition("/")[0]


def _base_parameters(denoiser: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's parameters, but quantised ones, under the names that they have without adapters."""
    adapted: list[str] = []
    for path, module in denoiser.named_modules():
        if any(path.startswith(f"{outer}.") for outer in adapted):
            continue
        own = module.named_parameters(recurse=False)
        if isinstance(module, BaseTunerLayer):
            adapted.append(path)
            own = module.get_base_layer().named_parameters()
        for name, parameter in own:
            if type(parameter.data) is Tensor and not parameter.is_meta:  # others are quantised
                yield f"{path}.{name}".lstrip("."), parameter


def _spread(names: list[str], count: int) -> list[str]:
    """So many of the names, from the first to the last."""
    if len(names) <= count:
        return names
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


@torch.no_grad()
def _values(parameter: Tensor) -> Tensor:
    """(VALUES,) evenly spread over a parameter, float32, on the CPU."""
    places = torch.linspace(0, parameter.numel() - 1, VALUES, dtype=torch.float64).round().long()
    return parameter.flatten()[places.to(parameter.device)].float().cpu()
