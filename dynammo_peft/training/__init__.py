from .checkpoint import Checkpoints
from .learner import Learner
from .results import Results
from .store import CheckpointError


__all__ = ["CheckpointError", "Checkpoints", "Learner", "Results"]
