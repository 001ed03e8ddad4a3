"""The one place that touches peft's enum of methods and its mappings.

peft has no plugin mechanism: ``register_peft_method`` accepts only members of the enum ``PeftType``. So the
enum is given a member first.
"""

from __future__ import annotations

import peft
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Make peft know a method, for get_peft_model, save_pretrained, from_pretrained and
    inject_adapter_in_model.

    Registering the same classes again does nothing.

    Args:
        name: lower case; its upper case becomes the ``peft_type`` in adapter_config.json.
        config_cls, model_cls: the method's classes; ``model_cls.prefix`` begins its parameters' names.

    Raises:
        RuntimeError: peft has another method of this name, or works differently from what this code knows.
    """
    peft_type = add_peft_type(name)
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import register_peft_method

        registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
        if registered is None:
            register_peft_method(
                name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix
            )
            return
    except Exception as error:  # whatever it is, the cause is a peft that works differently
        raise RuntimeError(_complaint(name, error)) from error
    if registered is not config_cls:
        raise RuntimeError(_complaint(name, f"the name already belongs to {registered.__module__}"))


def add_peft_type(name: str) -> PeftType:
    """Give peft's enum the member ``name.upper()``, unless it has it, and return it.

    Raises:
        RuntimeError: the enum of this peft or this Python does not take it.
    """
    value = name.upper()
    try:
        if value in PeftType.__members__:
            return PeftType[value]
        member = str.__new__(PeftType, value)
        member._name_ = value
        member._value_ = value
        # Enum classes refuse new attributes, and from Python 3.12 on members are attributes of their class.
        type.__setattr__(PeftType, value, member)
        PeftType._member_map_[value] = member
        PeftType._value2member_map_[value] = member
        PeftType._member_names_.append(value)
        if PeftType(value) is not member or member not in list(PeftType):
            raise TypeError("PeftType does not take a new member")
    except Exception as error:
        raise RuntimeError(_complaint(name, error)) from error
    return member


def _complaint(name: str, reason: Exception | str) -> str:
    if isinstance(reason, Exception):
        reason = f"{type(reason).__name__}: {reason}"
    return (
        f"Cannot register the adapter method {name!r} with peft {peft.__version__} ({reason}): "
        'install the tested peft (pip install "peft>=0.21,<0.22") or update loco-diffusion.'
    )
