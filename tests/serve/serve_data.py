"""Pictures, texts and files that tests of the server send, and how its errors are read."""

import base64
from io import BytesIO

import numpy as np
from PIL import Image

TOKEN = "a-token-that-nobody-guesses"
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    '"><script>document.title="owned"</script>',
    "../../../../etc/passwd",
    "{{7*7}} ${7*7} %00 %2e%2e/",
    "javascript:alert(1)",
    "a text in two\nlines \u202e turned",
]


def drawing(number, size=(40, 30)):
    """A picture unlike those of other numbers."""
    blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def file_of(image, kind="PNG"):
    """The bytes of an image's file."""
    written = BytesIO()
    image.save(written, kind)
    return written.getvalue()


def uri(content, kind="image/png"):
    """A data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def message_of(answer, status):
    """What an error says, if it is one of that status."""
    assert answer.status_code == status, (answer.status_code, answer.text[:500])
    return answer.json()["error"]["message"]
