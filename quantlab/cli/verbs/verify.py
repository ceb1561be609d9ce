"""`quantlab verify`: a folder's certificate."""

from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli import options
from quantlab.cli.given import given, sections, words
from quantlab.cli.printing import show


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that quantize or export wrote.")],
    limit: options.Limit = None,
    hellaswag: options.HellaSwag = None,
    engines: Annotated[str | None, typer.Option(help="Engines to start [all that load here].")] = None,
    set_: options.Set = None,
    json_: options.Json = False,
) -> None:
    """Proof that a folder holds the codes that were chosen, and that real engines load it: a certificate."""
    from quantlab.progress import counted
    from quantlab.sections import build_section
    from quantlab.verify.config import VerifyConfig
    from quantlab.verify.tables import certificate_table
    from quantlab.verify.verify import verify as verify_folder

    tree = sections({"hellaswag": given(limit=limit, path=hellaswag)}) | given(engines=words(engines))
    config = build_section(VerifyConfig, tree, set_ or ())
    with counted("verifying") as advance:
        certificate = verify_folder(folder, config, advance)
    show(json_, certificate.body(), lambda: certificate_table(certificate))
    certificate.check()
