"""Reinforcement learning by Stable-Baselines3 contrib and TorchRL."""

from __future__ import annotations

import functools

import torch
from torch import nn

from benchmarks.models.job import Job, Learnt, Model, Results, Swap, load, seed


def _recurrent_ppo(swap: Swap) -> Job:
    def learn() -> Results:
        agent = load("sb3_contrib").RecurrentPPO(
            "MlpLstmPolicy", "CartPole-v1", n_steps=128, n_epochs=4, seed=0, device="cpu"
        )
        swap(agent.policy)
        learnt = Learnt(agent.policy)
        agent.learn(256)
        rewards = [episode["r"] for episode in agent.ep_info_buffer]
        return {"learnt": learnt(), "rewards": torch.tensor(rewards)}

    return learn


def _recurrent_dqn(layer: str, swap: Swap) -> Job:
    collectors, modules = load("torchrl.collectors"), load("torchrl.modules")
    envs, objectives = load("torchrl.envs"), load("torchrl.objectives")
    tensordict = load("tensordict.nn")

    def learn() -> Results:
        seed()
        env = envs.TransformedEnv(envs.GymEnv("CartPole-v1"), envs.InitTracker())
        env.set_seed(0)
        recurrent = getattr(modules, layer)(4, 128, in_key="observation", out_key="embedding")
        env.append_transform(recurrent.make_tensordict_primer())
        policy = tensordict.TensorDictSequential(
            recurrent,
            tensordict.TensorDictModule(nn.Linear(128, 2), ["embedding"], ["action_value"]),
            modules.QValueModule(spec=env.action_spec),
        )
        swap(policy)
        learnt = Learnt(policy)
        objective = objectives.DQNLoss(policy, action_space=env.action_spec, delay_value=True)
        target = objectives.SoftUpdate(objective, eps=0.95)
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
        explorer = modules.EGreedyModule(env.action_spec, eps_init=0.5, annealing_num_steps=1000)
        collector = collectors.Collector(
            env,
            tensordict.TensorDictSequential(policy, explorer),
            frames_per_batch=100,  # a sequence holds several episodes
            total_frames=200,
        )
        losses = []
        for data in collector:
            for _ in range(4):
                optimizer.zero_grad()
                with modules.set_recurrent_mode(True):
                    loss = objective(data)["loss"]
                loss.backward()
                optimizer.step()
                target.step()
                losses.append(loss.detach())
        collector.shutdown()
        return {"learnt": learnt(), "losses": torch.stack(losses)}

    return learn


MODELS = (
    Model(
        "RecurrentPPO",
        {"sb3_contrib": "sb3-contrib"},
        "reinforcement learning, 256 steps of CartPole with 8 epochs",
        "training",
        _recurrent_ppo,
    ),
    *(
        Model(
            layer,
            {"torchrl": "torchrl", "gymnasium": "gymnasium"},
            "reinforcement learning, 200 steps of CartPole by its Collector, 8 of DQNLoss",
            "training",
            functools.partial(_recurrent_dqn, layer),
            subclass=True,
        )
        for layer in ("LSTMModule", "GRUModule")
    ),
)
