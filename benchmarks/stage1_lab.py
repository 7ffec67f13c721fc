"""What the runs of `stage1_sweep.py` share: texts, the teacher's embeddings, the miniature's layers, the scores.

Stage 1 adapts the layers above `align_layer`. Those below are frozen and a text's states there never change, so they
are computed once a text, and a run goes through the layers above alone. That is exact, and checked against `encode`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model
from safetensors.torch import load_file, save
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize

from emoji.benchmark import EmojiBenchmark, concepts_of
from emoji.miniature import text_teacher
from emoji.packages import Fetched
from emoji.settings import StageSettings
from emoji.training import stage1_texts
from unime_st.data import teacher_embeddings
from unime_st.files import write_atomically
from unime_st.fingerprint import fingerprint
from unime_st.modules import build_encoder, default_lora_config

CHUNK = 16  # rows that go through the layers together, of like length: little padding, and they stay in a CPU's cache


_STAGE1 = StageSettings(steps=12, batch_size=48, learning_rate=1e-3)


@dataclass(frozen=True)
class SweepSettings:
    """A miniature deeper than the demo's, of which only the upper layers learn.

    Attributes:
        layers: of SmolLM2's 30, those kept.
        align_layer: layers below those that learn.
        adapted_layers: those that get LoRA.
        lora_rank: of LoRA.
        image_size: of the miniature; no image is read.
        stage1: of every run, but for what the sweep changes.
        seed: of the texts.
    """

    layers: tuple[int, ...] = tuple(range(24))
    align_layer: int = 16
    adapted_layers: tuple[int, ...] = tuple(range(16, 24))
    lora_rank: int = 16
    image_size: int = 160
    stage1: StageSettings = _STAGE1
    seed: int = 0


class UpperLayers(nn.Module):
    """The language model's layers above the frozen ones, with LoRA, fed with the states below.

    Args:
        language: the language model with all its layers; taken apart.
        settings: which layers, and the rank.
    """

    def __init__(self, language: nn.Module, settings: SweepSettings) -> None:
        super().__init__()
        first = settings.align_layer
        self.language: Any = language
        self.language.layers = self.language.layers[first:]
        self.language.requires_grad_(False)
        adapted = [layer - first for layer in settings.adapted_layers]
        inject_adapter_in_model(default_lora_config(rank=settings.lora_rank, layers=adapted), self.language)

    def reset(self, seed: int) -> list[nn.Parameter]:
        """Start the LoRA weights anew; returns them."""
        torch.manual_seed(seed)
        for module in self.language.modules():
            if hasattr(module, "reset_lora_parameters"):
                module.reset_lora_parameters("default", init_lora_weights=True)
        return [parameter for parameter in self.language.parameters() if parameter.requires_grad]

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Embed texts, given their states (T, D) each, by the last token's state after the last layer.

        Rows are padded on the right, where a causal model does not look.

        Returns:
            (N, D)
        """
        order = sorted(range(len(states)), key=lambda row: len(states[row]))
        parts = []
        for start in range(0, len(order), CHUNK):
            chunk = [states[row] for row in order[start : start + CHUNK]]
            hidden = self.language(inputs_embeds=nn.utils.rnn.pad_sequence(chunk, batch_first=True)).last_hidden_state
            parts.append(hidden[range(len(chunk)), [len(row) - 1 for row in chunk]])
        return torch.cat(parts)[torch.tensor(order).argsort()]


def lower_states(encoder: Any, texts: Sequence[str], layers: int) -> list[Tensor]:
    """Compute the states of each text's prompt, (T, D), after some layers."""
    language, every, norm = encoder.model.language_model, encoder.model.language_model.layers, None
    states: list[Tensor] = []
    try:
        norm, language.norm, language.layers = language.norm, nn.Identity(), every[:layers]
        for start in range(0, len(texts), CHUNK):
            features = encoder.preprocess(list(texts[start : start + CHUNK]))
            lengths = features["attention_mask"].sum(dim=1).tolist()
            with torch.no_grad():
                inputs = {key: features[key] for key in ("input_ids", "attention_mask")}
                hidden = encoder.model(**inputs).last_hidden_state
            states += [row[-length:].clone() for row, length in zip(hidden, lengths, strict=True)]
    finally:
        language.norm, language.layers = norm, every
    return states


