"""He et al.'s recipe for CIFAR-10 in PyTorch, with the engines' interface."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import torch_oracle
from experiment.engines import Batch
from tests.helpers.comparing import nchw


class Oracle:
    """torch.optim.SGD; the rate is divided by ten at each milestone. The state is the number of steps taken.

    Args:
        network: in the precision to compute in.
        mean, std: per channel, as the engines normalise.
        milestones: in steps.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        milestones: Sequence[int] = (32000, 48000),
    ) -> None:
        self.network, self._milestones = network.train(), milestones
        self._mean, self._std = np.array(mean), np.array(std)
        self._dtype = next(network.parameters()).dtype
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def _normalised(self, image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(nchw((image / 255 - self._mean) / self._std)).to(self._dtype)

    def train(self, state: int, batches: Iterable[Batch]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Take a step for each batch, as in any PyTorch tutorial."""
        for step, batch in enumerate(batches, start=state):
            self.optimizer.param_groups[0]["lr"] = 0.1 * 0.1 ** bisect_right(self._milestones, step)
            logits = self.network(self._normalised(batch["image"]))
            loss = F.cross_entropy(logits, torch.from_numpy(batch["label"]).long())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield step + 1, {"loss": loss.item(), "logits": logits.detach().numpy(), "label": batch["label"]}

    def evaluate(self, state: int, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
        """Yield the logits of each batch, with the running statistics."""
        self.network.eval()
        for batch in batches:
            with torch.no_grad():
                yield self.network(self._normalised(batch["image"])).numpy()
        self.network.train()

    def to_tree(self, state: int) -> dict[str, Any]:
        """Where PyTorch stands, as a checkpoint tree."""
        arrays = torch_oracle.state_dict(self.network)
        parameters = dict(self.network.named_parameters())
        trace = {
            name: self.optimizer.state[p]["momentum_buffer"].numpy().copy() if state else arrays[name] * 0
            for name, p in parameters.items()
        }
        return {
            "params": {name: arrays[name] for name in parameters},
            "batch_stats": {name: array for name, array in arrays.items() if name not in parameters},
            "optimizer": {"trace": trace},
            "step": np.array(state, np.int32),
        }

    def from_tree(self, tree: dict[str, Any]) -> int:
        """The inverse of `to_tree`."""
        torch_oracle.load_state_dict(self.network, {**tree["params"], **tree["batch_stats"]})
        for name, p in self.network.named_parameters():
            momentum = torch.from_numpy(tree["optimizer"]["trace"][name].copy())
            self.optimizer.state[p]["momentum_buffer"] = momentum.to(self._dtype)
        return int(tree["step"])
