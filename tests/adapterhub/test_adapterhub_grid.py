"""Every wiring of an adapter that AdapterHub has, in a post-norm and in a pre-norm model: the same, or refused.

Three directions: a folder of AdapterHub read by us, a folder of ours read by AdapterHub, and AdapterHub's live modules
made fast. Outputs, and the gradients of the inputs and of the adapters, are compared.

Combinations that AdapterHub itself cannot run count as "fails": residual_before_ln="post_add" needs
original_ln_before=True and a LayerNorm behind the sublayer, which a pre-norm model has not. (AdapterHub leaves the
residual unset there, an UnboundLocalError.)
"""

import itertools
from collections import Counter

import pytest
import torch
from hub_helpers import assert_same, bert, gpt2, hub_run, needs_hub, ours_as_hub, randomise, run

from adapter_ops.integrations.adapterhub import accelerate, load_adapterhub, save_adapterhub
from adapter_ops.models.config import AdapterConfig
from adapter_ops.models.tasks import add_adapter, delete_adapter

pytestmark = needs_hub

WIRING = {
    "original_ln_before": (False, True),
    "original_ln_after": (False, True),
    "residual_before_ln": (True, False, "post_add"),
    "ln_before": (False, True),
    "ln_after": (False, True),
    "adapter_residual_before_ln": (False, True),
}
PLACEMENTS = [("mh_adapter",), ("output_adapter",), ("mh_adapter", "output_adapter")]


class Models:
    """Two models with the same weights, one of them AdapterHub's, and inputs for both."""

    def __init__(self, make):
        import adapters

        self.ours, self.hub = make(), make()
        adapters.init(self.hub)
        self.inputs = {"inputs_embeds": torch.randn(4, 6, 32)}

    def add_to_hub(self, placement, **fields):
        """Gives AdapterHub's model a random adapter "a"; returns its results, or None where AdapterHub fails."""
        import adapters

        there = {place: place in placement for place in PLACEMENTS[-1]}
        config = adapters.BnConfig(reduction_factor=8, non_linearity="gelu", **there, **fields)
        self.hub.add_adapter("a", config=config, set_active=True)
        randomise(self.hub, "adapters.")
        self.hub.eval()
        return self.hub_results()

    def hub_results(self):
        try:
            return hub_run(self.hub, self.inputs)
        except UnboundLocalError:
            return None

    def our_results(self):
        return ours_as_hub(self.ours, "a", run(self.ours, self.inputs))


@pytest.fixture(scope="module", params=[bert, gpt2])
def models(request):
    return Models(request.param)


def wirings(is_parallel):
    for placement, *values in itertools.product(PLACEMENTS, *WIRING.values()):
        yield placement, dict(zip(WIRING, values), is_parallel=is_parallel)


def differs(found, expected):
    """Whether results are not the same; to collect all that differ and not stop at the first."""
    try:
        assert_same(found, expected)
    except AssertionError:
        return True
    return False


# What comes of the 288 combinations of wiring and placement. Of a parallel adapter AdapterHub looks at
# original_ln_after, ln_before and ln_after alone.
READ = {
    ("BertModel", False): {"same": 66, "refused": 174, "fails": 48},
    ("BertModel", True): {"same": 24, "refused": 264},
    ("GPT2Model", False): {"same": 54, "refused": 138, "fails": 96},
    ("GPT2Model", True): {"same": 24, "refused": 264},
}


@pytest.mark.parametrize("is_parallel", [False, True])
def test_reads_the_same_or_refuses(models, is_parallel, tmp_path):
    counts, wrong = Counter(), []
    for placement, fields in wirings(is_parallel):
        expected = models.add_to_hub(placement, **fields)
        models.hub.save_adapter(str(tmp_path / "a"), "a")
        models.hub.delete_adapter("a")
        if expected is None:
            counts["fails"] += 1
            continue
        try:
            load_adapterhub(models.ours, tmp_path / "a")
        except ValueError:
            counts["refused"] += 1
            continue
        counts["same"] += 1
        if differs(models.our_results(), expected):
            wrong.append((placement, fields))
        delete_adapter(models.ours, "a")
    assert not wrong
    assert counts == READ[type(models.ours).__name__, is_parallel]


def configs():
    """Every AdapterConfig that there is over the fields that say where things stand."""
    placements = [("attention",), ("ffn",), ("attention", "ffn"), "parallel"]
    norms = [(None, "before"), ("layer", "before"), ("layer", "after"), ("batch", "before"), ("batch", "after")]
    for placement, before, after, residual, (norm, position) in itertools.product(
        placements, (False, True), (False, True), ("output", "input"), norms
    ):
        fields = dict(placement=placement, ln_before=before, ln_after=after, residual=residual)
        try:
            yield AdapterConfig(bottleneck=4, layer_norms="frozen", norm=norm, norm_position=position, **fields)
        except ValueError:
            continue


def test_writes_the_same_or_refuses(models, tmp_path):
    counts, wrong = Counter(), []
    for i, config in enumerate(configs()):
        folder = tmp_path / str(i)
        add_adapter(models.ours, "a", config, modules=())
        randomise(models.ours.eval(), "adapter_ops")
        try:
            save_adapterhub(models.ours, folder, "a")
        except ValueError:
            counts["refused"] += 1
            assert not folder.exists()
        else:
            counts["same"] += 1
            models.hub.load_adapter(str(folder), set_active=True)
            models.hub.eval()
            expected = models.hub_results()
            models.hub.delete_adapter("a")
            if expected is None or differs(models.our_results(), expected):
                wrong.append(config)
        delete_adapter(models.ours, "a")
    assert not wrong
    assert counts == {"same": 40, "refused": 60}


@pytest.mark.parametrize("is_parallel", [False, True])
def test_accelerate_changes_nothing(models, is_parallel):
    wrong = []
    for placement, fields in wirings(is_parallel):
        expected = models.add_to_hub(placement, **fields)
        if expected is not None:
            swaps = {swap.swapped for swap in accelerate(models.hub)}
            assert swaps == {not fields["ln_after"]}  # which has no fused form
            if differs(models.hub_results(), expected):
                wrong.append((placement, fields))
        models.hub.delete_adapter("a")
    assert not wrong
