"""Which rows meet in a batch.

``conflicts`` finds false negatives by identity, ``packing`` fills bins in which none meet, ``together`` brings hard
negatives into them by exchanges, and ``plan`` does all of it for an epoch.
"""
