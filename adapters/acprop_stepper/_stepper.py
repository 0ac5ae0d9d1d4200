"""The stepper: options, checks, and the step as a whole."""

import dataclasses
import importlib
import importlib.util
import math
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from acprop_core import ACProp, State
from acprop_core._checks import (
    called,
    check_carries,
    check_compensation,
    check_count,
    check_leaves,
    check_number,
    common_namespace,
    library,
)
from acprop_core._containers import align, flatten, unflatten
from acprop_core._rule import Array
from acprop_stepper import _memory
from acprop_stepper._engines import Buffer, Cupy, Numba, Numbers, Tiles
from acprop_stepper._gradients import global_norm, largest, on_device_of
from acprop_stepper._work import Copy, Work

Container = Any  # an array, or nested dicts, lists, tuples and namedtuples of arrays and None


class StepRecord(NamedTuple):
    """What a step did.

    Attributes
    ----------
    count : int
        Number of updates done, this one included.
    learning_rate : float
        The learning rate of this step.
    grad_norm : float or None
        Global norm of the gradients as they were given; None if nothing asked for it.
    skipped : bool
        Whether nothing was changed, because something was not finite.

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
        At least 0. A callable (a schedule) is given the count of updates done, 0 at the first step.
    b1, b2 : float
        Decay rates of the two moments, in [0, 1).
    eps, eps_root : float
        Added to the root of the second moment, and to the second moment at every step; at least 0.
    weight_decay : float
        Decoupled weight decay, at least 0; it is multiplied by the learning rate.
    mask : container of bool, prefix of one, or callable, optional
        Which parameters decay; as in `acprop_core.ACProp`, but read once, here.
    clip_exponent : float, optional
        No element moves by more than ``learning_rate * t**clip_exponent`` at step t, weight decay aside; None for no
        clip. 0.25 is recommended.
    centering : {"current", "previous"}
        Centre the second moment on m_t as the paper does, or on m_{t-1} as the code of ``optax.contrib.acprop``.
    moment_dtype : dtype or its name, optional
        Real dtype of the moments; by default the parameter's, and float32 for 16-bit parameters.
    compensate : bool
        Keep what rounding takes from 16-bit parameters, and give it back as soon as it is enough to change them.
    clip_norm : float, optional
        Gradients whose global norm exceeds this are scaled down to it; positive.
    nonfinite : {"allow", "skip", "raise"}
        What to do if a gradient, or a moment that it would lead to, is not finite: go on as the rule does, skip the
        step, or raise FloatingPointError. "skip" and "raise" read the gradients once more.
    engine : {"numba", "tiles", "cupy"}, optional
        By default the best that is installed and fits: for NumPy "numba" (contiguous and real; the rest goes through
        "tiles"), else "tiles"; for CuPy "cupy".
    threads : int
        Threads that share a step. More than one helps where one core cannot fill the memory bus.

    Attributes
    ----------
    functional : acprop_core.ACProp
        The same optimizer as pure functions.
    params : container of arrays
        What was given.

    Raises
    ------
    TypeError
        If a parameter is not a floating-point NumPy or CuPy array, or an option of a wrong type.
    ValueError
        If parameters overlap, one is read-only or not in native byte order, or an option is out of its range.
    ModuleNotFoundError
        If the engine asked for is not installed.

    Notes
    -----
    A step that has begun is completed whatever interrupts it; the interruption (KeyboardInterrupt, say) is raised when
    parameters, moments and count are those after the step. A step refused or skipped has changed nothing. Threads that
    step one stepper wait for each other. A pickled or deep-copied stepper steps the parameters copied along with it;
    let no thread step it meanwhile.

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
        weight_decay: float = 0.0,
        mask: Container | Callable[[Container], Container] | None = None,
        *,
        clip_exponent: float | None = None,
        centering: str = "current",
        moment_dtype: Any = None,
        compensate: bool = False,
        clip_norm: float | None = None,
        nonfinite: str = "allow",
        engine: str | None = None,
        threads: int = 1,
    ) -> None:
        self.functional = ACProp(
            learning_rate,
            b1,
            b2,
            eps,
            eps_root,
            weight_decay,
            mask,
            clip_exponent=clip_exponent,
            centering=centering,
            moment_dtype=moment_dtype,
            compensate=compensate,
        )
        for name in ("learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay", "clip_exponent"):
            value = getattr(self.functional, name)
            if not (value is None or isinstance(value, float) or (name == "learning_rate" and callable(value))):
                raise TypeError(f"{name} is {value!r}; a stepper takes numbers: convert it with float()")
        self.params = params
        self._clip_norm = None if clip_norm is None else check_number("clip_norm", clip_norm)
        if self._clip_norm is not None and not (isinstance(self._clip_norm, float) and self._clip_norm > 0.0):
            raise ValueError(f"clip_norm is {clip_norm!r}; give a number above 0, or None")
        if nonfinite not in ("allow", "skip", "raise"):
            raise ValueError(f"nonfinite is {nonfinite!r}; give 'allow', 'skip' or 'raise'")
        self._nonfinite = nonfinite
        self._engine = engine
        if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
            raise ValueError(f"threads is {threads!r}; give a whole number of at least 1")
        self._threads = threads
        self._work: Work | None = None
        self._busy = False
        self._lock = threading.RLock()

        pairs = list(flatten(params))
        self._names = [name for name, _ in pairs]
        self._leaves = [x for _, x in pairs]
        self._containers = unflatten(params, self._leaves)  # a copy: the caller may rebind names in his own
        state = self.functional.init(params)  # checks that these are floating-point arrays of one library
        self._count: int = state.count
        self._xp = _native(common_namespace({"parameter": self._leaves}, self._names))
        if self._xp is None:
            self._xp = np  # no parameters at all
        self._present = [x for x in self._leaves if x is not None]
        self._check_parameters()
        _check_engine(engine, self._xp)
        self._buffers = self._make_buffers(state)
        self._engines = [self._make_engine(engine, buffer) for buffer in self._buffers]
        self._tame = True  # whether no moment exceeds what `_safe` allows
        self._flat = not any("." in name for name in self._names) and isinstance(params, dict | list | tuple)
        self._flat = self._flat and len(self._leaves) == len(params)
        self._expect = [None if x is None else _layout(np.empty(x.shape, x.dtype)) for x in self._leaves]
        compiled = [engine.compiled for engine in self._engines if isinstance(engine, Numba)]
        every = len(compiled) == len(self._engines) and len(self._present) == len(self._leaves)
        self._plain = compiled[0].Plain(self._leaves) if compiled and every else None  # the fast check
        self._owners = {id(_memory.owner(x)) for x in self._leaves if x is not None}

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy steps copies of the parameters: those that are pickled or deep-copied along with it
        return _restored, (type(self), self.params, self._options(self.functional), self.state)

    def _options(self, functional: ACProp) -> dict[str, Any]:
        options = {field.name: getattr(functional, field.name) for field in dataclasses.fields(functional)}
        options |= {"clip_norm": self._clip_norm, "nonfinite": self._nonfinite}
        return options | {"engine": self._engine, "threads": self._threads}

    def _with(self, functional: ACProp) -> "Stepper":
        """Return a new stepper of the same parameters and options with other hyperparameters, their mask by name."""
        if isinstance(functional.mask, dict):
            mask = unflatten(self._containers, [functional.mask.get(name, True) for name in self._names])
            functional = dataclasses.replace(functional, mask=mask)
        return type(self)(self.params, **self._options(functional))

    def _become(self, other: "Stepper") -> None:
        """Take over all that another stepper of the same parameters is, but for the lock on which threads wait."""
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
            rows: list[tuple[Any, Any, Any]] = [(None, None, None)] * len(self._leaves)
            for buffer in self._buffers:
                with on_device_of(buffer.mu):
                    for i, leaf in enumerate(buffer.leaves):
                        mu, nu, carry = buffer.kept(i)
                        rows[leaf] = mu.copy(), nu.copy(), None if carry is None else carry.copy()
            columns = [unflatten(self._containers, [row[i] for row in rows]) for i in range(3)]
            return State(self._count, *columns[: 3 if self.functional.compensate else 2])

    def load_state(self, state: State) -> None:
        """Take up a run from this state, of a stepper or of the functional optimizer; it is copied.

        Parameters
        ----------
        state : State
            Moments and carry must be arrays of the parameters' library and shapes, in the dtypes that this stepper
            keeps; there must be a carry if it has `compensate`, and none otherwise.

        Raises
        ------
        TypeError, ValueError
            If it does not fit; nothing has changed then.
        RuntimeError
            If called from within a step, as by `step`.

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
            raise TypeError(f"the state is a {type(state).__name__}; give a State")
        count = check_count(state.count)
        if not isinstance(count, int):
            raise TypeError(f"the step count (state.count) is {count!r}; give an int")
        groups: dict[str, list[Any]] = {"parameter": self._leaves}
        for what, tree in (("first moment", state.mu), ("second moment", state.nu)):
            groups[what] = list(align(tree, self._containers, f"the container of {what}s"))
        check_compensation(self.functional.compensate, state.carry)
        carries = [] if state.carry is None else list(align(state.carry, self._containers, "the container of carries"))
        common_namespace({**groups, "carry": carries or [None] * len(self._names)}, self._names)
        check_leaves(groups, self._names)
        if state.carry is not None:
            check_carries(carries, self._leaves, self._names)
        groups["carry"] = carries
        copies = []
        for buffer in self._buffers:
            for what, own in (("first moment", buffer.mu), ("second moment", buffer.nu), ("carry", buffer.carry)):
                if own is None:
                    continue
                for leaf in buffer.leaves:
                    if groups[what][leaf].dtype != own.dtype:
                        raise TypeError(
                            f"{what} of {self._names[leaf]!r} has dtype {groups[what][leaf].dtype}, "
                            f"this stepper keeps {own.dtype}; convert it, or set moment_dtype"
                        )
                with on_device_of(own):
                    new = self._xp.concatenate([groups[what][leaf].reshape(-1) for leaf in buffer.leaves])
                copies.append(Copy(new, own, buffer.place()))
        self._tame = False
        self._finish(Work(copies, lambda: self._set(count)))

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
            If a gradient does not fit its parameter, or shares memory with one; nothing has changed then.
        FloatingPointError
            If something is not finite and `nonfinite` is "raise"; nothing has changed then.
        RuntimeError
            If called from within a step of this stepper: by a schedule, or a signal's handler that interrupts one.

        Examples
        --------
        >>> params = np.array([1.0, 1.0])
        >>> stepper = Stepper(params, learning_rate=1e-3, nonfinite="skip", clip_exponent=0.25)
        >>> stepper.step(np.array([0.5, np.nan]))
        StepRecord(count=0, learning_rate=0.001, grad_norm=None, skipped=True)
        >>> stepper.step(np.array([0.5, 0.0]))
        StepRecord(count=1, learning_rate=0.001, grad_norm=None, skipped=False)
        >>> params
        array([0.9995, 1.    ])
        """
        return self._alone(self._step, grads)

    def _alone(self, write: Callable[[Any], Any], argument: Any) -> Any:
        """Write while other threads wait, and a handler that interrupts this one may not."""
        with self._lock:
            if self._busy:
                raise RuntimeError(
                    "step or load_state was called from within one of them, by a schedule or a signal's handler; "
                    "do it later"
                )
            self._busy = True
            try:
                return write(argument)
            finally:
                self._busy = False

    def _step(self, grads: Container) -> StepRecord:
        self._settle()
        leaves, addresses = self._match(grads)
        step = self.functional.at(self._count, self._xp)
        learning_rate = step.learning_rate
        norm, scale = None, 1.0
        if self._clip_norm is not None:
            peak, ratio = global_norm(leaves, self._xp)
            norm = peak * ratio
            if norm > self._clip_norm:
                scale = self._clip_norm / norm if norm < math.inf else self._clip_norm / peak / ratio
        parts = [
            (buffer, [leaves[i] for i in buffer.leaves], self._numbers(step, buffer, scale, addresses))
            for buffer in self._buffers
        ]
        if self._nonfinite != "allow" and (culprit := self._not_finite(parts)):
            if self._nonfinite == "raise":
                raise FloatingPointError(f"{culprit}; nothing was changed. Mend it, or set nonfinite='skip'")
            return StepRecord(self._count, learning_rate, norm, skipped=True)
        count = self._count + 1
        tasks = [
            task
            for engine, (_, grads_of_buffer, numbers) in zip(self._engines, parts, strict=True)
            for task in engine.tasks(grads_of_buffer, numbers)
        ]
        self._finish(Work(tasks, lambda: self._set(count), self._threads, shielded=self._xp is not np))
        return StepRecord(count, learning_rate, norm, skipped=False)

    def _finish(self, work: Work) -> None:
        self._work = work
        work.finish()
        self._work = None  # and the gradients with it

    def _settle(self) -> None:
        # A handler may look in the middle of a step, and interruptions one upon another leave one half done: finish it
        # before anything else is done or seen. What has not begun is left to whoever is about to begin it.
        work = self._work
        if work is not None and work.begun:
            if not work.finished:
                work.finish()
            self._work = None

    def _set(self, count: int) -> None:
        self._count = count

    @staticmethod
    def _numbers(step: Any, buffer: Buffer, scale: float, addresses: Any) -> Numbers:
        k, dtype, real_dtype = step.numbers_for(buffer.mu.dtype, buffer.params[0].dtype)
        return Numbers(k, dtype, real_dtype, scale, None if addresses is None else addresses[buffer.leaves])

    def _match(self, grads: Container) -> tuple[list[Any], Any]:
        """Return the gradients in the order of the parameters, checked, and their `addresses` if these were found."""
        now = self._pick(self.params, "params")
        if not all(map(operator.is_, now, self._leaves)):
            name = next(name for name, x, y in zip(self._names, now, self._leaves, strict=True) if x is not y)
            raise ValueError(
                f"{called('parameter', name)} is not the array that the stepper was made for; write into that "
                "array, or make another stepper"
            )
        leaves = self._pick(grads, "the container of gradients")
        if self._plain is not None and (addresses := self._plain.addresses(leaves)) is not None:
            return leaves, addresses
        if self._xp is np and not all(map(_writeable, self._present)):
            self._check_parameters()  # which says which
        try:
            if all(map(operator.eq, map(_layout, leaves), self._expect)) and self._owners.isdisjoint(map(id, leaves)):
                return leaves, None
        except (AttributeError, ValueError):
            pass  # None, no array, or a view: what is comes out below
        # NumPy's arithmetic makes scalars of 0-d arrays, and compiled code cannot read the memory of a scalar
        leaves = [np.asarray(g) if isinstance(g, np.generic) else g for g in leaves]
        groups = {"parameter": self._leaves, "gradient": leaves}
        common_namespace(groups, self._names)
        check_leaves(groups, self._names)
        for name, x, g in zip(self._names, self._leaves, leaves, strict=True):
            if g is not None and (g.dtype != x.dtype or getattr(g, "device", None) != getattr(x, "device", None)):
                what = "dtype" if g.dtype != x.dtype else "device"
                have, want = getattr(g, what), getattr(x, what)
                raise TypeError(f"{called('gradient', name)} has {what} {have}, its parameter {want}; convert it")
        arrays = [(called("parameter", name), x, True) for name, x in self._named(self._leaves)]
        arrays += [(called("gradient", name), g, False) for name, g in self._named(leaves)]
        self._refuse_overlap(arrays)
        return leaves, None

    def _pick(self, grads: Container, what: str) -> list[Any]:
        # a flat container is read at C speed: a thousand small arrays should not wait for the interpreter
        if self._flat and type(grads) is type(self._containers):
            if isinstance(grads, dict):
                if grads.keys() == self._containers.keys():
                    return [grads[key] for key in self._containers]
            elif len(grads) == len(self._containers):
                return list(grads)
        return list(align(grads, self._containers, what))

    def _named(self, leaves: Sequence[Any]) -> list[tuple[str, Any]]:
        return [(name, x) for name, x in zip(self._names, leaves, strict=True) if x is not None]

    def _refuse_overlap(self, arrays: list[tuple[str, Array, bool]]) -> None:
        if overlap := _memory.first_overlap(arrays, self._xp):
            raise ValueError(
                f"{overlap[0]} and {overlap[1]} share memory, so that writing one would change the other; copy one"
                if overlap[0] != overlap[1]
                else f"several elements of {overlap[0]} lie in the same memory, as its strides have it; copy it"
            )

    def _not_finite(self, parts: list[tuple[Buffer, list[Any], Numbers]]) -> str | None:
        """Return what is not finite, or would not be after this step, or None."""
        exact = not self._tame
        for buffer, grads, numbers in parts:
            bound = _safe_magnitude(buffer, numbers)
            for leaf, g in zip(buffer.leaves, grads, strict=True):
                magnitude = 0.0 if g is None else largest(g, self._xp)
                if not math.isfinite(magnitude):
                    return f"{called('gradient', self._names[leaf])} holds {magnitude}"
                exact = exact or magnitude > bound
        if not exact:
            return None
        for buffer, grads, numbers in parts:
            for task in Tiles(buffer).tasks(grads, numbers):
                if not task.stays_finite():
                    names = [self._names[buffer.leaves[i]] for i in task.members]
                    return f"the step would make parameters or moments of {', '.join(map(repr, names))} infinite or NaN"
        self._tame = False
        return None

    def _check_parameters(self) -> None:
        if self._xp is not None and library(self._xp) not in ("numpy", "cupy"):
            raise TypeError(
                f"the parameters are arrays of {library(self._xp)}; a Stepper takes NumPy or CuPy arrays, "
                "and acprop_torch and acprop_optax the others"
            )
        for name, x in self._named(self._leaves):
            if not getattr(x.flags, "writeable", True):
                raise ValueError(
                    f"{called('parameter', name)} is read-only; a stepper writes into its parameters: copy it"
                )
            if not x.dtype.isnative:
                raise ValueError(
                    f"{called('parameter', name)} has dtype {x.dtype.str}, not in native byte order; convert it, "
                    "for example with astype(x.dtype.newbyteorder('='))"
                )
        self._refuse_overlap([(called("parameter", name), x, True) for name, x in self._named(self._leaves)])

    def _make_buffers(self, state: State) -> list[Buffer]:
        _, rows = self.functional.match(self.params, state, self.params)
        groups: dict[Any, list[int]] = {}
        for i, row in enumerate(rows):
            if row.param is not None:
                key = (row.param.dtype, row.decay, getattr(row.param, "device", None))
                groups.setdefault(key, []).append(i)
        buffers = []
        for (_, decay, _), members in groups.items():
            first, size = rows[members[0]], sum(rows[i].param.size for i in members)
            with on_device_of(first.param):
                mu, nu, carry = (
                    None if x is None else self._xp.zeros(size, x.dtype) for x in (first.mu, first.nu, first.carry)
                )
            buffers.append(Buffer(members, [rows[i].param for i in members], mu, nu, carry, decay, self._xp))
        return buffers

    def _make_engine(self, engine: str | None, buffer: Buffer) -> Tiles | Numba | Cupy:
        if self._xp is not np:
            return Cupy(buffer) if Cupy.fits(buffer) else Tiles(buffer)
        fast = engine == "numba" or (engine is None and importlib.util.find_spec("numba") is not None)
        return Numba(buffer) if fast and Numba.fits(buffer) else Tiles(buffer)


def _restored(kind: type[Stepper], params: Container, options: dict[str, Any], state: State) -> Stepper:
    stepper = kind(params, **options)
    stepper.load_state(state)
    return stepper


_writeable = operator.attrgetter("flags.writeable")
_layout = operator.attrgetter("__class__", "dtype", "shape", "base")


def _native(xp: Any) -> Any:
    """Return the library itself for array_api_compat's namespace of it."""
    if xp is None or library(xp) not in ("numpy", "cupy"):
        return xp
    return importlib.import_module(library(xp))


