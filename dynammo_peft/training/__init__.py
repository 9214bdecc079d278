from .learner import Learner
from .results import Results


__all__ = ["Learner", "Results"]