class Lab:
    """Texts, teacher and model of the sweep.

    Args:
        fetched: the unpacked packages.
        benchmark: gives the texts.
        backbone: the miniature's folder.
        settings: of the sweep.
        held_out: validation glosses to score on.
        work: keeps what is computed once.

    Attributes:
        train: states of the training texts.
        targets: the teacher's embeddings of them. (N, Dt)
        model: the layers that learn.
    """

    def __init__(
        self,
        fetched: Fetched,
        benchmark: EmojiBenchmark,
        backbone: Path,
        settings: SweepSettings,
        held_out: int,
        work: Path,
    ) -> None:
        self.settings, self.work = settings, work
        self.texts = stage1_texts(benchmark, settings.stage1, settings.seed)
        glosses = [(entry.term, entry.gloss) for entry in benchmark.glosses("validation") if _is_short(entry.gloss)]
        concepts = [concept for concept in concepts_of(fetched, benchmark)["validation"] if concept.tags]
        captions = [(concept.label, ", ".join(concept.tags[:5])) for concept in concepts]
        found = {"term_to_gloss": glosses, "label_to_keywords": captions}
        self.pairs = {name: self._unseen(pairs)[:held_out] for name, pairs in found.items()}
        self.held_out = [
            text for pairs in self.pairs.values() for column in zip(*pairs, strict=True) for text in column
        ]
        self.teacher = teacher = text_teacher(fetched)
        embedded = torch.from_numpy(teacher_embeddings(teacher, [*self.texts, *self.held_out], work / "teacher"))
        self.targets, self.held_out_targets = embedded.split([len(self.texts), len(self.held_out)])
        encoder = build_encoder(backbone, prompt_template="chatml_open", device="cpu")
        states = self._states(encoder, [*self.texts, *self.held_out])
        self.train, self.validation = states[: len(self.texts)], states[len(self.texts) :]
        some = self.held_out[:CHUNK]
        wanted = torch.from_numpy(encoder.encode(some))
        language: Any = encoder[0]
        self.model = UpperLayers(language.model.language_model, settings)
        self.model.reset(0)
        with torch.inference_mode():
            wrong = (normalize(self.model(self.validation[: len(some)])) - normalize(wanted)).abs().max().item()
        if not wrong < 1e-4:
            raise RuntimeError(f"The upper layers on kept states differ from `encode` by {wrong:.2g}.")

    def _states(self, encoder: SentenceTransformer, texts: list[str]) -> list[Tensor]:
        file = self.work / f"states-{fingerprint(chr(0).join(texts))}.safetensors"
        if not file.is_file():
            states = lower_states(encoder[0], texts, self.settings.align_layer)
            lengths = torch.tensor([len(row) for row in states])
            write_atomically(file, save({"states": torch.cat(states), "lengths": lengths}))
        kept = load_file(file)
        return list(kept["states"].split(kept["lengths"].tolist()))

    def _unseen(self, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Pairs of which neither text is trained on, nor occurs in an earlier pair."""
        seen, kept = set(self.texts), []
        for pair in pairs:
            if seen.isdisjoint(pair):
                kept.append(pair)
                seen.update(pair)
        return kept

    def batches(self, seed: int) -> Iterator[list[int]]:
        """Row numbers of each step: every training text once, in an order of the seed's."""
        rows = list(range(len(self.texts)))
        random.Random(seed).shuffle(rows)
        size = self.settings.stage1.batch_size
        yield from (rows[start : start + size] for start in range(0, len(rows), size))

    def base_scores(self) -> dict[str, float]:
        """Score the model as it is before training."""
        self.model.reset(0)
        with torch.inference_mode():
            return self.scores(self.model)

    def scores(self, model: UpperLayers | None) -> dict[str, float]:
        """Score the model, or the teacher (None), on texts never trained on; all in [0, 1]."""
        counts = {name: len(pairs) for name, pairs in self.pairs.items()}
        return scores(self.held_out_targets if model is None else model(self.validation), self.held_out_targets, counts)

    def self_probability(self, benchmark: EmojiBenchmark, temperature: float, batch_size: int) -> float:
        """Mean probability the teacher gives to the text itself, with the diagonal, in a batch of training texts."""
        stage = StageSettings(-(-batch_size // self.settings.stage1.batch_size), self.settings.stage1.batch_size, 0.0)
        texts = stage1_texts(benchmark, stage, self.settings.seed)[:batch_size]
        rows = normalize(torch.from_numpy(teacher_embeddings(self.teacher, texts, self.work / "teacher")))
        return (rows @ rows.T / temperature).softmax(dim=1).diagonal().mean().item()


def _is_short(gloss: str) -> bool:
    return len(gloss.split()) <= 9  # as those trained on


def scores(student: Tensor, teacher: Tensor, counts: dict[str, int]) -> dict[str, float]:
    """Retrieval within each set of pairs, and agreement with the teacher over all texts.

    Args:
        student: embeddings of the pairs' texts: of each set, first the queries, then their answers in order. (N, D)
        teacher: embeddings of the same. (N, Dt)
        counts: name of a set -> how many pairs it holds.

    Returns:
        Recall@1 and @5 of each set; `mean_reciprocal_rank`, the mean of the sets'; Spearman's correlation of the
        cosines of all pairs of different texts; the share of texts whose nearest other text is the same for both.
    """
    student, teacher = normalize(student.double()), normalize(teacher.double())
    result: dict[str, float] = {}
    reciprocal, start = [], 0
    for name, count in counts.items():
        cosines = student[start : start + count] @ student[start + count : start + 2 * count].T
        rank = (cosines >= cosines.diagonal()[:, None]).sum(dim=1).double()  # ties count against
        result |= {f"{name}_recall@{k}": (rank <= k).double().mean().item() for k in (1, 5)}
        reciprocal.append((1 / rank).mean().item())
        start += 2 * count
    ours, theirs = student @ student.T, teacher @ teacher.T
    upper = torch.ones_like(ours).triu(diagonal=1).bool()
    spearman = spearmanr(ours[upper].numpy(), theirs[upper].numpy()).statistic
    nearest = [cosines.fill_diagonal_(-torch.inf).argmax(dim=1) for cosines in (ours, theirs)]
    return {
        "mean_reciprocal_rank": sum(reciprocal) / len(reciprocal), **result, "spearman_with_teacher": float(spearman),
        "nearest_neighbor_agreement": (nearest[0] == nearest[1]).double().mean().item(),
    }  # fmt: skip
