import copy
import io
import zlib

import numpy as np
import pytest
import torch
from support import GOLDEN, same_state
from torch import nn

import mixing.solvers.rlmix_agent
from mixing.base import as_source
from mixing.ops import block_means, normalize_sum
from mixing.rlmix import RLMix, saliency_similarity
from mixing.rmix import actions_to_percentiles, salient_mask
from mixing.solvers.rlmix_agent import (
    ActorCritic,
    Agent,
    Features,
    compute_advantages,
    draw_actions,
    init_weights,
    joint_log_prob,
    ppo_loss,
)
from saliency import Source

B, K = 4, 5


class Classifier(Source):
    """A source with logits. Each call returns new random maps."""

    def __call__(self, images, targets):
        self.logits = torch.randn(len(images), targets.shape[1], device=images.device)
        return torch.rand(len(images), *images.shape[-2:], device=images.device)


def build_mixer(**options):
    return RLMix(**{"agent_trajectory_size": 3, "agent_batch_size": 2, "agent_epochs": 2, **options})


def train(mixer, steps, source=None, batch=B):
    """Run training steps without a network. Returns the last mixed images."""
    for _ in range(steps):
        images, targets = torch.randn(batch, 3, 16, 16), torch.eye(K)[torch.arange(batch) % K]
        mixed, _ = mixer(images, targets, source or Classifier())
        mixer.after_backward(torch.randn_like(mixed))
    return mixed


def test_features_match_the_published_code():
    golden = np.load(GOLDEN / "rmix.npz")
    features = Features(batch=10, classes=7, grid=8, features=16)
    state = features.state_dict()
    names = ["cnn.0", "cnn.2", "logits_layer.0", "linear.0"]
    assert list(state) == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    for key, value in state.items():  # each value comes from a legacy generator seeded with its key
        z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(value.shape))
        z = z * (0.1 if key.endswith("bias") else np.sqrt(2 / np.prod(value.shape[1:])))
        state[key] = torch.tensor(z.astype(np.float32))
    features.load_state_dict(state)
    with torch.no_grad():
        got = features(*(torch.from_numpy(golden[f"agent_in_{name}"]) for name in ("saliency", "logits")))
    expected = torch.from_numpy(golden["agent_features"])
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_initial_weights_are_orthogonal_and_actions_nearly_uniform():
    policy = ActorCritic(batch=B, classes=K, grid=8, actions=10)
    init_weights(policy)
    assert all(bias.eq(0).all() for name, bias in policy.named_parameters() if name.endswith("bias"))
    for layer, gain in (
        (policy.features.cnn[2], 2),
        (policy.features.linear[0], 2),
        (policy.actor[0], 2),
        (policy.critic[2], 2),
        (policy.action_head, 1e-4),
        (policy.value_head, 1),
    ):
        weight = layer.weight.detach().flatten(1)
        small = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(small, gain * torch.eye(len(small)), rtol=1e-4, atol=1e-5)
    log_probs, values = policy(torch.rand(2, B, 8, 8), torch.randn(2, B, K))
    assert log_probs.shape == (2, B, 10) and values.shape == (2,)
    torch.testing.assert_close(log_probs.exp().sum(2), torch.ones(2, B))
    assert (log_probs.exp() - 0.1).abs().max() < 0.01


def test_actions_are_drawn_with_their_probabilities():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])
    actions = draw_actions(probs.log().expand(20000, 2, 3))
    for i in range(2):
        assert (actions[:, i].bincount(minlength=3) / 20000 - probs[i]).abs().max() < 0.015
    log_prob = joint_log_prob(probs.log().unsqueeze(0), torch.tensor([[1, 2]]))
    torch.testing.assert_close(log_prob, torch.tensor([0.1]).log())  # 0.2 * 0.5


@pytest.mark.parametrize("steps", [1, 2, 7, 8])
def test_advantages_match_the_definition(steps):
    rewards, values, last = torch.randn(steps), torch.randn(steps), torch.randn(())
    starts = (torch.rand(steps) < 0.3).float()
    expected, following = [0.0] * steps, 0.0
    for t in reversed(range(steps)):
        continues = 1.0 if t + 1 == steps else 1.0 - float(starts[t + 1])
        after = float(last) if t + 1 == steps else float(values[t + 1])
        delta = float(rewards[t]) + 0.99 * after * continues - float(values[t])
        following = expected[t] = delta + 0.99 * 0.95 * continues * following
    torch.testing.assert_close(compute_advantages(rewards, values, starts, last), torch.tensor(expected))


