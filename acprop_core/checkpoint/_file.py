"""`save` and `load`: one file, written so that a crash leaves the old file or the new one."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

from acprop_core._optimizer import ACProp, Container, State
from acprop_core.adapt import check_number, flatten, unflatten, with_values
from acprop_core.checkpoint._names import Rename, Transform, match_names, rename_state
from acprop_core.checkpoint._portable import by_name, to_numpy


def save(path: str | os.PathLike[str], optimizer: ACProp, state: State) -> None:
    """Write hyperparameters and state to one safetensors file, which every host of ACProp can resume from.

    Parameters
    ----------
    path : path
        The file. An existing file is replaced only when all of the new one is on disk; the new one has its mode, and
        its owner where the system allows it.
    optimizer : ACProp
        Its hyperparameters are recorded: numbers as they are, the mask by name. Of a callable only the fact that it was
        one is recorded.
    state : State
        Moments in any container of arrays of any library, or as `export_state` of an adapter returned them.

    Raises
    ------
    ModuleNotFoundError
        If safetensors or NumPy is not installed.
    TypeError, ValueError
        If the state is not valid, or two of its arrays have one dotted name. No file has been touched then.
    OSError
        If the file cannot be written, or the path is a directory, a device or another object that is not a regular
        file. It is unchanged then.

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
    with _extra_named():
        from safetensors.numpy import save_file

        from acprop_core.checkpoint._contents import to_tensors
    tensors, metadata = to_tensors(optimizer, state)
    real = os.path.realpath(os.fsdecode(path))  # a link stays a link
    replaced = _status_of(real)
    if replaced is not None and not stat.S_ISREG(replaced.st_mode):
        kind = next((kind for kind, is_kind in _KINDS.items() if is_kind(replaced.st_mode)), "special file")
        error = IsADirectoryError if kind == "directory" else OSError
        raise error(f"{os.fsdecode(path)!r} is a {kind}, which save does not replace; pass the path of a regular file")
    # In the same folder, because a rename is atomic only within one file system. Each writer has its own name, which is
    # short: the name of the file may already be as long as the system allows.
    folder = os.path.dirname(real)
    temporary = os.path.join(folder, f".acprop-{os.getpid()}-{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode if replaced is None else replaced.st_mode
        os.chmod(temporary, 0o600)  # until its owner is known
        save_file(tensors, temporary, metadata)
        if replaced is not None and os.name == "posix":
            for owner, group in ((-1, replaced.st_gid), (replaced.st_uid, -1)):
                with contextlib.suppress(OSError):  # only root may give files away
                    os.chown(temporary, owner, group)
        os.chmod(temporary, stat.S_IMODE(mode))
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, real)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if os.name == "posix":  # the rename is an entry in the directory, which must be on disk too
        directory = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems cannot; the new file is already in place
            os.fsync(directory)
        os.close(directory)


def load(
    path: str | os.PathLike[str],
    params: Container | None = None,
    *,
    learning_rate: Any = None,
    weight_decay: Any = None,
    mask: Any = None,
    rename: Rename | None = None,
    transform: Transform | None = None,
    verify: bool = True,
) -> tuple[ACProp, State]:
    """Read a file that `save` wrote.

    The arrays are read-only and mapped from the file: they are read when they are used, and take no memory of their
    own.

    Parameters
    ----------
    path : path
        The file.
    params : container of arrays, optional
        Parameters of the functional core, of any array library. The moments then come in their structure, as NumPy
        arrays, checked against their names, shapes and dtypes. Without `params` they come as dicts by dotted name,
        which an adapter's `import_state` takes.
    learning_rate, weight_decay : float or callable, optional
        Replaces the recorded one. Required if the recorded one was a callable.
    mask : container of bool or callable, optional
        Replaces the recorded one. Required if the recorded one was a callable.
    rename : mapping or callable, optional
        From a name in the file to the name here. Names that a mapping lacks stay. A new name of None leaves the
        parameter out.
    transform : mapping or callable, optional
        For each name here a function from array to array, such as ``np.transpose``, or one function of name and array.
        It is applied to both moments, and to the carry.
    verify : bool
        Compare the checksum, which reads the file once. Without it, a damaged file may go unnoticed.

    Returns
    -------
    optimizer : ACProp
        With the recorded hyperparameters.
    state : State
        `count` is an int. A moment is None for a parameter that has taken no step yet (in PyTorch, where each parameter
        counts its own), and zeros if `params` are passed.

    Raises
    ------
    ModuleNotFoundError
        If safetensors or NumPy is not installed.
    ValueError
        If the file is damaged, was not written by `save` or is of a newer version, or does not match `params`; if
        `learning_rate`, `weight_decay` or `mask` is required, or `rename` or `transform` has an unknown name.
    TypeError
        If dtypes do not match.
    OSError
        If the file cannot be read.

    Notes
    -----
    A file is data: reading it runs no code from it.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> params = {"weight": np.ones((2, 3)), "bias": np.zeros(3)}
    >>> mask = {"weight": True, "bias": False}
    >>> optimizer = ACProp(learning_rate=1e-3, mask=mask, clip_exponent=0.25)
    >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
    >>> save(path, optimizer, optimizer.init(params))
    >>> same, state = load(path, params)
    >>> same == optimizer, state.nu["bias"]
    (True, array([0., 0., 0.]))
    """
    path = os.fsdecode(path)
    with _extra_named():
        from acprop_core.checkpoint._contents import read

        optimizer, state, callables = read(path, verify)
    options = {"learning_rate": learning_rate, "weight_decay": weight_decay, "mask": mask}
    for name in ("learning_rate", "weight_decay"):
        if options[name] is not None and not callable(options[name]):
            check_number(name, options[name])
    for name in callables:
        if options[name] is None:
            raise ValueError(
                f"{name} was a callable, which a file cannot hold, when {path!r} was saved; pass it again: "
                f"load(path, {name}=...)"
            )
    optimizer = with_values(optimizer, **{name: x for name, x in options.items() if x is not None})
    optimizer, state = rename_state(optimizer, state, rename, transform)
    if params is None:
        return optimizer, state
    named = by_name(flatten(params))
    fresh = optimizer.init(list(named.values()))
    rows = match_names(state, list(named), fresh)
    trees = []
    for i, zeros in enumerate(fresh[1:]):
        if zeros is not None:
            leaves = [
                to_numpy("moment", name, zero) if row[i] is None else row[i]
                for name, row, zero in zip(named, rows, zeros, strict=True)
            ]
            trees.append(unflatten(params, leaves))
    if isinstance(optimizer.mask, dict) and mask is None:
        marks = unflatten(params, [optimizer.mask.get(name, True) for name in named])
        optimizer = with_values(optimizer, mask=marks)
    return optimizer, State(state.count, *trees)


_KINDS: dict[str, Callable[[int], bool]] = {
    "directory": stat.S_ISDIR,
    "named pipe": stat.S_ISFIFO,
    "socket": stat.S_ISSOCK,
    "device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


def _status_of(path: str) -> os.stat_result | None:
    """Return the status of a file, None if there is none."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _extra_named() -> Iterator[None]:
    """Name the extra to install when a module is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed, which checkpoints need: python -m pip install {error.name}",
            name=error.name,
        ) from error
