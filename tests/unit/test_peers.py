"""The models that MTGR is compared with: their equations, what they may see, and what the ablations take away."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from mtgr.config import ModelConfig
from mtgr.errors import ConfigurationError
from mtgr.model import MTGR
from mtgr.model.norm import GroupLayerNorm
from mtgr.peers.dlrm import DLRM
from mtgr.peers.norm import SharedLayerNorm, share_norms
from mtgr.peers.sasrec import SASRec, SASRecBlock
from mtgr.peers.zoo import MODELS, Trainable, find_model
from mtgr.schema import ABSENT, FIRST_COLUMN
from mtgr.training.batches import Batch, collate
from mtgr.training.loop import Trainer
from mtgr.training.prepare import PreparedData, prepare
from mtgr.training.recipe import Recipe
from tests.unit.synthetic import LIKED, SyntheticDataset

CONFIG = ModelConfig(d_model=16, item_dim=8, feature_dim=4, head_dim=8, num_experts=2, relative_bias=True)
NAMES = list(MODELS)


@pytest.fixture(scope="module")
def data() -> PreparedData:
    return prepare(SyntheticDataset(), LIKED, max_history=16, realtime_step=8)


def make(name: str, data: PreparedData) -> tuple[Trainable, PreparedData]:
    spec = find_model(name)
    own = data.with_schema(spec.schema(data.schema))
    torch.manual_seed(0)
    model = spec.build(CONFIG, own.schema, own.catalog).eval()
    with torch.no_grad():  # away from zeros and ones, so that every part shows
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model, own


def some_batch(data: PreparedData) -> Batch:
    samples = data.train_samples()
    return collate([samples[0], samples[5], samples[9]])


def numpy_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def layer_norm(x: np.ndarray, norm: torch.nn.LayerNorm) -> np.ndarray:
    scaled = (x - x.mean()) / np.sqrt(x.var() + norm.eps)
    return scaled * numpy_of(norm.weight) + numpy_of(norm.bias)


def test_sasrec_block_follows_its_equations() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, num_heads=2)
    block = SASRecBlock(config).eval()
    n, k, d, width = 4, 2, config.d_model, config.d_model // 2
    x = torch.randn(1, n + k, d)
    visible = torch.rand(1, 1, n + k, n) < 0.6
    visible[0, 0, range(n), range(n)] = True
    got = numpy_of(block(x, torch.zeros(1, n + k, dtype=torch.int32), visible.float(), None, None, n))[0]

    rows = numpy_of(x)[0]
    weight = {name: numpy_of(parameter) for name, parameter in block.named_parameters()}
    for i in range(n + k):
        normal = layer_norm(rows[i], block.attention_norm)
        keys = [j for j in range(n) if visible[0, 0, i, j]] + ([i] if i >= n else [])
        query = weight["query.weight"] @ normal + weight["query.bias"]
        key_values = [weight["key_value.weight"] @ rows[j] + weight["key_value.bias"] for j in keys]
        attended = np.zeros(d)
        for head in range(2):
            part = slice(head * width, (head + 1) * width)
            logits = np.array([query[part] @ kv[:d][part] / np.sqrt(width) for kv in key_values])
            shares = np.exp(logits) / np.exp(logits).sum()
            attended[part] = sum(share * kv[d:][part] for share, kv in zip(shares, key_values, strict=True))
        hidden = layer_norm(normal + attended, block.feed_forward_norm)
        inner = np.maximum(weight["feed_forward.0.weight"] @ hidden + weight["feed_forward.0.bias"], 0.0)
        expected = hidden + weight["feed_forward.3.weight"] @ inner + weight["feed_forward.3.bias"]
        np.testing.assert_allclose(got[i], expected, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_candidates_do_not_see_what_is_not_earlier(name: str, data: PreparedData) -> None:
    model, own = make(name, data)
    batch = some_batch(own)
    before, _ = model.training_outputs(batch.context, batch.candidates)
    time = own.schema.time_column
    changed = batch.context.clone()
    middle = int(batch.candidates[0, : int(batch.valid[0].sum()), time].median())
    later = (changed[0, :, 0] == 3) & (changed[0, :, time] >= middle)
    assert later.any()
    changed[0, later, FIRST_COLUMN] = 3 + changed[0, later, FIRST_COLUMN] % 20
    changed[0, later, 4] = 2
    after, _ = model.training_outputs(changed, batch.candidates)
    early = batch.valid[0] & (batch.candidates[0, :, time] <= middle)
    torch.testing.assert_close(before[0, early], after[0, early])
    assert (before[0, batch.valid[0] & ~early] - after[0, batch.valid[0] & ~early]).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_queries_do_not_see_later_events(name: str, data: PreparedData) -> None:
    model, own = make(name, data)
    batch = some_batch(own)
    _, before = model.training_outputs(batch.context, batch.candidates)
    changed = batch.context.clone()
    last = int((changed[1, :, 0] > 0).sum()) - 1
    changed[1, last, FIRST_COLUMN] = 3 + changed[1, last, FIRST_COLUMN] % 20
    _, after = model.training_outputs(changed, batch.candidates)
    realtime = (changed[1, :last, 0] == 3).nonzero()[:, 0]
    torch.testing.assert_close(before[1, realtime], after[1, realtime])
    assert (before[1, last] - after[1, last]).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_company_do_not_matter(name: str, data: PreparedData) -> None:
    model, own = make(name, data)
    samples = own.train_samples()
    alone = collate([samples[0]])
    together = collate([samples[0], max(samples, key=lambda sample: len(sample.context))])
    assert together.context.shape[1] > alone.context.shape[1]
    k = alone.candidates.shape[1]
    one, _ = model.training_outputs(alone.context, alone.candidates)
    two, _ = model.training_outputs(together.context, together.candidates)
    torch.testing.assert_close(one[0], two[0, :k], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        model.next_item_logits(alone.context)[0], model.next_item_logits(together.context)[0], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_retrieval_is_what_training_asked_for(name: str, data: PreparedData) -> None:
    model, own = make(name, data)
    alone = collate([own.train_samples()[0]])
    _, queries = model.training_outputs(alone.context, alone.candidates)
    head = model.next_item_head
    expected = head(queries[:, -1], model.embedding.item.all()[2:], head.bias[2:])
    torch.testing.assert_close(model.next_item_logits(alone.context), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_each_learns_in_the_same_trainer(name: str, data: PreparedData) -> None:
    model, own = make(name, data)
    losses: list[float] = []
    recipe = Recipe(epochs=4, batch_tokens=512, learning_rate=1e-2, column_dropout=0.2, threads=1)
    Trainer(model, own.train_samples(), recipe).train(lambda _, loss: losses.append(loss))
    assert losses[-1] < losses[0] - 0.2


def test_dlrm_interactions_are_dot_products(data: PreparedData) -> None:
    model, own = make("dlrm", data)
    assert isinstance(model, DLRM)
    batch = some_batch(own)
    seen: list[Tensor] = []
    model.top.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.training_outputs(batch.context, batch.candidates)
    width, fields = CONFIG.d_model, 1 + len(model.embedding.candidate_columns) + 3
    values = numpy_of(seen[0][0, 0])
    vectors = values[: fields * width].reshape(fields, width)
    expected = [vectors[i] @ vectors[j] / np.sqrt(width) for i in range(fields) for j in range(i + 1, fields)]
    np.testing.assert_allclose(values[fields * width :], expected, atol=1e-5)


def test_dlrm_pools_the_latest_events(data: PreparedData) -> None:
    model, _ = make("dlrm", data)
    assert isinstance(model, DLRM)
    tokens = torch.randn(1, 10, CONFIG.d_model)
    types = torch.tensor([[1, 1, 2, 2, 2, 3, 3, 3, 3, 3]], dtype=torch.int32)
    seen = torch.ones(1, 1, 10, dtype=torch.bool)
    seen[..., 9] = False
    profile, events, latest = model._pools(tokens, types, seen)
    torch.testing.assert_close(profile[0, 0], tokens[0, :2].mean(dim=0))
    torch.testing.assert_close(events[0, 0], tokens[0, 2:9].mean(dim=0))
    torch.testing.assert_close(latest[0, 0], tokens[0, 4:9].mean(dim=0))
    assert all(not pool.any() for pool in model._pools(tokens, types, torch.zeros_like(seen)))


def test_shared_norm_is_group_norm_with_one_gain() -> None:
    torch.manual_seed(0)
    group, shared = GroupLayerNorm(8, 1e-6), SharedLayerNorm(8, 1e-6)
    with torch.no_grad():
        shared.gain.normal_()
        shared.bias.normal_()
        group.gain.copy_(shared.gain.expand_as(group.gain))
        group.bias.copy_(shared.bias.expand_as(group.bias))
    x, types = torch.randn(2, 5, 8), torch.tensor([[1, 2, 3, 4, 0], [1, 1, 3, 4, 4]])
    torch.testing.assert_close(shared(x, types), group(x, types))


def test_sharing_norms_leaves_none_by_type(data: PreparedData) -> None:
    model = MTGR(CONFIG, data.schema, data.catalog.features.shape[1])
    count = sum(isinstance(module, GroupLayerNorm) for module in model.modules())
    share_norms(model)
    assert count == 2 * CONFIG.num_layers + 1
    assert sum(isinstance(module, SharedLayerNorm) for module in model.modules()) == count
    assert not any(isinstance(module, GroupLayerNorm) for module in model.modules())


def test_ablations_take_away_one_thing_each(data: PreparedData) -> None:
    whole, _ = make("mtgr", data)
    causal, _ = make("mtgr-no-dynamic-mask", data)
    assert dataclasses.replace(causal.config, static_attention="full") == whole.config
    no_cross, own = make("mtgr-no-cross-features", data)
    assert own.schema.candidate_columns == ("item", "time")
    rows = own.train_samples()[0].candidates
    assert not rows[:, FIRST_COLUMN + 2 :].any()
    assert rows[:, FIRST_COLUMN].all()
    assert no_cross.config == whole.config
    one_norm, _ = make("mtgr-no-group-norm", data)
    assert one_norm.config == whole.config
    assert not any(isinstance(module, GroupLayerNorm) for module in one_norm.modules())
    assert isinstance(make("sasrec", data)[0], SASRec)


def test_hidden_columns_are_hidden(data: PreparedData) -> None:
    model, own = make("dlrm", data)
    with torch.no_grad():
        model.wide_terms.table.weight.zero_()  # it is shown everything, by design
    batch = some_batch(own)
    hidden = torch.zeros(batch.candidates.shape, dtype=torch.bool)
    hidden[..., FIRST_COLUMN] = True
    other = batch.candidates.clone()
    other[..., FIRST_COLUMN] = ABSENT
    got, _ = model.training_outputs(batch.context, batch.candidates, hidden)
    expected, _ = model.training_outputs(batch.context, other)
    torch.testing.assert_close(got, expected)


def test_unknown_model() -> None:
    with pytest.raises(ConfigurationError, match="sasrec"):
        find_model("bert4rec")
