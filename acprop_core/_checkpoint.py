"""Portable state in one file: write it, so that a crash leaves the old file or the new one; read it, or say why not.

The file is a safetensors file, which every framework can read:

- tensors ``mu/<name>``, ``nu/<name>`` and, of compensated 16-bit parameters, ``carry/<name>``; and ``count``, an int64
  without axes. A complex first moment is stored as a real one with a last axis of two, since the format has no
  complex128.
- metadata: `format`, `format_version`, `library_version`; `hyperparameters` and `parameters` as JSON, the latter
  "real", "complex" or "absent" (without moments) for every name, in the order of the model; `checksum`.

The checksum is SHA-256, in the standard library and as fast as a disk, over every byte of the file, with the 64 digits
of the checksum itself taken as zeros. A sum over names and values would miss what means the same, such as a letter of
another case in an escape of the header; this one misses nothing.
"""

import contextlib
import dataclasses
import importlib
import os
from typing import Any

import acprop_core
from acprop_core._checks import called, check_compensation, check_count, check_leaves, is_compensated
from acprop_core._containers import align, flatten, unflatten
from acprop_core._optimizer import ACProp, Container, State
from acprop_core._portable import (
    HYPERPARAMETERS,
    Rename,
    Transform,
    arrange,
    by_name,
    portable,
    renamed,
    to_numpy,
)

FORMAT = "acprop-core state"
FORMAT_VERSION = 2  # 1 had no carry
_ZEROS = "0" * 64
_KEY = b'"checksum":"'


