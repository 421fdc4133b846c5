"""Text embeddings of a vision-language model: computed once, then read from disk."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from models.checkpoint_file import read_checkpoint


def embed_texts(model, tokenizer, texts, *, cache_path=None, device="cpu", batch_size=256):
    """Text embeddings of length one, (S, D) float32 on ``device``, computed once and then read from disk.

    Parameters
    ----------
    model, tokenizer
        As in `Clip`, the model in eval mode on ``device``.
    texts : list of str
    cache_path : str or Path, optional
        Folder for the file ``text_<key>.pt``. The key is a digest of the text side's architecture and
        weights, the tokenizer and the texts; a file that is damaged is made again.
    batch_size : int
        Texts in one pass of the text tower.
    """
    file = None if cache_path is None else Path(cache_path) / f"text_{_text_key(model, tokenizer, texts)}.pt"
    embeddings = None if file is None else _read_embeddings(file, len(texts))
    if embeddings is None:
        batches = range(0, len(texts), batch_size)
        rows = []
        with torch.no_grad():
            for start in tqdm(batches, desc="text embeddings", unit="batch", disable=None, leave=False):
                tokens = tokenizer(texts[start : start + batch_size]).to(device)
                rows.append(F.normalize(model.encode_text(tokens).float(), dim=-1).cpu())
        embeddings = torch.cat(rows)
        if file is not None:
            _write_embeddings(file, embeddings)
    return embeddings.to(device)


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
    return hashlib.sha256(embeddings.numpy()).hexdigest()


def _read_embeddings(file, num_texts):
    try:
        stored = read_checkpoint(file)
        embeddings = stored["embeddings"]
        intact = len(embeddings) == num_texts and _checksum(embeddings) == stored["checksum"]
    except Exception:  # absent, cut off or foreign: it can fail anywhere in the reader, and is made again
        return None
    return embeddings if intact else None


def _write_embeddings(file, embeddings):
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            torch.save({"embeddings": embeddings, "checksum": _checksum(embeddings)}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
