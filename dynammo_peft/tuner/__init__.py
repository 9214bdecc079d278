from .config import DynammoConfig
from .default import TASK_ADAPTERS, default_adapter
from .head_config import HeadConfig
from .head_layer import DynammoHead
from .layer import DynammoLayer
from .lora import DynammoLoraConfig, DynammoLoraModel
from .model import DynammoModel
from .registration import register


__all__ = [
    "TASK_ADAPTERS",
    "DynammoConfig",
    "DynammoHead",
    "DynammoLayer",
    "DynammoLoraConfig",
    "DynammoLoraModel",
    "DynammoModel",
    "HeadConfig",
    "default_adapter",
]

register("dynammo", DynammoConfig, DynammoModel)
register("dynammo_lora", DynammoLoraConfig, DynammoLoraModel)
