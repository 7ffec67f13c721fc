"""A teacher's embeddings, made once: ``embed`` is the way in, ``identity`` tells whose, ``rows`` checks them."""
