"""DynaMMo for HuggingFace PEFT: image classifiers that learn new classes, at the cost of one forward pass.

Importing the package registers the method `DYNAMMO` with PEFT, and its standalone models with transformers.
"""

from . import hub
from .data import ClassIncrementalScenario, ExemplarMemory, Task, load_image_dataset, resized_image_processor
from .evaluation import Cost, forward_cost
from .methods import (
    ACL,
    METHODS,
    AdapterMethodArguments,
    Dynammo,
    DynammoArguments,
    Joint,
    Method,
    MethodArguments,
    Stage,
)
from .training import CheckpointError, Checkpoints, Learner, Results
from .tuner import DynammoConfig, DynammoLoraConfig, DynammoLoraModel, DynammoModel
from .version import __version__


__all__ = [
    "ACL",
    "METHODS",
    "AdapterMethodArguments",
    "CheckpointError",
    "Checkpoints",
    "ClassIncrementalScenario",
    "Cost",
    "Dynammo",
    "DynammoArguments",
    "DynammoConfig",
    "DynammoLoraConfig",
    "DynammoLoraModel",
    "DynammoModel",
    "ExemplarMemory",
    "Joint",
    "Learner",
    "Method",
    "MethodArguments",
    "Results",
    "Stage",
    "Task",
    "__version__",
    "forward_cost",
    "hub",
    "load_image_dataset",
    "resized_image_processor",
]
