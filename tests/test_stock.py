"""Seams to other libraries are where they were; one that has moved is told in one sentence."""

import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from unime_st import stock
from unime_st.stock import SEAMS, Seam, moved, require

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.where[1])
def test_a_seam_is_where_it_was(seam):
    assert moved(seam) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"where": ("sentence_transformers.gone", "x")}, "is not there"),
        ({"where": (SEAMS[0].where[0], "SentenceTransformer._renamed")}, "is not there"),
        ({"takes": ("inputs", "nothing_of_the_kind")}, "takes no nothing_of_the_kind"),
    ],
)
def test_a_seam_that_moved_is_told_in_a_sentence(change, said, monkeypatch):
    gone = replace(SEAMS[0], **change)
    assert said in moved(gone)
    assert version("sentence-transformers") in moved(gone)
    monkeypatch.setattr(stock, "SEAMS", (*SEAMS, gone))
    with pytest.raises(ImportError, match=re.escape(f"`{gone.where[0]}.{gone.where[1]}` of sentence-transformers")):
        require("sentence-transformers")
    require("transformers")


def test_overridden_private_methods_are_listed():
    """A private method of a stock class that ours replaces is called by stock code alone: a rename turns ours off."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

    from unime_st.modules.card_data import EncoderCardData
    from unime_st.modules.multimodal_encoder import MultimodalEncoder
    from unime_st.modules.sentence_transformer import MultimodalSentenceTransformer

    listed = {seam.where[1].rpartition(".")[2] for seam in SEAMS}
    pairs = (
        (MultimodalSentenceTransformer, SentenceTransformer),
        (MultimodalEncoder, Transformer),
        (EncoderCardData, SentenceTransformerModelCardData),
    )
    for own, base in pairs:
        replaced = {name for name in vars(own) if re.match(r"_[a-z]", name) and callable(getattr(base, name, None))}
        assert replaced <= listed, own


def test_bounds_keep_to_what_was_read():
    text = (ROOT / "pyproject.toml").read_text()
    for library, bound in {"sentence-transformers": "<7", "transformers": "<6"}.items():
        assert re.search(rf'"{library}>=[^"]*{bound}"', text)
    assert all(isinstance(seam, Seam) and seam.why and seam.read_in for seam in SEAMS)
