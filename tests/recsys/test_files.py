"""Readers of interactions: every number arrives, and every odd line is named."""

from __future__ import annotations

import datetime
import gzip
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_efficient.errors import FileProblem, MissingDependency, UnknownName, WrongArgument
from keras_efficient.recsys import files, read_lists, read_movielens, read_sequences, read_table


def packed(content: bytes) -> bytes:
    """The same bytes at any time: they name tests, and workers must agree on the names."""
    return gzip.compress(content, mtime=0)


@pytest.fixture
def write(tmp_path):
    def to(content: bytes | str, name: str = "data.txt"):
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / name

    return to


@pytest.fixture
def no_careful_reading(monkeypatch):
    def fail(*_):
        raise AssertionError("a good file was read line by line")

    monkeypatch.setattr(files, "_careful_numbers", fail)
    monkeypatch.setattr(files, "_careful_ratings", fail)


def pairs(interactions):
    return list(zip(interactions.users.tolist(), interactions.items.tolist(), strict=True))


def problem(read, path, *arguments, **options):
    with pytest.raises(FileProblem) as caught:
        read(path, *arguments, **options)
    assert caught.value.path == str(path)
    return caught.value.reason


# Lists.

LISTS = "2 7 3\n0 1\n4\n2 9\n"


@pytest.mark.parametrize(
    "content",
    [
        LISTS.encode(),
        LISTS.rstrip().encode(),
        packed(LISTS.encode()),
        LISTS.replace("\n", "\r\n").encode(),
        LISTS.replace(" ", "\t ").encode(),
        b"\xef\xbb\xbf" + LISTS.encode() + b"\n \n",
    ],
    ids=["plain", "no newline at the end", "gzip", "Windows", "tabs", "byte order mark, empty lines at the end"],
)
def test_lists(write, content, no_careful_reading):
    found = read_lists(write(content))
    assert pairs(found) == [(2, 7), (2, 3), (0, 1), (2, 9)]
    assert (found.num_users, found.num_items) == (5, 10)  # user 4 has a line and no items
    assert found.ratings is None
    assert found.times is None


def test_numbers_of_users_and_items_are_those_given(write):
    found = read_lists(write(LISTS), num_users=8, num_items=100)
    assert (found.num_users, found.num_items) == (8, 100)
    assert (found.counts() > 0).nonzero()[0].tolist() == [1, 3, 7, 9]


def test_ids_from_one(write):
    found = read_lists(write("1 1 5\n3 2\n"), first_id=1)
    assert pairs(found) == [(0, 0), (0, 4), (2, 1)]
    assert (found.num_users, found.num_items) == (3, 5)


def test_users_without_any_items(write):
    found = read_lists(write("3\n1\n"))
    assert (len(found), found.num_users, found.num_items) == (0, 4, 0)


