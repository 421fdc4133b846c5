"""Prompts of a vision-language model: templates filled with class names.

A prompt is one pretrained label. With M templates and T classes there are S = M * T of them, template by
template: prompt s is template s // T filled with class s % T. The first template is the one that zero-shot
classification with a single template uses.
"""

from dataclasses import dataclass
from pathlib import Path

from data.class_names import clean_class_name

DEFAULT_TEMPLATE = "This is a photo of a {}."


@dataclass(frozen=True)
class Prompts:
    """Templates and class names, and the S = M * T texts that they make.

    Attributes
    ----------
    templates : tuple of str
        M texts with ``{}`` in the place of the class name.
    class_names : tuple of str
        T cleaned names, in the order of the downstream labels.
    """

    templates: tuple
    class_names: tuple

    def __len__(self):
        return len(self.templates) * len(self.class_names)

    @property
    def texts(self):
        """All S prompts, list of str: template by template."""
        return [template.replace("{}", name) for template in self.templates for name in self.class_names]


def default_templates():
    """The 81 templates of the paper: `DEFAULT_TEMPLATE`, then open_clip's 80 for the ImageNet ensemble."""
    from models.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [DEFAULT_TEMPLATE, *(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)]


def read_templates(file):
    """Templates of a UTF-8 text file, one a line; empty lines are left out.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file, or no text.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}); write one template a line") from error
    except OSError as error:
        raise FileNotFoundError(f"templates {file} cannot be read: {error.strerror}") from error
    return [line.strip() for line in lines if line.strip()]


def build_prompts(class_names, templates=None):
    """Prompts of the given classes.

    Parameters
    ----------
    class_names : sequence of str
        T names, cleaned here (cleaning twice changes nothing).
    templates : sequence of str, optional
        M templates; `default_templates` where none are given.

    Raises
    ------
    ValueError
        For no classes, no templates, an empty class name, or a template without ``{}``.
    """
    templates = default_templates() if templates is None else list(templates)
    if not templates or not class_names:
        raise ValueError(f"prompts need templates and classes, got {len(templates)} and {len(class_names)}")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}} for the class, as in {DEFAULT_TEMPLATE!r}")
    cleaned = [clean_class_name(name) for name in class_names]
    for label, name in enumerate(cleaned):
        if not name.strip():
            raise ValueError(
                f"class {label} of {len(cleaned)} has the empty name {class_names[label]!r}; a prompt needs "
                "a word: name the class where its data set does (split.json, or the folder of its images)"
            )
    return Prompts(tuple(templates), tuple(cleaned))
