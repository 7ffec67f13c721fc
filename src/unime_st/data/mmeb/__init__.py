"""MMEB's layout: ``load`` is the entry point, ``train_rows`` and ``eval_rows`` read the two kinds of folder."""

from unime_st.data.mmeb.load import load_mmeb_eval, load_mmeb_train

__all__ = ["load_mmeb_eval", "load_mmeb_train"]
