"""tools.predict on real runs through its command line."""

import csv
import errno
import io
import json
import os
import re

import pytest
import torch
from PIL import Image

from data.sources import synthetic
from tools import predict
from tools.evaluate import test_logits as logits_of_test_set
from tools.training.finished import load_run


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three test images of the data set as files, one of them in a sub-folder, beside a file that is none."""
    folder, source = tmp_path_factory.mktemp("photos"), synthetic("test")
    (folder / "sub").mkdir()
    for i, name in ((0, "0.png"), (5, "5.PNG"), (30, "sub/30.png")):
        source.image(i).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def printed_json(capsys, *arguments):
    predict.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["vm_run", "vlm_run"])
def test_probabilities_are_those_of_the_evaluation(kind, request, photos, capsys):
    folder = request.getfixturevalue(kind)
    run = load_run(folder, splits=("test",))
    logits, _ = logits_of_test_set(run)
    predictions = printed_json(capsys, folder, photos, "--top-k", "3")
    assert [p["image"].removeprefix(f"{photos}/") for p in predictions] == ["0.png", "5.PNG", "sub/30.png"]
    for i, p in zip((0, 5, 30), predictions, strict=True):
        expected = logits[i].double().softmax(0).topk(3)
        assert [row["label"] for row in p["predictions"]] == expected.indices.tolist()
        assert [row["probability"] for row in p["predictions"]] == pytest.approx(expected.values.tolist(), abs=1e-5)
        assert [row["name"] for row in p["predictions"]] == [run.class_names[t] for t in expected.indices]


@pytest.mark.parametrize("kind", ["vm_run", "vlm_run"])
def test_contributions_add_up(kind, request, photos, capsys):
    folder = request.getfixturevalue(kind)
    (p,) = printed_json(capsys, folder, photos / "0.png", "--top-k", "2000")
    run, why = load_run(folder, splits=()), p["why"]
    image = torch.from_numpy(run.system.presets[1].store(Image.open(photos / "0.png")).copy()).permute(2, 0, 1)[None]
    ((source, target),) = run.logits([image / 255.0])
    winner = p["predictions"][0]["label"]
    assert why["margin"] == pytest.approx(float(target[0, winner] - target[0].mean()), abs=1e-4)
    assert why["pro"] + why["contra"] == pytest.approx(why["margin"], abs=1e-4) and abs(why["rest"]) < 1e-4
    assert sum(row["contribution"] for row in why["sources"]) == pytest.approx(why["pro"])
    contributions = [row["contribution"] for row in why["sources"]]
    assert contributions == sorted(contributions, reverse=True) and contributions[-1] > 0
    weights, z, first = run.system.mapping.weights, source[0] - source[0].mean(), why["sources"][0]
    s = first["label"]
    assert first["name"] == run.source_names[s] and first["weight"] == pytest.approx(float(weights[s, winner]))
    assert first["contribution"] == pytest.approx(float((weights[s, winner] - weights[s].mean()) * z[s]), abs=1e-4)


def test_contributions_by_hand():
    """Three pretrained labels, two downstream: ω centred over downstream labels, z over pretrained ones."""
    weights = torch.tensor([[0.75, 0.25], [0.25, 0.25], [0.0, 0.5]])
    z = torch.tensor([4.0, 1.0, 1.0])  # mean 2
    centred = weights - weights.mean(1, keepdim=True)
    contributions = predict.contributions_to(centred[:, 0], z)
    # the first speaks for label 0; the second for both alike; the third, inactive, usually speaks for label 1
    assert contributions.tolist() == pytest.approx([0.25 * 2, 0.0, -0.25 * -1])
    y = z @ weights
    assert float(contributions.sum()) == pytest.approx(float(y[0] - y.mean()))


def test_constant_on_all_pretrained_logits_changes_nothing():
    weights = torch.rand(6, 3).softmax(0)
    centred, z = weights - weights.mean(1, keepdim=True), torch.randn(6)
    torch.testing.assert_close(
        predict.contributions_to(centred[:, 1], z), predict.contributions_to(centred[:, 1], z + 100), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("kind", ["linear_run", "lda_run"])
def test_affine_mapping_has_a_rest(kind, request, photos, capsys):
    folder = request.getfixturevalue(kind)
    (p,) = printed_json(capsys, folder, photos / "0.png", "--top-k", "2000")
    run, why, winner = load_run(folder, splits=()), p["why"], p["predictions"][0]["label"]
    image = torch.from_numpy(run.system.presets[1].store(Image.open(photos / "0.png")).copy()).permute(2, 0, 1)[None]
    ((source, target),) = run.logits([image / 255.0])
    assert why["margin"] == pytest.approx(float(target[0, winner] - target[0].mean()), rel=1e-4, abs=1e-4)
    z, weights, bias = (x.detach().double() for x in (source[0], run.system.mapping.weights, run.system.mapping.bias))
    columns = weights.sum(0)
    rest = bias[winner] - bias.mean() + (columns[winner] - columns.mean()) * z.mean()
    assert why["rest"] == pytest.approx(float(rest), abs=1e-3 * max(1, why["pro"])) and abs(why["rest"]) > 1e-3
    assert why["pro"] + why["contra"] + why["rest"] == pytest.approx(why["margin"])
    assert any(row["weight"] < 0 for row in why["sources"])


def test_label_that_lda_never_saw_takes_no_part_in_the_mean(lda_run, photos):
    """Its bias is beyond all logits."""
    run = load_run(lda_run, splits=())
    (p,), _ = predict.predict(run, [photos / "0.png"])
    run.system.mapping._bias[(p["predictions"][0]["label"] + 1) % 8] = -1e30
    (again,), _ = predict.predict(run, [photos / "0.png"])
    assert 0 < again["why"]["margin"] < 10 * abs(p["why"]["margin"]) + 100


def test_csv_and_table_say_the_same(vm_run, photos, capsys):
    (_, p, _) = printed_json(capsys, vm_run, photos, "--top-k", "2")
    predict.main([str(vm_run), str(photos / "5.PNG"), "--csv", "--top-k", "2"])
    head, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert head == ["image", "rank", "label", "probability", "because", "contribution"] and len(rows) == 2
    assert [row[2] for row in rows] == [row["name"] for row in p["predictions"]]
    assert [float(row[3]) for row in rows] == pytest.approx([row["probability"] for row in p["predictions"]], abs=1e-5)
    assert rows[0][4] == p["why"]["sources"][0]["name"]
    predict.main([str(vm_run), str(photos / "5.PNG"), "--top-k", "2"])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == str(photos / "5.PNG")
    first, source = p["predictions"][0], p["why"]["sources"][0]
    assert table[1].split() == [*first["name"].split(), f"{first['probability']:.2%}"]
    assert table[3].startswith(f"why {first['name']}: ")
    assert table[4].split()[-3:] == [f"{source['contribution']:+.3f}", "weight", f"{source['weight']:+.4f}"]


def test_table_explains_itself_as_a_sum(lda_run, photos, capsys):
    """Whatever is not shown by name has a row of its own, so that the column adds up to its last line."""
    predict.main([str(lda_run), str(photos / "0.png"), "--top-k", "2"])
    _, rows = capsys.readouterr().out.split("why ")
    head, *rows = rows.splitlines()
    assert "how far its score is above the average of all labels, as a sum" in head
    *names, total = [row.split("  ")[1] for row in rows]
    assert (
        names[2:] == ["(others that raise it)", "(all that lower it)", "(due to no single one)"] and total == "(total)"
    )
    *terms, total = [float(re.search(r"[+-]\d+\.\d{3}(?!\d)", row)[0]) for row in rows]
    assert sum(terms) == pytest.approx(total, abs=0.005)


def test_any_size_and_mode(vm_run, tmp_path, capsys):
    """As the test preset has it: resized, and made RGB; transparency and grey included."""
    Image.new("LA", (300, 20), (128, 10)).save(tmp_path / "grey.png")
    Image.new("RGB", (32, 32), (128, 128, 128)).save(tmp_path / "small.png")
    one, two = printed_json(capsys, vm_run, tmp_path)
    assert [row["probability"] for row in one["predictions"]] == pytest.approx(
        [row["probability"] for row in two["predictions"]], abs=1e-6
    )


def test_bad_images_are_left_out(vm_run, photos, tmp_path, capsys):
    """One warning each; exit code 1, or 2 where no image is left."""
    (tmp_path / "none\x1b[2J.jpg").write_text("not an image")
    whole = (photos / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "gone.png").symlink_to("absent.png")
    good = printed_json(capsys, vm_run, photos)
    with pytest.raises(SystemExit) as caught:
        predict.main([str(vm_run), str(tmp_path), str(photos), "--json"])
    printed = capsys.readouterr()
    left = json.loads(printed.out)
    assert caught.value.code == 1 and [p["image"] for p in left] == [p["image"] for p in good]
    for one, other in zip(left, good, strict=True):
        assert one["predictions"][0]["probability"] == pytest.approx(other["predictions"][0]["probability"], abs=1e-6)
    one, gone, other = printed.err.splitlines()
    assert gone == f"warning: left out: {tmp_path}/gone.png: No such file or directory; restore or remove this image"
    assert one.startswith("warning: left out: ") and "cut.png: not a readable image" in one
    assert "not a readable image" in other and r"none\x1b[2J.jpg" in other
    with pytest.raises(SystemExit) as caught:
        predict.main([str(vm_run), str(tmp_path / "cut.png")])
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1


def test_a_folder_that_cannot_be_read_is_not_passed_over(photos, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="sub"):
        predict.image_files([photos])


def test_escapes_in_names_are_shown():
    why = {
        "margin": 1.0,
        "pro": 1.0,
        "contra": 0.0,
        "rest": 0.0,
        "sources": [{"label": 0, "name": "s\x1b[2J", "contribution": 1.0, "weight": -0.5}],
    }
    table = predict.as_table(
        [{"image": "i\x1b", "predictions": [{"label": 0, "name": "t\x1b", "probability": 1.0}], "why": why}]
    )
    assert "\x1b" not in table and all(text in table for text in (r"i\x1b", r"t\x1b", r"s\x1b[2J", "-0.5000"))


def test_bad_input(vm_run, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, words in [
        ([tmp_path / "absent.png"], ["absent.png", "no such image"]),
        ([tmp_path / "empty"], ["holds no image file"]),
        ([photos, "--top-k", "0"], ["--top-k must be 1 or more, got 0"]),
        ([photos, "--json", "--csv"], ["not allowed with"]),
        ([], ["IMAGE|FOLDER"]),
    ]:
        with pytest.raises(SystemExit) as caught:
            predict.main([str(vm_run), *map(str, arguments)])
        printed = capsys.readouterr()
        assert caught.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
        assert all(word in printed.err for word in words), printed.err
