"""A certificate: what was checked of a folder, what was found, and who loads it. As data and as JSON.

Times, memory and places are not in it, so that verifying the same folder again gives the same bytes.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import quantlab
from quantlab.errors import VerificationError
from quantlab.export.engines import Engine
from quantlab.verify.agreement import Agreement
from quantlab.verify.codes import CodesReport
from quantlab.verify.size import SizeReport

__all__ = [
    "CARD",
    "CERTIFICATE",
    "FLIP_COLUMNS",
    "SPEEDS",
    "STATES",
    "Certificate",
    "Row",
    "State",
    "content_digest",
    "unread",
]

CERTIFICATE = "certificate.json"
CARD = "README.md"
FORMAT_VERSION = 1

State = Literal["agrees", "disagrees", "failed", "not run", "should load", "cannot"]


@dataclass(frozen=True)
class Row:
    """One engine and this folder."""

    engine: Engine
    state: State
    reason: str = ""
    """Why it was not run, failed or disagrees."""
    versions: Mapping[str, str] | None = None
    agreement: Agreement | None = None
    peak_bytes: int = 0
    seconds: float = 0.0
    """Of loading and running; neither this nor the memory is in the certificate."""

    @property
    def loaded(self) -> bool:
        """Whether it loaded the folder and answered."""
        return self.state in ("agrees", "disagrees")


def unread(engine: Engine) -> Row:
    """The row of an engine that was not started: what is said of it, not what was seen."""
    if engine.loads == "no":
        return Row(engine, "cannot")
    return Row(engine, "should load" if engine.loads == "elsewhere" else "not run")


@dataclass(frozen=True)
class Certificate:
    """What verifying a folder found."""

    scheme: str
    format_name: str
    content: str
    """`content_digest` of the manifest: the folder that this is a certificate of."""
    num_files: int
    codes: CodesReport
    size: SizeReport
    rows: tuple[Row, ...]
    dataset_sha256: str
    num_documents: int
    broken: str = ""
    """Why the folder could not be read or simulated at all."""

    @property
    def failures(self) -> list[str]:
        """What is wrong, in the order of the checks."""
        found = [*self.codes.failures(), *self.size.failures()]
        if self.broken:
            found.append(self.broken)
        found += [
            f"{row.engine.name} must agree with the codes: {row.reason}"
            for row in self.rows
            if row.state == "disagrees"
        ]
        if not found and not any(row.state == "agrees" for row in self.rows):
            tried = "; ".join(
                f"{row.engine.name} {row.state}: {row.reason}" for row in self.rows if row.reason
            )
            found.append(f"an engine must load the folder: none did ({tried or 'none can be started here'})")
        return found

    @property
    def verified(self) -> bool:
        """Files and codes are true, and at least one engine loaded the folder and agreed."""
        return not self.failures

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.failures:
            return f"Not verified: {self.failures[0]}."
        names = " and ".join(row.engine.name for row in self.rows if row.state == "agrees")
        return (
            f"Verified: {self.codes.num_linears} linears hold bit for bit the codes that were chosen, and {names} "
            f"loaded them and agreed."
        )

    def check(self) -> None:
        """Raise if the folder is not verified.

        Raises:
            VerificationError: names the first check that failed.
        """
        if self.failures:
            damaged = self.codes.failures() or self.size.failures() or self.broken
            advice = "Export the folder again" if damaged else f"{CERTIFICATE} has every engine's numbers"
            raise VerificationError(f"{self.failures[0]}. {advice}.")

    def body(self) -> dict[str, Any]:
        """The certificate as JSON has it."""
        return {
            "format_version": FORMAT_VERSION,
            "quantlab": quantlab.__version__,
            "verified": self.verified,
            "verdict": self.verdict,
            "failures": self.failures,
            "certifies": self.content,
            "scheme": self.scheme,
            "format": self.format_name,
            "files": self.num_files,
            "codes": asdict(self.codes),
            "size": asdict(self.size),
            "hellaswag": {"documents": self.num_documents, "dataset_sha256": self.dataset_sha256},
            "engines": [_row_body(row) for row in self.rows],
        }

    def text(self) -> str:
        """certificate.json."""
        return json.dumps(_plain(self.body()), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def facts(self) -> list[tuple[str, str]]:
        """What was checked besides engines, in words."""
        return [
            ("files", f"{self.num_files} as MANIFEST.json lists them"),
            ("codes", _codes_text(self.codes)),
            *([("stored as", _types_text(self.codes))] if self.codes.stored_as else []),
            ("zero points", _zeros_text(self.codes)),
            ("size", _size_text(self.size)),
            ("certifies", self.content),
        ]

    def flips(self) -> list[tuple[str, ...]]:
        """Answers that an engine gives otherwise, under `FLIP_COLUMNS`."""
        return [
            (
                row.engine.name,
                str(flip.document),
                flip.score,
                f"{flip.ours} / {flip.theirs}",
                f"{flip.our_margin:.4f}",
                f"{flip.their_margin:.4f}",
            )
            for row in self.rows
            for flip in (row.agreement.flips if row.agreement else ())
        ]


def content_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a certificate is of: files of a manifest but card and certificate, and tensors."""
    files = {
        name: entry["sha256"] for name, entry in manifest["files"].items() if name not in (CARD, CERTIFICATE)
    }
    body = json.dumps({"files": files, "tensors": manifest.get("tensors")}, sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def _row_body(row: Row) -> dict[str, Any]:
    body: dict[str, Any] = {
        "engine": row.engine.name,
        "state": row.state,
        "speed": row.engine.speed,
        "note": row.engine.note,
        "reason": row.reason,
        "versions": dict(row.versions or {}),
    }
    if row.agreement is not None:
        found = asdict(row.agreement)
        body["agreement"] = found | {"agrees": row.agreement.agrees}
    return body


STATES: Mapping[str, str] = {
    "agrees": "loads here and agrees",
    "disagrees": "loads here and disagrees",
    "failed": "fails here",
    "not run": "not run",
    "should load": "should load, by the format's documentation",
    "cannot": "cannot load it",
}
"""State in words."""
SPEEDS: Mapping[str, str] = {
    "faster": "faster where it has a kernel",
    "smaller": "only smaller",
    "simulated": "simulated in floats",
}
"""What low bits are good for, in words."""
FLIP_COLUMNS = ("engine", "document", "score", "ending, ours / its", "our margin", "its margin")


def _codes_text(codes: CodesReport) -> str:
    wrong = {*codes.wrong_codes, *codes.wrong_scales}
    right = f"{codes.num_linears - len(wrong)} of {codes.num_linears} linears"
    return f"{right} bit for bit as chosen, {codes.num_weights:,} weights"


def _types_text(codes: CodesReport) -> str:
    """`Q5_0 in 180 linears, Q4_K in 30`; the names are in certificate.json."""
    counts = sorted(((len(names), kind) for kind, names in codes.stored_as.items()), reverse=True)
    return ", ".join(f"{kind} in {count} linears" for count, kind in counts)


def _zeros_text(codes: CodesReport) -> str:
    if not codes.num_zeros:
        return "none stored"
    return f"{codes.num_zeros:,}, {codes.zeros_at_0:,} of them at 0 and {codes.zeros_at_max:,} at the largest code"


def _size_text(size: SizeReport) -> str:
    return f"{size.files_bytes:,} bytes of weight files; {size.bits_per_weight:.3f} bits a weight in low bits"


def _plain(value: Any) -> Any:
    """Numbers that are not finite as text, since JSON has none."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
