"""What of `accelerate launch` a run can be started with."""

from __future__ import annotations

import os

from accelerate.utils import str_to_bool

from loco_diffusion.errors import UserError

# Set by `accelerate launch`, and read by accelerate.
_SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def check_launch() -> None:
    """Refuse ways of splitting a model over processes.

    Both gather a block's weights when it is called and drop them afterwards. The condition's pass of the tokens
    route, though, leaves keys and values behind from the middle of blocks, whose backward pass starts there, where
    nothing gathers again; and joint conditions run the parts of blocks without calling these. Optimizer states,
    which DeepSpeed splits too, are a few megabytes here.

    Raises:
        UserError: accelerate was launched with FSDP or DeepSpeed.
    """
    for variable, name in _SHARDING.items():
        if str_to_bool(os.environ.get(variable, "false")):
            raise UserError(
                f"Training does not split the base over processes, as {name} does; launch with --multi_gpu, where "
                "each has all of it, and make it smaller with quantization: nf4."
            )
