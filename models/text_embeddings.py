"""Text embeddings of a vision-language model: computed once, then read from disk."""

import hashlib
import json
import os
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from tqdm import tqdm

BAR_AFTER = 1  # seconds


def embed_texts(model, tokenizer, texts, *, cache_path=None, device="cpu", batch_size=32, should_stop=lambda: False):
    """Text embeddings of length one, (S, D) float32 on ``device``, computed once and then read from disk.

    A bar on stderr, where that is a terminal, shows how far they are if they take longer than `BAR_AFTER`.

    Parameters
    ----------
    model, tokenizer
        As in `Clip`, the model in eval mode on ``device``.
    texts : list of str
    cache_path : str or Path, optional
        Folder for the file ``text_<key>.safetensors``. The key is a digest of the text side's architecture and
        weights, the tokenizer and the texts; a file that is damaged is made again.
    batch_size : int
        Texts in one pass of the text tower.
    should_stop : callable, optional
        Asked before every batch; where it says yes, nothing is written.

    Raises
    ------
    InterruptedError
        Where ``should_stop`` said yes.
    """
    file = None if cache_path is None else Path(cache_path) / f"text_{_text_key(model, tokenizer, texts)}.safetensors"
    embeddings = None if file is None else _read_embeddings(file, len(texts))
    if embeddings is None:
        embeddings = _compute(model, tokenizer, texts, device, batch_size, should_stop)
        if file is not None:
            _write_embeddings(file, embeddings)
    return embeddings.to(device)


@torch.no_grad()
def _compute(model, tokenizer, texts, device, batch_size, should_stop):
    rows = []
    with tqdm(None, "text embeddings", len(texts), False, unit="prompt", disable=None, delay=BAR_AFTER) as progress:
        for start in range(0, len(texts), batch_size):
            if should_stop():
                raise InterruptedError(f"stopped after {start} of {len(texts)} text embeddings; none are kept")
            batch = texts[start : start + batch_size]
            rows.append(F.normalize(model.encode_text(tokenizer(batch).to(device)).float(), dim=-1).cpu())
            progress.update(len(batch))
    return torch.cat(rows)


def _text_key(model, tokenizer, texts):
    digest = hashlib.sha256()
    # The printed model tells activations apart, which weights alone do not.
    settings = [repr(model), type(tokenizer).__name__, getattr(tokenizer, "context_length", None), texts]
    digest.update(json.dumps(settings).encode())
    for key, value in model.state_dict().items():
        if not key.startswith("visual."):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:24]


def _checksum(embeddings):
    digest = hashlib.sha256(f"{embeddings.dtype} {tuple(embeddings.shape)}".encode())
    digest.update(embeddings.numpy())
    return digest.hexdigest()


def _read_embeddings(file, num_texts):
    try:
        with safetensors.safe_open(file, "pt") as stored:
            embeddings, checksum = stored.get_tensor("embeddings"), stored.metadata()["checksum"]
        intact = len(embeddings) == num_texts and _checksum(embeddings) == checksum
    except Exception:  # absent, cut off or foreign: it can fail anywhere in the reader, and is made again
        return None
    return embeddings if intact else None


def _write_embeddings(file, embeddings):
    content = safetensors.torch.save({"embeddings": embeddings}, {"checksum": _checksum(embeddings)})
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
