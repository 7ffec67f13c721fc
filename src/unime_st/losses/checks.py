"""What a loss refuses, with the name of the argument or column and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from unime_st.arguments import require_number
from unime_st.columns import NO_CANDIDATE
from unime_st.losses.described import described

MORE_ROWS = "Raise `per_device_train_batch_size`, or on several processes set `gather_across_devices=True`."
"""What helps a batch with too little to compare."""

DIRECTIONS = ("query_to_doc", "doc_to_query")
HARDNESS_MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")

_FEW = 8  # a few of a small batch: fewer than all, but more than one in so many
_MOST_ROWS = 10


def check_at_least_one(name: str, value: int | None, without: str) -> None:
    """Refuse what is no whole number, or below 1; ``without`` says what None does."""
    require_number(name, value, optional=True)
    if value is not None and value < 1:
        raise ValueError(f"`{name}={value}`, but at least 1 is needed; None {without}.")


def check_hard_negatives_warmup(steps: int, k: int | None) -> None:
    """Refuse a number of steps that is no whole number or below 0, and a warm-up that nothing follows."""
    require_number("hard_negatives_warmup_steps", steps, least=0)
    if steps and k is None:
        raise ValueError(
            f"`hard_negatives_warmup_steps={steps}` compares with all negatives first, but `num_hard_negatives=None` "
            "always does. Give the number of hardest negatives to go on with, or leave the warm-up at 0."
        )


def check_directions(directions: Sequence[str]) -> tuple[str, ...]:
    """Return the directions as a tuple, or say what is wrong with them."""
    found = tuple(directions) if isinstance(directions, list | tuple) else ()
    if found not in (DIRECTIONS[:1], DIRECTIONS, DIRECTIONS[::-1]):
        raise ValueError(
            f"`directions={directions!r}`, but they must be {DIRECTIONS[:1]} or {DIRECTIONS}; queries are not compared "
            "with queries here, nor documents with documents."
        )
    return found


def check_hardness(mode: str | None, strength: float) -> None:
    """Refuse an unknown way of weighting, a strength that is no finite number >= 0, and one that weights nothing."""
    if mode is not None and mode not in HARDNESS_MODES:
        raise ValueError(f"`hardness_mode={mode!r}`, but it must be None or one of {', '.join(HARDNESS_MODES)}.")
    require_number("hardness_strength", strength, least=0, whole=False)
    if not strength < float("inf"):
        raise ValueError(f"`hardness_strength={strength}`, but it must be a finite number (5 to 9 is usual).")
    if strength and mode is None:
        raise ValueError(
            f"`hardness_strength={strength}` weights nothing with `hardness_mode=None`. Say which negatives to weight: "
            f"{', '.join(HARDNESS_MODES)}."
        )
    if mode is not None and not strength:
        raise ValueError(
            f"`hardness_mode={mode!r}` weights nothing with `hardness_strength={strength}`. Give a strength above 0 (5 "
            "to 9 is usual), or leave the mode at None."
        )


def check_negative_selection(selection: str, k: int | None) -> None:
    """Refuse an unknown way of choosing negatives, and a draw of all of them."""
    if selection not in ("hardest", "random"):
        raise ValueError(f"`negative_selection={selection!r}`, but it must be 'hardest' or 'random'.")
    if selection == "random" and k is None:
        raise ValueError("`negative_selection='random'` needs a `num_hard_negatives`: None keeps all of them.")


def check_offered(k: int | None, offered: int, *, gathers: bool) -> None:
    """Refuse a number of negatives that a batch with so many candidates beside the positive cannot meet."""
    if k is None or k <= offered:
        return
    gathered = "" if gathers else ", set `gather_across_devices=True` on several processes"
    raise ValueError(
        f"`num_hard_negatives={k}`, but each query has only {offered} candidates besides its positive. Lower it (None "
        f"keeps all), raise `per_device_train_batch_size`{gathered}, or add explicit negatives. If this is the small "
        "last batch of an epoch, met first after resuming, set `dataloader_drop_last=True`."
    )


def require_step(warmup_steps: int, step: int | None) -> int:
    """The step that a warm-up is in, or what to do when nobody tells it."""
    if step is None:
        raise ValueError(
            f"`hard_negatives_warmup_steps={warmup_steps}`, but nobody tells the loss which step it is in. Give the "
            "Trainer `callbacks=[LossMetricsCallback(loss)]` (from `unime_st.losses`), or in a training loop of your "
            "own set `loss.global_step` (of this loss, not of one around it) before each step."
        )
    return step


def few_of_a_small_batch(k: int | None, candidates: int) -> str:
    """Warn of negatives that are a few of only so many candidates; an empty text where they are not."""
    if k is None or k >= candidates or k * _FEW <= candidates:
        return ""
    return (
        f"`num_hard_negatives={k}` keeps a few of only {candidates} candidates. In small batches the hardest are much "
        "the same for every query, and a loss over these alone made all embeddings alike (measured with 4 and 8 of "
        "31): keep all with `num_hard_negatives=None`, or at first, with `hard_negatives_warmup_steps`. The paper's 8 "
        "are of 1,024."
    )


def all_left_out(rows: int, offered: int, margin: float | None, by_margin: float, by_identity: float) -> str:
    """Say why no row has a negative, by how many of the candidates offered each filter leaves out in the mean."""
    if not offered:
        return f"its only row has no candidate but its own positive. {MORE_ROWS}"
    return (
        f"none of its {rows} rows has a negative left. Of {offered} candidates besides its positive a row loses "
        f"{by_margin:.3g} for scoring above it by more than `margin={margin}` and {by_identity:.3g} for holding a "
        "right answer by content or label. Raise the margin (None switches it off), look whether the label or the "
        f"target column holds few distinct values, or compare more rows. {MORE_ROWS}"
    )


def check_columns(embeddings: Sequence[Tensor], least: int, needed: str) -> None:
    """Refuse embeddings that do not stand for the columns of one batch; by shapes alone."""
    shapes = [tuple(column.shape) for column in embeddings]
    if len(shapes) < least or len(set(shapes)) > 1 or any(len(shape) != 2 or not shape[0] for shape in shapes):
        raise ValueError(f"{needed} must be embeddings of one shape (B, D), one tensor a column; got {shapes}.")


def check_labels(labels: Tensor, batch: int) -> None:
    """Refuse labels that are not one integer a row."""
    if labels.is_floating_point() or labels.is_complex() or labels.ndim != 1:
        raise ValueError(
            "The label must be one integer a row, identifying the row's target, equal for equal targets, got "
            f"{tuple(labels.shape)} of {labels.dtype}. Remove or rename the column if it means something else."
        )
    if len(labels) != batch:
        raise ValueError(f"Labels or content ids have {len(labels)} rows, but the embeddings have {batch}.")


def check_content_ids(ids: Sequence[Tensor], columns: int, batch: int) -> None:
    """Refuse identities that are not one integer a row and column."""
    if len(ids) != columns:
        raise ValueError(f"Content ids must be given for each of the {columns} columns, got {len(ids)}.")
    for number, column in enumerate(ids):
        if column.is_floating_point() or column.is_complex() or tuple(column.shape) != (batch,):
            raise ValueError(
                f"Content ids of column {number} have shape {tuple(column.shape)} ({column.dtype}), but integers of "
                f"shape ({batch},) are needed: one identity a row."
            )


def check_teacher(
    labels: Tensor | None, columns: int, batch: int, model: Any = None, features: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Refuse a teacher of the wrong shape, or with an embedding that says nothing.

    Numbers are read off the device in every batch, before the student runs: one bad row would spoil the weights.
    """
    if labels is None:
        raise ValueError(
            "DistillKLLoss got no label. Add a `label` column with the teacher's embedding of each text, e.g. from "
            "`unime_st.data.teacher_embeddings`."
        )
    expected = "(B, Dt)" if columns == 1 else f"(B, {columns}, Dt)"
    fits = (labels.ndim == 3 and labels.shape[1] == columns) or (labels.ndim == 2 and columns == 1)
    if not (fits and labels.is_floating_point() and labels.shape[-1] > 0):
        raise ValueError(
            f"The teacher's embeddings have shape {tuple(labels.shape)} ({labels.dtype}), but {columns} text column(s) "
            f"need floats of shape {expected}: one embedding a text, in the columns' order."
        )
    if len(labels) != batch:
        raise ValueError(
            f"The teacher has {len(labels)} rows, but the student's embeddings have {batch}: one each is needed."
        )
    told = labels.reshape(batch, columns, -1)
    finite, zero = told.isfinite().all(dim=2), (told == 0).all(dim=2)
    if not bool((~finite | zero).any()):
        return
    if not bool(finite.all()):
        bad, what, harm = ~finite, "NaN or infinite numbers", "which would make every weight NaN"
    else:
        bad, what, harm = zero, "nothing but zeros", "as like to any text as to any other"
    places = bad.nonzero().tolist()
    rows = sorted({row for row, _ in places})
    row, column = places[0]
    first = f" The first is of {described(model, features[column], row)}." if features else ""
    raise ValueError(
        f"The teacher's embeddings hold {what} in row(s) {rows[:_MOST_ROWS]} of the batch "
        f"({len(rows)} of {batch}), {harm}.{first} Embed these texts again, or drop them."
    )


