"""Robot datasets: read, written, sampled and loaded as `manipi.types.Frame`.

| module | |
|---|---|
| `dataset` | what every reader offers; `open_dataset`, `frames`, `action_chunks` |
| `lerobot`, `lerobot_index` | LeRobot v2.0, v2.1 and v3.0: tables and pictures, metadata |
| `lerobot_writer`, `lerobot_stats` | LeRobot v3.0, written whole or not at all |
| `video` | exact frames out of video files, and into them |
| `cache` | decoded pictures, at the size the model takes, kept on disk from their first use on |
| `subset` | some episodes of a dataset as a dataset of their own |
| `sampler`, `split` | which rows form step s; train and held-out episodes |
| `source` | a dataset as a robot's pipeline reads it: rows in, samples out |
| `loader` | batches, from worker processes |
| `shared` | memory that processes share: batches on their way, and columns |
| `stats` | norm stats |
| `check`, `describe` | what is wrong with a dataset; what is in it, and a robot that would fit |
"""
