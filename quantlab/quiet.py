"""Libraries that talk on stderr while they are imported, silenced: people read stderr."""

import logging

__all__ = ["quiet_imports"]


def quiet_imports() -> None:
    """Only errors of loggers whose warnings are about packages that transformers imports unasked.

    torchao lists the CUDA libraries that a machine lacks, and registers enums in a way that torch calls deprecated.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
