"""Robots as data. See `manipi.robots.robot` for the parts of a robot."""

from manipi.robots.robot import ActionGroup, EndEffector, Gripper, Joints, LinkageGripper, Robot, State

__all__ = ["ActionGroup", "EndEffector", "Gripper", "Joints", "LinkageGripper", "Robot", "State"]
