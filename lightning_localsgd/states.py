"""WHAT BECOMES of the local optimizers' states at the end of a round: each keeps its own, or the mean, or none."""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from lightning_localsgd.header import Decision, Header
from lightning_localsgd.links import Links
from lightning_localsgd.mean import Mean, bytes_of_element
from lightning_localsgd.moments import AverageState, average_states, averaged, mean_state
from lightning_localsgd.optimizers import Optimizers

OptimizerState = Literal["keep", "reset"] | AverageState


class States:
    """The states of one worker's optimizers.

    Args:
        rule: what becomes of them.
        optimizers: whose they are.
        mean: how tensors are averaged.
        header: how the ranks hear of each other.
        links: between the workers.
        device: where tensors must be to travel.
    """

    def __init__(
        self,
        rule: OptimizerState,
        optimizers: Optimizers,
        mean: Mean,
        header: Header,
        links: Links,
        device: torch.device,
    ) -> None:
        self._rule = rule
        self._optimizers = optimizers
        self._mean = mean
        self._header = header
        self._links = links
        self._device = device
        self._found: set[str] = set()  # what the rule is about, as all know

    def end_round(self, decision: Decision, round_: int) -> None:
        """Average what the rule names, all workers at once.

        Args:
            decision: to end the round.
            round_: its number.

        Raises:
            ValueError: on all ranks, if no optimizer that has stepped keeps what the rule is about.
        """
        rule, optimizers = self._rule, self._optimizers.all()
        if rule == "reset":  # where the next round starts
            self._require(any(optimizer.state for optimizer in optimizers), "a state to reset")
        elif isinstance(rule, AverageState):
            due = rule.due(round_ + 1)
            if due is not None and not due:
                return
            with torch.profiler.record_function("localsgd::optimizer_state"):
                found = average_states(
                    optimizers, self._mean, self._header, self._links, decision.weights, due, self._device
                )
            names = "moments" if due is None else " or ".join(f"`{key}`" for key in sorted(due))
            self._require(found, f"{names} to average")

    def _require(self, found: bool, what: str) -> None:
        """See once that there is what the rule is about, as soon as any optimizer has stepped."""
        if what in self._found:
            return
        told = self._header.gather((found, self._optimizers.have_stepped))
        if any(found for found, _ in told):
            self._found.add(what)
        elif any(stepped for _, stepped in told):
            raise ValueError(f'`optimizer_state` must be "keep" where no optimizer keeps {what}.')

    def start_round(self, left_out: bool) -> None:
        """Reset them, if the rule says so, or if this worker was ``left_out`` of the mean that it starts from."""
        if self._rule == "reset":
            self._optimizers.reset()
        if left_out:
            self._optimizers.reset(gradients=True)

    def payload(self, round_: int) -> int:
        """Return how many bytes are averaged at the end of this round."""
        due = self._rule.due(round_ + 1) if isinstance(self._rule, AverageState) else set()
        if due is not None and not due:
            return 0
        moments = averaged(self._optimizers.all(), due)
        return sum(moment.numel() * bytes_of_element(moment) for moment in moments)

    def mean(self, state: Mapping[str, Any], reader: int) -> dict[str, Any]:
        """Return one optimizer's state dict with the mean of its moments, for rank ``reader``; all workers at once."""
        return mean_state(dict(state), self._mean, self._header, self._links, reader=reader, device=self._device)
