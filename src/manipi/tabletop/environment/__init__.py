"""A small simulated robot that needs no GPU, no display and no asset files.

`import manipi.tabletop.environment` registers `manipi/Tabletop-v0` with gymnasium.
"""

from manipi.errors import ConfigError

try:
    import gymnasium
    import mujoco  # noqa: F401
except ImportError as error:
    raise ConfigError(
        expected="the packages mujoco and gymnasium, which simulate the embedded environments",
        found=f"no module named {error.name!r}",
        where="manipi.tabletop.environment",
        next="run: pip install 'manipi[demo]'",
    ) from error

from manipi.tabletop.environment.expert import Expert, demonstrations
from manipi.tabletop.environment.tabletop import Tabletop

gymnasium.register(id="manipi/Tabletop-v0", entry_point="manipi.tabletop.environment.tabletop:Tabletop")

__all__ = ["Expert", "Tabletop", "demonstrations"]
