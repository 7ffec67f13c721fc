"""One run of stage 2 on pairs: checked, split, evaluated, trained, evaluated, exported; called again, it goes on."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

from unime_st.checkpoints import explained_write_errors
from unime_st.data import PairsReport, check_pairs, split_pairs
from unime_st.data.pairs.contents import content_ids
from unime_st.data.pairs.stored import stored_rows
from unime_st.distributed import from_rank_zero
from unime_st.files import checksum, write_atomically
from unime_st.losses import HardNegativeInfoNCELoss, effective_negatives
from unime_st.modules import export_encoder
from unime_st.training.evaluators import pairs_evaluator
from unime_st.training.report import write_report
from unime_st.training.run import PROVENANCE, claim_folder, run_trainer, start_model
from unime_st.training.settings import PairsTraining

logger = logging.getLogger(__name__)

_FEW = 50

_BEFORE, _RESULTS = "before.json", "results.json"


class TrainedPairs(NamedTuple):
    """What a run has made.

    Attributes:
        encoder: Folder of the exported encoder, a stock checkpoint.
        report: The HTML page; ``report.md`` and ``report.json`` lie beside it.
        before: Metrics on the held-out rows before training.
        after: Metrics on the held-out rows after training.
    """

    encoder: Path
    report: Path
    before: dict[str, float]
    after: dict[str, float]


def train_pairs(
    pairs: Dataset,
    backbone: str | Path,
    output_dir: str | Path,
    settings: PairsTraining | None = None,
    *,
    eval_pairs: Dataset | None = None,
    device: str | None = None,
) -> TrainedPairs:
    """Train an encoder on pairs of one's own by UniME's stage 2, with LoRA on the language model.

    The pairs are checked first (:func:`~unime_st.data.check_pairs`) and refused whole if they are not fit; then a part
    is held out by content (:func:`~unime_st.data.split_pairs`), on which the encoder is evaluated before, in a long run
    while, and after training. Called again with the same arguments after a kill, it goes on from the last whole
    checkpoint; with others, it refuses.

    Args:
        pairs: Of :func:`~unime_st.data.load_pairs`.
        backbone: Hub name or folder of a multimodal LLM, or of a saved encoder.
        output_dir: Gets ``checkpoints/``, ``encoder/``, ``report.html`` and the results.
        settings: None for the defaults.
        eval_pairs: Rows to evaluate on, in place of held-out ones.
        device: Where to train; None chooses.

    Returns:
        The encoder, the report and the metrics.

    Raises:
        ValueError: When the data are not fit for training, with all that must be mended; when the folder holds a run
            with other data or settings, naming them, or another run is at work in it.

    Example:
        >>> train_pairs(Dataset.from_dict({"query": ["a"], "target": [""]}), "backbone", "output")
        Traceback (most recent call last):
        ...
        ValueError: the data set is not fit for training.
        * 1 of 1 rows have a side with nothing on it: row 0. ...
    """
    settings = settings or PairsTraining()
    output = Path(output_dir)
    report = replace(check_pairs(pairs), plan={})  # the steps are the run's to tell
    report.raise_for_problems()
    if eval_pairs is not None:
        check_pairs(eval_pairs).raise_for_problems()
        train, held = pairs, eval_pairs
    else:
        train, held = split_pairs(pairs, settings.held_out, seed=settings.seed)
    if len(held) < _FEW:
        logger.warning("Only %d rows are held out: their scores say little. Raise `held_out`.", len(held))
    if len(train) < settings.per_device_train_batch_size:
        logger.warning("%d rows are fewer than a batch: it is lowered to them.", len(train))
        settings = replace(settings, per_device_train_batch_size=max(2, len(train)))
    told = _told(pairs, backbone, settings, report, {"train": len(train), "held_out": len(held)})
    arguments = settings.arguments(output / "checkpoints", len(train), device=device)
    with ExitStack() as stack:
        from_rank_zero(lambda: claim_folder(output, told, stack, made_before_a_step=_BEFORE))
        if (done := from_rank_zero(lambda: _finished(output, told))) is not None:
            logger.info("%s holds the finished run.", output)
            return done
        evaluator = pairs_evaluator(held)
        model = start_model(backbone, settings, str(arguments.device))
        before = _before(output / _BEFORE, evaluator, model)
        log = _train(model, train, arguments, settings, evaluator)
        after = _metrics(evaluator, model)
        with explained_write_errors(output / "checkpoints"):
            return from_rank_zero(lambda: _finish(model, output, told, report, evaluator, before, after, log))


def _told(
    pairs: Dataset, backbone: str | Path, settings: PairsTraining, report: PairsReport, rows: dict[str, int]
) -> dict[str, Any]:
    identity = checksum(content_ids(*stored_rows(pairs)))
    return {"backbone": str(backbone), "data": report.name, "data_checksum": identity, "rows": rows, **settings.told()}


def _finished(output: Path, told: dict[str, Any]) -> TrainedPairs | None:
    """What a run with these settings has made that got to its end; None for one that did not."""
    results, encoder, page = (output / name for name in (_RESULTS, "encoder", "report.html"))
    if not (results.is_file() and (encoder / PROVENANCE).is_file() and page.is_file()):
        return None
    was = json.loads(results.read_text(encoding="utf-8"))
    same = all(was.get(name) == value for name, value in told.items())
    return TrainedPairs(encoder, page, was["before"], was["after"]) if same else None


def _before(path: Path, evaluator: SentenceEvaluator, model: SentenceTransformer) -> dict[str, float]:
    """Metrics before training; those of a run that goes on are kept."""
    known = from_rank_zero(lambda: json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None)
    if known is None:
        known = _metrics(evaluator, model)
        from_rank_zero(lambda: write_atomically(path, json.dumps(known, indent=1) + "\n"))
    return known


def _metrics(evaluator: SentenceEvaluator, model: SentenceTransformer) -> dict[str, float]:
    found: Any = evaluator(model)
    return {name: float(value) for name, value in found.items()}


def _train(
    model: SentenceTransformer,
    rows: Dataset,
    arguments: SentenceTransformerTrainingArguments,
    settings: PairsTraining,
    evaluator: SentenceEvaluator,
) -> list[dict[str, Any]]:
    """Train by stage 2's loss; returns the Trainer's log."""
    loss = HardNegativeInfoNCELoss(
        model,
        temperature=settings.temperature,
        margin=settings.margin,
        num_hard_negatives=settings.num_hard_negatives,
        gather_across_devices=arguments.world_size > 1,
        mini_batch_num_tokens=settings.mini_batch_num_tokens,
    )
    found = effective_negatives(loss, arguments)
    logger.info("Each query is compared with %d others a step.", found.number)
    for warning in found.warnings:
        logger.warning("%s", warning)
    return run_trainer(loss, rows, arguments, evaluator if arguments.eval_strategy != "no" else None)


def _finish(  # noqa: PLR0917
    model: SentenceTransformer,
    output: Path,
    told: dict[str, Any],
    report: PairsReport,
    evaluator: SentenceEvaluator,
    before: dict[str, float],
    after: dict[str, float],
    log: list[dict[str, Any]],
) -> TrainedPairs:
    encoder = export_encoder(model, output / "encoder")
    results = {**told, "before": before, "after": after}
    write_atomically(encoder / PROVENANCE, json.dumps(results, indent=1) + "\n")
    page = write_report(output, results, report, evaluator, log)
    write_atomically(output / _RESULTS, json.dumps(results, indent=1) + "\n")  # the last: a run without is not over
    return TrainedPairs(encoder, page, before, after)