def save(path: str | os.PathLike[str], optimizer: ACProp, state: State) -> None:
    """Write hyperparameters and state to one safetensors file, which every host of ACProp can go on from.

    Parameters
    ----------
    path : path
        The file; one that exists is replaced when all of the new one is on disk, and not before.
    optimizer : ACProp
        Its hyperparameters are recorded: numbers as they are, the mask by name; of a callable only that it was one.
    state : State
        Moments in any container of arrays of any library, or as `export_state` of an adapter returned them.

    Raises
    ------
    ModuleNotFoundError
        If safetensors or NumPy is not installed.
    TypeError, ValueError
        If the state is none, or two of its arrays have one dotted name; no file has been touched then.
    OSError
        If the file cannot be written; what was there is there still.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> optimizer = ACProp(learning_rate=1e-3, clip_exponent=0.25)
    >>> params = {"layers": [{"weight": np.ones((2, 3))}]}
    >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
    >>> save(path, optimizer, optimizer.init(params))
    >>> optimizer, state = load(path)
    >>> state.count, list(state.mu)
    (0, ['layers.0.weight'])
    """
    safetensors = _safetensors()
    tensors, metadata = _contents(optimizer, state)
    folder, name = os.path.split(os.path.realpath(os.fsdecode(path)))  # a link stays one
    # Beside the target, because a rename is atomic within one file system only; a name of its own for each writer.
    temporary = os.path.join(folder, f".{name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        safetensors.numpy.save_file(tensors, temporary, metadata)
        os.chmod(temporary, mode)  # safetensors makes files that their owner alone can read
        with open(temporary, "r+b") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            digits = 8 + header.index(_KEY) + len(_KEY)
            checksum = _checksum(memoryview(_mapped(file)), digits)
            file.seek(digits)
            file.write(checksum.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, os.path.join(folder, name))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if os.name == "posix":  # the rename is an entry in the directory, which is on disk only when that is
        directory = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems cannot; the new file is whole and in its place
            os.fsync(directory)
        os.close(directory)


def load(
    path: str | os.PathLike[str],
    params: Container | None = None,
    *,
    learning_rate: Any = None,
    mask: Any = None,
    rename: Rename | None = None,
    transform: Transform | None = None,
    verify: bool = True,
) -> tuple[ACProp, State]:
    """Read what `save` wrote.

    The arrays are read-only and mapped from the file: they are read when they are used, and take no memory of their
    own.

    Parameters
    ----------
    path : path
        The file.
    params : container of arrays, optional
        Parameters of the functional core, of any array library. The moments, NumPy arrays still, then come in their
        structure, checked against their names, shapes and dtypes; without, as dicts by dotted name, which is what an
        adapter's `import_state` takes.
    learning_rate : float or callable, optional
        In the place of the recorded one. Must be given if that was a callable.
    mask : container of bool or callable, optional
        In the place of the recorded one. Must be given if that was a callable.
    rename : mapping or callable, optional
        From a name in the file to the name here. A mapping leaves the names alone that it lacks. None leaves the
        parameter out.
    transform : mapping or callable, optional
        For each name here a function from array to array, such as ``np.transpose``, or one function of name and array.
        It is applied to both moments, and to the carry.
    verify : bool
        Compare the checksum, which reads the file once. Without, a damaged file may go unnoticed.

    Returns
    -------
    optimizer : ACProp
        With the recorded hyperparameters.
    state : State
        `count` is an int; a moment is None for a parameter that has taken no step yet (in PyTorch, where each parameter
        counts its own), zeros if `params` are given.

    Raises
    ------
    ModuleNotFoundError
        If safetensors or NumPy is not installed.
    ValueError
        If the file is damaged, is none of ours or of a newer version, or does not fit `params`; if `learning_rate` or
        `mask` must be given, or `rename` or `transform` lead nowhere.
    TypeError
        If dtypes do not fit.
    OSError
        If the file cannot be read.

    Notes
    -----
    A file is data: reading it runs nothing that it holds.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> params = {"weight": np.ones((2, 3)), "bias": np.zeros(3)}
    >>> optimizer = ACProp(learning_rate=1e-3, mask={"weight": True, "bias": False}, clip_exponent=0.25)
    >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
    >>> save(path, optimizer, optimizer.init(params))
    >>> same, state = load(path, params)
    >>> same == optimizer, state.nu["bias"]
    (True, array([0., 0., 0.]))
    """
    optimizer, state = _read(os.fsdecode(path), {"learning_rate": learning_rate, "mask": mask}, verify)
    optimizer, state = renamed(optimizer, state, rename, transform)
    if params is None:
        return optimizer, state
    named = by_name(flatten(params))
    fresh = optimizer.init(list(named.values()))
    rows = arrange(state, list(named), fresh)
    new = State(
        state.count,
        *(
            unflatten(
                params,
                [
                    to_numpy("moment", n, z) if x[i] is None else x[i]
                    for n, x, z in zip(named, rows, zeros, strict=True)
                ],
            )
            for i, zeros in enumerate(fresh[1:])
            if zeros is not None
        ),
    )
    if isinstance(optimizer.mask, dict) and mask is None:
        optimizer = dataclasses.replace(
            optimizer, mask=unflatten(params, [optimizer.mask.get(name, True) for name in named])
        )
    return optimizer, new


def _contents(optimizer: ACProp, state: State) -> tuple[dict[str, Any], dict[str, str]]:
    import json

    import numpy as np

    if not isinstance(optimizer, ACProp):
        raise TypeError(f"the optimizer is a {type(optimizer).__name__}; give an acprop_core.ACProp")
    if not isinstance(state, State):
        raise TypeError(f"the state is a {type(state).__name__}; give a State, or what export_state returned")
    names = list(by_name(flatten(state.mu)))
    nu = align(state.nu, state.mu, "the container of second moments")
    leaves = {
        "first moment": [to_numpy("first moment", name, x) for name, x in flatten(state.mu)],
        "second moment": [to_numpy("second moment", name, x) for name, x in zip(names, nu, strict=True)],
    }
    check_leaves(leaves, names)
    check_compensation(optimizer.compensate, state.carry)
    carries = {}
    if state.carry is not None:
        columns = zip(names, align(state.carry, state.mu, "the container of carries"), strict=True)
        carries = {name: to_numpy("carry", name, x) for name, x in columns if x is not None}
        _check_carries(carries, dict(zip(names, leaves["first moment"], strict=True)))
    count = check_count(state.count if isinstance(state.count, int) else to_numpy("step count", "", state.count))
    if count >= 2**63:
        raise ValueError(f"the step count (state.count) is {count}; a file holds counts below 2**63")
    tensors = {"count": np.asarray(count, dtype=np.int64)}
    kinds = {}
    for name, mu, nu in zip(names, *leaves.values(), strict=True):
        kinds[name] = "absent" if mu is None else "complex" if mu.dtype.kind == "c" else "real"
        if kinds[name] == "complex":
            mu = np.stack([mu.real, mu.imag], axis=-1)
        if mu is not None:
            for key, x in (("mu", mu), ("nu", nu)):
                tensors[f"{key}/{name}"] = np.asarray(x, order="C")
    tensors |= {f"carry/{name}": np.asarray(x, order="C") for name, x in carries.items()}
    record = portable(optimizer, state.mu)
    values = {name: getattr(record, name) for name in HYPERPARAMETERS}
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "library_version": acprop_core.__version__,
        "hyperparameters": json.dumps({name: "callable" if callable(x) else x for name, x in values.items()}),
        "parameters": json.dumps(kinds),
        "checksum": _ZEROS,
    }
    return tensors, metadata


