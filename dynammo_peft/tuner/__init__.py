from .config import DynammoConfig
from .layer import DynammoHead, DynammoLayer
from .model import DynammoModel
from .registration import register


__all__ = ["DynammoConfig", "DynammoHead", "DynammoLayer", "DynammoModel"]

register(DynammoConfig, DynammoModel)