def check_scores(
    scores: Tensor | None,
    columns: int,
    batch: int,
    model: Any = None,
    features: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Refuse scores of the wrong shape, or one that is neither in 0..1 nor -1, which a positive cannot have.

    Numbers are read off the device in every batch, before the model runs: one bad score would spoil the weights.
    """
    needed = f"one score in 0..1 for each of the {columns} candidate columns, the positive's first"
    if scores is None:
        raise ValueError(
            f"CandidateKLLoss got no label. Add a `label` column with {needed}; rows without scores train with "
            "HardNegativeInfoNCELoss, as a data set of their own (`loss={name: loss}`)."
        )
    if not scores.is_floating_point() or scores.ndim != 2 or scores.shape[1] != columns:
        raise ValueError(
            f"The scores (label) have shape {tuple(scores.shape)} ({scores.dtype}), but {needed}, is needed: "
            f"floats of shape ({batch}, {columns}). Where a row has fewer candidates, its score is {NO_CANDIDATE:g}."
        )
    if len(scores) != batch:
        raise ValueError(f"There are scores of {len(scores)} rows, but the embeddings have {batch}: one row each.")
    wrong = ~(((scores >= 0) & (scores <= 1)) | (scores == NO_CANDIDATE))  # NaN compares as false
    wrong[:, 0] |= scores[:, 0] == NO_CANDIDATE
    if not bool(wrong.any()):
        return
    places = wrong.nonzero().tolist()
    row, column = places[0]
    held = f", {described(model, features[column + 1], row)}" if features else ""
    which = "the positive" if column == 0 else f"negative {column}"
    raise ValueError(
        f"The score of row {row}, column {column} of the label ({which}{held}) is {scores[row, column].item():g}, and "
        f"{len(places) - 1} more of the batch are out of range. A score is a judge's p(yes) in 0..1, or "
        f"{NO_CANDIDATE:g} for no candidate, which a positive cannot have. Judge these rows again, or drop them; "
        "logits need a sigmoid."
    )
