"""The drawings of a vendor that was never trained on as a corpus, and the command that opens a page to search them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from emoji.benchmark import EmojiBenchmark
from emoji.concepts import HELD_OUT_VENDOR
from unime_st import load_encoder
from unime_st.data import encode_corpus, load_inputs


def search_command(encoder: Path, benchmark: EmojiBenchmark, corpus: Path) -> str:
    """Encode the drawings, or find them encoded; returns the command."""
    drawings = benchmark.image_root / HELD_OUT_VENDOR
    model: Any = load_encoder(encoder, device="cpu")
    encode_corpus(model, load_inputs(drawings), corpus, with_ids=True, window_size=128)
    unime = [sys.executable, "-m", "unime_st.cli"]
    return shlex.join([*unime, "serve", str(corpus), "--model", str(encoder), "--inputs", str(drawings)])
