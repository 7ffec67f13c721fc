"""One run of stage 1 on texts: the teacher's embeddings, trained, exported; called again, it goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from unime_st.checkpoints import explained_write_errors
from unime_st.data import with_teacher_labels
from unime_st.data.teacher.embed import Teacher
from unime_st.data.teacher.rows import refuse_one_text
from unime_st.distributed import from_rank_zero
from unime_st.files import checksum, write_atomically
from unime_st.identity.model import named_or_fingerprint
from unime_st.losses import DistillKLLoss, effective_negatives
from unime_st.modules import export_encoder
from unime_st.training.run import PROVENANCE, claim_folder, run_trainer, start_model
from unime_st.training.settings import TextDistillation

logger = logging.getLogger(__name__)


class DistilledTexts(NamedTuple):
    """What a run has made.

    Attributes:
        encoder: Folder of the exported encoder, a stock checkpoint, which stage 2 starts from.
        first: What the Trainer logged first: ``loss``, and the means of the loss's metrics.
        last: The same at the end.
    """

    encoder: Path
    first: dict[str, float]
    last: dict[str, float]


def distill_texts(
    texts: Dataset | Sequence[str],
    teacher: str | Path | Teacher,
    backbone: str | Path,
    output_dir: str | Path,
    settings: TextDistillation | None = None,
    *,
    device: str | None = None,
    **teacher_options: Any,
) -> DistilledTexts:
    """Distil a text teacher's similarities into a backbone by UniME's stage 1, with LoRA on the language model.

    The teacher embeds each distinct text once, into ``output_dir/teacher``; then the backbone is trained without its
    vision tower, which is added to what is exported. Called again with the same arguments after a kill, it goes on
    from the last whole file of embeddings or checkpoint; with others, it refuses. Folders of a teacher or backbone are
    told apart by their paths: put no other model there meanwhile. Several processes share the teacher's work, and
    compare each text with those of all.

    Args:
        texts: Rows of one or more text columns, as :func:`~unime_st.data.load_nli` gives them, or plain texts.
        teacher: Hub name or folder of a sentence-transformers model, or one that is loaded.
        backbone: Hub name or folder of a multimodal LLM, or of a saved encoder.
        output_dir: Gets ``teacher/``, ``checkpoints/`` and ``encoder/``.
        settings: None for the defaults.
        device: Where to train; None chooses.
        **teacher_options: ``prompt``, ``prompt_name``, ``teacher_name``, ``batch_size`` and ``show_progress_bar`` of
            :func:`~unime_st.data.teacher_embeddings`.

    Returns:
        The encoder, and what was logged first and last.

    Raises:
        OSError: When the teacher or the backbone cannot be loaded, or the disk is full.
        ValueError: When there are fewer than two rows or different texts, or a text is compared with one other alone,
            or the folder holds a run with other data or settings, naming them, or another run is at work in it; and
            whatever :func:`~unime_st.data.with_teacher_labels` raises.

    Example:
        >>> distill_texts(["a cat"], "teacher", "backbone", "output")
        Traceback (most recent call last):
        ...
        ValueError: There are too few texts (1 row): similarities need at least two.
    """
    settings = settings or TextDistillation()
    output, encoder = Path(output_dir), Path(output_dir) / "encoder"
    refuse_one_text("texts", texts)
    rows = texts if isinstance(texts, Dataset) else Dataset.from_dict({"text": list(texts)})
    if len(rows) < 2:
        raise ValueError(f"There are too few texts ({len(rows)} row): similarities need at least two.")
    if len(rows) < settings.per_device_train_batch_size:
        logger.warning("%d rows are fewer than a batch: it is lowered to them.", len(rows))
        settings = replace(settings, per_device_train_batch_size=len(rows))
    told = _told(rows, teacher, backbone, settings, teacher_options)
    arguments = settings.arguments(output / "checkpoints", len(rows), device=device)
    with ExitStack() as stack:
        from_rank_zero(lambda: claim_folder(output, told, stack))
        if (done := from_rank_zero(lambda: _finished(encoder, told))) is not None:
            logger.info("%s holds the finished run.", output)
            return done
        labelled = _labelled(rows, teacher, output / "teacher", device, teacher_options)
        if len({text for column in rows.column_names for text in rows[column][:]}) < 2:
            raise ValueError(f"All {len(rows)} rows hold one text: similarities need at least two different ones.")
        model = start_model(backbone, settings, str(arguments.device), text_only=True)
        loss = DistillKLLoss(
            model,
            temperature=settings.temperature,
            direction=settings.direction,
            include_diagonal=settings.include_diagonal,
            gather_across_devices=arguments.world_size > 1,
            mini_batch_num_tokens=settings.mini_batch_num_tokens,
        )
        found = effective_negatives(loss, arguments, candidates_a_row=len(rows.column_names))
        if found.number < 2 and not settings.include_diagonal:  # a softmax over one is 1 on both sides: the loss is 0
            raise ValueError("Each text is compared with one other alone, which teaches nothing. Give larger batches.")
        logger.info("Each text is compared with %d others a step.", found.number)
        for warning in found.warnings:
            logger.warning("%s", warning)
        log = [entry for entry in run_trainer(loss, labelled, arguments) if "loss" in entry]
        with explained_write_errors(output / "checkpoints"):
            return from_rank_zero(lambda: _finish(model, encoder, told, log))


class _NamedTeacher:
    """Loads on first use: of several processes, and in later runs, only one that finds a text not in the cache does."""

    def __init__(self, name: str, device: str | None) -> None:
        self.name, self.device = name, device
        self.model: SentenceTransformer | None = None

    def encode(self, texts: list[str], /, **options: Any) -> np.ndarray:
        """Embed texts."""
        try:
            self.model = self.model or SentenceTransformer(self.name, device=self.device)
        except OSError as error:  # the Hub's do not say of which model they are
            raise OSError(f"The teacher {self.name!r} cannot be loaded: {error}") from error
        return np.asarray(self.model.encode(texts, **options))


def _labelled(
    rows: Dataset, teacher: str | Path | Teacher, cache: Path, device: str | None, options: dict[str, Any]
) -> Dataset:
    """Rows with the teacher's embeddings; a teacher that is loaded here leaves the memory again."""
    if not isinstance(teacher, str | Path):
        return with_teacher_labels(rows, teacher, cache, **options)
    if Path(teacher).is_dir():  # known by its weights, for a folder may come to hold another model
        return with_teacher_labels(rows, SentenceTransformer(str(teacher), device=device), cache, **options)
    options = {"teacher_name": str(teacher), **options}
    return with_teacher_labels(rows, _NamedTeacher(str(teacher), device), cache, **options)


