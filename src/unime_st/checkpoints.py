"""Checkpoints known to be whole: after a kill or a full disk, a run goes on from the last of them."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from sentence_transformers import SentenceTransformerTrainer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unime_st import distributed
from unime_st.features import forget_kept_features
from unime_st.files import FULL, remove_leftovers, write_atomically

logger = logging.getLogger(__name__)

MARKER = "complete.json"
"""In a checkpoint that is whole: its step, and the size in bytes and the SHA-256 of every file."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_THREADS = 8
_TORCH_WRITER = ("PytorchStreamWriter failed", "inline_container", "iostream error")  # RuntimeErrors without a number


def mark_complete(checkpoint: Path, step: int) -> None:
    """Write the marker of a checkpoint all of whose files are written, after bringing them to the disk.

    Files are read once more for their checksums: about 0.6 s a gigabyte and thread, of several files at a time.
    """
    remove_leftovers(checkpoint)

    def described(file: Path) -> dict[str, Any]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        return {"bytes": file.stat().st_size, "sha256": _sha256(file)}

    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER)
    names = [file.relative_to(checkpoint).as_posix() for file in files]
    with ThreadPoolExecutor(_THREADS) as pool:
        told = dict(zip(names, pool.map(described, files), strict=True))
    write_atomically(checkpoint / MARKER, json.dumps({"step": step, "files": told}, indent=1))


