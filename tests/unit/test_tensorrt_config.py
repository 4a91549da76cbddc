"""Configs of the tensorrt models: they fit the plans, whatever profiles these have, on every kind of GPU."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from export.install import TEMPLATES, add_variant, keep_variants, template_hash
from export.tensorrt_config import ALONE_INSTANCES, fitted_text
from export.tensorrt_profiles import MAX_BATCH, bucket_profiles
from mtgr.routing.buckets import CONTEXT_BUCKETS
from tests.unit.fake_tensorrt import in_profile

MODELS = ("mtgr_tensorrt_rank", "mtgr_tensorrt_retrieve")


def config(name: str) -> Any:
    text = (TEMPLATES / name / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(string.Template(text).substitute(width=12, tasks=3, retrieved=100), pb.ModelConfig())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_context", [20, 1000, 2048])
def test_configs_fit_the_plans(name: str, max_context: int) -> None:
    model = config(name)
    assert (model.backend, model.default_model_filename) == ("tensorrt", "model.plan")
    assert model.max_batch_size == MAX_BATCH
    inputs = {entry.name: (-1, *entry.dims) for entry in model.input}
    profiles = bucket_profiles(inputs, max_context)
    (group,) = model.instance_group
    assert group.kind == pb.ModelInstanceGroup.KIND_GPU
    assert [int(index) for index in group.profile] == list(range(len(profiles)))
    cuda = model.optimization.cuda
    assert cuda.graphs
    specs = [{key: (spec.batch_size, *value.dim) for key, value in spec.input.items()} for spec in cuda.graph_spec]
    samples = [
        {key: (sample.batch_size, *value.dims) for key, value in sample.inputs.items()} for sample in model.model_warmup
    ]
    assert len(specs) == len({json.dumps(spec, sort_keys=True) for spec in specs}) >= 8
    for shapes in (*specs, *samples):
        assert set(shapes) == set(inputs)
        assert sum(in_profile(profile, shapes) for profile in profiles) == 1
        assert shapes["context"][1] in CONTEXT_BUCKETS
    assert {spec["context"][0] for spec in specs} == {1, 8}
    assert {sample["context"][0] == 1 for sample in samples} == {True, False}  # both profiles are warm


@pytest.mark.parametrize("name", MODELS)
def test_variants_by_gpu(name: str, tmp_path: Path) -> None:
    def staged(folder: Path) -> Path:
        version = folder / name / "1"
        version.mkdir(parents=True)
        (version / "model.plan").write_bytes(folder.name.encode())
        text = (TEMPLATES / name / "config.pbtxt").read_text(encoding="utf-8")
        text = string.Template(text).substitute(width=12, tasks=3, retrieved=100)
        (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")
        return version

    first = staged(tmp_path / "first")
    add_variant(first, "model.plan", "sm80")
    second = staged(tmp_path / "second")
    add_variant(second, "model.plan", "sm90")
    keep_variants(second, "model.plan", first.parent, ["sm80", "sm90"])
    for variant, content in (("sm80", b"first"), ("sm90", b"second")):
        text = (second.parent / "configs" / f"{variant}.pbtxt").read_text(encoding="utf-8")
        chosen = text_format.Parse(text, pb.ModelConfig())
        assert (second / chosen.default_model_filename).read_bytes() == content
        chosen.default_model_filename = "model.plan"
        assert chosen == config(name)
    assert template_hash(name)


@pytest.mark.parametrize("name", MODELS)
def test_a_config_is_fitted_to_what_could_be_built(name: str) -> None:
    text = string.Template((TEMPLATES / name / "config.pbtxt").read_text(encoding="utf-8")).substitute(
        width=12, tasks=3, retrieved=100
    )
    assert fitted_text(text, 2, MAX_BATCH) == text
    one = text_format.Parse(fitted_text(text, 1, MAX_BATCH), pb.ModelConfig())
    assert [list(group.profile) for group in one.instance_group] == [["0"]]
    del one.instance_group[0].profile[:]
    one.instance_group[0].profile.extend(["0", "1"])
    assert one == config(name)  # nothing else differs

    alone = text_format.Parse(fitted_text(text, 1, 1), pb.ModelConfig())
    assert (alone.max_batch_size, alone.instance_group[0].count) == (1, ALONE_INSTANCES)
    assert list(alone.instance_group[0].profile) == ["0"]
    assert [spec.batch_size for spec in alone.optimization.cuda.graph_spec] == [
        spec.batch_size for spec in config(name).optimization.cuda.graph_spec if spec.batch_size == 1
    ]
    assert [sample.name for sample in alone.model_warmup] == ["single"]
