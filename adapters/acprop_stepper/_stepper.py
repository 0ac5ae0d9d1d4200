"""The stepper: options, state, and the step as a whole."""

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from acprop_core import ACProp, State, adapt
from acprop_core.adapt import Row, unflatten
from acprop_stepper._buffers import Buffer, copy_within, on_device_of
from acprop_stepper._copies import new, restored
from acprop_stepper._engines import buffers_of, check_engine, engines_of
from acprop_stepper._gradients import find_nonfinite, global_norm
from acprop_stepper._matching import Matching
from acprop_stepper._upcoming import Upcoming
from acprop_stepper._work import Task, Work, cores, run_at_once

Container = Any  # an array, or nested dicts, lists, tuples and namedtuples of arrays and None


class StepRecord(NamedTuple):
    """The record of a step.

    Attributes
    ----------
    count : int
        Number of updates done, this one included.
    learning_rate : float
        The learning rate of this step.
    grad_norm : float or None
        Global norm of the gradients, before it is clipped; None without `clip_norm`.
    skipped : bool
        Whether nothing was changed, because a value was not finite.

    Examples
    --------
    >>> stepper = Stepper(np.ones(2), clip_norm=1.0, clip_exponent=0.25)
    >>> stepper.step(np.array([3.0, 4.0])).grad_norm
    5.0
    """

    count: int  # type: ignore[assignment]  # tuples have a method of this name
    learning_rate: float
    grad_norm: float | None
    skipped: bool


