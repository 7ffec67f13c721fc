"""What changes a model's fingerprint, for every family: all that decides embeddings, and nothing else."""

import copy
import json
import os
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import (
    BoW,
    Dense,
    Normalize,
    Pooling,
    StaticEmbedding,
    WordEmbeddings,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import CanineTokenizer, PythonBackend

from tiny import FAMILIES, PLUGIN_FAMILIES, picture, tiny_encoder
from unime_st import export_encoder, load_encoder
from unime_st.identity.model import explain_outdated, is_outdated, model_fingerprint
from unime_st.models.phi3_v import Phi3VImageProcessor


@pytest.fixture(scope="module", params=[*FAMILIES, *PLUGIN_FAMILIES])
def model(request, tmp_path_factory):
    return tiny_encoder(request.param, tmp_path_factory.mktemp("identity") / "backbone")


def pipeline(model):
    return model.tokenizer.backend_tokenizer


def _normalizer(model):
    pipeline(model).normalizer = normalizers.Lowercase()


def _pre_tokenizer(model):
    pipeline(model).pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _post_processor(model):
    opening = ("<eos>", model.tokenizer.eos_token_id)
    pipeline(model).post_processor = TemplateProcessing("<eos> $A", special_tokens=[opening])


def _merges(model):
    """The same vocabulary."""
    settings = json.loads(pipeline(model).to_str())
    words = settings["model"]["vocab"]
    backend = pipeline(model)
    backend.model = BPE(vocab=words | {"ab": words["é" if "é" in words else "Ġ"]}, merges=[("a", "b")])


def _added_token(model):
    flagged = AddedToken("<bos>", lstrip=True, special=True)
    settings = json.loads(pipeline(model).to_str())
    for token in settings["added_tokens"]:
        token["lstrip"] = token["content"] == flagged.content
    model.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(settings))


def _set(part, name, value):
    def change(model):
        owner = model[0].processor if part == "processor" else getattr(model[0].processor, part)
        assert hasattr(owner, name) or isinstance(owner, Phi3VImageProcessor), (part, name)  # a setting, not a typo
        setattr(owner, name, value)

    return change


CHANGES = {
    "normalizer": _normalizer,
    "pre-tokenizer": _pre_tokenizer,
    "post-processor": _post_processor,
    "merges": _merges,
    "flags of a token": _added_token,
    "side of padding": lambda model: setattr(model.tokenizer, "padding_side", "right"),
    "pad token": lambda model: setattr(model.tokenizer, "pad_token", "<eos>"),
    "image mean": _set("image_processor", "image_mean", [0.1, 0.2, 0.3]),
    "image resampling": _set("image_processor", "resample", 0),
    "image rescaling": _set("image_processor", "rescale_factor", 0.5),
    "resizing": _set("image_processor", "do_resize", False),
    "template": _set("processor", "chat_template", "{{ messages }}"),
    "named templates": _set("processor", "chat_template", {"default": "{{ messages }}"}),
    "length": lambda model: setattr(model, "max_seq_length", 17),
    "pooling": lambda model: setattr(model[1], "pooling_mode", "mean"),
    "prompt in pooling": lambda model: setattr(model[1], "include_prompt", False),
    "default prompt": lambda model: (model.prompts.update(q="Find: "), setattr(model, "default_prompt_name", "q")),
    "dimension": lambda model: setattr(model, "truncate_dim", 5),
    "module": lambda model: model.append(Dense(32, 32, bias=False, init_weight=torch.eye(32))),
    "config": lambda model: setattr(model[0].model.config, "image_token_id", 7),
    "weight": lambda model: next(model.parameters()).data.view(-1)[:1].add_(1e-6),
}


def clone(model):
    """A copy whose tokenizer, processor and modules can be changed alone."""
    return copy.deepcopy(model)


@pytest.mark.parametrize("change", CHANGES)
def test_each_thing_that_decides_embeddings_is_seen(model, change):
    other = clone(model)
    before = model_fingerprint(model)
    assert model_fingerprint(other) == before
    CHANGES[change](other)
    assert model_fingerprint(other) != before
    assert model_fingerprint(model) == before


