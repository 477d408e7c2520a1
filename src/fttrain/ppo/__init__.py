"""Reinforcement learning from rewards: rollouts, experience, and the policy that they train."""
