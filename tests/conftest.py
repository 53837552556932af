import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# pytest-xdist runs tests in parallel, and the models are too small to profit from threads
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from tiny_models import make_processor, make_qwen2_5_processor, make_qwen2_5_vl, make_qwen3_vl  # noqa: E402


torch.set_num_threads(1)
settings.register_profile("long", max_examples=5_000)


def pytest_addoption(parser):
    parser.addoption("--store_notebook", action="store_true", help="save the outputs of the example notebook")
    parser.addoption("--kills", type=int, default=1, help="number of random kills in test_resume.py")


@pytest.fixture(scope="session")
def processor():
    return make_processor()


@pytest.fixture(params=["qwen3_vl", "qwen2_5_vl"])
def family(request):
    """A model and the processor of its family."""
    if request.param == "qwen3_vl":
        return make_qwen3_vl(), make_processor()
    return make_qwen2_5_vl(), make_qwen2_5_processor()
