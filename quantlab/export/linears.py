"""What formats of other engines ask of a model's linears, and names of those that keep their precision."""

from torch import nn

from quantlab.errors import SchemeError
from quantlab.export.job import ExportJob

__all__ = ["kept_linears", "separate_linears"]


def separate_linears(job: ExportJob, format_name: str) -> dict[str, nn.Linear]:
    """The job's linears by name, each nn.Linear itself and with a weight of its own.

    Raises:
        SchemeError: one of them is another class, which the format's readers do not load, or shares its weight, which
            they could not tie again.
    """
    linears: dict[str, nn.Linear] = {}
    owners: dict[int, str] = {}
    for name in job.linears:
        linear = job.model.get_submodule(name)
        if type(linear) is not nn.Linear:
            raise SchemeError(
                f"format {format_name} holds nn.Linear only: {name} is a {type(linear).__name__}, which its readers do "
                f"not load. Quantize another architecture, or only evaluate this one."
            )
        owner = owners.setdefault(id(linear.weight), name)
        if owner != name:
            raise SchemeError(
                f"format {format_name} needs a weight of its own in every linear: {name} shares that of {owner}. "
                f'Add both to skip: "{name}" and "{owner}".'
            )
        linears[name] = linear
    return linears


def kept_linears(job: ExportJob) -> list[str]:
    """Names of every linear that is stored as it is: the output head, and what the user skips."""
    taken = set(job.linears)
    return [name for name, m in job.model.named_modules() if isinstance(m, nn.Linear) and name not in taken]
