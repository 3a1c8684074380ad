"""The agent of RL-Mix: an actor-critic that observes a whole batch, trained by proximal policy optimisation (PPO).

RL-Mix, arXiv 2212.04875, Sec. 3. PPO: Schulman et al., arXiv 1707.06347, Eqs. 7 and 9, with the generalised advantage
estimation of Schulman et al., arXiv 1506.02438, Eq. 16. The other settings are those of the library that the published
runs used.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

FEATURES, HIDDEN = 256, 64  # widths
DISCOUNT, GAE_LAMBDA = 0.99, 0.95
CLIP, VALUE_WEIGHT, MAX_GRAD_NORM = 0.2, 0.5, 0.5
LR_POWER = 0.9  # the learning rate is proportional to remaining**LR_POWER


class Features(nn.Module):
    """Saliency (T, batch, grid, grid) and logits (T, batch, classes) of T whole batches -> features (T, features).

    The images of a batch are the channels of the convolutions. The order of the images therefore matters, and `batch`
    is fixed.
    """

    def __init__(self, batch: int, classes: int, grid: int, features: int = FEATURES):
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(batch, 150, 3), nn.ReLU(), nn.Conv2d(150, 100, 2), nn.ReLU(), nn.Flatten())
        self.logits_layer = nn.Sequential(nn.Linear(classes, features), nn.Flatten())
        self.linear = nn.Sequential(nn.Linear(100 * (grid - 3) ** 2 + features * batch, features), nn.ReLU())

    def forward(self, saliency: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.cat([self.cnn(saliency), self.logits_layer(logits)], dim=1))


def build_mlp() -> nn.Sequential:
    """Return two tanh layers, FEATURES -> HIDDEN -> HIDDEN."""
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh())


class ActorCritic(nn.Module):
    """Saliency (T, batch, grid, grid) and logits (T, batch, classes) -> action log-probabilities and values.

    The log-probabilities are (T, batch, actions), the values (T,).
    """

    def __init__(self, batch: int, classes: int, grid: int, actions: int):
        super().__init__()
        self.shape = (batch, actions)
        self.features = Features(batch, classes, grid)
        self.actor, self.critic = build_mlp(), build_mlp()
        self.action_head, self.value_head = nn.Linear(HIDDEN, batch * actions), nn.Linear(HIDDEN, 1)

    def forward(self, saliency: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(saliency, logits)
        scores = self.action_head(self.actor(features)).unflatten(1, self.shape)
        return scores.log_softmax(2), self.value_head(self.critic(features)).squeeze(1)


@torch.no_grad()
def init_weights(policy: ActorCritic) -> None:
    """Initialise with orthogonal weights and zero biases, so that the first actions are nearly uniform."""
    for module, gain in (
        (policy.features, 2**0.5),
        (policy.actor, 2**0.5),
        (policy.critic, 2**0.5),
        (policy.action_head, 0.01),
        (policy.value_head, 1.0),
    ):
        for layer in module.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.orthogonal_(layer.weight, gain)
                layer.bias.zero_()


def draw_actions(log_probs: torch.Tensor) -> torch.Tensor:
    """Draw an action from log-probabilities (..., actions): (...) long.

    The Gumbel trick never waits for the device, while torch.multinomial checks its input there.
    """
    return (log_probs - torch.empty_like(log_probs).exponential_().log()).argmax(-1)


def joint_log_prob(log_probs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Return the joint log-probability (T,) of all actions of a step. log_probs (T, B, A), actions (T, B)."""
    return log_probs.gather(2, actions.unsqueeze(2)).sum((1, 2))


