"""WHERE in the data and in the random numbers a worker is, to go on from exactly there.

A map-style loader is left and found again by its indices: its index sampler is wrapped so that the random states are
known at which the current pass over the data was made and begun. To go on, the pass is made and begun at the same
states, so that it has the same order, and its first indices are dropped without loading what they stand for.
"""

import io
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

# What loaders, samplers and datasets, torch's and Lightning's, hold the others as.
_PARTS = {"batch_sampler", "sampler", "_sampler", "dataset", "datasets", "transform", "transforms", "target_transform"}

State = dict[str, Any]  # of tensors, numbers, strings, lists and dicts: loads with `weights_only=True`


def random_state(device: torch.device | None = None, generators: Sequence[Any] = ()) -> State:
    """Return the states of torch's, NumPy's and Python's generators, and of these other ones.

    Args:
        device: also the generator of this device, if it is a CUDA device.
        generators: torch's, NumPy's or Python's generator objects.
    """
    state: State = {
        "torch": torch.get_rng_state(),
        "numpy": _numpy_to(np.random.get_state(legacy=True)),
        "python": _python_to(random.getstate()),
        "others": [_get(generator) for generator in generators],
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: State, device: torch.device | None = None, generators: Sequence[Any] = ()) -> None:
    """Set what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(_numpy_from(state["numpy"]))
    random.setstate(_python_from(state["python"]))
    for generator, value in zip(generators, state["others"], strict=True):
        _set(generator, value)
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def generators_of(owner: Any) -> list[Any]:
    """Return the generator objects that a loader or a dataset holds, also in what it is made of."""
    found: dict[int, Any] = {}
    seen: set[int] = set()

    def look(owner: Any) -> None:
        if id(owner) in seen:
            return
        seen.add(id(owner))
        for name, value in list(getattr(owner, "__dict__", {}).items()):
            if isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
                found.setdefault(id(value), value)
            elif name in _PARTS:
                for part in value if isinstance(value, list | tuple) else [value]:
                    look(part)

    look(owner)
    return list(found.values())


class IndexSampler:
    """A loader's index sampler, whose current pass can be found again.

    Args:
        sampler: the loader's own; whatever else is asked for is its.
        generators: what it, or the loader, may draw from beside the global generators.
        twice: whether the loader makes two passes at once and begins the second, as one with processes does.
    """

    def __init__(self, sampler: Any, generators: Sequence[Any], twice: bool) -> None:
        self._sampler = sampler
        self._generators = generators
        self._twice = twice
        self._made: State | None = None  # the random state at which the current pass was made ...
        self._begun: State | None = None  # ... and at which its first index was asked for
        self._replays = False
        self.skipped = 0  # indices of the current pass that were dropped
        self._pass: _Pass | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_sampler":
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> "_Pass":
        first = self._pass is None or not self._twice
        if self._replays:
            if first:
                assert self._made is not None
                set_random_state(self._made, generators=self._generators)
        elif first or self._begun is not None:
            self._made, self._begun, self.skipped = random_state(generators=self._generators), None, 0
        self._pass = _Pass(self, iter(self._sampler))
        return self._pass

    def begin(self, indices: Iterator[Any]) -> None:
        """Called before the first index of a pass is taken."""
        if not self._replays:
            self._begun = random_state(generators=self._generators)
            return
        self._replays = False
        if self._begun is not None:
            set_random_state(self._begun, generators=self._generators)
            for _ in range(self.skipped):
                next(indices, None)

    def state(self, taken: int) -> State:
        """Return where the current pass is, ``taken`` of whose indices have been used."""
        return {"made": self._made, "begun": self._begun, "skip": self.skipped + taken}

    def go_on_from(self, state: State) -> None:
        """Make the next pass the one that ``state`` tells of."""
        self._made, self._begun, self.skipped = state["made"], state["begun"], state["skip"]
        self._replays, self._pass = True, None

    def settle(self) -> None:
        """Begin the pass that goes on, if nobody has yet."""
        if self._replays and self._pass is not None:
            self._pass.begin()


class _Pass:
    """One pass over the indices."""

    def __init__(self, owner: IndexSampler, indices: Iterator[Any]) -> None:
        self._owner, self._indices, self._begun = owner, indices, False

    def begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._owner.begin(self._indices)

    def __iter__(self) -> "_Pass":
        return self

    def __next__(self) -> Any:
        self.begin()
        return next(self._indices)


class Follower:
    """Follows one loader, so that its place can be kept.

    Args:
        loader: any iterable that Lightning trains on.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._generators = generators_of(loader)
        self.keeps_its_own = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._indices: IndexSampler | None = None
        self._watch: _Watch | None = None
        map_style = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        if map_style and not self.keeps_its_own:
            self._name = "sampler" if loader.batch_sampler is None else "batch_sampler"
            self._indices = IndexSampler(getattr(loader, self._name), self._generators, loader.num_workers > 0)
            vars(loader)[self._name] = self._indices  # `DataLoader.__setattr__` would refuse

    def leave(self) -> None:
        """Give the loader its own index sampler back."""
        if self._indices is not None:
            vars(self._loader)[self._name] = self._indices._sampler
            self._indices = None
        self.stop_watching()

    @property
    def why_not(self) -> str | None:
        """Why the place in the middle of a pass cannot be kept, or None if it can."""
        if self._indices is not None or self.keeps_its_own:
            return None
        return (
            f"the place of a `{type(self._loader).__name__}` over an iterable dataset cannot be found again without "
            "`state_dict` and `load_state_dict` of its own, as torchdata's `StatefulDataLoader` has them"
        )

    def state(self, iterator: Any, redo: int) -> State:
        """Return where the loader is.

        Args:
            iterator: its current iterator, if it has one.
            redo: how many of the batches that it gave are to be given again.
        """
        state: State = {"random": [_get(generator) for generator in self._generators]}
        taken = getattr(iterator, "_num_yielded", None)  # torch's own count
        if self._indices is not None and taken is not None:
            state["indices"] = self._indices.state(max(0, taken - redo))
        return state

    def go_on_from(self, state: State) -> None:
        """Make the loader's next iterator go on where it was."""
        if self._indices is not None and "indices" in state:
            self._indices.go_on_from(state["indices"])

    def watch(self, anew: bool) -> None:
        """Look whether the loader's processes draw random numbers, whose states they would have had before the stop.

        Args:
            anew: whether a pass begins, for which processes that do not persist start afresh anyway.
        """
        if self._indices is None or self._loader.num_workers == 0 or self._watch is not None:
            return
        if self._loader.persistent_workers if anew else self._indices.skipped:
            self._watch = _Watch(self._loader)

    def settle(self, state: State) -> None:
        """After the iterator has been made: put the loader's generators where they were."""
        if self._indices is not None:
            self._indices.settle()
        if len(state["random"]) == len(self._generators):
            for generator, value in zip(self._generators, state["random"], strict=True):
                _set(generator, value)

    def drew_in_processes(self) -> bool:
        """Whether the loader's processes were seen to draw random numbers since the place was found again."""
        return self._watch is not None and self._watch.seen

    def stop_watching(self) -> None:
        """Stop looking at the loader's processes."""
        if self._watch is not None:
            self._watch.leave()
            self._watch = None


