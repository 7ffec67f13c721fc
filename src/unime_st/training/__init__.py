"""Both stages as whole runs: texts and a teacher, or pairs of one's own, to an exported encoder."""

from unime_st.training.distill import DistilledTexts, distill_texts
from unime_st.training.evaluators import pairs_evaluator
from unime_st.training.planning import TrainingPlan, plan_training, without_weights
from unime_st.training.report import evaluation_report
from unime_st.training.settings import PairsTraining, TextDistillation
from unime_st.training.train import TrainedPairs, train_pairs

__all__ = [
    "DistilledTexts",
    "PairsTraining",
    "TextDistillation",
    "TrainedPairs",
    "TrainingPlan",
    "distill_texts",
    "evaluation_report",
    "pairs_evaluator",
    "plan_training",
    "train_pairs",
    "without_weights",
]
