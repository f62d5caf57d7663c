"""Procedural worlds: tasks without end, each with an exact verifier, a worked demonstration and disjoint splits."""

from posttrain.data.worlds.arithmetic import Arithmetic
from posttrain.data.worlds.base import Task, World
from posttrain.data.worlds.composition import Composition
from posttrain.data.worlds.countdown import Countdown

__all__ = ["Arithmetic", "Composition", "Countdown", "Task", "World"]
