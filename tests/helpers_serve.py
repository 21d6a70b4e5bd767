"""A tiny base with tasks in folders, and examples/serve.py as a process that answers for them."""

import http.client
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from adapter_ops import AdapterConfig, add_adapter, save_adapter, using_adapter

ROOT = Path(__file__).parent.parent
WORDS = [f"w{i}" for i in range(60)]


def make(folder, tasks=6):
    """Writes a BERT with random weights into folder/base, and tasks of it into folder/tasks.

    The last task has three labels and half the bottleneck, and the one before it has another config. Returns the model
    of each task, which has it, and the tokenizer.
    """
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    config = dict(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(hf.BertConfig(**config)).eval()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    three = hf.BertForSequenceClassification(hf.BertConfig(**config, id2label={0: "bad", 1: "fair", 2: "good"}))
    three.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("classifier.")}, strict=False
    )
    found = {}
    for i in range(tasks):
        name, owner = f"t{i}", three.eval() if i == tasks - 1 else model
        config = AdapterConfig(bottleneck=4 if i == tasks - 1 else 8)
        add_adapter(owner, name, "pfeiffer" if i == tasks - 2 else config)
        with torch.no_grad():
            for p in owner.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) / 3)
        save_adapter(owner, folder / "tasks" / name, name)
        found[name] = owner
    return found, tokenizer


@torch.no_grad()
def alone(owners, tokenizer, task, text):
    """What the service has to answer: the label and the scores that the task gives the text alone."""
    owner = owners[task]
    names = ["bad", "fair", "good"] if owner.config.num_labels == 3 else ["LABEL_0", "LABEL_1"]
    ids = torch.tensor([tokenizer(text, truncation=True, max_length=64)["input_ids"]])
    with using_adapter(owner, task):
        scores = owner(ids).logits[0].double().softmax(0)
    return names[int(scores.argmax())], dict(zip(names, scores.tolist()))


class Server:
    """The service as a user starts it. Its port is known when it says so on stderr, which `log` has."""

    def __init__(self, *arguments):
        ours = ("TRITON_INTERPRET", "ADAPTER_OPS_UNMEASURED", "ADAPTER_OPS_REQUIRE", "CUBLAS_WORKSPACE_CONFIG")
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, str(ROOT / "examples" / "serve.py"), *map(str, arguments), "--port", "0"]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        self.log, self.ready, self.port = "", threading.Event(), 0
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.log += line
            if match := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(match[1])
                self.ready.set()
        self.ready.set()

    def ask(self, method, path, body=None):
        """The status, the JSON (or the text, where it is none) and the headers."""
        assert self.ready.wait(60) and self.port, self.log
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = response.headers["content-type"] == "application/json"
        return response.status, json.loads(text) if is_json else text, response.headers

    def predict(self, task, given):
        """The status and the answer for a text, or for a list of texts."""
        field = "text" if isinstance(given, str) else "texts"
        status, answer, _ = self.ask("POST", "/predict", {"task": task, field: given})
        return status, answer

    def metrics(self):
        """Each sample's value by its name and labels."""
        from prometheus_client.parser import text_string_to_metric_families

        text = self.ask("GET", "/metrics")[1]
        families = text_string_to_metric_families(text)
        return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}

    def wait(self):
        """The exit status of the process, which has been told to end."""
        try:
            status = self.process.wait(timeout=60)
        finally:
            self.process.kill()
        self.reader.join()
        return status
