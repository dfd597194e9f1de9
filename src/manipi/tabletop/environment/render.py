"""Pictures without GPU, display or OpenGL: one shaded ray per pixel.

           camera                     lamp
             *─────── ray ──┐          o
                            │         ╱   color = rgba · tint · (ambient + (1 - ambient) · max(0, normal · to_lamp))
                            ▼  ↑    ╱
                ────────────●──┴─────     a ray that hits nothing takes the background's colour

The same scene gives the same picture on every machine (of one MuJoCo version: its ray caster decides ties at edges).

Shape letters: N pixels of the picture, row by row from the top left; V the same as one vector of 3 N numbers.
"""

# MuJoCo's bindings are compiled and come without stubs.
# pyright: reportAttributeAccessIssue=false

from dataclasses import dataclass

import mujoco
import numpy as np
from jaxtyping import Float64, UInt8

_SURFACE_OFFSET = 1e-3
"""Metres before a surface at which a shadow ray stops, so that no surface shades itself."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """Lighting and background of a picture; colours are red, green, blue in [0, 1]."""

    lamp: tuple[float, float, float] = (0.75, 0.55, 1.3)
    """Position, metres in the world frame."""
    ambient: float = 0.45
    """Brightness of a surface that the lamp does not reach."""
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Colour of all light."""
    horizon: tuple[float, float, float] = (0.56, 0.62, 0.70)
    """Background straight down, and half way to the zenith's colour at the horizon."""
    zenith: tuple[float, float, float] = (0.86, 0.90, 0.95)


class Renderer:
    """Casts pictures of one size of one model."""

    def __init__(self, model: mujoco.MjModel, *, height: int, width: int):
        self._model, self._height, self._width = model, height, width
        pixels = height * width
        self._geom_N = np.empty(pixels, np.int32)
        self._distance_N = np.empty(pixels)
        self._normal_V = np.zeros(3 * pixels)
        self._rays = [self._camera_rays(fovy) for fovy in model.cam_fovy]

    def render(
        self, data: mujoco.MjData, camera: str, *, look: Look | None = None, shadows: bool = False
    ) -> UInt8[np.ndarray, "h w 3"]:
        """What a camera of the model sees now; shadows cost a second ray per pixel.

        `data` must be up to date as after `mj_kinematics` and `mj_camlight`.
        """
        look = look or Look()
        index = self._model.camera(camera).id
        ray_N3 = self._rays[index] @ data.cam_xmat[index].reshape(3, 3).T
        self._cast(data, data.cam_xpos[index], ray_N3)
        # Pixels whose ray misses everything (geom -1, distance -1) are shaded too, which is cheaper than leaving them
        # out, and overwritten by the background.
        point_N3 = data.cam_xpos[index] + self._distance_N[:, None] * ray_N3
        miss_N = self._geom_N < 0
        color_N3 = self._model.geom_rgba[self._geom_N, :3].astype(np.float64)
        # The cosine between the normal and the way to the lamp; 0 where the surface faces away.
        to_lamp_N3 = look.lamp - point_N3
        toward_N = np.einsum("nd,nd->n", self._normal_V.reshape(-1, 3), to_lamp_N3)
        light_N = np.maximum(toward_N / np.sqrt(np.einsum("nd,nd->n", to_lamp_N3, to_lamp_N3)), 0.0)
        if shadows:
            # Whether the lamp reaches each point: rays from the lamp, since all rays of one cast share their origin.
            length_N = np.linalg.norm(to_lamp_N3, axis=1)
            self._cast(data, np.asarray(look.lamp), -to_lamp_N3 / length_N[:, None])
            light_N *= self._distance_N > length_N - _SURFACE_OFFSET
        color_N3 *= (look.ambient + (1 - look.ambient) * light_N)[:, None] * np.array(look.tint)
        upward_N1 = (ray_N3[miss_N, 2:] + 1) / 2
        color_N3[miss_N] = (1 - upward_N1) * np.array(look.horizon) + upward_N1 * np.array(look.zenith)
        return (255 * color_N3 + 0.5).astype(np.uint8).reshape(self._height, self._width, 3)

    def _camera_rays(self, fovy: float) -> Float64[np.ndarray, "N 3"]:
        """Unit rays through the centres of the pixels, in the camera's frame: x right, y up, looking along -z."""
        scale = np.tan(np.deg2rad(fovy) / 2) / self._height
        across = (2 * np.arange(self._width) + 1 - self._width) * scale
        down = (2 * np.arange(self._height) + 1 - self._height) * scale
        x, y = np.meshgrid(across, -down)
        ray_N3 = np.stack([x, y, -np.ones_like(x)], axis=-1).reshape(-1, 3)
        return ray_N3 / np.linalg.norm(ray_N3, axis=1, keepdims=True)

    def _cast(self, data: mujoco.MjData, origin: np.ndarray, ray_N3: np.ndarray) -> None:
        """Fills geom (-1: nothing), distance and normal of the first geom that each ray meets."""
        mujoco.mj_multiRay(
            self._model,
            data,
            origin,
            np.ascontiguousarray(ray_N3).reshape(-1),
            None,  # geoms of every group,
            True,  # fixed geoms too,
            -1,  # and of every body
            self._geom_N,
            self._distance_N,
            self._normal_V,
            len(ray_N3),
            mujoco.mjMAXVAL,
        )
