from .card import model_card, write_model_card
from .card_dataset import dataset_card
from .card_facts import CardFacts
from .card_picture import draw_accuracy_matrix
from .export import base_model, save_model
from .stock import to_stock


__all__ = [
    "CardFacts",
    "base_model",
    "dataset_card",
    "draw_accuracy_matrix",
    "model_card",
    "save_model",
    "to_stock",
    "write_model_card",
]
