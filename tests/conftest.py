"""For pytest: every check draws from its own seed, as under `python sanity_check.py`."""
import pytest

from tests.helpers import seed_check


@pytest.fixture(autouse=True)
def own_seed(request):
    seed_check(request.node.name)
