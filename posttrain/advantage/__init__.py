"""Rewards -> advantages, on the controller, before the batch is packed.  An estimator is a callable ``groups -> groups``."""

from posttrain.advantage.group import BatchWhiten, Chain, GroupAdvantage, Reward, statistics

__all__ = ["BatchWhiten", "Chain", "GroupAdvantage", "Reward", "statistics"]
