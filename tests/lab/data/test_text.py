"""Sentence pairs: parallel lines, IWSLT14 in both forms, LibreOffice's help."""

import os
from pathlib import Path

import pytest

from llqr_lab.data.errors import DataError
from llqr_lab.data.iwslt14 import TESTS, iwslt14_raw, iwslt14_tokenised
from llqr_lab.data.libreoffice import DEBIAN, libreoffice_help, paragraphs_by_id
from llqr_lab.data.pairs import parallel_lines

REAL = Path(os.environ.get("LLQR_LIBREOFFICE_HELP", DEBIAN))


def test_parallel_lines(tmp_path: Path):
    a, b = tmp_path / "x.de", tmp_path / "x.en"
    a.write_text("eins\u2028zwei\n\n drei \n", encoding="utf-8")
    b.write_text("one two\ntwo\nthree\n", encoding="utf-8")
    assert parallel_lines(a, b, "") == [("eins\u2028zwei", "one two"), ("drei", "three")]
    b.write_text("one\n")
    with pytest.raises(DataError, match="x.de: 3 lines, but .*x.en has 1.*Get it."):
        parallel_lines(a, b, "Get it.")
    b.write_bytes(b"\xff\n")
    with pytest.raises(DataError, match="x.en: damaged.*utf-8"):
        parallel_lines(a, b, "Get it.")


def test_iwslt14_tokenised(tmp_path: Path):
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.de").write_text(f"{part} ein wor@@ t\n")
        (tmp_path / f"{part}.en").write_text(f"{part} a wor@@ d\n")
    pairs = iwslt14_tokenised(tmp_path)
    assert pairs.valid == [("valid ein wor@@ t", "valid a wor@@ d")]
    (tmp_path / "test.en").unlink()
    with pytest.raises(DataError, match="test.en: there is no such.*prepare-iwslt14.sh"):
        iwslt14_tokenised(tmp_path)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    lines = {
        "de": ["<url>x</url>", "<title>Der Titel</title>"],
        "en": ["<url>x</url>", "<title>A Title</title>"],
    }
    for i in range(24):
        lines["de"].append(f" Satz Nummer {i} .")
        lines["en"].append(f"Sentence number {i} .")
    lines["de"].append("kurz")
    lines["en"].append("far too long for it")
    for language, text in lines.items():
        (tmp_path / f"train.tags.de-en.{language}").write_text("\n".join(text) + "\n")
        for name in TESTS:
            (tmp_path / f"IWSLT14.{name}.de-en.{language}.xml").write_text(
                f'<doc>\n<seg id="1"> {name} &amp; {language} </seg>\n<seg id="2">B</seg>\n</doc>\n'
            )
    return tmp_path


def test_iwslt14_raw(raw: Path):
    pairs = iwslt14_raw(raw)
    kept = [("der titel", "a title")]
    kept += [(f"satz nummer {i} .", f"sentence number {i} .") for i in range(24)]
    assert pairs.valid == [kept[0], kept[23]]
    assert pairs.train == kept[1:23] + kept[24:]
    assert len(pairs.test) == 2 * len(TESTS)
    assert pairs.test[2] == ("tedx.dev2012 & de", "tedx.dev2012 & en")


def test_damaged_raw_text_is_named(raw: Path):
    path = raw / "IWSLT14.TED.tst2011.de-en.en.xml"
    path.write_text('<seg id="1">only one</seg>')
    with pytest.raises(DataError, match="tst2011.de-en.en.xml: damaged.*de-en.tgz"):
        iwslt14_raw(raw)
    path.write_text("")
    with pytest.raises(DataError, match="tst2011.de-en.en.xml: damaged.*no <seg>"):
        iwslt14_raw(raw)


def page(**texts: str) -> str:
    body = "".join(f'<p id="{k}" class="paragraph" dir="auto">{v}</p>\n' for k, v in texts.items())
    return f'<html><body><h1 id="hd_1" dir="auto">Titel</h1>{body}</body></html>'


def test_paragraphs_lose_their_markup():
    switch = (
        'Drücken Sie <span id="swlnsys_1" class="switchinline"><span hidden="true" id="MAC_1" '
        'class="MAC"><span class="keycode">Befehl+T</span></span><span hidden="true" '
        'id="default_1"><span class="keycode">F11</span></span></span>!'
    )
    texts = paragraphs_by_id(
        page(par_1="a &lt; <a href='x'>b</a>\n  c", par_2=switch, par_3="x<br>y")
    )
    assert texts == {
        "hd_1": "Titel",
        "par_1": "a < b c",
        "par_2": "Drücken Sie F11!",
        "par_3": "x y",
    }


def write(root: Path, language: str, name: str, content: str) -> None:
    path = root / language / "text" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


# By their hashes: pages of the test and of the validation set; 1 and 3 are for training.
OTHER_PARTS = (43, 19)


def test_help_pages_are_paired_by_path_and_id(tmp_path: Path):
    for i in (1, 3, *OTHER_PARTS):
        write(
            tmp_path, "de", f"a/{i}.html", page(p=f"Satz {i}", q="gleich", r="nur deutsch", s="Oft")
        )
        write(tmp_path, "en-US", f"a/{i}.html", page(p=f"Sentence {i}", q="gleich", s="Often"))
    write(tmp_path, "de", "a/alone.html", page(p="allein"))
    pairs = libreoffice_help(tmp_path)
    test, valid = OTHER_PARTS
    # "Oft" is everywhere: it belongs to the test set alone.
    assert pairs.test == [(f"Satz {test}", f"Sentence {test}"), ("Oft", "Often")]
    assert pairs.valid == [(f"Satz {valid}", f"Sentence {valid}")]
    assert pairs.train == [("Satz 1", "Sentence 1"), ("Satz 3", "Sentence 3")]


def test_missing_help_is_named(tmp_path: Path):
    write(tmp_path, "de", "x.html", page(p="eins"))
    with pytest.raises(DataError, match="en-US/text: there is no such.*libreoffice-help-en-us"):
        libreoffice_help(tmp_path)
    write(tmp_path, "en-US", "y.html", page(p="one"))
    with pytest.raises(DataError, match="no page has paragraphs in both.*libreoffice-help-de"):
        libreoffice_help(tmp_path)


@pytest.mark.skipif(
    not (REAL / "de").exists() or not (REAL / "en-US").exists(),
    reason=f"not in {REAL}: apt-get install libreoffice-help-de libreoffice-help-en-us",
)
def test_the_real_help():
    pairs = libreoffice_help(REAL)
    parts = (pairs.train, pairs.valid, pairs.test)
    assert sum(map(len, parts)) > 30_000 and all(len(part) > 1_000 for part in parts)
    for side in (0, 1):
        texts = [pair[side] for part in parts for pair in part]
        assert len(set(texts)) == len(texts)
    assert not any("<" in a and ">" in a and "span" in a for part in parts for a, _ in part)
