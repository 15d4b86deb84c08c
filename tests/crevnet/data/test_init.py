import crevnet.data


def test_every_exported_name_exists():
    assert len(set(crevnet.data.__all__)) == len(crevnet.data.__all__)
    assert all(hasattr(crevnet.data, name) for name in crevnet.data.__all__)
