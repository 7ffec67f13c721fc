"""Hard negatives of a whole training set.

``mine`` is the entry point; ``contents`` describes the rows, ``encoder`` embeds them, ``search`` finds the nearest
targets, ``rows`` chooses among them, ``files`` holds the result on disk.
"""
