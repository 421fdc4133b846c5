"""Every figure of README and docs stands in a record that its page links to, and every generated table is regenerated.

A record is a file or folder of docs/records: README.md with command, commit, machine and figures as they were printed,
runs.jsonl where training runs are behind them (`python -m tools.report RESULTS --format record`). A table below a
command ``python -m tools.report docs/records/… --format markdown`` is that command's;

    python -m tests.system.test_records

writes all of them again.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest

from tools.report import __main__ as report

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECORDS = sorted((ROOT / "docs" / "records").glob("*/README.md"))

NUMBER = r"\d(?:[\d,]*\d)?(?:\.\d+)?(?:e-?\d+)?"
UNIT = r"%|×(?!\d)|s\b|ms\b|minutes?\b|hours?\b|[KMG]i?B\b|GFLOP/s|img/s|points?\b|kills\b|mutations\b"
# what was chosen and not measured: settings, versions, tolerances, names
GIVEN = (
    r"\blr 0\.\d+|momentum 0\.\d+|×0\.1 at 50 % and (?:at )?72 %|50 % and 72 % of the epochs|[λαρβτ] = [\d.]+",
    r"Python [\d.–]+|(?:torch|timm) [\d.]+\S*|arXiv [\d.]+|NeurIPS \d+|\d{4}-\d\d-\d\d|\b1e-\d+\b|the test's 5 points",
    r"0\.29 · 100|lr 0\.01|chance (?:is )?[\d.]+(?: %)?(?: and [\d.]+)?|\(chance: \d+\)|\d+ MiB\) that is full",
)


def figures(text):
    """The numbers of a page that look like results: with decimals, with a unit, or alone in a cell of a table.

    Blocks of ``text`` are what the Python above them prints, compared by the guides' own test.
    """
    text = re.sub(r"```(?:bash|python|bibtex|text)\n.*?```|<[^>]*>|(?<=\])\([^)]*\)", " ", text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`", " ", text.replace("```", ""))
    for given in GIVEN:
        text = re.sub(given, " ", text)
    found = re.findall(r"(?<![\w.])" + NUMBER + r"(?![\w.]*\d)", text)
    found = [number for number in found if "." in number or "e-" in number]
    chain = rf"(?<![\w.]){NUMBER}(?:\s?(?:–|to|or|and|±)\s{{0,1}}{NUMBER})*\s?(?:{UNIT})"
    found += [number for each in re.findall(chain, text) for number in re.findall(NUMBER, each)]
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
            found += [
                n
                for cell in cells
                if re.fullmatch(rf"{NUMBER}(?: [±/–] {NUMBER})*", cell)
                for n in re.findall(NUMBER, cell)
            ]
    return list(dict.fromkeys(found))


def numbers_of_records(page, text):
    """All numbers of the records that ``text``, the page at the path ``page``, links to."""
    links = re.findall(r"\]\(([^)#]*records/[^)#]+)\)", text)
    texts = [(page.parent / link).read_text(encoding="utf-8") for link in links]
    return {number for text in texts for number in re.findall(NUMBER, text)}


def generated(text):
    """(start, end, command) of each table below a command that reads records."""
    pattern = r"```bash\n(?:[^`]*\n)?python -m tools\.report (docs/records/[^\n]*)\n```\n\n((?:\|[^\n]*\n)*)"
    return [(match.start(2), match.end(2), match[1]) for match in re.finditer(pattern, text)]


def table_of(command):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.chdir(ROOT):
        report.main(command.split())
    return "".join(line for line in printed.getvalue().splitlines(keepends=True) if line.startswith("|"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_figure_stands_in_a_record_that_the_page_links_to(page):
    text = page.read_text(encoding="utf-8")
    known = numbers_of_records(page, text)
    for start, end, _ in reversed(generated(text)):
        text = text[:start] + text[end:]
    missing = [number for number in figures(text) if number not in known]
    assert not missing, f"{page.name} links to no record with {', '.join(missing)}"


@pytest.mark.parametrize("page", [*PAGES, *RECORDS], ids=lambda page: str(page.relative_to(ROOT)))
def test_generated_tables_are_those_of_their_commands(page):
    text = page.read_text(encoding="utf-8")
    for start, end, command in generated(text):
        assert text[start:end] == table_of(command), f"{command}: python -m tests.system.test_records writes it again"


def test_tables_of_records_are_generated():
    found = [command for page in (*PAGES, *RECORDS) for *_, command in generated(page.read_text(encoding="utf-8"))]
    assert {path.parent.name for path in (ROOT / "docs/records").glob("*/runs.jsonl")} <= {
        Path(word).name for command in found for word in command.split() if word.startswith("docs/records/")
    }


def test_thumbnails_are_there_and_small():
    paths = re.findall(r'<img src="([^"]+)" width="\d+" alt="[^"]+">', PAGES[0].read_text(encoding="utf-8"))
    assert len(paths) == 4 and all((ROOT / path).stat().st_size <= 25_000 for path in paths)


def test_what_counts_as_a_figure():
    text = """A model with 1,000 labels, lr 0.01, λ = 1, 32×32 pixels and `--epochs 0.5` ends at 84.5 % (deviation 1.2),
after 9 to 10 s, 2–3 minutes or 20 GB, ±0.5 [points](https://x.org/2.5), to to 1e-5 and 4e-7; 308 of 342, chance 10 %.

| mapping | K = 15 | accuracy |
| --- | --: | --: |
| ilm 7 | 12 | **8.0 ± 0.1** |

```bash
python train.py --lr 0.3
```

```
final accuracy 76.45%
```
"""
    expected = "84.5 1.2 9 10 2 3 20 0.5 4e-7 12 8.0 0.1 76.45"
    assert sorted(figures(text)) == sorted(expected.split())


def test_a_figure_without_a_record_is_found(tmp_path):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "one.txt").write_text("accuracy 84.5 over 1,424 images")
    linked = "[record](records/one.txt): 84.5 %, 84.6 %"
    assert numbers_of_records(tmp_path / "page.md", linked) == {"84.5", "1,424"}
    assert [n for n in figures(linked) if n not in numbers_of_records(tmp_path / "page.md", linked)] == ["84.6"]
    assert numbers_of_records(tmp_path / "page.md", "84.5 %") == set()


if __name__ == "__main__":
    for page in (*PAGES, *RECORDS):
        text = page.read_text(encoding="utf-8")
        for start, end, command in reversed(generated(text)):
            gap = "" if text.startswith("\n", end) else "\n"
            text = text[:start] + table_of(command) + gap + text[end:]
        page.write_text(text, encoding="utf-8")
