"""Makes PEFT know the methods: `PeftType.DYNAMMO`, `PeftType.DYNAMMO_LORA` and PEFT's maps.

`register_peft_method` accepts a method only if `PeftType` already has a member of its name, and `PeftType` has no hook
for new ones. A plain string in its place breaks `get_model_status` and transformers' adapter functions, so real
members are added here, and nowhere else.
"""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method


def extend_peft_type(name: str) -> PeftType:
    """Adds the member `name` to the enum `PeftType`, or returns it if it is there.

    Args:
        name (`str`): Name and value of the member, upper case.

    Returns:
        `PeftType`: The member.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # Since Python 3.11 a member is found by attribute through the class, not through the member map.
    type.__setattr__(PeftType, name, member)
    return member


def register(name: str, config_cls: type, model_cls: type) -> None:
    """Registers a method with PEFT; importing the package twice or reloading it does no harm.

    Args:
        name (`str`): Of the method, lower case.
        config_cls (`type`): Its configuration.
        model_cls (`type`): Its tuner.
    """
    peft_type = extend_peft_type(name.upper())
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
