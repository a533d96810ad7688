"""Tiny random models that read images and text, and a batch for each."""

from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.models.tiny import SIZES, TOWER, accepted, spread

IMAGE = 200  # the placeholder of an image's tokens
LENGTH = 16
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
# model_type -> the whole configuration's fields, its text's, its vision's.
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({"image_token_index": IMAGE, "boi_token_index": 201, "eoi_token_index": 202, "mm_tokens_per_image": 4},
               {"final_logit_softcapping": 1.7}, {"image_size": 16, "patch_size": 4}),
    "qwen2_5_vl": ({"image_token_id": IMAGE, "video_token_id": 201, "vision_start_token_id": 202, "vision_end_token_id": 203},
                   {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}, {"patch_size": 4, "window_size": 16}),
    "qwen3_vl": ({"image_token_id": IMAGE, "video_token_id": 201, "vision_start_token_id": 202, "vision_end_token_id": 203},
                 {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}, {"patch_size": 4, "num_position_embeddings": 16}),
    "qwen3_vl_moe": ({"image_token_id": IMAGE, "video_token_id": 201, "vision_start_token_id": 202, "vision_end_token_id": 203},
                     {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}, "output_router_logits": True},
                     {"patch_size": 4, "num_position_embeddings": 16}),
    "smolvlm": ({"image_token_id": IMAGE, "scale_factor": 2}, {}, {"image_size": 16, "patch_size": 4}),
}  # fmt: skip


def tiny_vision_model(model_type: str, seed: int = 0, **text: Any) -> Any:
    whole, of_text, of_vision = ARCHITECTURES[model_type]
    kind = transformers.CONFIG_MAPPING[model_type]
    made = kind()
    texts = {**accepted(type(made.text_config), SIZES), **of_text, **text}
    if model_type == "smolvlm":
        texts["model_type"] = "llama"
    config = kind(text_config=texts, vision_config={**accepted(type(made.vision_config), TOWER), **of_vision}, **whole)
    torch.manual_seed(seed)
    return spread(transformers.AutoModelForImageTextToText.from_config(config).eval())


def vision_batch(model_type: str, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Rows of text around one image of four tokens each, as the model's processor lays them out."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE, (rows, LENGTH), generator=generator)
    ids[:, 4:8] = IMAGE
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model_type.startswith("qwen"):
        ids[:, 3], ids[:, 8] = 202, 203
        # 4 × 4 patches of 3 colours, 2 frames and 4 × 4 pixels; four of them become a token.
        batch["pixel_values"] = torch.randn(rows * 16, 3 * 2 * 4 * 4, generator=generator)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
        batch["mm_token_type_ids"] = (ids == IMAGE).long()
    elif model_type == "gemma3":
        batch["pixel_values"] = torch.randn(rows, 3, 16, 16, generator=generator)
        batch["token_type_ids"] = (ids == IMAGE).long()
    else:
        batch["pixel_values"] = torch.randn(rows, 1, 3, 16, 16, generator=generator)
    return batch


def vision_rows(model_type: str, count: int) -> list[dict[str, Tensor]]:
    """Of a data set: one image each."""
    return [vision_batch(model_type, 1, seed) for seed in range(count)]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
