from .card import model_card, write_model_card
from .card_dataset import dataset_card
from .card_facts import CardFacts
from .card_picture import draw_accuracy_matrix
from .export import base_model, save_model
from .modeling_dynammo import DynammoForImageClassification
from .onnx import export_onnx
from .standalone import to_standalone
from .stock import to_stock


__all__ = [
    "CardFacts",
    "DynammoForImageClassification",
    "base_model",
    "dataset_card",
    "draw_accuracy_matrix",
    "export_onnx",
    "model_card",
    "save_model",
    "to_standalone",
    "to_stock",
    "write_model_card",
]
