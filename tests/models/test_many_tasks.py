"""What a model with two hundred tasks costs."""

import time

import pytest
import torch
from helpers_tasks import STRONG, bert

from adapter_ops import add_adapter, delete_adapter, load_adapter, save_adapter

pytestmark = pytest.mark.usefixtures("aten")


def test_loading_takes_no_longer_beside_two_hundred_tasks(tmp_path):
    """CPU time of the fastest of twenty loads; the models take turns, since other processes slow some loads down."""
    models = {}
    for count in (1, 200):
        torch.manual_seed(0)
        model = models[count] = bert(num_hidden_layers=4)
        add_adapter(model, "t", STRONG)
        save_adapter(model, tmp_path, "t")
        for i in range(1, count):
            load_adapter(model, tmp_path, f"t{i}")
    seconds = {count: [] for count in models}
    for _ in range(20):
        for count, model in models.items():
            start = time.process_time()
            load_adapter(model, tmp_path, "again")
            seconds[count].append(time.process_time() - start)
            delete_adapter(model, "again")
    assert min(seconds[200]) <= 1.5 * min(seconds[1]), seconds
