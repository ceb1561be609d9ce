"""Names of tensors and modules in a checkpoint's files, and in the model that transformers makes of them.

transformers renames while it loads: Gemma 3 stores `language_model.model.layers.0` and holds
`model.language_model.layers.0`, and a checkpoint of a base model lacks the name that the base model has in the causal
one. Nothing is listed here: both ways are asked of transformers' own table of conversions, which a loaded model carries
(`_weight_conversions`), and of the names that the headers of a folder hold.

`StoredNames.of_model` answers for a model that is to be written, `StoredNames.of_files` for files that are to be read.
Whatever stands beside tensors and speaks of them (quantization_config, scales of a cache, digests of a MANIFEST) uses
the stored names; records, `--skip` and messages use the loaded ones.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from quantlab.errors import CheckpointError

__all__ = ["StoredNames"]


@dataclass(frozen=True)
class StoredNames:
    """One model's tensors: name in memory -> name in files."""

    tensors: Mapping[str, str]

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> "StoredNames":
        """Where the tensors of a model in memory are written.

        Raises:
            CheckpointError: an architecture whose tensors are merged or split while they load.
        """
        conversions = getattr(model, "_weight_conversions", None) or ()
        if any(_changes_tensors(conversion) for conversion in conversions):
            raise CheckpointError(
                f"export needs an architecture whose tensors are stored as the model holds them: "
                f"{type(model).__name__} merges or splits them while loading. Evaluate it instead."
            )
        names = list(model.state_dict())
        markers = {name: torch.tensor(position) for position, name in enumerate(names)}
        stored = {int(marker): name for name, marker in revert_weight_conversion(model, markers).items()}
        return cls({name: stored[position] for position, name in enumerate(names)})

    @classmethod
    def of_files(cls, model: PreTrainedModel, stored: Iterable[str]) -> "StoredNames":
        """Where transformers puts the tensors of files.

        Args:
            model: the architecture, with or without memory for its weights.
            stored: names of tensors in the files; those that a format has in place of `weight` go by that name.
        """
        held = model.state_dict()
        conversions = get_model_conversion_mapping(model)
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        found: dict[str, str] = {}
        for name in stored:
            renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, held)
            if renamed not in held:
                plain, _ = rename_source_key(name, [], [], model.base_model_prefix, held)
                renamed = plain if plain in held else renamed
            found[renamed] = name
        return cls(found)

    def module(self, name: str) -> str:
        """The stored name of a module, by its name in memory; itself where nothing of it is stored."""
        return self._modules.get(name, name)

    def loaded(self, name: str) -> str:
        """The name in memory of a module, by its stored name."""
        return self._loaded.get(name, name)

    @cached_property
    def _modules(self) -> dict[str, str]:
        """Every module that holds a tensor, and all above it that end alike: names in memory -> in files."""
        found: dict[str, str] = {}
        for name, stored in self.tensors.items():
            ours, theirs = name.split("."), stored.split(".")
            while len(ours) > 1 and len(theirs) > 1 and ours[-1] == theirs[-1]:
                ours, theirs = ours[:-1], theirs[:-1]
                found.setdefault(".".join(ours), ".".join(theirs))
        return found

    @cached_property
    def _loaded(self) -> dict[str, str]:
        return {stored: name for name, stored in self._modules.items()}


def _changes_tensors(conversion: object) -> bool:
    """Whether a conversion that transformers made while loading has to be undone on values, and not on names only."""
    operations = conversion.operations if isinstance(conversion, WeightConverter) else ()
    # Dequantizing has no way back but to leave the floats as they are, which is what is wanted here.
    return any(type(operation.reverse_op).__name__ != "_IdentityOp" for operation in operations)
