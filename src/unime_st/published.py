"""What must be known of models on the Hub to make encoders of their transformers repositories: UniME's and a peer's.

Sources: their repositories, model cards and authors' scripts; UniME (arXiv 2504.17432), UniME-V2 (arXiv 2510.13515) and
Qwen3-VL-Embedding (arXiv 2601.04720). Where those differ, or an encoder here does:

* UniME's Phi-3.5-V has the prompts of its card; its authors' retrieval script leaves out the space before ``<|end|>``.
* Their results on MMEB come from the benchmark's own script, which gives the benchmark's texts bare, without a turn or
  "in one word"; UniME-V2's models read them so in any case.
* MMEB's texts end in a line break, which the scripts keep and our readers take away; only UniME-V2's Qwen2-VL sees it.
* UniME-V2's Qwen2-VL was trained and run with code that knows an image by the ``<|vision_start|>`` before it; its
  prompt has none, so an image's tokens are counted like words. transformers 5 counts them by rows and columns, and so
  does an encoder here, as stock sentence-transformers. ``model[0].flat_image_positions = True`` counts as they do.
* Qwen3-VL-Embedding pads on the right, which changes nothing. Its script resizes images with Pillow, an encoder here
  as the repository's processor does, within the same bounds: an image that must be resized differs a little. It cuts
  inputs at 8,192 tokens, "assistant" among them; ``max_seq_length`` cuts the text alone, and is not set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A published model. All pool the last token, pad on the left, and normalise.

    Encoding leaves the size of images to the repository's processor, within ``pixels`` where those are known; to repeat
    the authors' evaluation, resize them before (``MMEBEvaluator`` and ``MTEBEncoder`` have ``image_size``).
    """

    repo_id: str
    family: str  # its `config.model_type`
    trained_at: int | None  # side of the square that training images were resized to, in pixels; None for none
    paper: str  # arXiv identifier
    results: str  # its name in `unime_st.evaluation.published_results`
    template: str | None = None  # name of its prompts in `unime_st.prompts`; None is the family
    evaluated_at: int | None = None  # side that its authors' evaluation forces images to; None for none
    benchmark: Literal["mmeb", "mmeb_v2"] = "mmeb"  # of its results
    pixels: tuple[int, int] | None = None  # least and most of an image, as its authors' script has them

    @property
    def prompts(self) -> str:
        """Name of its prompt template."""
        return self.template or self.family


@dataclass(frozen=True)
class PublishedReranker:
    """A published reranker, a plain transformers repository: what its authors' scripts ask it and show it.

    Its repository may have another template and other bounds on pixels; those here are its scripts'.
    """

    repo_id: str
    family: str  # its `config.model_type`
    prompt: str  # what it is asked about a pair in use, a name in `unime_st.rerank_prompts.PAIR_PROMPTS`
    training_prompt: str  # what it was trained on
    list_prompt: str  # a name in `LIST_PROMPTS`, in use and in training
    pixels: tuple[int, int]  # least and most of an image
    paper: str  # arXiv identifier


UNIME_V2_CITATION = """
@misc{gu2025unimev2mllmasajudgeuniversalmultimodal,
    title={UniME-V2: MLLM-as-a-Judge for Universal Multimodal Embedding Learning},
    author={Tiancheng Gu and Kaicheng Yang and Kaichen Zhang and Xiang An and Ziyong Feng and Yueyi Zhang
        and Weidong Cai and Jiankang Deng and Lidong Bing},
    year={2025},
    eprint={2510.13515},
    archivePrefix={arXiv},
    primaryClass={cs.CV},
    url={https://arxiv.org/abs/2510.13515}
}
"""

QWEN3_VL_EMBEDDING_CITATION = """
@misc{li2026qwen3vlembedding,
    title={Qwen3-VL-Embedding and Qwen3-VL-Reranker: A Unified Framework for State-of-the-Art Multimodal Retrieval
        and Ranking},
    author={Mingxin Li and Yanzhao Zhang and Dingkun Long and Keqin Chen and Sibo Song and Shuai Bai and Zhibo Yang
        and Pengjun Xie and An Yang and Dayiheng Liu and Jingren Zhou and Junyang Lin},
    year={2026},
    eprint={2601.04720},
    archivePrefix={arXiv},
    url={https://arxiv.org/abs/2601.04720}
}
"""

