from .adapters import (
    AdapterTensors,
    Slot,
    adapted_base,
    adapter_slots,
    adapter_tensors,
    set_adapter_tensors,
)
from .backbones import merge_backbones
from .curvature import diagonal_fisher, input_grams
from .functions import (
    anchored_mean,
    average_statistics,
    exponential_moving_average,
    fisher,
    linear,
    regmean,
    running_anchored_mean,
    running_mean,
    uniform,
)
from .learned import learn_merge_weights
from .merge import combine, merge_adapters, merge_into
from .objectives import gaussian_likelihood
from .pruning import dare_linear, dare_ties, magnitude_prune, ties
from .recalibration import recalibrate
from .registry import COMBINATIONS, MergeFunction, check_weights, merge_function
from .soups import (
    CyclicSnapshots,
    HierarchicalSoup,
    Soup,
    average_adapters,
    cyclic_schedule,
    greedy_soup,
    hierarchical_soup,
)
from .weights import MergeWeights


__all__ = [
    "COMBINATIONS",
    "AdapterTensors",
    "CyclicSnapshots",
    "HierarchicalSoup",
    "MergeFunction",
    "MergeWeights",
    "Slot",
    "Soup",
    "adapted_base",
    "adapter_slots",
    "adapter_tensors",
    "anchored_mean",
    "average_adapters",
    "average_statistics",
    "check_weights",
    "combine",
    "cyclic_schedule",
    "dare_linear",
    "dare_ties",
    "diagonal_fisher",
    "exponential_moving_average",
    "fisher",
    "gaussian_likelihood",
    "greedy_soup",
    "hierarchical_soup",
    "input_grams",
    "learn_merge_weights",
    "linear",
    "magnitude_prune",
    "merge_adapters",
    "merge_backbones",
    "merge_function",
    "merge_into",
    "recalibrate",
    "regmean",
    "running_anchored_mean",
    "running_mean",
    "set_adapter_tensors",
    "ties",
    "uniform",
]
