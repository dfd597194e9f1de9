"""Robot datasets: read, written, sampled and loaded as `manipi.types.Frame`.

| module | |
|---|---|
| `dataset` | what every reader offers; `open_dataset`, `frames`, `action_chunks` |
| `lerobot`, `lerobot_index`, `lerobot_tables` | LeRobot v2.0, v2.1 and v3.0: the reader, metadata, tables |
| `rlds`, `rlds_index` | RLDS (DROID, Open X-Embodiment): episodes, metadata and the index of record files |
| `rlds_fields`, `tfrecord` | which features become which keys; record files, without TensorFlow |
| `lerobot_writer`, `lerobot_stats` | LeRobot v3.0, written whole or not at all |
| `lerobot_episode` | one episode, encoded apart from the dataset that it will be in |
| `convert`, `sources/` | other formats to LeRobot v3.0, by several processes; one reader per format |
| `video` | exact frames out of video files, and into them |
| `cache` | decoded pictures, at the size the model takes, kept on disk from their first use on |
| `subset` | some episodes of a dataset as a dataset of their own |
| `sampler`, `split` | which rows form step s; train and held-out episodes |
| `source` | a dataset as a robot's pipeline reads it: rows in, samples out |
| `mixture` | several datasets and robots in one stream |
| `idle`, `filters`, `mask` | frames that are not worth training on; the rules, and the file that keeps the rest |
| `loader` | batches, from worker processes |
| `helper` | processes that help another one, such as the loader's |
| `shared` | memory that processes share: batches on their way, and columns |
| `stats`, `sketch`, `stats_plot` | norm stats; pieces of them that merge; a picture of them |
| `chunk_error` | how far action chunks are from recorded ones, and what simple baselines would have said |
| `check`, `checks` | what is wrong with a dataset; the episodes that cannot be trained on |
| `view`, `describe` | an episode to look at; what is in a dataset, and a robot that would fit |
"""
