"""The multimodal LLM as a sentence-transformers module."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig
from sentence_transformers.base.modules.transformer import TransformerTask
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from unime_st.arguments import require_number
from unime_st.files import write_atomically
from unime_st.identity.content import Content
from unime_st.identity.features import CONTENT_KEY
from unime_st.modules.adapters import attach_adapter
from unime_st.modules.capture_hooks import enable_capture, remove_capture_hooks
from unime_st.modules.checks import check_adapter, check_loaded, check_processor
from unime_st.modules.inputs import Message, as_messages, checked_text, named_and_known, says_nothing
from unime_st.modules.late_media import ORIGIN, LatePreparation, Origin
from unime_st.modules.layouts import Layouts
from unime_st.modules.sharded import saved_whole
from unime_st.modules.speed.image_attention import images_at_once
from unime_st.modules.speed.prefixes import SharedPrefixes, shares_prefixes
from unime_st.modules.speed.token_tree import PREFIX_KEY
from unime_st.modules.speed.vision_cache import VisionCache, is_frozen, vision_tower
from unime_st.modules.text_only import load_text_model, whole_model
from unime_st.modules.told_rows import told_row
from unime_st.placement import IMAGES, LATE, LATE_ROWS, moved, read, with_every_image
from unime_st.prompts import TURN_FORMATS, chat_template
from unime_st.token_budget import TokenBudget
from unime_st.videos import VideoSettings

logger = logging.getLogger(__name__)

SETTINGS_FILE = "unime_st_config.json"
"""Our own settings beside a checkpoint; stock code ignores the file."""

_IMAGE_KEYS = ("pixel_values", "pixel_attention_mask", "image_sizes", "batch_num_images", "image_grid_thw")
_TEXT_ONLY = "text_only"
_SAVED = frozenset({"vision_cache_bytes", "flat_image_positions", "videos"})
_THE_CALLERS = _SAVED | {"allow_remote_images", "late_media", "prompt_template", "share_prefixes", "text_only"}


class MultimodalEncoder(LatePreparation):
    """Stock ``Transformer`` for multimodal LLMs, with what stock lacks for training and encoding.

    It saves and loads as a stock module; only in memory is it another class. Beyond stock:

    * inputs: bytes, data set cells, ``Path``; remote images only when asked for; errors name the row and the file;
    * a text too long loses its own last tokens, never a media token nor the trailing instruction;
    * batches and mini-batches whose rows have no image work in every family;
    * every weight must come from the checkpoint, adapters included;
    * where only embeddings are asked for (``encode``, our losses), rows that begin alike compute their beginning once,
      and nothing is computed for padding;
    * media may be opened and processed mini-batch by mini-batch, by a loss with GradCache (``late_media``);
    * a frozen vision tower stays in evaluation mode (batch normalisation keeps its statistics) and computes each
      distinct image once, GradCache's second pass included;
    * ``features["content_id"]`` (B,) identifies the content of each row, the instruction left out, for the losses'
      false-negative filter;
    * the tokenizer is saved without truncation state, so ``max_seq_length`` survives;
    * it can be sent to another process at any time, as ``start_multi_process_pool`` does.

    Args:
        model_name_or_path: a Hub name or a folder.
        prompt_template: a name of :data:`unime_st.prompts.TURN_FORMATS` or a Jinja chat template; None keeps the
            template of a checkpoint saved by this package, and gives a backbone its family's.
        allow_remote_images: open images at ``http(s)`` addresses.
        vision_cache_bytes: memory for features of a frozen vision tower; 0 keeps none.
        text_only: leave the vision tower and projector out of memory; images are refused, and saving the whole model
            reads them from the backbone's files again.
        share_prefixes: let rows of a batch that begin alike (one image, one instruction) compute their beginning once,
            and run without padding, in families where that is exact. Stock losses and direct calls get padded rows.
            With dropout, rows drop out the same of a beginning they share.
        videos: which frames of a video are shown and how large; None takes the defaults of
            :class:`~unime_st.videos.VideoSettings`.
        late_media: leave the media of a batch for training until the rows that show them are embedded, so that a loss
            with mini-batches holds the pixels of a mini-batch and no more. The number tells how many mini-batches are
            prepared ahead in a thread: 1 or 2 beside a GPU, 0 on the CPU, where the thread takes cores from the model.
            None processes the whole batch in the data collator. Losses and gradients are the same.
        flat_image_positions: count an image's tokens like words where transformers counts them by rows and columns
            (Qwen-VL), as models do that were trained on a lone placeholder, see :mod:`unime_st.published`. It is saved,
            but stock code does not know it.
        **kwargs: arguments of the stock module.

    Raises:
        ValueError: weights are missing or left over, or the family has no template.
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        prompt_template: str | None = None,
        allow_remote_images: bool = False,
        vision_cache_bytes: int = 2**28,
        share_prefixes: bool = True,
        text_only: bool = False,
        videos: VideoSettings | None = None,
        late_media: int | None = None,
        flat_image_positions: bool = False,
        **kwargs: Any,
    ) -> None:
        require_number("late_media", late_media, least=0, optional=True)
        processor_kwargs = {"padding_side": "left", **(kwargs.pop("processor_kwargs", None) or {})}
        for key in ("model_kwargs", "processor_kwargs", "config_kwargs"):  # else transformers asks on the terminal
            given = processor_kwargs if key == "processor_kwargs" else dict(kwargs.get(key) or {})
            kwargs[key] = {"trust_remote_code": False, **given}
        processor_kwargs = kwargs.pop("processor_kwargs")
        if text_only:  # read by `_load_model`, which the stock module calls
            kwargs["model_kwargs"] = {**(kwargs.get("model_kwargs") or {}), _TEXT_ONLY: True}
        super().__init__(model_name_or_path, processor_kwargs=processor_kwargs, **kwargs)
        check_processor(self.model, self.processor, model_name_or_path)
        self.model.register_forward_pre_hook(_every_image, with_kwargs=True)
        self.allow_remote_images = allow_remote_images
        self.videos = videos or VideoSettings()
        self.vision_cache = VisionCache(vision_cache_bytes)
        self.share_prefixes = share_prefixes
        self.late_media = late_media
        self.flat_image_positions = flat_image_positions
        self.layouts = Layouts()
        self.prefixes = SharedPrefixes()
        self._token_budget: TokenBudget | None = None
        self._told_of_blanks = False
        if self.tokenizer is not None:
            self.tokenizer.padding_side = "left"
        if prompt_template is not None:
            self.set_template(prompt_template)

    task: ClassVar[TransformerTask] = "feature-extraction"
    auto_class: ClassVar[Any] = AutoModel

    relative_positions = True
    """Padding before a row changes nothing, so a mini-batch may leave it out."""

    def keeping_features(self) -> AbstractContextManager[None]:
        """Within this context, a training step, features of a frozen vision tower are kept, however many."""
        return self.vision_cache.holding()

    def embeddings_alone(self, *, last_token_only: bool) -> AbstractContextManager[None]:
        """Within this context only embeddings are asked for: equal beginnings are computed once, and no padding is."""
        return self.prefixes.encoding(last_token_only=last_token_only)

    def forget_features(self) -> None:
        """Forget the features of a frozen vision tower that are kept between steps."""
        self.vision_cache.clear()

    def token_budget_on(self, device: torch.device) -> TokenBudget:
        """The tokens of a pass when told ``"auto"``, as learned from passes on this device so far."""
        if self._token_budget is None or self._token_budget.device != device:
            self._token_budget = TokenBudget(device)
        return self._token_budget

    def set_template(self, template: str) -> None:
        """Render messages by a template, or by the one of that name."""
        self.processor.chat_template = template if "{" in template else chat_template(template)
        self.input_formatter.message_format = "structured"
        if "message" not in self.modality_config:
            self.modality_config, self.module_output_name = self.infer_modalities(self.model, self.processor)
            self.input_formatter.supported_modalities = list(self.modality_config)

    @staticmethod
    def template_for(config: PretrainedConfig) -> str:
        """Name of the prompt template of a model's family; a family without one is refused."""
        if config.model_type in TURN_FORMATS:
            return config.model_type
        raise ValueError(
            f"There is no prompt template for the family {config.model_type!r}. Pass `prompt_template=` one of "
            f"{', '.join(sorted(TURN_FORMATS))}, or a Jinja chat template."
        )

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load from a folder saved by ``save``, with our settings if the folder has them."""
        settings = Path(model_name_or_path) / SETTINGS_FILE
        found = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        kept = {key: value for key, value in found.items() if key in _SAVED}
        if "videos" in kept:
            kept["videos"] = _saved_videos(kept["videos"], settings)
        given = kwargs.pop("init_defaults", None) or {}
        asked = {key: value for key, value in given.items() if value is not None}
        return super().load(model_name_or_path, init_defaults={**kept, **asked}, **kwargs)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read the stock module's settings; a checkpoint decides nothing that is the caller's to decide."""
        config = super().load_config(*args, **kwargs)
        return {key: value for key, value in config.items() if key not in _THE_CALLERS}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save as the stock module does, with a clean tokenizer and with our settings in a file beside."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
        adapters_alone = bool(getattr(self.model, "_hf_peft_config_loaded", False))
        vision = nullcontext() if adapters_alone else whole_model(self.model, self._source)
        with vision, saved_whole(self.model):
            super().save(output_path, *args, **kwargs)
        settings: dict[str, Any] = {"format": 1, "vision_cache_bytes": self.vision_cache.max_bytes}
        if self.videos != VideoSettings():
            settings["videos"] = asdict(self.videos)
        if self.flat_image_positions:
            settings["flat_image_positions"] = True
            logger.warning(
                "The encoder in %s has `flat_image_positions`, which stock sentence-transformers does not know: load "
                "it with `unime_st.load_encoder`, or images are embedded otherwise.",
                output_path,
            )
        write_atomically(Path(output_path) / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")

    def extra_repr(self) -> str:
        """Name the setting that changes embeddings in the printed form, by which fingerprints tell encoders apart."""
        own = ["flat_image_positions" * self.flat_image_positions]
        own += [repr(self.videos)] if self.videos != VideoSettings() else []
        return ", ".join(filter(None, [super().extra_repr(), *own]))

    def __getstate__(self) -> dict[str, Any]:
        """State to pickle, as a pool of processes needs it; stock LLaVA does not pickle once it has seen an image."""
        remove_capture_hooks(self.model)
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up pickled state, in a process that has made no such model."""
        super().__setstate__(state)
        enable_capture(self.model)

    def train(self, mode: bool = True) -> Self:
        """Switch modes; a frozen vision tower stays in evaluation mode."""
        super().train(mode)
        tower = vision_tower(self.model)
        if mode and tower is not None and is_frozen(tower):
            tower.eval()
        return self

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        processing_kwargs: Any = None,
        row_numbers: Sequence[int] | None = None,
        contents: Sequence[Content] | None = None,
        *,
        late_media: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Turn inputs into features.

        Args:
            inputs: B inputs: text, images, ``{"image", "text"}`` or chat messages, mixed as you like.
            prompt: an instruction for all rows; an instruction in a row's own system message goes before it.
            processing_kwargs: as in the stock module.
            row_numbers: the caller's numbers of the inputs, as ``encode`` gives them, for errors; blank texts are taken
                then, as stock code does. None counts from 0, and refuses them.
            contents: what the inputs say, where that is known already, as ``encode`` gives it.
            late_media: whether to leave media until the rows are embedded; None does as the encoder was told, but not
                for ``encode``.
            **kwargs: arguments of the stock module; ``max_length`` bounds the tokens of a row.

        Returns:
            The stock features, ``content_id`` (B,), and ``prefix_key`` (B, T) where beginnings can be shared. When an
            image is shown more than once, the images' tensors are in ``distinct_images``, once each, and
            ``image_numbers`` (B, M) tells which of them each row shows, then -1. Where media are left, only tokens,
            mask and counts are there, ``late_media`` with the inputs, and ``late_rows`` (B,).

        Raises:
            ValueError: a row is empty, its text spells a media token, its media and instruction alone are longer than
                the limit, or the processor refuses it. Without ``row_numbers`` a note tells what the row holds.
        """
        if not len(inputs):
            return {}
        if prompt is not None:
            checked_text(prompt, "`prompt`")
        rows = range(len(inputs)) if row_numbers is None else row_numbers
        asked: dict[str, Any] = {"prompt": prompt, "processing_kwargs": processing_kwargs, **kwargs}
        if late_media is None:
            late_media = self.late_media is not None and row_numbers is None
        try:
            if late_media and (found := self._laid_out(inputs, rows, contents, asked)) is not None:
                return found
            return self._preprocess(inputs, rows, contents, allow_blank=row_numbers is not None, **asked)
        except (OSError, TypeError, ValueError) as error:
            if row_numbers is None:
                error.add_note(told_row(error, inputs))
            raise

    def _preprocess(
        self,
        inputs: Sequence[Any],
        rows: Sequence[int],
        contents: Sequence[Content] | None,
        *,
        allow_blank: bool = False,
        **asked: Any,
    ) -> dict[str, Any]:
        named, known = named_and_known(inputs, rows, contents)
        messages = self._messages(named, rows, allow_blank=allow_blank)
        features = self._features(messages, rows, **asked)
        told = [content or Content(item, named=name) for item, name, content in zip(inputs, named, known, strict=True)]
        features[CONTENT_KEY] = torch.tensor([content.id for content in told], dtype=torch.long)
        if self.share_prefixes and shares_prefixes(self.model):
            features[PREFIX_KEY] = self._prefix_keys(features["input_ids"], [content.media for content in told])
        return features

    def _messages(self, named: Sequence[Any], rows: Sequence[int], **options: bool) -> list[list[Message]]:
        opened: dict[Any, Any] = {}
        asked_for: dict[str, Any] = {
            "allow_remote_images": self.allow_remote_images,
            "video_settings": self.videos,
            "opened": opened,
            **options,
        }
        messages = [as_messages(item, row, **asked_for) for row, item in zip(rows, named, strict=True)]
        blank = [row for row, message in zip(rows, messages, strict=True) if says_nothing(message)]
        if blank and not self._told_of_blanks:
            self._told_of_blanks = True  # once is enough
            logger.warning("Texts without a word are embedded as the instruction alone, here of row %d.", blank[0])
        return messages

    def _prefix_keys(self, ids: Tensor, media_of_rows: Sequence[tuple[bytes, ...]]) -> Tensor:
        """What each token is, (B, T): its number, or for a medium's tokens a number drawn from the row's media."""
        keys = ids.clone()
        stands_for_medium = torch.isin(ids, torch.tensor(self._media_token_ids(), dtype=ids.dtype))
        for row, media in enumerate(media_of_rows):
            if media:
                digest = hashlib.blake2b(b"".join(media), digest_size=8).digest()
                keys[row, stands_for_medium[row]] = -1 - (int.from_bytes(digest, "big") >> 1)
        return keys

    def _should_flatten_inputs(self, *_: Any, **__: Any) -> bool:
        """Never pack texts into one sequence under flash attention: it breaks Qwen2-VL and hides the rows' lengths."""
        return False

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Embed; see the stock module. Image tensors of a batch without images are left out."""
        if IMAGES in features and getattr(self, "_is_replica", False):
            raise ValueError(
                "DataParallel cuts a batch's images apart from the rows that show them. Start one process a device, "
                "with `accelerate launch` or `torchrun`."
            )
        if LATE in features:
            made = moved(self.with_media(features), features["attention_mask"].device)
            for name in (LATE, LATE_ROWS):
                del features[name]
            features.update(made)
        origin: Origin | None = features.pop(ORIGIN, None)
        count = read(features, "num_images_per_sample")
        dropped = {CONTENT_KEY, PREFIX_KEY}
        if count is not None and int(count.sum()) == 0 and not self._shows_video(features):
            dropped.update(_IMAGE_KEYS)
        inputs = {key: value for key, value in with_every_image(features).items() if key not in dropped}
        prefixes = self.prefixes.serving(self.model, features) if self.share_prefixes else nullcontext()
        images = images_at_once(self.model, features["attention_mask"].device)
        serving = self.vision_cache.serving(self.model, None if origin is None else origin.calls)
        with self.prefixes.turns, images, serving as answered, prefixes:
            outputs = super().forward(inputs, **kwargs)
        if origin is not None and origin.layout is not None and answered.calls is not None:
            origin.late.laid_out[origin.rows] = origin.layout, answered.calls
        features.update({key: value for key, value in outputs.items() if key not in inputs or value is not inputs[key]})
        for key in (self.module_output_name, "all_layer_embeddings"):
            if key in outputs:
                features[key] = outputs[key]
        return features

    def _shows_video(self, features: dict[str, Any]) -> bool:
        """Whether rows without images have tokens of media: frames of videos, which SmolVLM takes for images."""
        ids = read(features, "input_ids")
        assert ids is not None
        return bool(torch.isin(ids, torch.tensor(self._media_token_ids(), dtype=ids.dtype)).any())

    def _load_model(
        self,
        model_name_or_path: str,
        transformer_task: Any,
        config: PretrainedConfig,
        backend: str,
        is_peft_model: bool,
        **model_kwargs: Any,
    ) -> PreTrainedModel:
        if backend != "torch" or transformer_task != self.task:
            raise ValueError(
                f"{type(self).__name__} runs on backend 'torch' for {self.task!r}, not {backend!r} for "
                f"{transformer_task!r}. Load the checkpoint with sentence-transformers alone for those."
            )
        source, adapter = model_name_or_path, Path(model_name_or_path)
        if is_peft_model:  # transformers loads adapters too, but not the magnitudes of DoRA, and without a word
            model_kwargs.pop("revision", None)
            if not adapter.is_dir():
                adapter = Path(snapshot_download(model_name_or_path, allow_patterns="adapter_*"))
            source = str(PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path)
        self._source = source
        if model_kwargs.pop(_TEXT_ONLY, False):
            model, report = load_text_model(source, config, **model_kwargs)
        else:
            options = {"config": config, "output_loading_info": True, **model_kwargs}
            model, report = self.auto_class.from_pretrained(source, **options)
        check_loaded(source, report)
        if is_peft_model:
            attach_adapter(model, adapter)
            check_adapter(model, adapter)
        return model


def _every_image(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a backbone that is called with our features the images that they hold once; it would ignore them."""
    return args, with_every_image(kwargs) if IMAGES in kwargs else kwargs


def _saved_videos(found: Any, file: Path) -> VideoSettings:
    try:
        return VideoSettings(**found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: its `videos` are {found!r} ({error}). Restore it.") from error
