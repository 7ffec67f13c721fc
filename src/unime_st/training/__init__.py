"""Stage 2 on pairs of one's own, from the check of the data to the report and the exported encoder."""

from unime_st.training.evaluators import pairs_evaluator
from unime_st.training.report import evaluation_report
from unime_st.training.settings import PairsTraining
from unime_st.training.train import TrainedPairs, train_pairs

__all__ = ["PairsTraining", "TrainedPairs", "evaluation_report", "pairs_evaluator", "train_pairs"]