def test_duplicates(write):
    path = write("0 5 6 5\n1 5\n0 6\n")
    assert pairs(read_lists(path)) == [(0, 5), (0, 6), (0, 5), (1, 5), (0, 6)]
    assert pairs(read_lists(path, duplicates="drop")) == [(0, 5), (0, 6), (1, 5)]
    assert "line 1, '0 5 6 5': user 0 with item 5" in problem(read_lists, path, duplicates="error")
    assert "line 2, '1 1': user 1 with item 1" in problem(
        read_lists, write("1 1\n1 1\n"), first_id=1, duplicates="error"
    )
    assert len(read_lists(write("0 5 6\n1 5\n"), duplicates="error")) == 3
    with pytest.raises(UnknownName, match="policy"):
        read_lists(path, duplicates="dorp")


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        ("0 1\n5 12 x\n", {}, "line 2, '5 12 x': 'x' is not a whole number"),
        ("0 1\n5 -2\n", {}, "line 2, '5 -2': item -2 is not from 0"),
        ("-1 2\n", {}, "line 1, '-1 2': user -1 is not from 0"),
        ("0 1 9\n1 10 2\n", {"num_items": 10}, "line 2, '1 10 2': item 10 is not from 0 to 9"),
        ("0 1\n3\n", {"num_users": 3}, "line 2, '3': user 3 is not from 0 to 2"),
        ("1 1\n1 0\n", {"first_id": 1}, "line 2, '1 0': item 0 is not from 1"),
        ("0 1\n\n2 3\n", {}, "line 2, '': empty"),
        ("0 1.5\n", {}, "'1.5' is not a whole number"),
        ("0,1\n", {}, "'0,1' is not a whole number"),
        ("0 1_0\n", {}, "'1_0' is not a whole number"),
        ("0 +1\n", {}, "'\\+1' is not a whole number"),
        ("0 ٣\n", {}, "'٣' is not a whole number"),
        (b"0 1\r2 3\n", {}, "is not a whole number"),
        (b"0 1\n0 \xe9\n", {}, "line 2, '0 \ufffd': not UTF-8"),
        ("0 1\n0 1\n".encode("utf-16"), {}, "line 1.*not UTF-8"),
        ("0 1\n0 99999999\n", {}, "line 2, '0 99999999': item 99999999 is far more than 2 ids need"),
        ("2147483645 0\n", {}, "line 1.*user 2147483645 is far more than 1 ids need"),
        (f"0 {2**31 - 1}\n", {}, "item 2147483647 is not from 0 to 2147483646"),
        ("0 " + "9" * 30 + "\n", {}, "too large"),
        ("0 " + "9" * 6000 + "\n", {}, "line 1, '0 9{57}…'.*too large"),
        ("", {}, "is empty"),
        ("\n\n", {}, "is empty"),
        (packed(b"0 1 2\n" * 99)[:-9], {}, "damaged or cut off"),
        (packed(b"")[:3], {}, "damaged or cut off"),
        (packed(b"0 1 2\n" * 99)[:-8] + b"12345678", {}, "damaged or cut off"),
        (packed(b"0 1 2\n" * 99)[:10] + b"\xff" * 20, {}, "damaged or cut off"),
        (b"\x1f\x8bno gzip at all", {}, "damaged or cut off"),
    ],
)
def test_a_bad_file_is_named_with_its_line(write, content, options, reason):
    assert re.search(reason, problem(read_lists, write(content), **options), re.DOTALL)


def test_a_file_that_is_not_there(tmp_path):
    assert "cannot be read: No such file" in problem(read_lists, tmp_path / "missing.txt")
    problem(read_lists, tmp_path)


def test_a_packed_file_that_would_fill_the_memory_is_refused(write, monkeypatch):
    monkeypatch.setattr(files, "_LEAST_UNPACKED", 1000)
    assert len(read_lists(write(packed(b"0 1 2\n" * 99)))) == 198
    assert "holds more than 200 times its size" in problem(read_lists, write(packed(b"0 1 2\n" * 99_999)))


def test_numbers_that_make_no_sense(write):
    for name in ("num_users", "num_items", "first_id"):
        with pytest.raises(WrongArgument, match=name):
            read_lists(write("0 1\n"), **{name: -1})


def test_the_largest_id(write):
    found = read_lists(write(f"0 {2**31 - 2}\n0 {'1'.zfill(40)}\n"), num_items=2**31 - 1)
    assert found.items.tolist() == [2**31 - 2, 1]
    assert found.num_items == 2**31 - 1


def outcome(read, path, **options):
    try:
        found = read(path, **options)
    except FileProblem as error:
        return error.reason
    arrays = (None if a is None else a.tolist() for a in (found.users, found.items, found.ratings, found.times))
    return (*arrays, found.num_users, found.num_items)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123 \t\n\r-x", max_size=25), st.integers(1, 12))
