"""The paper's numbers: as many as printed, literally, and consistent among themselves."""

import itertools

import pytest

from llqr_lab.paper import FIGURES, TABLES, parse_cell
from llqr_lab.protocols import EXPERIMENTS, METHODS, resolve_settings

# rows x columns of numbers, as the paper prints them
SHAPES = {"1": (4, 7), "2": (4, 7), "3": (2, 6), "4": (8, 4), "5": (1, 6), "6": (1, 4)}
SHAPES |= {"7": (3, 1), "8": (4, 5), "10": (30, 5)}

# lines of the paper's text, a line or two of each table; it has tabs for commas and \pm for "+-"
LINES = {
    "1": [
        "WRN-28-10, 96.94 +- 0.09, 97.04 +- 0.08, 97.10 +- 0.03, 97.43 +- 0.09, 97.41 +- 0.04, "
        "97.64 +- 0.08, 97.52 +- 0.07"
    ],
    "2": [
        "VGG16-BN, 75.65 +- 0.28, 76.32 +- 0.35, 76.31 +- 0.11, 76.70 +- 0.18, 76.70 +- 0.10, "
        "78.14 +- 0.27, 77.67 +- 0.27",
        "PyramidNet-110, 83.96 +- 0.25, 84.40 +- 0.46, 84.00 +- 0.16, 86.20 +- 0.18, "
        "85.92 +- 0.10, 86.67 +- 0.21, 86.53 +- 0.05",
    ],
    "3": [
        "ResNet-18, 57.97 +- 0.28, 57.02 +- 0.49, 57.62 +- 0.47, 61.17 +- 0.27, 62.24 +- 0.49, "
        "61.98 +- 0.22"
    ],
    "4": [
        "CIFAR-10, VGG16-BN, 95.54 +- 0.14, 95.58 +- 0.09, 95.92 +- 0.07, 95.81 +- 0.11",
        "CIFAR-100, PyramidNet-110, 86.20 +- 0.18, 86.23 +- 0.08, 86.67 +- 0.21, 86.76 +- 0.13",
    ],
    "5": [
        "ResNet-50, 77.60 +- 0.31, 78.05 +- 0.12, 76.93 +- 0.42, 77.92 +- 0.07, 78.61 +- 0.16, "
        "78.19 +- 0.14"
    ],
    "6": ["IWSLT14 De-En, 34.24 +- 0.27, 34.51 +- 0.12, 34.20 +- 0.19, 34.57 +- 0.09"],
    "8": [
        "CIFAR-100, 0.6, 41.21 +- 1.27, 9.76 +- 1.46, 41.21 +- 1.13, 46.81 +- 1.46, 48.54 +- 0.81"
    ],
    "10": [
        "ViT-B/16, LLQR+SAM, 200, 8, 426.81, 12.85×, 4.55×, 85.33",
        "ViT-L/16, LLQR+SAM, 1500, 2, 372.23, 5.95×, 2.54×, 95.50",
        "ViT-L/16, LLQR, 50, 32, 1647.13, 26.32×, 11.24×, 97.46",
    ],
}


@pytest.mark.parametrize("number", TABLES)
def test_a_table_has_the_papers_shape_and_every_cell_a_number(number):
    table = TABLES[number]
    rows, columns = SHAPES[number]
    assert len(table["rows"]) == rows and len(table["columns"]) == columns
    for row in table["rows"]:
        assert len(row["cells"]) == columns
        for text in filter(None, row["cells"]):
            assert parse_cell(text).mean > 0
            assert (parse_cell(text).std is None) is (number == "10")


@pytest.mark.parametrize("number", LINES)
def test_lines_of_the_papers_text_are_rows_of_the_data(number):
    rows = [[*row["labels"], *row["cells"]] for row in TABLES[number]["rows"]]
    for line in LINES[number]:
        assert [c.replace("+-", "±").rstrip("×") for c in line.split(", ")] in rows


def test_the_column_of_table_7():
    cells = {row["labels"][0]: row["cells"] for row in TABLES["7"]["rows"]}
    assert cells["FisherSAM"] == ["80.89 ± 0.31"] and cells["LLQR^Delta+SAM"] == ["81.23 ± 0.14"]
    assert cells["LLQR+SAM (NGD)"] == ["81.82 ± 0.14"]


@pytest.mark.parametrize("number", [n for n in TABLES if n != "10"])
def test_every_cell_is_a_run_of_the_protocol_and_every_run_a_cell(number):
    table, about = TABLES[number], EXPERIMENTS[f"table{number}"]
    shown = set()
    for row, column in itertools.product(table["rows"], table["columns"]):
        run = {**table["run"], **row["run"], **column["run"]}
        shown.add((run["dataset"], run["model"], run["method"]))
        assert resolve_settings(f"table{number}", run["dataset"], run["model"], run["method"])
        baseline = row.get("minus") or column["minus"]
        assert baseline is None or baseline in about.methods
    assert shown == set(itertools.product(about.datasets, about.models, about.methods))


def test_table_4_repeats_tables_1_and_2():
    for row in TABLES["4"]["rows"]:
        number = {"CIFAR-10": "1", "CIFAR-100": "2"}[row["labels"][0]]
        first = next(r for r in TABLES[number]["rows"] if r["labels"] == row["labels"][1:])
        columns = [c["label"] for c in TABLES[number]["columns"]]
        for label, text in zip(
            (c["label"] for c in TABLES["4"]["columns"]), row["cells"], strict=True
        ):
            if label in columns:
                assert first["cells"][columns.index(label)] == text


def test_the_ratios_of_table_10_are_those_of_its_times():
    seconds = {}
    for row in TABLES["10"]["rows"]:
        seconds[row["run"]["model"], row["run"]["method"]] = float(row["cells"][1])
        assert row["run"]["method"] in METHODS
        for method, text in (("SGDM", row["cells"][2]), ("SAM", row["cells"][3])):
            base = next(
                float(r["cells"][1])
                for r in TABLES["10"]["rows"]
                if (r["run"]["model"], r["run"]["method"]) == (row["run"]["model"], method)
            )
            # Between the ends of what rounds to the printed times, and rounded itself.
            epoch = float(row["cells"][1])
            low, high = (epoch - 0.005) / (base + 0.005), (epoch + 0.005) / (base - 0.005)
            assert low - 0.005 <= float(text) <= high + 0.005
    assert len(seconds) == 10


def test_the_figures_numbers_are_those_of_the_protocols():
    run = ("figure6", "ImageNet-scale images", "vit-b16", "LLQR (NGD)")
    assert (
        tuple(FIGURES["figure6"]["exponents"]) == resolve_settings(*run)["report.exponents"].value
    )
    run = ("figure1", "ImageNet", "resnet50", "LLQR (NGD)")
    assert FIGURES["figure1"]["every"] == resolve_settings(*run)["llqr.every"].value
