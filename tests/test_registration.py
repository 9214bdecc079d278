"""PEFT knows the method as one of its own."""

import copy
import importlib
import json
import pickle

import pytest
from peft import PeftConfig, PeftType, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from tiny import tiny_model

import dynammo_peft.tuner
from dynammo_peft import DynammoConfig, DynammoModel
from dynammo_peft.tuner import registration


def test_member_is_a_real_one():
    member = PeftType.DYNAMMO
    assert type(member) is PeftType
    assert member is PeftType("DYNAMMO") is PeftType["DYNAMMO"]
    assert member in list(PeftType)
    assert member in PeftType
    assert len(PeftType) == len(set(PeftType)) == len(PeftType.__members__)
    assert (member.name, member.value) == ("DYNAMMO", "DYNAMMO")
    assert isinstance(member, str)
    assert member == "DYNAMMO"
    assert {member: 1}[PeftType("DYNAMMO")] == 1
    assert str(member) == "PeftType.DYNAMMO"
    assert repr(member) == "<PeftType.DYNAMMO: 'DYNAMMO'>"


@pytest.mark.parametrize("duplicate", [lambda value: pickle.loads(pickle.dumps(value)), copy.copy, copy.deepcopy])
def test_member_survives_copies(duplicate):
    assert duplicate(PeftType.DYNAMMO) is PeftType.DYNAMMO


def test_member_in_json():
    assert json.dumps(PeftType.DYNAMMO) == '"DYNAMMO"'


def test_other_members_are_untouched():
    assert PeftType("LORA") is PeftType.LORA
    assert PeftType.DYNAMMO != PeftType.LORA
    with pytest.raises(ValueError):
        PeftType("NO_SUCH_METHOD")


def test_registering_again_does_no_harm():
    members, configs = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    again = importlib.reload(registration)
    assert again.extend_peft_type("DYNAMMO") is PeftType.DYNAMMO
    assert again.extend_peft_type("LORA") is PeftType.LORA
    again.register("dynammo", DynammoConfig, DynammoModel)
    importlib.reload(dynammo_peft.tuner)
    assert list(PeftType) == members
    assert configs == PEFT_TYPE_TO_CONFIG_MAPPING


def test_maps_are_filled():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.DYNAMMO] is DynammoConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.DYNAMMO] is DynammoModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.DYNAMMO] == DynammoModel.prefix == "dynammo_"
    assert type(get_peft_config({"peft_type": "DYNAMMO"})) is DynammoConfig


def test_saved_adapter_is_recognised(tmp_path):
    get_peft_model(tiny_model("vit"), DynammoConfig(classes=["cat", "dog"])).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is DynammoConfig
    assert config.peft_type is PeftType.DYNAMMO
    assert config.classes == [["cat", "dog"]]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DYNAMMO"
