from .backbones import BackboneScore, recommend_backbone
from .cost import Cost, forward_cost
from .metrics import (
    METRICS,
    AccuracyMatrix,
    AverageIncrementalAccuracy,
    BackwardTransfer,
    ClassIncrementalMetric,
    Forgetting,
    LastAccuracy,
    MeanClassRecall,
)


__all__ = [
    "METRICS",
    "AccuracyMatrix",
    "AverageIncrementalAccuracy",
    "BackboneScore",
    "BackwardTransfer",
    "ClassIncrementalMetric",
    "Cost",
    "Forgetting",
    "LastAccuracy",
    "MeanClassRecall",
    "forward_cost",
    "recommend_backbone",
]
