"""Small modules and data for the tests, deterministic in (seed, rank, batch)."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_localsgd import LocalSGDStrategy

Batch = tuple[Tensor, Tensor]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class Batches(IterableDataset[Batch]):
    """``lengths[rank]`` batches of its own for each rank; no length that Lightning could see."""

    def __init__(self, lengths: list[int], size: int = 4, dtype: torch.dtype = torch.float32) -> None:
        self.lengths, self.size, self.dtype = lengths, size, dtype

    def __iter__(self) -> Iterator[Batch]:
        for index in range(self.lengths[rank()]):
            yield batch(rank(), index, self.size, self.dtype)


def batch(worker: int, index: int, size: int = 4, dtype: torch.dtype = torch.float32) -> Batch:
    """Return the same numbers in every process."""
    generator = torch.Generator().manual_seed(1000 * worker + index)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.sin(3 * x.sum(1, keepdim=True)).to(dtype)


def loader(lengths: list[int], **options: Any) -> DataLoader[Batch]:
    return DataLoader(Batches(lengths, **options), batch_size=None)


def network(seed: int = 0, norm: bool = False, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return a small smooth network; smooth, so that rounding does not grow."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        middle: list[nn.Module] = [nn.BatchNorm1d(8)] if norm else []
        return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.1)
    if name == "momentum":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    if name == "lbfgs":
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=4)
    raise AssertionError(name)


class Regression(LightningModule):
    """The network above, trained on squared error; each rank starts from a model of its own."""

    def __init__(self, optimizer: str = "sgd", norm: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net = network(seed=rank(), norm=norm, dtype=dtype)
        self.name, self.norm = optimizer, norm

    def setup(self, stage: str) -> None:
        with torch.no_grad():  # also under `spawn`, where the constructor ran before the ranks were known
            for own, other in zip(self.net.parameters(), network(rank(), self.norm).parameters(), strict=True):
                own.copy_(other)

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return ((self.net(x) - y) ** 2).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return optimizer(self.name, self.parameters())


class Constant(LightningModule):
    """One weight, whose gradient is rank + 1: with learning rate 1 every trajectory is known on paper."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (rank() + 1) * self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Trajectory(Callback):
    """Keeps the module's values after every step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.states.append(state_of(pl_module))

    def column(self, name: str) -> list[float]:
        return [state[name].item() for state in self.states]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def trainer(workers: int, strategy: Any = 4, **options: Any) -> Trainer:
    """Return a quiet trainer; an int as ``strategy`` is the period."""
    if isinstance(strategy, int):
        strategy = LocalSGDStrategy(period=strategy)
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "use_distributed_sampler": False,
    }
    return Trainer(devices=workers, strategy=strategy, **(quiet | options))


def same(states: list[dict[str, Tensor]]) -> bool:
    """Whether all these states are equal, bit for bit."""
    return all(torch.equal(first_value, other[name]) for other in states[1:] for name, first_value in states[0].items())