def _check_engine(engine: str | None, xp: Any) -> None:
    usable = ("tiles", "numba") if xp is np else ("cupy",)
    if engine is not None and engine not in usable:
        raise ValueError(
            f"engine is {engine!r}; for {'NumPy' if xp is np else 'CuPy'} arrays give "
            f"{' or '.join(map(repr, usable))}, or None for the best that is installed"
        )
    if engine == "numba" and importlib.util.find_spec("numba") is None:
        raise ModuleNotFoundError("engine is 'numba', which needs Numba: python -m pip install 'acprop-core[fast]'")


def _safe_magnitude(buffer: Buffer, numbers: Numbers) -> float:
    """Return up to which magnitude gradients lead to nothing that is not finite, if moments are no larger.

    0.0 is for do not know: the step is then computed once before it is written.
    """
    info = np.finfo(numbers.real_dtype)
    if min(buffer.params[0].real.dtype.itemsize, buffer.nu.dtype.itemsize) < np.dtype(numbers.real_dtype).itemsize:
        return 0.0
    bound = math.sqrt(float(info.max)) / 4.0  # |g - m|^2 stays finite
    k = numbers.k
    return bound if bound / max(k.eps, float(info.tiny)) * abs(k.rate) < float(info.max) / 4.0 else 0.0
