"""Who decides: rules, the policy network, PPO training, policy files, the Trainer callback."""
