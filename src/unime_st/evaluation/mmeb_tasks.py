"""The 36 tasks of MMEB V1, as data."""

from __future__ import annotations

# Meta-task -> tasks with a training set, tasks without one (VLM2Vec, arXiv 2410.05160, table 1).
_PUBLISHED: dict[str, tuple[str, str]] = {
    "Classification": (
        "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
        "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ),
    "VQA": ("OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W", "ScienceQA VizWiz GQA TextVQA"),
    "Retrieval": (
        "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
        "FashionIQ Wiki-SS-NQ OVEN EDIS",
    ),
    "Grounding": ("MSCOCO", "RefCOCO RefCOCO-Matching Visual7W-Pointing"),
}
META_TASKS: dict[str, str] = {
    task: meta for meta, parts in _PUBLISHED.items() for part in parts for task in part.split()
}
"""Task -> meta-task, in the published order."""

IN_DISTRIBUTION = frozenset(task for known, _ in _PUBLISHED.values() for task in known.split())
"""The 20 tasks with a training set in MMEB-train."""
