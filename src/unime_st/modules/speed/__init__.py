"""Everything that makes a pass faster than stock code's and leaves its result as it is.

These parts of the model are replaced while it runs, in this order, each by a context that puts the former part back
however it ends; meanwhile :class:`~unime_st.modules.speed.prefixes.SharedPrefixes` holds its lock ``turns``, so that
only one thread at a time sees a model with replaced parts:

1. ``image_attention`` replaces the vision tower's attention, by its configuration (on a GPU, for Qwen-VL): it takes all
   images in one call.
2. ``vision_cache`` replaces the vision tower's ``forward``: it remembers the output of a frozen tower for each image.
3. ``prefixes`` replaces the language model's ``forward``: it runs over packed tokens, which ``token_tree`` plans.
   Within it
   - the attention is replaced, by the configuration: ``row_attention`` (on a CPU, in inference) or ``tree_attention``
     (on a GPU);
   - ``forward`` of the last layer's query, output and feed-forward parts is replaced, to serve last tokens alone.

Beside these, ``shared_images`` replaces the image processor's ``preprocess`` while a batch is prepared, and ``batches``
puts inputs into batches and batches into passes. Under gradient checkpointing the two attentions of a GPU stay in the
configuration after their context, for layers that run again in the backward pass; for any other mask they act as the
usual attention.
"""
