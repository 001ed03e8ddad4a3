"""What adapters do to the layers they sit on: angles, orthogonality, intruder dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from loco_diffusion import rotations
from loco_diffusion.adapters.config import AdapterConfig
from loco_diffusion.adapters.export import low_rank_svd
from loco_diffusion.adapters.rotated import RotatedLayer, Side
from loco_diffusion.adapters.tuner import AdapterModel

TOP, THRESHOLD = 10, 0.5  # of the paper on intruder dimensions
_NAME = "adapter"
# The parameters that tell how many channels a side has, and the dimension that does.
CHANNELS: dict[str, tuple[Side, int]] = {
    "loco_u": ("input", 1),
    "loco_m": ("input", 0),
    "loco_u_out": ("output", 1),
    "loco_m_out": ("output", 0),
    "loft_basis": ("input", 0),
}


@dataclass
class Inspection:
    """What an adapter's parameters alone tell, by layer; rotated outputs count as layers of their own.

    Attributes:
        quantity, unit: what `spectra` holds, for people.
        spectra: from the largest value on, the angles of a rotation's planes in degrees, or the singular values
            of W' - W for LoRA.
        orthogonality_errors: the Frobenius norm of R R^T - I; empty for LoRA.
    """

    quantity: str
    unit: str = ""
    spectra: dict[str, list[float]] = field(default_factory=dict)
    orthogonality_errors: dict[str, float] = field(default_factory=dict)


def inspect(method: PeftConfig, weights: Mapping[str, Tensor]) -> Inspection | None:
    """Measure a LoCO, LOFT or LoRA adapter without its base model; None for other methods.

    Args:
        method: its configuration.
        weights: its parameters, named as in the base model.
    """
    if isinstance(method, LoraConfig):
        change = Inspection("singular value")
        for path, up, down in lora_factors(method, weights):
            change.spectra[path] = low_rank_svd(up, down)[1].tolist()
        return change if change.spectra else None
    angles = Inspection("angle", "\N{DEGREE SIGN}")
    for name, basis, core in rotations_of(method, weights):
        angles.spectra[name] = rotation_angles(basis, core).rad2deg().tolist()
        # In float64, so that what is measured is the rotation and not the measurement's own rounding.
        angles.orthogonality_errors[name] = rotations.orthogonality_error(basis.double(), core.double())
    return angles if angles.spectra else None


def layers_of(method: PeftConfig, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """An adapter's parameters by the layer's path and the parameter's own name, such as "loco_u"."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(method.peft_type)]
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        path, _, kind = name.partition(f".{prefix}")
        layers.setdefault(path, {})[prefix + kind] = tensor
    return layers


def trained_parameters(method: PeftConfig, weights: Mapping[str, Tensor]) -> int:
    """How many numbers of an adapter are trained; LOFT's supports, for example, are saved with it but frozen."""
    frozen = getattr(_tuner(method).tuner_layer_cls, "buffer_names", ())
    return sum(tensor.numel() for name, tensor in weights.items() if name.rpartition(".")[2] not in frozen)


def rotations_of(method: PeftConfig, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, B and T of every rotation I + B T B^T of an adapter at strength 1, see `RotatedLayer.get_chain`."""
    tuner = _tuner(method)
    if not (issubclass(tuner, AdapterModel) and issubclass(tuner.tuner_layer_cls, RotatedLayer)):
        return
    assert isinstance(method, AdapterConfig)
    for path, parameters in layers_of(method, weights).items():
        channels = {
            side: parameters[kind].shape[dimension]
            for kind, (side, dimension) in CHANNELS.items()
            if kind in parameters
        }
        if not channels:
            continue
        with torch.device("meta"):  # no base weight, and nothing computed from it
            base = nn.Linear(channels.get("input", 1), channels.get("output", 1))
            layer = tuner.layer_types["linear"](base, _NAME, method.for_layer(path))
        assert isinstance(layer, RotatedLayer)
        state = {f"{kind}.{_NAME}": tensor for kind, tensor in parameters.items()}
        layer.load_state_dict(state, strict=False, assign=True)
        with torch.no_grad():
            for side in layer.sides(_NAME):
                yield path if side == "input" else f"{path} (output)", *layer.get_chain(_NAME, side)


def lora_factors(config: LoraConfig, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Path, up and down of every layer of a LoRA at strength 1: W' - W = up @ down, the scale in up.

    Args:
        config: its configuration.
        weights: its parameters, named as in the base model.
    """
    for path, parameters in layers_of(config, weights).items():
        if "lora_A.weight" not in parameters:  # of an embedding
            continue
        up, down = parameters["lora_B.weight"], parameters["lora_A.weight"]
        alphas = config.alpha_pattern or {}
        alpha = alphas.get(get_pattern_key(list(alphas), path), config.lora_alpha)
        scale = alpha / (math.sqrt(len(down)) if config.use_rslora else len(down))
        yield path, scale * up, down


def rotation_angles(basis: Tensor, core: Tensor) -> Tensor:
    """The angles by which R = I + B T B^T turns its planes, from the eigenvalues of a small matrix.

    With B = Q C (QR), R acts on the columns of Q as I + C T C^T, whose eigenvalues are exp(+-i angle).

    Args:
        basis: (n, w) with w <= n, core: (w, w), of an orthogonal R.

    Returns:
        (ceil(w / 2),) from the largest to the smallest, in radians from 0 to pi, in float64.
    """
    triangle = torch.linalg.qr(basis.double(), mode="r").R
    small = torch.eye(len(triangle)).to(triangle) + triangle @ core.double() @ triangle.mT
    angles = torch.linalg.eigvals(small).angle().abs()
    return angles.sort(descending=True).values[::2]  # each plane has two eigenvalues


def intruder_dimensions(weight: Tensor, adapted: Tensor, top: int = TOP, threshold: float = THRESHOLD) -> int:
    """How many of an adapted weight's leading singular vectors are new, unlike every one of the base weight's.

    Source: the definition in "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv 2410.21228).

    Args:
        weight, adapted: (out, in), or (out, in, height, width) of a convolution, before and after.
        top: look at so many left singular vectors of `adapted`, those with the largest singular values.
        threshold: a vector is new if its cosines with all of `weight`'s left singular vectors are below this in
            absolute value.

    Returns:
        0..top.
    """
    before, after = (
        torch.linalg.svd(matrix.flatten(1).float(), full_matrices=False).U for matrix in (weight, adapted)
    )
    similarity = (before.mT @ after[:, :top]).abs().amax(0)
    return int((similarity < threshold).sum())


def count_intruders(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, int]]:
    """Path and :func:`intruder_dimensions` of each layer of an adapter, which is merged on the way.

    Works for every peft method whose layers have a weight and can merge.
    """
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and adapter_name in layer._all_available_adapter_names():
            before = _base_weight(layer).clone()
            layer.merge(adapter_names=[adapter_name])
            yield path, intruder_dimensions(before, _base_weight(layer))


def _base_weight(layer: BaseTunerLayer) -> Tensor:
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _tuner(method: PeftConfig) -> type[BaseTuner]:
    return PEFT_TYPE_TO_TUNER_MAPPING[PeftType(method.peft_type)]