def test_reading_at_once_and_by_line_is_the_same(tmp_path_factory, content, piece):
    path = tmp_path_factory.getbasetemp() / "lists.txt"
    path.write_bytes(content.encode())
    expected = outcome(read_lists, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_PIECE", piece)
        assert outcome(read_lists, path) == expected
        patch.setattr(files, "_quick_numbers", lambda *_: None)
        assert outcome(read_lists, path) == expected


# Sequences.


def test_sequences(write):
    found = read_sequences(write("2 9 3 9\n1 4\n2 1\n"))
    assert pairs(found) == [(1, 8), (1, 2), (1, 8), (0, 3), (1, 0)]
    assert found.times.tolist() == [0, 1, 2, 0, 3]
    assert (found.num_users, found.num_items) == (2, 9)
    assert "line 1, '0 4': user 0 is not from 1" in problem(read_sequences, write("0 4\n"))
    assert read_sequences(write("0 4\n"), first_id=0).items.tolist() == [4]


# MovieLens.

RATED = [(1, 3, 4.0, 881250949), (2, 1, 3.5, 881250950), (1, 1, 0.5, 12)]


def movielens(separator, header="", ratings=RATED):
    return header + "".join(separator.join(map(str, row)) + "\n" for row in ratings)


@pytest.mark.parametrize(
    "content",
    [
        movielens("\t"),
        movielens("::"),
        movielens(","),
        movielens(",", "userId,movieId,rating,timestamp\n"),
        movielens(",", "userId,movieId,rating,timestamp\n").replace("\n", "\r\n"),
        packed(movielens("\t").encode()),
    ],
    ids=["u.data", "ratings.dat", "no header", "ratings.csv", "Windows", "gzip"],
)
@pytest.mark.parametrize("piece", [1, 2**24])
def test_movielens(write, content, piece, monkeypatch, no_careful_reading):
    monkeypatch.setattr(files, "_PIECE", piece)
    found = read_movielens(write(content))
    assert pairs(found) == [(0, 2), (1, 0), (0, 0)]
    assert found.ratings.tolist() == [4.0, 3.5, 0.5]
    assert found.times.tolist() == [881250949, 881250950, 12]
    assert (found.num_users, found.num_items) == (2, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("1\t2\t3\t4\n1\t2\t\t4\n", r"line 2, '1\\t2\\t\\t4': '' is not a rating"),
        ("1\t2\t3\t4\n1\t\t2\t3\t4\n", "line 2.*not four fields"),
        ("1\t2\t3\n", "not four fields"),
        ("1\t2\t3\t4\t5\n", "not four fields"),
        ("1\t2\t3\n4\n", "line 1.*not four fields"),
        ("1\t2\t3\t4\n\n1\t2\t3\t4\n", "line 2, '': not four fields"),
        ("1\t2\tx\t4\n", "'x' is not a rating"),
        ("1\t2\tnan\t4\n", "'nan' is not a rating"),
        ("1\t2\t1.2.3\t4\n", "'1.2.3' is not a rating"),
        (f"1\t2\t{'9' * 60}\t4\n", "is not a rating"),
        ("1\t2.5\t3\t4\n", "'2.5' is not a whole number"),
        ("1::2::3::4.5\n", "line 1, '1::2::3::4.5': '4.5' is not a whole number"),
        ("userId,movieId,rating,timestamp\n1,2,3,4\n0,2,3,4\n", "line 3, '0,2,3,4': user 0 is not from 1"),
        ("1,-2,3,4\n", "item -2 is not from 1"),
        (f"1,{2**31},3,4\n", "item 2147483648 is not from 1 to 2147483647"),
        ("user,item,rating,time\n1,2,3,4\n", "line 1, 'user,item,rating,time': 'rating' is not a rating"),
        ("userId,movieId,rating,timestamp\n", "header and no ratings"),
        ("1 2 3 4\n", "line 1, '1 2 3 4': neither tabs"),
        ("", "is empty"),
        (packed(movielens("\t").encode())[:-4], "damaged or cut off"),
    ],
)
def test_bad_ratings_are_named_with_their_line(write, content, reason):
    assert re.search(reason, problem(read_movielens, write(content)))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text(alphabet="012.\t-x ", max_size=10) | st.just("1\t2\t3.5\t4"), min_size=1, max_size=4),
    st.integers(1, 12),
)
def test_reading_ratings_at_once_and_by_line_is_the_same(tmp_path_factory, lines, piece):
    path = tmp_path_factory.getbasetemp() / "ratings.txt"
    path.write_text("\n".join(["1\t2\t3\t4", *lines]))
    expected = outcome(read_movielens, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_PIECE", piece)
        assert outcome(read_movielens, path) == expected
        patch.setattr(files, "_quick_ratings", lambda *_: None)
        assert outcome(read_movielens, path) == expected


# Tables.

COLUMNS = {"user": "who", "item": "what", "rating": "stars", "time": "when"}
CSV = "who,other,what,stars,when\nann,,x,1,5\nbob,,y,2.5,6\nbob,,x,3,7\n"


def check_table(found, users, items):
    interactions, user_names, item_names = found
    assert user_names.tolist() == users
    assert item_names.tolist() == items
    assert pairs(interactions) == [(1, 0), (0, 1), (0, 0)]
    assert interactions.ratings.tolist() == [1.0, 2.5, 3.0]
    assert (interactions.num_users, interactions.num_items) == (2, 2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", CSV),
        ("a.csv.gz", packed(CSV.encode())),
        ("a.tsv", CSV.replace(",", "\t")),
        ("a.csv", "\ufeff" + CSV.replace("\n", "\r\n")),
        ("a.csv", CSV.replace("ann", '"ann"')),
    ],
)
def test_csv(write, name, content):
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    found = read_table(write(content, name), **COLUMNS)
    check_table(found, ["bob", "ann"], ["x", "y"])
    assert found[0].times.tolist() == [5, 6, 7]
    assert read_table(write(content, name), "who", "what")[0].ratings is None


