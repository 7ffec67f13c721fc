"""Batch samplers for contrastive training."""

from unime_st.samplers.epoch_callback import SamplerEpochCallback
from unime_st.samplers.false_negative_aware import FalseNegativeAwareBatchSampler
from unime_st.samplers.weighted import WeightedBatchSampler

__all__ = ["FalseNegativeAwareBatchSampler", "SamplerEpochCallback", "WeightedBatchSampler"]
