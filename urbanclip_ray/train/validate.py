"""Validation losses and retrieval during pretraining, on the validation rows of the shards."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.model.losses import contrastive_loss
from urbanclip_ray.model.recall import recall_at_k
from urbanclip_ray.model.texts import shown_texts
from urbanclip_ray.model.tokenize import TextTokenizer
from urbanclip_ray.train.batches import BatchMaker
from urbanclip_ray.train.shards import ShardReader


@torch.no_grad()
def validate(
    engine: Any, reader: ShardReader, maker: BatchMaker, tokenizer: TextTokenizer, config: TrainConfig
) -> dict[str, float]:
    """Called by all ranks, each takes its share of the rows; every rank returns the same figures.

    The contrastive loss is over chunks of `contrastive_batch_size` pairs: not to be compared between batch sizes.
    Recall is over all texts of the validation rows: not to be compared between numbers of rows.
    """
    engine.eval()
    num_rows = min(reader.num_rows, config.max_validation_rows)
    places = np.arange(dist.get_rank(), num_rows, dist.get_world_size())
    mine: dict[str, list[Tensor]] = {name: [] for name in ("image", "text", "key", "all_texts", "owner")}
    caption_sum, caption_count, scale = 0.0, 0, torch.ones(())
    for first in range(0, len(places), config.micro_batch_size):
        chosen = places[first : first + config.micro_batch_size]
        rows = list(reader.rows(chosen))
        batch = maker.validation(rows)
        output = engine(batch.images.to(engine.device), batch.tokens.to(engine.device))
        shown = [shown_texts(row["texts"], config.text_mode) for row in rows]
        texts = [text for of_tile in shown for text in of_tile]
        owner = [int(place) for place, of_tile in zip(chosen, shown, strict=True) for _ in of_tile]
        mine["image"].append(output.image.cpu())
        mine["text"].append(output.text.cpu())
        mine["key"].append(batch.text_keys)
        mine["all_texts"] += [
            engine(None, tokenizer.encode(texts[at : at + config.micro_batch_size]).to(engine.device)).text.cpu()
            for at in range(0, len(texts), config.micro_batch_size)
        ]
        mine["owner"].append(torch.tensor(owner))
        caption_sum += float(output.caption_sum)
        caption_count += int(output.caption_count)
        scale = output.logit_scale.cpu()
    engine.train()
    shares: list[Any] = [None] * dist.get_world_size()
    share = {name: torch.cat(parts) for name, parts in mine.items() if parts}
    dist.all_gather_object(shares, share | {"caption": (caption_sum, caption_count), "places": places})
    return _summarise(shares, scale, config)


def _summarise(shares: list[Any], scale: Tensor, config: TrainConfig) -> dict[str, float]:
    shares = [share for share in shares if "image" in share]
    order = torch.from_numpy(np.argsort(np.concatenate([share["places"] for share in shares])))
    joined = {name: torch.cat([share[name] for share in shares]) for name in ("image", "text", "key")}
    image, text, key = (joined[name][order] for name in ("image", "text", "key"))
    losses = []
    for chunk in torch.split(torch.arange(len(image)), config.contrastive_batch_size):
        pair = image[chunk], text[chunk]
        losses.append(float(contrastive_loss(*pair, *pair, key[chunk], 0, scale)) * len(chunk))
    recall = recall_at_k(
        image, torch.cat([share["all_texts"] for share in shares]), torch.cat([share["owner"] for share in shares])
    )
    caption_sum = sum(share["caption"][0] for share in shares)
    caption_count = sum(share["caption"][1] for share in shares)
    return {
        "contrastive": sum(losses) / len(image),
        "caption": caption_sum / max(1, caption_count),
        **{f"{direction}_{k}": value for direction, values in recall.items() for k, value in values.items()},
        "num_images": len(image),
        "num_texts": sum(len(share["owner"]) for share in shares),
    }
