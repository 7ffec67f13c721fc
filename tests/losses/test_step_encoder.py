"""What losses ask of an encoder is one written protocol; a plain default stands for encoders that do not know it."""

from contextlib import contextmanager

import pytest
import torch
from helpers import ANCHORS, NEGATIVES, POSITIVES, features
from sentence_transformers.sentence_transformer.modules import Transformer

from unime_st import build_encoder
from unime_st.features import forget_kept_features
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss, grad_cache
from unime_st.step_encoder import PlainEncoder, StepEncoder, first_module, is_compiled, step_encoder, unwrapped

METHODS = ["with_media", "keeping_features", "embeddings_alone", "forget_features"]
COLUMNS = ANCHORS, POSITIVES, NEGATIVES
STEPS = {"plain": {}, "GradCache": {"mini_batch_size": 3}}


class Encoder(Transformer):
    """A stock encoder that knows the protocol, and writes down what it is asked."""

    relative_positions = False
    mini_batches_ahead = 0

    def with_media(self, features):
        self.asked.append("media")
        return features

    @contextmanager
    def keeping_features(self):
        self.asked.append("keep")
        yield
        self.asked.append("kept")

    @contextmanager
    def embeddings_alone(self, *, last_token_only):
        self.asked.append(f"embed, last token {last_token_only}")
        yield

    def forget_features(self):
        self.asked.append("forget")


@pytest.fixture
def fake(text_model):
    text_model[0].__class__ = Encoder
    text_model[0].asked = []
    return text_model


def losses(model, **options):
    teacher = torch.randn(len(ANCHORS), len(COLUMNS), 4, generator=torch.Generator().manual_seed(0)).double()
    yield DistillKLLoss(model, temperature=0.5, **options), teacher
    yield HardNegativeInfoNCELoss(model, **options), None


def steps(model, **options):
    for loss, labels in losses(model, **options):
        model.zero_grad()
        value = loss(features(model, *COLUMNS), labels)
        value.backward()
        yield value.item(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("how", STEPS)
def test_both_losses_ask_an_encoder_that_knows_the_protocol(fake, how):
    for _ in steps(fake, **STEPS[how]):
        asked = fake[0].asked.copy()
        fake[0].asked.clear()
        if how == "GradCache":
            assert (asked.pop(0), asked.pop(-1)) == ("keep", "kept")
            passes = asked.count("embed, last token False")
            assert asked.count("media") == passes  # each mini-batch in each pass, but for the one that is kept
            asked = [name for name in asked if name != "media"]
        assert set(asked) == {"embed, last token False"}
        assert len(asked) >= len(COLUMNS)


@pytest.mark.parametrize("how", STEPS)
def test_a_stock_encoder_takes_the_default_and_learns_the_same(fake, how):
    asked = list(steps(fake, **STEPS[how]))
    fake[0].__class__ = Transformer
    fake[0].asked.clear()
    assert isinstance(step_encoder(fake), PlainEncoder)
    for (value, gradients), (other, others) in zip(asked, steps(fake, **STEPS[how]), strict=True):
        assert value == other
        assert all(map(torch.equal, gradients, others))
    assert not fake[0].asked


@pytest.mark.parametrize("relative", [False, True])
def test_padding_before_a_row_goes_where_the_encoder_says_that_it_changes_nothing(fake, monkeypatch, relative):
    trimmed = []
    select = grad_cache.select_rows
    monkeypatch.setattr(
        grad_cache, "select_rows", lambda *args, trim_leading: trimmed.append(trim_leading) or select(*args)
    )
    fake[0].relative_positions = relative
    list(steps(fake, mini_batch_size=3))
    assert set(trimmed) == {relative}


def test_the_last_token_alone_is_read_under_last_token_pooling(fake):
    fake[1].pooling_mode = "lasttoken"
    grad_cache.embedded(fake, *features(fake, ANCHORS))
    assert fake[0].asked == ["embed, last token True"]


def test_the_encoder_is_found_in_wrapped_models(fake):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    compiled = torch.compile(fake, backend="eager")
    expected = [(fake, False), (Wrapper(fake), False), (compiled, True), (Wrapper(Wrapper(compiled)), True)]
    for model, is_one in expected:
        assert unwrapped(model) is fake
        assert step_encoder(model) is first_module(model) is fake[0]
        assert is_compiled(model) == is_one


@pytest.mark.parametrize("model", [None, torch.nn.Linear(2, 2), torch.nn.Sequential(), lambda _: None])
def test_models_without_modules_take_the_default(model):
    assert isinstance(step_encoder(model), PlainEncoder)
    assert not step_encoder(model).relative_positions
    forget_kept_features(model)


def test_features_are_forgotten_wherever_the_encoder_is(fake):
    forget_kept_features(torch.nn.ModuleList([torch.nn.Linear(2, 2), fake]))
    assert fake[0].asked == ["forget"]


def test_the_default_implements_the_protocol():
    assert isinstance(PlainEncoder(), StepEncoder)
    PlainEncoder().forget_features()


def test_the_multimodal_encoder_implements_the_protocol(backbone, monkeypatch):
    model = build_encoder(backbone("fast_vlm"), device="cpu")
    encoder = model[0]
    assert isinstance(encoder, StepEncoder)
    assert step_encoder(model) is encoder
    assert encoder.relative_positions
    for name in (*METHODS, "relative_positions"):
        owner = next(kind for kind in type(encoder).__mro__ if name in vars(kind))
        with monkeypatch.context() as patch:
            patch.setattr(owner, f"{name}_renamed", getattr(owner, name), raising=False)
            patch.delattr(owner, name)
            assert not isinstance(encoder, StepEncoder), name
    with encoder.embeddings_alone(last_token_only=True):
        assert (encoder.prefixes.active, encoder.prefixes.last_token_only) == (True, True)
    assert not encoder.prefixes.active
