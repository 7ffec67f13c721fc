"""MMEB: ``evaluator`` is the entry point, ``tasks`` lists and reads the tasks, ``inputs`` collects their inputs."""

from unime_st.evaluation.mmeb.evaluator import MMEBEvaluator

__all__ = ["MMEBEvaluator"]
