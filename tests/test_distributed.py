"""A transformed model in several processes: its gradients, its shards and its images are those of one."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler
from support.features import CONDITION, WORKS, Enable, expected_of, merged, own, supports
from support.models import blocks, gradients, inputs, mask, output, relative_error, transformers, two_stages
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tome_fx import TransformError, set_ratio, transform
from tome_fx.graph import specialize


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def image(unet: Any) -> Tensor:
    """Latents after three steps, from a seed."""
    arguments = inputs(unet, 16, 16, batch=1)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    scheduler.set_timesteps(3)
    for step in scheduler.timesteps:
        noise = output(unet, {**arguments, "timestep": step})
        arguments["sample"] = scheduler.step(noise, step, arguments["sample"]).prev_sample
    sample: Tensor = arguments["sample"]
    return sample


@supports("DistributedDataParallel", WORKS)
def test_distributed_data_parallel_gives_the_gradients_of_the_transformed_model(alone: None) -> None:
    arguments = inputs(two_stages())
    result = merged(own().train())
    parallel = DistributedDataParallel(result)
    for ratio in (0.5, 0.25):
        set_ratio(result, ratio)
        expected = gradients(merged(own().train(), ratio), arguments)
        ours = gradients(parallel, arguments)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(gradient, expected[name]) for name, gradient in ours.items())


@pytest.fixture
def sharded(alone: None) -> Enable:
    mesh = init_device_mesh("cpu", (1,))

    def shard(model: Any) -> None:
        for module in (*blocks(model).values(), *transformers(model).values(), model):
            fully_shard(module, mesh=mesh)

    return shard


FSDP = supports("FSDP", CONDITION, "sharded after transform, the ratio stays")


@FSDP
def test_a_model_sharded_after_the_transform_merges_and_its_ratio_cannot_be_set(sharded: Enable) -> None:
    arguments = inputs(two_stages())
    result = merged(own())
    sharded(result)
    expected = output(expected_of(two_stages()), arguments)
    assert torch.equal(output(result, arguments), expected)
    with pytest.raises(TransformError, match="as fully_shard does"):
        set_ratio(result, 0.25)
    assert torch.equal(output(result, arguments), expected)
    assert all(issubclass(kind, dist.fsdp.FSDPModule) for kind in map(type, blocks(result).values()))


def test_a_kind_of_call_that_a_sharded_model_meets_first_is_served_by_others_too(
    sharded: Enable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specialize, "_classes", {})  # so that no graph for it is known from another test
    arguments = {**inputs(two_stages()), "encoder_attention_mask": mask()}
    result, other = merged(own()), merged(own())
    sharded(result)
    ours = output(result, arguments)
    assert torch.equal(output(other, arguments), ours)


@FSDP
def test_a_model_that_is_sharded_already_is_refused(sharded: Enable) -> None:
    model = own()
    sharded(model)
    with pytest.raises(TransformError, match=r"(?i)fsdp|shard"):
        transform(model)


RANK = """
import copy, sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from support.models import gradients, inputs, two_stages
from test_distributed import image
from torch.nn.parallel import DistributedDataParallel
from tome_fx import transform

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
found = {"image": image(transform(two_stages()))}
model = DistributedDataParallel(transform(copy.deepcopy(two_stages()).train()))
found["gradients"] = gradients(model, inputs(two_stages(), seed=rank))
torch.save(found, f"{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
@supports("Distributed inference", WORKS)
@supports("DistributedDataParallel", WORKS)
def test_two_processes_of_torchrun_make_the_same_image_and_share_their_gradients(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "rank.py"]
    subprocess.run([*run, str(Path(__file__).parent)], cwd=tmp_path, check=True, timeout=600)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = image(transform(two_stages()))
    assert all(torch.equal(rank["image"], expected) for rank in ranks)
    alone = [gradients(transform(own().train()), inputs(two_stages(), seed=rank)) for rank in range(2)]
    for name, gradient in ranks[0]["gradients"].items():
        assert torch.equal(gradient, ranks[1]["gradients"][name])
        mean = (alone[0][name] + alone[1][name]) / 2
        assert relative_error(gradient, mean) < 1e-5
    assert any(relative_error(alone[0][name], alone[1][name]) > 1e-2 for name in alone[0])
