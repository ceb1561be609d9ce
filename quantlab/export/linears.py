"""What formats of other engines ask of a model's linears, and names of those that keep their precision."""

from collections.abc import Sequence

from torch import nn

from quantlab.errors import SchemeError
from quantlab.export.formats import Format
from quantlab.export.job import ExportJob
from quantlab.layers.targets import choose_targets
from quantlab.schemes import Scheme

__all__ = ["both_names", "check_linears", "kept_linears", "separate_linears"]


def check_linears(model: nn.Module, form: Format, scheme: Scheme, skip: Sequence[str]) -> None:
    """Refuse what the format's readers would not load, before anything is computed.

    Raises:
        SchemeError: a linear that would go into low bits is another class than nn.Linear, shares its weight, which
            readers could not tie again, or has features that do not fit the format; or no linear can be chosen.
    """
    if scheme.is_baseline:
        return
    chosen = choose_targets(model, skip).chosen
    for target in chosen if form.plain_linears else ():
        if (kind := type(model.get_submodule(target.name))) is not nn.Linear:
            raise form.holds_no(kind.__name__, target.name)
    for target in chosen if form.own_weights else ():
        if target.tied_to is not None:
            raise SchemeError(
                f"format {form.name} needs a weight of its own in every linear: {target.name} shares that of "
                f'{target.tied_to}. Add both to skip: "{target.name}" and "{target.tied_to}".'
            )
    form.check_shapes(scheme, {target.name: (target.shape[0], target.shape[1]) for target in chosen})


def separate_linears(job: ExportJob) -> dict[str, nn.Linear]:
    """The job's linears by name, for formats that hold nn.Linear only (`check_linears`)."""
    linears = {}
    for name in job.linears:
        linear = job.model.get_submodule(name)
        assert type(linear) is nn.Linear, f"check_linears lets no {type(linear).__name__} through: {name}"
        linears[name] = linear
    return linears


def kept_linears(job: ExportJob) -> list[str]:
    """Names of every linear that is stored as it is: the output head, and what the user skips (`both_names`)."""
    taken = set(job.linears)
    return both_names(
        job, [name for name, m in job.model.named_modules() if isinstance(m, nn.Linear) and name not in taken]
    )


def both_names(job: ExportJob, names: Sequence[str]) -> list[str]:
    """Names in memory, and those in the files where they differ: some engines match the ones, some the others."""
    return list(dict.fromkeys(each for name in names for each in (name, job.names.module(name))))
