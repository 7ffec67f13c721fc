"""``unime export``: a stock checkpoint of a backbone, an adapter or an encoder."""

from __future__ import annotations

import argparse
from pathlib import Path

from unime_st.cli.options import say

HELP = "write a stock sentence-transformers checkpoint of a backbone, an adapter's folder or a published model"
EXAMPLE = "unime export Qwen/Qwen2-VL-2B-Instruct --output encoder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="a multimodal LLM, an adapter's folder, or an encoder")
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("--prompt-template", help="name of a template, for a backbone (default: its family's)")
    parser.add_argument("--max-pixels", type=int, help="of an image, for a backbone that keeps its resolution")
    parser.add_argument("--keep-adapters", action="store_true", help="save adapters alone, which need their backbone")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the best there is)")


def run(given: argparse.Namespace) -> int:
    """Load and write."""
    from unime_st.modules import build_encoder, export_encoder, load_encoder
    from unime_st.published import PUBLISHED

    if Path(given.output).exists() and Path(given.output).resolve() == Path(given.model).resolve():
        raise ValueError(f"{given.output} is the model itself. Give another folder.")
    options = {"prompt_template": given.prompt_template, "max_pixels": given.max_pixels}
    if given.model in PUBLISHED or (Path(given.model) / "modules.json").is_file():
        if named := [name for name, value in options.items() if value is not None]:
            raise ValueError(f"{given.model} is a saved encoder, which keeps its {', '.join(named)}. Leave them out.")
        model = load_encoder(given.model, device=given.device)
    else:
        model = build_encoder(given.model, device=given.device, **options)
    say(f"wrote {export_encoder(model, given.output, merge_adapters=not given.keep_adapters)}")
    return 0
