"""How embeddings are made, kept and compared, whoever asks for them.

``prompts`` resolves the prompt. ``store`` keeps embeddings on disk by content, in files that are written whole;
``missing`` makes what a store lacks, in all processes, with ``waiting`` for those of others. ``cache`` keeps those of
evaluations, by model and prompt in ``sections`` that may be evicted; ``distinct`` encodes through it, each distinct
item once. ``neighbors`` finds what is near. ``broken`` and ``full_disk`` word the errors.
"""