def _told(
    rows: Dataset,
    teacher: str | Path | Teacher,
    backbone: str | Path,
    settings: TextDistillation,
    options: dict[str, Any],
) -> dict[str, Any]:
    name = str(teacher) if isinstance(teacher, str | Path) else None
    asked = {key: options[key] for key in ("prompt", "prompt_name") if options.get(key) is not None}
    texts = checksum(*(checksum(*rows[column][:]) for column in rows.column_names))
    return {
        "backbone": str(backbone),
        "teacher": options.get("teacher_name") or named_or_fingerprint(teacher, name, "teacher_name"),
        **{f"teacher_{key}": value for key, value in asked.items()},
        "data_checksum": texts,
        "rows": {"train": len(rows)},
        **settings.told(),
    }


def _finished(encoder: Path, told: dict[str, Any]) -> DistilledTexts | None:
    """What a run with these settings has made that got to its end; None for one that did not."""
    path = encoder / PROVENANCE
    if not path.is_file():
        return None
    was = json.loads(path.read_text(encoding="utf-8"))
    same = all(was.get(name) == value for name, value in json.loads(json.dumps(told)).items())
    return DistilledTexts(encoder, was["first"], was["last"]) if same else None


def _finish(
    model: SentenceTransformer, encoder: Path, told: dict[str, Any], log: list[dict[str, float]]
) -> DistilledTexts:
    export_encoder(model, encoder)
    done = DistilledTexts(encoder, log[0], log[-1])
    told = {**told, "first": done.first, "last": done.last}
    write_atomically(encoder / PROVENANCE, json.dumps(told, indent=1) + "\n")  # the last: a run without is not over
    return done
