"""How far retrieval on RSICD's test split goes with the model of `rsicd_small`, tried on one GPU in minutes.

    python tests/experiments/retrieval_attempts.py --rsicd RSICD --output attempts.jsonl [NAME ...]

The model, losses, optimizer and schedule are those of a pretraining; what differs is the way there: all tiles lie decoded in
the GPU's memory at 128 px, and are cropped, turned and brightened there. One attempt is one process and one seed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from urbanclip_ray.config import ModelConfig, TrainConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import CoCa, build_model
from urbanclip_ray.model.losses import contrastive_loss
from urbanclip_ray.model.preprocess import normalise
from urbanclip_ray.model.recall import recall_at_k
from urbanclip_ray.model.tokenize import TextTokenizer, train_bpe
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.train.batches import text_key
from urbanclip_ray.train.engine import learning_rate, make_optimizer

RECIPE = load_recipe("rsicd_small")
STORED_PX = 128
VAL_SHARE = 0.05
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PATCH_DROPOUT = 0.5  # of attempts that name none
ATTEMPTS: dict[str, dict[str, Any]] = {  # changes of the training of `rsicd_small`, or of its model's `patch_dropout`
    "24 epochs": {"batch": 256, "lr": 1e-3, "epochs": 24},
    "24 epochs, seed 1": {"batch": 256, "lr": 1e-3, "epochs": 24, "seed": 1},
    "batch 256, 14 epochs": {"batch": 256, "lr": 1e-3, "epochs": 14},
    "20 epochs, a quarter of the patches": {"batch": 256, "lr": 1e-3, "epochs": 20, "patch_dropout": 0.75},
    "24 epochs, a quarter of the patches": {"batch": 256, "lr": 1e-3, "epochs": 24, "patch_dropout": 0.75},
    "batch 128, 14 epochs": {"batch": 128, "lr": 7e-4, "epochs": 14},
    "batch 128, 14 epochs, seed 1": {"batch": 128, "lr": 7e-4, "epochs": 14, "seed": 1},
    "batch 128, 14 epochs, lr 1.2e-3": {"batch": 128, "lr": 1.2e-3, "epochs": 14},
    "batch 128, 14 epochs, average": {"batch": 128, "lr": 7e-4, "epochs": 14, "ema_decay": 0.999},
    "batch 64, 14 epochs": {"batch": 64, "lr": 7e-4, "epochs": 14},
    "batch 64, 14 epochs, seed 1": {"batch": 64, "lr": 7e-4, "epochs": 14, "seed": 1},
    "batch 64, 18 epochs, a quarter of the patches": {"batch": 64, "lr": 7e-4, "epochs": 18, "patch_dropout": 0.75},
    "batch 64, 18 epochs, a quarter of the patches, seed 1": {
        "batch": 64,
        "lr": 7e-4,
        "epochs": 18,
        "patch_dropout": 0.75,
        "seed": 1,
    },
    "40 epochs": {"batch": 128, "lr": 7e-4, "epochs": 40},
    "40 epochs, decay and average": {"batch": 128, "lr": 7e-4, "epochs": 40, "weight_decay": 0.3, "ema_decay": 0.999},
    "40 epochs, smaller crops": {"batch": 128, "lr": 1e-3, "epochs": 40, "min_area_share": 0.25},
    "40 epochs, half the caption loss": {"batch": 128, "lr": 7e-4, "epochs": 40, "caption_weight": 0.5},
}


class Tiles:
    """RSICD decoded, on the device: pixels uint8 [tiles, 128, 128, 3], and the places of its parts."""

    def __init__(self, folder: Path) -> None:
        items = json.loads((folder / "captions.json").read_text())
        with ThreadPoolExecutor() as threads:
            stored = np.stack(list(threads.map(lambda item: read_tile(folder / item["image"]), items)))
        self.pixels = torch.from_numpy(stored).to(DEVICE)
        self.captions: list[list[str]] = [item["captions"] for item in items]
        learnt = [place for place, item in enumerate(items) if item["split"] != "test"]
        left_out = np.random.default_rng(0).choice(len(learnt), int(len(learnt) * VAL_SHARE), replace=False)
        self.train = np.delete(np.array(learnt), left_out).tolist()
        self.test = [place for place, item in enumerate(items) if item["split"] == "test"]


def read_tile(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((STORED_PX, STORED_PX), Image.Resampling.BICUBIC))


def augment(pixels: Tensor, size_px: int, config: TrainConfig) -> Tensor:
    """uint8 [rows, 128, 128, 3] -> [rows, size_px, size_px, 3]: what `train.augment` does, in one resampling."""
    rows, settings = len(pixels), config.augment
    share = torch.empty(rows, device=DEVICE).uniform_(settings.min_area_share, 1).sqrt()
    turn, flip = torch.randint(4, (rows,), device=DEVICE), torch.randint(2, (rows,), device=DEVICE) * 2 - 1
    cosine, sine = torch.tensor([[1.0, 0, -1, 0], [0, 1, 0, -1]], device=DEVICE)[:, turn]
    moved = (torch.rand(2, rows, device=DEVICE) * 2 - 1) * (1 - share)
    across, down = (
        torch.stack([share * cosine * flip, -share * sine, moved[0]]),
        torch.stack([share * sine * flip, share * cosine, moved[1]]),
    )
    grid = F.affine_grid(torch.stack([across, down]).permute(2, 0, 1), [rows, 3, size_px, size_px], align_corners=False)
    found = F.grid_sample(pixels.permute(0, 3, 1, 2).float(), grid, align_corners=False, padding_mode="reflection")
    brightness = torch.empty(rows, 1, 1, 1, device=DEVICE).uniform_(1 - settings.brightness, 1 + settings.brightness)
    return (found * brightness).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)


def attempt(tiles: Tiles, changes: dict[str, Any]) -> dict[str, Any]:
    """Train once and find what the test tiles' texts and images find."""
    changes = dict(changes)
    batch = changes.pop("batch", RECIPE.train.global_batch_size)
    area = changes.pop("min_area_share", RECIPE.train.augment.min_area_share)
    hidden = changes.pop("patch_dropout", PATCH_DROPOUT)
    config = TrainConfig(
        **RECIPE.train.model_dump()
        | {"contrastive_batch_size": batch, "global_batch_size": batch, "precision": "bf16"}
        | {"augment": RECIPE.train.augment.model_copy(update={"min_area_share": area})}
        | changes
    )
    torch.manual_seed(config.seed)
    settings: ModelConfig = RECIPE.model.model_copy(update={"patch_dropout": hidden})
    context_length = open_clip_config(settings, 0)["text_cfg"]["context_length"]
    tokenizer = train_bpe([text for at in tiles.train for text in tiles.captions[at]], settings.vocab_size, context_length)
    model = build_model(open_clip_config(settings, tokenizer.vocab_size), config.seed, settings.init_temperature).to(DEVICE)
    start = time.perf_counter()
    num_steps = train(model, tokenizer, tiles, config)
    seconds = time.perf_counter() - start
    found = recall(model.eval(), tokenizer, tiles)
    return {"steps": num_steps, "samples": num_steps * batch, "seconds": round(seconds), **found}


