"""The contents of a file, and every reason to refuse one.

The file is a safetensors file, which every framework can read:

- tensors ``mu/<name>``, ``nu/<name>`` and, of compensated 16-bit parameters, ``carry/<name>``; and ``count``, an int64
  without axes. A complex first moment is stored as a real one with a last axis of two, because the format has no
  complex128.
- metadata: `format`, `format_version`, `library_version`; `hyperparameters` and `parameters` as JSON, where the latter
  says "real", "complex" or "absent" (without moments) for every name, in the order of the model; `checksum`.

The checksum is the SHA-256 of the other metadata, of names, dtypes and shapes, and of all arrays. It cannot see changes
of the header that mean the same, such as another escape for a letter. Therefore a header must also be written as JSON
is written here, to the byte. The order of its keys is free, because safetensors shuffles the metadata.
"""

import hashlib
import importlib
import json
import mmap
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

import acprop_core
from acprop_core._checks import called, check_compensation, check_count, check_match
from acprop_core._containers import align, flatten
from acprop_core._dtypes import is_compensated
from acprop_core._optimizer import ACProp, State
from acprop_core.adapt import Row, check_row, with_values
from acprop_core.checkpoint._portable import CALLABLES, HYPERPARAMETERS, by_name, to_numpy, to_portable

FORMAT = "acprop-core state"
FORMAT_VERSION = "1"
_KEYS = ("mu", "nu", "carry")
_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8"}


