"""Which rows meet in a batch.

``conflicts`` finds false negatives by identity, ``packing`` fills bins in which none meet, ``together`` brings hard
negatives or whole clusters into them by exchanges, ``plan`` does all of it for an epoch, and ``report`` says what an
epoch leaves out.
"""
