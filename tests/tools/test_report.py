"""tools.report through its command line: averages, grouping, tables, hostile names, and the page in a real browser."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.files import write_json
from tools.report import __main__ as report

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "dataset": "flowers102", "backbone": "resnet18", "reprogramming": "padding", "mapping": "ilm", "seed": 0,
    "epochs": 2, "batch_size": 256, "lr": 0.01, "train_fraction": 1.0, "laplace": 1.0, "topk_ratio": 0.15,
    "linear_variant": "none", "bayes": True, "topk": True, "iteration": True, "canvas_size": None, "weights": None,
    "precision": "fp32", "engine": "all", "device": "cpu", "workers": 0, "results_path": "results",
}
HOSTILE = "<img src=x onerror=\"document.title='taken'\"></script><script>document.title='taken'</script> & 'daisy'"


def make_run(results, final, *, kind="vm", seconds=30.0, classes=("rose", "oxeye daisy"), sources=None, **settings):
    """A run folder as a script leaves it, with two downstream and four pretrained labels."""
    settings = SETTINGS | settings
    folder = results / f"{kind}_{len(list(results.glob('*')))}"
    folder.mkdir(parents=True)
    steps = {"estimate": seconds / 2, "train": seconds, "test": seconds / 2}
    metrics = [
        {"epoch": e, "train_loss": 2.0 - e, "train_accuracy": 0.5, "test_accuracy": final - 0.1 * (1 - e),
         "mapping_change": 0.25 if e else None, "lr": 0.01, "seconds": steps}
        for e in range(settings["epochs"])
    ]
    write_json(folder / "config.json", {"kind": kind, "settings": settings})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    write_json(folder / "result.json", {"final_accuracy": final, "best_accuracy": final + 0.05})
    top = {"labels": torch.tensor([[1, 3, 0], [2, 1, 0]]), "weights": torch.tensor([[0.6, 0.25, 0], [0.5, 0.125, 0.0]])}
    torch.save({
        "kind": kind, "settings": settings, "metrics": metrics, "mapping": {}, "program": torch.randn(3, 224, 224),
        "class_names": list(classes), "source_names": list(sources or ("tench", "daisy", "sea urchin", "vase")),
        "history": [{"epoch": 1, **top}],
    }, folder / "last.safetensors")
    return folder


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
    assert head == ["data set", "backbone", "input VR", "script", "ilm", "blm", "linear",
                    "seeds", "epochs", "batch", "minutes a run"]
    assert set("".join(rule)) == {"-", ":"}
    # 25, 28, 31 %: mean 28, sample standard deviation 3; (15 + 30 + 15) s, twice, are 2 minutes
    assert ours == ["flowers102", "resnet18", "padding", "train_vm", "28.0 ± 3.0", "**40.0**", "90.0",
                    "1–3", "2", "256", "2.0–4.0"]
    assert published == ["flowers102", "resnet18", "padding", "published", "27.9 ± 0.7", "–", "–", *"––––"]


def test_latex(results, capsys, tmp_path):
    make_run(results, 0.5, backbone="timm:a_b&c", dataset="synthetic")
    run(capsys, results, "--format", "latex", "--out", tmp_path / "t.tex")
    text = (tmp_path / "t.tex").read_text()
    assert r"28.0 $\pm$ 3.0 & \textbf{40.0} & 90.0 & 1--3" in text
    assert r"synthetic & timm:a\_b\&c & padding & train\_vm" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert {line.count("&") - line.count(r"\&") for line in body.strip().splitlines()} == {10}


@pytest.mark.parametrize("other, shown", [
    ({"lr": 0.1}, "lr 0.1"), ({"epochs": 1}, None), ({"batch_size": 64}, None),
    ({"precision": "bf16"}, "precision bf16"), ({"mapping": "blmpp", "topk_ratio": 1.0}, "topk ratio 1.0"),
    ({"train_fraction": 0.4}, "train fraction 0.4"), ({"mapping": "blm", "laplace": 10.0}, "laplace 10.0"),
    ({"mapping": "blm", "bayes": False}, "no bayes"), ({"iteration": False}, "no iteration"),
    ({"weights": "/w.pth"}, "weights /w.pth"), ({"a_new_setting": 7}, "a new setting 7"),
])
def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(results, capsys, other, shown):
    make_run(results, 0.7, seed=5, **other)
    lines = [line for line in rows(run(capsys, results, "--format", "markdown").out)[2:] if line[3] == "train_vm"]
    assert len(lines) == 2 and {"28.0 ± 3.0", "40.0"} <= {cell.strip("*") for line in lines for cell in line}
    assert "70.0" in next(line for line in lines if "28.0 ± 3.0" not in line)
    assert shown is None or sum(shown in line for line in lines) == 1


def test_settings_without_effect_do_not_part_runs(results, capsys):
    make_run(results, 0.34, seed=3, device="cuda", workers=4, engine="plain", laplace=3.0, results_path="elsewhere")
    _, _, ours, _ = rows(run(capsys, results, "--format", "markdown").out)
    assert ours[4] == "29.5 ± 3.9" and ours[7] == "1–4"


def test_what_is_left_out_is_named(results, capsys):
    make_run(results, 0.99, seed=1)
    (make_run(results, 0.99, seed=8) / "result.json").unlink()
    (make_run(results, 0.99, seed=9) / "metrics.jsonl").write_text("{}\n")
    (make_run(results, 0.99, seed=10) / "config.json").write_text('{"kind": "vm", "settings": {"mapping": []}}')
    outcome = run(capsys, results, "--format", "markdown")
    assert rows(outcome.out)[2][4] == "28.0 ± 3.0"
    warnings = outcome.err.splitlines()
    assert len(warnings) == 4 and all(line.startswith("warning: left out: ") for line in warnings)
    for word in ("repeats", "not finished", "train_loss", "lacks"):
        assert sum(word in line for line in warnings) == 1


def test_the_same_folder_twice_is_one_run(results, capsys):
    twice = run(capsys, results, results / "vm_0", "--format", "markdown")
    assert rows(twice.out)[2][4] == "28.0 ± 3.0" and twice.err == ""


def test_bad_input(tmp_path, capsys):
    assert "no folder" in fails(capsys, tmp_path / "absent")
    assert "holds no finished run" in fails(capsys, tmp_path)
    unfinished = make_run(tmp_path, 0.5)
    (unfinished / "result.json").unlink()
    assert "is not finished" in fails(capsys, unfinished)
    assert "invalid choice" in fails(capsys, tmp_path, "--format", "pdf")
    assert "did you mean --format" in fails(capsys, tmp_path, "--formt", "html")
    broken = make_run(tmp_path, 0.5, seed=2)
    (broken / "last.safetensors").write_bytes(b"none")
    assert "last.pt is no" in fails(capsys, broken, "--out", tmp_path / "r.html")
    for damage in (
        {"history": [{"labels": torch.tensor([[9], [0]]), "weights": torch.ones(2, 1)}]}, {"history": [{}]},
        {"program": torch.zeros(3)}, {"program": torch.zeros(3, 4, 5)}, {"class_names": [1, 2]},
    ):
        state = torch.load(make_run(tmp_path, 0.5, seed=3) / "last.safetensors")
        torch.save(state | damage, broken / "last.safetensors")
        assert "last.pt holds no" in fails(capsys, broken, "--out", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_help_and_exit_code_of_the_command():
    command = [sys.executable, "-m", "tools.report"]
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and all(word in shown.stdout for word in ("--format", "--out", "latex", "PATH"))


def page_data(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text.split("const data = ")[1].split(";\n")[0])


def test_page_needs_no_network_and_holds_the_numbers(results, capsys, tmp_path):
    out = tmp_path / "page.html"
    run(capsys, results, "--out", out)
    text = out.read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "src=" not in text and "<link" not in text and "@import" not in text
    data = page_data(out)
    (group,) = [g for g in data["groups"] if g["mapping"] == "ilm"]
    assert (group["accuracy"], group["std"], group["best"], group["seeds"]) == pytest.approx((28, 3, 33, 3))
    assert group["published"][:2] == [27.9, 0.7] and group["minutes"] == 2
    assert data["runs"][group["runs"][1]]["seed"] == 1
    assert data["runs"][0]["mapping"] == [[[1, 0.6], [3, 0.25]], [[2, 0.5], [1, 0.125]]]
    assert data["runs"][0]["curves"]["mapping_change"] == [None, 0.25]


def test_real_runs(vm_run, vlm_run, capsys, tmp_path):
    out = tmp_path / "page.html"
    run(capsys, vm_run, vlm_run, "--out", out)
    data = page_data(out)
    for group, folder in zip(data["groups"], (vm_run, vlm_run), strict=True):
        result = json.loads((folder / "result.json").read_text())
        assert group["accuracy"] == pytest.approx(100 * result["final_accuracy"])
        details = data["runs"][group["runs"][0]]
        classes, sources = data["names"][details["classes"]], data["names"][details["sources"]]
        assert len(details["mapping"]) == len(classes) == 8 and details["pattern"].startswith("data:image/png;base64,")
        assert all(0 <= s < len(sources) and 0 < w <= 1 for pairs in details["mapping"] for s, w in pairs)
    weights = torch.load(vm_run / "last.safetensors", weights_only=True)["mapping"]["_weights"]
    vm = data["runs"][data["groups"][0]["runs"][0]]["mapping"]
    assert [pairs[0][1] for pairs in vm] == pytest.approx(weights.max(0).values.tolist(), rel=1e-4)
    assert all(weights[s, t] == pytest.approx(w, rel=1e-4) for t, pairs in enumerate(vm) for s, w in pairs)


@pytest.mark.soak
@pytest.mark.skipif(not os.environ.get("BLM_REAL_DATA"), reason="needs BLM_REAL_DATA, a folder with flowers102")
@pytest.mark.filterwarnings("ignore:flowers102 has")
def test_daisies_draw_on_daisy(capsys, tmp_path):
    import train_vm

    train_vm.main([
        "--dataset", "flowers102", "--data-path", os.environ["BLM_REAL_DATA"], "--backbone", "efficientnet_lite0",
        "--epochs", "1", "--batch-size", "64", "--train-fraction", "0.5", "--results-path", str(tmp_path),
    ])
    run(capsys, tmp_path, "--out", tmp_path / "page.html")
    data = page_data(tmp_path / "page.html")
    (details,) = data["runs"]
    classes, sources = data["names"][details["classes"]], data["names"][details["sources"]]
    drawn_on = {
        name: [sources[s] for s, _ in pairs] for name, pairs in zip(classes, details["mapping"], strict=True)
    }
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
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run",
                 "disable-sync", "disable-component-update", "disable-dev-shm-usage", "window-size=1350,2000",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    opened = webdriver.Chrome(options=options, service=service)
    yield opened
    opened.quit()


@pytest.fixture
def page(browser, results, capsys):
    make_run(results, 0.5, mapping="rlm", dataset="dtd", batch_size=64)
    make_run(results, 0.9, mapping="blm", dataset=f"folder:/{HOSTILE}", reprogramming="watermarking",
             classes=(HOSTILE, "oxeye daisy"), sources=("tench", HOSTILE, "sea urchin", "vase"))
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
        script = "return [...document.querySelector(arguments[0]).tBodies[0].rows].map(" \
                 "row => [...row.cells].map(cell => cell.innerText.trim()))"
        return self.browser.execute_script(script, selector)

    def column(self, name):
        heads = [head.text.split(" ▲")[0].split(" ▼")[0].strip() for head in self.all("#board th")]
        return [row[heads.index(name)] for row in self.table("#board")]

    def head(self, name):
        return next(head for head in self.all("#board th") if head.text.startswith(name))

    def sort(self, name):
        self.head(name).find_element("css selector", "button").click()

    def type(self, selector, text):
        field = self.one(selector)
        field.clear()
        field.send_keys(text)


def test_leaderboard_sorts_and_filters(page):
    assert page.column("accuracy") == ["50.0", "28.0 ± 3.0", "40.0", "90.0", "90.0"]
    page.sort("accuracy")
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
    page.type("#filter", "nothing such")
    assert page.column("accuracy") == []


def test_best_mapping_is_bold_among_runs_that_are_alike(page):
    bold = [span.text for span in page.all("#board .best")]
    assert bold == ["40.0"], "28.0 loses, linear is a reference, the others have no rival"


def test_details_of_a_run_and_its_seeds(page):
    page.type("#filter", "ilm")
    page.one("#board tbody tr").click()
    assert page.one("#title").text == "ilm on flowers102, resnet18, padding"
    assert [button.text for button in page.all("#seeds button")] == ["seed 0", "seed 1", "seed 2"]
    assert "final 25.00 %" in page.one("#about").text
    page.all("#seeds button")[2].click()
    assert "final 31.00 %, best on test 36.00 %, 2.0 minutes" in page.one("#about").text
    lines = page.all("#curves polyline")
    assert [len(line.get_attribute("points").split()) for line in lines] == [2, 2, 2, 1]  # ‖Δω‖ starts an epoch later
    assert page.browser.execute_script("return document.querySelector('#pattern').naturalWidth") == 224


def test_explorer_searches_both_ways(page):
    page.type("#filter", "ilm")
    page.one("#board tbody tr").click()
    assert page.table("#explorer") == [["rose", "0.60\ndaisy\n0.25\nvase"],
                                       ["oxeye daisy", "0.50\nsea urchin\n0.13\ndaisy"]]
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
    table = {row[0]: row[1:] for row in page.table("#published")}
    assert len(table) == 12
    assert table["flowers102"] == ["27.9 ± 0.7", "23.2 ± 0.5", "24.6", "17.8", "12.3"]
    assert table["stanfordcars"] == ["4.5 ± 0.1", "3.4 ± 0.1", "–", "–", "–"]
    assert "ICML 2024" in page.one("#sources").text
