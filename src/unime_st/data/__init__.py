"""Training and evaluation data: MMEB, videos, document pages, a teacher's embeddings, corpora, pairs of one's own."""

from unime_st.data.bad_images import bad_image_report
from unime_st.data.corpus.encode import encode_corpus
from unime_st.data.corpus.encoded import EncodedCorpus, load_corpus
from unime_st.data.corpus.stream import encode_stream
from unime_st.data.documents import load_colpali_train, load_visrag_train
from unime_st.data.images import ItemReader, resolve_image
from unime_st.data.judging.json_list import import_judged_json, read_judged_json, write_judged_json
from unime_st.data.judging.judge import judge_negatives
from unime_st.data.judging.load import judged_json_rows, load_judged_negatives
from unime_st.data.judging.scorer import PairScorer
from unime_st.data.llava_hound import load_llava_hound
from unime_st.data.mining.mine import load_mined_negatives, mine_hard_negatives
from unime_st.data.mmeb.load import load_mmeb_eval, load_mmeb_train
from unime_st.data.nli import load_nli
from unime_st.data.pairs.check import check_pairs
from unime_st.data.pairs.inputs import load_inputs
from unime_st.data.pairs.load import load_pairs
from unime_st.data.pairs.report import PairsReport
from unime_st.data.pairs.split import split_pairs
from unime_st.data.pdf_pages import PdfPages
from unime_st.data.teacher.embed import teacher_embeddings, with_teacher_labels
from unime_st.data.with_images import with_images
from unime_st.embedding.broken import BrokenInputError

__all__ = [
    "BrokenInputError",
    "EncodedCorpus",
    "ItemReader",
    "PairScorer",
    "PairsReport",
    "PdfPages",
    "bad_image_report",
    "check_pairs",
    "encode_corpus",
    "encode_stream",
    "import_judged_json",
    "judge_negatives",
    "judged_json_rows",
    "load_colpali_train",
    "load_corpus",
    "load_inputs",
    "load_judged_negatives",
    "load_llava_hound",
    "load_mined_negatives",
    "load_mmeb_eval",
    "load_mmeb_train",
    "load_nli",
    "load_pairs",
    "load_visrag_train",
    "mine_hard_negatives",
    "read_judged_json",
    "resolve_image",
    "split_pairs",
    "teacher_embeddings",
    "with_images",
    "with_teacher_labels",
    "write_judged_json",
]
