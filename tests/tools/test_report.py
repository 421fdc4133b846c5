"""tools.report through its command line: averages, grouping, tables, hostile names, and the page in a real browser."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.files import write_json
from tools.report import __main__ as report
from tools.report.comparison import Cell, difference
from tools.report.page import _pattern_image
from tools.report.published import published_tables
from tools.report.runs import find_runs
from tools.training.checkpoint import write_checkpoint
from tools.training.run_folder import checkpoint_path, load_checkpoint

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "dataset": "flowers102",
    "backbone": "resnet18",
    "reprogramming": "padding",
    "mapping": "ilm",
    "seed": 0,
    "epochs": 2,
    "batch_size": 256,
    "lr": 0.01,
    "device": "cpu",
    "workers": 0,
    "results_path": "results",
}
START = {"time": "2026-01-01T00:00:00", "host": "here", "device": "CPU of 2 cores", "threads": 2, "command": "…"}
HOSTILE = "<img src=x onerror=\"document.title='taken'\"></script><script>document.title='taken'</script> & 'daisy'"
NAMED = ("dataset", "backbone", "reprogramming", "mapping", "seed", "epochs")


def make_run(
    results,
    final,
    *,
    kind="vm",
    seconds=30.0,
    classes=("rose", "oxeye daisy"),
    sources=None,
    data="1",
    test_data="1",
    starts=(START,),
    done=None,
    top_labels=((1, 3, 0), (2, 1, 0)),
    top_weights=((0.6, 0.25, 0), (0.5, 0.125, 0.0)),
    measured=None,
    **changes,
):
    """A run folder as a script leaves it; unfinished after ``done`` epochs. All changes but names are distinct."""
    settings = SETTINGS | changes
    folder = results / f"{kind}_{len(list(results.glob('*')))}"
    folder.mkdir(parents=True)
    steps = {"estimate": seconds / 2, "train": seconds, "test": seconds / 2}
    count = settings["epochs"] if done is None else done
    metrics = [
        {
            "epoch": e,
            "train_loss": 2.0 / (e + 1),
            "train_accuracy": 0.5,
            "test_accuracy": max(final - 0.1 * (1 - e / max(count - 1, 1)), 0),
            "mapping_change": 0.25 / e if e else None,
            "lr": 0.01,
            "seconds": steps,
        }
        for e in range(count)
    ]
    distinct = {key: value for key, value in changes.items() if key not in NAMED[:5]}
    write_json(
        folder / "config.json",
        {
            "format": 2,
            "kind": kind,
            "settings": settings,
            "distinct": distinct,
            "content": {"class names": list(classes), "train images": data, "test images": test_data},
            "starts": list(starts),
        },
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if done is None:
        write_json(folder / "result.json", {"final_accuracy": final, "best_accuracy": min(final + 0.05, 1)})
    if measured is not None:
        classes_measured = [{"name": n, "accuracy": a} for n, a in zip(classes, measured, strict=True)]
        write_json(folder / "evaluation.json", {"epoch": count - 1, "classes": classes_measured})
    if count:
        top = {"labels": torch.tensor(top_labels), "weights": torch.tensor(top_weights)}
        write_state(
            folder,
            {
                "kind": kind,
                "settings": settings,
                "metrics": metrics,
                "mapping": {},
                "program": torch.randn(3, 224, 224),
                "class_names": list(classes),
                "source_names": list(sources or ("tench", "daisy", "sea urchin", "vase")),
                "history": [{"epoch": count - 1, **top}],
            },
        )
    return folder


def write_state(folder, state):
    write_checkpoint(checkpoint_path(folder), state)


def run(capsys, *arguments):
    report.main([str(argument) for argument in arguments])
    return capsys.readouterr()


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        report.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    return error


def rows(markdown):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]


@pytest.fixture
def results(tmp_path):
    for seed, final in enumerate((0.25, 0.28, 0.31)):
        make_run(tmp_path, final, seed=seed)
    make_run(tmp_path, 0.4, mapping="blm", seconds=60.0)
    make_run(tmp_path, 0.9, mapping="linear")
    return tmp_path


def test_markdown(results, capsys):
    head, rule, ours, published = rows(run(capsys, results, "--format", "markdown").out)
    assert head == [
        "data set",
        "backbone",
        "input VR",
        "script",
        "ilm",
        "blm",
        "linear",
        "seeds",
        "epochs",
        "minutes per run",
    ]
    assert set("".join(rule)) == {"-", ":"}
    # 25, 28, 31 %: mean 28, sample standard deviation 3; (15 + 30 + 15) s, twice, are 2 minutes
    assert ours == [
        "flowers102",
        "resnet18",
        "padding",
        "train_vm",
        "28.0 ± 3.0",
        "40.0",
        "90.0",
        "1–3",
        "2",
        "2–4",
    ]
    assert published == ["flowers102", "resnet18", "padding", "published", "27.9 ± 0.7", "–", "–", *"–––"]


def test_only_cells_of_equally_many_seeds_compete_for_bold(results, capsys):
    """Three seeds of ilm against one of blm: neither; with two more of blm it wins, and flm's single 0.8 does not."""
    for seed in (1, 2):
        make_run(results, 0.4, mapping="blm", seed=seed)
    make_run(results, 0.8, mapping="flm")
    ours = rows(run(capsys, results, "--format", "markdown").out)[2]
    assert ours[4:8] == ["80.0", "28.0 ± 3.0", "**40.0 ± 0.0**", "90.0"]
    columns = "--format", "markdown", "--columns", "mapping", "--rows", "dataset"
    assert rows(run(capsys, results, *columns).out)[2][1:5] == ["80.0", "28.0 ± 3.0", "**40.0 ± 0.0**", "90.0"]


def test_mappings_of_plugins_come_last(results, capsys):
    make_run(results, 0.45, mapping="my_own")
    make_run(results, 0.35, mapping="a_plugin")
    head, _, ours, _ = rows(run(capsys, results, "--format", "markdown").out)
    assert head[4:9] == ["ilm", "blm", "linear", "a_plugin", "my_own"]
    assert ours[4:9] == ["28.0 ± 3.0", "40.0", "90.0", "35.0", "**45.0**"]


def test_seeds_of_other_data_are_not_averaged(results, capsys):
    make_run(results, 0.9, seed=7, data="2")
    head, _, *lines = rows(run(capsys, results, "--format", "markdown").out)
    ours = [line for line in lines if line[3] == "train_vm"]
    assert sorted(line[4] for line in ours) == ["28.0 ± 3.0", "90.0"] and head[-1] == "note"
    notes = [line[-1] for line in ours]
    assert len(set(notes)) == 2 and all("rows of this name differ in labels or images" in note for note in notes)


def test_published_figures_stand_once_below_the_rows_that_they_are_beside(results, capsys):
    make_run(results, 0.5, lr=0.1)
    lines = rows(run(capsys, results, "--format", "markdown").out)
    assert [line[3] for line in lines[2:]] == ["train_vm", "train_vm", "published"]


