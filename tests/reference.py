"""Every algorithm a second time, serially, for N workers in one process, in the paper's notation."""

from collections.abc import Callable, Collection, Iterable, Iterator
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


Restart = Callable[[list[nn.Module], list[float]], None]


def restarted_sgd(
    x: nn.Module,
    N: int,
    ends: Collection[int],
    T: int,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    F: Callable[[nn.Module, int, int], Tensor],
    begin: Callable[[nn.Module], Restart],
    *,
    gamma: Callable[[int], float],
    warmup: int = 0,
    state: str = "keep",
    delay: int = 0,
) -> Iterator[list[nn.Module]]:
    """Rounds of local steps, each of which ends with a restart: the grid of which all algorithms are points.

    Args:
        x, N, T, optimizer, F: as for :func:`pr_sgd`.
        ends: the steps after which rounds end.
        begin: given the model from which the first round starts, returns what makes the next start: called with the
            models at the end of a round and the learning rates of its steps.
        gamma: the learning rate of step t, from 1.
        warmup: steps before the first round, in which gradients are averaged.
        state: what becomes of the optimizers' states at the end of a round.
        delay: steps from there to the restart, in which all go on from where they are.

    Yields:
        The models of all workers after each step.
    """
    xs = [deepcopy(x) for _ in range(N)]
    steps = [optimizer(x_i) for x_i in xs]
    restart, gammas = begin(x), []
    aloft: tuple[int, list[nn.Module], list[float]] | None = None  # until step, from, learning rates
    for t in range(1, T + 1):
        for i in range(N):
            steps[i].param_groups[0]["lr"] = gamma(t)
            steps[i].zero_grad()
            F(xs[i], i, t).backward()
        if t <= warmup:
            average_gradients(xs)
        for step in steps:
            step.step()
        gammas.append(gamma(t))
        if aloft is not None and (t == aloft[0] or t in ends or t == T):
            land(xs, aloft[1], aloft[2], restart)
            average_or_reset(steps, state)
            aloft = None
        if t == warmup:
            restart, gammas = begin(xs[0]), []
        elif t > warmup and t in ends and t < T and delay:
            aloft, gammas = (t + delay, [deepcopy(x_i) for x_i in xs], gammas), []
        elif t > warmup and (t in ends or t == T) and gammas:
            restart(xs, gammas)
            average_or_reset(steps, state)
            gammas = []
        yield xs


@torch.no_grad()
def land(xs: list[nn.Module], s: list[nn.Module], gammas: list[float], restart: Restart) -> None:
    """CoCoD-SGD: x_i <- a' + (x_i - s_i), a' being the mean of s or an outer step; floating buffers take the mean."""
    starts = [deepcopy(s_i) for s_i in s]
    restart(starts, gammas)
    for x_i, s_i, a in zip(xs, s, starts, strict=True):
        for x, own, start in zip(x_i.parameters(), s_i.parameters(), a.parameters(), strict=True):
            x.copy_(start + (x - own))
        for x, own, start in zip(x_i.buffers(), s_i.buffers(), a.buffers(), strict=True):
            x.copy_(start if x.is_floating_point() else start + (x - own))


