"""Embedded environments: small simulated robots that need no GPU, no display and no asset files.

`import manipi.environments` registers `manipi/Tabletop-v0` with gymnasium.
"""

from manipi.errors import ConfigError

try:
    import gymnasium
    import mujoco  # noqa: F401
except ImportError as error:
    raise ConfigError(
        expected="the packages mujoco and gymnasium, which simulate the embedded environments",
        found=f"no module named {error.name!r}",
        where="manipi.environments",
        next="run: pip install 'manipi[demo]'",
    ) from error

from manipi.environments.demonstrations import demonstrations
from manipi.environments.expert import Expert
from manipi.environments.tabletop import Tabletop

gymnasium.register(id="manipi/Tabletop-v0", entry_point="manipi.environments.tabletop:Tabletop")

__all__ = ["Expert", "Tabletop", "demonstrations"]
