"""MMEB's layout: ``load`` is the entry point, ``train_rows`` and ``eval_rows`` read the two kinds of folder."""
