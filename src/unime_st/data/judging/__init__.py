"""Judging mined negatives with a reranker or an MLLM, choosing among them by its scores, and the released lists."""
