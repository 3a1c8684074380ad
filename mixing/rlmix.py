"""RL-Mix: R-Mix with percentiles chosen by a policy, which is rewarded if the network attends to the same places.

"Expeditious Saliency-guided Mix-up through Random Gradient Thresholding", arXiv 2212.04875, Sec. 3 (RL-Mix). State: the
clean saliency on a fixed grid and the clean logits of the whole batch. Action: a percentile for each image. Reward: the
cosine similarity between the saliency of the clean batch and that of the mixed batch. An episode is one epoch.

mixing/solvers/rlmix_agent.py holds the policy and its training.
"""

import torch
from torch.nn import functional as F

from .ops import block_means, check_at_least, check_divides, normalize_sum
from .rmix import RMix
from .solvers.rlmix_agent import Agent


def saliency_similarity(clean: torch.Tensor, mixed_grad: torch.Tensor) -> torch.Tensor:
    """Return the reward, (): the cosine similarity of two saliency maps over the whole batch.

    clean (B, rows, columns): block means of the clean saliency. mixed_grad (B, C, H, W): gradient with respect to the
    mixed images, reduced to block means of its root mean square. A similarity that is NaN counts as 0.
    """
    mixed = block_means(mixed_grad.float().square().mean(1).sqrt(), *clean.shape[1:])
    cosine = F.cosine_similarity(clean.flatten(), mixed.flatten(), dim=0, eps=1e-12)
    return cosine.nan_to_num(0.0, 0.0, 0.0)


class RLMix(RMix):
    """R-Mix with an agent that picks one of num_action percentiles for each image. **rmix_options: parameters of RMix.

    num_patches: blocks per side of the state and of the reward, at least 4. agent_lr: learning rate.
    agent_trajectory_size: steps of a rollout. agent_batch_size: steps of a minibatch. agent_epochs: passes over a
    rollout. reward_step: only every reward_step-th step has a reward, the others 0. reward_scaling: divisor of the
    reward. grad_sim: must be True, the only reward there is. A source without logits gives the agent zeros.

    The policy has the width of the first batch. Batches of another size, such as a shorter last one, are mixed with
    uniform percentiles as in R-Mix. The agent does not learn from them, nor from batches that are not mixed.
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
            raise ValueError("grad_sim must be True: the similarity of the gradients is the only reward")
        if self.num_patches < 4:
            raise ValueError(f"num_patches must be at least 4 for the policy's convolutions, got {self.num_patches}")
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
        self.agent: Agent | None = None  # built at the first batch, which determines its sizes
        self.agent_state: dict | None = None  # loaded state to build the agent from
        self.clean_saliency: torch.Tensor | None = None  # (B, grid, grid) of the batch whose reward is due
        self.steps = 0  # steps with a reward so far
        self.episode_start = True  # whether the next step begins an episode
        # batches of the run: so far, up to the end of the epoch, in total
        self.batches_done, self.episode_end, self.total_batches = 0, 0, 0

    @property
    def batch_size(self) -> int | None:
        """Return the size of the first batch, the only size that the agent learns from."""
        return self.agent.sizes["batch"] if self.agent else None

    def start_epoch(self, epoch, epochs, steps):
        self.episode_start = True
        self.batches_done, self.episode_end, self.total_batches = epoch * steps, (epoch + 1) * steps, epochs * steps

    @property
    def remaining(self) -> float:
        """Return the fraction of the run that is left; 1 if start_epoch() is never called."""
        return max(0.0, 1 - self.batches_done / self.total_batches) if self.total_batches else 1.0

    def check_size(self, height, width):
        super().check_size(height, width)
        check_divides("num_patches", self.num_patches, height, width)

    def __call__(self, images, targets, source=None):
        self.clean_saliency = None
        mixed = super().__call__(images, targets, source)
        self.batches_done += 1
        return mixed

    def choose_actions(self, saliency, targets, source):
        logits = torch.zeros_like(targets, dtype=torch.float32) if source.logits is None else source.logits
        logits = logits.nan_to_num(0.0, 0.0, 0.0)
        if self.agent is None:
            self.agent = self.build_agent(logits)
        if len(logits) != self.agent.sizes["batch"]:
            return super().choose_actions(saliency, targets, source)
        self.clean_saliency = block_means(saliency, self.num_patches, self.num_patches)
        return self.agent.act(
            normalize_sum(self.clean_saliency), logits, start=self.episode_start, remaining=self.remaining
        )

    def build_agent(self, logits: torch.Tensor) -> Agent:
        batch, classes = logits.shape
        sizes = {"batch": batch, "classes": classes, "grid": self.num_patches, "actions": self.num_action}
        if self.agent_state:
            saved_sizes = self.agent_state["sizes"]
            if saved_sizes | {"batch": batch} != sizes:
                raise ValueError(
                    f"the RL-Mix agent was saved for {saved_sizes} and this run needs {sizes}: "
                    "resume with the same data and options"
                )
            sizes = saved_sizes
        agent = Agent(sizes, logits.device, **self.agent_options, state=self.agent_state)
        self.agent_state = None
        return agent

    def after_backward(self, mixed_grad):
        if self.clean_saliency is None:
            return
        if mixed_grad is None:
            raise ValueError(
                "RL-Mix computes its reward from the gradient at the mixed images, and got None: call "
                "mixed.requires_grad_() before the forward pass and after_backward(mixed.grad) after the backward pass"
            )
        self.steps += 1
        with torch.no_grad():
            reward = saliency_similarity(self.clean_saliency, mixed_grad) / self.reward_scaling
            if self.steps % self.reward_step:
                reward = torch.zeros_like(reward)
        self.clean_saliency, self.episode_start = None, False
        self.agent.add_reward(reward, ended=self.batches_done == self.episode_end, remaining=self.remaining)

    def state_dict(self):
        agent = self.agent.state_dict() if self.agent else self.agent_state
        counters = {"steps": self.steps, "start": self.episode_start, "done": self.batches_done}
        return {"agent": agent, **counters, "episode_end": self.episode_end, "total": self.total_batches}

    def load_state_dict(self, state):
        self.agent, self.clean_saliency, self.agent_state = None, None, state["agent"]
        self.steps, self.episode_start, self.batches_done = state["steps"], state["start"], state["done"]
        self.episode_end, self.total_batches = state["episode_end"], state["total"]