def test_sizes_and_videos_are_seen(model):
    """All settings that hold numbers or switches, of every processor and of the config of what they prepare."""
    seen = 0
    before = model_fingerprint(model)
    for part in ("image_processor", "video_processor"):
        if getattr(model[0].processor, part, None) is None:
            continue
        for name, value in getattr(model[0].processor, part).to_dict().items():
            if isinstance(value, bool | int | float | dict | list):
                other = clone(model)
                setattr(getattr(other[0].processor, part), name, not value if isinstance(value, bool) else [value, 1])
                assert model_fingerprint(other) != before, (part, name)
                seen += 1
    assert seen >= 5
    own = [name for name, value in vars(model[0].processor).items() if isinstance(value, int) and name[0] != "_"]
    for name in own:
        other = clone(model)
        setattr(other[0].processor, name, 123)
        assert model_fingerprint(other) != before, name


def test_saving_copying_moving_and_calls_change_nothing(model, tmp_path):
    before = model_fingerprint(model)
    other = clone(model)
    other.encode(["a", "a longer text", {"image": picture(), "text": "b"}])
    pipeline(other).enable_truncation(3)
    pipeline(other).enable_padding(length=9)
    other.train()
    assert model_fingerprint(other) == before
    export_encoder(model, tmp_path / "exported")
    for name in ("exported", "moved"):
        if name == "moved":
            (tmp_path / "exported").rename(tmp_path / "moved")
        loaded = load_encoder(tmp_path / name, device="cpu")
        assert model_fingerprint(loaded) == before
    loaded.save_pretrained(str(tmp_path / "again"))
    assert model_fingerprint(load_encoder(tmp_path / "again", device="cpu")) == before
    loaded.prompts["unused"] = "not the default: "
    loaded.similarity_fn_name = "dot"
    loaded[0].model.config._name_or_path = "elsewhere"
    assert model_fingerprint(loaded) == before


def test_an_adapter_s_scale_and_state_are_seen_and_its_training_is_not(tmp_path):
    model = tiny_encoder("qwen2_vl", tmp_path / "backbone", peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    before = model_fingerprint(model)
    model.save_pretrained(str(tmp_path / "saved"))
    assert model_fingerprint(load_encoder(tmp_path / "saved", device="cpu")) == before
    layers = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]
    layers[0].scaling["default"] *= 2
    assert model_fingerprint(model) != before
    layers[0].scaling["default"] /= 2
    assert model_fingerprint(model) == before
    model[0].model.disable_adapters()
    assert model_fingerprint(model) != before


def words(**changes):
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "A": 2, "revision": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def static(tokenizer, *more):
    return SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_weights=torch.arange(8.0).view(4, 2)), *more], device="cpu"
    )


def test_a_static_model_is_known_by_its_tokenizer(tmp_path):
    plain = static(words())
    before = model_fingerprint(plain)
    plain.encode(["a A"])
    assert model_fingerprint(plain) == model_fingerprint(static(words())) == before
    plain.save_pretrained(str(tmp_path / "saved"))
    assert model_fingerprint(SentenceTransformer(str(tmp_path / "saved"), device="cpu")) == before
    cut, added = words(), words()
    cut.enable_truncation(1)
    added.add_tokens([AddedToken("a A", single_word=True)])
    swapped = Tokenizer(WordLevel({"[UNK]": 0, "a": 2, "A": 1, "revision": 3}, unk_token="[UNK]"))
    swapped.pre_tokenizer = pre_tokenizers.Whitespace()
    others = [words(normalizer=normalizers.Lowercase()), words(pre_tokenizer=pre_tokenizers.Punctuation())]
    fingerprints = [model_fingerprint(static(tokenizer)) for tokenizer in (*others, cut, added, swapped)]
    fingerprints += [model_fingerprint(static(words(), module)) for module in (Normalize(), nn.ReLU(), nn.Tanh())]
    assert len({before, *fingerprints}) == 9


