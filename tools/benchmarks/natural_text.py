"""Text with known sentence ends, in many languages, from what Debian ships.

    apt-get download $(python -m tools.benchmarks.natural_text --packages)
    for package in *.deb; do dpkg-deb -x $package tree; done
    python -m tools.benchmarks.natural_text tree --output natural

Message catalogues (.mo), manual pages and guides of GNOME come with their English original. A paragraph whose
original is one sentence is one sentence, too, whatever stops its translation holds (`z. B. Foo`): sentence
ends are known without a segmenter. Some translators make two sentences of one: a translation with a stop
after a long word and no lower-case letter behind it is left out. `natural/<language>.txt` has one sentence a
line, without repeats, in an order that depends on the sentences alone.
"""

from __future__ import annotations

import argparse
import gettext
import gzip
import hashlib
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from data_prep.common.errors import UserError, run_main

PACKAGES = """
manpages manpages-dev manpages-cs manpages-cs-dev manpages-de manpages-de-dev manpages-es manpages-es-dev
manpages-fr manpages-fr-dev manpages-hu manpages-it manpages-it-dev manpages-ja manpages-ja-dev manpages-pt-br
manpages-pt-br-dev manpages-ru manpages-ru-dev manpages-sr manpages-vi manpages-da manpages-pl manpages-uk
manpages-ro manpages-nl manpages-sv
coreutils util-linux util-linux-locales bash tar grep sed findutils procps psmisc gettext apt dpkg dpkg-dev
aptitude-common gnupg-l10n git wget nano parted e2fsprogs gcc-12-locales locales libgtk-3-common
libgtk-4-common libglib2.0-data evolution-common evolution-data-server-common gnome-control-center-data
nautilus-data gimp-data inkscape gedit-common epiphany-browser-data gnome-software-common gnome-shell-common
rhythmbox-data totem-common baobab brasero-common evince-common pidgin-data vlc-l10n gnucash-common
abiword-common gnumeric-common plasma-workspace-data krita-l10n kdenlive-data digikam-data cinnamon-l10n
system-config-printer-common deja-dup simple-scan synaptic gparted-common darktable tuxpaint gnome-user-docs
software-properties-common network-manager network-manager-gnome cheese-common anjuta-common
gnome-disk-utility gnome-system-monitor gnome-terminal-data eog gnome-calendar
libreoffice-l10n-ar libreoffice-l10n-bs libreoffice-l10n-cs libreoffice-l10n-da libreoffice-l10n-gl
libreoffice-l10n-he libreoffice-l10n-hi libreoffice-l10n-hr libreoffice-l10n-hu libreoffice-l10n-ja
libreoffice-l10n-ko libreoffice-l10n-nb libreoffice-l10n-pt libreoffice-l10n-sk libreoffice-l10n-sr
libreoffice-l10n-th libreoffice-l10n-vi
""".split()
LOCALES = {"pt_BR": "pt", "zh_CN": "zh", "sr@latin": "sr-latn"}
# Languages whose letters are not Latin: a sentence of English words is not translated.
OTHER_SCRIPTS = {"ar", "he", "hi", "ja", "ko", "ru", "sr", "th", "uk", "zh"}
CASELESS = OTHER_SCRIPTS - {"ru", "sr", "uk"}
LEAST_WORDS = 4  # of the English sentence
_CLOSERS = "[\"'”’»)\\]]*"
_ONE_SENTENCE = re.compile(rf"[A-Z].*[a-z)][.!?]{_CLOSERS}")
_INNER_END = re.compile(rf"[.!?…]{_CLOSERS}\s+[^a-z\s]")
_STOP = re.compile(r"[.!?。．！？؟।…]+[\"'”’“»«」』)\]]*")
# Where a second sentence begins. Long words are no abbreviations; scripts without case have short ones.
_SPLIT = {
    letters: re.compile(
        rf"(?:[^\s.,;:()\[\]0-9]{{{letters}}}\.|[?!؟।]){_CLOSERS}\s+(\w)|[。！？]{_CLOSERS}\s*[^\s”’»」』)）]"
    )
    for letters in (3, 5)
}
_NOT_PROSE = re.compile(r"[%<>{}|\\_&~$@#=*\n\t]|://|\x00")
_FONTS = ("B", "I", "BR", "RB", "BI", "IB", "IR", "RI", "R", "SM", "SB")
_ESCAPES = (
    (r"\\f(?:\[\w*\]|\(..|.)|\\[,/&:|^%c]", ""),
    (r"\\(?:\(en|\[en\])", "–"),
    (r"\\(?:\(em|\[em\])", "—"),
    (r"\\(?:\(aq|\[aq\])", "'"),
    (r"\\-", "-"),
    (r"\\[ ~0]", " "),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="natural_text", description=__doc__.split("\n")[0])
    parser.add_argument("tree", nargs="?", metavar="DIR", help="folder of unpacked packages")
    parser.add_argument("--output", metavar="DIR", default="natural", help="folder for <language>.txt")
    parser.add_argument(
        "--least", type=int, default=200, metavar="N", help="leave out languages with fewer sentences"
    )
    parser.add_argument("--packages", action="store_true", help="print the names of the packages, and end")
    arguments = parser.parse_args()
    if arguments.packages:
        print("\n".join(PACKAGES))
        return 0
    if not arguments.tree or not Path(arguments.tree).is_dir():
        raise UserError("name the folder that the packages were unpacked into")
    write(Path(arguments.tree), Path(arguments.output), arguments.least)
    return 0