def _read(path: str, given: dict[str, Any], verify: bool) -> tuple[ACProp, State]:
    import json

    import numpy as np

    safetensors = _safetensors()
    with open(path, "rb") as file:
        try:
            with safetensors.safe_open(path, "numpy") as opened:
                metadata = opened.metadata() or {}
        except safetensors.SafetensorError as error:
            raise _refusal(path, f"is no safetensors file, or a damaged one ({error})") from None
        content = _mapped(file)
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end]
    if metadata.get("format") != FORMAT:
        raise _refusal(path, "is a safetensors file, but none that acprop_core.save wrote")
    version = metadata.get("format_version", "")
    if version not in ("1", str(FORMAT_VERSION)):
        newer = version.isdecimal() and int(version) > FORMAT_VERSION
        raise _refusal(
            path,
            f"has format version {version}, newer than {FORMAT_VERSION}; install a newer acprop-core"
            if newer
            else f"has format version {version!r}, which does not exist; it is damaged",
        )
    if verify:
        digits = 8 + header.find(_KEY) + len(_KEY)
        if header.count(_KEY) != 1 or _checksum(memoryview(content), digits) != metadata["checksum"]:
            raise _refusal(path, "is damaged: its checksum does not fit its content")
    try:
        hyperparameters, kinds = (json.loads(metadata[key]) for key in ("hyperparameters", "parameters"))
        tensors = {
            name: np.ndarray(
                entry["shape"], _dtype(entry["dtype"]), buffer=content, offset=end + entry["data_offsets"][0]
            )
            for name, entry in json.loads(header).items()
            if name != "__metadata__"
        }
        count = tensors.pop("count")
        stored = [name for name, kind in kinds.items() if kind != "absent"]
        carries = {key.removeprefix("carry/"): tensors.pop(key) for key in list(tensors) if key.startswith("carry/")}
        if sorted(tensors) != sorted(f"{key}/{name}" for name in stored for key in ("mu", "nu")):
            raise ValueError("its arrays do not have the names of its parameters")
        mu, nu = ({name: tensors.get(f"{key}/{name}") for name in kinds} for key in ("mu", "nu"))
        mu |= {name: _complex(mu[name]) for name, kind in kinds.items() if kind == "complex"}
        check_leaves({"first moment": list(mu.values()), "second moment": list(nu.values())}, list(mu))
        _check_carries(carries, mu)
        if surplus := hyperparameters.keys() - set(HYPERPARAMETERS):
            raise ValueError(f"the hyperparameters {', '.join(sorted(surplus))} are unknown")
        mask = hyperparameters.get("mask")
        if mask not in (None, "callable") and (mask.keys() != kinds.keys() or {*mask.values()} - {True, False}):
            raise ValueError("the mask is not one bool for each parameter")
        recorded = ACProp(**{name: value for name, value in hyperparameters.items() if value != "callable"})
        carry = {name: carries.get(name) for name in kinds} if recorded.compensate or carries else None
        check_compensation(recorded.compensate, carry)
        state = State(check_count(count), mu, nu, carry)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _refusal(path, f"holds what save does not write ({error})") from error
    for name, value in given.items():
        if value is None and hyperparameters.get(name) == "callable":
            raise ValueError(
                f"{name} was a callable, which no file can hold, when {path!r} was saved; give it again: "
                f"load(path, {name}=...)"
            )
    return dataclasses.replace(recorded, **{k: v for k, v in given.items() if v is not None}), state


def _check_carries(carries: dict[str, Any], moments: dict[str, Any]) -> None:
    for name, x in carries.items():
        if not is_compensated(x):
            raise TypeError(f"{called('carry', name)} has dtype {x.dtype}; one of 16 bits keeps a carry, and no other")
        if moments.get(name) is None or x.shape != moments[name].shape:
            raise ValueError(
                f"{called('carry', name)} has shape {x.shape}, the first moment "
                f"{getattr(moments.get(name), 'shape', 'is None')}; make them equal"
            )


def _refusal(path: str, reason: str) -> ValueError:
    return ValueError(f"{path!r} {reason}")


def _checksum(content: memoryview, digits: int) -> str:
    import hashlib

    digest = hashlib.sha256(content[:digits])
    digest.update(_ZEROS.encode())
    digest.update(content[digits + len(_ZEROS) :])
    return digest.hexdigest()


def _mapped(file: Any) -> Any:
    import mmap

    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _dtype(name: str) -> Any:
    import numpy as np

    if name == "BF16":
        return _required("ml_dtypes").bfloat16
    return np.dtype({"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8"}[name])


def _complex(x: Any) -> Any:
    import numpy as np

    if x.dtype.kind != "f" or not x.shape or x.shape[-1] != 2:
        raise ValueError(f"a complex first moment is stored with dtype {x.dtype} and shape {x.shape}")
    return x.view(np.result_type(x.dtype, np.complex64))[..., 0]


def _safetensors() -> Any:
    _required("numpy")
    _required("safetensors.numpy")
    return importlib.import_module("safetensors")


def _required(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed, which checkpoints need: python -m pip install 'acprop-core[checkpoint]'",
            name=error.name,
        ) from error
