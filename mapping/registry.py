"""Every label mapping by its name, with the settings that are its own."""

import difflib
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from .estimators import bayesian, frequencies
from .label_mapping import LdaMapping, LinearMapping, MatrixMapping, OneToOneMapping
from .settings import Setting

LAPLACE = Setting("laplace", 1.0, "Laplace smoothing λ", "0 or more", lambda value: 0 <= value < math.inf)
TOPK_RATIO = Setting(
    "topk_ratio", 0.15, "α: each image counts with its K = max(1, ⌊αT⌋) largest probabilities", "in (0, 1]",
    lambda value: 0 < value <= 1,
)  # fmt: skip
LINEAR_VARIANT = Setting(
    "linear_variant", "none", "with bias, without, or weights through a sigmoid",
    choices=("none", "nobias", "sigmoid"),
)  # fmt: skip
BAYES = Setting("bayes", True, "ablation: ω from P(s|t) in place of P(t|s)")
TOPK = Setting("topk", True, "ablation: each image counts with all S probabilities")
ITERATION = Setting("iteration", True, "ablation: estimate ω once, before epoch 0")


def _auto_or_number(text):
    try:
        return float(text)
    except ValueError:
        return text  # "auto", or what its range refuses


SHRINKAGE = Setting(
    "shrinkage", "auto",
    "how far the covariance is shrunk to a multiple of the identity, 0 to 1; auto chooses it by leave-one-out",
    "auto or in [0, 1]", lambda value: value == "auto" or 0 <= value <= 1, type=_auto_or_number,
)  # fmt: skip


def _rlm(num_source, num_target, *, seed):
    return OneToOneMapping("rlm", num_source, num_target, seed=seed)


def _flm(num_source, num_target, *, seed):
    return OneToOneMapping("flm", num_source, num_target)


def _ilm(num_source, num_target, *, seed, iteration):
    return OneToOneMapping("ilm", num_source, num_target, iterative=iteration)


def _blm(num_source, num_target, *, seed, laplace, bayes, iteration):
    return MatrixMapping("blm", num_source, num_target, _posterior(laplace, bayes), iterative=iteration)


def _blmpp(num_source, num_target, *, seed, laplace, topk_ratio, bayes, topk, iteration):
    k = max(1, math.floor(round(topk_ratio * num_target, 9))) if topk else num_source  # 0.29 * 100 < 29
    estimator = _posterior(laplace, bayes)
    return MatrixMapping("blmpp", num_source, num_target, estimator, min(k, num_source), iterative=iteration)


def _posterior(laplace, bayes):
    return partial(bayesian, laplace=laplace) if bayes else frequencies


def _lda(num_source, num_target, *, seed, shrinkage, iteration, prior=None):
    return LdaMapping("lda", num_source, num_target, shrinkage, iterative=iteration, prior=prior)


def _linear(num_source, num_target, *, seed, linear_variant):
    return LinearMapping("linear", num_source, num_target, seed=seed, variant=linear_variant)


class Method(NamedTuple):
    """An entry of `MAPPINGS`.

    Attributes
    ----------
    build : callable
        ``build(num_source, num_target, *, seed, **its own settings)`` gives the `LabelMapping`.
    settings : tuple of Setting
        Those that are its own; mappings may share one.
    trained : bool
        Whether it has parameters for a gradient to train.
    embedded : bool
        Whether it reads a CLIP's image embedding in place of the logits, which are a linear image of it. `build` then
        also takes a ``prior``, as `build_mapping` does.
    """

    build: Callable
    settings: tuple = ()
    trained: bool = False
    embedded: bool = False


