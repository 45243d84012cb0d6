"""Files that are written whole or not at all."""

import pytest

from llqr_lab.common.output import write_csv, write_json, write_whole


def test_a_failure_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "made" / "a.json", {"a": 1})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


def test_line_ends_are_those_of_the_format(tmp_path):
    assert write_csv(tmp_path / "a.csv", [{"a": 1, "b": "x"}]).read_bytes() == b"a,b\r\n1,x\r\n"
    assert write_whole(tmp_path / "a.md", "a\nb\n").read_bytes() == b"a\nb\n"
