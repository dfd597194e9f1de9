"""What `manipi check` looks for: one module per kind of data, of any format, and one per format.

| module | finds |
|---|---|
| `report` | what a finding, an episode's facts and a report are |
| `lerobot` | metadata, tables and video lengths that disagree; rows out of order; timestamps without a picture |
| `values` | NaN, dimensions that never move, jumps, shaking, clipped and forbidden commands |
| `rotations` | angles that wrap; rotation vectors and quaternions that change their sign |
| `episodes` | pauses, episodes that are alike, instructions that are missing or spelled differently |
| `pictures` | frames that cannot be decoded, or are of another size |
| `page` | all of it as one HTML file |
"""
