"""What of `accelerate launch` a run can be started with."""

from __future__ import annotations

import os

from accelerate.utils import str_to_bool

from loco_diffusion.errors import UserError
from loco_diffusion.training.config import TrainingConfig

FSDP = "ACCELERATE_USE_FSDP"  # set by `accelerate launch`, and read by accelerate
_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"


def split_asked(config: TrainingConfig) -> bool:
    """Whether `accelerate launch --use_fsdp` asked to split the base over the processes.

    A block's weights are then gathered when it is called and dropped afterwards. That suits the encoder route. The
    condition's pass of the tokens route, though, leaves keys and values behind from the middle of blocks, whose
    backward pass starts there, where nothing gathers again; and joint conditions run the parts of blocks without
    calling these.

    Raises:
        UserError: accelerate was launched with DeepSpeed, or FSDP does not go together with the configuration.
    """
    if str_to_bool(os.environ.get(_DEEPSPEED, "false")):
        raise UserError(
            "DeepSpeed splits optimizer states and gradients, which adapters have few of; launch with --multi_gpu, or "
            "with --use_fsdp, which splits the frozen base over the processes."
        )
    if not str_to_bool(os.environ.get(FSDP, "false")):
        return False
    if config.tokens is not None:
        raise impossible_split("on the tokens route, which looks into blocks", "leave out tokens")
    if config.torch_compile:
        raise impossible_split("whose blocks are compiled", "leave out torch_compile")
    if config.quantization is not None:
        raise impossible_split(f"in {config.quantization}", "leave out quantization")
    return True


def impossible_split(what: str, remedy: str) -> UserError:
    """What is raised where FSDP does not work: on a base that is `what`."""
    return UserError(f"FSDP cannot split a base {what}; {remedy}, or launch with --multi_gpu.")
