"""Settings of every test: one thread, no network, and toy checkpoints that are made once.

QUANTLAB_TEST_THREADS gives torch more threads; QUANTLAB_TEST_MKLDNN=0 takes oneDNN from it (`make test-cpus`).
"""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from quantlab.quiet import quiet_imports

# Else what torchao says in a worker stands below pytest's last line.
quiet_imports()

import pytest
import torch

from tests.toys import save_checkpoint

torch.set_num_threads(int(os.environ.get("QUANTLAB_TEST_THREADS", "1")))
if os.environ.get("QUANTLAB_TEST_MKLDNN") == "0":
    torch.backends.mkldnn.set_flags(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An hour for what takes minutes on real weights; every other test has the limit of pyproject.toml."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of toy size in a Hugging Face folder, tokenizer included. Read only: copy it to change it."""
    return save_checkpoint("llama", tmp_path_factory.mktemp("toy") / "toy-llama")
