"""The policy network: one set of weights for every module, so that any number of modules fits.

Each module's features and the run's features become a token; mean and maximum over the modules give the context; a
head per module adds a correction to the rule's score, and a head on the context corrects the rank floor. Both
corrections start at zero: an untrained network *is* the rule (fracrule's placement, heur3's reallocation).
"""

from __future__ import annotations

import torch
from torch import nn

from ..env.observation import MODULE_FEATURES, RUN_FEATURES
from ..env.spaces import SCORE_BOUND
from ..lora.signals import SIGNALS
from .config import NetworkConfig


class RankNetwork(nn.Module):
    """Scores for every module, a correction of the rank floor, and a value.

    Args:
        config: its size and start.
    """

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config or NetworkConfig()
        width = self.config.width
        self.module_encoder = nn.Sequential(
            nn.Linear(len(MODULE_FEATURES), width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )
        self.context_encoder = nn.Sequential(nn.Linear(2 * width + len(RUN_FEATURES), width), nn.Tanh())
        self.score_head = nn.Sequential(nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, 1, bias=False))
        self.floor_head = nn.Linear(width, 1)
        self.value_head = nn.Linear(width, 1)
        self.signal_gain = nn.Parameter(torch.tensor(float(self.config.signal_gain)))
        stds = torch.tensor([self.config.score_std, self.config.floor_std])
        self.log_std = nn.Parameter(stds.log())
        for head in (self.score_head[-1], self.floor_head, self.value_head):
            for parameter in head.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self, modules: torch.Tensor, run: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and log standard deviation of the action, and the value.

        Args:
            modules: (batch, modules, len(MODULE_FEATURES)).
            run: (batch, len(RUN_FEATURES)).
            mask: (batch, modules), 1 for modules that exist.

        Returns:
            Mean (batch, modules + 1), zero for padding, the floor's correction last; log standard deviation of the
            same shape; value (batch,).
        """
        exists = mask.unsqueeze(-1).to(modules.dtype)
        tokens = self.module_encoder(modules)
        mean = (tokens * exists).sum(1) / exists.sum(1).clamp_min(1)
        top = tokens.masked_fill(exists == 0, -1.0).amax(1)  # tanh is never below -1
        context = self.context_encoder(torch.cat([mean, top, run], dim=-1))
        spread = context.unsqueeze(1).expand(-1, tokens.shape[1], -1)
        correction = self.score_head(torch.cat([tokens, spread], dim=-1)).squeeze(-1)
        scores = correction + self.signal_gain * modules[..., : len(SIGNALS)].mean(-1)
        means = torch.cat([scores * exists.squeeze(-1), self.floor_head(context)], dim=1)
        log_std = torch.cat([self.log_std[:1].expand_as(scores), self.log_std[1:].expand(len(run), 1)], dim=1)
        return means.clamp(-SCORE_BOUND, SCORE_BOUND), log_std, self.value_head(context).squeeze(-1)
