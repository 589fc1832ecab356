"""A scheduler of diffusers whose ``step`` is one launch: what all families share."""

from __future__ import annotations

import functools
import inspect
from collections import Counter, namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffcore import ops
from diffcore.diffusers.guidance import taken_apart
from diffcore.diffusers.rows import keeping_x0
from diffcore.diffusers.walk import Unsupported, Walk
from diffcore.noise import Noise, PhiloxNoise
from diffcore.solvers import SolverTable
from diffcore.solvers.table import Row

RULES = ("diffusers", "exact")
COEFFICIENTS = ("float64", "diffusers")
NOISES = ("generator", "philox")
_MOST_TABLES = 8
_FLOAT32_BYTES = 4

Call: TypeAlias = Any
"""The arguments of a stock ``step``: a named tuple with its names and defaults."""

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


class Choice(NamedTuple):
    """What a table depends on beside the scheduler.

    Attributes:
        rules: One of ``RULES``.
        start: The first row of the walk, for solvers whose order grows from there.
        options: Those of the stock ``step`` that its coefficients depend on.
        coefficients: One of ``COEFFICIENTS``.
    """

    rules: str = "diffusers"
    start: int = 0
    options: Mapping[str, Any] = NO_OPTIONS
    coefficients: str = "float64"


class Place(NamedTuple):
    """Where a step is.

    Attributes:
        row: Its row in the scheduler's timesteps.
        timestep: Its timestep, as a number.
        noisy: Whether the row of the table adds noise.
        options: As for ``Choice``.
    """

    row: int
    timestep: float
    noisy: bool
    options: Mapping[str, Any]


class Manner(NamedTuple):
    """How a fused scheduler takes its steps.

    Attributes:
        rules: "diffusers", or "exact" where diffusers departs from a solver's paper.
        noise: "generator" for diffusers' own draws, "philox" for noise drawn in the launch.
        coefficients: "float64", or "diffusers" for the rounding of diffusers' float32.
    """

    rules: str = "diffusers"
    noise: str = "generator"
    coefficients: str = "float64"


@dataclass
class Fusion:
    """What ``fuse`` adds to a scheduler.

    Attributes:
        manner: How it takes its steps.
        fallbacks: How often a call went to the stock scheduler, by reason.
        guided: How many steps have combined the predictions of a guided model themselves.
        walk: Where the scheduler is.
        tables: The last ones with what they were made from, for the next image needs the same.
    """

    manner: Manner
    fallbacks: Counter[str] = field(default_factory=Counter)
    guided: int = 0
    walk: Walk | None = None
    tables: dict[Any, tuple[Any, SolverTable]] = field(default_factory=dict)


