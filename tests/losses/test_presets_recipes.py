"""The blocks of docs/torchtune-axolotl.md against the packages themselves; each needs its package with what that depends on."""

import importlib.util
import re
import sys
import types
from importlib.metadata import distribution

import pytest
import torch
from document_blocks import ROOT

PAGE = ROOT / "docs" / "torchtune-axolotl.md"
UPSTREAM = 1.7


def block(heading, **names):
    """What a Python block of the page defines, as a module of its own, below a heading."""
    text = PAGE.read_text(encoding="utf-8").partition(f"## {heading}")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    module = types.ModuleType(f"block_of_{heading.split()[0]}")
    vars(module).update(names)
    sys.modules[module.__name__] = module  # pydantic looks there
    exec(compile(code, f"{PAGE.name}, {heading}", "exec"), vars(module))
    return module


def needs(*packages):
    """Skips where one is missing; torchtune and axolotl are sometimes there without what they depend on."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kd_loss", "forward"),
    [("ForwardKLWithChunkedOutputLoss", 1.0), ("ReverseKLWithChunkedOutputLoss", 0.0), ("SymmetricKLWithChunkedOutputLoss", 0.3)],
)
def test_torchtune_recipe_has_the_loss_of_its_own_step(kd_loss, forward, tied, monkeypatch):
    needs("torchtune", "torchao", "omegaconf", "torchdata")
    from torchtune.models.llama3_2 import llama3_2
    from torchtune.modules import loss as losses

    file = distribution("torchtune").locate_file("recipes/knowledge_distillation_single_device.py")
    spec = importlib.util.spec_from_file_location("torchtune_kd_recipe", file)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)

    def decoder(seed, embed_dim):
        torch.manual_seed(seed)
        made = llama3_2(
            vocab_size=320, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=embed_dim, max_seq_len=32, tie_word_embeddings=tied
        )
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return made

    def setup(self, cfg):  # what the recipe's own, which wants a GPU and files, leaves behind
        self._model, self._teacher_model = decoder(2, 32), decoder(1, 48)
        self._loss_fn = losses.CEWithChunkedOutputLoss(num_output_chunks=4)
        parameters = {"sym_kd_ratio": forward} if kd_loss.startswith("Symmetric") else {}
        self._kd_loss_fn = getattr(losses, kd_loss)(num_output_chunks=4, **parameters)
        self._kd_ratio = 0.4
        for model in (self._model, self._teacher_model):
            model.set_num_output_chunks(4)
        self.ignore_labels_cache = torch.full((3, 1), -100)

    monkeypatch.setattr(recipe.KDRecipeSingleDevice, "setup", setup)
    fused = block("torchtune", KDRecipeSingleDevice=recipe.KDRecipeSingleDevice).FusedKDRecipe
    tokens = torch.randint(320, (3, 16), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.arange(16) < torch.tensor([[3], [5], [2]]), -100)

    results = []
    for kind in (recipe.KDRecipeSingleDevice, fused):
        made = object.__new__(kind)
        made.setup(None)
        class_loss, kd_loss_value = made._loss_step({"tokens": tokens, "labels": labels})
        loss = (1 - made._kd_ratio) * class_loss + made._kd_ratio * kd_loss_value
        (UPSTREAM * loss).backward()
        gradients = {name: parameter.grad for name, parameter in made._model.named_parameters()}
        results.append((class_loss.item(), kd_loss_value.item(), gradients))
    teacher = decoder(1, 48)
    log_p = teacher(tokens).detach().log_softmax(-1)[:, :-1][labels[:, 1:] != -100]
    entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
    (want_class, want_kd, want), (got_class, got_kd, got) = results
    assert got_class == pytest.approx(want_class, rel=1e-5)
    assert got_kd + forward * entropy == pytest.approx(want_kd, rel=1e-5)
    assert got.keys() == want.keys()
    for name in want:
        assert want[name].abs().max() > 0
        assert (got[name] - want[name]).abs().max() <= 2e-5 * want[name].abs().max(), name


def test_axolotl_trainer_has_the_loss_of_the_logits(tmp_path):
    needs("axolotl", "addict", "numba", "transformers", "datasets")
    from axolotl.core.training_args import AxolotlTrainingArguments
    from axolotl.utils.dict import DictDefault
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from distill_kernels import reference

    vocabulary = 256

    def llama(seed, hidden_size):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=vocabulary,
                initializer_range=0.4,
            )
        )  # fmt: skip

    plugin = block("axolotl")
    teacher = llama(1, 48)
    teacher.save_pretrained(tmp_path / "teacher")
    cfg = DictDefault({"kd_teacher": str(tmp_path / "teacher")})
    made = plugin.FusedKDPlugin()
    assert made.get_trainer_cls(DictDefault({})) is None
    assert made.get_input_args() == "block_of_axolotl.FusedKDArguments"
    rows = torch.randint(vocabulary, (8, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * 12, "labels": [-100] * 3 + row.tolist()[3:]} for row in rows]
    arguments = AxolotlTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1, use_cpu=True,
        report_to=[], save_strategy="no", remove_unused_columns=False, learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    trainer = made.get_trainer_cls(cfg)(model=llama(2, 32), args=arguments, train_dataset=Dataset.from_list(data))
    made.post_trainer_create(cfg, trainer)

    batch = {name: torch.tensor([row[name] for row in data[:3]]) for name in data[0]}
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(53))
    hidden = trainer.model.model(batch["input_ids"]).last_hidden_state[:, :-1]
    teacher_hidden = teacher.model(batch["input_ids"]).last_hidden_state[:, :-1].detach()
    want = reference.distillation_loss(
        hidden, trainer.model.lm_head.weight, teacher_hidden, teacher.lm_head.weight.detach(), batch["labels"][:, 1:], temperature=2.0,
        kd_weight=0.9, ce_weight=0.1, num_items=53,
    )  # fmt: skip
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    got, wanted = (torch.autograd.grad(value, trainer.model.lm_head.weight, torch.full_like(value, UPSTREAM))[0] for value in (loss, want))
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(53)) < loss
