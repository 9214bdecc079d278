from .export import base_model, save_model


__all__ = ["base_model", "save_model"]
