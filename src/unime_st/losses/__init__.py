"""The losses of UniME's two stages and of UniME-V2, for the sentence-transformers Trainer."""

from unime_st.losses.candidate_kl import CandidateKLLoss
from unime_st.losses.distill_kl import DistillKLLoss
from unime_st.losses.hard_negative_info_nce import HardNegativeInfoNCELoss
from unime_st.losses.metrics_callback import LossMetricsCallback
from unime_st.losses.negatives import Negatives, effective_negatives
from unime_st.losses.pair_and_list import PairAndListLoss

__all__ = [
    "CandidateKLLoss",
    "DistillKLLoss",
    "HardNegativeInfoNCELoss",
    "LossMetricsCallback",
    "Negatives",
    "PairAndListLoss",
    "effective_negatives",
]
