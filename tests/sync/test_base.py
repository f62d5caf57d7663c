import pytest

from posttrain.sync.base import SyncError, check_names, check_version, compare

PRINT = {"a": (4, 10), "b": (2, -3), "c": (1, 0)}


def test_equal_fingerprints_pass_also_as_lists():
    compare(PRINT, {k: list(v) for k, v in PRINT.items()}, 3)


@pytest.mark.parametrize("value", [(4, 11), (5, 10)])
def test_every_differing_tensor_is_named(value):
    with pytest.raises(SyncError, match=r"version 3.*1 of 3 tensors differ.*: a \("):
        compare(PRINT, PRINT | {"a": value}, 3)


def test_missing_and_unknown_tensors_are_named():
    with pytest.raises(SyncError, match="1 of the engine's 3 tensors were not in the update: b"):
        check_names({"a", "c"}, PRINT, 1)
    with pytest.raises(SyncError, match="no tensor called z"):
        check_names({*PRINT, "z"}, PRINT, 1)


def test_a_long_list_is_shortened():
    wanted = {f"t{i}" for i in range(30)}
    with pytest.raises(SyncError, match="and 25 more"):
        check_names((), wanted, 1)


def test_versions_never_go_back():
    check_version(4, 4)
    check_version(4, 9)
    with pytest.raises(SyncError, match="version 3 but the engine already holds version 4"):
        check_version(4, 3)
