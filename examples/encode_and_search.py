"""Encode a folder of images once, and search it by a text, an image, or both together.

python examples/encode_and_search.py encoder photos --text "a red bus" --output found.html
python examples/encode_and_search.py encoder photos --image bus.jpg --text "the same, but blue" --output found.json
"""

import argparse
import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from sentence_transformers import util

from unime_st import load_encoder
from unime_st.evaluation import encode_distinct
from unime_st.images import IMAGE_FILES


def find_images(folder: Path) -> list[Path]:
    """All images below a folder that can be read; the others are named."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_FILES):
        try:
            with Image.open(path) as image:
                image.load()
            found.append(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            print(f"left out {path}: {error}")
    if not found:
        raise SystemExit(f"{folder} holds no image that can be read ({', '.join(sorted(IMAGE_FILES))}).")
    return found


def contact_sheet(query: str, found: list[dict[str, Any]]) -> str:
    """One HTML page with thumbnails inside, so that it can be sent as it is."""
    figures = []
    for entry in found:
        with Image.open(entry["image"]) as image:
            thumbnail = ImageOps.exif_transpose(image).convert("RGB")
        thumbnail.thumbnail((240, 240))
        jpeg = io.BytesIO()
        thumbnail.save(jpeg, "jpeg")
        name, data = html.escape(entry["image"]), base64.b64encode(jpeg.getvalue()).decode()
        caption = f"<figcaption>{entry['score']:.3f} {name}</figcaption>"
        figures.append(f'<figure><img src="data:image/jpeg;base64,{data}" alt="{name}">{caption}</figure>')
    style = (
        "body{font:15px sans-serif;overflow-wrap:anywhere}"
        "figure{display:inline-block;margin:8px;width:240px;max-width:calc(100% - 16px);vertical-align:top}"
    )
    title = html.escape(query)
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{viewport}<title>{title}</title><style>{style}</style>'
    )
    return f"{head}<h1>{title}</h1>\n" + "\n".join(figures) + "\n</html>\n"


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a saved encoder: a folder or a Hub name")
    parser.add_argument("folder", type=Path, help="of the images to search")
    parser.add_argument("--text", help="to search by")
    parser.add_argument("--image", type=Path, help="to search by")
    parser.add_argument("--top", type=int, default=5, help="results shown (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a contact sheet when it ends in .html, else JSON")
    parser.add_argument("--cache", type=Path, default=".embedding_cache", help="embeddings (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16)
    given = parser.parse_args(arguments)
    if not given.text and not given.image:
        parser.error("nothing to search by: give --text, --image or both")
    if given.image and not given.image.is_file():
        parser.error(f"there is no image {given.image}")

    # 1. The images: a second run finds them in the cache, known by the model's weights and the image's content.
    model = load_encoder(given.model)
    paths = find_images(given.folder)
    items = [{"image": str(path)} for path in paths]
    embeddings = encode_distinct(
        model, items, cache=given.cache, batch_size=given.batch_size, show_progress_bar=True
    )  # (images, D)

    # 2. The query: a text, an image or both. The model chooses its instruction by what is there.
    query = {key: str(value) for key, value in (("image", given.image), ("text", given.text)) if value}
    query_embedding = model.encode([query])  # (1, D)

    # 3. Embeddings are normalised, so the cosine ranks; `semantic_search` does it in chunks.
    hits = util.semantic_search(query_embedding, embeddings, top_k=given.top)[0]
    found = [{"image": str(paths[hit["corpus_id"]]), "score": round(hit["score"], 6)} for hit in hits]
    for place, entry in enumerate(found, start=1):
        print(f"{place:>3}  {entry['score']:.3f}  {entry['image']}")

    if given.output:
        sheet = given.output.suffix == ".html"
        content = {"query": query, "results": found}
        page = contact_sheet(" + ".join(query.values()), found) if sheet else json.dumps(content, indent=1) + "\n"
        given.output.write_text(page, encoding="utf-8")
        print(f"wrote {given.output}")
    return found


if __name__ == "__main__":
    main()
