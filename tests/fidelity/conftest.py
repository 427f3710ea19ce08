"""A world small enough to enumerate: every completion of a prompt, its probability, its reward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from rlhf_nb.maths import kl

END = 0


@dataclass(frozen=True)
class World:
    """Completions of at most T tokens over V, of which token 0 ends one; or of exactly T, where none does. Rewards are
    drawn once from [0, 1]."""

    V: int = 5
    T: int = 3
    prompts: int = 2
    seed: int = 0
    ends: bool = True

    @cache  # noqa: B019
    def completions(self) -> tuple[Tensor, Tensor, Tensor]:
        """(N, T) tokens, (N, T) mask, (N,) ended: every completion once."""
        done, open_ = [], [[]]
        for _ in range(self.T):
            longer = [[*c, v] for c in open_ for v in range(self.V)]
            done += [c for c in longer if self.ends and c[-1] == END]
            open_ = [c for c in longer if not self.ends or c[-1] != END]
        done += open_
        tokens = torch.tensor([c + [END] * (self.T - len(c)) for c in done])
        mask = torch.tensor([[True] * len(c) + [False] * (self.T - len(c)) for c in done])
        return tokens, mask, torch.tensor([self.ends and c[-1] == END for c in done])

    def rewards(self) -> Tensor:
        """(P, N) in [0, 1]."""
        n = len(self.completions()[0])
        return torch.rand(self.prompts, n, generator=self.generator(), dtype=torch.float64)

    def reference_logits(self) -> Tensor:
        """(P, states, V) of a random policy. A state is the path of tokens so far; see `states`."""
        count = sum(self.V**t for t in range(self.T))
        return torch.randn(self.prompts, count, self.V, generator=self.generator(1), dtype=torch.float64)

    @cache  # noqa: B019
    def states(self) -> Tensor:
        """(N, T) number of the state in which each token of each completion is taken."""
        tokens, _, _ = self.completions()
        first = torch.tensor([sum(self.V**s for s in range(t)) for t in range(self.T)])
        path = torch.zeros_like(tokens)
        for t in range(1, self.T):
            path[:, t] = path[:, t - 1] * self.V + tokens[:, t - 1]
        return path + first

    def token_logprobs(self, logits_PSV: Tensor) -> Tensor:
        """(P, N, T) log-probability of each token of each completion, 0 where none is."""
        tokens, mask, _ = self.completions()
        logprobs = logits_PSV.log_softmax(-1)[:, self.states()]
        chosen = logprobs.gather(-1, tokens.expand(self.prompts, -1, -1).unsqueeze(-1)).squeeze(-1)
        return chosen.masked_fill(~mask, 0.0)

    def generator(self, stream: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + stream)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def make_world() -> type[World]:
    return World


@pytest.fixture
def shortfall() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(P,) of log π, log π_ref and rewards, each (P, N): the reward that π lacks to what its KL could buy, as a share
    of what that buys over the reference. The frontier is π_ref·exp(r/β′) over all β′."""

    def of_one(policy: Tensor, reference: Tensor, rewards: Tensor) -> Tensor:
        spent, low, high = kl.exact(policy, reference), 1e-3, 1e3
        for _ in range(60):
            beta = (low * high) ** 0.5
            best = kl.gibbs(reference, rewards, beta)
            low, high = (beta, high) if kl.exact(best, reference) > spent else (low, beta)
        start, earned, most = ((logprobs.exp() * rewards).sum() for logprobs in (reference, policy, best))
        return (most - earned) / (most - start)

    return lambda *each_PN: torch.stack([of_one(*row) for row in zip(*each_PN, strict=True)])
