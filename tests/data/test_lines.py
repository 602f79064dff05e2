"""The policies of the one reader, one by one; test_lines_fuzz.py has them all at once."""

import errno
import gzip
import hashlib
import io
import itertools
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from nlpfast.data import lines
from nlpfast.data.lines import (
    DataError,
    file_digest,
    read_lines,
    read_lines_together,
    text_blocks,
    unequal_lengths,
)
from nlpfast.data.read_report import ReadReport

# what str.splitlines takes for the end of a line, beside \r and \n
OTHER_ENDS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"
BOM = b"\xef\xbb\xbf"
CUT = "the gzip data is cut short here, after {} whole lines; get or compress it again"
NOT_UTF8 = "byte 0x{} is not UTF-8"
FIX = "; convert the file to UTF-8"


def write(folder, data, name="some corpus.txt"):
    path = folder / name
    path.write_bytes(data)
    return path


def outcome(path):
    """The lines, and the error after them or None."""
    found = []
    try:
        found.extend(read_lines(path))
    except DataError as error:
        return found, str(error)
    return found, None


@pytest.fixture(params=[2, 3, 5, 1 << 18])
def block(request, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", request.param)
    monkeypatch.setattr(lines, "GZIP_BLOCK", min(request.param, 7))
    return request.param


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"a\nb", ["a", "b"]),
        (b"\n", [""]),
        (b"\n\n\n", ["", "", ""]),
        (b"a\n\n", ["a", ""]),
        (b" \n\t", [" ", "\t"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\r\nb\r", ["a", "b"]),
        (b"a\r\r\nb\rc\n\r", ["a\r", "b\rc", ""]),
        (b"\r\n\r", ["", ""]),
        (OTHER_ENDS.encode() + b"\n" + OTHER_ENDS.encode(), [OTHER_ENDS, OTHER_ENDS]),
        (BOM + b"a\n", ["a"]),
        (BOM + b"\n", [""]),
        (BOM + BOM + b"a\n" + BOM, ["\ufeffa", "\ufeff"]),
        ("é€\U0001f600\U0010ffff\x7f\ud7ff\ue000\n".encode(), ["é€\U0001f600\U0010ffff\x7f\ud7ff\ue000"]),
    ],
)
def test_lines_of_a_file(tmp_path, block, data, expected):
    assert outcome(write(tmp_path, data)) == (expected, None)
    assert outcome(write(tmp_path, gzip.compress(data))) == (expected, None)
    report = ReadReport("x")
    assert list(read_lines(str(write(tmp_path, data)), report)) == expected
    assert (report.read, report.used) == (len(expected), len(expected))
    assert report.byte_order_marks == data.startswith(BOM)


@pytest.mark.parametrize(
    ("data", "before", "message"),
    [
        (b"", 0, ": the file is empty; give a file with text"),
        (BOM, 0, ": the file is empty; give a file with text"),
        (b"\xff", 0, ":1: " + NOT_UTF8.format("ff") + " (invalid start byte)" + FIX),
        (b"a\nb\nc\xe9d\n", 2, ":3: " + NOT_UTF8.format("e9") + " (invalid continuation byte)" + FIX),
        (b"a\n\xf0\x9f\x98", 1, ":2: " + NOT_UTF8.format("f0") + " (unexpected end of data)" + FIX),
        (b"a\n\xf0\x9f\x98\n", 1, ":2: " + NOT_UTF8.format("f0") + " (invalid continuation byte)" + FIX),
        (b"\n\xc0\x80", 1, ":2: " + NOT_UTF8.format("c0")),
        (b"\xed\xa0\x80", 0, ":1: " + NOT_UTF8.format("ed")),
        (b"\xf4\x90\x80\x80", 0, ":1: " + NOT_UTF8.format("f4")),
        (BOM + b"a\n\xfe", 1, ":2: " + NOT_UTF8.format("fe")),
        (b"\xff\xfea\0\n\0", 0, ":1: " + NOT_UTF8.format("ff")),
        (b"a\n\nb\0c\n", 2, ":3: NUL byte; this is not a UTF-8 text file, convert it or remove the byte"),
        (b"a\0\nb\0", 0, ":1: NUL byte"),
        (b"a\nb\0\xff\n", 1, ":2: NUL byte"),
        (b"a\nb\xff\0\n", 1, ":2: " + NOT_UTF8.format("ff")),
    ],
)
def test_errors_name_file_and_line_after_the_lines_before(tmp_path, block, data, before, message):
    whole = data.removeprefix(BOM).split(b"\n")[:before]
    for content in (data, gzip.compress(data)):
        path = write(tmp_path, content)
        found, error = outcome(path)
        assert found == [line.decode() for line in whole]
        assert error.startswith(f"{path}{message}") and "\n" not in error


