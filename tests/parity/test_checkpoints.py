"""The reference's Orbax folders, read without JAX, hold the parameters bit for bit."""

import numpy as np
import pytest
from golden import ABSENT, CASES, find, name_of

# Of a training checkpoint, `<step>/params`; the others keep `params` at the top.
FOLDERS = [*find("models/*/ckpt_*/params"), *find("models/*/ckpt_*/*/params")]

pytestmark = pytest.mark.skipif(not CASES, reason=ABSENT)


def case_of(folder):
    return next(case for case in CASES if folder.is_relative_to(case.folder))


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_checkpoints(folder, measure):
    from manipi.weights.stores import OrbaxStore

    case = case_of(folder)
    found = OrbaxStore(folder).tree()
    assert found.keys() == case.params.keys()
    # bfloat16 where the reference keeps frozen weights so; widening is exact.
    errors = [np.abs(found[name].astype(np.float32) - value).max() for name, value in case.params.items()]
    measure("Orbax checkpoints", max(errors), 0)
    dtypes = [array.dtype.name for array in found.values()]
    if "ckpt_train" in folder.parts and "checkpoint_train_dtypes" in case.recorded:
        assert {name: dtypes.count(name) for name in set(dtypes)} == case.recorded["checkpoint_train_dtypes"]
    elif "ckpt_train" not in folder.parts:
        assert set(dtypes) == {"float32"}
