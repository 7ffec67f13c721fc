"""A sentence-transformers model whose saved form is stock."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import truncate_embeddings
from tqdm.auto import tqdm

from unime_st import distributed
from unime_st.arguments import require_number
from unime_st.features import check_finite
from unime_st.files import write_atomically
from unime_st.identity.content import Content
from unime_st.modules.card_data import EncoderCardData
from unime_st.modules.checks import loading_note
from unime_st.modules.multimodal_encoder import MultimodalEncoder
from unime_st.modules.saved import folder_of, saved_parts, trained_in
from unime_st.modules.sharded import is_sharded, whole_state
from unime_st.modules.speed.batches import NumberedInputs, encoding_order, fitted, passes, prepared
from unime_st.modules.speed.prefixes import language_model, shares_prefixes
from unime_st.placement import moved
from unime_st.token_budget import AUTO, CPU_TOKENS, require_tokens

STOCK_MODULE = f"{Transformer.__module__}.{Transformer.__name__}"
_BUDGET = "batch_num_tokens"
_WORKERS = "num_workers"
_NUMBERS = {"batch_size": False, "truncate_dim": True, _WORKERS: False}  # which of them may be None
_OWN_ARGUMENTS = frozenset(
    {"prompt", "batch_size", "show_progress_bar", "output_value", "save_to_cpu", "normalize_embeddings", "truncate_dim"}
    | {"device", _BUDGET, _WORKERS}
)
_OURS = f"{MultimodalEncoder.__module__}.{MultimodalEncoder.__name__}"


class MultimodalSentenceTransformer(SentenceTransformer):
    """A ``SentenceTransformer`` whose saved form names stock modules only.

    Whatever is saved (``save_pretrained``, the Trainer's checkpoints, ``push_to_hub``) loads in plain
    ``SentenceTransformer(path)`` without this package and without ``trust_remote_code``.
    An architecture that transformers lacks (phi3_v) needs ``import unime_st`` before that; its card says so.
    """

    model_card_data_class = EncoderCardData
    base_model_prefix = "decoder"
    """Where accelerate looks for the last norm that has weights, to split it under FSDP2: not among our modules."""
    numbers_rows = True
    """``preprocess`` takes ``row_numbers``, the caller's, for its errors."""

    @classmethod
    def _load_with_module_classes(cls, model_name_or_path: str, *_: Any, **__: Any) -> Any:
        """Load a checkpoint for the Trainer with our module, for stock code drops the magnitudes of DoRA."""
        folder = folder_of(model_name_or_path)
        parts = saved_parts(folder, model_kwargs=trained_in(folder))
        return MultimodalSentenceTransformer(device="cpu", **parts)

    @property
    def decoder(self) -> Any:
        """The language model of the encoder; None where the first module is no multimodal one."""
        return language_model(self[0].model) if isinstance(self[0], MultimodalEncoder) else None

    def get_model_kwargs(self) -> list[str]:
        """Names of what ``encode`` takes beyond the stock arguments: two of ours, see below, and those of the modules.

        ``encode(inputs, batch_size=256, batch_num_tokens=16384)`` prepares 256 inputs at a time and runs the model over
        at most so many of their tokens at once, images' included, what is shared counting once; a longer input is
        alone, but for those that share half of theirs with it, and a batch with videos is one pass. That bounds memory
        for inputs of whatever length, and lets a batch hold many short ones. By default a batch is one pass on a GPU,
        and passes of 1,024 tokens on the CPU. ``batch_num_tokens="auto"`` chooses on a CUDA device: the first passes
        are small and measured, later ones fill four fifths of the free memory, as far as ``batch_size`` goes, and one
        that runs out of memory is cut and tried again; what was learned serves later calls. On the CPU it is the
        default.

        ``encode(inputs, num_workers=4)`` prepares batches in so many forked processes while the model runs. It pays
        beside a GPU, when there are many batches and images are what takes the time; 0, the default, prepares the next
        batch in a thread on a GPU and none ahead on the CPU.
        """
        return [*super().get_model_kwargs(), _BUDGET, _WORKERS]

    @wraps(SentenceTransformer.encode)
    def encode(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Encode as the stock model does; an argument that must be a number, and is none, is refused by name."""
        for name, optional in _NUMBERS.items():
            if name in kwargs:
                require_number(name, kwargs[name], least=int(name != _WORKERS), optional=optional)
        require_tokens(_BUDGET, kwargs.get(_BUDGET))
        if kwargs.get(_WORKERS) and "fork" not in torch.multiprocessing.get_all_start_methods():
            raise ValueError(f"`{_WORKERS}={kwargs[_WORKERS]}`, but processes cannot be forked here. Leave it out.")
        return super().encode(*args, **kwargs)

    encode.takes_contents = True  # type: ignore[attr-defined] # see `identity.content.takes_contents`

    @torch.inference_mode()
    def _inference(self, inputs: list[Any], **kwargs: Any) -> Any:
        """What ``encode`` does in one process: each distinct input once, in an order that lets beginnings be shared.

        Stock code calls it in every process of a pool too, and takes over where anything but embeddings is asked for.
        """
        encoder: Any = self[0]
        plain = not isinstance(encoder, MultimodalEncoder) or kwargs["output_value"] != "sentence_embedding"
        budget = kwargs.get(_BUDGET)
        if plain or not inputs or self.device.type == "hpu":
            if budget is not None and inputs:
                raise ValueError(
                    f"`{_BUDGET}` bounds passes for sentence embeddings of a `MultimodalEncoder` only. Leave it "
                    "out, and choose `batch_size` instead."
                )
            rest = {name: value for name, value in kwargs.items() if name not in (_BUDGET, _WORKERS)}
            items = [item.item if isinstance(item, Content) else item for item in inputs]
            return check_finite(super()._inference(items, **rest), inputs)
        options = {name: value for name, value in kwargs.items() if name not in _OWN_ARGUMENTS}
        device = self._resolve_inference_device(kwargs.get("device"))
        if budget is None and device.type == "cpu":
            budget = CPU_TOKENS
        learned = encoder.token_budget_on(device) if budget == AUTO else None
        self.eval()
        by_beginning = encoder.share_prefixes and shares_prefixes(encoder.model)
        order = encoding_order(inputs, kwargs["batch_size"], by_beginning=by_beginning,
                               videos_of=encoder.frame_counts if encoder.frames_must_agree else None)  # fmt: skip
        first_row = getattr(inputs, "first_row", 0)

        def prepare(batch: np.ndarray) -> dict[str, Any]:
            # not `self.preprocess`, which tries again without the prompt when an input is of a wrong type
            numbers = (order.distinct[batch] + first_row).tolist()
            contents = [order.contents[place] for place in batch]
            items = [content.item for content in contents]
            return encoder.preprocess(items, kwargs["prompt"], row_numbers=numbers, contents=contents, **options)

        def embed(features: dict[str, Any]) -> torch.Tensor:
            embeddings = self(moved(features, device), **options)["sentence_embedding"]
            if kwargs["truncate_dim"] is not None:
                embeddings = truncate_embeddings(embeddings, kwargs["truncate_dim"])
            if kwargs["normalize_embeddings"]:
                embeddings = torch.nn.functional.normalize(embeddings, p=2, dim=1)
            return embeddings.cpu() if kwargs["save_to_cpu"] else embeddings

        def embedded(features: dict[str, Any], *, whole: bool) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
            if learned is not None and not whole:
                yield from fitted(features, learned, embed, padded=not by_beginning)
                return
            for rows, some, _ in passes(features, None if whole else budget, padded=not by_beginning):
                yield rows, embed(some)

        parts: list[torch.Tensor] = []
        encoded_places: list[np.ndarray] = []
        bar = tqdm(total=len(order.distinct), desc="Encoding", unit="input", disable=not kwargs["show_progress_bar"])
        reads_last = len(self) > 1 and isinstance(self[1], Pooling) and self[1].pooling_mode == "lasttoken"
        sharing = encoder.prefixes.encoding(last_token_only=reads_last, inference=True)
        with bar, encoder.prefixes.turns, sharing:
            workers = kwargs.get(_WORKERS) or 0
            coming = prepared(order.batches, prepare, ahead=device.type != "cpu", num_workers=workers)
            for batch, features in zip(order.batches, coming, strict=True):
                for rows, embeddings in embedded(features, whole=order.contents[batch[0]].shows_video):
                    parts.append(embeddings)
                    encoded_places.append(batch[rows])
                    bar.update(len(rows))
        encoded = torch.cat(parts)
        place = np.empty(len(order.distinct), dtype=np.int64)
        place[np.concatenate(encoded_places)] = np.arange(len(place))
        return check_finite(encoded[torch.from_numpy(place[order.index]).to(encoded.device)], inputs)

    def _multi_process(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """What ``encode`` does in several processes; their errors name the caller's rows."""
        return super()._multi_process(NumberedInputs(inputs), *args, **kwargs)

    def save(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Save; see :meth:`sentence_transformers.SentenceTransformer.save`.

        Weights that are split over processes (FSDP2, ZeRO-3) are gathered: every process must call this, one writes.
        """
        if is_sharded(self) and distributed.rank() != 0:
            encoder: Any = self[0]
            whole_state(encoder.model)
            return
        super().save(path, *args, **kwargs)
        listing = Path(path) / "modules.json"
        modules = json.loads(listing.read_text(encoding="utf-8"))
        for module in modules:
            if module["type"] == _OURS:
                module["type"] = STOCK_MODULE
        write_atomically(listing, json.dumps(modules, indent=2))
        _add_loading_note(Path(path) / "README.md", self)


def _add_loading_note(card: Path, model: SentenceTransformer) -> None:
    """Put the note of an architecture that transformers lacks above the text of a model card."""
    note = loading_note(model[0].model) if isinstance(model[0], MultimodalEncoder) else ""
    if not note or not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    header, mark, body = text.partition("\n---\n") if text.startswith("---\n") else ("", "", text)
    if note not in body:
        write_atomically(card, f"{header}{mark}\n{note}\n{body}")
