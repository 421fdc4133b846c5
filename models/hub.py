"""The Hugging Face hub: which of its files are on this machine, and whether it answers.

Its own client asks an unreachable hub for most of a minute, with a line for each try, before it gives up.
"""

import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub


def file_url(repository, file):
    """Where ``file`` of ``repository`` is fetched from."""
    return f"{huggingface_hub.constants.ENDPOINT}/{repository}/resolve/main/{file}"


def cached_file(repository, files):
    """Path of the first of ``files`` that is in the hub's cache on this machine; None without any."""
    found = (huggingface_hub.try_to_load_from_cache(repository, file) for file in files)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def is_reachable(url):
    """Whether a server answers for ``url``, be it with a refusal."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