class FusedScheduler:
    """Before a stock scheduler among the bases of a class: takes its steps by a table.

    A family says what its table is (``make_table``), on which arguments of ``step`` it depends
    (``options``), and what else the stock scheduler has to take (``_refuse``), which is counted.
    Its ``step``, with the signature of the stock one, is made by ``stepping``.
    """

    stock: ClassVar[type]
    """The class of diffusers that the family replaces."""
    options: ClassVar[tuple[str, ...]] = ()
    """The arguments of the stock ``step`` that the coefficients depend on."""
    coefficients: ClassVar[tuple[str, ...]] = ("float64",)
    """Those of ``COEFFICIENTS`` that the family has."""
    refuses_integers: ClassVar[bool] = False
    """Whether the stock ``step`` has an error for a timestep that is an integer."""
    returns_x0: ClassVar[bool] = False
    """Whether the stock ``step`` returns ``pred_original_sample`` beside ``prev_sample``."""
    has_history: ClassVar[bool] = False
    """Whether its tables keep a history, which leaves ``pred_original_sample`` a second launch."""
    widens: ClassVar[bool] = False
    """Whether 16-bit samples are stepped in float32, as its history would lose too much."""
    casts_to_model: ClassVar[bool] = True
    """Whether ``prev_sample`` has the dtype of the model's output, whatever that of the sample."""
    noise_dtype: ClassVar[torch.dtype | None] = None
    """The dtype that diffusers draws noise in; ``None`` for that of the model's output."""

    _fusion: Fusion
    # Of the stock class.
    config: Any
    timesteps: Tensor
    _step_index: int | None
    _begin_index: int | None

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """The table of a configured scheduler.

        Args:
            scheduler: Of the stock class or a fused one, with its timesteps set.
            choice: Rules, start and options.

        Returns:
            The table, of ``len(scheduler.timesteps) - choice.start`` rows.

        Raises:
            Unsupported: An option without a table, by name.
        """
        raise NotImplementedError

    @property
    def fallbacks(self) -> Counter[str]:
        """How often a call went to the stock scheduler, by reason; empty if all were fused."""
        return self._fusion.fallbacks

    @property
    def guided_steps(self) -> int:
        """How many steps took guidance along, after ``fuse(pipe, guidance=True)``."""
        return self._fusion.guided

    def _walk(self) -> Walk:
        """The walk over the timesteps that the scheduler holds, a new one if they changed."""
        walk = self._fusion.walk
        if walk is None or not walk.is_of(self):
            walk = self._fusion.walk = Walk(self)
        return walk

    def _row(self, walk: Walk, timestep: Any) -> int:
        """Which row a step takes: the stock scheduler's count of steps, found at its first one."""
        if self._step_index is not None:
            return self._step_index
        if self._begin_index is not None:
            return self._begin_index
        places = walk.places(timestep)
        # The second of two, as diffusers has it: a start in the middle must not skip a sigma.
        return places[1 if len(places) > 1 else 0]

    def _done(self, row: int) -> None:
        """Count the step, as the stock scheduler does."""
        self._step_index = row + 1

    def _draws(self, place: Place) -> bool:
        """Whether diffusers draws noise in this step.

        Also where its factor is 0: a generator that is used again must be where it would be.
        """
        return place.noisy

    def _step(self, call: Call) -> Any:
        """One step by the table; ``None`` if the stock scheduler has to take it.

        Args:
            call: The arguments of the stock ``step``, by name.
        """
        if not self.options:
            return self._take(call, NO_OPTIONS)
        return self._take(call, {name: getattr(call, name) for name in self.options})

    def _refuse(self, call: Call) -> None:
        """Leave a call to the stock scheduler, which also has the errors and warnings for it.

        Args:
            call: As for ``_step``.

        Raises:
            Unsupported: Why.
        """

    def _take(self, call: Call, options: Mapping[str, Any]) -> Any:
        """One step by the table of some options; ``None`` if the stock scheduler has to take it.

        Args:
            call: As for ``_step``.
            options: For ``make_table``.
        """
        model_output, timestep, sample = call[:3]
        try:
            self._refuse(call)
            walk = self._walk()
            row = self._row(walk, timestep)
            start = row if walk.start is None else walk.start
            table = self._table(walk, start, options)
            if not 0 <= row - start < len(table.rows):
                raise Unsupported(f"step {row} of a walk that starts at {start}")
            check_samples(model_output, sample)
        except Unsupported as reason:
            self._count(reason)
            return None
        walk.start = start
        model_output, guided = taken_apart(model_output, apart=self._is_prediction(table))
        noise = None
        if self._draws(Place(row, walk.times[row], table.rows[row - start].noisy, options)):
            noise = self._noise(walk, row, model_output, sample, call)
        output, spread = self._split(table, model_output, sample)
        writes_x0 = self.returns_x0 and not self.has_history
        x, history = table.step(
            row - start,
            sample.float() if self.widens and sample.itemsize < _FLOAT32_BYTES else sample,
            output,
            () if writes_x0 else walk.history,
            noise=noise,
            threshold=self._threshold(table, row - start, sample, output, guided),
            variance_output=spread,
            **guided,
        )
        self._fusion.guided += bool(guided)
        if not writes_x0:
            walk.history = history
        dtype = self._dtype(sample, output)
        if x.dtype != dtype:
            x = x.to(dtype)
        self._done(row)
        if not self.returns_x0:
            return self._output(x, return_dict=call.return_dict)
        known = writes_x0 and history
        x0 = history[0] if known else table.denoised(row - start, sample, output, **guided)
        x0 = self._original(x0, table.rows[row - start], noise)
        return self._output(x, x0, return_dict=call.return_dict)

    def _original(self, x0: Tensor, row: Row, noise: Noise | None) -> Tensor:
        """``pred_original_sample`` from the x0 of a row; another one where noise enters before."""
        return x0

    def _dtype(self, sample: Tensor, output: Tensor) -> torch.dtype:
        """The dtype of ``prev_sample``."""
        if self.casts_to_model:
            return output.dtype
        return torch.promote_types(sample.dtype, output.dtype)

    def _output(self, *tensors: Tensor, return_dict: bool) -> Any:
        """``prev_sample``, and ``pred_original_sample`` if there is one, as the stock step does."""
        if not return_dict:
            return tensors
        return self.output_class(*tensors)

    output_class: ClassVar[Callable[..., Any]]
    """What the stock ``step`` returns with ``return_dict=True``."""

    def _table(self, walk: Walk, start: int, options: Mapping[str, Any]) -> SolverTable:
        """The table of a walk from a row, and of the options of ``step``."""
        key = (start, *options.values())
        table = walk.tables.get(key)
        if table is not None:
            return table

        def make() -> SolverTable:
            manner = self._fusion.manner
            choice = Choice(manner.rules, start, options, manner.coefficients)
            made = self.make_table(walk.on_host(self), choice)
            return self._returning(made) if self.returns_x0 and not self.has_history else made

        return self._found(walk, key, make)

    def _found(
        self, walk: Walk, key: tuple[Any, ...], make: Callable[[], SolverTable]
    ) -> SolverTable:
        """The table of a key: in use, found again from a walk before, or made."""
        table = walk.tables.get(key)
        if table is not None:
            return table
        kept, content = self._fusion.tables, (*key, *walk.content)
        sources, table = kept.pop(content, ((), None))
        if table is None or any(a is not b for a, b in zip(sources, walk.sources, strict=True)):
            try:
                table = make()
            except Unsupported:
                raise
            except ValueError as error:  # levels that a solver cannot take
                raise Unsupported(str(error)) from error
        kept[content] = walk.sources, table  # the last of them
        if len(kept) > _MOST_TABLES:
            del kept[next(iter(kept))]
        walk.tables[key] = table
        return table

    def _returning(self, table: SolverTable) -> SolverTable:
        """The table whose h' is what the stock ``step`` returns beside ``prev_sample``."""
        return keeping_x0(table)

    def _drawn_in(self, sample: Tensor, output: Tensor) -> torch.dtype:
        """The dtype that diffusers draws noise in."""
        return self.noise_dtype or output.dtype

    def _noise(
        self,
        walk: Walk,
        row: int,
        model_output: Tensor,
        sample: Tensor,
        call: Call,
    ) -> Noise:
        """The noise of a step: given, drawn by diffusers' own function, or a key of ours."""
        given: Tensor | None = getattr(call, "variance_noise", None)
        if given is not None:
            return given
        generator = getattr(call, "generator", None)
        if self._fusion.manner.noise == "philox":
            if walk.noise_key is None:
                walk.noise_key = _key(generator, model_output)
            key: PhiloxNoise = walk.noise_key
            return key.at(row)
        drawn: Tensor = randn_tensor(
            sample.shape,
            generator=generator,
            device=model_output.device,
            dtype=self._drawn_in(sample, model_output),
        )
        return drawn

    def _is_prediction(self, table: SolverTable) -> bool:
        """Whether a model output is a prediction alone, so that a step may combine two of them."""
        return table.variance is None

    def _split(
        self, table: SolverTable, model_output: Tensor, sample: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The prediction, and the variance that is predicted beside it."""
        if table.variance is None:
            return model_output, None
        output, spread = model_output.split(sample.shape[1], dim=1)
        return output, spread

    def _threshold(
        self, table: SolverTable, row: int, sample: Tensor, output: Tensor, guided: dict[str, Any]
    ) -> Tensor | float | None:
        """Imagen's bound of x_0, where the scheduler is configured for it."""
        if not self.config.get("thresholding"):
            return None
        largest = float(self.config.sample_max_value)
        if largest < 1:
            return largest  # diffusers raises the bound to 1, and then lowers it to this
        return ops.dynamic_threshold(
            sample,
            output,
            table.rows[row].coefficients,
            ratio=self.config.dynamic_thresholding_ratio,
            sample_max_value=largest,
            **guided,
        )

    def _count(self, reason: Exception) -> None:
        fusion = self._fusion
        if fusion.walk is not None and fusion.walk.history:
            raise RuntimeError(
                f"step cannot leave the fused solver in the middle of a walk: {reason}; call "
                "set_timesteps first"
            ) from reason
        fusion.fallbacks[str(reason)] += 1


def stepping(stock_step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` of a stock class, taken by the table of a family where there is one.

    Args:
        stock_step: The method; its signature is kept, for pipelines look at it.

    Returns:
        The method of the fused class.
    """
    _, *parameters = inspect.signature(stock_step).parameters.values()
    defaults = [p.default for p in parameters if p.default is not p.empty]
    named_tuple: Any = namedtuple
    call_of = named_tuple("Call", [p.name for p in parameters], defaults=defaults)

    @functools.wraps(stock_step)
    def step(self: FusedScheduler, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return untraced(self, *args, **kwargs)
        try:
            call = call_of(*args, **kwargs)
        except TypeError:
            return stock_step(self, *args, **kwargs)  # which says what is wrong with the arguments
        taken = None
        if not (self.refuses_integers and is_integer(call.timestep)):
            taken = self._step(call)
        return stock_step(self, *args, **kwargs) if taken is None else taken

    # One break in the graph: a trace would hold the numbers of the table and the size of the
    # noise, and would be made again for others.
    untraced = torch.compiler.disable(step)
    return step


def is_integer(timestep: Any) -> bool:
    """Whether a timestep is an index, which many a family of diffusers refuses.

    Args:
        timestep: A number or a tensor.

    Returns:
        Whether it is.
    """
    if isinstance(timestep, Tensor):
        return not timestep.is_floating_point()
    return isinstance(timestep, int)


def renewing(set_timesteps: Callable[..., Any]) -> Callable[..., Any]:
    """``set_timesteps`` of a stock class, after which a new walk begins.

    Args:
        set_timesteps: The method; its signature is kept, for pipelines look at it.

    Returns:
        The method of the fused class.
    """

    @functools.wraps(set_timesteps)
    def renewed(self: FusedScheduler, *args: Any, **kwargs: Any) -> Any:
        result = set_timesteps(self, *args, **kwargs)
        self._fusion.walk = Walk(self)  # reads the timesteps here, and not in a step
        return result

    return renewed


def check_samples(model_output: Any, sample: Any) -> None:
    """Refuse what a kernel cannot take.

    Args:
        model_output: Of a step.
        sample: Of a step.

    Raises:
        Unsupported: Not tensors of floating point numbers.
    """
    for name, value in (("model_output", model_output), ("sample", sample)):
        if not isinstance(value, Tensor):
            raise Unsupported(f"{name} of type {type(value).__name__}")
        if not value.is_floating_point():
            raise Unsupported(f"{name} of {value.dtype}")


def _key(generator: Any, like: Tensor) -> PhiloxNoise:
    """A noise key from diffusers' generator; from a list of them, a seed for each sample."""
    if isinstance(generator, Sequence):
        keys = [PhiloxNoise.from_generator(one, device=like.device) for one in generator]
        seeds = [torch.as_tensor(key.seed, device=like.device).reshape(()) for key in keys]
        return PhiloxNoise(torch.stack(seeds), sample_ids=0)
    return PhiloxNoise.from_generator(generator, device=like.device)
