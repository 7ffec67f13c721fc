"""The demo: a miniature multimodal LLM and an emoji benchmark, made of real parts from package registries."""