_UNIME = "2504.17432"
_UNIME_V2 = "2510.13515"
_QWEN3 = "2601.04720"
CITATIONS = {_UNIME_V2: UNIME_V2_CITATION, _QWEN3: QWEN3_VL_EMBEDDING_CITATION}
"""Paper -> BibTeX, of those beside UniME itself, whose losses name theirs."""

_V2_QWEN = "unime_v2_qwen2_vl"

PUBLISHED: dict[str, PublishedCheckpoint] = {
    row.repo_id: row
    for row in (
        PublishedCheckpoint("DeepGlint-AI/UniME-Phi3.5-V-4.2B", "phi3_v", 336, _UNIME, "UniME Phi3.5-V"),
        PublishedCheckpoint("DeepGlint-AI/UniME-LLaVA-1.6-7B", "llava_next", 336, _UNIME, "UniME LLaVA-1.6"),
        PublishedCheckpoint(
            "DeepGlint-AI/UniME-LLaVA-OneVision-7B",
            "llava_onevision",
            336,
            _UNIME,
            "UniME LLaVA-OV-7B",
            "unime_llava_onevision",
        ),
        PublishedCheckpoint(
            "TianchengGu/UniME-V2-Qwen2VL-2B", "qwen2_vl", 672, _UNIME_V2, "UniME-V2 Qwen2-VL-2B", _V2_QWEN, 1344
        ),
        PublishedCheckpoint(
            "TianchengGu/UniME-V2-Qwen2VL-7B", "qwen2_vl", 672, _UNIME_V2, "UniME-V2 Qwen2-VL-7B", _V2_QWEN, 1344
        ),
        PublishedCheckpoint(
            "TianchengGu/UniME-V2-LLaVA-OneVision-8B",
            "llava_onevision",
            336,
            _UNIME_V2,
            "UniME-V2 LLaVA-OV-7B",
            "unime_v2_llava_onevision",
            1344,
        ),
        *(
            PublishedCheckpoint(
                f"Qwen/{name}",
                "qwen3_vl",
                None,
                _QWEN3,
                name,
                "qwen3_vl_embedding",
                benchmark="mmeb_v2",
                pixels=(4 * 32**2, 1800 * 32**2),
            )
            for name in ("Qwen3-VL-Embedding-2B", "Qwen3-VL-Embedding-8B")
        ),
    )
}
"""Hub name -> what to know."""


PUBLISHED_RERANKERS: dict[str, PublishedReranker] = {
    row.repo_id: row
    for row in (
        PublishedReranker(
            "TianchengGu/UniME-V2-reranker-Qwen25VL-7B",
            "qwen2_5_vl",
            "unime_v2",
            "unime_v2_training",
            "unime_v2",
            (4 * 28**2, 300 * 28**2),
            _UNIME_V2,
        ),
    )
}
"""Hub name -> what to know. The name is that of its authors' page on the Hub (huggingface.co/TianchengGu); prompts and
pixels are those of their Embedding/src/model_utils.py, Rerank/dataset/datasets_MMEB_rerank.py and vision code. They
rerank MMEB and retrieval listwise, SugarCrepe pairwise."""


def published_reranker(name: str) -> PublishedReranker:
    """Look a published reranker up by its name on the Hub.

    >>> published_reranker("TianchengGu/UniME-V2-reranker-Qwen25VL-7B").training_prompt
    'unime_v2_training'
    """
    if name not in PUBLISHED_RERANKERS:
        raise ValueError(f"There is no published reranker {name!r}. Known are {', '.join(PUBLISHED_RERANKERS)}.")
    return PUBLISHED_RERANKERS[name]


def published_checkpoint(name: str) -> PublishedCheckpoint:
    """Look a published model up by its name on the Hub.

    >>> published_checkpoint("DeepGlint-AI/UniME-LLaVA-1.6-7B").family
    'llava_next'
    """
    if name not in PUBLISHED:
        raise ValueError(f"There is no published checkpoint {name!r}. Known are {', '.join(PUBLISHED)}.")
    return PUBLISHED[name]
