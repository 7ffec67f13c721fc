"""Where a step and a pass read a number off the device, which on a GPU waits for all work before: listed, no more.

There is no GPU here. Tensors that a GPU would hold are marked, as is whatever is made of them, and what would read one
is noted with the place that asked for it.
"""

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tiny import picture
from unime_st import build_encoder, placement
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss, in_batch

READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique",
         "masked_select", "argwhere", "equal", "allclose"}  # fmt: skip
SRC = str(Path(placement.__file__).parent)
RED, GREEN = picture("red"), picture("green", (30, 60))
ANCHORS = [{"image": RED, "text": text} for text in ("what?", "who is it?", "where?")] + [GREEN, "a cat", "a dog"]
POSITIVES = ["kitten", "crimson " * 4, "a rose", "lime", "a cat", "dogs"]
TEXTS = ["a cat", "a cat on a mat", "no", "a dog " * 6, "a cat on the moon", "yes"]
TEACHER = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))

LOOKED_UP = ("modules/speed/vision_cache.py:keys", "modules/speed/vision_cache.py:of")
"""Once a pass with images: the features of a tower are looked up by what the images show, with a grid by its sizes."""

TRANSFORMERS = ("modeling_", "masking_utils", "vision_utils", "import_utils")
"""Its own reads, in passes with images above all: positions, checks of placeholders, sizes of grids."""


class Watch(TorchFunctionMode):
    """Counts the places of ours that read marked tensors, and those of other libraries."""

    def __init__(self, *marked):
        super().__init__()
        self.ours, self.others = Counter(), Counter()
        for tensor in marked:
            tensor.on_device = True

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        given = list(_tensors((args, kwargs)))
        marked = [tensor for tensor in given if getattr(tensor, "on_device", False)]
        reads = bool(marked) and (name in READS or (name in ("__getitem__", "__setitem__") and _by_mask(args)))
        reads = reads or (bool(marked) and name == "to" and "cpu" in map(str, (*args[1:], *kwargs.values())))
        if reads:
            place, is_ours = _place()
            (self.ours if is_ours else self.others)[place] += 1
        found = function(*args, **kwargs)
        if name in ("cpu", "to") and reads:
            return found.detach().view(found.shape) if found is args[0] else found  # another tensor, without the mark
        if marked:
            for tensor in _tensors(found):
                tensor.on_device = True
        return found


def _tensors(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for element in value:
            yield from _tensors(element)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))


def _by_mask(args):
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in index)