def test_a_line_of_the_limit_is_read_and_a_longer_one_is_not(tmp_path, monkeypatch, block):
    monkeypatch.setattr(lines, "MAX_LINE", 8)
    rule = r"the line has more than 8 characters; lines end at \n, so check what wrote the file"
    for limit in (b"12345678", "€" * 8, b"1234567\r"):
        limit = limit.encode() if isinstance(limit, str) else limit
        text = limit.decode().removesuffix("\r")
        for end in (b"\n", b""):
            assert outcome(write(tmp_path, b"a\n" + limit + end)) == (["a", text], None)
            path = write(tmp_path, b"a\n\n" + limit + b"9" + end)
            assert outcome(path) == (["a", ""], f"{path}:3: {rule}")
    path = write(tmp_path, b"x\n123456789")
    assert outcome(path)[1] == f"{path}:2: {rule}"
    # the first fault of a line is told: the ninth character, not the byte after it
    path = write(tmp_path, b"x\n123456789\xff\n")
    assert outcome(path)[1] == f"{path}:2: {rule}"
    path = write(tmp_path, b"x\n12345678\xff9\n")
    assert NOT_UTF8.format("ff") in outcome(path)[1]
    # exact text has no lines
    path = write(tmp_path, b"x\n123456789")
    assert "".join(text_blocks(path)) == "x\n123456789"


def test_the_limit_and_the_blocks_fit():
    assert 1 << 20 <= lines.MAX_LINE <= 16 << 20
    assert lines.BLOCK < lines.MAX_LINE


@pytest.mark.parametrize("name", ["corpus.gz", "corpus.txt", "corpus"])
def test_gzip_is_known_by_its_bytes(tmp_path, block, name):
    data = b"\xef\xbb\xbfone\r\ntwo\n"
    assert outcome(write(tmp_path, gzip.compress(data), name)) == (["one", "two"], None)
    assert outcome(write(tmp_path, data, name)) == (["one", "two"], None)
    # parts one after another, an empty one among them, and what tapes leave at the end
    parts = [gzip.compress(part) for part in (b"on", b"", b"e\ntw", b"o")]
    assert outcome(write(tmp_path, b"".join(parts) + b"\0" * 50, name)) == (["one", "two"], None)
    path = write(tmp_path, gzip.compress(b"") * 2)
    assert outcome(path) == ([], f"{path}: the file is empty; give a file with text")


def test_gzip_cut_short_anywhere(tmp_path, block):
    content = "".join(f"line {i} é€\U0001f600\n" for i in range(40)).encode()
    data = gzip.compress(content)
    for size in range(2, len(data)):
        path = write(tmp_path, data[:size])
        # whatever a byte more gives is known to be there
        there = zlib_prefix(data[:size])
        whole = there.decode(errors="ignore").split("\n")[:-1]
        assert outcome(path) == (whole, f"{path}:{len(whole) + 1}: {CUT.format(len(whole))}")
    # at the end of a part the text is whole
    assert outcome(write(tmp_path, data * 2))[1] is None
    path = write(tmp_path, data + data[:1])
    assert outcome(path)[1] == f"{path}:41: {CUT.format(40)}"


def zlib_prefix(data):
    member, content = zlib.decompressobj(wbits=31), b""
    for i in range(len(data)):
        content += member.decompress(data[i : i + 1])
    return content


