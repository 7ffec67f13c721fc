"""A teacher's embeddings, made once: ``embed`` is the way in, ``identity`` tells whose, ``rows`` checks them."""

from unime_st.data.teacher.embed import teacher_embeddings, with_teacher_labels

__all__ = ["teacher_embeddings", "with_teacher_labels"]