def to_tensors(optimizer: ACProp, state: State) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tensors and the metadata of a file.

    Parameters
    ----------
    optimizer : ACProp
        The hyperparameters.
    state : State
        Arrays of any library.

    Returns
    -------
    tensors : dict of numpy.ndarray
        By the names of the file.
    metadata : dict of str
        With the checksum.

    Raises
    ------
    TypeError, ValueError
        If the state is not valid, or two of its arrays have one dotted name.
    """
    if not isinstance(optimizer, ACProp):
        raise TypeError(f"the optimizer is a {type(optimizer).__name__}; pass an acprop_core.ACProp")
    if not isinstance(state, State):
        raise TypeError(f"the state is a {type(state).__name__}; pass a State, or the one that export_state returned")
    check_compensation(optimizer.compensate, state.carry, state.mu)
    mu = by_name(flatten(state.mu))
    nu = align(state.nu, state.mu, "the container of second moments")
    carry = [None] * len(mu) if state.carry is None else align(state.carry, state.mu, "the container of carries")
    count = check_count(state.count if isinstance(state.count, int) else to_numpy("step count", "", state.count))
    if count >= 2**63:
        raise ValueError(f"the step count (state.count) is {count}, which no int64 can hold; pass a count below 2**63")
    tensors = {"count": np.asarray(count, dtype=np.int64)}
    kinds = {}
    for name, *leaves in zip(mu, mu.values(), nu, carry, strict=True):
        whats = ("first moment", "second moment", "carry")
        row = Row(None, None, *(to_numpy(what, name, x) for what, x in zip(whats, leaves, strict=True)))
        _check(name, row)
        kinds[name] = "absent" if row.mu is None else "complex" if row.mu.dtype.kind == "c" else "real"
        if kinds[name] == "complex":
            row = row._replace(mu=np.stack([row.mu.real, row.mu.imag], axis=-1))
        for key, x in zip(_KEYS, row[2:], strict=True):
            if x is not None:
                tensors[f"{key}/{name}"] = np.asarray(x, x.dtype.newbyteorder("<"), order="C")
    record = to_portable(optimizer, state.mu)
    values = {name: getattr(record, name) for name in HYPERPARAMETERS}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": acprop_core.__version__,
        "hyperparameters": json.dumps({name: "callable" if callable(x) else x for name, x in values.items()}),
        "parameters": json.dumps(kinds),
    }
    return tensors, metadata | {"checksum": _checksum(tensors, metadata)}


def read(path: str, verify: bool) -> tuple[ACProp, State, list[str]]:
    """Return the contents of a file.

    Parameters
    ----------
    path : str
        The file.
    verify : bool
        Whether to compare the checksum.

    Returns
    -------
    optimizer : ACProp
        The hyperparameters, with defaults in the place of callables.
    state : State
        Arrays mapped from the file, in dicts by dotted name.
    callables : list of str
        The names of the hyperparameters that were callables.

    Raises
    ------
    ValueError
        If `save` did not write this file, or did not write it with this content.
    OSError
        If it cannot be read.
    """
    try:
        return _read(path, verify)
    except SafetensorError as error:
        raise ValueError(f"{path!r} is damaged, or not a safetensors file ({error}); use an older copy") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"unknown or missing {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path!r} cannot be loaded: {reason}") from error


def _read(path: str, verify: bool) -> tuple[ACProp, State, list[str]]:
    with open(path, "rb") as file, safe_open(path, "numpy") as opened:
        metadata = opened.metadata() or {}
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if metadata.get("format") != FORMAT:
        raise ValueError("acprop_core.save did not write it; pass the file of an optimizer")
    if (version := metadata["format_version"]) != FORMAT_VERSION:
        raise ValueError(f"it has format version {version}, not {FORMAT_VERSION}; install a newer acprop-core")
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    is_canonical = content[8:end] == header + b" " * (-len(header) % 8)
    tensors = {
        name: np.ndarray(entry["shape"], _dtype(entry["dtype"]), content, end + entry["data_offsets"][0])
        for name, entry in entries.items()
        if name != "__metadata__"
    }
    checksum = metadata.pop("checksum", None)
    if verify and not (is_canonical and checksum == _checksum(tensors, metadata)):
        raise ValueError("its checksum does not match its content, so it is damaged; use an older copy")
    return _parse(tensors, *(json.loads(metadata[key]) for key in ("hyperparameters", "parameters")))


def _parse(
    tensors: dict[str, Any], hyperparameters: dict[str, Any], kinds: dict[str, str]
) -> tuple[ACProp, State, list[str]]:
    mask = hyperparameters.get("mask")
    if mask not in (None, "callable") and (mask.keys() != kinds.keys() or {*mask.values()} - {True, False}):
        raise ValueError("the mask is not one bool for each parameter")
    callables = [name for name in CALLABLES if hyperparameters.get(name) == "callable"]
    numbers = {name: value for name, value in hyperparameters.items() if name not in callables}
    optimizer = with_values(ACProp(), **numbers)
    count = check_count(tensors.pop("count"))
    keys = _KEYS if optimizer.compensate else _KEYS[:2]
    rows = {name: Row(None, None, *(tensors.pop(f"{key}/{name}", None) for key in keys)) for name in kinds}
    if tensors or any((kinds[name] == "absent") != (row.mu is None) for name, row in rows.items()):
        raise ValueError("its arrays do not have the names of its parameters")
    for name, row in rows.items():
        if kinds[name] == "complex":
            rows[name] = row._replace(mu=_complex(row.mu))
        _check(name, rows[name])
    return (
        optimizer,
        State(count, *({name: getattr(row, key) for name, row in rows.items()} for key in keys)),
        callables,
    )


def _check(name: str, row: Row) -> None:
    check_row(name, row, has_params=False)
    if row.carry is None:
        return
    check_match("carry", name, row.carry, "first moment", row.mu)
    if not is_compensated(row.carry):
        raise TypeError(f"{called('carry', name)} has dtype {row.carry.dtype}; only 16-bit parameters have a carry")


def _checksum(tensors: dict[str, Any], metadata: dict[str, str]) -> str:
    about = {name: [x.dtype.name, *x.shape] for name, x in tensors.items()}
    digest = hashlib.sha256(json.dumps([metadata, about], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _dtype(name: str) -> Any:
    # ml_dtypes is imported here, because only files with bfloat16 need it.
    return importlib.import_module("ml_dtypes").bfloat16 if name == "BF16" else np.dtype(_DTYPES[name])


def _complex(x: Any) -> Any:
    if x.dtype.kind != "f" or not x.shape or x.shape[-1] != 2:
        raise ValueError(f"a complex first moment is stored with dtype {x.dtype} and shape {x.shape}")
    return x.view(np.result_type(x.dtype, np.complex64))[..., 0]