def test_gzip_damaged(tmp_path, block):
    content = "".join(f"line {i}\n" for i in range(40)).encode()
    data = gzip.compress(content)
    cases = [
        # the checksum, the length, the method of compression, what is after the end
        (data[:-8] + bytes([data[-8] ^ 1]) + data[-7:], 40, "incorrect data check"),
        (data[:-1] + b"\x07", 40, "incorrect length check"),
        (b"\x1f\x8b\x07" + data[3:], 0, "unknown compression method"),
        (data + b"text", 40, "incorrect header check"),
        (data + b"\0\0text", 40, "incorrect header check"),
    ]
    for damaged, whole, reason in cases:
        path = write(tmp_path, damaged)
        found, error = outcome(path)
        assert found == [f"line {i}" for i in range(whole)]
        assert error.startswith(f"{path}:{whole + 1}: the gzip data is damaged (Error -3 ")
        assert error.endswith(f"{reason}) here, after {whole} whole lines; get or compress it again")


def test_a_file_that_is_not_there(tmp_path):
    path = write(tmp_path, b"x")
    for missing, message in (
        (tmp_path / "nowhere", "nowhere: no such file; check the path"),
        (tmp_path, ": is a folder; give a text file"),
        (path / "below", r"below: cannot be read \(Not a directory\); check its permissions"),
    ):
        for read in (lambda p: list(read_lines(p)), lambda p: list(text_blocks(p)), file_digest):
            with pytest.raises(DataError, match=message):
                read(missing)


def test_an_error_of_the_disk_in_the_middle(tmp_path, monkeypatch):
    class Failing(io.BytesIO):
        def read(self, size):
            if self.tell() >= 4:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    monkeypatch.setattr(lines, "BLOCK", 4)
    monkeypatch.setattr(Path, "open", lambda *_: Failing(b"a\nb\nc\n"))
    assert outcome("f") == (["a", "b"], "f: cannot be read (Input/output error); check its permissions")


def test_digest_is_of_the_bytes(tmp_path):
    data = gzip.compress(b"text\n" * 100_000) + b"\0" * (1 << 19)
    path = write(tmp_path, data)
    assert file_digest(path) == hashlib.sha256(data).hexdigest()
    seen = hashlib.sha256()
    assert "".join(text_blocks(path, tap=seen.update)) == "text\n" * 100_000
    assert seen.hexdigest() == hashlib.sha256(data).hexdigest()


def test_a_reader_that_stops_early_closes_the_file(tmp_path, recwarn):
    reader = read_lines(write(tmp_path, b"a\nb\n"))
    assert next(reader) == "a"
    reader.close()
    assert not recwarn


def test_lines_together(tmp_path, block):
    first = write(tmp_path, BOM + b"a\nb\n\n", "first")
    second = write(tmp_path, gzip.compress(b"A\r\n\nC"), "second")
    third = write(tmp_path, BOM + b"1\n2\n3\n", "third")
    report = ReadReport(first)
    rows = [("a", "A", "1"), ("b", "", "2"), ("", "C", "3")]
    for row in read_lines_together([first, str(second), third], report):
        assert row == rows[report.read - 1]
        if row[1] == "":
            report.skip("empty")
    assert (report.read, report.used, report.byte_order_marks) == (3, 2, 2)
    assert report.skipped["empty"].first == [f"{first}:2"]
    assert list(read_lines_together([first])) == [("a",), ("b",), ("",)]


@pytest.mark.parametrize("counts", [(2, 3), (3, 2), (1, 500), (500, 1), (4, 4, 5), (5, 3, 4)])
def test_files_of_unequal_length_are_counted_to_the_end(tmp_path, block, counts):
    paths = [write(tmp_path, b"x\n" * count, f"file{i}") for i, count in enumerate(counts)]
    found = []
    with pytest.raises(DataError) as error:
        found.extend(read_lines_together(paths))
    others = "".join(f", {path} has {count}" for path, count in zip(paths[1:], counts[1:], strict=True))
    rule = "line i of one belongs to line i of the other; find the line too many"
    assert str(error.value) == f"{paths[0]} has {counts[0]} lines{others}: {rule}"
    assert str(unequal_lengths([("a", 1), ("b", 2)])) == f"a has 1 lines, b has 2: {rule}"
    rows = []
    with pytest.raises(DataError):
        for row in read_lines_together(paths):
            rows.append(row)
    assert rows == [("x",) * len(counts)] * min(counts)


