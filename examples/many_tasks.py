"""Many tasks on one frozen base, served from several threads at once, each request under its own task.

Each answer is compared with that of a model that has this one task alone.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from adapter_ops import add_adapter, load_task_state_dict, task_state_dict, using_adapter

TASKS = {f"has-{word}": word for word in range(6)}  # A text has the label 1 if it contains this word.
torch.set_num_threads(1)  # Requests run side by side, so one request needs no threads of its own.


def base() -> BertForSequenceClassification:
    torch.manual_seed(0)  # the same random weights every time
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    return BertForSequenceClassification(BertConfig(vocab_size=16, initializer_range=0.1, **sizes)).eval()


@torch.no_grad()
def answer(task: str, ids: Tensor) -> Tensor:
    with using_adapter(model, task):  # in this thread alone
        meeting.wait()  # Every thread has chosen its task before one of them calls the model.
        return model(ids).logits


model = base()
for task, word in TASKS.items():
    add_adapter(model, task)  # The new task is active, and its parameters are the only ones that train.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(30):
        ids = torch.randint(16, (32, 12))  # [B, T]
        model(ids, labels=(ids == word).any(1).long()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

meeting = Barrier(len(TASKS), timeout=60)
requests = [(task, torch.randint(16, (32, 12))) for _ in range(10) for task in TASKS]
with ThreadPoolExecutor(len(TASKS)) as pool:
    answers = list(pool.map(answer, *zip(*requests)))
right = [logits.argmax(-1) == (ids == TASKS[task]).any(1) for (task, ids), logits in zip(requests, answers)]
share = torch.cat(right).float().mean()
print(f"{len(TASKS)} threads answered {len(requests)} requests; {share:.0%} of the labels are right.")

alone = {task: base() for task in TASKS}
for task, other in alone.items():
    add_adapter(other, task)
    load_task_state_dict(other, task, task_state_dict(model, task))
with torch.no_grad():
    if not all(torch.equal(alone[task](ids).logits, logits) for (task, ids), logits in zip(requests, answers)):
        sys.exit("An answer differs from that of a model that has its task alone.")
print("Each answer is equal, bit for bit, to that of a model that has its task alone.")
