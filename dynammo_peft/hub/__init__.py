from .card import model_card, write_model_card
from .card_dataset import dataset_card
from .card_facts import CardFacts
from .card_picture import draw_accuracy_matrix
from .commit import check_can_push
from .export import base_model, save_model
from .learning import load_method, read_learning_options, save_learning_state
from .loading import from_pretrained, load_adapter
from .modeling_dynammo import DynammoForImageClassification
from .onnx import export_onnx
from .publish import push_to_hub, save_pretrained
from .space import write_space
from .standalone import to_standalone
from .stock import to_stock


__all__ = [
    "CardFacts",
    "DynammoForImageClassification",
    "base_model",
    "check_can_push",
    "dataset_card",
    "draw_accuracy_matrix",
    "export_onnx",
    "from_pretrained",
    "load_adapter",
    "load_method",
    "model_card",
    "push_to_hub",
    "read_learning_options",
    "save_learning_state",
    "save_model",
    "save_pretrained",
    "to_standalone",
    "to_stock",
    "write_model_card",
    "write_space",
]
