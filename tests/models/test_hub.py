"""Tasks on the Hugging Face hub: uploaded, described and downloaded. A server on this machine stands for the hub."""

import copy
import json
import os
import re
import subprocess
import sys

import huggingface_hub
import huggingface_hub.constants as constants
import huggingface_hub.file_download
import pytest
import torch
from helpers_distributed import Pair, close, outputs, shard, with_tasks
from helpers_hub import cached, contents, served
from helpers_tasks import STRONG, TOKENS, bert, logits, step
from torch import nn

from adapter_ops import (
    AdapterConfig,
    SitePattern,
    adapter_summary,
    add_adapter,
    delete_adapter,
    list_adapters,
    load_adapter,
    push_adapter,
    save_adapter,
    set_active_adapter,
)
from adapter_ops.models import files, push
from adapter_ops.models.hub import is_hub_id

pytestmark = pytest.mark.usefixtures("aten")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder and an empty working directory; the hub is at a port where nothing answers."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    at(monkeypatch, "http://127.0.0.1:9")
    return tmp_path / "cache"


def at(monkeypatch, url):
    """Sends huggingface_hub there; one module of its older versions has a copy of one of the constants."""
    for module in (constants, huggingface_hub.file_download):
        for name, value in endpoint(url).items():
            if module is constants or hasattr(module, name):
                monkeypatch.setattr(module, name, value)


def endpoint(url):
    return {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}"}


@pytest.fixture
def hub(monkeypatch):
    with served() as hub:
        at(monkeypatch, hub.url)
        yield hub


@pytest.fixture
def trained():
    """A model with a task, and the same base without it."""
    torch.manual_seed(0)
    model, fresh = bert(), bert()
    fresh.load_state_dict(model.state_dict())
    add_adapter(model, "t", STRONG)
    step(model)
    return model, fresh


@pytest.fixture
def folder(trained, tmp_path):
    save_adapter(trained[0], tmp_path / "saved", "t")
    return tmp_path / "saved"


def failing(match, error, *args, **kwargs):
    """load_adapter raises this error and leaves the model as it was. Returns the message."""
    model = bert()
    before = {n: (id(p), p.requires_grad, p._version) for n, p in model.named_parameters()}
    with pytest.raises(error, match=match) as raised:
        load_adapter(model, *args, **kwargs)
    assert {n: (id(p), p.requires_grad, p._version) for n, p in model.named_parameters()} == before
    assert list_adapters(model) == {} and not hasattr(model, "adapter_ops")
    return str(raised.value)


def test_what_is_uploaded_loads_again(hub, trained):
    model, fresh = trained
    url = push_adapter(model, "user/name", "t")
    assert url == f"{hub.url}/user/name/commit/{hub.branches['user/name']['main']}"
    assert hub.files("user/name").keys() == {"adapter_ops.safetensors", "adapter_ops.json", "README.md"}
    assert hub.messages == ["Upload the adapter t"] and len(hub.commits["user/name"]) == 2  # the empty one, and this
    hub.requests.clear()
    assert load_adapter(fresh, "user/name") == "t"
    assert torch.equal(logits(fresh), logits(model))
    assert {path.rpartition("/")[2] for method, path in hub.requests if "/resolve/" in path} == {
        "adapter_ops.safetensors",
        "adapter_ops.json",
    }


def test_the_config_alone(hub, trained):
    push_adapter(trained[0], "user/task", "t")
    assert AdapterConfig.from_pretrained("user/task") == STRONG
    with pytest.raises(FileNotFoundError, match=r"has no revision 'old'"):
        AdapterConfig.from_pretrained("user/task", revision="old")


