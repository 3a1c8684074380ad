"""RL-Mix: R-Mix whose percentiles a policy chooses, rewarded when the network still looks at the same places.

"Expeditious Saliency-guided Mix-up through Random Gradient Thresholding", arXiv 2212.04875, Sec. 3 (RL-Mix). State:
the clean saliency on a fixed grid and the clean logits of the whole batch. Reward: the cosine similarity between the
saliency of the clean batch and that of the mixed one. An episode is an epoch.
"""

import torch
from torch.nn import functional as F

from mixing.ops import block_means, check_at_least, check_divides, normalize_sum
from mixing.rmix import RMix
from mixing.solvers.rlmix_agent import Agent


def saliency_similarity(clean: torch.Tensor, mixed_grad: torch.Tensor) -> torch.Tensor:
    """The reward: cosine between the block means of the clean saliency, clean (B, rows, columns), and those of the root
    mean square of the gradient at the mixed images (B, C, H, W), over the whole batch; 0 where it is NaN.
    """
    mixed = block_means(mixed_grad.float().square().mean(1).sqrt(), *clean.shape[1:])
    cosine = F.cosine_similarity(clean.flatten(), mixed.flatten(), dim=0, eps=1e-12)
    return cosine.nan_to_num(0.0, 0.0, 0.0)


class RLMix(RMix):
    """An agent (mixing.solvers.rlmix_agent) picks one of num_action percentiles for each image; the rest is R-Mix,
    which takes the other parameters.

    num_patches: blocks to a side of the state and the reward, at least 4. agent_*: its learning rate, minibatch, steps
    of a rollout and passes over one. The reward is given at every reward_step-th step (0 at the others) and divided by
    reward_scaling; grad_sim=True is the only one there is. A source that runs no network has no logits: zeros.

    The policy is as wide as the first batch. Batches of another size, such as a shorter last one, are mixed with
    uniform percentiles, as R-Mix does, and nothing is learned from them; nor from batches that are not mixed.
    """

    wants_mixed_grad = True

    def __init__(
        self,
        *,
        agent_lr: float = 3e-4,
        agent_batch_size: int = 250,
        agent_trajectory_size: int = 1000,
        agent_epochs: int = 10,
        reward_step: int = 1,
        reward_scaling: float = 1.0,
        grad_sim: bool = True,
        **rmix_options,
    ):
        super().__init__(**rmix_options)
        if not grad_sim:
            raise ValueError("grad_sim must be True: there is no other reward than the similarity of gradients")
        if self.num_patches < 4:
            raise ValueError(f"num_patches must be at least 4, for the policy's convolutions, got {self.num_patches}")
        check_at_least("agent_batch_size", agent_batch_size, 1)
        check_at_least("agent_trajectory_size", agent_trajectory_size, 1)
        check_at_least("agent_epochs", agent_epochs, 1)
        check_at_least("reward_step", reward_step, 1)
        if agent_lr <= 0 or reward_scaling <= 0:
            raise ValueError(f"agent_lr and reward_scaling must be positive, got {agent_lr} and {reward_scaling}")
        self.agent_options = {
            "learning_rate": agent_lr,
            "batch_size": agent_batch_size,
            "trajectory_size": agent_trajectory_size,
            "epochs": agent_epochs,
        }
        self.reward_step, self.reward_scaling = reward_step, reward_scaling
        self.agent: Agent | None = None  # built at the first batch, which tells its sizes
        self.saved: dict | None = None  # the state to build it from
        self.clean: torch.Tensor | None = None  # (B, grid, grid) saliency of the batch whose reward is awaited
        self.steps = 0  # learned from so far
        self.start = True  # whether the next step begins an episode
        self.done, self.episode_end, self.total = 0, 0, 0  # batches of the training: so far, at the epoch's end, in all

    @property
    def batch_size(self) -> int | None:
        return self.agent.sizes["batch"] if self.agent else None

    def start_epoch(self, epoch, epochs, steps):
        self.start = True
        self.done, self.episode_end, self.total = epoch * steps, (epoch + 1) * steps, epochs * steps

    @property
    def remaining(self) -> float:
        """Share of the training that lies ahead; 1 for who never calls start_epoch."""
        return max(0.0, 1 - self.done / self.total) if self.total else 1.0

    def check_size(self, height, width):
        super().check_size(height, width)
        check_divides("num_patches", self.num_patches, height, width)

    def __call__(self, images, targets, source=None):
        self.clean = None
        mixed = super().__call__(images, targets, source)
        self.done += 1
        return mixed

    def choose_actions(self, saliency, targets, source):
        logits = torch.zeros_like(targets, dtype=torch.float32) if source.logits is None else source.logits
        logits = logits.nan_to_num(0.0, 0.0, 0.0)
        if self.agent is None:
            self.agent = self.build_agent(logits)
        if len(logits) != self.agent.sizes["batch"]:
            return super().choose_actions(saliency, targets, source)
        self.clean = block_means(saliency, self.num_patches, self.num_patches)
        return self.agent.act(normalize_sum(self.clean), logits, start=self.start, remaining=self.remaining)

    def build_agent(self, logits: torch.Tensor) -> Agent:
        batch, classes = logits.shape
        sizes = {"batch": batch, "classes": classes, "grid": self.num_patches, "actions": self.num_action}
        if self.saved:
            known = self.saved["sizes"]
            if known | {"batch": batch} != sizes:
                raise ValueError(f"the saved RL-Mix agent was made for {known}, this training needs {sizes}")
            sizes = known
        agent = Agent(sizes, logits.device, **self.agent_options, state=self.saved)
        self.saved = None
        return agent

    def after_backward(self, mixed_grad):
        if self.clean is None:
            return
        if mixed_grad is None:
            raise ValueError("RL-Mix is rewarded by the gradient at the mixed images, and got none")
        self.steps += 1
        with torch.no_grad():
            reward = saliency_similarity(self.clean, mixed_grad) / self.reward_scaling
            if self.steps % self.reward_step:
                reward = torch.zeros_like(reward)
        self.clean, self.start = None, False
        self.agent.add_reward(reward, ended=self.done == self.episode_end, remaining=self.remaining)

    def state_dict(self):
        agent = self.agent.state_dict() if self.agent else self.saved
        counters = {"steps": self.steps, "start": self.start, "done": self.done}
        return {"agent": agent, **counters, "episode_end": self.episode_end, "total": self.total}

    def load_state_dict(self, state):
        self.agent, self.clean, self.saved = None, None, state["agent"]
        self.steps, self.start, self.done = state["steps"], state["start"], state["done"]
        self.episode_end, self.total = state["episode_end"], state["total"]