def heterogeneous(
    x: nn.Module,
    N: int,
    I: list[list[int]],  # noqa: E741
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    F: Callable[[nn.Module, int, int], Tensor],
    begin: Callable[[nn.Module], Restart],
    *,
    gamma: Callable[[int], float],
    weigh: str = "uniform",
    state: str = "keep",
) -> Iterator[list[nn.Module]]:
    """Algorithm 3 of Yu, Yang, Zhu (2019): in round s worker i takes I_i^s steps, and all meet.

    Args:
        x, N, optimizer, begin, state: as for :func:`restarted_sgd`.
        I: the steps of each worker in each round; who takes none does not count in its average.
        F: the loss of worker i's model on its k-th batch, from 0, as ``F(x_i, i, k)``.
        gamma: the learning rate of step t, from 1, counted by the fastest worker.
        weigh: the average's weights.

    Yields:
        The models of all workers after each round.
    """
    xs = [deepcopy(x) for _ in range(N)]
    steps = [optimizer(x_i) for x_i in xs]
    restart, t, had = begin(x), 0, [0] * N
    for I_s in I:
        anchor = deepcopy(xs[0])
        for i in range(N):
            for k in range(1, I_s[i] + 1):
                steps[i].param_groups[0]["lr"] = gamma(t + k)
                steps[i].zero_grad()
                F(xs[i], i, had[i]).backward()
                steps[i].step()
                had[i] += 1
        counted = [i for i in range(N) if I_s[i]]
        mean = sum(I_s) / len(counted)
        for i in counted:
            factor = {"uniform": 1.0, "steps": I_s[i] / mean, "fednova": mean / I_s[i]}[weigh]
            for own, start in zip(xs[i].parameters(), anchor.parameters(), strict=True):
                own.data = start.data + factor * (own.data - start.data)
        restart([xs[i] for i in counted], [])
        for i in set(range(N)) - set(counted):
            xs[i].load_state_dict(xs[counted[0]].state_dict())
        average_or_reset([steps[i] for i in counted], state)
        t += max(I_s)
        yield xs


def plain(x: nn.Module) -> Restart:
    """The paper's own: every worker restarts from the mean."""
    return lambda xs, _: average(xs)


class OuterOptimizer:
    """DiLoCo and its kin: theta <- OuterOpt(theta, theta - 1/N sum_i theta_i)."""

    def __init__(self, theta: nn.Module, outer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]) -> None:
        self.theta = deepcopy(theta)
        self.outer = outer(self.theta.parameters())

    def __call__(self, xs: list[nn.Module], gammas: list[float]) -> None:
        average(xs)
        for theta, mean in zip(self.theta.parameters(), xs[0].parameters(), strict=True):
            theta.grad = theta.detach() - mean.detach()
        self.outer.step()
        copy_to_all(self.theta, xs)


class SlowMomentum:
    """SlowMo: u <- beta u + (x_0 - x_tau) / gamma; x_0 <- x_0 - alpha gamma u."""

    def __init__(self, x0: nn.Module, alpha: float, beta: float) -> None:
        self.x0, self.alpha, self.beta = deepcopy(x0), alpha, beta
        self.u = [torch.zeros_like(p) for p in x0.parameters()]

    @torch.no_grad()
    def __call__(self, xs: list[nn.Module], gammas: list[float]) -> None:
        average(xs)
        gamma = sum(gammas) / len(gammas)
        for x0, x_tau, u in zip(self.x0.parameters(), xs[0].parameters(), self.u, strict=True):
            u.mul_(self.beta).add_((x0 - x_tau) / gamma if gamma else 0)
            x0.copy_(x0 - self.alpha * gamma * u if gamma else x_tau)
        copy_to_all(self.x0, xs)


@torch.no_grad()
def copy_to_all(x: nn.Module, xs: list[nn.Module]) -> None:
    """x_i <- x for the parameters."""
    for x_i in xs:
        for own, start in zip(x_i.parameters(), x.parameters(), strict=True):
            own.copy_(start)


def average_gradients(xs: list[nn.Module]) -> None:
    """g_i <- 1/N sum_j g_j, as DDP does."""
    for gradients in zip(*([p.grad for p in x_i.parameters()] for x_i in xs), strict=True):
        mean = torch.stack(gradients).mean(0)
        for gradient in gradients:
            gradient.copy_(mean)


def average_or_reset(steps: list[torch.optim.Optimizer], state: str) -> None:
    """u_i <- 1/N sum_j u_j for each tensor of a parameter's shape; or u_i <- nothing; or u_i <- u_i."""
    if state == "reset":
        for step in steps:
            step.state.clear()
    if state == "average":
        for parameters in zip(*(step.param_groups[0]["params"] for step in steps), strict=True):
            states = [step.state[p] for step, p in zip(steps, parameters, strict=True)]
            for key in [key for key, value in states[0].items() if value.shape == parameters[0].shape]:
                mean = torch.stack([state[key] for state in states]).mean(0)
                for of_worker in states:
                    of_worker[key].copy_(mean)
