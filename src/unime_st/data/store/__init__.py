"""Embeddings on disk by content, each made once: the teacher's and those that mining needs.

``embeddings`` is the store, ``embed_once`` makes what is missing, ``waiting`` waits for other processes, ``full_disk``
words the error.
"""
