"""Robot datasets: read, written, sampled and loaded as `manipi.types.Frame`.

| module or package | |
|---|---|
| `dataset` | what every reader offers; `frames`, `action_chunks`, some episodes as a dataset of their own |
| `open` | which reader opens a folder or URL |
| `lerobot` | LeRobot v2.0, v2.1 and v3.0 read, v3.0 written; exact frames out of video files, and into them |
| `rlds` | RLDS (DROID, Open X-Embodiment): features and keys, record files without TensorFlow, their index |
| `feed` | sampler, mixture, picture cache and loader: from rows to batches |
| `norm_stats` | norm stats, pieces of them that merge, and a picture of them |
| `review` | what is in a dataset and what is wrong with it; frames that are not worth training on |
| `recorder` | what a robot saw, was told and did, as it happens |
| `action_error` | how far action chunks are from recorded ones, and what simple baselines would have said |
| `dimensions` | what the dimensions of states and commands are called |
"""
