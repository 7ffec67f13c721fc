"""What must be known of the UniME models on the Hub to make encoders of them: they are plain transformers repositories.

Sources: their repositories, model cards and authors' scripts; UniME (arXiv 2504.17432) and UniME-V2 (arXiv 2510.13515).
The prompts of UniME's Phi-3.5-V are those of its card; its authors' evaluation script leaves out the space before
``<|end|>``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A published model. All pool the last token, pad on the left, and normalise.

    Attributes:
        repo_id: on the Hub.
        family: its ``config.model_type``.
        trained_at: side of the square that training images were resized to, in pixels.
        paper: arXiv identifier.
        results: its name in :func:`unime_st.evaluation.published_results`.
        template: name of its prompts in :data:`unime_st.prompts.TURN_FORMATS` or ``BARE_FORMATS``; None is the family.
        evaluated_at: side of the square that its authors' evaluation forces images to, whatever their shape; None where
            it leaves them to the processor. Encoding leaves them to the repository's processor; to repeat the
            evaluation, resize images before (``MMEBEvaluator`` has ``image_size``).
    """

    repo_id: str
    family: str
    trained_at: int
    paper: str
    results: str
    template: str | None = None
    evaluated_at: int | None = None

    @property
    def prompts(self) -> str:
        """Name of its prompt template."""
        return self.template or self.family


_UNIME = "2504.17432"
_UNIME_V2 = "2510.13515"
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
    )
}
"""Hub name -> what to know."""


def published_checkpoint(name: str) -> PublishedCheckpoint:
    """Look a published model up.

    Args:
        name: on the Hub.

    Raises:
        ValueError: it is not in the table; with those that are.

    Example:
        >>> published_checkpoint("DeepGlint-AI/UniME-LLaVA-1.6-7B").family
        'llava_next'
    """
    if name not in PUBLISHED:
        raise ValueError(f"There is no published checkpoint {name!r}. Known are {', '.join(PUBLISHED)}.")
    return PUBLISHED[name]
