"""IS IT what was saved: the checksum of every tensor in a file, and of all the rest of it, before it is loaded.

``torch.save`` writes a zip archive, in which each tensor's memory is a record, all that is not a tensor is one more,
and each has a CRC-32. ``torch.load`` looks at none of them. We do, so a file carries its checksums at no cost when it
is saved, whatever is in it and whichever strategy saved it.
"""

import glob
import pickle
import struct
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import IO, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import torch
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from torch.serialization import get_crc32_options, set_crc32_options

_CHUNK = 1 << 20  # bytes read at a time
_REST = "data.pkl"  # the record that has all but the tensors' memory
_SHOWN = 3  # names in an error


@contextmanager
def checksums() -> Generator[None, None, None]:
    """Within it ``torch.save`` writes checksums, also where it has been told not to."""
    writes = get_crc32_options()
    set_crc32_options(True)
    try:
        yield
    finally:
        set_crc32_options(writes)


def load(path: str, *, map_location: Any = "cpu", weights_only: bool | None = None, called: str = "") -> dict[str, Any]:
    """Return the checkpoint in a file that ``torch.save`` has written, if it is still what was written.

    Args:
        path: a local path, or a URL that fsspec knows.
        map_location: as in ``torch.load``.
        weights_only: as in ``torch.load``, which executes nothing that stands in the file unless this is False.
        called: what it is called in errors, if not by its path.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, and names the file and the tensor; or if it is no checkpoint.
        pickle.UnpicklingError: if it is whole and has something that is refused with ``weights_only``.
    """
    files, name = url_to_fs(path)
    path = called or path
    if files.isdir(name):
        raise ValueError(f"A checkpoint must be a file, and {path} is a folder.")
    if not files.exists(name):
        raise FileNotFoundError(f"Checkpoint file not found: {path}{_others(files, name)}")
    with files.open(name, "rb") as file:
        require_intact(file, path)
        file.seek(0)
        try:
            checkpoint = torch.load(file, map_location=map_location, weights_only=weights_only)
        except pickle.UnpicklingError:
            raise
        except Exception as error:
            raise ValueError(f"The checkpoint {path} cannot be loaded: {_first_line(error)}.") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"A checkpoint must be a dict, and {path} holds a {type(checkpoint).__name__}.")
    return checkpoint


def _others(files: AbstractFileSystem, name: str) -> str:
    """Name the checkpoints beside one that is not there."""
    folder = name.rpartition("/")[0]
    there = sorted(path.rpartition("/")[2] for path in files.glob(f"{glob.escape(folder)}/*.ckpt")) if folder else []
    more = f" and {len(there) - _SHOWN} more" if len(there) > _SHOWN else ""
    return f". In its folder there is {', '.join(there[:_SHOWN])}{more}" if there else ""


def require_intact(file: IO[bytes], path: str) -> None:
    """Raise a ``ValueError`` that names what in ``file`` is not what was saved, if something is not.

    Args:
        file: can be read at any place.
        path: its name, for the error.
    """
    try:
        archive = ZipFile(file)
    except Exception as error:  # a damaged list of records raises all kinds
        raise ValueError(
            f"The checkpoint {path} is damaged, or none: it is no whole file as `torch.save` writes it "
            f"({_first_line(error)})."
        ) from error
    with archive:
        records = archive.infolist()
        if len(set(archive.namelist())) < len(records):
            raise ValueError(f"The checkpoint {path} is damaged: two of its records have one name.")
        whole = any(record.filename.endswith(f"/{_REST}") for record in records)
        if whole and not any(record.CRC for record in records):
            warnings.warn(
                f"The checkpoint {path} has no checksums, as after `torch.serialization.set_crc32_options(False)`: it "
                "is loaded, but not verified.",
                stacklevel=2,
            )
            return
        damaged = [record.filename for record in records if not _is_intact(archive, record)]
        if damaged or not whole:
            raise ValueError(f"The checkpoint {path} is damaged: {_named(archive, damaged)}.")


def _is_intact(archive: ZipFile, record: ZipInfo) -> bool:
    if record.external_attr or record.compress_type != ZIP_STORED:  # torch reads nothing of what is marked as a folder
        return False
    size = checksum = 0
    try:
        with archive.open(record) as content:
            while chunk := content.read(_CHUNK):
                size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    except (BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, RuntimeError):  # also not implemented
        return False
    return (size, size, checksum) == (record.file_size, record.compress_size, record.CRC)


def _named(archive: ZipFile, damaged: list[str]) -> str:
    """Say what these records are."""
    rest = [name for name in archive.namelist() if name.endswith(f"/{_REST}")]
    if len(rest) != 1 or rest[0] in damaged:
        return "what is not a tensor in it is not as it was saved"
    with archive.open(rest[0]) as content:
        names = _names(content)
    known = [name for record in damaged for name in names.get(record.rpartition("/")[2], [f"the record {record!r}"])]
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return f"{', '.join(known[:_SHOWN])}{more} {'are' if len(known) > 1 else 'is'} not as saved"


def _names(content: IO[bytes]) -> dict[str, list[str]]:
    """Return what the tensors are called whose memory is in each record."""
    names: dict[str, list[str]] = {}
    try:
        for name, key in _walk(_Outline(content).load(), ()):
            names.setdefault(key, []).append(f"`{'/'.join(name)}`")
    except Exception:  # something that is built of more than an outline has
        return names
    return names


class _Outline(pickle.Unpickler):
    """Reads what is where in a checkpoint without its tensors, and imports and calls nothing that it names."""

    def persistent_load(self, storage: Any) -> "_Memory":
        return _Memory(str(storage[2]))

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name.startswith("_rebuild"):
            return _first
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _Anything


class _Memory:
    def __init__(self, key: str) -> None:
        self.key = key


class _Anything(dict[Any, Any]):
    """Stands for an object of any class, and for a function."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __call__(self, *_: Any) -> "_Anything":
        return self

    def __setstate__(self, state: Any) -> None:
        self["state"] = state


def _first(first: Any, *_: Any) -> Any:
    return first


def _walk(value: Any, name: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, _Memory):
        yield name, value.key
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, (*name, str(key)))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _walk(item, (*name, str(place)))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0].rstrip(".")
