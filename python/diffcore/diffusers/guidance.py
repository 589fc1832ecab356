"""Classifier-free guidance within the step, in pipelines that combine the predictions themselves.

A pipeline writes ``m = m_u + w (m_c - m_u)`` in torch and gives m to the scheduler. A hook on its
network wraps what the network returns in a tensor that knows of this formula: the difference, the
product and the sum are then noted and not computed, and a fused step reads m_c, m_u and w instead
of m. Whatever else is done with such a tensor is done with its value, by the operators that the
pipeline would have called.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffcore._engine import native
from diffcore.guidance import Guidance

Rule = Callable[[Tensor, Tensor], Tensor]
"""m from m_c and m_u, as diffusers computes it."""

_DENOISERS = ("unet", "transformer")
_plainly = torch._C.DisableTorchFunctionSubclass


class _Call:
    """One call of a network: what is noted of its predictions.

    Attributes:
        seen: Whether something beside the formula has got hold of a prediction, and may write to
            it. From then on nothing is put off.
        open: The combinations that are not computed yet.
    """

    __slots__ = ("open", "seen")

    def __init__(self) -> None:
        self.seen = False
        self.open: list[weakref.ref[Combination]] = []


class Prediction(Tensor):
    """What a network has returned, or a part of it: an alias of the tensor."""

    _value: Tensor
    _call: _Call

    @classmethod
    def of(cls, value: Tensor, call: _Call) -> Prediction:
        """A tensor as a prediction.

        Args:
            value: The tensor.
            call: The call that it comes from.

        Returns:
            The prediction, which shares its memory.
        """
        found: Prediction = value.as_subclass(cls)
        found._value, found._call = value, call
        return found

    def shown(self) -> Tensor:
        """The tensor itself, for whatever may write to it or keep a view of it."""
        call = self._call
        call.seen = True
        for reference in call.open:
            combination = reference()
            if combination is not None:
                combination.computed()
        call.open.clear()
        return self._value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See ``_called``."""
        return _called(func, args, kwargs or {})


class Combination(Tensor):
    """``w (m_c - m_u)``, that added to m_u or to m_c, or a rule: computed when it is looked at.

    It has no memory. Its parts are those of a pipeline, in the order of the pipeline, so that its
    value has the bits that the pipeline would have.
    """

    _parts: tuple[Prediction, Prediction]
    _scale: float | None
    _added: Prediction | None
    _rule: tuple[Guidance | None, Rule] | None
    _value: Tensor | None

    @classmethod
    def of(
        cls,
        parts: tuple[Prediction, Prediction],
        scale: float | None = None,
        base: Prediction | None = None,
        rule: tuple[Guidance | None, Rule] | None = None,
    ) -> Combination:
        """A combination of two predictions.

        Args:
            parts: m_c and m_u.
            scale: w, ``None`` for the difference itself.
            base: What is added, one of the parts.
            rule: Instead of both: ours, ``None`` if there is none, and the function that it
                replaces.

        Returns:
            The combination.
        """
        like = parts[0]._value
        found: Combination = Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=like.device
        )
        found._parts, found._scale, found._added, found._rule = parts, scale, base, rule
        found._value = None
        for call in {parts[0]._call, parts[1]._call}:
            call.open.append(weakref.ref(found))
        return found

    def computed(self) -> Tensor:
        """The value, by torch's operators in the order of the pipeline."""
        if self._value is None:
            cond, uncond = [part._value for part in self._parts]
            if self._rule is not None:
                self._value = self._rule[1](cond, uncond)
                return self._value
            value = cond - uncond
            if self._scale is not None:
                value = self._scale * value
            self._value = value if self._added is None else self._added._value + value
        return self._value

    @property
    def noted(self) -> bool:
        """Whether it is not computed; its value may have been written to since."""
        return self._value is None

    @property
    def formula(self) -> bool:
        """Whether it is, element by element, still a part of the formula."""
        return self.noted and self._rule is None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See ``_called``."""
        return _called(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Operators that did not come by ``__torch_function__`` get the value too."""
        return func(*_values(args), **_values(kwargs or {}))


