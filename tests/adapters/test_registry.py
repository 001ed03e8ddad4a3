"""The registration with peft."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
from peft import LoraConfig, LoraModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from loco_diffusion.adapters import LoCOConfig, LoCOModel, registry


def test_peft_knows_the_method() -> None:
    member = PeftType("LOCO")
    assert member is PeftType["LOCO"] is PeftType.LOCO  # type: ignore[attr-defined]
    assert member == "LOCO" and member in list(PeftType) and isinstance(member, PeftType)
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is LoCOConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is LoCOModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "loco_"


def test_registering_again_changes_nothing() -> None:
    before = list(PeftType)
    registry.register("loco", LoCOConfig, LoCOModel)
    assert list(PeftType) == before


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(RuntimeError, match="already belongs to peft.tuners.lora") as caught:
        registry.register("lora", LoCOConfig, LoCOModel)
    assert peft.__version__ in str(caught.value)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is LoraModel


@pytest.mark.parametrize(
    "name", ["peft.utils.register_peft_method", "peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING"]
)
def test_a_changed_peft_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delattr(name)
    with pytest.raises(RuntimeError, match=r"ImportError.*install the tested peft") as caught:
        registry.register("loco", LoCOConfig, LoCOModel)
    assert peft.__version__ in str(caught.value)


def test_an_enum_that_takes_no_members_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(str):
        __members__: dict[str, str] = {}

    monkeypatch.setattr(registry, "PeftType", Closed)
    with pytest.raises(RuntimeError, match=r"AttributeError.*install the tested peft"):
        registry.add_peft_type("loco")
