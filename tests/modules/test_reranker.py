"""The judge: its prompts and tokens, its scores against a bare model and stock CrossEncoder, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoModelForImageTextToText, AutoProcessor

from tiny import FAMILIES, picture, tiny_backbone
from unime_st.modules import build_reranker, export_reranker, load_reranker
from unime_st.modules.reranker.pair_encoder import PairEncoder
from unime_st.prompts import chat_template
from unime_st.published import PUBLISHED_RERANKERS
from unime_st.rerank_prompts import LIST_PROMPTS, PAIR_PROMPTS, PairPrompt

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "judge_prompts.json").read_text())
RED, GREEN, WIDE = picture("red"), picture("green"), picture("white", (60, 20))
QUERY = {"image": RED, "text": "what is it?"}
PAIRS = [
    (QUERY, "a red bus"),
    (QUERY, "a boat"),
    (QUERY, {"image": GREEN, "text": "this one"}),
    (QUERY, GREEN),
    (QUERY, {"image": RED, "text": "this one"}),
    ("a red bus", RED),
    ("a red bus", "two buses"),
    (QUERY, "a red bus"),
    (WIDE, {"text": "long " * 30, "image": WIDE}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            made[family] = tiny_backbone(family, tmp_path_factory.mktemp(family), words=["Yes", "No"])
        return made[family]

    return of


def bare_scores(folder, template, pairs):
    """p(yes) / (p(yes) + p(no)) by a bare forward pass of each pair alone, over the whole vocabulary."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = template
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    found = []
    for pair in pairs:
        messages, images = [], []
        for role, half in zip(("query", "document"), pair, strict=True):
            half = {"text": half} if isinstance(half, str) else half if isinstance(half, dict) else {"image": half}
            images += [half["image"]] if "image" in half else []
            content = [{"type": "image"}] * ("image" in half)
            content += [{"type": "text", "text": half["text"]}] if "text" in half else []
            messages.append({"role": role, "content": content})
        text = processor.apply_chat_template(messages, tokenize=False)
        inputs = processor(images=[images] if images else None, text=[text], return_tensors="pt",
                           add_special_tokens=False)  # fmt: skip
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -1].double()
        yes, no = (logits[processor.tokenizer.convert_tokens_to_ids(word)].exp() for word in ("Yes", "No"))
        found.append(float(yes / (yes + no)))
    return np.array(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_a_bare_model(folders, family):
    judge = build_reranker(folders(family), device="cpu")
    scores = judge.predict(PAIRS)
    expected = bare_scores(folders(family), judge[0].processor.chat_template, PAIRS)
    assert np.ptp(expected) > 1e-3, "all scores are alike, so they prove nothing"
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    if judge[0].prefixes.computed:  # families that can share beginnings
        assert judge[0].prefixes.computed < 0.7 * judge[0].prefixes.padded
    for size in (1, 3):
        np.testing.assert_allclose(judge.predict(PAIRS, batch_size=size), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_these_families_share_a_query_and_compute_two_columns(folders, family):
    judge = build_reranker(folders(family), device="cpu")
    shapes = []
    judge[0].register_forward_hook(lambda _module, _given, output: shapes.append(tuple(output["causal_logits"].shape)))
    candidates = [f"candidate {number}" for number in range(12)]
    judge.predict([(QUERY, candidate) for candidate in candidates], batch_size=12)
    prefixes = judge[0].prefixes
    assert 0 < prefixes.computed < 0.3 * prefixes.padded
    assert {shape[1:] for shape in shapes} == {(1, 2)}
    alone = build_reranker(folders(family), device="cpu")
    alone.predict([(QUERY, candidates[0])])
    assert judge[0].vision_cache.misses == alone[0].vision_cache.misses > 0  # its tiles, in some families
    assert "forward" not in vars(judge[0].model.get_output_embeddings())


def test_equal_pairs_and_images_are_computed_once(folders):
    judge = build_reranker(folders("qwen2_vl"), device="cpu")
    images = [RED, GREEN, RED.copy(), GREEN.copy()]
    pairs = [(query, {"image": image, "text": "this"}) for query in ("a bus", "a boat") for image in images]
    rows = []
    plain = judge[0].preprocess
    judge[0].preprocess = lambda given, *args, **options: (rows.append(len(given)), plain(given, *args, **options))[1]
    scores = judge.predict(pairs)
    assert sum(rows) == 4
    assert judge[0].vision_cache.misses == 2
    np.testing.assert_array_equal(scores.reshape(2, 2, 2)[:, 0], scores.reshape(2, 2, 2)[:, 1])


@pytest.mark.parametrize("family", GOLDEN)
def test_prompts_and_tokens_are_golden(folders, family):
    encoder = build_reranker(folders(family), device="cpu")[0]
    features = encoder.preprocess([(QUERY, "a red bus"), ("a bus", GREEN)])
    for row, golden in enumerate(GOLDEN[family]):
        tokens = features["input_ids"][row][features["attention_mask"][row].bool()]
        words = encoder.tokenizer.decode(tokens)
        assert _runs(words) == golden["prompt"]
        assert _runs_of(tokens.tolist()) == [tuple(run) for run in golden["tokens"]]


def _runs(words):
    """The prompt with each run of one image's placeholders as one."""
    for token in ("<image>", "<|image_pad|>", "<image_soft_token>"):
        while token * 2 in words:
            words = words.replace(token * 2, token)
    return words


def _runs_of(tokens):
    runs = []
    for token in tokens:
        if runs and runs[-1][0] == token:
            runs[-1] = (token, runs[-1][1] + 1)
        else:
            runs.append((token, 1))
    return runs


def test_the_published_prompt_is_to_the_letter_in_a_published_template(folders):
    """Qwen2-VL's own template, as its repository has it, around the words of the authors' script."""
    own = (
        "{% set image_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and message['role'] "
        "!= 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ "
        "message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}{% for "
        "content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|>"
        "<|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif "
        "%}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    judge = build_reranker(folders("qwen2_vl"), device="cpu", processor_kwargs={"chat_template": own})
    fallback = build_reranker(folders("qwen2_vl"), device="cpu")
    features = [model[0].preprocess([(QUERY, "a red bus")])["input_ids"] for model in (judge, fallback)]
    assert torch.equal(*features)
    text = judge[0].tokenizer.decode(features[0][0])
    assert _runs(text) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nI will provide you with a query "
        "and a candidate. Please evaluate whether the candidate meets the requirements of the query. If it does, "
        "respond with 'Yes'; if it doesn't, respond with 'No'.Query:<|vision_start|><|image_pad|><|vision_end|>what is "
        "it?Candidate:a red bus<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "responed with 'No'" in PAIR_PROMPTS["unime_v2_training"].before_query
    said = build_reranker(folders("qwen2_vl"), device="cpu", processor_kwargs={"chat_template": own})
    asked = said[0].preprocess([("a", "b")], prompt="Be strict.")["input_ids"][0]
    assert said[0].tokenizer.decode(asked).startswith("<|im_start|>system\nBe strict.<|im_end|>\n<|im_start|>user\nI")


STOCK = """
import json, sys
import numpy as np
from PIL import Image
from sentence_transformers import CrossEncoder

model = CrossEncoder(sys.argv[1], device="cpu")
pairs = [[half if isinstance(half, str) else {**half, "image": Image.open(half["image"])} if "image" in half else half
          for half in pair] for pair in json.load(open(sys.argv[2]))]
assert not any(name.startswith("unime_st") for name in sys.modules)
print(json.dumps({"scores": model.predict(pairs).tolist(), "rank": model.rank(pairs[0][0], [p[1] for p in pairs[:3]])}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "adapted"),
    [("llava_next", False), ("qwen2_5_vl", True), ("qwen3_vl", False), ("smolvlm", True), ("gemma3", False)],
)
def test_what_is_exported_is_a_stock_cross_encoder(folders, family, adapted, tmp_path):
    judge = build_reranker(folders(family), device="cpu", peft_config=adapted)
    if adapted:
        for name, parameter in judge.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    export_reranker(judge, tmp_path / "reranker")
    RED.save(tmp_path / "red.png")
    GREEN.save(tmp_path / "green.png")
    query = {"text": "what is it?", "image": str(tmp_path / "red.png")}  # keys in another order
    pairs = [
        [query, "a red bus"],
        [query, {"image": str(tmp_path / "green.png"), "text": "this one"}],
        [query, {"image": str(tmp_path / "green.png")}],
        ["a bus", "two buses"],
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    command = [sys.executable, "-c", STOCK, str(tmp_path / "reranker"), str(tmp_path / "pairs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    stock = json.loads(done.stdout.splitlines()[-1])
    assert np.ptp(stock["scores"]) > 1e-3
    np.testing.assert_allclose(judge.predict(pairs), stock["scores"], rtol=0, atol=1e-5)
    loaded = load_reranker(tmp_path / "reranker", device="cpu")
    np.testing.assert_allclose(loaded.predict(pairs), stock["scores"], rtol=0, atol=1e-5)
    ranked = loaded.rank(query, [pair[1] for pair in pairs[:3]])
    assert [entry["corpus_id"] for entry in ranked] == [entry["corpus_id"] for entry in stock["rank"]]
    assert type(loaded[0]) is PairEncoder
    assert "unime_st" not in (tmp_path / "reranker" / "modules.json").read_text()


def test_text_pairs_alone_are_rendered_by_stock_code_too(folders, tmp_path):
    judge = build_reranker(folders("qwen2_vl"), device="cpu")
    export_reranker(judge, tmp_path / "reranker")
    pairs = [("a bus", "two buses"), ("a boat", "a car")]
    stock = CrossEncoder(str(tmp_path / "reranker"), device="cpu")
    np.testing.assert_allclose(judge.predict(pairs), stock.predict(pairs), rtol=0, atol=1e-5)


def test_words_of_ones_own(folders):
    words = PairPrompt("Q: ", "\nA: ", "\nGood?", yes="No", no="Yes")
    own = build_reranker(folders("qwen2_vl"), prompt=words, device="cpu")
    text = own[0].tokenizer.decode(own[0].preprocess([("a", "b")])["input_ids"][0])
    assert "<|im_start|>user\nQ: a\nA: b\nGood?<|im_end|>" in text
    turned = build_reranker(folders("qwen2_vl"), prompt=PairPrompt("Q: ", "\nA: ", "\nGood?"), device="cpu")
    np.testing.assert_allclose(own.predict(PAIRS), 1 - turned.predict(PAIRS), atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3"])
def test_an_encoders_template_is_no_judges_and_a_rerankers_is_its_own(folders, family, tmp_path):
    """An encoder's gathers the media and ends in "in one word"; its folder is a backbone where the head is tied."""
    asked = {"processor_kwargs": {"chat_template": chat_template(family)}, "device": "cpu"}
    pairs = [(QUERY, "a red bus"), ("a bus", GREEN)]
    plain, begun = build_reranker(folders(family), device="cpu"), build_reranker(folders(family), **asked)
    assert torch.equal(*(judge[0].preprocess(pairs)["input_ids"] for judge in (plain, begun)))
    own = build_reranker(folders(family), prompt=PairPrompt("Q: ", "\nA: "), device="cpu")
    export_reranker(own, tmp_path / "reranker")
    with pytest.raises(ValueError, match=r"is a reranker with a prompt of its own.*Load it by `load_reranker`"):
        build_reranker(tmp_path / "reranker", device="cpu")
    template = (tmp_path / "reranker" / "chat_template.jinja").read_text()
    trained_on = build_reranker(tmp_path / "reranker", template=template, device="cpu")
    np.testing.assert_allclose(trained_on.predict(pairs), own.predict(pairs), rtol=0, atol=1e-6)


def test_activation_and_prompt_are_the_callers(folders):
    judge = build_reranker(folders("qwen2_vl"), device="cpu")
    scores, logits = judge.predict(PAIRS), judge.predict(PAIRS, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)), atol=1e-6)
    assert np.abs(scores - judge.predict(PAIRS, prompt="Say Yes.")).max() > 1e-4
    assert judge.predict(PAIRS[0]) == pytest.approx(scores[0], abs=1e-6)
    assert judge.predict(PAIRS[:1], convert_to_tensor=True).shape == (1,)


def test_long_texts_lose_their_last_words_the_candidates_first(folders):
    judge = build_reranker(folders("qwen2_vl"), device="cpu", max_seq_length=400)
    features = judge[0].preprocess([(QUERY, "word " * 200)])
    text = judge[0].tokenizer.decode(features["input_ids"][0])
    assert features["input_ids"].shape[1] == 400
    assert "what is it?Candidate:word word" in text
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(ValueError, match=r"Row 0 needs .* tokens for its media and instruction alone"):
        build_reranker(folders("qwen2_vl"), device="cpu", max_seq_length=60)[0].preprocess([(RED, GREEN)])


BAD_PAIRS = {
    "The candidate of pair 1: Row 1 is None": (QUERY, None),
    "The candidate of pair 1: Row 1 holds neither text nor an image": (QUERY, ""),
    "The query of pair 1: Row 1 holds neither text nor an image": ({"text": ""}, "a"),
    "The candidate of pair 1: Row 1: there is no image file": (QUERY, {"image": "missing.png"}),
    "The candidate of pair 1: .*unknown key": (QUERY, {"picture": "a"}),
    r"row 1\) holds '<\|image_pad\|>', which is for media": (QUERY, "<|image_pad|>"),
}


@pytest.mark.parametrize("message", BAD_PAIRS)
def test_bad_pairs_are_named(folders, message):
    judge = build_reranker(folders("qwen2_vl"), device="cpu")
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        judge[0].preprocess([PAIRS[0], BAD_PAIRS[message]])
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=r"pair 1|row 1|Row 1|[kK]ey"):
        judge.predict([PAIRS[0], BAD_PAIRS[message]])


