"""Reading and writing files so that a failure leaves the old one whole.

A file is written beside the one that it replaces, under the name `.NAME.xxxxxxxx.unfinished`, and
takes the name once it is on the disk. Its writer holds a lock on it until then: an unfinished file
that nobody holds is left over from a process that was killed, and the next save to the same name
removes it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .arrays import Array, dtype_name, to_host

try:
    import fcntl
except ModuleNotFoundError:  # on Windows, which has no such locks
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "atomic_save",
    "atomic_write",
    "check_regular",
    "check_writable",
    "digest",
    "put_parts",
    "told",
]

HEADER = "comet"
"""The one key of our files' metadata, a JSON object: several would be written in any order."""

UNFINISHED = ".unfinished"
"""How the names of temporary files end."""

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "uint8": "U8",
}
"""Our dtypes' names in the safetensors format."""


def check_regular(path: Path) -> None:
    """Raise unless a path is a file that can be read to its end, or none at all.

    Raises:
        IsADirectoryError: it is a folder.
        ValueError: it is a pipe, a device or the like.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a regular file; give one.")


def told(error: OSError, path: Path, what: str) -> OSError:
    """The same error, which tells a path, what happened to it, and the cause."""
    return OSError(error.errno or errno.EIO, f"{what} ({error.strerror or error})", str(path))


def _bytes(x: Array) -> memoryview:
    """An array's numbers as they are in memory, in the order of its axes."""
    return np.ascontiguousarray(to_host(x)).reshape(-1).view(np.uint8).data


def digest(arrays: dict[str, Array], header: dict[str, Any] | None = None) -> str:
    """SHA-256 of arrays, their names, dtypes, shapes and numbers, in the order of the names, and of
    what a header tells of them.
    """
    found = hashlib.sha256(json.dumps(header or {}, sort_keys=True).encode())
    for name in sorted(arrays):
        x = arrays[name]
        found.update(f"{name} {dtype_name(x)} {tuple(x.shape)}\n".encode())
        found.update(_bytes(x))
    return found.hexdigest()


def _remove_unfinished(path: Path) -> None:
    """Remove what killed writers of a path have left, where locks tell it."""
    if fcntl is None:
        return
    name = re.compile(re.escape(f".{path.name}.") + "[a-z0-9_]{8}" + re.escape(UNFINISHED))
    with suppress(OSError):
        for entry in [e for e in os.scandir(path.parent) if name.fullmatch(e.name)]:
            with suppress(OSError), open(entry.path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not while another writes it
                os.unlink(entry.path)


@contextmanager
def _beside(path: Path) -> Iterator[Any]:
    """A new file in the folder of `path`, locked; it is gone afterwards, unless it was renamed."""
    while True:
        file = tempfile.NamedTemporaryFile(  # noqa: SIM115
            dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED, delete=False
        )
        with suppress(OSError, AttributeError):  # without locks nothing is ever removed
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # else another save took it for left over
            break
        file.close()
    try:
        with file:
            yield file
    finally:
        with suppress(FileNotFoundError):
            os.unlink(file.name)


def _replace(path: Path, write: Callable[[BinaryIO], object] | None) -> None:
    """Write a file beside `path`, then rename it over; or find out whether that would go well.

    The file is on the disk before it takes the name, so that a power cut leaves the old one or
    the new one. A symbolic link stays, and what it points to is replaced. The file keeps its mode,
    and a new one gets the mode that any new file of this process gets.

    Args:
        write: gets the open file; None writes nothing and replaces nothing.
    """
    check_regular(path)
    place = Path(os.path.realpath(path))
    try:
        try:
            mode = stat.S_IMODE(place.stat().st_mode)
        except FileNotFoundError:
            os.umask(mask := os.umask(0o077))
            mode = 0o666 & ~mask
            place.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(place)
        with _beside(place) as file:
            if write is None:
                return
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, mode)
            if fcntl is None:
                file.close()  # Windows renames no open file
            os.replace(file.name, place)
    except OSError as error:
        raise told(error, path, "nothing was written") from error


def check_writable(path: Path) -> None:
    """Raise unless a file can be written or replaced at a path. Folders on the way are made.

    Raises:
        OSError: it is a folder, or in a place where nothing can be written.
        ValueError: it is a pipe, a device or the like.
    """
    _replace(path, None)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file of text, UTF-8, or of bytes, whole or not at all.

    Raises:
        OSError: tells the path and the cause; the old file is as it was.
        ValueError: the path is a pipe, a device or the like.
    """
    data = content.encode() if isinstance(content, str) else content
    _replace(path, lambda file: file.write(data))


def atomic_save(path: Path, arrays: dict[str, Array], header: dict[str, Any]) -> None:
    """Write a safetensors file, whole or not at all, with the digest of its arrays and header.

    Args:
        path: file to write.
        arrays: of any library, of the dtypes in `DTYPES`.
        header: what else is told of them, fit for JSON. A "format" stands as metadata of its own,
            where other programs look for it.

    Raises:
        OSError, ValueError: as `atomic_write`.

    Source: the format of github.com/huggingface/safetensors: eight bytes with the size of a JSON
    object, the object, padded by spaces, and the numbers, the widest dtypes first, so that all
    are aligned. It is written here since the library's own writer leaves files that it did not
    finish, under names of its own.
    """
    own = {name: value for name, value in header.items() if name != "format"}
    metadata = {name: header[name] for name in ("format",) if name in header}
    metadata[HEADER] = json.dumps(own | {"digest": digest(arrays, own)}, sort_keys=True)
    table: dict[str, Any] = {"__metadata__": metadata}
    kinds = {name: DTYPES[dtype_name(x)] for name, x in arrays.items()}
    names = sorted(arrays, key=lambda name: (-int(kinds[name].lstrip("BFIU")), name))
    end = 0
    for name in names:
        start, shape = end, list(arrays[name].shape)
        end += int(np.prod(shape, dtype=np.int64)) * int(kinds[name].lstrip("BFIU")) // 8
        table[name] = {"dtype": kinds[name], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in names:
            file.write(_bytes(arrays[name]))

    _replace(path, write)


def put_parts(text: str, parts: dict[str, str], page: Path) -> str:
    """A page's text with its parts put between `<!-- NAME -->` and `<!-- end -->`, in place of what
    is there.

    Args:
        text: Markdown.
        parts: by name.
        page: for the message.

    Raises:
        ValueError: the page has no such place, or several.
    """
    for name, part in parts.items():
        place = re.compile(rf"<!-- {name} -->\n.*?<!-- end -->", re.DOTALL)
        if len(place.findall(text)) != 1:
            raise ValueError(f"{page} needs <!-- {name} --> and then <!-- end -->, once.")
        filled = f"<!-- {name} -->\n{part}\n<!-- end -->"
        text = place.sub(filled.replace("\\", r"\\"), text)
    return text
