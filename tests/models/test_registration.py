"""The families transformers lacks are known to it from `import unime_st` on, in whatever order."""

import subprocess
import sys

import pytest

CHECK = """
import sys, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
config = AutoConfig.for_model("phi3_v")
assert type(config).__module__ == "unime_st.models.phi3_v.configuration", type(config)
assert AutoModel._model_mapping[type(config)].__name__ == "Phi3VModel"
for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
    assert auto._model_mapping[type(config)].__name__ == "Phi3VForCausalLM"
assert PROCESSOR_MAPPING[type(config)].__name__ == "Phi3VProcessor"
assert {kind.__name__ for kind in IMAGE_PROCESSOR_MAPPING[type(config)].values()} == {"Phi3VImageProcessor"}
assert "unime_st" not in type(transformers.__spec__.loader).__module__
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("unime_st")]
"""


@pytest.mark.parametrize(
    "before",
    [
        "import unime_st; from transformers import CLIPVisionConfig",
        "from transformers import AutoModel; import unime_st",
        "import unime_st; import sentence_transformers",
        "from unime_st.models.phi3_v import Phi3VProcessor",
    ],
)
def test_in_any_order_of_imports(before):
    done = subprocess.run([sys.executable, "-c", before + CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_imported_before_it_is_asked_for():
    code = "import sys, unime_st.models; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
