"""`quantlab bench`: how fast and how large a folder is beside its parent."""

from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli import options
from quantlab.cli.given import given, words
from quantlab.cli.printing import show


def bench(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of low-bit weights, or a .gguf file.")
    ],
    parent: Annotated[
        Path | None, typer.Option(help="The 16-bit checkpoint beside it [what recipe.json names].")
    ] = None,
    engines: Annotated[
        str | None, typer.Option(help="quantlab,transformers,llama_cpp or some of them.")
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of the prompt.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens that follow, one at a time.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Processes of each side, in turn.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of every engine.")] = None,
    set_: options.Set = None,
    json_: options.Json = False,
) -> None:
    """Speed and memory of a folder beside its 16-bit parent, on this machine."""
    from quantlab.bench.bench import bench as bench_folder
    from quantlab.bench.config import BenchConfig
    from quantlab.bench.tables import bench_table
    from quantlab.progress import counted
    from quantlab.sections import build_section

    tree = given(
        parent=parent,
        engines=words(engines),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        threads=threads,
    )
    with counted("measuring") as advance:
        result = bench_folder(folder, build_section(BenchConfig, tree, set_ or ()), advance)
    show(json_, result.summary(), lambda: bench_table(result))
