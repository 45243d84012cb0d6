"""Table 9: the paper's integers and MiB, from modules that are real networks."""

import csv
import json

import pytest

from llqr_lab.cli import main
from llqr_lab.theory.storage import Storage, model_on_meta, storage_table, stored_numbers

# model: (parameters, numbers of e-kfac, numbers of diag-kfac)
COUNTS = {
    "ViT-Ti/16": (5_427_080, 24_235_082, 73_426),
    "ViT-B/16": (86_567_656, 387_826_882, 294_038),
    "ViT-L/16": (304_326_632, 1_367_114_178, 771_990),
    "ViT-Ti/16 at 224": (5_717_416, 26_072_962, 75_734),
}
# As printed in the paper: model, structure, shards, MiB of U a device, MiB in all a device.
PRINTED = [
    ("ViT-Ti/16", "e-kfac", 1, 92.45, 113.15),
    ("ViT-Ti/16", "e-kfac", 4, 23.11, 43.82),
    ("ViT-Ti/16", "diag-kfac", 1, 0.28, 20.98),
    ("ViT-Ti/16", "diag-kfac", 4, 0.07, 20.77),
    ("ViT-B/16", "e-kfac", 1, 1479.44, 1809.67),
    ("ViT-B/16", "e-kfac", 4, 369.86, 700.09),
    ("ViT-B/16", "diag-kfac", 1, 1.12, 331.35),
    ("ViT-B/16", "diag-kfac", 4, 0.28, 330.51),
    ("ViT-L/16", "e-kfac", 1, 5215.13, 6376.04),
    ("ViT-L/16", "e-kfac", 4, 1303.78, 2464.70),
    ("ViT-L/16", "diag-kfac", 1, 2.94, 1163.86),
    ("ViT-L/16", "diag-kfac", 4, 0.74, 1161.65),
]


@pytest.fixture(scope="module")
def table() -> list[Storage]:
    return storage_table()


def test_every_integer(table):
    counted = {}
    for row in table:
        counted.setdefault(row.model, {"params": row.params})[row.structure] = row.preconditioner
    assert counted == {
        name: {"params": params, "e-kfac": ekfac, "diag-kfac": diagonal}
        for name, (params, ekfac, diagonal) in COUNTS.items()
    }


def test_the_twelve_rows_of_the_paper(table):
    rows = [row.plain_row() for row in table[:12]]
    keys = ("model", "structure", "shards", "preconditioner_mib", "total_mib")
    assert [tuple(row[k] for k in keys) for row in rows] == PRINTED


def test_kfac_is_m2_plus_n2_a_matrix():
    model = model_on_meta("ViT-Ti/16")
    expected = 0
    for p in model.parameters():
        if p.dim() == 1:
            expected += p.numel()
            continue
        shape = [n for n in p.shape if n > 1] if p.dim() == 3 else list(p.shape)
        m, n = (1, shape[0]) if len(shape) == 1 else (shape[0], p.numel() // shape[0])
        expected += m * m + n * n
    assert stored_numbers(model, "kfac") == expected


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    assert main(["table", "9", "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "new" / "table9.json").read_text())
    with (tmp_path / "new" / "table9.csv").open() as file:
        assert [{k: str(v) for k, v in row.items()} for row in rows] == list(csv.DictReader(file))
    assert len(rows) == 16
    columns = "model structure shards params preconditioner preconditioner_mib total_mib"
    assert [*rows[0]] == columns.split()
    for part in ("24,235,082", "1,809.67", "26,072,962", "table9.json", "table9.csv"):
        assert part in printed


@pytest.mark.parametrize("number", ["0", "11", "nine"])
def test_another_number_says_which_exist(number, tmp_path, capsys):
    assert main(["table", number, "--out", str(tmp_path)]) != 0
    assert f"{number!r} here; there is: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
