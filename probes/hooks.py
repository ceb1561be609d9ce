"""The only place that registers hooks: `watch` for what a module gives, `around` for when a module runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from probes.sites import QueryBlock, select

See = Callable[[str, nn.Module, tuple[Any, ...], Any], object]
"""`see(name, module, args, output)`: looks at one call of one module."""


class EarlyStop(Exception):  # noqa: N818  not an error: it ends a forward that has shown enough
    """Raised inside a forward by `watch(..., stop=True)`; `watch` itself swallows it."""


@contextmanager
def watch(
    model: nn.Module, pattern: str | Sequence[str], see: See, *, stop: bool = False
) -> Iterator[list[str]]:
    """Call `see(name, module, args, output)` after every call of every module whose name matches the pattern.

    Args:
        pattern: dotted name with `*`, e.g. `"*.attn_logits"` or `"model.layers.3.mlp"`, or several.
        see: looks at the output; must copy what it keeps. What it returns is ignored.
        stop: end the forward once every matching module has been seen (a site: all its blocks). The `with` block
            ends there too, without an exception, so that a pass that needs the first layers does not pay for the rest.

    Yields:
        the names that match.

    Raises:
        ProbeError: no module matches.
    """
    watched = select(model, pattern)
    waiting = {name for name, _ in watched}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # Returns None whatever `see` returns: a value returned here would replace the output.
            see(name, module, args, output)
            if not args or not isinstance(args[-1], QueryBlock) or args[-1].is_last:
                waiting.discard(name)
            if stop and not waiting:
                raise EarlyStop

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in watched]
    try:
        yield [name for name, _ in watched]
    except EarlyStop:
        if not stop:
            raise
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def around(module: nn.Module, before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    """Call `before()` when the module's forward begins and `after()` when it ends without an exception."""
    handles = [
        module.register_forward_pre_hook(lambda *_: before()),
        module.register_forward_hook(lambda *_: after()),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