def test_answers_that_are_no_token_are_named(folders, tmp_path):
    with pytest.raises(ValueError, match=r"answer yes='Yes' is 3 token\(s\)"):
        build_reranker(tiny_backbone("qwen2_vl", tmp_path), device="cpu")
    with pytest.raises(ValueError, match=r"answer no='never' is 5 token\(s\)"):
        build_reranker(folders("qwen2_vl"), prompt=PairPrompt("", "", no="never"), device="cpu")
    with pytest.raises(ValueError, match=r"prompt='best'.*unime_v2"):
        build_reranker(folders("qwen2_vl"), prompt="best", device="cpu")


TEMPLATES = {
    "drops the text of the document": "{{ messages[0].content[1].text }}<|image_pad|><|image_pad|>",
    r"drops an image \(1 '<\|image_pad\|>' of two\)": "{% for m in messages %}{{ m.content[1].text }}{% endfor %}"
    "<|image_pad|>",
    "drops the text of the query and the text of the document and an image": "{# of #}nothing",
    "renders the document before the query": "{% for m in messages | reverse %}{% for part in m.content %}{% if "
    "part.type == 'text' %}{{ part.text }}{% else %}<|image_pad|>{% endif %}{% endfor %}{% endfor %}",
    "cannot render a pair": "{{ raise_exception('roles must alternate') }}",
}


