"""Robot datasets: read, written, sampled and loaded as `manipi.types.Frame`. Nothing here imports torch.

dataset.py         what every reader offers; `open_dataset`, `frames`
lerobot.py         LeRobot v2.0, v2.1 and v3.0      lerobot_writer.py   LeRobot v3.0
video.py           exact frames out of video files, and into them
cache.py           decoded pictures in a memory-mapped file
sampler.py         which rows form step s           split.py            train and held-out episodes
loader.py          batches, from worker processes
"""
