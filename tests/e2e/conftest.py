import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where data and tiny policy lie, made once by the first run that needs them."""
    return tmp_path_factory.mktemp("cache")