def train(model: CoCa, tokenizer: TextTokenizer, tiles: Tiles, config: TrainConfig) -> int:
    optimizer = make_optimizer(model, config)
    rows, places = config.global_batch_size, np.array(tiles.train)
    num_steps = len(places) * config.epochs // rows
    random = np.random.default_rng(config.seed)
    order = np.concatenate([random.permutation(places) for _ in range(config.epochs)])
    average = {name: value.detach().clone() for name, value in model.state_dict().items()} if config.ema_decay else {}
    model.train()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, config) * group["lr_scale"]
        chosen = order[step * rows : (step + 1) * rows]
        texts = [str(random.choice(tiles.captions[place])) for place in chosen]
        keys = torch.tensor([text_key(text) for text in texts], device=DEVICE)
        images = augment(tiles.pixels[torch.from_numpy(chosen).to(DEVICE)], model.image_px, config)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            output = model(normalise(images), tokenizer.encode(texts).to(DEVICE))
        loss = config.contrastive_weight * contrastive_loss(output.image, output.text, keys, output.logit_scale)
        loss = loss + config.caption_weight * output.caption_sum / output.caption_count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        with torch.no_grad():
            model.inner.logit_scale.clamp_(0, math.log(config.max_logit_scale))
            decay = min(config.ema_decay, (1 + step) / (10 + step))
            for name, value in average.items():
                value.lerp_(model.state_dict()[name], 1 - decay)
    if average:
        model.load_state_dict(average)
    return num_steps


@torch.inference_mode()
def recall(model: CoCa, tokenizer: TextTokenizer, tiles: Tiles) -> dict[str, float]:
    """R@10 in percent of the whole test tiles and all their sentences, repeated ones too."""
    images, texts = [], []
    for chosen in torch.tensor(tiles.test, device=DEVICE).split(256):
        pixels = tiles.pixels[chosen].permute(0, 3, 1, 2).float()
        small = F.interpolate(pixels, (model.image_px, model.image_px), mode="bicubic", antialias=True).clamp(0, 255)
        images.append(model.encode_image(normalise(small.round().to(torch.uint8).permute(0, 2, 3, 1)))[0].cpu())
    sentences = [text for place in tiles.test for text in tiles.captions[place]]
    for first in range(0, len(sentences), 512):
        texts.append(model.encode_text(tokenizer.encode(sentences[first : first + 512]).to(DEVICE))[0].cpu())
    owner = torch.tensor([number for number, place in enumerate(tiles.test) for _ in tiles.captions[place]])
    found = recall_at_k(torch.cat(images), torch.cat(texts), owner)
    return {f"{direction}_r10": round(100 * found[direction]["r10"], 1) for direction in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rsicd", required=True, help="RSICD: captions.json and the images")
    parser.add_argument("--output", required=True, help="a line of JSON for every attempt is added here")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which attempts (default: all): {'; '.join(ATTEMPTS)}")
    options = parser.parse_args()
    if unknown := set(options.names) - set(ATTEMPTS):
        parser.error(f"no attempt is called {', '.join(sorted(unknown))}: there are {'; '.join(ATTEMPTS)}")
    tiles = Tiles(Path(options.rsicd))
    for name in options.names or ATTEMPTS:
        record = {"attempt": name, "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"}
        record |= attempt(tiles, ATTEMPTS[name])
        print(record, flush=True)
        with Path(options.output).open("a") as lines:
            lines.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
