r"""What is wrong with bytes that are not UTF-8: another encoding, or a broken byte in good text.

The two need opposite remedies: converting a UTF-8 file from latin1 because of one broken byte spoils every character
that is not ASCII, and dropping the bytes that are not UTF-8 from a latin1 file takes out its letters.

    raise MalformedError("bad_byte", f"{path} is not UTF-8 text; {remedy_for(error, first_megabytes)}")
"""

from __future__ import annotations

import re

SKIPPING = "`cottention data build --skip-malformed` and data.skip_malformed"
"""What leaves out lines that are not text."""

_MULTIBYTE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_NEVER_LETTERS = frozenset(b"\xfe\xff")  # of latin1 they are thorn and y with dots, of UTF-8 nothing
_CONTROLS = frozenset(range(0x80, 0xA0))  # latin1's second set of controls, where cp1252 has quotes and dashes
_NOT_IN_CP1252 = frozenset(b"\x81\x8d\x8f\x90\x9d")
_MOST_ACCENTED = 0.4  # share of the letters that are not ASCII: Icelandic has a sixth; another alphabet has nearly all
_UTF16_SAMPLE = 4096
_UTF16_ZEROS = (
    0.4  # share of every second byte that is zero: of Western text in UTF-16 nearly all, of damage hardly one
)

_MARKS = {  # a longer mark stands before one that it begins with
    b"\x1f\x8b": "gzip-compressed (name it .gz)",
    b"\x28\xb5\x2f\xfd": "zstd-compressed (name it .zst)",
    b"PAR1": "a parquet file (name it .parquet)",
    b"PK\x03\x04": "a zip archive (unpack it first)",
    b"\xff\xfe\0\0": "UTF-32 text (convert it to UTF-8: iconv -f utf-32 -t utf-8)",
    b"\0\0\xfe\xff": "UTF-32 text (convert it to UTF-8: iconv -f utf-32 -t utf-8)",
    b"\xff\xfe": "UTF-16 text (convert it to UTF-8: iconv -f utf-16 -t utf-8)",
    b"\xfe\xff": "UTF-16 text (convert it to UTF-8: iconv -f utf-16 -t utf-8)",
}


def other_kind(head: bytes) -> str | None:
    """Say what a file is that does not begin as text does; None when it may be text.

    Args:
        head: its first bytes, some thousands.
    """
    for mark, what in _MARKS.items():
        if head.startswith(mark):
            return what
    sample = head[:_UTF16_SAMPLE]
    for first, name in ((1, "utf-16le"), (0, "utf-16be")):
        zeros, others = sample[first::2], sample[1 - first :: 2]
        if len(zeros) > 1 and zeros.count(0) >= _UTF16_ZEROS * len(zeros) and others.count(0) < 0.1 * len(others):
            return f"UTF-16 text (convert it to UTF-8: iconv -f {name} -t utf-8)"
    return None


def remedy_for(
    error: UnicodeDecodeError, head: bytes = b"", skipping: str = f"{SKIPPING} leave out the lines that have them"
) -> str:
    """Say what to do about bytes that are not UTF-8.

    Args:
        error: what the decoder said of them.
        head: the beginning of the file they are in, which shows what the rest of it is; the more the better.
        skipping: what leaves such lines out; "" where nothing does.
    """
    sample = head if error.object in head else head + error.object
    bad = [byte for byte in _MULTIBYTE.sub(b"", sample) if byte >= 0x80]
    num_good = sum(1 for _ in _MULTIBYTE.finditer(sample))
    is_cut = error.reason == "unexpected end of data" and len(error.object) - error.start > 1
    drop = f"iconv -c -f utf-8 -t utf-8 takes such bytes out{skipping and f', {skipping}'}"
    if num_good > len(bad) or is_cut or _NEVER_LETTERS.issuperset(bad):
        return f"it is UTF-8 with broken bytes: {drop}"
    num_letters = len(bad) + len(re.findall(rb"[A-Za-z]", sample))
    if (len(bad) > 2 and len(bad) > _MOST_ACCENTED * num_letters) or not _NOT_IN_CP1252.isdisjoint(bad):
        return "it is in another encoding: find out which one, and convert it first: iconv -f ENCODING -t utf-8"
    name = "latin1" if _CONTROLS.isdisjoint(bad) else "cp1252"
    convert = f"convert it first, for example with: iconv -f {name} -t utf-8"
    return f"{convert}; or, if it is UTF-8 with a broken byte: {drop}" if len(bad) == 1 else convert


def normalised_newlines(text: str) -> str:
    """Make every end of line a single line feed."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
