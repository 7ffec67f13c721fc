"""Pairs of one's own: read from the usual files and folders, checked as a whole, split by content.

The way in is :func:`~unime_st.data.load_pairs` (``load.py``): ``sources.py`` finds what to read, ``naming.py`` tells
what its columns are, ``cells.py`` reads them, and ``building.py`` makes the rows that the losses take.
"""