def compute_advantages(rewards: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, last_value: torch.Tensor):
    """Return the generalised advantages (T,) of arXiv 1506.02438, Eq. 16.

    rewards, values (T,); starts (T,): 1 where an episode begins; last_value (): value of the state after the last step,
    0 if the episode ended there. The recurrence advantage[t] = delta[t] + keep[t] * advantage[t + 1] is solved by
    doubling, in log2(T) rounds instead of T.
    """
    continues = torch.cat([1 - starts[1:], starts.new_ones(1)])
    next_values = torch.cat([values[1:], last_value.reshape(1)])
    total, keep = rewards + DISCOUNT * continues * next_values - values, DISCOUNT * GAE_LAMBDA * continues
    reach = 1
    while reach < len(total):
        total = total + keep * F.pad(total[reach:], (0, reach))
        keep = keep * F.pad(keep[reach:], (0, reach))
        reach *= 2
    return total


def ppo_loss(log_prob, old_log_prob, value, advantage, returns) -> torch.Tensor:
    """Return the loss of arXiv 1707.06347, Eq. 9, without its entropy term. All arguments are (T,).

    It is the clipped surrogate (Eq. 7) of advantages normalised over these T steps, plus VALUE_WEIGHT times the squared
    error of the values.
    """
    if len(advantage) > 1:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = (log_prob - old_log_prob).exp()
    surrogate = torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - CLIP, 1 + CLIP))
    return VALUE_WEIGHT * F.mse_loss(value, returns) - surrogate.mean()


class Rollout:
    """Preallocated memory on the device for `steps` steps. Rows are written at an index that the host knows."""

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
        """Write tensors or numbers into the row being filled. The row counts once `filled` has moved past it."""
        for name, value in values.items():
            row = self.rows[name][self.filled]
            if isinstance(value, torch.Tensor):
                row.copy_(value)
            else:
                row.fill_(value)  # an assignment would copy the number to the device and wait

    def state_dict(self) -> dict:
        return {name: row[: self.filled].clone() for name, row in self.rows.items()}

    def load_state_dict(self, state: dict) -> None:
        if len(state["reward"]) > self.steps:
            raise ValueError(f"agent_trajectory_size {self.steps} is less than the {len(state['reward'])} steps saved")
        self.filled = len(state["reward"])
        for name, row in self.rows.items():
            row[: self.filled].copy_(state[name])


class Agent:
    """Acts on batches of one size and learns from rollouts of `trajectory_size` steps.

    sizes: batch, classes, grid and actions. batch_size: steps of a minibatch; epochs: passes over a rollout. The
    optimizer is Adam with learning rate learning_rate * remaining**0.9, where `remaining` is the fraction of the run
    that is left. state: what state_dict() returned; the agent then continues exactly as if never interrupted, and
    building it draws no random numbers.
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
        with torch.device("meta" if state else "cpu"):  # on "meta", initialising weights draws no random numbers
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
            # a copy, because the optimizer would update the tensors of `state`
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
            self.rollout.load_state_dict(state["rollout"])

    @torch.no_grad()
    def act(self, saliency: torch.Tensor, logits: torch.Tensor, *, start: bool, remaining: float) -> torch.Tensor:
        """Return actions (B,) long for saliency (B, grid, grid), each map with sum 1, and logits (B, classes).

        start: whether an episode begins here. If the rollout is full, the agent learns from it first, because its last
        value is that of this state.
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
        """Store the reward () of the last actions.

        ended: whether the episode ends with them. A full rollout is then learned from at once, since no next state is
        needed.
        """
        self.rollout.write(reward=reward)
        self.rollout.filled += 1
        if self.rollout.full and ended:
            self.learn(torch.zeros_like(reward), remaining)

    @torch.enable_grad()
    def learn(self, last_value: torch.Tensor, remaining: float) -> None:
        """Make `epochs` passes over the rollout and empty it. last_value (): see compute_advantages()."""
        rows, device = self.rollout.rows, last_value.device
        advantage = compute_advantages(rows["reward"], rows["value"], rows["start"], last_value)
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
                nn.utils.clip_grad_norm_(self.policy.parameters(), MAX_GRAD_NORM)
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
