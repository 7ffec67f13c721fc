"""What a guide says of rows.

``embeddings`` reads it, ``neighbors`` compares, ``store`` keeps what was found, and ``clusters`` parts the rows by it.
"""
