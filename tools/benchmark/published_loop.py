"""The yardstick: training the way published code of this field goes about it, and images for it."""

import io
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from data import write_ilmvp
from data.ilmvp import LmdbSource
from data.loader import epoch_generator
from models.torchvision_shim import ensure_torchvision
from tools.training.numerics import set_up_arithmetic

NUM_CLASSES = 10
DISTINCT = 510  # made-up images that differ; more of them are copies


class Plain:
    """Published code's loop over an ILM-VP folder, as ``python -m tools.benchmark --help`` describes it."""

    description = "plain loop"

    def __init__(self, folder, classifier, input_vr, task, batch_size, mapping):
        self.classifier, self.input_vr, self.num_target, self.mapping = classifier, input_vr, task.num_target, mapping
        self.device = input_vr.program.device
        self.optimizer = torch.optim.Adam([input_vr.program], lr=0.01)
        self.half = self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half)
        sets = {split: _Decoded(folder / f"{split}.lmdb", input_vr.image_size) for split in ("train", "test")}
        self.order = list(range(len(sets["train"])))
        loader = partial(DataLoader, batch_size=batch_size, num_workers=2, persistent_workers=True)
        self.loaders = {
            "estimate": loader(sets["train"]),
            "train": loader(sets["train"], sampler=self.order),
            "test": loader(sets["test"]),
        }

    def arithmetic(self):
        set_up_arithmetic(self.device, "fp32", False)
        return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=True)

    def _batches(self, step):
        for images, labels in self.loaders[step]:
            yield images.to(self.device), labels.to(self.device)

    @torch.no_grad()
    def estimate(self, epoch):
        kept, labels = [], []
        for images, targets in self._batches("estimate"):
            logits = self.classifier(self.input_vr(images))
            if self.mapping == "blmpp":
                k = max(1, int(0.15 * self.num_target))
                values, index = logits.softmax(1).topk(k, dim=1)
                logits = torch.zeros_like(logits).scatter_(1, index, values).cpu()
            kept.append(logits)
            labels.append(targets)
        kept, labels = torch.cat(kept).cpu(), torch.cat(labels).cpu()
        if self.mapping != "blmpp":
            kept = functional.one_hot(kept.argmax(1), kept.shape[1]).float()
        joint = torch.zeros(self.num_target, kept.shape[1])
        joint = joint.scatter_add_(0, labels[:, None].expand(-1, kept.shape[1]), kept).T
        if self.mapping == "ilm":
            weights = torch.zeros_like(joint)
            for _ in range(self.num_target):
                source, target = divmod(int(joint.argmax()), self.num_target)
                weights[source, target] = 1
                joint[source], joint[:, target] = -1, -1
        else:
            posterior = joint / (joint.sum(1, keepdim=True) + 1)
            weights = posterior / posterior.sum(0, keepdim=True)
        self.weights = weights.to(self.device)

    def train(self, epoch):
        self.order[:] = torch.randperm(len(self.order), generator=epoch_generator(0, "train", epoch)).tolist()
        total, correct = 0.0, 0
        for images, labels in self._batches("train"):
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.float16, enabled=self.half):
                logits = self.classifier(self.input_vr(images)) @ self.weights
                loss = functional.cross_entropy(logits, labels)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            correct += (logits.argmax(1) == labels).sum().item()
            total += loss.item() * len(labels)
        self.loss = total / len(self.order)

    @torch.no_grad()
    def test(self, epoch):
        correct = 0
        for images, labels in self._batches("test"):
            logits = self.classifier(self.input_vr(images)) @ self.weights
            correct += (logits.argmax(1) == labels).sum().item()


class _Decoded(Dataset):
    """Images as published code reads them: those of 32 pixels lie in memory, others are decoded each time."""

    def __init__(self, path, size):
        ensure_torchvision()
        from torchvision import transforms

        self.source, self.held = LmdbSource(path), None
        self.transform = transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor()])
        if size <= 32:
            records = map(self._decode, range(len(self.source)))
            self.held = [(np.asarray(image), label) for image, label in records]

    def __len__(self):
        return len(self.source)

    def _decode(self, index):
        encoded, label = self.source.record(index)
        return Image.open(io.BytesIO(encoded)).convert("RGB"), label

    def __getitem__(self, index):
        image, label = self._decode(index) if self.held is None else self.held[index]
        return self.transform(Image.fromarray(image) if self.held else image), label


def make_images(folder, size, train, test):
    """Write an ILM-VP folder of smooth random images: JPEG of about 200 pixels, or PNG of 32x32."""
    generator = np.random.default_rng(0)
    sides, kind = ((size, size), "PNG") if size <= 32 else ((240, 200), "JPEG")

    def image():
        coarse, stored = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)), io.BytesIO()
        coarse.resize(sides, Image.Resampling.BICUBIC).save(stored, kind, quality=90)
        return stored.getvalue()

    def split(count):
        distinct = [image() for _ in range(min(count, DISTINCT))]
        return [(distinct[i % DISTINCT], i % NUM_CLASSES, f"{i}.img") for i in range(count)]

    names = [f"class {label}" for label in range(NUM_CLASSES)]
    write_ilmvp(folder, train=split(train), test=split(test), class_names=names)