def predicted(output: Tensor) -> Tensor:
    """What a network has returned, as a prediction.

    Args:
        output: The tensor.

    Returns:
        A prediction; the tensor itself where a gradient is recorded or a transform of functorch
        is under way, of which a combination that is computed later would know nothing.
    """
    tracked = (output.requires_grad and torch.is_grad_enabled()) or native.transforms() is not None
    if type(output) is not Tensor or tracked or not output.is_floating_point():
        return output
    return Prediction.of(output, _Call())


def taken_apart(model_output: Any, *, apart: bool = True) -> tuple[Any, dict[str, Any]]:
    """What a step reads instead of a model output.

    Args:
        model_output: What ``step`` was given.
        apart: Whether the step can combine predictions itself.

    Returns:
        The output as a plain tensor and nothing, or m_c, and m_u and w or a rule under the names
        that ``SolverTable.step`` has for them.
    """
    if not isinstance(model_output, (Prediction, Combination)):
        return model_output, {}
    if isinstance(model_output, Prediction):
        return model_output._value, {}
    whole, base = model_output, model_output._added
    rule = None if whole._rule is None else whole._rule[0]
    if not apart or not whole.noted or (base is None and rule is None):
        return whole.computed(), {}
    cond, uncond = whole._parts
    given: dict[str, Any] = {"model_output_uncond": uncond._value}
    if rule is not None:
        given["guidance"] = rule
    else:
        scale = 1.0 if whole._scale is None else whole._scale
        # m_c + w (m_c - m_u) is m_u + (1 + w) (m_c - m_u).
        given["guidance_scale"] = scale if base is uncond else 1 + scale
    return cond._value, given


def paired(cond: Any, uncond: Any) -> tuple[Prediction, Prediction] | None:
    """Two predictions that may be combined without being computed.

    Args:
        cond: Any tensor.
        uncond: Any tensor.

    Returns:
        Both; ``None`` unless they are predictions that nothing else has got hold of, and alike.
    """
    if not isinstance(cond, Prediction) or not isinstance(uncond, Prediction):
        return None
    if cond._call.seen or uncond._call.seen:
        return None
    a, b = cond._value, uncond._value
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return (cond, uncond) if alike else None


def watch(pipe: Any) -> None:
    """Let the networks of a pipeline return predictions.

    Args:
        pipe: A pipeline of diffusers whose networks return tensors.

    Raises:
        TypeError: It has neither a U-Net nor a transformer.
    """
    networks = _networks(pipe)
    if not networks:
        raise TypeError(
            "target must be a pipeline with a unet or a transformer for guidance=True, got "
            f"{type(pipe).__name__}"
        )
    for network in networks:
        network.register_forward_hook(_returning_predictions)


def unwatch(pipe: Any) -> None:
    """Let the networks of a pipeline return plain tensors again.

    Args:
        pipe: A pipeline of diffusers, or anything else, which has none.
    """
    for network in _networks(pipe):
        # By the function and not by a handle: a copy of the network has its hook, too.
        for key, hook in list(network._forward_hooks.items()):
            if hook is _returning_predictions:
                del network._forward_hooks[key]


def _networks(pipe: Any) -> list[nn.Module]:
    components = getattr(pipe, "components", None)
    named = components.items() if isinstance(components, dict) else ()
    return [x for name, x in named if name.startswith(_DENOISERS) and isinstance(x, nn.Module)]


def _returning_predictions(network: nn.Module, given: Any, output: Any) -> Any:  # noqa: ARG001
    """The forward hook: the first tensor of what a network returns becomes a prediction."""
    if torch.compiler.is_compiling():
        return output  # within a graph the compiler fuses the formula itself
    if isinstance(output, Tensor):
        return predicted(output)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return (predicted(output[0]), *output[1:])
    if isinstance(getattr(output, "sample", None), Tensor):
        output.sample = predicted(output.sample)
    return output