# A new mapping is a new entry, in a file of its own if need be.
MAPPINGS = {
    "rlm": Method(_rlm),
    "flm": Method(_flm),
    "ilm": Method(_ilm, (ITERATION,)),
    "blm": Method(_blm, (LAPLACE, BAYES, ITERATION)),
    "blmpp": Method(_blmpp, (LAPLACE, TOPK_RATIO, BAYES, TOPK, ITERATION)),
    "lda": Method(_lda, (SHRINKAGE, ITERATION), embedded=True),
    "linear": Method(_linear, (LINEAR_VARIANT,), trained=True),
}
ALIASES = {"blm+": "blmpp", "blmp": "blmpp"}


def check_mapping_name(name):
    """Canonical name of a mapping; upper and lower case are alike.

    Raises
    ------
    ValueError
        Unknown name; the message gives the valid ones and the closest.
    """
    known = {known.lower(): known for known in MAPPINGS}
    lower = str(name).lower()
    canonical = known.get(ALIASES.get(lower, lower))
    if canonical is None:
        valid, closest = ", ".join([*MAPPINGS, *ALIASES]), _closest(name, [*MAPPINGS, *ALIASES])
        raise ValueError(f"unknown mapping {name!r}: expected one of {valid} (closest: {closest})")
    return canonical


def mapping_settings():
    """The settings of all registered mappings, each with the mappings that it is for.

    Returns
    -------
    dict of str to (Setting, list of str)

    Raises
    ------
    ValueError
        Two mappings describe a setting of one name differently.
    """
    described = {}
    for mapping, method in MAPPINGS.items():
        for setting in method.settings:
            known, users = described.setdefault(setting.name, (setting, []))
            if known != setting:
                raise ValueError(
                    f"mappings {users[0]} and {mapping} describe a setting {setting.name!r} differently; "
                    "give one of the two another name, or both the same Setting"
                )
            users.append(mapping)
    return described


@torch.inference_mode(False)  # which a mapping may outlive
def build_mapping(name, num_source, num_target, *, seed=0, prior=None, **settings):
    """Build a label mapping.

    Parameters
    ----------
    name : str
        A key of `MAPPINGS`, or "blm+" or "blmp" for "blmpp", in upper or lower case.
    num_source, num_target : int, >= 1
        Pretrained labels S and downstream labels T; one-to-one mappings (rlm, flm, ilm) need S >= T.
    seed : int
        Of rlm's draw and linear's initial weights; torch's global generators are not touched.
    prior : Tensor (S, T), optional
        Of an `embedded` mapping (lda): a classifier that has seen no training sample, such as a CLIP's zero-shot one.
    **settings
        Any setting of any mapping (`mapping_settings`): ``laplace=1.0``, ``topk_ratio=0.15``, ``shrinkage="auto"``,
        ``linear_variant="none"``, ``bayes=True``, ``topk=True``, ``iteration=True``. Each is checked; those that are
        not this mapping's have no effect.

    Returns
    -------
    LabelMapping
        rlm and linear are ready for use; the estimated ones after `observe` and `refresh`.

    Raises
    ------
    TypeError
        No mapping has such a setting, or this one takes no prior.
    ValueError
        Unknown name, a value out of range, S < T one-to-one, or an ablation of a mapping that has no such step.
    """
    name = check_mapping_name(name)
    if num_source < 1 or num_target < 1:
        got = f"{num_source} pretrained and {num_target} downstream labels"
        raise ValueError(f"got {got}, expected at least one of each")
    known = mapping_settings()
    for key, value in settings.items():
        if key not in known:
            raise TypeError(f"no mapping has a setting {key!r} (closest: {_closest(key, known)})")
        setting, users = known[key]
        setting.check(value)
        if setting.default is True and not value and name not in users:
            named = " and ".join(users)
            raise ValueError(f"{key}=False is an ablation of {named}, got mapping {name!r}; leave it True")
    method = MAPPINGS[name]
    own = {setting.name: settings.get(setting.name, setting.default) for setting in method.settings}
    if prior is not None:
        own["prior"] = prior
    return method.build(num_source, num_target, seed=seed, **own)


def _closest(name, valid):
    return difflib.get_close_matches(str(name).lower(), valid, n=1, cutoff=0)[0]
