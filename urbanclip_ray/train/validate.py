"""Validation losses and retrieval during pretraining, on the validation rows of the shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.model.losses import contrastive_loss
from urbanclip_ray.model.preprocess import normalise
from urbanclip_ray.model.recall import recall_at_k
from urbanclip_ray.model.texts import shown_texts
from urbanclip_ray.model.tokenize import TextTokenizer
from urbanclip_ray.train.batches import BatchMaker
from urbanclip_ray.train.shards import ShardReader

T = TypeVar("T")


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
    places = list(range(dist.get_rank(), num_rows, dist.get_world_size()))
    mine: dict[str, list[Tensor]] = {name: [] for name in ("image", "text", "key")}
    caption_sum, caption_count, scale, bias = 0.0, 0, torch.ones(()), torch.zeros(())
    texts: list[str] = []
    owner: list[int] = []
    for chosen in _equally_many(places, config.micro_batch_size, engine.device):
        rows = list(reader.rows(np.array(chosen or [0])))
        batch = maker.validation(rows)
        output = engine(normalise(batch.images.to(engine.device)), batch.tokens.to(engine.device))
        scale, bias = output.logit_scale.cpu(), output.logit_bias.cpu()
        if not chosen:
            continue
        mine["image"].append(output.image.cpu())
        mine["text"].append(output.text.cpu())
        mine["key"].append(batch.text_keys)
        for place, row in zip(chosen, rows, strict=True):
            shown = shown_texts(row["texts"], config.text_mode)
            texts += shown
            owner += [place] * len(shown)
        caption_sum += float(output.caption_sum)
        caption_count += int(output.caption_count)
    all_texts = _embed(engine, texts, tokenizer, config.micro_batch_size)
    engine.train()
    shares: list[Any] = [None] * dist.get_world_size()
    share = {name: torch.cat(parts) for name, parts in mine.items() if parts}
    share |= {"all_texts": all_texts, "owner": torch.tensor(owner, dtype=torch.int64)}
    dist.all_gather_object(shares, share | {"caption": (caption_sum, caption_count), "places": places})
    return _summarise(shares, scale, bias, config)


def _equally_many(items: list[T], size: int, device: torch.device) -> Iterator[list[T]]:
    """Batches of this rank's items, as many as the rank with the most has: one that runs out gets empty ones.

    ZeRO-3 gathers weights in every forward, so all ranks must do equally many; for an empty batch the caller does one whose
    result it drops.
    """
    num_batches = torch.tensor(-(-len(items) // size), device=device)
    dist.all_reduce(num_batches, dist.ReduceOp.MAX)
    for number in range(int(num_batches)):
        yield items[number * size : (number + 1) * size]


def _embed(engine: Any, texts: list[str], tokenizer: TextTokenizer, size: int) -> Tensor:
    """[texts, width], on the CPU."""
    parts = []
    for chosen in _equally_many(texts, size, engine.device):
        embedded = engine(None, tokenizer.encode(chosen or [""]).to(engine.device)).text
        parts.append(embedded[: len(chosen)].cpu())
    return torch.cat(parts)


def _summarise(shares: list[Any], scale: Tensor, bias: Tensor, config: TrainConfig) -> dict[str, float]:
    shares = [share for share in shares if "image" in share]
    order = torch.from_numpy(np.argsort(np.concatenate([share["places"] for share in shares])))
    joined = {name: torch.cat([share[name] for share in shares]) for name in ("image", "text", "key")}
    image, text, key = (joined[name][order] for name in ("image", "text", "key"))
    losses = []
    for chunk in torch.split(torch.arange(len(image)), config.contrastive_batch_size):
        loss = contrastive_loss(image[chunk], text[chunk], key[chunk], scale, bias, kind=config.contrastive_loss)
        losses.append(float(loss) * len(chunk))
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