def is_complete(checkpoint: Path, *, read_files: bool = True) -> bool:
    """Whether a checkpoint has its marker, and every file the marker names at its size and with its checksum.

    The log names a file that has changed, and says so where the marker of an earlier version has no checksums. Without
    ``read_files`` sizes alone are compared.
    """
    try:
        told = json.loads((checkpoint / MARKER).read_bytes())["files"]
        marked = {checkpoint / name: own["sha256"] for name, own in told.items() if not isinstance(own, int)}
        sizes = {checkpoint / name: own if isinstance(own, int) else own["bytes"] for name, own in told.items()}
        if any(file.stat().st_size != size for file, size in sizes.items()):
            return False
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (ValueError, KeyError, TypeError, AttributeError):  # a marker that is cut short tells nothing
        logger.warning("%s is damaged: it does not say whether its checkpoint is whole.", checkpoint / MARKER)
        return False
    if not read_files:
        return True
    if len(marked) < len(sizes):
        logger.warning(
            "%s was marked by an earlier version, without checksums: its files have their sizes, but whether one is "
            "damaged cannot be told.", checkpoint)  # fmt: skip
    with ThreadPoolExecutor(_THREADS) as pool:
        changed = [file for file, now in zip(marked, pool.map(_sha256, marked), strict=True) if now != marked[file]]
    for file in changed:
        logger.warning("%s is damaged: it is not what was saved. Its checkpoint is passed over.", file)
    return not changed


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def checkpoints(folder: str | Path) -> list[Path]:
    """All checkpoints in a Trainer's output folder, whole or not, in the order of their steps; [] for no folder."""
    root = Path(folder)
    steps = [(int(found[1]), path) for path in root.glob("*") if (found := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(steps) if path.is_dir()]


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint to go on from: the latest whole one in a run's ``output_dir``, see :class:`CheckpointCallback`.

    ``transformers.trainer_utils.get_last_checkpoint`` also takes one that is half-written or damaged. Files are read
    for that; with several processes, let one look: ``from_rank_zero(lambda: last_complete_checkpoint(...))``.
    """
    return next((path for path in reversed(checkpoints(folder)) if is_complete(path)), None)


class ResumingTrainer(SentenceTransformerTrainer):
    """A ``SentenceTransformerTrainer`` that goes on from a checkpoint under FSDP too.

    Up to 6.2 sentence-transformers takes no model where transformers hands over the split one, and raises a TypeError.
    """

    def _load_from_checkpoint(self, checkpoint_path: str, model: nn.Module | None = None) -> None:
        if model is None:
            super()._load_from_checkpoint(checkpoint_path)
        else:
            Trainer._load_from_checkpoint(self, checkpoint_path, model)


class CheckpointCallback(TrainerCallback):
    """Marks each checkpoint when it is whole, on all processes, and only then deletes older ones.

    A run that goes on from a checkpoint ends with the weights of one never stopped, to the last bit, given the same
    processes and threads. For that, features of a frozen vision tower are forgotten at each checkpoint: they differ in
    the last bits with the batch they were computed in, and a resumed run has none.

    The Trainer's own rotation runs before anybody knows that the new checkpoint is whole, so this callback takes
    ``save_total_limit`` over for the time of training. The best checkpoint and the last complete one stay.
    """

    def __init__(self) -> None:
        self._limit: int | None = None

    def on_train_begin(  # type: ignore[override]
        self, args: TrainingArguments, _state: TrainerState, _control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Take the rotation over, and say when logged means would not survive a resumption."""
        forget_kept_features(model)
        self._limit, args.save_total_limit = args.save_total_limit, None
        by_steps = args.save_strategy == args.logging_strategy == "steps"
        if by_steps and args.save_steps % max(1, args.logging_steps):
            logger.warning(
                "`save_steps=%g` is no multiple of `logging_steps=%g`: a resumed run would log the means over the "
                "steps since its checkpoint only. Weights are not affected.",
                args.save_steps,
                args.logging_steps,
            )

    def on_train_end(  # type: ignore[override]
        self, args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any
    ) -> None:
        """Give the rotation back."""
        args.save_total_limit = self._limit

    def on_step_end(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any
    ) -> None:
        """Unmark an earlier run's checkpoint of this step, which is about to be written over."""
        if state.is_world_process_zero:
            _folder(args, state).joinpath(MARKER).unlink(missing_ok=True)

    def on_save(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Mark the checkpoint once every process has written its part, then delete what is beyond the limit."""
        forget_kept_features(model)
        distributed.gather_objects(None)  # every process writes the state of its random numbers
        if state.is_world_process_zero:
            checkpoint = _folder(args, state)
            mark_complete(checkpoint, state.global_step)
            self._rotate(checkpoint, state.best_model_checkpoint)
        distributed.gather_objects(None)  # nobody goes on, to fail perhaps, before the marker is there

    def _rotate(self, newest: Path, best: str | None) -> None:
        if not self._limit or self._limit < 0:
            return
        kept = [newest, *([Path(best)] if best else [])]
        found = checkpoints(newest.parent)
        others = [path for path in found[: found.index(newest)] if path not in kept]
        whole = [path for path in others if is_complete(path, read_files=False)]
        room = max(0, self._limit - len(set(kept)))
        for path in others:
            if path in whole[len(whole) - room :]:
                continue
            (path / MARKER).unlink(missing_ok=True)  # first: half of it must not pass for whole
            shutil.rmtree(path, ignore_errors=True)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


@contextmanager
def explained_write_errors(folder: str | Path) -> Iterator[None]:
    """Within this context an error for want of disk space says which checkpoints are whole and what to do."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _for_want_of_space(error):
            raise
        last = last_complete_checkpoint(folder)
        broken = [path.name for path in checkpoints(folder) if not is_complete(path)]
        rest = f"; {', '.join(broken)} is half-written and will be passed over" if broken else ""
        go_on = f"{last.name} is whole, and the same command goes on from it" if last else "no checkpoint is whole yet"
        raise OSError(
            errno.ENOSPC,
            f"The disk of {folder} is full, so training stopped ({error}). {go_on}{rest}. Free some space, or lower "
            "`save_total_limit`, and start again.",
        ) from error


def _for_want_of_space(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    text = str(error)
    if isinstance(error, SafetensorError):
        return any(f"os error {number}" in text for number in FULL)
    return any(mark in text for mark in _TORCH_WRITER)