def test_advantages_computed_by_hand():
    got = compute_advantages(
        torch.tensor([1.0, 1.0]), torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.0]), torch.tensor(1.0)
    )
    second = 1 + 0.99 * 1 - 2
    torch.testing.assert_close(got, torch.tensor([1 + 0.99 * 2 - 0.5 + 0.9405 * second, second]))
    got = compute_advantages(
        torch.tensor([1.0, 1.0]), torch.tensor([0.5, 2.0]), torch.tensor([1.0, 1.0]), torch.tensor(0.0)
    )
    assert got.tolist() == [0.5, -1.0], "no value of the next episode may enter"


def test_ppo_loss_computed_by_hand():
    ratio = torch.tensor([2.0, 0.5, 2.0, 0.5], requires_grad=True)
    advantage = torch.tensor([3.0, 3.0, -1.0, -1.0])  # mean 1, deviation 4 / sqrt(3): normalised +-sqrt(3) / 2
    value, returns = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 2.0])
    loss = ppo_loss(ratio.log(), torch.zeros(4), value, advantage, returns)
    unit = 3**0.5 / 2
    surrogate = (1.2 * unit + 0.5 * unit - 2.0 * unit - 0.8 * unit) / 4
    torch.testing.assert_close(loss, torch.tensor(0.5 * 1.0 - surrogate))
    loss.backward()
    assert ratio.grad.ne(0).tolist() == [False, True, True, False], "clipped ratios must not get gradients"
    single = ppo_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.tensor([2.0]), torch.zeros(1))
    assert single == -2, "a single step must not be normalised"


def test_policy_learns_rewarded_actions():
    sizes = {"batch": 3, "classes": 2, "grid": 4, "actions": 3}
    options = {"learning_rate": 3e-3, "batch_size": 32, "trajectory_size": 64, "epochs": 5}
    agent = Agent(sizes, torch.device("cpu"), **options)
    wanted = torch.tensor([2, 0, 1])
    shares = []
    for step in range(8 * 64):  # each step is its own episode
        saliency, logits = normalize_sum(torch.rand(3, 4, 4)), torch.randn(3, 2)
        hits = (agent.act(saliency, logits, start=True, remaining=1.0) == wanted).float().mean()
        agent.add_reward(hits, ended=step % 64 == 63, remaining=1.0)
        shares.append(float(hits))
    assert abs(np.mean(shares[:64]) - 1 / 3) < 0.15 and np.mean(shares[-64:]) > 0.8


def test_reward_is_the_similarity_of_the_two_maps():
    grad = torch.randn(B, 3, 16, 16)
    clean = block_means(grad.square().mean(1).sqrt(), 8, 8)
    assert abs(float(saliency_similarity(clean, 1e4 * grad)) - 1) < 1e-5, "the reward must not depend on the loss scale"
    left, right = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    left[..., :4], right[..., 4:] = 1, 1
    assert saliency_similarity(left[0], right) == 0
    both = saliency_similarity(left[0], left + right)
    assert abs(float(both) - 0.5**0.5) < 1e-6
    for bad in (float("nan"), float("inf")):
        assert saliency_similarity(left[0], right.masked_fill(right > 0, bad)) == 0
    assert saliency_similarity(left[0], torch.zeros_like(left)) == 0