def write(tree: Path, output: Path, least: int) -> None:
    """Write `output/<language>.txt` for every language of `tree` with enough sentences; print the counts."""
    found: dict[str, set[str]] = {"en": set()}
    for locale, original, translation in pairs(tree):
        language = LOCALES.get(locale, locale)
        if re.fullmatch("[a-z]{2,3}(-latn)?", language) and (
            sentence := one_sentence(original, translation, language)
        ):
            found.setdefault(language, set()).add(sentence)
            found["en"].add(original.strip())
    output.mkdir(parents=True, exist_ok=True)
    for language, sentences in sorted(found.items()):
        if len(sentences) >= least:
            ordered = sorted(sentences, key=lambda text: hashlib.sha256(text.encode()).digest())
            (output / f"{language}.txt").write_text("\n".join(ordered) + "\n", encoding="utf-8")
            print(f"{language}: {len(sentences):,} sentences")


def one_sentence(original: str, translation: str, language: str) -> str | None:
    """The translation of one English sentence, or None where it may be something else."""
    original, sentence = original.strip(), unicodedata.normalize("NFC", translation.strip())
    if len(original.split()) < LEAST_WORDS or _NOT_PROSE.search(original + sentence) or original == sentence:
        return None
    if not _ONE_SENTENCE.fullmatch(original) or _INNER_END.search(original):
        return None
    letters = [character for character in sentence if character.isalpha()]
    plain = sum(character.isascii() for character in letters)
    if not letters or (language in OTHER_SCRIPTS and 2 * plain > len(letters)):
        return None
    split = _SPLIT[3 if language in CASELESS else 5].search(sentence)
    if split and not (split[1] or "").islower():
        return None
    # Thai has no stops.
    return sentence if language == "th" or re.search(rf"{_STOP.pattern}$", sentence) else None


def pairs(tree: Path) -> Iterator[tuple[str, str, str]]:
    """(locale, English paragraph, its translation) of everything below `tree`."""
    for path in sorted(tree.rglob("LC_MESSAGES/*.mo")):
        try:
            with open(path, "rb") as file:
                catalogue: dict[Any, str] = vars(gettext.GNUTranslations(file))["_catalog"]
        except (OSError, ValueError, LookupError) as error:  # LookupError: a header that gettext cannot read
            print(f"{path}: left out: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        for key, text in catalogue.items():
            if isinstance(key, str) and key:
                yield path.parent.parent.name, key.rpartition("\x04")[2], text
    for english in sorted(tree.glob("usr/share/man/man*/*.gz")):
        others = tree.glob(f"usr/share/man/*/{english.parent.name}/{english.name}")
        yield from _aligned(english, others, lambda path: path.parents[1].name, _roff)
    for english in sorted(tree.glob("usr/share/help/C/**/*.page")):
        inside = english.relative_to(tree / "usr/share/help/C")
        others = tree.glob(f"usr/share/help/*/{inside}")
        yield from _aligned(
            english, others, lambda path: path.relative_to(tree / "usr/share/help").parts[0], _page
        )


def _aligned(english: Path, others: Iterable[Path], locale, read) -> Iterator[tuple[str, str, str]]:
    """Paragraphs of a page beside those of its translations that have as many."""
    originals = read(english)
    for path in sorted(others):
        if len(texts := read(path)) == len(originals):
            for original, text in zip(originals, texts, strict=True):
                yield locale(path), original, text


def _page(path: Path) -> list[str]:
    """Paragraphs of a page in GNOME's Mallard."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return []
    return [" ".join("".join(e.itertext()).split()) for e in root.iter() if e.tag.endswith("}p")]


def _roff(path: Path) -> list[str]:
    """Filled paragraphs of a manual page, without markup."""
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, ValueError):
        return []
    for pattern, plain in _ESCAPES:
        text = re.sub(pattern, plain, text)
    paragraphs: list[list[str]] = [[]]
    filled, tag = True, False
    for line in text.split("\n"):
        if line.startswith((".", "'")):
            macro, _, rest = line[1:].strip().partition(" ")
            if macro.startswith("\\"):  # a comment
                continue
            if macro not in _FONTS:
                filled = macro not in ("nf", "EX") and (filled or macro in ("fi", "EE", "SH", "SS"))
                paragraphs.append([])
                tag = macro in ("TP", "TQ")
                continue
            words = re.findall(r'"[^"]*"|\S+', rest)
            line = ("" if len(macro) == 2 and macro[0] != "S" else " ").join(
                word.strip('"') for word in words
            )
        if filled:
            paragraphs[-1].append(line)
        if tag:
            paragraphs.append([])
            tag = False
    joined = (" ".join(" ".join(lines).split()) for lines in paragraphs)
    return [paragraph for paragraph in joined if paragraph]


if __name__ == "__main__":
    sys.exit(run_main("natural_text", main))
