"""One thread for the models here, which are tiny, and two processes for the tests of models that processes share."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def tiny_models(one_thread):
    """With two threads of PyTorch's they take up to ten times as long, as each worker of pytest has its own two."""


@pytest.fixture(scope="module")
def pairs():
    made = []
    yield made
    for pair in made:
        pair.kill()


@pytest.fixture
def both(pairs, tmp_path):
    """both(function, *arguments) runs a function in two processes of one group, which outlive the test."""
    from helpers_distributed import Pair  # not above, as the other tests here need nothing of torch.distributed

    if not pairs or not pairs[-1].alive:
        pairs.append(Pair(tmp_path))
    return pairs[-1]


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """Six tasks of different bottlenecks: their folder, and their outputs."""
    from helpers_bank import six_tasks

    return six_tasks(tmp_path_factory.mktemp("six"))