# A graph that got one would be guarded by what it has noted.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _called(func: Any, args: Any, kwargs: Any) -> Any:
    """A function of torch that got a prediction or a combination."""
    rule = _RULES.get(func)
    if rule is not None and not kwargs and len(args) == 2:
        found = rule(*args)
        if found is not None:
            return found
    if func in _SHAPES or func in _CASTS:
        first, *rest = args
        if isinstance(first, Prediction):
            return _parts_of(func(first._value, *_values(rest), **_values(kwargs)), first._call)
        if isinstance(first, Combination) and first.formula and func in _SHAPES:
            return _reshaped(first, lambda x: func(x, *_values(rest), **_values(kwargs)))
    if func in _PROPERTIES:
        with _plainly():
            return func(*args, **kwargs)
    return func(*_values(args), **_values(kwargs))


def _values(given: Any) -> Any:
    """The same with plain tensors, in lists, tuples and dictionaries too."""
    if isinstance(given, Prediction):
        return given.shown()
    if isinstance(given, Combination):
        return given.computed()
    if type(given) in (list, tuple):
        return type(given)([_values(x) for x in given])
    if type(given) is dict:
        return {name: _values(x) for name, x in given.items()}
    return given


def _difference(cond: Any, uncond: Any) -> Combination | None:
    parts = paired(cond, uncond)
    return None if parts is None else Combination.of(parts)


def _product(a: Any, b: Any) -> Combination | None:
    difference, scale = (a, b) if isinstance(a, Combination) else (b, a)
    if not isinstance(difference, Combination) or type(scale) not in (float, int):
        return None
    plain = difference.formula and difference._scale is None and difference._added is None
    return Combination.of(difference._parts, scale) if plain else None


def _sum(a: Any, b: Any) -> Combination | None:
    scaled, base = (a, b) if isinstance(a, Combination) else (b, a)
    if not isinstance(scaled, Combination) or not isinstance(base, Prediction):
        return None
    if scaled._added is not None or not scaled.formula:
        return None
    for part in scaled._parts:
        if part._value is base._value:
            return Combination.of(scaled._parts, scaled._scale, part)
    return None


def _parts_of(found: Any, call: _Call) -> Any:
    """Views and copies of a prediction, as predictions of the same call."""
    if isinstance(found, (tuple, list)):
        return type(found)([_parts_of(x, call) for x in found])
    return Prediction.of(found, call)


def _reshaped(whole: Combination, shape: Callable[[Tensor], Any]) -> Any:
    """Parts of a combination, as combinations of the parts."""
    cond, uncond = (_parts_of(shape(part._value), part._call) for part in whole._parts)
    of_cond = whole._added is whole._parts[0]

    def combined(cond: Prediction, uncond: Prediction) -> Combination:
        base = None if whole._added is None else (cond if of_cond else uncond)
        return Combination.of((cond, uncond), whole._scale, base)

    if isinstance(cond, Prediction):
        return combined(cond, uncond)
    return type(cond)([combined(c, u) for c, u in zip(cond, uncond, strict=True)])


_RULES: dict[Any, Callable[[Any, Any], Combination | None]] = {
    Tensor.sub: _difference,
    torch.sub: _difference,
    Tensor.mul: _product,
    torch.mul: _product,
    Tensor.add: _sum,
    torch.add: _sum,
}
# What commutes with the formula, element by element.
_SHAPES = {
    *(Tensor.chunk, torch.chunk, Tensor.split, torch.split, Tensor.__getitem__, Tensor.narrow),
    *(Tensor.reshape, Tensor.permute, Tensor.transpose, Tensor.flatten),
    *(Tensor.unflatten, Tensor.squeeze, Tensor.unsqueeze),
}
# What does not, for it rounds; of a prediction it is a prediction.
_CASTS = {Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.view, Tensor.contiguous}
_PROPERTIES = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__),
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_cuda", "layout")),
}
