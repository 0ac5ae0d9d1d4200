"""stable-baselines3: the optimizer is an option of the policy; the last rollout may take a schedule below 0."""

from pathlib import Path

import numpy as np
import stable_baselines3
import torch
from stable_baselines3 import PPO

from acprop_torch import ACProp
from runs import REPORT, assert_same, torch_arrays, yardsticks


def agent(optimizer_class: type[torch.optim.Optimizer]) -> stable_baselines3.PPO:
    # begin
    def linear(remaining: float) -> float:
        return 3e-3 * remaining

    options = {"optimizer_class": optimizer_class}
    options["optimizer_kwargs"] = {"clip_exponent": 0.25}
    more = {"policy_kwargs": options, "n_steps": 512}
    model = PPO("MlpPolicy", "CartPole-v1", learning_rate=linear, **more)
    # end
    model.set_random_seed(0)
    return model


def trained(model: stable_baselines3.PPO, steps: int) -> list[np.ndarray]:
    """Train from a new episode, with random numbers that start at the same place."""
    model.set_random_seed(1)
    model._last_obs = None
    model.learn(steps, reset_num_timesteps=model.num_timesteps == 0)
    return torch_arrays(model.policy, model.policy.optimizer)


def test_stable_baselines3(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = agent(ACProp)
    trained(model, 4000)  # 8 rollouts of 512 steps
    assert model.policy.optimizer.param_groups[0]["lr"] < 0
    assert all(np.isfinite(x).all() for x in torch_arrays(model.policy, model.policy.optimizer))
    model.save(tmp_path / "agent")
    resumed = stable_baselines3.PPO.load(tmp_path / "agent", env=model.env)
    reward = np.mean([episode["r"] for episode in model.ep_info_buffer])
    assert_same(trained(model, 1000), trained(resumed, 1000))

    torch.manual_seed(0)
    yardstick = agent(yardsticks(globals())["ACProp"])
    trained(yardstick, 4000)
    theirs = np.mean([episode["r"] for episode in yardstick.ep_info_buffer])
    REPORT.append(f"stable-baselines3 {stable_baselines3.__version__}: reward {reward:.1f}; AdamW {theirs:.1f}")
    assert reward > 40  # 22 at random