def test_branches_messages_and_private_repositories(hub, trained):
    model, fresh = trained
    push_adapter(model, "user/name", "t", private=True, commit_message="first")
    assert hub.private["user/name"] in (True, "private")
    first, was = hub.branches["user/name"]["main"], logits(model)
    step(model)
    push_adapter(model, "user/name", "t", revision="v2", commit_message="second")
    assert hub.messages == ["first", "second"] and hub.branches["user/name"]["main"] == first
    assert 'load_adapter(model, "user/name", revision="v2")' in push.card(
        model, files.read_header(saved(model)), adapter_summary(model).tasks[0], "user/name", "v2"
    )
    for name, revision, expected in (("a", None, was), ("b", first, was), ("c", "v2", logits(model))):
        load_adapter(fresh, "user/name", name, revision=revision)
        assert torch.equal(logits(fresh), expected)
    message = failing("has no revision 'v3'", FileNotFoundError, "user/name", revision="v3")
    assert "there is no folder 'user/name'" in message


def saved(model):
    save_adapter(model, "saved", "t")
    return "saved"


def test_a_card_that_is_there_stays(hub, trained):
    model, _ = trained
    push_adapter(model, "user/name", "t")
    hub.commit("user/name", {"README.md": b"mine", "notes.txt": b"too"})
    step(model)
    before = hub.files("user/name")
    push_adapter(model, "user/name", "t")
    after = hub.files("user/name")
    assert (after["README.md"], after["notes.txt"]) == (b"mine", b"too")
    assert after["adapter_ops.safetensors"] != before["adapter_ops.safetensors"]


def test_errors_come_before_anything_is_uploaded(hub, trained):
    model, _ = trained
    with pytest.raises(ValueError, match="no adapter 'other'; it has: t"):
        push_adapter(model, "user/name", "other")
    with pytest.raises(ValueError, match="a b"):
        push_adapter(model, "user/a b", "t")
    model.adapter_ops.tasks["t"].copies.classifier.register_buffer("n", torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"classifier\.n in .* has dtype 'I32'|classifier\.n .* dtype"):
        push_adapter(model, "user/name", "t")
    assert not hub.requests


def test_what_is_a_hub_id(tmp_path):
    for text in ("user/name", "user/name-1.0_x", "0/1", "_a/b"):
        assert is_hub_id(text), text
    paths = (
        "name",
        "./user/name",
        "../name",
        "~/name",
        "/user/name",
        "a/b/c",
        "user/",
        "user/.hidden",
        "a\\b",
        "a b/c",
    )
    for text in (*paths, "", ".", "user/name/", tmp_path / "name"):
        assert not is_hub_id(text), text


def test_a_path_is_never_looked_up(hub, trained, folder, tmp_path, monkeypatch):
    model, fresh = trained
    for text in ("name", "./user/name", "~/name", "a/b/c", str(tmp_path / "none"), tmp_path.__class__("user/name")):
        failing("does not exist, expected a folder with adapter_ops.safetensors", FileNotFoundError, text)
    folder.rename(tmp_path / "work" / "name")
    (tmp_path / "work" / "user").mkdir()
    (tmp_path / "work" / "name").rename(tmp_path / "work" / "user" / "name")
    load_adapter(fresh, "user/name")  # a folder here comes before a repository of that name
    assert torch.equal(logits(fresh), logits(model))
    failing("revision is 'v1', but 'user/name' is a local path and no hub id", ValueError, "user/name", revision="v1")
    failing("revision is 'v1'", ValueError, tmp_path / "x", revision="v1")
    (tmp_path / "work" / "user" / "file").touch()
    failing("user/file is a file, expected a folder", FileNotFoundError, "user/file")
    failing("does not exist", FileNotFoundError, f"user/{'n' * 200}")  # longer than an id may be
    assert not hub.requests


def test_without_huggingface_hub(trained, folder, monkeypatch):
    model, fresh = trained
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = failing("pip install 'adapter-ops\\[hub\\]'", ImportError, "user/name")
    assert message.startswith("there is no folder 'user/name'; to download it from the Hugging Face hub, the package")
    with pytest.raises(ImportError, match="to upload to the Hugging Face hub, the package huggingface_hub is needed"):
        push_adapter(model, "user/name", "t")
    load_adapter(fresh, folder)
    assert torch.equal(logits(fresh), logits(model))


