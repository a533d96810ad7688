"""Models whose weights accelerate keeps on the CPU or on disk: the same outputs, losses and caches, the head fetched once."""

import copy

import accelerate
import pytest
import torch
from trainer_runs import assert_same_run, distillation_trainer, make_teacher, trained

from distill_kernels import run_backbone, write_teacher_cache
from distill_kernels.api.cache.token_rows import model_fingerprint

IDS = torch.randint(101, (2, 7), generator=torch.Generator().manual_seed(0))
WAYS = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=torch.device("cpu")),
    "device map": lambda model, folder: accelerate.dispatch_model(
        model, {"model": "cpu", "lm_head": "disk"}, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}


def offloaded(way, tied, folder):
    """(a model, the same model with weights elsewhere)"""
    plain = make_teacher(tie_word_embeddings=tied).eval()
    moved = copy.deepcopy(plain)
    moved = WAYS[way](moved, str(folder / "offloaded")) or moved
    if not any(parameter.is_meta for parameter in moved.parameters()):
        pytest.skip("this accelerate leaves everything where it is")
    return plain, moved


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_the_models_own_and_the_head_is_fetched_once(way, tied, tmp_path):
    plain, moved = offloaded(way, tied, tmp_path)
    with torch.no_grad():
        wanted, got, again = (run_backbone(model, input_ids=IDS) for model in (plain, moved, moved))
    assert torch.equal(got.hidden, wanted.hidden) and torch.equal(got.weight, wanted.weight)
    assert again.weight is got.weight


@pytest.mark.parametrize("way", WAYS)
def test_trainer_takes_a_teacher_with_weights_elsewhere(way, tmp_path):
    plain, moved = offloaded(way, False, tmp_path)
    runs = [trained(distillation_trainer(tmp_path, teacher_model=teacher)) for teacher in (plain, moved)]
    assert_same_run(*runs, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_cache_of_a_teacher_with_weights_elsewhere_is_the_same(way, tmp_path):
    plain, moved = offloaded(way, True, tmp_path)
    assert model_fingerprint(moved) == model_fingerprint(plain)
    for name, model in (("plain", plain), ("moved", moved)):
        write_teacher_cache(model, list(IDS), tmp_path / name, kind="top-k", top_k=5)
    files = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "moved").iterdir()}


def test_model_without_weights_is_refused_in_words():
    with torch.device("meta"):
        model = make_teacher()
    with pytest.raises(TypeError, match="is on meta, a placeholder without values: load the model's weights first"):
        run_backbone(model, input_ids=IDS)
    with pytest.raises(TypeError, match="is on meta, a placeholder"):
        model_fingerprint(model)
