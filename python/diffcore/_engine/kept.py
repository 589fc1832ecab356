"""Values that are made once and kept, such as tables and their copies on a device.

What is kept must be a plain tensor, whoever asks for it first. So it is made outside of modes and
transforms: made inside, it would be a fake, batched or inference tensor, useless to later calls.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")
Call = TypeVar("Call", bound=Callable[..., Any])

_names: dict[Hashable, str] = {}


@contextmanager
def plain_eager_mode() -> Iterator[None]:
    """A region without modes, transforms, inference mode and default device."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch.utils._python_dispatch import _disable_current_modes

    with ExitStack() as stack:
        stack.enter_context(torch._C.DisableTorchFunction())  # the default device is one
        stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        yield


def made_plainly(make: Callable[[], Made]) -> Made:
    """What ``make`` returns, made as in a plain eager call.

    Under Dynamo, where a value is traced instead of made, it is what the trace makes of it.
    """
    if torch.compiler.is_dynamo_compiling():
        return make()
    with plain_eager_mode():
        return make()


def constant_in_traces(function: Call) -> Call:
    """Marks a function for Dynamo, which calls it while tracing and takes the result as constant.

    The mark that ``torch.compiler.assume_constant_result`` sets; that loads Dynamo, which takes
    longer than torch itself.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Traced:
    """Values that a compiled function reads, each an attribute whose name stands for its key.

    Dynamo reads a dict once per trace, and guards on what is not in it: a dict that the trace fills
    would be compiled for twice. An attribute is read when it is there. So a function that is called
    while tracing (``constant_in_traces``) makes the value, keeps it here and
    returns the name.
    """

    def name(self, key: Hashable, make: Callable[[], Any]) -> str:
        """Makes the value of this key, if it is not here yet, and returns its name.

        A name stands for one key in all objects, so that a guard tells their values apart.
        """
        name = _names.setdefault(key, f"value_{len(_names)}")
        if not hasattr(self, name):
            setattr(self, name, make())
        return name

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies nothing: the values are made again."""
        return Traced, ()


# A few objects in use at once, not one for every combination of arguments ever used.
_MOST_KEPT = 64


class KeepsByArguments:
    """Base of a class with methods whose results are made once for their arguments and kept.

    ``self._kept("_method", *args)`` is ``self._method(*args)``. The arguments are hashable, and
    constants in a trace. A subclass calls ``super().__init__()``.
    """

    def __init__(self) -> None:
        self._built: dict[Hashable, Any] = {}
        self._traced = Traced()

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies nothing of it: a key may be a function that cannot be pickled."""
        return {**self.__dict__, "_built": {}}

    def _kept(self, make: str, *args: Any) -> Any:
        """What the method ``make`` returns for these arguments, made once."""
        if torch.compiler.is_dynamo_compiling():
            return getattr(self._traced, self._name(make, *args))
        key = (make, args)
        found = self._built.get(key)
        if found is None:
            if len(self._built) >= _MOST_KEPT:
                self._built.clear()
            found = self._built[key] = made_plainly(lambda: getattr(self, make)(*args))
        return found

    @constant_in_traces
    def _name(self, make: str, *args: Any) -> str:
        return self._traced.name((make, args), lambda: self._kept(make, *args))


class FixedSettings(KeepsByArguments):
    """The same for a class whose public attributes are set once, for the results come of them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name in self.__dict__:
            kind = type(self).__name__
            raise AttributeError(f"{name} of this {kind} cannot be changed; make another {kind}")
        super().__setattr__(name, value)