def test_word_tokenizers_and_bags_of_words_are_seen():
    def model(vocabulary=("a", "b"), **options):
        tokenizer = WhitespaceTokenizer(list(vocabulary), **options)
        return SentenceTransformer(modules=[WordEmbeddings(tokenizer, torch.ones(2, 2)), Pooling(2)], device="cpu")

    made = [model(), model(("b", "a")), model(stop_words={"a"}), model(do_lower_case=True)]
    bags = [BoW(["a", "revision"]), BoW(["a", "revision"], {"revision": 2.0}), BoW(["revision", "a"])]
    made += [SentenceTransformer(modules=[bag], device="cpu") for bag in bags]
    assert len({model_fingerprint(each) for each in made}) == len(made)
    assert model_fingerprint(model(stop_words={"a", "b"})) == model_fingerprint(model(stop_words={"b", "a"}))


class Slow(PythonBackend):
    """A tokenizer in Python, with what its kind keeps: a vocabulary, switches, and a cache of what it has seen."""

    vocab_files_names: ClassVar = {}

    def __init__(self, vocabulary=("a", "b"), lower=False, **kwargs):
        self.words, self.lower, self.cache = {word: number for number, word in enumerate(vocabulary)}, lower, {}
        super().__init__(unk_token="a", **kwargs)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return dict(self.words)

    def _tokenize(self, text):
        self.cache[text] = text.split()
        return self.cache[text]

    def _convert_token_to_id(self, token):
        return self.words.get(token, 0)

    def _convert_id_to_token(self, index):
        return list(self.words)[index]


def test_slow_tokenizers_are_seen():
    def known(tokenizer):
        module = nn.Linear(1, 1)
        nn.init.ones_(module.weight), nn.init.ones_(module.bias)
        module.tokenizer = tokenizer
        return model_fingerprint(module)

    one = Slow()
    before = known(one)
    one("a b a", truncation=True, max_length=2)
    assert one.cache
    assert known(one) == known(Slow()) == before
    others = [Slow(("b", "a")), Slow(lower=True), Slow(pad_token="b"), Slow(model_max_length=5), CanineTokenizer()]
    others += [Slow(extra_special_tokens=[AddedToken("a", lstrip=True)])]
    assert len({before, *map(known, others)}) == len(others) + 1


def test_routes_are_seen():
    def model(**options):
        return SentenceTransformer(
            modules=[Router({"query": [StaticEmbedding(words(), torch.ones(4, 2))], "document": [
                StaticEmbedding(words(), torch.zeros(4, 2))]}, **options)], device="cpu",
        )  # fmt: skip

    made = [model(default_route="query"), model(default_route="document")]
    made.append(model(default_route="query", route_mappings={("other", None): "document"}))
    made.append(model(default_route="query", route_mappings={("other", None): "query"}))
    made.append(model(default_route="query"))
    made[-1][0].sub_modules["document"][0].tokenizer.normalizer = normalizers.Lowercase()
    assert len({model_fingerprint(each) for each in made}) == len(made)


def test_a_subclass_that_logs_is_the_same_model():
    class Logging(SentenceTransformer):
        pass

    plain = static(words())
    assert model_fingerprint(Logging(modules=list(plain), device="cpu")) == model_fingerprint(plain)


IN_ANOTHER_PROCESS = """
import torch
from test_model_identity import Slow, model_fingerprint, static, words
module = static(words())
module.tokenizers = None
module[0].processor = {"sizes": {"b", "a", "c"}, "tokenizer": Slow()}
print(model_fingerprint(module))
"""


def test_it_is_the_same_in_every_process():
    found = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
        done = subprocess.run(
            [sys.executable, "-c", IN_ANOTHER_PROCESS], capture_output=True, text=True, env=environment, check=True
        )
        found.add(done.stdout.strip().splitlines()[-1])
    assert len(found) == 1
    assert len(found.pop()) == 64


def test_fingerprints_of_before_are_told_by_sight():
    now = model_fingerprint(nn.Linear(1, 1))
    assert not is_outdated(now)
    assert is_outdated(now[:-1] + ("0" if now[-1] != "0" else "1"))
    assert "earlier version" in explain_outdated("f" * 64)
    for other in (now, "BAAI/bge-m3", None, "f" * 32):
        assert explain_outdated(other) == ""
