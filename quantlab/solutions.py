"""Solutions: codes that took long to find, on disk, so that no cell of a sweep finds them twice.

A solution is of weights alone: w4g64-gptq and w4g64a8-gptq share it. Its folder is named by the hash of all that made
it and holds one safetensors file a decoder layer: `NAME.codes` packed densely (`quantlab.numerics.packing`),
`NAME.scale` float32 and `NAME.zero_point` int32, with grid, shape and note of each linear as JSON in the metadata.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantlab.export.atomic import new_folder
from quantlab.locks import locked
from quantlab.manifest import MANIFEST
from quantlab.methods.solved import Solved
from quantlab.numerics.affine import QuantizedTensor
from quantlab.numerics.packing import pack, unpack
from quantlab.numerics.qtype import QType
from quantlab.records import fingerprint
from quantlab.schemes import Scheme

__all__ = ["SolutionStore", "weights_alone"]

Put = Callable[[str, Sequence[Solved | None]], None]
"""Takes a linear's name and its codes under each scheme."""


def weights_alone(scheme: Scheme) -> Scheme:
    """The part of a scheme that its codes of weights depend on."""
    transforms = tuple(name for name in scheme.transforms if name != "bias")
    return Scheme(scheme.weights, method=scheme.method, transforms=transforms, mixed=scheme.mixed)


@dataclass(frozen=True)
class SolutionStore:
    """Solutions of one checkpoint under one calibration."""

    folder: Path
    """Holds a folder for each solution."""
    made_by: Mapping[str, Any]
    """All that codes depend on but the scheme: checkpoint, calibration, settings, sources."""
    schemes: tuple[Scheme, ...] = ()
    """Schemes of the run, which are worth solving together."""

    def path(self, scheme: Scheme) -> Path:
        """The folder of a scheme's solution."""
        key = fingerprint({"scheme": weights_alone(scheme).name, "made_by": self.made_by})
        return self.folder / f"{weights_alone(scheme).name}-{key[:16]}"

    @contextmanager
    def claimed(self, scheme: Scheme) -> Iterator[None]:
        """Be the only one that solves this scheme and those that are solved with it.

        Raises:
            OutputError: the folder cannot be written.
        """
        own = weights_alone(scheme)
        kin = {
            "method": own.method,
            "transforms": own.transforms,
            "mixed": own.mixed,
            "made_by": self.made_by,
        }
        with locked(self.folder / ".claims" / fingerprint(kin)):
            yield

    def load(self, scheme: Scheme) -> dict[str, Solved] | None:
        """The codes of every linear, or None where they are not there or not what was written."""
        folder = self.path(scheme)
        try:
            listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
            files = [_checked(folder / name, entry["sha256"]) for name, entry in sorted(listed.items())]
            return {name: solved for file in files for name, solved in _read(file)}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def together(self, scheme: Scheme) -> list[Scheme]:
        """The scheme's weights, and those of the run's others of its method and transforms that are not there yet."""
        own = weights_alone(scheme)
        kin = (weights_alone(each) for each in self.schemes)
        same = (
            each
            for each in kin
            if (each.method, each.transforms, each.mixed) == (own.method, own.transforms, own.mixed)
        )
        missing = (each for each in same if not (self.path(each) / MANIFEST).exists())
        return list(dict.fromkeys([own, *missing]))

    @contextmanager
    def writing(self, schemes: Sequence[Scheme]) -> Iterator[Put]:
        """Take the codes of one linear after another; the folders appear, whole, when the block ends well.

        Raises:
            OutputError: they cannot be written.
        """
        with ExitStack() as stack:
            folders = [stack.enter_context(new_folder(self.path(each), overwrite=True)) for each in schemes]
            layer: list[tuple[str, Sequence[Solved | None]]] = []

            def flush() -> None:
                for position, folder in enumerate(folders):
                    _write(folder, [(name, solved[position]) for name, solved in layer])
                layer.clear()

            def put(name: str, solved: Sequence[Solved | None]) -> None:
                if layer and _layer_of(layer[0][0]) != _layer_of(name):
                    flush()
                layer.append((name, solved))

            yield put
            flush()


def _checked(file: Path, sha256: str) -> Path:
    """The file, once its content is known to be what was written.

    Raises:
        OSError, ValueError: it is missing, or is not.
    """
    with file.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != sha256:
            raise ValueError(f"{file} is not what was written")
    return file


def _layer_of(name: str) -> str:
    """What one file holds: everything up to the first number of a linear's name."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found.group() if found else name


def _write(folder: Path, linears: Sequence[tuple[str, Solved | None]]) -> None:
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name, solved in linears:
        if solved is None:
            continue
        quantized = solved.quantized
        assert isinstance(quantized, QuantizedTensor), "formats by name are quick and not kept"
        tensors[f"{name}.codes"] = pack(quantized.codes, quantized.qtype.bits)
        tensors[f"{name}.scale"] = quantized.scale.contiguous()
        if quantized.zero_point is not None:
            tensors[f"{name}.zero_point"] = quantized.zero_point.contiguous()
        facts[name] = {
            "qtype": asdict(quantized.qtype),
            "shape": list(quantized.codes.shape),
            "note": solved.note,
        }
    if tensors:
        file = folder / f"{_layer_of(linears[0][0])}.safetensors"
        save_file(tensors, file, metadata={"linears": json.dumps(facts)})


def _read(file: Path) -> Iterator[tuple[str, Solved]]:
    with safe_open(file, framework="pt") as opened:
        facts = json.loads((opened.metadata() or {})["linears"])
        for name, fact in facts.items():
            qtype = QType(**fact["qtype"])
            codes = unpack(opened.get_tensor(f"{name}.codes"), qtype.bits, tuple(fact["shape"]), qtype.dtype)
            zero_point = None if qtype.symmetric else opened.get_tensor(f"{name}.zero_point")
            scale = opened.get_tensor(f"{name}.scale")
            yield name, Solved(QuantizedTensor(codes, scale, zero_point, qtype), fact["note"])
