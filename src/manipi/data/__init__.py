"""Robot datasets: read, written, sampled and loaded as `manipi.types.Frame`.

| module or package | |
|---|---|
| `dataset`, `open` | what every reader offers, and what dimensions are called; which reader opens a folder or URL |
| `lerobot/`, `rlds/` | LeRobot v2.0, v2.1 and v3.0, read and written; RLDS without TensorFlow |
| `recorder` | runs of a robot as a dataset |
| `feed/` | from datasets to batches: order, mixtures, cached pictures, worker processes |
| `norm_stats` | computed and merged |
| `review/` | a dataset looked at before it is trained on: checks, filters, descriptions, pages |
| `action_error` | how far action chunks are from recorded ones, and what simple baselines would have said |
"""