def test_text_and_numbers_as_ids_in_csv(write):
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")

    def users(*ids):
        return read_table(write("u,i\n" + "".join(f"{u},1\n" for u in ids)), "u", "i")[1]

    assert users("7", "-3", "7").tolist() == [7, -3]
    assert users("007", "7").tolist() == ["007", "7"]
    assert users("7", '"a,b\nc"').tolist() == ["7", "a,b\nc"]
    assert users("1" * 30, "1").tolist() == ["1" * 30, "1"]


def test_dates_in_csv(write):
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    path = write("u,i,t\n1,1,1970-01-01\n1,2,1970-01-01 00:00:01\n")
    assert read_table(path, "u", "i", time="t")[0].times.tolist() == [0, 1_000_000]


def parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("when", [[5, 6, 7], [5.0, 6.0, 7.0], [datetime.date(1970, 1, day) for day in (1, 2, 3)]])
def test_parquet(tmp_path, when):
    path = parquet(tmp_path / "a", who=[30, 10, 10], what=["x", "y", "x"], stars=[1, 2.5, 3], when=when)
    found = read_table(path, **COLUMNS)
    check_table(found, [10, 30], ["x", "y"])
    assert (np.diff(found[0].times) > 0).all()


def test_parquet_of_categories(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    who = pyarrow.array(["ann", "bob", "bob"]).dictionary_encode()
    check_table(
        read_table(parquet(tmp_path / "a", who=who, what=[7, 8, 7], stars=[1, 2.5, 3], when=[5, 6, 7]), **COLUMNS),
        ["bob", "ann"],
        [7, 8],
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (CSV.replace("bob,,y", ",,y"), "row 3: who is missing"),
        (CSV.replace("x,3", ",3"), "row 4: what is missing"),
        (CSV.replace("2.5", "good"), "row 3: stars is 'good', not a number"),
        (CSV.replace("2.5", ""), "row 3: stars is '', not a number"),
        (CSV.replace("2.5", "inf"), "row 3: stars is inf, it must be finite"),
        (CSV.replace("2.5", "1e39"), "row 3: stars is 1e\\+39, it must be finite"),
        (CSV.replace(",6", ",6.5"), "row 3: when is '6.5', not a whole number or a date"),
        (CSV.replace(",6", ",2020-01-01"), "'when' holds numbers and dates"),
        (CSV.replace("2.5,6", "2.5"), "Row #3: Expected 5 columns, got 4: bob,,y,2.5"),
        (CSV.replace("other", "what"), "2 columns 'what'"),
        (CSV.encode().replace(b"ann", b"\xff"), "UTF8"),
        ("who,what,stars,when\n", "no rows"),
        ("", "Empty CSV"),
        (b"PAR1 and nothing", "cannot be read as a table"),
        (packed(CSV.encode())[:-5], "damaged or cut off"),
    ],
)
def test_a_bad_table_is_named_with_its_row(write, content, reason):
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    assert re.search(reason, problem(read_table, write(content, "a.csv"), **COLUMNS))


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"who": [1, None]}, "row 2: who is missing"),
        ({"who": ["a", ""]}, "row 2: who is missing"),
        ({"who": [1.0, 2.0]}, "'who' holds double"),
        ({"stars": [1, None]}, "row 2: stars is missing"),
        ({"when": [1, None]}, "row 2: when is missing"),
        ({"when": [1.0, 1.5]}, "row 2: when is 1.5"),
    ],
)
def test_a_bad_parquet_file_is_named_with_its_row(tmp_path, columns, reason):
    good = {"who": [1, 2], "what": [1, 2], "stars": [1, 2], "when": [1, 2]}
    assert re.search(reason, problem(read_table, parquet(tmp_path / "a", **{**good, **columns}), **COLUMNS))


