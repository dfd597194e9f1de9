"""RLDS without TensorFlow: pictures of random frames per second, and how fast record files are indexed.

    python benchmarks/bench_rlds.py [--data ../shared/datasets/synthetic_droid_rlds/droidlike] [--camera NAME]

Every round does the same work in turn with the reader and with the least that it could be: decoding the same bytes from
memory, and reading the files for their checksums alone. A third way to a picture is what a reader without an index has
to do: read the record of its whole episode, check and parse it. To outweigh what indexing costs once, it indexes many
copies of the dataset (links to its file). Files come from the page cache; times are medians of CPU time.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from harness import Measure, report

from manipi.data.rlds.fields import RldsFields
from manipi.data.rlds.reader import RldsDataset, decode, open_rlds
from manipi.data.rlds.tfrecord import Example, masked_crc32c, read_records

ROUNDS, FRAMES, COPIES = 9, 64, 16
FIELDS = RldsFields(fps=15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/datasets/synthetic_droid_rlds/droidlike"))
    parser.add_argument("--camera", default="observation/wrist_image_left")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MANIPI_HOME"] = folder
        dataset = open_rlds(args.data, fields=FIELDS, show=False)
        access, bare, whole = medians(lambda round: pictures(dataset, args.camera, round))
        copies = copied(dataset, Path(folder) / "copies")
        index, checksums = medians(lambda round: indexing(copies, Path(folder) / f"{round}"))
        megabytes = sum(path.stat().st_size for path in copies.glob("*.tfrecord*")) / 1e6
    report(
        [
            Measure(name="random frames", value=1 / access, unit="/s CPU", goal=1_000, at_most=False),
            Measure(name="reader / decoding alone", value=access / bare, unit="×", goal=1.5),
            Measure(name="whole record / reader", value=whole / access, unit="×", goal=2, at_most=False),
            Measure(name="indexing", value=megabytes / index, unit="MB/s CPU", goal=500, at_most=False),
            Measure(name="indexing / checksums alone", value=index / checksums, unit="×", goal=2),
        ]
    )


def medians(measure: Callable[[int], tuple[float, ...]]) -> list[float]:
    return [median(values) for values in zip(*map(measure, range(ROUNDS)), strict=True)]


def cpu(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def pictures(dataset: RldsDataset, camera: str, round: int) -> tuple[float, float, float]:
    """CPU seconds per picture: by the reader, decoded from memory, and by way of the whole record."""
    rows = np.random.default_rng(round).permutation(dataset.num_frames)[:FRAMES]
    (path,) = dataset.root.glob("*-train.tfrecord*")
    records = list(read_records(path))
    places = []
    for row in rows:
        episode = int(dataset.episode_of(row))
        places.append((episode, int(row - dataset.starts[episode])))
    spans = [(records[e].data, *Example(records[e].data).spans(f"steps/{camera}")[f].tolist()) for e, f in places]
    encoded = [data[start : start + size] for data, start, size in spans]

    def by_record() -> None:
        with path.open("rb") as file:
            for episode, frame in places:
                file.seek(records[episode].offset)
                data = file.read(len(records[episode].data))
                assert masked_crc32c(data) == records[episode].checksum
                start, size = Example(data).spans(f"steps/{camera}")[frame].tolist()
                decode(data[start : start + size])

    ours = cpu(lambda: dataset.images(camera, rows))
    bare = cpu(lambda: [decode(data) for data in encoded])
    return ours / FRAMES, bare / FRAMES, cpu(by_record) / FRAMES


def copied(dataset: RldsDataset, root: Path) -> Path:
    """The dataset, `COPIES` times."""
    root.mkdir()
    (path,) = dataset.root.glob("*-train.tfrecord*")
    for i in range(COPIES):
        (root / f"{dataset.name}-train.tfrecord-{i:05d}-of-{COPIES:05d}").symlink_to(path)
    (root / "features.json").symlink_to(dataset.root / "features.json")
    split = {"name": "train", "shardLengths": [str(len(dataset.episodes))] * COPIES}
    (root / "dataset_info.json").write_text(json.dumps({"name": dataset.name, "splits": [split]}))
    return root


def indexing(root: Path, home: Path) -> tuple[float, float]:
    """CPU seconds of making the index, and of the checksums alone."""
    os.environ["MANIPI_HOME"] = str(home)
    made = cpu(lambda: open_rlds(root, fields=FIELDS, show=False))
    return made, cpu(lambda: [None for path in root.glob("*.tfrecord*") for _ in read_records(path)])


if __name__ == "__main__":
    main()
