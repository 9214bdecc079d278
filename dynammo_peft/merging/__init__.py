from .functions import COMBINATIONS, average_statistics, check_weights, linear


__all__ = ["COMBINATIONS", "average_statistics", "check_weights", "linear"]
