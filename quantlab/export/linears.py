"""What formats of other engines ask of a model's linears, and names of those that keep their precision."""

from torch import nn

from quantlab.errors import SchemeError
from quantlab.export.job import ExportJob

__all__ = ["check_own_weights", "kept_linears", "separate_linears"]


def separate_linears(
    job: ExportJob, format_name: str, *, inputs: int = 1, outputs: int = 1
) -> dict[str, nn.Linear]:
    """The job's linears by name, each nn.Linear itself and with a weight of its own.

    Args:
        inputs, outputs: what in_features and out_features must be multiples of.

    Raises:
        SchemeError: one of them is another class, which the format's readers do not load, shares its weight, which
            they could not tie again, or has another number of features.
    """
    check_own_weights(job, format_name)
    linears = {name: _plain(job, name, format_name) for name in job.linears}
    for name, linear in linears.items():
        if linear.in_features % inputs or linear.out_features % outputs:
            raise SchemeError(
                f"format {format_name} needs in_features in multiples of {inputs} and out_features in multiples of "
                f"{outputs}: {name} has in_features={linear.in_features} and out_features={linear.out_features}. "
                f'Add "*.{name.rpartition(".")[2]}" to skip, or use --format quantlab.'
            )
    return linears


def check_own_weights(job: ExportJob, format_name: str) -> None:
    """Refuse linears that share a weight.

    Raises:
        SchemeError: names the first two.
    """
    owners: dict[int, str] = {}
    for name in job.linears:
        owner = owners.setdefault(id(job.model.get_submodule(name).weight), name)
        if owner != name:
            raise SchemeError(
                f"format {format_name} needs a weight of its own in every linear: {name} shares that of {owner}. "
                f'Add both to skip: "{name}" and "{owner}".'
            )


def _plain(job: ExportJob, name: str, format_name: str) -> nn.Linear:
    linear = job.model.get_submodule(name)
    if type(linear) is not nn.Linear:
        raise SchemeError(
            f"format {format_name} holds nn.Linear only: {name} is a {type(linear).__name__}, which its readers do "
            f"not load. Quantize another architecture, or only evaluate this one."
        )
    return linear


def kept_linears(job: ExportJob) -> list[str]:
    """Names of every linear that is stored as it is: the output head, and what the user skips."""
    taken = set(job.linears)
    return [name for name, m in job.model.named_modules() if isinstance(m, nn.Linear) and name not in taken]
