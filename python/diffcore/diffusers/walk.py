"""Where a scheduler is: its rows by timestep, its tables, and the history of its steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffcore.solvers import SolverTable


class Unsupported(ValueError):
    """A call or an option that has no row of a table, by name; the stock scheduler can take it."""


class OnHost:
    """A scheduler as ``make_table`` sees it: with the timesteps and sigmas on the CPU.

    They were copied there by ``set_timesteps``, so a table that is made in the first step of a walk
    does not wait for the device.
    """

    def __init__(self, scheduler: Any, timesteps: Tensor, sigmas: Any) -> None:
        self._scheduler = scheduler
        self.timesteps = timesteps
        if sigmas is not None:
            self.sigmas = sigmas

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)


class Walk:
    """What follows from the timesteps and sigmas that a scheduler holds, until it gets others.

    Nothing here reads a tensor during a walk: pipelines pass 0-dim views of ``timesteps``, which
    are known by where they lie in memory.

    Attributes:
        sources: The configuration and the schedule, by identity.
        content: What tables follow from beside them and the options of a step.
        tables: Those in use, by start and options.
        history: What the steps so far have left for the next ones.
        left: Why the stock scheduler takes this walk to its end, ``None`` if it does not have to.
        start: The first row of this walk, ``None`` before its first step.
        noise_key: The noise key of this walk, ``None`` before it is needed.
        times: The timesteps as numbers.
        sigmas: The sigmas as numbers, empty where the scheduler has none.
    """

    __slots__ = (
        "_addresses",
        "_has_sigmas",
        "_held",
        "_host",
        "_places",
        "_writes",
        "content",
        "history",
        "left",
        "noise_key",
        "sigmas",
        "sources",
        "start",
        "tables",
        "times",
    )

    def __init__(self, scheduler: Any) -> None:
        if scheduler.timesteps is None:
            raise Unsupported("a step before set_timesteps")
        self._has_sigmas = "sigmas" in vars(scheduler)
        self._held: tuple[Tensor, Any] = scheduler.timesteps, self._sigmas_of(scheduler)
        self._writes = [seen for seen in map(_writes, self._held) if seen is not None]
        timesteps, sigmas = (x.cpu() if isinstance(x, Tensor) else x for x in self._held)
        self._host = timesteps, sigmas
        self.times: list[float] = timesteps.tolist()
        self.sigmas: list[float] = [] if sigmas is None else [float(s) for s in sigmas]
        held = self._held[0]
        between = held.stride(0) * held.element_size()
        self._addresses = {held.data_ptr() + i * between: i for i in range(len(held))}
        self._places: dict[float, list[int]] = {}
        for i, t in enumerate(self.times):
            self._places.setdefault(t, []).append(i)
        known = vars(scheduler)
        self.sources = scheduler.config, known.get("alphas_cumprod")
        numbers = known.get("num_inference_steps"), tuple(self.times), tuple(self.sigmas)
        self.content = (*numbers, known.get("variance_type"))
        self.tables: dict[Any, SolverTable] = {}
        self.history: tuple[Tensor, ...] = ()
        self.left: str | None = None
        self.start: int | None = None
        self.noise_key: Any = None

    def is_of(self, scheduler: Any) -> bool:
        """Whether the scheduler still holds the timesteps and sigmas that this was made from."""
        timesteps, sigmas = self._held
        if scheduler.timesteps is not timesteps or self._sigmas_of(scheduler) is not sigmas:
            return False
        for x, count in self._writes:  # noqa: SIM110 (no generator in every step)
            if x._version != count:
                return False
        return True

    def _sigmas_of(self, scheduler: Any) -> Any:
        # Asked for an attribute that it lacks, a scheduler looks through its configuration.
        return scheduler.sigmas if self._has_sigmas else None

    @property
    def progress(self) -> tuple[tuple[Tensor, ...], str | None, int | None, Any]:
        """What the steps so far have made of the walk."""
        return self.history, self.left, self.start, self.noise_key

    @progress.setter
    def progress(self, found: tuple[tuple[Tensor, ...], str | None, int | None, Any]) -> None:
        self.history, self.left, self.start, self.noise_key = found

    def __len__(self) -> int:
        """The number of timesteps."""
        return len(self.times)

    def value_of(self, timestep: Any) -> float:
        """The number in a timestep, without reading the tensor where it is a view of ``timesteps``.

        Args:
            timestep: A number, or a tensor of one element or one expanded.

        Returns:
            The number.

        Raises:
            Unsupported: A tensor of several values.
        """
        if not isinstance(timestep, Tensor):
            return float(timestep)
        place = self._place_in_memory(timestep)
        if place is not None:
            return self.times[place]
        if timestep.numel() != 1:
            raise Unsupported(f"a timestep of shape {tuple(timestep.shape)}")
        return float(timestep)

    def places(self, timestep: Any) -> list[int]:
        """The rows that have a timestep.

        Args:
            timestep: As for ``value_of``.

        Returns:
            Their indices, rising.

        Raises:
            Unsupported: No row has it.
        """
        value = self.value_of(timestep)
        found = self._places.get(value)
        if found is None:
            raise Unsupported(f"timestep {value:g}, which is not one of scheduler.timesteps")
        return found

    def on_host(self, scheduler: Any) -> OnHost:
        """The scheduler with the timesteps and sigmas of this walk on the CPU."""
        return OnHost(scheduler, *self._host)

    def _place_in_memory(self, timestep: Tensor) -> int | None:
        """The row whose entry of ``timesteps`` this is, of one element or expanded from one."""
        place = self._addresses.get(timestep.data_ptr())
        if place is None or (timestep.ndim and timestep.numel() != 1 and any(timestep.stride())):
            return None
        held = self._held[0]
        same = timestep.dtype == held.dtype and timestep.device == held.device
        return place if same else None


def _writes(x: Any) -> tuple[Tensor, int] | None:
    """A tensor and how often it was written to; an inference tensor has no count of it."""
    return (x, x._version) if isinstance(x, Tensor) and not x.is_inference() else None
