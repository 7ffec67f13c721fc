"""Encoders of this package in mteb: a wrapper that applies a task's instruction, a ``ModelMeta``, results as metadata.

A stock ``SentenceTransformer`` can be evaluated by ``mteb.evaluate`` too, but mteb passes a task's instruction to it
only as ``prompt``, which replaces UniME's own ("Summary above image in one word: "). The wrapper here puts the
instruction before the content, as MMEB's rows do, and keeps UniME's prompt at the end. UniME-V2's published models have
no prompt at the end. For them the wrapper differs from mteb's own where a task has no instruction: mteb makes one up
for queries, and their authors use none. This module needs the extra ``eval``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import EvalResult

try:
    import mteb
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.models import CrossEncoderWrapper
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_implementations import MODEL_REGISTRY
    from mteb.models.model_meta import ModelMeta, ScoringFunction
    from mteb.types import PromptType
except ImportError as missing:
    raise ImportError("This needs mteb, which is not installed: `pip install 'unime_st[eval]'`.") from missing

from PIL import Image
from sentence_transformers import CrossEncoder, SentenceTransformer

from unime_st.arguments import require_number
from unime_st.data.stored_images import sides_of
from unime_st.identity.model import model_fingerprint
from unime_st.images import as_rgb
from unime_st.modules import load_encoder
from unime_st.published import PUBLISHED

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata

_BATCHES_AT_ONCE = 16
_MODALITIES = ("text", "image")


class MTEBEncoder(AbsEncoder):
    """Wraps an encoder for mteb: texts, images and both, with the task's instruction before the content.

    Args:
        model_name: A folder or a Hub name to load, or a ``SentenceTransformer``.
        revision: Revision of the model on the Hub; folders have none.
        device: Device to run on.
        checkpoint: Folder to load in place of ``model_name``, under whose name results are filed.
        embed_dim: Number of dimensions to keep.
        use_task_instructions: False gives every task the bare content.
        image_size: Resize every image to this side, or (width, height), ignoring its shape. When ``model_name`` or
            ``published`` names a published model, None takes the size at which its authors evaluate (1,344 for
            UniME-V2); otherwise None leaves images as they are.
        **kwargs: Arguments of :func:`unime_st.load_encoder`.
    """

    def __init__(
        self,
        model_name: str | SentenceTransformer,
        revision: str | None = None,
        device: str | None = None,
        *,
        checkpoint: str | Path | None = None,
        embed_dim: int | None = None,
        use_task_instructions: bool = True,
        image_size: int | tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        named_model = kwargs.get("published") or (model_name if isinstance(model_name, str) else "")
        if image_size is None and named_model in PUBLISHED:
            image_size = PUBLISHED[named_model].evaluated_at
        self.image_size = None if image_size is None else sides_of(image_size)
        if isinstance(model_name, SentenceTransformer):
            self.model = model_name
        elif checkpoint is not None:
            self.model = load_encoder(str(checkpoint), device=device, **kwargs)
        else:
            kwargs = kwargs if revision is None or Path(model_name).is_dir() else {"revision": revision, **kwargs}
            self.model = load_encoder(model_name, device=device, **kwargs)
        named = {"name": f"unime_st/{Path(str(model_name)).name}"} if isinstance(model_name, str) else {}
        self.mteb_model_meta = ModelMeta.create_empty(
            {**named, "modalities": list(_MODALITIES)}
        )  # until mteb sets its own
        self.embed_dim = embed_dim
        self.use_task_instructions = use_task_instructions

    def instruction(self, task_metadata: TaskMetadata, prompt_type: PromptType | None) -> str:
        """A task's instruction, "" for none: a text, not for documents, or a mapping from kind to text."""
        prompt = task_metadata.prompt
        if not self.use_task_instructions or prompt is None:
            return ""
        if isinstance(prompt, Mapping):
            kind = prompt_type.value if prompt_type is not None else PromptType.query.value
            return str(prompt.get(kind) or "").strip()
        return "" if prompt_type == PromptType.document else str(prompt).strip()

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,  # noqa: ARG002 (mteb's interface, as below)
        hf_subset: str,  # noqa: ARG002
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Encode what a data loader yields, batches of ``text``, ``image`` or both, into ``(N, D)`` float32."""
        instruction = self.instruction(task_metadata, prompt_type)
        batch_size = int(kwargs.get("batch_size", 32))
        parts: list[np.ndarray] = []
        waiting: list[Any] = []

        def flush() -> None:
            parts.append(
                self.model.encode(
                    waiting,
                    batch_size=batch_size,
                    show_progress_bar=kwargs.get("show_progress_bar", False),
                    truncate_dim=self.embed_dim,
                    normalize_embeddings=True,
                )
            )
            waiting.clear()

        for batch in inputs:
            waiting.extend(_items(batch, instruction, self.image_size))
            if len(waiting) >= _BATCHES_AT_ONCE * batch_size:
                flush()
        if waiting:
            flush()
        return np.concatenate(parts)


def _items(
    batch: Mapping[str, Any], instruction: str, image_size: tuple[int, int] | None = None
) -> Iterator[dict[str, Any]]:
    """The inputs of a batch of columns, with the instruction before the text and images resized."""
    texts, images = batch.get("text"), batch.get("image")
    count = len(texts if texts is not None else images if images is not None else [])
    if not count:
        raise ValueError(f"A batch has the columns {', '.join(batch)}; this model encodes `text` and `image`.")
    for row in range(count):
        text = "\n".join(part for part in (instruction, texts[row] if texts is not None else "") if part)
        image = None if images is None else images[row]
        if image is not None and image_size is not None:
            image = as_rgb(image).resize(image_size, Image.Resampling.BICUBIC)
        item: dict[str, Any] = {} if image is None else {"image": image}
        yield {**item, "text": text} if text or not item else item


def mteb_model_meta(
    checkpoint: str | Path | SentenceTransformer, name: str, *, register: bool = True, **fields: Any
) -> ModelMeta:
    """Describe an encoder to mteb, so that results are filed under its name and the state of its weights.

    ``name`` has the form ``organisation/model``; with ``register`` ``mteb.get_model_meta(name)`` finds it, in this
    process. ``fields`` are those of ``ModelMeta``. Unless given, ``revision`` is the beginning of the weights'
    fingerprint, so results of other weights are never taken for these.
    """
    if name.count("/") != 1:
        raise ValueError(f"`name={name!r}`, but mteb files results under 'organisation/model'.")
    model = checkpoint if isinstance(checkpoint, SentenceTransformer) else load_encoder(str(checkpoint), device="cpu")
    in_memory = isinstance(checkpoint, SentenceTransformer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    meta = ModelMeta(**{
        "loader": _loader(model) if in_memory else MTEBEncoder,
        "loader_kwargs": {} if in_memory else {"checkpoint": str(checkpoint)},
        "name": name,
        "revision": model_fingerprint(model)[:40],
        "release_date": None,
        "languages": None,
        "n_parameters": parameters,
        "memory_usage_mb": size / 2**20,
        "max_tokens": model.max_seq_length,
        "embed_dim": model.get_embedding_dimension(),
        "license": None,
        "open_weights": None,
        "public_training_code": None,
        "public_training_data": None,
        "framework": ["Sentence Transformers", "PyTorch", "Transformers", "safetensors"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": True,
        "training_datasets": None,
        "modalities": list(_MODALITIES),
        **fields,
    })  # fmt: skip
    if register:
        MODEL_REGISTRY[name] = meta
    return meta


def mteb_reranker(reranker: CrossEncoder, name: str) -> CrossEncoderWrapper:
    """A reranker as mteb's own wrapper, filed under its name, that is shown images too if it takes them.

    mteb takes a ``CrossEncoder`` in memory for one of texts, and would leave images out without a word. It asks for
    scores of pairs, so a listwise reranker is refused.
    """
    if not isinstance(reranker, CrossEncoder):
        raise TypeError(
            f"`reranker` is a {type(reranker).__name__}, but mteb asks for scores of pairs: give a `CrossEncoder`, "
            "such as the `model` of a listwise reranker."
        )
    wrapper = CrossEncoderWrapper(reranker)
    modalities = [kind for kind in _MODALITIES if kind in (reranker.modalities or _MODALITIES)]
    wrapper.mteb_model_meta = ModelMeta.create_empty(
        {
            "name": name,
            "revision": model_fingerprint(reranker)[:40],
            "loader": CrossEncoderWrapper,
            "modalities": modalities,
            "model_type": ["cross-encoder"],
        }
    )
    return wrapper


def rerank_with_mteb(
    reranker: CrossEncoderWrapper,
    tasks: Iterable[Any],
    predictions: str | Path,
    *,
    depth: int = 10,
    batch_size: int = 32,
) -> list[Any]:
    """Rerank what an encoder found, by mteb's two stages: its retrieval tasks anew, of the first candidates alone.

    Args:
        reranker: Of :func:`mteb_reranker`, or any that mteb has.
        tasks: The encoder's tasks; those that are no retrieval are left out. They become reranking tasks: mteb changes
            them in place.
        predictions: The ``prediction_folder`` that ``mteb.evaluate`` was given for the encoder.
        depth: Candidates of a query that are reranked, at least 2; mteb drops the rest, so that recall past it falls.
        batch_size: Pairs a forward pass.

    Returns:
        mteb's results, one a task, in whose ``evaluation_time`` is how long it took.

    Raises:
        FileNotFoundError: There are no predictions of a task.
    """
    require_number("depth", depth, least=2)
    results = []
    for task in tasks:
        if isinstance(task, AbsTaskRetrieval):
            reranking = task.convert_to_reranking(predictions, top_k=depth)
            found = mteb.evaluate(reranker, reranking, encode_kwargs={"batch_size": batch_size}, cache=None)
            results += found.task_results
    return results


def _loader(model: SentenceTransformer) -> Any:
    def load(_: str, **kwargs: Any) -> MTEBEncoder:
        return MTEBEncoder(model, **kwargs)

    return load


def eval_results(results: Iterable[Any], tasks: Iterable[Any]) -> list[EvalResult]:
    """Turn mteb's ``task_results`` into metadata of a model card, one entry per task, split and subset, in percent."""
    metadata = {task.metadata.name: task.metadata for task in tasks}
    entries = []
    for result in results:
        if result.task_name not in metadata:
            raise ValueError(f"There is a result of {result.task_name!r}, but that is none of the tasks given.")
        task = metadata[result.task_name]
        entries += [
            EvalResult(
                task_type=_slug(task.type),
                task_name=task.type,
                dataset_type=task.dataset["path"],
                dataset_name=f"MTEB {task.name}",
                dataset_config=scores["hf_subset"],
                dataset_split=split,
                dataset_revision=result.dataset_revision,
                metric_type=task.main_score,
                metric_value=round(100 * scores["main_score"], 4),
            )
            for split, subsets in result.scores.items()
            for scores in subsets
        ]
    return entries


def _slug(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()
