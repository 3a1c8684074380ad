"""The agent of RL-Mix: an actor-critic that sees a whole batch at once, and its proximal policy optimisation.

RL-Mix, arXiv 2212.04875, Sec. 3; PPO, Schulman et al., arXiv 1707.06347, Eqs. 7 and 9, with the generalised advantages
of Schulman et al., arXiv 1506.02438, Eq. 16, and the settings of the library that the published runs used.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

FEATURES, HIDDEN = 256, 64
DISCOUNT, TRACE = 0.99, 0.95  # gamma and lambda of the advantages
CLIP, VALUE_WEIGHT, GRAD_NORM = 0.2, 0.5, 0.5
LR_POWER = 0.9


class Features(nn.Module):
    """saliency (T, batch, grid, grid) and logits (T, batch, classes) of T whole batches -> (T, features).

    The images are the channels of the convolutions, so the order of the images matters and `batch` is fixed.
    """

    def __init__(self, batch: int, classes: int, grid: int, features: int = FEATURES):
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(batch, 150, 3), nn.ReLU(), nn.Conv2d(150, 100, 2), nn.ReLU(), nn.Flatten())
        self.logits_layer = nn.Sequential(nn.Linear(classes, features), nn.Flatten())
        self.linear = nn.Sequential(nn.Linear(100 * (grid - 3) ** 2 + features * batch, features), nn.ReLU())

    def forward(self, saliency: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.cat([self.cnn(saliency), self.logits_layer(logits)], dim=1))


def tanh_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh())


class ActorCritic(nn.Module):
    """(T, batch, grid, grid), (T, batch, classes) -> log-probabilities of the actions (T, batch, actions) and values
    (T,).
    """

    def __init__(self, batch: int, classes: int, grid: int, actions: int):
        super().__init__()
        self.shape = (batch, actions)
        self.features = Features(batch, classes, grid)
        self.actor, self.critic = tanh_layers(), tanh_layers()
        self.action_head, self.value_head = nn.Linear(HIDDEN, batch * actions), nn.Linear(HIDDEN, 1)

    def forward(self, saliency: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(saliency, logits)
        scores = self.action_head(self.actor(features)).unflatten(1, self.shape)
        return scores.log_softmax(2), self.value_head(self.critic(features)).squeeze(1)


@torch.no_grad()
def init_weights(policy: ActorCritic) -> None:
    """Orthogonal weights and zero biases: nearly uniform actions at first."""
    for part, gain in (
        (policy.features, 2**0.5),
        (policy.actor, 2**0.5),
        (policy.critic, 2**0.5),
        (policy.action_head, 0.01),
        (policy.value_head, 1.0),
    ):
        for layer in part.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.orthogonal_(layer.weight, gain)
                layer.bias.zero_()


def draw_actions(log_probs: torch.Tensor) -> torch.Tensor:
    """(..., actions) -> (...) long, drawn by the Gumbel trick: torch.multinomial asks the device whether it may."""
    return (log_probs - torch.empty_like(log_probs).exponential_().log()).argmax(-1)


def joint_log_prob(log_probs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """log-probabilities (T, B, A) and actions (T, B) -> (T,): of all the actions of a step together."""
    return log_probs.gather(2, actions.unsqueeze(2)).sum((1, 2))


def advantages(rewards: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, last_value: torch.Tensor):
    """arXiv 1506.02438, Eq. 16 -> (T,). rewards, values (T,); starts (T,) is 1 where an episode begins; last_value ():
    of the state after the last step, 0 if the episode ended there.

    advantage[t] = delta[t] + keep[t] * advantage[t + 1] is solved by doubling: log2(T) rounds in place of T.
    """
    goes_on = torch.cat([1 - starts[1:], starts.new_ones(1)])
    next_values = torch.cat([values[1:], last_value.reshape(1)])
    total, keep = rewards + DISCOUNT * goes_on * next_values - values, DISCOUNT * TRACE * goes_on
    reach = 1
    while reach < len(total):
        total = total + keep * F.pad(total[reach:], (0, reach))
        keep = keep * F.pad(keep[reach:], (0, reach))
        reach *= 2
    return total


def ppo_loss(log_prob, old_log_prob, value, advantage, returns) -> torch.Tensor:
    """arXiv 1707.06347, Eq. 9 without the entropy term, all arguments (T,): clipped surrogate (Eq. 7) of advantages
    normalised over these T steps, plus VALUE_WEIGHT times the squared error of the values.
    """
    if len(advantage) > 1:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = (log_prob - old_log_prob).exp()
    surrogate = torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - CLIP, 1 + CLIP))
    return VALUE_WEIGHT * F.mse_loss(value, returns) - surrogate.mean()


class Rollout:
    """Preallocated memory, on the device, of up to `steps` steps. Rows are written at a host index."""

    def __init__(self, steps: int, *, batch: int, classes: int, grid: int, device: torch.device):
        self.rows = {
            "saliency": torch.zeros(steps, batch, grid, grid, device=device),
            "logits": torch.zeros(steps, batch, classes, device=device),
            "actions": torch.zeros(steps, batch, dtype=torch.long, device=device),
            "log_prob": torch.zeros(steps, device=device),
            "value": torch.zeros(steps, device=device),
            "start": torch.zeros(steps, device=device),
            "reward": torch.zeros(steps, device=device),
        }
        self.steps, self.filled = steps, 0

    @property
    def full(self) -> bool:
        return self.filled == self.steps

    def write(self, **values) -> None:
        """Into the row that is being filled; a row counts once `filled` has moved on."""
        for name, value in values.items():
            self.rows[name][self.filled] = value

    def state_dict(self) -> dict:
        return {name: row[: self.filled].clone() for name, row in self.rows.items()}

    def load_state_dict(self, state: dict) -> None:
        if len(state["reward"]) > self.steps:
            raise ValueError(f"{len(state['reward'])} steps were saved, agent_trajectory_size is {self.steps}")
        self.filled = len(state["reward"])
        for name, row in self.rows.items():
            row[: self.filled].copy_(state[name])


class Agent:
    """Acts on batches of one size and learns from `trajectory_size` steps at a time.

    sizes: batch, classes, grid and actions. batch_size: steps of a minibatch; epochs: passes over a rollout. The
    optimizer is Adam with rate learning_rate * remaining**0.9, where remaining is the share of the training ahead.
    state: what state_dict gave, from which the agent goes on as if it had never stopped, and draws nothing to be built.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        device: torch.device,
        *,
        learning_rate: float,
        batch_size: int,
        trajectory_size: int,
        epochs: int,
        state: dict | None = None,
    ):
        self.sizes, self.learning_rate = sizes, learning_rate
        self.batch_size, self.epochs = batch_size, epochs
        with torch.device("meta" if state else "cpu"):  # on "meta" the first weights cost no random numbers
            self.policy = ActorCritic(**sizes)
        if state:
            self.policy = self.policy.to_empty(device=device)
            self.policy.load_state_dict(state["policy"])
        else:
            init_weights(self.policy)
            self.policy.to(device)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), learning_rate, eps=1e-5)
        self.rollout = Rollout(
            trajectory_size, batch=sizes["batch"], classes=sizes["classes"], grid=sizes["grid"], device=device
        )
        if state:
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would go on in the same tensors
            self.rollout.load_state_dict(state["rollout"])

    @torch.no_grad()
    def act(self, saliency: torch.Tensor, logits: torch.Tensor, *, start: bool, remaining: float) -> torch.Tensor:
        """saliency (B, grid, grid) that sums to 1 for each image, logits (B, classes) -> actions (B,) long.

        start: whether an episode begins here. A full rollout is learned from first: its last value is that of this
        state.
        """
        state = saliency.unsqueeze(0), logits.unsqueeze(0)
        log_probs, value = self.policy(*state)
        if self.rollout.full:
            self.learn(torch.zeros_like(value) if start else value, remaining)
            log_probs, value = self.policy(*state)
        actions = draw_actions(log_probs)
        log_prob = joint_log_prob(log_probs, actions)[0]
        self.rollout.write(saliency=saliency, logits=logits, actions=actions[0], log_prob=log_prob, value=value[0])
        self.rollout.write(start=float(start))
        return actions[0]

    def add_reward(self, reward: torch.Tensor, *, ended: bool, remaining: float) -> None:
        """reward () for the last actions. ended: whether the episode ends with them, so that nothing need be waited for
        before a full rollout is learned from.
        """
        self.rollout.write(reward=reward)
        self.rollout.filled += 1
        if self.rollout.full and ended:
            self.learn(torch.zeros_like(reward), remaining)

    @torch.enable_grad()
    def learn(self, last_value: torch.Tensor, remaining: float) -> None:
        """`epochs` passes over the rollout, which is empty afterwards. last_value (): see advantages."""
        rows, device = self.rollout.rows, last_value.device
        advantage = advantages(rows["reward"], rows["value"], rows["start"], last_value)
        returns = advantage + rows["value"]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * remaining**LR_POWER
        for _ in range(self.epochs):
            for chosen in torch.randperm(self.rollout.steps, device=device).split(self.batch_size):
                log_probs, value = self.policy(rows["saliency"][chosen], rows["logits"][chosen])
                log_prob = joint_log_prob(log_probs, rows["actions"][chosen])
                loss = ppo_loss(log_prob, rows["log_prob"][chosen], value, advantage[chosen], returns[chosen])
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.policy.parameters(), GRAD_NORM)
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.rollout.filled = 0

    def state_dict(self) -> dict:
        return {
            "sizes": dict(self.sizes),
            "policy": dict(self.policy.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "rollout": self.rollout.state_dict(),
        }