@pytest.mark.parametrize("message", TEMPLATES)
def test_templates_that_drop_something_are_refused(folders, message):
    with pytest.raises(ValueError, match=message):
        build_reranker(folders("qwen2_vl"), template=TEMPLATES[message], device="cpu")


def test_a_template_that_drops_an_image_of_some_pairs_is_refused(folders):
    template = (
        "{% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% elif "
        "m.content | length > 1 %}<|image_pad|>{% endif %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"drops an image \(1 '<\|image_pad\|>' of two\)"):
        build_reranker(folders("qwen2_vl"), template=template, device="cpu")


HIDES = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% elif "
    "'hide' not in (m.content | string) %}<|image_pad|>{% endif %}{% endfor %}{% endfor %}"
)


def test_an_image_that_is_dropped_for_what_a_pair_says_is_named(folders):
    """By the processor, or by the count of tokens where one is silent."""
    judge = build_reranker(folders("qwen2_vl"), template=HIDES, device="cpu")
    with pytest.raises(ValueError, match=r"Row 1 .*number of <\|image_pad\|> tokens|Pair 1 shows 2 image\(s\)"):
        judge.predict([(QUERY, "a"), (QUERY, {"image": GREEN, "text": "hide"})])


def test_a_score_that_is_nan_is_named_by_the_callers_pair(folders):
    judge = build_reranker(folders("qwen2_vl"), device="cpu")
    plain = judge[0].forward

    def broken(features, **options):
        output = plain(features, **options)
        output["causal_logits"] = torch.full_like(output["causal_logits"], torch.nan)
        return output

    judge[0].forward = broken
    with pytest.raises(ValueError, match=r"row 0 \(\('z', 'last in order'\)\) and 1 more of 2"):
        judge.predict([("z", "last in order"), ("a", "first in order")])


