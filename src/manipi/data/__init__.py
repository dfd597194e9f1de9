"""Robot datasets: read, written, sampled and loaded as `manipi.types.Frame`.

| module | |
|---|---|
| `dataset` | what every reader offers; `open_dataset`, `frames`, `action_chunks` |
| `lerobot`, `lerobot_index`, `lerobot_tables` | LeRobot v2.0, v2.1 and v3.0: the reader, metadata, tables |
| `lerobot_writer`, `lerobot_stats` | LeRobot v3.0, written whole or not at all |
| `video` | exact frames out of video files, and into them |
| `cache` | decoded pictures, at the size the model takes, in a memory-mapped file |
| `subset` | some episodes of a dataset as a dataset of their own |
| `sampler`, `split` | which rows form step s; train and held-out episodes |
| `loader` | batches, from worker processes |
| `stats` | norm stats |
| `idle` | frames in which a robot does nothing |
| `check`, `checks` | what is wrong with a dataset; the episodes that cannot be trained on |
| `view`, `describe` | an episode to look at; what is in a dataset, and a robot that would fit |
"""