def test_damage_beyond_the_end_of_the_shorter_file_is_told(tmp_path):
    shorter, longer = write(tmp_path, b"a\n", "shorter"), write(tmp_path, b"a\nb\nc\xff\n", "longer")
    for paths in itertools.permutations((shorter, longer)):
        with pytest.raises(DataError, match=r"longer:3: byte 0xff"):
            list(read_lines_together(paths))


def test_reports_add_up_and_read_well():
    report = ReadReport(Path("corpus.txt"))
    assert str(report) == "corpus.txt: 0 lines read, 0 used"
    report.read = 1
    assert str(report) == "corpus.txt: 1 line read, 1 used"
    for number in range(2, 1001):
        report.read = number
        if number % 125 == 17:
            report.skip("empty")
        elif number in (40, 41):
            report.skip("longer than 100 words")
    assert str(report) == (
        "corpus.txt: 1,000 lines read, 990 used, 10 skipped "
        "(8 empty, 2 longer than 100 words; first: corpus.txt:17)"
    )
    assert report.as_dict() == {
        "path": "corpus.txt",
        "read": 1000,
        "used": 990,
        "skipped": {
            "empty": {"count": 8, "first": ["corpus.txt:17", "corpus.txt:142", "corpus.txt:267"]},
            "longer than 100 words": {"count": 2, "first": ["corpus.txt:40", "corpus.txt:41"]},
        },
        "byte_order_marks": 0,
    }
    report.byte_order_marks = 1
    assert str(report).endswith("first: corpus.txt:17); byte order mark taken off")


def test_a_line_is_skipped_once():
    report = ReadReport("f")
    with pytest.raises(ValueError, match="line 0 of f cannot be skipped"):
        report.skip("empty")
    report.read = 3
    report.skip("empty")
    with pytest.raises(ValueError, match="line 3 of f cannot be skipped again"):
        report.skip("too long")
    report.read = 4
    report.skip("too long")
    assert (report.read, report.used, list(report.skipped)) == (4, 2, ["empty", "too long"])


LARGE = """
import resource, sys
from pathlib import Path
from nlpfast.data.lines import read_lines, read_lines_together
from nlpfast.data.characters import read_characters
from nlpfast.data.text import read_text

used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, ((used << 10) + (60 << 20),) * 2)
what, path, cache = sys.argv[1:]
if what == "lines":
    print(sum(1 for _ in read_lines(path)))
elif what == "together":
    print(sum(1 for _ in read_lines_together([path, path])))
elif what == "characters":
    corpus = read_characters(path, cache_dir=cache)
    print(len(corpus.tokens), corpus.source(len(corpus.tokens) - 1).rpartition(":")[2])
else:
    try:
        read_text(path)
    except MemoryError:
        print("too large")
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file of 200 MB, 2,000,000 lines."""
    path = tmp_path_factory.mktemp("large") / "large.txt"
    part = b"".join(b"%06d " % i + b"abcdefgh " * 10 + b"ab\n" for i in range(20_000))
    with path.open("wb") as file:
        for _ in range(100):
            file.write(part)
    assert path.stat().st_size == 200_000_000
    yield path
    path.unlink()


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process's data")
@pytest.mark.parametrize(
    ("what", "printed"),
    [
        ("lines", "2000000"),
        ("together", "2000000"),
        ("characters", "200000000 2000000"),
        ("whole", "too large"),
    ],
)
def test_a_corpus_may_be_larger_than_the_memory_allowed(large, tmp_path, what, printed):
    done = subprocess.run(
        [sys.executable, "-c", LARGE, what, str(large), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == (printed, 0), done.stderr
