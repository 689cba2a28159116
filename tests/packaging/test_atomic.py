"""Temporary names and links; what else `replacing` promises is tested where pictures are written."""

from keras_efficient.atomic import replacing


def test_two_writers_of_names_that_begin_alike_do_not_meet(tmp_path):
    names = [tmp_path / f"{'a' * 120}{number}.bin" for number in range(2)]
    with replacing(names[0]) as one, replacing(names[1]) as two:
        one.write_bytes(b"1")
        two.write_bytes(b"2")
    assert [name.read_bytes() for name in names] == [b"1", b"2"]


def test_a_symbolic_link_stays_one(tmp_path):
    real, link = tmp_path / "real.bin", tmp_path / "link.bin"
    real.write_bytes(b"old")
    link.symlink_to(real)
    with replacing(link, overwrite=True) as temporary:
        temporary.write_bytes(b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