PUBLISHED = "TianchengGu/UniME-V2-reranker-Qwen25VL-7B"


def test_the_published_reranker_is_asked_and_shown_what_its_scripts_do(folders, tmp_path, monkeypatch):
    known = PUBLISHED_RERANKERS[PUBLISHED]
    model = load_reranker(folders("qwen2_5_vl"), published=PUBLISHED, device="cpu")
    assert known.prompt in PAIR_PROMPTS
    assert PAIR_PROMPTS[known.prompt] != PAIR_PROMPTS[known.training_prompt]
    assert known.list_prompt in LIST_PROMPTS
    plain = build_reranker(folders("qwen2_5_vl"), device="cpu")
    np.testing.assert_allclose(model.predict(PAIRS[6:7]), plain.predict(PAIRS[6:7]), rtol=0, atol=1e-6)
    large = [("a", picture("red", (1000, 800)))]
    tokens = [int((one[0].preprocess(large)["input_ids"] == one[0].model.config.image_token_id).sum())
              for one in (model, plain)]  # fmt: skip
    assert tokens[1] < 250 < tokens[0] <= 300
    export_reranker(model, tmp_path / "exported")
    again = load_reranker(tmp_path / "exported", device="cpu")
    assert int((again[0].preprocess(large)["input_ids"] == again[0].model.config.image_token_id).sum()) == tokens[0]
    monkeypatch.setattr(
        "unime_st.modules.saved.snapshot_download", lambda name: {PUBLISHED: folders("qwen2_5_vl")}[name]
    )
    by_name = load_reranker(PUBLISHED, device="cpu")
    np.testing.assert_allclose(by_name.predict(PAIRS[6:7]), plain.predict(PAIRS[6:7]), rtol=0, atol=1e-6)


def test_copies_of_another_model_and_names_that_are_not_known_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"is a qwen2_5_vl, but this folder holds a qwen2_vl"):
        load_reranker(folders("qwen2_vl"), published=PUBLISHED, device="cpu")
    with pytest.raises(ValueError, match=rf"no published reranker 'me/mine'. Known are {PUBLISHED}"):
        load_reranker(folders("qwen2_vl"), published="me/mine", device="cpu")
    export_reranker(build_reranker(folders("qwen2_5_vl"), device="cpu"), tmp_path / "saved")
    with pytest.raises(ValueError, match="is a saved reranker, which knows its prompt"):
        load_reranker(tmp_path / "saved", published=PUBLISHED, device="cpu")
