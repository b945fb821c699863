"""WHAT IS KEPT: one file of the consensus for everyone, and beside it a part of each worker for an exact resume.

A checkpoint of which each worker keeps a part is complete when its main file is there: the parts are written first,
all workers hear that all are, then the main file takes its name. It holds an id and the folder of the parts, so that
links, copies and other names of it find them.
"""

import hashlib
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, cast
from uuid import uuid4

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.hub import download_url_to_file

from lightning_localsgd._lightning import after_saves
from lightning_localsgd.header import Header
from lightning_localsgd.intact import checksums, load
from lightning_localsgd.rest import Rest

KEY = "lightning_localsgd"  # our entry in a checkpoint
_FOLDER = "localsgd-parts"  # Lightning reads the digits of every name that contains `ckpt_`, so ours does not


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint so that under its name there is always a whole one, the old or the new; reads only such.

    The file is written under another name, flushed to the disk, and renamed. What is read is verified, and nothing that
    stands in it is executed unless the user says so.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)  # raises, and says what to do
        write(checkpoint, str(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        # Lightning's own verifies nothing, and takes False for None before 2.6, and of URLs since.
        if not str(path).startswith("http"):
            return load(str(path), map_location=map_location, weights_only=weights_only)
        with TemporaryDirectory() as folder:
            copy = os.path.join(folder, "copy.ckpt")
            download_url_to_file(str(path), copy, progress=False)
            return load(copy, map_location=map_location, weights_only=weights_only, called=str(path))


def write(content: Any, path: str) -> None:
    """Save ``content`` under ``path``, a local path or a URL that fsspec knows, or leave what is there as it is."""
    files, name = url_to_fs(path)
    folder = os.path.dirname(name)
    files.makedirs(folder, exist_ok=True)
    # The same for the same path, so that what a kill has left is taken up again.
    unfinished = f"{folder}/.localsgd-{hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()}"
    try:
        if isinstance(files, LocalFileSystem):
            with open(unfinished, "wb") as file:
                with checksums():
                    torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, name)
            _sync(folder)
        else:
            with checksums(), files.open(unfinished, "wb") as file:
                torch.save(content, cast(BinaryIO, file))
            files.mv(unfinished, name)
    except BaseException:
        with suppress(Exception):
            files.rm(unfinished)
        raise


def _sync(folder: str) -> None:
    """Flush a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Parts:
    """The workers' parts of one checkpoint.

    Args:
        id: names them, whatever becomes of the main file's name.
        folder: where they were written.
    """

    id: str
    folder: str

    @classmethod
    def beside(cls, path: str) -> "Parts":
        """Return new parts for the checkpoint that will be ``path``."""
        return cls(uuid4().hex, os.path.join(_folder_of(path), _FOLDER))

    @classmethod
    def of(cls, checkpoint: dict[str, Any]) -> "Parts | None":
        """Return the parts that a checkpoint names, if it does."""
        entry = checkpoint.get(KEY)
        return cls(entry["id"], entry["folder"]) if isinstance(entry, dict) and "id" in entry else None

    @classmethod
    def of_file(cls, path: str) -> "Parts | None":
        """Return the parts that the checkpoint file ``path`` names, if there is such a file and it does."""
        files, name = url_to_fs(path)
        try:
            if isinstance(files, LocalFileSystem):
                return cls.of(torch.load(name, map_location="cpu", mmap=True, weights_only=True))
            with files.open(name, "rb") as file:
                return cls.of(torch.load(file, map_location="cpu", weights_only=True))
        except Exception:  # no file, or not one of ours
            return None

    def write(self, rank: int, part: dict[str, Any]) -> None:
        """Save one worker's part."""
        write(part | {"id": self.id}, os.path.join(self.folder, self.id, _name(rank)))

    def read(self, rank: int, main: str, weights_only: bool = True) -> dict[str, Any]:
        """Return one worker's part of the checkpoint whose main file is ``main``.

        Args:
            rank: the worker's.
            main: the path of the main file.
            weights_only: as in ``torch.load``.

        Raises:
            FileNotFoundError: if it is neither where it was written nor beside the main file.
            ValueError: if it is damaged.
        """
        for folder in dict.fromkeys((self.folder, os.path.join(_folder_of(main), _FOLDER))):
            path = os.path.join(folder, self.id, _name(rank))
            if _exists(path):
                part = load(path, weights_only=weights_only)
                assert part["id"] == self.id
                return part
        raise FileNotFoundError(
            f"The checkpoint {main} is incomplete: rank {rank}'s part {self.id}/{_name(rank)} is neither in "
            f'{self.folder} nor beside it. To go on from its consensus alone, take `checkpoint="consensus"`.'
        )

    def remove(self) -> None:
        """Remove the parts, as far as this host sees them."""
        files, name = url_to_fs(os.path.join(self.folder, self.id))
        try:
            files.rm(name, recursive=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            warnings.warn(f"The parts of a removed checkpoint in {name} could not be removed: {error}.", stacklevel=2)
        with suppress(OSError, NotImplementedError):  # the folder of all parts, if these were the last
            files.rmdir(os.path.dirname(name))

    def are_of_others(self, path: str) -> bool:
        """Whether a checkpoint beside ``path``, such as a copy of it, has the same parts, or may have them."""
        folder = Path(_folder_of(path))
        if not folder.is_dir():  # a remote one: nobody looks
            return False
        others = (file for file in folder.glob("*.ckpt") if not file.is_symlink() and file != Path(path).absolute())
        return any(_may_have(file, self) for file in others)


def _may_have(file: Path, parts: Parts) -> bool:
    try:
        return Parts.of(torch.load(file, map_location="cpu", mmap=True, weights_only=True)) == parts
    except FileNotFoundError:
        return False
    except Exception:  # something in it that is not plain
        return True


@dataclass(frozen=True)
class Save:
    """A checkpoint to be saved, as each rank asks for it.

    Args:
        path: where; the source's is taken.
        checkpoint: what; the source's is written. Its entry gets the id of the parts.
        options: Lightning's storage options.
        exact: whether each worker keeps its part.
        common: returns what else belongs into its entry; only the source is asked.
    """

    path: str
    checkpoint: dict[str, Any]
    options: Any
    exact: bool
    common: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Remove:
    """A checkpoint to be removed; the source's path is taken."""

    path: str


@dataclass(frozen=True)
class _Order:
    """What the source tells the others."""

    path: str
    saves: bool
    parts: Parts | None  # to be written
    stale: Parts | None  # to be removed


class Keeper:
    """Saves and removes checkpoints, all ranks together, of which the source handles the main file.

    Args:
        header: how the ranks hear of each other.
        first_of_host: whether this rank is the one that clears up on its host.
        part: gives this worker's part.
        rest: returns what this worker has had of its data.
    """

    def __init__(
        self,
        header: Header,
        first_of_host: bool,
        part: Callable[[], AbstractContextManager[dict[str, Any]]],
        rest: Callable[[], dict[str, Any]],
    ) -> None:
        self._header = header
        self._first_of_host = first_of_host
        self._part = part
        self._rest = rest
        self._written: dict[str, Parts | None] = {}  # main files that this process wrote

    def serve(self, source: int, wish: Save | Remove | None, io: CheckpointIO) -> None:
        """Do this rank's share of what rank ``source`` wants.

        Args:
            source: whose wish it is.
            wish: this rank's own, if it has the same one.
            io: reads and writes main files.

        Raises:
            Exception: on all ranks, if one of them could not do its share.
        """
        is_source = source == self._header.rank
        order: _Order = self._header.broadcast(self._order(wish) if is_source and wish is not None else None, source)
        sees_it = is_source or _exists(order.path)
        if order.saves:
            rest = Rest.together(self._header.gather(self._rest()), source)
            if (parts := order.parts) is not None:
                try:
                    self._try(partial(self._write_part, parts))
                except Exception:
                    if self._first_of_host:
                        parts.remove()  # they will have no main file
                    raise
            self._try(lambda: self._write(order, wish, rest, io) if is_source else None)
            if not is_source:
                self._written.pop(order.path, None)
        else:
            self._header.gather(sees_it)  # all have looked
            self._try(lambda: after_saves(io, lambda: self._remove(order, io)) if is_source else None)
            if not is_source and self._written.pop(order.path, order) is not order and _exists(order.path):
                io.remove_checkpoint(order.path)  # on this rank's own disk
        if order.stale is not None and self._first_of_host and not sees_it:
            order.stale.remove()

    def _order(self, wish: Save | Remove) -> _Order:
        stale = self._written[wish.path] if wish.path in self._written else Parts.of_file(wish.path)
        if stale is not None and stale.are_of_others(wish.path):
            stale = None
        if isinstance(wish, Remove):
            return _Order(wish.path, False, None, stale)
        return _Order(wish.path, True, Parts.beside(wish.path) if wish.exact else None, stale)

    def _try(self, act: Callable[[], None]) -> None:
        error = None
        try:
            act()
        except Exception as this:
            error = failed(f"Rank {self._header.rank}", "saves or removes a checkpoint", this)
        self._header.agree(error)

    def _write_part(self, parts: Parts) -> None:
        with self._part() as part:
            parts.write(self._header.rank, part)

    def _write(self, order: _Order, wish: Save | Remove | None, rest: dict[str, Any], io: CheckpointIO) -> None:
        assert isinstance(wish, Save)
        wish.checkpoint[KEY] |= wish.common() | {"rest": rest}
        if order.parts is not None:
            wish.checkpoint[KEY] |= {"id": order.parts.id, "folder": order.parts.folder}
        io.save_checkpoint(wish.checkpoint, wish.path, storage_options=wish.options)
        self._written[order.path] = order.parts
        if self._header.rank > 0:
            warnings.warn(
                f"Rank {self._header.rank} has written {order.path}, because rank 0 was elsewhere.", stacklevel=2
            )
        if order.stale is not None:
            after_saves(io, order.stale.remove)

    def _remove(self, order: _Order, io: CheckpointIO) -> None:
        io.remove_checkpoint(order.path)  # first: without its main file a part is nothing
        self._written.pop(order.path, None)
        if order.stale is not None:
            order.stale.remove()


def failed(rank: str, doing: str, error: Exception) -> Exception:
    """Return an error that says who failed, where and in what; of one of the system its own words, not torch's."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    why = cause or error
    told = RuntimeError(f"{rank} on host {gethostname()}, which {doing}, cannot: {type(why).__name__}: {why}")
    told.__cause__ = error
    return told


def _exists(path: str) -> bool:
    files, name = url_to_fs(path)
    return bool(files.exists(name))


def one_workers_path(path: str, rank: int) -> str:
    """Return the name under which a worker that raises saves its own replica, instead of under ``path``."""
    stem, extension = os.path.splitext(path)
    return f"{stem}-rank{rank}{extension}"


def refuse_one_worker(checkpoint: dict[str, Any], path: str) -> None:
    """Refuse a checkpoint of one worker's replica.

    Raises:
        ValueError: if it is one, and says how to take it all the same.
    """
    entry = checkpoint.get(KEY)
    if isinstance(entry, dict) and "one_worker" in entry:
        raise ValueError(
            f"A checkpoint to go on from must hold the consensus of all workers, and {path} holds the replica of rank "
            f"{entry['one_worker']} alone, which saved it when it raised; "
            "`lightning_localsgd.adopt_replica(path, new_path)` makes it the consensus."
        )


def adopt_replica(path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
    """Take the replica that one worker saved when it raised as the consensus to go on from.

    Args:
        path: a checkpoint that an exception left, such as ``on_exception-rank1.ckpt``; is left as it is.
        new_path: the checkpoint to write.

    Raises:
        ValueError: if ``path`` is no checkpoint of one worker's replica.

    Example:
        ``adopt_replica("on_exception-rank1.ckpt", "go_on.ckpt")``, then ``trainer.fit(model, ckpt_path="go_on.ckpt")``.
    """
    checkpoint = load(os.fspath(path), weights_only=True)
    if "one_worker" not in checkpoint.get(KEY, {}):
        raise ValueError(f"`path` must be a checkpoint of one worker's replica, got {os.fspath(path)!r}.")
    del checkpoint[KEY]["one_worker"]
    write(checkpoint, os.fspath(new_path))


def _folder_of(path: str) -> str:
    return os.path.dirname(path if "://" in path else os.path.abspath(path))


def _name(rank: int) -> str:
    return f"{rank:05d}.pt"
