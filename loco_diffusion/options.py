"""Fields of other classes that a configuration sets by name: of a peft method's config, of a condition."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

if TYPE_CHECKING:
    from peft import PeftConfig

    from loco_diffusion.conditions import Condition


def peft_config(method: str, target_modules: str | list[str], options: dict[str, Any]) -> PeftConfig:
    """The config of a peft method.

    Args:
        method: such as "loco" or "lora".
        target_modules: in peft's form, without our presets.
        options: fields of the method's own config class.

    Raises:
        ValueError: the method is unknown, or does not accept the options.
    """
    from peft import PeftConfig

    config_class = _config_class(method)
    if "target_modules" in options:
        raise ValueError("target_modules belongs beside options, not into it; move it")
    reserved = {field.name for field in dataclasses.fields(PeftConfig)} | {"target_modules"}
    known = (field.name for field in dataclasses.fields(config_class) if field.name not in reserved)
    checked = _checked(config_class, known, options)
    try:
        return config_class(target_modules=target_modules, **checked)
    except TypeError as error:
        raise ValueError(f"{config_class.__name__} does not accept these options ({error})") from error


def condition_with(condition: Condition, options: Mapping[str, Any]) -> Condition:
    """A condition with other values of some of its fields.

    Raises:
        ValueError: it has no such fields, or does not accept the values.
    """
    if not options:
        return condition
    if not dataclasses.is_dataclass(condition) or isinstance(condition, type):
        raise ValueError(f"the condition {condition.name} has no options; remove condition_options")
    known = (field.name for field in dataclasses.fields(condition))
    return dataclasses.replace(condition, **_checked(type(condition), known, options))


def _checked(owner: type[Any], known: Iterable[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options in the types that the class declares: peft itself would take r: "four"."""
    from peft import PeftConfig

    names = list(known)
    hints = typing.get_type_hints(owner)
    checked = {}
    for name, value in options.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            remedy = f"did you mean {close[0]}" if close else f"choose from {', '.join(names)}"
            raise ValueError(f"{owner.__name__} has no option {name!r}; {remedy}")
        if issubclass(owner, PeftConfig) and "Literal" in str(hints[name]):
            checked[name] = value  # peft lists patterns such as pissa_niter_[number]; its classes check them
            continue
        try:
            checked[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            raise ValueError(
                f"option {name}: {error.errors()[0]['msg']}, got {value!r}; correct it"
            ) from error
    return checked


def _config_class(method: str) -> type[Any]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import loco_diffusion.adapters  # noqa: F401  (registers our methods with peft)

    classes = {
        str(key.value).lower(): config_class
        for key, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if "target_modules" in {field.name for field in dataclasses.fields(config_class)}
    }
    if method.lower() not in classes:
        close = difflib.get_close_matches(method.lower(), classes, n=1)
        remedy = f"did you mean {close[0]}" if close else f"choose one of {', '.join(sorted(classes))}"
        raise ValueError(f"there is no adapter method {method!r}; {remedy}")
    return classes[method.lower()]
