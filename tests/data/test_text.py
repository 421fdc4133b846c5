"""Prompts: the 81 templates, their order, and what is refused."""

import re

import pytest

from data.text import DEFAULT_TEMPLATE, build_prompts, default_templates, read_templates


def test_the_templates_are_the_default_and_open_clips_eighty():
    templates = default_templates()
    assert len(templates) == len(set(templates)) == 81
    assert templates[0] == DEFAULT_TEMPLATE == "This is a photo of a {}."
    assert templates[1] == "a bad photo of a {}." and templates[-1] == "a tattoo of the {}."
    assert all(template.count("{}") == 1 for template in templates)


def test_prompts_run_through_the_classes_of_one_template_after_another():
    prompts = build_prompts(["Oxeye_Daisy", "globe-flower"], ["a {}.", "the {}.", "{} art"])
    assert prompts.class_names == ("oxeye daisy", "globe flower")
    assert prompts.texts == [
        "a oxeye daisy.", "a globe flower.", "the oxeye daisy.", "the globe flower.",
        "oxeye daisy art", "globe flower art",
    ]  # fmt: skip
    assert len(prompts) == 6


def test_sun397_has_as_many_prompts_as_the_design_says():
    prompts = build_prompts([f"scene {i}" for i in range(397)])
    assert len(prompts) == len(prompts.texts) == 32_157
    assert prompts.texts[-1] == "a tattoo of the scene 396."


def test_braces_of_a_class_name_or_template_stand_for_themselves():
    assert build_prompts(["{0}"], ["a {} in {brackets}"]).texts == ["a {0} in {brackets}"]


@pytest.mark.parametrize(
    ("class_names", "templates", "message"),
    [
        (["daisy", ""], None, "class 1 of 2 has the empty name ''"),
        (["_-", "daisy"], None, "class 0 of 2 has the empty name '_-'"),
        (["daisy"], ["a {}.", "a photo."], "template 'a photo.' has no {} for the class"),
        (["daisy"], ["a {name}."], "template 'a {name}.' has no {} for the class"),
        ([], None, "got 81 and 0"),
        (["daisy"], [], "got 0 and 1"),
    ],
)
def test_bad_input_gives_one_line(class_names, templates, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        build_prompts(class_names, templates)
    assert "\n" not in str(caught.value)


def test_templates_of_a_file(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a {}.\n\n  the {}, naïve \n", encoding="utf-8")
    assert read_templates(file) == ["a {}.", "the {}, naïve"]
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="templates.txt is not UTF-8 text"):
        read_templates(file)
    with pytest.raises(FileNotFoundError, match="none.txt cannot be read: No such file"):
        read_templates(tmp_path / "none.txt")
