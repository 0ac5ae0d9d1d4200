"""Checks: whether a stepper can step its parameters, and whether gradients match them."""

import importlib
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from acprop_core import adapt
from acprop_core.adapt import Array, align, called
from acprop_stepper._overlap import addresses, first_overlap

_writeable = operator.attrgetter("flags.writeable")
_nbytes = operator.attrgetter("nbytes")
_layout = operator.attrgetter("__class__", "dtype", "shape", "strides")


class Matching:
    """The parameters of a stepper, and the checks of their gradients.

    Parameters
    ----------
    params : container of arrays
        The parameters.

    Raises
    ------
    TypeError, ValueError
        If a stepper cannot write into the parameters.
    """

    def __init__(self, params: Any) -> None:
        self.names, self.leaves = adapt.names_and_leaves(params)
        named = list(zip(self.names, self.leaves, strict=True))
        self.namespace = adapt.common_namespace(("parameter", *pair) for pair in named) or np
        for pair in named:
            adapt.check_array("parameter", *pair)
        name = adapt.library(self.namespace)
        # the library itself, not array_api_compat's namespace of it
        xp = self.xp = importlib.import_module(name) if name in ("numpy", "cupy") else self.namespace
        self.containers = adapt.unflatten(params, self.leaves)  # a copy: the caller may rebind names in the original
        self._is_flat = isinstance(params, dict | list | tuple) and len(self.leaves) == len(params)
        self._is_flat = self._is_flat and not any("." in name for name in self.names)
        self._present = [x for x in self.leaves if x is not None]
        self.check_parameters()
        self._expected: Any = None
        if xp is np:
            self._nbytes = list(map(_nbytes, self._present))
            self._starts = addresses(self._present)
        if xp is np and self._present and all(x is not None and x.flags.c_contiguous for x in self.leaves):
            self._expected = [(np.ndarray, x.dtype, x.shape, x.strides) for x in self.leaves]
            self._alignments = np.array([x.dtype.alignment for x in self.leaves], np.int64)
            self._sizes = np.array(self._nbytes, np.int64)
            order = [i for i in np.argsort(self._starts) if self._sizes[i]]
            self._begins, self._ends = self._starts[order], np.array([0, *(self._starts + self._sizes)[order]])
            self._fitting = b"", self._starts  # addresses of all arrays, and of gradients, at the last step that fitted

    def gradients(self, params: Any, grads: Any) -> tuple[list[Any], Any]:
        """Return the gradients in the order of the parameters, checked; refuse parameters that have been replaced.

        Their addresses follow if all are contiguous, and otherwise None.
        """
        now = self._leaves_of(params, "params")
        if not all(map(operator.is_, now, self.leaves)):
            name = next(name for name, x, y in zip(self.names, now, self.leaves, strict=True) if x is not y)
            raise ValueError(
                f"{called('parameter', name)} is not the array that the stepper was made for; write into that "
                "array, or make another stepper"
            )
        if self.xp is np:
            self._check_memory()
        leaves = self._leaves_of(grads, "the container of gradients")
        if (found := self._plain_addresses(leaves)) is not None:
            return leaves, found
        # NumPy's arithmetic makes scalars of 0-d arrays, and compiled code cannot read the memory of a scalar
        leaves = [np.asarray(g) if isinstance(g, np.generic) else g for g in leaves]
        pairs = [("parameter", self.leaves), ("gradient", leaves)]
        adapt.common_namespace((what, *pair) for what, column in pairs for pair in zip(self.names, column, strict=True))
        for name, x, g in zip(self.names, self.leaves, leaves, strict=True):
            adapt.check_match("gradient", name, g, "parameter", x, optional=True)
            if g is not None and (g.dtype != x.dtype or getattr(g, "device", None) != getattr(x, "device", None)):
                what = "dtype" if g.dtype != x.dtype else "device"
                have, want = getattr(g, what), getattr(x, what)
                raise TypeError(f"{called('gradient', name)} has {what} {have}, its parameter {want}; convert it")
        self._refuse_overlap(leaves)
        return leaves, None

    def _plain_addresses(self, leaves: list[Any]) -> Any:
        """Return the addresses of contiguous gradients that share no memory with a parameter; None for others."""
        try:
            if self._expected is None or list(map(_layout, leaves)) != self._expected:
                return None
        except AttributeError:  # None, or not an array
            return None
        begin = addresses(leaves)
        # gradients are usually where the last ones were: to see that is one comparison, not seven operations
        if (key := begin.tobytes()) == self._fitting[0]:
            return self._fitting[1]
        # of the parameters that begin before a gradient ends, the last one ends last
        last = np.searchsorted(self._begins, begin + self._sizes)
        if (self._ends[last] > begin).any() or (begin % self._alignments).any():
            return None
        self._fitting = key, begin
        return begin

    def _check_memory(self) -> None:
        """Refuse parameters that are read-only or whose memory is no longer where it was."""
        if not all(map(_writeable, self._present)):
            self.check_parameters()  # which names the parameter
        if (
            list(map(_nbytes, self._present)) == self._nbytes
            and addresses(self._present).tobytes() == self._starts.tobytes()
        ):
            return
        names = [name for name, x in zip(self.names, self.leaves, strict=True) if x is not None]
        for name, x, nbytes, start in zip(names, self._present, self._nbytes, self._starts, strict=True):
            if x.nbytes != nbytes or x.ctypes.data != start:
                raise ValueError(
                    f"{called('parameter', name)} was resized, or has other memory, since the stepper was made; write "
                    "into the array as it was, or make another stepper"
                )

    def check_parameters(self) -> None:
        """Refuse parameters that a stepper cannot write into."""
        if self.xp.__name__ not in ("numpy", "cupy"):
            raise TypeError(
                f"the parameters are arrays of {adapt.library(self.xp)}; a Stepper takes NumPy or CuPy arrays; "
                "use acprop_torch or acprop_optax for others"
            )
        for name, x in zip(self.names, self.leaves, strict=True):
            if x is None:
                continue
            if isinstance(x, np.generic):
                raise ValueError(
                    f"{called('parameter', name)} is a {type(x).__name__} ({x!r:.40}), a scalar, which never changes; "
                    "pass np.array of it"
                )
            if not getattr(x.flags, "writeable", True):
                raise ValueError(
                    f"{called('parameter', name)} is read-only; a stepper writes into its parameters: copy it"
                )
            if not x.dtype.isnative:
                raise ValueError(
                    f"{called('parameter', name)} has dtype {x.dtype.str}, not in native byte order; convert it, "
                    "for example with astype(x.dtype.newbyteorder('='))"
                )
        self._refuse_overlap()

    def _refuse_overlap(self, grads: Sequence[Any] = ()) -> None:
        named: list[tuple[str, Array, bool]] = []
        for what, leaves in (("parameter", self.leaves), ("gradient", grads)):
            named += [
                (called(what, name), x, what == "parameter")
                for name, x in zip(self.names, leaves, strict=False)
                if x is not None
            ]
        if overlap := first_overlap(named, self.xp):
            raise ValueError(
                f"{overlap[0]} and {overlap[1]} share memory, so that writing one would change the other; copy one"
                if overlap[0] != overlap[1]
                else f"several elements of {overlap[0]} are in the same memory, because of its strides; copy it"
            )

    def _leaves_of(self, tree: Any, what: str) -> list[Any]:
        # a flat container is read at C speed, because the interpreter is slow for a thousand small arrays
        if self._is_flat and type(tree) is type(self.containers):
            if isinstance(tree, dict):
                if tree.keys() == self.containers.keys():
                    return [tree[key] for key in self.containers]
            elif len(tree) == len(self.containers):
                return list(tree)
        return list(align(tree, self.containers, what))
