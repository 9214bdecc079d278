from .acl import ACL
from .adapters import AdapterMethodArguments
from .base import Method, MethodArguments, Optimization, Stage
from .dynammo import Dynammo
from .dynammo_arguments import DynammoArguments
from .joint import Joint


METHODS: dict[str, type[Method]] = {method.name: method for method in (Dynammo, ACL, Joint)}

__all__ = [
    "ACL",
    "METHODS",
    "AdapterMethodArguments",
    "Dynammo",
    "DynammoArguments",
    "Joint",
    "Method",
    "MethodArguments",
    "Optimization",
    "Stage",
]
