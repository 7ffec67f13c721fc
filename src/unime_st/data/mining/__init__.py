"""Hard negatives of a whole training set.

``mine`` is the entry point; ``contents`` describes the rows, ``encoder`` embeds them, ``rows`` chooses among the
nearest targets, ``files`` holds the result on disk.
"""
