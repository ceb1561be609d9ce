"""Options that several verbs take: their types with help. An option of one verb stands in the verb's file.

An option that is not given is None, and the configuration's default holds (`given.py`).
"""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub id (Hugging Face), or .gguf file.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.")]
Training = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A training as one file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any other field of the configuration."),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for records and report [runs/NAME].")]
NewFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]
Overwrite = Annotated[
    bool | None, typer.Option("--overwrite", help="Replace the folder once the new one is complete.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or auto.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
TrustRemoteCode = Annotated[
    bool | None, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of every draw.")]
Text = Annotated[Path | None, typer.Option(help="UTF-8 text file [WikiText-2 raw test].")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens in a block of text.")]
NumSequences = Annotated[int | None, typer.Option(help="Blocks of text.")]
TextFormat = Annotated[str | None, typer.Option(help="rows (joined by blank lines), or file (as it is).")]
Sampling = Annotated[str | None, typer.Option(help="draw (seeded), or first.")]
HellaSwag = Annotated[Path | None, typer.Option(help="HellaSwag file [the validation split].")]
Limit = Annotated[int | None, typer.Option(help="The first N documents of one fixed permutation.")]
BatchSize = Annotated[str | None, typer.Option(metavar="N|auto", help="Documents in one forward pass.")]
Workers = Annotated[int | None, typer.Option(help="Processes, each with a model of its own.")]
Hessian = Annotated[
    str | None,
    typer.Option(help="Calibration: shared by all schemes, or sequential, each layer on quantized inputs."),
]
Skip = Annotated[list[str] | None, typer.Option(help="Pattern of linears that stay at 16 bits.")]
Format = Annotated[str | None, typer.Option("--format", help="`quantlab list formats`.")]
MaxShardSize = Annotated[int | None, typer.Option(help="Bytes of a weight file at most.")]