def test_rollout_records_each_step():
    mixer, source = build_mixer(agent_trajectory_size=9, reward_step=3, reward_scaling=4.0), Classifier()
    rewards = []
    for step in range(6):
        if step in (0, 4):
            mixer.start_epoch(step // 4, 3, 4)
        images, targets = torch.randn(B, 3, 16, 16), torch.eye(K)[:B]
        maps = []
        mixed, _ = mixer(images, targets, lambda i, t, maps=maps: maps.append(source(i, t)) or maps[0])
        rows = mixer.agent.rollout.rows
        assert torch.equal(rows["saliency"][step], normalize_sum(block_means(maps[0], 8, 8)))
        assert rows["logits"][step].eq(0).all(), "a source without logits must give zeros"
        grad = torch.randn_like(mixed)
        mixer.after_backward(grad)
        reward = saliency_similarity(block_means(maps[0], 8, 8), grad) / 4
        rewards.append(reward if step % 3 == 2 else torch.tensor(0.0))
    torch.testing.assert_close(rows["reward"][:6], torch.stack(rewards))
    assert rows["start"][:6].tolist() == [1, 0, 0, 0, 1, 0] and mixer.agent.rollout.filled == 6
    train(mixer, 1, source)
    assert torch.equal(rows["logits"][6], source.logits)


def test_recorded_actions_determine_the_patches():
    mixer = build_mixer(random_patches=(4,), pairing="reversed")
    images, targets, source = torch.randn(B, 3, 16, 16), torch.eye(K)[:B], Classifier()
    for _ in range(5):
        maps = []
        mixed, _ = mixer(images, targets, lambda i, t, maps=maps: maps.append(source(i, t)) or maps[0])
        action = mixer.agent.rollout.rows["actions"][0]
        mask = salient_mask(normalize_sum(block_means(maps[0], 4, 4)), actions_to_percentiles(action, 10))
        alone = (mask & ~mask.flip(0)).repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
        assert torch.equal(mixed.where(alone, 0), images.where(alone, 0)) and alone.any()


@pytest.mark.parametrize("steps", [3, 5])
def test_rollout_bootstraps_from_the_next_value_unless_the_episode_ended(steps, monkeypatch):
    calls = []
    monkeypatch.setattr(
        mixing.solvers.rlmix_agent,
        "compute_advantages",
        lambda *given: calls.append(given) or compute_advantages(*given),
    )
    mixer = build_mixer(agent_lr=1e-2)
    mixer.start_epoch(1, 4, steps)
    train(mixer, 3)
    if steps == 3:
        assert len(calls) == 1 and calls[0][3] == 0, "the agent must learn at once if the episode is over"
    else:
        assert not calls, "the agent must wait for the next state"
        train(mixer, 1)
        assert len(calls) == 1 and calls[0][3] != 0
    lr = mixer.agent.optimizer.param_groups[0]["lr"]
    assert lr == pytest.approx(1e-2 * (1 - (steps + 3) / (4 * steps)) ** 0.9)
    assert mixer.agent.rollout.filled == (0 if steps == 3 else 1)


def test_full_rollout_pending_at_the_end_of_an_epoch_ends_with_it(monkeypatch):
    calls = []
    monkeypatch.setattr(
        mixing.solvers.rlmix_agent,
        "compute_advantages",
        lambda *given: calls.append(given) or compute_advantages(*given),
    )
    mixer = build_mixer()
    mixer.start_epoch(0, 2, 4)
    train(mixer, 3)
    train(mixer, 1, batch=B - 1)
    assert not calls
    mixer.start_epoch(1, 2, 4)
    train(mixer, 1)
    assert len(calls) == 1 and calls[0][3] == 0


def test_learning_updates_all_weights_and_leaves_no_gradients():
    mixer = build_mixer()
    train(mixer, 1)
    before = {name: value.clone() for name, value in mixer.agent.policy.named_parameters()}
    train(mixer, 3)
    for name, value in mixer.agent.policy.named_parameters():
        assert not torch.equal(value, before[name]) and value.isfinite().all() and value.grad is None, name


def test_each_pass_uses_each_step_once(monkeypatch):
    calls = []
    monkeypatch.setattr(mixing.solvers.rlmix_agent, "ppo_loss", lambda *given: calls.append(given) or ppo_loss(*given))
    mixer = build_mixer(agent_trajectory_size=7, agent_batch_size=3, agent_epochs=4)
    mixer.start_epoch(0, 2, 7)
    train(mixer, 7)
    assert [len(given[0]) for given in calls] == [3, 3, 1] * 4
    orders = [torch.cat([given[1] for given in calls[i : i + 3]]) for i in range(0, 12, 3)]
    recorded = mixer.agent.rollout.rows["log_prob"].sort().values
    assert all(torch.equal(order.sort().values, recorded) for order in orders), "a pass must use all steps"
    assert not all(torch.equal(order, orders[0]) for order in orders), "minibatches must be shuffled"
    torch.testing.assert_close(calls[0][0].detach(), calls[0][1])  # before the first update: equal


def test_batches_of_another_size_are_mixed_but_not_learned_from():
    mixer = build_mixer(agent_trajectory_size=9)
    train(mixer, 2)
    assert train(mixer, 1, batch=B - 1).shape[0] == B - 1
    assert mixer.agent.rollout.filled == 2 and mixer.steps == 2
    train(mixer, 1, batch=B + 2)
    train(mixer, 1)
    assert mixer.agent.rollout.filled == 3
    drawn = [
        mixer.choose_actions(torch.rand(3, 16, 16), torch.eye(3), as_source(lambda images, targets: images))
        for _ in range(500)
    ]
    counts = torch.cat(drawn).bincount(minlength=10)
    assert (counts - 150).abs().max() < 50, "percentiles must be uniform"


def test_batches_that_are_not_mixed_are_not_learned_from():
    mixer = build_mixer(agent_trajectory_size=200, mix_prob=0.5)
    train(mixer, 100)
    assert 30 < mixer.agent.rollout.filled < 70
    with pytest.raises(ValueError, match="gradient"):
        for _ in range(50):
            mixer(torch.randn(B, 3, 16, 16), torch.eye(K)[:B], Classifier())
            mixer.after_backward(None)
    mixer.mix_prob, filled = 1.0, mixer.agent.rollout.filled
    mixer(torch.randn(B, 3, 16, 16), torch.eye(K)[:B], Classifier())  # no backward pass follows
    mixer.mix_prob = 0.0
    train(mixer, 1)
    assert mixer.agent.rollout.filled == filled


@pytest.mark.parametrize("before", [2, 3, 4, 8])
def test_resumed_agent_continues_bit_for_bit(before):
    """Interrupted in the middle of a rollout, with a full rollout, and after the agent has learned."""
    whole = build_mixer()
    whole.start_epoch(0, 3, 8)
    train(whole, before)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    fresh = build_mixer()
    fresh.load_state_dict(saved)
    assert same_state(fresh.state_dict(), whole.state_dict()), "a state must survive before the agent is built"
    results = []
    for mixer in (whole, fresh):
        torch.manual_seed(1)
        if before == 8:
            mixer.start_epoch(1, 3, 8)
        mixed = train(mixer, 7)
        results.append((mixed, torch.rand(()), mixer.state_dict()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert same_state(results[0][2], results[1][2])


def test_training_does_not_modify_the_loaded_state():
    mixer = build_mixer()
    train(mixer, 5)  # one update, then 2 steps
    file = io.BytesIO()
    torch.save(mixer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["agent"]["rollout"]["logits"].untyped_storage().nbytes() == 2 * B * K * 4, (
        "only the filled rows are saved"
    )
    ends = []
    for _ in range(2):
        mixer.load_state_dict(saved)
        torch.manual_seed(2)
        train(mixer, 5)
        ends.append(copy.deepcopy(mixer.state_dict()))
    assert same_state(*ends)
    assert RLMix().state_dict()["agent"] is None


def test_loading_a_state_that_does_not_fit_raises_an_error():
    mixer = build_mixer()
    train(mixer, 2)
    for options, said in (({"num_action": 5}, "num_action|actions"), ({"agent_trajectory_size": 1}, "trajectory_size")):
        other = build_mixer(**options)
        other.load_state_dict(mixer.state_dict())
        with pytest.raises(ValueError, match=said):
            train(other, 1)


def test_rlmix_trains_a_network():
    from saliency.gradient import Gradient

    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(8, K)).train()
    mixer = build_mixer(agent_trajectory_size=2)
    source = Gradient(net, **mixer.gradient_options)
    for _ in range(4):
        images, targets = torch.randn(B, 3, 16, 16), torch.eye(K)[:B]
        mixed, soft = mixer(images, targets, source)
        mixed.requires_grad_(mixer.wants_mixed_grad)
        nn.functional.cross_entropy(net(mixed), soft).backward()
        mixer.after_backward(mixed.grad)
    rewards = mixer.agent.rollout.rows["reward"]
    assert rewards.gt(0).all() and rewards.le(1).all(), "the cosine of two non-negative maps is positive"


@pytest.mark.parametrize(
    "options",
    [
        {"grad_sim": False},
        {"num_patches": 3},
        {"agent_lr": 0},
        {"agent_batch_size": 0},
        {"agent_trajectory_size": 0},
        {"agent_epochs": 0},
        {"reward_step": 0},
        {"reward_scaling": 0},
        {"pairing": "backwards"},
    ],
)
def test_wrong_hyper_parameters_raise_an_error(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RLMix(**options)


def test_error_for_a_grid_that_does_not_fit_names_the_option():
    with pytest.raises(ValueError, match="num_patches"):
        RLMix(random_patches=(6,))(torch.randn(2, 3, 12, 12), torch.eye(2), Classifier())