def test_columns_that_are_not_there(write, tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    for path in (write(CSV, "a.csv"), parquet(tmp_path / "b", who=[1], what=[1])):
        with pytest.raises(UnknownName, match="whom") as caught:
            read_table(path, "whom", "what")
        assert caught.value.nearest == "who"
    with pytest.raises(WrongArgument, match="two things"):
        read_table(write(CSV, "a.csv"), "who", "who")


def test_pyarrow_is_asked_for(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r"keras-efficient\[recsys\]"):
        read_table(write(CSV, "a.csv"), **COLUMNS)


# Real data.


@pytest.fixture
def recsys_dir(data_dir):
    if not (data_dir / "recsys").is_dir():
        pytest.skip(f"needs the recommenders' data (looked in {data_dir / 'recsys'})")
    return data_dir / "recsys"


def test_gowalla(recsys_dir, no_careful_reading):
    sizes = {"num_users": 29_858, "num_items": 40_981, "duplicates": "error"}
    train, valid, test = (
        read_lists(recsys_dir / f"gowalla/{part}.txt.gz", **sizes) for part in ("train", "valid", "test")
    )
    assert (len(train), len(valid), len(test)) == (810_128, 91_047, 217_242)
    # Read again in the simplest way.
    with gzip.open(recsys_dir / "gowalla/test.txt.gz", "rt") as lines:
        expected = [(int(user), int(item)) for user, *items in map(str.split, lines) for item in items]
    assert pairs(test) == expected


def test_amazon_sequences(recsys_dir, no_careful_reading):
    found = read_sequences(recsys_dir / "amazon-games/sequences.txt.gz")
    assert (len(found), found.num_users, found.num_items) == (287_107, 31_013, 23_715)


def test_movielens_100k(recsys_dir, no_careful_reading):
    found = read_movielens(recsys_dir / "ml-100k/ratings.tsv.gz")
    assert (len(found), found.num_users, found.num_items) == (100_000, 943, 1_682)
    assert (found.users[0], found.items[0], found.ratings[0], found.times[0]) == (195, 241, 3, 881250949)
    assert found.ratings.mean() == pytest.approx(3.52986)  # as the data set's README has it
    assert (found.counts() > 0).all()
