"""MMEB: ``evaluator`` is the way in, ``tasks`` which there are and how each is read, ``inputs`` what the model sees."""

from unime_st.evaluation.mmeb.evaluator import MMEBEvaluator

__all__ = ["MMEBEvaluator"]