def _place():
    """The innermost frame that is no part of torch or of this test, and whether it is ours."""
    frame = sys._getframe(2)
    while "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    file = frame.f_code.co_filename
    ours = file.startswith(SRC)
    short = file.removeprefix(SRC + "/") if ours else "/".join(Path(file).parts[-2:])
    return f"{short}:{frame.f_code.co_name}", ours


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What is sent to the device is another tensor, which is marked."""

    def sent(value, device):
        found = value.detach().view(value.shape) if isinstance(value, Tensor) else value
        found.on_device = True
        return found

    monkeypatch.setattr(placement, "sent", sent)
    for name, module in list(sys.modules.items()):
        if name.startswith("unime_st") and getattr(module, "sent", None) not in (None, sent):
            monkeypatch.setattr(module, "sent", sent)

    def at_hand(features):
        """As with a device: one read a column."""
        numbers = [key for key, value in features.items() if isinstance(value, Tensor) and placement._is_whole(value)]
        if not any(getattr(features[key], "on_device", False) for key in numbers):
            return dict(features)
        reads["columns"] += 1
        images = {key: _unmarked(value) for key, value in features.get(placement.IMAGES, {}).items()}
        found = {key: _unmarked(features[key]) for key in numbers}
        return {**features, **found, **({placement.IMAGES: images} if images else {})}

    reads = Counter()
    for name, module in list(sys.modules.items()):
        if name.startswith("unime_st") and hasattr(module, "with_numbers_at_hand"):
            monkeypatch.setattr(module, "with_numbers_at_hand", at_hand)
    return reads


def _unmarked(value):
    if not placement._is_whole(value):
        return value
    found = value.detach().view(value.shape)
    found.on_device = False
    return found


def marked(features):
    for tensor in _tensors(features):
        tensor.on_device = True
    return features


def encoder(backbone, family):
    model = build_encoder(backbone(family), device="cpu", peft_config=True).train()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.on_device = True
    return model


OTHERS = ("qwen3_vl", "llava_next")
CONTRAST = HardNegativeInfoNCELoss
CASES = {
    "stage 1, plain": (DistillKLLoss, {"temperature": 0.5}, (TEXTS,), TEACHER),
    "stage 1, cached": (DistillKLLoss, {"temperature": 0.5, "mini_batch_size": 2}, (TEXTS,), TEACHER),
    "stage 2, plain": (CONTRAST, {"temperature": 1.0}, (ANCHORS, POSITIVES), None),
    "stage 2, cached": (
        HardNegativeInfoNCELoss,
        {"temperature": 1.0, "mini_batch_size": 2},
        (ANCHORS, POSITIVES),
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["qwen2_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_step_reads_what_is_listed(family, case, backbone, as_on_a_gpu, monkeypatch):
    model = encoder(backbone, family)
    model[0].prefixes.attention = "mask"  # the tree's kernel would be compiled
    kind, options, columns, labels = CASES[case]
    loss = kind(model, **options).train()

    def step():
        features = [marked(model.preprocess(list(column))) for column in columns]
        value = loss(features, None if labels is None else marked(labels.clone()))
        value.backward()

    for _ in range(9):  # positions are looked at in the first passes of a model
        step()
    as_on_a_gpu.clear()
    watch = Watch()
    whole = in_batch.cached_backward

    def watched(loss, send, finish):
        def send_watched(scale):
            with watch:
                send(scale)

        return whole(loss, send_watched, finish)

    monkeypatch.setattr(in_batch, "cached_backward", watched)
    with watch:
        features = [marked(model.preprocess(list(column))) for column in columns]
        value = loss(features, None if labels is None else marked(labels.clone()))
    value.backward()  # within a mode it would not be watched
    passes = sum(count for place, count in watch.ours.items() if place == LOOKED_UP[0])
    expected = {"losses/in_batch.py:_check": 1}
    if labels is not None:
        expected["losses/checks.py:check_teacher"] = 1
    if len(columns) > 1:
        assert passes > 0
        expected |= dict.fromkeys(LOOKED_UP if family.startswith("qwen") else LOOKED_UP[:1], passes)
    assert watch.ours == expected
    assert as_on_a_gpu == {"columns": len(columns)}
    assert all(any(part in place for part in TRANSFORMERS) for place in watch.others)
    assert watch.others  # else nothing was watched


@pytest.mark.parametrize("family", ["qwen2_vl", *OTHERS])
def test_encode_reads_what_is_listed(family, backbone, as_on_a_gpu):
    model = encoder(backbone, family)
    model[0].prefixes.attention = "mask"
    items = [*ANCHORS, *POSITIVES]
    for _ in range(9):
        model.encode(items, batch_size=4)
    model[0].vision_cache.clear()
    passes = []
    model[0].register_forward_pre_hook(lambda _, args: passes.append(bool((args[0]["input_ids"]).numel())))
    with Watch() as watch:
        model.encode(items, batch_size=4, batch_num_tokens=10_000)
    assert len(passes) > 2
    read_out = watch.ours.pop("modules/sentence_transformer.py:embed")
    assert read_out == len(passes)  # embeddings go to the CPU
    shown = watch.ours[LOOKED_UP[0]]
    assert 0 < shown < len(passes)
    assert watch.ours == dict.fromkeys(LOOKED_UP if family.startswith("qwen") else LOOKED_UP[:1], shown)
    assert all(any(part in place for part in TRANSFORMERS) for place in watch.others)


def test_the_watch_sees_what_reads():
    device, host = torch.arange(3.0), torch.arange(3.0)
    ways = [
        lambda x: x[0].item(), lambda x: (x + 1).tolist(), lambda x: x.cpu(), lambda x: x.numpy(), lambda x: bool(x[1]),
        lambda x: x[x > 1], lambda x: x.nonzero(), lambda x: x.to("cpu"), lambda x: int(x.sum()), lambda x: x.unique(),
    ]  # fmt: skip
    for way in ways:
        with Watch(device) as watch:
            way(host)
            assert not watch.others
            way(device)
        assert sum(watch.others.values()) >= 1
