from crevnet.data.errors import DataError


def test_callers_may_catch_it_as_a_value_error():
    assert issubclass(DataError, ValueError)
