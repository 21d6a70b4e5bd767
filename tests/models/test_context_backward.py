"""Backward runs the task of its forward, in whichever thread PyTorch runs it."""

import _thread
import contextvars
import threading

import pytest
import torch
from helpers_context import PRESETS, two_tasks
from helpers_families import forward
from helpers_tasks import checkpoint_layers

from adapter_ops import active_adapter, using_adapter

pytestmark = pytest.mark.usefixtures("aten")


@pytest.mark.parametrize("preset", PRESETS)
def test_threads_that_train_do_not_meet(preset):
    """Forward and backward in two threads at once: each task's gradients are what they are alone."""
    model, inputs = two_tasks("bert", preset)
    model.requires_grad_(False)
    tasks = {name: model.adapter_ops.task(name).requires_grad_(True) for name in ("a", "b")}

    def gradients(name):
        with using_adapter(model, name):
            loss = forward(model, inputs)[0].square().sum()
            return torch.autograd.grad(loss, list(tasks[name].parameters()))

    expected, found = {name: gradients(name) for name in tasks}, {}
    threads = [
        threading.Thread(target=lambda n=name, i=i: found.__setitem__((n, i), gradients(n)))
        for i in range(3)
        for name in tasks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for (name, _), gradient in found.items():
        for f, e in zip(gradient, expected[name]):
            torch.testing.assert_close(f, e)


@pytest.mark.skipif(not hasattr(torch.autograd.graph, "contextvars"), reason="needs PyTorch 2.12")
def test_backward_in_a_thread_of_autograds(monkeypatch):
    """On a GPU backward, and so a checkpointed layer, runs in another thread than the caller's. PyTorch hands it the
    caller's context, which stands here for a context of the thread's own."""
    model, _ = two_tasks("bert", "houlsby")
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda g: seen.append(active_adapter(model)))

    def backward(context):
        monkeypatch.setattr(torch.autograd.graph.contextvars, "copy_context", lambda: context)
        y.sum().backward(retain_graph=True)

    with using_adapter(model, "a"):
        context = contextvars.copy_context()
        thread = threading.Thread(target=backward, args=(context,))
        thread.start()
        thread.join()
    assert seen == ["a"] and active_adapter(model) == "b"


def test_backward_in_a_thread_that_has_no_context_is_refused_within_a_block(monkeypatch):
    """PyTorch before 2.12 hands no context to autograd's threads, which Python did not start."""
    model, _ = two_tasks("bert", "houlsby")
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda g: seen.append(active_adapter(model)))
    monkeypatch.setattr(torch._C, "_is_key_in_tls", lambda key: False)

    def backward(done):
        try:
            y.sum().backward(retain_graph=True)
        except RuntimeError as error:
            seen.append(error)
        done.set()

    def elsewhere():
        done = threading.Event()
        _thread.start_new_thread(backward, (done,))
        assert done.wait(60)
        return seen.pop()

    assert elsewhere() == "b"  # the default, since no block is open
    with using_adapter(model, "a"):
        assert "train with set_active_adapter or train_adapter" in str(elsewhere())
        thread = threading.Thread(target=backward, args=(threading.Event(),))  # one of the user's
        thread.start()
        thread.join()
        assert seen.pop() == "b"
        y.sum().backward(retain_graph=True)
        assert seen.pop() == "a"
    assert elsewhere() == "b"


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_in_a_context(reentrant):
    model, inputs = two_tasks("bert", "parallel")
    trained = list(model.adapter_ops.task("a").requires_grad_(True).parameters())
    with using_adapter(model, "a"):
        expected = torch.autograd.grad(forward(model, inputs)[0].square().sum(), trained)
        checkpoint_layers(model, reentrant)
        forward(model, inputs)[0].square().sum().backward()
    for p, e in zip(trained, expected):
        torch.testing.assert_close(p.grad, e)
