"""Corpora of any size: encoded in windows, into parts on disk, and read back.

``encode`` is the entry point; ``windows`` cuts the inputs, ``window_encoder`` encodes a window, ``run`` compares and
writes, ``parts`` are the files, ``encoded`` is the corpus as it is read; ``stream`` encodes without files.
"""