class Stepper:
    """ACProp (Zhuang et al. 2021, arXiv:2110.05454) for NumPy and CuPy arrays, which it updates in place.

    Parameters
    ----------
    params : container of arrays
        Writeable NumPy or CuPy arrays of a floating-point dtype in native byte order, of any shape and layout. They
        stay the caller's; every step changes them in place. They must not overlap.
    learning_rate : float or callable
        At least 0. A callable (a schedule) is called with the count of updates done, 0 at the first step; it may
        return any finite number.
    b1, b2 : float
        Decay rates of the two moments, in [0, 1). ``b1=0`` needs a clip or centering "previous"; as in
        `acprop_core.ACProp`.
    eps, eps_root : float
        Added to the root of the second moment, and to the second moment at every step; at least 0.
    weight_decay : float or callable
        Decoupled weight decay, at least 0; it is multiplied by the learning rate. A callable is a schedule.
    mask : container of bool, prefix of one, or callable, optional
        Which parameters decay; as in `acprop_core.ACProp`, but read only once, by the constructor.
    clip_exponent : float, optional
        No element moves by more than ``learning_rate * t**clip_exponent`` at step t, weight decay aside; None for no
        clip. 0.25 is recommended. It does not clip gradients: `clip_norm` does.
    centering : {"current", "previous", "none"}
        What the second moment is centred on: ``m_t`` as in the paper, ``m_{t-1}`` as in optax, or nothing, as in Adam.
    asynchronous : bool
        False makes synchronous steps, as those of Adam and AdaBelief; `acprop_core.ACProp` says what the two make.
    moment_dtype : dtype or its name, optional
        Real dtype of the moments; by default the parameter's, and float32 for 16-bit parameters.
    compensate : bool
        Keep the amount that 16-bit parameters lose to rounding, and add it to them as soon as it is large enough.
    clip_norm : float, optional
        Gradients whose global norm exceeds this are scaled down to it; positive.
    nonfinite : {"allow", "skip", "raise"}
        What to do if a gradient, or a moment that it would lead to, is not finite: continue as the rule does, skip the
        step, or raise FloatingPointError. "skip" and "raise" read the gradients once more.
    engine : {"numba", "cuda", "tiles"}, optional
        By default the best that works here and fits: "numba" for NumPy, "cuda" for CuPy (contiguous and real; the rest
        goes through "tiles"), else "tiles".
    threads : int
        Threads that share a step. More than one helps where one core cannot fill the memory bus.

    Attributes
    ----------
    functional : acprop_core.ACProp
        The same optimizer as pure functions.
    params : container of arrays
        The parameters that were passed.

    Raises
    ------
    TypeError
        If a parameter is not a floating-point NumPy or CuPy array, or an option of a wrong type.
    ValueError
        If parameters overlap, one is read-only or not in native byte order, or an option is out of its range.
    ModuleNotFoundError
        If the engine asked for is not installed.
    RuntimeError
        If it is installed and does not work.

    Warns
    -----
    RuntimeWarning
        If Numba, or numba-cuda, is installed and does not work, so that the default engine is "tiles".
    UserWarning
        If `b1` is 0 with centering "current" and no clip.

    Notes
    -----
    A step that has begun is completed even if it is interrupted; the interruption (KeyboardInterrupt, say) is raised
    after parameters, moments and count are written. A step that is refused or skipped changes nothing. Threads that
    step one stepper wait for each other. A pickled or deep-copied stepper steps the parameters copied along with it;
    do not step one in another thread while it is copied. Parameters that arrive read-only in another process, such as
    joblib's memory maps, become copies in the attribute `params`.

    Examples
    --------
    >>> import numpy as np
    >>> params = {"weight": np.ones((2, 3)), "bias": np.zeros(3)}
    >>> stepper = Stepper(params, learning_rate=1e-3, clip_exponent=0.25)
    >>> stepper.step({"weight": np.full((2, 3), 0.5), "bias": np.ones(3)})
    StepRecord(count=1, learning_rate=0.001, grad_norm=None, skipped=False)
    >>> params["bias"]
    array([-0.001, -0.001, -0.001])
    """

    def __init__(
        self,
        params: Container,
        learning_rate: float | Callable[[int], float] = 1e-3,
        b1: float = 0.9,
        b2: float = 0.999,
        eps: float = 1e-16,
        eps_root: float = 1e-16,
        weight_decay: float | Callable[[int], float] = 0.0,
        mask: Container | Callable[[Container], Container] | None = None,
        *,
        clip_exponent: float | None = None,
        centering: str = "current",
        asynchronous: bool = True,
        moment_dtype: Any = None,
        compensate: bool = False,
        clip_norm: float | None = None,
        nonfinite: str = "allow",
        engine: str | None = None,
        threads: int = 1,
    ) -> None:
        options = (clip_exponent, centering, moment_dtype, compensate, asynchronous)
        functional = ACProp(learning_rate, b1, b2, eps, eps_root, weight_decay, mask, *options)
        self._begin(params, functional, clip_norm, nonfinite, engine, threads)

    def _begin(
        self,
        params: Container,
        functional: ACProp,
        clip_norm: float | None,
        nonfinite: str,
        engine: str | None,
        threads: int,
    ) -> None:
        self.functional = functional
        for name in ("learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay", "clip_exponent"):
            value = getattr(self.functional, name)
            if not (value is None or isinstance(value, float) or callable(value)):
                raise TypeError(f"{name} is {value!r}; a stepper takes numbers: convert it with float()")
        self.params = params
        self._clip_norm = None if clip_norm is None else adapt.check_number("clip_norm", clip_norm)
        if self._clip_norm is not None and not (isinstance(self._clip_norm, float) and self._clip_norm > 0.0):
            raise ValueError(f"clip_norm is {clip_norm!r}; use a number above 0, or None")
        if nonfinite not in ("allow", "skip", "raise"):
            raise ValueError(f"nonfinite is {nonfinite!r}; use 'allow', 'skip' or 'raise'")
        self._nonfinite = nonfinite
        self._engine = engine
        if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
            raise ValueError(f"threads is {threads!r}; use a whole number of at least 1")
        self._threads = threads
        self._work: Work | None = None
        self._busy = False
        self._lock = threading.RLock()

        self._matching = Matching(params)
        self._xp = self._matching.xp
        check_engine(engine, self._xp)
        self._count = np.zeros(1, np.int64)  # an array, so that compiled code can set it
        self._buffers = buffers_of(self.functional, self._matching)
        threads = min(threads, cores())
        self._engines = engines_of(self._buffers, engine, self._xp, threads)
        is_alone = threads == 1 or len(self._engines) < 2  # threads help one engine after the other, not at once
        self._at_once = is_alone and all(x.calls_suffice(threads) for x in self._engines)
        self._tame = True  # whether no moment exceeds `safe_magnitude`

    def __repr__(self) -> str:
        sizes = [x.size for x in self._matching.leaves if x is not None]
        return f"Stepper(arrays={len(sizes)}, elements={sum(sizes)}, count={self._count[0]}, {self.functional})"

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy steps copies of the parameters, which are pickled or deep-copied along with it
        return restored, (type(self), self.params, self.functional, self._options, self.state)

    @property
    def _options(self) -> tuple[float | None, str, str | None, int]:
        return self._clip_norm, self._nonfinite, self._engine, self._threads

    def _with(self, functional: ACProp) -> "Stepper":
        """Return a new stepper of the same parameters and options with other hyperparameters, their mask by name."""
        if isinstance(functional.mask, dict):
            names, like = self._matching.names, self._matching.containers
            mask = unflatten(like, [functional.mask.get(name, True) for name in names])
            functional = adapt.with_values(functional, mask=mask)
        return new(type(self), self.params, functional, self._options)

    def _become(self, other: "Stepper") -> None:
        """Become another stepper of the same parameters, except for the lock on which threads wait."""
        self._alone(vars(self).update, {**vars(other), "_lock": self._lock, "_busy": True})

    @property
    def state(self) -> State:
        """A copy of step count, moments and carry, in the structure of the parameters.

        Returns
        -------
        acprop_core.State
            Arrays of the parameters' library, which `load_state` takes and so does the functional optimizer.

        Examples
        --------
        >>> stepper = Stepper({"w": np.ones(2)}, clip_exponent=0.25)
        >>> stepper.state
        State(count=0, mu={'w': array([0., 0.])}, nu={'w': array([0., 0.])}, carry=None)
        """
        with self._lock:
            self._settle()
            rows: list[tuple[Any, Any, Any]] = [(None, None, None)] * len(self._matching.leaves)
            for buffer in self._buffers:
                with on_device_of(buffer.mu):
                    for i, leaf in enumerate(buffer.leaves):
                        mu, nu, carry = buffer.kept(i)
                        rows[leaf] = mu.copy(), nu.copy(), None if carry is None else carry.copy()
            columns = [unflatten(self._matching.containers, [row[i] for row in rows]) for i in range(3)]
            return State(int(self._count[0]), *columns[: 3 if self.functional.compensate else 2])

    def load_state(self, state: State) -> None:
        """Continue a run from the state of a stepper or of the functional optimizer; it is copied.

        Parameters
        ----------
        state : State
            Moments and carry must be arrays of the parameters' library and shapes, in the dtypes that this stepper
            keeps; there must be a carry if it has `compensate`, and None otherwise.

        Raises
        ------
        TypeError, ValueError
            If the state does not match; nothing has changed then.
        RuntimeError
            If called from within a step; as in `step`.

        Examples
        --------
        >>> params = {"w": np.ones(2)}
        >>> stepper = Stepper(params, clip_exponent=0.25)
        >>> record = stepper.step({"w": np.ones(2)})
        >>> resumed = Stepper(params, clip_exponent=0.25)
        >>> resumed.load_state(stepper.state)
        >>> resumed.state.count
        1
        """
        self._alone(self._load, state)

    def _load(self, state: State) -> None:
        self._settle()
        if not isinstance(state, State):
            raise TypeError(f"the state is a {type(state).__name__}; pass a State")
        count = adapt.check_count(state.count)
        if not isinstance(count, int):
            raise TypeError(f"the step count (state.count) is {count!r}; pass an int")
        if count >= 2**62:
            raise ValueError(f"the step count (state.count) is {count}, too large for a stepper; pass one below 2**62")
        like = self._matching.containers
        grads = unflatten(like, [None] * len(self._matching.names))
        rows, _ = adapt.rows_of(Row(like, grads, *state[1:]), self.functional.compensate)
        tasks = [task for buffer in self._buffers for task in self._loading(buffer, rows)]
        self._tame = False
        self._finish(tasks, count)

    def _loading(self, buffer: Buffer, rows: Sequence[Row]) -> list[Task]:
        """Return the tasks that copy the moments and carries of rows into a buffer."""
        tasks: list[Task] = []
        for field, own in (("mu", buffer.mu), ("nu", buffer.nu), ("carry", buffer.carry)):
            if own is None:
                continue
            new = [getattr(rows[leaf], field) for leaf in buffer.leaves]
            for leaf, x in zip(buffer.leaves, new, strict=True):
                if x.dtype != own.dtype:
                    raise TypeError(
                        f"{adapt.called(getattr(adapt.WHAT, field), self._matching.names[leaf])} has dtype {x.dtype}, "
                        f"this stepper keeps {own.dtype}; convert it, or set moment_dtype"
                    )
            with on_device_of(own):
                flat = self._xp.concatenate([x.reshape(-1) for x in new])
            tasks.append(functools.partial(copy_within, flat, own, buffer.place()))
        return tasks

    def step(self, grads: Container) -> StepRecord:
        """Update parameters and moments in place, all of them or none.

        Parameters
        ----------
        grads : container of arrays
            Gradients, in the structure, shapes and dtypes of the parameters; they are not written to. A gradient of
            None leaves its parameter and its moments as they are.

        Returns
        -------
        StepRecord
            Count, learning rate, gradient norm (with `clip_norm`), and whether the step was skipped.

        Raises
        ------
        TypeError, ValueError
            If a gradient does not match its parameter, or shares memory with one; nothing has changed then.
        FloatingPointError
            If a value is not finite and `nonfinite` is "raise"; nothing has changed then.
        RuntimeError
            If called from within a step of this stepper: by a schedule, or a signal's handler that interrupts one.

        Examples
        --------
        >>> params = np.array([1.0, 1.0])
        >>> stepper = Stepper(params, 1e-3, nonfinite="skip", clip_exponent=0.25)
        >>> stepper.step(np.array([0.5, np.nan]))
        StepRecord(count=0, learning_rate=0.001, grad_norm=None, skipped=True)
        >>> stepper.step(np.array([0.5, 0.0]))
        StepRecord(count=1, learning_rate=0.001, grad_norm=None, skipped=False)
        >>> params
        array([0.9995, 1.    ])
        """
        return self._alone(self._step, grads)

    def _alone(self, write: Callable[[Any], Any], argument: Any) -> Any:
        """Write while other threads wait; refuse a handler that interrupts this thread and would write too."""
        with self._lock:
            if self._busy:
                raise RuntimeError(
                    "step or load_state was called from within one of them, by a schedule or a signal's handler; "
                    "call it later"
                )
            self._busy = True
            try:
                return write(argument)
            finally:
                self._busy = False

    def _step(self, grads: Container) -> StepRecord:
        self._settle()
        leaves, found = self._matching.gradients(self.params, grads)
        count = int(self._count[0])
        now = Upcoming(self.functional, count, self._matching.namespace)
        learning_rate = now.hyper.learning_rate
        norm = None
        if self._clip_norm is not None:
            peak, ratio = global_norm(leaves, self._xp)
            norm = peak * ratio
            if norm > self._clip_norm:
                now.grad_scale = self._clip_norm / norm if norm < math.inf else self._clip_norm / peak / ratio
        if self._nonfinite != "allow":
            culprit, self._tame = find_nonfinite(self._buffers, self._matching.names, leaves, now.step, self._tame)
            if culprit is not None and self._nonfinite == "raise":
                raise FloatingPointError(f"{culprit}; nothing was changed. Correct it, or use nonfinite='skip'")
            if culprit is not None:
                return StepRecord(count, learning_rate, norm, skipped=True)
        if found is not None and self._at_once:
            calls = [call for engine in self._engines for call in engine.calls(leaves, found, now)]
            run_at_once([*calls, functools.partial(self._count.fill, count + 1)])
        else:
            parts = [(engine, [leaves[i] for i in engine.leaves]) for engine in self._engines]
            self._finish([task for engine, own in parts for task in engine.tasks(own, now)], count + 1)
        return StepRecord(count + 1, learning_rate, norm, skipped=False)

    def _finish(self, tasks: Sequence[Task], count: int) -> None:
        self._work = Work(tasks, lambda: self._count.fill(count), min(self._threads, cores()))
        self._work.finish()
        self._work = None  # frees the gradients too

    def _settle(self) -> None:
        # A handler may look in the middle of a step, and a step that failed may be half done. So finish it before
        # anything else is done or seen. Work that has not begun is left to the caller that is about to begin it.
        if self._work is not None and self._work.begun:
            self._work.finish()
            self._work = None
