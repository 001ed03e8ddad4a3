"""Frozen base models in fewer bits, by the libraries that diffusers knows."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal, TypeAlias

import torch

from loco_diffusion.errors import UserError

Quantization: TypeAlias = Literal["int8", "nf4"]

_PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


def quantization_config(kind: Quantization, component: str, dtype: torch.dtype) -> Any:
    """What diffusers' `from_pretrained` takes to quantise one component of a pipeline.

    Args:
        kind: int8, a scale an output channel (torchao, anywhere), or nf4 of 4 bits (Dettmers et al. 2023,
            arXiv 2305.14314; bitsandbytes, on a GPU).
        component: name of the component.
        dtype: in which its layers compute.

    Raises:
        UserError: the library is missing, or there is no GPU for it.
    """
    check_quantization(kind)
    from diffusers import BitsAndBytesConfig, TorchAoConfig
    from diffusers.quantizers import PipelineQuantizationConfig

    if kind == "nf4":
        mapping: dict[str, Any] = {
            component: BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        }
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        mapping = {component: TorchAoConfig(Int8WeightOnlyConfig(version=2))}
    return PipelineQuantizationConfig(quant_mapping=mapping)


def check_quantization(kind: Quantization) -> None:
    """Raise UserError if the library of a quantisation is missing, or there is no GPU for it."""
    if kind == "nf4" and not torch.accelerator.is_available():
        raise UserError("quantization nf4 needs a GPU, and there is none; use int8.")
    package = _PACKAGES[kind]
    try:
        import_module(package)
    except Exception as error:  # a wrong CUDA has other types than ImportError
        raise UserError(
            f"quantization {kind} needs {package}, which cannot be imported ({error}); pip install {package}."
        ) from error
