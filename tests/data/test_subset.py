"""Some episodes of a dataset are a dataset."""

import pickle

import numpy as np
import pytest

from manipi.data.dataset import EpisodeSubset
from manipi.data.open import open_dataset
from manipi.errors import ConfigError

CAMERA = "observation.images.top"


def test_rows_are_those_of_the_chosen_episodes(written, dataset):
    """Episodes of 20, 7, 13, 1 and 9 frames; 4 and 1 in this order."""
    chosen = open_dataset(written, episodes=(4, 1))
    rows = np.r_[41:50, 20:27]
    assert [(e.index, e.start, e.length, e.task) for e in chosen.episodes] == [
        (4, 0, 9, dataset.episodes[4].task),
        (1, 9, 7, dataset.episodes[1].task),
    ]
    assert chosen.num_frames == 16
    np.testing.assert_array_equal(chosen.column("action"), dataset.column("action")[rows])
    for served in (chosen, pickle.loads(pickle.dumps(chosen))):
        shuffled = np.array([15, 0, 8, 9])
        np.testing.assert_array_equal(served.images(CAMERA, shuffled), dataset.images(CAMERA, rows[shuffled]))
        assert [served.prompt(r) for r in (8, 9)] == [dataset.prompt(49), dataset.prompt(20)]
    assert chosen.locate(10) == "episode 1, frame 1"


def test_fingerprint_names_the_choice(written, dataset):
    prints = {open_dataset(written, episodes=e).fingerprint for e in ((), (0, 1), (1, 0), (0, 2), (0, 1, 2, 3, 4))}
    assert len(prints) == 5
    assert open_dataset(written, episodes=(0, 1)).fingerprint in prints


@pytest.mark.parametrize(("numbers", "found"), [((0, 9), r"unknown \[9\]"), ((1, 1), r"\[1, 1\]")])
def test_unknown_or_repeated_episode(dataset, numbers, found):
    with pytest.raises(ConfigError, match=rf"(?s)each episode once, from 0 to 4.*{found}"):
        EpisodeSubset(dataset, numbers)
