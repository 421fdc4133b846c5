"""Weights in files from strangers: plain tensors or one line that says what is wrong, and no code is run.

Three forms are read: safetensors, torch checkpoints, and TorchScript archives, as OpenAI publishes its CLIPs.
"""

import io
import pickle
import zipfile

import safetensors.torch
import torch

MAX_ENTRIES, MAX_NAME = 100_000, 1_000  # attributes of all modules of a TorchScript archive, characters of a path


def read_state_dict(path):
    """Read a checkpoint's tensors without running any code that it may carry.

    ``torch.load(weights_only=True)`` reads torch checkpoints. It makes tensors and plain values alone, but believes
    the sizes that a file declares: a hostile one can still ask for more memory than there is. safetensors cannot.

    Parameters
    ----------
    path : str or Path
        A ``.safetensors`` file, or a torch checkpoint: a state dict, bare or under ``state_dict`` or ``model``.

    Returns
    -------
    dict of str to Tensor on the CPU; a ``module.`` prefix left by data-parallel training is dropped.

    Raises
    ------
    ValueError
        For anything that is not such a file.
    """
    state = read_mapping(path)
    if not state or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise ValueError(f"{path} holds no state dict: expected parameter names with tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def read_mapping(path):
    """The dict of a checkpoint that holds the weights, with whatever else stands in it; {} where there is none."""
    try:
        if str(path).endswith(".safetensors"):
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere inside the readers
        reason = one_line(error, 120)
        raise ValueError(f"{path} is not a readable checkpoint of plain tensors ({reason})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return state if isinstance(state, dict) else {}


def is_torchscript(file):
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(entry.endswith("/constants.pkl") for entry in archive.namelist())


def read_torchscript_state_dict(file):
    """Tensors of a TorchScript archive, without running the code in it.

    Modules become plain holders of attributes; of everything else the archive's pickle may name only tensors,
    their storages and OrderedDict.

    Parameters
    ----------
    file : str or Path

    Returns
    -------
    dict of str to Tensor on the CPU: parameters, buffers, and constants that are tensors.

    Raises
    ------
    pickle.UnpicklingError
        For an archive that names anything else, or more than it holds.
    """
    with zipfile.ZipFile(file) as archive:
        pickled = next(entry for entry in archive.namelist() if entry.endswith("/data.pkl"))
        unpickler = _TorchScriptUnpickler(archive, pickled.removesuffix("/data.pkl"))
        pending, state, entries = [("", unpickler.load())], {}, 0
    while pending:
        name, value = pending.pop()
        if isinstance(value, torch.Tensor):
            state[name] = value
        elif isinstance(value, _Module):
            attributes = vars(value)
            entries += len(attributes)
            # a module may hold itself, or another twice, which holds another twice, and so on
            if entries > MAX_ENTRIES or len(name) + max(map(len, attributes), default=0) > MAX_NAME:
                raise pickle.UnpicklingError("the archive's modules are nested beyond measure")
            pending += [(f"{name}.{key}" if name else key, child) for key, child in reversed(attributes.items())]
    return state


class _Module:
    """Holds the attributes of any class that an archive defines."""


class _TorchScriptUnpickler(pickle._Unpickler):  # the one in C allocates a table up to the largest memo index
    def _refuse(self):
        raise pickle.UnpicklingError("the archive's pickle holds a bytearray, which no CLIP weights need")

    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: _refuse}  # it would allocate what it declares

    def __init__(self, archive, root):
        self.archive, self.root, self.storages = archive, root, {}
        super().__init__(io.BytesIO(self._read("data.pkl")))

    def find_class(self, module, name):
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"the archive names {module}.{name}, which no CLIP weights need")

    def persistent_load(self, reference):
        _, dtype, key, _, _ = reference
        if key not in self.storages:
            self.storages[key] = torch.frombuffer(bytearray(self._read(f"data/{key}")), dtype=dtype)
        return self.storages[key]

    def _read(self, name):
        record = self.archive.getinfo(f"{self.root}/{name}")
        if record.compress_type != zipfile.ZIP_STORED:  # so that no record is larger than the file
            raise pickle.UnpicklingError(f"the archive's {name} is compressed, which torch never does")
        return self.archive.read(record)


_STORAGE_TYPES = {
    f"{kind}Storage": getattr(torch, kind.lower())
    for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Bool")
}


def _rebuild_tensor(storage, offset, size, stride, *_):
    return storage.as_strided(size, stride, offset)


def one_line(error, limit=160):
    """The first line of an error that tells what is wrong, cut to ``limit`` characters."""
    text = repr(error) if isinstance(error, KeyError) else str(error)  # a key alone tells nothing
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    line = next((line for line in lines if not line.startswith(_HEADINGS)), repr(error))
    return line if len(line) <= limit else line[: limit - 3] + "..."


# torch's lines above the one that tells; some of them advise to read the file in the unsafe way
_HEADINGS = "Error(s) in loading", "Weights only load failed", "Please file an issue"
