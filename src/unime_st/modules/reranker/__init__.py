"""A judge or reranker: a multimodal LLM that is asked for yes or no, as a stock ``CrossEncoder`` on disk."""
