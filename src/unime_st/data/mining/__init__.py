"""Hard negatives of a whole set.

``mine`` is the way in, ``contents`` what the rows hold, ``encoder`` their embeddings, ``search`` the nearest ones,
``rows`` what is kept of them, ``files`` the result on disk.
"""
