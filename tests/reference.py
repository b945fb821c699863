"""Every algorithm a second time, serially, for N workers in one process, in the paper's notation."""

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn


def pr_sgd(
    x: nn.Module,
    N: int,
    I: int,  # noqa: E741 - the paper's name
    T: int,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    F: Callable[[nn.Module, int, int], Tensor],
) -> Iterator[list[nn.Module]]:
    """Algorithm 1 of Yu, Yang, Zhu (2019), in the order "step, then average".

    Args:
        x: the common first model.
        N: number of workers.
        I: number of steps between averages.
        T: number of steps.
        optimizer: makes a local optimizer for a model.
        F: the loss of worker i's model on its batch of step t, as ``F(x_i, i, t)``.

    Yields:
        The models of all workers after each step.
    """
    xs = [deepcopy(x) for _ in range(N)]
    steps = [optimizer(x_i) for x_i in xs]
    for t in range(1, T + 1):
        for i in range(N):

            def closure(i: int = i, t: int = t) -> Tensor:
                steps[i].zero_grad()
                loss = F(xs[i], i, t)
                loss.backward()
                return loss

            steps[i].step(closure)
        if t % I == 0 or t == T:
            average(xs)
        yield xs


@torch.no_grad()
def average(xs: list[nn.Module]) -> None:
    """x_i <- 1/N sum_j x_j for parameters and floating buffers; integer buffers take the maximum."""
    for tensors in zip(*(x.state_dict().values() for x in xs), strict=True):
        together = torch.stack([tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors])
        mean = together.mean(0) if tensors[0].is_floating_point() else together.max(0).values
        for tensor in tensors:
            tensor.copy_(mean)
