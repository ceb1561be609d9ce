"""Settings of every test: one thread, no network, and toy checkpoints that are made once."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from tests.toys import save_checkpoint

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of toy size in a Hugging Face folder, tokenizer included. Read only: copy it to change it."""
    return save_checkpoint("llama", tmp_path_factory.mktemp("toy") / "toy-llama")
