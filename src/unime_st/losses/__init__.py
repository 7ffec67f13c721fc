"""The losses of UniME's two stages, for the sentence-transformers Trainer."""

from unime_st.losses.distill_kl import DistillKLLoss
from unime_st.losses.hard_negative_info_nce import HardNegativeInfoNCELoss
from unime_st.losses.metrics_callback import LossMetricsCallback

__all__ = ["DistillKLLoss", "HardNegativeInfoNCELoss", "LossMetricsCallback"]