def test_other_machines_and_threads_are_noted(results, capsys):
    make_run(results, 0.34, seed=3, starts=[START, START | {"device": "GPU", "threads": 8}])
    assert rows(run(capsys, results, "--format", "markdown").out)[2][-1] == (
        "ilm: runs on CPU of 2 cores and GPU, runs with 2 and 8 threads"
    )


def test_latex(results, capsys, tmp_path):
    make_run(results, 0.5, backbone="timm:a_b&c", dataset="synthetic")
    make_run(results, 0.5, seed=1, mapping="blm")
    make_run(results, 0.5, seed=2, mapping="blm")
    run(capsys, results, "--format", "latex", "--out", tmp_path / "t.tex")
    text = (tmp_path / "t.tex").read_text()
    assert r"28.0 $\pm$ 3.0 & \textbf{46.7 $\pm$ 5.8} & 90.0 & 1--3" in text
    assert r"synthetic & timm:a\_b\&c & padding & train\_vm" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert {line.count("&") - line.count(r"\&") for line in body.strip().splitlines()} == {9}


def test_latex_of_signs_that_text_fonts_lack(tmp_path, capsys):
    """A minus sign stops pdflatex, and < is printed as ¡."""
    for seed in range(3):
        make_run(tmp_path, 0.9 + 1e-4 * seed, seed=seed)
        make_run(tmp_path, 0.8, seed=seed, mapping="blm")
    out = run(
        capsys, tmp_path, "--format", "latex", "--columns", "mapping", "--rows", "dataset", "--baseline", "ilm"
    ).out
    assert "$-$10.0 (p $<$ 0.001): a loss" in out


