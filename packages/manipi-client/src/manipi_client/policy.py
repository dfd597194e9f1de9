"""What a policy is, for the robot's side."""

from __future__ import annotations

from typing import Any, Mapping, Protocol


class Policy(Protocol):
    """Turns observations into actions: a server far away, a broker around it, or a function in a test."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the policy says about itself: robot, model, home pose."""
        ...

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The actions for an observation.

        Returns:
            A dict with `actions`, [H, A] for a policy that plans a chunk and [A] behind an `ActionChunkBroker`.
        """
        ...

    def reset(self) -> None:
        """Forget the episode so far."""
        ...
