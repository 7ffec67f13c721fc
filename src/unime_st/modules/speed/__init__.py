"""Everything that makes a pass faster than stock code's, and leaves its result as it is.

What is put in place of parts of the model while it runs, in this order, each by a context that puts the former part
back however it ends; :class:`~unime_st.modules.speed.prefixes.SharedPrefixes` holds ``turns`` meanwhile, so that one
thread at a time has a model whose parts are replaced:

1. ``image_attention``: the vision tower's attention, by its configuration (a GPU, Qwen-VL): all images in one call.
2. ``vision_cache``: the vision tower's ``forward``: what a frozen tower made of an image is remembered.
3. ``prefixes``: the language model's ``forward``: it runs over packed tokens, which ``token_tree`` plans. Within it
   - the attention, by the configuration: ``row_attention`` (a CPU, inference) or ``tree_attention`` (a GPU);
   - ``forward`` of the last layer's query, output and feed-forward parts: for last tokens alone.

Beside these, ``shared_images`` replaces the image processor's ``__call__`` while a batch is prepared, and ``batches``
puts inputs into batches and batches into passes. Under gradient checkpointing the two attentions of a GPU stay in the
configuration after their context, for layers run again in the backward pass; for any other mask they are the usual one.
"""
