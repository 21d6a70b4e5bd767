"""python -m bench grouped: every provider is right, a wrong one is not timed, and rows are as they are called."""

import pytest
import torch

from bench.commands import main
from bench.grouped import command, providers

SMALL = ["--shape", "60x16x4", "--tasks", "3", "--seconds", "0.01"]


@pytest.mark.parametrize("T", [1, 3, 7, 80])
def test_rows_of_tasks(T):
    even, zipf = (command.rows_of_tasks(60, T, spread) for spread in command.SPREADS)
    assert len(even) == len(zipf) == T and sum(even) == sum(zipf) == 60
    assert max(even) - min(even) <= 1
    assert zipf[0] == round(60 / sum(1 / (t + 1) for t in range(T)))


def test_every_provider_is_timed(capsys, tmp_path):
    path = tmp_path / "table.txt"
    assert main(["grouped", *SMALL, "--out", str(path)]) == 0
    text = capsys.readouterr().out
    assert path.read_text() == text and "not timed" not in text
    timed = {name for name in providers.PROVIDERS if name != "adapterhub-split"}
    for spread in command.SPREADS:
        for order in command.ORDERS:
            for mode in command.MODES:
                lines = [line for line in text.splitlines() if f"{spread}, {order} " in line and f" {mode} " in line]
                assert timed <= {line.split()[3] for line in lines}


def test_a_wrong_provider_is_not_timed(monkeypatch, capsys):
    wrong = providers.Provider(lambda: lambda b, x, parameters: providers.loop(b, x, parameters) * 1.001)
    only = ["--modes", "fwd", "--spread", "even", "--order", "sorted"]
    monkeypatch.setitem(providers.PROVIDERS, "padded-bmm", wrong)
    assert main(["grouped", *SMALL, *only, "--providers", "padded-bmm,loop"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("padded-bmm" in line and "not timed: the error of y" in line for line in lines)
    assert any("loop" in line and "not timed" not in line and line.lstrip().startswith("3") for line in lines)
    assert main(["grouped", *SMALL, *only, "--providers", "padded-bmm"]) == 1


def test_a_batch_knows_its_order():
    ids = torch.tensor([2, 0, 2, 1, 0])
    batch = providers.Batch(ids, 4, 8, 2, torch.float32, "cpu")
    x = torch.arange(5.0)[:, None].expand(5, 8)
    assert batch.lengths == [2, 1, 2, 0] and not batch.is_sorted
    assert batch.by_task(x)[:, 0].tolist() == [1, 4, 3, 0, 2]
    assert torch.equal(batch.as_before(batch.by_task(x)), x)
