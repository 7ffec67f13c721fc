"""The families transformers lacks are known to it from `import unime_st` on, and the import stays cheap."""

import subprocess
import sys

import pytest

CHECK = """
from transformers import AutoConfig
config = AutoConfig.for_model("phi3_v")
assert type(config).__module__ == "unime_st.models.phi3_v.configuration", type(config)
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
for auto, name in ((AutoModel, "Phi3VModel"), (AutoModelForCausalLM, "Phi3VForCausalLM"),
                   (AutoModelForImageTextToText, "Phi3VForCausalLM")):
    assert auto._model_mapping[type(config)].__name__ == name
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
assert PROCESSOR_MAPPING[type(config)].__name__ == "Phi3VProcessor"
assert "Phi3VImageProcessor" in str(IMAGE_PROCESSOR_MAPPING[type(config)])
"""


@pytest.mark.parametrize(
    "before",
    [
        "import unime_st",
        "import unime_st; import sentence_transformers",
        "import sentence_transformers; import unime_st",
        "import transformers; import unime_st",
        "from transformers import AutoConfig; import unime_st",
        "from transformers import AutoModel; import unime_st",
        "import unime_st; from transformers import AutoProcessor",
        "import unime_st; from transformers import Phi3Model",
        "import unime_st.modules",
        "from unime_st.models.phi3_v import Phi3VProcessor",
    ],
)
def test_in_any_order_of_imports(before):
    done = subprocess.run([sys.executable, "-c", before + CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_loaders_of_the_host_are_left_as_they_were():
    import transformers as module

    assert type(module.__loader__).__module__.startswith(("importlib", "_frozen_importlib"))
    assert module.__spec__.loader is module.__loader__
