"""Robots as data. See `manipi.robots.robot` for the parts of a robot."""

from manipi.robots.robot import SLOTS, ActionGroup, EndEffector, Gripper, Joints, Robot, State

__all__ = ["SLOTS", "ActionGroup", "EndEffector", "Gripper", "Joints", "Robot", "State"]