@pytest.mark.parametrize(
    "other, shown",
    [
        ({"lr": 0.1}, "lr 0.1"),
        ({"epochs": 1}, "1"),
        ({"batch_size": 64}, "batch size 64"),
        ({"mapping": "blm", "bayes": False}, "bayes False"),
        ({"a_new_setting": 7}, "a new setting 7"),
        ({"weights": "/a/w.pth"}, "weights w.pth"),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(results, capsys, other, shown):
    make_run(results, 0.7, seed=5, **other)
    lines = [line for line in rows(run(capsys, results, "--format", "markdown").out)[2:] if line[3] == "train_vm"]
    assert len(lines) == 2 and {"28.0 ± 3.0", "40.0"} <= {cell.strip("*") for line in lines for cell in line}
    assert "70.0" in next(line for line in lines if "28.0 ± 3.0" not in line)
    assert sum(shown in line for line in lines) == 1


def test_where_the_same_images_lie_does_not_part_runs(tmp_path, capsys):
    for seed, place in enumerate(("/home/me", "/scratch")):
        make_run(tmp_path, 0.25, dataset=f"folder:{place}/photos", weights=f"{place}/w.pth", seed=seed)
    make_run(tmp_path, 0.5, dataset="folder:/else/photos", weights="/w.pth", data="2")
    found = [[line[0], *line[4:7]] for line in rows(run(capsys, tmp_path, "--format", "markdown").out)[2:]]
    assert sorted(found) == [
        ["folder:photos", "weights w.pth", "25.0 ± 0.0", "2"],
        ["folder:photos", "weights w.pth", "50.0", "1"],
    ]


def test_settings_that_are_not_distinct_do_not_part_runs(results, capsys):
    folder = make_run(results, 0.34, seed=3)
    change_config(folder, settings=SETTINGS | {"seed": 3, "device": "cuda", "workers": 4, "results_path": "elsewhere"})
    _, _, ours, _ = rows(run(capsys, results, "--format", "markdown").out)
    assert ours[4] == "29.5 ± 3.9" and ours[7] == "1–4"


def test_seeds_that_draw_their_images_are_averaged(tmp_path, capsys):
    for seed in range(3):
        make_run(tmp_path, 0.2 + 0.02 * seed, seed=seed, shots=4, data=f"drawn with {seed}")
        make_run(tmp_path, 0.4, seed=seed, mapping="blm", shots=4, data="1", test_data=f"{seed}")
    lines = [line for line in rows(run(capsys, tmp_path, "--format", "markdown").out)[2:] if line[3] != "published"]
    cells = sorted(line[5] for line in lines)
    assert cells == ["22.0 ± 2.0", "–", "–"]  # other test images are another row
    for seed in range(3):
        drawn = {"data": f"{seed}", "test_data": f"{seed}"}
        make_run(tmp_path / "split", 0.2 + 0.02 * seed, seed=seed, test_fraction=0.5, **drawn)
    (line,) = [
        line for line in rows(run(capsys, tmp_path / "split", "--format", "markdown").out)[2:] if "22.0 ± 2.0" in line
    ]


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_one_bad_run_never_stops_a_report_over_others(results, capsys):
    make_run(results, 0.99, seed=1)
    (make_run(results, 0.99, seed=9) / "metrics.jsonl").write_text("{}\n")
    (make_run(results, 0.99, seed=10) / "config.json").write_text("[]")
    change_config(make_run(results, 0.99, seed=11), format=None)
    change_config(make_run(results, 0.99, seed=12), format=3)
    change_config(make_run(results, 0.99, seed=13), settings={"mapping": []})
    change_config(make_run(results, 0.99, seed=14), kind="vm\x1b[31m")
    change_config(make_run(results, 0.99, seed=15), starts="now")
    for damage in ("1" + "0" * 400, "-0.5", "NaN", "[" * 10000, "1" + "0" * 5000):
        (make_run(results, 0.99, seed=16) / "result.json").write_text(f'{{"final_accuracy": {damage}}}')
    folder = make_run(results, 0.99, seed=17)
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().replace("15.0", "1" + "0" * 400))
    (make_run(results, 0.99, seed=18) / "metrics.jsonl").write_bytes(b"\xff")
    (make_run(results, 0.99, seed=19) / "evaluation.json").write_text('{"epoch": 1, "classes": [3]}')
    folder.rename(results / "a\x1b]0;b\udcff")
    outcome = run(capsys, results, "--format", "markdown")
    assert rows(outcome.out)[2][4] == "28.0 ± 3.0"
    warnings = outcome.err.splitlines()
    assert len(warnings) == 16 and all(line.startswith("warning: left out: ") for line in warnings)
    for word in (
        "repeats",
        "an older version",
        "a newer version",
        "a known kind",
        "lacks dataset",
        "test_accuracy is None",
        "-0.5",
        "nan",
        r"a\x1b]0;b\udcff",
        "got int",
    ):
        assert sum(word in line for line in warnings) == 1, word
    assert "\x1b" not in outcome.err
    page = run(capsys, results, "--out", results / "page.html")
    assert len(page.err.splitlines()) == 16


def test_escapes_in_names_are_shown(results, capsys):
    folder = make_run(results, 0.5, dataset="a\x1b[31mb\ud800\u202e")
    outcome = run(capsys, results, "--format", "markdown").out
    assert r"a\\x1b\[31mb\\ud800\\u202e" in outcome and outcome.isascii() is False and "\x1b" not in outcome
    run(capsys, folder, "--out", results / "page.html")
    assert page_data(results / "page.html")["groups"][0]["dataset"] == r"a\x1b[31mb\ud800\u202e"
    make_run(results, 0.6, **{"a\x1b[31m": "b\x1b[0m", "weights": "c\x1b[1m"}, seed=5)
    columns = run(capsys, results, "--format", "markdown", "--columns", "weights", "--rows", "dataset,mapping")
    assert "\x1b" not in columns.out + columns.err and r"c\\x1b\[1m" in columns.out and r"a\\x1b" in columns.out


def test_the_same_folder_twice_is_one_run(results, capsys):
    twice = run(capsys, results, results / "vm_0", "--format", "markdown")
    assert rows(twice.out)[2][4] == "28.0 ± 3.0" and twice.err == ""


def test_bad_input(tmp_path, capsys):
    assert "no folder and no file" in fails(capsys, tmp_path / "absent")
    assert "holds no run" in fails(capsys, tmp_path)
    unfinished = make_run(tmp_path, 0.5, done=1)
    assert "holds no finished run" in fails(capsys, unfinished, "--format", "latex")
    assert "invalid choice" in fails(capsys, tmp_path, "--format", "pdf")
    assert "did you mean --format" in fails(capsys, tmp_path, "--formt", "html")


def test_damaged_checkpoints_cost_their_pattern_alone(tmp_path, capsys):
    folder, out = make_run(tmp_path / "runs", 0.5), tmp_path / "page.html"
    whole = copy.deepcopy(load_checkpoint(checkpoint_path(folder)))  # whose tensors may still lie in the file
    checkpoint_path(folder).write_bytes(b"none")
    damages = [
        None,
        *(
            {"history": [{"labels": torch.tensor([[9], [0]]), "weights": torch.ones(2, 1)}]},
            {"history": [{}]},
            {"history": [{"labels": torch.tensor([[1], [0]]), "weights": torch.full((2, 1), torch.nan)}]},
            {"program": torch.zeros(3)},
            {"program": torch.zeros(3, 4, 5)},
            {"class_names": [1, 2]},
        ),
    ]
    for damage in damages:
        if damage is not None:
            write_state(folder, whole | damage)
        error = run(capsys, folder, "--out", out).err
        assert error.startswith("warning: no pattern and mapping of this run: ") and error.count("\n") == 1
        (details,) = page_data(out)["runs"]
        assert details["pattern"] is details["mapping"] is None and details["result"] == [50.0, pytest.approx(55)]
    checkpoint_path(folder).unlink()
    assert "is gone" in run(capsys, folder, "--out", out).err


def test_help_and_exit_code_of_the_command():
    command = [sys.executable, "-m", "tools.report"]
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and all(word in shown.stdout for word in ("--format", "--out", "latex", "PATH"))


# ---- records ----


def test_a_record_is_read_like_the_runs_that_it_was_made_of(results, capsys):
    make_run(results, 0.5, dataset="folder:/home/me/photos", weights="/home/me/w.pth", measured=[0.75, None], shots=2)
    make_run(results, 0.6, kind="vlm", backbone="ViT-B-16", starts=[START, START | {"device": "GPU"}])
    make_run(results, 0.2, seed=3, epochs=10, done=4)
    record = results.parent / f"{results.name}-record"
    record.mkdir()
    assert run(capsys, results, "--format", "record", "--out", record / "runs.jsonl").err.startswith("1 unfinished")
    text = (record / "runs.jsonl").read_text()
    assert len(text.splitlines()) == 7  # of finished runs
    for of_the_machine in (START["host"], "command", "/home", "results_path", "time"):
        assert f'"{of_the_machine}' not in text and "/home" not in text
    for place in (results, record):
        for kind in ("markdown", "latex", "html"):
            run(capsys, place, "--format", kind, "--out", results.parent / f"{place.name}.{kind}")
    shown = {}
    for kind in ("markdown", "latex"):
        shown[kind] = [(results.parent / f"{place.name}.{kind}").read_text() for place in (results, record)]
        assert "folder:photos" in shown[kind][0] and "/home" not in shown[kind][0]
        first, second = ([line.split() for line in text.splitlines() if "---" not in line] for text in shown[kind])
        assert first == second
    first, second = (page_data(results.parent / f"{place.name}.html") for place in (results, record))
    for key in ("accuracy", "std", "minutes", "best"):
        assert [g[key] for g in first["groups"] if "progress" not in g] == [g[key] for g in second["groups"]]
    assert [r["curves"] for r in first["runs"][:-1]] == [r["curves"] for r in second["runs"]]
    assert "runs.jsonl:" in second["runs"][0]["folder"] and second["runs"][0]["mapping"] is None
    assert [bool(r["measured"]) for r in second["runs"]].count(True) == 1
    run(capsys, record, "--format", "record", "--out", results.parent / "again.jsonl")  # a record of a record
    assert sorted((results.parent / "again.jsonl").read_text().splitlines()) == sorted(text.splitlines())


def test_a_damaged_record_never_stops_a_report_over_others(results, capsys):
    good = run(capsys, results, "--format", "record").out.splitlines()
    damages = (
        "{",
        "[]",
        "{}",
        good[0].replace('"format": 2', '"format": NaN'),
        good[0].replace('"result"', '"outcome"'),
        good[0].replace("0.25", "7"),
    )
    for number, damage in enumerate(damages):
        (results / f"record{number}").mkdir()
        (results / f"record{number}" / "runs.jsonl").write_text(damage + "\n")
    outcome = run(capsys, results, "--format", "markdown")
    assert rows(outcome.out)[2][4] == "28.0 ± 3.0"
    warnings = outcome.err.splitlines()
    assert len(warnings) == 6 and all(line.startswith("warning: left out: ") for line in warnings), warnings


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
@pytest.mark.parametrize("place", ['"lr": ', '"versions": ', '"of_the_result": ', '"of_an_epoch": '])
def test_a_record_is_json_whatever_was_read(results, capsys, place, number):
    """A number that is not finite is none in JSON: a foreign run that has one anywhere is left out."""
    make_run(results, 0.5, lr=0.125, mapping="blm", starts=[START | {"versions": 0.125}])
    (line,) = (line for line in run(capsys, results, "--format", "record").out.splitlines() if "0.125" in line)
    line = line.replace('"final_accuracy"', '"of_the_result": 0.125, "final_accuracy"')
    line = line.replace('"epoch": 0', '"of_an_epoch": 0.125, "epoch": 0').replace(f"{place}0.125", place + number)
    (results / "runs.jsonl").write_text(line + "\n")
    shutil.rmtree(results / "vm_5")
    outcome = run(capsys, results, "--format", "record")
    assert outcome.err.startswith("warning: left out: ") and outcome.err.count("\n") == 1
    assert len([json.loads(each, parse_constant=pytest.fail) for each in outcome.out.splitlines()]) == 5


def test_lists_too_deep_in_each_other_cost_their_run_alone(results):
    """At some depth json reads them, with the stack as it is, but can't write them within a record."""
    file = next(results.rglob("metrics.jsonl"))
    first, _, rest = file.read_text().partition("\n")
    found = set()
    for depth in range(800, 1000):
        file.write_text(f'{first[:-1]}, "deep": {"[" * depth}{"]" * depth}}}\n{rest}')
        found.add(len(find_runs([results])))
    assert len(found) == 2


def test_a_record_is_named_as_a_file(results, capsys, tmp_path):
    run(capsys, results, "--format", "record", "--out", tmp_path / "mine.jsonl")
    shown = [run(capsys, place, "--format", "markdown").out for place in (results, tmp_path / "mine.jsonl")]
    assert shown[0] == shown[1]
    (tmp_path / "empty.jsonl").touch()
    assert "holds no run" in fails(capsys, tmp_path / "empty.jsonl")
    assert "no JSON in each line" in fails(capsys, results / "vm_0" / "result.json")
    assert "25.0" in run(capsys, results / "vm_0" / "config.json", "--format", "markdown").out


def test_a_run_beside_its_record_is_one_run_with_its_pattern(results, capsys):
    make_run(results, 0.2, seed=3, epochs=10, done=4)
    run(capsys, results, "--format", "record", "--out", results / "runs.jsonl")  # comes before vm_0 in the alphabet
    outcome = run(capsys, results, "--out", results / "page.html")
    assert outcome.err == "1 unfinished, 5 finished runs\n"
    assert all(details["pattern"] for details in page_data(results / "page.html")["runs"])


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_of_a_run_and_its_unfinished_double_the_finished_one_is_kept(tmp_path, capsys, names):
    for name, done in zip(names, (None, 1), strict=True):
        make_run(tmp_path / name, 0.5, done=done)
    outcome = run(capsys, tmp_path, "--format", "markdown")
    assert rows(outcome.out)[2][4] == "50.0"
    assert f"left out: {tmp_path / names[1]}" in outcome.err and outcome.err.count("\n") == 1


def test_what_is_no_file_is_not_waited_for(results):
    for name in ("runs.jsonl", "config.json"):
        (results / "other" / name).mkdir(parents=True)
        os.mkfifo(results / name)
    command = [sys.executable, "-m", "tools.report", str(results), "--format", "markdown"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "28.0 ± 3.0" in done.stdout


# ---- columns of one setting ----


@pytest.fixture
def study(tmp_path):
    """Two mappings without a pattern, with it as it starts, and trained; what was trained on another canvas."""
    none, start, trained = (
        {"reprogramming": "none", "epochs": 0, "done": None},
        {"epochs": 0, "canvas_size": 128},
        {"epochs": 2, "canvas_size": 128},
    )
    for seed in range(3):
        for final, settings in ((0.20 + 0.02 * seed, none), (0.5, start), (0.30 + 0.04 * seed, trained)):
            make_run(tmp_path, final, seed=seed, **settings)
        for final, settings in ((0.9, none), (0.8, start), (0.895 + 0.005 * seed, trained)):
            make_run(tmp_path, final, seed=seed, mapping="lda", **settings)
    return tmp_path


def test_what_a_pattern_adds(study, capsys):
    """20, 22, 24 % against 30, 34, 38 %: 12 points, t = 12 / √(4/3 + 16/3) = 4.648 at 2.94 degrees of freedom."""
    out = run(capsys, study, "--format", "markdown", "--columns", "pattern", "--baseline", "none").out
    head, _, ilm, lda = rows(out)
    start, trained = "padding, as it starts", "padding, trained"
    assert head == [
        *("data set", "backbone", "mapping", "none", start, trained, f"{start}, over none", f"{trained}, over none"),
        *("seeds", "seconds per run", "settings"),
    ]
    assert ilm[2:6] == ["ilm", "22.0 ± 2.0", "50.0 ± 0.0", "34.0 ± 4.0"]
    assert ilm[6:8] == ["+28.0 (p = 0.0017)", "+12.0 (p = 0.02)"]
    # without a deviation on either side there is no p; 90 against 89.5, 90, 90.5 is no difference
    assert lda[3:6] == ["90.0 ± 0.0", "80.0 ± 0.0", "90.0 ± 0.5"]
    assert lda[6:8] == ["−10.0 (p –): a loss", "0.0 (p = 1): no difference shown"]
    assert ilm[8:10] == ["3", "0 / 0 / 120"]
    assert ilm[10] == "canvas size 128 (none: default), epochs 0 (padding, trained: 2)"
    assert "All runs: data set flowers102" not in out and "All runs: script train_vm.\n" in out
    assert "Welch" in out and "uncorrected" in out
    make_run(study, 0.3, mapping="flm", reprogramming="none", epochs=0)
    make_run(study, 0.2, mapping="flm", epochs=0)
    out = run(capsys, study, "--format", "markdown", "--columns", "pattern", "--baseline", "none").out
    assert rows(out)[2][6:8] == ["−10.0 (p –)", "–"]  # single seeds show nothing


def test_welch_by_hand(study):
    runs = [r for r in find_runs([study]) if r.mapping == "ilm"]
    cells = {
        key: Cell([r for r in runs if (r.row.reprogramming, r.row.epochs) == key])
        for key in (("none", 0), ("padding", 2))
    }
    points, p = difference(cells["padding", 2], cells["none", 0])
    t, df = 12 / (20 / 3) ** 0.5, (20 / 3) ** 2 / ((4 / 3) ** 2 / 2 + (16 / 3) ** 2 / 2)
    # the tail of Student's t by integration
    from math import gamma, pi

    scale = gamma((df + 1) / 2) / ((df * pi) ** 0.5 * gamma(df / 2))
    step = 0.001
    within = sum(scale * (1 + ((i + 0.5) * step) ** 2 / df) ** (-(df + 1) / 2) for i in range(round(t / step))) * step
    assert points == pytest.approx(12) and p == pytest.approx(1 - 2 * within, abs=1e-4)
    single = Cell(cells["none", 0].runs[:1])
    assert difference(cells["padding", 2], single) == (pytest.approx(14), None)


def test_columns_of_any_setting(tmp_path, capsys):
    for seed in range(2):
        for shots in (16, 2, None):
            own = {"shots": shots} if shots else {}
            make_run(tmp_path, 0.1 + 0.01 * (shots or 50), seed=seed, data=f"{seed * bool(shots)}", **own)
    make_run(tmp_path, 0.3, mapping="blm", shots=2)
    head, _, ilm, blm = rows(run(capsys, tmp_path, "--format", "markdown", "--columns", "shots").out)
    assert head[2:6] == ["mapping", "default", "2", "16"]  # in the order of their numbers
    assert "seconds per run" not in head  # they stand beside what a baseline gains
    (best,) = rows(run(capsys, tmp_path, "--format", "markdown", "--columns", "mapping", "--rows", "shots").out)[3:4]
    assert best[:4] == ["2", "12.0 ± 0.0", "30.0", "1–2"]  # one seed does not compete with two
    assert ilm[2:6] == ["ilm", "60.0 ± 0.0", "12.0 ± 0.0", "26.0 ± 0.0"] and blm[3:6] == ["–", "30.0", "–"]
    make_run(tmp_path, 0.3, mapping="blm", shots=2, lr=0.1, seed=1)
    message = fails(capsys, tmp_path, "--format", "latex", "--columns", "shots", "--rows", "mapping")
    assert "blm, 2 differ in lr; name it in --rows" in message
    make_run(tmp_path, 0.3, mapping="lda", data="1")
    make_run(tmp_path, 0.3, mapping="lda", data="2", seed=1)
    message = fails(capsys, tmp_path, "--format", "latex", "--columns", "shots", "--rows", "mapping,lr")
    assert "lda, default, default differ in data" in message
    table = run(capsys, tmp_path, "--format", "latex", "--columns", "shots", "--rows", "mapping,lr,data").out
    assert r"mapping & lr & data & default & 2 & 16 & seeds" in table and table.count(r"lda & default & ") == 2
    assert table.count(r" & -- & 30.0 & -- & 1") == 2  # blm, lr default and 0.1


def test_rows_are_by_default_what_tells_the_runs_of_a_cell_apart(results, capsys):
    make_run(results, 0.5, mapping="blm", lr=0.1, reprogramming="watermarking", data="2")
    make_run(results, 0.6, mapping="blm", data="2")
    out = run(capsys, results, "--format", "markdown", "--columns", "mapping").out
    head, _, *lines = rows(out)
    assert head[:5] == ["data set", "backbone", "input VR", "lr", "data"] and len(lines) == 3
    assert [line[2:4] for line in lines] == [["padding", "default"]] * 2 + [["watermarking", "0.1"]]
    assert "All runs: script train_vm, epochs 2." in out


def test_settings_of_a_row_are_told(tmp_path, capsys):
    """That of most columns, and in brackets those of others; what all runs have stands below, defaults nowhere."""
    for mapping in ("ilm", "blm", "blmpp"):
        make_run(tmp_path, 0.5, mapping=mapping, epochs=6 if mapping == "blm" else 0, shots=4, canvas_size=128)
        make_run(tmp_path, 0.5, mapping=mapping, epochs=0, dataset="dtd", shots=4, batch_size=64)
    out = run(capsys, tmp_path, "--format", "markdown", "--columns", "mapping").out
    assert [line[-1] for line in rows(out)] == [
        "settings",
        "----------------------------------",
        "batch size 64, epochs 0",
        "canvas size 128, epochs 0 (blm: 6)",
    ]
    assert "All runs: input VR padding, script train_vm, shots 4." in out


def test_refusals_of_columns(results, capsys):
    assert "--columns makes a table, and html is none" in fails(capsys, results, "--columns", "mapping")
    for rows_given in ("mapping", ""):
        error = fails(capsys, results, "--format", "markdown", "--rows", rows_given)
        assert "--rows belongs to --columns" in error
    markdown = [results, "--format", "markdown", "--columns"]
    assert "'colour' is no setting of these runs; they have mapping, pattern, " in fails(capsys, *markdown, "colour")
    assert "'' is no setting of these runs" in fails(capsys, *markdown, "")
    assert "'' is no setting of these runs" in fails(capsys, *markdown, "mapping", "--rows", "")
    assert "no value of mapping; these are ilm; blm; linear" in fails(capsys, *markdown, "mapping", "--baseline", "flm")


# ---- published figures ----


def test_published_clip_figures_stand_beside_runs_of_as_many_shots(tmp_path, capsys):
    make_run(tmp_path, 0.5, kind="vlm", backbone="ViT-B-32-quickgelu", dataset="fgvc_aircraft", shots=16)
    make_run(tmp_path, 0.6, kind="vlm", backbone="ViT-B-32-quickgelu", dataset="fgvc_aircraft", mapping="blm", shots=8)
    make_run(tmp_path, 0.7, kind="vlm", backbone="ViT-B-32-quickgelu", dataset="dtd", shots=16, weights="laion2b")
    out = run(capsys, tmp_path, "--format", "markdown").out
    head, _, *lines = rows(out)
    assert head[5:12] == ["ilm", "blm", "vp", "ar", "attrvr", "dvp", "rvp"]
    (line,) = (line for line in lines if line[3] == "published")
    assert line[:5] == ["fgvc_aircraft", "ViT-B-32-quickgelu", "–", "published", "shots 16"]
    assert line[5:12] == ["–", "–", "24.3", "21.8", "24.5", "26.1", "32.8"]
    assert "Published vp, ar, attrvr, dvp: Cai et al." in out and "second hand" in out
    assert "Published rvp: Li, Cai" in out
    run(capsys, tmp_path, "--out", tmp_path / "page.html")
    found = {(g["dataset"], g["settings"]): g["published"] for g in page_data(tmp_path / "page.html")["groups"]}
    assert [each[:2] for each in found["fgvc_aircraft", "shots 16"]][0::4] == [["vp", 24.3], ["rvp", 32.8]]
    assert found["fgvc_aircraft", "shots 8"] == found["dtd", "shots 16, weights laion2b"] == []


@pytest.mark.skipif(not os.environ.get("BLM_REFERENCE"), reason="needs BLM_REFERENCE")
def test_published_clip_figures_are_those_of_the_reference():
    reference = json.loads((Path(os.environ["BLM_REFERENCE"]) / "clip_published.json").read_text())["tables"]
    ours = {(t["backbone"], t["method"]): t["accuracy"] for t in published_tables() if "method" in t}
    assert len(ours) == 20
    for backbone, methods in reference.items():
        for method, values in methods.items():
            values["fgvc_aircraft"] = values.pop("aircraft")
            average = values.pop("avg")
            found = {name: mean for name, (mean, _) in ours[backbone.replace("/", "-"), method].items()}
            assert found == values and sum(found.values()) / 11 == pytest.approx(average, abs=0.051)


def page_data(path):
    text = path.read_text(encoding="utf-8")
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    return data | {"runs": [details for group in data["groups"] for details in group["runs"]]}


def test_page_needs_no_network_and_holds_the_numbers(results, capsys, tmp_path):
    out = tmp_path / "page.html"
    run(capsys, results, "--out", out)
    text = out.read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "src=" not in text and "<link" not in text and "@import" not in text
    data = page_data(out)
    (group,) = [g for g in data["groups"] if g["mapping"] == "ilm"]
    assert (group["accuracy"], group["std"], group["best"], len(group["runs"])) == pytest.approx((28, 3, 33, 3))
    ((name, *published),) = group["published"]
    assert name == "ilm" and published[:2] == [27.9, 0.7] and group["minutes"] == 2
    assert group["runs"][1]["seed"] == 1
    assert data["runs"][0]["mapping"] == [[[1, 0.6], [3, 0.25]], [[2, 0.5], [1, 0.125]]]
    assert data["runs"][0]["curves"]["mapping_change"] == [None, 0.25]


def test_pattern_of_a_plugin_is_shown_stretched(tmp_path, capsys):
    """The report runs no plugin: the program alone, from its smallest to its largest value."""
    make_run(tmp_path, 0.5)
    make_run(tmp_path, 0.4, reprogramming="my_vr", dataset="my_data")
    make_run(tmp_path, 0.3, reprogramming="watermarking")
    make_run(tmp_path, 0.3, reprogramming="none")
    run(capsys, tmp_path, "--out", tmp_path / "page.html")
    data = page_data(tmp_path / "page.html")
    captions = {g["reprogramming"]: g["runs"][0]["caption"] for g in data["groups"]}
    assert captions["padding"].startswith("sigmoid(θ) around the place of the image, contrast ×")
    assert captions["my_vr"].startswith("θ alone: black -")
    assert captions["watermarking"].startswith("added to the normalised image")
    assert captions["none"] == "no pattern" and [details["pattern"] for details in data["runs"]].count(None) == 1
    program = torch.tensor([[[-1.0, 0.0], [1.0, 3.0]]]).expand(3, 2, 2)
    image, _ = _pattern_image(SimpleNamespace(settings={"reprogramming": "my_vr"}), program)
    assert image[..., 0].tolist() == [[0, 64], [128, 255]] and image.dtype == torch.uint8


def test_page_shows_how_far_unfinished_runs_are(results, capsys):
    folder = make_run(results, 0.2, seed=3, epochs=10, done=4)
    make_run(results, 0.2, seed=4, epochs=10, done=0)
    outcome = run(capsys, results, "--out", results / "page.html")
    assert outcome.err == "2 unfinished, 5 finished runs\n"
    data = page_data(results / "page.html")
    begun, waiting = (g["progress"] for g in data["groups"] if "progress" in g)
    assert (
        begun["done"] == 4
        and begun["to_go"] == pytest.approx(6)
        and begun["ended"] == 1000 * (folder / "metrics.jsonl").stat().st_mtime
    )  # a minute each
    assert waiting == {"done": 0, "ended": None, "to_go": None}
    details = data["runs"][-2]
    assert details["result"] is None and len(details["curves"]["test_accuracy"]) == 4 and details["pattern"]


def test_negative_weights_are_kept(tmp_path, capsys):
    make_run(tmp_path, 0.5, mapping="linear", top_weights=((0.5, -2.0, 0), (-1.0, -3.0, 0)))
    run(capsys, tmp_path, "--out", tmp_path / "page.html")
    assert page_data(tmp_path / "page.html")["runs"][0]["mapping"] == [[[1, 0.5], [3, -2.0]], [[2, -1.0], [1, -3.0]]]


def test_real_runs(vm_run, vlm_run, capsys, tmp_path):
    out = tmp_path / "page.html"
    run(capsys, vm_run, vlm_run, "--out", out)
    data = page_data(out)
    for group, folder in zip(data["groups"], (vm_run, vlm_run), strict=True):
        result = json.loads((folder / "result.json").read_text())
        assert group["accuracy"] == pytest.approx(100 * result["final_accuracy"])
        details = group["runs"][0]
        classes, sources = data["names"][details["classes"]], data["names"][details["sources"]]
        assert len(details["mapping"]) == len(classes) == 8 and details["pattern"].startswith("data:image/webp;base64,")
        assert all(0 <= s < len(sources) and 0 < w <= 1 for pairs in details["mapping"] for s, w in pairs)
    weights = load_checkpoint(checkpoint_path(vm_run))["mapping"]["_weights"]
    vm = data["runs"][0]["mapping"]
    assert [pairs[0][1] for pairs in vm] == pytest.approx(weights.max(0).values.tolist(), rel=1e-4)
    assert all(weights[s, t] == pytest.approx(w, rel=1e-4) for t, pairs in enumerate(vm) for s, w in pairs)


@pytest.mark.soak
@pytest.mark.skipif(not os.environ.get("BLM_REAL_DATA"), reason="needs BLM_REAL_DATA, a folder with flowers102")
@pytest.mark.filterwarnings("ignore:flowers102 has")
def test_daisies_draw_on_daisy(capsys, tmp_path):
    import train_vm

    train_vm.main(
        [
            "--dataset",
            "flowers102",
            "--data-path",
            os.environ["BLM_REAL_DATA"],
            "--backbone",
            "efficientnet_lite0",
            "--epochs",
            "1",
            "--batch-size",
            "64",
            "--train-fraction",
            "0.5",
            "--results-path",
            str(tmp_path),
        ]
    )
    run(capsys, tmp_path, "--out", tmp_path / "page.html")
    data = page_data(tmp_path / "page.html")
    (details,) = data["runs"]
    classes, sources = data["names"][details["classes"]], data["names"][details["sources"]]
    drawn_on = {name: [sources[s] for s, _ in pairs] for name, pairs in zip(classes, details["mapping"], strict=True)}
    assert drawn_on["oxeye daisy"][0] == "daisy" and "daisy" in drawn_on["barbeton daisy"]
    assert {"sea urchin", "cardoon", "porcupine"} & set(drawn_on["globe thistle"])


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "no-first-run",
        "disable-sync",
        "disable-component-update",
        "disable-dev-shm-usage",
        "window-size=1350,2000",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    opened = webdriver.Chrome(options=options, service=service)
    yield opened
    opened.quit()


@pytest.fixture
def page(browser, results, capsys):
    make_run(results, 0.5, mapping="rlm", dataset="dtd", batch_size=64)
    make_run(
        results,
        0.9,
        mapping="blm",
        dataset=f"photos {HOSTILE}",
        reprogramming="watermarking",
        classes=(HOSTILE, "oxeye daisy"),
        sources=("tench", HOSTILE, "sea urchin", "vase"),
    )
    run(capsys, results, "--out", results / "page.html")
    browser.get((results / "page.html").as_uri())
    return Page(browser)


class Page:
    def __init__(self, browser):
        self.browser = browser

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def one(self, selector):
        (found,) = self.all(selector)
        return found

    def table(self, selector):
        script = (
            "return [...document.querySelector(arguments[0]).tBodies[0].rows].map("
            "row => [...row.querySelectorAll('td:not(.break)')].map(cell => cell.innerText.trim()))"
        )
        return self.browser.execute_script(script, selector)

    def column(self, name):
        heads = [head.text.split(" ▲")[0].split(" ▼")[0].strip() for head in self.all("#board th")]
        return [row[heads.index(name)] for row in self.table("#board")]

    def head(self, name):
        return next(head for head in self.all("#board th") if head.text.startswith(name))

    def sort(self, name):
        self.head(name).find_element("css selector", "button").click()

    def until(self, selector, text):
        """Wait for a text; following a link to a run takes the browser a moment."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, 60).until(lambda _: text in self.one(selector).text)

    def command(self, name, **arguments):
        self.browser.execute_cdp_cmd(name, arguments)

    def keys(self):
        from selenium.webdriver import ActionChains

        return ActionChains(self.browser)

    def keys_of(self, selector):
        charts = self.all(selector)
        return [[part.text for part in chart.find_elements("css selector", ".key span")] for chart in charts]

    def focused_row(self):
        row = self.browser.switch_to.active_element.find_element("xpath", "ancestor::tr")
        return [row.find_element("css selector", "a").text, row.find_element("css selector", ".accuracy").text]

    def type(self, selector, text):
        field = self.one(selector)
        field.clear()
        field.send_keys(text)


def test_leaderboard_sorts_and_filters(page):
    assert page.column("accuracy") == ["90.0", "90.0", "50.0", "40.0", "28.0 ± 3.0"]
    assert page.head("accuracy").get_attribute("aria-sort") == "descending"
    page.sort("accuracy")
    assert page.column("accuracy") == ["28.0 ± 3.0", "40.0", "50.0", "90.0", "90.0"]
    page.sort("mapping")
    assert page.column("mapping") == ["blm", "blm", "ilm", "linear", "rlm"]
    page.sort("published")  # what has none comes last
    assert page.column("published") == ["27.9 ± 0.7", "–", "–", "–", "–"]
    page.type("#filter", "flowers ilm")
    assert page.column("accuracy") == ["28.0 ± 3.0"] and "1 of 5" in page.one("#shown").text


def test_best_row_is_open_and_a_filter_never_leaves_another_one_s_details(page):
    assert page.one("#title").text.startswith("linear on flowers102")
    page.type("#filter", "ilm")
    assert page.one("#title").text == "ilm on flowers102, resnet18, padding (2 epochs)"
    page.type("#filter", "nothing such")
    assert page.column("accuracy") == [] and "no row" in page.one("#shown").text
    assert not page.one("#details").is_displayed() and not page.one("#comparison").is_displayed()
    page.type("#filter", "dtd")
    assert page.one("#title").text == "rlm on dtd, resnet18, padding (batch size 64, 2 epochs)"


def test_best_mapping_is_bold_among_equally_many_seeds(browser, results, capsys):
    make_run(results, 0.3, mapping="flm")  # one seed, as blm; ilm has three
    run(capsys, results, "--out", results / "page.html")
    browser.get((results / "page.html").as_uri())
    assert [span.text for span in Page(browser).all("#board .best")] == ["40.0"]


def test_details_of_a_run_and_its_seeds(page):
    page.type("#filter", "ilm")
    assert [button.text for button in page.all("#seeds button")] == ["seed 0", "seed 1", "seed 2"]
    assert "final 25.00 %" in page.one("#about").text
    page.all("#seeds button")[2].click()
    about = page.one("#about").text
    assert "final 31.00 %, best on test 36.00 %, 2 minutes, on CPU of 2 cores, 2 threads" in about
    lines = page.all("#curves polyline")
    assert [len(line.get_attribute("points").split()) for line in lines] == [2, 2, 2, 2]
    (start, _), (end, _) = (point.split(",") for point in lines[3].get_attribute("points").split())
    assert float(end) - float(start) == 24  # ‖Δω‖ starts an epoch later: a dash for the one there is
    assert page.browser.execute_script("return document.querySelector('#pattern').naturalWidth") == 224


def test_keyboard_alone_opens_rows_and_their_address_links_to_them(page, results):
    keys = page.keys()
    page.one("#filter").click()
    for _ in range(14):  # boxes of the head come first: one stop each, then the open row
        keys.send_keys("\ue004").perform()
        if page.browser.switch_to.active_element.tag_name == "a":
            break
    assert page.focused_row() == ["linear", "90.0"]
    keys.send_keys("\ue015\ue015").perform()  # two rows down
    assert page.focused_row() == ["rlm", "50.0"]
    keys.send_keys("\ue010").perform()  # End
    assert page.focused_row() == ["ilm", "28.0 ± 3.0"]
    keys.send_keys("\ue007").perform()  # Enter
    page.until("#title", "ilm on")
    assert page.browser.switch_to.active_element.get_attribute("id") == "title"
    keys.send_keys("\ue004").perform()  # into the details
    assert page.browser.switch_to.active_element.text == "seed 0"
    keys.send_keys("\ue004\ue007").perform()
    assert "final 28.00 %" in page.one("#about").text and page.browser.switch_to.active_element.text == "seed 1"
    link = page.browser.current_url
    assert link.endswith("vm_1")
    page.browser.get("about:blank")
    page.browser.get(link)
    assert "final 28.00 %" in page.one("#about").text and page.one("#title").text.startswith("ilm on")
    page.browser.get(link.rpartition("#")[0] + "#%E0")  # no address of ours
    page.browser.refresh()
    assert page.one("#title").text.startswith("linear on") and page.browser.get_log("browser") == []


def test_comparison_of_curves_and_classes(browser, results, capsys):
    make_run(results, 0.6, mapping="flm", dataset="dtd", measured=[0.5, 0.25])
    make_run(results, 0.7, mapping="blmpp", dataset="dtd", measured=[0.25, None])
    make_run(results, 0.8, mapping="blmpp", dataset="dtd", seed=1, measured=[0.5, 1.0])
    run(capsys, results, "--out", results / "page.html")
    browser.get((results / "page.html").as_uri())
    page = Page(browser)
    assert page.keys_of("#together .chart") == [["linear", "blm", "ilm"]] * 2  # the open row and those like it
    assert "measures a run" in page.one("#sum").text and not page.one("#choice").is_displayed()
    page.type("#filter", "dtd")
    assert page.keys_of("#together .chart") == [["blmpp", "flm"]] * 2
    # 0.6, 0.7 at the start and 0.7, 0.8 at the end of blmpp, 0.5 and 0.6 of flm, on an axis from 50 to 75 %
    ends = [
        [float(point.split(",")[1]) for point in line.get_attribute("points").split()]
        for line in page.all("#together .chart:first-child polyline")
    ]
    assert (ends[1][0] - ends[0][0]) == pytest.approx(1.5 * (ends[1][0] - ends[1][1])) and ends[0][0] > ends[0][1]
    assert page.table("#differences") == [
        ["oxeye daisy", "100.0", "25.0", "+75.0", ""],
        ["rose", "37.5", "50.0", "−12.5", ""],
    ]
    bars = page.all("#differences i")
    styles = [bar.get_attribute("style") for bar in bars]
    assert styles == ["width: 50%; left: 50%;", "width: 8.33333%; left: 41.6667%;"]
    assert "better in 1 of 2 classes, worse in 1, equal in 0" in page.one("#sum").text
    page.type("#filter", " ")
    page.all("#board input")[page.column("mapping").index("linear")].click()
    assert page.keys_of("#together .chart")[0] == ["linear · flowers102", "blmpp · dtd", "flm · dtd"]
    page.one("#alike").click()
    assert page.keys_of("#together .chart") == [["blmpp", "flm"]] * 2


def test_best_on_validation_is_no_best_on_test(browser, results, capsys):
    make_run(results, 0.6, mapping="flm", validation_fraction=0.2)
    record = results / "record"
    record.mkdir()
    run(capsys, results, "--format", "record", "--out", record / "runs.jsonl")
    run(capsys, record, "--out", results / "page.html")
    browser.get((results / "page.html").as_uri())
    page = Page(browser)
    assert page.column("mapping") == ["linear", "flm", "blm", "ilm"]
    assert page.column("best on test") == ["95.0", "–", "45.0", "33.0"]
    assert page.column("best on validation") == ["–", "65.0", "–", "–"]
    page.type("#filter", "validation")
    assert "best on validation 65.00 %" in page.one("#about").text
    assert page.one("#caption").text == "A record holds neither pattern nor mapping."
    assert not page.one("#pattern").is_displayed() and not page.one("#mapping").is_displayed()


def test_charts_without_a_line_say_why(browser, results, capsys):
    """Of a run without epochs, which is estimated once; of one that has not begun; of one that never changed."""
    make_run(results, 0.99, mapping="lda", epochs=0, reprogramming="none", done=1)
    folder = results / "vm_5"
    line = json.loads((folder / "metrics.jsonl").read_text()) | {"train_loss": None, "train_accuracy": None}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    write_json(folder / "result.json", {"final_accuracy": 0.99, "best_accuracy": 0.99})
    make_run(results, 0.2, seed=3, epochs=10, done=0)
    run(capsys, results, "--out", results / "page.html")
    browser.get((results / "page.html").as_uri())
    page = Page(browser)
    assert page.one("#title").text == "lda on flowers102, resnet18, none (0 epochs)"
    assert page.one("#caption").text == "no pattern" and not page.one("#pattern").is_displayed()
    _, loss, change = page.all("#curves .chart")
    assert loss.text.endswith("nothing was trained") and change.text.endswith("no change to show after one epoch")
    page.one("#running a").click()
    page.until("#about", "0 of 10 epochs")
    assert all(chart.text.endswith("no epoch has ended") for chart in page.all("#curves .chart"))
    assert page.one("#caption").text == "None before the end of the first epoch."


def test_unfinished_runs_are_shown_with_their_progress(browser, results, capsys):
    make_run(results, 0.2, seed=3, epochs=10, done=4)
    run(capsys, results, "--out", results / "page.html")
    browser.get((results / "page.html").as_uri())
    page = Page(browser)
    ((name, epochs, accuracy, to_go, _),) = page.table("#running")
    assert name == "ilm · flowers102 · resnet18 · padding · train_vm · seed 3"
    assert (epochs, accuracy, to_go) == ("4 of 10", "20.0", "6") and page.one("progress").get_attribute("value") == "4"
    assert page.one("#sweep").text.startswith("5 of 6 runs are finished")
    page.one("#running a").click()
    page.until("#about", "4 of 10 epochs")
    assert page.one("#pattern").is_displayed()
    assert "ilm" in page.one("#title").text and page.table("#explorer")[0][0] == "rose"


def test_explorer_bars_are_scaled_by_label_and_signed(browser, tmp_path, capsys):
    make_run(tmp_path, 0.5, mapping="linear", top_weights=((0.02, -0.01, 0), (5.0, -5.0, 0)))
    run(capsys, tmp_path, "--out", tmp_path / "page.html")
    browser.get((tmp_path / "page.html").as_uri())
    page = Page(browser)
    assert page.table("#explorer") == [
        ["rose", "0.020\ndaisy\n−0.010\nvase"],
        ["oxeye daisy", "5.0\nsea urchin\n−5.0\ndaisy"],
    ]
    bars = [(bar.get_attribute("class"), bar.get_attribute("style")) for bar in page.all("#explorer i")]
    assert bars == [
        ("", "width: 50%; left: 50%;"),
        ("minus", "width: 25%; left: 25%;"),
        ("", "width: 50%; left: 50%;"),
        ("minus", "width: 50%; left: 0%;"),
    ]
    assert "speak against" in page.one("#reading").text


@pytest.mark.parametrize("width", [390, 820, 1400])
def test_accuracy_is_in_view_at_any_width(browser, results, capsys, width):
    clip = {"kind": "vlm", "backbone": "ViT-B-32-quickgelu", "dataset": "fgvc_aircraft"}
    make_run(results, 0.5, **clip, shots=16, validation_fraction=0.2)  # all columns, with five published figures
    make_run(results, 0.5, **clip, shots=16, validation_fraction=0.2, seed=1, starts=[START | {"device": "GPU"}])
    run(capsys, results, "--out", results / "page.html")
    browser.get((results / "page.html").as_uri())
    page = Page(browser)
    page.command("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
    try:
        fits = page.browser.execute_script("""
            const cells = [...document.querySelectorAll("#board td.accuracy, #board td[data-name=minutes]")];
            const right = Math.max(...cells.map((cell) => cell.getBoundingClientRect().right));
            return [cells.length, right <= innerWidth, document.documentElement.scrollWidth <= innerWidth];""")
        assert fits == [8, True, True]
    finally:
        page.command("Emulation.clearDeviceMetricsOverride")


def test_dark_mode(page):
    colours = []
    for scheme in ("light", "dark"):
        page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        script = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        colours.append([sum(map(int, c[4:-1].split(","))) for c in page.browser.execute_script(script)])
    page.command("Emulation.setEmulatedMedia", features=[])
    assert colours[0][0] < 150 < 700 < colours[0][1] and colours[1][1] < 150 < 600 < colours[1][0]


def test_explorer_searches_both_ways(page):
    page.type("#filter", "ilm")
    assert page.table("#explorer") == [
        ["rose", "0.60\ndaisy\n0.25\nvase"],
        ["oxeye daisy", "0.50\nsea urchin\n0.13\ndaisy"],
    ]
    page.type("#search", "DAISY")
    assert [row[0] for row in page.table("#explorer")] == ["oxeye daisy"]
    page.one("#backward").click()
    assert [row[0] for row in page.table("#explorer")] == ["daisy", "sea urchin", "vase"]
    page.type("#search", "daisy")
    assert page.table("#explorer") == [["daisy", "0.60\nrose\n0.13\noxeye daisy"]]
    assert page.one("#found").text == "1 of 3 labels"
    page.all("#explorer .pair button")[1].click()  # follow "oxeye daisy" back
    assert page.table("#explorer") == [["oxeye daisy", "0.50\nsea urchin\n0.13\ndaisy"]]
    assert page.one("#forward").get_attribute("aria-pressed") == "true"


def test_names_are_text_whatever_they_hold(page):
    page.type("#filter", "onerror")
    page.one("#board tbody tr").click()
    assert HOSTILE in page.one("#title").text
    assert page.table("#explorer")[0] == [HOSTILE, f"0.60\n{HOSTILE}\n0.25\nvase"]
    assert page.browser.title == "Reprogramming runs" and len(page.all("img")) == 1
    assert page.browser.get_log("browser") == []


def test_published_figures_are_shown_with_their_source(page):
    vision = {tuple(row[:2]): row[2:] for row in page.table("#published .scroll:nth-of-type(1) table")}
    assert vision["resnet18", "flowers102"] == ["27.9 ± 0.7", "23.2 ± 0.5", "17.8", "12.3"]
    assert len(vision) == 23 and ("resnet50", "stanfordcars") not in vision
    clip = {tuple(row[:2]): row[2:] for row in page.table("#published .scroll:nth-of-type(2) table")}
    assert len(clip) == 44 and clip["ViT-B-32", "fgvc_aircraft"] == ["24.3", "21.8", "24.5", "26.1", "32.8"]
    assert [head.text for head in page.all("#published h3")] == ["Vision models", "CLIP, 16 images per class"]
    sources = page.one("#sources").text
    assert "ICML 2024" in sources and "second hand: as quoted" in sources