def test_a_misspelt_folder(hub):
    message = failing("has no repository 'adapters/cola' that you may read", FileNotFoundError, "adapters/cola")
    assert message.startswith("there is no folder 'adapters/cola', and") and "HF_TOKEN" in message


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "unreachable"])
def test_without_a_connection(offline, cache, trained, folder, monkeypatch):
    """What the cache has loads; the error for what it has not says what to set."""
    model, fresh = trained
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    message = failing("not in the cache .*cache and cannot be downloaded", FileNotFoundError, "user/name")
    assert message.startswith("there is no folder 'user/name', and 'user/name' is not") and "HF_HUB_OFFLINE" in message
    commit = cached(cache, "user/name", contents(folder))
    cached(cache, "user/name", contents(folder), revision="v1")
    for name, revision in (("a", None), ("b", "v1"), ("c", commit)):
        load_adapter(fresh, "user/name", name, revision=revision)
        assert torch.equal(logits(fresh), logits(model))
    failing("'user/name' at the revision 'v2' is not in the cache", FileNotFoundError, "user/name", revision="v2")


def test_repositories_of_other_kinds(hub, cache, monkeypatch):
    hub.create("user/empty")
    failing(
        "'user/empty' on the Hugging Face hub has none of the files adapter_ops.safetensors, adapter_ops.json",
        FileNotFoundError,
        "user/empty",
    )
    hub.create("user/peft")
    hub.commit("user/peft", {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"x"})
    failing("belongs to a PEFT adapter", ValueError, "user/peft")
    hub.create("user/hub")
    config = b'{"config": {}, "model_type": "bert", "hidden_size": 32}'
    hub.commit("user/hub", {"adapter_config.json": config, "pytorch_adapter.bin": b"x" * 999})
    failing("belongs to an adapter of AdapterHub: use .*load_adapterhub", ValueError, "user/hub")
    assert not any(path.endswith((".bin", "adapter_model.safetensors")) for _, path in hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached(cache, "user/other", {"config.json": b"{}"})
    failing("'user/other' on the Hugging Face hub has none of", FileNotFoundError, "user/other")


def card_of(hub, repo="user/name"):
    return hub.files(repo)["README.md"].decode()


def test_the_cards_figures(hub, trained):
    model, _ = trained
    model.config._name_or_path = "user/base"
    push_adapter(model, "user/name", "t")
    text = card_of(hub)
    data = huggingface_hub.ModelCard(text).data
    assert data.base_model == "user/base" and data.library_name == "adapter-ops"
    assert data.tags == ["adapter", "adapter-ops", "bert"] and data.to_dict()["base_model_relation"] == "adapter"
    size = adapter_summary(model).tasks[0]
    base = adapter_summary(model).base
    for what, count in (
        ("adapters", size.adapters),
        ("LayerNorms", size.norms),
        ("other modules (`classifier`)", size.modules),
        ("all", size.total),
    ):
        assert f"| {what} | {count:,} | {count / base:.2%} |" in text
    assert "| `bottleneck` | `4` |" in text and "| `init_std` | `0.3` |" in text
    assert "5 outputs." in text and "| 4 | `LABEL_4` |" in text
    header = files.read_header(saved(model))
    assert header["base"]["digest"][:12] in text and f"adapter-ops {header['library']}" in text


def test_a_base_that_is_no_repository(hub, trained, tmp_path):
    """A local folder, which tells others nothing, is no metadata; nor is a path that is no longer there."""
    model, _ = trained
    (tmp_path / "work" / "out").mkdir()
    for name in ("out", "/home/me/out", "./out", "a/b/c", ""):
        model.config._name_or_path = name
        repo = f"user/base{len(hub.commits)}"
        push_adapter(model, repo, "t")
        text = card_of(hub, repo)
        assert json.loads(hub.files(repo)["adapter_ops.json"])["base"]["name"] is None
        assert b"/home/me" not in hub.files(repo)["adapter_ops.safetensors"]
        assert huggingface_hub.ModelCard(text).data.base_model is None
        assert '.from_pretrained("path/to/the/base/model", num_labels=5)' in text


def test_a_card_with_texts_of_a_users(hub):
    """Names and labels stay texts, whatever characters they have."""
    names = {0: "a|b", 1: "x\n---\n# y", 2: "```\n", 3: "<b>", 4: "`"}
    for task, labels in (("many", {n: f"c{n}" for n in range(60)}), ("odd", names)):
        other = bert(num_labels=len(labels), id2label=labels)
        add_adapter(other, task, STRONG)
        push_adapter(other, f"user/{task}", task)
    text = card_of(hub, "user/odd")
    rows = text[text.index("## Labels") :].splitlines()[6:]
    assert rows == [
        "| 0 | `a\\|b` |",
        "| 1 | `x --- # y` |",
        "| 2 | ```` ``` ```` |",
        "| 3 | `<b>` |",
        "| 4 | `` ` `` |",
    ]
    text = card_of(hub, "user/many")
    assert "60 outputs. The first 50 of them:" in text and "| 49 | `c49` |" in text and "c50" not in text


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_model_that_is_not_of_transformers(hub):
    model = Net()
    add_adapter(
        model, "t", STRONG.__class__(bottleneck=2, layer_norms="frozen"), sites={"ffn": SitePattern("blocks.*.0")}
    )
    push_adapter(model, "user/net", "t")
    text = card_of(hub, "user/net")
    assert "model = ...  # a Net\n" in text and "## Labels" not in text
    data = huggingface_hub.ModelCard(text).data
    assert data.tags == ["adapter", "adapter-ops"] and data.base_model is None
    twin = Net()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("adapter_ops")})
    load_adapter(twin, "user/net")
    x = torch.randn(3, 8)
    assert torch.equal(twin(x), model(x))


