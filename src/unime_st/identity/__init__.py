"""What things are: an input (``content``, ``digests``), a row of features, a row of a data set, a model."""