class _Watch:
    """Sees whether a loader's processes draw random numbers for a batch.

    Their states are not kept, so after a resume they draw other numbers than without it.
    """

    def __init__(self, loader: Any) -> None:
        self._loader, self._own = loader, (loader.worker_init_fn, loader.collate_fn)
        flag: Tensor = torch.zeros(1, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        loader.collate_fn = _Collate(loader.collate_fn, flag)
        loader.worker_init_fn = _Init(loader.worker_init_fn)
        self._flag = flag

    @property
    def seen(self) -> bool:
        return bool(self._flag.item())

    def leave(self) -> None:
        self._loader.worker_init_fn, self._loader.collate_fn = self._own


class _Init:
    """A ``worker_init_fn`` that notes the random state with which a process starts."""

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self._init = init

    def __call__(self, worker: int) -> None:
        if self._init is not None:
            self._init(worker)
        _Collate.before = _Collate.now()


class _Collate:
    """A ``collate_fn`` that looks once whether random numbers were drawn since the process started."""

    before: State | None = None  # in a loader's process

    @staticmethod
    def now() -> State:
        info = get_worker_info()
        return random_state(generators=generators_of(info.dataset) if info is not None else ())

    def __init__(self, collate: Callable[[Any], Any], flag: Tensor) -> None:
        self._collate, self._flag = collate, flag

    def __call__(self, samples: Any) -> Any:
        if _Collate.before is not None:
            if not _equal(_Collate.before, _Collate.now()):
                self._flag.fill_(1)
            _Collate.before = None
        return self._collate(samples)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def _get(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return _python_to(generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return _numpy_to(generator.get_state(legacy=True))
    return _plain(generator.bit_generator.state)


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(_python_from(state))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_numpy_from(state))
    else:
        generator.bit_generator.state = state


def _numpy_to(state: Any) -> State:
    name, keys, position, has_gauss, gauss = state
    return {
        "name": name,
        "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "rest": [int(position), int(has_gauss), float(gauss)],
    }


def _numpy_from(state: State) -> Any:
    position, has_gauss, gauss = state["rest"]
    return state["name"], state["keys"].numpy().astype(np.uint32), position, has_gauss, gauss


def _python_to(state: Any) -> State:
    version, numbers, gauss = state
    return {"version": version, "numbers": torch.tensor(numbers, dtype=torch.int64), "gauss": gauss}


def _python_from(state: State) -> Any:
    return state["version"], tuple(state["numbers"].tolist()), state["gauss"]


def _plain(value: Any) -> Any:
    """Return the state of a NumPy bit generator with lists of ints in place of arrays."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value if isinstance(value, str) else int(value)


def is_plain(value: Any) -> bool:
    """Return whether ``torch.load(..., weights_only=True)`` gives this value back."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:
        return False
    return True
