"""Recordings in other formats, read episode by episode for `manipi.data.convert`.

| module | |
|---|---|
| `source` | what every source offers; `open_source`, which recognises the format |
| `hdf5` | ALOHA; robomimic and LIBERO |
| `droid` | DROID as it was recorded: HDF5 and MP4 |
| `replay_buffer` | Zarr in diffusion_policy's layout, UMI's among them |
| `dataset` | whatever `manipi.data.dataset.open_dataset` opens |
"""
