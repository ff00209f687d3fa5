"""A CartPole whose every step takes a while, as a user's module would register it."""

import time

import gymnasium
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

STEP_SECONDS = 0.01


class SlowCartPole(CartPoleEnv):
    def step(self, action):
        time.sleep(STEP_SECONDS)
        return super().step(action)


gymnasium.register("SlowCartPole-v0", SlowCartPole, max_episode_steps=200)
