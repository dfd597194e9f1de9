"""Small real recordings in the layouts of other projects, and the values that they hold."""

import io
import json
from pathlib import Path

import av
import h5py
import numpy as np
import zarr
from PIL import Image


def pictures(length: int, seed: int = 0, height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth in space, so that a codec keeps them; brightness tells the frame, and top and bottom differ."""
    frame, y, x = np.meshgrid(np.arange(length), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([(frame * 7 + 20) % 200 + 20, y * 3 + 40, x * 2 + seed * 10 + 30], axis=-1).astype(np.uint8)


def numbers(length: int, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((length, size)).astype(np.float32)


def write_aloha(folder: Path, lengths=(20, 7, 33), *, compressed=False, cameras=("cam_high", "cam_left_wrist")) -> Path:
    folder.mkdir(exist_ok=True)
    for e, length in enumerate(lengths):
        with h5py.File(folder / f"episode_{e}.hdf5", "w") as file:
            file["action"] = numbers(length, 14, e).astype(np.float64)
            for i, name in enumerate(("qpos", "qvel", "effort")):
                file[f"observations/{name}"] = numbers(length, 14, 100 * (i + 1) + e).astype(np.float64)
            for c, camera in enumerate(cameras):
                images = pictures(length, c + e)
                file[f"observations/images/{camera}"] = jpeg_rows(images) if compressed else images
    return folder


def jpeg_rows(images: np.ndarray) -> np.ndarray:
    """JPEG files, padded to the length of the longest."""
    rows = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95)
        rows.append(np.frombuffer(buffer.getvalue(), np.uint8))
    padded = np.zeros((len(rows), max(map(len, rows))), np.uint8)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def write_libero(folder: Path, lengths=(9, 12)) -> Path:
    """Two files of one task each; demo_10 comes behind demo_9."""
    folder.mkdir(exist_ok=True)
    for t, task in enumerate(("open the drawer", "close the drawer")):
        with h5py.File(folder / f"{task.replace(' ', '_')}_demo.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["problem_info"] = json.dumps({"problem_name": "x", "language_instruction": task})
            data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
            for demo, length in zip((9, 10), lengths):
                seed = 10 * t + demo
                data[f"demo_{demo}/actions"] = numbers(length, 7, seed).astype(np.float64)
                data[f"demo_{demo}/dones"] = (np.arange(length) == length - 1).astype(np.uint8)
                data[f"demo_{demo}/rewards"] = np.zeros(length, np.uint8)
                data[f"demo_{demo}/states"] = numbers(length, 20 + t, seed)
                data[f"demo_{demo}/obs/ee_states"] = numbers(length, 6, seed + 1).astype(np.float64)
                data[f"demo_{demo}/obs/gripper_states"] = numbers(length, 2, seed + 2).astype(np.float64)
                data[f"demo_{demo}/obs/agentview_rgb"] = pictures(length, t, 64, 64)
    return folder


def write_mp4(path: Path, images: np.ndarray, rate: int = 15) -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=rate, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "yuv420p"
        for image in images:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode(None))


SERIALS = {"ext1_cam_serial": "30", "ext2_cam_serial": "20", "wrist_cam_serial": "10"}


def write_droid(root: Path, lengths=(20, 11), *, metadata=True, recorded=0) -> Path:
    """`recorded`: how many frames more (or fewer) the videos have."""
    for e, length in enumerate(lengths):
        folder = root / f"lab/success/day{e}"
        (folder / "recordings/MP4").mkdir(parents=True)
        with h5py.File(folder / "trajectory.h5", "w") as file:
            state, action = file.create_group("observation/robot_state"), file.create_group("action")
            state["joint_positions"] = numbers(length, 7, e).astype(np.float64)
            state["gripper_position"] = numbers(length, 1, 50 + e)[:, 0].astype(np.float64)
            state["cartesian_position"] = numbers(length, 6, 60 + e)
            for i, (name, size) in enumerate((("joint_position", 7), ("joint_velocity", 7), ("cartesian_position", 6))):
                action[name] = numbers(length, size, 100 * (i + 1) + e)
            action["gripper_position"] = numbers(length, 1, 80 + e)[:, 0]
            file["observation/controller_info/movement_enabled"] = np.arange(length) % 3 > 0
            for serial in SERIALS.values():
                file[f"observation/camera_type/{serial}"] = np.full(length, 0 if serial == "10" else 1)
        for c, serial in enumerate(SERIALS.values()):
            write_mp4(folder / f"recordings/MP4/{serial}.mp4", pictures(length + recorded, c))
        if metadata:
            entries = SERIALS | {"current_task": "move an object"}
            (folder / f"metadata_LAB+abc+{e}.json").write_text(json.dumps(entries))
    texts = {"LAB+abc+0": {"language_instruction1": "pick up the pen", "language_instruction2": "take it"}}
    (root / "aggregated-annotations-030724.json").write_text(json.dumps(texts))
    return root


def write_zarr(path: Path, arrays: dict[str, np.ndarray], ends: list[int]) -> Path:
    """A ReplayBuffer; a path that ends in .zip is packed."""
    store = zarr.storage.ZipStore(path, mode="w") if path.suffix == ".zip" else zarr.storage.LocalStore(path)
    group = zarr.open_group(store, mode="w", zarr_format=2)
    for name, values in arrays.items():
        group.create_array(f"data/{name}", data=values, chunks=(4, *values.shape[1:]))
    group.create_array("meta/episode_ends", data=np.array(ends))
    store.close()
    return path


def push_t() -> dict[str, np.ndarray]:
    """As diffusion_policy's pusht_cchi_v7_replay: pictures as floats, keypoints as a matrix."""
    return {
        "img": pictures(25, 0, 64, 64).astype(np.float32),
        "state": numbers(25, 5, 1),
        "action": numbers(25, 2, 2),
        "keypoint": numbers(25, 18, 3).reshape(25, 9, 2),
        "n_contacts": np.ones((25, 1), np.float32),
    }


def umi() -> dict[str, np.ndarray]:
    return {
        "camera0_rgb": pictures(25, 0, 64, 64),
        "robot0_eef_pos": numbers(25, 3, 1),
        "robot0_eef_rot_axis_angle": numbers(25, 3, 2),
        "robot0_gripper_width": numbers(25, 1, 3),
        "robot0_demo_start_pose": numbers(25, 6, 4).astype(np.float64),
    }
