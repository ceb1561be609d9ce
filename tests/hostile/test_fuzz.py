"""Thousands of small damages with a fixed seed: every one is accepted or refused in one sentence, and nothing else.

What is accepted of a safetensors header, the safetensors library must read alike: names, dtypes, shapes and bytes.
"""

import json
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save

from quantlab.config import CheckpointConfig
from quantlab.errors import CheckpointError, ConfigError
from quantlab.inspection.checkpoint import inspect_checkpoint
from quantlab.inspection.folder import open_folder
from quantlab.inspection.gguf_header import read_gguf
from quantlab.inspection.safetensors_header import read_header
from tests.hostile.bases import make_bases
from tests.hostile.case import CONFIG, INDEX

NUM_MUTATIONS = 2000

TOKENS = (
    b"0", b"-1", b"1e9", b"1e400", b"9223372036854775808", b"18446744073709551615", b"1.5", b"NaN", b"Infinity",
    b"null", b"true", b'""', b'"F32"', b'"BF16"', b'"F4"', b'"U64"', b"[", b"]", b"{", b"}", b",", b":", b'"', b" ",
    b"\\u0000", b"\xff", b"../", b"/etc/passwd", b'"auto_map"', b'"shape"', b'"data_offsets"', b"\x00",
)  # fmt: skip
NUMBERS = (0, 1, 7, 255, 2**31, 2**32 - 1, 2**53, 2**62, 2**63, 2**64 - 1)


def mutated(text: bytes, generator: np.random.Generator) -> bytes:
    """The text after one to three changes: a byte, a token over or between others, a piece gone or twice."""
    for _ in range(generator.integers(1, 4)):
        place, width = int(generator.integers(len(text) + 1)), int(generator.integers(1, 12))
        token = TOKENS[generator.integers(len(TOKENS))]
        before, after = text[:place], text[place:]
        text = (
            before + bytes([generator.integers(256)]) + after[1:],
            before + token + after,
            before + token + after[len(token) :],
            before + after[width:],
            before + after[:width] + after,
        )[generator.integers(5)]
    return text


def renumbered(text: bytes, generator: np.random.Generator) -> bytes:
    """One run of digits is another number."""
    digits = [i for i in range(len(text)) if text[i : i + 1].isdigit() and not text[i - 1 : i].isdigit()]
    start = digits[generator.integers(len(digits))]
    end = next(i for i in range(start, len(text)) if not text[i : i + 1].isdigit())
    near = int(text[start:end]) + int(generator.integers(-4, 5))
    number = (near, NUMBERS[generator.integers(len(NUMBERS))])[generator.integers(2)]
    return text[:start] + str(number).encode() + text[end:]


def survives(read: Callable[[], object]) -> object:
    """What is read, or None where it is refused in one line; any other end is the test's."""
    try:
        return read()
    except (CheckpointError, ConfigError) as error:
        assert str(error).isprintable()
        return None


def changes(text: bytes, seed: int) -> list[bytes]:
    generator = np.random.default_rng(seed)
    kinds = (mutated, renumbered)
    return [kinds[generator.integers(2)](text, generator) for _ in range(NUM_MUTATIONS)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bases(tmp_path_factory.mktemp("bases"))


def test_what_is_accepted_of_a_header_is_what_the_library_reads(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b.weight": np.arange(8, dtype=np.float16),
        "c": np.zeros((0, 4), np.int64),
        "d": np.arange(3, dtype=np.uint8),
    }
    blob = save(arrays, {"format": "pt"})
    (length,) = struct.unpack_from("<Q", blob)
    header, data = blob[8 : 8 + length], blob[8 + length :]
    path, verdicts = tmp_path / "x.safetensors", Counter[bool]()
    for number, text in enumerate(changes(header, seed=1)):
        # One in ten keeps the length that was right before.
        kept = length if number % 10 == 0 else len(text)
        path.write_bytes(struct.pack("<Q", kept) + text + data)
        ours = survives(lambda: read_header(path))
        verdicts[ours is not None] += 1
        if isinstance(ours, dict):
            whole = path.read_bytes()
            theirs = dict(safetensors.deserialize(whole))
            assert {n: (t.dtype, list(t.shape), whole[t.begin : t.end]) for n, t in ours.items()} == {
                n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in theirs.items()
            }
    # Both happen: the comparison is made, and faults are found.
    assert min(verdicts[True], verdicts[False]) > 20, verdicts


def test_a_damaged_index_is_accepted_or_refused(bases: Path) -> None:
    folder = bases / "shards"
    index = (folder / INDEX).read_bytes()
    verdicts = Counter[bool]()
    for text in changes(index, seed=2):
        (folder / INDEX).write_bytes(text)
        found = survives(lambda: open_folder(folder))
        verdicts[found is not None] += 1
        if found is not None:
            assert all(file.parent == folder for file in found.weights)  # type: ignore[attr-defined]
    (folder / INDEX).write_bytes(index)
    assert verdicts[False] > NUM_MUTATIONS / 2 and verdicts[True] > 0, verdicts


def test_a_damaged_config_is_accepted_or_refused(bases: Path) -> None:
    folder = bases / "llama"
    config = (folder / CONFIG).read_bytes()
    verdicts = Counter[bool]()
    for text in changes(config, seed=3):
        (folder / CONFIG).write_bytes(text)
        found = survives(lambda: inspect_checkpoint(CheckpointConfig(path=str(folder))))
        verdicts[found is not None] += 1
        if found is not None:
            # What no sentence refuses is JSON without a key that stands twice, and names no code.
            assert "auto_map" not in json.loads(text)
    (folder / CONFIG).write_bytes(config)
    assert verdicts[False] > NUM_MUTATIONS / 2 and verdicts[True] > 20, verdicts


def test_a_damaged_gguf_header_is_accepted_or_refused(bases: Path) -> None:
    path = bases / "gguf/toy.gguf"
    blob = path.read_bytes()
    start = min(tensor.begin for tensor in read_gguf(path).tensors.values())
    generator = np.random.default_rng(4)
    verdicts = Counter[bool]()
    for _ in range(NUM_MUTATIONS):
        header = bytearray(blob[:start])
        for _ in range(generator.integers(1, 4)):
            place = int(generator.integers(4, start - 8))
            if generator.integers(2):
                header[place] = generator.integers(256)
            else:
                header[place : place + 8] = struct.pack("<Q", NUMBERS[generator.integers(len(NUMBERS))])
        path.write_bytes(bytes(header) + blob[start:])
        found = survives(lambda: inspect_checkpoint(CheckpointConfig(path=str(path))))
        verdicts[found is not None] += 1
    path.write_bytes(blob)
    assert min(verdicts[True], verdicts[False]) > 20, verdicts
