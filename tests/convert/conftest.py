from tests.data.conftest import episodes as episodes
from tests.data.conftest import write as write