def test_the_cards_code_runs(hub, trained, tmp_path):
    """In a process of its own, offline, with the environment variables that users set."""
    model, fresh = trained
    fresh.save_pretrained(tmp_path / "base")
    model.config._name_or_path = "user/base"
    push_adapter(model, "user/name", "t")
    code = re.search("```python\n(.*?)```", card_of(hub), re.DOTALL)[1]
    assert 'BertForSequenceClassification.from_pretrained("user/base", num_labels=5)' in code
    cached(tmp_path / "home" / "hub", "user/base", contents(tmp_path / "base"))
    cached(tmp_path / "home" / "hub", "user/name", hub.files("user/name"))
    code += f"import torch\ntorch.save(model.eval()(torch.tensor({TOKENS.tolist()}))[0].detach(), 'logits.pt')\n"
    (tmp_path / "work" / "of_the_card.py").write_text(code)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": ""}
    del environment["HF_HUB_CACHE"]
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run(
        [sys.executable, "-W", "error::UserWarning:adapter_ops", "of_the_card.py"], env=environment, check=True
    )
    torch.testing.assert_close(torch.load("logits.pt"), logits(model))
    set_active_adapter(model, None)
    assert not torch.allclose(torch.load("logits.pt"), logits(model))


def _pushing(url, folder):
    at(pytest.MonkeyPatch(), url)  # for the process, which ends with the test
    constants.HF_HUB_CACHE = folder
    alone = with_tasks()
    shared = shard(copy.deepcopy(alone))
    found = push_adapter(shared, "user/shared", "a")
    assert found.startswith(f"{url}/user/shared/commit/")
    fresh = with_tasks()
    delete_adapter(fresh, "a")
    load_adapter(fresh, "user/shared")
    close({"a": outputs(fresh)["a"]}, {"a": outputs(alone)["a"]})
    with pytest.raises((ValueError, RuntimeError), match="a b"):  # raised by the first, told by it to the other
        push_adapter(shared, "user/a b", "a")


def test_a_sharded_model_is_uploaded_by_its_first_process(hub, tmp_path):
    pair = Pair(tmp_path)
    try:
        pair(_pushing, hub.url, str(tmp_path / "shared"))
    finally:
        pair.kill()
    assert hub.messages == ["Upload the adapter a"]
