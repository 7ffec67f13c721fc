"""How far the closed-form alignment carries, and where it loses: text->image R@1 on validation concepts, untrained.

Along the way from a drawing to its embedding:

1. a ridge regression from the vision features to the caption's inner state (the projector), scored in those states;
2. the language model reading exact states of the captions in place of drawings: an upper bound for the reading;
3. the language model reading the projected states of drawings: what the aligned miniature does;
4. the projector on the drawings it was fitted to, and cross-fitted: what stage 2 would see and what it should see;
5. a ridge regression from the cross-fitted states to the teacher's embeddings, scored there: what is left of the
   baseline after the projector, read linearly.

Embeddings are centred and scaled by dimension before cosines, for an untrained language model's lie in a narrow cone.
Writes `benchmarks/results/alignment.json`.
"""

from __future__ import annotations

from basics import RESULTS, keep, parser

# isort: split
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emoji.align import Projection, caption_states, fit_projections
from emoji.benchmark import build_benchmark
from emoji.concepts import TRAINED_VENDORS, VENDORS
from emoji.miniature import text_teacher
from emoji.packages import fetch
from emoji.pipeline import Demo
from emoji.ridge import Ridge, fit_ridge, recalls, ridge_baseline, vision_features
from emoji.settings import DemoSettings
from small_models import whole_miniature
from unime_st.modules import build_encoder

LAYERS = (16,)


def standardised(rows: Tensor) -> Tensor:
    return (rows - rows.mean(0)) / rows.std(0)


def r_at_1(images: Tensor, texts: Tensor) -> float:
    return round(recalls(standardised(images.double()), standardised(texts.double()))["text_to_image"]["R@1"], 1)


def read(model: Any, tokens: Tensor) -> Tensor:
    """Embeddings of visual tokens (N, P, D) given in place of what the projector makes of images."""
    encoder = model[0]
    size = encoder.processor.image_processor.size
    blank = np.zeros((size["height"], size["width"], 3), dtype=np.uint8)
    ids = encoder.preprocess([blank])["input_ids"][0]
    language, rows = encoder.model.language_model, []
    for part in tokens.split(64):
        embedded = language.embed_tokens(ids).expand(len(part), -1, -1).clone()
        embedded[:, ids == encoder.model.config.image_token_id] = part
        with torch.inference_mode():
            rows.append(language(inputs_embeds=embedded).last_hidden_state[:, -1])
    return torch.cat(rows)


def projected(projection: Projection, maps: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(maps)).float() @ projection.weight.T + projection.bias


def by_fold(maps: np.ndarray, states: Tensor, folds: list[int], fits: list[Projection]) -> float:
    """Mean over folds of R@1 within the fold, each with its projection."""
    number = np.array(folds)
    members = [np.flatnonzero(number == fold) for fold in range(len(fits))]
    scores = [r_at_1(projected(fit, maps[own]).mean(1), states[own]) for fit, own in zip(fits, members, strict=True)]
    return round(sum(scores) / len(scores), 1)


def teacher_from_states(
    features: list[np.ndarray], taught: Tensor, folds: list[int], fits: list[Projection], penalty: float
) -> Ridge:
    """Ridge regression to the teacher's embeddings from each training drawing's states, cross-fitted."""
    number = np.array(folds)
    rows, targets = [], []
    for fold, fit in enumerate(fits):
        own = np.flatnonzero(number == fold)
        for maps in features:
            rows.append(projected(fit, maps[own]).mean(1))
            targets.append(taught[own])
    return fit_ridge(torch.cat(rows), torch.cat(targets), [penalty])[0]


def main() -> None:
    cache: Path = parser(__doc__, cache=True).parse_args().cache
    settings = DemoSettings()
    fetched = fetch(cache, print)
    benchmark = build_benchmark(fetched, cache / "benchmark", seed=settings.seed)
    model = build_encoder(whole_miniature(cache, fetched, settings), prompt_template="chatml_open", device="cpu")
    demo = Demo(cache, cache / "alignment", settings)
    features, captions = demo.training_features(fetched, benchmark)
    folds_of = demo.folds(fetched, benchmark)
    images, _ = benchmark.retrieval("train", TRAINED_VENDORS[0])
    folds = [folds_of[path.relative_to(benchmark.image_root).as_posix()] for path in images]
    texts = [own[0] for own in benchmark.retrieval("validation", TRAINED_VENDORS[0])[1]]
    embedded = torch.from_numpy(model.encode(texts))
    stem = f"{benchmark.info['settings']['format']}-{settings.seed}-{settings.image_size}"
    maps = {
        vendor: vision_features(
            fetched,
            benchmark.retrieval("validation", vendor)[0],
            cache / "features" / f"vision-{stem}-validation-{vendor}.npy",
            image_size=settings.image_size,
        )
        for vendor in VENDORS
    }
    teacher = text_teacher(fetched)
    taught, wanted = (torch.from_numpy(teacher.encode(list(part))).double() for part in (captions, texts))
    ridge = ridge_baseline(fetched, benchmark, cache / "features", image_size=settings.image_size)["validation"]
    baseline = {vendor: round(ridge[vendor]["text_to_image"]["R@1"], 1) for vendor in VENDORS}
    content: dict[str, Any] = {"split": "validation", "metric": "text->image R@1, percent"}
    content |= {"ridge into the teacher's space": baseline, "penalty": settings.align_penalty}
    for layer in LAYERS:
        states, own = caption_states(model, texts, layer), caption_states(model, captions, layer)
        fits = fit_projections(features, own.double(), folds, settings.align_penalty)
        tokens = {vendor: projected(fits[0], rows) for vendor, rows in maps.items()}
        exact = states[:, None].expand(-1, tokens["google"].shape[1], -1)
        linear = teacher_from_states(features, taught, folds, fits[1:], settings.align_penalty)
        found = {
            "projected, in the states": {vendor: r_at_1(rows.mean(1), states) for vendor, rows in tokens.items()},
            "exact states, read": r_at_1(read(model, exact), embedded),
            "projected, read": {vendor: r_at_1(read(model, rows), embedded) for vendor, rows in tokens.items()},
            "training drawings, in the states": by_fold(features[0], own, folds, [fits[0]] * settings.folds),
            "training drawings, cross-fitted": by_fold(features[0], own, folds, fits[1:]),
            "teacher's space from the projected states": {
                vendor: r_at_1(linear(rows.mean(1)), wanted) for vendor, rows in tokens.items()
            },
        }
        content[f"layer {layer}"] = found
        print(layer, json.dumps(found), flush=True)
    keep(RESULTS / "alignment.json", content)


if __name__ == "__main__":
    main()
